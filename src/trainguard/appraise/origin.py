"""Whose file is it? One answer for every check that meets a path or a `file:line`.

Paths come from the training process; what they are worth comes from outside it: the lock, and the measurement that was
taken before this attempt. Only where there is neither do the process's own claims about its folders count.

    library    interpreter or installed package, as locked (or, without a lock, as measured or merely there); source
               that such a package wrote in this run
    approved   the job's own code, exactly as locked
    own        the job's own code; there is no lock to hold it to
    guard      a file of trainguard that is the one this judge was shipped with, or that the lock holds; of a run that
               another version recorded, the one that its supervisor had
    cache      made on this machine from other code: TorchInductor, Triton, remote modules
    foreign    outside the job's folder and every library; there is no lock
    planted    contradicts the lock, or is not what was measured before the start
    generated  code without a file
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from trainguard import __version__
from trainguard.appraise.interface import Context
from trainguard.digest import HEX_SHA256_LENGTH, file_sha256
from trainguard.errors import TrainguardError
from trainguard.evidence import Evidence
from trainguard.lockfile import Measurement, Plan, parse_lock, parse_measurement
from trainguard.policy import Policy

Standing = Literal["library", "approved", "own", "guard", "cache", "foreign", "planted", "generated"]
Area = Literal["library", "code", "data", "guard", "program", "cache", "outside"]

SYSTEM = ("/usr/", "/etc/", "/lib/", "/lib64/", "/bin/", "/sbin/", "/opt/", "/run/", "/proc/", "/sys/", "/dev/")
CACHE_MARKS = ("/torchinductor_", "/.triton/", "/triton/", "/torch_extensions/", "/transformers_modules/")
PATHS_LIMIT = 200_000
"""Paths remembered per run; an attacker cannot make a judge hold more."""


GENERATED_LIMIT = 10_000
REFERENCES_LIMIT = 4


class Origins:
    """Learns roots and hashes from the records, then classes paths. Feed it every record first."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.lock: Measurement | None = None
        self.measured: Measurement | None = None
        self.problems: list[str] = []
        """Why lock or measurement cannot be used, one sentence each."""
        self.hashes: dict[str, str] = {}
        """Path → SHA-256 of what was compiled, as the first process said."""
        self.outputs: tuple[str, ...] = ()
        """Folders and files that the lock declares as written by the job."""
        self._approved = Policy()
        self._real: dict[str, str] = {}
        self._areas: list[tuple[str, Area, str]] = []
        self._folders: tuple[str, ...] = ()
        self._locked: dict[str, Mapping[str, str]] = {}
        self._taken: dict[str, Mapping[str, str]] = {}
        self._generated: set[str] = set()
        """Source files that installed packages wrote in this run."""
        self._guard: str | None = None
        self._guard_then: Mapping[str, str] | None = None
        """The guard's files by the word of a supervisor of another version; None where this judge's own are meant."""
        self._cwd: str | None = None

    # -- learning -------------------------------------------------------------------------------------------------

    def see(self, evidence: Evidence) -> None:
        """Take note of what `evidence` says about folders and hashes."""
        body = evidence.body
        if evidence.kind == "start":
            self._start(body)
        elif evidence.kind == "measurement":
            self._measurement(body)
        elif evidence.kind == "code":
            self._where(body.get("where"))
            for path, digest, *_ in rows(body.get("files"), 4):
                if isinstance(path, str) and isinstance(digest, str) and len(self.hashes) < PATHS_LIMIT:
                    self.hashes.setdefault(self.normal(path), digest)
        elif evidence.kind == "open":
            self._opened(body.get("files"))

    def _start(self, body: Mapping[str, Any]) -> None:
        cwd = body.get("cwd")
        self._cwd = cwd if isinstance(cwd, str) else None
        command = body.get("command")
        words = [word for word in command if isinstance(word, str)] if isinstance(command, list) else []
        scripts = [word for word in words[1:] if word.endswith(".py")]
        base = self._cwd or "/"
        named = (_join(base, script).rsplit("/", 1)[0] for script in scripts[:1])
        self._folders = tuple(dict.fromkeys([*named, base]))
        if body.get("trainguard") != __version__ and isinstance(body.get("guard"), str):
            self._guard_then = self._recorded_guard(body["guard"])

    def _recorded_guard(self, digest: str) -> Mapping[str, str] | None:
        try:
            return msgspec.json.decode(self._context.blob(digest), type=dict[str, str])
        except (TrainguardError, msgspec.DecodeError) as error:
            self.problems.append(f"the guard's own files as recorded at the start cannot be read: {error}")
            return None

    def _measurement(self, body: Mapping[str, Any]) -> None:
        blob, lock = body.get("blob"), body.get("lock")
        try:
            if isinstance(blob, str):
                self.measured, self._taken, *_ = _reference(blob, self._context, locked=False)
            if isinstance(lock, str):
                self.lock, self._locked, self._approved, _ = _reference(lock, self._context, locked=True)
        except TrainguardError as error:
            self.problems.append(str(error))
            return
        self.outputs = self.lock.declared.outputs if self.lock is not None else ()
        self._rebuild()

    def _opened(self, files: object) -> None:
        """Source that a package generates: it could as well execute the text, which is its own business too."""
        for line in dicts(files):
            path, package = line.get("path"), line.get("by")
            if line.get("mode") != "w" or not isinstance(path, str) or not isinstance(package, str):
                continue
            if path.endswith(".py") and len(self._generated) < GENERATED_LIMIT and self.standing(package) == "library":
                self._generated.add(self.normal(path))

    def _where(self, where: object) -> None:
        """The process's own word on its folders: used for aliases, the guard, and where nothing was measured."""
        if not isinstance(where, dict):
            return
        real, roots, site = where.get("real"), where.get("roots"), where.get("site")
        if isinstance(real, dict):
            self._real.update({a: r for a, r in real.items() if isinstance(a, str) and isinstance(r, str)})
        if isinstance(roots, dict):
            guard, prefix = roots.get("guard"), roots.get("prefix")
            self._guard = guard if isinstance(guard, str) else self._guard
            if isinstance(prefix, str):
                self._claim(prefix + "/bin", "program")
            self._claim(roots.get("stdlib"), "library")
        for folder in site if isinstance(site, list) else ():
            self._claim(folder, "library")
        self._rebuild()

    def _claim(self, root: object, area: Area) -> None:
        if isinstance(root, str) and len(root) > 1 and self.measured is None and len(self._areas) < 1000:
            entry = (self.normal(root), area, "")
            if entry not in self._areas:
                self._areas.append(entry)

    def _rebuild(self) -> None:
        if self.measured is not None:
            self._areas = [
                (self.normal(tree.root), _area(name), name) for name, tree in self.measured.trees.items() if tree.root
            ]
            if self.measured.interpreter is not None:
                self._areas.append((self.normal(self.measured.interpreter.prefix + "/bin"), "program", ""))
        self._areas.sort(key=lambda entry: -len(entry[0]))

    # -- answers --------------------------------------------------------------------------------------------------

    def normal(self, path: str) -> str:
        """`path` with the aliases that the job's process resolved (a symbolic link to its environment)."""
        for alias, real in self._real.items():
            if path == alias or path.startswith(alias + "/"):
                return real + path[len(alias) :]
        return path

    def area(self, path: str) -> tuple[Area, str, str]:
        """Which kind of place a path is, the tree it lies in, and its path below that tree's root."""
        path = self.normal(path)
        if self._guard is not None and path.startswith(self.normal(self._guard) + "/"):
            return "guard", "", path[len(self.normal(self._guard)) + 1 :]
        found = self._tree_of(path)
        if found is not None:
            return found
        if any(mark in path for mark in CACHE_MARKS) or self._in_cache(path) or path in self._generated:
            return "cache", "", path
        for folder in self._folders if self.measured is None else ():
            if path.startswith(folder + "/"):
                return "code", "", path[len(folder) + 1 :]
        return "outside", "", path

    def _tree_of(self, path: str) -> tuple[Area, str, str] | None:
        """The innermost tree around a path; of several with one root, the one that lists it: data lies beside code."""
        innermost: tuple[Area, str, str] | None = None
        length = 0
        for root, area, name in self._areas:
            if innermost is not None and len(root) < length:
                break
            if path != root and not path.startswith(root + "/"):
                continue
            below = path[len(root) + 1 :] or path.rsplit("/", 1)[-1]
            if below in self._locked.get(name, ()) or below in self._taken.get(name, ()):
                return area, name, below
            if innermost is None:
                innermost, length = (area, name, below), len(root)
        return innermost

    def locked(self, path: str) -> str | None:
        """SHA-256 that the lock holds for `path`, or None."""
        _, tree, below = self.area(path)
        return _digest(self._locked.get(tree, {}).get(below))

    def taken(self, path: str) -> str | None:
        """SHA-256 that was measured for `path` before this attempt, or None."""
        _, tree, below = self.area(path)
        return _digest(self._taken.get(tree, {}).get(below))

    def measured_value(self, path: str) -> tuple[str, int] | None:
        """SHA-256 and size in bytes that were measured for `path` before this attempt, or None."""
        _, tree, below = self.area(path)
        digest, _, size = self._taken.get(tree, {}).get(below, "").partition(" ")
        return (digest, int(size)) if _digest(digest) is not None and size.isdigit() else None

    def standing(self, place: str) -> Standing:
        """What a path, or a `file:line`, is worth."""
        if place.startswith("<"):
            return "library" if place.startswith("<frozen ") else "generated"
        path = self.normal(_file(place))
        if path in self._generated:
            return "library"
        area, _, below = self.area(path)
        loaded = self.hashes.get(path)
        if area == "guard":
            return "guard" if self._is_guard(below, loaded, path) else "planted"
        if area in ("program", "cache"):
            return "library" if area == "program" else "cache"
        if area == "outside":
            return "planted" if self.lock is not None else "foreign"
        reference = self.locked(path) if self.lock is not None else self.taken(path)
        if self.lock is None and self.measured is None:
            return "library" if area == "library" else "own"
        if reference is None:
            return "planted" if self.lock is not None or area == "library" else "foreign"
        if loaded is not None and loaded != reference:
            return "planted"
        if area == "library":
            return "library"
        return "approved" if self.lock is not None else "own"

    def relative(self, place: str) -> str:
        """`place` relative to the code root where it lies inside, as approvals name it."""
        area, _, below = self.area(_file(place))
        line = place[len(_file(place)) :]
        return below + line if area == "code" else place

    def approves(self, check: str, place: str) -> bool:
        """Whether policy or lock approve a departure of `check` at `place`, named absolutely or below the code root."""
        names = (place, self.relative(place))
        return any(policy.approves(check, name) for policy in (self._context.policy, self._approved) for name in names)

    def declared_output(self, path: str) -> bool:
        """Whether the lock says that the job writes this file or folder."""
        path, base = self.normal(path), self._cwd or "/"
        return any(path == (o := _join(base, one)) or path.startswith(o + "/") for one in self.outputs)

    def module_elsewhere(self, module: str) -> str | None:
        """Where the lock (or the measurement) has a module of this name in a library, as `<tree>/<path>`."""
        top = module.split(".")[0]
        for tree, files in (self._locked or self._taken).items():
            if _area(tree) != "library":
                continue
            for below in (f"{top}.py", f"{top}/__init__.py"):
                if below in files:
                    return f"{tree}/{below}"
        return None

    def guard_file(self, below: str) -> str | None:
        """SHA-256 of a file of the guard's inner half, as this judge was shipped with it."""
        return self._guard_files().get(below)

    def _guard_files(self) -> Mapping[str, str]:
        return guard_files() if self._guard_then is None else self._guard_then

    def _in_cache(self, path: str) -> bool:
        caches = self.measured.caches if self.measured is not None else ()
        return any(cache.path and path.startswith(cache.path + "/") for cache in caches)

    def _is_guard(self, below: str, loaded: str | None, path: str) -> bool:
        if loaded is None:
            return True  # named as an origin only; its hash is judged where it was loaded
        return loaded in (self._guard_files().get(below), self.locked(path))


