"""The course of a run: what processes say of seeds, loaders, optimizers and flags as they begin, and of rates later.

    course = Course()
    for evidence in records:
        for fact in course.see(evidence): …
    agreed([told_by(records), told_by(other_records)])       # a Plan: what these runs have in common

Facts are exact values only: no loss, no norm, nothing that another processor may round otherwise. A process speaks
from its first optimizer step on; what it said of loaders before stands among its first facts. What a training is
resumed from stands before all others: where it is not the same, what moves as a training goes on is not to be expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trainguard.appraise.modules import PERFORMANCE
from trainguard.appraise.order import plan_of
from trainguard.appraise.origin import dicts, rows
from trainguard.appraise.ranks import member_of
from trainguard.digest import sha256_hex
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence, unfold
from trainguard.lockfile import Plan

FACTS_LIMIT = 20_000
"""Facts of one process that are taken note of."""
VALUE_LIMIT = 1000
"""Characters of a value; of a longer one the digest is kept."""
EVERY_STEP = 32
PER_OCTAVE = 8
"""Rates are told at each of the first 32 updates, then at eight in every doubling."""
MOVING = ("lr", "momentum", "betas", "weight_decay")
"""Entries of a group that schedules set."""
UNFORESEEN = ("ReduceLROnPlateau",)
"""Schedulers that follow a measured loss."""
STREAMS = ("torch", "numpy", "python")
AT = " at update "
CLOSE = 1e-9
"""Relative difference of two rates that one formula gives on two machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing a process says of its course."""

    key: str
    value: str
    """JSON."""
    technique: str
    evidence: Evidence
    moves: bool = False
    """Whether it is another one where a training goes on from saved state."""
    resumes: bool = False
    """Whether it says from what a training goes on."""


@dataclass(slots=True)
class Beginning:
    """How a process began to train."""

    rank: int
    world: int
    attempt: int = 0
    """How often the launcher had started the job again."""
    again: bool = False
    """Whether another process has trained as this rank before."""
    steps: int = 0


@dataclass(slots=True)
class _Optimizer:
    groups: list[dict[str, Any]] = field(default_factory=list)
    unforeseen: bool = False


class Course:
    """Follows every process that trains."""

    def __init__(self) -> None:
        self.begun: dict[int | None, Beginning] = {}
        self._attempts: dict[int | None, int] = {}
        self._loaded: dict[int | None, set[str]] = {}
        """Process → contents of model files that it read before its first step."""
        self._waiting: dict[int | None, list[Fact]] = {}
        self._told: dict[int | None, int] = {}
        self._optimizers: dict[tuple[int | None, int], _Optimizer] = {}

    def see(self, evidence: Evidence) -> Iterator[Fact]:
        """The facts that this record makes known: of a process that has not begun yet, none."""
        if evidence.kind == "process":
            self._attempts[evidence.process] = member_of(evidence).attempt
        elif evidence.kind == "opened" and evidence.process not in self.begun:
            read = self._loaded.setdefault(evidence.process, set())
            if len(read) < FACTS_LIMIT:
                read.add(str(evidence.body.get("sha256")))
        elif evidence.kind == "loader" and "end" not in evidence.body:
            facts = list(self._bounded(evidence, _loader(evidence)))
            if evidence.process in self.begun:
                yield from facts
            else:
                self._waiting.setdefault(evidence.process, []).extend(facts)
        elif evidence.kind == "step":
            yield from self._step(evidence)

    def _bounded(self, evidence: Evidence, facts: Iterable[Fact]) -> Iterator[Fact]:
        for fact in facts:
            told = self._told.get(evidence.process, 0)
            if told < FACTS_LIMIT:
                self._told[evidence.process] = told + 1
                yield fact

    def _step(self, evidence: Evidence) -> Iterator[Fact]:
        beginning = self.begun.get(evidence.process)
        facts: list[Fact] = []
        if beginning is None:
            beginning = self.begun[evidence.process] = self._begin(evidence)
            first = [*self._resumed(evidence), *_streams(evidence), *_flags(evidence)]
            facts += [*self._bounded(evidence, first), *self._waiting.pop(evidence.process, ())]
        beginning.steps += 1
        facts += self._bounded(evidence, self._settings(evidence))
        yield from facts

    def _begin(self, evidence: Evidence) -> Beginning:
        rank = _rank(evidence)
        again = any(each.rank == rank for each in self.begun.values())
        attempt = self._attempts.get(evidence.process, 0)
        return Beginning(rank=rank, world=_world(evidence.body), attempt=attempt, again=again)

    def _resumed(self, evidence: Evidence) -> Iterator[Fact]:
        """What this training goes on from."""
        files = len(self._loaded.pop(evidence.process, ()))
        yield _fact(evidence, "model files read before the first step", files, "E7", resumes=True)
        state = _list(_dict(evidence.body.get("optimizer")).get("state"))
        names = sorted({name for names in state for name in _list(names) if isinstance(name, str)})
        yield _fact(evidence, "optimizer state before the first step", names, "E7", resumes=True)

    def _settings(self, evidence: Evidence) -> Iterator[Fact]:
        body = evidence.body
        number, index = body.get("opt"), body.get("index")
        if not isinstance(number, int) or not isinstance(index, int) or not 0 <= number < 1024:
            return
        known = self._optimizers.setdefault((evidence.process, number), _Optimizer())
        link = _dict(body.get("hyperparameters"))
        _settle(known.groups, link)
        known.unforeseen |= _unforeseen(body)
        name = f"optimizer {number}"
        if index == 1:
            yield from _optimizer(evidence, name, known.groups, link)
        elif is_told(index) and not known.unforeseen:
            for entry in MOVING:
                values = [group[entry] for group in known.groups if entry in group]
                if values:
                    yield _fact(evidence, f"{name} {entry}{AT}{index}", _runs(values), "C3", moves=True)
        if isinstance(link.get("inside"), list):
            _settle(known.groups, {"changed": link["inside"]})


def is_told(index: int) -> bool:
    """Whether rates are told at this update of an optimizer."""
    if index <= EVERY_STEP:
        return True
    stride = (1 << (index.bit_length() - 1)) // PER_OCTAVE
    return index % stride == 0


# -- facts of one record --------------------------------------------------------------------------------------------


def _fact(
    evidence: Evidence, key: str, value: object, technique: str, *, moves: bool = False, resumes: bool = False
) -> Fact:
    text = msgspec.json.encode(value, order="sorted")
    if len(text) > VALUE_LIMIT:
        text = msgspec.json.encode("sha256:" + sha256_hex(text))
    return Fact(
        key=key[:300], value=text.decode(), technique=technique, evidence=evidence, moves=moves, resumes=resumes
    )


def _loader(evidence: Evidence) -> Iterator[Fact]:
    """What stands behind a loader at its first pass, and where the stream is that its order comes from."""
    body = evidence.body
    number, samplers = body.get("loader"), body.get("samplers")
    if body.get("epoch") != 0 or not isinstance(number, int):
        return
    name = f"loader {number}"
    yield _fact(evidence, f"{name} data set", [body.get("kind"), body.get("dataset")], "D2")
    within = [""]
    for entry, value in plan_of(samplers):
        if entry == "class":
            within.append(str(value)[:200])
            continue
        technique = "D3" if entry in ("num_replicas", "rank") else "D1" if "seed" in entry else "D2"
        yield _fact(evidence, f"{name} {within[-1].rsplit('.', 1)[-1]} {entry}", value, technique)
    yield _fact(evidence, f"{name} samplers", within[1:], "D2")
    states = [body.get("state"), *_generators(samplers)]
    yield _fact(evidence, f"{name} order begins at", states, "D1", moves=True)


def _generators(samplers: object) -> Iterator[object]:
    for _ in range(6):
        if not isinstance(samplers, dict):
            return
        if isinstance(own := samplers.get("generator"), dict):
            yield own.get("state")
        samplers = samplers.get("of")


def _streams(evidence: Evidence) -> Iterator[Fact]:
    """Where random streams stand as the first step begins."""
    link = _dict(evidence.body.get("rng"))
    if "seed" in link:
        yield _fact(evidence, "seed of torch", link["seed"], "D1")
    for name in STREAMS:
        if isinstance(link.get(name), str):
            yield _fact(evidence, f"stream {name} at the first step", link[name], "D1", moves=True)
    for device, seed, offset in rows(link.get("cuda"), 3):
        yield _fact(evidence, f"stream cuda {device} at the first step", [seed, offset], "D1", moves=True)


def _flags(evidence: Evidence) -> Iterator[Fact]:
    """Numeric flags as the script has set them by its first step; how fast it is to be is each machine's own."""
    flags = _dict(_dict(evidence.body.get("modules")).get("flags"))
    for name, value in flags.items():
        if isinstance(name, str) and name not in PERFORMANCE and not name.startswith("env."):
            yield _fact(evidence, f"flag {name}", value, "A10")


