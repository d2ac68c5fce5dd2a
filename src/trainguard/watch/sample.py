"""Reads a few elements of many tensors at once, without touching anything the job can see.

Everything here runs under no_grad, writes to no tensor of the job, draws no random numbers and, per phase, makes
one `cat` and one copy. Blobs are `{"f": "<f" | "<d", "b": base64}`: little-endian float32 or float64, exact
(bfloat16 and float16 widen without loss).
"""

from __future__ import annotations

import base64
import ctypes
from typing import Any, Dict, List, Optional, Tuple

Place = Tuple[int, int, int]
"""offset, stride, count: the flat indices offset, offset + stride, … of a tensor."""


def place(numel: int, count: int, number: int) -> Place:
    """Where to sample `count` of `numel` elements, from the secret `number` (128 bits)."""
    if numel <= count or count < 2:
        return (0, 1, min(numel, max(count, 1)))
    low, high = number & 0xFFFFFFFFFFFFFFFF, number >> 64
    stride = 1 + low % ((numel - 1) // (count - 1))
    return (high % (numel - stride * (count - 1)), stride, count)


def run(numel: int, count: int, number: int) -> Place:
    """`count` neighbours out of `numel` elements: cheaper to read than scattered ones, fit for equality."""
    count = min(numel, count)
    return (number % (numel - count + 1), 1, count)


def plain(tensor: Any) -> Any:
    """The tensor itself, or the local shard of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def view(torch: Any, tensor: Any, where: Place) -> Any:
    """A one-dimensional look at `where`, for dense tensors without a copy. Caller holds no_grad."""
    offset, stride, count = where
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (stride,), tensor.storage_offset() + offset)
    stop = offset + stride * (count - 1) + 1
    return torch.take(tensor, torch.arange(offset, stop, stride, device=tensor.device))


def why_not(tensor: Any) -> Optional[str]:
    """Why this tensor cannot be sampled, or None."""
    if str(tensor.layout) != "torch.strided":
        return "sparse"
    if not tensor.is_floating_point():
        return "complex" if tensor.is_complex() else "not floating point"
    if tensor.element_size() < 2:
        return "8-bit"
    if tensor.numel() == 0:
        return "empty"
    return None


def shared(param: Any) -> Optional[str]:
    """Why what is written to this parameter may be another process's work, or None."""
    try:
        mine = param.device.type != "cpu" or not param.is_shared()
    except (RuntimeError, NotImplementedError):  # it has no memory of its own, as a share of a tensor
        return None
    return None if mine else "in shared memory: other processes write to it"


class Gathered:
    """Values of many views, copied on their devices; `raw` fetches them. The order of the views is kept."""

    __slots__ = ("order", "parts")

    def __init__(self, torch: Any, views: List[Any]) -> None:
        device = views[0].device
        self.order: Optional[List[Tuple[int, int]]] = None
        """(part, length) of every view, when they live on several devices."""
        if all(item.device == device for item in views):
            self.parts = [torch.cat(views)]
            return
        devices: List[Any] = []
        shares: List[List[Any]] = []
        self.order = []
        for item in views:
            if item.device not in devices:
                devices.append(item.device)
                shares.append([])
            part = devices.index(item.device)
            shares[part].append(item)
            self.order.append((part, item.numel()))
        self.parts = [torch.cat(share) for share in shares]

    def raw(self, torch: Any) -> Tuple[str, bytes]:
        """("<f" or "<d", little-endian bytes) of all values. Waits once for every device."""
        if self.order is None:
            return raw(torch, self.parts[0])
        parts = [part.cpu() for part in self.parts]
        used = [0] * len(parts)
        pieces = []
        for part, length in self.order:
            pieces.append(parts[part][used[part] : used[part] + length])
            used[part] += length
        return raw(torch, torch.cat(pieces))


def raw(torch: Any, values: Any) -> Tuple[str, bytes]:
    """("<f" or "<d", the little-endian bytes) of a flat floating tensor. Waits for its device."""
    if values.dtype != torch.float64 and values.dtype != torch.float32:
        values = values.float()
    values = values.cpu()
    size = values.element_size()
    return ("<f" if size == 4 else "<d", ctypes.string_at(values.data_ptr(), values.numel() * size))


def blob(kind: str, data: bytes) -> Dict[str, str]:
    """The JSON form of what `raw` gives."""
    return {"f": kind, "b": base64.b64encode(data).decode("ascii")}
