"""Shadow of an update: what the optimizer's source on disk does with copies of what the live optimizer was given.

For optimizers without a formula of their own in the judge (appraise/updates.py): L-BFGS, Muon, Adafactor, SparseAdam,
and any class of the job's or of a package. On some checked steps parameters, gradients and state are copied before the
update. After it, a *twin* runs on the copies: an object whose class is compiled from the source file, whose SHA-256 is
the one that link *code* recorded when the module was loaded. What the twin gives is compared with what the live
optimizer did, bit for bit. So the twin shows that the live code does what its source says; whether that source is the
approved one is for link *code* and the lock.

The twin never sees the live class. Names of its module are looked up in the source, one by one as they are used;
modules of the job and of torch.optim are followed the same way, other modules of torch and a few of the standard
library are taken as they are (LIVE: link *surface* compares those that matter). What could be felt outside, or makes
the result depend on more than was copied, is refused, and the value says so: talking to other ranks, files, module
state, functions held by the optimizer, compiled functions. Closures are not run again: what they returned, and the
gradients they left, are played back.

Value, under "shadow" in link *optimizer* (spec/evidence.md): either {"off": reason} or

    {"source": [[path, sha256]], "scope": "all" | name of the one tensor, "tensors": n, "elements": n,
     "calls": closure calls, "live": digest, "twin": digest, "again": digest of a second twin, where they differ,
     "covers": [tensor i of link *optimizer*], "values": blob of the twin's weights at their places,
     "differ": [{"name", "what", "differ", "of", "at", "before", "live", "twin"}] at most 4}

Nothing of the job is written to: copies are made with the generators left as they are, and should a twin draw random
numbers all the same, the generators are put back.
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import os
import sys
import threading
import time
import types
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

from . import audit, code, facts, sample

if TYPE_CHECKING:
    from .engine import Entry, Step, Track

REFERENCES = (
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.sgd.SGD",
    "torch.optim.adagrad.Adagrad",
    "torch.optim.rmsprop.RMSprop",
    "torch.optim.adadelta.Adadelta",
    "torch.optim.nadam.NAdam",
    "torch.optim.radam.RAdam",
    "torch.optim.adamax.Adamax",
    "torch.optim.asgd.ASGD",
    "torch.optim.rprop.Rprop",
)
"""Classes whose update the judge computes itself (appraise/updates.py: the same names; a test holds it)."""

ALL_ELEMENTS = 1 << 17
"""Up to so many elements in all, every tensor of the optimizer is repeated."""

ONE_ELEMENTS = 1 << 20
"""Beyond that, one tensor of the step's sample, which may have so many."""

COUPLED_ELEMENTS = 1 << 21
"""Where one tensor's update depends on others (or a closure is called): all of them, up to so many."""

COPY_BYTES = 64 << 20
"""Copies of one step take no more than this; a step that needs more is not repeated."""

SHARE = 0.3
"""Part of the guard's budget that shadows may take."""

SOURCE_BYTES = 1 << 20
CALLS_LIMIT = 64
DIFFER_LIMIT = 4
PLACES = 8
NAMES = 32

_USUAL = """math cmath typing typing_extensions collections functools itertools operator copy abc enum dataclasses
contextlib types numbers numpy heapq bisect statistics fractions decimal string re inspect __future__"""
LIVE = tuple(_USUAL.split())
"""Modules of the standard library that twins use as they are; and torch, but for torch.optim."""

QUIET = ("warnings", "logging")
"""Modules of which a twin gets one that does nothing: nobody is told a thing twice."""

RANKS = ("is_available", "is_initialized", "get_world_size", "get_rank")
"""What a twin may ask torch.distributed."""

NOT_OF_TORCH = ("save", "load", "compile", "manual_seed", "seed", "set_rng_state", "fork", "_dynamo", "_inductor")
NOT_BUILTIN = ("open", "input", "exec", "eval", "compile", "breakpoint", "exit", "quit", "help", "globals", "vars")


class Refused(Exception):
    """Why a step cannot be repeated; a sentence."""


# -- the source --------------------------------------------------------------------------------------------------------


