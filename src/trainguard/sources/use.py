"""What a run used of the registered data: a pure function of its records, its lock and the register (spec/data.md).

    use = read_use(home, "r2", leaves=leaves, register=register, scope=Scope(since_ns=…))
    use.contents      every content it read, with where that is on record
    use.draws         which rows of which data set were in which batches, where the order can be drawn again
    use.unknown       why something of it cannot be told; empty only where everything it read is accounted for

A content is accounted for when it is registered, approved as code by the run's lock, sealed by a watched run, or
written by the run itself. Everything else could be anything, so it is a reason, and beside a reason
nothing is "not used".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from trainguard.appraise.interface import Context
from trainguard.appraise.judge import recorded_policy
from trainguard.appraise.order import Batch, Unknown, chained, drawn
from trainguard.appraise.origin import Origins, dicts, rows, text
from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Citation
from trainguard.home import Home
from trainguard.sources.layout import Layout, parse_layout
from trainguard.sources.native import HARMLESS_PROGRAMS, OWN_FILES_ONLY, STANDARD_READERS
from trainguard.sources.register import Register

CODE_KINDS = (".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".ini", ".sh")
CODE_BYTES = 1 << 16
"""A larger file in the code tree is data, whatever it is called."""

SYSTEM = ("/usr/", "/etc/", "/lib/", "/lib64/", "/bin/", "/sbin/")
SYSTEM_BYTES = 4 << 20

ROWS_LIMIT = 1 << 20
BATCHES_LIMIT = 1 << 22
UNKNOWN_LIMIT = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which part of a run is asked about."""

    since_ns: int | None = None
    """Only what was heard at or after this time of the supervisor's clock."""
    steps: int | None = None
    """Only up to and including this optimizer step."""

    def holds(self, step: int | None, at: int) -> bool:
        """Whether work heard at `at`, of step `step` (None before the first), is asked about."""
        early = self.since_ns is not None and at < self.since_ns
        return not early and (self.steps is None or step is None or step <= self.steps)


@dataclass(slots=True, kw_only=True)
class Content:
    """One content that a process of the run read."""

    path: str
    sha256: str | None
    step: int | None
    """Optimizer step in which it was first read; None before the first."""
    process: int | None
    data: int | None
    """Number of the data set on whose behalf, in that process or the one it was forked from."""
    citation: Citation | None
    place: str | None = None
    how: str = "read"
    """read, mapped, or alias: given another name by the run."""


@dataclass(slots=True)
class Draw:
    """What one loader pass took of one data set, in the part of the run that is asked about."""

    process: int | None
    rank: int | None
    loader: int
    epoch: int
    data: int
    first: int
    last: int
    batches: int = 0
    samples: int = 0
    rows: set[int] | None = field(default_factory=set)
    """None once there are more than ROWS_LIMIT different ones."""
    each: list[tuple[int, list[int]]] | None = None
    """Step and rows of every batch; kept only where sources share a file, to tell theirs apart."""
    citations: dict[Citation, None] = field(default_factory=dict)

    def within(self, wanted: tuple[int, int]) -> Draw | None:
        """The part that took rows from wanted[0] up to but not wanted[1]; None where no row is among them.

        Only for a draw whose rows and batches were kept.
        """
        part = replace(self, batches=0, samples=0, rows=set(), each=None, first=self.last, last=self.first)
        for step, taken in self.each or ():
            mine = [row for row in taken if wanted[0] <= row < wanted[1]]
            if mine:
                part.take(mine, step)
        return part if part.batches else None

    def take(self, found: list[int], step: int) -> None:
        """One batch took these rows, by step `step`."""
        self.first, self.last = min(self.first, step), max(self.last, step)
        self.batches += 1
        self.samples += len(found)
        if self.rows is not None:
            self.rows.update(found)
            if self.each is not None:
                self.each.append((step, found))
            if len(self.rows) > ROWS_LIMIT:
                self.rows = None


@dataclass(slots=True)
class Use:
    """Everything `read_use` found."""

    run: str
    contents: list[Content] = field(default_factory=list)
    draws: dict[tuple[int | None, int, int, int], Draw] = field(default_factory=dict)
    """By process, loader, epoch and data set."""
    unknown: dict[str, None] = field(default_factory=dict)
    """Why not everything it read is accounted for, one sentence each."""
    unplanned: dict[str, None] = field(default_factory=dict)
    """Why it is not known which rows were in which batches, one sentence each."""
    assumed: dict[str, None] = field(default_factory=dict)
    """What the answer takes for granted, one sentence each."""
    loaded: set[tuple[int | None, int]] = field(default_factory=set)
    """(process, data set) that stand behind a loader whose order is known."""
    parents: dict[int, int | None] = field(default_factory=dict)
    """Process → the process that it was forked from."""
    steps: int = 0
    """Optimizer steps in the part that is asked about, most of any process."""
    last: tuple[int | None, int] = (None, 0)
    """Step and time of the last record."""
    lock: str | None = None
    ended: bool = False


