"""Check *plan*: does the run begin, and go on, as the approved runs did? (docs/checks/plan.md)

A lock may hold a plan: what reference runs of the command had in common (course.py). It was signed before this run
began, so unlike anything the run says of itself it cannot have been made to fit. A departure is suspicious: another
machine, or another day, may be the honest reason, and more references leave out what depends on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from trainguard.appraise.course import AT, Beginning, Course, Fact, same
from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import locked_plan
from trainguard.errors import TrainguardError
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.lockfile import Plan as Approved

FINDINGS_PER_TECHNIQUE = 5
LISTED = 6
"""Departures that one finding names."""
COURSE = "plan.course"
"""Link of what moves: streams, order, rates."""
NEW = ("data set", "class")
"""Facts that tell of a loader, or of an optimizer, as such."""


class Plan:
    """Holds what the processes of a run say of their course to the lock's plan."""

    name = "plan"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._course = Course()
        self._plan: Approved | None = None
        self._why = "no lock: what ran was compared with nothing approved"
        self._required = False
        self._held: Counter[str] = Counter()
        self._broken: Counter[str] = Counter()
        self._blind: dict[str, None] = {}
        self._resumed: dict[int | None, str] = {}
        """Process → why what moves is not held to the plan."""
        self._seen: set[str] = set()
        self._given: Counter[str] = Counter()
        self._explained: dict[str, None] = {}
        self._parted: set[tuple[int | None, str]] = set()
        """Process, value that is not as planned: a rate is told once, at the first update at which it is another."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Hold what this record tells of its process's course to the plan."""
        if evidence.kind == "start":
            self._read(evidence.body.get("lock"))
        if self._plan is None:
            return
        departed: dict[str, list[Fact]] = {}
        for fact in self._course.see(evidence):
            if self._departs(fact, self._plan):
                departed.setdefault(fact.technique, []).append(fact)
        for technique, facts in departed.items():
            yield from self._tell(technique, facts, self._plan)

    def end(self) -> Iterator[Finding | LinkState]:
        """What the plan has and never came, and the balance."""
        if self._plan is not None:
            yield from self._missing(self._plan)
            if not self._course.begun:
                self._blind["no optimizer step was seen"] = None
        blind = tuple(self._blind) if self._plan is not None else (self._why,)
        yield LinkState(
            link=self.name,
            held=self._held[self.name],
            broken=self._broken[self.name],
            blind=blind,
            explained=tuple(self._explained),
            required=self._required,
        )
        if self._plan is not None:
            reasons = dict.fromkeys(self._resumed.values())
            if self._plan.varied:
                reasons[f"the reference runs differ in {', '.join(self._plan.varied)}"[:500]] = None
            held, broken = self._held[COURSE], self._broken[COURSE]
            yield LinkState(link=COURSE, held=held, broken=broken, blind=tuple(reasons), required=False)

    def _read(self, lock: object) -> None:
        if not isinstance(lock, str):
            return
        try:
            self._plan = locked_plan(lock, self._context)
        except TrainguardError as error:
            self._required, self._why = True, f"the lock cannot be read: {error}"
            return
        self._required = self._plan is not None
        self._why = "the lock holds no plan: nothing but the run itself says how it should go"

    # -- one fact ---------------------------------------------------------------------------------------------

    def _departs(self, fact: Fact, plan: Approved) -> bool:
        """Whether this fact is not as planned, and that has to be told; keeps the balance."""
        process = fact.evidence.process
        beginning = self._course.begun[process]
        if reason := _unheld(beginning, plan):
            self._blind[reason] = None
            return False
        self._seen.add(fact.key)
        expected = self._expected(fact, beginning.rank, plan)
        if fact.resumes:
            self._note_resumed(fact, beginning, expected)
            return False
        if fact.moves and process in self._resumed:
            return False
        if expected is None:
            return self._unplanned(fact, beginning.steps, plan)
        link = COURSE if fact.moves else self.name
        if same(expected, fact.value):
            self._held[link] += 1
            return False
        if self._context.policy.approves(self.name, fact.key):
            self._explained[fact.key] = None
            return False
        self._broken[link] += 1
        rate = (process, fact.key.partition(AT)[0])
        known = rate in self._parted
        self._parted.add(rate)
        return not known

    def _note_resumed(self, fact: Fact, beginning: Beginning, expected: str | None) -> None:
        if beginning.attempt:
            why = "was started again"
        elif expected is not None and not same(expected, fact.value):
            why = f"goes on from saved state: {fact.key}: {fact.value}, planned {expected}"
        else:
            return
        self._resumed[fact.evidence.process] = f"it {why[:200]}; streams, order and rates are other ones then"

    def _unplanned(self, fact: Fact, steps: int, plan: Approved) -> bool:
        """Whether it is a loader or an optimizer that no reference had when it had made as many steps."""
        known = fact.key in plan.varied or steps > plan.steps or not fact.key.endswith(NEW)
        if known or self._context.policy.approves(self.name, fact.key):
            return False
        self._broken[self.name] += 1
        return True

    # -- telling ----------------------------------------------------------------------------------------------

    def _tell(self, technique: str, facts: list[Fact], plan: Approved) -> Iterator[Finding]:
        self._given[technique] += 1
        if self._given[technique] > FINDINGS_PER_TECHNIQUE:
            return
        rank = self._course.begun[facts[0].evidence.process].rank
        told = [self._departure(fact, rank, plan) for fact in facts[:LISTED]]
        more = f"; and {len(facts) - LISTED} more" if len(facts) > LISTED else ""
        first = facts[0]
        yield finding_from(
            self.name,
            "suspicious",
            f"not as in the approved runs: {'; '.join(told)}{more}",
            first.evidence,
            run=self._context.run,
            techniques=(technique,),
            path=first.key,
            step=first.evidence.step if first.evidence.step is not None else 1,
            expected=self._expected(first, rank, plan),
            found=first.value,
        )

    def _departure(self, fact: Fact, rank: int, plan: Approved) -> str:
        expected = self._expected(fact, rank, plan)
        if expected is None:
            return f"{fact.key} {fact.value[:100]} is in none of them"
        return f"{fact.key} is {fact.value[:100]}, planned {expected[:100]}"

    def _expected(self, fact: Fact, rank: int, plan: Approved) -> str | None:
        return plan.values.get(f"rank {rank}: {fact.key}", plan.values.get(fact.key))

    def _missing(self, plan: Approved) -> Iterator[Finding]:
        """Loaders and optimizers that a run which went as far as the references never had."""
        begun = self._course.begun.values()
        if not self._seen or min(each.steps for each in begun) < plan.steps:
            return
        planned = {key.removeprefix("rank ").partition(": ")[2] or key for key in plan.values if key.endswith(NEW)}
        absent = sorted(planned - self._seen)
        if absent:
            self._broken[self.name] += 1
            names = ", ".join(key.rsplit(" ", 1 + key.endswith("data set"))[0] for key in absent[:LISTED])
            text = f"not as in the approved runs: {names} never came, in {plan.steps:,} steps and more"
            yield finding_from(self.name, "suspicious", text, run=self._context.run, techniques=("D2",), path=absent[0])


def _unheld(beginning: Beginning, plan: Approved) -> str | None:
    """Why nothing that this process says can be held to the plan; None where it can."""
    if beginning.again and not beginning.attempt:
        return f"several processes train as rank {beginning.rank}; only the first was held to the plan"
    if len(plan.worlds) == 1 and beginning.world not in plan.worlds:
        ranks = f"{plan.worlds[0]} rank{'' if plan.worlds[0] == 1 else 's'}"
        return (
            f"the plan is of runs with {ranks}, this one has {beginning.world}: make it of two sizes, and what both "
            f"have in common is held at any"
        )
    return None
