"""Link *hyperparameters*: what every parameter group says, at every step, and who changed it.

Value of the link in a step frame (absent when nothing changed; spec/evidence.md "hyperparameters"):

    {"groups": [{name: value, …, "n": tensors,    all of it: first step, every 256th, and when groups come or go
                 "tensors": [names]}]             (`tensors` names those that are tensors; absent for none)
     "class": …                                    with `groups`
     "changed": [[group, name, value]]             otherwise: what differs from the step before
     "inside": [[group, name, value]]              what differs after the update from before it, in checked steps
     "schedulers": [[class, steps it made, [last rates]]]   when one acts on this optimizer, with every change
     "writers": {name: ["file:line", …]}           lines that store it, at the first change that no scheduler set, and
                                                   when more are found
     "within": {name: ["file:line", …]}            those of them in the optimizer's own class, where it is not torch's
     "census": {"total", "frozen": [names], "without_grad": [names], "outside": [names], "counts": [3 numbers]}}
                                                   in checked steps, when it differs from the last one sent

Values: numbers, booleans, strings and null as they are; sequences as lists; a tensor of one element on the CPU as
its number; non-finite numbers as "nan", "inf", "-inf"; anything else as {"type": name}.
"""

from __future__ import annotations

import gc
import math
import weakref
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from . import roots, writers
from .client import Client

if TYPE_CHECKING:
    from .engine import Step, Track

REPEAT_STEPS = 256
NAMES_LIMIT = 32
SEARCH_LIMIT = 3
"""Times that the heap is searched for a scheduler, per optimizer, at first and where one is known that does not say
what was set: 10 to 50 ms each. As often for a library's objects that hold it."""
HOLDERS_LIMIT = 12
"""The latter in a process."""


