"""Link *modules*: the mode and settings of the model's modules, and torch's numeric flags, read back as they are.

Flags are what torch itself says, not what a configuration says. Of each module: `training` and its public scalar
attributes (dropout probability, momentum, eps, …). Read when the gradients are final (in a closure's step, when the
closure has run), so a toggle to eval() and back between steps is not a change.

Flags at every checked step; modules at every fifth. Attributes that move during the first steps
(counters, warm-ups) are learnt and left out.

In the step frame, only when something changed since it was last read, and at the first look:

    "modules": {"flags": {name: value, …} or changed ones, "changed": [[name, before, now], …], "learnt": n,
                "setters": {name: [["file:line", [] or [value]], …]}   once, with the first change: stores of
                                                      attributes, and calls that set flags, in the job's own source}

and kind "sweep", body {"what": "modules", "checked": comparisons since the last} every 50 steps.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import roots, writers
from .client import Client

EVERY = 50
MODULES_EVERY = 5
LEARN_STEPS = 15
CHANGED_LIMIT = 50
MODULES_LIMIT = 4000

ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUDA_LAUNCH_BLOCKING",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTHONHASHSEED",
)


def readers(torch: Any) -> List[Tuple[str, Callable[[], Any]]]:
    """Name and reader of every numeric flag; a reader that this torch lacks raises and is dropped by the caller."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return [
        ("float32_matmul_precision", lambda: torch.get_float32_matmul_precision()),
        ("cuda.matmul.allow_tf32", lambda: cuda.allow_tf32),
        ("cuda.matmul.allow_fp16_reduced_precision_reduction", lambda: cuda.allow_fp16_reduced_precision_reduction),
        ("cuda.matmul.allow_bf16_reduced_precision_reduction", lambda: cuda.allow_bf16_reduced_precision_reduction),
        ("cudnn.enabled", lambda: cudnn.enabled),
        ("cudnn.allow_tf32", lambda: cudnn.allow_tf32),
        ("cudnn.benchmark", lambda: cudnn.benchmark),
        ("cudnn.deterministic", lambda: cudnn.deterministic),
        ("mkldnn.enabled", lambda: torch.backends.mkldnn.enabled),
        ("deterministic_algorithms", lambda: torch.are_deterministic_algorithms_enabled()),
        ("default_dtype", lambda: str(torch.get_default_dtype())),
        ("num_threads", lambda: torch.get_num_threads()),
        ("anomaly_mode", lambda: torch.is_anomaly_enabled()),
    ]


class Modules:
    """See the module."""

    name = "modules"
    every_step = False

    def __init__(self, client: Client) -> None:
        self.client = client
        self.readers: Optional[List[Tuple[str, Callable[[], Any]]]] = None
        self.flags: Dict[str, Any] = {}
        self.settings: Dict[int, Dict[str, Any]] = {}
        """Index of an optimizer → settings of the modules whose parameters it updates."""
        self.numbers: Dict[int, Tuple[Any, int]] = {}
        """id of a root → weak reference to it, and its number: which root is the largest may change (unfreezing)."""
        self.learnt: Dict[str, bool] = {}
        self.given = 0
        self.sent_setters = False
        self.looked = 0
        self.compared = 0
        self._said: Optional[Dict[str, Any]] = None
        self._read = False

    def before(self, step: Any) -> None:
        """Nothing yet: a closure may still set the mode."""
        self._said = None
        self._read = False

    def ready(self, step: Any) -> None:
        """Read and compare, once a step, before anything of the update happened."""
        if self._read:
            return
        self._read = True
        changed = self._flags(step.torch)
        first = self.looked == 0
        if first or step.number % MODULES_EVERY == 0:
            changed += self._modules(step)
        self.looked += 1
        if first:
            self._said = {"flags": self.flags, "changed": []}
        elif changed:
            self._said = {"changed": changed[:CHANGED_LIMIT], "learnt": len(self.learnt)}
            if not self.sent_setters:
                self.sent_setters = True
                self._said["setters"] = writers.setters()

    def after(self, step: Any) -> Optional[Dict[str, Any]]:
        """What changed, for the step frame."""
        if step.number % EVERY == 0:
            self.client.send("sweep", {"what": "modules", "checked": self.compared, "found": []}, step.number)
            self.compared = 0
        return self._said

    def _flags(self, torch: Any) -> List[List[Any]]:
        if self.readers is None:
            self.readers = [pair for pair in readers(torch) if _works(pair[1])]
        found = {name: read() for name, read in self.readers}
        for name in ENVIRONMENT:
            if name in os.environ:
                found["env." + name] = os.environ[name][:200]
        self.compared += len(found)
        changed = [
            [n, self.flags.get(n), found.get(n)] for n in {**self.flags, **found} if _moved(self.flags, found, n)
        ]
        first, self.flags = not self.flags, found
        return [] if first else changed

    def _modules(self, step: Any) -> List[List[Any]]:
        found: Dict[str, Any] = {}
        updated = {id(entry.param) for entry in step.track.entries}
        mine = [root for root in roots.roots() if any(id(p) in updated for p in root.parameters())]
        for root in mine:
            number = self._number(root)
            prefix = "" if number == 0 else "%d:" % number
            for position, (name, module) in enumerate(root.named_modules()):
                if position > MODULES_LIMIT:
                    break
                _scalars(found, prefix + (name or "root") + ".", module)
        self.compared += len(found)
        before = self.settings.get(step.opt, {})
        self.settings[step.opt] = found
        changed = [[n, before[n], found[n]] for n in found if n in before and before[n] != found[n]]
        if step.index <= LEARN_STEPS:
            for name, _, _ in changed:
                if not name.endswith(".training"):
                    self.learnt[name] = True
        return [line for line in changed if line[0] not in self.learnt]

    def _number(self, root: Any) -> int:
        """The number a root was given when it was first looked at."""
        known = self.numbers.get(id(root))
        if known is None or known[0]() is not root:
            self.given += 1
            known = self.numbers[id(root)] = (weakref.ref(root), self.given - 1)
        return known[1]


def _moved(before: Dict[str, Any], now: Dict[str, Any], name: str) -> bool:
    return before.get(name) != now.get(name)


def _works(read: Callable[[], Any]) -> bool:
    try:
        read()
    except Exception:
        return False
    return True


def _scalars(found: Dict[str, Any], prefix: str, module: Any) -> None:
    """Public scalar attributes of one module, and its mode."""
    for name, value in vars(module).items():
        if name[0] != "_" and (type(value) in (bool, int, float)):
            found[prefix + name] = value
