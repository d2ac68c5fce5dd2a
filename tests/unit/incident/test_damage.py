"""Ranges, rows and prices add up; what is said outside is set beside what the log shows; nothing is counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers import told
from tests.helpers.family import SECOND, Family, finding, verdict

from trainguard.archive import RunReader
from trainguard.errors import Misuse, Unavailable
from trainguard.finding import Citation, Finding
from trainguard.home import Home
from trainguard.incident import damage
from trainguard.incident.damage import (
    Claim,
    Price,
    Prices,
    Range,
    assess,
    by_kind,
    choose_price,
    read_prices,
    total,
    what_if,
)
from trainguard.incident.losses import takes_time_only
from trainguard.render.damage import damage_lines

HOUR = 3600.0
PRICE = Price(device="H100", currency="USD", low=2.0, likely=3.0, high=4.0, basis="list", date="2026-03-01")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    family = Family(Home(tmp_path / "home"), tmp_path / "models")
    family.judged(monkeypatch)
    return family


def steps(run: str, family: Family, course: list[tuple[float, told.Told]], *findings: Finding) -> None:
    """Record `course`, pairs of seconds that pass before a record and the record, with the verdict of `findings`."""
    family.verdicts[run] = verdict(*findings)
    moments, now = [], 1_700_000_000.0
    for pause, _ in course:
        now += pause
        moments.append(int(now * SECOND))
    left = iter(moments)
    told.record(family.home, run, [line for _, line in course], clock=lambda: next(left, moments[-1]))


def step(number: int, wall: float, process: int = 0, rank: int | None = None) -> told.Told:
    """A step that took `wall` seconds."""
    return told.step(number, process, rank, wall_ns=int(wall * SECOND))


def test_a_tainted_run_is_a_range_from_the_acts_seen_to_the_whole_run(made: Family) -> None:
    """Ten steps of one second after the hello; acts at steps 4 and 6."""
    made.run("a", finding(4, leaf=7), finding(6), steps=10)
    report = assess(made.home)
    (row,) = report.rows
    assert (row.kind, row.from_step, row.to_step, row.leaf) == ("tainted", 4, 10, 7)
    assert row.hours.low * HOUR == pytest.approx(3, abs=0.01), "from the beginning of step 4 to the end of step 6"
    assert row.hours.likely * HOUR == pytest.approx(7 + 2, abs=0.01), "to the end of the process"
    assert row.hours.high * HOUR == pytest.approx(10 + 2, abs=0.01)
    assert report.hours == row.hours == total(report.rows)
    assert report.devices == 1


def test_every_rank_of_a_tainted_run_counts_whichever_it_was_seen_in(made: Family) -> None:
    made.run("a", finding(4, rank=2), steps=10, ranks=4)
    report = assess(made.home)
    assert [row.rank for row in report.rows] == [0, 1, 2, 3]
    assert report.devices == 4


def test_an_act_without_a_step_spoils_the_run_from_its_start(made: Family) -> None:
    made.run("a", finding(None), finding(4), steps=10)
    (row,) = assess(made.home).rows
    assert row.hours.low == row.hours.likely == row.hours.high > 0


def test_what_is_made_from_it_counts_whole_and_what_is_not_counts_nothing(made: Family) -> None:
    early, late = made.run("a", finding(6), saves={5: "5.pt", 10: "10.pt"})
    made.run("child", opens=[late])
    made.run("good", opens=[early])
    report = assess(made.home)
    assert set(report.runs) == {"a", "child"}
    child = next(row for row in report.rows if row.run == "child")
    assert (child.kind, child.hours.low) == ("descendant", 0.0)
    assert child.hours.likely == child.hours.high > 0
    assert "10.pt" in child.why


def test_suspicion_and_ignorance_are_in_no_low_figure(made: Family) -> None:
    made.run("odd", finding(3, "suspicious"))
    made.run("blind", gaps=["nothing was measured"])
    report = assess(made.home)
    (row,) = report.rows
    assert (row.kind, row.hours.low, row.hours.likely) == ("suspect", 0.0, 0.0)
    assert row.hours.high > 0
    assert report.unknown == ("blind",)


def test_chosen_runs_take_what_was_made_from_them_along(made: Family) -> None:
    (bad,) = made.run("a", finding(1), saves={10: "a.pt"})
    made.run("child", opens=[bad])
    made.run("b", finding(1))
    assert set(assess(made.home, runs=["a"]).runs) == {"a", "child"}
    assert set(assess(made.home, runs=["b"]).runs) == {"b"}


# -- time ----------------------------------------------------------------------------------------------------------


def killed(pid: int, *, denied: bool = False) -> told.Told:
    sender = {"pid": 900, "uid": 1002, "cmdline": ["kill"]}
    body = {"call": "kill", "signal": 9, "sender": sender, "target": pid, "targets": [{"pid": pid}], "denied": denied}
    return ("signalled", body, {"pid": 900})


def gone(process: int, signal: int = 9, **more: object) -> told.Told:
    where = {"process": process, "pid": 800 + process, "rank": 0}
    return ("exit", {"said_bye": False, "ended": {"status": None, "signal": signal}} | more, where)


def saved(number: int) -> told.Told:
    return ("seal", {"path": "x", "leaf": 3, "findings": []}, {"step": number})


def kill_course(kill: told.Told) -> list[tuple[float, told.Told]]:
    """Four steps of 10 s, a checkpoint after the second, a kill in the fifth, a restart."""
    return [
        (0, told.start()),
        (5, told.process(0, 0)),
        (10, step(1, 10, 0, 0)),
        (10, step(2, 10, 0, 0)),
        (0, saved(2)),
        (10, step(3, 10, 0, 0)),
        (10, step(4, 10, 0, 0)),
        (4, kill),
        (1, gone(0)),
        (60, told.process(1, 0)),
        (30, step(1, 10, 1, 0)),
        (10, step(2, 10, 1, 0)),
        (0, ("exit", {"said_bye": True}, {"process": 1, "pid": 801, "rank": 0})),
    ]


def cited(home: Home, run: str, kind: str) -> str:
    """Hash of the first record of a kind."""
    found = next(record.hash for record in RunReader(home, run).records() if record.kind == kind)
    assert found is not None
    return found


def kill_finding(home: Home, run: str, outcome: str = "violated", kind: str = "signalled") -> Finding:
    base = finding(4, outcome, check="kills", techniques=("F8",), message="process 900 sent SIGKILL")  # type: ignore[arg-type]
    return replace(base, evidence=(Citation(leaf=5, hash=cited(home, run, kind)),))


@pytest.mark.parametrize(("outcome", "low"), [("violated", 1.0), ("suspicious", 0.0)])
def test_a_kill_costs_the_work_since_the_checkpoint_and_the_wait_for_the_next_step(
    made: Family, outcome: str, low: float
) -> None:
    """24 s of work after the checkpoint, and 81 s until the next step begins; the run's other work is presumed good."""
    steps("a", made, kill_course(killed(800)))
    made.verdicts["a"] = verdict(kill_finding(made.home, "a", outcome))
    report = assess(made.home)
    seconds = {kind: hours.likely * HOUR for kind, hours in report.parts.items()}
    assert seconds["redone"] == pytest.approx(24)
    assert seconds["idle"] == pytest.approx(1 + 60 + 20)
    assert report.hours.likely * HOUR == pytest.approx(105)
    assert report.hours.low == pytest.approx(low * report.hours.likely)
    everything = 45 + 60 + 40
    assert report.hours.high * HOUR == pytest.approx(everything), "every moment from hello to end, once"
    assert report.devices == 1, "a rank that was started again is one device"


