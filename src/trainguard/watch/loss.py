"""The losses on a tape: what each call of one of torch's loss functions asked for, and what it gave.

Part of link *truth*, in the same steps (tape.py). For every call of a function in REFERENCES whose result is one
number, the loss is computed anew from the tensors and settings that were given, in float64, by its definition. What was
given is what the calling line says, where its settings are written there (or in the module that holds them), so that a
function that changes them on the way is seen.

A call can also end up elsewhere: `F.cross_entropy` is a name. Where the calling line names one of torch's own functions
and code outside torch answers, that code is named, with what torch's function would have given.

Value (`losses` in link *truth*; spec/evidence.md "truth"):

    {"calls": [{"name", "place", "value": as the job saw it, "reference": by definition, "factor": how often it is in
       what backward started from (null: not linearly), "rows": all, "used": that count, "settings": {name: value},
       "by": place of code outside torch that answered, "why": why there is no reference}],
     "rest": what no call accounts for}
"""

from __future__ import annotations

import ast
import itertools
import linecache
import math
import sys
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from . import facts

if TYPE_CHECKING:
    from .tape import Node, Replay, Root, Tape

CALLS_LIMIT = 64
FRAMES_LIMIT = 48
ELEMENTS_LIMIT = 1 << 24
"""Largest input that is recomputed."""

DEFAULTS: Dict[str, Dict[str, Any]] = {
    "cross_entropy": {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0},
    "nll_loss": {"weight": None, "ignore_index": -100, "reduction": "mean"},
    "mse_loss": {"weight": None, "reduction": "mean"},
    "l1_loss": {"weight": None, "reduction": "mean"},
    "smooth_l1_loss": {"beta": 1.0, "reduction": "mean"},
    "huber_loss": {"delta": 1.0, "weight": None, "reduction": "mean"},
    "binary_cross_entropy": {"weight": None, "reduction": "mean"},
    "binary_cross_entropy_with_logits": {"weight": None, "pos_weight": None, "reduction": "mean"},
}
"""Loss function of torch.nn.functional → its settings where a call does not name them."""

SCALES = ("aten::mul", "aten::div")
SUMS = {"aten::add": 1.0, "aten::sub": -1.0}
SAME = ("aten::clone", "aten::_to_copy", "aten::alias", "aten::view", "aten::mean", "aten::sum", "aten::squeeze")


class _Call:
    """One call of a loss function."""

    __slots__ = ("by", "code", "given", "key", "name", "place", "settings", "slot", "value")

    def __init__(self, name: str, key: Any, place: str) -> None:
        self.name = name
        self.key = key
        self.place = place
        self.by: Optional[str] = None
        self.given: Tuple[Any, Any] = (None, None)
        """(input, target), as slots on the tape or tensors."""
        self.settings: Dict[str, Any] = {}
        self.slot = -1
        self.value: Any = None