class Source:
    """The definitions in one source file, whose bytes are those that were loaded."""

    def __init__(self, name: str, path: str, data: bytes) -> None:
        self.name = name
        self.path = path
        self.digest = hashlib.sha256(data).hexdigest()
        self.tree = facts.parse(data)
        self.defs: Dict[str, List[Any]] = {}
        self.imports: Dict[str, List[Tuple[Any, Any]]] = {}
        self.values: Dict[str, List[Any]] = {}
        self.patched: Set[str] = set()
        """Names of which an attribute is set anywhere in the file: the class is not what its body says."""
        self._collect(self.tree.body)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
                if isinstance(node.value, ast.Name) and node.attr not in ("__doc__", "__module__", "__name__"):
                    self.patched.add(node.value.id)
            elif isinstance(node, ast.Call) and _sets_attribute(node):
                self.patched.add(node.args[0].id)  # type: ignore[attr-defined]

    def _collect(self, body: List[Any]) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                self.defs.setdefault(node.name, []).append(node)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    bound = alias.asname or alias.name.split(".")[0]
                    self.imports.setdefault(bound, []).append((node, alias))
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    for each in ast.walk(target):
                        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                            self.values.setdefault(each.id, []).append(node if target is each else None)
            elif isinstance(node, (ast.AnnAssign, ast.AugAssign)) and isinstance(node.target, ast.Name):
                self.values.setdefault(node.target.id, []).append(node if isinstance(node, ast.AnnAssign) else None)
            for inner in ("body", "orelse", "finalbody"):
                if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
                    self._collect(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                self._collect(handler.body)

    def definition(self, qualname: str) -> Any:
        """The class statement of that qualified name, in a function or not. Raises Refused."""
        body: List[Any] = self.tree.body
        found: Any = None
        for part in [part for part in qualname.split(".") if part != "<locals>"]:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            same = [n for top in body for n in _statements(top) if isinstance(n, kinds) and n.name == part]
            if len(same) != 1:
                raise Refused("its source defines %s %d times" % (part, len(same)))
            found, body = same[0], same[0].body
        if not isinstance(found, ast.ClassDef):
            raise Refused("its source has no class %s" % qualname)
        return found


def _sets_attribute(node: ast.Call) -> bool:
    """Whether it is setattr(NAME, …)."""
    named = isinstance(node.func, ast.Name) and node.func.id == "setattr"
    return named and bool(node.args) and isinstance(node.args[0], ast.Name)


def _statements(node: Any) -> Iterator[Any]:
    """`node` and the statements inside it, but not inside its functions and classes."""
    yield node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (ast.stmt, ast.excepthandler)):
            for each in _statements(inner):
                yield each


class Space(dict):  # type: ignore[type-arg]
    """The global names of one module, each made from its source at first use."""

    def __init__(self, twins: "Twins", source: Source) -> None:
        super().__init__()
        self.twins = twins
        self.source = source
        self["__name__"] = source.name
        self["__file__"] = source.path
        self["__package__"] = getattr(sys.modules.get(source.name), "__package__", None)
        self["__builtins__"] = twins.builtins

    def __missing__(self, name: str) -> Any:
        value = self.twins.resolve(self, name)
        self[name] = value
        return value


