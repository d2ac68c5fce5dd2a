"""Rules for the standard library: containers, dates, paths, enums, and instances without a constructor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trainguard.scan.rules.interface import CallRule, Kind, Refused, refuse
from trainguard.scan.values import Bag, FrozenBag, Global, Map, Object, Span, Value, is_constant, is_inert, length_of

if TYPE_CHECKING:
    from trainguard.scan.machine import Machine

ARRAY_CODES = "bBuwhHiIlLqQfd"
PATTERN_LENGTH = 4096
RATIO = re.compile(r"-?\d{1,4300}(/\d{1,4300})?\Z", re.ASCII)
FORBIDDEN_ATTRIBUTES = frozenset(("__class__", "__dict__", "__reduce__", "__reduce_ex__", "__setstate__", "__del__"))


PLACE = "relative_path"
"""The attribute that DCP's reader joins to the checkpoint's folder (torch.distributed.checkpoint, _StorageInfo)."""


def leads_out(place: str) -> bool:
    """Whether a path that is joined to a folder can end outside it."""
    return place.startswith(("/", "~")) or "\\" in place or ":" in place or ".." in place.split("/")


def attributes(machine: Machine, target: Object, state: Value) -> Value:
    """State of an ordinary instance: a dict of attribute names, or (dict, None).

    A double-underscore name may hold a constant (some libraries keep a `__version__`), never an object: that is how a
    method of the instance would be replaced. The slots half (`setattr`, so descriptors run) must be empty.
    """
    if type(state) is tuple and len(state) == 2 and state[1] is None:
        state = state[0]
    if state is None:
        return target
    check_attributes(target.origin, state)
    return target


def slots_too(machine: Machine, target: Object, state: Value) -> Value:
    """As `attributes`, for classes whose slots were reviewed: (dict or None, dict of slots), or a list of values."""
    if type(state) is tuple and len(state) == 2:
        for half in state:
            if half is not None:
                check_attributes(target.origin, half)
        return target
    if type(state) in (list, tuple):
        return target
    return attributes(machine, target, state)


def check_attributes(origin: Global, state: Value) -> None:
    """Raise Refused unless `state` is a Map of attribute names without a dunder that holds an object."""
    if type(state) is not Map:
        raise refuse("build", origin, "attributes as a dict", state)
    for key, value in zip(state[::2], state[1::2], strict=True):
        if type(key) is not str:
            raise refuse("build", origin, "attribute names as str", key)
        if key == PLACE and type(value) is str and leads_out(value):
            raise Refused("path", f"{origin.name}: reads {value[:120]!a}, which lies outside the folder")
        if key.startswith("__") and key.endswith("__") and (key in FORBIDDEN_ATTRIBUTES or not is_inert(value)):
            raise Refused("build", f"{origin.name}: state writes the attribute {key[:60]!a}")


def any_state(machine: Machine, target: Object, state: Value) -> Value:
    """State for a class whose `__setstate__` was reviewed to do nothing but store it."""
    return target


def constant_state(machine: Machine, target: Object, state: Value) -> Value:
    """State made of constants only."""
    if not is_inert(state):
        raise refuse("build", target.origin, "state made of constants", state)
    return target


def bare(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """No arguments."""
    if args:
        raise refuse("arguments", origin, "no arguments", args)
    return Object(origin)


def anything(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """Any arguments: only for names the user trusts with `call`."""
    return Object(origin)


def named_and_called(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """A name that this tier may only name, called or instantiated all the same: as unknown as one on no list."""
    machine.unlisted(origin, "call" if args else "instance")
    return Object(origin)


def one_constant(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """An enum member by value: one constant, or a tuple of constants."""
    if len(args) != 1 or not is_inert(args[0]):
        raise refuse("arguments", origin, "one constant", args)
    return Object(origin)


def constants(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """Constants only, such as Decimal('1.5') or PosixPath('a', 'b')."""
    if not all(is_constant(arg) for arg in args):
        raise refuse("arguments", origin, "constants", args)
    return Object(origin)


def date(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """datetime types: the packed bytes or integers, and a time zone object."""
    if not all(is_constant(arg) or _is_object_of(arg, "datetime.") for arg in args):
        raise refuse("arguments", origin, "constants and a time zone", args)
    return Object(origin)


def _is_object_of(value: Value, prefix: str) -> bool:
    return isinstance(value, Object) and value.origin.listed is not None and value.origin.name.startswith(prefix)


def sequence(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """list, tuple, set, frozenset: nothing or one list, tuple or set."""
    if args and (len(args) != 1 or type(args[0]) not in (list, tuple, Bag, FrozenBag)):
        raise refuse("arguments", origin, "one list", args)
    if args and origin.name in ("builtins.set", "builtins.frozenset"):
        machine.check_keys(args[0])
    return Object(origin)


def raw_bytes(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """bytes, bytearray: nothing, bytes, (text, encoding), or a list of small integers; never a length."""
    if not args and origin.name == "builtins.bytes":
        return b""
    if not args or (len(args) == 1 and _is_bytes(args[0])):
        return args[0] if args and origin.name == "builtins.bytes" else Object(origin, args[0] if args else b"")
    if len(args) == 2 and isinstance(args[0], str | Span) and type(args[1]) is str:
        return encode(machine, origin, args)
    if len(args) == 1 and type(args[0]) in (list, tuple) and all(type(item) is int for item in args[0]):
        return Object(origin)
    raise refuse("arguments", origin, "bytes, or text and an encoding", args)


def _is_bytes(value: Value) -> bool:
    """Bytes, or what one of these calls made of them; of any other object the constructor would ask a length."""
    return length_of(value) is not None or (isinstance(value, Object) and length_of(value.facts) is not None)


def encode(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """_codecs.encode(text, 'latin1'): how Python 3 writes bytes at protocols 0 to 2."""
    if len(args) != 2 or type(args[1]) is not str or args[1].lower().replace("-", "") not in ("latin1", "latin_1"):
        raise refuse("arguments", origin, "(text, 'latin1')", args)
    text = args[0]
    if type(text) is str:
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError as error:
            raise refuse("arguments", origin, "text of Latin-1 characters", args) from error
    if type(text) is Span and text.is_text:
        raw = machine.source.read(text.offset, text.length).decode("utf-8", "surrogatepass")
        machine.spend(values=len(raw) >> 6)
        try:
            raw.encode("latin-1")
        except UnicodeEncodeError as error:
            raise refuse("arguments", origin, "text of Latin-1 characters", args) from error
        return Span(text.offset, len(raw), is_text=False)
    raise refuse("arguments", origin, "(text, 'latin1')", args)


def mapping(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """OrderedDict, Counter, dict: nothing, a dict, or a list of pairs. Never a string: nothing writes one there."""
    if args and (len(args) != 1 or not (type(args[0]) is Map or _is_pairs(args[0]))):
        raise refuse("arguments", origin, "nothing, a dict or a list of pairs", args)
    made = Object(origin)
    made.filled = bool(args and args[0])
    return made


def _is_pairs(value: Value) -> bool:
    return type(value) in (list, tuple) and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in value)


def deque(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """deque: (), (items,) or (items, maxlen)."""
    fits = len(args) <= 2 and (not args or type(args[0]) in (list, tuple))
    if not fits or (len(args) == 2 and type(args[1]) not in (int, type(None))):
        raise refuse("arguments", origin, "(items, length)", args)
    return Object(origin)


def defaultdict(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """defaultdict: (factory) or (factory, dict); the factory is called later, so it must be harmless to call."""
    if len(args) > 2 or (len(args) == 2 and type(args[1]) is not Map):
        raise refuse("arguments", origin, "(factory)", args)
    factory = args[0] if args else None
    if factory is not None and not (isinstance(factory, Global) and factory.listed and factory.listed.rules.factory):
        raise refuse("arguments", origin, "a plain container type as factory", args)
    return Object(origin)


def member_by_name(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """builtins.getattr: only (listed enum, member name), as enum members pickle on some Python versions."""
    fits = len(args) == 2 and isinstance(args[0], Global) and type(args[1]) is str
    if not fits or not args[1].isidentifier() or args[1].startswith("_"):
        raise refuse("arguments", origin, "(a listed enum, a member name)", args)
    if args[0].listed is None:
        machine.unlisted(args[0], "value")
        return Object(args[0])
    if not args[0].listed.rules.enum:
        raise refuse("arguments", origin, "(a listed enum, a member name)", args)
    return Object(args[0])


def reconstruct(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """copyreg._reconstructor(class, base, state): how protocols 0 and 1 make an instance."""
    if len(args) != 3 or not isinstance(args[0], Global) or not isinstance(args[1], Global):
        raise refuse("arguments", origin, "(class, base, state)", args)
    made = instantiate(machine, args[0], ())
    base = args[1].listed
    if base is None or not base.rules.base:
        raise refuse("arguments", origin, "object or a plain container type as base", args[1])
    if args[1].name == "builtins.object" and args[2] is not None:
        raise refuse("arguments", origin, "None as the state of object", args[2])
    if not (is_inert(args[2]) or type(args[2]) in (list, tuple, Map, Bag, FrozenBag)):
        raise refuse("arguments", origin, "a plain value as base state", args[2])
    return made


def new_object(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """copyreg.__newobj__(class, *args): NEWOBJ spelled as a call."""
    if not args or not isinstance(args[0], Global):
        raise refuse("arguments", origin, "(class, …)", args)
    return instantiate(machine, args[0], args[1:])


def instantiate(machine: Machine, target: Global, args: tuple[Value, ...]) -> Value:
    """`target.__new__(target, *args)` by the rule of its kind; an unlisted target becomes unknown."""
    if target.listed is None:
        machine.unlisted(target, "instance" if not args else "call")
        return Object(target)
    if target.listed.rules.new is None:
        raise Refused("instance", f"{target.name} may not be instantiated")
    return target.listed.rules.new(machine, target, args)


def partial(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """functools.partial(function): the function must be on a list as harmless to call with anything."""
    if len(args) != 1 or not _is_harmless(args[0]):
        raise refuse("arguments", origin, "one listed plain function", args)
    return Object(origin)


def partial_state(machine: Machine, target: Object, state: Value) -> Value:
    """State of a partial: (function, args, keywords, attributes)."""
    fits = type(state) is tuple and len(state) == 4 and _is_harmless(state[0]) and type(state[1]) is tuple
    if not fits or type(state[2]) not in (Map, type(None)) or type(state[3]) not in (Map, type(None)):
        raise refuse("build", target.origin, "(listed function, args, keywords, attributes)", state)
    if state[3]:
        check_attributes(target.origin, state[3])
    return target


def _is_harmless(value: Value) -> bool:
    return isinstance(value, Global) and value.listed is not None and value.listed.kind in ("function", "factory")


def numbers(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """array.array(type code, list of numbers): how an array pickles below protocol 3."""
    if len(args) != 2 or type(args[0]) is not str or args[0] not in ARRAY_CODES:
        raise refuse("arguments", origin, "(type code, numbers)", args)
    if not (type(args[1]) is list and all(type(item) in (int, float) for item in args[1])):
        raise refuse("arguments", origin, "(type code, numbers)", args)
    return Object(origin)


def array_bytes(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """array._array_reconstructor(array.array, type code, format code, bytes)."""
    fits = len(args) == 4 and isinstance(args[0], Global) and args[0].name == "array.array"
    if not fits or args[1] not in tuple(ARRAY_CODES) or type(args[2]) is not int or length_of(args[3]) is None:
        raise refuse("arguments", origin, "(array.array, type code, format code, bytes)", args)
    return Object(origin)


def pattern(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """re._compile(text, flags): a short pattern; compiling takes time in proportion to its text."""
    if len(args) != 2 or type(args[0]) not in (str, bytes) or len(args[0]) > PATTERN_LENGTH or type(args[1]) is not int:
        raise refuse("arguments", origin, f"(at most {PATTERN_LENGTH} characters, flags)", args)
    return Object(origin)


def fraction(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """Fraction('1/3') or Fraction(1, 3); in text no exponent, which would be worked out as an integer."""
    fits = len(args) <= 2 and all(type(arg) is int or (type(arg) is str and RATIO.match(arg)) for arg in args)
    if not fits:
        raise refuse("arguments", origin, "whole numbers", args)
    return Object(origin)


def tree(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """sklearn.tree._tree.Tree(features, classes per output, outputs): two numbers and an array."""
    if len(args) != 3 or type(args[0]) is not int or type(args[2]) is not int or not isinstance(args[1], Object):
        raise refuse("arguments", origin, "(int, array, int)", args)
    return Object(origin)


def one_class(machine: Machine, origin: Global, args: tuple[Value, ...]) -> Value:
    """sklearn's newObj(class): an instance without its constructor."""
    if len(args) != 1 or not isinstance(args[0], Global) or args[0].listed is None:
        raise refuse("arguments", origin, "one listed class", args)
    if args[0].listed.kind != "sklearn_state":
        raise refuse("arguments", origin, "one of sklearn's compiled classes", args[0])
    return Object(args[0])