def test_a_signal_that_ended_nobody_costs_nothing(made: Family) -> None:
    course = [each for each in kill_course(killed(777)) if each[1][1].get("ended") is None]
    steps("a", made, course)
    made.verdicts["a"] = verdict(kill_finding(made.home, "a"))
    assert "redone" not in assess(made.home).parts


def test_ends_by_nobody_known_are_counted_less_those_that_come_by_nature(made: Family) -> None:
    course = [each for each in kill_course(killed(800)) if each[1][0] != "signalled"]
    steps("a", made, course)
    made.verdicts["a"] = verdict(finding(None, "suspicious", check="kills", techniques=("F8",), message="3 ends"))
    redone = assess(made.home).parts["redone"]
    assert redone.low == 0.0
    assert 0.99 * redone.high < redone.likely < redone.high
    memory = {"out_of_memory": {"group": 1, "host": 1, "named": []}}
    course = [
        (pause, gone(0, **memory) if line[0] == "exit" and line[1].get("ended") else line) for pause, line in course
    ]
    steps("b", made, course)
    made.verdicts["b"] = made.verdicts["a"]
    assert not [row for row in assess(made.home).rows if row.run == "b" and row.kind == "redone"]


def sleep_finding(step: int, outcome: str = "violated", rank: int | None = 0) -> Finding:
    return finding(step, outcome, check="stalls", techniques=("F7",), rank=rank, message="sleeps at x.py:3")  # type: ignore[arg-type]


