"""How to go on: the last checkpoint before anything was wrong, what came after it, and the command that resumes.

    plan = plan_recovery(home, run)
    plan.checkpoint, plan.later, plan.command
    moved = quarantine(plan)

Nothing is deleted. What came after the first bad step is moved into a folder beside it, with a note of what was moved,
why and by which account, so that it remains evidence.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from trainguard.appraise.judge import judge_run, maintained
from trainguard.appraise.verdict import Verdict, Word
from trainguard.archive import LogLeaves, RunReader
from trainguard.envelope import load_public_key
from trainguard.errors import Misuse, TrainguardError, Unavailable
from trainguard.home import Home
from trainguard.incident.graph import RANK
from trainguard.incident.lineage import Lineage, checkpoint_key, read_lineage
from trainguard.seal.ledger import SealLeaf, read_ledger
from trainguard.seal.verify import verify_seal
from trainguard.veil import MAINTENANCE

SCHEMA = "trainguard/recover/v1"
QUARANTINE = "quarantine"
NOTE = "QUARANTINE.json"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One sealed checkpoint of the run, as it stands now."""

    place: str
    step: int | None
    leaf: int
    root: str
    word: Word
    """Of the run up to its step and all it was made from."""
    intact: Literal["yes", "no", "gone"]
    """Whether the sealed bytes still lie there."""
    why: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `trainguard recover`."""

    schema: str = SCHEMA
    run: str
    verdict: Word
    first_bad_step: int | None
    """Earliest step of a finding that counts; None where it concerns the run from its start, or nothing was found."""
    reason: str = ""
    """That finding."""
    checkpoint: Candidate | None = None
    """The newest one to go on from; None where there is none."""
    later: tuple[Candidate, ...] = ()
    """Sealed after it: to be quarantined."""
    passed_over: tuple[Candidate, ...] = ()
    """Earlier than the first bad step but not usable, with the reason."""
    command: tuple[str, ...] = ()
    """Resumes from `checkpoint`, as far as the log can tell how."""
    command_from: str = ""
    """Where the command comes from."""

    @property
    def exit_status(self) -> int:
        """0 there is a way on, 3 there is none."""
        return 0 if self.checkpoint is not None else 3


def plan_recovery(home: Home, run: str) -> Plan:
    """Where `run` can go on from. Reads the bytes of the checkpoints it considers.

    A checkpoint is taken when the run up to its step is not worse than it was without the findings, and its bytes are
    those that were sealed. Raises Misuse where the run saved nothing.
    """
    plan = _planned(home, run)
    return _blurred(plan, judge_run(home, run)) if maintained(home) else plan


def _blurred(plan: Plan, shown: Verdict) -> Plan:
    """The plan as this machine shows it: where to go on from is what it is, why is not said."""

    def quiet(one: Candidate) -> Candidate:
        return (
            msgspec.structs.replace(one, word="UNKNOWN", why=MAINTENANCE) if RANK[one.word] >= RANK["SUSPECT"] else one
        )

    return msgspec.structs.replace(
        plan,
        verdict=shown.verdict,
        first_bad_step=first_bad_step(shown),
        reason=MAINTENANCE,
        later=tuple(map(quiet, plan.later)),
        passed_over=tuple(map(quiet, plan.passed_over)),
    )


def _planned(home: Home, run: str) -> Plan:
    lineage = read_lineage(home, lifted=True)
    verdict = lineage.verdicts.get(run)
    if verdict is None:
        raise Misuse(f"run {run!r}: the log holds no statement of this run", next_step="trainguard runs")
    seals = [seal for seal in lineage.seals if seal.run == run]
    if not seals:
        raise Misuse(f"run {run}: nothing it saved was sealed, so there is nothing to go on from")
    bad = first_bad_step(verdict)
    reason = next((f"{f.check}: {f.message}" for f in verdict.findings if f.outcome != "not_checked"), "")
    looked_at = [_candidate(home, lineage, seal) for seal in _newest_of_each(seals)]
    usable = [c for c in looked_at if c.intact == "yes" and RANK[c.word] < RANK["SUSPECT"]]
    chosen = max(usable, key=_order, default=None)
    after = _order(chosen) if chosen is not None else (-1, -1)
    begin = RunReader(home, run).begin or {}
    command, source = _resume_command(home, lineage, begin.get("command"), chosen)
    return Plan(
        run=run,
        verdict=verdict.verdict,
        first_bad_step=bad,
        reason=reason,
        checkpoint=chosen,
        later=tuple(c for c in looked_at if _order(c) > after and RANK[c.word] >= RANK["SUSPECT"]),
        passed_over=tuple(c for c in looked_at if c is not chosen and RANK[c.word] < RANK["SUSPECT"] and c.why),
        command=command,
        command_from=source,
    )


def first_bad_step(verdict: Verdict) -> int | None:
    """The earliest step of a violated or suspicious finding; None where one has no step, or there is none."""
    steps = [f.subject.step for f in verdict.findings if f.outcome != "not_checked"]
    numbered = [step for step in steps if step is not None]
    return min(numbered) if numbered and len(numbered) == len(steps) else None


def _order(candidate: Candidate) -> tuple[int, int]:
    return (candidate.step if candidate.step is not None else -1, candidate.leaf)


def _newest_of_each(seals: Sequence[SealLeaf]) -> list[SealLeaf]:
    """The last seal of every place: an earlier one of the same place was written over."""
    return list({seal.place: seal for seal in seals}.values())


def _candidate(home: Home, lineage: Lineage, seal: SealLeaf) -> Candidate:
    standing = lineage.standing_of(checkpoint_key(seal.root))
    intact, why = _still_there(home, Path(seal.place))
    if RANK[standing.word] >= RANK["SUSPECT"]:
        why = "; ".join(lineage.reasons(standing))
    return Candidate(
        place=seal.place, step=seal.step, leaf=seal.leaf, root=seal.root, word=standing.word, intact=intact, why=why
    )


def _still_there(home: Home, place: Path) -> tuple[Literal["yes", "no", "gone"], str]:
    try:
        report = verify_seal(place, home=home)
    except TrainguardError as error:
        return ("gone" if not os.path.lexists(place) else "no"), str(error)
    broken = [finding for finding in report.findings if finding.outcome == "violated"]
    if not broken:
        return "yes", ""
    return ("gone" if not os.path.lexists(place) else "no"), broken[0].message


def _resume_command(
    home: Home, lineage: Lineage, command: object, chosen: Candidate | None
) -> tuple[tuple[str, ...], str]:
    """A command that this log has seen resume from a checkpoint of the same folder; else the run's own, as it was."""
    if chosen is None:
        return (), ""
    folder = Path(chosen.place).parent
    leaves = LogLeaves(home)
    for run in reversed(list(leaves.runs)):
        begin = leaves.runs[run]
        words = _words(begin.get("command"))
        resumed = [s for s in lineage.seals if s.run != run and _made_from(lineage, run, s) and _beside(s, folder)]
        if resumed and words:
            swapped = tuple(_swap(word, {seal.place for seal in resumed}, chosen.place) for word in words)
            return swapped, f"as run {run} resumed from {Path(resumed[-1].place).name}"
    return _words(command), "the run's own command: add how this script resumes from a checkpoint"


