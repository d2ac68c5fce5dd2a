"""Values that code reads, and that nothing honest changes while a training runs: compared from sweep to sweep.

A function can stay what it is and yet compute something else, because it reads another number: in a closure's cell, in
a constant of its module, in an attribute of its class, in a field of a configuration object, in the module that a name
leads to. Link *surface* hands over what it follows; here is remembered what was there at first, and what is not the
same any more is told (`tell`), together with where the job's own sources assign such a value: a judge weighs it.

    cell       a cell that the enclosing code binds once and for all holds another object
    value      a plain value is another: {"stores": [["file:line", "literal" | "flag" | "computed"], …]}
    moved      a name of the job's own leads to another function, class or module; {"was": "file:line"}
    replaced   a name of torch's (or of builtins, math) leads to another class, module or function
    class      an object has another class; bases: a class has other bases; added: a class hides a method of its base

Only identities and plain values are compared; no method or property of the job is called. What a container holds
(lists, dictionaries, tensors) is not looked at.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import types
import weakref
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Set, Tuple

from . import code, facts, stores

MISSING: Any = object()
PLAIN = (type(None), bool, int, float, complex, str, bytes)
TEXT_LIMIT = 500
SPACES_LIMIT = 20_000
OBJECTS_LIMIT = 300
DEPTH_LIMIT = 5
STORES_LIMIT = 8
OWN_FILES_LIMIT = 400
FILE_LIMIT_BYTES = 1 << 20

WHOLE = ("torch", "torch.functional", "torch.nn.functional", "builtins", "math", "operator", "functools")
"""Modules of which every name that leads to something callable is kept, native functions too."""

_Function, _Builtin, _Module = types.FunctionType, types.BuiltinFunctionType, types.ModuleType
SETTINGS = (("argparse", "Namespace"), ("types", "SimpleNamespace"))
"""Classes of objects that hold a job's settings, besides data classes."""

READS = frozenset(("__call__", "__getitem__", "__iter__", "get_lr"))


class Space:
    """Some names of one namespace, and what they led to at first."""

    __slots__ = ("held", "homes", "kind", "label", "own", "table")

    def __init__(self, table: Callable[[], Any], label: str, kind: str, homes: Tuple[str, ...], own: bool) -> None:
        self.table = table
        """Gives the namespace, or None where the object is no more."""
        self.label = label
        self.kind = kind
        """module, class or object"""
        self.homes = homes
        """Files whose assignments to such attributes count besides the job's own: those of its class and its bases."""
        self.own = own
        self.held: Dict[str, Any] = {}


class Kind:
    """One class: its bases and names when first seen."""

    __slots__ = ("mro", "names", "size", "type")

    def __init__(self, of: type) -> None:
        self.type = of
        self.mro = of.__mro__
        self.names = frozenset(vars(of))
        self.size = len(self.names)


