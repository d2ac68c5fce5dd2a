"""What a run committed to: read from its proved records, strictly (spec/replay.md, "Commits").

run = committed(reader)          everything replay needs of a run, or Unavailable with the reason why it cannot be
run.steps[120].vector("weights") one number for each slot of run.slots(0)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Citation

STEP_LIMIT = 50_000_000
SLOT_LIMIT = 4096
RANK_LIMIT = 1 << 16
LANES_LIMIT = 64
"""Real values of one kind in a step frame, and kinds of them."""

VECTORS = ("before", "raw", "used", "state", "weights", "buffers")


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one process."""

    number: int
    """Optimizer step in its process, from 1."""
    opt: int
    rng: tuple[str | None, ...]
    modes: str | None
    groups: str | None
    hyper: Mapping[str, Mapping[str, Any]]
    """Settings of every parameter group as they were in this step; shared between steps that did not change them."""
    vectors: Mapping[str, bytes]
    lean: bool
    own: bytes = b""
    """Samples of this rank's own gradient, little-endian float32; empty where there are no other ranks."""
    got: bytes = b""
    """Samples of the gradient that it used, at the same places."""
    lanes: Mapping[str, tuple[float, ...]] = {}
    """Real values of some elements, by kind: an estimate may begin with them, nothing is proved by them."""
    edited: tuple[tuple[int, str, str, tuple[float, ...]], ...] = ()
    """(position, sum, ramp, values) of tensors that were not what the step before had left."""
    citation: Citation | None = None
    wall_ns: int = 0

    def vector(self, name: str) -> tuple[int, ...] | None:
        """The numbers of one vector, or None where the step did not commit to it."""
        data = self.vectors.get(name)
        if data is None:
            return None
        return tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))


