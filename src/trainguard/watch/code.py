"""Link *code*: the hash of exactly the bytes that get compiled.

Every source module goes through one method of importlib, `SourceLoader.get_code`. Ours reads the bytes once, hashes
them, and takes the code object from a private cache that is keyed by that hash (or compiles those very bytes). So no
`.pyc` beside a source file is ever executed, whatever its time stamps say, and there is no gap between what was
hashed and what runs. What does not come that way (main script, `exec` of a string, bytecode without source, extension
modules, loaders of other packages) is seen by the audit events `exec`, `compile` and `import` and by walking
`sys.modules`, and is reported as what it is.

Frames (spec/evidence.md, "code"):

    kind "code", body {"where": {…}}                                         once, first
    kind "code", body {"files": [[path, sha256 or null, module, how], …]}    in batches
    kind "code", body {"ran": {…}}                                           code that no source file accounts for

Known gap: the private cache belongs to the account the job runs under. Code of the job can write to it; entries of
other owners or with group or world write permission are refused (docs/checks/code.md).
"""

from __future__ import annotations

import atexit
import hashlib
import marshal
import os
import random
import stat
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from . import audit, facts
from .client import Client

BATCH_BYTES = 90_000
"""A frame's list of files stays below this (a frame is at most client.FRAME_LIMIT_BYTES)."""

BATCH_SECONDS = 0.25
FILE_LIMIT_BYTES = 16 << 20
"""Source files beyond this are reported without being compiled a second time for comparison."""

RECOMPILE_LIMIT_BYTES = 64 << 10
RAN_LIMIT = 400
"""Reports of code without a file, per process; past it they are only counted."""

CRITICAL = (
    "torch.optim",
    "torch.nn",
    "torch.utils.data",
    "torch.autograd",
    "torch.amp",
    "torch.serialization",
    "torch.random",
    "torch._tensor",
    "torch.distributed.algorithms",
    "torch.utils._contextlib",
    "torch._jit_internal",
    "random",
    "accelerate.optimizer",
    "accelerate.scheduler",
    "accelerate.data_loader",
)
"""Modules whose code objects are kept, so that link *surface* can tell later whether a function is still theirs."""

_EXTENSION, _SOURCELESS = "extension", "bytecode"


