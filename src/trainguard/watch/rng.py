"""Link *rng*: where the random streams stand at every step, and every time somebody seeds them again.

Value of the link in a step frame (spec/evidence.md "rng"):

    {"seed": torch.initial_seed(), when it differs from the last one sent; read in checked steps and after seeding
     "torch": digest of the CPU generator's state before the step, in checked steps,
     "cuda": [[device, seed, offset]], where CUDA is in use, in checked steps
     "after": `torch` once more after the step,
     "numpy", "python": digests of the global generators, where the modules are loaded,
     "dropout": whether a module in training mode draws random numbers: these four in every 8th checked step
     "seeded": ["file:line:function", …] stack, innermost first, of the last torch.manual_seed since the step before
     "seeders": lines of the job's own source that seed generators in a loop or a function, once
     "states": {"torch" | "numpy" | "python": base64 of the 2496 bytes of the block}, now and then}

All three are MT19937. A digest is `<8 bytes of BLAKE2b over the block of 624 words, hex>.<position in it>`, so a judge
who holds one state can walk the stream and say whether, and after how many draws, it comes by another. Whole states
(3.3 kB) go out when a generator is first read, at an optimizer's first step, after a seeding, and at every 64th.

Where a call of `torch.manual_seed` came from is known without wrapping it: as long as an accelerator is not in use,
torch itself keeps the stack of the last seeding call, to repeat it when the device wakes up.
"""

from __future__ import annotations

import array
import base64
import ctypes
import hashlib
import os
import struct
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import roots, seeders
from .client import Client

if TYPE_CHECKING:
    from .engine import Step

DRAWING = ("Dropout", "AlphaDropout", "FeatureAlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d", "RReLU")
FRAMES_LIMIT = 6
OTHERS_EVERY = 8
WHOLE_EVERY = 64
"""Readings of a generator after which its whole state is told again."""
WORDS = 624
_TORCH_HEAD = struct.Struct("<QiiQ")
"""Start of a CPU generator's state: seed, words left in the block, whether seeded, index of the next word (torch's
legacy layout, at::CPUGeneratorImplStateLegacy); 624 words of 64 bits follow."""


class Rng:
    """Reads generator states; draws from none."""

    name = "rng"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.seed: Optional[int] = None
        self.trackers: Optional[List[Any]] = None
        """torch's memories of the last seeding call, one for each kind of device."""
        self.calls: List[Any] = []
        self.dropout: Optional[bool] = None
        self.seeders: Optional[List[str]] = None
        self.readings: Dict[str, int] = {}
        """Generator → how often its state was read."""

    def before(self, step: Step) -> None:
        """The state that this step will draw from."""
        value: Dict[str, Any] = {}
        place = self._seeding_call()
        if place is not None:
            value["seeded"] = place
        if step.full or place is not None:
            self._read(step, value)
        step.scratch[self.name] = value

    def still(self, track: Any, optimizer: Any, still: Any) -> bool:
        """Nobody seeds."""
        if self.trackers is None:
            return False
        still.same.extend((each, "manual_seed_all_cb", call) for each, call in zip(self.trackers, self.calls))
        return True

    def _read(self, step: Step, value: Dict[str, Any]) -> None:
        generator = step.torch.default_generator
        seed = generator.initial_seed()
        if seed != self.seed:
            self.seed = seed
            value["seed"] = seed
        if step.full:
            self._told(value, "torch", torch_words(generator), "seeded" in value or step.index == 1)
            _cuda(step.torch, value)
            if step.index % OTHERS_EVERY == 1:
                self._others(step, value)

    def _told(self, value: Dict[str, Any], name: str, state: Optional[Tuple[bytes, int]], whole: bool) -> None:
        """Put the digest of `state` into the value, and now and then the state itself."""
        if state is None:
            return
        value[name] = digest_of(*state)
        count = self.readings.get(name, 0)
        self.readings[name] = count + 1
        if whole or count % WHOLE_EVERY == 0:
            value.setdefault("states", {})[name] = base64.b64encode(state[0]).decode("ascii")

    def after(self, step: Step) -> Any:
        """The state that it left behind."""
        value = step.scratch.get(self.name)
        if not value:
            return None
        if "dropout" in value:
            value["after"] = digest_of(*torch_words(step.torch.default_generator))
        return value

    def _others(self, step: Step, value: Dict[str, Any]) -> None:
        self._told(value, "numpy", _numpy(), False)
        self._told(value, "python", _python(), False)
        if self.seeders is None:
            self.seeders = seeders.places()
            if self.seeders:
                value["seeders"] = self.seeders
        if self.dropout is None or step.index % 64 == 1:
            self.dropout = any(_draws(module) for root in roots.roots() for module in root.modules())
        value["dropout"] = self.dropout

    def _seeding_call(self) -> Any:
        """Where the generators were last seeded, if that happened since the step before."""
        if self.trackers is None:
            modules = [sys.modules.get("torch." + name) for name in ("cuda", "xpu")]
            found = [getattr(module, "_lazy_seed_tracker", None) for module in modules]
            trackers = [tracker for tracker in found if hasattr(tracker, "manual_seed_all_cb")]
            self.calls = [None] * len(trackers)
            self.trackers = trackers  # last: another thread that finds them finds the calls too
        place = None
        for number, tracker in enumerate(self.trackers):
            call = tracker.manual_seed_all_cb
            if call is not self.calls[number]:
                self.calls[number] = call
                place = _place(call[1]) if call is not None else None
        return place

    def forked(self) -> None:
        """Nothing is shared with the parent process."""


