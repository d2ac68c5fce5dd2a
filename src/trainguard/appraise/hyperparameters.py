"""Check *hyperparameters*: does every parameter group keep its values, except where a schedule sets them?
(docs/checks/hyperparameters.md)

A change is accounted for by a torch scheduler that acts on the optimizer and says the same rate, or by a line that
stores that hyper-parameter: of the job's own source, of the optimizer's class, or of the class of a library's object
that holds the optimizer (reported by the process, from the source files). What neither accounts for is violated. On top
of that: a schedule may not jump where it ran smoothly, a scheduler may not be stepped more often than before, and no
parameter may drop out for good.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.steps import number
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

FINDINGS_PER_KIND = 5
SMOOTH_STEPS = 20
JUMP_LEAST = 0.02
"""Change of a rate, as a part of the larger one, below which nothing counts as a jump."""
JUMP_TIMES = 5.0
"""A jump is this many times the largest change among the last SMOOTH_STEPS."""
STEADY_STEPS = 20
STAY_STEPS = 16
REGULAR_STRIDES = 10
GROUPS_LIMIT = 4096

JUMPING = frozenset(
    {
        "StepLR",
        "MultiStepLR",
        "ConstantLR",
        "ExponentialLR",
        "MultiplicativeLR",
        "SequentialLR",
        "ChainedScheduler",
        "CosineAnnealingWarmRestarts",
        "CyclicLR",
        "ReduceLROnPlateau",
    }
)
"""Schedulers whose rate may jump."""

SCHEDULED = {"OneCycleLR": {"betas", "momentum"}, "CyclicLR": {"betas", "momentum"}}
"""Schedulers that also set other hyper-parameters."""

BOOKKEEPING = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "param_names", "tensors"}
)
"""Entries of a group that schedulers keep there; the update does not read them."""

Key = tuple[int | None, int]


@dataclass(slots=True)
class _Group:
    values: dict[str, object] = field(default_factory=dict)
    moves: deque[float] = field(default_factory=lambda: deque(maxlen=SMOOTH_STEPS))
    """Relative changes of the rate at the last steps, 0 where it stayed."""
    begin: float | None = None
    peak: float = 0.0
    """The first rate, and the largest so far: where a schedule that runs in cycles begins again."""


@dataclass(slots=True)
class _Track:
    groups: list[_Group] = field(default_factory=list)
    writers: dict[str, list[str]] | None = None
    within: dict[str, list[str]] = field(default_factory=dict)
    """Lines of the optimizer's own class that store a hyper-parameter."""
    counts: dict[str, int] = field(default_factory=dict)
    """Scheduler class → steps it had made."""
    told_at: dict[str, int] = field(default_factory=dict)
    """Scheduler → update at which its count was told last."""
    gaps: dict[str, int] = field(default_factory=dict)
    """Scheduler → fewest updates between two times that it was told."""
    strides: Counter[int] = field(default_factory=Counter)
    """Scheduler steps per optimizer step → how often, zeros left out."""
    census: dict[str, object] | None = None
    censuses: int = 0
    without: Counter[str] = field(default_factory=Counter)
    """Tensor → censuses in which it had no gradient."""
    steps: int = 0
    scaled: bool = False
    """A gradient scaler calls the steps: it skips some, while the scheduler goes on."""
    dropped: dict[str, tuple[int, Evidence, str]] = field(default_factory=dict)
    """Tensor → (step it dropped out at, that record, in words); a finding once it stays out for STAY_STEPS."""


