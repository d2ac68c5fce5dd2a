"""Tolerance: what an honest replay on another build may differ by, and what is more than that (spec/replay.md).

    kinds = parted(run_build, replay_build)               ("threads", "instructions"), or Unavailable for another torch
    reading = judged(distances, kinds, 8, calibration)    how far apart, against what is allowed
    reading.excess <= 1                                   within its class

Bits are only expected of the same build. Elsewhere the state after a segment is compared by size: for each tensor, how
far run and replay lie apart, over how far the segment moved it. What is allowed is a class bound, measured on this
machine by a reference training under every variation that it can make (numerics.py), times MARGIN, or the job's own
spread: how far replays of this very segment under those variations lie apart here, times MARGIN. To both comes the
rounding of the weights themselves. Pure functions of numbers; nothing here runs anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from trainguard.errors import Unavailable

KINDS: Mapping[str, str] = {
    "threads": "threads", "capability": "instructions", "mkldnn": "mkldnn", "cpu": "processor",
}  # fmt: skip
"""Field of a build → the kind of variation that a class is for."""

HARD = ("torch", "devices", "deterministic")
"""What no class covers: another version of torch, another device."""

IN_WORDS: Mapping[str, str] = {
    "threads": "another number of threads",
    "instructions": "other vector instructions",
    "mkldnn": "oneDNN switched on or off",
    "processor": "another model of processor",
}
EXACT = ("rng", "modes", "groups")
"""Links that no arithmetic is in: equal on every build."""

MARGIN = 16.0
"""Between what was measured and what is allowed: a few variations are a small sample of all that there are."""

WIDEST = 0.05
"""A class that would hide more than this share of a segment's own movement says nothing: could not tell."""

EPSILON: Mapping[str, float] = {
    "float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "complex64": 2.0**-23,
}  # fmt: skip

Distances = Mapping[str, tuple[float, float, float]]
"""Tensor → (distance, movement, size), L2 norms."""


class Variation(msgspec.Struct, frozen=True, kw_only=True):
    """One way in which honest arithmetic differs, as it was measured on one machine."""

    name: str
    kind: str
    settings: dict[str, str] = {}
    """Variables that make it; empty where a variable cannot."""
    changes: bool
    """Whether it changed a single bit here."""
    weights: dict[str, dict[str, float]] = {}
    """Workload → steps → largest share of its own movement by which any tensor of weights differed."""
    gradients: dict[str, dict[str, float]] = {}
    """Workload → steps → the largest relative difference of any gradient or optimizer state."""
    seconds: float = 0.0


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What one machine's honest arithmetic differs by."""

    schema: str = "trainguard/numerics/v1"
    machine: dict[str, Any]
    """`cpu` and `torch`, as in a run's build, and what else torch says of itself."""
    made: str
    steps: tuple[int, ...]
    variations: tuple[Variation, ...]

    def bound(self, kinds: Sequence[str], steps: int) -> tuple[float, float]:
        """What is allowed after `steps` steps: (weights, as a share of movement; state and buffers, of their size).

        Of float32 workloads only: a job in lower precision is judged by its own spread. `processor` takes every
        variation there is. Beyond the longest reference the bound grows no further, and own spread decides.
        """
        chosen = [each for each in self.variations if each.kind in kinds or "processor" in kinds]
        return (
            MARGIN * max((_at(each.weights, steps) for each in chosen), default=0.0),
            MARGIN * max((_at(each.gradients, steps) for each in chosen), default=0.0),
        )

    def spread_by(self, have: Mapping[str, str]) -> list[dict[str, str]]:
        """Settings under which a job's own spread can be had here: of each kind the variation that changes most.

        have: the settings that it has already.
        """
        found: dict[str, Variation] = {}
        for each in self.variations:
            if each.changes and each.settings and not each.settings.items() <= have.items():
                known = found.get(each.kind)
                if known is None or _largest(each) > _largest(known):
                    found[each.kind] = each
        return [dict(found[kind].settings) for kind in sorted(found)]


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One segment's state against what is allowed."""

    kinds: tuple[str, ...]
    steps: int
    excess: float
    """The largest distance, in multiples of what is allowed for it; up to 1 is within the class."""
    tensor: str | None = None
    """Where."""
    distance: float = 0.0
    """There, as a share of the movement (of the size, for optimizer state and buffers)."""
    whole: float = 0.0
    """Of all weights together, as a share of their movement."""
    undetectable: float = 0.0
    """Share of the segment's movement of all weights together that an act may make up without being seen."""
    by: str = "class"
    """`class`, or `own spread` where the job's own replays had to be asked."""

    @property
    def words(self) -> str:
        """The largest effect that would not have been seen."""
        share = _percent(self.undetectable)
        act = _percent(min(1.0, self.undetectable * self.steps))
        return (
            f"compared within a tolerance ({', '.join(IN_WORDS[kind] for kind in self.kinds)}; {self.by}): an act that "
            f"changes less than {share} of what these {self.steps} steps moved the weights by would not be seen, such "
            f"as a learning rate changed by less than {act} in one of them"
        )