class Losses:
    """Listens to a tape."""

    def __init__(self, tape: Tape, fault: Callable[[str, BaseException], None]) -> None:
        self.tape = tape
        self.torch = tape.torch
        self.fault = fault
        self.calls: List[_Call] = []
        self.folder = str(self.torch.__file__).rsplit("/", 1)[0] + "/"
        self.functional = self.folder + "nn/functional.py"
        self.module = sys.modules["torch.nn.functional"]

    def scalar(self, tape: Tape, node: Node, value: Any, number: int) -> None:
        """A number was computed: by a loss function?"""
        try:
            slot = tape.slot_of(value)
            if slot is not None and len(self.calls) < CALLS_LIMIT:
                self._look(slot, value)
        except Exception as error:
            self.fault("loss.scalar", error)

    def _look(self, slot: int, value: Any) -> None:
        inner: Any = None
        frame: Any = sys._getframe(3)
        for _ in range(FRAMES_LIMIT):
            if frame is None:
                return
            code = frame.f_code
            if code.co_filename == self.functional and code.co_name in DEFAULTS:
                self._note(code.co_name, frame, frame, None, slot, value)
            elif inner is not None and not inner.f_code.co_filename.startswith(self.folder):
                name = self._named_here(frame)
                if name is not None:
                    place = "%s:%d:%s" % (inner.f_code.co_filename, inner.f_code.co_firstlineno, inner.f_code.co_name)
                    self._note(name, inner, frame, place, slot, value)
            inner, frame = frame, frame.f_back

    def _named_here(self, frame: Any) -> Optional[str]:
        """The torch loss function that the line being executed in `frame` calls by its name, if any."""
        if frame.f_code.co_filename.startswith(self.folder):
            held = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
            kind = type(held)
            return _of_module(kind.__name__) if kind.__module__ == "torch.nn.modules.loss" else None
        for call in _calls_at(frame):
            name = self._torch_name(call, frame)
            if name is not None:
                return name
        return None

    def _torch_name(self, call: ast.Call, frame: Any) -> Optional[str]:
        parts = _dotted(call.func)
        if len(parts) < 2 or parts[-1] not in DEFAULTS:
            return None
        found: Any = frame.f_locals.get(parts[0], frame.f_globals.get(parts[0]))
        for part in parts[1:-1]:
            if type(found) is not type(sys):
                return None
            found = getattr(found, part, None)
        return parts[-1] if found is self.module else None

    def _note(self, name: str, frame: Any, caller: Any, by: Optional[str], slot: int, value: Any) -> None:
        """Remember the call; what it computes last is its result."""
        first, second = _arguments(frame, name)
        above = frame.f_back
        way = []
        for _ in range(6):  # from where it was called: the frame's own address is soon another one's
            if above is None:
                break
            way.append((id(above), above.f_lasti))
            above = above.f_back
        key = (id(frame), frame.f_code, id(first), id(second), tuple(way))
        for known in reversed(self.calls):
            if known.key == key:
                known.slot, known.value = slot, value.detach()
                return
        if by is None:
            caller = frame.f_back
        call = _Call(name, key, "?")
        call.by, call.slot, call.value = by, slot, value.detach()
        call.given = (self._kept(first), self._kept(second))
        call.settings = dict(DEFAULTS[name])
        if by is None:
            for setting in call.settings:
                if setting in frame.f_locals:
                    call.settings[setting] = frame.f_locals[setting]
            call.settings["reduction"] = _reduction(frame.f_locals, call.settings["reduction"])
        self._declared(call, name, caller)
        self.calls.append(call)

    def _declared(self, call: _Call, name: str, caller: Any) -> None:
        """Settings as the calling module or line says them."""
        while caller is not None and caller.f_code.co_filename.startswith(self.folder):
            held = caller.f_locals.get("self")
            if type(held).__module__ == "torch.nn.modules.loss" and _of_module(type(held).__name__) == name:
                for setting in call.settings:
                    if hasattr(held, setting):
                        call.settings[setting] = getattr(held, setting)
                name = ""
            caller = caller.f_back
        if caller is None:
            return
        call.place = "%s:%d" % (caller.f_code.co_filename, caller.f_lineno)
        matching = [each for each in _calls_at(caller) if _dotted(each.func)[-1:] == [name]]
        if len(matching) != 1 or not name:
            return
        said = _literals(matching[0], name)
        call.settings.update(said)
        if call.by is not None and not said:
            call.settings["reduction"] = None  # another function answers, and how it was asked is not known

    def _kept(self, tensor: Any) -> Any:
        if not isinstance(tensor, self.torch.Tensor):
            return None
        slot = self.tape.slot_of(tensor)
        return slot if slot is not None and slot not in self.tape.constants else tensor.detach()

    # -- afterwards -------------------------------------------------------------------------------------------

    def want(self, replay: Replay) -> None:
        """Have the replay keep what the references are computed from."""
        for call in self.calls:
            for given in call.given:
                if isinstance(given, int):
                    replay.wanted[given] = None

    def value(self, replay: Replay, roots: List[Root], total: float) -> Optional[Dict[str, Any]]:
        """The frame's value, after the unshifted replay."""
        if not self.calls:
            return None
        factors = self._factors(replay, roots)
        lines, rest = [], total
        for call in self.calls:
            line = self._line(call, replay)
            factor = factors.get(call.slot)
            if call.slot not in factors:
                continue  # an evaluation, or a value that backward did not start from
            line["factor"] = factor
            lines.append(line)
            if factor is None:
                rest = math.nan
            elif call.by is None:
                rest -= factor * float(call.value)
        return {"calls": lines, "rest": rest if math.isfinite(rest) else None} if lines else None

    def _line(self, call: _Call, replay: Replay) -> Dict[str, Any]:
        line: Dict[str, Any] = {"name": call.name, "place": call.place, "value": float(call.value)}
        line["settings"] = {key: value for key, value in call.settings.items() if isinstance(value, (int, float, str))}
        if call.by is not None:
            line["by"] = call.by
        first, second = (replay.wanted.get(g) if isinstance(g, int) else g for g in call.given)
        why = self._why_not(call, first, second)
        if why is not None:
            line["why"] = why
            return line
        try:
            line["reference"], line["rows"], line["used"] = reference(
                self.torch, call.name, first, second, call.settings
            )
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            line["why"] = type(error).__name__
        return line

    def _why_not(self, call: _Call, first: Any, second: Any) -> Optional[str]:
        if first is None or second is None:
            return "its input is not on the tape"
        if first.numel() > ELEMENTS_LIMIT:
            return "too large"
        if call.settings.get("weight") is not None and call.name in ("mse_loss", "l1_loss", "huber_loss"):
            return "weighted"
        if call.settings.get("reduction") is None:
            return "its settings are not known"
        if call.settings.get("reduction") not in ("mean", "sum"):
            return "not reduced to one number by the function itself"
        return None

    def _factors(self, replay: Replay, roots: List[Root]) -> Dict[int, Optional[float]]:
        """Slot of a call's result → its factor in the sum of the roots; absent where it is not part of it."""
        wanted = {call.slot for call in self.calls}
        share: Dict[int, Optional[float]] = {}
        for root in roots:
            seed = 1.0 if root.seed is None else float(root.seed) if root.seed.numel() == 1 else None
            share[root.slot] = None if seed is None else (share.get(root.slot) or 0.0) + seed
        found: Dict[int, Optional[float]] = {}
        for node in reversed(replay.nodes):
            if not node.outputs or node.outputs[0] not in share:
                continue
            slot = node.outputs[0]
            if slot in wanted:
                found[slot] = share[slot]
            self._spread(node, share[slot], share)
        return found

    def _spread(self, node: Node, factor: Optional[float], share: Dict[int, Optional[float]]) -> None:
        name, refs = node.kind.name.rstrip("_"), node.inputs
        for position, ref in enumerate(refs):
            if ref.frozen:
                continue
            each = self._times(node, name, position, refs)
            total = None if factor is None or each is None else factor * each
            if ref.slot in share:
                known = share[ref.slot]
                share[ref.slot] = None if known is None or total is None else known + total
            else:
                share[ref.slot] = total

    def _times(self, node: Node, name: str, position: int, refs: Any) -> Optional[float]:
        """By what an operator on numbers multiplies one of its inputs; None for anything else."""
        if name in SAME and len(refs) == 1:
            return 1.0
        if name == "aten::neg":
            return -1.0
        if name in SUMS:
            alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
            return 1.0 if position == 0 else SUMS[name] * float(alpha)
        if name in SCALES and position == 0:
            other = self._number(node.args[1])
            if other is None or (name == "aten::div" and (not other or node.kwargs.get("rounding_mode"))):
                return None
            return other if name == "aten::mul" else 1.0 / other
        if name == "aten::mul":
            return self._number(node.args[0])
        return None

    def _number(self, value: Any) -> Optional[float]:
        if isinstance(value, (int, float)):
            return float(value)
        constant = self.tape.constants.get(value.slot) if hasattr(value, "slot") else None
        if constant is None or constant.tensor.numel() != 1 or constant.tensor.requires_grad:
            return None
        return float(constant.value if constant.value is not None else constant.tensor)


