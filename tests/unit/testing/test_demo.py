"""The demo counts an act as found only for a finding of the act's kind, and overwrites nothing that is not its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from trainguard.appraise.verdict import decide
from trainguard.errors import Misuse, Unavailable
from trainguard.finding import Finding, LinkState, Outcome
from trainguard.render import playbill
from trainguard.render.techniques import TITLES
from trainguard.render.terminal import as_text
from trainguard.testing import demo


def a_scene(act: demo.Act, *findings: Finding, weights: str = "aa", lock: bool = True) -> demo.Scene:
    verdict = decide(
        findings,
        [LinkState(link="environment", held=3)],
        run=act.key,
        steps=60,
        watched_steps=60,
        gaps=() if lock else ("no lock: what ran was compared with nothing approved",),
    )
    return demo.Scene(act=act, run=act.key, folder="/d", verdict=verdict, seconds=1.0, weights=weights, loss=3.2)


def finding(outcome: Outcome, *techniques: str) -> Finding:
    return Finding(check="optimizer", outcome=outcome, techniques=techniques, message="seen in /d/jobs/train.py")


SIGN = next(act for act in demo.ACTS if act.key == "act-3")


def test_an_act_counts_as_found_for_a_finding_of_its_kind():
    """Violated or suspicious, naming one of the act's techniques."""
    assert a_scene(SIGN, finding("violated", "C1")).as_promised
    assert a_scene(SIGN, finding("suspicious", "F7", "C1")).as_promised


@pytest.mark.parametrize(
    "findings",
    [(), (finding("violated", "G4"),), (finding("not_checked", "C1"),)],
    ids=["none", "another", "unchecked"],
)
def test_an_act_that_was_missed_is_not_counted(findings: tuple[Finding, ...]):
    """An alarm about something else is luck, not detection."""
    scene = a_scene(SIGN, *findings)
    assert not scene.as_promised
    assert "not" in dict(playbill.rows(scene, None))["found"]


def test_the_clean_run_must_be_verified():
    """UNKNOWN is not good enough."""
    assert a_scene(demo.CLEAN).as_promised
    assert not a_scene(demo.CLEAN, lock=False).as_promised
    assert not a_scene(demo.CLEAN, finding("suspicious", "C1")).as_promised


def test_the_ending_names_what_was_missed():
    """The last line is the truth about all acts."""
    clean, found, missed = a_scene(demo.CLEAN), a_scene(SIGN, finding("violated", "C1")), a_scene(demo.ACTS[0])
    assert playbill.ending([clean, found], 9.0) == "1 of 1 act found, in 9 s. The clean run is VERIFIED."
    assert playbill.ending([clean, found, missed], 9.0).endswith(f"Not as it should be: {missed.act.title}.")


def test_unchanged_weights_are_called_harmless_and_changed_ones_are_not():
    """Bit for bit, as the script itself printed them."""
    clean = a_scene(demo.CLEAN, weights="aa")
    assert playbill.damage(a_scene(SIGN, weights="aa"), clean).startswith("none")
    assert playbill.damage(a_scene(SIGN, weights="bb"), clean).startswith("final weights are not those")


def test_paths_are_shown_below_the_demo_s_folder():
    """A page that is handed on does not carry the path of the machine it was made on."""
    clean = a_scene(demo.CLEAN)
    shown = a_scene(SIGN, finding("violated", "C1"))
    assert "/d/" not in as_text(playbill.scene_view(shown, clean))
    assert "/d/" not in playbill.index_page([clean, shown], 1.0, log="home")


def test_every_act_has_its_own_key_known_techniques_and_a_story():
    """What is shown is complete."""
    assert len({act.key for act in demo.ACTS}) == len(demo.ACTS) == 5
    for act in demo.ACTS:
        assert act.techniques <= set(TITLES)
        assert act.story.endswith(".")
        assert act.helper is None or ast.parse(act.helper)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    """--out pointing at a home folder by mistake costs nothing."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Misuse, match="expected an empty folder"):
        demo.Stage(tmp_path, steps=60).build()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_example_script_is_found_and_takes_the_reviewed_helper():
    """One source of truth, and the line the helper is imported at."""
    script = demo.training_script()
    assert script.is_file()
    assert "\nimport torch\n" in script.read_text()


def test_a_torch_without_the_edited_line_is_said():
    """No act is played on a file it could not change."""
    with pytest.raises(Unavailable, match="no line"):
        demo._faster("nothing of the kind")
