"""Real values beside the fingerprints of link *commits*: not where two runs part, but by how much, so that a cause can
be estimated before it is re-enacted (spec/replay.md, "Values"; replay/explain.py).

    {"places": [[position, offset, count], …],   where, in the first frame of an optimizer and when its groups change
     "lanes": {"before": b64, "raw": b64, "used": b64, "weights": b64, "state:<key>": b64},    float32, little-endian
     "edited": [[position, sum, ramp, [value, …]], …]}     tensors that are not what the step before left; sums in full

At most PLACES tensors, evenly spread, LANE neighbouring elements of each, at places drawn from the run's key. `sum` and
`ramp` are over the tensor's 64-bit words x_i: sum x_i and sum (i + 1) x_i mod 2**64, so that one changed word gives its
own place and its new value. A judge proves nothing from these: equality of fingerprints does.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import math
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import sample

if TYPE_CHECKING:
    from .engine import Entry, Step, Track

PLACES = 8
LANE = 4
EDITED_LIMIT = 8
STATE_KEYS = 4
WORDS_LIMIT = 1 << 24
"""No ramp over a longer tensor: it needs as much memory again."""

MASK = (1 << 64) - 1


def places(track: Track, seed: bytes) -> List[List[int]]:
    """[position, offset, count] of the elements of an optimizer whose values are said."""
    able = [entry for entry in track.entries if entry.reason is None and entry.param.is_contiguous()]
    chosen = [able[len(able) * turn // PLACES] for turn in range(PLACES)] if len(able) > PLACES else able
    found = []
    for entry in chosen:
        count = min(LANE, entry.numel)
        drawn = hashlib.blake2b(b"%d" % entry.position, key=seed, digest_size=8).digest()
        found.append([entry.position, int.from_bytes(drawn, "little") % (entry.numel - count + 1), count])
    return found


class Lanes:
    """The values of one step, gathered as it goes."""

    __slots__ = ("entries", "places", "rows", "torch")

    def __init__(self, torch: Any, entries: List[Entry], where: List[List[int]]) -> None:
        self.torch = torch
        self.entries = entries
        self.places = where
        self.rows: Dict[str, Any] = {}

    def weights(self, name: str) -> None:
        """Values of the parameters as they are now."""
        self._keep(name, [self.entries[position].param for position, _, _ in self.places])

    def gradients(self, name: str) -> None:
        """Values of the gradients as they are now; zeros where there is none."""
        self._keep(name, [self.entries[position].param.grad for position, _, _ in self.places])

    def state(self, optimizer: Any) -> None:
        """Values of every entry of the optimizer's state that has one number for each of a parameter."""
        keys: Dict[str, None] = {}
        held = [optimizer.state.get(self.entries[position].param) or {} for position, _, _ in self.places]
        for each in held:
            keys.update(dict.fromkeys(key for key, value in each.items() if getattr(value, "numel", _none)() > 1))
        for key in list(keys)[:STATE_KEYS]:
            self._keep("state:" + str(key), [each.get(key) for each in held])

    def _keep(self, name: str, tensors: List[Any]) -> None:
        torch = self.torch
        pieces = []
        for tensor, (position, offset, count) in zip(tensors, self.places):
            piece = None
            if tensor is not None:
                tensor = sample.plain(tensor.detach())
                if tensor.is_contiguous() and tensor.numel() == self.entries[position].numel:
                    piece = tensor.as_strided((count,), (1,), tensor.storage_offset() + offset).float()
            pieces.append(torch.zeros(count, device=self.entries[position].param.device) if piece is None else piece)
        if pieces:
            device = pieces[0].device
            self.rows[name] = torch.cat([piece if piece.device == device else piece.to(device) for piece in pieces])

    def told(self) -> Dict[str, str]:
        """All rows, with one copy from the device."""
        if not self.rows:
            return {}
        flat = self.torch.cat([row.to(self.torch.float32) for row in self.rows.values()]).cpu()
        data = ctypes.string_at(flat.data_ptr(), 4 * flat.numel())
        out, used = {}, 0
        for name, row in self.rows.items():
            out[name] = base64.b64encode(data[used : used + 4 * row.numel()]).decode("ascii")
            used += 4 * row.numel()
        return out


def _none() -> int:
    return 0


def edited(step: Step, sums: List[Any], known: Optional[Tuple[Any, Any]], view: Any) -> List[List[Any]]:
    """Tensors whose sum is another than after the step before. CPU only: anywhere else the answer would have to be
    waited for. known: (signature, sums) as they were left; view(param) → its words."""
    track, torch = step.track, step.torch
    if known is None or known[0] is not track.signature or len(known[1]) != len(sums):
        return []
    if not sums or sums[0].device.type != "cpu" or known[1][0].device.type != "cpu":
        return []
    now, was = torch.stack(sums), torch.stack(known[1])
    if torch.equal(now, was):
        return []
    found = []
    for position in (now != was).nonzero().flatten().tolist()[:EDITED_LIMIT]:
        entry = track.entries[position]
        words = view(entry.param)
        found.append([position, *both(torch, words), heads(entry.param)])
    return found


def both(torch: Any, words: Any) -> Tuple[str, str]:
    """Sum and ramp of 64-bit words, mod 2**64, in decimal (too large for JSON numbers)."""
    if words.numel() > WORDS_LIMIT:
        return str(int(words.sum()) & MASK), ""
    ramp = torch.arange(1, words.numel() + 1, device=words.device)
    return str(int(words.sum()) & MASK), str(int((words * ramp).sum()) & MASK)


def heads(param: Any) -> List[float]:
    """Some of its values, exactly: the same ones of every tensor of this size."""
    plain = sample.plain(param.detach())
    if not plain.is_floating_point() or not plain.is_contiguous():
        return []
    flat = plain.view(-1)
    count = min(LANE, flat.numel())
    stride = flat.numel() // count if count else 1
    return [value if math.isfinite(value) else 0.0 for value in flat[:: max(1, stride)][:count].tolist()]
