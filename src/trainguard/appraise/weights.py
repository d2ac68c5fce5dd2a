"""Check *weights*: did anybody but the optimizer write to weights or optimizer state? (docs/checks/weights.md)

Continuity: the sample taken after step t must be the sample found before step t + 1. A departure waits, for at most
WAIT_STEPS checked steps, for the interval that runs under watch: if the line that writes is named, it is suspicious, or
explained where the policy approves that line; if nothing is named, it is violated. One case is open: whole tensors hold
values that are no multiple or shift of what they were, and the job's source has lines that do that (a checkpoint put
back, an average, a layer begun again). Then those lines are named, and it is suspicious.

Where there are other ranks, the interval is first compared with theirs (`_together`):

    a weighted mean of what the ranks held (blend.py)            held: the script averages weights over ranks
    all differed before and hold the same now, and no mean       blind: brought together by a rule of the script's own
    the same in a job that averages otherwise                    a departure, as are all others
    not all ranks looked at this interval                        blind if weights come apart here between averages
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from trainguard.appraise.blend import blend_of
from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.ranks import Ranks
from trainguard.appraise.steps import parse_blob
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

WAIT_STEPS = 8
FINDINGS_PER_KIND = 5
CHANGED_LIMIT = 64
WAITING_LIMIT = 256
"""Intervals that wait for other ranks."""
PATIENCE = 16
"""Intervals to wait for ranks that nobody has seen on this host, where nothing says how many run here."""
AVERAGES_KNOWN = 2
"""Intervals explained by a mean, from which on this job's weights are brought together in no other way."""

Key = tuple[int | None, int]
Shared = tuple[int, int]
"""Attempt, index of the optimizer."""
Relation = Literal["multiplied by", "shifted by", "by at most", "not finite"]
Slot = tuple[str, str, str]
"""Tensor, weight or state key, place."""


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor that differs from what the update left."""

    name: str
    what: str
    """weight, or the key of the optimizer's state."""
    differ: int
    of: int
    text: str
    """What the change amounts to, in words."""
    bit: bool = False
    """It is one bit of one element of the sample."""
    other: bool = False
    """Most of the sample holds other values, which are no multiple or shift of what they were."""

    @property
    def tensor(self) -> str:
        """The name, with the state key where it is not the weight."""
        return self.name if self.what == "weight" else f"{self.name}.{self.what}"


@dataclass(slots=True)
class _Open:
    """A departure whose writer is not known yet."""

    evidence: Evidence
    changes: list[Change]
    tensors: int
    bit: bool = False
    """All that changed is one bit of one element."""
    waited: int = 0


@dataclass(frozen=True, slots=True)
class _Interval:
    """What one rank saw between two steps, in a job of several."""

    rank: int
    was: str
    """Digest of its sampled weights as the update left them."""
    now: str
    track: _Track
    departure: _Open | None = None
    """None: nothing changed."""
    values: dict[Slot, tuple[list[float], list[float]]] = field(default_factory=dict)
    """Before and after, of what changed."""
    moved: str = ""
    """By what sums over whole tensors moved."""
    writers: tuple[str, ...] = ()
    """Places that wrote in it, where it was under watch."""


@dataclass(slots=True)
class _Job:
    """What is known of one optimizer of all ranks of one attempt."""

    waiting: dict[int, dict[int, _Interval]] = field(default_factory=dict)
    """Index of the step after the interval → rank → what it saw."""
    latest: dict[int, int] = field(default_factory=dict)
    """Rank → index of its last record."""
    averaged: int = 0
    """Intervals that a weighted mean explained."""
    apart: bool = False
    """Ranks were seen to hold different weights."""
    unsure: list[_Interval] = field(default_factory=list)
    """Departures that the whole run may yet show to be averages: only sums over whole tensors moved, on all alike."""


@dataclass(slots=True)
class _Track:
    after: str | None = None
    """Digest that the last step left."""
    index: int | None = None
    open: list[_Open] = field(default_factory=list)
    writers: dict[str, str] = field(default_factory=dict)
    """Place that writes to a weight → operation and tensor."""


