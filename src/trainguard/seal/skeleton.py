"""The shape of a pickle: which tensor lies under which name, read without running anything.

An opcode walk that builds plain containers, marks what a persistent id stands for, and turns every global, call,
instance and state into an inert `Opaque`. It resolves no name and imports nothing, so a hostile pickle can at most
make it give up (ValueError). It is a reading aid for naming tensors, never a safety verdict: that is scan's.

    skeleton = read_skeleton(data)              # the value of `data.pkl` in a torch zip
    tensors, rest = flatten(skeleton)           # names → TensorRef, names → text of the plain values
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

OPERATION_LIMIT = 2_000_000
"""About 3 s; a model of 100,000 tensors with Adam state needs about 8 M and is then named by storage record."""
NAME_LIMIT = 50_000
DEPTH_LIMIT = 64
LABEL_DEPTH = 4
_TEXT_LIMIT = 200


@dataclass(slots=True)
class Opaque:
    """Something only code could make. Inert: its parts are kept so that tensors inside can be named."""

    what: str
    """`module.name` of a global, `call`, `pid` …"""
    parts: list[Any] = field(default_factory=list)
    """Arguments, state, items: in the order they were given."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view into one storage, as `torch._utils._rebuild_tensor*` would make it."""

    storage: str
    """Key of the storage: the last part of the record's name in a torch zip."""
    kind: str
    """Storage type or dtype, such as `FloatStorage`."""
    start: int
    """First element in the storage."""
    span: int
    """Elements from the first to the last that the view touches."""
    shape: tuple[int, ...]


_MARK = object()


def read_skeleton(data: bytes) -> Any:
    """The inert value of the first pickle in `data`. Raises ValueError for what cannot be followed."""
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count >= OPERATION_LIMIT:
                raise ValueError(f"more than {OPERATION_LIMIT} operations")
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        return machine.stack[-1]
    except (IndexError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"not a pickle that can be followed: {type(error).__name__}") from error