def rows(value: object, width: int) -> list[list[Any]]:
    """The well-formed rows of a list of lists; others are passed over."""
    return [row for row in value if isinstance(row, list) and len(row) == width] if isinstance(value, list) else []


def dicts(value: object) -> list[dict[str, Any]]:
    """The objects in a list of objects; anything else is passed over."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text(value: object, limit: int = 500) -> str | None:
    """`value` if it is text, cut to `limit`; else None."""
    return value[:limit] if isinstance(value, str) else None


def locked_plan(digest: str, context: Context) -> Plan | None:
    """The plan in the lock with this digest. Raises TrainguardError where it cannot be read."""
    return _reference(digest, context, locked=True)[3]


Reference = tuple[Measurement, dict[str, Mapping[str, str]], Policy, Plan | None]
_references: dict[str, Reference] = {}
"""The last few locks and measurements, by digest: every check of a run reads the same ones."""


def _reference(digest: str, context: Context, *, locked: bool) -> Reference:
    """A measurement, alone or in a lock, with its merged contents and the lock's approvals and plan."""
    if digest not in _references:
        data = context.blob(digest)
        if locked:
            lock = parse_lock(data, where="lock")
            known: Reference = (
                lock.measurement,
                _contents(lock.measurement),
                Policy(approve=lock.approvals),
                lock.plan,
            )
        else:
            measurement = parse_measurement(data, where="measurement")
            known = (measurement, _contents(measurement), Policy(), None)
        while len(_references) >= REFERENCES_LIMIT:
            _references.pop(next(iter(_references)))
        _references[digest] = known
    return _references[digest]


