"""Rules for torch: storages, tensors and how they are rebuilt.

Geometry is checked before anything is allocated: a tensor's view must lie inside its storage (the class of
CVE-2026-24747), and the container checks that a storage has as many bytes as it says. Backward hooks must be empty and
stay empty: they are called later, by the training.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trainguard.scan.claims import Claim
from trainguard.scan.rules.interface import Kind, Refused, refuse
from trainguard.scan.rules.plain import check_attributes
from trainguard.scan.values import Global, Map, Object, Storage, Value, View, is_constant, is_inert, length_of

if TYPE_CHECKING:
    from trainguard.scan.machine import Machine

STORAGE_BYTES = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "ComplexDouble": 16,
    "ComplexFloat": 8,
    "QInt8": 1,
    "QUInt8": 1,
    "QInt32": 4,
    "QUInt4x2": 1,
    "QUInt2x4": 1,
    "Untyped": 1,
}
"""Bytes per element of `torch.<Name>Storage`."""

_WIDTHS = {
    8: ("float64", "complex64"),
    4: ("float32", "complex32", "qint32"),
    2: ("float16", "bfloat16", "bits16"),
    16: ("complex128",),
    1: (
        "bool",
        "qint8",
        "quint8",
        "quint4x2",
        "quint2x4",
        "bits8",
        "bits1x8",
        "bits2x4",
        "bits4x2",
        "float4_e2m1fn_x2",
        *tuple(f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")),
    ),
}
_INTEGERS = {
    f"{sign}int{bits}": max(1, bits // 8) for sign in ("", "u") for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
}
DTYPE_BYTES = _INTEGERS | {name: width for width, names in _WIDTHS.items() for name in names}
"""Bytes per element of `torch.<dtype>`; sub-byte types are stored one to a byte or packed, never smaller."""

MAX_DIMENSIONS = 64
TENSOR = "tensor"
"""Facts of a tensor of which no more needs to be known; of others it is their View."""
_INT = {int}
MAX_ELEMENTS = 1 << 62


@functools.lru_cache(maxsize=256)
def storage_bytes(name: str) -> int | None:
    """Bytes per element of a storage class by its global name, or None when it is not one."""
    last = name.rpartition(".")[2]
    return STORAGE_BYTES.get(last[: -len("Storage")]) if last.endswith("Storage") else None


def persistent_storage(machine: Machine, pid: Value, parts: int) -> Value:
    """What torch's persistent_load returns for `pid`: ('storage', class, key, location, elements) and nothing else.

    parts: 5 in a zip checkpoint; 6 in the legacy format, whose last part is None or (key, offset, elements).
    """
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module" and parts == 6 and isinstance(pid[1], Global):
        return pid[1]
    if type(pid) is not tuple or len(pid) != parts or pid[0] != "storage" or not isinstance(pid[1], Global):
        raise Refused("persistent-id", "persistent id: expected ('storage', class, key, location, elements)")
    item_bytes = storage_bytes(pid[1].name) if pid[1].listed is not None else None
    key, location, numel = pid[2], pid[3], pid[4]
    if item_bytes is None or type(key) is not str or type(location) is not str or type(numel) is not int:
        raise Refused("persistent-id", "persistent id: expected a torch storage class, two strings and a number")
    if not 0 <= numel < MAX_ELEMENTS or not key.isascii() or "/" in key or len(key) > 64:
        raise Refused(
            "persistent-id", f"persistent id: expected a plain key and a size, found {key[:64]!a} and {numel}"
        )
    if parts == 6 and pid[5] is not None:
        return _legacy_view(machine, pid[5], key, item_bytes, numel)
    return machine.storage(key, item_bytes, numel)


def _legacy_view(machine: Machine, view: Value, key: str, item_bytes: int, numel: int) -> Storage:
    fits = type(view) is tuple and len(view) == 3 and type(view[0]) is str
    if not fits or type(view[1]) is not int or type(view[2]) is not int or min(view[1:]) < 0:
        raise Refused("persistent-id", "persistent id: expected a view as (key, offset, elements)")
    if view[1] + view[2] > numel:
        raise Refused("geometry", f"storage view of {view[1]}+{view[2]} elements in a storage of {numel}")
    machine.storage(key, item_bytes, numel)
    return Storage("", item_bytes, view[2])  # without its key: nothing reads numbers through such a view


def _ints(value: Value) -> tuple[int, ...] | None:
    if type(value) is Object and value.origin.name == "torch.Size":
        value = value.facts
    if type(value) is list:
        value = tuple(value)
    if type(value) is not tuple or len(value) > MAX_DIMENSIONS:
        return None
    return value if {*map(type, value)} <= _INT else None


def check_view(origin: Global, storage: Value, offset: Value, size: Value, stride: Value, item_bytes: int) -> Value:
    """The view (in elements of `item_bytes`) as a value to keep; raises Refused unless it lies inside the storage."""
    sizes, strides = _ints(size), _ints(stride)
    if type(offset) is not int or offset < 0 or sizes is None or strides is None or len(sizes) != len(strides):
        raise refuse("geometry", origin, "an offset, a shape and strides of equal length", (offset, size, stride))
    last = offset
    for extent, step in zip(sizes, strides, strict=True):
        if extent < 0 or step < 0:
            raise refuse("geometry", origin, "a shape and strides without negative numbers", (size, stride))
        if extent == 0:
            last = -1
            break
        last += (extent - 1) * step
    bytes_there = storage_size(storage)
    if bytes_there is None:
        raise refuse("geometry", origin, "a storage", storage)
    if (last + 1) * item_bytes > bytes_there or offset * item_bytes > bytes_there:
        raise Refused("geometry", f"tensor of {(last + 1) * item_bytes} bytes in a storage of {bytes_there} bytes")
    if type(storage) is Storage and storage.item_bytes == item_bytes:
        return View(storage, offset, sizes, strides)
    return TENSOR


def storage_size(value: Value) -> int | None:
    """Bytes of a storage stand-in, or None when it is not one."""
    if type(value) is Storage:
        return value.numel * value.item_bytes
    if isinstance(value, Object) and type(value.facts) is Storage:
        return value.facts.numel * value.facts.item_bytes
    return None


def _item_bytes(value: Value) -> int:
    if type(value) is Storage:
        return value.item_bytes
    if isinstance(value, Object) and isinstance(value.facts, Storage):
        return value.facts.item_bytes
    return 1


def check_hooks(machine: Machine, origin: Global, value: Value) -> None:
    """Raise Refused unless `value` is None or an OrderedDict that is empty now; it is sealed so that it stays empty."""
    if value is None:
        return
    empty = (isinstance(value, Object) and value.origin.name == "collections.OrderedDict" and not value.filled) or (
        type(value) is Map and not value
    )
    if not empty:
        raise refuse("hooks", origin, "no backward hooks", value)
    if isinstance(value, Object):
        value.sealed = True
    else:
        machine.seal(value)


def tensor(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_tensor(storage, offset, size, stride) and v2, which adds requires_grad, hooks and metadata."""
    if not 4 <= len(args) <= 7:
        raise refuse("arguments", origin, "a storage, offset, size and stride", args)
    storage = args[0]
    view = check_view(origin, storage, args[1], args[2], args[3], _item_bytes(storage))
    if len(args) > 4 and type(args[4]) is not bool:
        raise refuse("arguments", origin, "requires_grad as a bool", args[4])
    if len(args) > 5:
        check_hooks(machine, origin, args[5])
    if len(args) > 6:
        check_metadata(origin, args[6])
    return Object(origin, view)


