"""Link *batches*: is what a loader delivered what reaches the model and the loss?

Value of the link (checked steps only, absent when no loader delivered anything):

    {"delivered": [[loader, epoch, batch, digest of its indices, of labels | null, of the first other tensor | null]],
     "model": [loader, epoch, batch, path in the batch, elements compared, elements equal],
     "loss": {"batch": [loader, epoch, batch], "path": of the labels in the batch, "relation": "same" | "shifted" |
              "binary", "given": [labels of some rows as delivered], "used": [labels of these rows in the loss]},
     "why": what could not be compared, in words}

Which labels a loss used needs no look at the loss: the gradient that it sends back into the model's output says it.
Under cross-entropy the gradient of a row is softmax minus one-hot, times one factor for all rows: the label is the
class that is pushed up. Under a binary loss the sign says it. Only rows that have that form, with the factor that most
rows have, are read: mixed, smoothed or soft labels and other losses do not, and nothing is claimed of them.

Hooks stand on the outermost modules for one step at a time, and return nothing: values and gradients pass unchanged.
They are not set where anything was compiled, since a hook would have it compiled again.
"""

from __future__ import annotations

import functools
import random
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set, Tuple

from . import armed, loaders, roots
from .client import Client

if TYPE_CHECKING:
    from .engine import Step

ALWAYS = 12
"""First steps of an optimizer at whose model and loss we look; after these, one checked step in 4, drawn in secret."""
EVERY = 4
ROWS = 64
MODULES_LIMIT = 12
ROOTS_EVERY = 64
OUTPUTS_LIMIT = 4

clock = time.thread_time_ns


