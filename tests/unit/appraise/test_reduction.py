"""Shares of the ranks, solved for from sampled gradients."""

from __future__ import annotations

import random
import struct

import pytest

from trainguard.appraise.reduction import Values, one_tensor, reduce_of, way_of

COUNTS = [2, 3, 4, 12]


def gradients(ranks: int, tensors: int = 4, elements: int = 32, seed: int = 0) -> list[list[Values]]:
    """Random gradients by rank and tensor, as float32 has them, tensors of different size."""
    draw = random.Random(seed)
    return [
        [[single(draw.gauss(0.1, 10.0**-t)) for _ in range(elements)] for t in range(tensors)] for _ in range(ranks)
    ]


def single(value: float, kind: str = "f") -> float:
    """Rounded to float32 (f) or float16 (e)."""
    return float(struct.unpack(f"<{kind}", struct.pack(f"<{kind}", value))[0])


def mix(locals_: list[list[Values]], shares: list[float], kind: str = "f") -> list[Values]:
    """What a reduction with these shares leaves."""
    return [
        [single(sum(w * rank[t][n] for w, rank in zip(shares, locals_, strict=True)), kind) for n in range(len(values))]
        for t, values in enumerate(locals_[0])
    ]


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("factor", [1.0, 0.013, 65536.0])
def test_a_mean_is_a_mean_whatever_one_factor_does_to_all(ranks: int, factor: float) -> None:
    """Averaged, clipped, summed, scaled: equal shares."""
    locals_ = gradients(ranks)
    found = reduce_of(locals_, mix(locals_, [factor / ranks] * ranks))
    assert found.kind == "mean"
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.apart == ()


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("share", [-1.0, -0.1, 0.0, 1.3, 1.01, 5.0])
def test_the_rank_whose_share_is_another_is_named(ranks: int, share: float) -> None:
    """Turned, left out, scaled: by what factor."""
    odd = ranks - 1
    locals_ = gradients(ranks)
    shares = [1.0 / ranks] * ranks
    shares[odd] *= share
    found = reduce_of(locals_, mix(locals_, shares))
    assert found.kind == "shares"
    if ranks > 2:
        assert found.apart == (odd,)
        assert found.shares[odd] == pytest.approx(share, abs=1e-4)
    assert found.turned == ((odd,) if share < 0 else ())


def test_what_no_rank_made_is_unlike_any_shares() -> None:
    """Noise of a tenth on the reduced gradient fits nothing; a thousandth looks like a mean in low precision."""
    locals_ = gradients(4)
    for size, kind in ((0.1, "unlike"), (1e-4, "mean")):
        draw = random.Random(1)
        used = [[x + size * draw.random() for x in values] for values in mix(locals_, [0.25] * 4)]
        found = reduce_of(locals_, used)
        assert (found.kind, found.roundoff > 2.0**-24) == (kind, kind == "mean")


def test_a_mean_in_half_precision_is_known_as_such() -> None:
    """A compressing communication hook; a turned share is still seen through it."""
    locals_ = gradients(3)
    way, found = way_of(locals_, [mix(locals_, [1 / 3] * 3, "e")] * 3)
    assert (way, found.roundoff) == ("rounded", 2.0**-11)
    turned = reduce_of(locals_, mix(locals_, [1 / 3, -1 / 3, 1 / 3], "e"))
    assert turned.turned == (1,)


def test_too_few_elements_name_nobody() -> None:
    """With as many unknowns as values any shares would fit."""
    locals_ = gradients(8, tensors=1, elements=8)
    assert reduce_of(locals_, mix(locals_, [1.0] * 7 + [-1.0])).kind == "unlike"


def test_ranks_with_the_same_batch_are_told_by_their_mean_alone() -> None:
    """Equal gradients leave the shares open, and a mean is still a mean."""
    one = gradients(1)[0]
    assert reduce_of([one, one, one], one).kind == "mean"
    assert reduce_of([one, one, one], [[-x for x in values] for values in one]).factor == pytest.approx(-1.0)


def test_a_rank_with_nothing_to_give_is_in_order() -> None:
    """A frozen branch, an empty batch: its gradient is zero, whatever its share."""
    locals_ = gradients(3)
    locals_[1] = [[0.0] * len(values) for values in locals_[1]]
    assert reduce_of(locals_, mix(locals_, [1 / 3] * 3)).kind == "mean"
    assert reduce_of(locals_, mix(locals_, [1 / 3, 1 / 3, -1 / 3])).turned == (2,)


def test_one_tensor_of_one_rank_is_found_where_the_shares_differ_by_tensor() -> None:
    """Only the second tensor of rank 2 was turned."""
    locals_ = gradients(4)
    used = mix(locals_, [0.25] * 4)
    used[1] = mix(locals_, [0.25, 0.25, -0.25, 0.25])[1]
    assert reduce_of(locals_, used).kind == "unlike"
    found = one_tensor(locals_, used)
    assert found is not None
    assert (found[0], found[1].turned) == (1, (2,))


def test_ranks_that_use_their_own_gradients_do_not_reduce() -> None:
    """Local steps."""
    locals_ = gradients(3)
    assert way_of(locals_, locals_)[0] == "unreduced"


def test_nan_and_infinity_are_left_out() -> None:
    """Numbers that are none say nothing."""
    locals_ = gradients(2, tensors=1)
    locals_[0][0][3] = float("nan")
    assert way_of(locals_, [locals_[1], locals_[1]])[0] == "nothing"


def test_a_mean_of_few_elements_in_bfloat16_is_no_share_that_differs_by_its_rounding() -> None:
    """Quiet: shares that are solved for lie nearer to what rounding left than equal ones do."""

    def narrow(value: float) -> float:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return float(struct.unpack("<f", struct.pack("<I", (bits + 0x8000) & 0xFFFF0000))[0])

    kinds = set()
    for seed in range(40):
        locals_ = [[[narrow(v) for v in row] for row in rank] for rank in gradients(3, 1, 12, seed)]
        total = [narrow(narrow(a + b) + c) for a, b, c in zip(*(rank[0] for rank in locals_), strict=True)]
        kinds.add(reduce_of(locals_, [[narrow(v / 3) for v in total]]).kind)
    assert "shares" not in kinds
    assert "mean" in kinds
