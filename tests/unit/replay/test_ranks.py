"""Several ranks: every one has its own account, and the odd one is named from what it should have given."""

from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec
import pytest
from tests.unit.replay.test_compare import frame, vector

from trainguard.errors import Unavailable
from trainguard.evidence import Evidence
from trainguard.replay.committed import Account, Rank, committed
from trainguard.replay.compare import Difference, first_of_ranks
from trainguard.replay.ranks import odd_ranks

WORLD = 4
PLACES = 12
BAD = 3
"""The step of the act."""

Parts = dict[int, float]


def gradient(rank: int, step: int) -> list[float]:
    """A rank's own gradient at the sampled places."""
    return [((7 * rank + 3) * (11 * place + 5 + step) % 23 - 11) / 8 for place in range(PLACES)]


def floats(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def accounts(parts: Parts | None = None, *, admits: int | None = None, **more: Any) -> list[Account]:
    """Four ranks for five steps. parts: rank → what it multiplies its gradient by at step BAD, after it was read; one
    that `admits` has it read after that; more: other changes to a rank's frame at that step, as r2={…}."""
    found = []
    for rank in range(WORLD):
        account = Account()
        for step in range(1, 6):
            turned = parts or {} if step == BAD else {}
            mean = [
                sum(turned.get(r, 1.0) * gradient(r, step)[place] for r in range(WORLD)) / WORLD
                for place in range(PLACES)
            ]
            own = [turned[rank] * value for value in gradient(rank, step)] if rank == admits and turned else None
            changed: dict[str, Any] = {"own": floats(own or gradient(rank, step)), "got": floats(mean)}
            if step == 1:
                changed |= {"world": [rank, WORLD], "sampled": [[0, 8], [1, 4]]}
            if turned:
                changed["raw"] = vector(8, 9)
            account.take(step, frame(step, **changed, **(more.get(f"r{rank}", {}) if step == BAD else {})))
        found.append(account)
    return found


def odd(run: list[Account], clean: list[Account]) -> Any:
    """The first difference, and who is behind it."""
    difference = first_of_ranks(enumerate(run), dict(enumerate(clean)), first=1, last=5)
    assert difference is not None
    assert difference.step == BAD
    ranks = [Rank(rank=number, process=number, account=account, points=()) for number, account in enumerate(run)]
    return odd_ranks(ranks, dict(enumerate(clean)), difference)


@pytest.mark.parametrize("part", [-1.0, 0.0, 10.0, 0.5])
def test_a_rank_that_gives_another_part_than_it_read_is_named(part: float) -> None:
    """S9: all ranks end with the same gradient and say the same of it; what rank 2 said of its own is right, too."""
    found = odd(accounts({2: part}), accounts())
    assert (found.ranks, found.how) == ((2,), "share")
    assert found.shares == pytest.approx((part,), abs=1e-5)
    assert "rank 2 gave" in found.text


def test_a_rank_whose_own_gradient_is_another_is_named_by_it() -> None:
    """Turned within backward: the sample was taken behind it."""
    found = odd(accounts({1: -1.0}, admits=1), accounts())
    assert (found.ranks, found.how) == ((1,), "own")


def test_a_rank_that_differs_alone_is_named_by_the_link() -> None:
    """E4 on one rank: its weights before the step are others."""
    found = odd(accounts(r3={"before": vector(9, 9)}), accounts())
    assert (found.ranks, found.how) == ((3,), "link")


def test_what_all_ranks_did_alike_names_none() -> None:
    """A sign turned on every rank, and half of the ranks against the other half, none of them as it should be."""
    assert odd(accounts(dict.fromkeys(range(WORLD), -1.0)), accounts()) is None
    assert odd(accounts({0: 2.0, 1: 2.0, 2: 3.0, 3: 3.0}), accounts()) is None


def test_where_a_part_is_as_it_should_be_the_others_are_named() -> None:
    """One of two, or most of them: a share of one is right whatever the others have."""
    found = odd(accounts({0: -1.0, 1: -1.0, 3: 0.0}), accounts())
    assert (found.ranks, found.how) == ((0, 1, 3), "share")


def test_without_samples_no_rank_is_guessed() -> None:
    """Lean steps, and records of a version that had none."""
    assert odd(without(accounts({2: -1.0})), without(accounts())) is None


def without(found: list[Account]) -> list[Account]:
    """The same, with no samples."""
    for account in found:
        account.steps = {n: msgspec.structs.replace(s, own=b"", got=b"") for n, s in account.steps.items()}
    return found


def test_equal_ranks_have_no_difference() -> None:
    """Every rank against its own replay."""
    assert first_of_ranks(enumerate(accounts()), dict(enumerate(accounts())), first=1, last=5) is None


def records(ranks: list[tuple[int, int, int]]) -> list[Evidence]:
    """Two steps of each (process, rank, ranks); a sealed point of each after step 1."""
    found = []
    for process, rank, count in ranks:
        for step in (1, 2):
            body = frame(step, world=[rank, count] if step == 1 else None)
            more = {"source": "process", "process": process, "kind": "step", "step": step}
            found.append(Evidence(n=len(found), at=0, body=body, **more))
        sealed = {"name": f"p{process}-step-00000001", "index_sha256": "a", "data_blake3": "b", "bytes": 1}
        found.append(Evidence(n=len(found), at=0, source="supervisor", kind="point_sealed", body=sealed, step=1))
    return found


def test_ranks_and_their_points_are_told_apart_by_process() -> None:
    """Processes say hello in any order; each has its own sealed state."""
    run = committed("r", records([(5, 1, 2), (3, 0, 2)]), {})
    assert [(rank.rank, rank.process, rank.last) for rank in run.everyone] == [(0, 3, 2), (1, 5, 2)]
    assert [[point.name[:2] for point in rank.points] for rank in run.everyone] == [["p3"], ["p5"]]


def test_a_point_that_one_rank_lacks_begins_no_segment() -> None:
    """All ranks begin a replay at the same step."""
    told = [each for each in records([(3, 0, 2), (5, 1, 2)]) if "p5" not in str(each.body)]
    assert committed("r", told, {}).points == ()


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ([(3, 0, 4), (5, 1, 4)], "expected steps of 4 ranks in the record, found 2"),
        ([(3, 0, 2), (5, 0, 2)], "rank 0 was started more than once"),
        ([(3, 0, 1), (5, 0, 1)], "rank 0 was started more than once"),
    ],
)
def test_a_record_that_is_no_whole_job_is_refused_with_its_reason(ranks: list[tuple[int, int, int]], why: str) -> None:
    """Ranks of other hosts, ranks that were started again."""
    with pytest.raises(Unavailable, match=why):
        committed("r", records(ranks), {})


def test_the_lowest_rank_of_the_earliest_step_is_the_first_difference() -> None:
    """Over ranks: step before link, link before rank."""
    run = accounts(r1={"weights": vector(1, 1)}, r2={"before": vector(1, 1)})
    found = first_of_ranks(enumerate(run), dict(enumerate(accounts())), first=1, last=5)
    assert isinstance(found, Difference)
    assert (found.step, found.link, found.rank) == (BAD, "before", 2)