def check_metadata(origin: Global, value: Value) -> None:
    """Tensor metadata (`conj`, `neg`): None or a dict of constants."""
    if value is not None and not (type(value) is Map and is_inert(value)):
        raise refuse("arguments", origin, "metadata made of constants", value)


def tensor_v3(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])."""
    if not 7 <= len(args) <= 8:
        raise refuse("arguments", origin, "a storage, geometry, flags and a dtype", args)
    item_bytes = dtype_bytes(args[6])
    if item_bytes is None or type(args[4]) is not bool:
        raise refuse("arguments", origin, "requires_grad as a bool and a torch dtype", args)
    check_view(origin, args[0], args[1], args[2], args[3], item_bytes)
    check_hooks(machine, origin, args[5])
    if len(args) == 8:
        check_metadata(origin, args[7])
    return Object(origin, TENSOR)


def dtype_bytes(value: Value) -> int | None:
    """Bytes per element of a `torch.<dtype>` global, or None when it is not one."""
    if not isinstance(value, Global) or value.listed is None or value.listed.kind != "torch_dtype":
        return None
    return DTYPE_BYTES.get(value.name.rpartition(".")[2])


def quantized(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_qtensor(storage, offset, size, stride, quantizer parameters, requires_grad, hooks)."""
    if len(args) != 7 or type(args[4]) is not tuple or not args[4]:
        raise refuse("arguments", origin, "a storage, geometry and quantizer parameters", args)
    sizes = _ints(args[2])
    packed = type(args[0]) is Storage and sizes is not None and args[0].item_bytes == 1
    strides = tuple(0 for _ in sizes) if packed and sizes and args[0].numel * 4 >= _product(sizes) else args[3]
    check_view(origin, args[0], args[1], args[2], strides, _item_bytes(args[0]))
    if not all(_is_plain(part) for part in args[4]) or type(args[5]) is not bool:
        raise refuse("arguments", origin, "quantizer parameters", args[4])
    if len(args[4]) == 4:
        _check_channels(origin, sizes or (), args[4])
    check_hooks(machine, origin, args[6])
    return Object(origin, TENSOR)


