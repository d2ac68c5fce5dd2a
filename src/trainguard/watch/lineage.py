"""What backward started from: the names of the first operations between the loss and the weights.

Read while backward runs, from inside a gradient hook: torch's own frame on the stack of this thread holds the loss, and
the loss holds its graph. Nothing is executed and nothing is kept. Where hooks run in another thread (devices other than
the CPU) the frame is not there, and nothing is said.

A tail is a list of names, breadth first from the loss: `NegBackward0`, `MeanBackward0`, …; a gradient that backward
was called with comes first, as `seed -1` (one number) or `seed` (a tensor). Data do not stand in it, only operations.
"""

from __future__ import annotations

import zlib
from typing import Any, List

NODES_LIMIT = 10
FRAMES_LIMIT = 16
NAME_LIMIT = 60


def tail_of(frame: Any) -> List[str]:
    """The tail of the backward pass that is running below `frame`; empty where it cannot be seen."""
    for _ in range(FRAMES_LIMIT):
        if frame is None:
            return []
        if frame.f_code.co_name == "_engine_run_backward":
            return _tail(frame.f_locals.get("t_outputs") or (), frame.f_locals.get("args") or ())
        frame = frame.f_back
    return []


def key_of(tail: List[str]) -> str:
    """Checksum of a tail: 8 hex digits."""
    return "%08x" % zlib.crc32("\n".join(tail).encode())


def _tail(roots: Any, arguments: Any) -> List[str]:
    names = [name for seed in (arguments[0] if arguments else ()) or () for name in _seed(seed)]
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    position = 0
    while position < len(waiting) and len(names) < NODES_LIMIT:
        node = waiting[position]
        position += 1
        names.append(str(node.name())[:NAME_LIMIT])
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return names


def _seed(seed: Any) -> List[str]:
    """Nothing for the usual 1; a number is only read where that waits for no device."""
    if seed is None:
        return []
    if seed.numel() != 1 or seed.device.type != "cpu":
        return ["seed"]
    value = float(seed)
    return [] if value == 1.0 else ["seed %.6g" % value]