class _Machine:
    """The pickle virtual machine with everything that could act replaced by Opaque."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]() if callable(_CONSTANTS[name]) else _CONSTANTS[name])
        elif name in _PUSHES:
            self.stack.append(argument)
        else:
            handler = _HANDLERS.get(name)
            if handler is None:
                raise ValueError(f"opcode {name}")
            handler(self, argument)

    def marked(self) -> list[Any]:
        """What lies above the topmost mark; both are taken off."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target if isinstance(target, list) else target.parts).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            target.update((_label(key), value) for key, value in pairs)
        else:
            target.parts.append({_label(key): value for key, value in pairs})

    def call(self, function: Any, arguments: Any) -> None:
        name = function.what if isinstance(function, Opaque) else "call"
        parts = list(arguments) if isinstance(arguments, tuple | list) else [arguments]
        self.stack.append(_rebuilt(name, parts))

    def build(self, _argument: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.parts.append(state)
        elif isinstance(target, dict) and isinstance(state, dict):
            pass  # attributes of an OrderedDict, such as state_dict's _metadata: no tensor is ever there


def _label(key: Any) -> str:
    """How a dict key shows in a name: text as it is, numbers in brackets."""
    if isinstance(key, str):
        return key[:_TEXT_LIMIT]
    if isinstance(key, int | float | bytes | bool | None):
        return f"[{key!r}]"[:_TEXT_LIMIT]
    return f"[{' '.join(_plain(key, LABEL_DEPTH))}]"[:_TEXT_LIMIT] if isinstance(key, Opaque) else "[?]"


def _plain(value: Any, depth: int) -> Iterator[str]:
    """The texts and numbers in a key that only code could make, such as DCP's MetadataIndex, in order."""
    if isinstance(value, str | int):
        yield str(value)
    elif isinstance(value, Opaque | dict | list | tuple) and depth:
        parts = value.parts if isinstance(value, Opaque) else value.values() if isinstance(value, dict) else value
        for part in parts:
            yield from _plain(part, depth - 1)


def _rebuilt(name: str, parts: list[Any]) -> Any:
    """The value of a call: a TensorRef or an ordered dict where it is one of torch's own, else Opaque."""
    if name == "collections OrderedDict" and not parts:
        return {}
    if name.startswith("torch._utils _rebuild_tensor") and len(parts) >= 4:
        return _tensor(parts) or Opaque(name, parts)
    if name in ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state") and parts:
        return parts[0]
    return Opaque(name, parts)


def _tensor(parts: list[Any]) -> TensorRef | None:
    storage, start, shape, strides = parts[:4]
    if not (isinstance(storage, Opaque) and storage.what == "pid" and len(storage.parts) >= 4):
        return None
    numbers = (start, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) or len(shape) != len(strides):
        return None
    kind = storage.parts[1].what.split(" ")[-1] if isinstance(storage.parts[1], Opaque) else "?"
    if kind == "UntypedStorage" and len(parts) > 6 and isinstance(parts[6], Opaque):  # _rebuild_tensor_v3
        kind = parts[6].what.split(" ")[-1]
    span = 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return TensorRef(str(storage.parts[2]), kind, start, span, tuple(shape))


def _pid(machine: _Machine, argument: Any) -> None:
    machine.stack.append(Opaque("pid", list(argument) if isinstance(argument, tuple) else [argument]))


def _stack_global(machine: _Machine, _argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Opaque(f"{module} {name}"[:_TEXT_LIMIT]))


def _reduce(machine: _Machine, _argument: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.call(function, arguments)


def _new_object_ex(machine: _Machine, _argument: Any) -> None:
    keywords, arguments, function = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    machine.call(function, (*arguments, keywords))


def _object(machine: _Machine, _argument: Any) -> None:
    function, *arguments = machine.marked()
    machine.call(function, arguments)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _argument: Any) -> None:
        values = tuple(machine.stack[len(machine.stack) - count :])
        del machine.stack[len(machine.stack) - count :]
        machine.stack.append(values)

    return make


def _append_one(machine: _Machine, _argument: Any) -> None:
    value = machine.stack.pop()
    machine.append([value])


def _set_item(machine: _Machine, _argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _dict(machine: _Machine, _argument: Any) -> None:
    pairs = machine.marked()
    machine.stack.append({})
    machine.set_items(pairs)


_CONSTANTS: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "MARK": _MARK,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": (),
}
_PUSHED = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BYTEARRAY8
"""
_PUSHES = frozenset(_PUSHED.split())
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "POP": lambda m, a: m.stack.pop(),
    "POP_MARK": lambda m, a: m.marked().clear(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "PUT": lambda m, a: m.memoize(int(a)),
    "BINPUT": lambda m, a: m.memoize(a),
    "LONG_BINPUT": lambda m, a: m.memoize(a),
    "MEMOIZE": lambda m, a: m.memoize(len(m.memo)),
    "GET": lambda m, a: m.stack.append(m.memo[int(a)]),
    "BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.stack.append(m.memo[a]),
    "LIST": lambda m, a: m.stack.append(m.marked()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.marked())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "DICT": _dict,
    "FROZENSET": lambda m, a: m.stack.append(m.marked()),
    "APPEND": _append_one,
    "APPENDS": lambda m, a: m.append(m.marked()),
    "ADDITEMS": lambda m, a: m.append(m.marked()),
    "SETITEM": _set_item,
    "SETITEMS": lambda m, a: m.set_items(m.marked()),
    "GLOBAL": lambda m, a: m.stack.append(Opaque(str(a)[:_TEXT_LIMIT])),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_ex,
    "OBJ": _object,
    "INST": lambda m, a: m.call(Opaque(str(a)[:_TEXT_LIMIT]), m.marked()),
    "BUILD": _Machine.build,
    "PERSID": _pid,
    "BINPERSID": lambda m, a: _pid(m, m.stack.pop()),
}


def flatten(skeleton: Any) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Names in a skeleton: of its tensors, and of its containers with the text of the plain values in each.

    Names join keys by dots and indexes in brackets: `optimizer.state[3].exp_avg`. A tensor two names lead to has two;
    a container two names lead to is walked once. Raises ValueError beyond NAME_LIMIT names.
    """
    tensors: dict[str, TensorRef] = {}
    values: dict[str, list[str]] = {}
    seen: set[int] = set()
    pending: list[tuple[str, str, Any, int]] = [("", "", skeleton, 0)]
    while pending:
        place, key, value, depth = pending.pop()
        name = _joined(place, key)
        if isinstance(value, TensorRef):
            tensors[_unused(name, tensors)] = value
        elif isinstance(value, dict | list | tuple | Opaque):
            if id(value) in seen or depth > DEPTH_LIMIT:
                continue
            seen.add(id(value))
            if isinstance(value, Opaque):
                values.setdefault(place, []).append(f"{key}: {value.what}")
            pending += [(name, child, inner, depth + 1) for child, inner in reversed(list(_children(value)))]
        else:
            values.setdefault(place, []).append(f"{key}={value!r}")
        if len(tensors) + len(values) > NAME_LIMIT:
            raise ValueError(f"more than {NAME_LIMIT} names")
    return tensors, {name: "\n".join(lines) for name, lines in values.items()}


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, Opaque):
        for index, part in enumerate(value.parts):
            yield ("" if isinstance(part, TensorRef | dict) else f"({index})"), part
    else:
        yield from ((f"[{index}]", inner) for index, inner in enumerate(value))


def _joined(place: str, key: str) -> str:
    if not place or not key:
        return (place or key)[:1000]
    return f"{place}{'' if key.startswith(('[', '(')) else '.'}{key}"[:1000]


def _unused(name: str, taken: dict[str, Any]) -> str:
    name = name or "tensor"
    while name in taken:
        name += "~"
    return name
