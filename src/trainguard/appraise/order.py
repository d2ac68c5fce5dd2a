"""Check *order*: are the samples of every batch those that the sampler draws from its seed? (docs/checks/order.md)

When a pass over the data begins, the guard says which samplers stand behind it and where their generator stands. For
the samplers of torch (and accelerate's seeded one) the judge draws the same order without torch and compares the chain
over all indices at every step, to the batch. Other samplers are the job's own code: their chain is on record, for a
replay or a plan to be compared with.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from trainguard.appraise.interface import Context, finding_from
from trainguard.appraise.origin import rows, text
from trainguard.appraise.streams import Twister, block_digest, distributed_order, permutation, random_order
from trainguard.appraise.walks import parse_block, parse_state
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState, Outcome

TORCH = "torch.utils.data.sampler."
DISTRIBUTED = "torch.utils.data.distributed.DistributedSampler"
SKIPPING = "accelerate.data_loader.SkipBatchSampler"
SEEDABLE = "accelerate.data_loader.SeedableRandomSampler"
INDICES_LIMIT = 10_000_000
"""Indices that are drawn again while one run is judged: about 1.2 µs each."""
WHOLE_LIMIT = 2_000_000
"""Length of data whose permutation is drawn as a whole, as a distributed sampler does."""
BATCH_LIMIT = 1 << 20
PASSES_LIMIT = 4096
FINDINGS_LIMIT = 5
PLAN: tuple[str, ...] = (
    "class",
    "batch",
    "drop_last",
    "length",
    "replacement",
    "samples",
    "num_replicas",
    "rank",
    "seed",
    "shuffle",
)
PLAN += ("initial_seed",)
"""What stays as it is from pass to pass of one loader. `epoch` and the state of a generator move."""
SHARES = frozenset(("num_replicas", "rank"))
LOADERS_LIMIT = 1024
Batch = tuple[int, ...]


@dataclass(slots=True)
class _Pass:
    """One pass of one loader, as the judge draws it."""

    batches: Iterator[Batch] | None
    """What is still to come; None when it is not recomputed."""
    samplers: str
    count: int = 0
    chain: bytes = b"\0" * 8
    broken: bool = False
    ending: Evidence | None = None
    """The record that its sampler has ended, until the last batch is handed over."""


@dataclass(slots=True)
class _Ranks:
    """Who reads which share of the data, of one distributed sampler."""

    shares: dict[int, set[int]] = field(default_factory=dict)
    """Rank that a sampler says → ranks of the processes that said so."""
    replicas: int = 0


class Unknown(ValueError):
    """An order that is not recomputed, and why."""


class Order:
    """Follows the passes of every loader of every process."""

    name = "order"

    def __init__(self, context: Context) -> None:
        self._context = context
        self._passes: dict[tuple[int | None, int, int], _Pass] = {}
        self._held = 0
        self._broken = 0
        self._left = INDICES_LIMIT
        self._unknown: Counter[str] = Counter()
        self._given: Counter[str] = Counter()
        self._ranks = _Ranks()
        self._epochs: dict[tuple[int | None, int], list[int]] = {}
        self._plans: dict[tuple[int | None, int], tuple[tuple[str, object], ...]] = {}
        """Process, loader → the plan its first pass told."""

    def see(self, evidence: Evidence) -> Iterator[Finding]:
        """Take one beginning, one end, or the loaders' places at one step."""
        if evidence.kind == "loader":
            if "end" in evidence.body:
                self._end(evidence)
            else:
                yield from self._begin(evidence)
        elif evidence.kind == "step":
            for row in rows(evidence.body.get(self.name), 5)[:64]:
                yield from self._at(evidence, row)

    def end(self) -> Iterator[Finding | LinkState]:
        """Passes that ended, shares of the data that were read twice, and the balance."""
        for (_, loader, epoch), known in list(self._passes.items()):
            yield from self._ended(loader, epoch, known)
        yield from self._shares()
        blind = tuple(f"{reason} ({count})" for reason, count in self._unknown.items())
        if not self._passes and not self._broken:
            blind = (
                "no loader of torch was seen; batches that a script makes itself follow from the random streams (rng)",
            )
        yield LinkState(link=self.name, held=self._held, broken=self._broken, blind=blind, required=False)

    # -- beginnings -------------------------------------------------------------------------------------------

    def _begin(self, evidence: Evidence) -> Iterator[Finding]:
        body = evidence.body
        loader, epoch, samplers = body.get("loader"), body.get("epoch"), body.get("samplers")
        if not (_whole(loader) and _whole(epoch) and isinstance(samplers, dict)):
            self._broken += 1
            yield self._finding(evidence, "suspicious", "G2", "malformed record of a loader's beginning")
            return
        if body.get("kind") == "iterable":
            self._unknown["an iterable dataset chooses its samples itself"] += 1
            return
        if len(self._passes) >= PASSES_LIMIT:
            oldest = next(iter(self._passes))
            yield from self._ended(oldest[1], oldest[2], self._passes.pop(oldest))
        yield from self._planned(evidence, loader, epoch, samplers)
        names = " of ".join(_names(samplers))
        try:
            batches: Iterator[Batch] | None = self._drawn(samplers, body)
        except (Unknown, ValueError) as error:
            self._unknown[str(error)[:300]] += 1
            batches = None
        self._passes[evidence.process, loader, epoch] = _Pass(batches, names)
        yield from self._distributed(evidence, loader, samplers)

    def _planned(self, evidence: Evidence, loader: int, epoch: int, samplers: dict[str, Any]) -> Iterator[Finding]:
        """A loader's samplers are put together when it is made; what they draw does not change from pass to pass."""
        plan = tuple(plan_of(samplers))
        first = self._plans.get((evidence.process, loader))
        if first is None:
            if len(self._plans) < LOADERS_LIMIT:
                self._plans[evidence.process, loader] = plan
            return
        moved = [(one, two) for one, two in zip(first, plan, strict=False) if one != two and not _grown(one, two)]
        if len(first) == len(plan) and not moved:
            return
        self._plans[evidence.process, loader] = plan
        changes = ", ".join(f"{name} was {old!r:.80} and is {new!r:.80}" for (name, old), (_, new) in moved[:4])
        self._broken += 1
        yield self._finding(
            evidence,
            "suspicious",
            "D3" if any(name in SHARES for (name, _), _ in moved) else "D2",
            f"loader {loader}, pass {epoch + 1}: its samplers are not those of its first pass: "
            f"{changes or 'they are others, or other in number'}",
        )

    def _drawn(self, samplers: dict[str, Any], body: dict[str, Any]) -> Iterator[Batch]:
        inner: dict[str, Any] = samplers["of"] if isinstance(samplers.get("of"), dict) else samplers
        length = inner.get("length")
        if inner.get("class") == DISTRIBUTED and _whole(length):  # drawn as a whole, whatever is used of it
            if length > min(WHOLE_LIMIT, self._left):
                raise Unknown("the order of a distributed sampler over so much data is not drawn again")
            self._left -= length
        return _batches(samplers, body)

    def _distributed(self, evidence: Evidence, loader: int, samplers: dict[str, Any]) -> Iterator[Finding]:
        inner = samplers
        while isinstance(inner.get("of"), dict):
            inner = inner["of"]
        if inner.get("class") != DISTRIBUTED or not inner.get("shuffle"):
            return
        epoch, replicas, rank = inner.get("epoch"), inner.get("num_replicas"), inner.get("rank")
        if _whole(replicas) and _whole(rank) and evidence.rank is not None:
            self._ranks.replicas = max(self._ranks.replicas, replicas)
            self._ranks.shares.setdefault(rank, set()).add(evidence.rank)
        if not _whole(epoch):
            return
        known = self._epochs.setdefault((evidence.process, loader), [])
        if len(set(known)) > 2 and known[-1] == epoch:
            self._broken += 1
            message = (
                f"loader {loader} makes another pass in the order of epoch {epoch}: set_epoch was called before "
                f"every pass until now, and not before this one"
            )
            yield self._finding(evidence, "suspicious", "D3", message)
        known.append(epoch)
        del known[:-8]

    def _shares(self) -> Iterator[Finding]:
        """Every rank has to read its own share, where there are as many shares as ranks."""
        ranks = set().union(*self._ranks.shares.values()) if self._ranks.shares else set()
        if len(ranks) < 2 or self._ranks.replicas != len(ranks) or len(self._ranks.shares) == len(ranks):
            return
        twice = {share: who for share, who in self._ranks.shares.items() if len(who) > 1}
        missing = sorted(set(range(self._ranks.replicas)) - set(self._ranks.shares))
        self._broken += 1
        told = "; ".join(
            f"share {share} is read by ranks {', '.join(map(str, sorted(who)))}" for share, who in twice.items()
        )
        yield finding_from(
            self.name,
            "suspicious",
            f"ranks read the same share of the data: {told[:500]}; nobody reads {missing[:16]}",
            run=self._context.run,
            techniques=("D3",),
        )

    # -- steps ------------------------------------------------------------------------------------------------

    def _at(self, evidence: Evidence, row: list[Any]) -> Iterator[Finding]:
        loader, epoch, count, chain, marks = row
        known = self._passes.get((evidence.process, loader, epoch)) if _whole(loader) and _whole(epoch) else None
        if known is None or known.batches is None or known.broken or not _whole(count) or not isinstance(chain, str):
            return
        first = known.count
        odd: list[int] = []
        why = self._advance(known, count, marks if isinstance(marks, str) else "", odd)
        if why is None and known.batches is None:
            return
        if why is None and known.chain.hex() != chain:
            why = "are not the samples that this sampler draws"
        if why is None:
            self._held += 1
            if known.ending is not None and known.ending.body.get("end") == count:
                yield from self._ended(loader, epoch, known)
            return
        known.broken = True
        self._broken += 1
        which = (
            f"batch {odd[0]}" if odd else f"batch {count}" if count - first <= 1 else f"batches {first + 1} to {count}"
        )
        again = self._which(evidence.process, loader, epoch, chain)
        message = f"loader {loader}, pass {epoch + 1}: {which} {why} ({known.samplers}){again}"
        yield self._finding(
            evidence, "violated", "D2", message, expected=f"chain {known.chain.hex()}", found=f"chain {chain[:64]}"
        )

    def _end(self, evidence: Evidence) -> None:
        """The sampler has ended; with loader workers that is some batches before the last is handed over."""
        loader, epoch = evidence.body.get("loader"), evidence.body.get("epoch")
        known = self._passes.get((evidence.process, loader, epoch)) if _whole(loader) and _whole(epoch) else None
        if known is not None:
            known.ending = evidence

    def _ended(self, loader: int, epoch: int, known: _Pass) -> Iterator[Finding]:
        """Nothing may be left when a sampler has ended, and nothing be there too much."""
        evidence, known.ending = known.ending, None
        if evidence is None or known.batches is None or known.broken:
            return
        count, chain = evidence.body.get("end"), evidence.body.get("chain")
        why = self._advance(known, count) if _whole(count) else "are not told"
        if known.batches is None:
            return
        if why is None and known.chain.hex() != chain:
            why = "are not the samples that this sampler draws"
        elif why is None and next(known.batches, None) is not None:
            why = "are all that came: the sampler's order goes on"
        if why is None:
            self._held += 1
            return
        known.broken = True
        self._broken += 1
        message = f"loader {loader}, pass {epoch + 1}, which ended: its {count} batches {why} ({known.samplers})"
        yield self._finding(evidence, "violated", "D2", message)

    def _advance(self, known: _Pass, count: int, marks: str = "", odd: list[int] | None = None) -> str | None:
        """Draw on to batch `count`; why that cannot be, or None. Past the account the pass is no longer recomputed.

        marks: four digits of the chain after each of these batches; `odd` gets the number of those that differ.
        """
        first = known.count
        while known.batches is not None and known.count < count:
            if self._left <= 0:
                self._unknown[f"more than {INDICES_LIMIT:,} samples: later ones are not drawn again"] += 1
                known.batches = None
                return None
            batch = next(known.batches, None)
            if batch is None:
                return f"are more than the sampler has ({known.count} batches)"
            self._left -= len(batch)
            known.chain = chained(known.chain, batch)
            mark = marks[4 * (known.count - first) :][:4]
            known.count += 1
            if odd is not None and len(mark) == 4 and not known.chain.hex().startswith(mark):
                odd.append(known.count)
        return None

    def _which(self, process: int | None, loader: int, epoch: int, chain: str) -> str:
        for (other, number, earlier), each in self._passes.items():
            if (other, number) == (process, loader) and earlier < epoch and each.chain.hex() == chain:
                return f"; they are those of pass {earlier + 1} again"
        return ""

    def _finding(
        self,
        evidence: Evidence,
        outcome: Outcome,
        technique: str,
        message: str,
        expected: str | None = None,
        found: str | None = None,
    ) -> Finding:
        return finding_from(
            self.name,
            outcome,
            message,
            evidence,
            run=self._context.run,
            techniques=(technique,),
            expected=expected,
            found=found,
        )


