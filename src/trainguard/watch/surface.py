"""Link *surface*: what the job's calls really reach, compared with the source that was verified.

`torch.nn.utils.clip_grad_norm_` is a name. Somebody can bind another function to it, put another `__code__` into the
function, change its defaults, a constant it reads, or a method of its base class; `id()` stays the same for most of
these. So every function of the modules that decide about training (code.CRITICAL), and of the classes of the job's own
model and optimizer, is followed from its name: through decorators, closures and partials to its code objects. Those
must be the ones that our loader compiled from the bytes it hashed; defaults and constants must be what the syntax tree
of these bytes says. Later sweeps compare identities, which is cheap, and follow again only what moved.

Frames (spec/evidence.md, "sweep"):

    kind "sweep", body {"what": "surface", "checked": bindings, "code": code objects followed, "done": bool,
                        "unread": files whose source could not be had, "differ": [{"binding", "kind", "origin",
                        "function", "claims"}, …]}

kind: replaced, wrapped, code, defaults, constant or removed; guest, a function of another package under a name of torch
itself, whose own names are too many to follow; and those of steady.py, which compares with what was there
at first: values in closures, in the job's own modules, classes and settings, and what its functions hang on. Only new
differences are listed. Runs in slices of a few milliseconds after a step, when the budget has room.
"""

from __future__ import annotations

import _imp
import atexit
import functools
import os
import sys
import time
import weakref
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from . import audit, code, facts, loaders, roots, steady
from .client import Client

SLICE_NS = 8_000_000
"""Longest a sweep works at a stretch."""

FIRST_SLICE_NS = 60_000_000
"""Longest stretch at the very first step, where start-up dwarfs it."""

LAST_SLICE_NS = 200_000_000
"""Longest stretch at exit, to end a sweep that was begun."""

EVERY = 20
EVERY_OF_ALL = 10
EARLY = 5
"""A sweep begins after each of the first EARLY steps, then after every EVERY-th (with `--links all` EVERY_OF_ALL-th),
and when the process leaves."""

GUESTS = ("torch", "torch.Tensor", "torch.functional", "torch._C._nn", "torch._C._linalg")
"""Where a function of another package is told at the first sweep (kind guest): mostly native, without a source."""

REACH_LIMIT = 40
"""Functions followed from one name."""

INSTANCE_NAMES = ("forward", "__call__", "_call_impl", "step", "zero_grad", "train", "eval", "state_dict", "parameters")
"""Methods that may be hidden by an attribute of one object."""

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_Function = type(facts.read)
_Builtin = type(len)
_Cached = type(functools.lru_cache(len))
_Code = type(facts.read.__code__)
_MISSING: Any = object()


class Binding:
    """One name and what it led to when it was last followed."""

    __slots__ = ("expected", "functions", "hides", "label", "later", "name", "own", "owner", "value")

    def __init__(
        self,
        owner: Any,
        name: str,
        label: str,
        expected: Tuple[Any, ...],
        own: bool,
        hides: bool = False,
        later: bool = False,
    ) -> None:
        self.owner = owner
        """Namespace: the `__dict__` of a module, class or object."""
        self.name = name
        self.label = label
        self.expected = expected
        """Code objects one of which must be reached; empty where the source defines no function of that name."""
        self.own = own
        """Whether the name lies in the job's own code, where its own functions are at home."""
        self.hides = hides
        """Whether it is a method that a base class has as well: code without a file has no business there."""
        self.later = later
        """Whether it counts only where it leads later: the job may bind its own names as it likes, once."""
        self.value: Any = _MISSING
        self.functions: Tuple[Tuple[Any, Any, Any, Any, Any], ...] = ()
        """(function, code, defaults, keyword defaults, what its cells hold) of all that were reached."""