def _optimizer(evidence: Evidence, name: str, groups: list[dict[str, Any]], link: dict[str, Any]) -> Iterator[Fact]:
    """An optimizer at its first update."""
    if isinstance(link.get("class"), str):
        yield _fact(evidence, f"{name} class", link["class"], "C4")
    for entry in sorted({entry for group in groups for entry in group if isinstance(entry, str)}):
        values = [group.get(entry) for group in groups]
        yield _fact(evidence, f"{name} {entry}", _runs(values), "C3" if entry == "lr" else "C4", moves=entry in MOVING)
    schedulers = [row[0] for row in rows(link.get("schedulers"), 3)]
    yield _fact(evidence, f"{name} schedulers", schedulers, "C3")
    census = _dict(link.get("census"))
    if census:
        yield _fact(evidence, f"{name} tensors", [census.get("total"), census.get("counts")], "C9")


def _unforeseen(body: Mapping[str, Any]) -> bool:
    """Whether rates follow from results, which another machine may round otherwise."""
    schedulers = rows(_dict(body.get("hyperparameters")).get("schedulers"), 3)
    return "scale" in _dict(body.get("gradients")) or any(str(row[0]).endswith(UNFORESEEN) for row in schedulers)


def _settle(groups: list[dict[str, Any]], link: dict[str, Any]) -> None:
    """Apply what one frame says of the groups."""
    if isinstance(link.get("groups"), list):
        groups[:] = dicts(link["groups"])
    for number, entry, value in rows(link.get("changed"), 3):
        if isinstance(number, int) and 0 <= number < len(groups) and isinstance(entry, str):
            groups[number][entry] = value


