"""How far apart two states are, tensor by tensor: what tolerance is judged by (spec/replay.md, "Tolerance").

    distances(python, {"0/24": clean}, {"0/24": run}, {"0": start})["0/24"]["param/0/0.weight"] → (Δ, move, size)

Only where an audit asks for it. The sums are made by `_distances.py` in the interpreter that replayed, which has torch:
the auditor needs none.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trainguard.errors import Unavailable

SCRIPT = Path(__file__).parent / "_distances.py"
SECONDS = 600.0

Distances = dict[str, dict[str, tuple[float, float, float]]]


def distances(
    python: str, clean: Mapping[str, Path], against: Mapping[str, str], starts: Mapping[str, str]
) -> Distances:
    """`rank/step` → tensor → (‖clean - run‖, ‖clean - start‖, ‖clean‖) for every state that is in both.

    starts: rank → folder of the state that moves are measured from; without one, its first state in `clean` is taken.
    Raises Unavailable where they cannot be read.
    """
    pairs: dict[str, list[str]] = {}
    first = dict(starts)
    for name in sorted(clean, key=lambda each: int(each.partition("/")[2])):
        start = first.setdefault(name.partition("/")[0], str(clean[name]))
        if name in against:
            pairs[name] = [str(clean[name]), against[name], start]
    if not pairs:
        return {}
    try:
        done = subprocess.run(
            [python, "-I", str(SCRIPT)], input=json.dumps(pairs).encode(), capture_output=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=Distances)
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        reason = [str(error)]
    raise Unavailable(f"{python}: states cannot be compared: {reason[0][:300]}")