class Steady:
    """See the module. `tell(line)` takes one difference."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell
        self.spaces: Dict[int, Space] = {}
        self.kinds: Dict[int, Kind] = {}
        self.objects: Dict[int, Tuple[Any, type]] = {}
        """id of an optimizer or module → weak reference, its class."""
        self.trees: Dict[str, Any] = {}
        self.once: Dict[str, Set[str]] = {}
        """Path → names that this module binds once."""
        self.own_files: Dict[str, stores.Stores] = {}
        self.checked = 0

    # -- taking things up --------------------------------------------------------------------------------------------

    def module(self, name: str, module: Any) -> None:
        """Keep the classes and modules that a library's module names; of those in WHOLE all that can be called."""
        table = object.__getattribute__(module, "__dict__")
        space = self._space(id(table), lambda: table, name, "module", (), False)
        if space is None:
            return
        kinds: Tuple[type, ...] = (type, _Module)
        if name in WHOLE:
            kinds = (type, _Module, _Function, _Builtin, types.MethodType)
        for attribute, value in list(table.items()):
            if attribute[:2] != "__" and issubclass(type(value), kinds):
                space.held[attribute] = value

    def own_module(self, name: str, table: Dict[str, Any], path: str) -> None:
        """Keep every plain value, class and module that the job's own module binds once, and fields of settings."""
        known = self.spaces.get(id(table))
        if path not in self.once:
            tree = self._tree(path)
            self.once[path] = stores.bound_once(tree) if tree is not None else set()
        once = self.once[path]
        space = known or self._space(id(table), lambda: table, name, "module", (), True)
        if space is None:
            return
        for attribute in once:
            value = table.get(attribute, MISSING)
            if attribute in space.held or value is MISSING or attribute[:2] == "__":
                continue
            if is_plain(value) or isinstance(value, (type, _Module)):
                space.held[attribute] = value
            self.settings(value, name + "." + attribute)

    def settings(self, value: Any, label: str) -> None:
        """Keep the plain fields of a data class's object, an argparse or a simple namespace."""
        kind = type(value)
        if _names(kind) in SETTINGS or "__dataclass_fields__" in _all_names(kind):
            self.fields(value, label)

    def fields(self, thing: Any, label: str) -> None:
        """Keep the plain attributes of one object."""
        table = getattr(thing, "__dict__", None)
        if type(table) is not dict:
            return
        homes = _homes(type(thing))
        try:
            ref = weakref.ref(thing)
        except TypeError:
            return
        known = self.spaces.get(id(thing))
        if known is not None and known.kind == "object" and known.table() is None:
            del self.spaces[id(thing)]
        space = self._space(id(thing), lambda: getattr(ref(), "__dict__", None), label, "object", homes, True)
        if space is not None:
            space.held = {name: value for name, value in table.items() if isinstance(name, str) and is_plain(value)}

    def kind(self, of: type, own: bool) -> None:
        """Keep a class: its bases, the methods it does not have, and its plain attributes."""
        if id(of) in self.kinds:
            return
        self.kinds[id(of)] = Kind(of)
        label = "%s.%s" % (of.__module__, of.__qualname__)
        space = self._space(id(of), lambda: vars(of), label, "class", _homes(of), own)
        if space is not None:
            space.held = {n: v for n, v in vars(of).items() if n[:2] != "__" and is_plain(v)}

    def _space(
        self, key: int, table: Callable[[], Any], label: str, kind: str, homes: Tuple[str, ...], own: bool
    ) -> Optional[Space]:
        if key in self.spaces or len(self.spaces) >= SPACES_LIMIT:
            return None
        self.spaces[key] = Space(table, label, kind, homes, own)
        return self.spaces[key]

    # -- comparing ----------------------------------------------------------------------------------------------------

    def look(self, things: List[Tuple[str, Any]]) -> Iterator[None]:
        """Compare all that is kept and tell of what moved; yields where it may pause. things: live objects by label."""
        self.checked = 0
        for space in list(self.spaces.values()):
            table = space.table()
            if table is None:
                continue
            for name, value in space.held.items():
                found = table.get(name, MISSING)
                if found is not value and not (is_plain(value) and facts.same(value, found)):
                    self._moved(space, table)
                    break
            self.checked += len(space.held)
            yield
        for kind in list(self.kinds.values()):
            self._kind_moved(kind)
        yield
        for label, thing in things:
            self._class_of(label, thing)

    def _moved(self, space: Space, table: Any) -> None:
        for name, value in list(space.held.items()):
            found = table.get(name, MISSING)
            if found is value or (is_plain(value) and facts.same(value, found)):
                continue
            label = space.label + "." + name
            if found is MISSING:
                del space.held[name]
            else:
                space.held[name] = found
            if value is None and self._filled(space, found):
                continue
            if is_plain(value) and not _leads_to_code(found):
                where = self.stored(name, space.homes)
                self.tell(
                    label, "value", where[0][0] if where else None, None, _shown(found), _shown(value), stores=where
                )
            else:
                kind = "moved" if space.own else "replaced"
                self.tell(label, kind, *origin(found), was=origin(value)[0])

    def _filled(self, space: Space, found: Any) -> bool:
        """Whether an empty field of a library's object holds a container now: what those hold is not looked at."""
        loaded = code.current()
        if loaded is None or not space.homes or is_plain(found) or found is MISSING or _leads_to_code(found):
            return False
        return space.kind == "object" and space.homes[0].startswith(loaded._libraries)

    def _kind_moved(self, kind: Kind) -> None:
        of = kind.type
        label = "%s.%s" % (of.__module__, of.__qualname__)
        if of.__mro__ != kind.mro:
            added = [one for one in of.__mro__ if one not in kind.mro]
            kind.mro = of.__mro__
            self.tell(label, "bases", *origin(added[0] if added else None))
        held = vars(of)
        if len(held) == kind.size:
            return
        for name in held.keys() - kind.names:
            value = held[name]
            hides = name[:2] != "__" or name in ("__call__", "__getattribute__", "__getattr__", "__setattr__")
            if hides and callable_like(value) and any(name in vars(base) for base in of.__mro__[1:]):
                self.tell(label + "." + name, "added", *origin(value))
        kind.names, kind.size = frozenset(held), len(held)

    def _class_of(self, label: str, thing: Any) -> None:
        known = self.objects.get(id(thing))
        if known is None or known[0]() is not thing:
            try:
                self.objects[id(thing)] = (weakref.ref(thing), type(thing))
            except TypeError:
                pass
        elif known[1] is not type(thing):
            self.objects[id(thing)] = (known[0], type(thing))
            self.tell(label + ".__class__", "class", *origin(type(thing)), was="%s.%s" % _names(known[1]))

    # -- cells --------------------------------------------------------------------------------------------------------

    def cell_moved(self, label: str, function: Any, name: str, before: Any, found: Any, module_code: Any) -> None:
        """A cell of `function` holds something else than when it was followed last."""
        if before is EMPTY or module_code is None:
            return
        if stores.is_constant_cell(module_code, function.__code__, name):
            place = "%s:%d" % (os.path.abspath(function.__code__.co_filename), function.__code__.co_firstlineno)
            label = "%s: the variable %s that it closes over" % (label, name)
            self.tell(label, "cell", place, function.__qualname__, _shown(found), _shown(before))

    # -- what sources say ---------------------------------------------------------------------------------------------

    def stored(self, name: str, homes: Tuple[str, ...]) -> List[List[str]]:
        """Where the job's own sources, or `homes`, assign an attribute of this name: [["file:line", kind], …]."""
        loaded = code.current()
        if loaded is None:
            return []
        libraries = loaded._libraries
        files = [path for path in list(loaded.known) if not path.startswith(libraries) and path[-3:] == ".py"]
        found: List[List[str]] = []
        for path in dict.fromkeys([*files[:OWN_FILES_LIMIT], *homes]):
            if path not in self.own_files:
                tree = self._tree(path)
                self.own_files[path] = stores.stores(tree) if tree is not None else {}
            found.extend(["%s:%d" % (path, line), kind] for line, kind in self.own_files[path].get(name, ()))
        # What is computed is the likelier to be honest, and a judge sees only the first.
        found.sort(key=lambda one: one[1] == stores.LITERAL)
        return found[:STORES_LIMIT]

    def _tree(self, path: str) -> Any:
        """The syntax tree of exactly the bytes that were loaded from `path`, or None."""
        loaded = code.current()
        if path not in self.trees and loaded is not None:
            self.trees[path] = None
            data = code._read(path)
            if (
                data is not None
                and len(data) <= FILE_LIMIT_BYTES
                and loaded.known.get(path) == hashlib.sha256(data).hexdigest()
            ):
                self.trees[path] = facts.parse(data)
        return self.trees.get(path)


