"""Check *inputs*: what the job reads is what was approved, and stays the same while it runs (docs/checks/inputs.md).

With a lock, a file that is read must be in it, with that content, unless the job wrote it itself. With or without: a
file whose content changes between two reads of one run (B2), naming the step in which the new content came in and the
line that reads it; a small file that training asks for again and again (B2); addresses and native libraries that come
in while training runs (B2, A3).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import SYSTEM, Origins, dicts, text
from trainguard.appraise.sweeps import whose
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

POLLED_BYTES = 256 * 1024
"""A control file is small; data that is read again and again is not."""

KNOWN_BEFORE_BYTES = 16 * 1024
"""The same for a file that was read before the first step already, as data sets are."""

READER_FILES = 8
"""A line that opens more different files than this reads data."""

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
SEALABLE = (*CHECKPOINTS, ".pkl", ".pickle", ".tar")
"""What a run seals where it saves it, and another may go on from."""
SETTLE_NS = 2_000_000_000
"""The supervisor has looked at a file within this time after the job read it."""
DATA = (".npy", ".npz", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".jsonl", ".idx", ".mds", ".tar", ".h5", ".pkl")
PATHS_LIMIT = 100_000
FOLDERS_LIMIT = 1000
FINDING_LIMIT = 500


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A model file that the lock does not list, until the supervisor may have said what it is."""

    evidence: Evidence
    path: str
    place: str | None
    line: dict[str, Any]