@dataclass(slots=True)
class _Pass:
    batches: Iterator[Batch]
    layout: Layout | None
    citation: Citation | None
    chain: bytes = b"\0" * 8
    count: int = 0
    step: int = 0
    broken: bool = False


class _Reader:
    """Follows one run's records once."""

    def __init__(self, use: Use, origins: Origins, scope: Scope, register: Register, known: set[str]) -> None:
        self._use = use
        self._origins = origins
        self._scope = scope
        self._register = register
        self._known = known
        """SHA-256 of files of sealed checkpoints."""
        self._began = 0
        self._outputs: set[str] = set()
        self._passes: dict[tuple[int | None, int, int], _Pass] = {}
        self._layouts: dict[tuple[int | None, int], Layout | None] = {}
        self._pids: dict[int, int] = {}
        self._left = BATCHES_LIMIT
        self._shared = any(shard.rows is not None for known in register.contents.values() for _, shard, _ in known)

    def see(self, record: Evidence) -> None:
        """Take one record."""
        self._origins.see(record)
        if record.source == "process" and record.kind == "steps":
            try:
                for each in unfold(record):
                    self._step(each)
            except MalformedEvidence as error:
                self._plan(str(error))
            return
        handler = {
            "start": self._start,
            "process": self._process,
            "open": self._open,
            "code": self._code,
            "spawn": self._spawn,
            "loader": self._loader,
            "step": self._step,
        }.get(record.kind)
        if handler is not None:
            handler(record)

    # -- the run ------------------------------------------------------------------------------------------------

    def _start(self, record: Evidence) -> None:
        self._began = record.at
        lock = record.body.get("lock")
        self._use.lock = lock if isinstance(lock, str) else None
        stdin = record.body.get("stdin")
        if stdin is None or not isinstance(stdin, str):
            self._use.assumed["nothing came by standard input, of which nothing is on record"] = None
        elif stdin.startswith("/") and not stdin.startswith("/dev/"):
            self._doubt(f"standard input was the file {stdin[:300]}, whose content is not on record")
        elif not stdin.startswith("/dev/"):
            self._use.assumed["nothing came by standard input, which was a pipe or a connection"] = None

    def _process(self, record: Evidence) -> None:
        hello = record.body.get("hello")
        above = hello.get("forked_from") if isinstance(hello, dict) else None
        if record.process is None:
            return
        if record.pid is not None:
            self._pids[record.pid] = record.process
        self._use.parents[record.process] = self._pids.get(above) if isinstance(above, int) else None

    # -- files --------------------------------------------------------------------------------------------------

    def _open(self, record: Evidence) -> None:
        for line in dicts(record.body.get("files")):
            path = text(line.get("path"), 4096)
            if path is not None:
                self._file(record, path, line)
        outside = record.body.get("outside")
        if isinstance(outside, dict):
            self._outside(outside)
        if record.body.get("skipped") is not None:
            self._doubt(f"process {record.pid} opened more files than are listed one by one")

    def _file(self, record: Evidence, path: str, line: dict[str, Any]) -> None:
        mode = line.get("mode")
        if mode == "w":
            self._outputs.add(path)
            return
        if mode == "moved":
            return  # a folder: what is read in it is told like any other file
        step = line.get("step")
        digest = self._digest(path, line)
        data = line.get("data")
        content = Content(
            path=path,
            sha256=digest,
            step=step if isinstance(step, int) else None,
            process=record.process,
            data=data if isinstance(data, int) else None,
            citation=_cited(record),
            place=text(line.get("place")),
            how="read" if mode == "r" else "alias" if mode == "alias" else "mapped",
        )
        if digest in self._register.contents or digest is None:
            self._use.contents.append(content)
        if digest not in self._register.contents:
            why = self._unaccounted(path, digest, line)
            if why is not None:
                self._doubt(why)

    def _digest(self, path: str, line: dict[str, Any]) -> str | None:
        """Content of the file as it was read: the process's word, or as measured before where nothing came between."""
        digest = line.get("sha256")
        if isinstance(digest, str):
            return digest
        changed, size = line.get("ctime_ns"), line.get("size")
        if line.get("changed") is True or not isinstance(changed, int) or changed >= self._began:
            return None
        measured = self._origins.measured_value(path)
        return measured[0] if measured is not None and measured[1] == size else None

    def _unaccounted(self, path: str, digest: str | None, line: dict[str, Any]) -> str | None:
        """Why a content that is not registered could be training data, or None."""
        if digest is not None and digest in self._known:
            return None
        area, _, _ = self._origins.area(path)
        if path in self._outputs or line.get("own") is True or area in ("guard", "program", "library"):
            return None
        size = line.get("size")
        small = isinstance(size, int) and size <= CODE_BYTES
        if area == "code" and small and path.endswith(CODE_KINDS) and digest == self._origins.locked(path) is not None:
            return None
        if path.startswith(SYSTEM) and isinstance(size, int) and size <= SYSTEM_BYTES and line.get("uid") == 0:
            return None
        if area == "cache":
            return None
        at = f"step {line['step']}" if isinstance(line.get("step"), int) else "before the first step"
        if digest is None:
            return f"{path}, opened {at}: its content is not on record (too large to be hashed while it was read)"
        locked = self._origins.locked(path)
        stands = (
            "it is in the lock, with this content"
            if locked == digest
            else "it is not what was approved in the lock"
            if locked is not None
            else "it is not in the lock"
        )
        return f"{path}, opened {at}: content {digest[:16]}… is registered as of no source; {stands}"

    def _outside(self, line: dict[str, Any]) -> None:
        way, what = line.get("way"), text(line.get("what"), 300) or "?"
        if way in ("connect", "url") and not _is_local(what):
            self._doubt(f"the run read from {what}: what came by the network is not on record")

    # -- other ways in ------------------------------------------------------------------------------------------

    def _code(self, record: Evidence) -> None:
        for path, _, module, how in rows(record.body.get("files"), 4):
            if how != "extension" or not isinstance(module, str) or not isinstance(path, str):
                continue
            top = module.split(".")[0]
            native = "lib-dynload" in path
            if top in STANDARD_READERS if native else top not in OWN_FILES_ONLY:
                self._use.unknown.setdefault(native_reason(top), None)

    def _spawn(self, record: Evidence) -> None:
        program, words = text(record.body.get("program"), 300) or "?", record.body.get("args")
        first = words[0] if isinstance(words, list) and words and isinstance(words[0], str) else program
        name = (program if "/" in program else first).rsplit("/", 1)[-1].split(" ", 1)[0]
        if name.startswith(("python", "pypy")):
            return  # guarded itself, or a finding
        if name in HARMLESS_PROGRAMS:
            self._use.assumed[f"{name}, which the run started, handed it no training data"] = None
            return
        self._doubt(f"the run started {name[:100]}, which can read files that are not on record")

    def _doubt(self, why: str) -> None:
        if len(self._use.unknown) < UNKNOWN_LIMIT:
            self._use.unknown[why[:600]] = None

    # -- batches ------------------------------------------------------------------------------------------------

    def _plan(self, why: str) -> None:
        if len(self._use.unplanned) < UNKNOWN_LIMIT:
            self._use.unplanned[why[:600]] = None

    def _loader(self, record: Evidence) -> None:
        body = record.body
        loader, epoch = body.get("loader"), body.get("epoch")
        if "end" in body or not (isinstance(loader, int) and isinstance(epoch, int)):
            return
        if "data" in body:
            self._layouts[record.process, loader] = parse_layout(body["data"])
        layout = self._layouts.get((record.process, loader))
        if layout is None:
            self._plan("a loader did not say how its data sets are put together")
            return
        try:
            batches = drawn(body)
        except (Unknown, ValueError, KeyError, TypeError) as error:
            self._plan(f"the order of a loader is not committed: {error}")
            return
        self._passes[record.process, loader, epoch] = _Pass(batches, layout, _cited(record))
        self._use.loaded |= {(record.process, leaf) for leaf in layout.leaves if leaf is not None}

    def _step(self, record: Evidence) -> None:
        if record.source != "process":
            return
        if record.step is not None and self._scope.holds(record.step, record.at):
            self._use.steps = max(self._use.steps, record.step)
        self._use.last = (record.step, record.at)
        for loader, epoch, count, chain, _ in rows(record.body.get("order"), 5)[:64]:
            if isinstance(loader, int) and isinstance(epoch, int) and isinstance(count, int):
                self._delivered(record, loader, epoch, count, chain)

    def _delivered(self, record: Evidence, loader: int, epoch: int, count: int, chain: object) -> None:
        known = self._passes.get((record.process, loader, epoch))
        if known is None or known.broken:
            return
        step = record.step or 0
        wanted = self._scope.holds(record.step, record.at)
        try:
            while known.count < count and self._left > 0:
                batch = next(known.batches)
                known.count, self._left = known.count + 1, self._left - 1
                known.chain = chained(known.chain, batch)
                if wanted:
                    self._taken(record, loader, epoch, known, batch, step)
        except (StopIteration, Unknown, ValueError, OverflowError) as error:
            known.broken = True
            self._plan(
                f"loader {loader}, pass {epoch + 1}: its order cannot be drawn again: {error or 'it is too short'}"
            )
            return
        if self._left <= 0:
            known.broken = True
            self._plan(f"more than {BATCHES_LIMIT} batches: later ones are not drawn again")
        elif known.chain.hex() != chain:
            known.broken = True
            self._plan(f"loader {loader}, pass {epoch + 1}: by step {step} its batches are not those its sampler draws")

    def _taken(self, record: Evidence, loader: int, epoch: int, known: _Pass, batch: Batch, step: int) -> None:
        found: dict[int, list[int]] = {}
        for index in batch:
            where = known.layout.find(index) if known.layout is not None else None
            if where is None:
                self._plan(f"loader {loader}: which data set index {index} stands for is not on record")
                continue
            found.setdefault(where[0], []).append(where[1])
        for data, taken in found.items():
            key = (record.process, loader, epoch, data)
            draw = self._use.draws.get(key)
            if draw is None:
                draw = self._use.draws[key] = Draw(record.process, record.rank, loader, epoch, data, step, step)
                draw.each = [] if self._shared else None
                if known.citation is not None:
                    draw.citations[known.citation] = None
            draw.take(taken, step)
            cited = _cited(record)
            if cited is not None and len(draw.citations) < 8:
                draw.citations[cited] = None


