"""A tape of one step's operators, from the weights to the scalars that backward started from, and its replay.

While a tape records, a TorchDispatchMode passes every operator on unchanged and writes down which one it was and which
tensors it got. Nothing of the job is ever run a second time: the replay executes torch's operators alone, on tensors
of its own, in float64, without gradients. So modules that count, buffers that a forward pass updates, random numbers
and collectives stay as the job left them.

What is replayed, and how:

    a tensor made before the tape     taken as it is; copied first when the job is about to write to it
    random operators                  never run: what they gave the job is kept and used again
    values that autograd cut off      (detach, no_grad, comparisons): kept from the unshifted replay, for no derivative
                                      passes through them; that it is cut off is read where the job uses the value
    custom autograd functions         the operators inside their forward; what their backward does is not looked at
    attention kernels                 softmax(q kᵀ · scale + mask) v
    reduced precision                 float64 throughout

A tape that could not be replayed faithfully has a `problem`, one clause saying why: a graph that began before it,
collectives that carry gradients, operators without a schema we know, tensor subclasses.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

NODES_LIMIT = 40_000
GRAPH_LIMIT = 20_000
SOURCES_LIMIT = 16
FRAMES_LIMIT = 96

ATTENTION = frozenset(
    "aten::_scaled_dot_product_" + kind
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
)
OVERWRITING = frozenset(
    "aten::" + name
    for name in (
        *("bernoulli_", "normal_", "uniform_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"),
        *("bernoulli", "rand_like", "randn_like", "randint_like", "multinomial", "normal", "poisson", "binomial"),
    )
)
"""Random operators whose result does not pass a gradient on to their input."""

ESTIMATING = ("aten::fake_quantize_", "aten::_fake_quantize_", "aten::fused_moving_avg_", "aten::_fused_moving_avg_")
"""Operators whose backward is an estimator by design, and no derivative."""

EMBEDDING = "aten::embedding"
EMBEDDINGS = (EMBEDDING, "aten::embedding_bag", "aten::_embedding_bag", "aten::_embedding_bag_forward_only")

NATIVE = "CppFunction"
"""Type of an autograd function that was made in native code."""

RESHAPING = ("aten::set_", "aten::resize_", "aten::resize_as_")


class Ref:
    """A tensor argument: where its value is, and whether autograd cuts it off here."""

    __slots__ = ("frozen", "slot")

    def __init__(self, slot: int, frozen: bool) -> None:
        self.slot = slot
        self.frozen = frozen


class Node:
    """One operator that ran."""

    __slots__ = ("args", "func", "inputs", "kept", "kind", "kwargs", "outputs", "targets")

    def __init__(self, func: Any, kind: "_Kind") -> None:
        self.func = func
        self.kind = kind
        self.args: Tuple[Any, ...] = ()
        self.kwargs: Dict[str, Any] = {}
        self.inputs: List[Ref] = []
        self.targets: List[int] = []
        """Slots that it writes to."""
        self.outputs: List[Optional[int]] = []
        """Slots of its results, lists flattened; None for what is no tensor."""
        self.kept: List[Any] = []
        """Results of a random operator, or the strides of an attention's."""


class Constant:
    """A tensor that was there before the tape."""

    __slots__ = ("tensor", "value", "version")

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.version = _version(tensor)
        self.value: Any = None
        """A copy, made when the job was about to write to it."""


class Root:
    """A tensor that backward started from."""

    __slots__ = ("place", "seed", "slot", "sources", "value")

    def __init__(self, slot: int, value: Any, seed: Any, place: str) -> None:
        self.slot = slot
        self.value = value
        self.seed = seed
        """The gradient it was given; None for 1."""
        self.place = place
        """`file:line` of the call of backward."""
        self.sources: List[List[str]] = []
        """[class, file:line of its backward] of custom autograd functions in its graph."""


