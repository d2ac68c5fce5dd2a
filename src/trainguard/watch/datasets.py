"""Which data set object opened a file, and how the data sets of a loader are put together.

Together with the order of indices (link *order*) this says which rows of which file were in which batch. A data set is
known by a number of its own in this process, kept through forks, so a worker names it as its parent does. Only instance
attributes are read, by name; no method or property of the job is called.

    layout   {"class", "number"}                       a data set that hands over rows itself
             {"class", "ends": […], "of": [layout, …]}  torch's ConcatDataset: index i is of the first with i < end
             {"class", "runs": [[first, count], …] | null, "of": [layout]}   torch's Subset
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, Dict, List, Optional, Tuple

FRAMES_LIMIT = 32
DEPTH_LIMIT = 4
NODES_LIMIT = 64
RUNS_LIMIT = 1024
INDICES_LIMIT = 1 << 16
KNOWN_LIMIT = 4096

_numbers: Dict[int, Tuple[Any, int]] = {}
_next = 0


def number_of(dataset: Any) -> Optional[int]:
    """This object's number in the process; None for one that cannot be told from a later one at its address."""
    global _next
    known = _numbers.get(id(dataset))
    if known is not None and known[0]() is dataset:
        return known[1]
    if len(_numbers) >= KNOWN_LIMIT:
        return None
    try:
        reference = weakref.ref(dataset)
    except TypeError:
        return None
    _numbers[id(dataset)] = (reference, _next)
    _next += 1
    return _next - 1


def opener(frame: Any, libraries: Tuple[str, ...]) -> Optional[int]:
    """Number of the data set on whose behalf `frame` runs: the innermost torch data set, or else one by its methods."""
    base = _class("torch.utils.data.dataset", "Dataset")
    alike: Any = None
    for _ in range(FRAMES_LIMIT):
        if frame is None:
            break
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            mro = type.mro(type(owner)) if isinstance(owner, object) and type(type(owner)) is type else []
            if base is not None and base in mro:
                return number_of(owner)
            if alike is None and not code.co_filename.startswith(libraries) and _is_alike(mro):
                alike = owner
        frame = frame.f_back
    return number_of(alike) if alike is not None else None


def _is_alike(mro: List[Any]) -> bool:
    return all(any(name in vars(kind) for kind in mro) for name in ("__getitem__", "__len__"))


def layout(dataset: Any) -> Optional[Dict[str, Any]]:
    """How `dataset` is put together; None where it is too deep or too wide."""
    left = [NODES_LIMIT]
    return _layout(dataset, 0, left)


def _layout(dataset: Any, depth: int, left: List[int]) -> Optional[Dict[str, Any]]:
    left[0] -= 1
    if depth > DEPTH_LIMIT or left[0] < 0:
        return None
    kind = type(dataset)
    out: Dict[str, Any] = {"class": ("%s.%s" % (kind.__module__, kind.__qualname__))[:200]}
    held = getattr(dataset, "__dict__", {})
    if kind is _class("torch.utils.data.dataset", "ConcatDataset"):
        inner = [_layout(each, depth + 1, left) for each in list(held["datasets"])[: NODES_LIMIT + 1]]
        if any(each is None for each in inner):
            return None
        out.update(ends=[int(end) for end in held["cumulative_sizes"]], of=inner)
    elif kind is _class("torch.utils.data.dataset", "Subset"):
        one = _layout(held["dataset"], depth + 1, left)
        if one is None:
            return None
        out.update(runs=_runs(held["indices"]), of=[one])
    else:
        out["number"] = number_of(dataset)
    return out


def _runs(indices: Any) -> Optional[List[List[int]]]:
    """Indices as runs of neighbours [first, count]; None for more than RUNS_LIMIT runs."""
    if isinstance(indices, range):
        if indices.step == 1:
            return [[indices.start, len(indices)]]
    elif type(indices) not in (list, tuple):
        return None
    if len(indices) > INDICES_LIMIT:
        return None
    runs: List[List[int]] = []
    for index in indices:
        if type(index) is not int:
            return None
        if runs and index == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
            continue
        if len(runs) >= RUNS_LIMIT:
            return None
        runs.append([index, 1])
    return runs


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)
