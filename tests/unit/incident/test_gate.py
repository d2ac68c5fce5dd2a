"""Nothing passes the gate but bytes that a watched run sealed, good in themselves and in all they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers.family import Family, finding

from trainguard.appraise.verdict import Level
from trainguard.envelope import load_public_key
from trainguard.errors import Misuse, Unavailable
from trainguard.home import Home
from trainguard.incident import gate
from trainguard.incident.gate import Refused, ask, require
from trainguard.seal.ledger import read_ledger
from trainguard.seal.write import seal_path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    made = Family(Home(tmp_path_factory.mktemp("home")), tmp_path_factory.mktemp("models"))
    (base,) = made.run("base", saves={10: "base.pt"}, level="TIL-3")
    early, late = made.run("bad", finding(6), saves={5: "bad-5.pt", 10: "bad-10.pt"}, opens=[base])
    made.run("tuned", saves={10: "tuned.pt"}, opens=[late])
    made.run("early", saves={10: "early.pt"}, opens=[early])
    made.run("odd", finding(3, "suspicious"), saves={10: "odd.pt"})
    made.run("blind", gaps=["nothing was measured"], saves={10: "blind.pt"})
    with pytest.MonkeyPatch.context() as patch:
        made.judged(patch)
        yield made


@pytest.mark.parametrize(
    ("model", "verdict", "status"),
    [
        ("base.pt", "VERIFIED", 0),
        ("bad-5.pt", "VERIFIED", 0),
        ("bad-10.pt", "TAINTED", 1),
        ("tuned.pt", "TAINTED", 1),
        ("early.pt", "VERIFIED", 0),
        ("odd.pt", "SUSPECT", 3),
        ("blind.pt", "UNKNOWN", 3),
    ],
)
def test_a_model_passes_only_with_everything_it_was_made_from(
    family: Family, model: str, verdict: str, status: int
) -> None:
    answer = ask(family.folder / model, home=family.home)
    assert (answer.verdict, answer.exit_status) == (verdict, status)
    assert answer.passed == (not answer.reasons)
    if not answer.passed:
        assert answer.reasons[0] == f"the verdict is {verdict}, VERIFIED is required"


def test_a_refusal_names_the_run_it_comes_from(family: Family) -> None:
    answer = ask(family.folder / "tuned.pt", home=family.home)
    assert any("bad-10.pt" in reason and "a weight changed" in reason for reason in answer.reasons)
    assert answer.ancestors == ("tuned", "bad", "base")


def test_the_level_is_the_lowest_on_the_way(family: Family) -> None:
    assert ask(family.folder / "base.pt", home=family.home, level="TIL-3").passed
    answer = ask(family.folder / "early.pt", home=family.home, level="TIL-3")
    assert (answer.level, answer.passed, answer.exit_status) == ("TIL-1", False, 3)
    assert "the level is TIL-1, TIL-3 is required" in answer.reasons


def test_a_refusal_for_its_level_says_which_run_lacks_which_step(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By run on the way: no lock, nothing replayed, replayed where that does not count; none for what has the level."""
    model = family.folder / "early.pt"
    asked = ask(model, home=family.home, level="TIL-3").reasons
    assert "run early: it ran without a lock, which cannot be made up for" in " ".join(asked)
    assert not any(reason.startswith("run base:") for reason in asked), "it has TIL-3"
    for lock, replayed, words in (
        ("a" * 64, 0, "run early: no segment of it was replayed: trainguard audit early --env PYTHON"),
        ("a" * 64, 7, "run early: no audit of it was made in an environment measured apart"),
    ):
        known = family.verdicts["early"]
        coverage = replace(known.coverage, replayed_steps=replayed)
        monkeypatch.setitem(family.verdicts, "early", replace(known, lock=lock, coverage=coverage))
        assert any(reason.startswith(words) for reason in ask(model, home=family.home, level="TIL-3").reasons)
    monkeypatch.setitem(family.verdicts, "early", replace(family.verdicts["early"], level="TIL-3"))
    left = ask(model, home=family.home, level="TIL-3").reasons
    assert [reason for reason in left if reason.startswith("run ")] == [
        "run bad: it ran without a lock, which cannot be made up for: trainguard lock, run it again, audit that run"
    ]


