"""A story tells what the log proves, in bounded size, and stops where the record is not what was sealed."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest
from tests.helpers import told

from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.render import listing, story, timeline
from trainguard.render.readings import Reader
from trainguard.render.terminal import as_text


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def hyper(**groups: object) -> dict[str, object]:
    return {"hyperparameters": groups}


def test_a_story_tells_the_run_from_its_start_to_its_end(home: Home):
    """Facts, first step, folded stretches and the end, in order, each with the leaf that proves it."""
    told.record(home, "r", told.whole_run(*(told.step(n) for n in range(1, 121))))
    whole = story.tell_run(home, "r")
    assert [event.kind for event in whole.events] == ["start", "process", "first_step", "quiet", "end"]
    assert whole.events[3].title == "120 steps (1 to 120)"
    assert (whole.state, whole.status, whole.steps) == ("ended", 0, 120)
    assert whole.own_ns == 120 * 50_000
    assert (whole.host, whole.account) == ("node-7", "victim-a (uid 1000)")
    assert whole.record.records == 126, "120 steps; start, ledger, process, bye, exit and end"
    assert whole.record.run_leaf == 0
    assert whole.events[0].leaf == 1
    assert whole.events[-1].leaf == whole.record.last_leaf
    assert whole.processes[0].steps == 120
    assert whole.processes[0].said_bye is True


def test_a_finding_stands_in_the_timeline_at_the_record_it_cites(home: Home):
    """What was found is told when it happened, not at the end."""
    spawn = {"how": "subprocess", "program": "python", "args": ["python", "-I", "x.py"], "place": "/home/u/t.py:8"}
    between = ("spawn", spawn, {"process": 0, "pid": 800, "source": "process", "step": 1})
    told.record(home, "r", told.whole_run(told.step(1), between, told.step(2)))
    kinds = [event.kind for event in story.tell_run(home, "r").events]
    assert kinds[kinds.index("spawn") + 1] == "finding"
    assert kinds.index("finding") < kinds.index("end")


def test_a_record_that_was_edited_is_told_up_to_the_edit_and_no_further(home: Home):
    """Nothing behind a segment that does not verify is shown as if it were proved."""
    told.record(home, "r", told.whole_run(*(told.step(n) for n in range(1, 121))))
    spool = told.spool(home, "r")
    data = bytearray(spool.read_bytes())
    data[-200] ^= 1
    spool.write_bytes(data)
    broken = story.tell_run(home, "r")
    assert broken.record.broken is not None
    assert "end" not in [event.kind for event in broken.events]
    assert broken.verdict.verdict == "TAINTED"
    assert "not what was sealed" in as_text(timeline.story_view(broken))


def test_a_run_without_an_end_says_so(home: Home):
    """Silence is told, not smoothed over."""
    told.record(home, "r", [told.start(), told.process(), told.step(1)], final=False)
    whole = story.tell_run(home, "r")
    assert whole.state == "unended"
    assert "the record has no end" in as_text(timeline.story_view(whole))


def test_a_curve_of_any_length_is_thinned_without_losing_its_extremes():
    """One slow step in a hundred thousand stays visible."""
    thin = story._Thin()
    for step in range(1, 100_001):
        thin.add(step, 9.0 if step == 77_777 else 1.0)
    points = thin.ranges()
    assert len(points) <= story.POINT_LIMIT
    assert (points[0].first, points[-1].last) == (1, 100_000)
    assert [(p.first <= 77_777 <= p.last) for p in points if p.high == 9.0] == [True]
    assert all(a.last + 1 == b.first for a, b in itertools.pairwise(points))
    assert thin.total / thin.count == pytest.approx(1.00008)


def test_the_learning_rate_is_carried_on_while_nothing_changes():
    """Rates are sent only when they change; the curve has every step."""
    reader = Reader()
    frames = [
        {"opt": 0, "hyperparameters": {"groups": [{"lr": 0.1}, {"lr": 5.0}]}},
        {"opt": 0},
        {"opt": 1, "hyperparameters": {"groups": [{"lr": 9.0}]}},
        {"opt": 0, "hyperparameters": {"changed": [[1, "lr", 7.0], [0, "lr", 0.2]]}},
    ]
    rates = [dict(reader.of_step(frame)).get("learning_rate") for frame in frames]
    assert rates == [0.1, 0.1, None, 0.2]


@pytest.mark.parametrize(
    "body",
    [
        {"wall_ns": "soon", "own_ns": float("nan")},
        {"wall_ns": 10**400},
        {"wall_ns": True},
        {"opt": 0, "hyperparameters": {"groups": "none"}, "gradients": [1]},
        {"opt": 0, "hyperparameters": {"changed": [[0, "lr", {"type": "Tensor"}], 7]}},
    ],
)
def test_readings_that_are_no_finite_numbers_are_left_out(body: dict[str, object]):
    """Frames come from a process that may be the attacker's."""
    assert list(Reader().of_step(body)) == []