def test_sleeps_cost_what_steps_take_longer_than_before_in_every_rank_that_waits(made: Family) -> None:
    """Two ranks, 20 steps of 10 s; from step 11 on every other one takes 15 s, by rank 0's doing."""
    course: list[tuple[float, told.Told]] = [(0, told.start()), (0, told.process(0, 0)), (0, told.process(1, 1))]
    for number in range(1, 21):
        wall = 15 if number > 10 and number % 2 else 10
        course += [(wall, step(number, wall, 0, 0)), (0, step(number, wall, 1, 1))]
    steps("a", made, course, sleep_finding(11))
    slowed = assess(made.home).parts["slowed"]
    assert slowed.low * HOUR == pytest.approx(25), "the rank that slept"
    assert slowed.likely * HOUR == pytest.approx(50), "and the one that waited for it"
    assert slowed.high * HOUR == pytest.approx(50)


def test_steps_that_were_slow_before_are_taken_off(made: Family) -> None:
    """Every fifth step evaluates and takes 12 s, before the first sleep as after it."""
    course: list[tuple[float, told.Told]] = [(0, told.start()), (0, told.process(0, 0))]
    for number in range(1, 41):
        wall = 12.0 if number % 5 == 0 else 10.0
        wall += 4.0 if number > 20 and number % 5 == 1 else 0.0
        course.append((wall, step(number, wall, 0, 0)))
    steps("a", made, course, sleep_finding(21, "suspicious"))
    slowed = assess(made.home).parts["slowed"]
    assert slowed.low == 0.0
    assert slowed.likely * HOUR == pytest.approx(4 * 4)
    assert slowed.high * HOUR == pytest.approx(4 * 4 + 4 * 2)


def test_a_moment_of_a_device_is_counted_once(made: Family) -> None:
    """Sleeps, and then weights edited: after the edit all of it is spoilt, slow or not."""
    course: list[tuple[float, told.Told]] = [(0, told.start()), (0, told.process(0, 0))]
    for number in range(1, 31):
        wall = 15.0 if number > 10 else 10.0
        course.append((wall, step(number, wall, 0, 0)))
    steps("a", made, course, sleep_finding(11), finding(21))
    report = assess(made.home)
    assert report.parts["slowed"].likely * HOUR == pytest.approx(10 * 5)
    assert report.parts["tainted"].likely * HOUR == pytest.approx(10 * 15)
    assert report.hours.high * HOUR == pytest.approx(10 * 10 + 20 * 15)


def test_only_time_is_taken_where_all_techniques_say_so() -> None:
    assert takes_time_only(sleep_finding(1))
    assert not takes_time_only(finding(1))
    assert not takes_time_only(finding(1, techniques=("F8", "B8")))
    assert not takes_time_only(finding(1, techniques=()))


# -- money and words -----------------------------------------------------------------------------------------------


def test_money_is_hours_at_the_same_end_of_the_price(made: Family) -> None:
    made.run("a", finding(4), finding(6))
    report = assess(made.home, prices=Prices(price=(PRICE,)))
    assert report.money is not None
    assert report.money.low == pytest.approx(report.hours.low * 2)
    assert report.money.likely == pytest.approx(report.hours.likely * 3)
    assert report.money.high == pytest.approx(report.hours.high * 4)


