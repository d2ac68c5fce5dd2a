"""Check *modules*: numeric flags, module modes and settings stay what they were (docs/checks/modules.md).

A flag that changes while training runs changes the arithmetic of every later step (A10; thread counts A11). A module
that no longer trains, or another dropout probability, changes what is learnt (C11). What the model itself moves in its
first steps was learnt by the watcher and is not reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainguard.appraise.interface import Context
from trainguard.appraise.origin import rows
from trainguard.appraise.sweeps import SweepCheck
from trainguard.evidence import Evidence
from trainguard.finding import Finding

PERFORMANCE = ("num_threads", "env.OMP_NUM_THREADS", "env.MKL_NUM_THREADS", "env.CUDA_LAUNCH_BLOCKING")
FLAG_PREFIXES = ("cuda.", "cudnn.", "mkldnn.", "env.")
SET_BY = {
    "float32_matmul_precision": ("set_float32_matmul_precision",),
    "deterministic_algorithms": ("use_deterministic_algorithms",),
    "default_dtype": ("set_default_dtype", "set_default_tensor_type"),
    "num_threads": ("set_num_threads",),
    "anomaly_mode": ("detect_anomaly", "set_detect_anomaly"),
}
"""Flag → functions and attributes that set it; any other flag is an attribute of its own name."""
FLAGS = ("float32_matmul_precision", "deterministic_algorithms", "default_dtype", "num_threads", "anomaly_mode")


class Modules(SweepCheck):
    """See the module."""

    name = "modules"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._first: dict[str, tuple[Any, Evidence]] = {}
        self._ranks: set[str] = set()
        self._setters: dict[int | None, dict[str, Any]] = {}
        """Process → what its own source sets, and where."""

    def step(self, evidence: Evidence) -> Iterator[Finding]:
        value = evidence.body.get("modules")
        if not isinstance(value, dict):
            return
        if isinstance(value.get("flags"), dict):
            self._held += 1
            yield from self._between_ranks(evidence, value["flags"])
        if isinstance(value.get("setters"), dict):
            self._setters[evidence.process] = value["setters"]
        alike: dict[tuple[str, str, str], list[str]] = {}
        for name, before, now in rows(value.get("changed"), 3):
            if isinstance(name, str) and not self._set_by_approved_code(evidence.process, name, now):
                setting = name[:300].rsplit(".", 1)[-1] if name.endswith(".training") else name[:300]
                alike.setdefault((setting, f"{before!s:.200}", f"{now!s:.200}"), []).append(name[:300])
        for (_, was, is_now), names in alike.items():
            yield from self._changed(evidence, names, was, is_now)

    def _set_by_approved_code(self, process: int | None, name: str, now: object) -> bool:
        """Whether a line of the code that the lock approves sets this flag or setting by its name, to that value.

        A mode does not count: every script that validates puts its model into another mode and back.
        """
        last = name.rsplit(".", 1)[-1]
        if last == "training" or name.startswith("env."):
            return False
        told = self._setters.get(process, {})
        for setter in SET_BY.get(name, (last,)):
            for place, value in rows(told.get(setter), 2)[:16]:
                fits = isinstance(place, str) and (value in ([], [now]) or name == "anomaly_mode")
                if fits and self._origins.standing(place) == "approved":
                    self._explained[self._origins.relative(place)] = None
                    return True
        return False

    def _changed(self, evidence: Evidence, names: list[str], before: str, now: str) -> Iterator[Finding]:
        """One finding for settings that moved together, such as the mode of a whole model."""
        name = names[0]
        others = f" and of {len(names) - 1} more" if len(names) > 1 else ""
        flag = name in FLAGS or name.startswith(FLAG_PREFIXES)
        techniques = ("A11",) if name in PERFORMANCE else ("A10",) if flag else ("C11",)
        what = "numeric flag" if flag else "mode of module" if name.endswith(".training") else "module setting"
        yield from self._finding(
            evidence,
            "suspicious",
            f"{what} {name}{others} changed from {before:.100} to {now:.100}, found in step {evidence.step}",
            place=name,
            techniques=techniques,
            expected=before,
            found=now,
        )

    def _between_ranks(self, evidence: Evidence, flags: dict[str, Any]) -> Iterator[Finding]:
        """Every rank starts with the same arithmetic."""
        for name, value in flags.items():
            first = self._first.setdefault(name, (value, evidence))
            if first[0] == value or evidence.rank is None or name in PERFORMANCE or name in self._ranks:
                continue
            self._ranks.add(name)
            yield from self._finding(
                evidence,
                "suspicious",
                f"numeric flag {name[:300]} is {value!s:.100} on rank {evidence.rank} and {first[0]!s:.100} on rank "
                f"{first[1].rank}",
                place=name[:300],
                techniques=("A10", "F1"),
                expected=f"{first[0]!s:.200}",
                found=f"{value!s:.200}",
            )
