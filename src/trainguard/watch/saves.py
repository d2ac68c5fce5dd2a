"""Link *saves*: what `torch.save` is given is digested before it is written, so that the file can be compared with it.

Through `torch.serialization.register_package`, torch's own way of being asked about each storage it saves: the storages
are in memory then, and nothing has been written. The supervisor digests the same storages in the file, by the same
rule, when it seals it. A storage that differs was altered on the way (E9). Nothing is patched, nothing is copied.

Frames (spec/evidence.md "save"):

    kind "save", body {"save": n, "path": file or null, "began_ns", "ended_ns", "sure": bool,
                       "storages": [[key, bytes, digest of samples, digest of all or null, weight or null], …]}
    kind "save", body {"save": n, "left": [[weight, bytes, digest of samples, digest of all or null], …]}
    kind "save", body {"save": n, "renamed": path}

    kind "save", body {"files": [path, …], "weights": [[weight, bytes, digest of samples, digest of all or null], …],
                       "since_ns", "at_ns"}
    kind "save", body {"told_ns": time}          everything saved up to then has been told

A save can be told in several frames of one number. `sure` is false where the storages may honestly change while they
are written: shared memory, another thread that trains, a device. Digests are the first 32 hex digits of SHA-256.

safetensors writes natively and tells nobody. But a step begins with the weights the one before it left: so before a
step the weights are digested, if safetensors files were written since the last one into a folder where Python code of
the job wrote too (a config beside them, say). Told as `weights`; what is not in the file, or renamed, is no matter.

A distributed checkpoint is a row of such saves in one file, one for each tensor.

Not seen: safetensors files written alone; torch's old format.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import sys
import threading
import time
import weakref
from typing import Any, Dict, List, Optional, Set, Tuple

from . import audit
from .client import Client

SAMPLED_BYTES = 1 << 20
"""A storage of at most this is sampled whole."""
PIECES = 16
PIECE_BYTES = 1 << 16
WHOLE_BYTES = 256 << 20
"""Of each save, this many bytes are digested whole, as long as the time for it lasts."""
CREDIT_SECONDS = 1.0
SHARE = 0.01
"""Whole digests may use CREDIT_SECONDS and this share of the time since the process began."""
FRAME_STORAGES = 500
STORAGES_LIMIT = 20_000
SAVES_REMEMBERED = 64
DIGEST_DIGITS = 32
FRAMES = 12
WRAPPERS = 3
FOLDERS_LIMIT = 8
FILES_LIMIT = 64
COARSE_NS = 20_000_000
"""Times of files are this coarse on Linux's own file systems."""
WEIGHTS_LIMIT = 5_000
KEPT_LEAST = 3
LEFT_LIMIT = 64
"""Weights told as left out of a save, at most; only where the save holds at least KEPT_LEAST, and most."""
TOLD_AFTER_NS = 3_000_000_000
"""After a save it is said once, this much later, that all was told: files' times are coarser than the clock."""
PRIORITY = -29_361
"""Before every device's own entry; torch cannot sort two entries of one priority, so nobody else may have this one."""


def pieces(key: str, size: int) -> List[Tuple[int, int]]:
    """(start, length) of what is sampled of a storage of `size` bytes; `key` is the run's secret, hex."""
    if size <= SAMPLED_BYTES:
        return [(0, size)]
    secret = bytes.fromhex(key)[:64]
    starts = []
    for index in range(PIECES):
        text = ("%d %d" % (size, index)).encode()
        number = int.from_bytes(hashlib.blake2b(text, key=secret, digest_size=8).digest(), "little")
        starts.append(number % (size - PIECE_BYTES))
    return [(start, PIECE_BYTES) for start in sorted(starts)]


