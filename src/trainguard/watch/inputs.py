"""Link *inputs*: every file the process opens, with the line that opened it, and other ways in from outside.

Heard from audit events (`open`, `os.rename`, `socket.connect`, `urllib.Request`, `ctypes.dlopen`, …), before the call
takes place. Of a file that is read: its hash (bounded), owner and times at the first open, and again whenever its
identity or times differ from what this process last saw and this process did not write it. So a side file that is
changed while the run reads it is named with the step in which the new content came in.

Frames (spec/evidence.md, "open"):

    kind "open", body {"files": [{"path", "mode", "sha256", "size", "mtime_ns", "ctime_ns", "uid", "place", …}, …]}
    kind "open", body {"made": path}                  a folder that this process makes
    kind "open", body {"outside": {"way": "connect" | "url" | "dlopen", "what", "place"}}

Not seen: files that native code opens itself (Rust, C++), unless they are still mapped when a step ends.
"""

from __future__ import annotations

import atexit
import os
import stat
import sys
import threading
import time
from typing import Any, Dict, List, Optional, Set, Tuple

from . import audit, code, datasets, saves
from .client import Client

HASH_LIMIT_BYTES = 64 << 20
"""Largest file hashed before the first step; IN_LOOP_LIMIT_BYTES once training runs."""

IN_LOOP_LIMIT_BYTES = 4 << 20
BATCH_BYTES = 60_000
BATCH_SECONDS = 0.25
FILES_LIMIT = 5_000
FOLDERS_LIMIT = 1_000
"""Files reported one by one; past it a process only counts them."""

POLLED_STEPS = 3
"""A file opened again in this many different steps is reported as polled."""

RECOMPILE_EVERY = 40
"""Steps between comparisons of one cached code object with its source."""