class Index:
    """Every code object compiled from one verified source file."""

    __slots__ = ("by_place", "classes", "facts", "functions", "ids", "module")

    def __init__(self, module_code: Any, file_facts: Optional[Dict[str, Any]]) -> None:
        self.ids: Dict[int, Any] = {}
        self.by_place: Dict[Tuple[str, int], List[Any]] = {}
        self.functions: Dict[str, Tuple[Any, ...]] = {}
        """Functions of the module's own scope, by name."""
        self.classes: Dict[str, Dict[str, Tuple[Any, ...]]] = {}
        """Methods in the body of each class of the module's own scope, by class and name."""
        self.facts = file_facts
        self.module = module_code
        self._walk(module_code)
        for inner in _nested(module_code):
            if inner.co_flags & 1:  # CO_OPTIMIZED: a function, not a class body
                self.functions[inner.co_name] = (*self.functions.get(inner.co_name, ()), inner)
            else:
                methods = self.classes.setdefault(inner.co_name, {})  # a class may stand in both branches of an `if`
                for name, found in _methods(inner).items():
                    methods[name] = (*methods.get(name, ()), *found)

    def _walk(self, parent: Any) -> None:
        for inner in _nested(parent):
            self.ids[id(inner)] = inner
            self.by_place.setdefault((inner.co_name, inner.co_firstlineno), []).append(inner)
            self._walk(inner)

    def holds(self, found: Any) -> bool:
        """Whether `found` is one of them, or equal to one of them in all it does."""
        if id(found) in self.ids:
            return True
        alike = self.by_place.get((found.co_name, found.co_firstlineno), ())
        return any(code.code_digest(one) == code.code_digest(found) for one in alike)