class Saves:
    """The saves of one process. Made by `install`."""

    def __init__(self, client: Client, torch: Any) -> None:
        self.client = client
        self.torch = torch
        self.key = str(client.settings.get("key", ""))
        self.number = 0
        self.began = time.monotonic()
        self.spent = 0.0
        self.steppers: Set[int] = set()
        """Threads that made optimizer steps."""
        self._lock = threading.Lock()
        self._id_map: Any = None
        """torch's own table of the save under way; held, so that another save cannot be taken for it."""
        self._keys: Set[str] = set()
        self._whole = 0
        self._frame: Dict[str, Any] = {}
        self._paths: Dict[str, int] = {}
        self._live: Dict[int, Tuple[str, Any]] = {}
        """Address of a weight's storage → its name and a function that gives the weight, for the save under way."""
        self._kept = 0
        """How many of `_live` the save under way holds itself."""
        self._place: Tuple[Optional[str], Optional[int]] = None, None
        """File and step of the last save."""
        self._folders: Set[str] = set()
        """Where the job wrote or made something since the last step began."""
        self._since_ns = time.time_ns()
        """When the last step began."""
        self._owed = False
        """Whether it has not been said yet that the last save was told."""
        self.muted = False
        """Whether nothing is told of what is saved: a replay that skips steps has other values (warp.py)."""

    # -- torch asks ---------------------------------------------------------------------------------------------

    def tag(self, storage: Any) -> None:
        """torch is about to save `storage`."""
        if self.muted:
            return
        inside = audit.entered()
        began = time.monotonic()
        try:
            with self._lock:
                self._take(storage)
        except Exception as error:
            self.client.fault("saves.tag", error)
        finally:
            self.spent += time.monotonic() - began
            audit.left(inside)

    def _take(self, storage: Any) -> None:
        asking, saving = _frames()
        if asking is None or saving is None:
            return
        id_map, name = asking.f_locals.get("id_map"), asking.f_locals.get("storage_key")
        if not isinstance(id_map, dict) or not isinstance(name, str) or self._skips():
            return
        if id_map is not self._id_map:
            self._begin(id_map, _target(saving))
        if name in self._keys or len(self._keys) >= STORAGES_LIMIT:
            return
        self._keys.add(name)
        line = self._digest(storage, name)
        if line is not None:
            weight = self._live.pop(storage.data_ptr(), None)
            self._kept += weight is not None
            self._frame["storages"].append([*line, weight[0] if weight is not None else None])
            self._frame["ended_ns"] = time.time_ns()
            if len(self._frame["storages"]) >= FRAME_STORAGES:
                self._send()

    def _skips(self) -> bool:
        """Whether torch was told to leave the data out of what it writes."""
        state = getattr(self.torch.serialization, "_serialization_tls", None)
        return bool(getattr(state, "skip_data", False) or getattr(state, "materialize_fake_tensors", False))

    def _begin(self, id_map: Any, path: Optional[str]) -> None:
        self._send()
        self._owed = True
        self.number += 1
        self._id_map, self._keys, self._whole = id_map, set(), 0
        # A distributed checkpoint saves tensor after tensor into one file: looking the weights up for each is too much.
        place = (path, _step())
        again = path is not None and place == self._place
        self._live, self._kept, self._place = ({} if again else _weights()), 0, place
        me = threading.get_ident()
        now = time.time_ns()
        self._frame = {
            "save": self.number,
            "path": path,
            "began_ns": now,
            "ended_ns": now,
            "sure": self.steppers <= {me},
            "storages": [],
        }
        if path is not None:
            if len(self._paths) >= SAVES_REMEMBERED:
                self._paths.clear()
            self._paths[path] = self.number

    def _digest(self, storage: Any, name: str) -> Optional[List[Any]]:
        """[name, bytes, digest of samples, digest of all or None]; None where there is nothing to read."""
        size = int(storage.nbytes())
        device = storage.device.type
        if not size or device == "meta":
            return None
        if device != "cpu":
            self._frame["sure"] = False
            return self._digest_elsewhere(storage, name, size)
        if storage.is_shared():
            self._frame["sure"] = False
        view = memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B")
        sampled = hashlib.sha256()
        for start, length in pieces(self.key, size):
            sampled.update(view[start : start + length])
        short = sampled.hexdigest()[:DIGEST_DIGITS]
        if size <= SAMPLED_BYTES:
            return [name, size, short, short]
        return [name, size, short, self._all_of(view, size)]

    def _all_of(self, view: memoryview, size: int) -> Optional[str]:
        self._whole += size
        if self._whole > WHOLE_BYTES or self.spent > CREDIT_SECONDS + SHARE * (time.monotonic() - self.began):
            return None
        began = time.monotonic()
        digest = hashlib.sha256(view).hexdigest()[:DIGEST_DIGITS]
        self.spent += time.monotonic() - began
        return digest

    def _digest_elsewhere(self, storage: Any, name: str, size: int) -> List[Any]:
        """Samples of a storage on a device, copied piece by piece."""
        torch = self.torch
        sampled = hashlib.sha256()
        with torch.no_grad():
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,))
            for start, length in pieces(self.key, size):
                part = flat[start : start + length].cpu()
                sampled.update(memoryview((ctypes.c_char * length).from_address(part.data_ptr())))
        short = sampled.hexdigest()[:DIGEST_DIGITS]
        return [name, size, short, short if size <= SAMPLED_BYTES else None]

    # -- telling ------------------------------------------------------------------------------------------------

    def flush(self, *, between: bool = False, last: bool = False) -> None:
        """Tell what was saved and not told yet. Cheap when there is nothing.

        between: no save of this thread can be under way, and the weights are still as they were.
        """
        if between:
            self._look()
        if not self._owed:
            return
        with self._lock:
            self._send()
            if between:
                self._tell_left()
            now = time.time_ns()
            if last or now > self._frame.get("ended_ns", 0) + TOLD_AFTER_NS:
                self._owed = False
                self.client.send("save", {"told_ns": now + (TOLD_AFTER_NS if last else 0)}, _step())

    def on_write(self, args: Tuple[Any, ...]) -> None:
        """Audit events `open` and `os.mkdir`."""
        self.flush()
        target, mode = args[0], args[1]
        writes = not isinstance(mode, str) or bool(set(mode) & set("wax+"))
        if writes and len(self._folders) < FOLDERS_LIMIT and isinstance(target, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(target))
            self._folders.add(path if isinstance(mode, int) else os.path.dirname(path))

    def _look(self) -> None:
        """Digest the weights if safetensors files were written since the last step began."""
        since, self._since_ns = self._since_ns, time.time_ns()
        if not self._folders:
            return
        folders, self._folders = self._folders, set()
        inside = audit.entered()
        began = time.monotonic()
        try:
            files = [path for folder in folders for path in _written(folder, since - COARSE_NS)]
            if files and self.steppers:
                self._whole = 0
                self._tell_weights(files, since)
        except Exception as error:
            self.client.fault("saves.look", error)
        finally:
            self.spent += time.monotonic() - began
            audit.left(inside)

    def _tell_weights(self, files: List[str], since: int) -> None:
        lines = []
        for name, give in list(_weights().values()):
            weight = give()
            if weight is None or weight.device.type != "cpu" or not weight.is_contiguous():
                continue
            storage = weight.detach().untyped_storage()
            if storage.nbytes() == weight.numel() * weight.element_size():
                lines.append(self._digest(storage, name))
        about = {"files": files[:FILES_LIMIT], "since_ns": since, "at_ns": time.time_ns()}
        for start in range(0, len(lines), FRAME_STORAGES):
            self.client.send("save", {**about, "weights": lines[start : start + FRAME_STORAGES]}, _step())

    def _tell_left(self) -> None:
        """Weights that the save does not hold itself, where it holds most: it may have been given others instead."""
        live, self._live = self._live, {}
        if not live or self._kept < KEPT_LEAST or len(live) > min(self._kept, LEFT_LIMIT):
            return
        left = []
        for name, give in live.values():
            weight = give()
            if weight is not None and weight.device.type == "cpu" and weight.is_contiguous():
                line = self._digest(weight.detach().untyped_storage(), name)
                if line is not None and line[1] == weight.numel() * weight.element_size():
                    left.append(line)
        if left:
            self.client.send("save", {"save": self.number, "left": left}, _step())

    def _send(self) -> None:
        if self._frame and self._frame["storages"]:
            self.client.send("save", dict(self._frame), _step())
            self._frame["storages"] = []

    def on_rename(self, args: Tuple[Any, ...]) -> None:
        """Audit event `os.rename`: (source, target, …). A save is often made beside its place and moved there."""
        self.flush()
        source, target = args[0], args[1]
        if not self._paths or not all(isinstance(name, (str, bytes)) for name in (source, target)):
            return
        number = self._paths.pop(os.path.abspath(os.fsdecode(source)), None)
        if number is not None:
            target = os.path.abspath(os.fsdecode(target))
            self._paths[target] = number
            self.client.send("save", {"save": number, "renamed": target}, _step())

    def forked(self) -> None:
        """In a forked child: the parent's saves are the parent's."""
        self._lock = threading.Lock()
        self._frame = {}
        self._id_map = None
        self._paths = {}
        self._live = {}
        self._folders = set()
        self._owed = False
        self.number = 0