class Inputs:
    """See the module."""

    name = "inputs"

    def __init__(self, context: Context) -> None:
        self._run = context.run
        self._origins = Origins(context)
        self._held = 0
        self._listed = 0
        self._broken = 0
        self._blind: dict[str, None] = {}
        self._explained: dict[str, None] = {}
        self._outputs: set[str] = set()
        self._folders: set[str] = set()
        self._made: set[str] = set()
        """Folders that the job made."""
        self._moved: list[tuple[str, str]] = []
        """Folders that the job renamed: (new name, old name)."""
        self._began: int | None = None
        """Supervisor's clock at the start of the run."""
        self._polled: dict[str, tuple[Evidence, dict[str, Any]]] = {}
        self._readers: dict[str, set[str]] = {}
        self._told: set[tuple[str, str]] = set()
        self._changed: set[str] = set()
        self._spoke = False
        self._lock: str | None = None
        self._continued: set[str] = set()
        """Files that are what runs under the same lock saved, by their seals."""
        self._unsettled: list[_Unsettled] = []

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        self._origins.see(evidence)
        if self._unsettled:
            yield from self._settle(evidence.at)
        if evidence.source != "process":
            self._supervised(evidence)
            return
        self._spoke = self._spoke or evidence.kind == "code"
        if evidence.kind != "open":
            return
        for line in dicts(evidence.body.get("files")):
            path = text(line.get("path"), 4096)
            if path is not None:
                yield from self._file(evidence, path, line)
        made = text(evidence.body.get("made"), 4096)
        if made is not None and len(self._made) < PATHS_LIMIT:
            self._made.add(made)
        outside = evidence.body.get("outside")
        if isinstance(outside, dict):
            yield from self._outside(evidence, outside)
        if isinstance(evidence.body.get("skipped"), int):
            self._blind[f"process {evidence.pid} opened more files than are listed one by one"] = None

    def _supervised(self, evidence: Evidence) -> None:
        """When the run began and under what, and which files are what was sealed."""
        if evidence.kind == "start":
            self._began, self._lock = evidence.at, text(evidence.body.get("lock"))
        path, sealed = text(evidence.body.get("path"), 4096), evidence.body.get("sealed")
        if evidence.kind != "opened" or path is None or not isinstance(sealed, dict):
            return
        if self._lock is not None and sealed.get("lock") == self._lock and len(self._continued) < PATHS_LIMIT:
            self._continued.add(path)

    # -- files ----------------------------------------------------------------------------------------------------

    def _file(self, evidence: Evidence, path: str, line: dict[str, Any]) -> Iterator[Finding]:
        if line.get("mode") == "alias":
            return  # another name of a file; where it is read, it speaks for itself
        if line.get("mode") == "moved":
            source = text(line.get("of"), 4096)
            if source is not None and len(self._moved) < FOLDERS_LIMIT:
                self._moved.append((path, source))
            return
        if line.get("mode") == "w":
            if len(self._outputs) < PATHS_LIMIT:
                self._outputs.add(path)
                self._folders.add(path.rsplit("/", 1)[0])
            return
        place = text(line.get("place"), 4096)
        if place is not None and len(self._readers) < PATHS_LIMIT:
            self._readers.setdefault(place, set()).add(path)
        area, _, _ = self._origins.area(path)
        if area in ("library", "guard", "program") or path.startswith(SYSTEM):
            return
        if area == "cache" or self._is_package_cache(path, text(line.get("by"), 4096)):
            yield from self._cached(evidence, path, place, line)
        elif line.get("changed") is True:
            yield from self._altered(evidence, path, place, line)
        elif line.get("polled") is not None:
            self._polled[path] = (evidence, line)
        else:
            yield from self._first_read(evidence, path, place, line)

    def _first_read(self, evidence: Evidence, path: str, place: str | None, line: dict[str, Any]) -> Iterator[Finding]:
        self._listed += 1
        if self._origins.lock is None:
            return
        locked, found = self._origins.locked(path), line.get("sha256")
        if locked is not None and found in (locked, None):
            self._held += 1
            if found is None:
                self._blind["some inputs were too large to hash while they were read"] = None
        elif locked is not None:
            yield from self._tell(
                evidence,
                "violated",
                f"{path}, read by {place}, is not what was approved",
                path,
                place,
                line,
                techniques=("B2", "D5"),
                expected=f"sha256 {locked}",
                found=f"sha256 {found}",
            )
        elif self._is_output(path, line, evidence.uid) or _is_metadata(path):
            return
        elif path.endswith(SEALABLE):
            self._unsettled.append(_Unsettled(evidence, path, place, line))
        else:
            yield from self._unlisted(evidence, path, place, line)

    def _settle(self, now: int | None) -> Iterator[Finding]:
        """Model files that are not in the lock: held where this lock's runs saved them, told where nobody says so."""
        waiting, self._unsettled = self._unsettled, []
        for each in waiting:
            if each.path in self._continued:
                self._held += 1
            elif now is not None and now - each.evidence.at < SETTLE_NS:
                self._unsettled.append(each)
            else:
                yield from self._unlisted(each.evidence, each.path, each.place, each.line)

    def _unlisted(self, evidence: Evidence, path: str, place: str | None, line: dict[str, Any]) -> Iterator[Finding]:
        found = line.get("sha256")
        yield from self._tell(
            evidence,
            "suspicious",
            f"{path}, read by {place}, is not among the inputs of the lock (data are named with --data in making it, "
            f"what an earlier run left with --output)",
            path,
            place,
            line,
            techniques=("E3", "B2") if path.endswith(CHECKPOINTS) else ("B2",),
            expected="an input that the lock lists",
            found=f"sha256 {found}",
        )

    def _cached(self, evidence: Evidence, path: str, place: str | None, line: dict[str, Any]) -> Iterator[Finding]:
        """What compilers and packages keep between runs: whoever can write it reaches into the job."""
        owner = line.get("uid")
        if owner in (evidence.uid, 0, None):
            self._listed += 1
            return
        yield from self._tell(
            evidence,
            "suspicious",
            f"{path}, a cache that {place} reads, belongs to account {owner}",
            path,
            place,
            line,
            techniques=("A8",),
            expected=f"owner {evidence.uid}",
            found=f"owner {owner}",
        )

    def _is_package_cache(self, path: str, reader: str | None) -> bool:
        """Whether an installed package asks for a file in its own folder of the account's cache: ~/.cache/NAME.

        Its code is what the lock says; weights and data are kept there too, and those are inputs.
        """
        if reader is None or path.endswith((*CHECKPOINTS, *DATA)):
            return False
        area, _, below = self._origins.area(reader)
        if area != "library" or self._origins.standing(reader) != "library":
            return False
        return f"/.cache/{below.split('/', 1)[0]}/" in path

    def _is_output(self, path: str, line: dict[str, Any], uid: int | None) -> bool:
        """Whether the job wrote the file, as far as is known: said so, declared so, or made among its own files.

        What native code writes is seen by nobody (torch.save of an object without tensors, tokenizers): such a file
        lies beside others that were, or in a folder that the job made, and belongs to its account.
        """
        if self._wrote(path) or self._origins.declared_output(path):
            return True
        written = line.get("mtime_ns")
        fresh = isinstance(written, int) and self._began is not None and written >= self._began
        if fresh and path.endswith(CHECKPOINTS) and path.rsplit("/", 1)[0] in self._folders:
            return True
        return (
            fresh and line.get("uid") == uid is not None and any(str(f) in self._made for f in PurePath(path).parents)
        )

    def _wrote(self, path: str) -> bool:
        """Whether the job wrote the file, under this name or under that of a folder it renamed since."""
        if path in self._outputs:
            return True
        for target, source in reversed(self._moved):
            if path.startswith(target + "/"):
                path = source + path[len(target) :]
                if path in self._outputs:
                    return True
        return False

    def _altered(self, evidence: Evidence, path: str, place: str | None, line: dict[str, Any]) -> Iterator[Finding]:
        own = line.get("own") is True
        if self._wrote(path) and not own:
            return  # another process of this job wrote it
        self._changed.add(path)
        step = line.get("step")
        locked = self._origins.lock is not None and self._origins.locked(path) not in (None, line.get("sha256"))
        writer = "the job wrote it, somebody else changed it" if own else "the job did not write it"
        yield from self._tell(
            evidence,
            "violated" if locked else "suspicious",
            f"{path} changed while the run reads it: new content first read in step {step}, at {place}; {writer}",
            path,
            place,
            line,
            techniques=("E3", "B2") if path.endswith(CHECKPOINTS) else ("B2",),
            expected=f"sha256 {line.get('was')}",
            found=f"sha256 {line.get('sha256')}",
            key=f"changed {line.get('sha256')}",
        )

    def _end_polled(self) -> Iterator[Finding]:
        for path, (evidence, line) in self._polled.items():
            place, size, first = text(line.get("place"), 4096), line.get("size"), line.get("first")
            small = isinstance(size, int) and size <= (KNOWN_BEFORE_BYTES if first is None else POLLED_BYTES)
            data = len(self._readers.get(place or "", ())) > READER_FILES
            accepted = self._origins.lock is not None and self._origins.locked(path) == line.get("sha256")
            skipped = path in self._changed or self._wrote(path) or accepted or data
            if skipped or not small or place is None:
                continue
            if self._origins.standing(place) in ("library", "guard"):
                continue
            steps = line.get("polled")
            yield from self._tell(
                evidence,
                "suspicious",
                f"{path} is read again and again while training runs, at {place}: "
                "what it says later can change what the code does",
                path,
                place,
                line,
                techniques=("B2",),
                expected="inputs that are read before training begins, or approved",
                found=f"read in steps {steps}",
                key="polled",
            )

    # -- other ways in --------------------------------------------------------------------------------------------

    def _outside(self, evidence: Evidence, line: dict[str, Any]) -> Iterator[Finding]:
        way, what, place = line.get("way"), text(line.get("what"), 2048) or "?", text(line.get("place"), 4096)
        if way == "dlopen":
            yield from self._library(evidence, what, place)
            return
        self._listed += 1
        standing = self._origins.standing(place) if place is not None else "library"
        if evidence.step is None or standing in ("library", "guard") or _is_local(what):
            return
        yield from self._tell(
            evidence,
            "suspicious",
            f"training read from {what} in step {evidence.step}, at {place}, in {whose(standing)}",
            what,
            place,
            {"step": evidence.step},
            techniques=("B2",),
            expected="no input from outside while training runs",
            found=what,
        )

    def _library(self, evidence: Evidence, what: str, place: str | None) -> Iterator[Finding]:
        if not what.startswith("/") or what.startswith(SYSTEM) or self._origins.area(what)[0] != "outside":
            return
        yield from self._tell(
            evidence,
            "suspicious",
            f"native library {what}, from outside every installed package, was loaded at {place}",
            what,
            place,
            {"step": evidence.step},
            techniques=("A3", "A4"),
            expected="libraries of the system or of installed packages",
            found=what,
        )

    # -- the balance ----------------------------------------------------------------------------------------------

    def end(self) -> Iterator[Finding | LinkState]:
        yield from self._settle(None)
        yield from self._end_polled()
        if self._origins.lock is None:
            self._blind["no lock: inputs were listed and watched for changes, not compared"] = None
        held = self._held + (1 if self._spoke and not self._broken else 0)
        yield LinkState(
            link=self.name,
            held=held,
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
        place: str | None,
        line: dict[str, Any],
        *,
        techniques: tuple[str, ...],
        expected: str | None = None,
        found: str | None = None,
        key: str = "",
    ) -> Iterator[Finding]:
        """One finding at the line that reads, or at the file; approved by either."""
        for name in (place, path):
            if name is not None and self._origins.approves(self.name, name):
                self._explained[self._origins.relative(name)] = None
                return
        if (path, key) in self._told:
            return
        self._told.add((path, key))
        self._broken += 1
        if self._broken > FINDING_LIMIT:
            return
        step = line.get("step")
        yield finding_from(
            self.name,
            outcome,
            message,
            evidence,
            run=self._run,
            techniques=techniques,
            path=place or path,
            step=step if isinstance(step, int) else None,
            expected=expected,
            found=found,
        )


def _is_metadata(path: str) -> bool:
    """Whether a path is a package's own description, which importing asks for; entry points are measured as such."""
    return any(mark in path for mark in (".dist-info/", ".egg-info/"))


def _is_local(what: str) -> bool:
    """Whether an address is of this machine."""
    host = what.split("://")[-1].split("/")[0].rsplit(":", 1)[0].strip("[]")
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