EMPTY: Any = object()
"""What an empty cell holds, and what stands for content that is not kept."""


def cells(function: Any) -> Tuple[Any, ...]:
    """What the cells of a function hold: immutable plain values, functions and classes as they are, others by id."""
    return tuple(map(_content, function.__closure__ or ()))


def same_cells(before: Tuple[Any, ...], function: Any) -> bool:
    """Whether they hold what they did."""
    closure = function.__closure__
    if closure is None:
        return not before
    return len(before) == len(closure) and all(
        one is two or (type(one) is type(two) and is_plain(one) and facts.same(one, two))
        for one, two in zip(before, map(_content, closure))
    )


class _Id(int):
    """An object that is not kept alive."""


_ids: Dict[int, _Id] = {}


def _content(cell: Any) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:
        return EMPTY
    if is_plain(value) or isinstance(value, (_Function, type, _Builtin, types.MethodType)):
        return value
    key = id(value)
    if key not in _ids and len(_ids) < SPACES_LIMIT:
        _ids[key] = _Id(key)
    return _ids.get(key, EMPTY)


def is_plain(value: Any) -> bool:
    """None, a truth value, a number, short text, or a short tuple of these."""
    kind = type(value)
    if kind in PLAIN:
        return kind not in (str, bytes) or len(value) <= TEXT_LIMIT
    return kind is tuple and len(value) <= 16 and all(type(one) in PLAIN for one in value)


def callable_like(value: Any) -> bool:
    """A function, native function, method or descriptor of one."""
    return isinstance(value, (_Function, _Builtin, staticmethod, classmethod, property, functools.partial))


def _leads_to_code(value: Any) -> bool:
    """Whether calling it would run something: then what it is counts, and not what it says."""
    return callable_like(value) or isinstance(value, (type, _Module)) or "__call__" in _all_names(type(value))


class Hung:
    """Where a function hangs: an object that is not kept alive, and the attributes and positions from there on.

    Stands in for a namespace: `get` follows the way.
    """

    __slots__ = ("path", "ref")

    def __init__(self, ref: Any, path: Tuple[Any, ...]) -> None:
        self.ref = ref
        self.path = path

    @property
    def gone(self) -> bool:
        """Whether the object is no more."""
        return self.ref() is None

    def get(self, name: str, missing: Any = None) -> Any:
        """What hangs there now, or `missing`."""
        thing = self.ref()
        for part in self.path:
            if isinstance(part, str):
                thing = (getattr(thing, "__dict__", None) or {}).get(part, missing)
            elif not isinstance(thing, (list, tuple)) or part >= len(thing):
                return missing
            else:
                thing = thing[part]
        return thing


