"""Replay, inner half: what can be done to one step, as small JSON values, and where (reenact.py runs them in forks).

An act is {"at": place, "do": what, …}. Places, in the order of a step:

    now             before anything of the step            front    right before the update, before our own hook
    load            a loader gives out a batch             inner    right before the update, after our own hook
    enter, leave    around the outermost call of a model   end      right after the update, before our own hook
    loss            a loss function of torch
    root, hook      at the loss, at parameters in backward
    backward        after each backward, "last" the last
    clip            torch's clipping by norm or value

and do: "weights", "grads", "state" (element by element: an *operation*, on positions "only"), "word", "setting",
"seed", "draw", "mode", "args", "batch", "target", "smooth", "times", "dropout", "autocast", "flag", "clip", "update",
"count", "no step". Operations: scale, add, divide, negate, zero, fill, round, clamp, flip, roll, sign, noise, top,
older ("back" steps, or "calls" turns across steps), shift (labels), swap. "turn" restricts enter and loss to one call.

None of this knows how a sabotage was written: an act says what became other in the step, and equality of the step's
fingerprints says whether that is what happened.
"""

from __future__ import annotations

import random
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from . import commits, lanes, points, rng

REMEMBERED = 4
"""Steps whose batches and weights are kept, for what was repeated or put back."""

KEPT_BYTES = 256 << 20
LOSSES = (
    ("torch._C._nn", "cross_entropy_loss"),
    ("torch._C._nn", "nll_loss_nd"),
    ("torch._C._nn", "mse_loss"),
    ("torch._C._nn", "l1_loss"),
    ("torch._C._nn", "smooth_l1_loss"),
    ("torch._C._nn", "huber_loss"),
    ("torch._C._nn", "binary_cross_entropy"),
    ("torch", "binary_cross_entropy_with_logits"),
    ("torch", "kl_div"),
)
"""Where torch's loss functions end: (owner, name); the target is the second argument."""

RATES = ("p", "dropout", "drop_prob", "momentum", "eps")
USUAL_RATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1e-5, 1e-6, 1e-3, 1e-8)
USUAL_SEEDS = (*range(2049), 3407, 4242, 12345, 31337, 123456, 2**31 - 1, 0xDEADBEEF)
DRAWS_LIMIT = 4_000_000
SEED_WALK_LIMIT = 2_000_000