class Surface:
    """See the module. One instance per process, made by the engine."""

    name = "surface"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.bindings: List[Binding] = []
        self.modules: Set[str] = set()
        self.types: Set[int] = set()
        self.indexes: Dict[str, Optional[Index]] = {}
        self.constants: List[Tuple[Dict[str, Any], str, Any, str]] = []
        self.told: Set[Tuple[str, str, str]] = set()
        self.unread: Set[str] = set()
        self.followed = 0
        self._work: Optional[Iterator[None]] = None
        self._checked = 0
        self._differ: List[Dict[str, Any]] = []
        self.steady = steady.Steady(self._differs)
        self._guests_told = False
        self.places: Set[Tuple[str, str]] = set()
        """(module, name) of the job's own functions, ("", label) of those that hang on objects."""
        self.hooked: Set[int] = set()
        """Optimizers whose step was seen to run torch's hooks."""
        self.own: List[Tuple[str, Dict[str, Any], str]] = []
        """(name, namespace, file) of the job's own modules."""
        self._whole = client.settings.get("links") == "all"
        self._last: Optional[int] = None
        self._stands: Optional[Tuple[Any, int, List[Any], int]] = None
        """What the last step was of: weakly the optimizer, its index, weakly its schedules, the step's number."""
        atexit.register(self.finish)

    def before(self, step: Any) -> None:
        """Nothing to carry."""

    def after(self, step: Any) -> None:
        """Nothing for the step frame: a sweep has its own."""

    def between(self, step: Any) -> None:
        """Begin or go on with a sweep, for a few milliseconds."""
        if self._work is None:
            self._stands = (weakref.ref(step.optimizer), step.opt, _schedules(step), step.number)
            if step.number > EARLY and step.number % (EVERY_OF_ALL if self._whole else EVERY):
                return
            self._work = self._sweep(step)
        self._go_on(step.number, FIRST_SLICE_NS if step.number == 1 else SLICE_NS)

    def finish(self) -> None:
        """At exit: end the sweep that was begun, and make a last one of what is known."""
        try:
            if self._work is not None and self._last is not None:
                self._go_on(self._last, LAST_SLICE_NS)
            if self._work is None and self._last is not None and self._stands is not None:
                number = self._stands[-1]
                if number > self._last:
                    self._work = self._sweep(_Last(*self._stands))
                    self._go_on(number, LAST_SLICE_NS)
        except Exception as error:
            self.client.fault("surface.exit", error)

    def _go_on(self, number: int, slice_ns: int) -> None:
        self._last = number
        inside = audit.entered()
        deadline = time.thread_time_ns() + slice_ns
        try:
            for _ in self._work or ():
                if time.thread_time_ns() > deadline and not self._whole:
                    return
            self._work = None
            self._report(number)
        except Exception:
            self._work = None
            raise
        finally:
            audit.left(inside)

    def forked(self) -> None:
        """The child's engine makes its own links."""

    # -- one sweep ----------------------------------------------------------------------------------------------

    def _sweep(self, step: Any) -> Iterator[None]:
        """The work of one sweep, yielding wherever it may pause."""
        self._checked = 0
        for _ in self._enumerate(step):
            yield
        self.bindings = [each for each in self.bindings if not getattr(each.owner, "gone", False)]
        for number, binding in enumerate(self.bindings):
            if not self._unmoved(binding):
                self._follow(binding)
                yield
            elif number % 64 == 0:
                yield
            self._checked += 1
        for namespace, name, expected, label in self.constants:
            found = namespace.get(name, _MISSING)
            if not facts.same(expected, found):
                kind = "removed" if found is _MISSING else "constant"
                self._differs(label + "." + name, kind, None, None, repr(found)[:200], repr(expected)[:200])
            self._checked += 1
        yield
        for _ in self.steady.look(self._objects(step)):
            yield
        self._checked += self.steady.checked

    def _report(self, number: int) -> None:
        differ, self._differ = self._differ, []
        body = {
            "what": "surface",
            "checked": self._checked,
            "code": self.followed,
            "unread": sorted(self.unread)[:20],
            "differ": differ[:200],
        }
        self.client.send("sweep", body, number)

    # -- what there is to check -----------------------------------------------------------------------------------

    def _enumerate(self, step: Any) -> Iterator[None]:
        """Bindings of critical modules that were loaded since the last sweep, and of the job's own classes."""
        for name, module in list(sys.modules.items()):
            if name in self.modules or module is None:
                continue
            self.modules.add(name)
            if name.startswith(code.CRITICAL):
                self._module(name, module)
                yield
            if name.startswith(code.CRITICAL) or name in steady.WHOLE:
                self.steady.module(name, module)
                yield
            else:
                path = self._is_own(module)
                if path is not None and not any(vars(module) is table for _, table, _ in self.own):
                    self.own.append((name, vars(module), path))
        if not self._guests_told and "torch" in sys.modules:
            self._guests_told = True
            self._guests()
            yield
        for kind in _types_in_use(step):
            for base in kind.__mro__:
                if id(base) not in self.types and base is not object:
                    self._class(base)
                    yield
        for _ in self._own(step):
            yield

    def _guests(self) -> None:
        """Functions of other packages under names of torch."""
        torch = sys.modules["torch"]
        extensions = getattr(sys.modules.get("typing_extensions"), "__file__", None)  # marks what is deprecated
        homes = (os.path.dirname(os.path.abspath(torch.__file__ or "")) + os.sep, _HERE, extensions or _HERE)
        for label in GUESTS:
            owner: Any = torch
            for part in label.split(".")[1:]:
                owner = getattr(owner, part, None)
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                function = _guest(value, homes) if _callable(value) and not isinstance(value, type) else None
                if function is not None:
                    self._differs(label + "." + name, "guest", *_origin(function))

    def _own(self, step: Any) -> Iterator[None]:
        """The job's own modules, and functions that hang on its data sets, transforms and schedules."""
        for name, table, path in self.own:
            self.steady.own_module(name, table, path)
            index = self._index(path)
            for attribute, value in list(table.items()) if index is not None else ():
                if isinstance(value, type):
                    if value.__module__ == name:
                        self._class(value, later=True)
                elif attribute[:2] != "__" and _callable(value) and (name, attribute) not in self.places:
                    self.places.add((name, attribute))
                    expected = index.functions.get(attribute, ())  # type: ignore[union-attr]
                    label = name + "." + attribute
                    self.bindings.append(Binding(table, attribute, label, expected, own=True, later=True))
            yield
        for label, thing in steady.hanging(_hooks_on(step)):
            if not isinstance(thing, steady.Hung):
                self.steady.fields(thing, label)
            elif ("", label) not in self.places:
                self.places.add(("", label))
                self.bindings.append(Binding(thing, label, label, (), own=True, later=True))
        yield

    def _is_own(self, module: Any) -> Optional[str]:
        """The file of a module of the job's own; None of another's."""
        table = getattr(module, "__dict__", None)
        path = _file_of(table) if type(table) is dict else None
        loaded = code.current()
        if path is None or loaded is None or path.startswith((*loaded._libraries, _HERE)) or path not in loaded.known:
            return None
        return path

    def _module(self, name: str, module: Any) -> None:
        namespace = object.__getattribute__(module, "__dict__")
        path = _file_of(namespace)
        index = self._index(path) if path is not None else None
        if index is None:
            return
        for attribute, value in list(namespace.items()):
            if isinstance(value, type) and getattr(value, "__module__", None) == name:
                self._class(value)
            elif isinstance(value, type) and value.__module__ == "torch":
                self.steady.kind(value, own=False)  # torch.Tensor, which calls itself a class of torch
            elif attribute[:2] != "__" and _callable(value):
                self._bind(namespace, attribute, name, index.functions.get(attribute, ()))
        constants = (index.facts or {}).get("constants", {})
        for attribute, expected in constants.items():
            if attribute in namespace and attribute[:2] != "__":
                self.constants.append((namespace, attribute, expected, name))

    def _class(self, kind: type, later: bool = False) -> None:
        if id(kind) in self.types:
            return
        self.types.add(id(kind))
        module = sys.modules.get(kind.__module__)
        namespace = object.__getattribute__(module, "__dict__") if isinstance(module, type(sys)) else {}
        path = _file_of(namespace)
        index = self._index(path, module) if path is not None else None
        if index is None:
            return
        loaded = code.current()
        own = loaded is not None and not str(path).startswith(loaded._libraries)
        self.steady.kind(kind, own)
        methods = index.classes.get(kind.__qualname__, {})
        label = "%s.%s" % (kind.__module__, kind.__qualname__)
        held = vars(kind)
        for attribute in {**methods, **held}:
            value = held.get(attribute, _MISSING)
            if attribute in methods or _callable(value):
                hides = attribute[:2] != "__" and any(attribute in vars(base) for base in kind.__mro__[1:])
                self._bind(held, attribute, label, methods.get(attribute, ()), own, hides, later)

    def _bind(
        self,
        owner: Any,
        name: str,
        label: str,
        expected: Tuple[Any, ...],
        own: bool = False,
        hides: bool = False,
        later: bool = False,
    ) -> None:
        self.bindings.append(Binding(owner, name, label + "." + name, expected, own, hides, later))

    def _index(self, path: str, module: Any = None) -> Optional[Index]:
        """The code objects of a loaded file; None when its source cannot be had any more."""
        if path not in self.indexes:
            loaded = code.current()
            module_code = _frozen(module) or (None if loaded is None else loaded.code_of(path))
            if module_code is None or loaded is None:
                self.indexes[path] = None
                self.unread.add(path)
            else:
                found = loaded.facts(path)
                if found is None and path in loaded.critical:
                    self.unread.add(path)  # code can be compared, defaults and constants not
                self.indexes[path] = Index(module_code, found)
        return self.indexes[path]

    # -- following one name ---------------------------------------------------------------------------------------

    def _unmoved(self, binding: Binding) -> bool:
        """Whether everything this name led to last time is still the same objects."""
        if binding.owner.get(binding.name, _MISSING) is not binding.value or binding.value is _MISSING:
            return False
        for function, function_code, defaults, keywords, held in binding.functions:
            if function.__code__ is not function_code or function.__defaults__ is not defaults:
                return False
            if (held or function.__closure__) and not steady.same_cells(held, function):
                return False
            if keywords is not None and function.__kwdefaults__ != keywords:
                return False
        return True

    def _follow(self, binding: Binding) -> None:
        """Follow a name to every function it leads to and compare all of them."""
        value = binding.owner.get(binding.name, _MISSING)
        if binding.value is not _MISSING and isinstance(binding.value, _Builtin) and value is not binding.value:
            self._differs(binding.label, "replaced", *_origin(value))
        if value is _MISSING:
            if binding.value is not _MISSING and binding.owner:  # nothing left in it: the object itself has gone
                self._differs(binding.label, "removed", None, None)
            binding.value = value
            return
        before, binding.value = binding.value, value
        known = {id(function): (code_before, held) for function, code_before, _, _, held in binding.functions}
        kept, wrong, expected_seen = [], False, not binding.expected
        if binding.later:
            expected_seen = True
            if before is not _MISSING and value is not before and steady.origin(value) != steady.origin(before):
                self._differs(binding.label, "moved", *steady.origin(value), was=steady.origin(before)[0])
        for position, function in enumerate(reach(value)):
            self.followed += 1
            found = function.__code__
            held = steady.cells(function)
            kept.append((function, found, function.__defaults__, _copy(function.__kwdefaults__), held))
            if id(function) in known:
                code_before, held_before = known[id(function)]
                if code_before is found:
                    self._cells(binding, function, held_before, held)
                elif binding.own and code_before.co_filename != found.co_filename:
                    self._differs(binding.label, "code", *_origin(function))
            if any(found is one for one in binding.expected) or _equals_one(found, binding.expected):
                expected_seen = True
                self._defaults(binding, function, found)
            elif not self._is_verified(binding, function, found, first=position == 0):
                wrong = True
        binding.functions = tuple(kept)
        if not expected_seen and not wrong and not isinstance(value, type):
            self._differs(binding.label, "replaced", *_origin(value))

    def _cells(self, binding: Binding, function: Any, before: Tuple[Any, ...], held: Tuple[Any, ...]) -> None:
        """Tell of cells that hold something else than when this name was followed last."""
        if steady.same_cells(before, function) or len(before) != len(held):
            return
        path = os.path.abspath(function.__code__.co_filename)
        index = self._index(path)
        if index is None:
            return
        for name, one, two in zip(function.__code__.co_freevars, before, held):
            if one is not two and not (steady.is_plain(one) and facts.same(one, two)):
                self.steady.cell_moved(binding.label, function, name, one, two, index.module)

    def _is_verified(self, binding: Binding, function: Any, found: Any, *, first: bool) -> bool:
        """Whether code that is not the binding's own may stand there: verified code of the library, or of its file."""
        loaded = code.current()
        if loaded is None:
            return True
        if binding.later and found.co_filename[:1] == "<":
            return True
        if found.co_filename[:1] == "<":
            planted = first and bool(binding.expected or binding.hides)
            if planted:
                self._differs(binding.label, "replaced", *_origin(function))
            return not planted
        path = os.path.abspath(found.co_filename)
        of_library = path.startswith(loaded._libraries)
        home = _file_of(function.__globals__)
        kind = "code" if home is not None and home != path else "replaced" if first else "wrapped"
        if path not in loaded.known:
            self._differs(binding.label, kind, *_origin(function))
            return False
        index = self._index(path) if path in loaded.kept or not of_library else None
        if index is not None and not index.holds(found):
            self._differs(binding.label, "code", *_origin(function), claims=True)
            return False
        if not of_library and not binding.own:
            self._differs(binding.label, kind, *_origin(function))
            return False
        return True

    def _defaults(self, binding: Binding, function: Any, function_code: Any) -> None:
        """Are the function's defaults those that its source says, where these are literals?"""
        index = self._index(os.path.abspath(function_code.co_filename))
        known = (index.facts or {}).get("functions", {}) if index is not None else {}
        expected = known.get((function_code.co_name, function_code.co_firstlineno))
        if expected is None:
            return
        positional, keywords = expected
        found = function.__defaults__ or ()
        wrong = len(found) != len(positional) or any(
            one != facts.UNKNOWN and not facts.same(one[0], two) for one, two in zip(positional, found)
        )
        held = function.__kwdefaults__ or {}
        wrong = wrong or any(
            one != facts.UNKNOWN and not facts.same(one[0], held.get(name, _MISSING)) for name, one in keywords.items()
        )
        if wrong:
            wanted = [one[0] if one != facts.UNKNOWN else "…" for one in positional]
            place, name = _origin(function)
            self._differs(
                binding.label, "defaults", place, name, repr((found, held))[:300], repr((wanted, keywords))[:300]
            )

    # -- single objects -------------------------------------------------------------------------------------------

    def _objects(self, step: Any) -> List[Tuple[str, Any]]:
        """Methods hidden by an attribute of the optimizer or of one module; returns all of these by label."""
        things = [("optimizer[%d]" % step.opt, step.optimizer)] if step.optimizer is not None else []
        for root in roots.roots():
            things.extend(("module %s" % (name or "root"), module) for name, module in root.named_modules())
        for label, thing in things:
            self._object(thing, label)
        self._step_of(step)
        return things

    def _step_of(self, step: Any) -> None:
        """Does `optimizer.step` still run torch's hooks, as it did when the guard's ran in it?"""
        optimizer = step.optimizer
        if optimizer is None:
            return
        home = sys.modules["torch.optim.optimizer"].__file__
        found = list(reach(optimizer.step))
        hooked = any(one.__code__.co_name == "wrapper" and one.__code__.co_filename == home for one in found)
        if hooked:
            self.hooked.add(step.opt)
        elif found and step.opt in self.hooked and not _is_compiled(optimizer.step):
            self.hooked.discard(step.opt)
            self._differs("optimizer[%d].step" % step.opt, "unhooked", *_origin(found[0]))

    def _object(self, thing: Any, label: str) -> None:
        held, loaded = vars(thing), code.current()
        for attribute in INSTANCE_NAMES:
            if attribute not in held or loaded is None:
                continue
            own = [one.__code__ for one in reach(getattr(type(thing), attribute, None))]
            home = _file_of(vars(sys.modules.get(type(thing).__module__, sys)))
            for function in reach(held[attribute]):
                path = os.path.abspath(function.__code__.co_filename)
                honest = path == home or path.startswith(loaded._libraries)
                if function.__code__ in own or (honest and path in loaded.known):
                    continue  # the object's own method inside an honest wrapper, or code of its own file
                self._differs(label + "." + attribute, "replaced", *_origin(function))

    # -- findings -------------------------------------------------------------------------------------------------

    def _differs(
        self,
        label: str,
        kind: str,
        origin: Optional[str],
        function: Optional[str],
        found: Optional[str] = None,
        expected: Optional[str] = None,
        claims: bool = False,
        was: Optional[str] = None,
        stores: Optional[List[List[str]]] = None,
    ) -> None:
        key = (label, kind, origin or found or "")
        if key in self.told:
            return
        self.told.add(key)
        line: Dict[str, Any] = {"binding": label, "kind": kind, "origin": origin, "function": function}
        if found is not None or expected is not None:
            line["found"], line["expected"] = found, expected
        if claims:
            line["claims"] = True
        if was is not None:
            line["was"] = was
        if stores:
            line["stores"] = stores
        self._differ.append(line)