class Twins:
    """Classes made anew from their source. One of these per process; what it made is kept."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.spaces: Dict[str, Space] = {}
        self.classes: Dict[Any, Any] = {}
        """Live class → twin, or the reason there is none."""
        self.builtins = dict(vars(builtins))
        for name in NOT_BUILTIN:
            self.builtins[name] = _refusing("it calls %s" % name)
        self.builtins["print"] = _nothing
        self.builtins["__import__"] = self._import

    def class_of(self, kind: Any) -> Any:
        """The twin of a class. Raises Refused."""
        if kind not in self.classes:
            try:
                self.classes[kind] = self._made(kind)
            except Refused as refused:
                self.classes[kind] = str(refused)
            except Exception as error:
                self.classes[kind] = "its source does not run by itself: %s: %s" % (type(error).__name__, error)
        found = self.classes[kind]
        if found is kind:
            found = "its class cannot be told from the live one"
        if isinstance(found, str):
            raise Refused(found)
        return found

    def sources(self) -> List[List[str]]:
        """[path, SHA-256] of every source that was used."""
        return sorted([space.source.path, space.source.digest] for space in self.spaces.values())

    def _made(self, kind: Any) -> Any:
        space = self.space(kind.__module__)
        source = space.source
        if kind.__qualname__ in source.defs or kind.__qualname__ in source.imports:
            return space[kind.__qualname__]
        node = space.source.definition(kind.__qualname__)
        return self._run(space, node)

    def space(self, name: str) -> Space:
        """The names of one module. Raises Refused where its source is not what was loaded."""
        known = self.spaces.get(name)
        if known is not None:
            return known
        module = sys.modules.get(name)
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py"):
            raise Refused("%s has no source file" % name)
        path = os.path.abspath(path)
        try:
            with open(path, "rb") as file:
                data = file.read(SOURCE_BYTES + 1)
        except OSError:
            raise Refused("the source of %s cannot be read" % name) from None
        if len(data) > SOURCE_BYTES:
            raise Refused("the source of %s is larger than %d bytes" % (name, SOURCE_BYTES))
        loaded = code.current()
        if loaded is not None and loaded.known.get(path) != hashlib.sha256(data).hexdigest():
            raise Refused("the source of %s is not the one that was loaded" % name)
        made = self.spaces[name] = Space(self, Source(name, path, data))
        return made

    # -- names ------------------------------------------------------------------------------------------------

    def resolve(self, space: Space, name: str) -> Any:
        """What a global name of a module stands for. Raises KeyError for none (a builtin), Refused for a bad one."""
        source = space.source
        found = [*source.defs.get(name, ()), *source.imports.get(name, ()), *source.values.get(name, ())]
        if not found:
            raise KeyError(name)
        if len(found) > 1:
            return self._live(space, name)
        if name in source.defs:
            return self._run(space, source.defs[name][0])
        if name in source.imports:
            node, alias = source.imports[name][0]
            if isinstance(node, ast.Import):
                return self.module(alias.name if alias.asname else alias.name.split(".")[0])
            return self._from(_absolute(space["__package__"], node.module, node.level), alias.name)
        return self._value(space, name, source.values[name][0])

    def module(self, name: str) -> Any:
        """A module as twins see it. Raises Refused."""
        top = name.split(".")[0]
        if top in QUIET:
            return _QUIET
        if name == "torch" or (top == "torch" and not name.startswith("torch.optim")):
            if name.startswith("torch.distributed"):
                return _Part(sys.modules["torch.distributed"], RANKS)
            return _Torch(self) if name == "torch" else sys.modules[name]
        if top in LIVE or name == "torch.optim.optimizer":
            return sys.modules[name]
        if name not in sys.modules:
            raise Refused("it imports %s, which is not loaded" % name)
        return _Module(self, name)

    def _from(self, module: str, name: str) -> Any:
        held = self.module(module)
        try:
            return getattr(held, name)
        except AttributeError:
            return self.module("%s.%s" % (module, name))

    def attribute(self, module: str, name: str) -> Any:
        """`module.name`, for a module that is followed by its source."""
        inner = "%s.%s" % (module, name)
        if inner in sys.modules and (_nowhere(module) or name not in self.space(module).source.imports):
            return self.module(inner)
        try:
            return self.space(module)[name]
        except KeyError:
            raise AttributeError(name) from None

    def _value(self, space: Space, name: str, node: Any) -> Any:
        """A name bound by an assignment: computed from the source where that is all constants, else as it is."""
        value = getattr(node, "value", None)
        if value is not None and _constant(value):
            expression = ast.fix_missing_locations(ast.Expression(body=value))
            return eval(compile(expression, space.source.path, "eval"), {"__builtins__": {}})  # noqa: S307
        return self._live(space, name)

    def _live(self, space: Space, name: str) -> Any:
        """A name that the source does not settle: taken as it is, if nothing can be felt through it."""
        value = vars(sys.modules[space.source.name]).get(name)
        home = str(getattr(value, "__module__", ""))
        if home == "logging":
            return _QUIET
        torch = self.torch
        plain = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
        if isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)):
            return value
        if isinstance(value, type(sys)):
            return self.module(value.__name__)
        if isinstance(value, type) and torch.optim.Optimizer in value.__mro__:
            raise Refused("its source does not settle what %s is" % name)
        if isinstance(value, type) and (home.split(".")[0] in (*LIVE, "torch", "builtins")):
            return value
        if home == "typing" or type(value).__module__ == "typing":
            return value
        raise Refused("its result depends on %s, which its source does not settle" % name)

    def _import(self, name: str, names: Any = None, local: Any = None, given: Any = (), level: int = 0) -> Any:
        """`__import__` for twins: what is loaded already, as twins see it."""
        package = (names or {}).get("__package__")
        full = _absolute(package, name, level)
        if given:
            self.module(full)
            return self.module(full)
        return self.module(full.split(".")[0])

    # -- definitions ------------------------------------------------------------------------------------------

    def _run(self, space: Space, node: Any) -> Any:
        """Execute one definition, without annotations and without what only concerns compilers."""
        if isinstance(node, ast.ClassDef) and node.name in space.source.patched:
            raise Refused("its source sets attributes of %s" % node.name)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Global):
                raise Refused("it keeps state in its module")
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _of_class(inner.value):
                raise Refused("it keeps state in its class")
        node = _Bare().visit(copy.deepcopy(node))
        for name in _used_by_body(node):
            try:
                space[name]
            except KeyError:
                pass
        tree = ast.fix_missing_locations(ast.Module(body=[node], type_ignores=[]))
        exec(compile(tree, space.source.path, "exec"), space)  # noqa: S102 - the source that the job itself runs
        return space[node.name]


def _nowhere(name: str) -> bool:
    """Whether a module has no file: a namespace package."""
    return getattr(sys.modules.get(name), "__file__", None) is None


class _Bare(ast.NodeTransformer):
    """Takes annotations of arguments away, and decorators that keep a compiler off."""

    def visit_FunctionDef(self, node: Any) -> Any:
        """Of functions and methods alike."""
        node.returns = None
        arguments = node.args
        every = [*arguments.args, *arguments.kwonlyargs, *getattr(arguments, "posonlyargs", [])]
        for each in [*every, arguments.vararg, arguments.kwarg]:
            if each is not None:
                each.annotation = None
        node.decorator_list = [each for each in node.decorator_list if not _for_compilers(each)]
        self.generic_visit(node)
        return node


def _for_compilers(decorator: Any) -> bool:
    names = [n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in ast.walk(decorator)]
    return any("disable_dynamo" in name for name in names)


def _used_by_body(node: Any) -> List[str]:
    """Names that a definition needs when it is executed: a class body does not ask a Space for what it lacks."""
    parts: List[Any] = list(node.decorator_list)
    if isinstance(node, ast.ClassDef):
        parts += [*node.bases, *(each.value for each in node.keywords)]
        for inner in node.body:
            if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                parts += [*inner.decorator_list, *inner.args.defaults, *filter(None, inner.args.kw_defaults)]
            elif isinstance(inner, ast.ClassDef):
                parts += [ast.Name(id=name, ctx=ast.Load()) for name in _used_by_body(inner)]
            else:
                parts.append(inner)
    else:
        parts += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    return [n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)]


def _of_class(node: Any) -> bool:
    """Whether an expression is a class as seen from inside: cls, type(self), self.__class__."""
    if isinstance(node, ast.Name):
        return node.id == "cls"
    if isinstance(node, ast.Attribute):
        return node.attr == "__class__"
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"


def _constant(node: Any) -> bool:
    allowed = (ast.Constant, ast.Tuple, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.Load)
    return all(isinstance(each, allowed) for each in ast.walk(node))


def _absolute(package: Optional[str], name: Optional[str], level: int) -> str:
    if not level:
        return name or ""
    parts = (package or "").split(".")
    base = ".".join(parts[: len(parts) - level + 1])
    return "%s.%s" % (base, name) if name else base


class _Module:
    """A module whose names are made from its source."""

    def __init__(self, twins: Twins, name: str) -> None:
        self.__dict__.update(_twins=twins, __name__=name)

    def __getattr__(self, name: str) -> Any:
        return self._twins.attribute(self.__name__, name)


class _Torch:
    """torch, but for torch.optim, which is followed by its source, and what could be felt outside."""

    def __init__(self, twins: Twins) -> None:
        self.__dict__["_twins"] = twins

    def __getattr__(self, name: str) -> Any:
        if name in NOT_OF_TORCH:
            raise Refused("it uses torch.%s" % name)
        if name in ("optim", "distributed"):
            return self._twins.module("torch." + name)
        return getattr(self._twins.torch, name)


class _Part:
    """Some names of a module; for any other the twin is given up."""

    def __init__(self, module: Any, names: Tuple[str, ...]) -> None:
        self.__dict__.update(_module=module, _names=names)

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise Refused("it uses %s.%s" % (self._module.__name__, name))
        return getattr(self._module, name)


class _Quiet:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


_QUIET = _Quiet()


class _Unknown:
    """Stands for a value that cannot be copied: whoever uses it gives the twin up."""

    def __init__(self, what: str) -> None:
        self.__dict__["_what"] = what

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Refused("its result depends on %s, which cannot be copied" % self.__dict__["_what"])

    __getattr__ = __setattr__ = __call__ = __bool__ = __iter__ = __len__ = __getitem__ = __setitem__ = _refuse
    __eq__ = __ne__ = __lt__ = __gt__ = __add__ = __mul__ = __float__ = __int__ = __contains__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """print, for twins."""


def _refusing(reason: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Refused(reason)

    return refuse


# -- copies ------------------------------------------------------------------------------------------------------------


class Copier:
    """Copies values and remembers what it copied, so that what was one thing stays one thing."""

    def __init__(self, torch: Any, twins: Optional[Twins]) -> None:
        self.torch = torch
        self.twins = twins
        """With it, optimizers become twins; without, they stay plain copies of their `__dict__`."""
        self.left = COPY_BYTES
        self.known: Dict[int, Any] = {}
        self.held: List[Any] = []

    def copy(self, value: Any, what: str, depth: int = 0) -> Any:
        """A copy of numbers, tensors and containers of them; _Unknown for anything else."""
        torch = self.torch
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return value
        if id(value) in self.known:
            return self.known[id(value)]
        if depth > 6:
            return _Unknown(what)
        if isinstance(value, torch.Tensor):
            return self._keep(value, self.tensor(value, what))
        if isinstance(value, (torch.optim.Optimizer, _Plain)):
            return self._optimizer(value, depth)
        if isinstance(value, _Unknown):
            return value
        if isinstance(value, _Named):
            return value if self.twins is None else self.twins.attribute(value.module, value.name)
        if type(value) in (dict, OrderedDict):
            made: Any = self._keep(value, type(value)())
            for key, each in value.items():
                made[self._key(key, what, depth)] = self.copy(each, "%s[%s]" % (what, _short(key)), depth + 1)
            return made
        if type(value) is defaultdict:
            made = self._keep(value, defaultdict(value.default_factory if value.default_factory is dict else None))
            for key, each in value.items():
                made[self._key(key, what, depth)] = self.copy(each, what, depth + 1)
            return made
        if type(value) is list:
            made = self._keep(value, [])
            made.extend(self.copy(each, what, depth + 1) for each in value)
            return made
        if type(value) in (tuple, set, frozenset, torch.Size) or type(value).__name__ == "deque":
            inner = [self.copy(each, what, depth + 1) for each in value]
            return self._keep(value, type(value)(inner))
        return _Unknown(what)

    def _key(self, key: Any, what: str, depth: int) -> Any:
        if isinstance(key, self.torch.Tensor) and id(key) not in self.known:
            raise Refused("its state is of tensors that were not copied")
        return self.copy(key, what, depth + 1)

    def _keep(self, value: Any, made: Any) -> Any:
        self.known[id(value)] = made
        self.held.append(value)  # no id is used twice while we know it
        return made

    def _optimizer(self, optimizer: Any, depth: int) -> Any:
        """A nested optimizer: a plain copy of what it holds, or, of such a copy, its twin."""
        if self.twins is None:
            made: Any = self._keep(optimizer, _Plain())
            made.kind_ = type(optimizer)
        else:
            made = self._keep(optimizer, object.__new__(self.twins.class_of(optimizer.kind_)))
        held = {key: value for key, value in vars(optimizer).items() if key != "kind_"}
        fill(made, held, type(optimizer) if self.twins is None else optimizer.kind_, self, depth)
        return made

    def tensor(self, value: Any, what: str) -> Any:
        """A copy at the same place within a cache line: some kernels add up in another order elsewhere."""
        torch = self.torch
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and type(value).__name__ != "Buffer":
            raise Refused("%s is a %s" % (what, type(value).__name__))
        layout = str(value.layout)
        if value.device.type == "meta" or layout not in ("torch.strided", "torch.sparse_coo"):
            raise Refused("%s is %s" % (what, layout if value.device.type != "meta" else "a meta tensor"))
        size = value.element_size() * (value.numel() if layout == "torch.strided" else value._nnz() * 64)
        self.left -= size
        if self.left < 0:
            raise Refused("copies would take more than %d MiB" % (COPY_BYTES >> 20))
        made = _aligned(torch, value.detach()) if layout == "torch.strided" else value.detach().clone()
        if isinstance(value, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=value.requires_grad)
            for key, each in vars(value).items():
                setattr(made, key, self.copy(each, "%s.%s" % (what, key), 5))
        elif value.requires_grad and value.is_leaf:
            made.requires_grad_(True)
        return made


class _Named:
    """Stands for a function of a module: a twin has that function's twin."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def _function(value: Any, kind: type) -> Any:
    """A function that an optimizer of class `kind` keeps as an attribute: by name where its own source defines it.

    Any other may have been put there from outside, and following it would say that what it does is right.
    """
    if type(value) is not types.FunctionType:
        return None
    module, name = value.__module__, value.__qualname__
    if module in {base.__module__ for base in kind.__mro__} and vars(sys.modules[module]).get(name) is value:
        return _Named(module, name)
    return None