class Account:
    """The steps of one process, taken record by record. Used for the run and for every replay of it."""

    def __init__(self) -> None:
        self.build: dict[str, Any] | None = None
        self.tensors: dict[int, tuple[str, ...]] = {}
        """Optimizer → name of each slot."""
        self.places: dict[int, tuple[tuple[int, int, int], ...]] = {}
        """Optimizer → (position, offset, count) of the elements whose values are said."""
        self.steps: dict[int, Step] = {}
        self.uncommitted: set[int] = set()
        """Steps without commits."""
        self.rank: int | None = None
        """As the process said; None where it knows of no other ranks."""
        self.ranks = 1
        self.sampled: dict[int, tuple[int, ...]] = {}
        """Optimizer → elements of each tensor in `Step.own` and `Step.got`."""
        self._hyper: dict[int, dict[str, dict[str, Any]]] = {}

    def take(self, number: int | None, body: Mapping[str, Any], citation: Citation | None = None) -> None:
        """One step frame. Raises MalformedEvidence for what is not as the spec says."""
        value = body.get("commits")
        if not isinstance(value, Mapping):
            if isinstance(number, int) and len(self.uncommitted) < STEP_LIMIT:
                self.uncommitted.add(number)
            return
        opt = body.get("opt")
        if not isinstance(number, int) or not 0 < number < STEP_LIMIT or not isinstance(opt, int):
            raise MalformedEvidence(f"step frame: expected a step number and an optimizer, found {number!r}, {opt!r}")
        try:
            self._take(number, opt, value, body, citation)
        except (TypeError, ValueError, AttributeError, KeyError, binascii.Error) as error:
            raise MalformedEvidence(f"step {number}: commits are not as specified: {error}") from error

    def _take(
        self, number: int, opt: int, value: Mapping[str, Any], body: Mapping[str, Any], citation: Citation | None
    ) -> None:
        if isinstance(value.get("build"), dict):
            self.build = value["build"]
        names = value.get("tensors")
        if isinstance(names, list) and len(names) <= SLOT_LIMIT:
            self.tensors[opt] = tuple(str(name)[:400] for name in names)
        self._place(opt, value)
        where = value.get("places")
        if isinstance(where, list) and len(where) <= LANES_LIMIT:
            self.places[opt] = tuple((int(a), int(b), int(c)) for a, b, c in where)
        self._settings(opt, value)
        wall = body.get("wall_ns")
        self.steps[number] = Step(
            number=number,
            opt=opt,
            rng=tuple(None if each is None else str(each)[:80] for each in value["rng"])[:72],
            modes=_text(value.get("modes")),
            groups=_text(value.get("groups")),
            hyper=self._inside(opt, value),
            vectors={name: _vector(value[name]) for name in VECTORS if name in value},
            lean=value.get("lean") is True,
            own=_floats(value.get("own")),
            got=_floats(value.get("got")),
            lanes=_lanes(value.get("lanes")),
            edited=_edited(value.get("edited")),
            citation=citation,
            wall_ns=wall if isinstance(wall, int) else 0,
        )

    def _place(self, opt: int, value: Mapping[str, Any]) -> None:
        """Rank and number of ranks, and what is sampled."""
        world = value.get("world")
        if isinstance(world, list):
            rank, ranks = world
            if type(rank) is not int or type(ranks) is not int or not 0 <= rank < ranks <= RANK_LIMIT:
                raise ValueError(f"a rank and a number of ranks of {rank!r}, {ranks!r}")
            self.rank, self.ranks = rank, ranks
        sampled = value.get("sampled")
        if isinstance(sampled, list) and len(sampled) <= SLOT_LIMIT:
            self.sampled[opt] = tuple(int(count) for _, count in sampled)

    def branch(self, until: int) -> Account:
        """A copy as it was after step `until`, to be gone on with apart."""
        copy = Account()
        copy.rank, copy.ranks, copy.sampled = self.rank, self.ranks, dict(self.sampled)
        copy.build, copy.tensors, copy.places = self.build, dict(self.tensors), dict(self.places)
        copy.steps = {number: step for number, step in self.steps.items() if number <= until}
        copy._hyper = dict(self._hyper)
        return copy

    def drop(self, link: str) -> None:
        """Forget one vector of every step: it cannot be compared."""
        for number, step in self.steps.items():
            kept = {name: data for name, data in step.vectors.items() if name != link}
            self.steps[number] = msgspec.structs.replace(step, vectors=kept)

    def _settings(self, opt: int, value: Mapping[str, Any]) -> None:
        hyper, changed = value.get("hyper"), value.get("changed")
        if isinstance(hyper, dict):
            self._hyper[opt] = {str(group): dict(entries) for group, entries in hyper.items()}
        elif isinstance(changed, list):
            fresh = {group: dict(entries) for group, entries in self._hyper.get(opt, {}).items()}
            for group, name, item in changed:
                fresh.setdefault(str(group), {})[str(name)] = item
            self._hyper[opt] = fresh

    def _inside(self, opt: int, value: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Settings of this step, with those that were others right after the update as they were then."""
        known, inside = self._hyper.get(opt, {}), value.get("inside")
        if not isinstance(inside, list):
            return known
        fresh = {group: dict(entries) for group, entries in known.items()}
        for group, name, item in inside:
            fresh.setdefault(str(group), {})[str(name)] = item
        return fresh


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One sealed replay point, as the log has it."""

    step: int
    name: str
    """Its folder below RUN/points."""
    index_sha256: str
    data_blake3: str
    bytes: int
    leaf: int | None = None


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a run."""

    rank: int
    process: int
    account: Any
    points: tuple[Point, ...]

    @property
    def last(self) -> int:
        """Its last step."""
        return int(max(self.account.steps))


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """A run as replay sees it."""

    run: str
    start: Mapping[str, Any]
    key: str | None
    """Secret of the run, said at its end or held until then; None when neither is there: keyed vectors cannot be
    compared."""
    account: Any
    """Steps of rank 0."""
    points: tuple[Point, ...]
    """Those of rank 0, after steps for which every rank has one."""
    process: int
    alarms: tuple[int, ...]
    """Steps at which the record itself has something unusual: a gap, a second seeding, a signal."""
    last: int
    others: tuple[Rank, ...] = ()
    """Ranks 1, 2, …"""
    ended_ns: int | None = None
    """When the command ended by itself, with status 0; None where it did not."""

    @property
    def everyone(self) -> tuple[Rank, ...]:
        """All ranks, from 0 on."""
        return (Rank(rank=0, process=self.process, account=self.account, points=self.points), *self.others)

    @property
    def steps(self) -> Mapping[int, Step]:
        """Step number → what was committed."""
        found: Mapping[int, Step] = self.account.steps
        return found


def committed(run: str, records: Iterable[Evidence], begin: Mapping[str, Any], *, held: str | None = None) -> Committed:
    """Everything replay needs. records: proved ones; begin: the body of the run's `run/v1` statement; held: the key as
    the supervisor keeps it (keys.py), for a run that has not said it; another than was committed to counts for none.

    Raises Unavailable, naming what is missing, for a run that cannot be replayed by this version.
    """
    found = Gathering(run, begin)
    found.take(records)
    return found.committed(held)


class Gathering:
    """What a run commits to, taken record by record: of a run that goes on, as far as it has come."""

    def __init__(self, run: str, begin: Mapping[str, Any]) -> None:
        self._run = run
        self._begin = begin
        self._accounts: dict[int, Account] = {}
        self._points: list[Point] = []
        self._alarms: set[int] = set()
        self._key: str | None = None
        self._ended: int | None = None

    def take(self, records: Iterable[Evidence]) -> None:
        """The records that follow on those taken before. After an exception nothing more can be taken."""
        for record in (each for folded in records for each in unfold(folded)):
            self._take(record)

    def _take(self, record: Evidence) -> None:
        if record.kind == "step" and record.source == "process" and record.process is not None:
            citation = Citation(leaf=record.leaf, hash=record.hash) if record.leaf is not None and record.hash else None
            self._accounts.setdefault(record.process, Account()).take(record.step, record.body, citation)
            if _seeded(record):
                self._alarms.add(record.step or 1)
        elif record.kind == "point_sealed" and record.source == "supervisor":
            self._points.append(_point(record))
        elif record.kind == "end" and isinstance(record.body.get("key"), str):
            self._key, self._ended = record.body["key"], record.at if record.body.get("status") == 0 else None

    def committed(self, held: str | None = None) -> Committed:
        """All of it by now. Raises Unavailable as `committed` does."""
        run, key = self._run, self._key
        if key is not None and not _opens(key, self._begin):
            raise MalformedEvidence(f"run {run}: the key said at its end is not the one committed to at its start")
        if key is None and held is not None and _opens(held, self._begin):
            key = held
        trained = _ranks(run, self._accounts)
        told = [
            _rank(run, rank, process, account, self._points, key) for rank, (process, account) in enumerate(trained)
        ]
        common = set.intersection(*({point.step for point in rank.points} for rank in told))
        ranks = [
            msgspec.structs.replace(rank, points=tuple(p for p in rank.points if p.step in common)) for rank in told
        ]
        return Committed(
            run=run,
            start=self._begin,
            key=key,
            account=ranks[0].account,
            points=ranks[0].points,
            process=ranks[0].process,
            alarms=tuple(sorted(self._alarms)),
            last=ranks[0].last,
            others=tuple(ranks[1:]),
            ended_ns=self._ended,
        )


def _rank(run: str, number: int, process: int, account: Account, points: Iterable[Point], key: str | None) -> Rank:
    """One rank, with the points that its own process wrote."""
    last = max(account.steps)
    _gaps(run, account, last)
    if key is None:
        account = account.branch(last)
        account.drop("weights")
    own = (p for p in points if p.step <= last and p.name.startswith(f"p{process}-"))
    return Rank(rank=number, process=process, account=account, points=tuple(sorted(own, key=lambda p: p.step)))


def _ranks(run: str, accounts: Mapping[int, Account]) -> list[tuple[int, Account]]:
    """The processes that trained, by rank."""
    committing = {number: account for number, account in accounts.items() if account.steps}
    if not committing:
        raise Unavailable(
            f"run {run}: expected commits in its step records, found none (recorded without, or no step)",
            next_step="record it again with commits (policy: commits = true)",
        )
    if len(committing) == 1 and next(iter(committing.values())).ranks == 1:
        return list(committing.items())
    by_rank: dict[int, tuple[int, Account]] = {}
    for process, account in committing.items():
        if account.rank is None:
            raise Unavailable(
                f"run {run}: {len(committing)} processes trained, and process {process} is no rank of a job"
            )
        if account.rank in by_rank:
            raise Unavailable(
                f"run {run}: rank {account.rank} was started more than once; jobs that were started again cannot be "
                "replayed by this version"
            )
        by_rank[account.rank] = (process, account)
    ranks = {account.ranks for account in committing.values()}
    missing = sorted(set(range(max(ranks))) - by_rank.keys())
    if len(ranks) > 1 or missing:
        raise Unavailable(
            f"run {run}: expected steps of {max(ranks)} ranks in the record, found {len(by_rank)} (none of rank "
            f"{', '.join(map(str, missing[:5]))}); ranks of other hosts are in other records"
        )
    return [by_rank[rank] for rank in range(max(ranks))]


def _gaps(run: str, account: Account, last: int) -> None:
    """Every step is told of, whether or not it is committed to."""
    missing = last - len(account.steps) - sum(number <= last for number in account.uncommitted)
    if missing > 0:
        raise Unavailable(
            f"run {run}: {missing} of {last} steps are not in the record; what is missing cannot be compared"
        )


def _point(record: Evidence) -> Point:
    try:
        return msgspec.convert({**record.body, "step": record.step, "leaf": record.leaf}, Point)
    except msgspec.ValidationError as error:
        raise MalformedEvidence(f"record {record.n}: not a sealed point: {error}") from error


def _opens(key: str, begin: Mapping[str, Any]) -> bool:
    """Whether `key` is what the run committed to before its first step; older runs committed to none."""
    expected = begin.get("key_sha256")
    return not isinstance(expected, str) or hashlib.sha256(key.encode()).hexdigest() == expected


def _seeded(record: Evidence) -> bool:
    rng = record.body.get("rng")
    return isinstance(rng, dict) and bool(rng.get("seeded")) and (record.step or 0) > 1


def _text(value: object) -> str | None:
    return None if value is None else str(value)[:80]


def _floats(value: object) -> bytes:
    return b"" if value is None else _vector(value)


def _lanes(value: object) -> Mapping[str, tuple[float, ...]]:
    if not isinstance(value, Mapping) or len(value) > LANES_LIMIT:
        return {}
    found = {}
    for name, text in value.items():
        data = base64.b64decode(str(text), validate=True)
        if len(data) % 4 or len(data) > 4 * LANES_LIMIT:
            raise ValueError(f"values of {len(data)} bytes")
        found[str(name)[:80]] = struct.unpack(f"<{len(data) // 4}f", data)
    return found


def _edited(value: object) -> tuple[tuple[int, str, str, tuple[float, ...]], ...]:
    if not isinstance(value, list) or len(value) > LANES_LIMIT:
        return ()
    found = []
    for position, total, ramp, heads in value:
        if not str(total).isdigit() or len(str(total)) > 20 or len(str(ramp)) > 20 or len(heads) > LANES_LIMIT:
            raise ValueError("an edited tensor is not as specified")
        found.append((int(position), str(total), str(ramp), tuple(float(each) for each in heads)))
    return tuple(found)


def _vector(value: object) -> bytes:
    data = base64.b64decode(str(value), validate=True)
    if len(data) % 4 or len(data) > 4 * SLOT_LIMIT:
        raise ValueError(f"a vector of {len(data)} bytes")
    return data