class Hyperparameters:
    """Follows every group of every optimizer."""

    name = "hyperparameters"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tracks: dict[Key, _Track] = {}
        self._held = 0
        self._broken = 0
        self._explained: set[str] = set()
        self._given: Counter[tuple[int | None, str]] = Counter()

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Follow one step."""
        if evidence.kind != "step":
            return
        opt = evidence.body.get("opt")
        track = self._tracks.setdefault((evidence.process, opt if isinstance(opt, int) else -1), _Track())
        track.steps += 1
        gradients = evidence.body.get("gradients")
        track.scaled = track.scaled or (isinstance(gradients, dict) and "scale" in gradients)
        before = self._broken
        try:
            yield from self._step(evidence, evidence.body.get(self.name), track)
        except MalformedEvidence as error:
            self._broken += 1
            yield from self._give(evidence, "suspicious", ("G2",), f"malformed record: {error}")
        yield from self._dropped(track)
        if track.groups:
            self._held += self._broken == before

    def end(self) -> Iterator[Finding | LinkState]:
        """The balance."""
        blind = () if self._held or self._broken else ("no optimizer step was seen",)
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=blind,
            explained=tuple(sorted(self._explained)),
        )

    # -- one step ---------------------------------------------------------------------------------------------

    def _step(self, evidence: Evidence, value: object, track: _Track) -> Iterator[Finding]:
        if value is None:
            for group in track.groups:
                group.moves.append(0.0)
            return
        entry = _object(value)
        if isinstance(entry.get("writers"), dict):
            track.writers = _writers(entry["writers"])
        if isinstance(entry.get("within"), dict):
            track.within = _writers(entry["within"])
        schedulers = _schedulers(entry.get("schedulers"))
        changed = [_triple(each) for each in _list(entry.get("changed"))]
        old = [dict(group.values) for group in track.groups]
        self._apply(entry, changed, track)
        yield from self._changes(evidence, track, old, schedulers)
        yield from self._strides(evidence, track, schedulers)
        for number_, name, now in [_triple(each) for each in _list(entry.get("inside"))]:
            if name in BOOKKEEPING:
                continue
            was = track.groups[number_].values.get(name) if number_ < len(track.groups) else None
            if not _lines(track.within, name):
                self._broken += 1
                text = f"group {number_}: {name} changed from {was} to {now} inside the optimizer's step"
                yield from self._give(evidence, "suspicious", _techniques(name), text)
            if number_ < len(track.groups):
                track.groups[number_].values[name] = now
        if isinstance(entry.get("census"), dict):
            self._census(evidence, _object(entry["census"]), track)

    def _apply(self, entry: dict[str, object], changed: list[tuple[int, str, object]], track: _Track) -> None:
        groups = _list(entry.get("groups"))
        if len(groups) > GROUPS_LIMIT:
            raise MalformedEvidence(f"hyperparameters: {len(groups)} groups, limit {GROUPS_LIMIT}")
        for index, values in enumerate(groups):
            if index == len(track.groups):
                track.groups.append(_Group())
            track.groups[index].values = dict(_object(values))
        if groups:
            del track.groups[len(groups) :]
        for index, name, now in changed:
            if index < len(track.groups):
                track.groups[index].values[name] = now

    def _changes(
        self, evidence: Evidence, track: _Track, old: list[dict[str, object]], schedulers: list[_Scheduler]
    ) -> Iterator[Finding]:
        for index, group in enumerate(track.groups):
            if index >= len(old):
                continue  # a group that was just added has no past
            was = old[index]
            yield from self._rate(evidence, track, index, was.get("lr"), schedulers)
            for name in sorted(was.keys() | group.values.keys()):
                now = group.values.get(name)
                if name == "lr" or name in BOOKKEEPING or was.get(name) == now:
                    continue
                yield from self._other(evidence, track, index, name, was.get(name), now, schedulers)

    def _rate(
        self, evidence: Evidence, track: _Track, index: int, was: object, schedulers: list[_Scheduler]
    ) -> Iterator[Finding]:
        group = track.groups[index]
        now = group.values.get("lr")
        old, new = number(was), number(now)
        if old is None or new is None:
            return
        says = [scheduler.rates[index] for scheduler in schedulers if index < len(scheduler.rates)]
        places = self._places(track, "lr")
        if old == new:
            group.moves.append(0.0)
            return
        move = abs(new - old) / max(abs(new), abs(old))  # of the larger: a schedule that ends at nothing may rise again
        where = f"group {index}: learning rate went from {old:.9g} to {new:.9g}"
        if schedulers and says and not any(_equal(new, each) for each in says):
            if not places:
                self._broken += 1
                text = f"{where}, but the scheduler last set {says[-1]:.9g}"
                yield from self._give(
                    evidence, "violated", ("C3",), text, expected=f"{says[-1]:.9g}", found=f"{new:.9g}"
                )
                return
        elif not schedulers and not places:
            self._broken += 1
            text = f"{where}, and neither a scheduler nor a line of the job's source sets it"
            yield from self._give(evidence, "violated", ("C3",), text, expected=f"{old:.9g}", found=f"{new:.9g}")
            return
        jumps = any(scheduler.short in JUMPING for scheduler in schedulers)
        again = any(start is not None and _near(new, start) for start in (group.begin, group.peak))
        group.peak = max(group.peak, old)
        group.begin = old if group.begin is None else group.begin
        if not jumps and not again and _jump(group, move):
            self._broken += 1
            usual = max(group.moves)
            text = f"{where}: a jump of {move:.1%} in a schedule that moved by at most {usual:.2%} a step"
            yield from self._give(evidence, "suspicious", ("C3",), text, path=places[0] if places else None)
        group.moves.append(move)

    def _other(
        self,
        evidence: Evidence,
        track: _Track,
        index: int,
        name: str,
        was: object,
        now: object,
        schedulers: list[_Scheduler],
    ) -> Iterator[Finding]:
        if any(name in SCHEDULED.get(scheduler.short, ()) for scheduler in schedulers):
            return
        if name == "n":
            if isinstance(was, int) and isinstance(now, int) and now < was:
                self._broken += 1
                text = f"group {index} lost {was - now} of its {was} tensors"
                yield from self._give(evidence, "violated", ("C5",), text)
            return
        if self._places(track, name):
            return
        self._broken += 1
        text = f"group {index}: {name} went from {was} to {now}, and no scheduler or line of the job's source sets it"
        yield from self._give(
            evidence, "violated", _techniques(name), text, expected=str(was)[:80], found=str(now)[:80]
        )

    def _places(self, track: _Track, name: str) -> list[str]:
        return _lines(track.writers or {}, name)

    def _strides(self, evidence: Evidence, track: _Track, schedulers: list[_Scheduler]) -> Iterator[Finding]:
        """A scheduler is stepped as often between two updates as it always was."""
        for scheduler in schedulers:
            if scheduler.count is None:
                continue
            last = track.counts.get(scheduler.kind)
            since, track.told_at[scheduler.kind] = track.told_at.get(scheduler.kind, 0), track.steps
            track.counts[scheduler.kind] = scheduler.count
            if last is None or track.steps <= 2:
                continue
            stride, gap = scheduler.count - last, max(1, track.steps - since)
            shortest = track.gaps[scheduler.kind] = min(gap, track.gaps.get(scheduler.kind, gap))
            # A rate that stays the same for a while, as at the top of a warm-up, is not told: the next report counts
            # the steps of all the updates since.
            usual = max(track.strides, default=stride) * (gap // shortest)
            if stride > usual and not track.scaled and sum(track.strides.values()) >= REGULAR_STRIDES:
                self._broken += 1
                text = (
                    f"{scheduler.short} was stepped {stride} times between two updates, never more than {usual} before"
                )
                yield from self._give(evidence, "suspicious", ("C3", "C9"), text)
            elif stride > 0 and gap == shortest:
                track.strides[stride] += 1

    def _census(self, evidence: Evidence, census: dict[str, object], track: _Track) -> None:
        """Parameters may come to take part (unfreezing), but not drop out for good."""
        last, track.census = track.census, census
        track.censuses += 1
        if last is None or track.steps <= STEADY_STEPS:
            track.without.update(_names(census, "without_grad"))
            return
        for kind, words in (("frozen", "requires no gradient any more"), ("without_grad", "has no gradient any more")):
            for name in sorted(_names(census, kind) - _names(last, kind)):
                if not track.without[name]:
                    track.dropped.setdefault(name, (track.steps, evidence, words))
        present = set(track.dropped) - _names(census, "frozen") - _names(census, "without_grad")
        for name in present:  # it came back: a part of the model that is used now and then
            del track.dropped[name]
            track.without[name] += 1

    def _dropped(self, track: _Track) -> Iterator[Finding]:
        for name, (since, evidence, words) in list(track.dropped.items()):
            if track.steps - since >= STAY_STEPS:
                del track.dropped[name]
                track.without[name] += 1
                self._broken += 1
                text = f"{name} {words}, and had one in every step before"
                yield from self._give(evidence, "suspicious", ("C5",), text, tensor=name)

    def _give(
        self,
        evidence: Evidence,
        outcome: Outcome,
        techniques: tuple[str, ...],
        text: str,
        *,
        tensor: str | None = None,
        path: str | None = None,
        expected: str | None = None,
        found: str | None = None,
    ) -> Iterator[Finding]:
        kind = (evidence.rank, techniques[0])
        self._given[kind] += 1
        if self._given[kind] > FINDINGS_PER_KIND:
            return
        yield finding_from(
            self.name,
            outcome,
            f"step {evidence.step}: {text}",
            evidence,
            run=self._context.run,
            techniques=techniques,
            tensor=tensor,
            path=path,
            expected=expected,
            found=found,
        )


@dataclass(frozen=True, slots=True)
class _Scheduler:
    kind: str
    count: int | None
    rates: list[float]

    @property
    def short(self) -> str:
        """Class name without its module."""
        return self.kind.rsplit(".", 1)[-1]


def _jump(group: _Group, move: float) -> bool:
    """Whether `move` stands out from a schedule that has been moving a little at nearly every step."""
    moves = group.moves
    if len(moves) < SMOOTH_STEPS or sum(m > 0 for m in moves) < 0.8 * SMOOTH_STEPS:
        return False
    return move > JUMP_LEAST and move > JUMP_TIMES * max(moves)


def _techniques(name: str) -> tuple[str, ...]:
    return ("C3",) if name == "lr" else ("C4",)


def _equal(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= 1e-6 * max(abs(a), abs(b))  # a tensor rate is float32, a scheduler's is not


def _near(rate: float, start: float) -> bool:
    """Whether a rate is where a cycle begins, or a step's move below it: cycles need not be whole numbers of steps."""
    return abs(rate - start) <= JUMP_LEAST * abs(start)