class Weights:
    """Compares what each update left with what the next one found."""

    name = "weights"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tracks: dict[Key, _Track] = {}
        self._held = 0
        self._broken = 0
        self._blind: Counter[str] = Counter()
        self._explained: set[str] = set()
        self._given: Counter[tuple[int | None, str]] = Counter()
        self._ranks = Ranks()
        self._jobs: dict[Shared, _Job] = {}
        self._may: dict[int | None, list[str]] = {}
        """Process → lines of its source that put other values into weights as a whole."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Compare one checked interval."""
        value = evidence.body.get(self.name)
        self._ranks.see(evidence)
        if evidence.kind == "sweep" and evidence.source == "process" and evidence.body.get("what") == "silence":
            yield from self._silence(evidence)
        if evidence.kind != "step":
            return
        self._hosts(evidence)
        opt = evidence.body.get("opt")
        track = self._tracks.setdefault((evidence.process, opt if isinstance(opt, int) else -1), _Track())
        if value is not None:
            try:
                yield from self._interval(evidence, _object(value), track)
            except MalformedEvidence as error:
                self._broken += 1
                yield from self._give(evidence, "suspicious", ("G2",), f"malformed record: {error}", None)
        if evidence.body.get("checked") is True:
            yield from self._age(track)

    def end(self) -> Iterator[Finding | LinkState]:
        """Departures whose writer nobody named, and the balance."""
        for job in self._jobs.values():
            for index in sorted(job.waiting):
                self._close(job, index)
            for interval in job.unsure:
                self._decide(job, interval)
        for track in self._tracks.values():
            for each in track.open:
                yield from self._violated(each)
        blind = tuple(sorted(self._blind))
        if not self._held and not self._broken and not blind and not self._explained:
            blind = ("no interval between two steps was sampled",)
        yield LinkState(
            link=self.name,
            held=self._held,
            broken=self._broken,
            blind=blind,
            explained=tuple(sorted(self._explained)),
        )

    # -- one interval -----------------------------------------------------------------------------------------

    def _interval(self, evidence: Evidence, value: dict[str, object], track: _Track) -> Iterator[Finding]:
        if isinstance(value.get("off"), str):
            self._blind[str(value["off"])[:200]] += 1
            return
        self._learn(value, track)
        if isinstance(value.get("may"), list):
            self._may[evidence.process] = [place for place in _list(value["may"]) if isinstance(place, str)][:64]
        index = evidence.body.get("index")
        if "before" in value:
            yield from self._compare(evidence, value, track)
        track.after = value["after"] if isinstance(value.get("after"), str) else None  # type: ignore[assignment]
        track.index = index if isinstance(index, int) else None
        if track.writers and track.open:
            yield from self._attribute(track)

    def _compare(self, evidence: Evidence, value: dict[str, object], track: _Track) -> Iterator[Finding]:
        before, expected = value.get("before"), value.get("expected")
        index = evidence.body.get("index")
        ranks = value.get("ranks")
        if not isinstance(before, str) or not isinstance(expected, str):
            raise MalformedEvidence("weights: digests are no strings")
        follows = track.index is not None and isinstance(index, int) and index == track.index + 1
        if follows and track.after is not None and expected != track.after:
            self._broken += 1
            text = f"the record says that step {index} began from {expected}, but the step before left {track.after}"
            yield from self._give(evidence, "violated", ("E4", "G2"), text, None)
            return
        whole = _whole(value.get("whole"))
        if before == expected and not whole:
            self._held += 1
            if ranks is not None:
                self._together(evidence, _object(ranks), track)
            return
        self._broken += 1
        listed = _list(value.get("changed"))[:CHANGED_LIMIT]
        changes = [_change(each) for each in listed]
        if not changes:
            text = "the sum over the whole tensor is another; none of the sampled elements is"
            changes = [Change(name, "weight", 0, 0, text) for name in whole]
        total = value.get("changed_tensors")
        if value.get("replaced") is True and all(change.what != "weight" for change in changes):
            text = "the optimizer's state was replaced as a whole between two steps (load_state_dict)"
            yield from self._place(evidence, ["Optimizer.load_state_dict"], text, changes)
            return
        bit = len(changes) == 1 and len(whole) <= 1 and (changes[0].bit or _one_bit_moved(value.get("whole")))
        departure = _Open(evidence, changes, total if isinstance(total, int) else len(changes), bit)
        if ranks is None:
            track.open.append(departure)
        else:
            moved = str(_object(value.get("whole") or {}).get("by"))[:400]
            writers = tuple(place for place, _ in _writers(value))
            self._together(evidence, _object(ranks), track, departure, _values(listed), moved, writers)

    # -- other ranks ------------------------------------------------------------------------------------------

    def _together(
        self,
        evidence: Evidence,
        ranks: dict[str, object],
        track: _Track,
        departure: _Open | None = None,
        values: dict[Slot, tuple[list[float], list[float]]] | None = None,
        moved: str = "",
        writers: tuple[str, ...] = (),
    ) -> None:
        """Keep an interval until every rank has reported it, or went past it."""
        world, was, now = ranks.get("world"), ranks.get("was"), ranks.get("now")
        index, opt, rank = evidence.body.get("index"), evidence.body.get("opt"), self._ranks.rank(evidence)
        if not isinstance(world, int) or not isinstance(was, str) or not isinstance(now, str):
            raise MalformedEvidence("weights: ranks: expected world and two digests")
        if not isinstance(index, int) or not isinstance(opt, int) or rank is None:
            if departure is not None:
                track.open.append(departure)
            return
        job = self._jobs.setdefault((self._ranks.attempt(evidence), opt), _Job())
        interval = _Interval(rank, was[:64], now[:64], track, departure, values or {}, moved, writers)
        job.waiting.setdefault(index, {})[rank] = interval
        job.latest[rank] = index
        for each in sorted(job.waiting):
            seen = job.waiting[each]
            if len(seen) >= world or self._passed(job, each, world, evidence):
                self._close(job, each, whole=len(seen) >= world)
        while len(job.waiting) > WAITING_LIMIT:
            self._close(job, min(job.waiting))

    def _passed(self, job: _Job, index: int, world: int, evidence: Evidence) -> bool:
        """Whether every rank of this host has gone past that step without looking at the interval before it."""
        here = self._ranks.members.get(evidence.process)
        local = here.local_world if here is not None and here.local_world else world
        known = self._ranks.beginners(evidence) | set(job.latest)
        if len(known) < min(local, world) and len(job.waiting) <= PATIENCE:
            return False
        return all(job.latest.get(rank, 0) > index for rank in known)

    def _close(self, job: _Job, index: int, *, whole: bool = False) -> None:
        """Decide on one interval of the ranks that reported it; whole: all of them did."""
        seen = job.waiting.pop(index)
        intervals = [seen[rank] for rank in sorted(seen)]
        job.apart = job.apart or len({each.was for each in intervals}) > 1
        departed = [each for each in intervals if each.departure is not None]
        if not departed:
            return
        if whole and _blended(intervals):
            job.averaged += 1
            self._settle(departed, None)
            return
        alike = len(intervals) > 1 and len({each.now for each in intervals}) == 1
        if alike and len({each.was for each in intervals}) > 1 and not (whole and job.averaged >= AVERAGES_KNOWN):
            self._settle(
                departed, "ranks held different weights, and between two steps the same: not by a mean of them"
            )
            job.apart = True
            return
        if alike and not any(each.values for each in departed) and len({each.moved for each in departed}) == 1:
            job.unsure += departed
            return
        for each in departed:
            if whole:
                each.track.open.append(each.departure)  # type: ignore[arg-type]  # none are left out above
            else:
                self._decide(job, each)

    def _decide(self, job: _Job, interval: _Interval) -> None:
        """A change that other ranks did not look at: nothing to say of it where weights are averaged now and then."""
        if job.averaged or job.apart:
            self._settle(
                [interval], "weights changed between two steps, in a job whose ranks come apart between averages"
            )
        elif interval.departure is not None:
            interval.track.open.append(interval.departure)

    def _settle(self, departed: list[_Interval], blind: str | None) -> None:
        """Take back that these intervals are broken: they are held, or blind with a reason."""
        self._broken -= len(departed)
        for each in departed:
            for place in each.writers:  # they wrote a mean, so they are not who wrote something else
                each.track.writers.pop(place, None)
        if blind is None:
            self._held += len(departed)
        else:
            self._blind[blind] += len(departed)

    def _hosts(self, evidence: Evidence) -> None:
        """Do ranks of other hosts hold other weights than this one held at the same round?"""
        value, opt = evidence.body.get("replicas"), evidence.body.get("opt")
        hosts = value.get("hosts") if isinstance(value, dict) else None
        seen = hosts.get("seen") if isinstance(hosts, dict) else None
        if not isinstance(seen, dict) or not isinstance(opt, int):
            return
        rounds: dict[str, set[str]] = {}
        for key, text in list(seen.items())[:64]:
            where, _, _ = str(key).rpartition(".")
            rounds.setdefault(where, set()).add(_held_weights(text))
        if any(len(held) > 1 for held in rounds.values()):
            self._jobs.setdefault((self._ranks.attempt(evidence), opt), _Job()).apart = True

    def _learn(self, value: dict[str, object], track: _Track) -> None:
        for place, words in _writers(value):
            track.writers.setdefault(place, words)

    def _attribute(self, track: _Track) -> Iterator[Finding]:
        waiting, track.open = track.open, []
        for each in waiting:
            text = f"weights changed between two steps: {_words(each)}"
            yield from self._place(each.evidence, sorted(track.writers), text, each.changes, track.writers)

    def _place(
        self,
        evidence: Evidence,
        places: list[str],
        text: str,
        changes: list[Change],
        operations: dict[str, str] | None = None,
    ) -> Iterator[Finding]:
        if self._is_approved(places):
            return
        place = places[0]
        by = f", by {(operations or {}).get(place, 'a call')} at {place}"
        tensor = changes[0].tensor if changes else None
        yield from self._give(evidence, "suspicious", ("E4", "B7"), text + by + _hint(place), tensor, place)

    def _age(self, track: _Track) -> Iterator[Finding]:
        late: list[_Open] = []
        for each in track.open:
            each.waited += 1
            if each.waited > WAIT_STEPS:
                late.append(each)
        if late:
            track.open = [each for each in track.open if each not in late]
            for each in late:
                yield from self._violated(each)

    def _violated(self, each: _Open) -> Iterator[Finding]:
        lines = self._may.get(each.evidence.process, [])
        if lines and each.changes and all(change.what == "weight" and change.other for change in each.changes):
            yield from self._restored(each, lines)
            return
        text = f"{_words(each)}, between two steps, by nobody that could be named"
        tensor = each.changes[0].tensor if each.changes else None
        if each.bit:
            text += "; it is one bit of one element: faulty memory does this as well as an act"
        yield from self._give(each.evidence, "suspicious" if each.bit else "violated", ("E4", "B7"), text, tensor)

    def _restored(self, each: _Open, lines: list[str]) -> Iterator[Finding]:
        """Whole tensors hold other values, once: lines that do so are there, and none was seen."""
        if self._is_approved(lines):
            return
        named = ", ".join(_short(line) for line in lines[:4]) + (" and more" if len(lines) > 4 else "")
        text = (
            f"{_words(each)}, between two steps, by nobody that was seen; these lines put values into weights: {named}"
        )
        hint = _hint(lines[0]) + " (or whichever it was)" if len(lines) > 1 else _hint(lines[0])
        yield from self._give(each.evidence, "suspicious", ("E4", "B7"), text + hint, each.changes[0].tensor)

    def _is_approved(self, places: list[str]) -> bool:
        """Whether the policy approves one of them: then the departure is explained."""
        approved = [place for place in places if self._context.policy.approves(self.name, place)]
        self._broken -= bool(approved)
        self._explained.update(approved)
        return bool(approved)

    def _silence(self, evidence: Evidence) -> Iterator[Finding]:
        """Weights moved with the batches, and no step was reported (watch/silence.py)."""
        batches, moved = evidence.body.get("batches"), evidence.body.get("moved")
        if not (isinstance(batches, int) and isinstance(moved, int)):
            return
        self._broken += 1
        too = ", and gradients with them" if evidence.body.get("gradients") is True else ""
        yield finding_from(
            self.name,
            "suspicious",
            f"weights moved at {moved} looks in a row{too}, while {batches} batches came and no optimizer's step was "
            f"seen after step {evidence.step}: what updates them runs none of torch's hooks",
            evidence,
            run=self._context.run,
            techniques=("B3", "G7", "C9"),
        )

    def _give(
        self,
        evidence: Evidence,
        outcome: Outcome,
        techniques: tuple[str, ...],
        text: str,
        tensor: str | None,
        path: str | None = None,
    ) -> Iterator[Finding]:
        kind = (evidence.rank, outcome + (path or ""))
        self._given[kind] += 1
        if self._given[kind] > (1 if path else FINDINGS_PER_KIND):  # one line that writes is one thing to approve
            return
        where = f"before step {evidence.step}: "
        yield finding_from(
            self.name,
            outcome,
            where + text,
            evidence,
            run=self._context.run,
            techniques=techniques,
            tensor=tensor,
            path=path,
        )


