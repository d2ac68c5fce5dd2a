"""Link *live*, outer half: reads the functions of a running Python process out of its memory, and trusts nothing in it.

    EXE -I -S -B reader.py < options        JSON in, JSON out; EXE is the very program the process runs (/proc/PID/exe)

Whatever runs inside a process can answer for every object in it: feed copies, patch what introspection calls, unload
the guard. What it cannot do is keep a changed function and show the old one to somebody who reads its memory: the
bytes that the interpreter executes are the bytes that are read. So this program, started by the supervisor, follows
the interpreter's own pointers, from the runtime structure to `sys.modules`, to module and class dictionaries, to
functions, code, defaults, closures, and compares each code object with what it compiles itself from the source file
whose hash it reports.

No offset of any structure is written down here. It runs the same binary as the process, so it finds each in its own
memory first (`Layout`), checks the find on objects it knows, and gives up by name where one does not fit. Reading
needs what ptrace needs (same account, a parent under Yama) and never stops the process: objects may move while they
are read, so a difference counts only when three readings agree.

Output: {"modules", "functions", "code", "found": [{"binding", "kind", "origin", "function", "claims"?}, …],
"guard": {…}, "natives", "files": {path: sha256}, "skipped": {why: n}, "error"?: why nothing could be read}.
Standard library only; never imports anything of the job.
"""

from __future__ import annotations

import dis
import hashlib
import importlib.util
import json
import os
import struct
import sys
import time
import types
from collections import OrderedDict
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

CHUNK = 1 << 14
CHUNKS_LIMIT = 8192
"""Chunks of memory kept at a time: 128 MiB."""

FILE_LIMIT_BYTES = 4 << 20
DEPTH_LIMIT = 24
REACH_LIMIT = 24
ITEMS_LIMIT = 200_000
FOUND_LIMIT = 200
AGREE = 3
AGREE_SECONDS = 0.05


class Unreadable(Exception):
    """Memory that is not there, or not what it should be."""