def torch_words(generator: Any) -> Tuple[bytes, int]:
    """The 2496 little-endian bytes of a CPU generator's block, and the index of its next word (624: used up).

    Raises ValueError for a state that is not laid out as MT19937's.
    """
    state = generator.get_state()
    size = int(state.numel())
    if size < _TORCH_HEAD.size + 8 * WORDS:
        raise ValueError("a generator state of %d bytes" % size)
    raw = ctypes.string_at(state.data_ptr(), size)
    _, left, _, position = _TORCH_HEAD.unpack_from(raw)
    words = array.array("I", raw[_TORCH_HEAD.size : _TORCH_HEAD.size + 8 * WORDS])[::2]
    return words.tobytes(), WORDS if left == 1 else position


def digest_of(words: bytes, position: int) -> str:
    """What a frame says of a state: digest of the block, and the position in it."""
    return "%s.%d" % (hashlib.blake2b(words, digest_size=8).hexdigest(), position)


def _cuda(torch: Any, value: Dict[str, Any]) -> None:
    if torch.cuda.is_initialized():
        index = torch.cuda.current_device()
        each = torch.cuda.default_generators[index]
        value["cuda"] = [[index, str(each.initial_seed()), each.get_offset()]]


def _numpy() -> Optional[Tuple[bytes, int]]:
    module = sys.modules.get("numpy.random")
    if module is None:
        return None
    inner = module.get_state(legacy=False)["state"]
    if not isinstance(inner, dict) or "key" not in inner:
        return None
    return inner["key"].astype("<u4").tobytes(), int(inner["pos"])


def _python() -> Optional[Tuple[bytes, int]]:
    module = sys.modules.get("random")
    if module is None:
        return None
    state = module.getstate()[1]
    return struct.pack("<%dI" % WORDS, *state[:WORDS]), state[WORDS]


def states(torch: Any) -> List[Optional[str]]:
    """Digests of the global generators of torch (CPU), numpy and Python; None for one that is not loaded."""
    found = (torch_words(torch.default_generator), _numpy(), _python())
    return [None if state is None else digest_of(*state) for state in found]


def _draws(module: Any) -> bool:
    if not module.training:
        return False
    if type(module).__name__ in DRAWING:
        return bool(getattr(module, "p", 1.0))
    rate = module.__dict__.get("dropout")
    return isinstance(rate, float) and rate > 0.0


def _place(stack: List[str]) -> List[str]:
    """`file:line:function` of the innermost frames outside torch's own seeding code, innermost first."""
    out: List[str] = []
    for text in reversed(stack):
        head = text.strip().split("\n", 1)[0]
        parts = head.split('"')
        if len(parts) < 3 or _of_torch_seeding(parts[1]):
            continue
        rest = parts[2].split(",")
        line = rest[1].strip()[5:] if len(rest) > 1 else "?"
        function = rest[2].strip()[3:] if len(rest) > 2 else "?"
        out.append("%s:%s:%s" % (parts[1], line, function))
        if len(out) == FRAMES_LIMIT:
            break
    return out


def _of_torch_seeding(path: str) -> bool:
    torch = sys.modules["torch"]
    folder = os.path.dirname(str(torch.__file__))
    return path in (
        os.path.join(folder, "random.py"),
        os.path.join(folder, "cuda", "__init__.py"),
        os.path.join(folder, "cuda", "random.py"),
        os.path.join(folder, "xpu", "__init__.py"),
        os.path.join(folder, "xpu", "random.py"),
        os.path.join(folder, "_dynamo", "eval_frame.py"),
        os.path.join(folder, "_compile.py"),
    )