def reference(torch: Any, name: str, first: Any, second: Any, settings: Dict[str, Any]) -> Tuple[float, int, int]:
    """(the loss by its definition, elements or rows in all, those that count), in float64."""
    x = first.detach().to(torch.float64)
    weight = settings.get("weight")
    weight = weight.detach().to(torch.float64) if weight is not None else None
    mean = settings["reduction"] == "mean"
    if name in ("cross_entropy", "nll_loss"):
        return _by_class(torch, name, x, second.detach(), weight, settings, mean)
    y = second.detach().to(torch.float64)
    x, y = torch.broadcast_tensors(x, y)
    if name == "mse_loss":
        each = (x - y) ** 2
    elif name == "l1_loss":
        each = (x - y).abs()
    elif name in ("smooth_l1_loss", "huber_loss"):
        each = _huber((x - y).abs(), name, settings, torch)
    elif name == "binary_cross_entropy":
        each = -(y * x.log().clamp(min=-100) + (1 - y) * (1 - x).log().clamp(min=-100))
    else:
        each = _logits(torch, x, y, settings.get("pos_weight"))
    if weight is not None:
        each = each * weight
    return float(each.mean() if mean else each.sum()), x.numel(), x.numel()


def _huber(distance: Any, name: str, settings: Dict[str, Any], torch: Any) -> Any:
    bound = float(settings["beta"] if name == "smooth_l1_loss" else settings["delta"])
    if name == "smooth_l1_loss":
        return (
            distance if bound == 0 else torch.where(distance < bound, distance**2 / (2 * bound), distance - bound / 2)
        )
    return torch.where(distance <= bound, distance**2 / 2, bound * (distance - bound / 2))


