"""A seal against our log: was it entered, is it the newest, was a later one deleted, is there a second one.

Step 3 of verify.py. A seal proves that these bytes were sealed once. Only the log tells that they are the ones that
should lie here now: not an older checkpoint put back (E6), another run's (E7), with later ones deleted (E8), nor one of
two seals for one step, or of one content for two steps (E10).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from trainguard.errors import VerificationError
from trainguard.finding import Finding, Subject
from trainguard.log import TreeHead
from trainguard.log.note import Verifier
from trainguard.seal.bundle import Bundle, Seal
from trainguard.seal.case import Case
from trainguard.seal.ledger import RUN, Ledger, SealLeaf, verify_entry
from trainguard.seal.manifest import SINGLE
from trainguard.seal.report import LOGGED, NEWEST, SIGNER
from trainguard.seal.signers import When, judge, witnessed_at
from trainguard.seal.tensors import is_training_state

NEWEST_NAMES = frozenset({"latest", "last", "current", "newest", "final"})
"""A link so named is meant to lead to the newest checkpoint of a run."""
_CALLED_LIMIT = 3
TIME_DIGITS = 20
"""Of nanoseconds since the epoch: up to the year 5138."""


def check_logged(case: Case, bundle: Bundle, seal: Seal, verifier: Verifier | None, *, required: bool) -> None:
    """Is the seal in the log it was entered in, and does that log still hold all it held then.

    verifier: key of the log that the bundle's own proof is checked with. required: not to have a log is not to know.
    """
    case.leaf = case.ledger.find(seal.payload_digest) if case.ledger is not None else None
    head = _proved(case, bundle, verifier)
    if case.broken:
        return
    if case.ledger is None:
        _without_log(case, bundle, head, required=required)
    elif head is not None and not case.ledger.extends(head):
        case.say(
            "violated",
            ("E6", "E8"),
            "the log no longer holds what it held when this was sealed: it was cut, put back or forked",
            expected=f"a log that extends {head.origin} at {head.size} entries",
            found=f"{case.ledger.head.size} entries",
        )
    elif case.leaf is not None and head is not None:
        case.checked.append(LOGGED)
    elif seal.complete:
        _never_entered(case, case.ledger)
    else:
        case.blocking = case.blocking or required
        case.say("not_checked", (), "another tool's seal: it is in no log of ours, so whether it is the newest is open")


def _proved(case: Case, bundle: Bundle, verifier: Verifier | None) -> TreeHead | None:
    """The tree head under which the bundle's own proof holds; None where there is no proof or no key for it."""
    if bundle.entry is None or verifier is None:
        return None
    try:
        return verify_entry(bundle, case.public, verifier, where=case.seal_file.name)
    except VerificationError as error:
        case.say("violated", ("E10",), f"the seal's log entry does not hold: {error}")
        return None


def _without_log(case: Case, bundle: Bundle, head: TreeHead | None, *, required: bool) -> None:
    case.blocking = case.blocking or required
    if head is not None:
        case.checked.append(LOGGED)
        case.say("not_checked", (), "whether this is the newest seal was not checked: the log itself is not here")
        return
    why = "the seal has no log entry" if bundle.entry is None else "there is no log here and no --log-key"
    case.say("not_checked", (), f"whether the seal was logged and is the newest was not checked: {why}")


def _never_entered(case: Case, ledger: Ledger) -> None:
    if case.leaf is not None:
        message, expected, found = "the seal file has lost its log entry", case.leaf.called, "no log entry in it"
    else:
        message = "signed with the expected key but never entered in the log: the key was used behind its back"
        expected, found = f"an entry in {ledger.head.origin}", f"none among {ledger.head.size}"
    case.say("violated", ("E10",), message, expected=expected, found=found)


def check_signer(case: Case, seal: Seal, bundle: Bundle | None) -> None:
    """E10: was the key good when it sealed this, by the trust file. Without one there is nothing to ask."""
    signer = case.trust.find(seal.signer) if case.trust is not None else None
    if signer is None:
        return
    case.signed_by = signer.name
    doubt = judge(signer, _when(case, bundle))
    if doubt is None:
        case.checked.append(SIGNER)
        return
    case.blocking = case.blocking or doubt.outcome == "not_checked"
    case.say(doubt.outcome, ("E10",), doubt.message, expected=doubt.expected, found=doubt.found)


def _when(case: Case, bundle: Bundle | None) -> When:
    """What is known of when the seal was made: by its witnesses, by our log, by entries before it."""
    witnesses = case.trust.witnesses if case.trust is not None else ()
    proved = LOGGED in case.checked and bundle is not None and bundle.entry is not None
    witnessed = witnessed_at(bundle.entry.note, witnesses) if proved and bundle and bundle.entry else None
    leaf, ledger = case.leaf, case.ledger
    earlier = [_seconds(s) for s in ledger.seals if s.leaf < leaf.leaf] if ledger is not None and leaf else []
    return When(
        existed_by=min(time.time(), witnessed) if witnessed is not None else time.time(),
        witnessed=witnessed is not None,
        said=_seconds(leaf) if leaf is not None else None,
        not_earlier=max((at for at in earlier if at is not None), default=None),
    )


def _seconds(leaf: SealLeaf) -> float | None:
    """When its entry says it was sealed; None where it says nothing that could be a time."""
    text = leaf.sealed_at
    return int(text) / 1e9 if text.isascii() and text.isdigit() and len(text) <= TIME_DIGITS else None


def check_run(case: Case, seal: Seal, run: str | None) -> None:
    """E7: the checkpoint must be of the run that was asked for."""
    if run is None or seal.facts.run == run:
        return
    case.say(
        "violated",
        ("E7",),
        "sealed for another run",
        expected=f"run {run}",
        found=f"run {seal.facts.run}" if seal.facts.run else "no run",
    )


