"""A step repeated from its source: does the live optimizer do what it says? (docs/checks/optimizer.md)

The twin ran in the job's process (watch/shadow.py), so this is evidence of that process. What is judged here: whether
the source was the one that was loaded, whether the twin's weights are those that link *optimizer* read after the step,
and, where they are not, what the difference amounts to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainguard.appraise.steps import Differing, Sample, Shadow

TENSORWISE = frozenset({"torch.optim.Muon", "torch.optim.Adafactor", "torch.optim.sparse_adam.SparseAdam"})
"""Classes whose update of a tensor depends on that tensor alone: one is enough to convict."""

TOLERANCE = {"float64": 1e-6, "float32": 1e-5}
"""Relative difference of two updates by the same code on the same numbers, where memory lies otherwise."""

COARSE = 2.0**-7
"""The same for types with fewer digits."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a departure amounts to."""

    name: str
    techniques: tuple[str, ...]
    text: str
    expected: str
    found: str


class Sources:
    """What link *code* said of the files that were loaded."""

    def __init__(self) -> None:
        self._loaded: dict[str, set[str]] = {}
        self.repeated: set[str] = set()
        """Classes of which a step was repeated, or a reason was given why not."""

    def see(self, body: dict[str, Any]) -> None:
        """Take the lines of one code frame."""
        files = body.get("files")
        for line in files if isinstance(files, list) else ():
            if isinstance(line, list) and len(line) >= 2 and isinstance(line[0], str) and isinstance(line[1], str):
                self._loaded.setdefault(line[0], set()).add(line[1])

    def unknown(self, shadow: Shadow) -> str | None:
        """Why the twin's source is not the one that was loaded; None where it is, or where no link *code* spoke."""
        for path, digest in shadow.source if self._loaded else ():
            if digest not in self._loaded.get(path, ()):
                return f"{path[:200]} is not the source that was loaded"
        return None if shadow.source else "it names no source"


def compare(sample: Sample, shadow: Shadow) -> Told | str | None:
    """None: the live optimizer did what its source says. A sentence: it cannot be told. Else what it did."""
    wrong = _sampled(sample, shadow)
    if wrong is None and (shadow.agrees or _close(sample, shadow)):
        return None
    if shadow.again is not None and shadow.again != shadow.twin:
        return "its step does not give the same result twice"
    if shadow.scope != "all" and sample.kind not in TENSORWISE:
        return "its update of one tensor seems to depend on others"
    if shadow.differ:
        return _told(shadow.differ[0])
    if wrong is not None:
        return wrong
    if shadow.course is not None:
        text = f"at call {shadow.course + 1} of its closure the weights are not where its source would have them"
        return Told("", ("C4", "C9"), text, shadow.twin, shadow.live)
    return Told("", ("C4", "C9"), "the step is not the one that its source makes", shadow.twin, shadow.live)


def _sampled(sample: Sample, shadow: Shadow) -> Told | None:
    """The twin's weights at the sampled places, against those that were read after the step."""
    for index, values in shadow.values.items():
        tensor = sample.tensors[index]
        size = _tolerance(tensor.dtype)
        for offset, (have, want, was) in enumerate(zip(tensor.weight_after, values, tensor.weight, strict=True)):
            if have == want or not (math.isfinite(have) or math.isfinite(want)):
                continue
            if abs(have - want) > size * max(abs(want - was), abs(have - was)) + 4 * size * abs(was) * 1e-2:
                element = tensor.at[0] + tensor.at[1] * offset
                text = "the weight is not what the step of its source gives"
                place = f"{tensor.name}[{element}]"
                return Told(tensor.name, ("C4", "C9"), text, f"{place} = {want:.9g}", f"{place} = {have:.9g}")
    return None


def _close(sample: Sample, shadow: Shadow) -> bool:
    """Whether all that differs is what rounding explains."""
    known = {tensor.name: tensor.dtype for tensor in sample.tensors}
    if not shadow.differ:
        return False
    return all(_small(each, _tolerance(known.get(each.name, "float32"))) for each in shadow.differ)


def _small(each: Differing, tolerance: float) -> bool:
    if each.off is not None:
        return each.off <= tolerance
    pairs = list(zip(each.live, each.twin, strict=False))
    return bool(pairs) and all(abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in pairs)


def _tolerance(dtype: str) -> float:
    return TOLERANCE.get(dtype, COARSE)


def _told(each: Differing) -> Told:
    """What the first difference, of a weight where there is one, amounts to."""
    techniques: tuple[str, ...] = ("C4", "C9")
    text = f"its {each.what} is not what the step of its source gives"
    ratio, off = each.ratio, each.off
    if ratio is not None and off is not None:
        straight = abs(off - abs(ratio - 1)) <= 1e-2 * max(off, 1e-9)
        if straight and abs(ratio + 1) < 1e-2:
            techniques, text = ("C1",), "the update was applied in the opposite direction to that of its source"
        elif straight and abs(ratio) < 1e-6:
            techniques, text = ("C9", "C5"), "the update that its source makes was skipped"
        elif straight:
            techniques, text = ("C3", "C4"), f"effective learning rate is {ratio:.6g} times that of its source"
    text += f"; {each.differ} of {each.of} elements"
    place = f"{each.what}[{each.at[0]}]" if each.at else each.what
    want = f"{place} = {each.twin[0]:.9g}" if each.twin else "what its source gives"
    have = f"{place} = {each.live[0]:.9g}" if each.live else "something else"
    return Told(each.name, techniques, text, want, have)
