"""Lineage from our own log: run → checkpoint it sealed → run that opened it, by content (DESIGN section 10).

    lineage = read_lineage(home)
    lineage.standing_of(lineage.checkpoint(Path("out/step-000300.pt")))

Witnessed edges are those that the log shows: a seal that a watched run made, a sealed file that a watched run opened,
recognised by the SHA-256 of its content and not by its name. A checkpoint is judged by its run *up to its step*:
what happened after it was saved does not reach it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trainguard.appraise.judge import judge_run
from trainguard.appraise.verdict import Verdict, Word, until
from trainguard.archive import LogLeaves, RunReader
from trainguard.envelope import load_public_key
from trainguard.errors import Misuse, Unavailable, VerificationError
from trainguard.evidence import Evidence
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.incident.graph import RANK, Graph, Kind, Node, Standing, Standings
from trainguard.seal.ledger import Ledger, SealLeaf, read_ledger
from trainguard.seal.manifest import read_manifest, resolve, root_digest
from trainguard.sources.register import Register, read_register

BASIS: frozenset[Kind] = frozenset({"start", "lock", "data"})
"""Kinds that hand nothing on and are no results: they are told as what others were made from, and not listed."""


@dataclass(slots=True)
class Lineage:
    """The graph of one log with everything it was drawn from."""

    graph: Graph
    verdicts: dict[str, Verdict]
    """Run → its verdict."""
    seals: tuple[SealLeaf, ...]
    used: dict[str, dict[str, int | None]] = field(default_factory=dict)
    """Run → content (SHA-256) of files it opened → optimizer step of the first opening."""
    trackers: dict[str, str] = field(default_factory=dict)
    """Key of a tracker's run, as importers name it → key of our run that said it had it open; itself where two say so.
    Claims of the jobs."""
    _standings: Standings | None = None

    @property
    def standings(self) -> Standings:
        """How good everything is, all it was made from included; drawn once."""
        if self._standings is None:
            self._standings = self.graph.standings()
        return self._standings

    def standing_of(self, key: str) -> Standing:
        """Raises Misuse for a key that is not in the graph."""
        try:
            return self.standings[key]
        except KeyError:
            raise Misuse(f"{key}: nothing of that name is in the lineage", next_step="trainguard lineage") from None

    def reasons(self, standing: Standing) -> tuple[str, ...]:
        """The chain behind a standing as sentences, the deciding node first."""
        first, *chain = (self.graph.nodes.get(key) for key in standing.because)
        if first is None:
            return (f"nothing is recorded of {standing.because[0]}",)
        said = [f"{first.label}: {first.reason or first.word}"]
        said += [f"{node.label} was made from it" for node in chain if node is not None and node.kind != "start"]
        return tuple(said)


def checkpoint_key(root: str) -> str:
    """Key of a checkpoint by its OMS root digest."""
    return f"checkpoint:{root}"


def run_key(run: str) -> str:
    """Key of a run as a whole."""
    return f"run:{run}"


def root_of(path: Path) -> str:
    """The OMS root digest of the checkpoint that lies at `path` now. Reads all of it."""
    manifest = read_manifest(resolve(path), tensors=False)
    return root_digest(str(entry.digest) for entry in manifest.resources)


def read_lineage(home: Home, *, judge: Callable[..., Verdict] | None = None, lifted: bool = False) -> Lineage:
    """Everything the log of `home` knows, every run judged anew, as this machine shows it.

    judge: in place of `judge_run`, with its arguments. lifted: whatever is muted, for decisions.

    Raises Misuse where there is no log, VerificationError where it does not verify.
    """
    judge = judge or functools.partial(judge_run, lifted=lifted)
    leaves = LogLeaves(home)
    key = load_public_key(home.keys / "attestation.pub")
    ledger = read_ledger(home, key)
    if ledger is None:
        raise Unavailable(f"{home.root}: no log here", next_step="record a run first: trainguard run -- CMD")
    by_content = _by_content(ledger, key)
    lineage = Lineage(graph=Graph(), verdicts={}, seals=ledger.seals)
    courses: dict[str, _Course] = {}
    register = read_register(leaves, home)
    for run in leaves.runs:
        lineage.verdicts[run] = judge(home, run, leaves=leaves)
        courses[run] = _course(home, run, leaves, lineage.verdicts[run])
        lineage.used[run] = courses[run].opened
        for named in courses[run].trackers:
            same = lineage.trackers.setdefault(named, run_key(run)) == run_key(run)
            lineage.trackers[named] = run_key(run) if same else named  # said by two: it stays a node of its own
        _add_run(lineage, run, lineage.verdicts[run])
        _add_basis(lineage, run, leaves.runs[run], register)
    for seal in ledger.seals:
        _add_checkpoint(lineage, seal, courses.get(seal.run) if seal.run is not None else None)
    for run, contents in lineage.used.items():
        for content in contents:
            for seal in by_content.get(content, ()):
                if seal.run != run:
                    lineage.graph.join(checkpoint_key(seal.root), _start(run), witnessed=True, by=f"leaf {seal.leaf}")
    return lineage


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One run or artifact as it is listed."""

    key: str
    kind: str
    label: str
    word: Word
    made_from: tuple[str, ...] = ()
    """Labels of what it was directly made from; those that are only claimed end in ` (claimed)`."""
    because: tuple[str, ...] = ()
    """The chain behind a word that is not VERIFIED, the deciding one first."""


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What `trainguard lineage` answers."""

    schema: str = "trainguard/lineage/v1"
    subject: str | None = None
    affected: tuple[Line, ...] = ()
    """TAINTED or SUSPECT."""
    unknown: tuple[Line, ...] = ()
    cleared: tuple[Line, ...] = ()
    """VERIFIED with all it was made from: not affected."""

    @property
    def exit_status(self) -> int:
        """0 everything listed is VERIFIED, 1 something is TAINTED, 3 otherwise."""
        if any(line.word == "TAINTED" for line in self.affected):
            return 1
        return 3 if self.affected or self.unknown else 0


def family(lineage: Lineage, key: str | None = None) -> Family:
    """Everything, or with `key` only that node, what it was made from and what was made from it.

    Raises Misuse for a key that is not there.
    """
    graph = lineage.graph
    keys: Iterable[str] = graph.nodes
    if key is not None:
        lineage.standing_of(key)
        start = [_start(key.partition(":")[2])] if key.startswith("run:") else []
        near = [key, *graph.ancestors(key), *graph.descendants(key)]
        keys = dict.fromkeys([*near, *(below for at in start for below in graph.descendants(at))])
    lines = [_line(lineage, key) for key in keys if key in graph.nodes and not _is_basis(graph.nodes[key])]
    return Family(
        subject=key,
        affected=tuple(line for line in lines if RANK[line.word] >= RANK["SUSPECT"]),
        unknown=tuple(line for line in lines if line.word == "UNKNOWN"),
        cleared=tuple(line for line in lines if line.word == "VERIFIED"),
    )


def _is_basis(node: Node) -> bool:
    """Whether a node only hands on; data and locks that somebody claims are results of nobody knows what."""
    return node.kind in BASIS and node.word == "VERIFIED"


def _line(lineage: Lineage, key: str) -> Line:
    node, standing = lineage.graph.nodes[key], lineage.standing_of(key)
    return Line(
        key=key,
        kind=node.kind,
        label=node.label,
        word=standing.word,
        made_from=tuple(_sources(lineage.graph, key)),
        because=lineage.reasons(standing) if standing.word != "VERIFIED" else (),
    )


def _sources(graph: Graph, key: str) -> Iterator[str]:
    """Labels of what a node was made from; the start of a run stands for what the run opened."""
    for source, witnessed in graph.sources_of(key):
        node = graph.nodes.get(source)
        if node is not None and node.kind == "start":
            yield from _sources(graph, source)
            continue
        label = node.label if node is not None else source
        yield label if witnessed else f"{label} (claimed)"


def _start(run: str) -> str:
    return f"start:{run}"


def _add_run(lineage: Lineage, run: str, verdict: Verdict) -> None:
    """Two nodes: what the run began from, which its checkpoints inherit, and the run as a whole, which they do not."""
    lineage.graph.add(Node(key=_start(run), kind="start", label=f"start of run {run}", run=run))
    whole = Node(key=run_key(run), kind="run", label=f"run {run}", word=verdict.verdict, reason=why(verdict), run=run)
    lineage.graph.add(whole)
    lineage.graph.join(_start(run), run_key(run), witnessed=True)


def _add_basis(lineage: Lineage, run: str, begin: Mapping[str, Any], register: Register) -> None:
    """What a run began from beside checkpoints: its lock, and the registered data that it opened, by content.

    They hand nothing on: whether code, environment and data were the approved ones is in the run's own verdict.
    """
    lock = begin.get("lock")
    if isinstance(lock, str):
        label = f"lock {lock[:12]} (code, environment, data, command)"
        lineage.graph.add(Node(key=f"lock:{lock}", kind="lock", label=label))
        lineage.graph.join(f"lock:{lock}", _start(run), witnessed=True, by=f"leaf {begin.get('leaf')}")
    for content in lineage.used[run]:
        for source, shard, entry in register.contents.get(content, ()):
            terms = entry.licence or entry.terms or "no licence stated"
            label = f"{shard.name} of {source.name} ({terms}{', withdrawn' if source.withdrawn is not None else ''})"
            key = f"data:{source.name}/{entry.manifest}"
            lineage.graph.add(Node(key=key, kind="data", label=label))
            lineage.graph.join(key, _start(run), witnessed=True, by=f"leaf {entry.leaf}")


def _add_checkpoint(lineage: Lineage, seal: SealLeaf, course: _Course | None) -> None:
    key = checkpoint_key(seal.root)
    verdict = lineage.verdicts.get(seal.run) if seal.run is not None else None
    if verdict is None:
        reason = "sealed by hand: no watched run is known for it"
        lineage.graph.add(
            Node(key=key, kind="checkpoint", label=seal.name, word="UNKNOWN", reason=reason, place=seal.place)
        )
        return
    so_far = _so_far(verdict, seal, course)
    label = f"{seal.name} (run {seal.run}, step {seal.step})" if seal.step is not None else f"{seal.name} ({seal.run})"
    node = Node(
        key=key,
        kind="checkpoint",
        label=label,
        word=so_far.verdict,
        reason=why(so_far),
        run=seal.run,
        step=seal.step,
        place=seal.place,
    )
    lineage.graph.add(node)
    lineage.graph.join(_start(str(seal.run)), key, witnessed=True, by=f"leaf {seal.leaf}")


def why(verdict: Verdict) -> str:
    """The first thing that makes a verdict what it is."""
    if verdict.findings and verdict.verdict != "VERIFIED":
        worst = verdict.findings[0]
        step = f" at step {worst.subject.step}" if worst.subject.step is not None else ""
        return f"{worst.check}{step}: {worst.message}"
    return verdict.reasons[0] if verdict.reasons else verdict.verdict


def _by_content(ledger: Ledger, key: Any) -> dict[str, list[SealLeaf]]:
    """SHA-256 of a file → seals it was sealed in. Seals whose statement is gone or touched are left out."""
    found: dict[str, list[SealLeaf]] = {}
    for leaf in ledger.seals:
        seal = ledger.kept(leaf, key)
        if seal is None or seal.hash_type != "sha256":
            continue
        for entry in seal.entries.values():
            if entry.digest is not None:
                found.setdefault(entry.digest, []).append(leaf)
    return found


@dataclass(slots=True)
class _Course:
    """What the record of a run says of files and of order.

    A rank that is started again counts its steps from 1 again. So what came first is told by turns: the number of
    processes that had made steps and ended when a process began. Steps are compared within a turn only.
    """

    opened: dict[str, int | None] = field(default_factory=dict)
    """Content of every file the run reported to have opened for reading → step of the first opening."""
    seals: dict[int, int] = field(default_factory=dict)
    """Leaf of a seal → turn of the newest process that had begun when it was made."""
    cited: dict[str, int] = field(default_factory=dict)
    """Hash of a cited record → turn of its process."""
    trackers: set[str] = field(default_factory=set)
    """Keys of the trackers' runs that it named."""

    def concerns(self, finding: Finding, seal: SealLeaf) -> bool:
        """Whether a finding with a step is about work that went into a checkpoint."""
        turns = [self.cited[citation.hash] for citation in finding.evidence if citation.hash in self.cited]
        own = self.seals.get(seal.leaf)
        if turns and own is not None and min(turns) != own:
            return min(turns) < own
        step = finding.subject.step
        return step is None or seal.step is None or step <= seal.step


