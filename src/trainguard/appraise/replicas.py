"""Check *replicas*: do ranks hold the same, and did each give what its backward left? (docs/checks/replicas.md)

1. *reduction*: at every checked step, the gradient that the ranks used is the mean of what backward left on them. Where
   it is not, the shares are solved for: they name the rank whose part was turned, scaled or left out (F2, F3).
2. *consensus*: at every round, ranks that held equal weights, optimizer state, settings and buffers still do (F1).
   Two ranks can only differ; among three or more, the one that stands alone is named.
3. *identity*: ranks run the same bytes with the same settings; each rank is one process.
4. *factors*: every rank multiplies its loss by what the others do, before backward (factors.py; F2).
5. *hosts*: what ranks on other hosts left in the job's store agrees with what was held here.
6. *shards*: where weights are sharded, 1. for one rank's shard of some tensors, from what backward left on every rank;
   and all ranks worked with the weights that the holder of the shard has (shards.py; F1, F3).

What is so from the first steps on is the script's own way (shards, local steps, another kind of reduction): blind with
its reason, not held. A rank that stands alone may have faulty hardware, so it is suspicious, whatever it did; that a
rank's gradient took part with the wrong sign is arithmetic, and violated.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trainguard.appraise.factors import Factors, Odd
from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.ranks import Ranks
from trainguard.appraise.reduction import ROUNDOFFS, Reduction, Way, one_tensor, way_of
from trainguard.appraise.shards import Shards, parse_shards
from trainguard.appraise.steps import Sample, Tensor, parse_sample
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

FINDINGS_PER_KIND = 5
LEARN_STEPS = 5
"""Checked steps in which a way of reducing counts as the script's own."""
PENDING_LIMIT = 256
ROUNDS_KEPT = 16
NAMES_SHOWN = 3
PER_TENSOR = ("weights", "buffers")
CHECKSUM = 8
"""Hex digits of one checksum."""
TEXTS_LIMIT = 4096
TAILS_LIMIT = 256
NAMES_COMPARED = 8
CHANCE = 10**6
"""Odds against chance from which a loss that only one rank ever has is no accident of its data."""

ASPECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "weights": ("other weights", ("F1", "F2", "E4")),
    "state": ("another optimizer state", ("F1", "E4")),
    "hyper": ("other optimizer settings", ("F1", "C4")),
    "buffers": ("other buffers", ("F1", "E4")),
}
"""What is compared at a round → how a rank that stands alone is described, and what it could be."""

IDENTITY: dict[str, str] = {
    "python": "another Python",
    "torch": "another torch",
    "accelerator": "another accelerator library",
    "main": "another main script",
    "flags": "other numeric settings",
    "restart": "another attempt",
    "hooks": "other communication hooks",
}

Key = tuple[int, int]
"""Attempt, index of the optimizer."""


@dataclass(frozen=True, slots=True)
class _Report:
    """One rank's record of one step or round."""

    rank: int
    evidence: Evidence
    sample: Sample | None = None
    value: dict[str, Any] = field(default_factory=dict)
    shards: Shards | None = None


@dataclass(slots=True)
class _Habit:
    """How the gradients of one optimizer have been reduced so far."""

    checked: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    factors: list[float] = field(default_factory=list)
    tails: dict[str, Counter[int]] = field(default_factory=dict)
    """What backward started from (checksums) → steps of each rank that had it."""
    made_of: dict[str, list[str]] = field(default_factory=dict)
    """Checksum → names of operations, from the loss on."""
    own_tails: set[tuple[int, str]] = field(default_factory=set)
    """Rank, and what its backward alone started from in the first steps."""
    gathered: Counter[bool] = field(default_factory=Counter)
    """Whether gathered weights were those of the shard → how often."""


@dataclass(slots=True)
class _Agreement:
    """Whether ranks agreed on one aspect so far."""

    equal: int = 0
    """Rounds after the first step in which all were equal."""
    own_way: bool = False
    """They differed before they were ever seen equal: no replicas, or not of this."""