def check_newest(case: Case, seal: Seal, *, must: bool) -> None:
    """Is this the checkpoint that should lie here. must: it has to be the newest of its run."""
    if seal.facts.live == "differs":
        case.findings.append(live_differs(seal, case.place.name))
    if case.ledger is None or case.leaf is None:
        return
    before = len(case.findings)
    _check_place(case, case.ledger, case.leaf)
    _check_later(case, case.ledger, case.leaf, must=must)
    case.findings.extend(collisions(seal, case.leaf.place, case.leaf.source, case.ledger.seals))
    if len(case.findings) == before:
        case.checked.append(NEWEST)


def means_newest(path: Path) -> bool:
    """Whether `path` is a link whose name promises the newest checkpoint."""
    return path.is_symlink() and path.name.split(".")[0].lower() in NEWEST_NAMES


def _check_place(case: Case, ledger: Ledger, leaf: SealLeaf) -> None:
    """What the log says was last sealed at this path."""
    here = ledger.newest(place=str(case.place))
    if here is None or (here.root, here.dir_hash) == (leaf.root, leaf.dir_hash):
        return
    if here.run == leaf.run:
        techniques: tuple[str, ...] = ("E6",)
        message = "an older seal was put back: the log has a later one for this path"
        if here.leaf < leaf.leaf:
            techniques, message = ("E7",), "another checkpoint of the run was put here"
    else:
        techniques, message = ("E7", "E6"), "another run's checkpoint was put here"
    case.say(
        "violated",
        techniques,
        message,
        expected=here.called,
        found=leaf.called,
        cites=(here.citation, leaf.citation),
    )


def _check_later(case: Case, ledger: Ledger, leaf: SealLeaf, *, must: bool) -> None:
    """Later checkpoints of the same run: one that should be here instead, or that are gone."""
    later = [seal for seal in ledger.of_run(leaf.run) if seal.leaf > leaf.leaf and (seal.step or 0) > (leaf.step or 0)]
    if not later:
        return
    if must:
        case.say(
            "violated",
            ("E6",),
            "not the newest checkpoint of its run",
            expected=later[-1].called,
            found=leaf.called,
            cites=(later[-1].citation, leaf.citation),
        )
    here = str(case.place)
    gone = [seal for seal in later if seal.place != here and not os.path.lexists(seal.place)]
    kept = [seal for seal in later if seal.place != here and os.path.lexists(seal.place)]
    if not gone or kept or here not in {leaf.place, *(seal.place for seal in later)}:
        return
    message = f"every later checkpoint of the run is gone: {_listed([seal.called for seal in gone])}"
    certain = must or case.broken
    if not certain and all(seal.source == RUN for seal in gone):
        # What a run saved it may also have deleted: retention that keeps the best looks just so.
        case.notes.append(message)
        return
    case.say(
        "violated" if certain else "suspicious",
        ("E8", "E6"),
        message,
        expected=f"files of {len(gone)} later seals that the log has",
        found="none of them on the disk",
        cites=tuple(seal.citation for seal in gone[-20:]),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _CALLED_LIMIT} more" if len(names) > _CALLED_LIMIT else ""
    return ", ".join(names[-_CALLED_LIMIT:]) + more


def live_differs(seal: Seal, name: str) -> Finding:
    """E9: the file is not what was written."""
    return Finding(
        check="seal",
        outcome="violated",
        techniques=("E9",),
        subject=Subject(run=seal.facts.run, step=seal.facts.step, path=name),
        message=f"{name} is not what was written when it was saved: the digest taken while writing differs",
        expected="the bytes that were written",
        found=f"root {seal.root}",
    )


def collisions(seal: Seal, place: str, source: str, seals: tuple[SealLeaf, ...]) -> Iterator[Finding]:
    """Seals of the same run that cannot both be right: two contents for one step, one content for two steps.

    Only where someone sealed by hand: a run may itself save twice in a step, or save what it does not train. Even then
    both have honest causes (a step done again after a restart), so they are suspicious.
    """
    run, step = seal.facts.run, seal.facts.step
    if run is None or step is None:
        return
    others = [o for o in seals if o.run == run and o.step is not None and o.payload != seal.payload_digest]
    last_saved = [o for o in others if (o.step, o.place, o.source) == (step, place, RUN)][-1:]
    weights = _holds_weights(seal)
    for other in others:
        if source == RUN == other.source:
            continue
        same = (other.root, other.dir_hash) == (seal.root, seal.dir_hash)
        superseded = other.source == RUN and other not in last_saved
        if (other.step, other.place) == (step, place) and not same and not superseded:
            message = f"two different contents were sealed for step {step} of run {run} at the same place"
            yield _collision(seal, other, ("E10",), message, f"root {other.root} ({other.called})")
        elif other.step != step and other.root == seal.root and weights:
            message = f"the same bytes are sealed for step {other.step} and for step {step} of run {run}"
            yield _collision(seal, other, ("E6", "E10"), message, "another content than " + other.called)


def _holds_weights(seal: Seal) -> bool:
    """Whether any tensor in it is expected to change from step to step: RNG state need not."""
    files = ((seal.name if name == SINGLE else name, entry) for name, entry in seal.entries.items())
    return any(not is_training_state(tensor, file) for file, entry in files for tensor in entry.tensors or ())


def _collision(seal: Seal, other: SealLeaf, techniques: tuple[str, ...], message: str, expected: str) -> Finding:
    return Finding(
        check="seal",
        outcome="suspicious",
        techniques=techniques,
        subject=Subject(run=seal.facts.run, step=seal.facts.step, path=seal.name),
        message=message,
        expected=expected,
        found=f"root {seal.root}",
        evidence=(other.citation,),
    )