def _so_far(verdict: Verdict, seal: SealLeaf, course: _Course | None) -> Verdict:
    """The verdict on what went into a checkpoint."""
    if seal.step is None:
        return verdict
    if course is None:
        return until(verdict, seal.step)
    return until(verdict, seal.step, concerns=lambda finding: course.concerns(finding, seal))


def _course(home: Home, run: str, leaves: LogLeaves, verdict: Verdict) -> _Course:
    """One pass over the records of a run."""
    course = _Course()
    wanted = {citation.hash for finding in verdict.findings for citation in finding.evidence}
    turns: dict[int | None, int] = {}
    stepped: set[int] = set()
    ended = newest = 0
    try:
        for record in RunReader(home, run, leaves=leaves).records():
            if record.kind == "open":
                for digest, step in _contents(record):
                    course.opened.setdefault(digest, step)
            elif record.kind == "process" and record.process is not None:
                turns[record.process] = newest = ended
            elif record.kind in ("step", "steps") and record.process is not None:
                stepped.add(record.process)
                course.trackers.update(_trackers(record))
            elif record.kind == "exit" and record.process in stepped:
                ended += 1
            elif record.kind == "seal" and isinstance(record.body.get("leaf"), int):
                course.seals[record.body["leaf"]] = newest
            if record.hash in wanted:
                course.cited[str(record.hash)] = turns.get(record.process, newest)
    except VerificationError:
        pass  # the run's verdict says so already: check `log`
    return course


def _trackers(record: Evidence) -> Iterator[str]:
    said = record.body.get("trackers") if record.kind == "step" else None
    for line in said[:64] if isinstance(said, list) else ():
        if not (isinstance(line, list) and len(line) == 3 and all(isinstance(word, str) for word in line)):
            continue
        if line[0] in ("mlflow", "wandb") and len(line[1]) <= 64 and line[1].isprintable():
            yield f"artifact:{line[0]}/run/{line[1]}"


def _contents(record: Evidence) -> Iterator[tuple[str, int | None]]:
    files = record.body.get("files")
    lines: Iterable[Any] = files if isinstance(files, list) else ()
    for line in lines:
        if isinstance(line, dict) and isinstance(line.get("sha256"), str) and line.get("mode") != "w":
            step = line.get("first")
            yield line["sha256"], step if isinstance(step, int) else None