def _logits(torch: Any, x: Any, y: Any, positive: Any) -> Any:
    """-y·p·log σ(x) - (1 - y)·log(1 - σ(x)), without overflow."""
    softplus = x.abs().neg().exp().log1p()
    log_yes, log_no = x.clamp(max=0) - softplus, (-x).clamp(max=0) - softplus
    factor = 1.0 if positive is None else positive.detach().to(torch.float64)
    return -(factor * y * log_yes + (1 - y) * log_no)


def _by_class(
    torch: Any, name: str, x: Any, target: Any, weight: Any, settings: Dict[str, Any], mean: bool
) -> Tuple[float, int, int]:
    """Cross entropy and negative log-likelihood over rows: classes in dimension 1, or in the only one."""
    if x.dim() == 1:
        x, target = x[None], target[None]
    x = x.movedim(1, -1).reshape(-1, x.shape[1])
    if name == "cross_entropy":
        top = x.max(-1, keepdim=True).values
        x = x - top - (x - top).exp().sum(-1, keepdim=True).log()
    classes = x.shape[1]
    smoothing = float(settings.get("label_smoothing") or 0.0)
    by_class = torch.ones(classes, dtype=torch.float64, device=x.device) if weight is None else weight
    if target.is_floating_point():
        wanted = target.to(torch.float64)
        wanted = (wanted.movedim(1, -1) if wanted.dim() > 2 else wanted).reshape(-1, classes)
        wanted = wanted * (1 - smoothing) + smoothing / classes
        each = -(x * wanted * by_class).sum(-1)
        return float(each.mean() if mean else each.sum()), len(each), len(each)
    target = target.reshape(-1)
    used = target != int(settings["ignore_index"])
    rows, labels = x[used], target[used]
    weights = by_class[labels]
    plain = -(rows.gather(1, labels[:, None])[:, 0] * weights).sum()
    smooth = -(rows * by_class).sum()
    total = (1 - smoothing) * plain + smoothing / classes * smooth if smoothing else plain
    return float(total / weights.sum() if mean else total), len(target), len(labels)


_MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "BCELoss": "binary_cross_entropy",
    "BCEWithLogitsLoss": "binary_cross_entropy_with_logits",
}


def _of_module(name: str) -> Optional[str]:
    return _MODULES.get(name)