# -- drawing an order again -----------------------------------------------------------------------------------------


def drawn(body: dict[str, Any]) -> Iterator[Batch]:
    """The batches of indices of the pass that a record of kind `loader` begins.

    Raises Unknown or ValueError, at once or while it is drawn, where that order is not recomputed.
    """
    samplers = body.get("samplers")
    if body.get("kind") == "iterable":
        raise Unknown("an iterable dataset chooses its samples itself")
    if not isinstance(samplers, dict):
        raise Unknown("malformed record of a loader's beginning")
    inner: dict[str, Any] = samplers["of"] if isinstance(samplers.get("of"), dict) else samplers
    length = inner.get("length")
    if inner.get("class") == DISTRIBUTED and _whole(length) and length > WHOLE_LIMIT:
        raise Unknown("the order of a distributed sampler over so much data is not drawn again")
    return _batches(samplers, body)


def chained(chain: bytes, batch: Batch) -> bytes:
    """The chain over the indices of one more batch (spec/evidence.md, `order`)."""
    return hashlib.blake2b(chain + struct.pack(f"<{len(batch)}q", *batch), digest_size=8).digest()


def _batches(samplers: dict[str, Any], body: dict[str, Any]) -> Iterator[Batch]:
    """The batches of indices that these samplers yield. Raises Unknown where that is not recomputed."""
    kind = samplers.get("class")
    if kind == SKIPPING:
        skip, inner = samplers.get("skip"), samplers.get("of")
        if not (_whole(skip) and skip <= BATCH_LIMIT and isinstance(inner, dict) and inner.get("class") != SKIPPING):
            raise Unknown("malformed record of a sampler that skips batches")
        if not _whole(size := inner.get("batch")) or skip * size > WHOLE_LIMIT:
            raise Unknown("so many skipped batches are not drawn again")
        return itertools.islice(_batches(inner, body), skip, None)
    if kind != TORCH + "BatchSampler":
        return ((index,) for index in _indices(samplers, body))
    size, drop_last, inner = samplers.get("batch"), samplers.get("drop_last"), samplers.get("of")
    if not (_whole(size) and 0 < size <= BATCH_LIMIT and isinstance(drop_last, bool) and isinstance(inner, dict)):
        raise Unknown("malformed record of a batch sampler")
    return _cut(_indices(inner, body), size, drop_last)