def hanging(roots: List[Tuple[str, Any]]) -> Iterator[Tuple[str, Any]]:
    """(label, Hung) of every function that hangs on these objects: transforms, collate functions, schedules; and
    (label, the object) of every object that was looked into. DEPTH_LIMIT deep, through short lists and tuples."""
    seen: Set[int] = set()
    waiting: List[Tuple[str, Any, int]] = [(label, thing, 0) for label, thing in roots]
    while waiting and len(seen) < OBJECTS_LIMIT:
        label, thing, depth = waiting.pop(0)
        if id(thing) in seen or depth > DEPTH_LIMIT or not _worth_a_look(thing):
            continue
        seen.add(id(thing))
        try:
            ref = weakref.ref(thing)
        except TypeError:
            continue
        yield label, thing
        table = thing.__dict__
        for name, value in list(table.items()) if len(table) <= 256 else ():
            if not isinstance(name, str):
                continue
            for path, one in _parts((name,), value, 0):
                inner = label + "".join("[%d]" % part if isinstance(part, int) else "." + part for part in path)
                if _followed(one):
                    yield inner, Hung(ref, path)
                else:
                    waiting.append((inner, one, depth + 1))


def _parts(path: Tuple[Any, ...], value: Any, depth: int) -> Iterator[Tuple[Tuple[Any, ...], Any]]:
    """A value, or what is in it where it is a short list or tuple."""
    if not isinstance(value, (list, tuple)):
        yield path, value
    elif len(value) <= 64 and depth < 2:
        for position, one in enumerate(value):
            yield from _parts((*path, position), one, depth + 1)


def _followed(value: Any) -> bool:
    return isinstance(value, (_Function, types.MethodType, functools.partial))


def _worth_a_look(value: Any) -> bool:
    """An object that is called, read by index, iterated, or steps: data sets, transforms, samplers, schedulers."""
    if isinstance(value, type) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    return not READS.isdisjoint(_all_names(type(value)))


_known_names: Dict[Any, FrozenSet[str]] = {}


def _all_names(kind: Any) -> FrozenSet[str]:
    """Names of a class and its bases, without object's."""
    known = _known_names.get(kind)
    if known is None:
        known = frozenset(name for base in kind.__mro__[:-1] for name in vars(base))
        if len(_known_names) < SPACES_LIMIT:
            _known_names[kind] = known
    return known


def origin(value: Any) -> Tuple[Optional[str], Optional[str]]:
    """(`file:line`, name) of a function, class or module; of anything else that can be called, of its type."""
    if isinstance(value, _Module):
        return _file_of(vars(value)), value.__name__
    if isinstance(value, type):
        for member in vars(value).values():
            inner = getattr(member, "__func__", member)
            if isinstance(inner, _Function) and inner.__module__ == value.__module__:
                return _place(inner), "%s.%s" % _names(value)
        return _file_of(vars(sys.modules.get(value.__module__, sys))), "%s.%s" % _names(value)
    inner = getattr(value, "__func__", value)
    inner = getattr(inner, "func", inner)
    if isinstance(inner, _Function):
        return _place(inner), inner.__qualname__
    if "__call__" in _all_names(type(value)):
        return origin(type(value))
    return None, "%s.%s" % _names(type(value))


def _place(function: Any) -> str:
    name = function.__code__.co_filename
    return "%s:%d" % (name if name[:1] == "<" else os.path.abspath(name), function.__code__.co_firstlineno)


def _homes(kind: type) -> Tuple[str, ...]:
    """Files of a class and its bases."""
    if _names(kind) in SETTINGS:
        return ()
    files = [_file_of(vars(sys.modules.get(base.__module__, sys))) for base in kind.__mro__[:8]]
    return tuple(dict.fromkeys(path for path in files if path is not None and path[-3:] == ".py"))


def _names(kind: type) -> Tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _file_of(namespace: Any) -> Optional[str]:
    path = namespace.get("__file__")
    return os.path.abspath(path) if isinstance(path, str) else None


def _shown(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    if isinstance(value, _Id) or value is EMPTY:
        return "another object"
    if is_plain(value):
        return repr(value)[:200]
    place, name = origin(value)
    return "%s at %s" % (name, place) if _leads_to_code(value) else "an object of %s" % name