def _schedulers(value: object) -> list[_Scheduler]:
    out: list[_Scheduler] = []
    for row in _list(value)[:16]:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)):
            raise MalformedEvidence(f"hyperparameters: scheduler: {str(row)[:80]!r}")
        count = row[1] if isinstance(row[1], int) else None
        rates = [rate for rate in map(number, _list(row[2])) if rate is not None]
        out.append(_Scheduler(row[0], count, rates))
    return out


def _writers(value: object) -> dict[str, list[str]]:
    return {
        name: [place for place in _list(places) if isinstance(place, str)][:16]
        for name, places in list(_object(value).items())[:64]
    }


def _lines(writers: dict[str, list[str]], name: str) -> list[str]:
    """Lines that store `name`, or something whose name is computed."""
    return writers.get(name) or writers.get("*") or []


def _triple(value: object) -> tuple[int, str, object]:
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], int) and isinstance(value[1], str):
        return value[0], value[1], value[2]
    raise MalformedEvidence(f"hyperparameters: change: {str(value)[:80]!r}")


def _names(census: dict[str, object], kind: str) -> set[str]:
    return {name for name in _list(census.get(kind)) if isinstance(name, str)}


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedEvidence(f"hyperparameters: expected an object, found {type(value).__name__}")
    return value


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
