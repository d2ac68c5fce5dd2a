"""Link *loads*: model files are vetted outside the process before it reads them; pickles in memory are listened to.

Two moments, both before anything of a file runs:

- Audit event `open`: a file that begins like a model file (pickle, zip, safetensors, objects in .npy, a compressed
  stream) is opened here as well, and that descriptor goes to the supervisor over a socket of its own. By policy `log`
  nothing waits; by `stop` the answer is waited for, and what is not safe is never opened: `audit.Refused` is raised.
- Audit event `pickle.find_class`: an unpickler, wherever its bytes come from, is about to resolve a name that starts
  programs or runs text as code. Reported, and by `stop` refused. What processes of a job send each other (worker
  queues, process pools, object collectives) is neither a file nor slowed nor refused.

Frames (spec/evidence.md "load"):

    kind "load", body {"global": "posix.system", "place", "times", "refused": bool}
    kind "load", body {"unvetted": path, "why"}            a file the supervisor could not be asked about

Not seen: files that native code opens itself (safetensors' reader, torch.jit.load): link *inputs* sees those that stay
mapped; pickles of protocols 0 and 1 that name nothing in their first 256 bytes, until they name something.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import struct
import sys
import threading
from typing import Any, Dict, FrozenSet, Optional, Tuple

from . import audit, children, code, inputs
from .client import Client

HEAD_BYTES = 256
MESSAGE_BYTES = 16384
KNOWN_LIMIT = 4096
"""Files remembered as let pass, by identity."""
REPORT_LIMIT = 64
WAIT_SECONDS = 30.0
BYTES_PER_SECOND = 50e6
"""By `stop`, an answer is waited for WAIT_SECONDS and a second more for each of these."""

IGNORED = ("/proc/", "/sys/")
SOURCE = (".py", ".pyc", ".so", ".pyi")
PLAIN = re.compile(rb"(?:^|[(\]}Il\n.])c([A-Za-z_]\w*)[\w.]*\r?\n[A-Za-z_][\w.]*\r?\n")
"""A GLOBAL opcode of a pickle without a magic."""
COMPRESSED = (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x04\x22\x4d\x18", b"\x28\xb5\x2f\xfd", b"\x5d\0\0")
ZLIB = (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")

_STARTERS = """
system popen popen2 popen3 popen4 execl execle execlp execlpe execv execve execvp execvpe spawnl spawnle spawnlp
spawnlpe spawnv spawnve spawnvp spawnvpe posix_spawn posix_spawnp startfile fork forkpty
"""
_SYSTEM = frozenset(_STARTERS.split())
_RUNNERS = """
subprocess: Popen run call check_call check_output getoutput getstatusoutput
_posixsubprocess: fork_exec
commands: getoutput getstatusoutput
popen2: popen2 popen3 popen4
builtins: eval exec compile __import__ breakpoint
__builtin__: eval exec compile __import__ execfile apply
importlib: import_module __import__ reload
pkgutil: resolve_name find_loader get_loader
marshal: load loads
runpy: run_module run_path _run_code _run_module_code
pty: spawn
code: InteractiveInterpreter InteractiveConsole interact
timeit: timeit repeat main
platform: popen
ctypes: CDLL PyDLL OleDLL WinDLL
cProfile: run runctx
profile: run runctx
trace: Trace
pdb: run runeval runcall
bdb: Bdb
webbrowser: open open_new open_new_tab get
"""
RUNS: Dict[str, FrozenSet[str]] = {
    **{module: frozenset(names.split()) for module, _, names in (line.partition(":") for line in _RUNNERS.split("\n"))},
    **dict.fromkeys(("os", "posix", "nt"), _SYSTEM),
}
"""module → names in it that start programs or run text as code: nothing weights or state have need of."""
PACKAGES = ("pip", "ensurepip", "idlelib")
"""Every name of these runs code when it is called."""

CHANNELS = (
    os.sep + os.path.join("multiprocessing", ""),
    os.sep + os.path.join("concurrent", "futures", ""),
    os.sep + os.path.join("torch", "distributed", ""),
    os.sep + os.path.join("loky", ""),
    os.sep + os.path.join("ray", ""),
)
"""Folders of libraries that unpickle what another process of the same job sent."""
FRAMES = 24

Identity = Tuple[int, int, int, int, int]


class Loads:
    """The gate of one process. Made by `install`."""

    def __init__(self, client: Client, gate: Dict[str, Any]) -> None:
        self.client = client
        self.address = str(gate["path"])
        self.stop = gate.get("mode") == "stop"
        self.known: Dict[Identity, None] = {}
        self.told: Dict[Tuple[str, Optional[str]], int] = {}
        self.libraries: Tuple[str, ...] = ()
        self.local = threading.local()
        self.unvetted = 0
        state = code.current()
        if state is not None:
            self.libraries = tuple(state._libraries)

    # -- files --------------------------------------------------------------------------------------------------

    def on_open(self, args: Tuple[Any, ...]) -> None:
        """Audit event `open`: (path or descriptor, mode, flags)."""
        target, mode, flags = args[0], args[1], args[2]
        if flags & (os.O_WRONLY | os.O_CREAT | os.O_TRUNC) or (isinstance(mode, str) and set(mode) & set("wax")):
            return
        if isinstance(target, bool):
            return
        if isinstance(target, int):
            self._look(os.dup(target), None)
            return
        path = os.fsdecode(target) if isinstance(target, (str, bytes)) else None
        if path is None or path.startswith(IGNORED):
            return
        if path.endswith(SOURCE) and path.startswith(self.libraries or ("\0",)):
            return
        descriptor = _open(path)
        if descriptor is not None:
            self._look(descriptor, os.path.abspath(path))

    def _look(self, descriptor: int, path: Optional[str]) -> None:
        """Have the file looked at if it begins like a model file. Closes `descriptor`."""
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                return
            identity = _identity(status)
            if identity in self.known or not begins_like_model(os.pread(descriptor, HEAD_BYTES, 0), status.st_size):
                return
            self._ask(descriptor, path, status)
            if len(self.known) >= KNOWN_LIMIT:
                self.known.clear()
            self.known[identity] = None
            if self.stop and path is not None:
                self.local.passed = (os.path.realpath(path), identity)
        finally:
            os.close(descriptor)

    def _ask(self, descriptor: int, path: Optional[str], status: os.stat_result) -> None:
        """Hand the descriptor out. By `stop`, returns only if the file may be read, else raises audit.Refused."""
        shown = path or _name_of(descriptor)
        opened = inputs.current()
        file = opened.files.get(shown) if opened is not None else None
        state = code.current()
        message = {
            "path": shown,
            "place": children.place(),
            "step": state.step if state is not None else None,
            "own": file is not None and file.own,
            "wait": self.stop,
        }
        try:
            answer = self._exchange(json.dumps(message).encode()[:MESSAGE_BYTES], descriptor, status.st_size)
        except (OSError, ValueError) as error:
            self._could_not_ask(shown, error)
            return
        if answer is not None and answer.get("refuse"):
            raise audit.Refused("trainguard did not let it be opened (policy load = stop): %s" % answer.get("why"))

    def _exchange(self, message: bytes, descriptor: int, size: int) -> Optional[Dict[str, Any]]:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            link.settimeout(WAIT_SECONDS + size / BYTES_PER_SECOND if self.stop else 0)
            link.connect(self.address)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
            link.sendmsg([message], rights)
            if not self.stop:
                return None
            data = link.recv(MESSAGE_BYTES)
            if not data:
                raise OSError("closed without an answer")
            answer = json.loads(data.decode())
            return answer if isinstance(answer, dict) else None
        finally:
            link.close()

    def _could_not_ask(self, path: str, error: Exception) -> None:
        """By `log` training goes on and the record says so; by `stop` what was not vetted is not opened."""
        self.unvetted += 1
        if self.unvetted <= REPORT_LIMIT:
            self.client.send("load", {"unvetted": path[:4096], "why": str(error)[:200] or type(error).__name__})
        if self.stop:
            raise audit.Refused(
                "trainguard did not let it be opened (policy load = stop): %s: could not be vetted: %s: %s"
                % (path, type(error).__name__, error)
            )

    # -- names --------------------------------------------------------------------------------------------------

    def on_find_class(self, args: Tuple[Any, ...]) -> None:
        """Audit event `pickle.find_class`: (module, name), before the module is imported."""
        if self.stop and getattr(self.local, "passed", None) is not None:
            self._confirm()
        module, name = args[0], args[1]
        if not isinstance(module, str) or not isinstance(name, str):
            return
        names = RUNS.get(module)
        if names is None:
            if module.partition(".")[0] not in PACKAGES:
                return
        elif name.rpartition(".")[2] not in names:
            return
        if not _is_sent_by_a_process():
            self._tell("%s.%s" % (module[:200], name[:200]))

    def _tell(self, name: str) -> None:
        place = children.place()
        key = (name, place)
        count = self.told.get(key, 0) + 1
        if len(self.told) < KNOWN_LIMIT:
            self.told[key] = count
        if count & (count - 1) == 0:
            state = code.current()
            body = {"global": name, "place": place, "times": count, "refused": self.stop}
            self.client.send("load", body, state.step if state is not None else None)
        if self.stop:
            raise audit.Refused("trainguard did not let it be read (policy load = stop): a pickle that names %s" % name)

    def _confirm(self) -> None:
        """The file that was let pass is the one that was opened then: nobody put another in its place in between."""
        path, identity = self.local.passed
        self.local.passed = None
        for number in os.listdir("/proc/self/fd"):
            try:
                if os.readlink("/proc/self/fd/" + number) != path:
                    continue
                status = os.fstat(int(number))
            except OSError:
                continue
            if _identity(status) != identity:
                self._ask(int(number), path, status)


def begins_like_model(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins so may be read by an unpickler, or is safetensors."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head[:4] == b"PK\x03\x04":
        return True
    if head[:6] == b"\x93NUMPY":
        return b"O'" in head
    if head.startswith(COMPRESSED) or head[:2] in ZLIB:
        return True
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < min(size, 1 << 30):
        return True
    found = PLAIN.search(head)
    return found is not None and _is_module(found.group(1).decode())


def _is_module(top: str) -> bool:
    """Whether an unpickler could import it just so: a list of words is no pickle."""
    standard = getattr(sys, "stdlib_module_names", None)
    return standard is None or top in standard or top in sys.modules or top in RUNS


def _is_sent_by_a_process() -> bool:
    """Whether the unpickler at work reads what another process of the job sent."""
    frame: Any = sys._getframe(1)
    for _ in range(FRAMES):
        if frame is None:
            return False
        if any(folder in frame.f_code.co_filename for folder in CHANNELS):
            return True
        frame = frame.f_back
    return False


def _open(path: str) -> Optional[int]:
    """A descriptor of the regular file at `path`; None for everything else, without touching it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError):
        return None


def _name_of(descriptor: int) -> str:
    try:
        return os.readlink("/proc/self/fd/%d" % descriptor)
    except OSError:
        return "descriptor %d" % descriptor


def _identity(status: os.stat_result) -> Identity:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def install(client: Client) -> None:
    """Listen, where the welcome names a gate."""
    gate = client.settings.get("gate")
    if not isinstance(gate, dict) or not gate.get("path"):
        return
    state = Loads(client, gate)
    audit.on("open", state.on_open)
    audit.on("pickle.find_class", state.on_find_class)