def _weights() -> Dict[int, Tuple[str, Any]]:
    """Address → (name, weak reference) of every weight that has a storage of its own and an optimizer that stepped."""
    engine = sys.modules.get(__package__ + ".engine")
    known = engine.current() if engine is not None else None
    found: Dict[int, Tuple[str, Any]] = {}
    for track in list(known.tracks.values()) if known is not None else ():
        for entry in track.entries[:WEIGHTS_LIMIT]:
            if "[" not in entry.name:
                local = getattr(entry.param, "_local_tensor", entry.param)
                address = _address(local)
                if address is not None:
                    found[address] = (entry.name, weakref.ref(local))
    return found


def _address(weight: Any) -> Optional[int]:
    """Where a weight's memory begins; None for one that has none of its own, as a sharded one between steps."""
    try:
        return int(weight.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return None


def _written(folder: str, since_ns: int) -> List[str]:
    """safetensors files in `folder` that were written since."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors") and entry.stat().st_mtime_ns >= since_ns:
                    found.append(entry.path)
    except OSError:
        return []
    return found


def _frames() -> Tuple[Any, Any]:
    """The frame in which torch asks, and that of `torch.save`; None where this is another format than its zip."""
    frame: Any = sys._getframe(1)
    asking = None
    zipped = False
    for _ in range(FRAMES):
        if frame is None:
            return None, None
        name = frame.f_code.co_name
        if name == "persistent_id" and asking is None:
            asking = frame
        elif name == "_save":
            zipped = True
        elif name == "save" and "f" in frame.f_locals:
            return (asking, frame) if zipped else (None, None)
        frame = frame.f_back
    return None, None


def _target(saving: Any) -> Optional[str]:
    """The file a `torch.save` writes to: given by path, or as an open file that has one."""
    given = saving.f_locals.get("f")
    for _ in range(WRAPPERS):  # torch.distributed.checkpoint writes through a wrapper around its file
        if isinstance(given, (str, bytes, os.PathLike)) or getattr(given, "name", None) is not None:
            break
        given = getattr(given, "raw", None)
    name = given if isinstance(given, (str, bytes, os.PathLike)) else getattr(given, "name", None)
    if not isinstance(name, (str, bytes, os.PathLike)):
        return None
    return os.path.abspath(os.fsdecode(name))


def _step() -> Optional[int]:
    from . import code

    state = code.current()
    return state.step if state is not None else None


_saves: Optional[Saves] = None


def current() -> Optional[Saves]:
    """The saves of this process, once torch has been imported."""
    return _saves


def install(client: Client, torch: Any) -> None:
    """Be asked about storages from now on."""
    global _saves
    if _saves is not None or not client.settings.get("key"):
        return
    state = _saves = Saves(client, torch)
    torch.serialization.register_package(PRIORITY, state.tag, lambda storage, location: None)
    audit.on("open", state.on_write)
    audit.on("os.mkdir", state.on_write)
    audit.on("os.rename", state.on_rename)
    os.register_at_fork(after_in_child=state.forked)
    atexit.register(lambda: state.flush(between=True, last=True))