def _blended(intervals: list[_Interval]) -> bool:
    """Whether all ranks now hold a weighted mean of what they held, or what one of them held."""
    departed = [each for each in intervals if each.departure is not None]
    held = [each for each in intervals if each.departure is None]
    if held:
        given = {each.now for each in held}
        return all(each.now in given and each.was != each.now for each in departed)
    slots = list(departed[0].values)
    if not slots or any(list(each.values) != slots for each in departed):
        return False
    sizes = {tuple(len(side) for slot in slots for side in each.values[slot]) for each in departed}
    if len(sizes) != 1:
        return False
    olds = [[v for slot in slots for v in each.values[slot][0]] for each in departed]
    news = [[v for slot in slots for v in each.values[slot][1]] for each in departed]
    return len(olds[0]) == len(news[0]) and blend_of(olds, news) is not None


def _writers(value: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Place and operation of every write that was seen in an interval under watch."""
    for each in _list(value.get("writers"))[:32]:
        entry = _object(each)
        place = _place([line for line in _list(entry.get("stack")) if isinstance(line, str)])
        if place is not None:
            yield place, f"{str(entry.get('op'))[:80]} on {str(entry.get('name'))[:200]}"


def _values(listed: list[object]) -> dict[Slot, tuple[list[float], list[float]]]:
    """The values of what changed, before and after, by where they are."""
    out = {}
    for value in listed:
        entry = _object(value)
        if "old" in entry:
            slot = (str(entry.get("name"))[:512], str(entry.get("what"))[:80], str(entry.get("at"))[:80])
            out[slot] = (parse_blob(entry["old"]), parse_blob(entry.get("new")))
    return out


def _held_weights(text: object) -> str:
    """Checksum of the weights in what a rank left in the job's store; empty where it is none."""
    try:
        value = msgspec.json.decode(text[:4096]) if isinstance(text, str) else None
    except (msgspec.DecodeError, RecursionError):
        return ""
    return str(value.get("weights"))[:64] if isinstance(value, dict) else ""


def _words(each: _Open) -> str:
    if not each.changes:
        return f"{each.tensors} tensors changed"
    first = each.changes[0]
    more = f" and {each.tensors - 1} more tensors" if each.tensors > 1 else ""
    seen = f"{first.differ} of {first.of} sampled elements; " if first.of else ""
    return f"{first.tensor}{more} changed ({seen}{first.text})"


def _whole(value: object) -> list[str]:
    """Names of tensors whose sum changed; none where nothing was summed."""
    if value is None:
        return []
    names = _list(_object(value).get("changed"))[:CHANGED_LIMIT]
    if not all(isinstance(name, str) for name in names):
        raise MalformedEvidence("weights: whole: names are no strings")
    return [str(name)[:512] for name in names]


def _change(value: object) -> Change:
    entry = _object(value)
    name, what = entry.get("name"), entry.get("what")
    differ, of = entry.get("differ"), entry.get("of")
    if not isinstance(name, str) or not isinstance(what, str) or not isinstance(differ, int) or not isinstance(of, int):
        raise MalformedEvidence("weights: a change without name, kind and counts")
    if "old" not in entry:
        return Change(name[:512], what[:80], differ, of, "another type")
    old, new = parse_blob(entry["old"]), parse_blob(entry.get("new"))
    relation, amount = _relation(old, new)
    text = relation if math.isnan(amount) else f"{relation} {amount:.6g}"
    other = relation == "by at most" and 2 <= of <= 2 * differ
    return Change(name[:512], what[:80], differ, of, text, bit=_one_bit(old, new), other=other)


def _one_bit(old: list[float], new: list[float]) -> bool:
    """Whether the values differ in one bit of one of them; narrow types are looked at as the wide one they came in."""
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if struct.pack("<d", a) != struct.pack("<d", b)]
    return len(old) == len(new) and len(pairs) == 1 and any(_bits(*pairs[0], kind) == 1 for kind in ("f", "d"))