class Memory:
    """The memory of one process, in chunks that are read once until `fresh`."""

    def __init__(self, descriptor: int, *, keep: bool = True) -> None:
        self.file = descriptor
        self.keep = keep
        self.chunks: Dict[int, bytes] = {}

    def fresh(self) -> None:
        """Forget what was read."""
        self.chunks.clear()

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`."""
        if not 0 < address < 1 << 62 or not 0 <= size <= 1 << 24:
            raise Unreadable("%d bytes at %#x" % (size, address))
        if not self.keep:
            self.chunks.clear()
        first, last = address // CHUNK, (address + size - 1) // CHUNK
        try:
            data = self._chunk(first) if first == last else b"".join(map(self._chunk, range(first, last + 1)))
            found = data[address - first * CHUNK :][:size]
        except OSError:
            found = b""
        if len(found) != size:
            found = self._exactly(address, size)
        if len(found) != size:
            raise Unreadable("%d bytes at %#x" % (size, address))
        return found

    def _chunk(self, number: int) -> bytes:
        known = self.chunks.get(number)
        if known is None:
            if len(self.chunks) >= CHUNKS_LIMIT:
                self.chunks.clear()
            known = self.chunks[number] = os.pread(self.file, CHUNK, number * CHUNK)
        return known

    def _exactly(self, address: int, size: int) -> bytes:
        """Without the rest of its chunk, which may hang over the end of a mapping."""
        try:
            return os.pread(self.file, size, address)
        except OSError as error:
            raise Unreadable("%#x: %s" % (address, error.strerror)) from None

    def word(self, address: int) -> int:
        """The unsigned 64-bit number at `address`."""
        return int(struct.unpack("<Q", self.read(address, 8))[0])

    def words(self, address: int, count: int) -> Tuple[int, ...]:
        """`count` of them."""
        return struct.unpack("<%dQ" % count, self.read(address, 8 * count))

    def text(self, address: int, limit: int = 200) -> str:
        """A C string."""
        data = b""
        while b"\0" not in data and len(data) < limit:
            data += self.read(address + len(data), 32)
        return data.split(b"\0")[0].decode("ascii", "replace")


def _sample(a: Any, b: float = 0.5, *, c: str = "c") -> Any:
    return lambda: (a, b, c)


class _Thing:
    def __init__(self) -> None:
        self.first_of_thing, self.second_of_thing = "one", "two"


class Layout:
    """Where things lie, found in this process. Raises Unreadable with the name of what could not be found."""

    def __init__(self) -> None:
        import ctypes

        own = Memory(os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC), keep=False)
        self.own = own
        runtime = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
        get = ctypes.pythonapi.PyInterpreterState_Get
        get.restype = ctypes.c_void_p
        interpreter = int(get())
        self.image = _image_of("self", runtime)
        self.runtime = runtime - self.image[1]
        self.interpreter = self._offset("interpreter", runtime, interpreter, 1 << 17)
        self.modules = self._offset("modules", interpreter, id(sys.modules), 1 << 19)
        function = _sample(1)
        self.code = self._offset("code", id(_sample), id(_sample.__code__), 256)
        self.defaults = self._offset("defaults", id(_sample), id(_sample.__defaults__), 256)
        self.keywords = self._offset("kwdefaults", id(_sample), id(_sample.__kwdefaults__), 256)
        self.closure = self._offset("closure", id(function), id(function.__closure__), 256)
        self.globals = self._offset("globals", id(_sample), id(_sample.__globals__), 256)
        code = _sample.__code__
        self.consts = self._offset("co_consts", id(code), id(code.co_consts), 256)
        self.names = self._offset("co_names", id(code), id(code.co_names), 256)
        self.filename = self._offset("co_filename", id(code), id(code.co_filename), 256)
        self.name = self._offset("co_name", id(code), id(code.co_name), 256)
        self.handlers = self._offset("co_exceptiontable", id(code), id(code.co_exceptiontable), 256)
        self.bytecode = self._bytecode()
        self.line = self._line()
        self.dictionary = self._offset("tp_dict", id(_Thing), _dict_of(_Thing), 1024)
        self.flags = self._offset("tp_flags", id(_Thing), _Thing.__flags__, 1024)
        self.ascii = own.read(id("asciitext"), 96).find(b"asciitext")
        self.wide = own.read(id("Ä€texts"), 128).find("Ä€texts".encode("utf-16-le"))
        self.latin = own.read(id("Ätexts"), 128).find("Ätexts".encode("latin-1"))
        if min(self.ascii, self.wide, self.latin) < 0:
            raise Unreadable("layout of text")
        self.digits = _digits(own)
        self.cached_keys = self._cached_keys()
        self._check()

    def _offset(self, what: str, start: int, value: int, limit: int) -> int:
        for offset in range(0, limit, 8):
            try:
                if self.own.word(start + offset) == value:
                    return offset
            except Unreadable:
                break
        raise Unreadable("layout of %s" % what)

    def _bytecode(self) -> int:
        fresh = compile("def f(a):\n    return [a, 3, a + 1]\n", "x", "exec").co_consts[0]
        offset = self.own.read(id(fresh), 512).find(fresh.co_code)
        if offset < 0:
            raise Unreadable("layout of bytecode")
        return offset

    def _line(self) -> int:
        sample = compile("\n" * 77700 + "def f(): pass\n", "x", "exec").co_consts[0]
        offset = self.own.read(id(sample), 160).find(struct.pack("<i", sample.co_firstlineno))
        if offset < 0:
            raise Unreadable("layout of co_firstlineno")
        return offset

    def _cached_keys(self) -> Optional[int]:
        """Where a class keeps the names of its objects' attributes; None where this version does it otherwise."""
        thing = _Thing()
        process = Process(self, self.own, 0, {})
        for offset in range(dict_offset_min(), 1600, 8):
            try:
                names = [process.string(k) for k, _ in process.entries(self.own.word(id(_Thing) + offset))]
            except (Unreadable, UnicodeDecodeError):
                continue
            if names == ["first_of_thing", "second_of_thing"]:
                self.cached_keys = offset
                try:
                    if process.attributes(id(thing)).keys() == {"first_of_thing", "second_of_thing"}:
                        return offset
                except (Unreadable, AttributeError):
                    pass
        return None

    def _check(self) -> None:
        """Read known objects of this process in the way the other's are read."""
        process = Process(self, self.own, 0, {})
        known = {"a": 1, "ä€": 2, "b": _sample}
        if self.cached_keys is not None:
            thing = _Thing()
            shared = process.named(id(vars(thing)))
            if shared != {"first_of_thing": id(thing.first_of_thing), "second_of_thing": id(thing.second_of_thing)}:
                raise Unreadable("layout of dict with shared keys")
        read = {process.string(k): v for k, v in process.dictionary(id(known))}
        if read != {"a": id(known["a"]), "ä€": id(known["ä€"]), "b": id(_sample)}:
            raise Unreadable("layout of dict")
        for value in (_sample.__code__, Layout.__init__.__code__, json.dumps.__code__, Process.differs.__code__):
            if process.differs(id(value), value) is not None:
                raise Unreadable("layout of code: %s" % process.differs(id(value), value))


def dict_offset_min() -> int:
    """Where the part of a type object that only heap types have begins: after the fields every type has."""
    return 400


def _dict_of(kind: type) -> int:
    import gc

    return next(id(one) for one in gc.get_referents(kind) if type(one) is dict and "__module__" in one)


def _digits(memory: Memory) -> Tuple[int, int]:
    """(offset of the size word of an int, offset of its digits)."""
    big = (3 << 60) + (5 << 30) + 7
    at = memory.read(id(big), 48).find(struct.pack("<3I", 7, 5, 3))
    if at < 0:
        raise Unreadable("layout of int")
    return 16, at


STATIC = {
    "function": types.FunctionType,
    "code": types.CodeType,
    "module": types.ModuleType,
    "dict": dict,
    "ordered": OrderedDict,
    "str": str,
    "bytes": bytes,
    "tuple": tuple,
    "frozenset": frozenset,
    "int": int,
    "float": float,
    "complex": complex,
    "list": list,
    "staticmethod": staticmethod,
    "classmethod": classmethod,
    "property": property,
    "cell": types.CellType,
    "builtin": types.BuiltinFunctionType,
    "method": types.MethodType,
}
"""Types that lie in the interpreter's own image: their address there is their address here, moved."""

SINGLETONS = {"None": None, "True": True, "False": False, "Ellipsis": ...}


def _image_of(pid: Any, address: int) -> Tuple[str, int]:
    """((device, inode) of the file mapped at `address`, the address its first page is mapped at)."""
    bases: Dict[str, int] = {}
    with open("/proc/%s/maps" % pid) as file:
        for line in file:
            fields = line.split(None, 5)
            low, high = (int(part, 16) for part in fields[0].split("-"))
            key = fields[3] + " " + fields[4]
            if fields[4] != "0" and int(fields[2], 16) == 0:
                bases.setdefault(key, low)
            if fields[4] == "0" and bases:
                key = list(bases)[-1]  # the image's own zeroed pages follow its file pages
            if low <= address < high:
                if key not in bases:
                    break
                return key, bases[key]
    raise Unreadable("the interpreter's image")


def _base_in(pid: int, image: str) -> int:
    with open("/proc/%d/maps" % pid) as file:
        for line in file:
            fields = line.split(None, 5)
            if fields[3] + " " + fields[4] == image and int(fields[2], 16) == 0:
                return int(fields[0].split("-")[0], 16)
    raise Unreadable("the process runs another interpreter")


class Process:
    """Python objects of another process, by address."""

    def __init__(self, layout: Layout, memory: Memory, moved: int, files: Dict[str, str]) -> None:
        self.layout = layout
        self.memory = memory
        self.types = {id(kind) + moved: name for name, kind in STATIC.items()}
        self.singletons = {id(value) + moved: value for value in SINGLETONS.values()}
        self.files = files
        self._strings: Dict[int, str] = {}

    def kind(self, address: int) -> Optional[str]:
        """Name of the built-in type of an object, "class" for a class, None for anything else."""
        of = self.memory.word(address + 8)
        known = self.types.get(of)
        if known is not None:
            return known
        return "class" if self.memory.word(of + self.layout.flags) >> 31 & 1 else None

    def string(self, address: int) -> str:
        """The text of a str."""
        known = self._strings.get(address)
        if known is not None:
            return known
        if self.types.get(self.memory.word(address + 8)) != "str":
            raise Unreadable("not a str")
        size = self.memory.word(address + 16)
        state = int(struct.unpack("<I", self.memory.read(address + 32, 4))[0])
        kind, ascii_only = state >> 2 & 7, state >> 6 & 1
        if size > 1 << 20 or kind not in (1, 2, 4):
            raise Unreadable("a str of %d characters" % size)
        layout = self.layout
        data = self.memory.read(address + (layout.ascii if ascii_only else layout.wide), size * kind)
        text = data.decode({1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[kind], "surrogatepass")
        if len(self._strings) < ITEMS_LIMIT:
            self._strings[address] = text
        return text

    def tuple(self, address: int) -> Tuple[int, ...]:
        """Addresses of the items of a tuple."""
        if self.types.get(self.memory.word(address + 8)) != "tuple":
            raise Unreadable("not a tuple")
        size = self.memory.word(address + 16)
        if size > 1 << 16:
            raise Unreadable("a tuple of %d" % size)
        return self.memory.words(address + 24, size) if size else ()

    def list(self, address: int) -> Tuple[int, ...]:
        """Addresses of the items of a list."""
        if self.types.get(self.memory.word(address + 8)) != "list":
            raise Unreadable("not a list")
        size = self.memory.word(address + 16)
        return self.memory.words(self.memory.word(address + 24), size) if 0 < size < 1 << 16 else ()

    def dictionary(self, address: int) -> List[Tuple[int, int]]:
        """(address of key, address of value) of a dict with its own values."""
        if self.types.get(self.memory.word(address + 8)) not in ("dict", "ordered"):
            raise Unreadable("not a dict")
        values = self.memory.word(address + 40)
        entries = self.entries(self.memory.word(address + 32))
        if values:  # it shares its keys with other objects of its class; the values are its own
            held = self.memory.words(values, len(entries)) if entries else ()
            return [(key, value) for (key, _), value in zip(entries, held) if value]
        return entries

    def entries(self, keys: int) -> List[Tuple[int, int]]:
        """The entries of a table of keys."""
        head = self.memory.read(keys, 32)
        log_size, log_index, kind = head[8], head[9], head[10]
        count = int(struct.unpack("<q", head[24:32])[0])
        if kind > 2 or log_size > 32 or log_index > 40 or not 0 <= count <= ITEMS_LIMIT:
            raise Unreadable("a table of keys")
        start, width = keys + 32 + (1 << log_index), 3 if kind == 0 else 2
        words = self.memory.words(start, count * width) if count else ()
        pairs = [(words[n + width - 2], words[n + width - 1]) for n in range(0, count * width, width)]
        return [pair for pair in pairs if pair[0] and (pair[1] or kind == 2)]

    def named(self, address: int) -> Dict[str, int]:
        """A dict with text keys, as {text: address of value}; other keys are left out."""
        found = {}
        for key, value in self.dictionary(address):
            try:
                found[self.string(key)] = value
            except Unreadable:
                continue
        return found

    def attributes(self, address: int) -> Dict[str, int]:
        """The attributes of an ordinary object."""
        values, held = self.memory.word(address - 32), self.memory.word(address - 24)
        if held:
            return self.named(held)
        offset = self.layout.cached_keys
        if offset is None or not values:
            raise Unreadable("attributes of an object")
        keys = self.entries(self.memory.word(self.memory.word(address + 8) + offset))
        slots = self.memory.words(values, len(keys)) if keys else ()
        return {self.string(key): value for (key, _), value in zip(keys, slots) if value}

    # -- code -----------------------------------------------------------------------------------------------------

    def differs(self, address: int, expected: types.CodeType, depth: int = 0) -> Optional[str]:
        """What of a code object is not as in `expected`; None when nothing is."""
        if self.types.get(self.memory.word(address + 8)) != "code" or depth > DEPTH_LIMIT:
            return "no code"
        layout = self.layout
        units = self.memory.word(address + 16)
        if units > 1 << 20 or len(expected.co_code) != 2 * units:
            return "bytecode"
        if plain_bytecode(self.memory.read(address + layout.bytecode, 2 * units)) != expected.co_code:
            return "bytecode"
        at = self.memory.word
        if [self.string(one) for one in self.tuple(at(address + layout.names))] != list(expected.co_names):
            return "names"
        if not self.equal(at(address + layout.handlers), expected.co_exceptiontable, depth):
            return "exception table"
        consts = self.tuple(at(address + layout.consts))
        if len(consts) != len(expected.co_consts):
            return "constants"
        for one, wanted in zip(consts, expected.co_consts):
            if isinstance(wanted, types.CodeType):
                inner = self.differs(one, wanted, depth + 1)
                if inner is not None:
                    return inner
            elif not self.equal(one, wanted, depth):
                return "constants"
        return None

    def equal(self, address: int, wanted: Any, depth: int = 0) -> bool:
        """Whether the constant at `address` is `wanted`, in type and value."""
        if address in self.singletons or any(wanted is one for one in SINGLETONS.values()):
            return address in self.singletons and bool(self.singletons[address] is wanted)
        kind = self.types.get(self.memory.word(address + 8))
        if kind != type(wanted).__name__ or depth > DEPTH_LIMIT:
            return False
        if kind == "str":
            return bool(self.string(address) == wanted)
        if kind == "bytes":
            size = self.memory.word(address + 16)
            return size == len(wanted) and self.memory.read(address + 32, size) == wanted
        if kind == "float":
            return self.memory.read(address + 16, 8) == struct.pack("<d", wanted)
        if kind == "complex":
            return self.memory.read(address + 16, 16) == struct.pack("<2d", wanted.real, wanted.imag)
        if kind == "int":
            return self._int_equal(address, wanted)
        if kind == "tuple":
            items = self.tuple(address)
            return len(items) == len(wanted) and all(self.equal(a, b, depth + 1) for a, b in zip(items, wanted))
        return kind == "frozenset" and self.memory.word(address + 24) == len(wanted)

    def _int_equal(self, address: int, wanted: int) -> bool:
        """Compares the words that hold size and sign, and the digits, with those of the same number here."""
        size_at, digits_at = self.layout.digits
        length = digits_at + 4 * max(1, (abs(wanted).bit_length() + 29) // 30)
        mine = self.layout.own.read(id(wanted), length)[size_at:]
        return self.memory.read(address, length)[size_at:] == mine


_BASE: Dict[int, int] = {}
_CACHES: Dict[int, int] = {}


def _tables() -> None:
    """Specialised instruction → the plain one, and how many cache units follow each (CPython 3.11 and later)."""
    everything: Dict[str, int] = getattr(dis, "_all_opmap", dis.opmap)
    for special, plain in getattr(dis, "deoptmap", {}).items():
        if special in everything and plain in everything:
            _BASE[everything[special]] = everything[plain]
    entries: Any = getattr(dis, "_inline_cache_entries", {})
    pairs = entries.items() if isinstance(entries, dict) else enumerate(entries)
    for name, count in pairs:
        number = everything.get(name) if isinstance(name, str) else name
        if number is not None and count:
            _CACHES[number] = count


_tables()


def plain_bytecode(raw: bytes) -> bytes:
    """Bytecode as it was compiled: the interpreter rewrites instructions in place to faster ones, and back."""
    out, at = bytearray(raw), 0
    while at < len(out):
        number = _BASE.get(out[at], out[at])
        out[at] = number
        caches = _CACHES.get(number, 0)
        out[at + 2 : at + 2 + 2 * caches] = bytes(min(2 * caches, max(0, len(out) - at - 2)))
        at += 2 + 2 * caches
    return bytes(out)


def _facts() -> Any:
    """The sibling file that reads syntax trees; this program runs by its path, outside of any package."""
    if "facts" not in sys.modules:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "facts.py")
        spec: Any = importlib.util.spec_from_file_location("facts", path)
        sys.modules["facts"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["facts"])
    return sys.modules["facts"]


class Source:
    """What one source file compiles to, by name and first line."""

    def __init__(self, path: str, optimize: int) -> None:
        with open(path, "rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
        if len(data) > FILE_LIMIT_BYTES:
            raise Unreadable("a large file")
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._data = data
        self._facts: Optional[Dict[str, Any]] = None
        self.codes: Dict[Tuple[str, int], List[types.CodeType]] = {}
        self.own: Dict[str, List[types.CodeType]] = {}
        module = compile(data, path, "exec", dont_inherit=True, optimize=optimize)
        self._walk(module)
        for inner in module.co_consts:
            if isinstance(inner, types.CodeType) and inner.co_flags & 1:
                self.own.setdefault(inner.co_name, []).append(inner)

    def facts(self) -> Dict[str, Any]:
        """Defaults and constants, from the syntax tree (facts.py)."""
        if self._facts is None:
            self._facts = dict(_facts().read(self._data))
        return self._facts

    def _walk(self, parent: types.CodeType) -> None:
        for inner in parent.co_consts:
            if isinstance(inner, types.CodeType):
                self.codes.setdefault((inner.co_name, inner.co_firstlineno), []).append(inner)
                self._walk(inner)


class Sweep:
    """One reading of one process."""

    def __init__(self, process: Process, options: Dict[str, Any]) -> None:
        self.process = process
        self.memory = process.memory
        self.pid = int(options["pid"])
        self.optimize = int(options.get("optimize", 0))
        self.prefixes = tuple(options.get("prefixes", ()))
        self.guard = str(options.get("guard", ""))
        self.everything = bool(options.get("everything"))
        self.after = str(options.get("after", ""))
        self.deadline = time.process_time() + float(options.get("cpu_seconds", 30.0))
        self.sources: Dict[str, Optional[Source]] = {}
        self.found: List[Dict[str, Any]] = []
        self.counts = {"modules": 0, "functions": 0, "code": 0, "natives": 0}
        self.skipped: Dict[str, int] = {}
        self.seen: Set[int] = set()
        """Classes that were followed."""
        self.judged: Dict[Tuple[int, int], Tuple[str, str, str]] = {}
        """(function, its code) → what `_judge` said."""
        self.namespaces: Dict[str, Dict[str, int]] = {}
        self.natives: Dict[int, str] = {}
        self.held: Dict[str, int] = {}
        self.classes: Dict[str, Set[int]] = {}
        """Module → everything its namespace holds."""
        self.partial = False

    def run(self, modules: int) -> Dict[str, Any]:
        """Follow every module that counts, in the order of importance."""
        self.held = self.process.named(modules)
        cursor = ""
        for rank, name in sorted(self._ranked()):
            if time.process_time() > self.deadline:
                self.partial = True
                break
            cursor = name if rank > LAST_OF_CHOSEN else ""
            try:
                self._module(name)
            except Unreadable as error:
                self._skip("unreadable: %s" % error)
        found, guard, native = self._confirmed()[:FOUND_LIMIT], self._guard(), self._native_pointers()
        return {
            **self.counts,
            "found": found,
            "guard": guard,
            "native": native,
            "files": {path: source.sha256 for path, source in self.sources.items() if source is not None},
            "skipped": dict(list(self.skipped.items())[:20]),
            "partial": self.partial,
            "cursor": cursor if self.partial else "",
        }

    def _ranked(self) -> Iterator[Tuple[int, str]]:
        """The guard, what decides about training and the job's own code; the rest in turns, from where we left off."""
        for name in self.held:
            try:
                path = self._file_of(name)
            except Unreadable:
                continue
            if path is None:
                continue
            if name.startswith("_trainguard"):
                yield 0, name
            elif name.startswith(self.prefixes) or not in_library(path):
                yield LAST_OF_CHOSEN, name
            elif self.everything:
                yield LAST_OF_CHOSEN + (1 if name > self.after else 2), name

    def _names(self, name: str) -> Dict[str, int]:
        """The namespace of a module."""
        return self.process.named(self._namespace(name))

    def _file_of(self, name: str) -> Optional[str]:
        """The file a module says it is from; its name stands among the first in the namespace."""
        for key, value in self.process.dictionary(self._namespace(name)):
            if self._text(key) == "__file__":
                return self._text(value)
        return None

    def _namespace(self, name: str) -> int:
        address = self.held[name]
        kind = self.memory.word(address + 8)
        if (
            self.process.types.get(kind) != "module"
            and self.process.types.get(self.memory.word(kind + 256)) != "module"
        ):
            raise Unreadable("no module")
        return self.memory.word(address + 16)

    def _skip(self, why: str) -> None:
        self.skipped[why] = self.skipped.get(why, 0) + 1

    def _module(self, name: str) -> None:
        names = self._names(name)
        path = self._text(names.get("__file__"))
        ours = name.startswith("_trainguard")
        if path is None:
            return
        if ours or name == "torch.optim.optimizer":
            self.namespaces[name] = names
        if not ours and self._loader(names) not in ("SourceFileLoader", None):
            self._skip("another loader's module")
            return
        self.counts["modules"] += 1
        source = self._source(path)
        for attribute, value in names.items():
            if attribute[:2] != "__":
                self._value("%s.%s" % (name, attribute), name, attribute, value, path, source)
        if source is not None and (ours or name.startswith(self.prefixes)):
            self._constants(name, names, source)

    def _constants(self, module: str, names: Dict[str, int], source: Source) -> None:
        """Names that the source binds once, to a literal, hold it."""
        for name, wanted in source.facts()["constants"].items():
            if name in names and name[:2] != "__":
                self._constant({"binding": "%s.%s" % (module, name), "kind": "constant"}, names[name], wanted)

    def _constant(self, line: Dict[str, Any], address: int, wanted: Any) -> None:
        if not self.process.equal(address, wanted):
            self.found.append({"origin": None, "function": None, **line, "expected": repr(wanted)[:200]})

    def _loader(self, names: Dict[str, int]) -> Optional[str]:
        loader = names.get("__loader__")
        if loader is None or loader in self.process.singletons:
            return None
        return self.memory.text(self.memory.word(self.memory.word(loader + 8) + 24)).rpartition(".")[2]

    def _text(self, address: Optional[int]) -> Optional[str]:
        try:
            return self.process.string(address) if address else None
        except Unreadable:
            return None

    def _value(self, label: str, module: str, name: str, value: int, path: str, source: Optional[Source]) -> None:
        try:
            kind = self.process.kind(value)
            if kind == "class":
                self._class(label, module, value, path)
            elif kind == "builtin":
                self.natives[value] = label
            elif kind in CALLABLE:
                self._reach(label, value, path, source.own.get(name, []) if source is not None else [])
        except Unreadable as error:
            self._skip("unreadable: %s" % error)

    def _class(self, label: str, module: str, address: int, path: str) -> None:
        """Every function in a class body; a class is followed from the module it calls its own."""
        if address in self.seen:
            return
        names = self.process.named(self.memory.word(address + self.process.layout.dictionary))
        home = self._text(names.get("__module__"))
        if home != module and self._really_of(home, address):
            return
        self.seen.add(address)
        for attribute, value in names.items():
            kind = self.process.kind(value)
            if kind in CALLABLE:
                self._reach("%s.%s" % (label, attribute), value, path, [])
            elif kind == "class" and attribute != "__class__":
                self._class("%s.%s" % (label, attribute), module, value, path)

    def _really_of(self, home: Optional[str], address: int) -> bool:
        """Whether the module that a class names as its own holds it: a class can name any."""
        if home is None or home not in self.held:
            return False
        if home not in self.classes:
            try:
                names = self.process.named(self.memory.word(self.held[home] + 16))
                self.classes[home] = set(names.values())
            except Unreadable:
                self.classes[home] = set()
        return address in self.classes[home]

    def _reach(self, label: str, value: int, path: str, expected: List[types.CodeType]) -> None:
        """Every function that a name leads to, through wrappers and closures."""
        queue, first = [value], True
        seen: Set[int] = set()
        while queue and len(seen) < REACH_LIMIT:
            address = queue.pop(0)
            if address in seen:
                continue
            seen.add(address)
            kind = self.process.kind(address)
            if kind in ("staticmethod", "classmethod", "method"):
                queue.append(self.memory.word(address + 16))
            elif kind == "property":
                queue.extend(
                    one for one in self.memory.words(address + 16, 3) if one and one not in self.process.singletons
                )
            elif kind == "function":
                self._function(label, address, path, first)
                first = False
                queue.extend(self._closed_over(address))

    def _closed_over(self, function: int) -> Iterator[int]:
        closure = self.memory.word(function + self.process.layout.closure)
        for cell in self.process.tuple(closure) if closure else ():
            held = self.memory.word(cell + 16)
            if held and self.process.types.get(self.memory.word(held + 8)) in CALLABLE:
                yield held

    def _function(self, label: str, function: int, path: str, first: bool) -> None:
        layout = self.process.layout
        code = self.memory.word(function + layout.code)
        self.counts["functions"] += 1
        known = self.judged.get((function, code))
        told = known or self._judge(function)
        self.judged[(function, code)] = told
        kind, origin, name = told
        home = self._text(self.process.named(self.memory.word(function + layout.globals)).get("__file__"))
        file = origin.rpartition(":")[0]
        line: Dict[str, Any] = {"binding": label, "origin": origin, "function": name, "at": function}
        ours = path.startswith(self.guard + os.sep)
        path = file if ours and file.startswith(self.guard + os.sep) else path
        if kind == "claims":
            if known is None:
                self.found.append({**line, "kind": "code", "claims": True})
        elif home is not None and file[:1] != "<" and os.path.realpath(home) != os.path.realpath(file):
            if known is None:
                self.found.append({**line, "kind": "code"})
        elif first and file != path and (ours or file[:1] != "<") and not in_library(file):
            self.found.append({**line, "kind": "replaced"})
        elif known is None and (ours or label.startswith(self.prefixes)):
            self._defaults(function, line)

    def _defaults(self, function: int, line: Dict[str, Any]) -> None:
        """Defaults that the source gives as literals are these."""
        file, _, number = line["origin"].rpartition(":")
        source = self.sources.get(file)
        known = source.facts()["functions"].get((line["function"], int(number))) if source is not None else None
        if known is None:
            return
        positional, keywords = known
        held = self.memory.word(function + self.process.layout.defaults)
        found = self.process.tuple(held) if held else ()
        held = self.memory.word(function + self.process.layout.keywords)
        named = self.process.named(held) if held else {}
        wrong = len(found) != len(positional)
        pairs = list(zip(found, positional)) + [(named.get(name, 0), one) for name, one in keywords.items()]
        for address, one in pairs:
            wrong = wrong or (isinstance(one, tuple) and not (address and self.process.equal(address, one[0])))
        if wrong:
            self.found.append({**line, "kind": "defaults"})

    def _judge(self, function: int) -> Tuple[str, str, str]:
        """("claims" | "held", place, name) of a function's code: is it what the file it names compiles to?"""
        layout, process = self.process.layout, self.process
        code = self.memory.word(function + layout.code)
        file = process.string(self.memory.word(code + layout.filename))
        name = process.string(self.memory.word(code + layout.name))
        line = int(struct.unpack("<i", self.memory.read(code + layout.line, 4))[0])
        place = "%s:%d" % (file, line)
        source = self._source(file)
        if source is None:
            return "held", place, name
        self.counts["code"] += 1
        alike = source.codes.get((name, line), ())
        held = any(process.differs(code, one) is None for one in alike)
        return "held" if held else "claims", place, name

    def _source(self, path: str) -> Optional[Source]:
        if path[:1] != "/":
            return None
        if path not in self.sources:
            try:
                self.sources[path] = Source(path, self.optimize)
            except (OSError, SyntaxError, ValueError, Unreadable) as error:
                self.sources[path] = None
                self._skip("%s: %s" % (type(error).__name__, path[:200]))
        return self.sources[path]

    def _confirmed(self) -> List[Dict[str, Any]]:
        """Differences that stay when they are looked at again."""
        for _ in range(AGREE - 1 if self.found else 0):
            time.sleep(AGREE_SECONDS)
            self.memory.fresh()
            self.process._strings.clear()
            self.found = [line for line in self.found if self._still(line)]
        return [{key: value for key, value in line.items() if key != "at"} for line in self.found]

    def _still(self, line: Dict[str, Any]) -> bool:
        if line["kind"] in ("constant", "defaults"):
            return True  # values of finished objects: the reading is either torn, and raised, or right
        try:
            if self.process.kind(line["at"]) != "function":
                return False
            told = self._judge(line["at"])
        except Unreadable:
            return False
        return told[1] == line["origin"] and (told[0] == "claims") == bool(line.get("claims"))

    # -- the guard itself -----------------------------------------------------------------------------------------

    def _guard(self) -> Dict[str, Any]:
        """Whether the guard's modules, hooks and links are where they were put."""
        said: Dict[str, Any] = {"modules": sum(name.startswith("_trainguard") for name in self.namespaces)}
        engine = self.namespaces.get("_trainguard.engine")
        optimizer = self.namespaces.get("torch.optim.optimizer")
        if optimizer is not None:
            said["hooks"] = [self._hooked(optimizer, one) for one in HOOKS]
        try:
            if engine is not None:
                said["engine"] = self._type_is(engine.get("_engine"), engine.get("Engine"))
                if said["engine"]:
                    said.update(self._engine(engine["_engine"]))
        except Unreadable as error:
            said["unread"] = str(error)
        return said

    def _hooked(self, optimizer: Dict[str, int], name: str) -> Optional[bool]:
        """Whether a function of the guard's engine is in this table of torch's."""
        try:
            for _, hook in self.process.dictionary(optimizer[name]):
                if self.process.kind(hook) == "function":
                    file = self._judge(hook)
                    if (
                        file is not None
                        and file[0] == "held"
                        and file[1].startswith(self.guard + os.sep + "engine.py:")
                    ):
                        return True
        except (Unreadable, KeyError):
            return None
        return False

    def _type_is(self, address: Optional[int], kind: Optional[int]) -> bool:
        return bool(address and kind) and self.memory.word(int(address or 0) + 8) == kind

    def _engine(self, address: int) -> Dict[str, Any]:
        held = self.process.attributes(address)
        links = self.process.list(held["links"])
        strange, shadowed = [], self._shadows(address, held)
        for link in links:
            name = self.memory.text(self.memory.word(self.memory.word(link + 8) + 24)).rpartition(".")[2]
            home = self._class_home(self.memory.word(link + 8))
            if home is None or not home.startswith("_trainguard."):
                strange.append(name)
                continue
            try:
                shadowed += self._shadows(link, self.process.attributes(link))
            except Unreadable:
                continue
        shadowed += self._parts(held)
        return {"links": len(links), "strange": strange[:20], "shadowed": shadowed[:20]}

    def _parts(self, held: Dict[str, int]) -> List[str]:
        """Methods hidden in what the engine leads to besides its links: the connection, the governor."""
        hidden = []
        for name, address in held.items():
            try:
                home = self._class_home(self.memory.word(address + 8))
                if home is not None and home.startswith("_trainguard."):
                    hidden += [
                        "%s.%s" % (name, one) for one in self._shadows(address, self.process.attributes(address))
                    ]
            except Unreadable:
                continue
        return hidden

    def _class_home(self, kind: int) -> Optional[str]:
        names = self.process.named(self.memory.word(kind + self.process.layout.dictionary))
        return self._text(names.get("__module__"))

    def _shadows(self, address: int, held: Dict[str, int]) -> List[str]:
        """Attributes of an object that hide a method of its class."""
        kind = self.memory.word(address + 8)
        names = self.process.named(self.memory.word(kind + self.process.layout.dictionary))
        return [name for name in held if name in names and self.process.kind(names[name]) == "function"]

    def _native_pointers(self) -> List[Dict[str, Any]]:
        """Native functions whose pointer leads to no file: [{"binding", "address"}, …]."""
        ranges = sorted(_executable(self.pid))
        strange = []
        for function, label in self.natives.items():
            try:
                target = self.memory.word(self.memory.word(function + 16) + 8)
            except Unreadable:
                continue
            self.counts["natives"] += 1
            if not any(low <= target < high for low, high in ranges):
                strange.append({"binding": label, "address": "%#x" % target})
        return strange[:20]


LAST_OF_CHOSEN = 1
CALLABLE = ("function", "staticmethod", "classmethod", "property", "method")
HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def in_library(path: str) -> bool:
    """Whether a file is the standard library's or an installed package's, by the folders it lies in."""
    return path.startswith(STDLIB) or "/site-packages/" in path or "/dist-packages/" in path


STDLIB = os.path.dirname(os.path.abspath(os.__file__)) + os.sep


def _executable(pid: int) -> Iterator[Tuple[int, int]]:
    """Ranges that are mapped executable from a file."""
    with open("/proc/%d/maps" % pid) as file:
        for line in file:
            fields = line.split(None, 5)
            if "x" in fields[1] and fields[4] != "0":
                low, high = fields[0].split("-")
                yield int(low, 16), int(high, 16)


def read(pid: int, options: Dict[str, Any]) -> Dict[str, Any]:
    """Everything about process `pid`. Raises Unreadable or OSError."""
    layout = Layout()
    image, own_base = layout.image
    base = _base_in(pid, image)
    memory = Memory(int(options["memory"]))
    process = Process(layout, memory, base - own_base, {})
    interpreter = memory.word(base + layout.runtime + layout.interpreter)
    modules = memory.word(interpreter + layout.modules)
    result = Sweep(process, options).run(modules)
    memory.fresh()
    if memory.word(interpreter + layout.modules) != modules or not process.dictionary(modules):
        raise Unreadable("the process left while it was read")
    return result


def main() -> int:
    """Read options from stdin, write what was found to stdout."""
    options = json.loads(sys.stdin.read())
    began = time.process_time()
    try:
        result = read(int(options["pid"]), options)
    except (Unreadable, OSError, ValueError, RecursionError, struct.error) as error:
        result = {"error": "%s: %s" % (type(error).__name__, error)}
    result["cpu_seconds"] = round(time.process_time() - began, 3)
    sys.stdout.write(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