class Code:
    """What this process has loaded. One instance, made by `install`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.step: Optional[int] = None
        """Optimizer step now running, set by the engine's links; None before the first."""
        self.known: Dict[str, Optional[str]] = {}
        """Absolute path → SHA-256 of the bytes that were compiled (None: not hashed)."""
        self.kept: Dict[str, Any] = {}
        """Absolute path → code object of the whole module, for CRITICAL modules."""
        self.critical: Set[str] = set()
        """Paths of CRITICAL modules."""
        self.main: Optional[str] = None
        self.folder = _private_folder(client.settings.get("pycache"))
        self._pending: List[List[Any]] = []
        self._pending_bytes = 0
        self._since = 0.0
        self._expected: Dict[int, Any] = {}
        """id → code object that our loader returned and that has not run yet; held, so that no id is used twice."""
        self._seen_modules: Set[str] = set()
        self._ran: Dict[Tuple[str, str], int] = {}
        self._compiled = threading.local()
        self._unhashed: List[str] = []
        self._libraries = _libraries()
        self._alone = True
        self._chance = random.Random(os.urandom(16))
        self.first: Callable[[], None] = lambda: None
        """Called before code without a file is reported: sends which files were opened, so that a judge knows."""

    # -- the loader ---------------------------------------------------------------------------------------------

    def load(self, loader: Any, name: str, plain: bool) -> Any:
        """The code object of `name`, compiled from bytes that were hashed. Raises what compiling them raises.

        plain: the loader is importlib's own class, so our cache may stand in for its compiler.
        """
        path = loader.get_filename(name)
        data = loader.get_data(path)
        digest = hashlib.sha256(data).hexdigest()
        code = self._cached(digest, path) if plain else None
        if code is None:
            code = loader.source_to_code(data, path)
            if plain:
                self._keep(digest, code)
                if name.startswith(CRITICAL):
                    self._keep(digest + ".facts", facts.read(data))
        path = os.path.abspath(path)
        self._expected[id(code)] = code
        self.known[path] = digest
        if name.startswith(CRITICAL):
            self.kept[path] = code
            self.critical.add(path)
        self.add(path, digest, name, "source" if plain else "source by " + _type_name(loader))
        return code

    def _cached(self, digest: str, path: str) -> Any:
        """The code object for source `digest` from the private cache, or None."""
        code = self._entry(digest)
        if not isinstance(code, _CodeType):
            return None
        import _imp

        _imp._fix_co_filename(code, path)  # type: ignore[attr-defined]
        return code

    def facts(self, path: str) -> Optional[Dict[str, Any]]:
        """What the source of the loaded file `path` says of its functions (facts.read), or None."""
        digest = self.known.get(path)
        found = self._entry(digest + ".facts") if digest is not None else None
        if isinstance(found, dict) or digest is None:
            return found
        data = _read(path)
        if data is None or len(data) > RECOMPILE_LIMIT_BYTES or hashlib.sha256(data).hexdigest() != digest:
            return None
        found = facts.read(data)  # its code was cached for another module of the same text, an empty one mostly
        self._keep(digest + ".facts", found)
        return found

    def code_of(self, path: str) -> Any:
        """The code object of the whole module that was loaded from `path`, or None where it cannot be had."""
        digest = self.known.get(path)
        if path in self.kept or digest is None:
            return self.kept.get(path)
        code = self._cached(digest, path)
        if code is None:
            data = _read(path)
            if data is not None and hashlib.sha256(data).hexdigest() == digest:
                code = compile(data, path, "exec", dont_inherit=True)
        self.kept[path] = code
        return code

    def _entry(self, name: str) -> Any:
        """The value of one cache entry; None when there is none that only this account can have written."""
        if self.folder is None:
            return None
        try:
            descriptor = os.open(self.folder + name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if not _ours(status) or not stat.S_ISREG(status.st_mode):
                return None
            data = os.read(descriptor, status.st_size + 1)
        finally:
            os.close(descriptor)
        if len(data) != status.st_size:
            return None
        try:
            return marshal.loads(data)  # noqa: S302 - our own file, owner and mode checked above
        except (EOFError, ValueError, TypeError):
            return None  # a torn entry; it is written again

    def _keep(self, name: str, value: Any) -> None:
        """Write a cache entry: temporary name, then rename, so a reader sees all of it or nothing."""
        if self.folder is None:
            return
        temporary = "%s.%s.%d" % (self.folder, name, os.getpid())
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                data, view = marshal.dumps(value), 0
                while view < len(data):
                    view += os.write(descriptor, data[view:])
            finally:
                os.close(descriptor)
            os.replace(temporary, self.folder + name)
        except OSError:
            pass  # a full disk costs time at the next start, nothing else

    # -- reporting ----------------------------------------------------------------------------------------------

    def add(self, path: str, digest: Optional[str], module: str, how: str) -> None:
        """Queue one line of the report; sent when a batch is full or a quarter of a second old."""
        now = time.monotonic()
        if not self._pending:
            self._since = now
        self._pending.append([path, digest, module, how])
        self._pending_bytes += len(path) + len(module) + len(how) + 90
        if self._pending_bytes >= BATCH_BYTES or now - self._since > BATCH_SECONDS or not self._alone:
            self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        files, self._pending, self._pending_bytes = self._pending, [], 0
        if files:
            self.client.send("code", {"files": files}, self.step)

    def tick(self) -> None:
        """At a step boundary: modules that came by other ways, and the queue."""
        self.walk_modules()
        if self._pending and time.monotonic() - self._since > BATCH_SECONDS:
            self.flush()

    def hash_one(self) -> None:
        """When there is time: the hash of one native module that was reported without."""
        if self._unhashed:
            path = self._unhashed.pop(0)
            self.known[path] = file_sha256(path)
            self.add(path, self.known[path], "", "hash of " + _EXTENSION)

    def recompile_one(self) -> None:
        """When there is time: is the code object of one file, drawn by chance, what its source compiles to?

        The private cache belongs to the job's account. An entry that was poisoned between two starts is found here.
        """
        path = self._chance.choice(list(self.kept)) if self.kept else None
        data = _read(path) if path is not None else None
        if path is None or data is None or len(data) > RECOMPILE_LIMIT_BYTES or self.kept[path] is None:
            return
        digest = hashlib.sha256(data).hexdigest()
        if digest == self.known.get(path) and not _compiles_to(data, self.kept[path]):
            self.report_ran(self.kept[path], path, None, digest, False, None, place="the private cache")

    def forked(self) -> None:
        """In a forked child: the parent reports what it had queued; from here on everything goes out at once."""
        self._pending, self._pending_bytes, self._unhashed = [], 0, []
        self._alone = False
        self.step = None

    # -- what importlib's source loader did not compile -----------------------------------------------------------

    def walk_modules(self, how: str = "") -> None:
        """Report modules in sys.modules whose file has not been reported yet."""
        if len(sys.modules) == len(self._seen_modules):
            return
        for name in list(sys.modules):
            if name not in self._seen_modules:
                self._seen_modules.add(name)
                try:
                    self._module(name, sys.modules.get(name), how)
                except Exception as error:
                    self.client.fault("code.module", error)

    def _module(self, name: str, module: Any, how: str) -> None:
        if not isinstance(module, type(sys)):
            return
        names = object.__getattribute__(module, "__dict__")
        spec = names.get("__spec__")
        path = getattr(spec, "origin", None) or names.get("__file__")
        if not isinstance(path, str) or path in ("built-in", "frozen", "namespace"):
            return
        path = os.path.abspath(path)
        if path in self.known or not _may_be_file(path):
            return
        kind = _type_name(getattr(spec, "loader", None))
        if path.endswith((".so", ".pyd")) or "ExtensionFileLoader" in kind:
            self.extension(path, name)
        elif "zipimporter" in kind:
            archive = getattr(spec.loader, "archive", path)
            self.known[path] = digest = file_sha256(archive)
            self.add(path, digest, name, "zip")
        else:
            self.known[path] = digest = file_sha256(path)
            plain = "SourceFileLoader" in kind or spec is None
            self.add(path, digest, name, how or ("source by " + kind if not plain else "found loaded"))

    def extension(self, path: str, name: str) -> None:
        """Report a native module: size and identity now, its hash at a later step (libraries are large)."""
        path = os.path.abspath(path)
        if path in self.known:
            return
        self.known[path] = None
        self.add(path, None, name, _EXTENSION)
        self._unhashed.append(path)

    def on_import(self, args: Tuple[Any, ...]) -> None:
        """Audit event `import`: only native modules carry a file name here."""
        if len(args) > 1 and isinstance(args[1], str):
            self.extension(args[1], str(args[0]))

    def on_run_file(self, args: Tuple[Any, ...]) -> None:
        """Audit event `cpython.run_file`: the main script is about to be read."""
        self.main = os.path.abspath(os.fsdecode(args[0]))

    def on_compile(self, args: Tuple[Any, ...]) -> None:
        """Audit event `compile`: remember the source until its code object is executed."""
        self._compiled.last = args

    def on_exec(self, args: Tuple[Any, ...]) -> None:
        """Audit event `exec`: a code object is about to run. Those our loader returned are accounted for."""
        code = args[0]
        key = id(code)
        if self._expected.pop(key, None) is not None:
            return
        caller = _caller(3)
        filename = code.co_filename
        if filename[:1] == "<":
            self._nameless(code, filename, caller)
            return
        self._named(code, os.path.abspath(filename), caller)

    def _nameless(self, code: Any, filename: str, caller: Any) -> None:
        """Code without a file: `exec` of a string, frozen modules, generated functions."""
        if caller is not None:
            maker = caller.f_code
            executes = any("exec" in name or "eval" in name for name in maker.co_names) or _imports(caller)
            if executes and maker.co_filename.startswith(self._libraries):
                return  # namedtuple, dataclasses, torch.fx and their like; their own code is verified
        elif filename.startswith("<frozen"):
            return
        self.report_ran(code, filename, caller, None, None, self._source(filename))

    def _named(self, code: Any, path: str, caller: Any) -> None:
        """Code that says it comes from `path`: compare it with that file's bytes, compiled afresh."""
        if path in self.known and caller is not None and _imports(caller):
            return  # a second loader for a file that was reported; the walk over sys.modules names it
        if not _may_be_file(path):
            self._nameless(code, path, caller)  # generated, under a made-up name
            return
        data = _read(path)
        digest = None if data is None else hashlib.sha256(data).hexdigest()
        same = None if data is None else _compiles_to(data, code)
        main = caller is None and path == self.main
        if path not in self.known:
            self.known[path] = digest
            self.add(path, digest, "__main__" if main else "", "main" if main else "run")
        if not (main and same):
            self.report_ran(code, path, caller, digest, same, None)
        self.flush()

    def report_ran(
        self,
        code: Any,
        path: str,
        caller: Any,
        digest: Optional[str],
        same: Optional[bool],
        source: Optional[str],
        place: str = "",
    ) -> None:
        """Report code that no line of `files` accounts for: the first time at a place, and then every doubling."""
        function = None
        if not place:
            place, function = _place(caller)
        count = self._ran.get((place, path), 0) + 1
        self._ran[(place, path)] = count
        if count & (count - 1) or len(self._ran) > RAN_LIMIT:
            return
        owner = _owner(path)
        ran = {
            "file": path,
            "sha256": digest,
            "same": same,
            "source": source,
            "code": code_digest(code),
            "place": place,
            "function": function,
            "times": count,
            "owner": owner,
        }
        self.flush()
        self.first()
        self.client.send("code", {"ran": ran}, self.step)

    def _source(self, filename: str) -> Optional[str]:
        """SHA-256 of the source just compiled under `filename` in this thread, if that is what is about to run."""
        last = getattr(self._compiled, "last", None)
        if last is None or len(last) < 2 or _text(last[1]) != filename:
            return None
        self._compiled.last = None
        data = last[0].encode("utf-8", "surrogatepass") if isinstance(last[0], str) else last[0]
        return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else None


_code: Optional[Code] = None


def install(client: Client) -> None:
    """Hook the source loaders; reports every module file with the SHA-256 of the bytes compiled."""
    global _code
    state = _code = Code(client)
    client.send("code", {"where": where(state.folder)})
    _hook_loaders(state)
    state._expected.clear()
    state.walk_modules("before the guard")
    for event, handler in (
        ("import", state.on_import),
        ("cpython.run_file", state.on_run_file),
        ("compile", state.on_compile),
        ("exec", state.on_exec),
    ):
        audit.on(event, handler)
    os.register_at_fork(after_in_child=state.forked)
    atexit.register(_last, state)


def current() -> Optional[Code]:
    """The code link of this process, or None before `install`."""
    return _code


def where(folder: Optional[str]) -> Dict[str, Any]:
    """The folders a judge needs to class a path: claims of this process, checked against the lock's roots."""
    site = sys.modules.get("site")
    packages: List[str] = []
    try:
        packages = list(site.getsitepackages()) if site is not None else []
        packages += [site.getusersitepackages()] if site is not None and site.ENABLE_USER_SITE else []
    except Exception:
        pass
    stdlib = os.path.dirname(os.path.abspath(os.__file__))
    roots = {"stdlib": stdlib, "guard": os.path.dirname(os.path.abspath(__file__)), "prefix": sys.prefix}
    return {
        "roots": roots,
        "site": packages,
        "real": {p: os.path.realpath(p) for p in [*roots.values(), *packages] if os.path.realpath(p) != p},
        "path": [entry for entry in sys.path if isinstance(entry, str)][:64],
        "cwd": _cwd(),
        "cache": folder is not None,
        "optimize": sys.flags.optimize,
    }


def _last(state: Code) -> None:
    try:
        state.walk_modules()
        state.flush()
    except Exception as error:
        state.client.fault("code.exit", error)


def _hook_loaders(state: Code) -> None:
    """Put our get_code in front of importlib's; whatever goes wrong in ours, theirs is called."""
    external = sys.modules["_frozen_importlib_external"]
    source, sourceless = external.SourceFileLoader, external.SourcelessFileLoader
    theirs, theirs_too = external.SourceLoader.get_code, sourceless.get_code
    overridable = ("get_data", "source_to_code", "get_filename")
    standard = {name: getattr(source, name) for name in overridable}

    def get_code(self: Any, fullname: str) -> Any:
        code = None
        inside = audit.entered()
        try:
            kind = type(self)
            plain = kind is source or all(getattr(kind, n, None) is standard[n] for n in overridable)
            code = state.load(self, fullname, plain)
        except (SyntaxError, ImportError, OSError, UnicodeError):
            pass  # importlib meets the same and says so in its own words
        except Exception as error:
            state.client.fault("code.load", error)
        finally:
            audit.left(inside)
        return theirs(self, fullname) if code is None else code

    def get_bytecode(self: Any, fullname: str) -> Any:
        code = theirs_too(self, fullname)
        inside = audit.entered()
        try:
            path = os.path.abspath(self.get_filename(fullname))
            state.known[path] = digest = file_sha256(path)
            state._expected[id(code)] = code
            state.add(path, digest, fullname, _SOURCELESS)
        except Exception as error:
            state.client.fault("code.bytecode", error)
        finally:
            audit.left(inside)
        return code

    # Tracebacks of a SyntaxError in a user's module drop the frames of importlib; ours must go with them, or the
    # message would differ between a guarded and an unguarded run.
    source.get_code = _as_importlib(get_code, "<frozen importlib._bootstrap_external>")
    sourceless.get_code = _as_importlib(get_bytecode, "<frozen importlib._bootstrap_external>")


def _as_importlib(function: Any, filename: str) -> Any:
    function.__code__ = function.__code__.replace(co_filename=filename, co_name="get_code")
    return function


def _private_folder(root: Any) -> Optional[str]:
    """The cache folder (with its trailing slash) for this interpreter, or None when it cannot be trusted."""
    if not root or not isinstance(root, str):
        return None
    external = sys.modules["_frozen_importlib_external"]
    tag = "%s-%s-%d" % (sys.implementation.cache_tag, external.MAGIC_NUMBER.hex(), sys.flags.optimize)
    folder = os.path.join(root, "code", tag)
    try:
        if not _ours(os.lstat(root)):
            return None
        os.makedirs(folder, mode=0o700, exist_ok=True)
        for place in (root, os.path.dirname(folder), folder):
            status = os.lstat(place)
            if not stat.S_ISDIR(status.st_mode) or not _ours(status):
                return None
    except OSError:
        return None
    return folder + os.sep


def _ours(status: os.stat_result) -> bool:
    """Whether only this account (or root) can have written it."""
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _libraries() -> Tuple[str, ...]:
    """Beginnings of file names of the interpreter's own and installed code."""
    here = where(None)
    folders = [here["roots"]["stdlib"], here["roots"]["guard"], *here["site"]]
    folders += [here["real"][f] for f in folders if f in here["real"]]
    return (*(f + os.sep for f in folders), "<frozen ")


def _caller(depth: int) -> Any:
    """The frame that called into the audited C function, or None (the interpreter itself did)."""
    try:
        return sys._getframe(depth)
    except ValueError:
        return None


def _imports(frame: Any) -> bool:
    return bool(frame.f_code.co_filename.startswith("<frozen importlib"))


def _place(frame: Any) -> Tuple[str, Optional[str]]:
    if frame is None:
        return "interpreter", None
    name = frame.f_code.co_filename
    return "%s:%d" % (name if name[:1] == "<" else os.path.abspath(name), frame.f_lineno), frame.f_code.co_name


def _type_name(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return "%s.%s" % (kind.__module__, kind.__qualname__)


def _text(value: Any) -> Any:
    return os.fsdecode(value) if isinstance(value, bytes) else value


def _may_be_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _owner(path: str) -> Optional[List[int]]:
    """Owner and mode of a file and of its folder: [uid, mode, folder uid, folder mode]."""
    try:
        file, folder = os.stat(path), os.stat(os.path.dirname(path))
    except (OSError, ValueError):
        return None
    return [file.st_uid, file.st_mode & 0o7777, folder.st_uid, folder.st_mode & 0o7777]


def _read(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError:
        return None
    return data if len(data) <= FILE_LIMIT_BYTES else None


def _compiles_to(data: bytes, code: Any) -> bool:
    """Whether `data`, compiled now, is `code`."""
    futures = code.co_flags & 0x1FF0000  # the __future__ features it was compiled under
    try:
        fresh = compile(data, code.co_filename, "exec", flags=futures, dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return code_digest(fresh) == code_digest(code)


def code_digest(code: Any) -> str:
    """SHA-256 over everything in a code object that decides what it does, nested code included."""
    sink = hashlib.sha256()
    _feed(code, sink.update)
    return sink.hexdigest()


def _feed(code: Any, feed: Callable[[bytes], Any]) -> None:
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    feed(code.co_code)
    feed(repr((code.co_name, counts, names)).encode("utf-8", "surrogatepass"))
    feed(getattr(code, "co_exceptiontable", b""))
    for value in code.co_consts:
        if isinstance(value, type(code)):
            _feed(value, feed)
        else:
            text = sorted(map(repr, value)) if isinstance(value, frozenset) else value
            feed(("%s:%r" % (type(value).__name__, text)).encode("utf-8", "surrogatepass"))


def file_sha256(path: str) -> Optional[str]:
    """SHA-256 of a file's bytes now, or None when it cannot be read."""
    sink = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while True:
                chunk = file.read(1 << 20)
                if not chunk:
                    return sink.hexdigest()
                sink.update(chunk)
    except OSError:
        return None


def _cwd() -> Optional[str]:
    try:
        return os.getcwd()
    except OSError:
        return None


_CodeType = type(_cwd.__code__)