def _made_from(lineage: Lineage, run: str, seal: SealLeaf) -> bool:
    return any(edge.target == f"start:{run}" for edge in lineage.graph.made_with(checkpoint_key(seal.root)))


def _beside(seal: SealLeaf, folder: Path) -> bool:
    return Path(seal.place).parent == folder


def _swap(word: str, places: set[str], chosen: str) -> str:
    """`word` with a path to one of `places` replaced by the chosen one, by file name."""
    for place in places:
        name = Path(place).name
        if word in (place, name) or word.endswith("/" + name):
            return chosen
    return word


def _words(value: object) -> tuple[str, ...]:
    return tuple(str(word) for word in value) if isinstance(value, list) else ()


# -- the resumed run against one that was never attacked --------------------------------------------------------------


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """The last checkpoints of two runs, tensor by tensor, from their seals."""

    resumed: str
    reference: str
    resumed_checkpoint: str
    reference_checkpoint: str
    tensors: int
    """Compared by name."""
    differing: tuple[str, ...] = ()
    """Tensors that differ, or that only one of them has; at most 100."""
    differing_more: int = 0

    @property
    def equal(self) -> bool:
        """Bit for bit, and something was compared."""
        return bool(self.tensors) and not self.differing

    @property
    def exit_status(self) -> int:
        """0 equal, 1 different, 3 nothing could be compared."""
        return 0 if self.equal else 1 if self.tensors else 3