def _cut(indices: Iterator[int], size: int, drop_last: bool) -> Iterator[Batch]:
    while batch := tuple(itertools.islice(indices, size)):
        if len(batch) == size or not drop_last:
            yield batch


def _indices(sampler: dict[str, Any], body: dict[str, Any]) -> Iterator[int]:
    kind, length = sampler.get("class"), sampler.get("length")
    if kind == TORCH + "WeightedRandomSampler":
        raise Unknown("the order of a weighted sampler is not drawn again")
    known = (*(TORCH + name for name in ("SequentialSampler", "RandomSampler", "SubsetRandomSampler")), DISTRIBUTED)
    if kind not in (*known, SEEDABLE):
        raise Unknown(f"the order of {text(kind, 200) or 'a sampler'} is the job's own")
    if not (_whole(length) and length > 0):
        raise Unknown("malformed record of a sampler")
    if kind == TORCH + "SequentialSampler":
        return iter(range(length))
    if kind == DISTRIBUTED:
        return _distributed_indices(sampler, length)
    if kind == TORCH + "SubsetRandomSampler":
        return _subset(sampler, length, body)
    replacement, samples = sampler.get("replacement"), sampler.get("samples")
    if not (isinstance(replacement, bool) and _whole(samples)):
        raise Unknown("malformed record of a random sampler")
    if kind == SEEDABLE:
        seed, epoch = sampler.get("initial_seed"), sampler.get("epoch")
        if not (_whole(seed) and _whole(epoch)):
            raise Unknown("malformed record of a seeded sampler")
        stream = Twister.from_seed(seed + epoch)
    elif sampler.get("generator") is None:
        stream = Twister.from_seed(_stream(body.get("state"), body.get("block")).seed())
    else:
        stream = _own(sampler)
    return random_order(stream, length, replacement=replacement, samples=samples)


