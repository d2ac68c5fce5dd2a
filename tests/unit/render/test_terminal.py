"""What people read in a terminal says what the verdict says, worst first, and obeys nothing it quotes."""

from __future__ import annotations

import pytest

from trainguard.appraise.verdict import Verdict, decide
from trainguard.finding import Citation, Finding, LinkState, Subject
from trainguard.render import terminal, words
from trainguard.render.techniques import GROUPS, TITLES, labelled

UPDATE = Finding(
    check="update",
    outcome="violated",
    techniques=("C4", "C3"),
    subject=Subject(run="r", rank=0, step=120, tensor="lm_head.weight"),
    message="the update is 1.01 times what AdamW gives",
    expected="-1.2034e-05",
    found="-1.2154e-05",
    evidence=(Citation(leaf=812, hash="9f" * 32),),
)
ODD = Finding(check="processes", outcome="suspicious", subject=Subject(run="r"), message="a process never reported")
UNCHECKED = Finding(check="inputs", outcome="not_checked", message="no manifest lists these files")


def a_verdict(*findings: Finding, links: tuple[LinkState, ...] = (), run: str = "run-1") -> Verdict:
    """A verdict decided the usual way over 400 steps."""
    return decide(findings, links, run=run, steps=400, watched_steps=399)


def text_of(verdict: Verdict, width: int = 100, *, ascii_only: bool = False) -> str:
    return terminal.as_text(terminal.verdict_view(verdict, ascii_only=ascii_only), width=width)


def test_the_first_line_has_the_word_the_run_the_level_and_the_coverage():
    """Somebody who reads one line only has the answer."""
    first = text_of(a_verdict(UPDATE)).splitlines()[0]
    assert " ".join(first.split()) == "TAINTED run-1 TIL-1 399 of 400 steps checked in full, none replayed"


def test_a_finding_shows_where_what_expected_found_its_names_and_its_leaf():
    """Everything needed to act on a finding stands beside it."""
    text = text_of(a_verdict(UPDATE))
    for part in (
        "step 120",
        "rank 0",
        "lm_head.weight",
        "the update is 1.01 times what AdamW gives",
        "-1.2034e-05",
        "-1.2154e-05",
        "C4 optimizer arithmetic changed",
        "leaf 812 (9f9f9f9f9f9f…)",
    ):
        assert part in text


def test_violated_findings_come_before_suspicious_ones_before_unchecked_ones():
    """Worst first, whatever order they were found in."""
    text = text_of(a_verdict(UNCHECKED, ODD, UPDATE))
    assert text.index("the update is") < text.index("a process never") < text.index("no manifest lists")


def test_the_same_message_at_many_steps_is_shown_once_and_counted():
    """A thousand broken steps do not bury the rest."""
    many = [
        Finding(check="update", outcome="violated", message=UPDATE.message, subject=Subject(run="r", step=step))
        for step in range(120, 220)
    ]
    text = text_of(a_verdict(*many, ODD))
    assert text.count("the update is") == 1
    assert "99 more of update, steps 121 to 219" in text
    assert "a process never reported" in text


def test_each_link_shows_its_state_in_words_and_blind_shows_why():
    """Colour and glyph are not the only bearers of a state."""
    links = (
        LinkState(link="code", held=1204),
        LinkState(link="update", held=388, broken=12),
        LinkState(link="inputs", blind=("no data manifest in the lock",)),
        LinkState(link="continuity", held=3, explained=("train.py:88",)),
    )
    lines = text_of(a_verdict(links=links)).splitlines()
    shown = {line.split()[1]: line for line in lines if line.startswith(("  ✓", "  ✗", "  ◌", "  ≈"))}
    assert "held" in shown["code"]
    assert "1,204 held" in shown["code"]
    assert "broken" in shown["update"]
    assert "12 broken" in shown["update"]
    assert "no data manifest in the lock" in shown["inputs"]
    assert "approved: train.py:88" in shown["continuity"]


def test_a_link_that_nobody_needed_and_nothing_checked_is_not_shown_as_held():
    """Blind is never green: unused is not held."""
    idle = LinkState(link="replicas", required=False)
    text = text_of(a_verdict(links=(idle,)))
    assert words.link_word(idle) == "unused"
    assert "✓" not in text


def test_a_required_link_that_saw_nothing_is_blind_even_without_a_reason():
    """An empty balance is not a green one."""
    text = text_of(a_verdict(links=(LinkState(link="rng"),)))
    assert "nothing of it was seen" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_line_is_longer_than_the_window(width: int):
    """Long paths and messages wrap instead of running out of the window."""
    long = Finding(
        check="inputs",
        outcome="suspicious",
        subject=Subject(path="/very/long/" + "folder/" * 40 + "file.py:7"),
        message="word " * 100,
        found="x" * 300,
    )
    links = (LinkState(link="inputs", blind=("reason " * 40,)),)
    text = text_of(a_verdict(long, links=links), width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_escape_sequences_and_markup_in_evidence_are_shown_and_not_obeyed():
    """A name from a hostile process can neither colour the terminal nor overwrite a line in it."""
    hostile = Finding(
        check="update",
        outcome="violated",
        subject=Subject(tensor="\x1b[2J[bold green]VERIFIED[/]\r\u202egpj"),
        message="[link=https://example.org]click[/link]\x07",
        expected="\x1b]0;title\x07",
        found="[red]",
    )
    text = text_of(a_verdict(hostile))
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert "[bold green]VERIFIED[/]" in text
    assert "[link=https://example.org]click[/link]" in text


def test_a_terminal_without_unicode_gets_plain_signs():
    """Glyphs have a twin in ASCII."""
    links = (LinkState(link="code", held=1), LinkState(link="rng", blind=("why",)))
    text = text_of(a_verdict(UPDATE, links=links), ascii_only=True)
    assert not set("✓✗◌≈") & set(text)
    assert "x  violated" in text


def test_no_colour_leaves_the_program_where_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    """Files and pipes get text."""
    monkeypatch.setenv("NO_COLOR", "1")
    screen = terminal.screen(width=80)
    with screen.capture() as captured:
        screen.print(terminal.verdict_view(a_verdict(UPDATE)))
    assert "\x1b[3" not in captured.get()
    assert "\x1b[4" not in captured.get()


def test_the_next_command_names_the_run_so_that_a_shell_reads_it_as_one_word():
    """A command that is copied runs."""
    text = text_of(a_verdict(UPDATE))
    assert "trainguard explain run-1" in text
    assert "trainguard lock -- CMD" in text


def test_the_catalogue_has_a_title_for_each_of_its_eighty_techniques():
    """13 + 9 + 11 + 8 + 10 + 10 + 11 + 8, in eight groups."""
    sizes = {"A": 13, "B": 9, "C": 11, "D": 8, "E": 10, "F": 10, "G": 11, "H": 8}
    assert list(TITLES) == [f"{group}{number}" for group, size in sizes.items() for number in range(1, size + 1)]
    assert list(GROUPS) == list(sizes)
    assert len(set(TITLES.values())) == 80


def test_an_unknown_technique_is_shown_by_its_id():
    """A newer writer's id is not dropped."""
    assert labelled("Z9") == "Z9"


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [(840e3, "840 µs"), (12.34e6, "12.3 ms"), (4e9, "4.0 s"), (200e9, "3 min 20 s"), (7500e9, "2 h 5 min")],
)
def test_a_duration_is_in_the_unit_a_person_would_use(nanoseconds: float, shown: str):
    """From microseconds to hours."""
    assert words.duration(nanoseconds) == shown
