"""Was a source used? Answered from the log for a run or a checkpoint, with the rows it rests on (spec/data.md).

    answer = ask(home, source="acme", run="r2")
    answer.answer        not_used, used or cannot_tell
    signed = sign_answer(home, answer)               # a DSSE statement `data-use/v1`, logged; anyone can check it
    verify_answer(signed, [public_key])

*Used* needs a record: a process of the run read that content, and where the order of batches is committed, which steps
and rows. *Not used* needs more: a lock, a run that nothing speaks against, and every content it read accounted for.
All else is *cannot tell*, with every reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.appraise.verdict import Level, Verdict, Word, until
from trainguard.archive import LogLeaves, RunReader
from trainguard.digest import canonical_json, sha256_hex
from trainguard.envelope import (
    PREDICATE_BASE,
    load_or_create_key,
    load_public_key,
    sign_statement,
    statement,
    verify_statement,
)
from trainguard.errors import MalformedEvidence, Misuse, VerificationError
from trainguard.finding import Citation
from trainguard.home import Home
from trainguard.incident.lineage import Lineage, checkpoint_key, read_lineage, root_of, run_key
from trainguard.log import Log, LogReader
from trainguard.seal.ledger import read_ledger
from trainguard.sources.register import Entry, Register, Source, read_register
from trainguard.sources.use import Content, Draw, Scope, Use, native_reason, read_use

SCHEMA = "trainguard/data-use/v1"
PREDICATE = "data-use/v1"
ELSEWHERE = frozenset(("stalls", "kills", "scale"))
"""Checks whose findings say nothing about which data were used."""
RUNS_LIMIT = 64
CITED_LIMIT = 256
SHOWN_LIMIT = 100
ANSWER_LIMIT_BYTES = 4 << 20

Outcome = Literal["not_used", "used", "cannot_tell"]
EXIT_STATUS: dict[Outcome, int] = {"not_used": 0, "used": 1, "cannot_tell": 3}


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the log that an answer rests on."""

    what: str
    leaf: int
    hash: str