class _Kind:
    """What there is to know of an operator before it runs."""

    __slots__ = ("aliases", "attention", "name", "names", "random", "replayable", "writes")

    def __init__(self, torch: Any, func: Any) -> None:
        schema = func._schema
        self.name = str(schema.name)
        self.names = [argument.name for argument in schema.arguments]
        self.writes = [
            number
            for number, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.aliases = any(each.alias_info is not None for each in schema.returns)
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.attention = self.name in ATTENTION
        self.replayable = self.name.startswith(("aten::", "prim::"))


class Tape:
    """Records between `start` and `stop`, in the thread that called `start`."""

    def __init__(
        self, torch: Any, fault: Callable[[str, BaseException], None], on_root: Callable[[int], None], kinds: Any
    ) -> None:
        self.torch = torch
        self.fault = fault
        self.on_root = on_root
        """Called with the index of each root when its backward has begun, before any gradient is written."""
        self.kinds: Dict[Any, _Kind] = kinds
        """What is known of operators; kept from one tape to the next."""
        self.nodes: List[Node] = []
        self.constants: Dict[int, Constant] = {}
        self.roots: List[Root] = []
        self.hooks: List[str] = []
        """`file:line` of hooks that the job put on tensors of the graph."""
        self.problem: Optional[str] = None
        self.low = False
        """Whether a value of half precision takes part."""
        self.observer: Any = None
        """Told of every node with a scalar result: watch/loss.py."""
        self.slots = 0
        self.known: Dict[int, Tuple[Any, int]] = {}
        self.parents: Dict[int, int] = {}
        self.tasks: Set[int] = set()
        self.aside = 0
        """id of the engine's frame while the mode is left for a backward pass."""
        self.stopped = False
        self.weak = sys.modules["torch.utils.weak"].TensorWeakRef
        self.plain = {torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor)}
        self.task = torch._C._current_graph_task_id
        self.forward = torch.autograd.forward_ad
        self.mode = _mode(torch, self)

    # -- the mode ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to record."""
        self.mode.__enter__()

    def stop(self) -> bool:
        """End recording; False when another mode stands above ours, so that it must be tried again later."""
        self.stopped = True
        modules = getattr(sys, "modules", None)
        if not modules or "torch.utils._python_dispatch" not in modules:
            return True  # the interpreter is ending: nothing runs under our mode any more, and its names are gone
        stack = modules["torch.utils._python_dispatch"]._get_current_dispatch_mode_stack()
        if not any(each is self.mode for each in stack):
            return True
        if stack[-1] is not self.mode:
            return False
        self.mode.__exit__(None, None, None)
        return True

    def fail(self, reason: str) -> None:
        """The tape is of no use; the first reason stands."""
        if self.problem is None:
            self.problem = reason
            self.nodes, self.known, self.constants = [], {}, {}

    # -- recording --------------------------------------------------------------------------------------------

    def enter(self, func: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[Node]:
        """Before an operator runs: its node, or None when it is not to be recorded."""
        if self.problem is not None:
            return None
        if self.task() != -1:
            self._backward()
            return None
        if getattr(self.forward, "_current_level", -1) >= 0:
            self.fail("forward-mode derivatives")
            return None
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = _Kind(self.torch, func)
        if kind.name in RESHAPING:  # how loaders hand over a batch: what it holds from now on is a new constant
            for value in self._written(kind, args, kwargs):
                self.known.pop(id(value), None)
            return None
        grad = self.torch.is_grad_enabled()
        if not grad and (not self._worth(kind, args, kwargs) or self._updated(kind, args, kwargs)):
            return None
        if kind.name == "aten::ones_like":
            self._made_grads()
        node = Node(func, kind)
        node.args = tuple(self._take(node, value, grad) for value in args)
        node.kwargs = {key: self._take(node, value, grad) for key, value in kwargs.items()}
        if not node.inputs:
            return None  # made from nothing: a constant when it is used
        if self.problem is None and not self._may(node, kind, args, kwargs, grad):
            return None
        return node if self.problem is None else None

    def leave(self, node: Node, args: Tuple[Any, ...], kwargs: Dict[str, Any], result: Any) -> None:
        """After it ran: know its results."""
        given = {id(value): value for value in _tensors((args, kwargs))}
        outputs = list(_flat(result))
        fresh = []
        for value in outputs:
            if not isinstance(value, self.torch.Tensor):
                node.outputs.append(None)
            elif id(value) in given and id(value) in self.known:
                node.outputs.append(self.known[id(value)][1])
            else:
                node.outputs.append(self._know(value))
                fresh.append(value)
        if not any(slot is not None for slot in node.outputs) and not node.targets:
            return
        if node.kind.aliases:
            for slot in node.outputs:
                if slot is not None:
                    self._unite(slot, node.inputs[0].slot)
        if node.kind.random and not node.kind.attention:
            node.kept = [value.detach().clone() if isinstance(value, self.torch.Tensor) else None for value in outputs]
        elif node.kind.attention:
            node.kept = [tuple(outputs[0].stride())]
        self.nodes.append(node)
        if len(self.nodes) > NODES_LIMIT:
            self.fail("the step has more than %d operators" % NODES_LIMIT)
        if self.observer is not None and fresh and fresh[0].dim() == 0 and fresh[0].is_floating_point():
            self.observer.scalar(self, node, fresh[0], len(self.nodes) - 1)

    def slot_of(self, tensor: Any) -> Optional[int]:
        """The slot of a tensor that the tape knows."""
        entry = self.known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _worth(self, kind: _Kind, args: Any, kwargs: Any) -> bool:
        """Whether an operator without gradients matters: it writes to what we know, or is inside a custom function."""
        if kind.writes and any(self.slot_of(value) is not None for value in self._written(kind, args, kwargs)):
            return True
        return _in_function()

    def _may(self, node: Node, kind: _Kind, args: Any, kwargs: Any, grad: bool) -> bool:
        """Whether it can be replayed; keeps a copy of what it is about to overwrite."""
        carries = any(not ref.frozen and self._alive(ref.slot) for ref in node.inputs) and grad
        if not kind.replayable:
            if carries or kind.writes:
                self.fail("%s is no operator of torch's own" % kind.name)
            return False
        if carries and self._estimates(node):
            self.fail("the backward of %s is an estimator, not a derivative" % kind.name)
            return False
        if kind.random and not kind.attention and kind.name not in OVERWRITING and kind.name != "aten::native_dropout":
            self.fail("%s draws random numbers" % kind.name)
            return False
        if kind.attention and float(self.named(node, "dropout_p", 0.0) or 0.0) > 0.0:
            self.fail("%s draws random numbers" % kind.name)
            return False
        for value in self._written(kind, args, kwargs):
            slot = self.slot_of(value)
            if slot is None:
                continue
            node.targets.append(slot)
            constant = self.constants.get(slot)
            if constant is not None and constant.value is None:
                constant.value = constant.tensor.detach().clone()
        return True

    def _estimates(self, node: Node) -> bool:
        """Whether what this operator hands back is by design another gradient than its derivative."""
        name = node.kind.name
        return name.startswith(ESTIMATING) or (
            name in EMBEDDINGS and bool(self.named(node, "scale_grad_by_freq", False))
        )

    def _updated(self, kind: _Kind, args: Any, kwargs: Any) -> bool:
        """Whether only weights are written to: another optimizer's update. New constants then."""
        written = list(self._written(kind, args, kwargs))
        if not written or not all(value.is_leaf and value.requires_grad for value in written):
            return False
        for value in written:
            slot = self.slot_of(value)
            if slot is not None:
                constant = self.constants.get(slot)
                if constant is not None and constant.value is None:
                    constant.value = value.detach().clone()
                del self.known[id(value)]
        return True

    def named(self, node: Node, name: str, default: Any) -> Any:
        if name in node.kwargs:
            return node.kwargs[name]
        position = node.kind.names.index(name) if name in node.kind.names else len(node.args)
        return node.args[position] if position < len(node.args) else default

    def _written(self, kind: _Kind, args: Any, kwargs: Any) -> Iterator[Any]:
        for number in kind.writes:
            value = args[number] if number < len(args) else kwargs.get(kind.names[number])
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, self.torch.Tensor):
                    yield tensor

    def _alive(self, slot: int) -> bool:
        constant = self.constants.get(slot)
        return constant is None or bool(constant.tensor.requires_grad)

    def _take(self, node: Node, value: Any, grad: bool) -> Any:
        if isinstance(value, self.torch.Tensor):
            ref = self._ref(value, grad)
            node.inputs.append(ref)
            return ref
        if isinstance(value, (list, tuple)) and value:
            return [self._take(node, each, grad) for each in value]
        return value

    def _ref(self, tensor: Any, grad: bool) -> Ref:
        if type(tensor) not in self.plain:
            self.fail("tensors of class %s" % type(tensor).__name__)
            return Ref(-1, False)
        hooks = tensor._backward_hooks
        if hooks and not tensor.is_leaf:
            self._hooked(hooks)
        slot = self.slot_of(tensor)
        if slot is not None:
            constant = self.constants.get(slot)
            if constant is None:
                return Ref(slot, grad and not tensor.requires_grad)
            if constant.value is not None or constant.version == _version(tensor):
                return Ref(slot, False)
        if str(tensor.layout) != "torch.strided":
            self.fail("sparse tensors")
        slot = self._know(tensor)
        self.constants[slot] = Constant(tensor)
        return Ref(slot, False)

    def _know(self, tensor: Any) -> int:
        slot = self.slots
        self.slots += 1
        self.known[id(tensor)] = (self.weak(tensor), slot)
        if tensor.dtype in (self.torch.bfloat16, self.torch.float16):
            self.low = True
        return slot

    def _hooked(self, hooks: Any) -> None:
        for hook in list(hooks.values())[:SOURCES_LIMIT]:
            place = place_of(getattr(hook, "__func__", hook))
            if place not in self.hooks and len(self.hooks) < SOURCES_LIMIT:
                self.hooks.append(place)

    def _unite(self, one: int, other: int) -> None:
        first, second = self.family(one), self.family(other)
        if first != second:
            self.parents[first] = second

    def family(self, slot: int) -> int:
        """One number for all slots that may share memory."""
        while slot in self.parents:
            slot = self.parents[slot]
        return slot

    # -- backward ---------------------------------------------------------------------------------------------

    def _made_grads(self) -> None:
        """torch makes the gradient 1 for what backward starts from."""
        frame: Any = sys._getframe(1)
        for _ in range(10):
            if frame is None:
                return
            if frame.f_code.co_name == "_make_grads" and frame.f_code.co_filename.endswith("autograd/__init__.py"):
                above = frame.f_back
                if above is not None and above.f_code.co_name == "backward":
                    self._follow(above)
                return
            frame = frame.f_back

    def _follow(self, frame: Any) -> None:
        """Step aside while this backward pass runs, so that it takes the very paths it takes without us.

        torch decides by modes in force how it computes some derivatives (`prod`), and hands the modes on to the threads
        of its engine. They must be gone before the engine is called, which a profile function tells.
        """
        engine = sys.modules["torch.autograd.graph"]._engine_run_backward.__code__
        caller = frame.f_code
        if sys.getprofile() is not None:
            return  # somebody else's: the mode stays in force, and _backward finds the roots

        def profile(inner: Any, event: str, _: Any) -> None:
            if event == "call" and inner.f_code is engine and not self.aside:
                self._guarded(self._aside, inner)
            elif event == "return" and inner.f_code is engine and self.aside == id(inner):
                self._guarded(self._return, inner)
            if event == "return" and inner.f_code is caller and not self.aside:
                sys.setprofile(None)

        sys.setprofile(profile)

    def _guarded(self, what: Callable[[Any], None], frame: Any) -> None:
        try:
            what(frame)
        except Exception as error:
            self.fail("recording failed: %s" % type(error).__name__)
            self.fault("tape.aside", error)

    def _aside(self, frame: Any) -> None:
        stack = sys.modules["torch.utils._python_dispatch"]._get_current_dispatch_mode_stack()
        if len(stack) == 1 and stack[0] is self.mode:
            self.mode.__exit__(None, None, None)
            self.aside = id(frame)
            if self.problem is None:
                self._from_frame(frame, _outside(frame))

    def _return(self, frame: Any) -> None:
        self.aside = 0
        sys.setprofile(None)
        if not self.stopped:
            self.mode.__enter__()

    def _backward(self) -> None:
        """The first operator of a backward pass names what it started from."""
        task = self.task()
        if task in self.tasks:
            return
        self.tasks.add(task)
        engines, place = _engine_frames()
        if len(engines) > 1:
            return  # started by a backward pass, for itself
        if engines:
            self._from_frame(engines[0], place)
        else:
            self.fail("backward was started in a way that cannot be followed")

    def _from_frame(self, frame: Any, place: str) -> None:
        given = frame.f_locals
        outputs, rest, named = given.get("t_outputs"), given.get("args"), given.get("kwargs") or {}
        if outputs is None or not rest:
            self.fail("backward was started in a way that cannot be followed")
            return
        if not named.get("accumulate_grad", False):
            return  # torch.autograd.grad: its result is nobody's .grad
        if len(rest) > 3 and rest[3]:
            self.fail("backward for some tensors only")
            return
        before = len(self.roots)
        for output, seed in zip(outputs, rest[0]):
            self._root(output, seed, place, tell=len(self.roots) == before)

    def _root(self, tensor: Any, seed: Any, place: str, tell: bool = True) -> None:
        slot = self.slot_of(tensor)
        if slot is None:
            self.fail("backward started from what was computed before the step")
            return
        root = Root(slot, tensor.detach(), seed.detach() if seed is not None else None, place)
        root.sources, native = _sources(tensor)
        if native is not None:
            self.fail("%s is in the graph, whose forward autograd does not see" % native)
        self.roots.append(root)
        if tell:
            self.on_root(len(self.roots) - 1)