def _frozen(module: Any) -> Any:
    """The code of a module that lies in the interpreter itself, such as `abc`; None where it came from a file."""
    if getattr(getattr(module, "__spec__", None), "origin", None) != "frozen":
        return None
    try:
        return _imp.get_frozen_object(module.__name__)
    except ImportError:
        return None


class _Last:
    """Stands in for a step when the process leaves."""

    def __init__(self, ref: Any, opt: int, schedules: List[Any], number: int) -> None:
        self.optimizer, self.opt, self.schedules, self.number = ref(), opt, schedules, number


def _schedules(step: Any) -> List[Any]:
    """Weak references to the schedules of a step's optimizer, as link *hyperparameters* found them."""
    if isinstance(step, _Last):
        return step.schedules
    return list((step.track.memory.get("hyperparameters") or {}).get("schedulers", ()))


def _is_compiled(function: Any) -> bool:
    """torch.compile traces a step's hooks away; the record shows that its steps are not seen."""
    return hasattr(function, "_torchdynamo_orig_callable") or hasattr(function, "_torchdynamo_inline")


def _hooks_on(step: Any) -> List[Tuple[str, Any]]:
    """Objects of the job that hold functions: schedules of this optimizer, data sets of loaders seen so far."""
    things: List[Tuple[str, Any]] = []
    for number, ref in enumerate(_schedules(step)):
        things.append(("schedule %d of optimizer[%d]" % (number, step.opt), ref()))
    observer = loaders.current()
    for number, refs in list(observer.held.items()) if observer is not None else ():
        for what, ref in refs:
            things.append(("%s of loader %d" % (what, number), ref()))
    return [(label, thing) for label, thing in things if thing is not None]


