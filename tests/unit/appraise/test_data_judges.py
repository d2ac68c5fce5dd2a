"""The judges of the data path: whatever a frame says, the answer is a finding or a state, never an exception."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.helpers.loading import fit
from tests.helpers.recorded import judge

from trainguard.appraise.batches import Batches
from trainguard.appraise.interface import Check
from trainguard.appraise.order import Order
from trainguard.appraise.rng import Rng
from trainguard.appraise.streams import Twister, block_digest
from trainguard.appraise.walks import Account, Walk, parse_block, parse_state
from trainguard.evidence import Evidence

CHECKS: tuple[type[Check], ...] = (Rng, Order, Batches)
WRONG: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, "x", [], {}, [[]], [{}], [1, "a", None], {"a": {"b": []}})


@pytest.fixture(scope="module")
def honest() -> list[Evidence]:
    """Three steps of one pass: beginnings, batches and arrivals."""
    from tests.helpers.loading import BATCH, Table
    from torch.utils.data import DataLoader, Subset

    data = Subset(Table(), range(3 * BATCH))
    return fit(DataLoader(data, batch_size=BATCH, shuffle=True), passes=1)


def paths_of(value: Any, depth: int = 0) -> Iterator[tuple[Any, ...]]:
    """Every place in a body, three levels deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:12]:
        yield (key,)
        if depth < 2:
            yield from ((key, *rest) for rest in paths_of(inner, depth + 1))


@pytest.mark.torch
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_no_wrong_value_anywhere_raises(check: type[Check], honest: list[Evidence]) -> None:
    """Every field of a loader's frames, and of these links in a step frame, replaced by everything it should not be."""
    seen: set[str] = set()
    for n, record in enumerate(honest):
        if record.kind not in ("loader", "batch", "step") or (record.kind in seen and record.kind != "loader"):
            continue
        if record.kind == "step" and not isinstance(record.body.get("batches", {}).get("loss"), dict):
            continue
        seen.add(record.kind)
        for number, path in enumerate(paths_of(record.body)):
            if record.kind == "step" and path[0] not in ("order", "batches"):
                continue
            for wrong in WRONG[number % 2 :: 2]:
                body = copy.deepcopy(record.body)
                place: Any = body
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = wrong
                changed = [*honest[:n], msgspec.structs.replace(record, body=body), *honest[n + 1 :]]
                _, states = judge(check, changed)
                assert check.name in states
    assert seen == {"loader", "batch", "step"}


def test_states_and_blocks_are_parsed_strictly() -> None:
    """Digits, point, position; length and alphabet."""
    assert parse_state("00112233aabbccdd.624") == ("00112233aabbccdd", 624)
    for wrong in (None, "", "00112233aabbccdd", "00112233aabbccdd.625", "00112233aabbccdd.-1", "0.1", 5):
        with pytest.raises(ValueError, match="expected"):
            parse_state(wrong)
    for wrong in (None, 5, "AAAA", "!" * 100, "A" * 10_000):
        with pytest.raises(ValueError, match=r"expected|base64"):
            parse_block(wrong)


def test_a_judge_walks_no_further_than_its_account() -> None:
    """A stream that draws without end costs a bounded time, and the answer says so."""
    account = Account(50)
    walk = Walk(account)
    start = Twister.from_seed(0)
    assert walk.read(f"{block_digest(start.block)}.624", None, [0]).kind == "seeded"
    assert account.left == 50
    far = start.copy()
    for _ in range(100 * 624):
        far.word()
    text = f"{block_digest(far.block)}.{far.position}"
    assert walk.read(text, None).kind == "exhausted"
    assert account.left <= 0
    assert Walk(Account(5000)).read(text, None).kind == "unknown"