class Replay:
    """Runs a tape again, as often as wanted."""

    def __init__(self, tape: Tape, roots: List[Root]) -> None:
        self.tape = tape
        self.torch = tape.torch
        self.roots = roots
        self.nodes = _needed(tape, roots)
        self.floats = {tape.torch.float16, tape.torch.bfloat16, tape.torch.float32, tape.torch.float64}
        self.last = _last_uses(self.nodes, roots)
        self.written = {slot for node in self.nodes for slot in node.targets}
        self.converted: Dict[int, Any] = {}
        self.frozen: Dict[Tuple[int, int], Any] = {}
        """(node, number of its input) → value that autograd cut off, from the unshifted run."""
        self.padding: Dict[int, Any] = {}
        """Number of an embedding among the nodes → its padding row in the unshifted run."""
        self.base = True
        self.wanted: Dict[int, Any] = {}
        """Slot → None: what the unshifted run is to keep; filled by it."""
        self.stale = self._stale()

    def _stale(self) -> Optional[str]:
        seen: Set[int] = set()
        for slot in {ref.slot for node in self.nodes for ref in node.inputs}:
            constant = self.tape.constants.get(slot)
            if constant is None:
                continue
            if constant.value is None and _version(constant.tensor) != constant.version:
                return "a tensor that was used has been written to since"
            if constant.tensor.requires_grad and id(constant.tensor) in seen:
                return "a weight was written to between two uses"
            seen.add(id(constant.tensor))
        return self._beyond()

    def _beyond(self) -> Optional[str]:
        """Whether what backward started from rests on a graph from before the tape, or one made by a backward pass."""
        reached = {
            s for s, each in self.tape.constants.items() if each.tensor.requires_grad and not each.tensor.is_leaf
        }
        if not reached:
            return None
        for node in self.nodes:
            if any(not ref.frozen and ref.slot in reached for ref in node.inputs):
                reached.update(slot for slot in (*node.outputs, *node.targets) if slot is not None)
        if any(root.slot in reached for root in self.roots):
            return "a graph that began before the step, or second derivatives"
        return None

    def weights(self) -> Dict[int, int]:
        """id of every leaf that takes part and requires a gradient → its slot."""
        used = {ref.slot for node in self.nodes for ref in node.inputs if not ref.frozen}
        held = self.tape.constants
        return {id(held[s].tensor): s for s in used if s in held and held[s].tensor.requires_grad}

    def overwritten(self) -> Dict[int, Any]:
        """Slot that an operator wrote to as a whole → the weight (a tensor) whose memory that was."""
        family = self.tape.family
        held = {
            family(slot): constant.tensor
            for slot, constant in self.tape.constants.items()
            if constant.tensor.requires_grad and constant.tensor.is_leaf
        }
        pairs = ((slot, held.get(family(slot))) for node in self.nodes for slot in node.targets)
        return {slot: weight for slot, weight in pairs if weight is not None}

    def run(self, shifts: Optional[Dict[int, Any]] = None) -> float:
        """The sum over roots, each times its seed, with `shifts` (slot → what to add) to the weights."""
        torch = self.torch
        self.base = not shifts
        env: Dict[int, Any] = {}
        for number, node in enumerate(self.nodes):
            self._step(number, node, env, shifts or {})
            for slot in self.last[number]:
                env.pop(slot, None)
        total = 0.0
        for root in self.roots:
            value = self._value(root.slot, env, shifts or {})
            if root.seed is not None:
                value = value * root.seed.to(torch.float64)
            total += float(value.sum())
        return total

    def _step(self, number: int, node: Node, env: Dict[int, Any], shifts: Dict[int, Any]) -> None:
        torch = self.torch
        counter = iter(range(len(node.inputs)))

        def fill(value: Any) -> Any:
            if isinstance(value, Ref):
                return self._argument(number, next(counter), value, node, env, shifts)
            if isinstance(value, list):
                return [fill(each) for each in value]
            if isinstance(value, torch.dtype):
                return torch.float64 if value in self.floats else value
            return value

        args = tuple(fill(value) for value in node.args)
        kwargs = {key: fill(value) for key, value in node.kwargs.items() if key not in ("pin_memory", "generator")}
        results = self._call(node, args, kwargs)
        if node.kind.name == EMBEDDING:
            self._keep_padding(number, node, args, results[0])
        for slot, value in zip(node.outputs, results):
            if slot is not None:
                env[slot] = value
                if self.base and slot in self.wanted:
                    self.wanted[slot] = value.detach().clone()

    def _keep_padding(self, number: int, node: Node, args: Tuple[Any, ...], result: Any) -> None:
        """The padding row of an embedding gets no gradient: what was looked up there is not shifted."""
        row = self.tape.named(node, "padding_idx", -1)
        if row < 0:
            return
        if self.base:
            self.padding[number] = args[0][row].clone()
        result[args[1] == row] = self.padding[number]

    def _argument(
        self, number: int, position: int, ref: Ref, node: Node, env: Dict[int, Any], shifts: Dict[int, Any]
    ) -> Any:
        value = self._value(ref.slot, env, shifts)
        if ref.frozen and ref.slot not in node.targets:
            if self.base:
                self.frozen[number, position] = value.clone() if self._may_change(ref.slot) else value
            else:
                return self.frozen.get((number, position), value)
        return value

    def _may_change(self, slot: int) -> bool:
        family = self.tape.family
        if not hasattr(self, "families"):
            self.families = {family(each) for each in self.written}
        return family(slot) in self.families

    def _value(self, slot: int, env: Dict[int, Any], shifts: Dict[int, Any]) -> Any:
        value = env.get(slot)
        if value is not None:
            return value
        constant = self.tape.constants[slot]
        value = self.converted.get(slot)
        if value is None:
            value = constant.value if constant.value is not None else constant.tensor.detach()
            if value.dtype in self.floats:
                value = value.to(self.torch.float64)
            elif value.is_complex():
                value = value.to(self.torch.complex128)
            self.converted[slot] = value
        if slot in shifts:
            value = value + shifts[slot]
        elif slot in self.written:
            value = value.clone()
        env[slot] = value
        return value

    def _call(self, node: Node, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> List[Any]:
        torch, kind = self.torch, node.kind
        if kind.attention:
            return [_attention(torch, kind, args, kwargs, node.kept[0])]
        if kind.name == "aten::native_dropout":
            mask = node.kept[1]
            rate = float(args[1])
            kept = args[0] * mask.to(torch.float64) * (0.0 if rate == 1.0 else 1.0 / (1.0 - rate))
            return [kept if args[2] is not False else args[0].clone(), mask]
        if kind.name == "aten::mkldnn_rnn_layer":
            return _recurrent(torch, dict(zip(kind.names, args), **kwargs))
        if kind.random:
            if node.targets:
                return [args[0].copy_(node.kept[0])]
            return [value.to(torch.float64) if value.dtype in self.floats else value.clone() for value in node.kept]
        if kind.name in ("aten::_softmax", "aten::_log_softmax"):
            args = (*args[:2], False)
        try:
            return list(_flat(node.func(*args, **kwargs)))
        except RuntimeError as error:
            if kind.name not in ("aten::view", "aten::_unsafe_view"):
                raise RuntimeError("%s: %s" % (kind.name, error)) from error
            return [args[0].reshape(args[1])]


def _attention(torch: Any, kind: _Kind, args: Any, kwargs: Any, strides: Tuple[int, ...]) -> Any:
    """Scaled dot-product attention by its definition."""
    given = dict(zip(kind.names, args), **kwargs)
    query, key, value = given["query"], given["key"], given["value"]
    if key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scale = given.get("scale")
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    bias = given.get("attn_mask", given.get("attn_bias"))
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    if given.get("is_causal"):
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    result = torch.softmax(scores, -1) @ value
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)