def _subset(sampler: dict[str, Any], length: int, body: dict[str, Any]) -> Iterator[int]:
    chosen = sampler.get("indices")
    if not (isinstance(chosen, list) and len(chosen) == length and all(_whole(i) for i in chosen)):
        raise Unknown("the indices of a large subset are not on record")
    own = sampler.get("generator") is not None
    stream = _own(sampler) if own else _stream(body.get("state"), body.get("block"))
    return (chosen[i] for i in permutation(stream, length))


def _distributed_indices(sampler: dict[str, Any], length: int) -> Iterator[int]:
    numbers = [sampler.get(name) for name in ("num_replicas", "rank", "epoch", "seed")]
    if not all(_whole(value) for value in numbers) or not numbers[0]:
        raise Unknown("malformed record of a distributed sampler")
    replicas, rank, epoch, seed = (int(value or 0) for value in numbers)
    if replicas > length:
        raise Unknown("fewer samples than ranks")
    return iter(
        distributed_order(
            seed,
            epoch,
            length,
            shuffle=bool(sampler.get("shuffle")),
            ranks=replicas,
            rank=rank,
            drop_last=bool(sampler.get("drop_last")),
        )
    )


def _own(sampler: dict[str, Any]) -> Twister:
    generator = sampler["generator"]
    if not isinstance(generator, dict):
        raise Unknown("malformed record of a sampler's generator")
    if "device" in generator:
        raise Unknown("a sampler draws from a generator that is not on the CPU")
    return _stream(generator.get("state"), generator.get("block"))