class Used(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Use of one shard of the source by one run."""

    run: str
    shard: str
    path: str
    """As the run called it; its content is what counts."""
    sha256: str
    read_in_step: int | None
    """Optimizer step in which it was first read; None before the first."""
    basis: Literal["rows", "opened"]
    """rows: the committed order of batches says which; opened: it was read, and into which batches is not known."""
    steps: tuple[int, int] | None = None
    """First and last step that used it; for `opened` the steps that can have."""
    batches: int = 0
    samples: int = 0
    """With repetitions."""
    rows: tuple[tuple[int, int], ...] = ()
    """Rows used, as [first, end) runs in order, SHOWN_LIMIT at most."""
    rows_total: int | None = None
    """Different rows used; None where that is not known."""
    why: str | None = None
    """Of `opened`: why rows are not known."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run or checkpoint that has to do with the source, through lineage."""

    key: str
    label: str
    read_in_step: int | None = None
    by: Literal["read", "descends"]
    """read: the run read the source's content; descends: made from one that did."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `trainguard data prove` answers."""

    schema: str = SCHEMA
    source: str
    subject: str
    """`run:<id>` or `checkpoint:<root digest>`."""
    run: str
    step: int | None = None
    """Of a checkpoint: the step up to which its run is asked about."""
    scope: Literal["ever", "after withdrawal"]
    withdrawn: str | None = None
    """When, UTC; None for a source that is not withdrawn."""
    reason: str | None = None
    """Of the withdrawal."""
    answer: Outcome
    after_withdrawal: Outcome | None = None
    """The same for the time after the withdrawal alone; None for a source that is not withdrawn."""
    verdict: Word
    level: Level
    lock: str | None = None
    runs: tuple[str, ...] = ()
    """The run asked about and those whose models it went on from."""
    used: tuple[Used, ...] = ()
    excluded: tuple[str, ...] = ()
    """Shards that were opened and of which the committed order shows that no row was used."""
    reasons: tuple[str, ...] = ()
    """Why it cannot be told, every one."""
    assumes: tuple[str, ...] = ()
    """What the answer takes for granted."""
    earlier: tuple[Model, ...] = ()
    """Every model of this log that used the source, or was made from one that did."""
    evidence: tuple[Record, ...] = ()
    head_size: int
    head_root: str
    """Of the verified tree head all of it is under, hex."""

    @property
    def exit_status(self) -> int:
        """0 not used, 1 used, 3 cannot tell."""
        return EXIT_STATUS[self.answer]

    def encode(self) -> bytes:
        """Canonical bytes, whose SHA-256 is signed."""
        return canonical_json(msgspec.to_builtins(self))


def ask(
    home: Home,
    *,
    source: str,
    run: str | None = None,
    checkpoint: Path | None = None,
    since_withdrawal: bool = False,
    assume_native: Sequence[str] = (),
    lineage: Lineage | None = None,
) -> Answer:
    """Whether `source` was used by the run, or by what the checkpoint was made by and from.

    since_withdrawal: ask about the time after the withdrawal only; else about all of it, and of a withdrawn source
    about both.
    assume_native: packages whose native code is taken not to have read data by itself; named in the answer.
    Raises Misuse for a source, run or checkpoint that is not known.
    """
    leaves = LogLeaves(home)
    register = read_register(leaves, home)
    asked = register.of(source)
    lineage = lineage if lineage is not None else read_lineage(home)
    key, name, step = _subject(lineage, run, checkpoint)
    if since_withdrawal and asked.withdrawn is None:
        raise Misuse(f"source {source}: expected one that is withdrawn, found it in use", next_step="ask without it")
    withdrawn_ns = int(asked.withdrawn.at) if asked.withdrawn is not None else None
    chain = _ancestry(lineage, key, name)

    def put(since: int | None) -> _Asking:
        asking = _Asking(home, leaves, register, asked, lineage, since, frozenset(assume_native))
        for index, each in enumerate(chain[:RUNS_LIMIT]):
            asking.judge(each, step if index == 0 else None)
        if len(chain) > RUNS_LIMIT:
            asking.reasons[f"it was made from {len(chain)} runs: {RUNS_LIMIT} of them were looked at"] = None
        return asking

    asking = put(withdrawn_ns if since_withdrawal else None)
    after = asking.outcome if withdrawn_ns is not None else None
    if after is not None and after != "not_used" and not since_withdrawal:
        after = put(withdrawn_ns).outcome
    verdict = lineage.verdicts[name]
    return Answer(
        source=source,
        subject=key,
        run=name,
        step=step,
        scope="after withdrawal" if since_withdrawal else "ever",
        withdrawn=asked.withdrawn.when if asked.withdrawn is not None else None,
        reason=asked.withdrawn.reason if asked.withdrawn is not None else None,
        answer=asking.outcome,
        after_withdrawal=after,
        verdict=verdict.verdict,
        level=verdict.level,
        lock=verdict.lock,
        runs=tuple(chain[:RUNS_LIMIT]),
        used=tuple(asking.used[:SHOWN_LIMIT]),
        excluded=tuple(asking.excluded),
        reasons=tuple(asking.reasons),
        assumes=tuple(asking.assumes),
        earlier=tuple(_earlier(lineage, asked, register)),
        evidence=tuple(asking.cited)[:CITED_LIMIT],
        head_size=leaves.head.size,
        head_root=leaves.head.root.hex(),
    )


class _Asking:
    """One question, put to one run after the other."""

    def __init__(
        self,
        home: Home,
        leaves: LogLeaves,
        register: Register,
        asked: Source,
        lineage: Lineage,
        since: int | None,
        native: frozenset[str],
    ) -> None:
        self.used: list[Used] = []
        self.excluded: dict[str, None] = {}
        self.reasons: dict[str, None] = {}
        self.assumes: dict[str, None] = {}
        self.cited: dict[Record, None] = {}
        self._home = home
        self._leaves = leaves
        self._register = register
        self._asked = asked
        self._lineage = lineage
        self._since = since
        self._native = native
        self._sealed = _sealed_contents(home)
        self._mine = _contents_of(asked)
        for entry in asked.added:
            self._cite(f"{asked.name}: shard {entry.shard} registered", entry.citation)
        if asked.withdrawn is not None:
            self._cite(f"{asked.name}: withdrawn", asked.withdrawn.citation)
        missing = len(asked.added) - len(asked.shards)
        if missing > 0 and len({entry.manifest for entry in asked.added}) != len(asked.shards):
            self.reasons[f"{missing} manifests of {asked.name} are gone or were altered: its content is not known"] = (
                None
            )

    @property
    def outcome(self) -> Outcome:
        """Used weighs most; a reason forbids saying that it was not."""
        return "used" if self.used else "cannot_tell" if self.reasons else "not_used"

    def judge(self, run: str, step: int | None) -> None:
        """Ask about one run."""
        begin = self._leaves.runs.get(run)
        if begin is None:
            self.reasons[f"the log holds no statement of run {run}"] = None
            return
        if self._over_before(run):
            return
        scope = Scope(since_ns=self._since, steps=step)
        use = read_use(self._home, run, leaves=self._leaves, register=self._register, scope=scope, sealed=self._sealed)
        hits = [content for content in use.contents if content.sha256 in self._mine]
        self._reasons_of(run, use, self._lineage.verdicts[run], step)
        for content in _one_each(hits):
            self._hit(run, use, content, [each for each in hits if each.sha256 == content.sha256])
        self._cite_run(run, begin, use)

    def _over_before(self, run: str) -> bool:
        """Whether the run's record was closed before the withdrawal: by the log's own order, not by clocks."""
        segments = self._leaves.segments.get(run, ())
        withdrawn = self._asked.withdrawn
        if self._since is None or withdrawn is None or not segments:
            return False
        return segments[-1].final and segments[-1].leaf < withdrawn.leaf

    def _reasons_of(self, run: str, use: Use, verdict: Verdict, step: int | None) -> None:
        so_far = until(verdict, step) if step is not None else verdict
        for why in use.unknown:
            native = next((name for name in self._native if native_reason(name) == why), None)
            if native is not None:
                self.assumes[f"the native code of {native} read no training data by itself"] = None
            else:
                self.reasons[f"run {run}: {why}"] = None
        for why in use.assumed:
            self.assumes[f"run {run}: {why}"] = None
        for finding in so_far.findings:
            if finding.outcome != "not_checked" and finding.check not in ELSEWHERE:
                self.reasons[f"run {run}: {finding.outcome} {finding.check}: {finding.message}"[:600]] = None
        for link in so_far.links:
            if link.link in ("code", "inputs", "environment", "processes") and link.state == "blind":
                why = "; ".join(link.blind) or "nothing was checked"
                self.reasons[f"run {run}: link {link.link} is blind: {why}"[:600]] = None
        if so_far.lock is None:
            self.reasons[f"run {run}: no lock: nothing was approved before it ran"] = None

    # -- content of the source that was read ----------------------------------------------------------------------

    def _hit(self, run: str, use: Use, content: Content, all_of_it: list[Content]) -> None:
        shards = self._mine[str(content.sha256)]
        if use.steps == 0:
            self.excluded[f"run {run}: {content.path}: no optimizer step was made in the part asked about"] = None
            return
        for shard, rows in shards:
            drawn, why = _rows_of(use, all_of_it)
            if drawn is None:
                self._unplanned(run, use, content, shard, rows, why)
                continue
            taken = drawn if rows is None else [part for draw in drawn if (part := draw.within(rows)) is not None]
            for draw in drawn:
                for citation in draw.citations:
                    self._cite(f"run {run}: order of batches of loader {draw.loader}", citation)
            if rows is not None and any(draw.rows is None for draw in drawn):
                self.reasons[f"run {run}: {content.path}: too many rows to tell those of {shard} apart"] = None
            elif taken:
                self.used.append(_by_rows(run, content, shard, taken))
            else:
                self.excluded[f"run {run}: {content.path} ({shard}): the committed order drew none of its rows"] = None

    def _unplanned(
        self, run: str, use: Use, content: Content, shard: str, rows: tuple[int, int] | None, why: str
    ) -> None:
        if rows is not None:
            text = f"{content.path} holds rows of {self._asked.name} ({shard}) and others: {why}"
            self.reasons[f"run {run}: {text}"] = None
            return
        first = max(content.step or 1, 1)
        self.used.append(
            Used(
                run=run,
                shard=shard,
                path=content.path,
                sha256=str(content.sha256),
                read_in_step=content.step,
                basis="opened",
                steps=(min(first, use.steps), use.steps),
                why=why,
            )
        )

    # -- evidence -------------------------------------------------------------------------------------------------

    def _cite(self, what: str, citation: Citation) -> None:
        self.cited[Record(what=what, leaf=citation.leaf, hash=citation.hash)] = None

    def _cite_run(self, run: str, begin: dict[str, Any], use: Use) -> None:
        segments = self._leaves.segments.get(run, ())
        for content in use.contents:
            if content.citation is not None:
                of = "unknown content" if content.sha256 is None else content.sha256[:16]
                self._cite(f"run {run}: read {content.path} ({of})"[:300], content.citation)
        if segments:
            self._cite(f"run {run}: last sealed segment", Citation(leaf=segments[-1].leaf, hash=segments[-1].sha256))


def _rows_of(use: Use, opened: Sequence[Content]) -> tuple[list[Draw] | None, str]:
    """The draws from the data sets that read this content; None, and why, where that is not known."""
    if use.unplanned:
        return None, next(iter(use.unplanned))
    datasets: set[tuple[int | None, int]] = set()
    for content in [each for each in opened if each.how != "alias"] or opened:
        if content.data is None:
            return None, "it was not read by a data set of a loader, so no committed order speaks of it"
        datasets |= {(process, content.data) for process in _line(use, content.process)}
    for content in use.contents:
        mine = content.sha256 == opened[0].sha256
        if not mine and content.data is not None and any((content.process, content.data) == each for each in datasets):
            return None, "its data set read other files too, and which rows are of which is not on record"
    known = datasets & use.loaded
    if not known:
        return None, "the data set that read it stands behind no loader whose order is committed"
    return [draw for draw in use.draws.values() if (draw.process, draw.data) in known], ""


def _line(use: Use, process: int | None) -> Iterator[int | None]:
    """A process and those it was forked from: a worker's data sets are its parent's."""
    seen = 0
    while process is not None and seen < 16:
        yield process
        process, seen = use.parents.get(process), seen + 1


def _by_rows(run: str, content: Content, shard: str, draws: list[Draw]) -> Used:
    together: set[int] = set().union(*(draw.rows or () for draw in draws))
    counted = all(draw.rows is not None for draw in draws)
    return Used(
        run=run,
        shard=shard,
        path=content.path,
        sha256=str(content.sha256),
        read_in_step=content.step,
        basis="rows",
        steps=(min(draw.first for draw in draws), max(draw.last for draw in draws)),
        batches=sum(draw.batches for draw in draws),
        samples=sum(draw.samples for draw in draws),
        rows=tuple(_runs(together))[:SHOWN_LIMIT] if counted else (),
        rows_total=len(together) if counted else None,
    )


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = end = None
    for row in sorted(rows):
        if end is not None and first is not None and row == end:
            end = row + 1
            continue
        if first is not None and end is not None:
            yield first, end
        first, end = row, row + 1
    if first is not None and end is not None:
        yield first, end


def _one_each(hits: Sequence[Content]) -> Iterator[Content]:
    """The first reading of each content."""
    seen: set[str | None] = set()
    for content in hits:
        if content.sha256 not in seen:
            seen.add(content.sha256)
            yield content


def _contents_of(source: Source) -> dict[str, list[tuple[str, tuple[int, int] | None]]]:
    """SHA-256 → the source's shards that hold it, with the rows that are meant."""
    found: dict[str, list[tuple[str, tuple[int, int] | None]]] = {}
    for shard in source.shards.values():
        for digest, size in shard.contents.items():
            if size:
                found.setdefault(digest, []).append((shard.name, shard.rows))
    return found


def _sealed_contents(home: Home) -> set[str]:
    """SHA-256 of every file of a checkpoint that the log knows."""
    key = load_public_key(home.keys / "attestation.pub")
    ledger = read_ledger(home, key)
    found: set[str] = set()
    for leaf in ledger.seals if ledger is not None else ():
        seal = ledger.kept(leaf, key) if ledger is not None and leaf.run is not None else None
        if seal is not None and seal.hash_type == "sha256":
            found |= {entry.digest for entry in seal.entries.values() if entry.digest is not None}
    return found


# -- lineage ----------------------------------------------------------------------------------------------------------


def _subject(lineage: Lineage, run: str | None, checkpoint: Path | None) -> tuple[str, str, int | None]:
    """Key, run and step of what is asked about."""
    if checkpoint is not None:
        key = checkpoint_key(root_of(checkpoint))
        node = lineage.graph.nodes.get(key)
        if node is None or node.run is None or node.run not in lineage.verdicts:
            raise Misuse(
                f"{checkpoint}: expected a checkpoint that a watched run sealed, found bytes of which no run is known",
                next_step="trainguard verify names what the log knows of it",
            )
        return key, node.run, node.step
    if run is None or run not in lineage.verdicts:
        raise Misuse(f"run {str(run)[:100]!r}: expected a run that the log knows", next_step="trainguard runs")
    return run_key(run), run, None


def _ancestry(lineage: Lineage, key: str, run: str) -> list[str]:
    """The run and those that made what it went on from, near ones first."""
    nodes = (lineage.graph.nodes.get(each) for each in lineage.graph.ancestors(key))
    named = [run, *(node.run for node in nodes if node is not None and node.run is not None)]
    return [name for name in dict.fromkeys(named) if name in lineage.verdicts]


def _earlier(lineage: Lineage, source: Source, register: Register) -> Iterator[Model]:
    """Every run that read content of the source, and everything that descends from it."""
    mine = _contents_of(source)
    told: set[str] = set()
    below: dict[str, None] = {}
    for run, contents in lineage.used.items():
        steps = [step for digest, step in contents.items() if digest in mine]
        if not steps:
            continue
        told.add(run_key(run))
        first = None if None in steps else min(step for step in steps if step is not None)
        yield Model(key=run_key(run), label=f"run {run}", read_in_step=first, by="read")
        below.update(dict.fromkeys(lineage.graph.descendants(f"start:{run}")))
        below.update(dict.fromkeys(lineage.graph.descendants(run_key(run))))
    for key in below:
        node = lineage.graph.nodes.get(key)
        if node is not None and node.kind != "start" and key not in told:
            yield Model(key=key, label=node.label, by="descends")


# -- the signed statement ---------------------------------------------------------------------------------------------


def sign_answer(home: Home, answer: Answer) -> bytes:
    """Sign and log `answer`: the bytes of a file that holds the statement and the answer it speaks of."""
    data = answer.encode()
    key = load_or_create_key(home.keys / "attestation.pem")
    body = {
        "source": answer.source,
        "subject": answer.subject,
        "scope": answer.scope,
        "answer": answer.answer,
        "document": home.store_blob(data),
        "head_size": answer.head_size,
        "head_root": answer.head_root,
    }
    digest = {"sha256": sha256_hex(data)}
    entry = sign_statement(statement(PREDICATE, body, [{"name": f"data-use/{answer.source}", "digest": digest}]), key)
    with Log.open(home.log, home.keys / "log.key") as log:
        log.append([entry])
        log.publish()
    return canonical_json({"envelope": json.loads(entry), "answer": json.loads(data)}) + b"\n"


def verify_answer(data: bytes, keys: Sequence[ec.EllipticCurvePublicKey], *, where: str = "answer") -> Answer:
    """The answer in a file that `sign_answer` made, if one of `keys` signed it.

    Still owed by the caller: that the log extends the tree head the answer names, and holds the rows it cites.
    Raises MalformedEvidence or VerificationError.
    """
    if len(data) > ANSWER_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: expected at most {ANSWER_LIMIT_BYTES} bytes, found {len(data)}")
    try:
        file = json.loads(data)
        envelope, answer = canonical_json(file["envelope"]), canonical_json(file["answer"])
        told = msgspec.json.decode(answer, type=Answer)
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.DecodeError) as error:
        raise MalformedEvidence(f"{where}: not a signed answer of trainguard data prove: {error}") from None
    value = verify_statement(envelope, keys, where=where)
    body = value["predicate"]
    expected = (PREDICATE_BASE + PREDICATE, sha256_hex(answer), told.source, told.subject, told.answer)
    found = (value.get("predicateType"), *(body.get(name) for name in ("document", "source", "subject", "answer")))
    if expected != found or told.schema != SCHEMA:
        raise MalformedEvidence(f"{where}: the signed statement speaks of another answer than the file holds")
    return told


