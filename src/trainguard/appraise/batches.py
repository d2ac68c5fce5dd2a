"""Check *batches*: do labels reach the loss as the data set has them, and batches as made? (docs/checks/batches.md)

Four stations, each compared with the one before:

    data set → batch     the labels of the samples, and those of the batch that was made of them
    batch → job          digests where it was made (a worker) and where it was handed over
    batch → loss         labels handed over, and those that the gradient at the model's output says the loss used
    pass → pass          the label of sample i, and what it was in an earlier pass

Honest code changes labels too: it mixes, smooths, masks or draws them. Then all or most of them change; few changed
among many that stay are what tampering looks like, and are suspicious, unless the code that made the batch is torch's
own (violated: it only stacks) or the lock or an approval holds it (explained).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import Origins, rows, text
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

STACKS = ("default_collate", "torch/utils/data/_utils/collate.py")
"""Name and file of torch's own function that makes a batch of samples."""
FEW = 0.2
"""At most this part of the labels changed: tampering rather than a habit of the job."""
MOST = 0.9
LEAST_ROWS = 64
LEAST_REVISITS = 20
LEAST_STEPS = 10
LABELS_LIMIT = 1_000_000
WAITING_LIMIT = 20_000
FINDINGS_LIMIT = 5


@dataclass(slots=True)
class _Making:
    """Batches made by one function of one place."""

    rows: int = 0
    changed: int = 0
    events: list[tuple[Evidence, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Labels:
    """Labels of one data set by index, as first seen."""

    first: dict[int, object] = field(default_factory=dict)
    revisits: int = 0
    changed: int = 0
    events: list[tuple[Evidence, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Arrival:
    """One path of a batch, at the model or at the loss of one process."""

    count: int = 0
    compared: int = 0
    equal: int = 0
    whole: int = 0
    """Looks at which all were equal."""
    first: int | None = None
    """Number of the first look at which some were not, from 0."""
    odd: list[tuple[Evidence, int, int, str]] = field(default_factory=list)
    """The first of those: step, compared, equal, in words."""

    def add(self, evidence: Evidence, compared: int, equal: int, told: str) -> None:
        """Take one look."""
        if compared == equal:
            self.whole += 1
        else:
            self.first = self.count if self.first is None else self.first
            if len(self.odd) < 4 * FINDINGS_LIMIT:
                self.odd.append((evidence, compared, equal, told))
        self.count += 1
        self.compared += compared
        self.equal += equal


class Batches:
    """Follows labels and batches through every process."""

    name = "batches"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._origins = Origins(context)
        self._held = 0
        self._broken = 0
        self._read = 0
        self._blind: dict[str, int] = {}
        self._explained: set[str] = set()
        self._making: dict[tuple[str, str], _Making] = {}
        self._labels: dict[int, _Labels] = {}
        self._count = 0
        self._loader_of: dict[int, int] = {}
        """Base seed of a pass → number of its labels' table."""
        self._base_of: dict[tuple[int | None, int, int], int] = {}
        """Process, loader, pass → base seed."""
        self._made: dict[tuple[int, int, str], list[Any]] = {}
        self._handed: dict[tuple[int, int, str], tuple[Evidence, list[Any]]] = {}
        self._loss: dict[tuple[int | None, str], _Arrival] = {}
        self._model: dict[tuple[int | None, str], _Arrival] = {}
        self._given = 0
        self._series: dict[tuple[int | None, int], int] = {}
        """Process and loader → number of its series: loaders of one kind over one data set, made anew each pass."""
        self._kinds: dict[tuple[int | None, str], int] = {}

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Take one beginning of a pass, one batch that was made, or one step."""
        self._origins.see(evidence)
        body = evidence.body
        if evidence.kind == "loader" and "end" not in body:
            self._begin(evidence)
        elif evidence.kind == "batch":
            yield from self._batch(evidence)
        elif evidence.kind == "step" and isinstance(body.get(self.name), dict):
            yield from self._step(evidence, body[self.name])

    def end(self) -> Iterator[Finding | LinkState]:
        """What only the whole run shows, and the balance."""
        yield from self._makings()
        yield from self._passes()
        before = self._broken
        for (_, path), arrival in self._loss.items():
            yield from self._arrived(arrival, f"labels ({path})", strict=False)
        lost = self._broken - before
        for (_, path), arrival in self._model.items():
            yield from self._arrived(arrival, f"inputs ({path})", strict=True)
        blind = tuple(f"{reason} ({count})" for reason, count in self._blind.items())
        if not (self._held or self._broken):
            blind = (*blind, "no batch of a torch loader was looked at")
        explained = tuple(sorted(self._explained))
        yield LinkState(
            link=self.name, held=self._held, broken=self._broken, blind=blind, explained=explained, required=False
        )
        reason = () if self._read else ("no loss was seen whose gradient tells its labels",)
        yield LinkState(
            link="batches.labels", held=max(0, self._read - lost), broken=lost, blind=reason, required=False
        )

    # -- passes -----------------------------------------------------------------------------------------------

    def _begin(self, evidence: Evidence) -> None:
        loader, epoch, base = (evidence.body.get(name) for name in ("loader", "epoch", "base_seed"))
        if isinstance(loader, int) and isinstance(epoch, int) and isinstance(base, int):
            self._loader_of[base] = self._series_of(evidence, loader)
            self._base_of[evidence.process, loader, epoch] = base

    def _series_of(self, evidence: Evidence, loader: int) -> int:
        """The series a loader belongs to; its own where it is not told over which data set it goes."""
        known = self._series.get((evidence.process, loader))
        if known is None:
            kind = _kind(evidence.body) or f"loader {loader}"
            known = self._kinds.setdefault((evidence.process, kind), len(self._kinds))
            self._series[evidence.process, loader] = known
        return known

    # -- making -----------------------------------------------------------------------------------------------

    def _batch(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        base, task, index = body.get("base_seed"), body.get("task"), text(body.get("index"), 64)
        if not (isinstance(base, int) and isinstance(task, int)):
            return
        sums = body.get("sums")
        if index is not None and isinstance(sums, list) and len(sums) == 2:
            yield from self._pair((base, task, index), made=sums, evidence=evidence)
        self._remember(evidence, base)
        yield from self._made_of(evidence)

    def _made_of(self, evidence: Evidence) -> Iterator[Finding]:
        """The labels of the samples beside those of their batch."""
        body = evidence.body
        count, differ, collate = body.get("rows"), body.get("differ"), body.get("collate")
        if not (isinstance(count, int) and isinstance(differ, int) and 0 <= differ <= count < 1 << 31):
            return
        names = [text(part, 300) for part in collate] if isinstance(collate, list) else []
        place, function = (*names, None, None)[:2]
        known = self._making.setdefault((place or "native code", function or "?"), _Making())
        known.rows += count
        known.changed += differ
        if not differ:
            self._held += 1
            return
        told = _pairs(body.get("which"))
        if function == STACKS[0] and (place or "").rsplit(":", 1)[0].endswith(STACKS[1]):
            self._broken += 1
            yield self._finding(
                evidence,
                "violated",
                f"{differ} of {count} labels changed while a batch was stacked: {told}; {STACKS[0]} only stacks",
            )
            return
        if len(known.events) < 4 * FINDINGS_LIMIT:
            known.events.append((evidence, f"{differ} of {count} labels changed between data set and batch: {told}"))

    def _makings(self) -> Iterator[Finding]:
        for (place, function), known in self._making.items():
            if not known.events:
                continue
            if known.changed > FEW * known.rows:
                self._note(f"{function} at {place} makes labels of its own")
                continue
            if place != "native code" and self._excused(place):
                continue
            for evidence, told in known.events:
                self._broken += 1
                yield self._finding(evidence, "suspicious", f"{told}; made by {function} at {place}", place)

    # -- pass to pass -----------------------------------------------------------------------------------------

    def _remember(self, evidence: Evidence, base: int) -> None:
        indices, labels = evidence.body.get("i"), evidence.body.get("y")
        if not (isinstance(indices, list) and isinstance(labels, list) and len(indices) == len(labels) <= 4096):
            return
        known = self._labels.setdefault(self._loader_of.get(base, -1 - (base % 1024)), _Labels())
        moved = []
        for index, label in zip(indices, labels, strict=True):
            if not isinstance(index, int) or not isinstance(label, (int, str)):
                continue
            if index not in known.first:
                if self._count < LABELS_LIMIT:
                    self._count += 1
                    known.first[index] = label
                continue
            known.revisits += 1
            if known.first[index] != label:
                moved.append([index, known.first[index], label])
        known.changed += len(moved)
        if moved and len(known.events) < 4 * FINDINGS_LIMIT:
            told = f"{len(moved)} samples have other labels than when they were first seen: {_pairs(moved)}"
            known.events.append((evidence, told))

    def _passes(self) -> Iterator[Finding]:
        for known in self._labels.values():
            self._held += known.revisits - known.changed
            if not known.events:
                continue
            if known.changed > FEW * known.revisits or known.revisits < LEAST_REVISITS:
                self._note("labels are drawn anew at every access")
                continue
            for evidence, told in known.events:
                self._broken += 1
                alternatives = f"; {known.changed} of {known.revisits} labels seen again changed"
                yield self._finding(evidence, "suspicious", told + alternatives)

    # -- made and handed over ---------------------------------------------------------------------------------

    def _pair(
        self,
        key: tuple[int, int, str],
        *,
        evidence: Evidence,
        made: list[Any] | None = None,
        handed: list[Any] | None = None,
    ) -> Iterator[Finding]:
        """Two processes speak of one batch, in either order."""
        if made is None:
            made = self._made.pop(key, None)
            if made is None:
                if handed is not None and len(self._handed) < WAITING_LIMIT:
                    self._handed[key] = (evidence, handed)
                return
        elif handed is None:
            waiting = self._handed.pop(key, None)
            if waiting is None:
                if len(self._made) < WAITING_LIMIT:
                    self._made[key] = made
                return
            evidence, handed = waiting
        for what, one, other in zip(("labels", "inputs"), made, handed or (), strict=False):
            if not (isinstance(one, str) and isinstance(other, str)):
                continue
            if one == other:
                self._held += 1
                continue
            self._broken += 1
            yield self._finding(
                evidence,
                "violated",
                f"the {what} of batch {key[1] + 1} that was handed over are not those that were made",
            )

    # -- steps ------------------------------------------------------------------------------------------------

    def _step(self, evidence: Evidence, value: dict[str, Any]) -> Iterator[Finding]:
        for loader, epoch, task, index, labels, inputs in rows(value.get("delivered"), 6)[:256]:
            key = (evidence.process, loader, epoch) if isinstance(loader, int) and isinstance(epoch, int) else None
            base = self._base_of.get(key) if key is not None else None
            if base is not None and isinstance(task, int) and isinstance(index, str):
                yield from self._pair((base, task, index[:64]), evidence=evidence, handed=[labels, inputs])
        self._at_model(evidence, value.get("model"))
        self._at_loss(evidence, value.get("loss"))
        if isinstance(value.get("why"), str):
            self._note(value["why"][:200])

    def _at_model(self, evidence: Evidence, line: object) -> None:
        if not (isinstance(line, list) and len(line) == 6 and all(isinstance(n, int) for n in (*line[:3], *line[4:]))):
            return
        loader, epoch, task, path, compared, equal = line
        if not (isinstance(path, str) and 0 <= equal <= compared < 1 << 20 and compared):
            return
        told = f"of batch {task + 1} of pass {epoch + 1} of loader {loader}"
        series = self._series.get((evidence.process, loader), f"loader {loader}")
        arrival = self._model.setdefault((evidence.process, f"{series}{path[:100]}"), _Arrival())
        arrival.add(evidence, compared, equal, told)

    def _at_loss(self, evidence: Evidence, value: object) -> None:
        if not isinstance(value, dict):
            return
        given, used, path, batch = (value.get(name) for name in ("given", "used", "path", "batch"))
        if not (isinstance(given, list) and isinstance(used, list) and 0 < len(given) == len(used) <= 1024):
            return
        if not (isinstance(path, str) and isinstance(batch, list) and all(isinstance(n, int) for n in batch)):
            return
        self._read += 1
        equal = sum(type(a) is int and type(b) is int and a == b for a, b in zip(given, used, strict=True))
        wrong = [[None, a, b] for a, b in zip(given, used, strict=True) if a != b]
        told = f"of {_batch_name(batch)}" + (f": {_pairs(wrong)}" if wrong else "")
        loader = batch[0] if batch else 0
        series = self._series.get((evidence.process, loader), f"loader {loader}")
        relation = f"{series}{path[:100]} {value.get('relation')}"
        self._loss.setdefault((evidence.process, relation), _Arrival()).add(evidence, len(given), equal, told)

    def _arrived(self, arrival: _Arrival, what: str, *, strict: bool) -> Iterator[Finding]:
        """Few changes among many that arrive whole; or none at all, and from some step on all of them."""
        if arrival.first is None:
            self._held += arrival.whole
            return
        usual = arrival.whole >= MOST * arrival.count if strict else arrival.equal >= MOST * arrival.compared
        enough = arrival.count >= (2 * LEAST_STEPS if strict else 1) and arrival.compared >= LEAST_ROWS
        changed = arrival.count - arrival.whole
        turned = arrival.first >= LEAST_STEPS and changed >= 3 and changed == arrival.count - arrival.first
        if not (usual and enough) and not (turned and not strict):
            self._note(f"{what} reach the {'model' if strict else 'loss'} changed, as a habit of the job")
            return
        self._held += arrival.whole
        for evidence, count, right, told in arrival.odd:
            self._broken += 1
            where = "model" if strict else "loss"
            yield self._finding(
                evidence,
                "suspicious",
                f"{count - right} of {count} {what} that reached the {where} are not those handed over {told}",
            )

    # -- helpers ----------------------------------------------------------------------------------------------

    def _excused(self, place: str) -> bool:
        if self._origins.approves(self.name, place) or self._origins.standing(place) == "approved":
            self._explained.add(place)
            return True
        return False

    def _note(self, reason: str) -> None:
        if reason in self._blind or len(self._blind) < 32:
            self._blind[reason] = self._blind.get(reason, 0) + 1

    def _finding(self, evidence: Evidence, outcome: Outcome, message: str, path: str | None = None) -> Finding:
        return finding_from(self.name, outcome, message, evidence, run=self._context.run, techniques=("D4",), path=path)


def _pairs(which: object) -> str:
    """`sample 17: 3 → 5` for some rows."""
    out = []
    for index, before, after in rows(which, 3)[:4]:
        name = f"sample {index}: " if isinstance(index, int) else ""
        out.append(f"{name}{str(before)[:20]} → {str(after)[:20]}")
    return ", ".join(out)


def _kind(body: dict[str, Any]) -> str | None:
    """What loaders have in common that a script makes anew for every pass: data set, sampling, size of a batch."""
    data, samplers = body.get("data"), body.get("samplers")
    if not (isinstance(data, dict) and isinstance(samplers, dict)):
        return None
    layout = json.dumps(data, sort_keys=True)
    if "null" in layout:  # a data set, or a choice of its rows, that cannot be told from a later one
        return None
    inner = samplers.get("of")
    sampling = inner.get("class") if isinstance(inner, dict) else None
    kind = json.dumps([layout, samplers.get("class"), samplers.get("batch"), sampling])
    return hashlib.sha256(kind.encode()).hexdigest()


def _batch_name(batch: list[int]) -> str:
    if len(batch) != 3:
        return "a batch"
    return f"batch {batch[2] + 1} of pass {batch[1] + 1} of loader {batch[0]}"