def _recurrent(torch: Any, given: Dict[str, Any]) -> List[Any]:
    """One direction of one layer of an LSTM by its definition; raises NotImplementedError for what it is not."""
    if given["mode"] != 2 or given["batch_sizes"]:
        raise NotImplementedError("this kind of recurrent layer")
    biases = (given["weight2"], given["weight3"]) if given["has_biases"] else (None, None)
    hidden, cell = given["hx_"], given["cx_"]
    steps = list(given["input"].unbind(0))
    outputs = []
    for row in reversed(steps) if given["reverse"] else steps:
        gates = torch.nn.functional.linear(row, given["weight0"], biases[0])
        gates = gates + torch.nn.functional.linear(hidden.reshape(row.shape[0], -1), given["weight1"], biases[1])
        inward, forget, fresh, outward = gates.chunk(4, -1)
        cell = torch.sigmoid(forget) * cell.reshape(row.shape[0], -1) + torch.sigmoid(inward) * torch.tanh(fresh)
        hidden = torch.sigmoid(outward) * torch.tanh(cell)
        outputs.append(hidden)
    if given["reverse"]:
        outputs.reverse()
    result = torch.stack(outputs)
    return [result, hidden.reshape(given["hx_"].shape), cell.reshape(given["cx_"].shape), torch.empty(0)]


