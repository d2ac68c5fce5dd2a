"""Link *hooks*: functions that torch calls behind the script's back.

Global module and optimizer hooks, hooks of the optimizer in use, of its parameters (gradient hooks, post-accumulate
hooks), of the modules of the model, state-dict hooks, and the saved-tensor hooks in force. Counted before every
checked step, which is cheap; described, with file and line, when the count changes and every 50 steps. The guard's
own hooks are left out by identity of their namespace.

Frames (spec/evidence.md, "sweep"):

    kind "sweep", body {"what": "hooks", "checked": places looked at,
                        "found": [{"kind", "origin", "function", "on", "count"}, …]}    new ones only

Not seen: hooks that C++ code keeps itself, such as the reducer of DistributedDataParallel or `Node.register_hook`.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator, List, Optional, Tuple

from . import origin, roots
from .client import Client

EVERY = 50

GLOBAL = (
    ("global forward pre-hook", "torch.nn.modules.module", "_global_forward_pre_hooks"),
    ("global forward hook", "torch.nn.modules.module", "_global_forward_hooks"),
    ("global backward hook", "torch.nn.modules.module", "_global_backward_hooks"),
    ("global backward pre-hook", "torch.nn.modules.module", "_global_backward_pre_hooks"),
    ("global buffer registration hook", "torch.nn.modules.module", "_global_buffer_registration_hooks"),
    ("global module registration hook", "torch.nn.modules.module", "_global_module_registration_hooks"),
    ("global parameter registration hook", "torch.nn.modules.module", "_global_parameter_registration_hooks"),
    ("global optimizer pre-hook", "torch.optim.optimizer", "_global_optimizer_pre_hooks"),
    ("global optimizer post-hook", "torch.optim.optimizer", "_global_optimizer_post_hooks"),
)
OPTIMIZER = (
    ("optimizer pre-hook", "_optimizer_step_pre_hooks"),
    ("optimizer post-hook", "_optimizer_step_post_hooks"),
    ("optimizer state-dict hook", "_optimizer_state_dict_pre_hooks"),
    ("optimizer state-dict hook", "_optimizer_state_dict_post_hooks"),
    ("optimizer load-state-dict hook", "_optimizer_load_state_dict_pre_hooks"),
    ("optimizer load-state-dict hook", "_optimizer_load_state_dict_post_hooks"),
)
TENSOR = (("gradient hook", "_backward_hooks"), ("post-accumulate hook", "_post_accumulate_grad_hooks"))
MODULE = (
    ("module forward pre-hook", "_forward_pre_hooks"),
    ("module forward hook", "_forward_hooks"),
    ("module backward hook", "_backward_hooks"),
    ("module backward pre-hook", "_backward_pre_hooks"),
    ("module state-dict hook", "_state_dict_hooks"),
    ("module state-dict hook", "_state_dict_pre_hooks"),
    ("module load-state-dict hook", "_load_state_dict_pre_hooks"),
    ("module load-state-dict hook", "_load_state_dict_post_hooks"),
)

Found = Tuple[str, Any, str]
"""Kind, the hook, and the name of what it hangs on."""


class Hooks:
    """See the module."""

    name = "hooks"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.inventory = origin.Inventory()
        self.count: Optional[int] = None
        self.due = True

    def before(self, step: Any) -> None:
        """Count before the update: hooks that act in this step are in place by now."""
        count = sum(1 for _ in self._quick(step))
        self.due = self.due or count != self.count or step.number % EVERY == 0
        self.count = count
        if self.due:
            self._sweep(step)

    def after(self, step: Any) -> None:
        """Nothing for the step frame."""

    def _sweep(self, step: Any) -> None:
        self.due = False
        found = list(self._quick(step))
        places = len(GLOBAL) + len(OPTIMIZER) + 2 * len(step.track.entries) + 1
        for root in roots.roots():
            for name, module in root.named_modules():
                places += len(MODULE)
                found.extend(_of(module, MODULE, name or "root"))
        lines = []
        for kind, hook, on in found:
            where, function = origin.of(hook)
            lines.append({"kind": kind, "origin": where, "function": function, "on": on})
        new = self.inventory.news(lines)
        body = {"what": "hooks", "checked": places, "total": len(found), "found": new[:200]}
        self.client.send("sweep", body, step.number)

    def _quick(self, step: Any) -> Iterator[Found]:
        """Hooks that act on every gradient or update; not those of single modules."""
        for kind, module_name, attribute in GLOBAL:
            held = getattr(sys.modules.get(module_name), attribute, None)
            for hook in _values(held):
                if not origin.is_ours(hook):
                    yield kind, hook, "every module" if "optimizer" not in kind else "every optimizer"
        yield from _of(step.optimizer, OPTIMIZER, type(step.optimizer).__name__)
        for entry in step.track.entries:
            yield from _of(entry.param, TENSOR, entry.name)
        yield from _saved_tensor_hooks(step.torch)


def _of(thing: Any, table: Tuple[Tuple[str, str], ...], name: str) -> Iterator[Found]:
    for kind, attribute in table:
        held = getattr(thing, attribute, None)
        if held:
            for hook in _values(held):
                if not origin.is_ours(hook):
                    yield kind, hook, name


def _values(held: Any) -> List[Any]:
    return list(held.values()) if isinstance(held, dict) else []


def _saved_tensor_hooks(torch: Any) -> Iterator[Found]:
    try:
        pair = torch._C._autograd._top_saved_tensors_default_hooks(True)
    except (AttributeError, TypeError, RuntimeError):
        return
    for hook in pair or ():
        yield "saved-tensor hook", hook, "every saved tensor"