def withdrawals(register: Register) -> list[Entry]:
    """Every withdrawal, oldest first."""
    found = (source.withdrawn for source in register.sources.values())
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.leaf)


def recheck(home: Home, answer: Answer) -> bool:
    """Whether the log in `home` is the one the answer rests on, and still holds its rows; False where there is none.

    Raises VerificationError where the log is another, was rewritten, or a cited row is not in it.
    """
    if not (home.log / "journal").is_dir():
        return False
    reader = LogReader(home.log, home.keys / "log.vkey")
    head = reader.head()
    if head.size < answer.head_size or reader.root_at(answer.head_size).hex() != answer.head_root:
        raise VerificationError(
            f"the answer rests on a log of {answer.head_size} entries with root {answer.head_root[:16]}…; "
            f"the log here, of {head.size}, is another or was rewritten"
        )
    known = _hashes(home, {row.leaf for row in answer.evidence})
    for row in answer.evidence:
        if row.hash not in known.get(row.leaf, ()):
            raise VerificationError(f"leaf {row.leaf}: does not hold the cited row {row.hash[:16]}… ({row.what[:100]})")
    return True


def _hashes(home: Home, wanted: set[int]) -> dict[int, set[str]]:
    """Leaf → SHA-256 of its entry, of its segment, and of every record in it."""
    leaves = LogLeaves(home)
    found: dict[int, set[str]] = {body["leaf"]: {body["entry"]} for body in leaves.data if body["leaf"] in wanted}
    for run, segments in leaves.segments.items():
        mine = {segment.leaf: segment.sha256 for segment in segments if segment.leaf in wanted}
        for leaf, digest in mine.items():
            found.setdefault(leaf, set()).add(digest)
        for record in RunReader(home, run, leaves=leaves).records() if mine else ():
            if record.leaf in mine and record.hash is not None:
                found[record.leaf].add(record.hash)
    return found