def reach(value: Any) -> Iterator[Any]:
    """Every Python function that calling `value` may lead to, through wrappers, closures and partials."""
    seen: Set[int] = set()
    queue = [value]
    while queue and len(seen) < REACH_LIMIT:
        one = queue.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, _Function):
            yield one
            queue.extend(_inside(one))
        elif isinstance(one, (staticmethod, classmethod)):
            queue.append(one.__func__)
        elif isinstance(one, property):
            queue.extend(part for part in (one.fget, one.fset, one.fdel) if part is not None)
        elif isinstance(one, (functools.partial, functools.cached_property)):
            queue.append(one.func)
        elif hasattr(type(one), "__func__") and not isinstance(one, type):
            queue.append(one.__func__)
        elif isinstance(one, _Cached):
            queue.append(one.__wrapped__)


def _inside(function: Any) -> Iterator[Any]:
    """Functions held by a function: what it wraps and what its closure keeps."""
    wrapped = function.__dict__.get("__wrapped__")
    if wrapped is not None:
        yield wrapped
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:
            continue
        if isinstance(held, (_Function, functools.partial, staticmethod, classmethod)) or (
            hasattr(type(held), "__func__") and not isinstance(held, type)
        ):
            yield held


def _callable(value: Any) -> bool:
    kinds = (_Function, _Builtin, staticmethod, classmethod, property, functools.partial, functools.cached_property)
    return isinstance(value, kinds)