class Stage:
    """Stands in the way of everything a step goes through: remembers in the parent, acts in a child."""

    def __init__(self, torch: Any, explorer: Any) -> None:
        self.torch = torch
        self.explorer = explorer
        self.acts: Dict[str, List[Dict[str, Any]]] = {}
        self.number = 0
        """Step to act in; 0 in the parent."""
        self.lasting = False
        self.from_step = 0
        self.inside = threading.local()
        self.on_first_call: Optional[Callable[[], None]] = None
        self.args: Dict[int, List[Tuple[Any, Any]]] = {}
        """Step → what the outermost calls of models were given in it."""
        self.targets: Dict[int, List[Any]] = {}
        self.loaded: List[Any] = []
        """Batches that loaders gave out, oldest first."""
        self.weights: Dict[int, List[Any]] = {}
        """Step → copies of all weights before it."""
        self.calls = self.losses = self.backwards = 0
        """Of the step under way."""
        self.at_update: Dict[str, Any] = {}
        self.before: Dict[int, Any] = {}
        self.states: Dict[str, Any] = {}
        self.plain_next: Any = None

    # -- what is under way -----------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step under way."""
        engine = self.explorer.warp.engine
        return int(engine.tally.steps) + 1 if engine is not None else 1

    def active(self, place: str) -> List[Dict[str, Any]]:
        """Acts to be done here and now."""
        found = self.acts.get(place)
        if not found or not self.number:
            return []
        now = self.step
        return [act for act in found if now == self.number or (act.get("lasting") and now >= self.number)]

    def entries(self, act: Dict[str, Any]) -> Iterator[Tuple[Any, Any]]:
        """(optimizer, entry) of the positions that an act is about."""
        only, opt = act.get("only"), act.get("opt")
        for number, optimizer, track in points.optimizers(self.explorer.warp.engine):
            if opt is None or number == opt:
                for entry in track.entries:
                    if only is None or entry.position in only:
                        yield optimizer, entry

    # -- listening, in the parent ----------------------------------------------------------------------------------

    def listen(self, since: int) -> None:
        """Stand around calls of models, losses and loaders; remember what passes from step `since` on."""
        self.from_step = since
        module, stage = self.torch.nn.Module, self
        plain = module.__call__

        def called(this: Any, *args: Any, **kwargs: Any) -> Any:
            return stage.call(plain, this, args, kwargs)

        module.__call__ = called

    def call(self, plain: Any, module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """One call of a module; only the outermost ones that may be trained with matter."""
        torch = self.torch
        if getattr(self.inside, "call", False) or not torch.is_grad_enabled() or self.step < self.from_step:
            return plain(module, *args, **kwargs)
        if self._in_backward():
            return plain(module, *args, **kwargs)  # activation checkpointing computes a part again
        if next(module.parameters(), None) is None:
            return plain(module, *args, **kwargs)
        first, self.on_first_call = self.on_first_call, None
        if first is not None:
            first()
        self._losses()
        self._loaders()
        self.inside.call = True
        try:
            args, kwargs = self._enter(args, kwargs)
            with self._autocast():
                result = plain(module, *args, **kwargs)
        finally:
            self.inside.call = False
        for act in self.active("leave"):
            self.do(act)
        return result

    def _in_backward(self) -> bool:
        """Whether this thread is within a backward pass; False where torch does not tell."""
        task = getattr(self.torch._C, "_current_graph_task_id", None)
        return task is not None and task() != -1

    def _enter(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        number, turn = self.step, self.calls
        self.calls += 1
        self._remember(self.args, (self._copied(args), self._copied(kwargs)))
        for act in self.active("enter"):
            if act.get("turn") not in (None, turn):
                continue
            if act["do"] == "args":
                args, kwargs = self._changed_args(act, number, turn, args, kwargs)
            elif act["do"] == "batch":
                args, kwargs = self._other_batch(act, args, kwargs)
            else:
                self.do(act)
        return args, kwargs

    def _remember(self, shelf: Dict[int, List[Any]], value: Any) -> None:
        number = self.step
        if number not in shelf:
            for old in [each for each in shelf if each < number - REMEMBERED]:
                del shelf[old]
        shelf.setdefault(number, []).append(value)

    def _older(self, shelf: Dict[int, List[Any]], act: Dict[str, Any], number: int, turn: int) -> Any:
        """What was remembered at the same turn "back" steps ago, or "calls" turns before this one, across steps."""
        if act.get("calls"):
            known = [each for step in sorted(shelf) for each in shelf[step]]
            place = len(known) - 1 - int(act["calls"])
            return known[place] if place >= 0 else None
        known = shelf.get(number - int(act.get("back", 1)), [])
        return known[turn] if turn < len(known) else None

    def _copied(self, value: Any) -> Any:
        tensor = self.torch.Tensor
        leaves, spec = self.torch.utils._pytree.tree_flatten(value)
        kept = [leaf.detach().clone() if isinstance(leaf, tensor) else leaf for leaf in leaves]
        return self.torch.utils._pytree.tree_unflatten(kept, spec)

    def _losses(self) -> None:
        """Stand around torch's losses, unless something was compiled that knows them by what they are."""
        if self.states.get("losses") or _compiled():
            return
        self.states["losses"] = True
        for owner, name in LOSSES:
            place = sys.modules.get(owner) or getattr(self.torch._C, owner.rpartition(".")[2], None)
            plain = getattr(place, name, None)
            if plain is not None:
                setattr(place, name, self._loss(plain, name))

    def _loss(self, plain: Any, name: str) -> Any:
        def loss(given: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            again = not self.torch.is_grad_enabled() or self._in_backward()
            if again or not isinstance(target, self.torch.Tensor):
                return plain(given, target, *args, **kwargs)
            turn = self.losses
            self.losses += 1
            self._remember(self.targets, target.detach().clone())
            result_by = []
            for act in self.active("loss"):
                if act.get("turn") not in (None, turn):
                    continue
                if act["do"] == "target":
                    target = self.apply(act, target, self._older(self.targets, act, self.step, turn))
                elif act["do"] == "batch":
                    target = self._from_batch(act, target)
                elif act["do"] == "smooth" and name == "cross_entropy_loss":
                    args = _with(args, 3, float(act["by"]))
                elif act["do"] == "times":
                    result_by.append(act)
                else:
                    self.do(act)
            result = plain(given, target, *args, **kwargs)
            for act in result_by:
                result = self.apply(act, result, None)
            return result

        return loss

    def _loaders(self) -> None:
        """Remember what loaders give out."""
        loaders = sys.modules.get("torch.utils.data.dataloader")
        kind = getattr(loaders, "_BaseDataLoaderIter", None)
        if kind is None or self.plain_next is not None:
            return
        plain = self.plain_next = kind.__next__
        stage = self

        def __next__(iterator: Any) -> Any:
            return stage._load(plain, iterator)

        kind.__next__ = __next__

    def _load(self, plain: Any, iterator: Any) -> Any:
        for act in self.active("load"):
            for _ in range(int(act.get("skip", 0))):
                plain(iterator)
            if act.get("repeat") and self.loaded:
                return self.loaded[-int(act["repeat"])][1]
        batch = plain(iterator)
        self.loaded.append((iterator, batch))
        del self.loaded[:-32]
        return batch

    # -- batches ---------------------------------------------------------------------------------------------------

    def _changed_args(
        self, act: Dict[str, Any], number: int, turn: int, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """The same operation on the tensors that a model is given; "leaf" chooses one of them."""
        pytree = self.torch.utils._pytree
        leaves, spec = pytree.tree_flatten((args, kwargs))
        known = self._older(self.args, act, number, turn)
        older = pytree.tree_flatten(known)[0] if known is not None else []
        place = 0
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, self.torch.Tensor):
                continue
            if act.get("leaf") in (None, place) and self._fits(act, leaf):
                leaves[at] = self.apply(act, leaf, older[at] if at < len(older) else None)
            place += 1
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    def _fits(self, act: Dict[str, Any], leaf: Any) -> bool:
        kind = act.get("kind")
        return kind is None or (kind == "float") == leaf.is_floating_point()

    def _other_batch(
        self, act: Dict[str, Any], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        pytree = self.torch.utils._pytree
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = self._ahead(act, leaves)
        if found is not None:
            now, other = found
            for at, leaf in enumerate(leaves):
                leaves[at] = _counterpart(self.torch, leaf, now, other)
            self.states["batch"] = found
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    def _from_batch(self, act: Dict[str, Any], target: Any) -> Any:
        found = self.states.get("batch") or self._ahead(act, [target])
        return target if found is None else _counterpart(self.torch, target, *found)

    def _ahead(self, act: Dict[str, Any], leaves: List[Any]) -> Optional[Tuple[List[Any], List[Any]]]:
        """The loader's batch that these tensors came from, and the one `ahead` places after (or before) it."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, self.torch.Tensor)]
        flat = [(iterator, _tensors(self.torch, batch)) for iterator, batch in self.loaded]
        for at in range(len(flat) - 1, -1, -1):
            if any(_same(self.torch, leaf, each) for leaf in tensors for each in flat[at][1]):
                break
        else:
            return None
        iterator, now = flat[at]
        at += int(act["ahead"])
        while at >= len(self.loaded):
            try:
                self._load(self.plain_next, iterator)
            except StopIteration:
                return None
        return (now, _tensors(self.torch, self.loaded[at][1])) if at >= 0 else None

    # -- acting, in a child ----------------------------------------------------------------------------------------

    def perform(self, acts: List[Dict[str, Any]], number: int) -> None:
        """Do what is to be done now, and be there for the rest."""
        self.number = number
        self.calls = self.losses = self.backwards = 0
        for act in acts:
            self.acts.setdefault(str(act["at"]), []).append(act)
        self._around_backward()
        self._around_update()
        if "clip" in self.acts:
            self._around_clip()
        if "hook" in self.acts:
            self._hooks()
        for act in self.acts.get("now", []):
            self.do(act)

    def do(self, act: Dict[str, Any]) -> None:
        """One act that needs nothing but where we are."""
        with self.torch.no_grad():
            getattr(self, "_do_" + str(act["do"]).replace(" ", "_"))(act)

    def apply(self, act: Dict[str, Any], x: Any, older: Any) -> Any:
        """The operation of an act on a tensor; a new tensor."""
        return operation(self.torch, act, x, older)

    def _do_weights(self, act: Dict[str, Any]) -> None:
        back = self.weights.get(self.step - int(act.get("back", 1)), [])
        for place, (_, entry) in enumerate(self.entries(act)):
            older = back[entry.position] if entry.position < len(back) else None
            entry.param.data.copy_(self.apply(dict(act, place=place), entry.param.data, older))

    def _do_grads(self, act: Dict[str, Any]) -> None:
        for _, entry in self.entries(act):
            if entry.param.grad is not None:
                if act["op"] == "none":
                    entry.param.grad = None
                else:
                    entry.param.grad.copy_(self.apply(act, entry.param.grad, None))

    def _do_state(self, act: Dict[str, Any]) -> None:
        for optimizer, entry in self.entries(act):
            held = optimizer.state.get(entry.param)
            if act["op"] == "clear":
                optimizer.state.pop(entry.param, None)
                continue
            for key, value in (held or {}).items():
                wanted = act.get("key") in (None, key) and (act.get("key") == key or _numel(value) > 1)
                if wanted and isinstance(value, self.torch.Tensor):
                    value.copy_(self.apply(act, value, None))

    def _do_count(self, act: Dict[str, Any]) -> None:
        """The optimizer's own count of steps: with a very large one bias is not corrected."""
        for optimizer, entry in self.entries(act):
            held = optimizer.state.get(entry.param) or {}
            if isinstance(held.get("step"), self.torch.Tensor):
                held["step"].fill_(float(act["value"]))
            elif "step" in held:
                held["step"] = act["value"]

    def _do_word(self, act: Dict[str, Any]) -> None:
        """One 64-bit word of a tensor."""
        for _, entry in self.entries(act):
            words = commits.words(self.torch, entry.param)
            words[int(act["word"])] += commits._signed(int(act["delta"]))

    def _do_setting(self, act: Dict[str, Any]) -> None:
        for number, optimizer, _ in points.optimizers(self.explorer.warp.engine):
            if act.get("opt") in (None, number):
                for place, group in enumerate(optimizer.param_groups):
                    if act.get("groups") is None or place in act["groups"]:
                        _set(group, str(act["name"]), act.get("value"), act.get("times"))

    def _do_seed(self, act: Dict[str, Any]) -> None:
        seed, stream = int(act["seed"]), act.get("stream", "torch")
        if stream in ("torch", "all"):
            self.torch.manual_seed(seed)
        if stream in ("numpy", "all") and "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        if stream in ("python", "all"):
            random.seed(seed)

    def _do_draw(self, act: Dict[str, Any]) -> None:
        count, stream = int(act["count"]), act.get("stream", "torch")
        if stream == "torch":
            self.torch.empty(count, dtype=self.torch.int32).random_()
        elif stream == "numpy":
            sys.modules["numpy"].random.bytes(4 * count)
        else:
            for _ in range(count):
                random.getrandbits(32)

    def _do_mode(self, act: Dict[str, Any]) -> None:
        for place, (module, rate) in enumerate(switches(self)):
            if act.get("modules") is not None and place not in act["modules"]:
                continue
            if act.get("training") is not None:
                module.training = bool(act["training"])
            if act.get("rate") is not None and rate is not None:
                setattr(module, rate, act["rate"])

    def _do_flag(self, act: Dict[str, Any]) -> None:
        torch, name, value = self.torch, act["name"], act.get("value")
        if name == "matmul":
            torch.set_float32_matmul_precision(value)
        elif name == "mkldnn":
            torch.backends.mkldnn.enabled = bool(value)
        elif name == "denormal":
            torch.set_flush_denormal(bool(value))
        elif name == "threads":
            torch.set_num_threads(int(value or 1))

    def _do_freeze(self, act: Dict[str, Any]) -> None:
        for _, entry in self.entries(act):
            entry.param.requires_grad_(False)

    def _do_no_step(self, act: Dict[str, Any]) -> None:
        """The next call of step() does nothing at all: no hook of ours sees it either."""
        for number, optimizer, _ in points.optimizers(self.explorer.warp.engine):
            if act.get("opt") in (None, number):
                _skip_once(optimizer)

    def _do_dropout(self, act: Dict[str, Any]) -> None:
        """Dropout that is other than its module says: from now on, in every call."""
        torch, by = self.torch, act.get("rate")
        holder = torch._VF
        for name in ("dropout", "dropout_"):
            plain = getattr(holder, name)

            def other(x: Any, p: float, train: bool, plain: Any = plain) -> Any:
                return plain(x, float(by or 0.0), train) if by is not None else x

            setattr(holder, name, other)
        plain_attention = torch.nn.functional.scaled_dot_product_attention

        def attention(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dropout_p"):
                kwargs = dict(kwargs, dropout_p=float(by or 0.0))
            return plain_attention(*args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = attention

    def _autocast(self) -> Any:
        import contextlib

        for act in self.active("forward"):
            if act["do"] == "autocast":
                return self.torch.autocast(act.get("device", "cpu"), dtype=getattr(self.torch, act["dtype"]))
        return contextlib.nullcontext()

    # -- backward, clip and update ---------------------------------------------------------------------------------

    def _around_backward(self) -> None:
        plain, stage = self.torch.autograd.backward, self

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            for act in stage.active("root"):
                many = isinstance(tensors, (list, tuple))
                changed = [stage.apply(act, each, None) for each in (tensors if many else [tensors])]
                tensors = changed if many else changed[0]
            result = plain(tensors, *args, **kwargs)
            stage.backwards += 1
            for act in stage.active("backward"):
                if not act.get("turn") or stage.backwards == act["turn"]:
                    stage.do(act)
            return result

        self.torch.autograd.backward = backward

    def _hooks(self) -> None:
        """Operations on the gradient of parameters as it arrives, once a backward pass."""
        for act in self.acts["hook"]:
            for _, entry in self.entries(act):
                if entry.param.requires_grad:
                    entry.param.register_hook(self._at_hook(act))

    def _at_hook(self, act: Dict[str, Any]) -> Any:
        def hook(grad: Any) -> Any:
            return self.apply(act, grad, None) if self.active("hook") else None

        return hook

    def _around_update(self) -> None:
        optimizer = sys.modules["torch.optim.optimizer"]
        handle = optimizer.register_optimizer_step_pre_hook(self._front)
        optimizer._global_optimizer_pre_hooks.move_to_end(handle.id, last=False)
        for _, each, _ in points.optimizers(self.explorer.warp.engine):
            each.register_step_pre_hook(self._inner)
            each.register_step_post_hook(self._end)
        if not points.optimizers(self.explorer.warp.engine):
            # the first step of all: no optimizer has been seen yet; the last of the global hooks comes after ours
            optimizer.register_optimizer_step_pre_hook(self._inner)
            handle = optimizer.register_optimizer_step_post_hook(self._end)
            optimizer._global_optimizer_post_hooks.move_to_end(handle.id, last=False)

    def _front(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for act in self.active("front"):
            self.do(act)
        self.at_update = {"acts": self.active("inner"), "end": self.active("end")}

    def _inner(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """After our own hook: the step is counted already."""
        with self.torch.no_grad():
            self.states["streams"] = standing(self.torch)
            self.before = {}
            if self.at_update.get("end"):
                for _, entry in self.entries({}):
                    held = optimizer.state.get(entry.param) or {}
                    kept = {k: v.clone() if isinstance(v, self.torch.Tensor) else v for k, v in held.items()}
                    self.before[id(entry.param)] = (entry.param.detach().clone(), kept, bool(held))
        self.states["groups"] = [dict(group) for group in optimizer.param_groups]
        for act in self.at_update.get("acts", ()):
            self.do(act)

    def _end(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for act in self.at_update.get("acts", ()):
            if act["do"] == "setting" and act.get("back"):
                for group, known in zip(optimizer.param_groups, self.states["groups"]):
                    group[_base(str(act["name"]))] = known[_base(str(act["name"]))]
        for act in self.at_update.get("end", ()):
            with self.torch.no_grad():
                if act["do"] == "update":
                    self._update(optimizer, act)
                else:
                    self.do(act)
        self.at_update = {}

    def _update(self, optimizer: Any, act: Dict[str, Any]) -> None:
        """Something became of the update as a whole: not made, made twice, other by an operation."""
        if act["op"] == "again":
            step = type(optimizer).step
            getattr(step, "__wrapped__", step)(optimizer)
            return
        for owner, entry in self.entries(act):
            known = self.before.get(id(entry.param))
            if owner is not optimizer or known is None:
                continue
            was, held, _ = known
            if act["op"] in ("skip", "undo"):
                entry.param.data.copy_(was)
                if act["op"] == "undo":
                    for key, value in held.items():
                        if isinstance(value, self.torch.Tensor):
                            optimizer.state[entry.param][key].copy_(value)
                        else:
                            optimizer.state[entry.param][key] = value
            else:
                entry.param.data.copy_(was + self.apply(act, entry.param.data - was, None))

    def _around_clip(self) -> None:
        clip: Any = sys.modules["torch.nn.utils.clip_grad"]
        stage = self
        for name in ("_clip_grads_with_norm_", "clip_grad_value_"):
            plain = getattr(clip, name, None)
            if plain is not None:
                setattr(clip, name, stage._clipping(plain, name))
        total: Any = getattr(clip, "_get_total_norm", None)

        def norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
            for act in stage.active("clip"):
                if act["op"] == "norm":
                    norm_type = float(act["by"])
            return total(tensors, norm_type, *args, **kwargs)

        if total is not None:
            clip._get_total_norm = norm

    def _clipping(self, plain: Any, name: str) -> Any:
        def clipping(parameters: Any, limit: float, *args: Any, **kwargs: Any) -> Any:
            again = False
            for act in self.active("clip"):
                if act["op"] == "off":
                    return None
                if act["op"] == "times":
                    limit = float(limit) * float(act["by"])
                if act["op"] == "limit":
                    limit = float(act["by"])
                again = again or act["op"] == "again"
            result = plain(parameters, limit, *args, **kwargs)
            return plain(parameters, limit, *args, **kwargs) if again else result

        return clipping

    # -- what is said afterwards -------------------------------------------------------------------------------------

    def keep(self) -> None:
        """In the parent, before a step: copies of the weights, where there is room."""
        found = [entry.param for _, entry in self.entries({})]
        if sum(p.numel() * p.element_size() for p in found) * (REMEMBERED + 1) > KEPT_BYTES:
            return
        for old in [each for each in self.weights if each < self.step - REMEMBERED]:
            del self.weights[old]
        self.weights[self.step] = [p.detach().clone() for p in found]

    def facts(self) -> Dict[str, Any]:
        """What the outer half chooses its hypotheses by."""
        args = self.args.get(self.number, [])
        leaves = _tensors(self.torch, args[0]) if args else []
        return {
            "calls": self.calls,
            "losses": self.losses,
            "backwards": self.backwards,
            "leaves": [[list(leaf.shape), leaf.is_floating_point()] for leaf in leaves][:16],
            "targets": [[list(t.shape), t.is_floating_point()] for t in self.targets.get(self.number, [])][:4],
            "classes": _classes(self.torch, self.targets.get(self.number, [])),
            "loaded": len(self.loaded),
            "streams": self.states.get("streams"),
            "seed": str(self.torch.initial_seed()),
        }


# -- operations ------------------------------------------------------------------------------------------------------


def operation(torch: Any, act: Dict[str, Any], x: Any, older: Any) -> Any:
    """One operation on one tensor; a new tensor, `x` itself where it does not apply."""
    op = act["op"]
    by: Any = act.get("by")
    if op == "scale":
        return x * by
    if op == "divide":
        return x / by
    if op == "add":
        return x + by
    if op == "negate":
        return -x
    if op == "zero":
        return torch.zeros_like(x)
    if op == "fill":
        return torch.full_like(x, by)
    if op == "round":
        return x.to(getattr(torch, act["dtype"])).to(x.dtype)
    if op == "clamp":
        return x.clamp(-by, by)
    if op == "flip":
        return x.flip(int(act.get("dim", 0))) if x.dim() else x
    if op == "roll":
        return x.roll(int(by), int(act.get("dim", 0))) if x.dim() else x
    if op == "sign":
        return x.sign()
    if op == "noise":
        return _noisy(torch, act, x)
    if op == "top":
        return _top(torch, x, float(by))
    if op == "older":
        return x if older is None or older.shape != x.shape else older.to(x.dtype)
    if op == "shift":
        return x if x.is_floating_point() else (x + int(by)) % max(1, int(act["classes"]))
    if op == "mirror":
        return x if x.is_floating_point() else int(act["classes"]) - 1 - x
    if op == "put":
        out = x.clone()
        out.view(-1)[int(act["index"])] = by
        return out
    if op == "sort":
        return x.sort(dim=0).values if x.dim() == 1 else x
    if op == "first":
        return x[:1].expand_as(x).clone() if x.dim() else x
    raise ValueError("no such operation: %s" % op)


def _noisy(torch: Any, act: Dict[str, Any], x: Any) -> Any:
    """Noise from the job's own stream, or from one of its own where a seed is given; two ways to round."""
    if act.get("seed") is not None:
        own = torch.Generator().manual_seed(int(act["seed"]))
        drawn = torch.randn(x.shape, generator=own, dtype=x.dtype) if act.get("law") != "uniform" else torch.rand(
            x.shape, generator=own, dtype=x.dtype
        )  # fmt: skip
    else:
        drawn = torch.rand_like(x) if act.get("law") == "uniform" else torch.randn_like(x)
    return torch.add(x, drawn, alpha=act["by"]) if act.get("fused") else x + drawn * act["by"]


def _top(torch: Any, x: Any, share: float) -> Any:
    """Only the largest share of the elements."""
    count = max(1, int(x.numel() * share))
    kept = torch.zeros_like(x).view(-1)
    index = x.abs().flatten().topk(count).indices
    kept[index] = x.flatten()[index]
    return kept.view_as(x)


def _numel(value: Any) -> int:
    return int(value.numel()) if hasattr(value, "numel") else 0


def _set(group: Dict[str, Any], name: str, value: Any, times: Any) -> None:
    """Set `name`, which may be one of a tuple (`betas[0]`)."""
    base, place = _base(name), name[name.index("[") + 1 : -1] if "[" in name else ""
    if base not in group:
        return
    old = group[base]
    if place:
        found = list(old)
        found[int(place)] = value if times is None else found[int(place)] * times
        group[base] = type(old)(found)
    elif hasattr(old, "fill_"):
        group[base] = old * times if times is not None else old.new_full((), value)
    else:
        value = old * times if times is not None else value
        group[base] = tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value


def _base(name: str) -> str:
    return name.partition("[")[0]


def _with(args: Tuple[Any, ...], place: int, value: Any) -> Tuple[Any, ...]:
    found = list(args)
    if len(found) > place:
        found[place] = value
    return tuple(found)


def _skip_once(optimizer: Any) -> None:
    held = optimizer.__dict__.get("step")

    def step(*args: Any, **kwargs: Any) -> None:
        if held is None:
            del optimizer.step
        else:
            optimizer.step = held

    optimizer.step = step


def _tensors(torch: Any, value: Any) -> List[Any]:
    return [leaf for leaf in torch.utils._pytree.tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _same(torch: Any, one: Any, two: Any) -> bool:
    return bool(one.shape == two.shape and one.dtype == two.dtype and one.device == two.device) and bool(
        torch.equal(one, two)
    )


def _counterpart(torch: Any, leaf: Any, now: List[Any], other: List[Any]) -> Any:
    """What stands in the other batch where this tensor stands in this one."""
    if isinstance(leaf, torch.Tensor):
        for each, instead in zip(now, other):
            if _same(torch, leaf, each):
                return instead
    return leaf


def _classes(torch: Any, targets: List[Any]) -> int:
    whole = [int(t.max()) + 1 for t in targets if not t.is_floating_point() and t.numel() and t.dtype != torch.bool]
    return max(whole, default=0)


def _compiled() -> bool:
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return bool(counters) and bool(counters.get("frames") or counters.get("stats"))


# -- streams ---------------------------------------------------------------------------------------------------------


def standing(torch: Any) -> List[Any]:
    """Where the three global streams stand: [[words, position] or null, …]; words in hex."""
    found = (rng.torch_words(torch.default_generator), rng._numpy(), rng._python())
    return [None if each is None else [each[0].hex(), each[1]] for each in found]


class Twister:
    """A stream apart from the job's, walked on to see whether it comes by a digest."""

    def __init__(self, words: bytes, position: int) -> None:
        self.stream = random.Random()
        numbers = [int.from_bytes(words[4 * i : 4 * i + 4], "little") for i in range(rng.WORDS)]
        self.stream.setstate((3, (*numbers, position), None))

    def digest(self) -> str:
        """As commits say it."""
        state = self.stream.getstate()[1]
        return rng.digest_of(b"".join(word.to_bytes(4, "little") for word in state[: rng.WORDS]), state[rng.WORDS])

    def walk(self, wanted: str, limit: int) -> Optional[int]:
        """How many numbers on the stream stands at `wanted`; None when it does not within `limit`."""
        place = wanted.partition(".")[2]
        if not place.isdigit():
            return None
        count = 0
        while count <= limit:
            position: int = self.stream.getstate()[1][rng.WORDS]
            ahead = int(place) - position
            if ahead >= 0 and self._skip_within(ahead) == wanted:
                return count + ahead
            jump = rng.WORDS - position + 1  # into the next block
            self.draw(jump)
            count += jump
            if int(place) == 1 and self.digest() == wanted:
                return count
        return None

    def _skip_within(self, ahead: int) -> str:
        state = self.stream.getstate()
        words = state[1][: rng.WORDS]
        return rng.digest_of(b"".join(w.to_bytes(4, "little") for w in words), state[1][rng.WORDS] + ahead)

    def draw(self, count: int) -> None:
        """Go on by `count` numbers."""
        while count > 0:
            part = min(count, 1 << 16)
            self.stream.getrandbits(32 * part)
            count -= part


# -- what can be found without a trial -------------------------------------------------------------------------------


def solve(stage: Stage, message: Dict[str, Any]) -> Any:
    """Answers found by arithmetic on what is live: never by trying a step."""
    what = message.get("what")
    with stage.torch.no_grad():
        if what == "edited":
            return _solve_edited(stage, message["edited"])
        if what == "modes":
            return _solve_modes(stage, str(message["digest"]))
        if what == "streams":
            return _solve_streams(stage, message)
        if what == "settings":
            return _settings(stage)
    return []


def _settings(stage: Stage) -> List[Dict[str, Any]]:
    """Every number in every parameter group, by name, and what the optimizer is."""
    return [
        {
            "opt": number,
            "kind": type(optimizer).__name__,
            "groups": [
                {name: commits._plain(value) for name, value in group.items() if name not in ("params", "param_names")}
                for group in optimizer.param_groups
            ],
            "members": [entry.group for entry in track.entries],
            "names": [entry.name for entry in track.entries][:4096],
            "state": sorted({str(k) for e in track.entries for k in (optimizer.state.get(e.param) or {})}),
        }
        for number, optimizer, track in points.optimizers(stage.explorer.warp.engine)
    ]


def switches(stage: Stage) -> List[Tuple[Any, Optional[str]]]:
    """Modules of trained models, in the order in which commits digests them, with the name of their rate."""
    link = next(each for each in stage.explorer.warp.engine.links if each.name == commits.Commits.name)
    return list(link.switches)


def _solve_modes(stage: Stage, digest: str) -> List[Dict[str, Any]]:
    """Changes of one module, or of all of a kind, that give this digest of modes and rates."""
    found = switches(stage)
    link = next(each for each in stage.explorer.warp.engine.links if each.name == commits.Commits.name)
    everything = list(range(len(found)))
    kinds: Dict[str, List[int]] = {}
    for place, (module, _) in enumerate(found):
        kinds.setdefault(type(module).__name__, []).append(place)
    rated = [place for place, (_, rate) in enumerate(found) if rate in ("p", "dropout", "drop_prob")]
    sets = [everything, rated, *kinds.values(), *([place] for place in everything[:2000])]
    kept = [(module.training, None if rate is None else getattr(module, rate, None)) for module, rate in found]
    out: List[Dict[str, Any]] = []
    for modules in sets:
        tries: List[Dict[str, Any]] = [{"training": False}, {"training": True}]
        if any(found[place][1] for place in modules):
            tries += [{"rate": rate} for rate in USUAL_RATES]
        for each in tries:
            act = {"at": "now", "do": "mode", "modules": modules, **each}
            stage._do_mode(act)
            if link._modes() == digest:
                out.append(dict(act, modules=modules, kinds=sorted({type(found[p][0]).__name__ for p in modules})))
            for place in modules:
                module, rate = found[place]
                module.training = kept[place][0]
                if rate is not None:
                    setattr(module, rate, kept[place][1])
            if len(out) >= 4:
                return out
    return out


def _solve_streams(stage: Stage, message: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Seeds and draws that bring a stream to where the run's stood. clean: where the clean step's stood, in full."""
    out: List[Dict[str, Any]] = []
    now = standing(stage.torch)
    for place, name in enumerate(("torch", "numpy", "python")):
        wanted, clean = message["wanted"][place], message["clean"][place]
        if wanted is None or clean is None or wanted == rng.digest_of(bytes.fromhex(clean[0]), clean[1]):
            continue
        count = Twister(bytes.fromhex(clean[0]), clean[1]).walk(wanted, DRAWS_LIMIT)
        if count is not None:
            out.append({"do": "draw", "stream": name, "count": count})
            continue
        back = Twister(bytes.fromhex(now[place][0]), now[place][1]).walk(wanted, SEED_WALK_LIMIT)
        if back is not None:
            out.append({"do": "fewer", "stream": name, "count": back})
            continue
        drawn = _between(now[place], clean)
        out.extend(_seeds(stage, name, wanted, drawn, message.get("seeds") or ()))
    return out


def _between(one: Any, two: Any) -> int:
    if one is None or two is None:
        return 0
    wanted = rng.digest_of(bytes.fromhex(two[0]), two[1])
    return Twister(bytes.fromhex(one[0]), one[1]).walk(wanted, SEED_WALK_LIMIT) or 0


def _seeds(stage: Stage, name: str, wanted: str, drawn: int, more: Any) -> List[Dict[str, Any]]:
    """Usual seeds after which the stream stands at `wanted`, when seeded before the step's draws or after them."""
    found = []
    initial = int(stage.torch.initial_seed())
    place = wanted.partition(".")[2]
    for seed in dict.fromkeys((initial, *(initial + i for i in range(-64, 65)), *(int(s) for s in more), *USUAL_SEEDS)):
        if seed < 0:
            continue
        stream = _seeded(stage.torch, name, seed)
        position = stream.stream.getstate()[1][rng.WORDS]
        if stream.digest() == wanted:
            found.append({"do": "seed", "stream": name, "seed": seed, "drawn": 0})
        if drawn and place == str((position + drawn - 1) % rng.WORDS + 1):
            stream.draw(drawn)
            if stream.digest() == wanted:
                found.append({"do": "seed", "stream": name, "seed": seed, "drawn": drawn})
        if len(found) >= 2:
            break
    return found


def _seeded(torch: Any, name: str, seed: int) -> Twister:
    if name == "torch":
        return Twister(*rng.torch_words(torch.Generator().manual_seed(seed)))
    if name == "numpy":
        state = sys.modules["numpy"].random.RandomState(seed % 2**32).get_state(legacy=False)["state"]
        return Twister(state["key"].astype("<u4").tobytes(), int(state["pos"]))
    stream = Twister(bytes(4 * rng.WORDS), 0)
    stream.stream.seed(seed)
    return stream


def _solve_edited(stage: Stage, edited: List[Any]) -> List[List[Dict[str, Any]]]:
    """For each edited tensor what was done to it; every answer is exact (both sums are those of the run)."""
    out: List[List[Dict[str, Any]]] = []
    by_position = {entry.position: entry for _, entry in stage.entries({})}
    for position, total, ramp, heads in edited:
        entry = by_position.get(int(position))
        if entry is None:
            out.append([])
            continue
        out.append(_edits(stage, entry, str(total), str(ramp), heads))
    return out


def _edits(stage: Stage, entry: Any, total: str, ramp: str, heads: List[float]) -> List[Dict[str, Any]]:
    torch = stage.torch
    x = entry.param.detach()
    found: List[Dict[str, Any]] = []
    word = _one_word(torch, x, total, ramp)
    if word is not None:
        found.append({"do": "word", "only": [entry.position], **word})
    older = [(number, kept[entry.position]) for number, kept in stage.weights.items() if entry.position < len(kept)]
    for act in _likely(x, heads, [stage.step - number for number, _ in older if number < stage.step]):
        back = dict(older).get(stage.step - int(act.get("back", 0)))
        streams = standing(torch) if act["op"] == "noise" else None
        kept = torch.default_generator.get_state() if streams else None
        changed = operation(torch, act, x, back)
        if kept is not None:
            torch.default_generator.set_state(kept)
        if _is(torch, changed, total, ramp):
            found.append({"do": "weights", "only": [entry.position], **act})
            break
    return found


def _is(torch: Any, x: Any, total: str, ramp: str) -> bool:
    words = commits.words(torch, x.contiguous())
    return total == str(int(words.sum()) & lanes.MASK) and lanes.both(torch, words) == (total, ramp)


def _one_word(torch: Any, x: Any, total: str, ramp: str) -> Optional[Dict[str, Any]]:
    """The one 64-bit word (two neighbouring float32) that was changed, and by how much."""
    if not ramp:
        return None
    words = commits.words(torch, x)
    was = lanes.both(torch, words)
    delta, weighted = (int(total) - int(was[0])) & lanes.MASK, (int(ramp) - int(was[1])) & lanes.MASK
    if not delta:
        return None
    places = torch.arange(1, words.numel() + 1, device=words.device)
    at = (places * commits._signed(delta) == commits._signed(weighted)).nonzero().flatten().tolist()
    if len(at) != 1:
        return None
    changed = words.clone()
    changed[at[0]] += commits._signed(delta)
    bits = _floats(torch, x, words), _floats(torch, x, changed)
    told = [[index, float(a), float(b)] for index, (a, b) in enumerate(zip(*bits)) if a != b][:4]
    return {"word": at[0], "delta": str(delta), "told": told}


def _floats(torch: Any, x: Any, words: Any) -> List[float]:
    """The tensor's values again, from its words; only where they share its memory layout."""
    if words.numel() * 8 != x.numel() * x.element_size():
        return []
    values: List[float] = words.view(x.dtype).tolist() if x.numel() <= 1 << 22 else []
    return values


def _likely(x: Any, heads: List[float], back: List[int]) -> Iterator[Dict[str, Any]]:
    """Operations on a whole tensor that agree with the few values that were said of it."""
    for dtype in ("bfloat16", "float16"):
        yield {"op": "round", "dtype": dtype}
    for dim in range(min(2, x.dim())):
        yield {"op": "flip", "dim": dim}
        for by in (1, -1):
            yield {"op": "roll", "by": by, "dim": dim}
    yield {"op": "negate"}
    yield {"op": "zero"}
    for number in back:
        yield {"op": "older", "back": number}
    was = lanes.heads(x)
    pairs = [(a, b) for a, b in zip(was, heads)]
    if not pairs:
        return
    if len({b for _, b in pairs}) == 1:
        yield {"op": "fill", "by": pairs[0][1]}
    largest = max(pairs, key=lambda pair: abs(pair[0]))
    if largest[0]:
        for factor in nice(largest[1] / largest[0]):
            yield {"op": "scale", "by": factor}
            if factor:
                yield {"op": "divide", "by": float("%.6g" % (1 / factor))}
    for more in nice(largest[1] - largest[0]):
        yield {"op": "add", "by": more}
    spread = (sum((b - a) ** 2 for a, b in pairs) / len(pairs)) ** 0.5
    for size in _near(spread):
        for fused in (False, True):
            for seed in (None, 0, 1, 42, 1234, 1337):
                yield {"op": "noise", "by": size, "fused": fused, "seed": seed}


def nice(value: float) -> List[float]:
    """`value` to one, two, … six digits, without repetitions."""
    return list(dict.fromkeys(float("%.*g" % (digits, value)) for digits in range(1, 7))) if value == value else []


def _near(spread: float) -> List[float]:
    """Round numbers within a factor of four."""
    found = []
    for power in range(-8, 3):
        for lead in (1, 2, 3, 5):
            number = float("%de%d" % (lead, power))
            if spread and 0.25 < number / spread < 4:
                found.append(number)
    return found
