"""Run by the interpreter that replayed: stdin {name: [clean, run, start]}, folders; stdout the distances.

Alone: the standard library and torch. Reads replay points (spec/replay.md, "Points") and nothing else; every offset is
checked before it is used. Norms are L2 in float64; a value that is not finite makes a distance infinite.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """One answer."""
    given = json.loads(sys.stdin.buffer.read())
    told = {name: between(opened(clean), opened(run), opened(start)) for name, (clean, run, start) in given.items()}
    sys.stdout.write(json.dumps(told))


def opened(folder: str) -> dict[str, Any]:
    """Tensor → its values, of what is trained; random streams and modules that nobody trains are left out."""
    index = json.loads((Path(folder) / "index.json").read_bytes())
    data = bytearray((Path(folder) / "data").read_bytes())
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    found = {}
    for name, dtype, shape, offset, nbytes in index["tensors"]:
        if name.startswith(("rng/", "param/x", "buffer/x")):
            continue
        if not 0 <= offset <= offset + nbytes <= len(data):
            raise ValueError(f"{name} lies outside the data")
        found[name] = flat[offset : offset + nbytes].view(getattr(torch, dtype)).reshape(shape)
    for name, number in index.get("numbers", {}).items():
        found[name] = torch.tensor(float(number), dtype=torch.float64)
    return found


def between(clean: dict[str, Any], run: dict[str, Any], start: dict[str, Any]) -> dict[str, list[float]]:
    """[‖clean - run‖, ‖clean - start‖, ‖clean‖] for each tensor; infinite where only one side has it."""
    told = {}
    for name in sorted(clean.keys() | run.keys()):
        one, two = clean.get(name), run.get(name)
        if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
            told[name] = [sys.float_info.max, 0.0, 0.0]
            continue
        first = start.get(name)
        moved = norm(one, first) if first is not None and first.shape == one.shape else norm(one, None)
        told[name] = [norm(one, two), moved, norm(one, None)]
    return told


def norm(one: Any, two: Any) -> float:
    """‖one - two‖, or ‖one‖."""
    kind = torch.complex128 if one.is_complex() else torch.float64
    x = one.to(kind)
    if two is not None:
        same = one == two
        x = torch.where(same, torch.zeros((), dtype=kind), x - two.to(kind))
    value = float(torch.linalg.vector_norm(x)) if x.numel() else 0.0
    return value if math.isfinite(value) else sys.float_info.max


if __name__ == "__main__":
    main()
