"""Check *weights*: did anybody but the optimizer write to weights or optimizer state? (docs/checks/weights.md)

Continuity: the sample taken after step t must be the sample found before step t + 1. A departure waits, for at most
WAIT_STEPS checked steps, for the interval that runs under watch: if the line that writes is named, it is suspicious, or
explained where the policy approves that line; if nothing is named, it is violated.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.steps import parse_blob
from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

WAIT_STEPS = 8
FINDINGS_PER_KIND = 5
CHANGED_LIMIT = 16

Key = tuple[int | None, int]


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

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Compare one checked interval."""
        value = evidence.body.get(self.name)
        if evidence.kind != "step":
            return
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
            return
        self._broken += 1
        changes = [_change(each) for each in _list(value.get("changed"))[:CHANGED_LIMIT]]
        if not changes:
            text = "the sum over the whole tensor is another; none of the sampled elements is"
            changes = [Change(name, "weight", 0, 0, text) for name in whole]
        total = value.get("changed_tensors")
        if value.get("replaced") is True and all(change.what != "weight" for change in changes):
            text = "the optimizer's state was replaced as a whole between two steps (load_state_dict)"
            yield from self._place(evidence, ["Optimizer.load_state_dict"], text, changes)
            return
        bit = len(changes) == 1 and len(whole) <= 1 and (changes[0].bit or _one_bit_moved(value.get("whole")))
        track.open.append(_Open(evidence, changes, total if isinstance(total, int) else len(changes), bit))

    def _learn(self, value: dict[str, object], track: _Track) -> None:
        for each in _list(value.get("writers"))[:32]:
            entry = _object(each)
            stack = [line for line in _list(entry.get("stack")) if isinstance(line, str)]
            place = _place(stack)
            if place is not None:
                track.writers.setdefault(place, f"{str(entry.get('op'))[:80]} on {str(entry.get('name'))[:200]}")

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
        approved = [place for place in places if self._context.policy.approves(self.name, place)]
        if approved:
            self._broken -= 1
            self._explained.update(approved)
            return
        place = places[0]
        by = f", by {(operations or {}).get(place, 'a call')} at {place}"
        hint = f'; if that is meant, approve it: [[approve]] check = "weights" place = "{_short(place)}"'
        tensor = changes[0].tensor if changes else None
        yield from self._give(evidence, "suspicious", ("E4", "B7"), text + by + hint, tensor, place)

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
        text = f"{_words(each)}, between two steps, by nobody that could be named"
        tensor = each.changes[0].tensor if each.changes else None
        if each.bit:
            text += "; it is one bit of one element: faulty memory does this as well as an act"
        yield from self._give(each.evidence, "suspicious" if each.bit else "violated", ("E4", "B7"), text, tensor)

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
    return Change(name[:512], what[:80], differ, of, _amount(old, new), _one_bit(old, new))


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


def _amount(old: list[float], new: list[float]) -> str:
    """Scaled, shifted, or by how much at most."""
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if math.isfinite(a) and math.isfinite(b)]
    moved = [(a, b) for a, b in pairs if a != b]
    if not moved:
        return "not finite"
    ratios = [b / a for a, b in moved if a]
    if ratios and len(ratios) == len(moved) and max(ratios) - min(ratios) <= 1e-4 * max(map(abs, ratios)):
        return f"multiplied by {sum(ratios) / len(ratios):.6g}"
    shifts = [b - a for a, b in moved]
    if max(shifts) - min(shifts) <= 1e-3 * max(map(abs, shifts)):
        return f"shifted by {sum(shifts) / len(shifts):.6g}"
    return f"by at most {max(map(abs, shifts)):.6g}"


def _place(stack: list[str]) -> str | None:
    """`file:line` of the innermost frame outside torch, or the innermost of all."""
    for line in [*(s for s in stack if "/torch/" not in s), *stack[:1]]:
        parts = line.rsplit(":", 2)
        if len(parts) == 3:
            return f"{parts[0]}:{parts[1]}"[:1024]
    return None


def _short(place: str) -> str:
    return "/".join(place.rsplit("/", 2)[-2:]) if place.count("/") > 2 else place


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise MalformedEvidence(f"weights: expected an object, found {type(value).__name__}")
    return value


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