def _equals_one(found: Any, expected: Tuple[Any, ...]) -> bool:
    alike = [one for one in expected if (one.co_name, one.co_firstlineno) == (found.co_name, found.co_firstlineno)]
    return any(code.code_digest(one) == code.code_digest(found) for one in alike)


def _nested(parent: Any) -> List[Any]:
    return [value for value in parent.co_consts if isinstance(value, _Code)]


def _methods(body: Any) -> Dict[str, Tuple[Any, ...]]:
    """Functions in a class body, by name; private names as Python mangles them."""
    methods: Dict[str, Tuple[Any, ...]] = {}
    for inner in _nested(body):
        if inner.co_flags & 1 and inner.co_name[0] != "<":
            name = inner.co_name
            if name[:2] == "__" and name[-2:] != "__":
                name = "_%s%s" % (body.co_name.lstrip("_"), name)
            methods[name] = (*methods.get(name, ()), inner)
    return methods


def _types_in_use(step: Any) -> Set[type]:
    kinds = {type(step.optimizer)} - {type(None)}
    for root in roots.roots():
        kinds.update(type(module) for module in root.modules())
    return kinds


def _file_of(namespace: Dict[str, Any]) -> Optional[str]:
    path = namespace.get("__file__")
    return os.path.abspath(path) if isinstance(path, str) else None


def _origin(value: Any) -> Tuple[Optional[str], Optional[str]]:
    """`file:line` and qualified name of the first function behind a value."""
    for function in reach(value):
        found = function.__code__
        name = found.co_filename
        place = name if name[:1] == "<" else os.path.abspath(name)
        return "%s:%d" % (place, found.co_firstlineno), function.__qualname__
    kind = value if isinstance(value, type) else type(value)
    return None, "%s.%s" % (kind.__module__, kind.__qualname__)


def _guest(value: Any, homes: Tuple[str, ...]) -> Any:
    """The first function behind a value whose file is neither in `homes` nor in the standard library; None without."""
    for function in reach(value):
        path = os.path.abspath(function.__code__.co_filename)
        standard = path.startswith(_STANDARD) and "-packages" + os.sep not in path[len(_STANDARD) :]
        if not standard and not path.startswith(homes):
            return function
    return None


def _copy(keywords: Optional[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    return None if keywords is None else dict(keywords)