def _arguments(frame: Any, name: str) -> Tuple[Any, Any]:
    """The first two arguments of a running function."""
    code, held = frame.f_code, frame.f_locals
    named = [held.get(each) for each in code.co_varnames[: code.co_argcount]]
    if code.co_flags & 4:
        named += list(held.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount], ()))
    if named and hasattr(named[0], "named_parameters"):
        named = named[1:]  # the self of a module
    rest: Dict[str, Any] = {}
    if code.co_flags & 8:
        rest = held.get(code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)], {})
    first = named[0] if named else rest.get("input")
    second = named[1] if len(named) > 1 else rest.get("target")
    return first, second


_parsed: Dict[Tuple[str, int, int], List[ast.Call]] = {}


def _calls_at(frame: Any) -> List[ast.Call]:
    """The call that a frame is executing; all of the statement where Python keeps no columns; none without source."""
    key = (frame.f_code.co_filename, frame.f_lineno, frame.f_lasti)
    if key not in _parsed:
        if len(_parsed) > 256:
            _parsed.clear()
        call = _executing(frame)
        _parsed[key] = [call] if call is not None else _parse(*key[:2])
    return _parsed[key]


def _executing(frame: Any) -> Optional[ast.Call]:
    """The call under way, by the columns that Python 3.11 and later keep of every instruction."""
    if not hasattr(frame.f_code, "co_positions"):
        return None
    at = frame.f_lasti // 2
    (begin, end, left, right), *_ = [*itertools.islice(frame.f_code.co_positions(), at, at + 1), (None,) * 4]
    lines = linecache.getlines(frame.f_code.co_filename)
    if begin is None or end is None or left is None or right is None or not 0 < begin <= end <= len(lines):
        return None
    text = [line.encode() for line in lines[begin - 1 : end]]
    text[-1] = text[-1][:right]
    text[0] = text[0][left:]
    try:
        tree = facts.parse("(" + b"".join(text).decode() + "\n)")
    except (SyntaxError, ValueError):
        return None
    found = tree.body[0].value if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr) else None
    return found if isinstance(found, ast.Call) else None


def _parse(path: str, line: int) -> List[ast.Call]:
    lines = linecache.getlines(path)
    if not 0 < line <= len(lines):
        return []
    for length in (1, 2, 3, 4, 6, 8, 12):
        for back in (0, 1, 2, 3):
            text = "".join(lines[max(0, line - 1 - back) : line - 1 + length])
            try:
                tree = facts.parse(_unindented(text))
            except (SyntaxError, ValueError):
                continue
            found = [each for each in ast.walk(tree) if isinstance(each, ast.Call)]
            if found:
                return found
    return []


def _unindented(text: str) -> str:
    import textwrap

    text = textwrap.dedent(text).strip()
    for word in ("return ", "yield "):
        if text.startswith(word):
            text = text[len(word) :]
    return text + "\n    pass" if text.endswith(":") else text


def _dotted(node: Any) -> List[str]:
    parts: List[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*reversed([*parts, node.id])] if isinstance(node, ast.Name) else []


def _reduction(given: Dict[str, Any], reduction: Any) -> Any:
    """The reduction that a function was asked for, also in the older words that torch still takes."""
    average, reduce = given.get("size_average"), given.get("reduce")
    if average is None and reduce is None:
        return reduction
    if reduce is not None and not reduce:
        return "none"
    return "mean" if average is None or average else "sum"


def _literals(call: ast.Call, name: str) -> Dict[str, Any]:
    """Settings that a call says, or leaves at their default; none where it passes some on by other means."""
    if len(call.args) > 2 or any(isinstance(each, ast.Starred) for each in call.args):
        return {}
    out = {key: value for key, value in DEFAULTS[name].items() if isinstance(value, (int, float, str))}
    for keyword in call.keywords:
        if keyword.arg not in DEFAULTS[name] and keyword.arg not in ("input", "target"):
            return {}
        try:
            value = ast.literal_eval(keyword.value)
        except ValueError:
            out.pop(keyword.arg, None)
            continue
        if keyword.arg in out and isinstance(value, (int, float, str)):
            out[keyword.arg] = value
        else:
            out.pop(keyword.arg, None)
    return out