def _check_channels(origin: Global, sizes: tuple[int, ...], parameters: tuple[Value, ...]) -> None:
    """(scheme, scales, zero points, axis): one of each for every index of that axis; older torch does not look."""
    _, scales, points, axis = parameters
    if type(axis) is not int or not 0 <= axis < len(sizes):
        raise refuse("geometry", origin, f"an axis of {len(sizes)} dimensions", axis)
    for part in (scales, points):
        view = _view_of(part)
        count = len(part) if type(part) is list else _product(view.sizes) if view else None
        if count != sizes[axis]:
            raise refuse("geometry", origin, f"{sizes[axis]} scales and zero points", count)


def _product(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _is_plain(value: Value) -> bool:
    if is_constant(value) or is_tensor(value):
        return True
    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, Global) and value.listed is not None and value.listed.kind in ("torch_dtype", "constant")


def is_tensor(value: Value) -> bool:
    """Whether `value` is a tensor that a rule of this file made."""
    return isinstance(value, Object) and (type(value.facts) is View or value.facts is TENSOR)


def parameter(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_parameter(tensor, requires_grad, hooks[, state]) and the buffer twin."""
    if not 3 <= len(args) <= 4 or not is_tensor(args[0]):
        raise refuse("arguments", origin, "(tensor, requires_grad, hooks)", args)
    if type(args[1]) is not bool:
        raise refuse("arguments", origin, "requires_grad as a bool", args[1])
    if args[2] is not True and args[2] is not False:
        check_hooks(machine, origin, args[2])
    if len(args) == 4:
        check_tensor_state(origin, args[3])
    return Object(origin, TENSOR)


def check_tensor_state(origin: Global, state: Value) -> None:
    """Attributes set on a tensor: nothing, a dict, or (dict, dict of slots); names must not be dunder with objects."""
    for half in state if type(state) is tuple and len(state) == 2 else (state,):
        if half is not None and half != ():
            check_attributes(origin, half)
            keys = half[::2] if type(half) is Map else ()
            if any(type(key) is str and "hook" in key for key in keys):
                raise Refused("hooks", f"{origin.name}: state writes hooks")


def sparse(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_sparse_tensor(layout, (indices, values, size[, coalesced])), or (pointers, indices, values, size).

    torch does not look at the indices when it loads; the container does once it knows where they lie (claims.py).
    """
    name = _layout_name(args[0]) if len(args) == 2 else None
    if name not in SPARSE_PARTS or type(args[1]) is not tuple:
        raise refuse("arguments", origin, "(a sparse layout, its parts)", args)
    count = SPARSE_PARTS[name]
    tensors, rest = args[1][:count], args[1][count:]
    shape = _ints(rest[0]) if rest else None
    fits = len(tensors) == count and all(map(is_tensor, tensors)) and shape is not None and min(shape, default=0) >= 0
    if not fits or not all(type(part) in (bool, type(None)) for part in rest[1:]) or len(rest) > 2:
        raise refuse("arguments", origin, "tensors and a shape", args[1])
    machine.claim(Claim(name, tuple(_view_of(part) for part in tensors), shape or ()))
    return Object(origin, TENSOR)


SPARSE_PARTS = {"coo": 2, "csr": 3, "csc": 3, "bsr": 3, "bsc": 3}
"""Sparse layouts → the tensors they are rebuilt from."""


def _layout_name(value: Value) -> str:
    """`coo` of torch.sparse_coo, named or looked up by name; empty for anything else."""
    name = value.facts if isinstance(value, Object) else value.name if isinstance(value, Global) else None
    return name.removeprefix("torch.sparse_") if type(name) is str and name.startswith("torch.sparse_") else ""


def _view_of(value: Value) -> View | None:
    facts = value.facts if isinstance(value, Object) else None
    return facts if type(facts) is View else None


def nested(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_nested_tensor(buffer, sizes, strides, offsets): tensors, whose numbers are looked at like indices."""
    if len(args) != 4 or not all(map(is_tensor, args)):
        raise refuse("arguments", origin, "a buffer and three tensors that cut it", args)
    machine.claim(Claim("nested", tuple(_view_of(part) for part in args)))
    return Object(origin, TENSOR)


def plain_tensor(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """Meta and device tensors: tensors, numpy arrays, numbers, dtypes, devices and layouts only."""
    for arg in args:
        listed = isinstance(arg, Object) and arg.origin.listed is not None
        if not (_is_plain(arg) or _ints(arg) is not None or listed or type(arg) is Storage):
            raise refuse("arguments", origin, "tensors, numbers, dtypes and devices", arg)
    return Object(origin, TENSOR)


def wrapper(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_wrapper_subclass(class, dtype, size, stride, offset, layout, device, requires_grad)."""
    if not args or not isinstance(args[0], Global):
        raise refuse("arguments", origin, "(class, dtype, size, …)", args)
    _check_tensor_class(machine, origin, args[0])
    plain_tensor(machine, origin, args[1:])
    return Object(origin, TENSOR)


def _check_tensor_class(machine: Machine, origin: Global, target: Global) -> None:
    if target.listed is None:
        machine.unlisted(target, "instance")
    elif target.listed.kind != "torch_tensor_class" and target.listed.tier != "user":
        raise refuse("arguments", origin, "a listed tensor class", target)


def from_type(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_rebuild_from_type_v2(function, class, arguments, state): the function's own rule judges the arguments."""
    if len(args) != 4 or not isinstance(args[0], Global) or not isinstance(args[1], Global):
        raise refuse("arguments", origin, "(function, class, arguments, state)", args)
    function, target, arguments, state = args
    if type(arguments) is not tuple:
        raise refuse("arguments", origin, "arguments as a tuple", arguments)
    _check_tensor_class(machine, origin, target)
    if function.listed is None:
        machine.unlisted(function, "call")
    elif function.listed.kind not in TENSOR_BUILDERS:
        raise refuse("arguments", origin, "a function that rebuilds a tensor", function)
    else:
        machine.call(function, arguments)
    if not _is_wrapper_state(state):
        check_tensor_state(origin, state)
    return Object(origin, TENSOR)


def _is_wrapper_state(state: Value) -> bool:
    """A tensor subclass's own (listed) state: None, or a tuple of plain parts."""
    return state is None or (type(state) is tuple and not any(type(part) is Map for part in state))


def size(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """torch.Size((…))."""
    found = _ints(args[0]) if len(args) == 1 else ()
    if len(args) > 1 or found is None:
        raise refuse("arguments", origin, "a tuple of ints", args)
    return Object(origin, found)


def device(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """torch.device('cuda', 0)."""
    fits = 1 <= len(args) <= 2 and type(args[0]) is str and len(args[0]) < 40
    if not fits or (len(args) == 2 and type(args[1]) is not int):
        raise refuse("arguments", origin, "(kind, index)", args)
    return Object(origin)


def layout(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """torch.serialization._get_layout('torch.strided')."""
    if len(args) != 1 or type(args[0]) is not str or not args[0].startswith("torch."):
        raise refuse("arguments", origin, "the name of a layout", args)
    return Object(origin, args[0])


def load_from_bytes(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """torch.storage._load_from_bytes(b): a whole torch file inside; it is vetted like one."""
    if len(args) != 1 or length_of(args[0]) is None:
        raise refuse("arguments", origin, "bytes", args)
    machine.nested(args[0])
    return Object(origin, Storage("", 1, length_of(args[0]) or 0))


def typed_storage(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """Storage classes called or instantiated: only empty; data comes through persistent ids."""
    if args:
        raise refuse("arguments", origin, "no arguments", args)
    return Object(origin)


def storage_state(machine: Machine, target: Object, state: Value) -> Value:
    """State of a typed storage: attributes."""
    check_attributes(target.origin, state)
    return target


def tensor_class(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """torch.nn.Parameter(tensor, requires_grad) and tensor classes called: tensors and flags only."""
    if not all(is_tensor(arg) or type(arg) is bool for arg in args):
        raise refuse("arguments", origin, "a tensor", args)
    return Object(origin, TENSOR)


TORCH: dict[str, Kind] = {
    "torch_dtype": Kind(),
    "torch_storage": Kind(call=typed_storage, new=typed_storage, state=storage_state),
    "torch_tensor_class": Kind(call=tensor_class),
    "torch_tensor": Kind(call=tensor),
    "torch_tensor_v3": Kind(call=tensor_v3),
    "torch_quantized": Kind(call=quantized),
    "torch_parameter": Kind(call=parameter),
    "torch_sparse": Kind(call=sparse),
    "torch_plain": Kind(call=plain_tensor),
    "torch_nested": Kind(call=nested),
    "torch_wrapper": Kind(call=wrapper),
    "torch_from_type": Kind(call=from_type),
    "torch_size": Kind(call=size, new=size),
    "torch_device": Kind(call=device),
    "torch_layout": Kind(call=layout),
    "torch_load_from_bytes": Kind(call=load_from_bytes),
}
"""Kinds for torch."""

TENSOR_BUILDERS = frozenset(
    kind for kind in TORCH if kind not in ("torch_from_type", "torch_load_from_bytes", "torch_dtype", "torch_storage")
)