def parted(run: Mapping[str, Any] | None, clean: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The kinds of variation that lie between two builds; none where bits are to be expected.

    Raises Unavailable where no class covers the difference.
    """
    if run is None or clean is None:
        raise Unavailable("one of the two did not say on which build of torch it ran")
    for name in HARD:
        if run.get(name) != clean.get(name):
            raise Unavailable(f"not comparable: {name}: the run had {run.get(name)!r}, the replay {clean.get(name)!r}")
    found = [kind for name, kind in KINDS.items() if name in run and run[name] != clean.get(name)]
    return tuple(dict.fromkeys(found))


def matching(run: Mapping[str, Any], clean: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Settings that bring a replay nearer to the run's build where this machine can: the same number of threads, or
    the run's lower vector instructions. given: the run's own settings, which are not touched."""
    wanted: dict[str, str] = {}
    threads, was = run.get("threads"), clean.get("threads")
    if isinstance(threads, int) and 0 < threads <= 1024 and threads != was and "OMP_NUM_THREADS" not in given:
        wanted["OMP_NUM_THREADS"] = str(threads)
    order = ("DEFAULT", "AVX2", "AVX512")
    one, two = str(run.get("capability")), str(clean.get("capability"))
    lower = one in order and two in order and order.index(one) < order.index(two)
    if lower and "ATEN_CPU_CAPABILITY" not in given:
        wanted["ATEN_CPU_CAPABILITY"] = one.lower()
    return wanted


def judged(
    distances: Distances, kinds: Sequence[str], steps: int, calibration: Calibration,
    dtypes: Mapping[str, str], spread: Sequence[Distances] = (),
) -> Reading:  # fmt: skip
    """distances: of the run from the replay. dtypes: tensor → its type. spread: of other replays of the same segment
    from that replay, where the class alone did not do."""
    weights, others = calibration.bound(kinds, steps)
    worst: tuple[float, str | None, float] = (0.0, None, 0.0)
    for name, (apart, moved, size) in distances.items():
        by_size = name.startswith(("state/", "buffer/"))
        scale, share = (size, others) if by_size else (moved, weights)
        own = MARGIN * max((each[name][0] for each in spread if name in each), default=0.0)
        allowed = max(share * scale, own) + _rounding(dtypes.get(name), size, steps)
        excess = apart / allowed if allowed > 0 else (0.0 if apart == 0 else math.inf)
        if excess > worst[0]:
            worst = (excess, name, apart / scale if scale > 0 else math.inf)
    apart, moved, hidden = _whole(distances, dtypes, steps, weights, spread)
    return Reading(
        kinds=tuple(kinds),
        steps=steps,
        excess=min(worst[0], 1e12),
        tensor=worst[1],
        distance=min(worst[2], 1e12),
        whole=min(1e12, apart / moved) if moved > 0 else 0.0,
        undetectable=min(1.0, hidden / moved) if moved > 0 else 1.0,
        by="own spread" if spread else "class",
    )


def _whole(
    distances: Distances, dtypes: Mapping[str, str], steps: int, weights: float, spread: Sequence[Distances]
) -> tuple[float, float, float]:
    """Of all weights together: distance, movement, and what the tolerance would hide."""
    apart = moved = hidden = 0.0
    for name, (distance, movement, size) in distances.items():
        if name.startswith(("state/", "buffer/")):
            continue
        own = MARGIN * max((each[name][0] for each in spread if name in each), default=0.0)
        allowed = max(weights * movement, own) + _rounding(dtypes.get(name), size, steps)
        apart, moved, hidden = math.hypot(apart, distance), math.hypot(moved, movement), math.hypot(hidden, allowed)
    return apart, moved, hidden


def _rounding(dtype: str | None, size: float, steps: int) -> float:
    """What rounding alone may do to a tensor of this size in so many steps: a last bit in each, in a random walk."""
    return EPSILON.get(dtype or "float32", 2.0**-23) * size * math.sqrt(max(1, steps))


def _at(measured: Mapping[str, Mapping[str, float]], steps: int) -> float:
    """At the shortest reference that is as long; beyond the longest, at that. Of float32 workloads the one that parts
    least: a job that parts further is asked itself, and is not granted what the most restless reference needs."""
    values: list[float] = []
    for workload, told in measured.items():
        if workload != "mixed" and told:
            lengths = sorted(int(length) for length in told)
            length = next((each for each in lengths if each >= steps), lengths[-1])
            values.append(told[str(length)])
    return min((value for value in values if value > 0), default=0.0)


def _largest(variation: Variation) -> float:
    told = (each for workload, each in variation.weights.items() if workload != "mixed")
    return max((value for each in told for value in each.values()), default=0.0)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 0.001 else f"{100 * share:.1g} %"