def _contents(measurement: Measurement) -> dict[str, Mapping[str, str]]:
    """Tree name → path below its root → value, with the files of installed packages in their tree."""
    merged: dict[str, dict[str, str]] = {name: dict(tree.files) for name, tree in measurement.trees.items()}
    for distribution in measurement.distributions.values():
        merged.setdefault(distribution.tree, {}).update(distribution.files)
    return dict(merged)


def _area(tree: str) -> Area:
    if tree.startswith(("stdlib", "site-packages", "user-site")):
        return "library"
    return "data" if tree.startswith(("data:", "weights:")) else "code"


def _digest(value: str | None) -> str | None:
    head = (value or "").split(" ", 1)[0]
    return head if len(head) == HEX_SHA256_LENGTH else None


def _file(place: str) -> str:
    path, _, line = place.rpartition(":")
    return path if path and line.isdigit() else place


def _join(base: str, path: str) -> str:
    parts: list[str] = []
    for part in (path if path.startswith("/") else f"{base}/{path}").split("/"):
        if part == "..":
            parts[-1:] = []
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


@functools.cache
def guard_files() -> dict[str, str]:
    """SHA-256 of the in-process half of this very installation, by path below its folder."""
    folder = Path(__file__).parent.parent / "watch"
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*.py")}