def read_use(
    home: Home, run: str, *, leaves: LogLeaves, register: Register, scope: Scope, sealed: set[str] | None = None
) -> Use:
    """What the run used, in the part of it that `scope` names. sealed: contents of checkpoints that the log knows.

    Never raises for bad evidence: what does not verify is a reason of its own.
    """
    reader = RunReader(home, run, leaves=leaves)
    context = Context(run=run, policy=recorded_policy(home, reader), blob=home.blob)
    use, origins = Use(run), Origins(context)
    follower = _Reader(use, origins, scope, register, sealed or set())
    try:
        for record in reader.records():
            follower.see(record)
    except VerificationError as error:
        use.unknown[f"the record of run {run} does not verify: {error}"] = None
    use.ended = reader.ended
    if not use.ended:
        use.unknown[f"the record of run {run} has no end"] = None
    if use.lock is None:
        use.unknown["there was no lock: what code would read the data was not approved before the run"] = None
    for problem in origins.problems:
        use.unknown[f"lock or measurement cannot be used: {problem}"] = None
    for why in _unread_places(origins, register):
        use.unknown[why] = None
    return use


def native_reason(package: str) -> str:
    """The reason that a package with native code of its own gives."""
    return f"{package} was loaded: its native code can open files that are not on record"


def _unread_places(origins: Origins, register: Register) -> Iterator[str]:
    """Registered contents that lie where opening is not reported: among installed packages."""
    measured = origins.measured
    if measured is None:
        return
    for tree in measured.trees.values():
        if not tree.name.startswith(("stdlib", "site-packages", "user-site")):
            continue
        yield from _hidden(tree.name, tree.files, register)
    for package in measured.distributions.values():
        yield from _hidden(package.tree, package.files, register)


def _hidden(tree: str, files: dict[str, str], register: Register) -> Iterator[str]:
    for below, value in files.items():
        digest, _, size = value.partition(" ")
        if digest in register.contents and size not in ("0", ""):
            names = ", ".join(sorted({source.name for source, _, _ in register.contents[digest]}))
            yield f"content of {names} lies among installed packages, as {tree}/{below}, where reading is not recorded"


def _cited(record: Evidence) -> Citation | None:
    if record.leaf is None or record.hash is None:
        return None
    return Citation(leaf=record.leaf, hash=record.hash)


def _is_local(what: str) -> bool:
    host = what.split("://")[-1].split("/")[0].rsplit(":", 1)[0].strip("[]")
    return host in ("localhost", "") or host.startswith("127.") or host == "::1"
