"""Is this machine set up so that a guarded run means what it says? One reading a question, each with its remedy.

    for reading in machine(home_folder):
        print(reading.state, reading.name, reading.found, reading.remedy)

Only looks: opens a socket pair, lists folders, asks the kernel. Changes nothing, needs no rights, imports no torch.
Outside this check: whether the log verifies (`trainguard log verify`), and whether what runs is approved (`preflight`).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import pwd
import re
import shutil
import socket
import stat
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

State = Literal["ok", "warn", "fail", "unknown"]

OLDEST_TORCH = (2, 6)
SITE_FILE_LIMIT = 400_000
"""Files looked at in all site folders; an environment with everything has about a tenth."""

FREE_WARN_BYTES, FREE_FAIL_BYTES = 2 << 30, 100 << 20
LOADING_VARIABLES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # struct timex is 208 bytes on Linux; the kernel writes no more than its own size


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    name: str
    state: State
    """ok; warn: works, but leaves a way open; fail: must be put right; unknown: could not be told."""
    found: str
    remedy: str | None = None
    """What to do about it, None where nothing is to be done."""


def machine(home: Path) -> list[Reading]:
    """Every reading of this machine for state kept in `home` (which need not exist). Never raises."""
    return [_safely(question, home) for question in QUESTIONS]


def _safely(question: Callable[[Path], Reading], home: Path) -> Reading:
    name = question.__name__.strip("_").replace("_", " ")
    try:
        return msgspec.structs.replace(question(home), name=name)
    except Exception as error:  # one odd file system must not hide the other answers
        return Reading(name=name, state="unknown", found=f"could not be told: {type(error).__name__}: {error}")


def _reading(state: State, found: str, remedy: str | None = None) -> Reading:
    return Reading(name="", state=state, found=found, remedy=remedy)


def _python(_home: Path) -> Reading:
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    return _reading("ok", found)


def _torch(_home: Path) -> Reading:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        remedy = "nothing, where the job uses another environment; else: pip install torch"
        return _reading("warn", "not installed beside trainguard", remedy)
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if number < OLDEST_TORCH:
        return _reading("warn", f"torch {version}", "2.6 or newer is tested; older ones lack hooks the guard uses")
    return _reading("ok", f"torch {version}")


def _peer_identity(_home: Path) -> Reading:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        pid, uid, _ = struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if (pid, uid) != (os.getpid(), os.getuid()):
        found = f"the kernel names pid {pid}, account {uid} for our own end of a socket"
        return _reading("fail", found, "run outside this sandbox: it hides who speaks")
    return _reading("ok", "the kernel names the process at the other end of a socket (SO_PEERCRED)")


def _processes(_home: Path) -> Reading:
    if not Path(f"/proc/{os.getpid()}/stat").is_file():
        return _reading("fail", "/proc is not there", "mount it: the process tree is read from it")
    foreign = [path for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != str(os.getpid())]
    if len(foreign) < 2 and os.getppid() != 1:
        return _reading("warn", "/proc shows no process but ours", "mount /proc without hidepid for this account")
    return _reading("ok", f"/proc shows {len(foreign) + 1} processes")


def _signals(_home: Path) -> Reading:
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    available = actions.read_text().split() if actions.is_file() else []
    if "user_notif" not in available:
        remedy = "a kernel from 5.0 with seccomp; without it the sender of a signal stays unknown"
        return _reading("warn", "no seccomp user notification", remedy)
    return _reading("ok", "seccomp user notification is there, so senders of signals can be named")


def _foreign_memory(_home: Path) -> Reading:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not scope.is_file():
        remedy = "a kernel with Yama, or a sandbox; any process of this account can write into a run"
        return _reading("warn", "nothing limits ptrace (no Yama)", remedy)
    value = int(scope.read_text())
    if value == 0:
        remedy = "sysctl kernel.yama.ptrace_scope=1; any process of this account can write into a run"
        return _reading("warn", "ptrace_scope is 0", remedy)
    return _reading("ok", f"ptrace_scope is {value}: only ancestors can attach")


def _umask(_home: Path) -> Reading:
    text = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.M)
    if text is None:
        return _reading("unknown", "not in /proc/self/status")
    mask = int(text[1], 8)
    if not mask & 0o002:
        return _reading("fail", f"{mask:04o}: new files can be written by anyone", "umask 022")
    if not mask & 0o020:
        return _reading("warn", f"{mask:04o}: new files can be written by the whole group", "umask 022")
    return _reading("ok", f"{mask:04o}")


def _keys(home: Path) -> Reading:
    folder = home / "keys"
    if not folder.is_dir():
        return _reading("ok", f"none yet; the first run makes them in {folder}, mode 0700")
    secret = [path for path in (folder, *folder.iterdir()) if path.suffix not in (".pub", ".vkey")]
    for path in secret:
        status = path.lstat()
        if status.st_uid not in (os.getuid(), 0):
            return _reading("fail", f"{path} belongs to account {_account(status.st_uid)}", "make new keys elsewhere")
        if status.st_mode & 0o077:
            found = f"{path} has mode {stat.S_IMODE(status.st_mode):04o}"
            return _reading("fail", found, f"chmod go= {path}; whoever read them can sign, so make new keys")
    return _reading("ok", f"{folder} is ours alone")


def _state_folder(home: Path) -> Reading:
    place = home if home.is_dir() else home.parent
    if not os.access(place, os.W_OK):
        return _reading("fail", f"{place} cannot be written", "set TRAINGUARD_HOME to a folder you can write")
    weak = next((path for path in (home, *home.glob("*")) if path.is_dir() and _others_write(path)), None)
    if weak is not None:
        found = f"{weak} has mode {stat.S_IMODE(weak.stat().st_mode):04o}"
        return _reading("fail", found, f"chmod go-w {weak}; evidence in it can be replaced (the log would tell)")
    return _reading("ok", f"{home} can be written by us alone" if home.is_dir() else f"{home} will be made in {place}")


def _disk(home: Path) -> Reading:
    place = next(path for path in (home, *home.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free at {place}"
    if free < FREE_FAIL_BYTES:
        return _reading("fail", found, "free some: a full disk makes gaps in the record")
    if free < FREE_WARN_BYTES:
        return _reading("warn", found, "free some: a day of 8,000 ranks writes up to 2 GB")
    return _reading("ok", found)


def _clock(_home: Path) -> Reading:
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    answer = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    if answer < 0:
        return _reading("unknown", f"adjtimex: {os.strerror(ctypes.get_errno())}")
    if answer == _TIME_ERROR:
        return _reading(
            "warn", "not synchronised", "start a time service; order comes from the log, but times will be off"
        )
    return _reading("ok", "synchronised")


def _loading_variables(_home: Path) -> Reading:
    present = [name for name in LOADING_VARIABLES if os.environ.get(name)]
    if present:
        return _reading(
            "warn", f"{', '.join(present)} set", "unset what is not needed: these decide which code is loaded"
        )
    return _reading("ok", "none of " + ", ".join(LOADING_VARIABLES) + " is set")


def _packages(_home: Path) -> Reading:
    """Who can write what a job started by this Python imports."""
    roots = sorted({Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")})
    seen = 0
    open_to_all: list[Path] = []
    open_to_group: list[Path] = []
    foreign: dict[int, Path] = {}
    for path, status in _imported(roots):
        seen += 1
        if stat.S_ISLNK(status.st_mode):
            continue
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & 0o002 and not sticky:
            open_to_all.append(path)
        elif status.st_mode & 0o020 and not _own_group(status):
            open_to_group.append(path)
        if status.st_uid not in (0, os.getuid()):
            foreign.setdefault(status.st_uid, path)
    return _write_set(seen, open_to_all, open_to_group, foreign)


def _write_set(seen: int, everyone: list[Path], group: list[Path], foreign: dict[int, Path]) -> Reading:
    if everyone:
        found = f"anyone can write {len(everyone):,} of {seen:,} files and folders, such as {everyone[0]}"
        return _reading("fail", found, "chmod -R o-w them, then compare with a fresh install: trainguard lock")
    if foreign:
        accounts = ", ".join(f"{_account(uid)} (such as {path})" for uid, path in sorted(foreign.items())[:3])
        remedy = "give each job an environment of its own; a lock shows what they changed"
        return _reading("warn", f"other accounts own imported files: {accounts}", remedy)
    if group:
        found = f"a group can write {len(group):,} of {seen:,} files and folders, such as {group[0]}"
        return _reading("warn", found, "chmod -R g-w them, or give each job an environment of its own")
    return _reading("ok", f"only this account and root can write the {seen:,} files and folders it imports from")


def _imported(roots: list[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    """The roots, the folders above them, and everything below, each once, without following links."""
    above = {parent for root in roots for parent in root.parents}
    for path in sorted(above):
        yield path, path.lstat()
    waiting, seen = [root for root in roots if root.is_dir()], 0
    done: set[Path] = set()
    while waiting and seen < SITE_FILE_LIMIT:
        folder = waiting.pop()
        if folder in done:
            continue
        done.add(folder)
        yield folder, folder.lstat()
        with os.scandir(folder) as entries:
            for entry in entries:
                seen += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                else:
                    yield Path(entry.path), entry.stat(follow_symlinks=False)


def _others_write(path: Path) -> bool:
    status = path.stat()
    return bool(status.st_mode & 0o002) or (bool(status.st_mode & 0o020) and not _own_group(status))


def _own_group(status: os.stat_result) -> bool:
    """Whether the group is the owner's private one: same number as the account, as most systems set it up."""
    return status.st_gid == status.st_uid


def _account(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


QUESTIONS: tuple[Callable[[Path], Reading], ...] = (
    _python,
    _torch,
    _peer_identity,
    _processes,
    _signals,
    _foreign_memory,
    _umask,
    _state_folder,
    _keys,
    _disk,
    _clock,
    _loading_variables,
    _packages,
)
"""Asked in this order."""
