"""Check *code*: what was compiled is what was approved, and nothing else ran (docs/checks/code.md).

Every source file is compared by the hash of the bytes that were compiled. With a lock: changed (A5, B1), changed
between preflight and import (A13), unknown to the lock (B1), hiding a locked module of the same name (A7), bytecode
without source (A6). Without a lock: what contradicts the measurement taken before the start, a standard module from
elsewhere (A7), and two processes that compiled different bytes from one path (F1). Code that came from no file, or is
not what its file compiles to, is judged by who executed it (B2, A6).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import CACHE_MARKS, Origins, Standing, rows, text
from trainguard.appraise.sweeps import whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

UNPICKLERS = ("/torch/serialization.py", "/pickle.py", "/joblib/numpy_pickle.py", "/dill/_dill.py", "/cloudpickle.py")
"""Files of libraries that execute what a data file tells them to."""

FINDING_LIMIT = 500


class Code:
    """See the module."""

    name = "code"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._origins = Origins(context)
        self._held = 0
        self._broken = 0
        self._blind: dict[str, None] = {}
        self._explained: dict[str, None] = {}
        self._first: dict[str, tuple[str, Evidence]] = {}
        self._told: set[tuple[str, str]] = set()
        self._data: dict[str, tuple[str, str | None]] = {}
        """SHA-256 of an opened file → its path and the place that opened it."""
        self._greeted: set[int | None] = set()
        self._spoke: set[int | None] = set()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        if evidence.kind == "process" and not self._forked(evidence):
            self._greeted.add(evidence.process)
        elif evidence.kind == "open":
            self._opened(evidence)
        elif evidence.kind == "code" and evidence.source == "process":
            self._spoke.add(evidence.process)
            for path, digest, module, how in rows(evidence.body.get("files"), 4):
                if isinstance(path, str) and isinstance(module, str) and isinstance(how, str):
                    yield from self._file(evidence, path, digest if isinstance(digest, str) else None, module, how)
            ran = evidence.body.get("ran")
            if isinstance(ran, dict):
                yield from self._ran(evidence, ran)

    @staticmethod
    def _forked(evidence: Evidence) -> bool:
        hello = evidence.body.get("hello")
        return isinstance(hello, dict) and hello.get("forked_from") is not None

    def _opened(self, evidence: Evidence) -> None:
        files = evidence.body.get("files")
        for line in files if isinstance(files, list) else ():
            if isinstance(line, dict) and isinstance(line.get("sha256"), str) and isinstance(line.get("path"), str):
                self._data[line["sha256"]] = (line["path"], text(line.get("place"), 4096))

    # -- files ----------------------------------------------------------------------------------------------------

    def _file(self, evidence: Evidence, path: str, digest: str | None, module: str, how: str) -> Iterator[Finding]:
        if digest is None:
            return  # a native module: its hash follows in a line of its own
        yield from self._same_everywhere(evidence, path, digest)
        area, _, _ = self._origins.area(path)
        locked, taken = self._origins.locked(path), self._origins.taken(path)
        standard = area == "library" or module.split(".")[0] not in sys.stdlib_module_names
        if area in ("program", "cache"):
            self._held += area == "program"
        elif how == "bytecode":
            yield from self._bytecode(evidence, path, module)
        elif area == "guard":
            yield from self._guard(evidence, path)
        elif self._origins.lock is not None:
            yield from self._against_lock(evidence, path, digest, module, locked, taken)
        elif taken is not None and taken != digest:
            yield from self._changed_since_start(evidence, path, digest, taken)
        elif not standard and module:
            yield from self._tell(
                evidence,
                "violated",
                f"module {module} of the standard library was taken from {path}",
                path,
                ("A7",),
                expected="the interpreter's own library",
                found=path,
            )
        elif area == "outside" and (elsewhere := self._origins.module_elsewhere(module)) is not None:
            yield from self._shadowed(evidence, path, module, elsewhere)
        else:
            self._held += 1

    def _against_lock(
        self, evidence: Evidence, path: str, digest: str, module: str, locked: str | None, taken: str | None
    ) -> Iterator[Finding]:
        if locked == digest:
            self._held += 1
        elif locked is not None and taken == locked:
            yield from self._changed_since_start(evidence, path, digest, taken)
        elif locked is not None:
            area, _, _ = self._origins.area(path)
            yield from self._tell(
                evidence,
                "violated",
                f"{path} is not what was approved",
                path,
                ("A5", "A13") if area == "library" else ("B1", "A13"),
                expected=f"sha256 {locked}",
                found=f"sha256 {digest}",
            )
        elif (elsewhere := self._origins.module_elsewhere(module) if module else None) is not None:
            yield from self._shadowed(evidence, path, module, elsewhere)
        else:
            library = self._origins.area(path)[0] == "library"
            yield from self._tell(
                evidence,
                "violated",
                f"{path} ({module or 'run as a script'}) is not in the lock",
                path,
                ("A5", "A13") if library else ("B1", "A13", "B2"),
                expected="only files that the lock lists",
                found=f"sha256 {digest}",
            )

    def _changed_since_start(self, evidence: Evidence, path: str, digest: str, taken: str) -> Iterator[Finding]:
        yield from self._tell(
            evidence,
            "violated",
            f"{path} was changed between the measurement before the start and its import",
            path,
            ("A13",),
            expected=f"sha256 {taken}, as measured before the start",
            found=f"sha256 {digest}",
        )

    def _shadowed(self, evidence: Evidence, path: str, module: str, elsewhere: str) -> Iterator[Finding]:
        yield from self._tell(
            evidence,
            "violated",
            f"module {module} was taken from {path} and hides {elsewhere}",
            path,
            ("A7", "A13"),
            expected=elsewhere,
            found=path,
        )

    def _bytecode(self, evidence: Evidence, path: str, module: str) -> Iterator[Finding]:
        lock = self._origins.lock
        _, tree, below = self._origins.area(path)
        known = lock.trees[tree].bytecode if lock is not None and tree in lock.trees else {}
        if known.get(below, "").endswith("sourceless"):
            self._held += 1
            return
        yield from self._tell(
            evidence,
            "violated" if lock is not None else "suspicious",
            f"module {module} ran from bytecode without source, {path}",
            path,
            ("A6",),
            expected="source whose bytes can be compared",
            found="a .pyc file alone",
        )

    def _guard(self, evidence: Evidence, path: str) -> Iterator[Finding]:
        if self._origins.standing(path) == "guard":
            self._held += 1
            return
        yield from self._tell(
            evidence,
            "suspicious",
            f"{path}, a file of the guard inside the job, is not the one this judge was shipped with",
            path,
            ("G6", "G7"),
        )

    def _same_everywhere(self, evidence: Evidence, path: str, digest: str) -> Iterator[Finding]:
        first = self._first.setdefault(path, (digest, evidence))
        if first[0] != digest and first[1].process != evidence.process:
            yield from self._tell(
                evidence,
                "suspicious",
                f"process {evidence.pid} compiled other bytes from {path} than process {first[1].pid}",
                path,
                ("F1", "A13"),
                expected=f"sha256 {first[0]}",
                found=f"sha256 {digest}",
                key="ranks",
            )

    # -- code that no file accounts for ---------------------------------------------------------------------------

    def _ran(self, evidence: Evidence, ran: dict[str, Any]) -> Iterator[Finding]:
        file, place = text(ran.get("file"), 4096) or "?", text(ran.get("place"), 4096) or "interpreter"
        step = evidence.step
        if file.startswith("<"):
            yield from self._string(evidence, ran, place, step)
            return
        if any(mark in file for mark in CACHE_MARKS):
            yield from self._cached(evidence, ran, file, place)
            return
        if ran.get("same") is False and (":" not in place or self._origins.standing(place) != "library"):
            yield from self._tell(
                evidence,
                "violated" if ":" not in place or self._origins.lock is not None else "suspicious",
                f"code that calls itself {file} ran in step {step or 0}, but that file does not compile to it",
                place if ":" in place else file,
                ("A6", "B2"),
                expected=f"what sha256 {ran.get('sha256')} compiles to",
                found=f"code object {str(ran.get('code'))[:16]}",
            )
        elif any(path == file for path, _ in self._told):
            return  # the file itself has been named already
        elif self._origins.standing(file) in ("foreign", "planted") and place != "interpreter":
            yield from self._tell(
                evidence,
                "violated" if self._origins.lock is not None else "suspicious",
                f"{place} executed {file}, which belongs to neither the job's code nor its libraries",
                place,
                ("B2", "B1"),
                found=f"sha256 {ran.get('sha256')}",
            )

    def _string(self, evidence: Evidence, ran: dict[str, Any], place: str, step: int | None) -> Iterator[Finding]:
        source = text(ran.get("source"), 64)
        standing = self._origins.standing(place)
        opened = self._data.get(source) if source is not None else None
        loading = standing == "library" and place.rpartition(":")[0].endswith(UNPICKLERS)
        if place == "interpreter" or (standing in ("library", "guard") and not loading):
            self._held += 1  # `python -c`, whose text is part of the command; or a library's own business
            return
        if not loading and self._is_accepted_text(source, opened, standing, step):
            self._held += 1
            return
        data = f", read from {opened[0]}," if opened is not None else ""
        when = f"in step {step}" if step is not None else "before the first step"
        severe = self._origins.lock is not None and (loading or opened is not None or standing == "planted")
        yield from self._tell(
            evidence,
            "violated" if severe else "suspicious",
            f"text{data} was executed as code {when} by {place}, in {whose(standing)}",
            place,
            ("E1", "B2") if loading else ("B2",),
            expected="code from files that are in the lock",
            found=f"source sha256 {source}",
        )

    def _is_accepted_text(
        self, source: str | None, opened: tuple[str, str | None] | None, standing: Standing, step: int | None
    ) -> bool:
        """Whether text that ran is that of an accepted file, or made by the job's own code before training."""
        if source is not None and source in self._known_sources():
            return True
        if opened is not None:
            return self._origins.standing(opened[0]) in ("approved", "own")
        return step is None and standing in ("own", "approved")

    def _cached(self, evidence: Evidence, ran: dict[str, Any], file: str, place: str) -> Iterator[Finding]:
        owner = ran.get("owner")
        if not (isinstance(owner, list) and len(owner) == 4 and all(isinstance(part, int) for part in owner)):
            return
        uid, mode, folder_uid, folder_mode = owner
        others = {uid, folder_uid} - {evidence.uid, 0}
        if others or (mode | folder_mode) & 0o022:
            yield from self._tell(
                evidence,
                "suspicious",
                f"{file}, generated code run by {place}, can be written by other accounts than {evidence.uid}",
                file,
                ("A8",),
                expected=f"owner {evidence.uid}, not writable by others",
                found=f"owners {uid} and {folder_uid}, modes {mode:o} and {folder_mode:o}",
            )

    def _known_sources(self) -> set[str]:
        return {digest for path, digest in self._origins.hashes.items() if self._origins.standing(path) != "planted"}

    # -- the balance ----------------------------------------------------------------------------------------------

    def end(self) -> Iterator[Finding | LinkState]:
        if self._origins.lock is None:
            self._blind["no lock: what was loaded is compared only with what was measured before the start"] = None
        if self._origins.measured is None:
            self._blind["nothing was measured before the start"] = None
        for problem in self._origins.problems:
            self._blind[problem] = None
        mute = len(self._greeted - self._spoke)
        if mute:
            self._blind[f"{mute} processes reported nothing they loaded"] = None
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=tuple(self._blind),
            explained=tuple(self._explained),
        )

    def _tell(
        self,
        evidence: Evidence,
        outcome: Outcome,
        message: str,
        path: str,
        techniques: tuple[str, ...],
        *,
        expected: str | None = None,
        found: str | None = None,
        key: str = "",
    ) -> Iterator[Finding]:
        """One finding, once for each path and account of it, unless it is approved."""
        if self._origins.approves(self.name, path):
            self._explained[self._origins.relative(path)] = None
            return
        if (path, key or techniques[0]) in self._told:
            return
        self._told.add((path, key or techniques[0]))
        self._broken += 1
        if self._broken > FINDING_LIMIT:
            return
        yield finding_from(
            self.name,
            outcome,
            message,
            evidence,
            run=self._run,
            techniques=techniques,
            path=path,
            expected=expected,
            found=found,
        )