def _runs(values: list[Any]) -> object:
    """A value of all groups: itself where they are alike, else [[how many in a row, value], …]."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return runs[0][1] if len(runs) == 1 else runs


def _rank(evidence: Evidence) -> int:
    """Of a launcher's process by its variables, of others as torch.distributed told them; 0 for a job of one."""
    told = _dict(evidence.body.get("replicas")).get("rank")
    return evidence.rank if evidence.rank is not None else told if isinstance(told, int) and told >= 0 else 0


def _world(body: Mapping[str, Any]) -> int:
    """Ranks of the job, as the first step says."""
    for link in ("replicas", "gradients", "shards"):
        world = _dict(body.get(link)).get("world")
        if isinstance(world, int) and world > 0:
            return world
    return 1


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


# -- what runs have in common ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Told:
    """The course of a whole run."""

    run: str
    world: int = 1
    steps: int = 0
    """Of the rank that made fewest."""
    facts: dict[str, dict[int, str]] = field(default_factory=dict)
    """Key → rank → value."""
    problem: str = ""
    """Why it can be no reference; empty where it can."""


def told_by(run: str, records: Iterable[Evidence]) -> Told:
    """The course of the run with these records. A run that cannot be a reference has a `problem`."""
    course, told = Course(), Told(run)
    try:
        for record in records:
            for each in unfold(record):
                for fact in course.see(each):
                    rank = course.begun[fact.evidence.process].rank
                    told.facts.setdefault(fact.key, {}).setdefault(rank, fact.value)
    except MalformedEvidence as error:
        told.problem = str(error)
    begun = list(course.begun.values())
    if not begun:
        told.problem = "no process of it made an optimizer step"
    elif any(each.again or each.attempt for each in begun):
        told.problem = "several processes of it trained as one rank, or it was started again"
    else:
        told.world, told.steps = max(each.world for each in begun), min(each.steps for each in begun)
    return told


def agreed(courses: Sequence[Told]) -> Plan:
    """What these runs have in common: of all ranks where all say the same, else rank by rank."""
    values: dict[str, str] = {}
    varied: set[str] = set()
    for key in sorted({key for told in courses for key in told.facts}):
        by_rank = [told.facts.get(key, {}) for told in courses]
        everywhere = all(len(ranks) == told.world for told, ranks in zip(courses, by_rank, strict=True))
        if everywhere and len({value for ranks in by_rank for value in ranks.values()}) == 1:
            values[key] = by_rank[0][0] if 0 in by_rank[0] else next(iter(by_rank[0].values()))
            continue
        for rank in sorted({rank for ranks in by_rank for rank in ranks}):
            said = {ranks.get(rank) for ranks in by_rank}
            if len(said) == 1:
                values[f"rank {rank}: {key}"] = by_rank[0][rank]
            else:
                varied.add(key)
    return Plan(
        runs=tuple(told.run for told in courses),
        worlds=tuple(sorted({told.world for told in courses})),
        steps=min(told.steps for told in courses),
        values=values,
        varied=tuple(sorted(varied)),
    )


def same(expected: str, found: str) -> bool:
    """Whether two values are one, rates to the last few bits."""
    return expected == found or _alike(msgspec.json.decode(expected), msgspec.json.decode(found))


def _alike(one: Any, two: Any) -> bool:
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_alike, one, two))
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=CLOSE)
    return type(one) is type(two) and bool(one == two)