@pytest.mark.parametrize("level", ["TIL-2", "TIL-4"])
def test_a_level_that_is_never_awarded_is_said_to_be(family: Family, level: Level) -> None:
    reasons = ask(family.folder / "base.pt", home=family.home, level=level).reasons
    if level == "TIL-4":
        assert f"{level} is not awarded by this version, whatever is done (spec/levels.md)" in reasons
    else:
        assert reasons == (), "TIL-3 is above it"


def test_a_lower_bar_lets_suspicion_through_but_never_what_is_proved(family: Family) -> None:
    assert ask(family.folder / "odd.pt", home=family.home, word="SUSPECT").passed
    assert not ask(family.folder / "tuned.pt", home=family.home, word="SUSPECT").passed


def test_a_file_sealed_by_hand_is_of_no_known_run(family: Family) -> None:
    (family.folder / "hand.pt").write_text("by hand")
    seal_path(family.home, family.folder / "hand.pt")
    answer = ask(family.folder / "hand.pt", home=family.home)
    assert (answer.passed, answer.verdict, answer.level) == (False, "UNKNOWN", "TIL-0")
    assert answer.reasons == ("no watched run is known that made these bytes",)


def test_other_bytes_than_were_sealed_are_refused(family: Family, tmp_path: Path) -> None:
    (model,) = family.run("edited", saves={10: "edited.pt"})
    model.write_text("other bytes")
    answer = ask(model, home=family.home)
    assert (answer.passed, answer.verdict, answer.exit_status) == (False, "TAINTED", 1)
    loose = tmp_path / "loose.pt"
    loose.write_text("never sealed")
    with pytest.raises(Unavailable, match="has no seal"):
        require(loose, home=family.home)


def test_a_seal_that_could_not_be_told_does_not_pass(family: Family) -> None:
    """Our copy of the seal is gone: only the log's entry is left, and the bytes were compared with nothing.

    An earlier version let it through, because nothing was found against it.
    """
    (model,) = family.run("lost", saves={10: "lost.pt"})
    ledger = read_ledger(family.home, load_public_key(family.home.keys / "attestation.pub"))
    assert ledger is not None
    leaf = ledger.newest(run="lost")
    assert leaf is not None
    (family.home.blobs / leaf.envelope).unlink()
    answer = ask(model, home=family.home)
    assert (answer.passed, answer.exit_status) == (False, 3)
    assert "the content was not checked" in answer.reasons[0]
    with pytest.raises(Refused, match=r"lost\.pt"):
        require(model, home=family.home)


def test_a_report_that_could_not_tell_and_says_nothing_is_refused(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gate.verify_seal
    monkeypatch.setattr(gate, "verify_seal", lambda *a, **k: replace(real(*a, **k), status="unknown", findings=()))
    answer = ask(family.folder / "base.pt", home=family.home)
    assert answer.reasons == ("seal: whether these are the bytes that were sealed could not be told",)
    assert (answer.passed, answer.exit_status) == (False, 3)


def test_require_hands_back_the_provenance_or_raises(family: Family) -> None:
    answer = require(family.folder / "base.pt", home=family.home, level="TIL-3")
    assert (answer.run, answer.step) == ("base", 10)
    with pytest.raises(Refused, match="expected VERIFIED at TIL-1, found TAINTED") as refused:
        require(family.folder / "bad-10.pt", home=family.home)
    assert refused.value.exit_status == 1


@pytest.mark.parametrize("word", ["verified", "", "TAINTED "])
def test_only_the_four_words_and_five_levels_can_be_asked_for(word: str) -> None:
    with pytest.raises(Misuse):
        gate.parse_word(word)
    with pytest.raises(Misuse):
        gate.parse_level(word)