def test_statements_from_outside_are_supported_or_not_or_unknown(made: Family) -> None:
    made.run("a", finding(1), ranks=2)

    def answers(*said: tuple[str, float, str]) -> list[str]:
        outside = tuple(
            damage.Outside(text="t", quantity=quantity, value=value, currency=currency)  # type: ignore[arg-type]
            for quantity, value, currency in said
        )
        report = assess(made.home, prices=Prices(price=(PRICE,), outside=outside))
        return [each.answer for each in report.outside]

    statements = (
        ("devices", 2, ""),
        ("devices", 8000, ""),
        ("runs", 0, ""),
        ("money", 1e7, "USD"),
        ("money", 1, "CNY"),
    )
    assert answers(*statements) == ["supported", "not supported", "not supported", "not supported", "unknown"]
    made.run("blind", gaps=["no lock"], ranks=4)
    asked = (("devices", 8000, ""), ("devices", 3, ""), ("devices", 2, ""), ("runs", 2, ""), ("money", 1e7, "USD"))
    assert answers(*asked) == ["not supported", "unknown", "supported", "unknown", "not supported"]


def test_ranges_add_end_to_end_and_parts_add_up_to_the_whole(made: Family) -> None:
    made.run("a", finding(4), ranks=3)
    made.run("odd", finding(3, "suspicious"))
    report = assess(made.home)
    parts = list(by_kind(report.rows).values())
    summed = Range()
    for part in parts:
        summed = summed.plus(part)
    assert summed.likely == pytest.approx(report.hours.likely)
    assert summed.high == pytest.approx(report.hours.high)
    assert Range(low=1, likely=2, high=3).plus(Range(low=1, likely=1, high=1)) == Range(low=2, likely=3, high=4)
    text = "\n".join(damage_lines(report))
    assert "spoilt work" in text
    assert "work that is in doubt" in text


def test_what_a_fleet_loses_per_minute_is_its_price_over_sixty() -> None:
    told_ = what_if(8000, PRICE)
    assert told_.per_hour == Range(low=16_000, likely=24_000, high=32_000)
    assert told_.per_minute.likely == pytest.approx(400)
    assert told_.per_day.likely == 24 * 24_000
    for wrong in (0, -1, 10_000_001):
        with pytest.raises(Misuse, match="what-if"):
            what_if(wrong, PRICE)


def test_prices_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    good = '[[price]]\ndevice="H100"\ncurrency="USD"\nlow=1.0\nlikely=2.0\nhigh=3.0\nbasis="list"\ndate="2026-03-01"\n'
    path.write_text(good)
    prices = read_prices(path)
    assert choose_price(prices, None) == prices.price[0] == choose_price(prices, "H100")
    with pytest.raises(Misuse, match="no price for it; there are prices for: H100"):
        choose_price(prices, "A100")
    for wrong, words in (
        (good.replace("low=1.0", "low=5.0"), "0 <= low <= likely <= high"),
        (good.replace('"list"', '"guess"'), "not a prices file"),
        (good + "surprise=1\n", "not a prices file"),
        ("[[price", "not a prices file"),
        ("x" * (damage.LIMIT_BYTES + 1), "at most"),
    ):
        path.write_text(wrong)
        with pytest.raises(Misuse, match=words):
            read_prices(path)
    with pytest.raises(Unavailable, match="cannot be read"):
        read_prices(tmp_path / "none.toml")


# -- what an incident manager hands in, and what happened twice -------------------------------------------------------

GOOD = '[[price]]\ndevice="H100"\ncurrency="USD"\nlow=1.0\nlikely=2.0\nhigh=3.0\nbasis="list"\ndate="2026-03-01"\n'
CLAIM = '[[claim]]\nby="manager of team-b"\nwhat="people"\ncurrency="USD"\namount=1000.0\ndate="2026-11-20"\n'
SAID = '[[outside]]\ntext="8,000 GPUs"\nquantity="devices"\nvalue=8000.0\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("high=3.0", "high=inf"), "H100: expected 0 <= low <= likely <= high, all finite"),
        (GOOD.replace("likely=2.0", "likely=nan"), "all finite"),
        (GOOD.replace("2026-03-01", "last spring"), "price of H100: expected a day as YYYY-MM-DD, found 'last spring'"),
        (GOOD.replace("2026-03-01", "2026-02-30"), "expected a day as YYYY-MM-DD"),
        (GOOD.replace('"USD"', '"US dollars\\u001b[31m"'), "expected a currency as three letters"),
        (GOOD + GOOD.replace("2026-03-01", "2026-09-01"), "two prices for H100"),
        (GOOD + GOOD.replace("USD", "EUR"), "two prices for H100"),
        (CLAIM.replace("1000.0", "-5.0"), "claim of manager of team-b: expected an amount of 0 or more"),
        (CLAIM.replace("1000.0", "nan"), "expected an amount of 0 or more"),
        (CLAIM.replace("2026-11-20", "soon"), "claim of manager of team-b: expected a day"),
        (CLAIM.replace("manager of team-b", ""), "claim: expected who states it"),
        (SAID.replace("8000.0", "inf"), "8,000 GPUs: expected a value of 0 or more"),
        (SAID.replace("8000.0", "-1.0"), "8,000 GPUs: expected a value of 0 or more"),
        (SAID.replace("devices", "money"), "8,000 GPUs: expected a currency"),
    ],
)
def test_what_cannot_be_meant_in_a_prices_file_is_refused_and_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(Misuse, match=words):
        read_prices(path)