def _bits(one: float, other: float, kind: str) -> int:
    """Bits that differ between two numbers as float32 (f) or float64 (d); 0 where they are none of that type."""
    try:
        a, b = struct.pack(f"<{kind}", one), struct.pack(f"<{kind}", other)
    except OverflowError:
        return 0
    if struct.unpack(f"<{kind}", a)[0] != one and not math.isnan(one):
        return 0
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).bit_count()


def _one_bit_moved(value: object) -> bool:
    """Whether one sum over a whole tensor moved by a power of two, as one flipped bit makes it."""
    by = _list(_object(value).get("by")) if value is not None else []
    if len(by) != 1 or not isinstance(by[0], str) or not by[0].lstrip("-").isdigit() or len(by[0]) > 20:
        return False
    return abs(int(by[0])).bit_count() == 1


def _relation(old: list[float], new: list[float]) -> tuple[Relation, float]:
    """How the new values follow from the old ones, and the number that says it."""
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if math.isfinite(a) and math.isfinite(b)]
    moved = [(a, b) for a, b in pairs if a != b]
    if not moved:
        return "not finite", math.nan
    ratios = [b / a for a, b in moved if a]
    if ratios and len(ratios) == len(moved) and max(ratios) - min(ratios) <= 1e-4 * max(map(abs, ratios)):
        return "multiplied by", sum(ratios) / len(ratios)
    shifts = [b - a for a, b in moved]
    if max(shifts) - min(shifts) <= 1e-3 * max(map(abs, shifts)):
        return "shifted by", sum(shifts) / len(shifts)
    return "by at most", max(map(abs, shifts))


def _place(stack: list[str]) -> str | None:
    """`file:line` of the innermost frame outside torch, or the innermost of all."""
    for line in [*(s for s in stack if "/torch/" not in s), *stack[:1]]:
        parts = line.rsplit(":", 2)
        if len(parts) == 3:
            return f"{parts[0]}:{parts[1]}"[:1024]
    return None


def _hint(place: str) -> str:
    return f'; if that is meant, approve it: [[approve]] check = "weights" place = "{_short(place)}"'


def _short(place: str) -> str:
    return "/".join(place.rsplit("/", 2)[-2:]) if place.count("/") > 2 else place


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedEvidence(f"weights: expected an object, found {type(value).__name__}")
    return value


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