class _Plain:
    """What a nested optimizer holds, before its twin is made."""

    kind_: Any


def _aligned(torch: Any, value: Any) -> Any:
    item = value.element_size()
    if value.device.type != "cpu" or not value.is_contiguous() or value.data_ptr() % 64 == 0:
        return value.clone()
    room = torch.empty(value.numel() + 64 // item, dtype=value.dtype)
    offset = (value.data_ptr() - room.data_ptr()) % 64
    if offset % item:
        return value.clone()
    made = room[offset // item : offset // item + value.numel()].view(value.shape)
    return made.copy_(value)


def fill(made: Any, held: Dict[str, Any], kind: type, copier: Copier, depth: int = 0) -> None:
    """Give a copy of an optimizer of class `kind` what it holds, but for hooks and methods put on the object."""
    for key, value in held.items():
        if key.startswith("_optimizer_"):
            made.__dict__[key] = type(value)()
        elif callable(value) and not isinstance(value, (copier.torch.optim.Optimizer, _Unknown)):
            if key not in ("step", "zero_grad", "_hook_for_profile"):
                made.__dict__[key] = _function(value, kind) or _Unknown("self.%s" % key)
        else:
            made.__dict__[key] = copier.copy(value, "self.%s" % key, depth + 1)


def _short(key: Any) -> str:
    return key[:40] if isinstance(key, str) else type(key).__name__


# -- one step ----------------------------------------------------------------------------------------------------------


class Before:
    """What the live optimizer was given at one step."""

    def __init__(self, step: Step, chosen: List[Entry], scope: str) -> None:
        torch = step.torch
        self.scope = scope
        self.chosen = chosen
        self.elements = sum(entry.numel for entry in chosen)
        copier = Copier(torch, None)
        for entry in chosen:
            copier.copy(entry.param, entry.name)
        self.params = [copier.known[id(entry.param)] for entry in chosen]
        self.grads = [_grad(copier, entry) for entry in chosen]
        optimizer = step.optimizer
        if scope == "all":
            plain = _Plain()
            fill(plain, vars(optimizer), type(optimizer), copier)
            self.held = vars(plain)
        else:
            self.held = _only(optimizer, chosen[0], copier)
        self.left = copier.left
        self.generators = _generators(torch)
        self.states = [each.get_state() for each in self.generators]
        self.others = _other_generators()
        self.calls: List[Tuple[Any, List[Any], str]] = []
        """Of every closure call: what it returned, the gradients it left, a digest of the weights then."""

    def called(self, step: Step, value: Any) -> None:
        """The closure has run once more."""
        if len(self.calls) >= CALLS_LIMIT:
            raise Refused("its closure is called more than %d times" % CALLS_LIMIT)
        torch = step.torch
        copier = Copier(torch, None)
        copier.left = self.left
        grads = [_grad(copier, entry) for entry in self.chosen]
        said = copier.copy(value.detach() if isinstance(value, torch.Tensor) else value, "the closure's value")
        self.left = copier.left
        self.calls.append((said, grads, digest(torch, [entry.param for entry in self.chosen])))


def _grad(copier: Copier, entry: Entry) -> Any:
    grad = entry.param.grad
    return None if grad is None else copier.tensor(grad, "the gradient of " + entry.name)


def _only(optimizer: Any, entry: Entry, copier: Copier) -> Dict[str, Any]:
    """What the optimizer holds of one tensor: its group with this tensor alone, its state, and plain settings."""
    group = optimizer.param_groups[entry.group]
    held: Dict[str, Any] = {}
    known = {id(optimizer.state), id(optimizer.param_groups)}
    for key, value in vars(optimizer).items():
        if id(value) in known or key in ("state", "param_groups"):
            continue
        if key.startswith("_optimizer_"):
            held[key] = type(value)()
        elif not callable(value):
            held[key] = _Unknown("self.%s" % key) if _big(value) else copier.copy(value, "self.%s" % key, 1)
        elif _function(value, type(optimizer)) is not None:
            held[key] = _function(value, type(optimizer))
    settings = {key: copier.copy(value, key, 1) for key, value in group.items() if key not in ("params", "param_names")}
    held["param_groups"] = [dict(settings, params=[copier.known[id(entry.param)]])]
    held["state"] = defaultdict(dict)
    if entry.param in optimizer.state:
        held["state"][copier.known[id(entry.param)]] = copier.copy(optimizer.state[entry.param], "its state", 1)
    return held


def _big(value: Any, depth: int = 0) -> bool:
    """Whether it holds parameters or optimizers, which may be other ones than the one that is copied."""
    if hasattr(value, "param_groups") or hasattr(value, "_backward_hooks"):
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return depth < 3 and any(_big(each, depth + 1) for each in inner)


class Run:
    """A twin on fresh copies of what was copied before the step."""

    def __init__(self, torch: Any, twins: Twins, kind: Any, before: Before) -> None:
        self.torch = torch
        self.before = before
        copier = Copier(torch, twins)
        copier.left = max(before.left, COPY_BYTES // 2)
        for param in before.params:
            copier.copy(param, "a parameter")
        self.params = [copier.known[id(param)] for param in before.params]
        self._give(before.grads)
        self.twin = object.__new__(twins.class_of(kind))
        for key, value in before.held.items():
            self.twin.__dict__[key] = copier.copy(value, "self.%s" % key, 1)
        self.turn = 0
        self.off_course: Optional[int] = None
        """The first closure call at which the twin's weights were not the live ones."""

    def go(self) -> None:
        """Run its step. Raises Refused, or whatever it raises."""
        with self.torch.enable_grad():
            if self.before.calls:
                type(self.twin).step(self.twin, self._closure)
            else:
                type(self.twin).step(self.twin)

    def _closure(self) -> Any:
        if self.turn >= len(self.before.calls):
            self.off_course = self.turn if self.off_course is None else self.off_course
            raise Refused("it calls its closure more often than the live one did")
        value, grads, weights = self.before.calls[self.turn]
        if self.off_course is None and digest(self.torch, self.params) != weights:
            self.off_course = self.turn
        self.turn += 1
        self._give(grads)
        return value.clone() if isinstance(value, self.torch.Tensor) else value

    def _give(self, grads: List[Any]) -> None:
        for param, grad in zip(self.params, grads):
            param.grad = None if grad is None else grad.clone()

    def leaves(self) -> Iterator[Tuple[int, str, Any]]:
        """(tensor, "weight" or state key, value) of all that the step may have changed."""
        return leaves(self.params, self.twin.state)


def leaves(params: List[Any], state: Any) -> Iterator[Tuple[int, str, Any]]:
    """(tensor, "weight" or state key, tensor or number): weights first, then states, in the order they were made."""
    for number, param in enumerate(params):
        yield number, "weight", param.detach()
    for number, param in enumerate(params):
        held = state.get(param) if hasattr(state, "get") else None
        for key, value in (held or {}).items() if isinstance(held, dict) else ():
            for name, leaf in _inside(str(key), value, 0):
                yield number, name, leaf


def _inside(name: str, value: Any, depth: int) -> Iterator[Tuple[str, Any]]:
    if hasattr(value, "_version") or isinstance(value, (bool, int, float)):
        yield name, value
    elif isinstance(value, (list, tuple)) and depth < 3:
        for number, each in enumerate(value):
            for leaf in _inside("%s[%d]" % (name, number), each, depth + 1):
                yield leaf


def digest(torch: Any, values: List[Any]) -> str:
    """8 bytes of BLAKE2b, hex, over type, shape and the 64-bit sum over the bytes of each value."""
    sink = hashlib.blake2b(digest_size=8)
    for value in values:
        if not hasattr(value, "_version"):
            sink.update(repr(value).encode())
            continue
        whole = value.detach()
        if str(whole.layout) != "torch.strided":
            whole = whole.coalesce().to_dense()
        whole = whole.contiguous().reshape(-1)
        bytes_ = whole.view(torch.uint8) if whole.numel() else whole
        wide = bytes_.numel() % 8 == 0 and whole.storage_offset() * whole.element_size() % 8 == 0 and bytes_.numel()
        total = int((bytes_.view(torch.int64) if wide else bytes_).sum(dtype=torch.int64)) if bytes_.numel() else 0
        sink.update(("%s%s%d;" % (value.dtype, tuple(value.shape), total)).encode())
    return sink.hexdigest()


class Shadow:
    """Decides when a step is repeated, and repeats it. A part of link *optimizer*."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.twins: Optional[Twins] = None
        self.spent_ns = 0
        self.began_ns = time.perf_counter_ns()
        self.taken: Dict[int, Before] = {}
        self.off: Dict[int, str] = {}

    # -- before the update --------------------------------------------------------------------------------------

    def before(self, step: Step) -> None:
        """Copy what the update will be computed from, if this step is to be repeated."""
        self.taken.pop(step.opt, None)
        self.off.pop(step.opt, None)
        memory = step.track.memory.setdefault("shadow", {"needed": _needed(step), "coupled": False, "last_ns": 0})
        if not memory["needed"] or not self._affordable(step, memory):
            return
        began = time.thread_time_ns()
        inside = audit.entered()  # compiling and running the source are our doing
        try:
            chosen, scope = self._scope(step, memory)
            self._twins(step).class_of(type(step.optimizer))
            self.taken[step.opt] = Before(step, chosen, scope)
        except Refused as refused:
            self.off[step.opt] = str(refused)
        finally:
            audit.left(inside)
        memory["last_ns"] = time.thread_time_ns() - began
        self.spent_ns += memory["last_ns"]

    def called(self, step: Step, value: Any) -> None:
        """The closure has returned `value`; gradients are in place."""
        before = self.taken.get(step.opt)
        if before is None:
            return
        try:
            if before.scope != "all":
                step.track.memory["shadow"]["coupled"] = True
                raise Refused("its closure needs all tensors; they are repeated the next time")
            before.called(step, value)
        except Refused as refused:
            del self.taken[step.opt]
            self.off[step.opt] = str(refused)

    def forget(self, opt: int) -> None:
        """The optimizer is gone."""
        self.taken.pop(opt, None)
        self.off.pop(opt, None)

    def _scope(self, step: Step, memory: Dict[str, Any]) -> Tuple[List[Entry], str]:
        if step.called is None:
            raise Refused("its step() was given arguments other than a closure")
        track: Track = step.track
        total = sum(entry.numel for entry in track.entries)
        if total <= (COUPLED_ELEMENTS if memory["coupled"] else ALL_ELEMENTS):
            return track.entries, "all"
        if memory["coupled"]:
            raise Refused("its update of one tensor depends on others, and all are more than can be copied")
        for entry, _ in step.sample:
            if entry.numel <= ONE_ELEMENTS and entry.param.grad is not None:
                return [entry], entry.name
        raise Refused("the sampled tensors have more than %d elements" % ONE_ELEMENTS)

    def _affordable(self, step: Step, memory: Dict[str, Any]) -> bool:
        governor = step.engine.governor
        if governor.everything or step.index <= 2:
            return True
        elapsed = time.perf_counter_ns() - self.began_ns
        allowed = SHARE * (governor.credit_ns + governor.share * elapsed)
        return bool(self.spent_ns + memory["last_ns"] <= allowed)

    def _twins(self, step: Step) -> Twins:
        if self.twins is None:
            self.twins = Twins(step.torch)
        return self.twins

    # -- after the update ---------------------------------------------------------------------------------------

    def after(self, step: Step) -> Optional[Dict[str, Any]]:
        """Repeat the step and compare; None when this step is not repeated."""
        memory = step.track.memory.get("shadow")
        before = self.taken.pop(step.opt, None)
        reason = self.off.pop(step.opt, None)
        if memory is None or before is None:
            return {"off": reason[:300]} if reason is not None else None
        began = time.thread_time_ns()
        inside = audit.entered()
        try:
            return self._compare(step, before, memory)
        except Refused as refused:
            return {"off": str(refused)[:300]}
        except Exception as error:
            return {"off": "its source failed on the copies: %s: %s" % (type(error).__name__, str(error)[:200])}
        finally:
            audit.left(inside)
            cost = time.thread_time_ns() - began
            memory["last_ns"] += cost
            self.spent_ns += cost

    def _compare(self, step: Step, before: Before, memory: Dict[str, Any]) -> Dict[str, Any]:
        torch, twins = step.torch, self._twins(step)
        if before.others != _other_generators():
            raise Refused("numbers were drawn from Python's or numpy's generator during the step")
        run = self._run(step, before)
        params = [entry.param for entry in before.chosen]
        live = list(leaves(params, step.optimizer.state))
        made = list(run.leaves())
        value: Dict[str, Any] = {"source": twins.sources()[:NAMES], "scope": before.scope}
        value.update(tensors=len(params), elements=before.elements, calls=len(before.calls))
        value["live"] = digest(torch, [leaf for _, _, leaf in live])
        value["twin"] = digest(torch, [leaf for _, _, leaf in made])
        differ = list(_differences(torch, before, live, made))
        if run.off_course is not None or run.turn != len(before.calls):
            value["course"] = run.off_course if run.off_course is not None else run.turn
        if differ or value["live"] != value["twin"] or "course" in value:
            value["differ"] = differ[:DIFFER_LIMIT]
            value["again"] = digest(torch, [leaf for _, _, leaf in self._run(step, before).leaves()])
            memory["coupled"] = memory["coupled"] or before.scope != "all"
        covers = {id(entry): number for number, entry in enumerate(before.chosen)}
        value["covers"] = [i for i, (entry, _) in enumerate(step.sample) if id(entry) in covers]
        if value["covers"]:
            views = [
                sample.view(torch, run.params[covers[id(step.sample[i][0])]].detach(), step.sample[i][1])
                for i in value["covers"]
            ]
            value["values"] = sample.blob(*sample.Gathered(torch, views).raw(torch))
        return value

    def _run(self, step: Step, before: Before) -> Run:
        """A twin that has made the step, with every generator left as it was found."""
        torch = step.torch
        run = Run(torch, self._twins(step), type(step.optimizer), before)
        now = [each.get_state() for each in before.generators]
        shared = threading.active_count() > 1
        if shared and not all(torch.equal(*pair) for pair in zip(before.states, now)):
            # Found out before the twin draws: putting a generator back would take from others what they drew meanwhile.
            raise Refused("its step draws random numbers, and other threads may draw as well")
        others = _other_generators()
        local = step.engine.local
        try:
            local.twin = True
            run.go()
        finally:
            local.twin = False
            drew = [not torch.equal(each.get_state(), state) for each, state in zip(before.generators, now)]
            for each, state, moved in zip(before.generators, now, drew):
                if moved:
                    each.set_state(state)
            _put_back(others)
        if not any(drew):
            return run
        if shared or before.calls:
            raise Refused("its step draws random numbers, and other threads or its closure may draw as well")
        run = Run(torch, self._twins(step), type(step.optimizer), before)
        for each, state in zip(before.generators, before.states):
            each.set_state(state)
        try:
            local.twin = True
            run.go()
        finally:
            local.twin = False
            for each, state in zip(before.generators, now):
                each.set_state(state)
            _put_back(others)
        return run


def _needed(step: Step) -> bool:
    """Whether the judge has no formula for this optimizer: the counterpart of appraise.optimizer.reference_of."""
    kind = type(step.optimizer)
    names = ["%s.%s" % (each.__module__, each.__qualname__) for each in kind.__mro__]
    if names[0] in REFERENCES:
        return any(entry.reason == "sparse" or _sparse(entry.param.grad) for entry in step.track.entries)
    function = kind.step
    for _ in range(16):
        function = getattr(function, "__wrapped__", function)
    if not str(getattr(function, "__module__", "")).startswith("torch.optim."):
        return True
    nearest = [name for name in names if name.startswith("torch.optim.") and ".optimizer." not in name]
    return not nearest or nearest[0] not in REFERENCES


def _sparse(grad: Any) -> bool:
    return grad is not None and str(grad.layout) != "torch.strided"


def _generators(torch: Any) -> List[Any]:
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found


def _other_generators() -> List[Any]:
    found: List[Any] = []
    python, numbers = sys.modules.get("random"), sys.modules.get("numpy.random")
    found.append(python.getstate() if python is not None else None)
    if numbers is not None:
        state = numbers.get_state()
        found.append((state[0], state[1].tobytes(), *state[2:]))
    return found


def _put_back(states: List[Any]) -> None:
    """Python's and numpy's generators as they were, where they moved."""
    now = _other_generators()
    if now[0] != states[0] and states[0] is not None:
        sys.modules["random"].setstate(states[0])
    if len(now) > 1 and len(states) > 1 and now[1] != states[1]:
        numbers = sys.modules["numpy.random"]
        state = states[1]
        numbers.set_state((state[0], sys.modules["numpy"].frombuffer(state[1], dtype="uint32"), *state[2:]))


def _differences(torch: Any, before: Before, live: List[Any], made: List[Any]) -> Iterator[Dict[str, Any]]:
    """What the twin has otherwise than the live optimizer, weights first."""
    if [(n, what) for n, what, _ in live] != [(n, what) for n, what, _ in made]:
        yield {"name": "", "what": "the entries of the state", "differ": 1, "of": 1}
        known = {(n, what): leaf for n, what, leaf in made}
        pairs = [(n, what, leaf, known[n, what]) for n, what, leaf in live if (n, what) in known]
    else:
        pairs = [(n, what, leaf, other) for (n, what, leaf), (_, _, other) in zip(live, made)]
    for number, what, one, two in pairs:
        line = _difference(torch, before, number, what, one, two)
        if line is not None:
            yield line


def _difference(torch: Any, before: Before, number: int, what: str, one: Any, two: Any) -> Optional[Dict[str, Any]]:
    name = before.chosen[number].name
    if not hasattr(one, "_version") or not hasattr(two, "_version"):
        same = type(one) is type(two) and (one == two or (one != one and two != two))
        return None if same else {"name": name, "what": what, "differ": 1, "of": 1, "live": [repr(one)[:40]]}
    if one.shape != two.shape or one.dtype != two.dtype:
        return {"name": name, "what": what, "differ": 1, "of": 1, "live": ["%s %s" % (one.dtype, tuple(one.shape))]}
    a, b = one.detach().reshape(-1), two.detach().reshape(-1)
    apart = (a != b) & ~((a != a) & (b != b))
    count = int(apart.sum())
    if not count:
        return None
    distance = (a.double() - b.double()).abs().nan_to_num(nan=1e300, posinf=1e300)
    at = torch.topk(distance, min(PLACES, count)).indices
    line = {"name": name, "what": what, "differ": count, "of": a.numel(), "at": at.tolist()}
    line["live"], line["twin"] = _numbers(a[at]), _numbers(b[at])
    if what == "weight":
        start = before.params[number].detach().reshape(-1)
        line["before"] = _numbers(start[at])
        went, goes = a.double() - start.double(), b.double() - start.double()
        line["ratio"] = _number(torch.dot(went, goes) / torch.dot(goes, goes))
        line["off"] = _number((went - goes).norm() / goes.norm())
    return line


def _numbers(values: Any) -> List[Any]:
    return [_number(value) for value in values]


def _number(value: Any) -> Any:
    number = float(value)
    return number if number - number == 0 else repr(number)