class _Watch(armed.Hooks):
    """Hooks on the model for one step of one optimizer."""

    def __init__(self, link: "Batches", modules: List[Any]) -> None:
        super().__init__()
        self.link = link
        self.torch = sys.modules["torch"]
        self.fed: Any = None
        """[line of the delivery, path, elements, how many are equal (a tensor)]"""
        self.rows: List[Any] = []
        """[line, how many batches were delivered since, path, relation, labels delivered, labels used, whether they can
        be read]: tensors, per candidate."""
        self.known: Set[Tuple[int, ...]] = set()
        """Lines of deliveries that the model was called with, told by values that other batches do not have."""
        self.entered = False
        self.heard: List[Tuple[Any, Any]] = []
        """Outputs that are listened to: weak reference, and its values without its graph."""
        self.own_ns = 0
        self.why = "the model was not called"
        for module in modules:
            self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after))

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        start = clock()
        try:
            if not self.entered and self.torch.is_grad_enabled():
                self.entered = True
                self.why = "no delivered tensor has the form of labels for the model's output"
                with self.torch.no_grad():
                    self._compare(loaders.leaves([list(args), dict(kwargs)]))
        except Exception as error:
            self.link.client.fault("batches.before", error)
        self.own_ns += clock() - start

    def _compare(self, inputs: List[Tuple[str, Any]]) -> None:
        """How much of a delivered tensor arrives at the model as it was: the best of all candidates."""
        ring = self.link.observer.ring if self.link.observer is not None else ()
        heard = bool(ring and ring[-1].sampled)  # the batch in use may have been delivered before we listened
        best = -1.0
        for delivery in reversed(ring):
            for path, numel, at, values in delivery.sampled:
                for _, tensor in inputs:
                    if tensor.numel() != numel or str(tensor.layout) != "torch.strided":
                        continue
                    found = self.torch.take(tensor.detach(), at.to(tensor.device))
                    equal = float((found == values.to(device=found.device, dtype=found.dtype)).float().mean())
                    if equal > best and (heard or equal == 1.0):
                        best = equal
                        self.fed = [*delivery.line, path, int(at.numel()), round(equal * at.numel())]
                    if equal == 1.0 and bool((values != values.flatten()[0]).any()):  # a mask of ones is any batch's
                        self.known.add(tuple(delivery.line))
            if self.known:
                return

    def _after(self, module: Any, args: Any, output: Any) -> None:
        start = clock()
        try:
            if self.torch.is_grad_enabled() and not self.rows:
                found = loaders.leaves(vars(output) if hasattr(output, "__dataclass_fields__") else output)
                able = [each for _, each in found if each.requires_grad and each.is_floating_point() and each.dim()]
                for tensor in able[:OUTPUTS_LIMIT]:
                    if not any(known() is tensor for known, _ in self.heard):
                        tensor.register_hook(functools.partial(self._listen, len(self.heard)))
                        self.heard.append((weakref.ref(tensor), tensor.detach()))
        except Exception as error:
            self.link.client.fault("batches.after", error)
        self.own_ns += clock() - start

    def _listen(self, number: int, grad: Any) -> None:
        start = clock()
        try:
            output = self.heard[number][1]
            if self.handles and output.shape == grad.shape:
                with self.torch.no_grad():
                    self._labels(grad.detach(), output)
        except Exception as error:
            self.link.client.fault("batches.listen", error)
        self.own_ns += clock() - start

    def _labels(self, grad: Any, output: Any) -> None:
        """Read the labels that the loss used out of its gradient, beside those that were delivered."""
        observer = self.link.observer
        if observer is None or grad.numel() == 0 or len(self.rows) >= 16:
            return
        if not any(delivery.labels for delivery in observer.ring):
            self.why = "no delivered batch was kept that has labels"
        for since, delivery in enumerate(reversed(observer.ring)):
            for path, labels in delivery.labels:
                for relation, pairs in self._laid_out(labels.to(grad.device), grad, output):
                    self.rows.append([delivery.line, since, path, relation, *pairs])

    def _laid_out(self, labels: Any, grad: Any, output: Any) -> List[Tuple[str, Any]]:
        """Relations in which `labels` can stand to an output with gradient `grad`."""
        shape, wide = tuple(labels.shape), tuple(grad.shape)
        whole = not labels.is_floating_point()
        if whole and len(wide) > 2 and wide[1] > 1 and shape == wide[:1] + wide[2:]:
            grad, output = grad.movedim(1, -1), output.movedim(1, -1)
            wide = tuple(grad.shape)
        if whole and len(wide) >= 2 and wide[-1] > 1 and labels.numel() * wide[-1] == grad.numel():
            out = [("same", self._classes(labels, grad, output))]
            if labels.dim() == 2 and shape[1] > 2 and wide[:-1] == shape:
                out.append(("shifted", self._classes(labels[:, 1:], grad[:, :-1], output[:, :-1])))
            return out
        if labels.numel() == grad.numel() and bool(((labels == 0) | (labels == 1)).all()):
            return [("binary", self._signs(labels, grad, output))]
        return []

    def _chosen(self, rows: int, device: Any) -> Any:
        rng = self.link.rng
        places = range(rows) if rows <= ROWS else sorted(rng.sample(range(rows), ROWS))
        return self.torch.tensor(list(places), device=device)

    def _classes(self, labels: Any, grad: Any, output: Any) -> Any:
        """(labels given, labels used, rows that can be read, rows that count) of some rows; classes stand last."""
        classes = grad.shape[-1]
        labels, grad, output = labels.reshape(-1), grad.reshape(-1, classes), output.reshape(-1, classes)
        chosen = self._chosen(grad.shape[0], grad.device)
        labels, grad, output = labels[chosen], grad[chosen].float(), output[chosen].float()
        live = (grad != 0).any(dim=1)
        lowest, used = grad.min(dim=1)
        single = (grad != 0).sum(dim=1) == 1  # the model's output is the logarithm itself: only the label's class moves
        rest = 1 - output.softmax(dim=1).gather(1, used[:, None])[:, 0]
        factor = self.torch.where(single, -lowest, -lowest / rest)
        return labels, used, self._alike(factor, live & (lowest < 0)), live

    def _signs(self, labels: Any, grad: Any, output: Any) -> Any:
        labels, grad, output = labels.reshape(-1), grad.reshape(-1), output.reshape(-1)
        chosen = self._chosen(grad.shape[0], grad.device)
        labels, grad, output = labels[chosen], grad[chosen].float(), output[chosen].float()
        live = grad != 0
        used = (grad < 0).long()
        clear = self._alike(grad / (output.sigmoid() - used), live)
        if int(clear.sum()) * 2 < int(live.sum()):  # the model's output is the probability itself
            clear = self._alike(grad * output * (1 - output) / (output - used), live)
        return labels.long(), used, clear, live

    def _alike(self, factor: Any, live: Any) -> Any:
        """Rows whose factor is, within 5 %, the one that most rows have."""
        live = live & factor.isfinite() & (factor > 0)
        if not bool(live.any()):
            return live
        middle = factor[live].median()
        return live & ((factor - middle).abs() <= 0.05 * middle)

    def told(self) -> Dict[str, Any]:
        """What was seen, as JSON."""
        value: Dict[str, Any] = {}
        if self.fed is not None:
            value["model"] = self.fed
        best, most = None, -1.0
        for line, since, path, relation, labels, used, clear, live in self.rows:
            rows = int(live.sum())
            if rows == 0 or int(clear.sum()) * 2 < rows:
                self.why = "the gradient at the model's output is not that of a loss with one label a row"
                continue
            keep = clear & (labels >= 0)
            given, taken = labels[keep].tolist(), used[keep].tolist()
            equal = sum(a == b for a, b in zip(given, taken)) / max(1, len(given))
            if given and equal == 1.0:
                self.link.since = since
            elif not (tuple(line) in self.known or (not self.known and since == self.link.since)):
                self.why = "which delivered batch the loss was of cannot be told"
                continue  # trainers fetch ahead: it may be of one that was delivered before we listened
            if given and equal > most:
                best, most = {"batch": line, "path": path, "relation": relation, "given": given, "used": taken}, equal
        if best is not None:
            value["loss"] = best
        elif self.why:
            value["why"] = self.why
        return value