class Replicas:
    """Joins the records of all ranks by step and by round."""

    name = "replicas"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ranks = Ranks()
        self._held = 0
        self._broken = 0
        self._world = 1
        self._blind: Counter[str] = Counter()
        self._given: Counter[tuple[str, int | None]] = Counter()
        self._steps: dict[tuple[int, int, int], dict[int, _Report]] = {}
        self._rounds: dict[tuple[int, int, int], dict[int, _Report]] = {}
        self._step_order: deque[tuple[int, int, int]] = deque()
        self._round_order: deque[tuple[int, int, int]] = deque()
        self._habits: dict[Key, _Habit] = {}
        self._agreements: dict[tuple[int, int, str], _Agreement] = {}
        self._members: dict[Key, set[int]] = {}
        """Attempt, optimizer → ranks that ever sent a round."""
        self._places: set[str] = set()
        self._explained: set[str] = set()
        self._sharded: set[int | None] = set()
        """Processes whose tensors are shards."""
        self._names: dict[str, list[str]] = {}
        self._identity: dict[int, dict[int, _Report]] = {}
        self._identity_said: set[tuple[int, str]] = set()
        self._flags: dict[tuple[int | None, int], tuple[int, dict[str, Any]]] = {}
        """Launcher, rank → restarts before its first attempt, and the flags torch stated in that."""
        self._files: dict[str, tuple[int, str, int | None]] = {}
        """Attempt and path → rank that first compiled it, hash, process."""
        self._texts: dict[tuple[int, int, int], dict[int, str]] = {}
        self._factors: dict[Key, Factors] = {}

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Judge a step or a round once all ranks have reported it."""
        self._ranks.see(evidence)
        if evidence.kind == "code":
            yield from self._code(evidence)
        if evidence.kind != "step":
            return
        try:
            found = [*self._round(evidence), *self._step(evidence), *self._scaled(evidence), *self._again(evidence)]
        except MalformedEvidence as error:
            self._broken += 1
            found = [
                self._finding(evidence, outcome="suspicious", techniques=("G2",), text=f"malformed record: {error}")
            ]
        yield from self._limited(found)

    def end(self) -> Iterator[Finding | LinkState]:
        """Rounds that not all ranks finished, and the balance."""
        for key in list(self._round_order):
            yield from self._limited(list(self._close(key)))
        for waiting in self._steps.values():
            self._blind["not all ranks recorded the same step"] += len(waiting)
        alone = self._world < 2
        if any(habit.gathered[True] for habit in self._habits.values()):
            self._blind = Counter({r: n for r, n in self._blind.items() if not r.endswith(_SHARDS)})
        blind = [reason for reason, count in self._blind.items() if reason.startswith("!") or count > self._held]
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=() if alone else tuple(sorted(reason.lstrip("!") for reason in blind)),
            explained=tuple(sorted(self._explained)),
            required=False,
        )

    # -- reduction --------------------------------------------------------------------------------------------

    def _step(self, evidence: Evidence) -> Iterator[Finding]:
        """Keep a checked step until every rank has reported it."""
        value, other = evidence.body.get("gradients"), evidence.body.get("optimizer")
        if not isinstance(value, dict):
            return
        world = value.get("world")
        if not isinstance(world, int) or not 2 <= world <= 1 << 20:
            return
        self._world = max(self._world, world)
        opt, index = _int(evidence, "opt"), _int(evidence, "index")
        if value.get("sharded") is True:
            self._sharded.add(evidence.process)
        shards = evidence.body.get("shards")
        if shards is None and (value.get("armed") is not True or other is None):
            return
        if isinstance(shards, dict) and isinstance(shards.get("blind"), str):
            self._sharded.add(evidence.process)
            self._blind[f"reduction is not seen: {shards['blind'][:200]}"] += 1
            return
        if shards is None and evidence.process in self._sharded:
            self._blind["weights are shards: each rank's gradients are reduced before they reach them"] += 1
            return
        key = (self._ranks.attempt(evidence), opt, index)
        waiting = self._steps.setdefault(key, {})
        if not waiting:
            self._step_order.append(key)
        rank = self._ranks.rank(evidence)
        rank = rank if rank is not None else len(waiting)
        if shards is not None:
            self._sharded.add(evidence.process)
            waiting[rank] = _Report(rank, evidence, shards=parse_shards(shards))
        else:
            waiting[rank] = _Report(rank, evidence, parse_sample(other))
        if len(waiting) == world:
            del self._steps[key]
            yield from self._reduced([waiting[r] for r in sorted(waiting)], self._habits.setdefault(key[:2], _Habit()))
        while len(self._steps) > PENDING_LIMIT:
            dropped = self._steps.pop(self._step_order.popleft(), None)
            if dropped:
                self._blind["not all ranks recorded the same step"] += len(dropped)

    def _reduced(self, reports: list[_Report], habit: _Habit) -> Iterator[Finding]:
        """One step of all ranks."""
        yield from self._lineage(reports, habit)
        if any(report.shards is not None for report in reports):
            yield from self._scattered(reports, habit)
            return
        tables = [_table(report.sample) for report in reports]
        keys = [key for key in tables[0] if all(key in table for table in tables)]
        if not keys:
            self._blind["the ranks sampled different places, or their tensors are shards"] += len(reports)
            return
        locals_ = [[table[key].local or [] for key in keys] for table in tables]
        used = [[table[key].grad or [] for key in keys] for table in tables]
        yield from self._by_way(reports, habit, [name for name, *_ in keys], locals_, used)

    def _by_way(
        self,
        reports: list[_Report],
        habit: _Habit,
        names: list[str],
        locals_: list[list[list[float]]],
        used: list[list[list[float]]],
    ) -> Iterator[Finding]:
        """How the gradients of some tensors were reduced, beside how they were before."""
        habit.checked += 1
        early = habit.checked <= LEARN_STEPS
        kind, found = way_of(locals_, used)
        if early:
            habit.kinds[kind] += 1
        if kind == "nothing":
            self._blind["the sampled gradients are all zero or not finite"] += len(reports)
        elif kind == "mean" or (kind == "rounded" and habit.kinds[kind]):
            yield from self._mean(reports, habit, found, early)
        elif kind == "shares" and found.turned:
            yield from self._turned(reports, found)
        elif kind == "unlike" and (parts := one_tensor(locals_, used[0])) is not None:
            yield from self._turned(reports, parts[1], names[parts[0]])
        elif self._ranks.torch_hook("powerSGD_hook", "post_localSGD_hook"):
            self._blind["!a communication hook of torch reduces approximately, or not at every step"] += len(reports)
        elif habit.kinds[kind] >= 2:
            self._blind[f"!{_OWN_WAYS[kind]}, from the first steps on"] += len(reports)
        elif kind == "shares" and _weighted(found, habit):
            self._blind["the ranks' gradients were weighted in some steps, as for batches of unequal size"] += 1
        elif not early:  # once among the first may be chance; the second time it is a habit
            yield from self._departed(reports, kind, found, habit)

    # -- shards -----------------------------------------------------------------------------------------------

    def _scattered(self, reports: list[_Report], habit: _Habit) -> Iterator[Finding]:
        """One step of all ranks that hold shards: reduction, and the weights they worked with."""
        parts = [report.shards for report in reports]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or any(part.places != known[0].places for part in known):
            self._blind["the ranks sampled different places of their shards"] += len(reports)
            return
        by_rank = {report.rank: part for report, part in zip(reports, known, strict=True)}
        yield from self._gathered(reports, habit, by_rank)
        judged = [
            i for i, (_, owner, *_) in enumerate(known[0].places) if owner in by_rank and i in by_rank[owner].reduced
        ]
        if not judged:
            self._blind["no reduced gradient of a sampled shard was recorded"] += len(reports)
            return
        reduced = [by_rank[known[0].places[i][1]].reduced[i] for i in judged]
        locals_ = [[part.local[i] for i in judged] for part in known]
        yield from self._by_way(
            reports, habit, [known[0].places[i][0] for i in judged], locals_, [reduced] * len(known)
        )

    def _gathered(self, reports: list[_Report], habit: _Habit, by_rank: dict[int, Shards]) -> Iterator[Finding]:
        """Did all ranks work with the same weights, and with those that the holder of each shard has?"""
        places = by_rank[reports[0].rank].places
        apart: list[tuple[str, list[list[_Report]]]] = []
        for i, (name, owner, *_) in enumerate(places):
            groups = _groups(reports, lambda report: repr(by_rank[report.rank].gathered[i]))  # noqa: B023 used at once
            held = by_rank[owner].held.get(i) if owner in by_rank else None
            if len(groups) > 1:
                apart.append((name, groups))
            elif held is not None:
                habit.gathered[held == by_rank[owner].gathered[i]] += 1
        if apart:
            name, groups = apart[0]
            alone = groups[-1] if len(groups[0]) > len(groups[-1]) else None
            what = f"other weights than the others, gathered from the ranks' shards: {name}"
            what = what if alone else f"different weights, gathered from the ranks' shards: {name}"
            more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
            text = f"{_ranks_text([r.rank for r in alone or reports])} worked with {what}{more}"
            records = [report.evidence for report in (*groups[0][:2], *groups[-1][:2])]
            self._broken += 1
            yield self._finding(
                *records,
                outcome="suspicious",
                techniques=("F3", "F1", "E4"),
                text=self._at(reports, text + "; faulty hardware does this as well as an act"),
                tensor=name,
                nobody=alone is None,
            )
        if habit.gathered[False] == 1 and habit.gathered[True] >= LEARN_STEPS:
            habit.gathered[False] += 1  # said once
            self._broken += 1
            text = "all ranks worked with weights that are not those of the shard they were gathered from"
            yield self._finding(
                reports[0].evidence, outcome="suspicious", techniques=("F3", "E4"), text=self._at(reports, text)
            )

    def _lineage(self, reports: list[_Report], habit: _Habit) -> Iterator[Finding]:
        """Did backward start from the same operations on every rank?"""
        values = [report.evidence.body["gradients"] for report in reports]
        for value in values:
            made = value.get("made_of")
            for key, names in list(made.items())[:8] if isinstance(made, dict) else ():
                if isinstance(names, list) and len(habit.made_of) < TAILS_LIMIT:
                    habit.made_of.setdefault(str(key)[:8], [str(name)[:80] for name in names[:32]])
        tails = [str(value.get("from")) for value in values]
        if any("from" not in value for value in values):
            return
        counted = Counter(tails)
        for report, tail in zip(reports, tails, strict=True):
            habit.tails.setdefault(tail, Counter())[report.rank] += 1
        common, times = counted.most_common(1)[0]
        if len(counted) != 2 or (times != len(reports) - 1 and len(reports) > 2):
            return
        if len(reports) == 2:  # the one that is not as in the steps before
            common = max(counted, key=lambda tail: sum(habit.tails[tail].values()))
            if sum(habit.tails[common].values()) < 2 * LEARN_STEPS:
                return
        position = next(i for i, tail in enumerate(tails) if tail != common)
        report, tail = reports[position], tails[position]
        if len(habit.tails[tail]) > 1:
            return  # other ranks had it too, with other data
        seen = habit.tails[tail][report.rank]
        turned = self._turned_tail(habit, values[position], values[tails.index(common)])
        if habit.checked <= LEARN_STEPS:
            habit.own_tails.add((report.rank, tail))
        if not turned and ((report.rank, tail) in habit.own_tails or len(reports) ** (seen - 1) < CHANCE):
            return
        self._broken += 1
        odd, usual = values[position], values[tails.index(common)]
        names = self._words_of(habit, odd, usual), self._words_of(habit, usual, odd)
        others = _ranks_text([r.rank for i, r in enumerate(reports) if i != position])
        text = (
            f"rank {report.rank}'s backward started from {'a loss with its sign turned' if turned else 'another loss'}"
        )
        text += f" ({names[0]}), that of {others} did not ({names[1]}), and no other rank's ever did"
        yield self._finding(
            *(r.evidence for i, r in enumerate(reports) if i != position and i < 4),
            report.evidence,
            outcome="suspicious",
            techniques=("F2", "C6"),
            text=self._at(reports, text),
        )

    # -- factors ----------------------------------------------------------------------------------------------

    def _scaled(self, evidence: Evidence) -> Iterator[Finding]:
        """Does every rank multiply its loss by what the others do?"""
        value, rank = evidence.body.get("gradients"), self._ranks.rank(evidence)
        world = value.get("world") if isinstance(value, dict) else None
        if not isinstance(world, int) or not 2 <= world <= 1 << 20 or rank is None or "truth" not in evidence.body:
            return
        key = (self._ranks.attempt(evidence), _int(evidence, "opt"))
        factors = self._factors.setdefault(key, Factors())
        habit = self._habits.get(key)
        if not factors.see(rank, evidence) or habit is None or not (habit.kinds["mean"] or habit.kinds["rounded"]):
            return  # ranks that reduce nothing, or by weights of their own, owe each other no factor
        unsteady = factors.unsteady
        for odd in factors.odd(world):
            yield from self._odd_factor(odd)
        if factors.unsteady > unsteady:
            self._blind["factors of the loss were not compared: they vary on several ranks"] += 1

    def _odd_factor(self, odd: Odd) -> Iterator[Finding]:
        if self._context.policy.approves(self.name, odd.place):
            self._explained.add(odd.place)
            return
        self._broken += 1
        who = f"rank {odd.rank}" if odd.rank is not None else f"rank {self._ranks.rank(odd.seen.evidence)}"
        others = "all others" if odd.rank is not None else f"rank {self._ranks.rank(odd.other.evidence)}"
        text = f"{who} counts its loss {odd.factor:.6g} times in what backward starts from, {others} {odd.common:.6g}"
        text += f" ({odd.place}, at as many rows)" + ("; its sign is turned" if odd.turned else "")
        text += (
            "; if ranks are meant to weigh otherwise, approve the place"
            if odd.rank is not None
            else ("; which one is right does not show: compare with the script")
        )
        yield self._finding(
            odd.other.evidence,
            odd.seen.evidence,
            outcome="suspicious",
            techniques=("F2", "C6"),
            text=text,
            path=odd.place,
            expected=f"{odd.common:.9g}",
            found=f"{odd.factor:.9g}",
            nobody=odd.rank is None,
        )

    # -- lineage ----------------------------------------------------------------------------------------------

    def _turned_tail(self, habit: _Habit, odd: dict[str, Any], common: dict[str, Any]) -> bool:
        """Whether two tails differ by a negation alone, or by the sign of what backward was called with."""
        usual = [habit.made_of.get(key, []) for key in _keys(common)]
        for key in _keys(odd):
            names = habit.made_of.get(key, [])
            for other in usual if key not in _keys(common) else ():
                if names and _without_turns(names) == _without_turns(other) and (_turns(names) - _turns(other)) % 2:
                    return True
        return False

    def _words_of(self, habit: _Habit, value: dict[str, Any], beside: dict[str, Any]) -> str:
        keys = [key for key in _keys(value) if key not in _keys(beside)] or _keys(value)
        return ", ".join(habit.made_of.get(keys[0], [])[:3]) if keys else ""

    def _mean(self, reports: list[_Report], habit: _Habit, found: Reduction, early: bool) -> Iterator[Finding]:
        world = len(reports)
        if early:
            habit.factors.append(found.factor)
        steady = len(habit.factors) >= 3 and max(habit.factors) - min(habit.factors) <= 1e-5 * abs(habit.factors[0])
        ratio = found.factor / habit.factors[0] if steady and habit.factors[0] else 1.0
        if steady and not early and (abs(ratio - world) < 1e-4 * world or abs(ratio * world - 1) < 1e-4):
            self._broken += 1
            what = "summed where they were averaged" if ratio > 1 else "averaged where they were summed"
            text = f"the ranks' gradients were {what}: {ratio:.6g} times what every step before left"
            yield self._finding(
                reports[0].evidence, outcome="violated", techniques=("F3", "C2"), text=self._at(reports, text)
            )
            return
        if found.factor < 0:
            return  # all ranks alike, against the direction: check gradients says it of each
        self._held += 1
        if found.roundoff > ROUNDOFFS[0]:
            self._blind["reduced in low precision: what is smaller than its rounding is not seen"] += 1

    def _turned(self, reports: list[_Report], found: Reduction, tensor: str | None = None) -> Iterator[Finding]:
        """Some ranks took part with the wrong sign: no way of averaging does that."""
        self._broken += 1
        for position in found.turned:
            report = reports[position]
            others = [r for i, r in enumerate(reports) if i != position]
            text = (
                f"rank {report.rank}'s gradient was reduced {found.shares[position]:.4g} times what its backward left; "
                f"{_ranks_text([r.rank for r in others])} took part with what theirs left"
                if len(found.turned) == 1
                else f"rank {report.rank}'s gradient was reduced {found.shares[position]:.4g} times"
            )
            records = [*(r.evidence for r in others[:3]), report.evidence]
            yield self._finding(
                *records, outcome="violated", techniques=("F2", "F3"), text=self._at(reports, text), tensor=tensor
            )

    def _departed(self, reports: list[_Report], kind: Way, found: Reduction, habit: _Habit) -> Iterator[Finding]:
        """Another way of reducing than in the steps before."""
        self._broken += 1
        record = reports[0].evidence
        if kind == "unreduced":
            text = "every rank used its own gradient: they were not reduced, as in the steps before"
            yield self._finding(record, outcome="suspicious", techniques=("F3",), text=self._at(reports, text))
        elif kind == "shares":
            yield from self._apart(reports, found, habit)
        elif kind == "differ":
            text = "the ranks used different gradients, and in the steps before the same"
            yield self._finding(record, outcome="suspicious", techniques=("F3", "F2"), text=self._at(reports, text))
        else:
            text = (
                "the reduced gradient is made of what backward left on the ranks, in no proportion: something was added"
            )
            yield self._finding(record, outcome="suspicious", techniques=("F3", "F2"), text=self._at(reports, text))

    def _apart(self, reports: list[_Report], found: Reduction, habit: _Habit) -> Iterator[Finding]:
        """Unequal shares, all with the right sign."""
        usual = habit.factors[0] if habit.factors else 0.0
        odd = [i for i, share in enumerate(found.absolute) if abs(share - usual) > 1e-3 * usual]
        if len(odd) != 1:
            shares = ", ".join(f"{reports[i].rank}: {found.shares[i]:.4g}" for i in found.apart[:8])
            text = f"the ranks' gradients took part in unequal shares ({shares}), and in the steps before in equal ones"
            text += "; clipping on each rank, or weighting by the script, would do that too"
            yield self._finding(
                *(r.evidence for r in reports[:4]),
                outcome="suspicious",
                techniques=("F2", "F3"),
                text=self._at(reports, text),
                nobody=True,
            )
            return
        report = reports[odd[0]]
        share = found.absolute[odd[0]] / usual
        others = [r for i, r in enumerate(reports) if i != odd[0]]
        text = f"rank {report.rank}'s gradient was reduced {share:.4g} times what its backward left; "
        text += f"{_ranks_text([r.rank for r in others])} took part as in every step before"
        if share < 1:
            text += "; clipping on that rank alone, by the script, would do that too"
        yield self._finding(
            *(r.evidence for r in others[:3]),
            report.evidence,
            outcome="suspicious" if share < 1 else "violated",
            techniques=("F3", "F2") if abs(share) < 1e-3 else ("F2", "F3"),
            text=self._at(reports, text),
        )

    def _at(self, reports: list[_Report], text: str) -> str:
        return f"step {reports[0].evidence.step}: {text}"

    # -- consensus --------------------------------------------------------------------------------------------

    def _round(self, evidence: Evidence) -> Iterator[Finding]:
        """Keep a rank's round until the other ranks of this host have reported theirs."""
        value = evidence.body.get(self.name)
        if value is None:
            return
        if not isinstance(value, dict):
            raise MalformedEvidence(f"replicas: expected an object, found {type(value).__name__}")
        rank, world = value.get("rank"), value.get("world")
        if not isinstance(rank, int) or not isinstance(world, int) or not 0 <= rank < world <= 1 << 20:
            raise MalformedEvidence(f"replicas: rank {str(rank)[:20]} of {str(world)[:20]}")
        self._world = max(self._world, world)
        attempt, opt = self._ranks.attempt(evidence), _int(evidence, "opt")
        report = _Report(rank, evidence, value=value)
        yield from self._one_process(report)
        if isinstance(value.get("identity"), dict):
            value["identity"]["hooks"] = value.get("hooks")
            yield from self._identities(attempt, report)
        yield from self._collectives(report)
        yield from self._hosts(attempt, opt, report)
        for names in ("names", "buffer_names"):
            if isinstance(value.get(names), list):
                self._names[names] = [str(name)[:512] for name in value[names][:256]]
        if "round" not in value:
            return
        key = (attempt, opt, _int(evidence, "index"))
        members = self._members.setdefault(key[:2], set())
        members.add(rank)
        waiting = self._rounds.setdefault(key, {})
        if not waiting:
            self._round_order.append(key)
        waiting[rank] = report
        if len(waiting) == world or (len(waiting) >= len(members) >= 2 and key[2] > 1 and world > len(members)):
            yield from self._close(key)
        while len(self._round_order) > ROUNDS_KEPT:
            yield from self._close(self._round_order[0])

    def _close(self, key: tuple[int, int, int]) -> Iterator[Finding]:
        """Compare what the ranks held at one round."""
        if key in self._round_order:
            self._round_order.remove(key)
        waiting = self._rounds.pop(key, {})
        reports = [waiting[rank] for rank in sorted(waiting)]
        if len(reports) < 2:
            return
        agreed = True
        for aspect in ASPECTS:
            if all(isinstance(report.value.get(aspect), str) for report in reports):
                found = list(self._aspect(key, aspect, reports))
                agreed = agreed and not found
                yield from found
        worlds = {report.value["world"] for report in reports}
        if len(worlds) > 1:
            self._broken += 1
            text = f"ranks of one job say that it has {' and '.join(map(str, sorted(worlds)))} ranks"
            yield self._finding(reports[-1].evidence, outcome="suspicious", techniques=("F9", "F10"), text=text)
        elif agreed and not self._agreements.get((*key[:2], "weights"), _Agreement(own_way=True)).own_way:
            self._held += 1

    def _aspect(self, key: tuple[int, int, int], aspect: str, reports: list[_Report]) -> Iterator[Finding]:
        agreement = self._agreements.setdefault((*key[:2], aspect), _Agreement())
        if agreement.own_way:
            return
        groups = _groups(reports, lambda report: _held_of(report, aspect))
        if len(groups) == 1:
            agreement.equal += key[2] > 1
            return
        alone = groups[-1] if len(groups) == 2 and len(groups[0]) > len(groups[-1]) else None
        learnt = agreement.equal >= 2
        if aspect == "buffers" and not learnt:
            agreement.own_way = True
            return
        if alone is None and self._ranks.torch_hook("post_localSGD_hook"):
            agreement.own_way = True
            self._blind["a communication hook of torch lets the ranks' weights come apart between averages"] += 1
            return
        if not learnt and (alone is None or len(groups[0]) < 2 or len(alone) > 1):
            agreement.own_way = True
            self._blind[f"!ranks hold {ASPECTS[aspect][0]} {_SHARDS}"] += 1
            return
        agreement.own_way = True  # said once: what has come apart stays apart
        self._broken += 1
        yield self._stands_alone(key, aspect, reports, groups, alone, agreement.equal)

    def _stands_alone(
        self,
        key: tuple[int, int, int],
        aspect: str,
        reports: list[_Report],
        groups: list[list[_Report]],
        alone: list[_Report] | None,
        equal: int,
    ) -> Finding:
        what, techniques = ASPECTS[aspect]
        where = self._where(aspect, groups[0][0], groups[-1][0])
        before = f"after {equal} rounds in which all were equal" if equal else "from the first steps on"
        if alone is None:
            text = f"step {key[2]}: ranks differ: {_ranks_text([r.rank for r in reports])} hold {what}{where}, {before}"
            text += "; two that differ do not say which one is right" if len(reports) == 2 else ""
            records = [report.evidence for report in reports[:4]]
            return self._finding(*records, outcome="suspicious", techniques=techniques, text=text, nobody=True)
        names, others = _ranks_text([r.rank for r in alone]), _ranks_text([r.rank for r in groups[0]])
        text = f"step {key[2]}: {names} stands alone with {what}{where}, {before} ({others} agree)"
        text += "; faulty hardware does this as well as an act: look at its host, and replay"
        records = [*(report.evidence for report in groups[0][:2]), *(report.evidence for report in alone[:2])]
        return self._finding(*records, outcome="suspicious", techniques=techniques, text=text)

    def _where(self, aspect: str, one: _Report, other: _Report) -> str:
        """Which tensors differ, where that was sent."""
        if aspect not in PER_TENSOR:
            return ""
        a, b = str(one.value[aspect]), str(other.value[aspect])
        names = self._names.get("names" if aspect == "weights" else "buffer_names", [])
        places = [i // CHECKSUM for i in range(0, len(a), CHECKSUM) if a[i : i + CHECKSUM] != b[i : i + CHECKSUM]]
        shown = [names[i] if i < len(names) else f"tensor {i}" for i in places[:NAMES_SHOWN]]
        if not shown:
            return " (no sampled element differs, the sum over all of them does)"
        return f" in {len(places)} of {len(a) // CHECKSUM} tensors ({', '.join(shown)})"

    # -- identity ---------------------------------------------------------------------------------------------

    def _one_process(self, report: _Report) -> Iterator[Finding]:
        other = self._ranks.beside(report.evidence)
        if other is None:
            return
        self._broken += 1
        text = f"two processes act as rank {report.rank} of the same attempt: {other} and {report.evidence.process}"
        text += " of the record, and the first has not ended"
        yield self._finding(report.evidence, outcome="suspicious", techniques=("F9", "F10"), text=text)

    def _identities(self, attempt: int, report: _Report) -> Iterator[Finding]:
        known = self._identity.setdefault(attempt, {})
        known[report.rank] = report
        reports = [known[rank] for rank in sorted(known)]
        for entry, words in IDENTITY.items():
            groups = _groups(reports, lambda each: str(each.value["identity"].get(entry)))  # noqa: B023 used at once
            if len(groups) < 2 or (attempt, entry) in self._identity_said:
                continue
            if len(reports) < report.value["world"] and len(reports) < 3:
                continue  # which of two is the odd one shows when more have spoken
            self._identity_said.add((attempt, entry))
            self._broken += 1
            odd = groups[-1][0]
            found = str(odd.value["identity"].get(entry))[:80]
            expected = str(groups[0][0].value["identity"].get(entry))[:80]
            these, those = (_ranks_text([r.rank for r in group]) for group in (groups[-1], groups[0]))
            text = f"{these}: {words} than {those}"
            yield self._finding(
                groups[0][0].evidence,
                odd.evidence,
                outcome="suspicious",
                techniques=("F10", "F1") if entry == "restart" else ("F1", "A10"),
                text=text,
                expected=expected,
                found=found,
                nobody=len(groups[0]) == len(groups[-1]),
            )

    def _collectives(self, report: _Report) -> Iterator[Finding]:
        """Names of torch.distributed that lead to other code: once for each place."""
        rows = report.value.get("foreign")
        for row in rows[:64] if isinstance(rows, list) else ():
            if not isinstance(row, list) or len(row) != 2 or not all(isinstance(part, str) for part in row):
                raise MalformedEvidence(f"replicas: foreign: expected [name, place], found {str(row)[:80]}")
            name, place = row[0][:200], row[1][:1024]
            if place in self._places:
                continue
            self._places.add(place)
            if self._context.policy.approves(self.name, place):
                self._explained.add(place)
                continue
            if "/site-packages/" in place or "/dist-packages/" in place:
                self._blind[f"!{name} is answered by an installed package ({place})"] += 1
                continue
            self._broken += 1
            text = f"{name} is answered by {place}, which is not torch's; if that is meant, approve it: "
            text += f'[[approve]] check = "{self.name}" place = "{place}"'
            yield self._finding(
                report.evidence, outcome="suspicious", techniques=("F3", "B2"), text=text, path=place, nobody=True
            )

    def _again(self, evidence: Evidence) -> Iterator[Finding]:
        """Flags of a rank that was started again, beside those of its first attempt."""
        value = evidence.body.get("modules")
        flags = value.get("flags") if isinstance(value, dict) else None
        rank = self._ranks.rank(evidence)
        if not isinstance(flags, dict) or rank is None:
            return
        launcher, restarts = self._ranks.restarts(evidence)
        first, before = self._flags.setdefault((launcher, rank), (restarts, flags))
        names = [n for n in before if n in flags and flags[n] != before[n] and n not in _OWN_FLAGS]
        if restarts == first or not names:
            return
        self._flags[launcher, rank] = (restarts, flags)
        self._broken += 1
        text = f"rank {rank} was started again with another {', '.join(names[:4])} than before"
        expected, found = str(before[names[0]])[:80], str(flags[names[0]])[:80]
        yield self._finding(
            evidence, outcome="suspicious", techniques=("F10", "A10"), text=text, expected=expected, found=found
        )

    def _code(self, evidence: Evidence) -> Iterator[Finding]:
        """A rank that compiled other bytes of a file than another rank of the same attempt did."""
        files = evidence.body.get("files")
        if evidence.rank is None or not isinstance(files, list):
            return
        attempt = self._ranks.attempt(evidence)
        for row in files[:4096]:
            if not isinstance(row, list) or len(row) < 4 or not isinstance(row[0], str) or not isinstance(row[1], str):
                continue
            if row[3] not in ("source", "main") or len(self._files) > 65_536:
                continue
            key, now = f"{attempt} {row[0]}", (evidence.rank, row[1], evidence.process)
            before = self._files.setdefault(key, now)
            if before[2] in self._ranks.ended:
                before = self._files[key] = now  # nobody runs it any more
            if before[1] == row[1] or before[0] == evidence.rank:
                continue
            self._broken += 1
            text = f"rank {evidence.rank} runs other bytes of {row[0]} than rank {before[0]}"
            yield from self._limited(
                [
                    self._finding(
                        evidence,
                        outcome="suspicious",
                        techniques=("F1", "A13"),
                        text=text,
                        path=row[0],
                        expected=before[1],
                        found=row[1],
                    )
                ]
            )

    # -- other hosts ------------------------------------------------------------------------------------------

    def _hosts(self, attempt: int, opt: int, report: _Report) -> Iterator[Finding]:
        """What ranks elsewhere left in the store, beside what was left from here."""
        hosts = report.value.get("hosts")
        if not isinstance(hosts, dict):
            return
        number, own, seen = hosts.get("round"), hosts.get("own"), hosts.get("seen")
        if isinstance(number, int) and isinstance(own, str):
            self._texts.setdefault((attempt, opt, number), {})[report.rank] = own[:TEXTS_LIMIT]
        touched = set()
        for key, text in list(seen.items())[:64] if isinstance(seen, dict) else ():
            parts = [int(part) for part in str(key).split(".") if part.isdigit() and len(part) < 12]
            if len(parts) == 3 and isinstance(text, str):
                place = (attempt, parts[0], parts[1])
                self._texts.setdefault(place, {}).setdefault(parts[2], text[:TEXTS_LIMIT])
                touched.add(place)
        for place in sorted(touched):
            yield from self._compare_texts(place, report)
        while len(self._texts) > ROUNDS_KEPT:
            del self._texts[next(iter(self._texts))]

    def _compare_texts(self, place: tuple[int, int, int], report: _Report) -> Iterator[Finding]:
        parsed = {rank: _text(text) for rank, text in self._texts[place].items()}
        reports = [_Report(rank, report.evidence, value=value) for rank, value in sorted(parsed.items()) if value]
        if len(reports) < 2:
            return
        held = True
        for entry in ("weights", "state", "hyper", "world", "identity"):
            agreement = self._agreements.setdefault((*place[:2], f"hosts {entry}"), _Agreement())
            groups = _groups(reports, lambda each: str(each.value.get(entry)))  # noqa: B023 used at once
            if agreement.own_way or len(groups) == 1:
                agreement.equal += len(groups) == 1 and place[2] > 0
                continue
            alone = groups[-1] if len(groups) == 2 and len(groups[0]) > len(groups[-1]) else None
            if agreement.equal < 2 and (alone is None or len(groups[0]) < 2 or len(alone) > 1):
                agreement.own_way = entry not in ("world", "identity")
                if agreement.own_way:
                    self._blind["ranks on other hosts hold other weights or state from the first steps on"] += 1
                    continue
            if len(reports) < min(4, report.value["world"]) and alone is None:
                continue  # more will have spoken at the next round
            agreement.own_way, held = True, False
            self._broken += 1
            who = _ranks_text([r.rank for r in (alone or groups[-1])])
            others = _ranks_text([r.rank for r in groups[0]])
            verb = "stands alone with" if alone is not None else "differs in"
            text = f"round {place[2]} of the store: {who} {verb} {_HOST_WORDS[entry]} ({others} agree)"
            text += "; faulty hardware does this as well as an act: look at its host, and replay"
            yield self._finding(
                report.evidence,
                outcome="suspicious",
                techniques=("F1", "F9") if entry in ("world", "identity") else ("F1", "F2", "E4"),
                text=text,
                nobody=alone is None,
                named=alone[0].rank if alone is not None else None,
            )
        self._held += held

    # -- findings ---------------------------------------------------------------------------------------------

    def _finding(
        self,
        *records: Evidence,
        outcome: Outcome,
        techniques: tuple[str, ...],
        text: str,
        nobody: bool = False,
        named: int | None = None,
        **fields: Any,
    ) -> Finding:
        """A finding; `nobody` leaves the rank open, `named` gives it where no record of that rank is here."""
        finding = finding_from(
            self.name, outcome, text, *records, run=self._context.run, techniques=techniques, **fields
        )
        if not nobody and named is None:
            rank = self._ranks.rank(records[-1])
            return _with_rank(finding, rank if rank is not None else finding.subject.rank)
        return _with_rank(finding, named)

    def _limited(self, found: list[Finding]) -> Iterator[Finding]:
        for finding in found:
            kind = (finding.techniques[0] + finding.outcome, finding.subject.rank)
            self._given[kind] += 1
            if self._given[kind] <= FINDINGS_PER_KIND:
                yield finding


_OWN_FLAGS = ("num_threads", "env.OMP_NUM_THREADS", "env.MKL_NUM_THREADS", "anomaly_mode")
"""Flags that may differ between attempts: how many processors there are, and looking for a fault."""

_SHARDS = "from the first steps on: shards, or not kept equal"
_OWN_WAYS = {
    "shares": "the ranks' gradients take part in unequal shares",
    "unlike": "the reduced gradient is no weighting of what backward left on the ranks",
    "unreduced": "every rank uses its own gradient: nothing is reduced",
    "differ": "the ranks use different gradients",
}

_HOST_WORDS = {
    "weights": "other weights",
    "state": "another optimizer state",
    "hyper": "other optimizer settings",
    "world": "another number of ranks",
    "identity": "other code, versions or numeric settings",
}


def _held_of(report: _Report, aspect: str) -> str:
    whole = report.value.get("whole") if aspect == "weights" else None
    return f"{report.value[aspect]} {whole}"


def _keys(value: dict[str, Any]) -> list[str]:
    keys = value.get("from")
    return [str(key)[:CHECKSUM] for key in keys[:8]] if isinstance(keys, list) else []


def _turns(names: list[str]) -> int:
    return sum(name.startswith(("NegBackward", "seed -")) for name in names)


def _without_turns(names: list[str]) -> list[str]:
    """The operations but for negations, as far as both lists surely reach."""
    return [name for name in names if not name.startswith(("NegBackward", "seed"))][:NAMES_COMPARED]


def _weighted(found: Reduction, habit: _Habit) -> bool:
    """Whether unequal shares still add up to what equal ones did: a mean weighted by the sizes of the batches."""
    usual = habit.factors[0] if habit.factors else 0.0
    total = sum(found.absolute) / len(found.absolute)
    return len(found.apart) > 0 and not found.turned and abs(total - usual) <= 1e-4 * abs(usual)


def _table(sample: Sample | None) -> dict[tuple[str, int, tuple[int, int, int]], Tensor]:
    """Sampled tensors with both gradients, by name, size and place: shards of different tensors never meet."""
    tensors = sample.tensors if sample is not None else []
    return {(t.name, t.numel, t.at): t for t in tensors if t.local is not None and t.grad is not None}


def _groups(reports: list[_Report], of: Callable[[_Report], str]) -> list[list[_Report]]:
    """Reports with the same value together, the largest group first."""
    groups: dict[str, list[_Report]] = {}
    for report in reports:
        groups.setdefault(of(report), []).append(report)
    return sorted(groups.values(), key=lambda group: -len(group))


def _text(text: str) -> dict[str, Any]:
    """What a rank left in the store; empty for anything else than an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _ranks_text(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, sorted(ranks)[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _with_rank(finding: Finding, rank: int | None) -> Finding:
    return msgspec.structs.replace(finding, subject=msgspec.structs.replace(finding.subject, rank=rank))


def _int(evidence: Evidence, name: str) -> int:
    value = evidence.body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedEvidence(f"step frame: {name}: expected a number from 0, found {str(value)[:40]!r}")
    return value
