"""The pickle machine: what an unpickler would do with a stream, worked out without doing any of it.

Every opcode of protocols 0 to 5, with the real stack, marks, memo and frames (PEP 307, 3154, 574; CPython
`Lib/pickle.py` and `Modules/_pickle.c`). Nothing is imported, called, hashed or compared on behalf of the stream; names
stay names and results of calls are stand-ins. Decisions fall at the opcode, not on the final object, so a discarded
result is judged like a kept one:

  GLOBAL, STACK_GLOBAL, INST   the name is looked up in the lists, after Python 2 names are mapped as `find_class` does
  REDUCE, NEWOBJ(_EX), OBJ     the listed name's rule judges the arguments
  BUILD                        only on objects a listed name made, by the name's state rule
  APPEND(S), SETITEM(S), …     only into real containers and listed container classes
  PERSID, BINPERSID            only where the loader knows them, only in torch's exact shape
  EXT1, EXT2, EXT4             refused: they name code by number

Unlisted names make the stream unknown and simulation goes on, so that a report names all of them; everything that is
malformed, hidden or against a rule makes it unsafe and ends it. A computed name is unsafe.

What must hold: a stream that this machine calls safe makes CPython's C and Python unpicklers resolve exactly the
globals and persistent ids recorded here, in this order, and stop at the same byte (bench/fuzz_scan.py).
"""

from __future__ import annotations

import _compat_pickle
import codecs
import contextlib
import math
import pickletools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainguard.scan.budget import Meter, OverBudget
from trainguard.scan.claims import Claim
from trainguard.scan.quick import ELSEWHERE, HOLE, Handler, slow, unknown
from trainguard.scan.quick import handlers as quick_handlers
from trainguard.scan.rules.arrays import ArrayState, DType, count_of
from trainguard.scan.rules.interface import Malformed, Refused, describe
from trainguard.scan.rules.plain import instantiate
from trainguard.scan.rules.tensors import persistent_storage
from trainguard.scan.source import BytesSource, PartSource, Source
from trainguard.scan.trust import Trust
from trainguard.scan.values import (
    Bag,
    FrozenBag,
    Global,
    Map,
    Object,
    Span,
    Storage,
    Value,
    is_constant,
)

WHOLE_BYTES = 16 << 20
"""Streams up to this size are held in one piece."""
WINDOW_BYTES = 4 << 20
"""Longer ones are read through a window of this size."""
MARGIN_BYTES = 1 << 10
"""Bytes that are always there at an opcode, so that short arguments need no check (255 and a length at most)."""
SLICE_BYTES = 1 << 16
"""The budget is settled at least this often."""
LINE_BYTES = 1 << 16
"""Longest text argument of a protocol 0 opcode that is kept; longer ones are refused."""
MEMO_GAP = 1 << 16
"""A memo index may lie this far beyond the memo; the C unpickler allocates up to the index."""
KEY_DEPTH = 8
"""Tuples in tuples as a dict key; hashing recurses in C without a limit."""
HIGHEST_PROTOCOL = 5

_U4 = struct.Struct("<I").unpack_from
_U8 = struct.Struct("<Q").unpack_from
_I4 = struct.Struct("<i").unpack_from
_U2 = struct.Struct("<H").unpack_from
_F8 = struct.Struct(">d").unpack_from

INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(rb"[-+]?([0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|inf|nan)")
"""What `repr` writes, which both unpicklers read alike; they differ on other spellings (octal, underscores, blanks)."""

SIMPLE_KEYS = frozenset((str, int, bytes, bool, float, type(None)))
CALL_ONLY = frozenset(("getattr", "reconstructor", "new_object", "partial", "torch_load_from_bytes", "encode"))
"""Kinds whose rule guards what they are given. They may be called but not kept in a container or an object, from where
a library could call them with arguments no rule has seen."""

INSTANTIATOR = "_instantiator"
INSTANTIATORS = frozenset(f"{package}.cli.instantiate_module" for package in ("lightning.pytorch", "pytorch_lightning"))
"""What its command line writes there."""

ALIGNMENT_BYTES = 32
"""joblib aligns to 16. No opcode is below 0x28, so a length up to this ends a plain unpickler."""
ARRAY_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"


@dataclass(slots=True)
class Trace:
    """What a run of the machine saw, for the report and for the second opinion."""

    globals: list[tuple[str, str]] = field(default_factory=list)
    """(module, name) of every find_class call, mapped, in order."""
    raw_globals: list[tuple[str, str]] = field(default_factory=list)
    """The same as written in the stream; find_class is given these and maps them itself."""
    implied: set[str] = field(default_factory=set)
    """Classes of what is built that the stream does not name; torch's weights_only asks for them."""
    persistent: int = 0
    """Calls of persistent_load."""
    end: int = 0
    """Offset after STOP, or where the machine gave up."""
    finished: bool = False
    """Whether STOP was reached."""
    called: bool = False
    """Whether anything was called, instantiated or given state."""
    value: Value = None
    """The stand-in of the object the stream builds."""
    inline_arrays: int = 0
    """joblib arrays that lay between the opcodes."""
    claims: list[Claim] = field(default_factory=list)
    """Numbers in storages that native code will believe; who knows where the storages lie must check them."""
    storages: dict[str, int] = field(default_factory=dict)
    """Storage key → bytes, as the persistent ids say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Who would read this stream, as far as that changes what the opcodes mean."""

    name: str
    """pickle, torch or joblib."""
    storage_parts: int = 0
    """Parts of a persistent id: 5 for a torch zip, 6 for torch legacy, 0 for none."""
    inline_arrays: bool = False
    """joblib: array bytes follow the BUILD of a NumpyArrayWrapper."""


PICKLE = Loader(name="pickle")
TORCH_ZIP = Loader(name="torch", storage_parts=5)
TORCH_LEGACY = Loader(name="torch", storage_parts=6)
JOBLIB = Loader(name="joblib", inline_arrays=True)

UnlistedNote = Callable[[Global, str, int], None]
"""(global, use, offset): an unlisted name was used."""


class Machine:
    """One pickle stream in `source` from `start`. `run` once; then read `trace` and `position`."""

    def __init__(
        self,
        source: Source,
        start: int,
        *,
        loader: Loader,
        trust: Trust,
        meter: Meter,
        on_unlisted: UnlistedNote,
        on_nested: Callable[[Source, int], None],
    ) -> None:
        """on_nested is given a torch file that lies inside an argument (bytes, offset) and judges it."""
        self.source = source
        self.trace = Trace(end=start)
        self._loader = loader
        self._trust = trust
        self._meter = meter
        self._on_unlisted = on_unlisted
        self._on_nested = on_nested
        self.keep = meter.policy.constant_bytes
        self._base = start
        """Absolute offset of the window's first byte."""
        self._data = b""
        self.pos = 0
        self._limit = 0
        """Window position at which the loop must call `_boundary`."""
        self._frame_end = 0
        """Absolute end of the current frame; 0 outside frames."""
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.fence = 0
        self.memo: list[Value] = []
        self.holes = 0
        self._protocol = 0
        self._known: dict[tuple[str, str], Global] = {}
        self._sealed: list[Value] = []
        self.guarded = False
        """Whether a call-only name was resolved, so that containers must be looked through for it."""
        self._built: set[int] = set()
        """ids of objects that were given state: a second time, an attribute could stand in for __setstate__."""
        self._kept: list[Value] = []
        """Those objects, so that no id is used again."""
        self._steps = 0
        self.made = 0
        self._settled_steps = 0
        self._settled_made = 0

    # What rules may ask ------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Absolute offset behind the last byte taken."""
        return self._base + self.pos

    @property
    def steps(self) -> int:
        """Opcodes taken so far."""
        return self._steps

    def implies(self, name: str) -> None:
        """Note a class that what is loaded will have, though the stream does not name it."""
        self.trace.implied.add(name)

    def spend(self, *, values: int) -> None:
        """Charge `values` containers to the budget."""
        self.made += values

    def unlisted(self, name: Global, use: str) -> None:
        """Note that an unlisted name is used as `value`, `instance` or `call`; stronger uses replace weaker ones."""
        order = ("", "value", "instance", "call")
        if order.index(use) > order.index(name.use):
            name.use = use
            self._on_unlisted(name, use, self.position)

    def storage(self, key: str, item_bytes: int, numel: int) -> Storage:
        """A storage stand-in; the same key must always mean the same number of bytes."""
        size = item_bytes * numel
        if self.trace.storages.setdefault(key, size) != size:
            raise Refused("geometry", f"storage {key!a}: {size} bytes here, {self.trace.storages[key]} bytes before")
        self.made += 1
        return Storage(key, item_bytes, numel)

    def claim(self, claim: Claim) -> None:
        """Note numbers in storages that must be looked at before the stream is clean."""
        self.made += 1
        self.trace.claims.append(claim)

    def seal(self, value: Value) -> None:
        """Refuse later changes to a list or Map a rule relied on."""
        self._sealed.append(value)

    def nested(self, value: Value) -> None:
        """Judge bytes that a listed call will load as a torch file."""
        if type(value) is Span:
            self._on_nested(PartSource(self.source, value.offset, value.length), value.offset)
        else:
            self._on_nested(BytesSource(value), self.position)

    def check_keys(self, keys: Value) -> None:
        """Raise unless every key is one whose hash neither recurses deeply nor runs code of the stream."""
        if not {type(key) for key in keys} <= SIMPLE_KEYS:
            for key in keys:
                self._check_key(key, KEY_DEPTH)

    def _check_key(self, key: Value, depth: int) -> None:
        if type(key) in (tuple, FrozenBag):
            if not depth:
                raise Refused("key", f"dict key: tuples nested more than {KEY_DEPTH} deep")
            for item in key:
                self._check_key(item, depth - 1)
        elif isinstance(key, Object) and key.origin.name == "builtins.str":
            raise Refused("key", "dict key: a text that a call makes, which nothing writes")
        elif not (is_constant(key) or isinstance(key, Global | Object | Storage)):
            raise Malformed(f"dict key: expected something hashable, found {describe(key)}")

    # The loop ----------------------------------------------------------------------------------------------------

    def run(self) -> Trace:
        """Work through the stream to its STOP.

        Raises Refused (and Malformed) with what is wrong, OverBudget past a limit; `trace` and `position` then say
        how far it came.
        """
        try:
            self._load(self._base)
            self._loop()
            self._settle()
        except IndexError as error:
            raise Malformed(f"ends in the middle of an opcode, at byte {self.position}") from error
        except struct.error as error:
            raise Malformed(f"ends in the middle of an opcode, at byte {self.position}") from error
        except UnicodeDecodeError as error:
            raise Malformed(f"text that is not UTF-8, at byte {self.position}") from error
        except RecursionError as error:
            raise OverBudget("values nested too deeply") from error
        finally:
            self.trace.end = self.position
        return self.trace

    def _loop(self) -> None:
        """Dispatch opcodes until STOP: one handler each, which says where the next one lies."""
        handlers = self._handlers()
        data, pos, limit, steps = self._data, self.pos, self._limit, 0
        try:
            while True:
                if pos >= limit:
                    self._steps, steps = self._steps + steps, 0
                    if pos < ELSEWHERE:
                        self.pos = pos
                    elif self.trace.finished:
                        return
                    if self.pos >= self._limit:
                        self._boundary()
                    data, pos, limit = self._data, self.pos, self._limit
                steps += 1
                pos = handlers[data[pos]](data, pos + 1)
        finally:
            self._steps += steps

    def _handlers(self) -> list[Handler]:
        """A handler for each of the 256 bytes: those of quick.py, this machine's methods, and refusals."""
        quick = quick_handlers(self)
        return [
            quick.get(opcode) or (slow(self, method) if method is not None else unknown(self, opcode))
            for opcode, method in enumerate(OPCODES)
        ]

    def _boundary(self) -> None:
        """Called at least every SLICE_BYTES: settle the budget, close a frame, move the window, notice the end."""
        self._settle()
        absolute = self.position
        if self._frame_end:
            if absolute > self._frame_end:
                raise Malformed(f"an opcode straddles the end of a frame at byte {self._frame_end}")
            if absolute == self._frame_end:
                self._frame_end = 0
        if absolute >= self.source.size:
            raise Malformed("ends without STOP")
        if self.pos + MARGIN_BYTES > len(self._data) and self._base + len(self._data) < self.source.size:
            self._load(absolute)
        self._set_limit()

    def _settle(self) -> None:
        self._meter.spend_operations(self._steps - self._settled_steps, self.made - self._settled_made)
        self._settled_steps, self._settled_made = self._steps, self.made

    def _load(self, absolute: int) -> None:
        """Make `absolute` the window's first byte."""
        rest = self.source.size - absolute
        window = getattr(self.source, "window_bytes", rest if rest <= WHOLE_BYTES else WINDOW_BYTES)
        self._data = self.source.read(absolute, window)
        self._base, self.pos = absolute, 0
        self._set_limit()

    def _set_limit(self) -> None:
        last = self._base + len(self._data) >= self.source.size
        limit = len(self._data) if last else len(self._data) - MARGIN_BYTES
        if self._frame_end:
            limit = min(limit, self._frame_end - self._base)
        self._limit = max(self.pos, min(limit, self.pos + SLICE_BYTES))

    # Taking arguments --------------------------------------------------------------------------------------------

    def _take(self, length: int) -> bytes:
        """The next `length` bytes, at most `constant_bytes` or a few; moves the window when they cross its end."""
        if self.pos + length > len(self._data):
            absolute = self.position
            if absolute + length > self.source.size:
                raise Malformed(f"an argument of {length} bytes runs past the end")
            self._load(absolute)
        data = self._data[self.pos : self.pos + length]
        if len(data) != length:
            raise Malformed(f"an argument of {length} bytes runs past the end")
        self.pos += length
        return data

    def _skip(self, length: int) -> Span:
        """Step over `length` bytes without reading them; their place as a span of bytes."""
        absolute = self.position
        if length > self.source.size - absolute:
            raise Malformed(f"an argument of {length} bytes runs past the end")
        if self.pos + length <= len(self._data):
            self.pos += length
        else:
            self._load(absolute + length)
        self._straddles()
        return Span(absolute, length, is_text=False)

    def _straddles(self) -> None:
        if self._frame_end and self.position > self._frame_end:
            raise Malformed(f"an opcode straddles the end of a frame at byte {self._frame_end}")

    def long_text(self, length: int) -> Value:
        """The text argument of a string opcode: by value when short, else its place, checked to be UTF-8."""
        if length <= self.keep:
            self.made += 1 + (length >> 6)
            return self._take(length).decode("utf-8", "surrogatepass")
        span = Span(self.position, length, is_text=True)
        if length > self._meter.policy.pickle_bytes:
            raise OverBudget(f"one string of {length} bytes, limit {self._meter.policy.pickle_bytes}")
        self._check_utf8(length)
        self.made += 1
        return span

    def _check_utf8(self, length: int) -> None:
        absolute, step = self.position, 1 << 20
        if absolute + length > self.source.size:
            raise Malformed(f"an argument of {length} bytes runs past the end")
        carry = b""
        for offset in range(0, length, step):
            chunk = carry + self.source.read(absolute + offset, min(step, length - offset))
            cut = len(chunk) if offset + step >= length else _whole_characters(chunk)
            chunk[:cut].decode("utf-8", "surrogatepass")
            carry = chunk[cut:]
        self._skip(length)

    def _bytes(self, length: int) -> Value:
        """The bytes argument of a bytes opcode: by value when short, else its place."""
        if length <= self.keep:
            self.made += 1 + (length >> 6)
            return self._take(length)
        self.made += 1
        return self._skip(length)

    def _line(self) -> bytes:
        """A text argument: up to and without the newline."""
        end = self._data.find(b"\n", self.pos)
        if end < 0:
            self._load(self.position)
            end = self._data.find(b"\n", 0, LINE_BYTES + 1)
        if end < 0 or end - self.pos > LINE_BYTES:
            raise Malformed("a text argument without its newline")
        line = self._data[self.pos : end]
        self.pos = end + 1
        self.made += 1 + (len(line) >> 6)
        return line

    # Stack and memo ----------------------------------------------------------------------------------------------

    def _pop(self) -> Value:
        if len(self.stack) <= self.fence:
            raise Malformed("takes from an empty stack")
        return self.stack.pop()

    def _top(self) -> Value:
        if len(self.stack) <= self.fence:
            raise Malformed("takes from an empty stack")
        return self.stack[-1]

    def _pop_mark(self) -> list[Value]:
        if not self.marks:
            raise Malformed("closes a group without a mark")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        self.fence = self.marks[-1] if self.marks else 0
        return items

    def refuse_guarded(self, items: Sequence[Value]) -> None:
        """Raise when a call-only name is about to be kept in a container."""
        for item in items:
            if type(item) is Global and item.listed is not None and item.listed.kind in CALL_ONLY:
                raise Refused("call", f"{item.name} kept as a value: it may only be called, under its rule")

    def put(self, index: int, value: Value) -> None:
        memo = self.memo
        if index > len(memo) + MEMO_GAP:
            raise Refused("stream", f"writes memo entry {index} after {len(memo)} entries: loaders would allocate them")
        if index >= len(memo):
            self.holes += index - len(memo)
            self.made += (index - len(memo)) >> 3
            memo.extend([HOLE] * (index - len(memo)))
            memo.append(value)
            return
        if memo[index] is HOLE:
            self.holes -= 1
        memo[index] = value

    # Names and calls ---------------------------------------------------------------------------------------------

    def _find(self, module: str, name: str) -> Global:
        """What find_class(module, name) is a stand-in for; listed or not."""
        self.trace.raw_globals.append((module, name))
        if self._protocol < 3:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[(module, name)]
            elif module in _compat_pickle.IMPORT_MAPPING:
                module = _compat_pickle.IMPORT_MAPPING[module]
        self.trace.globals.append((module, name))
        known = self._known.get((module, name))
        if known is None:
            # A dotted name reaches through objects, so it is written apart: `module:Outer.inner` is never the listed
            # `module.Outer.inner`.
            full = f"{module}{':' if '.' in name else '.'}{name}"
            known = Global(full, self._trust.find(full))
            self._known[(module, name)] = known
            self.made += 1
            self.guarded = self.guarded or (known.listed is not None and known.listed.kind in CALL_ONLY)
        if known.listed is None:
            self.unlisted(known, "value")
        return known

    def call(self, function: Value, args: Value) -> Value:
        """What `function(*args)` returns, by its rule. Rules use it for calls inside calls."""
        self.trace.called = True
        if not isinstance(function, Global):
            raise Refused("call", f"calls {describe(function)}: only names may be called, never results")
        if type(args) is not tuple:
            raise Refused("call", f"{function.name}: expected a tuple of arguments, found {describe(args)}")
        self.made += 1
        if function.listed is None:
            self.unlisted(function, "call")
            return Object(function)
        rule = function.listed.rules.call
        if rule is None:
            raise Refused("call", f"{function.name} may be named but not called, found {describe(args)}")
        return rule(self, function, args)

    def _new(self, target: Value, args: Value, keywords: Value = None) -> Value:
        self.trace.called = True
        if not isinstance(target, Global):
            raise Refused("instance", f"instantiates {describe(target)}: only names may be")
        if type(args) is not tuple or keywords:
            raise Refused("instance", f"{target.name}: expected a tuple and no keywords, found {describe(args)}")
        self.made += 1
        return instantiate(self, target, args)

    # Opcodes outside the loop ------------------------------------------------------------------------------------

    def _proto(self) -> None:
        self._protocol = self._take(1)[0]
        if self._protocol > HIGHEST_PROTOCOL:
            raise Malformed(f"protocol {self._protocol}: expected at most {HIGHEST_PROTOCOL}")

    def _frame(self) -> None:
        length = int.from_bytes(self._take(8), "little")
        absolute = self.position
        if self._frame_end:
            raise Malformed(f"a frame begins inside the frame that ends at byte {self._frame_end}")
        if length > self.source.size - absolute:
            raise Malformed(f"a frame of {length} bytes runs past the end")
        self._frame_end = absolute + length if length else 0
        self._set_limit()

    def _stop(self) -> None:
        self.trace.value = self._pop()
        self._straddles()
        if self._frame_end and self.position != self._frame_end:
            raise Malformed(f"STOP inside a frame that ends at byte {self._frame_end}")
        self.trace.finished = True

    def _pop_one(self) -> None:
        if len(self.stack) > self.fence:
            self.stack.pop()
        else:
            self._pop_mark()

    def _pop_group(self) -> None:
        self._pop_mark()

    def _dup(self) -> None:
        self.stack.append(self._top())

    def _int(self) -> None:
        line = self._line()
        if line in (b"00", b"01"):
            self.stack.append(line == b"01")
        else:
            self.stack.append(self._parse_int(line))

    def _long(self) -> None:
        line = self._line()
        self.stack.append(self._parse_int(line.removesuffix(b"L")))

    def _parse_int(self, line: bytes) -> int:
        if not INTEGER.fullmatch(line):
            raise Malformed(f"expected an integer, found {line[:40]!r}")
        if len(line) > self._meter.policy.integer_digits:
            raise OverBudget(f"an integer of {len(line)} digits, limit {self._meter.policy.integer_digits}")
        return int(line)

    def _long_binary(self, length: int) -> None:
        if length > self.source.size - self.position:
            raise Malformed(f"an argument of {length} bytes runs past the end")
        if length > self.keep:
            raise OverBudget(f"an integer of {length} bytes, limit {self.keep}")
        self.made += 1 + (length >> 6)
        self.stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _long1(self) -> None:
        self._long_binary(self._take(1)[0])

    def _long4(self) -> None:
        length = int.from_bytes(self._take(4), "little", signed=True)
        if length < 0:
            raise Malformed("an integer of negative length")
        self._long_binary(length)

    def _float_text(self) -> None:
        line = self._line()
        if not NUMBER.fullmatch(line):
            raise Malformed(f"expected a number, found {line[:40]!r}")
        value = float(line)
        if math.isinf(value) and b"inf" not in line:
            raise Malformed(f"a number too large for a float: {line[:40]!r}")
        self.stack.append(value)

    def _float_binary(self) -> None:
        self.stack.append(_F8(self._take(8))[0])

    def _string_text(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
            raise Malformed("a string without its quotes")
        self.stack.append(_unescape(line[1:-1]).decode("latin-1"))

    def _string_binary(self, length: int) -> None:
        value = self._bytes(length)
        # Python 2 strings become text by the loader's encoding: ASCII, UTF-8 (torch) or what the caller says. A name
        # must be ASCII to be listed, so no choice of encoding makes a listed name of an unlisted one.
        if type(value) is bytes:
            self.stack.append(value.decode("latin-1"))
        else:
            self.stack.append(Span(value.offset, value.length, is_text=True))

    def _binstring(self) -> None:
        length = int.from_bytes(self._take(4), "little", signed=True)
        if length < 0:
            raise Malformed("a string of negative length")
        self._string_binary(length)

    def _short_binstring(self) -> None:
        self._string_binary(self._take(1)[0])

    def _unicode_text(self) -> None:
        try:
            self.stack.append(str(self._line(), "raw-unicode-escape"))
        except UnicodeDecodeError as error:
            raise Malformed("text with a broken escape") from error

    def _binunicode8(self) -> None:
        self.stack.append(self.long_text(int.from_bytes(self._take(8), "little")))

    def _binbytes(self) -> None:
        self.stack.append(self._bytes(int.from_bytes(self._take(4), "little")))

    def _short_binbytes(self) -> None:
        self.stack.append(self._bytes(self._take(1)[0]))

    def _binbytes8(self) -> None:
        self.stack.append(self._bytes(int.from_bytes(self._take(8), "little")))

    def _bytearray8(self) -> None:
        # A bytearray is unhashable and can be changed by nothing but BUILD, which is refused: bytes will do.
        self.stack.append(self._bytes(int.from_bytes(self._take(8), "little")))

    def _empty_list(self) -> None:
        self.made += 1
        self.stack.append([])

    def _empty_dict(self) -> None:
        self.made += 1
        self.stack.append(Map())

    def _empty_set(self) -> None:
        self.made += 1
        self.stack.append(Bag())

    def _list(self) -> None:
        items = self._pop_mark()
        if self.guarded:
            self.refuse_guarded(items)
        self.made += 1 + (len(items) >> 3)
        self.stack.append(items)

    def _dict(self) -> None:
        items = self._pop_mark()
        self.made += 1 + (len(items) >> 3)
        self.stack.append(Map(self._checked_pairs(items)))

    def _frozenset(self) -> None:
        items = self._pop_mark()
        if self.guarded:
            self.refuse_guarded(items)
        self.made += 1 + (len(items) >> 3)
        self.check_keys(items)
        self.stack.append(FrozenBag(items))

    def _append(self) -> None:
        item = self._pop()
        self._extend(self._top(), [item])

    def _appends(self) -> None:
        items = self._pop_mark()
        self._extend(self._top(), items)

    def _extend(self, target: Value, items: list[Value]) -> None:
        if self.guarded:
            self.refuse_guarded(items)
        self.made += len(items) >> 3
        if type(target) is list:
            self._refuse_sealed(target)
            target.extend(items)
        else:
            self._fill(target, "list", "appends to")

    def _setitem(self) -> None:
        value = self._pop()
        key = self._pop()
        self._set(self._top(), [key, value])

    def _setitems(self) -> None:
        items = self._pop_mark()
        self._set(self._top(), items)

    def _set(self, target: Value, items: list[Value]) -> None:
        self.made += len(items) >> 3
        pairs = self._checked_pairs(items)
        if type(target) is Map:
            self._refuse_sealed(target)
            target.extend(pairs)
        else:
            # A class whose items are attributes would find such an item where an unpickler looks for a method.
            if any(type(key) is str and key.startswith("__") for key in pairs[::2]):
                raise Refused("items", f"sets an item named like a method of {describe(target)}")
            self._fill(target, "dict", "sets items of")

    def _checked_pairs(self, items: list[Value]) -> list[Value]:
        if len(items) % 2:
            raise Malformed("a dict with a key and no value")
        if self.guarded:
            self.refuse_guarded(items)
        keys = items[::2]
        self.check_keys(keys)
        if INSTANTIATOR in keys:
            for key, value in zip(keys, items[1::2], strict=True):
                if key == INSTANTIATOR:
                    self._check_instantiator(value)
        return items

    def _check_instantiator(self, value: Value) -> None:
        """Lightning imports what this key of its hyper-parameters names, and calls it (core/saving.py)."""
        if value is not None and value not in INSTANTIATORS:
            self.unlisted(Global(value[:1000] if type(value) is str else describe(value), None), "call")

    def _additems(self) -> None:
        items = self._pop_mark()
        target = self._top()
        if self.guarded:
            self.refuse_guarded(items)
        self.check_keys(items)
        self.made += len(items) >> 3
        if type(target) is Bag:
            target.extend(items)
        else:
            self._fill(target, "set", "adds to")

    def _fill(self, target: Value, kind: str, verb: str) -> None:
        """Put items into an object of a listed container class."""
        self.trace.called = True
        if not isinstance(target, Object):
            raise Refused("items", f"{verb} {describe(target)}")
        listed = target.origin.listed
        if id(target) in self._built:
            # An attribute called append or extend would be found before the method. Nothing writes items behind state.
            raise Refused("items", f"{verb} a {target.origin.name} after it was given state")
        if target.sealed:
            raise Refused("hooks", f"{verb} {target.origin.name} after it was used as empty")
        if listed is None:
            self.unlisted(target.origin, "call")
        elif listed.rules.items != kind and listed.kind != "anything":
            raise Refused("items", f"{verb} a {target.origin.name}, which is not a {kind}")
        target.filled = True

    def _refuse_sealed(self, target: Value) -> None:
        if any(target is sealed for sealed in self._sealed):
            raise Refused("hooks", "fills a container after it was used as empty")

    def _get_text(self) -> None:
        index = self._parse_int(self._line())
        if not 0 <= index < len(self.memo) or self.memo[index] is HOLE:
            raise Malformed(f"reads memo entry {index}, which was never written")
        self.stack.append(self.memo[index])

    def _put_text(self) -> None:
        index = self._parse_int(self._line())
        if index < 0:
            raise Malformed("writes a memo entry below zero")
        self.put(index, self._top())

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self.stack.append(self._find(_name(module), _name(name)))

    def _stack_global(self) -> None:
        name = self._pop()
        module = self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("global", f"a computed name: {describe(module)}, {describe(name)}")
        self.stack.append(self._find(module, name))

    def _inst(self) -> None:
        module, name = _name(self._line()), _name(self._line())
        args = tuple(self._pop_mark())
        self.stack.append(self._instance(self._find(module, name), args))

    def _obj(self) -> None:
        items = self._pop_mark()
        if not items:
            raise Malformed("instantiates nothing")
        self.stack.append(self._instance(items[0], tuple(items[1:])))

    def _instance(self, target: Value, args: tuple[Value, ...]) -> Value:
        """INST and OBJ call the class, except when it is a class and there are no arguments: then they call __new__."""
        listed = target.listed if isinstance(target, Global) else None
        if not args and listed is not None and listed.rules.new is not None:
            return self._new(target, args)
        return self.call(target, args)

    def reduce(self) -> None:
        args = self._pop()
        function = self._top()
        self.stack[-1] = self.call(function, args)

    def _newobj(self) -> None:
        args = self._pop()
        target = self._top()
        self.stack[-1] = self._new(target, args)

    def _newobj_ex(self) -> None:
        keywords = self._pop()
        args = self._pop()
        target = self._top()
        self.stack[-1] = self._new(target, args, keywords)

    def _build(self) -> None:
        state = self._pop()
        target = self._top()
        self.trace.called = True
        if not isinstance(target, Object):
            raise Refused("build", f"writes state into {describe(target)}")
        if id(target) in self._built:
            raise Refused("build", f"writes state into a {target.origin.name} a second time")
        self._built.add(id(target))
        self._kept.append(target)
        listed = target.origin.listed
        if listed is None:
            self.unlisted(target.origin, "instance")
            return
        if listed.name == ARRAY_WRAPPER:
            self.stack[-1] = self._inline_array(target, state)
            return
        if listed.rules.state is None:
            raise Refused("build", f"{target.origin.name}: takes no state, found {describe(state)}")
        self.stack[-1] = listed.rules.state(self, target, state)

    def _persid(self) -> None:
        self._persistent(_name(self._line()))

    def binpersid(self) -> None:
        self._persistent(self._pop())

    def _persistent(self, pid: Value) -> None:
        if not self._loader.storage_parts:
            raise Refused("persistent-id", f"a persistent id ({describe(pid)}): {self._loader.name} knows none")
        self.trace.persistent += 1
        self.stack.append(persistent_storage(self, pid, self._loader.storage_parts))

    def _extension(self) -> None:
        raise Refused("extension", "an extension code: it names code by a number that only the loader's process knows")

    def _out_of_band(self) -> None:
        raise Malformed("an out-of-band buffer: files have none")

    # joblib ------------------------------------------------------------------------------------------------------

    def _inline_array(self, target: Object, state: Value) -> Value:
        """The array bytes that follow the BUILD of a joblib wrapper (joblib/numpy_pickle.py, NumpyArrayWrapper).

        [padding length, padding] array bytes · for object dtypes a second pickle instead, which is run in place.
        """
        if not self._loader.inline_arrays:
            raise Refused("build", "a joblib array wrapper outside a joblib file: its bytes would run as opcodes")
        if self._frame_end and self.position != self._frame_end:
            raise Malformed(f"array bytes inside the frame that ends at byte {self._frame_end}")
        self._frame_end = 0
        facts = state.text_keys() if type(state) is Map else None
        if facts is None or not set(facts) <= WRAPPER_FIELDS:
            raise Refused("build", f"{ARRAY_WRAPPER}: expected its own fields, found {describe(state)}")
        kind, count, cls = facts.get("dtype"), count_of(facts.get("shape")), facts.get("subclass")
        listed_class = isinstance(cls, Global) and cls.listed is not None and cls.listed.kind == "numpy_array_type"
        if not isinstance(kind, Object) or not isinstance(kind.facts, DType) or count is None or not listed_class:
            raise Refused("build", f"{ARRAY_WRAPPER}: expected a dtype, a shape and an array class")
        self.trace.inline_arrays += 1
        if kind.facts.has_objects:
            self._object_array(kind.facts)
        else:
            self._array_bytes(facts.get("numpy_array_alignment_bytes"), count * kind.facts.item_bytes)
        return Object(target.origin, ArrayState(kind.facts.item_bytes, kind.facts.has_objects))

    def _array_bytes(self, alignment: Value, length: int) -> None:
        if alignment is None:
            self._refuse_opcodes()
        else:
            self._padding(alignment)
        self._skip(length)

    def _padding(self, alignment: Value) -> None:
        """One byte with the length of the padding, then 0xff. None of them is an opcode to a plain unpickler."""
        if type(alignment) is not int or not 1 <= alignment <= ALIGNMENT_BYTES:
            raise Refused("build", f"{ARRAY_WRAPPER}: expected an alignment, found {describe(alignment)}")
        length = self._take(1)[0]
        if length > alignment or self._take(length).strip(b"\xff"):
            raise Refused("build", f"{ARRAY_WRAPPER}: expected at most {alignment} bytes of padding, found others")

    def _refuse_opcodes(self) -> None:
        """Older joblib writes no padding: raise Refused when a plain unpickler would act on the array's bytes.

        It goes on with stack and memo as they are, so a copy of this machine does.
        """
        reader = Machine(
            self.source,
            self.position,
            loader=PICKLE,
            trust=self._trust,
            meter=self._meter.probe(),
            on_unlisted=lambda name, use, offset: None,
            on_nested=lambda source, offset: None,
        )
        reader.stack, reader.marks, reader.memo = [*self.stack], [*self.marks], [*self.memo]
        reader.fence, reader.holes, reader._protocol = self.fence, self.holes, self._protocol
        with contextlib.suppress(Refused, OverBudget):  # most arrays: their first byte is no opcode
            reader.run()
        names = [".".join(pair) for pair in reader.trace.globals if self._trust.could_import(*pair)]
        if reader.trace.called or names:
            what = f"names {names[0][:120]}" if names else "calls something"
            raise Refused("polyglot", f"{ARRAY_WRAPPER}: the array's bytes are opcodes to pickle.load: it {what}")

    def _object_array(self, kind: DType) -> None:
        """A nested pickle.load from the same file: a machine of its own, from here to its STOP."""
        inner = Machine(
            self.source,
            self.position,
            loader=PICKLE,
            trust=self._trust,
            meter=self._meter,
            on_unlisted=self._on_unlisted,
            on_nested=self._on_nested,
        )
        try:
            inner.run()
        finally:
            self.trace.globals += inner.trace.globals
            self.trace.claims += inner.trace.claims
            self.trace.called = self.trace.called or inner.trace.called
        self._load(inner.position)


WRAPPER_FIELDS = frozenset(("subclass", "shape", "order", "dtype", "allow_mmap", "numpy_array_alignment_bytes"))


def _whole_characters(chunk: bytes) -> int:
    """Length of `chunk` without a UTF-8 sequence that is cut at its end."""
    for back in range(1, min(4, len(chunk)) + 1):
        byte = chunk[-back]
        if byte < 0x80:
            return len(chunk)
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(chunk) if needed <= back else len(chunk) - back
    return len(chunk)


def _name(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("a name that is not UTF-8") from error


def _unescape(text: bytes) -> bytes:
    """Python 2 string escapes, by the function the unpicklers themselves use."""
    try:
        return codecs.escape_decode(text)[0]
    except ValueError as error:
        raise Malformed("a string with a broken escape") from error


_METHODS: dict[str, Callable[[Machine], None]] = {
    "PROTO": Machine._proto,
    "FRAME": Machine._frame,
    "STOP": Machine._stop,
    "POP": Machine._pop_one,
    "POP_MARK": Machine._pop_group,
    "DUP": Machine._dup,
    "INT": Machine._int,
    "LONG": Machine._long,
    "LONG1": Machine._long1,
    "LONG4": Machine._long4,
    "FLOAT": Machine._float_text,
    "BINFLOAT": Machine._float_binary,
    "STRING": Machine._string_text,
    "BINSTRING": Machine._binstring,
    "SHORT_BINSTRING": Machine._short_binstring,
    "UNICODE": Machine._unicode_text,
    "BINUNICODE8": Machine._binunicode8,
    "BINBYTES": Machine._binbytes,
    "SHORT_BINBYTES": Machine._short_binbytes,
    "BINBYTES8": Machine._binbytes8,
    "BYTEARRAY8": Machine._bytearray8,
    "EMPTY_LIST": Machine._empty_list,
    "EMPTY_DICT": Machine._empty_dict,
    "EMPTY_SET": Machine._empty_set,
    "LIST": Machine._list,
    "DICT": Machine._dict,
    "FROZENSET": Machine._frozenset,
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "SETITEM": Machine._setitem,
    "SETITEMS": Machine._setitems,
    "ADDITEMS": Machine._additems,
    "GET": Machine._get_text,
    "PUT": Machine._put_text,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "INST": Machine._inst,
    "OBJ": Machine._obj,
    "NEWOBJ": Machine._newobj,
    "NEWOBJ_EX": Machine._newobj_ex,
    "BUILD": Machine._build,
    "PERSID": Machine._persid,
    "EXT1": Machine._extension,
    "EXT2": Machine._extension,
    "EXT4": Machine._extension,
    "NEXT_BUFFER": Machine._out_of_band,
    "READONLY_BUFFER": Machine._out_of_band,
}
"""Opcode name, as `pickletools` and PEP 3154 spell it → its method; the rest stands in quick.py."""

OPCODES: list[Callable[[Machine], None] | None] = [None] * 256
for _opcode in pickletools.opcodes:
    OPCODES[ord(_opcode.code)] = _METHODS.get(_opcode.name)
