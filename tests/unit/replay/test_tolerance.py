"""Tolerance: what is honest on another build stays within it, and what is not goes beyond."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trainguard.errors import Unavailable
from trainguard.replay.tolerance import MARGIN, Calibration, Reading, Variation, judged, matching, parted

BUILD: dict[str, Any] = {
    "torch": "2", "capability": "AVX2", "mkldnn": True, "devices": [], "threads": 1, "deterministic": False, "cpu": "A",
}  # fmt: skip
FLOAT = {"param/0/w": "float32", "param/0/k": "float32", "state/0/0/exp_avg": "float32"}


def variation(kind: str, share: float, **changed: Any) -> Variation:
    told = {"transformer": {"1": share / 10, "10": share, "50": 10 * share}, "mixed": {"10": 0.3}}
    given = {"name": kind, "kind": kind, "changes": True, "weights": told, "gradients": told}
    return Variation(**(given | {"settings": {kind.upper(): "1"}} | changed))


CALIBRATION = Calibration(
    machine={"cpu": "A", "torch": "2"},
    made="2026",
    steps=(1, 10, 50),
    variations=(variation("threads", 1e-6), variation("instructions", 4e-6), variation("mkldnn", 0.0, changes=False)),
)


def distances(w: float, k: float = 0.0, state: float = 0.0) -> dict[str, tuple[float, float, float]]:
    """Weights w moved by 1 of size 1, weights k too, and a state of size 1: each this far apart."""
    return {"param/0/w": (w, 1.0, 1.0), "param/0/k": (k, 1.0, 1.0), "state/0/0/exp_avg": (state, 0.0, 1.0)}


def reading(found: Any, *, kinds: tuple[str, ...] = ("threads",), steps: int = 10, spread: Any = ()) -> Reading:
    return judged(found, kinds, steps, CALIBRATION, FLOAT, spread)


def test_the_same_build_has_no_kinds_and_another_names_them() -> None:
    """Bits are expected of the first; each kind that differs has a class."""
    assert parted(BUILD, BUILD) == ()
    other = BUILD | {"threads": 4, "capability": "AVX512", "cpu": "B", "mkldnn": False}
    assert set(parted(BUILD, other)) == {"threads", "instructions", "processor", "mkldnn"}
    assert parted({k: v for k, v in BUILD.items() if k != "cpu"}, BUILD) == ()


@pytest.mark.parametrize("name", ["torch", "devices", "deterministic"])
def test_what_no_class_covers_is_not_compared(name: str) -> None:
    """Another version of torch is another program."""
    with pytest.raises(Unavailable, match=f"not comparable: {name}"):
        parted(BUILD, BUILD | {name: "other"})
    with pytest.raises(Unavailable, match="did not say"):
        parted(None, BUILD)


def test_a_replay_is_brought_nearer_where_the_machine_can() -> None:
    """The run's number of threads; lower instructions, never higher ones; nothing that the run set itself."""
    clean = BUILD | {"threads": 8, "capability": "AVX512"}
    assert matching(BUILD, clean, {}) == {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"}
    assert matching(BUILD, clean, {"OMP_NUM_THREADS": "1"}) == {"ATEN_CPU_CAPABILITY": "avx2"}
    assert matching(clean, BUILD, {}) == {"OMP_NUM_THREADS": "8"}
    assert matching(BUILD | {"threads": 10**9, "capability": "x"}, clean, {}) == {}


def test_honest_noise_is_within_and_a_tampered_step_is_beyond() -> None:
    """A sign turned in one of ten steps is a fifth of the movement; one per cent of a learning rate a thousandth."""
    assert reading(distances(2e-6)).excess < 1
    assert reading(distances(0.2)).excess > 1000
    found = reading(distances(1e-3))
    assert found.excess > 10
    assert (found.tensor, found.by) == ("param/0/w", "class")


def test_a_class_is_by_kind_and_by_length() -> None:
    """Only the kinds that differ are granted; longer segments part further; another processor is granted everything."""
    assert CALIBRATION.bound(("threads",), 10) == (MARGIN * 1e-6, MARGIN * 1e-6)
    assert CALIBRATION.bound(("threads",), 1)[0] == pytest.approx(MARGIN * 1e-7)
    assert CALIBRATION.bound(("threads",), 11) == CALIBRATION.bound(("threads",), 5000)
    assert CALIBRATION.bound(("instructions", "threads"), 10)[0] == MARGIN * 4e-6
    assert CALIBRATION.bound(("processor",), 10)[0] == MARGIN * 4e-6
    assert CALIBRATION.bound(("mkldnn",), 10) == (0.0, 0.0)


def test_a_tensor_that_only_adds_up_noise_is_held_against_its_own_spread() -> None:
    """A bias whose true gradient is nothing, under Adam: honest replays lie as far apart as they move."""
    noisy = distances(2e-6, k=0.3)
    assert reading(noisy).excess > 1
    own = reading(noisy, spread=[distances(1e-6, k=0.2)])
    assert own.excess < 1
    assert own.by == "own spread"


def test_own_spread_of_one_tensor_excuses_no_other() -> None:
    """The act hides in w, the noise is in k."""
    found = reading(distances(0.01, k=0.3), spread=[distances(1e-6, k=0.2)])
    assert found.excess > 1
    assert found.tensor == "param/0/w"


def test_state_is_measured_by_its_size() -> None:
    """Momentum carries the gradient of the last step: a scaled one is seen there first."""
    assert reading(distances(0.0, state=1e-6)).excess < 1
    found = reading(distances(0.0, state=1e-2))
    assert found.excess > 1
    assert found.tensor == "state/0/0/exp_avg"


def test_rounding_of_the_weights_themselves_is_honest() -> None:
    """A tensor that hardly moves may still differ by its last bits; half precision by more."""
    still = {"param/0/w": (1e-7, 1e-9, 1.0)}
    assert judged(still, ("threads",), 10, CALIBRATION, {"param/0/w": "float32"}).excess < 1
    coarse = {"param/0/w": (1e-2, 1e-9, 1.0)}
    assert judged(coarse, ("threads",), 10, CALIBRATION, {"param/0/w": "float32"}).excess > 1
    assert judged(coarse, ("threads",), 10, CALIBRATION, {"param/0/w": "bfloat16"}).excess < 1


def test_the_largest_effect_that_would_be_hidden_is_said_in_words() -> None:
    """As a share of the movement, and as a learning rate in one step; wider where the job's own spread is."""
    found = reading(distances(2e-6))
    assert 1e-6 < found.undetectable < 1e-4
    assert "another number of threads; class" in found.words
    assert "of what these 10 steps moved the weights by would not be seen" in found.words
    assert reading(distances(0.0), spread=[distances(1e-3)]).undetectable > 0.01


def test_a_tensor_that_one_side_lacks_is_beyond() -> None:
    """As `_distances.py` says it: as far as a number can be."""
    assert reading(distances(0.0) | {"param/0/x": (1.7e308, 0.0, 0.0)}).excess == 1e12


def test_own_spread_is_asked_of_the_widest_variation_of_each_kind() -> None:
    """And of none that changed no bit here, or that no variable makes."""
    more = (
        *CALIBRATION.variations,
        variation("threads", 1e-5, settings={"OMP": "8"}),
        variation("x", 1.0, settings={}),
    )
    wide = msgspec.structs.replace(CALIBRATION, variations=more)
    assert wide.spread_by({}) == [{"INSTRUCTIONS": "1"}, {"OMP": "8"}]
    assert wide.spread_by({"OMP": "8"}) == [{"INSTRUCTIONS": "1"}, {"THREADS": "1"}]