class Batches(armed.Arms):
    """Arms hooks for the next checked step, and reports what they saw."""

    name = "batches"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.observer = loaders.current() or loaders.install(client)
        self.rng = random.Random(bytes.fromhex(client.settings["key"]) + b"batches")
        super().__init__()
        self.modules: Dict[int, Tuple[List[Any], int]] = {}
        """Index of an optimizer → modules at which its loss may begin, and how often they were used."""
        self.since: Optional[int] = None
        """How many batches had been delivered after the one whose labels a loss was last seen to use unchanged."""

    def before(self, step: Step) -> None:
        """Everything was seen while the gradients were made."""

    def after(self, step: Step) -> Optional[Dict[str, Any]]:
        """Report; take the hooks off, and arm those of the next step if it is to be looked at."""
        observer = self.observer
        value: Dict[str, Any] = {}
        watch = self.taken_off(step.opt)
        if watch is not None:
            step.own_ns += watch.own_ns
        if observer is None:
            return None
        sums, observer.sums = observer.sums, []
        if sums:
            value["delivered"] = sums
        if watch is not None and observer.ring:
            value.update(watch.told())
        self.arm(step)
        return value or None

    def arm(self, step: Step) -> None:
        """The next step is checked: be there when its batch is delivered and its gradients are made."""
        observer = self.observer
        if observer is not None:
            self._arm(step, observer)
            observer.wanted = bool(self.watches)

    def _arm(self, step: Step, observer: "loaders.Observer") -> None:
        count = step.track.memory.get(self.name, 0)
        step.track.memory[self.name] = count + 1
        if not step.track.next_full or not observer.passes:
            return
        if count >= ALWAYS and self.rng.randrange(EVERY):
            return
        if _compiled():
            return
        modules, looked = self.modules.get(step.opt, ([], 0))
        if not modules or looked % ROOTS_EVERY == 0:
            modules = _outermost(step)
        self.modules[step.opt] = (modules, looked + 1)
        if modules:
            self.watches[step.opt] = _Watch(self, modules)

    def forget(self, opt: int) -> None:
        """The optimizer is gone, and its modules are not kept alive."""
        super().forget(opt)
        self.modules.pop(opt, None)

    def forked(self) -> None:
        """The child has loaders of its own, or none."""
        super().forked()
        loaders.remove()


def _compiled() -> bool:
    """Whether anything was compiled by torch in this process."""
    counters: Any = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return bool(counters) and bool(counters.get("frames") or counters.get("stats"))


def _outermost(step: Step) -> List[Any]:
    """Modules at whose outputs a loss can begin: roots that this optimizer trains, and what holds most of one."""
    torch = step.torch
    found: List[Any] = []
    own = {id(entry.param) for entry in step.track.entries}
    trained = [root for root in roots.roots() if any(id(p) in own for p in root.parameters())]
    for root in trained[:4]:
        total = sum(p.numel() for p in root.parameters())
        children = [c for c in root.children() if 2 * sum(p.numel() for p in c.parameters()) > total]
        found += [root, *children]
    return [m for m in found if not isinstance(m, torch.jit.ScriptModule)][:MODULES_LIMIT]