def _stream(state: object, whole: object) -> Twister:
    """The generator at a state that was told whole. Raises Unknown where it was not, ValueError for a malformed one."""
    if whole is None or state is None:
        raise Unknown("the generator's state was not told whole at this pass")
    digest, position = parse_state(state)
    stream = Twister.from_words(parse_block(whole), position)
    if block_digest(stream.block) != digest:
        raise Unknown("the state that was told is not the one of its digest")
    return stream


def plan_of(samplers: Any) -> Iterator[tuple[str, object]]:
    """What decides a loader's order and does not move by itself, sampler by sampler from the outermost."""
    for _ in range(6):
        if not isinstance(samplers, dict):
            return
        for name in PLAN:
            if name in samplers:
                yield name, samplers[name]
        samplers = samplers.get("of")


def _grown(before: tuple[str, object], after: tuple[str, object]) -> bool:
    """Data that became more, as where examples are collected while a model learns."""
    (name, old), (other, new) = before, after
    return name == other and name in ("length", "samples") and _whole(old) and _whole(new) and new > old


def _names(samplers: dict[str, Any]) -> Iterator[str]:
    inner: Any = samplers
    for _ in range(6):
        if not isinstance(inner, dict):
            return
        yield str(inner.get("class"))[:200].rsplit(".", 1)[-1]
        inner = inner.get("of")


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