SCAN_EVERY = 200
"""Steps between looks at what native code has mapped."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
IGNORED = ("/proc/", "/sys/", "/dev/")
MEMORY = "/dev/shm/"  # noqa: S108
"""Ordinary files can lie there too. What is only mapped from it (shared tensors) is not told."""
DETOURS = ("/fd/", "/cwd/", "/root/", "/stdin")
Identity = Tuple[int, int, int, int, int]


class File:
    """What this process knows of one path."""

    __slots__ = ("digest", "first", "identity", "opens", "own", "settled", "steps")

    def __init__(self) -> None:
        self.identity: Optional[Identity] = None
        self.digest: Optional[str] = None
        self.first: Optional[int] = None
        """Step of the first open; None before the first step."""
        self.opens = 0
        self.steps: Set[int] = set()
        self.own = False
        """Whether this process wrote it."""
        self.settled = True
        """Whether `identity` is known to be that of our own last write."""


class Inputs:
    """The files and addresses of one process. One instance, made by `install`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.files: Dict[str, File] = {}
        self.unsettled: Set[str] = set()
        self._pending: List[Dict[str, Any]] = []
        self._pending_bytes = 0
        self._since = 0.0
        self._waited = False
        self._reported = 0
        self._skipped = 0
        self._folders = 0
        """Folders that were told to be made here."""
        self._outside: Dict[Tuple[str, str, str], int] = {}
        self._alone = True
        self._began = time.monotonic()
        self._spent = 0.0
        state = code.current()
        folder = (state.folder,) if state is not None and state.folder else ()
        self._libraries = state._libraries if state is not None else ()
        self._ignored = IGNORED + self._libraries + folder + _caches(client.settings.get("pycache"))

    @property
    def step(self) -> Optional[int]:
        """Optimizer step whose work is going on; None before the first."""
        state = code.current()
        return state.step if state is not None else None

    # -- events -------------------------------------------------------------------------------------------------

    def on_open(self, args: Tuple[Any, ...]) -> None:
        """Audit event `open`: (path, mode, flags)."""
        path, mode, flags = args[0], args[1], args[2]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str):
            return
        if path.startswith(("/proc/", "/dev/")) and any(name in path for name in DETOURS):
            path = os.path.realpath(path)  # another name of a file that has one
        if self._is_ignored(path):
            return
        path = os.path.abspath(path)
        if self._is_ignored(path) or path.endswith(".pyc") or self._is_code(path):
            return
        if flags & WRITING or (isinstance(mode, str) and set(mode) & set("wax+")):
            self.wrote(path)
        else:
            self.reads(path)

    def _is_ignored(self, path: str) -> bool:
        """Whether opening `path` is not told: the system's own, and what other links speak of."""
        return path.startswith(self._ignored) and not path.startswith(MEMORY)

    def _is_code(self, path: str) -> bool:
        """Whether link *code* speaks for this file: the main script, and what the source loader read."""
        state = code.current()
        return state is not None and (path == state.main or path in state.known)

    def on_rename(self, args: Tuple[Any, ...], how: str = "rename") -> None:
        """Audit events `os.rename`, `os.link`, `os.symlink`: (source, target, …): the target is our doing.

        how: rename, link or symlink. A link's source stays, so reading by the new name is told like any other.
        """
        source, target = args[0], args[1]
        if not isinstance(source, (str, bytes)) or not isinstance(target, (str, bytes)):
            return
        target = os.path.abspath(os.fsdecode(target))
        base = os.path.dirname(target) if how == "symlink" else os.getcwd()
        source = os.path.normpath(os.path.join(base, os.fsdecode(source)))
        foreign = self.alias(source, target)
        if how == "rename" and os.path.isdir(source):
            self.report({"path": target, "mode": "moved", "of": source, "place": self.place()[0]})
            return
        self.wrote(target)
        if foreign and how != "rename":
            self.files[target].settled = True
            self.unsettled.discard(target)

    def alias(self, source: str, target: str) -> bool:
        """Whether a file that this process did not write is about to get another name; its content is told."""
        known = self.files.get(source)
        if (known is not None and known.own) or self._is_ignored(os.path.realpath(source)):
            return False
        identity, status = _identity(source)
        if identity is None or status is None or not stat.S_ISREG(status.st_mode):
            return False
        line: Dict[str, Any] = {"path": target, "mode": "alias", "of": source, "place": self.place()[0]}
        line["sha256"] = self._hash(source, status.st_size)
        line.update(size=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
        self.report(line)
        return True

    def outside(self, way: str, what: str) -> None:
        """Report another way in: the first, and then every doubling, for each place."""
        place, _ = self.place()
        key = (way, what, place or "")
        count = self._outside.get(key, 0) + 1
        self._outside[key] = count
        if count & (count - 1) == 0 and len(self._outside) < FILES_LIMIT:
            body = {"way": way, "what": what[:2048], "place": place, "times": count}
            self.client.send("open", {"outside": body}, self.step)

    # -- files --------------------------------------------------------------------------------------------------

    def wrote(self, path: str) -> None:
        """This process is about to write `path`."""
        file = self.files.get(path)
        if file is None:
            file = self.files[path] = File()
        if not file.own:
            file.own = True
            line = {"path": path, "mode": "w", "place": self.place()[0]}
            package = _writer() if path.endswith(".py") else None
            if package is not None:
                line["by"] = package
            self.report(line)
            if package is not None:
                self.flush()  # it may be imported next, and whose it is is to be known by then
        file.settled = False
        self.unsettled.add(path)

    def on_mkdir(self, args: Tuple[Any, ...]) -> None:
        """Audit event `os.mkdir`: what appears in a folder that we made is ours, whoever of us writes it."""
        path = _absolute(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else None
        if path is None or self._is_ignored(path) or os.path.lexists(path) or self._folders >= FOLDERS_LIMIT:
            return
        self._folders += 1
        self.client.send("open", {"made": path}, self.step)

    def reads(self, path: str, how: str = "r") -> None:
        """This process is about to read `path`: report it the first time, when it changed, and when it is polled."""
        identity, status = _identity(path)
        if identity is None or status is None:
            return
        file = self.files.get(path)
        if file is None:
            if len(self.files) >= FILES_LIMIT * 4 or self._is_ignored(os.path.realpath(path)):
                self._skipped += 1
                return
            file = self.files[path] = File()
            file.first = self.step
        file.opens += 1
        polled = self._is_polled(file)
        if file.own and not file.settled:
            return  # our own unfinished write, read back
        if identity == file.identity and not polled:
            return
        was, known = file.digest, file.identity is not None
        if identity != file.identity:
            file.identity = identity
            file.digest = self._hash(path, status.st_size)
            if known and was is not None and was == file.digest and not polled:
                return  # touched; the same bytes
        self._say(path, how, file, status, was, known, polled)

    def _say(
        self,
        path: str,
        how: str,
        file: File,
        status: os.stat_result,
        was: Optional[str],
        known: bool,
        polled: bool,
    ) -> None:
        place, function = self.place()
        package = _package()
        if place is not None and place.startswith("<frozen zipimport>"):
            return  # the interpreter asks whether the main script is an archive
        line: Dict[str, Any] = {
            "path": path,
            "mode": how,
            "sha256": file.digest,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
            "uid": status.st_uid,
            "place": place,
            "function": function,
            "opens": file.opens,
            "first": file.first,
        }
        if package is not None:
            line["by"] = package
        if known and not polled:
            line["was"] = was
            line["changed"] = True
        if polled:
            line["polled"] = sorted(file.steps)
        if file.own:
            line["own"] = True
        data = datasets.opener(sys._getframe(1), self._libraries)
        if data is not None:
            line["data"] = data
        if not stat.S_ISREG(status.st_mode):
            line["type"] = stat.S_IFMT(status.st_mode)
        self.report(line)

    def _is_polled(self, file: File) -> bool:
        step = self.step
        if step is None or step in file.steps or len(file.steps) >= POLLED_STEPS:
            return False
        file.steps.add(step)
        return len(file.steps) == POLLED_STEPS

    def _hash(self, path: str, size: int) -> Optional[str]:
        """SHA-256 of the file now, within its limits: size, and 0.2 s plus 2 % of the time this process runs."""
        limit = HASH_LIMIT_BYTES if self.step is None else IN_LOOP_LIMIT_BYTES
        began = time.monotonic()
        if size > limit or self._spent > 0.2 + 0.02 * (began - self._began):
            return None
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                return None
            return code.file_sha256(path)
        except OSError:
            return None
        finally:
            self._spent += time.monotonic() - began

    def report(self, line: Dict[str, Any]) -> None:
        """Queue one line."""
        self._reported += 1
        if self._reported > FILES_LIMIT and not line.get("changed"):
            self._skipped += 1
            return
        now = time.monotonic()
        if not self._pending:
            self._since = now
        line["step"] = self.step
        self._pending.append(line)
        self._pending_bytes += 300 + 2 * len(line["path"])
        if self._pending_bytes > BATCH_BYTES or now - self._since > BATCH_SECONDS or not self._alone:
            self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        lines, self._pending, self._pending_bytes = self._pending, [], 0
        if lines:
            self.client.send("open", {"files": lines}, self.step)

    def tick(self) -> None:
        """At a step boundary: settle our own finished writes, send what is queued."""
        if self.unsettled:
            self._settle()
        if self._pending and (time.monotonic() - self._since > BATCH_SECONDS or self._waited):
            self.flush()
        self._waited = bool(self._pending)

    def _settle(self) -> None:
        """Files we wrote and no longer hold open: from here on, another identity is another writer's."""
        held = _open_files()
        for path in list(self.unsettled):
            file = self.files.get(path)
            if file is None or os.path.realpath(path) in held:
                continue
            self.unsettled.discard(path)
            file.identity, _ = _identity(path)
            file.settled = True
            file.digest = None

    def scan_maps(self) -> None:
        """Files that native code has mapped for reading and no audit event told of."""
        system = ("/usr/", "/lib", os.path.realpath(sys.base_prefix) + os.sep, "/memfd:", "/SYSV")
        for path in _mapped_files():
            if path not in self.files and ".so" not in path and not path.startswith(self._ignored + system):
                self.reads(path, "mapped")

    def last(self) -> None:
        """At exit."""
        self.flush()
        if self._skipped:
            self.client.send("open", {"skipped": self._skipped}, self.step)

    def forked(self) -> None:
        """In a forked child: what was queued is the parent's to send."""
        self._pending, self._pending_bytes = [], 0
        self._alone = False

    def place(self) -> Tuple[Optional[str], Optional[str]]:
        """`file:line` and function of the innermost frame that is neither the interpreter's nor installed code."""
        frame: Any = sys._getframe(1)
        inner: Optional[Tuple[str, str]] = None
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith(self._libraries):
                return "%s:%d" % (_absolute(name), frame.f_lineno), frame.f_code.co_name
            if inner is None and not _is_ours(name):
                inner = ("%s:%d" % (name, frame.f_lineno), frame.f_code.co_name)
            frame = frame.f_back
        return inner if inner is not None else (None, None)


def _package() -> Optional[str]:
    """File of the innermost frame that is installed code: the package that asks, of whoever called it."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "-packages" + os.sep in name and not _is_ours(name):
            return str(_absolute(name))
        frame = frame.f_back
    return None


def _writer() -> Optional[str]:
    """File of an installed package whose own line is about to write, the standard library left out; else None."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        installed = "-packages" + os.sep in name
        if not _is_ours(name) and (installed or not name.startswith(_STANDARD)):
            return str(_absolute(name)) if installed else None
        frame = frame.f_back
    return None


class InputsLink:
    """The engine's side of *code* and *inputs*: tells them the step and gives them a moment between steps."""

    name = "inputs"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        note_saved(sys.modules["torch"])
        saves.install(client, sys.modules["torch"])

    def still(self, track: Any, optimizer: Any, still: Any) -> bool:
        """No module is new and nothing waits to be reported."""
        loaded, opened = code.current(), _inputs
        for one in (loaded, opened):
            if one is not None:
                still.same.append((one, "_pending", one._pending))
                still.sizes.append((one._pending, 0))
        if loaded is not None:
            still.sizes.append((sys.modules, len(loaded._seen_modules)))
        if opened is not None:
            still.sizes.append((opened.unsettled, 0))
        return True

    def before(self, step: Any) -> None:
        """The update of `step` begins."""
        saved = saves.current()
        if saved is not None:
            saved.steppers.add(threading.get_ident())
            saved.flush(between=True)
        loaded = code.current()
        if loaded is not None:
            loaded.step = step.number

    def after(self, step: Any) -> None:
        """The update has been made; what happens from here on belongs to the next step."""
        inside = audit.entered()
        try:
            loaded, opened = code.current(), _inputs
            if loaded is not None:
                loaded.tick()
            if opened is not None:
                opened.tick()
                if step.full and step.number % SCAN_EVERY == 1:
                    opened.scan_maps()
            if loaded is not None:
                loaded.step = step.number + 1
        finally:
            audit.left(inside)

    def between(self, step: Any) -> None:
        """The budget has room: one native module's hash."""
        inside = audit.entered()
        try:
            loaded = code.current()
            if loaded is not None:
                loaded.hash_one()
                if step.number % RECOMPILE_EVERY == RECOMPILE_EVERY // 2:
                    loaded.recompile_one()
        finally:
            audit.left(inside)


_inputs: Optional[Inputs] = None


def current() -> Optional[Inputs]:
    """The inputs of this process, once installed."""
    return _inputs


def install(client: Client) -> None:
    """Listen to audit events for files, renames, addresses and libraries."""
    global _inputs
    state = _inputs = Inputs(client)
    audit.on("open", state.on_open)
    loaded = code.current()
    if loaded is not None:
        loaded.first = state.flush
    audit.on("os.mkdir", state.on_mkdir)
    audit.on("os.rename", state.on_rename)
    audit.on("os.link", lambda args: state.on_rename(args, "link"))
    audit.on("os.symlink", lambda args: state.on_rename(args, "symlink"))
    audit.on("os.truncate", lambda args: state.wrote(_absolute(args[0])))
    audit.on("socket.connect", lambda args: _connected(state, args[1]))
    audit.on("cpython.remote_debugger_script", lambda args: state.outside("remote script", str(args[0])))
    audit.on("urllib.Request", lambda args: state.outside("url", str(args[0])))
    audit.on("ctypes.dlopen", lambda args: state.outside("dlopen", str(args[0])) if args[0] else None)
    # Another program may read what we wrote, or take our place: what we know goes out first.
    for event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"):
        audit.on(event, lambda args: _flush(state))
    os.register_at_fork(before=lambda: _flush(state), after_in_child=state.forked)
    atexit.register(_last, state)


def _flush(state: Inputs) -> None:
    try:
        loaded = code.current()
        if loaded is not None:
            loaded.flush()
        state.flush()
    except Exception as error:
        state.client.fault("inputs.flush", error)


def note_saved(torch: Any) -> None:
    """Learn which files `torch.save` writes: its zip writer is native and raises no audit event.

    Through `torch.serialization.register_package`, torch's own way of being asked about each storage that is saved.
    """
    global _noting
    state = _inputs
    if state is None or _noting:
        return
    _noting = True

    def tag(storage: Any) -> None:
        inside = audit.entered()
        try:
            frame: Any = sys._getframe(1)
            for _ in range(12):
                if frame is None or frame.f_code.co_name == "save":
                    break
                frame = frame.f_back
            target = frame.f_locals.get("f") if frame is not None else None
            if isinstance(target, (str, os.PathLike)):
                state.wrote(_absolute(target))
        except Exception as error:
            state.client.fault("inputs.saved", error)
        finally:
            audit.left(inside)

    torch.serialization.register_package(-1, tag, lambda storage, location: None)


def _last(state: Inputs) -> None:
    try:
        state.last()
    except Exception as error:
        state.client.fault("inputs.exit", error)


def _connected(state: Inputs, address: Any) -> None:
    if isinstance(address, tuple) and len(address) >= 2:
        state.outside("connect", "%s:%s" % (address[0], address[1]))


def _caches(pycache: Any) -> Tuple[str, ...]:
    return (os.path.abspath(pycache) + os.sep,) if isinstance(pycache, str) and pycache else ()


def _identity(path: str) -> Tuple[Optional[Identity], Optional[os.stat_result]]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None, None
    if stat.S_ISDIR(status.st_mode):
        return None, None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns), status


def _open_files() -> Set[str]:
    held = set()
    try:
        for name in os.listdir("/proc/self/fd"):
            try:
                held.add(os.readlink("/proc/self/fd/" + name))
            except OSError:
                continue
    except OSError:
        pass
    return held


def _mapped_files() -> Set[str]:
    """Paths of file mappings without execute permission."""
    paths = set()
    try:
        with open("/proc/self/maps", "rb") as file:
            for line in file:
                fields = line.split(None, 5)
                if len(fields) == 6 and fields[4] != b"0" and b"x" not in fields[1] and fields[5][:1] == b"/":
                    paths.add(os.fsdecode(fields[5].rstrip(b"\n")))
    except OSError:
        pass
    return paths


def _absolute(path: Any) -> str:
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    return text if text[:1] == "<" else os.path.abspath(text)


def _is_ours(name: str) -> bool:
    return name.startswith(_OWN)


_noting = False
_STANDARD = ("<frozen ", os.path.dirname(os.path.abspath(os.__file__)) + os.sep)
_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep
