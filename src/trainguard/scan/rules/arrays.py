"""Rules for numpy: arrays, dtypes, scalars and random generators.

numpy checks little of what a pickle tells it about a dtype, so shapes, item sizes and field offsets are checked here:
an array's data must have exactly the bytes its shape and dtype need, and a field must lie inside its record.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from trainguard.scan.rules.interface import Kind, Refused, refuse
from trainguard.scan.rules.plain import any_state, bare, constant_state, constants
from trainguard.scan.values import Global, Map, Object, Value, is_inert, length_of

if TYPE_CHECKING:
    from trainguard.scan.machine import Machine

DTYPE_TEXT = re.compile(
    r"[<>|=]?(?P<code>[?bBhHiIlLqQpPefdgFDGSaUVOMmcu])(?P<bytes>\d{0,9})(?P<unit>\[[0-9a-zA-Z/]{1,12}\])?\Z", re.ASCII
)
ITEM_BYTES = {
    "?": 1,
    "b": 1,
    "B": 1,
    "h": 2,
    "H": 2,
    "l": 8,
    "L": 8,
    "q": 8,
    "Q": 8,
    "p": 8,
    "P": 8,
    "e": 2,
    "d": 8,
} | {
    "g": 16,
    "F": 8,
    "D": 16,
    "G": 32,
    "O": 8,
}
BIT_GENERATORS = frozenset(("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"))
MAX_DIMENSIONS = 64
"""NPY_MAXDIMS of numpy 2; 32 before."""
MAX_FIELDS = 4096
OBJECT_FLAGS = 0x07
"""NPY_ITEM_REFCOUNT, NPY_LIST_PICKLE, NPY_ITEM_IS_POINTER: with one of them numpy takes bytes for object pointers."""


class DType(NamedTuple):
    """What is known about a dtype."""

    item_bytes: int
    has_objects: bool = False


class ArrayState(NamedTuple):
    """What is known about an ndarray."""

    item_bytes: int
    has_objects: bool


def parse_dtype(text: str) -> DType | None:
    """The dtype of a typestring such as `<f4` or `U10`, or None when it is not one."""
    match = DTYPE_TEXT.match(text)
    if match is None:
        return None
    code, digits = match["code"], match["bytes"]
    if text.lstrip("<>|=") == "b1":
        return DType(1)
    if match["unit"] and code not in "Mm":
        return None
    if code == "O":
        return DType(8, has_objects=True)
    if code in "SaVU":
        return DType(int(digits or 0) * (4 if code == "U" else 1))
    if code in "Mm":
        return DType(8) if digits in ("", "8") else None
    if digits:
        return DType(int(digits)) if int(digits) in (1, 2, 4, 8, 12, 16, 32) else None
    return DType(ITEM_BYTES.get(code, 4))


def dtype(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """numpy.dtype(typestring, align, copy)."""
    found = parse_dtype(args[0]) if args and type(args[0]) is str else None
    if args and isinstance(args[0], Global) and args[0].listed and args[0].listed.kind == "numpy_scalar_type":
        found = SCALAR_TYPES.get(args[0].name.rpartition(".")[2])
    if found is None or len(args) > 3 or not all(type(arg) in (bool, int) for arg in args[1:]):
        raise refuse("arguments", origin, "a numpy typestring and two flags", args)
    if type(args[0]) is str:
        machine.implies(_class_of(args[0], found))
    return Object(origin, found)


def _class_of(text: str, kind: DType) -> str:
    """The class of the dtype a typestring makes; torch's restricted unpickler wants that listed too."""
    match = DTYPE_TEXT.match(text)
    code = match["code"] if match else "V"
    if text.lstrip("<>|=") == "b1":
        return "numpy.dtypes.BoolDType"
    name = CLASSES.get(code) or f"{SIZED.get(code, 'Int')}{8 * kind.item_bytes}"
    return f"numpy.dtypes.{name}DType"


CLASSES = {"?": "Bool", "O": "Object", "S": "Bytes", "a": "Bytes", "U": "Str", "V": "Void", "M": "DateTime64"} | {
    "m": "TimeDelta64"
}
SIZED = {
    "u": "UInt",
    "f": "Float",
    "c": "Complex",
    "e": "Float",
    "d": "Float",
    "F": "Complex",
    "D": "Complex",
} | dict.fromkeys("BHILQP", "UInt")

SCALAR_TYPES = {
    "bool_": DType(1),
    "object_": DType(8, has_objects=True),
    "record": DType(-1),  # its state says how long it is
    **{f"{kind}{bits}": DType(bits // 8) for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": DType(bits // 8) for bits in (16, 32, 64)},
    **{f"complex{bits}": DType(bits // 8) for bits in (64, 128)},
}


def dtype_state(machine: Machine, target: Object, state: Value) -> Value:
    """(version, byte order, subarray, names, fields, item size, alignment, flags[, metadata])."""
    if type(state) is not tuple or not 8 <= len(state) <= 9:
        raise refuse("build", target.origin, "eight or nine parts", state)
    version, order, subarray, names, fields, size, alignment, flags = state[:8]
    if not all(is_inert(part) for part in (version, order, names, size, alignment, flags)):
        raise refuse("build", target.origin, "constants", state)
    if target.sealed:
        raise Refused("build", f"{target.origin.name}: given state after another dtype holds it")
    known: DType = target.facts if isinstance(target.facts, DType) else DType(0)
    if type(size) is not int or type(alignment) is not int or size > 1 << 31:
        raise refuse("build", target.origin, "an item size and an alignment", state)
    if len(state) == 9 and not _is_metadata(state[8]):
        raise refuse("build", target.origin, "metadata made of constants", state[8])
    if fields is None and names is None and subarray is None:
        if size not in (-1, known.item_bytes) or known.item_bytes < 0:
            raise refuse("build", target.origin, f"an item size of {known.item_bytes}", size)
        if type(flags) is not int or (flags & OBJECT_FLAGS and not known.has_objects):
            raise refuse("build", target.origin, "flags of a dtype without objects", flags)
        return target
    if size < 0 or (size > known.item_bytes and known.item_bytes >= 0):
        raise refuse("build", target.origin, f"an item size of {known.item_bytes}", size)
    objects = _fields_have_objects(target, names, fields, size) if fields is not None else False
    if subarray is not None:
        objects = _subarray_has_objects(target, subarray, size) or objects
    if type(flags) is not int or (flags & OBJECT_FLAGS and not objects):
        raise refuse("build", target.origin, "flags of a dtype without objects", flags)
    target.facts = DType(size, has_objects=objects)
    return target


def _is_metadata(value: Value) -> bool:
    if value is None or is_inert(value):
        return True
    return type(value) is tuple and len(value) == 2 and all(part is None or is_inert(part) for part in value)


def _fields_have_objects(target: Object, names: Value, fields: Value, size: int) -> bool:
    if type(fields) is not Map or type(names) is not tuple or len(fields) > 2 * MAX_FIELDS:
        raise refuse("build", target.origin, "a dict of fields", fields)
    if not set(names) <= {key for key in fields[::2] if type(key) is str}:
        raise refuse("build", target.origin, "a field for every name", names)
    objects = False
    for _, field in fields.pairs():
        if type(field) is not tuple or len(field) not in (2, 3) or not isinstance(field[0], Object):
            raise refuse("build", target.origin, "(dtype, offset)", field)
        inner, offset = field[0].facts, field[1]
        fits = isinstance(inner, DType) and type(offset) is int and inner.item_bytes >= 0
        if not fits or not 0 <= offset <= size - inner.item_bytes:
            raise refuse("build", target.origin, f"a field inside {size} bytes", field)
        _hold(target, field[0])
        objects = objects or inner.has_objects
    return objects


def _hold(outer: Object, inner: Object) -> None:
    """Note that `outer` is made of `inner`, which must be complete: numpy follows a circle until its stack ends."""
    if inner is outer:
        raise Refused("build", f"{outer.origin.name}: a dtype that holds itself")
    inner.sealed = True


def _subarray_has_objects(target: Object, subarray: Value, size: int) -> bool:
    fits = type(subarray) is tuple and len(subarray) == 2 and isinstance(subarray[0], Object)
    if not fits or not isinstance(subarray[0].facts, DType):
        raise refuse("build", target.origin, "(dtype, shape)", subarray)
    _hold(target, subarray[0])
    shape = subarray[1] if type(subarray[1]) is tuple else (subarray[1],)
    count = count_of(shape)
    if count is None or count * subarray[0].facts.item_bytes != size:
        raise refuse("build", target.origin, f"a subarray of {size} bytes", subarray)
    return bool(subarray[0].facts.has_objects)


def count_of(shape: Value) -> int | None:
    """Elements of a shape, or None when it is not a tuple of at most 64 non-negative ints."""
    if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        return None
    count = 1
    for size in shape:
        if type(size) is not int or size < 0 or size >= 1 << 63:
            return None
        count *= size
    return count


def array(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_reconstruct(ndarray class, (0,), b'b'): an empty array that state fills."""
    if len(args) != 3 or not _is_array_type(args[0]) or args[1] != (0,) or args[2] not in (b"b", "b"):
        raise refuse("arguments", origin, "(ndarray, (0,), b'b')", args)
    return Object(origin)


def masked_array(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_mareconstruct(subclass, base class, (0,), b'b')."""
    if (
        len(args) != 4
        or not all(_is_array_type(arg) for arg in args[:2])
        or args[2:] not in (((0,), b"b"), ((0,), "b"))
    ):
        raise refuse("arguments", origin, "(MaskedArray, ndarray, (0,), b'b')", args)
    return Object(origin)


def _is_array_type(value: Value) -> bool:
    return isinstance(value, Global) and value.listed is not None and value.listed.kind == "numpy_array_type"


def array_state(machine: Machine, target: Object, state: Value) -> Value:
    """(version, shape, dtype, Fortran order, bytes or list of objects); a masked array adds its mask and fill value."""
    if type(state) is tuple and len(state) == 7 and _is_fill_value(state[6]):
        length = length_of(state[5])
        count = count_of(state[1])
        if length is None or count is None or length % max(count, 1):
            raise refuse("build", target.origin, "a mask as bytes", state)
        state = state[:5]
    if type(state) is not tuple or len(state) not in (4, 5):
        raise refuse("build", target.origin, "(version, shape, dtype, order, data)", state)
    shape, kind, _, data = state[-4:]
    if not isinstance(kind, Object) or not isinstance(kind.facts, DType):
        raise refuse("build", target.origin, "a dtype", kind)
    check_data(target.origin, shape, kind.facts, data)
    target.facts = ArrayState(kind.facts.item_bytes, kind.facts.has_objects)
    return target


def _is_fill_value(value: Value) -> bool:
    """What a masked array shows in the place of a masked item: a constant, or a numpy scalar or array of its dtype."""
    plain = isinstance(value, Object) and isinstance(value.facts, ArrayState) and not value.facts.has_objects
    made = isinstance(value, Object) and value.origin.listed is not None and value.origin.listed.kind == "numpy_scalar"
    return is_inert(value) or plain or made


def check_data(origin: Global, shape: Value, kind: DType, data: Value) -> None:
    """Raise Refused unless `data` has exactly what `shape` of `kind` needs: so many bytes, or so many objects."""
    count = count_of(shape)
    if count is None:
        raise refuse("build", origin, "a shape", shape)
    found = len(data) if type(data) is list and kind.has_objects else length_of(data)
    wanted = count if kind.has_objects else count * kind.item_bytes
    if found != wanted or (kind.has_objects and type(data) is not list):
        raise refuse("build", origin, f"data of {wanted} {'objects' if kind.has_objects else 'bytes'}", found)


def from_buffer(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_frombuffer(bytes, dtype, shape, order): arrays at protocol 5."""
    fits = len(args) == 4 and isinstance(args[1], Object) and isinstance(args[1].facts, DType)
    if not fits or args[1].facts.has_objects or args[3] not in ("C", "F"):
        raise refuse("arguments", origin, "(bytes, dtype, shape, order)", args)
    check_data(origin, args[2], args[1].facts, args[0])
    return Object(origin, ArrayState(args[1].facts.item_bytes, has_objects=False))


def scalar(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """scalar(dtype, bytes)."""
    fits = len(args) == 2 and isinstance(args[0], Object) and isinstance(args[0].facts, DType)
    if not fits or args[0].facts.has_objects or length_of(args[1]) != args[0].facts.item_bytes:
        raise refuse("arguments", origin, "(dtype, bytes of one item)", args)
    return Object(origin)


def scalar_type(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """numpy.float64(1.5): constants; never a number for a type that takes it as its length."""
    sized = origin.name.rpartition(".")[2] in ("void", "record", "bytes_", "str_")
    if sized and any(type(arg) is int for arg in args):
        raise refuse("arguments", origin, "bytes or text", args)
    return constants(machine, origin, args)


def bit_generator(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """__bit_generator_ctor(name or class) and its two companions; the name is looked up in numpy's own table."""
    for arg in args:
        named = (type(arg) is str and arg in BIT_GENERATORS) or (
            isinstance(arg, Global)
            and arg.listed is not None
            and arg.listed.kind in ("numpy_bit_generator", "numpy_random")
        )
        made = isinstance(arg, Object) and arg.origin.name.startswith("numpy.random.")
        if not (named or made):
            raise refuse("arguments", origin, "the name of a numpy bit generator", arg)
    if len(args) > 2:
        raise refuse("arguments", origin, "the name of a numpy bit generator", args)
    return Object(origin)


POSITIONS = {"pos": 624, "buffer_pos": 4}
"""Keys of a generator's state → the last place in its buffer; numpy reads there without looking."""


def generator_state(machine: Machine, target: Object, state: Value) -> Value:
    """State of a bit generator: whatever it is made of, its positions lie inside its buffers."""
    pending = [state]
    while pending:
        item = pending.pop()
        if type(item) is tuple or type(item) is list:
            pending.extend(item)
        elif type(item) is Map:
            for key, value in item.pairs():
                pending.append(value)
                limit = POSITIONS.get(key) if type(key) is str else None
                if limit is not None and not (type(value) is int and 0 <= value <= limit):
                    raise refuse("build", target.origin, f"{key} up to {limit}", value)
    return target


def seed_sequence(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """__pyx_unpickle_SeedSequence(class, checksum, None or state)."""
    fits = len(args) == 3 and isinstance(args[0], Global) and args[0].listed is not None
    if not fits or not args[0].name.startswith("numpy.random.") or type(args[1]) is not int:
        raise refuse("arguments", origin, "(SeedSequence, checksum, state)", args)
    return Object(origin)


NUMPY: dict[str, Kind] = {
    "numpy_array_type": Kind(),
    "numpy_scalar_type": Kind(call=scalar_type, factory=True),
    "numpy_bit_generator": Kind(call=bit_generator, new=bit_generator, state=generator_state),
    "numpy_dtype": Kind(call=dtype, state=dtype_state),
    "numpy_dtype_class": Kind(call=lambda machine, origin, args: Object(origin, DType(8)), state=constant_state),
    "numpy_array": Kind(call=array, state=array_state),
    "numpy_masked": Kind(call=masked_array, state=array_state),
    "joblib_wrapper": Kind(new=bare),
    "numpy_from_buffer": Kind(call=from_buffer),
    "numpy_scalar": Kind(call=scalar),
    "numpy_random": Kind(call=bit_generator, state=generator_state),
    "numpy_seed_sequence": Kind(call=seed_sequence, state=any_state),
}
"""Kinds for numpy."""