DIFFERING_LIMIT = 100


def compare_ends(home: Home, resumed: str, reference: str) -> Ends:
    """Whether two runs end in the same weights and state, by the tensor digests of what they sealed last.

    Raises Misuse where one of them sealed nothing, Unavailable where a seal names no tensors.
    """
    a, b = _last_seal(home, resumed), _last_seal(home, reference)
    first, second = _tensors(home, a), _tensors(home, b)
    names = first.keys() | second.keys()
    differing = sorted(name for name in names if first.get(name) != second.get(name))
    return Ends(
        resumed=resumed,
        reference=reference,
        resumed_checkpoint=a.place,
        reference_checkpoint=b.place,
        tensors=len(names),
        differing=tuple(differing[:DIFFERING_LIMIT]),
        differing_more=max(0, len(differing) - DIFFERING_LIMIT),
    )


def _last_seal(home: Home, run: str) -> SealLeaf:
    ledger = read_ledger(home, load_public_key(home.keys / "attestation.pub"))
    seal = ledger.newest(run=run) if ledger is not None else None
    if seal is None:
        raise Misuse(f"run {run}: nothing it saved was sealed, so its end cannot be compared")
    return seal


def _tensors(home: Home, leaf: SealLeaf) -> dict[str, str]:
    """Tensor → digest, over all files of the sealed checkpoint."""
    key = load_public_key(home.keys / "attestation.pub")
    ledger = read_ledger(home, key)
    seal = ledger.kept(leaf, key) if ledger is not None else None
    if seal is None:
        raise Unavailable(f"{leaf.called}: our copy of the seal is gone or was touched")
    found = {
        f"{entry.name}:{name}" if not seal.single else name: digest
        for entry in seal.entries.values()
        for name, digest in (entry.tensors or {}).items()
    }
    if not found:
        raise Unavailable(
            f"{leaf.called}: the seal names no tensors: its files are of a format that tensors are not placed in",
            next_step="compare the files with: trainguard diff",
        )
    return found


# -- quarantine -------------------------------------------------------------------------------------------------------


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint set aside."""

    place: str
    to: str


def quarantine(plan: Plan) -> tuple[Moved, ...]:
    """Move every checkpoint of `plan.later` into `quarantine/<run>` of its folder, and leave a note beside it.

    Moves within one file system, so a crash leaves each either here or there. Raises Unavailable where a move fails;
    what was moved before stays moved, and running it again goes on.
    """
    moved: list[Moved] = []
    for candidate in plan.later:
        place = Path(candidate.place)
        if not os.path.lexists(place):
            continue
        folder = place.parent / QUARANTINE / plan.run
        target = _free(folder / place.name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place.rename(target)
        except OSError as error:
            raise Unavailable(
                f"{place}: cannot be set aside: {error.strerror}", next_step=f"move it to {folder} by hand"
            ) from error
        moved.append(Moved(place=str(place), to=str(target)))
        _note(folder, plan, candidate, target)
    return tuple(moved)


def _free(path: Path) -> Path:
    """`path`, or the first of `path.1`, `path.2`, … that does not exist: nothing set aside earlier is overwritten."""
    number = 0
    candidate = path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def _note(folder: Path, plan: Plan, candidate: Candidate, target: Path) -> None:
    line = {
        "moved": target.name,
        "from": candidate.place,
        "run": plan.run,
        "step": candidate.step,
        "root": candidate.root,
        "leaf": candidate.leaf,
        "verdict": candidate.word,
        "why": candidate.why,
        "account": os.getuid(),
        "at": str(time.time_ns()),
    }
    with (folder / NOTE).open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")


def shell(command: Sequence[str]) -> str:
    """The command as one line for a shell."""
    return shlex.join(command)