def _needed(tape: Tape, roots: List[Root]) -> List[Node]:
    """The nodes that the roots rest on, in order."""
    family = tape.family
    wanted = {family(root.slot) for root in roots}
    kept = []
    for node in reversed(tape.nodes):
        if not any(slot is not None and family(slot) in wanted for slot in (*node.outputs, *node.targets)):
            continue
        kept.append(node)
        wanted.update(family(ref.slot) for ref in node.inputs)
    return kept[::-1]


def _last_uses(nodes: List[Node], roots: List[Root]) -> List[List[int]]:
    """For every node, the slots that nothing after it needs."""
    done = {root.slot for root in roots}
    out: List[List[int]] = []
    for node in reversed(nodes):
        mine = {ref.slot for ref in node.inputs} | {slot for slot in node.outputs if slot is not None}
        out.append([slot for slot in mine if slot not in done])
        done |= mine
    return out[::-1]


def _mode(torch: Any, tape: Tape) -> Any:
    """The dispatch mode of a tape: every operator runs once, as it would have."""

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            node = None
            try:
                node = tape.enter(func, args, kwargs)
            except Exception as error:
                tape.fail("recording failed: %s" % type(error).__name__)
                tape.fault("tape.enter", error)
            result = func(*args, **kwargs)
            if node is not None:
                try:
                    tape.leave(node, args, kwargs, result)
                except Exception as error:
                    tape.fail("recording failed: %s" % type(error).__name__)
                    tape.fault("tape.leave", error)
            return result

    return Mode()