class Hyperparameters:
    """Reads every group before the update and again after it."""

    name = "hyperparameters"
    every_step = True

    def __init__(self, client: Client) -> None:
        self.client = client
        self.own: Optional[Dict[str, List[str]]] = None
        """Lines of the job's own source that store hyper-parameters."""
        self.searches = 0

    def before(self, step: Step) -> None:
        """Compare every group with what it said at the step before."""
        memory = step.track.memory.setdefault(
            self.name, {"last": [], "json": [], "searches": 0, "again": 0, "schedulers": []}
        )
        groups = step.optimizer.param_groups
        copies = memory.get("copies")
        regular = step.index % REPEAT_STEPS != 0
        if regular and not (step.full and "stale" in memory) and _unchanged(groups, copies):
            step.scratch[self.name] = None
            return
        if regular and not step.full:
            moved = _moved(groups, copies)
            if moved:
                memory["stale"] = True
                step.scratch[self.name] = said = {"changed": moved}
                self._explain(step, memory, said, moved)
                return
        if memory.pop("stale", False):  # what moved was told step by step
            memory["last"] = [frozen(copy, count) for _, count, copy in copies] if copies is not None else []
            memory["json"] = []
        now = [frozen(group) for group in groups]
        memory["copies"] = _copies(groups)
        last = memory["last"]
        memory["last"] = now
        if now != last or not memory["json"]:
            memory["json"] = [scalars(group) for group in step.optimizer.param_groups]
        if now == last and regular:
            step.scratch[self.name] = None
            return
        value: Dict[str, Any] = {}
        changed = [] if len(now) != len(last) else _changed(step.optimizer.param_groups, now, last)
        if not last or len(now) != len(last) or step.index % REPEAT_STEPS == 0:
            value["groups"] = memory["json"]
            value["class"] = type(step.optimizer).__module__ + "." + type(step.optimizer).__qualname__
        if changed:
            value["changed"] = changed
        self._explain(step, memory, value, changed)
        step.scratch[self.name] = value

    def still(self, track: Track, optimizer: Any, still: Any) -> bool:
        """Every group says what it said; entries that can change in place have to be read."""
        memory = track.memory.get(self.name)
        copies = memory.get("copies") if memory is not None else None
        if copies is None:
            return False
        still.values.extend((group, tuple(copy.values())) for group, _, copy in copies)
        held, reference = memory, weakref.ref(optimizer)  # the optimizer itself must not be kept alive
        still.tell = lambda: self._tell(reference(), held or {}, still)
        still.until = min(still.until, (track.count // REPEAT_STEPS + 1) * REPEAT_STEPS)
        return True

    def _tell(self, optimizer: Any, memory: Dict[str, Any], still: Any) -> Optional[Dict[str, Any]]:
        """What a schedule did to a step that is not checked; None where there is none, or more than numbers moved."""
        copies = memory["copies"]
        reports = _reports(memory)
        moved = _moved(optimizer.param_groups, copies) if reports and optimizer is not None else None
        if not moved:
            return None
        memory["stale"] = True
        still.values = [(group, tuple(copy.values())) for group, _, copy in copies]
        value: Dict[str, Any] = {"changed": moved, "schedulers": reports}
        self._name_writers(optimizer, memory, value, moved, reports)
        return {self.name: value}

    def after(self, step: Step) -> Any:
        """Compare again; in checked steps, count the parameters that take no part."""
        value: Optional[Dict[str, Any]] = step.scratch.get(self.name)
        if not step.full:
            return value  # what the update changed shows before the next one
        memory = step.track.memory[self.name]
        groups = step.optimizer.param_groups
        now = memory["last"] if _unchanged(groups, memory.get("copies")) else [frozen(group) for group in groups]
        if now != memory["last"]:
            memory["copies"] = _copies(groups)
            value = value or {}
            if len(now) == len(memory["last"]):
                value["inside"] = _changed(groups, now, memory["last"])
                self._name_writers(step.optimizer, memory, value, value["inside"], [])
            memory["last"] = now
            memory["json"] = [scalars(group) for group in groups]
        if step.ready and (step.index < 4 or step.index % 4 == 0 or step.track.without_grad != memory.get("without")):
            memory["without"] = step.track.without_grad
            census = _census(step)
            if census != memory.get("census"):
                memory["census"] = census
                value = value or {}
                value["census"] = census
        return value

    def _explain(self, step: Step, memory: Dict[str, Any], value: Dict[str, Any], changed: List[Any]) -> None:
        first = step.index == 1 and "step" in vars(step.optimizer)
        reports = _reports(memory)
        if (first or changed) and not reports and memory["searches"] < SEARCH_LIMIT:
            memory["searches"] += 1
            memory["schedulers"] = _find_schedulers(step.torch, step.optimizer)
        elif not _scheduled(changed, reports) and memory["again"] < SEARCH_LIMIT:
            memory["again"] += 1  # averaging puts another scheduler in the place of the first
            memory["schedulers"] = _find_schedulers(step.torch, step.optimizer)
        reports = _reports(memory)
        if reports:
            value["schedulers"] = reports
        self._name_writers(step.optimizer, memory, value, changed, reports)

    def _name_writers(
        self, optimizer: Any, memory: Dict[str, Any], value: Dict[str, Any], changed: List[Any], reports: List[Any]
    ) -> None:
        """Send which lines store hyper-parameters, where a change is not what a scheduler says.

        The job's own and those of the optimizer's class first; if they do not store what changed, those of the
        libraries' objects that hold the optimizer.
        """
        if _scheduled(changed, reports):
            return
        lines = memory.get("lines")
        if lines is None:
            self.own = writers.places() if self.own is None else self.own
            within = writers.places_within([type(optimizer)])
            lines = memory["lines"] = _joined(self.own, within)
            value["writers"] = lines
            if within:
                value["within"] = within
        names = {name for _, name, _ in changed}
        if all(lines.get(name) or lines.get(writers.ANY) for name in names):
            return
        if memory.get("held", 0) < SEARCH_LIMIT and self.searches < HOLDERS_LIMIT:
            memory["held"] = memory.get("held", 0) + 1
            self.searches += 1
            found = writers.places_within(writers.holders(optimizer))
            if found:
                value["writers"] = memory["lines"] = _joined(lines, found)


def _joined(one: Dict[str, List[str]], other: Dict[str, List[str]]) -> Dict[str, List[str]]:
    return {name: sorted({*one.get(name, ()), *other.get(name, ())}) for name in sorted({*one, *other})}


def _copies(groups: List[Any]) -> Optional[List[Tuple[Any, int, Dict[str, Any]]]]:
    """What `_unchanged` compares with; None where an entry can change in place (a tensor, a list)."""
    out: List[Tuple[Any, int, Dict[str, Any]]] = []
    for group in groups:
        rest = {key: value for key, value in group.items() if key != "params" and key != "param_names"}
        if any(hasattr(value, "_version") or isinstance(value, (list, dict)) for value in rest.values()):
            return None
        out.append((group, len(group["params"]), dict(group)))
    return out


def _unchanged(groups: List[Any], copies: Optional[List[Tuple[Any, int, Dict[str, Any]]]]) -> bool:
    """Whether every group is the same object with equal entries: the quick way, for most steps."""
    if copies is None or len(groups) != len(copies):
        return False
    for group, (known, count, copy) in zip(groups, copies):
        if group is not known or len(group["params"]) != count or group["params"] is not copy["params"]:
            return False
        try:
            if group != copy:
                return False
        except Exception:  # a tensor took the place of a number
            return False
    return True


def _moved(groups: List[Any], copies: Optional[List[Tuple[Any, int, Dict[str, Any]]]]) -> Optional[List[List[Any]]]:
    """[group, name, value] of numbers that moved, and the copies brought up to date; None for any other change."""
    if copies is None or len(groups) != len(copies):
        return None
    for group, (known, count, copy) in zip(groups, copies):
        if group is not known or len(group) != len(copy) or group["params"] is not copy["params"]:
            return None
        if len(group["params"]) != count:
            return None
    found: List[Tuple[int, Any, Any]] = []
    for number, (group, (_, _, copy)) in enumerate(zip(groups, copies)):
        for key, value in group.items():
            old = copy.get(key, _moved)
            if old is value or key == "params" or key == "param_names":
                continue
            if not _scalar(value) or not _scalar(old):
                return None
            if old != value:
                found.append((number, key, value))
    for number, key, value in found:
        copies[number][2][key] = value
    return [[number, str(key), _json(value)] for number, key, value in found]


def _scalar(value: Any) -> bool:
    """Whether it is a number, or a tuple of numbers such as betas."""
    if type(value) is tuple:
        return all(type(each) in (float, int, bool) for each in value)
    return value is None or type(value) in (float, int, bool, str)


def frozen(group: Dict[str, Any], count: Optional[int] = None) -> Dict[str, Any]:
    """What of a group can change, in a form that `==` compares exactly and cheaply."""
    out: Dict[str, Any] = {"params": len(group["params"]) if count is None else count}
    for key, value in group.items():
        kind = type(value)
        if kind is float or kind is bool or kind is int or value is None or kind is str:
            out[key] = value
        elif kind is tuple or kind is list:
            if key != "params" and key != "param_names":
                out[key] = tuple(value) if not any(hasattr(v, "_version") for v in value) else tuple(map(_plain, value))
        elif hasattr(value, "_version"):
            out[key] = _plain(value)
    return out


def scalars(group: Dict[str, Any]) -> Dict[str, Any]:
    """All hyper-parameters of a group as JSON values, and `n`, how many tensors it holds."""
    out = {str(key): _json(value) for key, value in group.items() if key not in ("params", "param_names")}
    out["n"] = len(group["params"])
    tensors = [str(key) for key, value in group.items() if _holds_tensor(key, value)]
    if tensors:
        out["tensors"] = tensors
    return out


def _holds_tensor(key: Any, value: Any) -> bool:
    if key == "params":
        return False
    return hasattr(value, "_version") or (
        isinstance(value, (list, tuple)) and any(hasattr(v, "_version") for v in value)
    )


def _plain(value: Any) -> Any:
    """A tensor's number where it is on the CPU; elsewhere its version, for reading it would wait for the device."""
    if not hasattr(value, "_version"):
        return value
    if value.numel() == 1 and value.device.type == "cpu":
        return value.item()
    return (id(value), value._version)


def _json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else repr(float(value))
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value[:16]]
    if hasattr(value, "_version") and value.numel() == 1 and value.is_floating_point():
        return _json(value.item())
    return {"type": type(value).__name__}


def _changed(groups: List[Any], now: List[Dict[str, Any]], last: List[Dict[str, Any]]) -> List[List[Any]]:
    out: List[List[Any]] = []
    for number, (new, old) in enumerate(zip(now, last)):
        if new == old:
            continue
        for key in {**old, **new}:
            if new.get(key) != old.get(key) or (key in new) != (key in old):
                value = new["params"] if key == "params" else _json(groups[number].get(key))
                out.append([number, "n" if key == "params" else str(key), value])
    return out


def _find_schedulers(torch: Any, optimizer: Any) -> List[Any]:
    """Weak references to torch schedulers that act on this optimizer's groups, by one look over the heap."""
    module = torch.optim.lr_scheduler
    kinds = _subclasses(module.LRScheduler)
    found = [item for item in gc.get_objects() if type(item) in kinds]
    mine = [
        item
        for item in found
        if getattr(getattr(item, "optimizer", None), "param_groups", None) is optimizer.param_groups
    ]
    return [weakref.ref(item) for item in mine[:16]]


def _subclasses(kind: Any) -> Any:
    known = {kind}
    waiting = [kind]
    while waiting:
        for each in waiting.pop().__subclasses__():
            if each not in known:
                known.add(each)
                waiting.append(each)
    return known


def _reports(memory: Dict[str, Any]) -> List[List[Any]]:
    """What the schedulers that are still there say."""
    held = [ref() for ref in memory["schedulers"]]
    return [_report(scheduler) for scheduler in held if scheduler is not None]


def _scheduled(changed: List[Any], reports: List[Any]) -> bool:
    """Whether every change is of a rate, to what a scheduler set for that group."""
    return all(
        name == "lr" and any(number < len(rates) and rates[number] == now for _, _, rates in reports)
        for number, name, now in changed
    )


def _report(scheduler: Any) -> List[Any]:
    kind = type(scheduler)
    last = getattr(scheduler, "_last_lr", None) or []
    return [
        "%s.%s" % (kind.__module__, kind.__qualname__),
        getattr(scheduler, "_step_count", None) if isinstance(getattr(scheduler, "_step_count", None), int) else None,
        [_json(value) for value in list(last)[:64]],
    ]


def _census(step: Step) -> Dict[str, Any]:
    """Which parameters take no part in this step: frozen, without gradient, or in no optimizer."""
    track: Track = step.track
    frozen_names: List[str] = []
    without: List[str] = []
    for entry in track.entries:
        if not entry.param.requires_grad:
            frozen_names.append(entry.name)
        elif entry.position in track.without_grad:
            without.append(entry.name)
    outside = _outside(step)
    return {
        "total": len(track.entries),
        "frozen": frozen_names[:NAMES_LIMIT],
        "without_grad": without[:NAMES_LIMIT],
        "outside": outside[:NAMES_LIMIT],
        "counts": [len(frozen_names), len(without), len(outside)],
    }


def _outside(step: Step) -> List[str]:
    """Trainable parameters of the job's models that no optimizer holds; looked for at the first steps only."""
    memory = step.track.memory
    if step.index in (2, 20) or "outside" not in memory:
        held = {id(entry.param) for track in list(step.engine.tracks.values()) for entry in track.entries}
        names: List[str] = []
        for root in roots.roots():
            for name, parameter in root.named_parameters():
                if parameter.requires_grad and id(parameter) not in held:
                    names.append(name)
        memory["outside"] = names
    result: List[str] = memory["outside"]
    return result