PLAIN: dict[str, Kind] = {
    "constant": Kind(),
    "named": Kind(call=named_and_called, new=named_and_called, state=any_state),
    "function": Kind(),
    "anything": Kind(call=anything, new=anything, state=any_state),
    "instance": Kind(call=None, new=bare, state=attributes),
    "instance_slots": Kind(new=bare, state=slots_too),
    "instance_state": Kind(new=bare, state=any_state),
    "instance_called": Kind(call=bare, new=bare, state=attributes),
    "random": Kind(call=bare, state=constant_state),
    "instance_constants": Kind(call=constants, new=constants, state=attributes),
    "dict": Kind(call=mapping, new=bare, state=attributes, items="dict", factory=True, base=True),
    "list": Kind(call=sequence, new=bare, state=attributes, items="list", factory=True, base=True),
    "sequence": Kind(call=sequence, new=sequence, state=attributes, items="set", factory=True, base=True),
    "named_tuple": Kind(new=anything),
    "text": Kind(new=constants, state=attributes),
    "dict_instance": Kind(call=mapping, new=bare, state=attributes, items="dict", base=True),
    "list_instance": Kind(call=sequence, new=bare, state=attributes, items="list", base=True),
    "sklearn_tree": Kind(call=tree, state=attributes),
    "sklearn_pairs": Kind(call=one_class),
    "sklearn_state": Kind(new=bare, state=any_state),
    "enum": Kind(call=one_constant, new=one_constant, enum=True),
    "array": Kind(call=numbers),
    "array_bytes": Kind(call=array_bytes),
    "pattern": Kind(call=pattern),
    "fraction": Kind(call=fraction, new=fraction),
    "constants": Kind(call=constants, new=constants, state=constant_state),
    "number": Kind(call=constants, new=constants, factory=True, base=True),
    "base": Kind(call=bare, new=bare, base=True),
    "date": Kind(call=date, new=date, state=constant_state),
    "bytes": Kind(call=raw_bytes, new=raw_bytes, base=True),
    "encode": Kind(call=encode),
    "deque": Kind(call=deque, new=bare, items="list", state=attributes),
    "defaultdict": Kind(call=defaultdict, new=defaultdict, items="dict", state=attributes),
    "getattr": Kind(call=member_by_name),
    "reconstructor": Kind(call=reconstruct),
    "new_object": Kind(call=new_object),
    "partial": Kind(call=partial, new=partial, state=partial_state),
}
"""Kinds for Python itself and for ordinary classes of any library."""

__all__ = ["PLAIN", "CallRule", "attributes", "instantiate"]