def test_several_prices_and_none_chosen_is_said_as_that(made: Family) -> None:
    """Two devices, two currencies: nothing is added up, and the next step is to choose."""
    made.run("a", finding(4))
    other = replace(PRICE, device="A100", currency="EUR")
    lines = list(damage_lines(assess(made.home, prices=Prices(price=(PRICE, other)))))
    assert "money: not stated: there are prices for H100 and A100: choose one with --device" in lines
    assert "EUR" in "".join(damage_lines(assess(made.home, prices=Prices(price=(PRICE, other)), device="A100")))
    assert "money: not stated: no price was given (--prices FILE)" in list(damage_lines(assess(made.home)))


def test_claims_in_two_currencies_stand_apart(made: Family) -> None:
    """Each with its own; no sum over currencies, and none with what was measured."""
    made.run("a", finding(4))
    claims = tuple(
        Claim(by=by, what="people", currency=currency, amount=1000.0, date="2026-11-20")
        for by, currency in (("manager of team-b", "USD"), ("manager of team-c", "EUR"))
    )
    report = assess(made.home, prices=Prices(price=(PRICE,), claim=claims))
    text = "\n".join(damage_lines(report))
    assert "1,000.00 USD" in text
    assert "1,000.00 EUR" in text
    assert "2,000" not in text
    assert report.money == assess(made.home, prices=Prices(price=(PRICE,))).money


def test_nothing_recorded_costs_nothing_and_says_so(made: Family) -> None:
    """No finding in any run: zero hours, no rows, and no word of loss."""
    made.run("well")
    report = assess(made.home, prices=Prices(price=(PRICE,)))
    assert (report.rows, report.hours, report.money) == ((), Range(), Range())
    assert next(iter(damage_lines(report))) == "device-hours: 0 over 0 affected runs"


def test_two_acts_whose_stretches_overlap_cost_their_union(made: Family) -> None:
    """Edited at steps 3 to 7 and at 5 to 9, by two kinds of act: what one took the other cannot take again."""
    made.run(
        "both",
        finding(3),
        finding(7),
        Finding(check="loss", outcome="violated", techniques=("C6",), subject=finding(5).subject, message="a loss"),
        Finding(check="loss", outcome="violated", techniques=("C6",), subject=finding(9).subject, message="a loss"),
        steps=10,
    )
    made.run("one", finding(3), finding(9), steps=10)
    both, one = (assess(made.home, runs=[run]) for run in ("both", "one"))
    assert both.hours == one.hours
    assert both.hours.high * HOUR == pytest.approx(12), "from the hello to the end, once"


def test_a_run_that_went_on_from_a_spoilt_checkpoint_is_counted_once(made: Family, tmp_path: Path) -> None:
    """It is spoilt itself and was made from what was: its own hours, once."""
    (late,) = made.run("a", finding(6), saves={10: "a.pt"})
    made.run("resumed", finding(2), opens=[late], steps=10)
    made.run("alike", finding(2), opens=[tmp_path / "models" / "a.pt"], steps=10)
    alone = assess(made.home, runs=["alike"]).hours.high
    report = assess(made.home)
    assert sum(row.hours.high for row in report.rows if row.run == "resumed") == alone
    assert report.hours.high == pytest.approx(2 * alone + 12 / HOUR)


@pytest.mark.parametrize("devices", [0, -1, 10_000_001])
def test_a_fleet_that_is_none_is_refused(devices: int) -> None:
    with pytest.raises(Misuse, match="expected 1 to 10,000,000 devices"):
        what_if(devices, PRICE)