def _in_function() -> bool:
    """Whether a custom autograd function's forward is on the stack."""
    frame: Any = sys._getframe(2)
    for _ in range(FRAMES_LIMIT):
        if frame is None:
            return False
        code = frame.f_code
        if code.co_name == "apply" and code.co_filename.endswith("autograd/function.py"):
            return True
        frame = frame.f_back
    return False


def _engine_frames() -> Tuple[List[Any], str]:
    """Frames that started a backward pass, innermost first, and the first place outside torch above the outermost."""
    frame: Any = sys._getframe(2)
    engines: List[Any] = []
    place = "?"
    folder = str(sys.modules["torch"].__file__).rsplit("/", 1)[0] + "/"
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_engine_run_backward" and code.co_filename.endswith("autograd/graph.py"):
            engines.append(frame)
            place = "?"
        elif engines and place == "?" and not code.co_filename.startswith(folder):
            place = "%s:%d" % (code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return engines, place


def _outside(frame: Any) -> str:
    """`file:line` of the innermost frame outside torch."""
    folder = str(sys.modules["torch"].__file__).rsplit("/", 1)[0] + "/"
    while frame is not None:
        if not frame.f_code.co_filename.startswith(folder):
            return "%s:%d" % (frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "?"


def _sources(tensor: Any) -> Tuple[List[List[str]], Optional[str]]:
    """Custom autograd functions in the graph of `tensor`; and one of native code, as TorchScript makes them."""
    found: List[List[str]] = []
    native: Optional[str] = None
    seen: Set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting and len(seen) < GRAPH_LIMIT:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == NATIVE:
            native = str(node.name())[:100]
        forward = getattr(type(node), "_forward_cls", None)
        if forward is not None and len(found) < SOURCES_LIMIT:
            name = "%s.%s" % (forward.__module__, forward.__qualname__)
            entry = [name, place_of(getattr(forward, "backward", None))]
            if entry not in found:
                found.append(entry)
        waiting.extend(each for each, _ in node.next_functions)
    return found, native


def place_of(function: Any) -> str:
    """`file:line` of a function's code, or `?`."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return "%s:%d" % (code.co_filename, code.co_firstlineno) if code is not None else "?"


def _version(tensor: Any) -> int:
    try:
        return int(tensor._version)
    except Exception:  # inference tensors have none, and cannot be written to
        return 0


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif hasattr(value, "_version"):
        yield value


def unsupported(torch: Any) -> Optional[str]:
    """Why this torch cannot be recorded, or None."""
    for module in ("torch.utils._python_dispatch", "torch.utils.weak"):
        if module not in sys.modules:
            return "this torch has no %s" % module
    if not hasattr(torch._C, "_current_graph_task_id") or not hasattr(torch, "Tag"):
        return "this torch is too old to be followed"
    return None