def test_nothing_a_process_sends_breaks_the_story(home: Home):
    """Every kind of record with bodies of the wrong shape still gives a story, a text and a document."""
    wrong = [{}, {"cmdline": 7, "args": {"a": 1}, "signal": "nine", "hello": [], "lost": "many", "files": 3}]
    records = [told.start(command=["python"])]
    for kind in (*story.EVENTS, "code", "open", "sweep", "unheard_of"):
        if kind != "start":
            records += [(kind, body, {"process": 0, "pid": 800}) for body in wrong]
    told.record(home, "r", [*records, told.end()])
    whole = story.tell_run(home, "r")
    assert as_text(timeline.story_view(whole))
    assert msgspec.json.decode(msgspec.json.encode(whole))["run"] == "r"


def test_ten_thousand_events_of_one_kind_become_a_few_lines_and_a_count(home: Home):
    """A flood does not bury the rest."""
    spawn = {"how": "system", "program": "sh", "args": ["sh", "-c", "true"], "guarded_env": True, "place": None}
    flood = [("spawn", spawn, {"process": 0, "pid": 800, "source": "process"})] * 3000
    told.record(home, "r", [told.start(), told.process(), *flood, told.step(1), *told.leave(), told.end()])
    whole = story.tell_run(home, "r")
    assert sum(event.kind == "spawn" for event in whole.events) == story.SHOWN_PER_KIND
    assert any("2,988 more events" in event.title for event in whole.events)
    assert whole.events[-1].kind == "more"
    assert whole.counts["spawn"] == 3000
    assert any(event.kind == "end" for event in whole.events)


def test_a_sparkline_has_its_peak_where_the_curve_has_it():
    """Eight heights, the highest for the highest value; a flat curve is a low line."""
    points = [story.Point(n, n, 1.0, 1.0, 8.0 if n == 3 else 1.0) for n in range(1, 7)]
    assert timeline.sparkline(points) == "▁▁█▁▁▁"
    assert timeline.sparkline(points[:2]) == "▁▁"
    assert timeline.sparkline(points, ascii_only=True).isascii()


def test_the_list_of_runs_is_newest_first_and_judged_from_the_records(home: Home):
    """Words are drawn anew; a file that says otherwise is not asked."""
    told.record(home, "one", told.whole_run(told.step(1)))
    told.record(home, "two", [told.start(), told.process(), told.step(1)], final=False)
    (home.run("one") / "verdict.json").write_text('{"verdict": "VERIFIED"}')
    rows = listing.rows(home, budget_seconds=float("inf"))
    assert [(row.run, row.state, row.verdict, row.steps) for row in rows] == [
        ("two", "unended", "SUSPECT", 1),
        ("one", "ended", "UNKNOWN", 1),
    ]


def test_past_the_budget_runs_are_listed_without_a_word(home: Home):
    """A long list stays fast, and what is missing says so."""
    for name in ("a", "b", "c"):
        told.record(home, name, told.whole_run(told.step(1)))
    ticks = iter([0.0, 0.0, 5.0, 5.0, 5.0])
    rows = listing.rows(home, budget_seconds=1.0, clock=lambda: next(ticks))
    assert [row.verdict for row in rows] == ["UNKNOWN", None, None]
    assert rows[1].reason == "not judged, to keep the list fast"


def test_a_run_whose_folder_was_deleted_is_still_listed(home: Home):
    """The log remembers what the disk lost."""
    told.record(home, "gone", told.whole_run(told.step(1)))
    spool = told.spool(home, "gone")
    spool.unlink()
    spool.parent.rmdir()
    (row,) = listing.rows(home)
    assert (row.run, row.verdict) == ("gone", "TAINTED")


def test_a_folder_that_the_log_does_not_know_is_listed_as_unrecorded(home: Home):
    """A planted run is not mistaken for one."""
    told.record(home, "real", told.whole_run(told.step(1)))
    home.run("planted").mkdir()
    rows = {row.run: row for row in listing.rows(home)}
    assert rows["planted"].state == "unrecorded"
    assert rows["planted"].verdict is None


def test_without_a_log_the_list_says_what_to_do(home: Home):
    """The first call in a new folder."""
    with pytest.raises(Misuse, match="no log here"):
        listing.rows(home)
