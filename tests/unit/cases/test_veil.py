"""Mutes hide from ordinary lists what two approvers agreed to hide, and turn nothing green; nor do waivers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace
from tests.helpers import told
from tests.helpers.cases import DAY, Site
from tests.helpers.family import Family
from tests.helpers.family import finding as bad
from tests.helpers.sourced import opened

from trainguard import opaque, veil
from trainguard.appraise.difference import compare_runs
from trainguard.appraise.judge import veiled, waived
from trainguard.appraise.verdict import decide
from trainguard.archive import LogLeaves
from trainguard.cases.desk import RefusedAct
from trainguard.cli import main
from trainguard.errors import Misuse, VerificationError
from trainguard.finding import Finding, LinkState, Subject
from trainguard.home import Home
from trainguard.incident.gate import ask
from trainguard.incident.recover import plan_recovery
from trainguard.log import Log
from trainguard.veil import MAINTENANCE, Muted, Veil, approver_keys, read_veil, seal_mute, sign_mute
from trainguard.waiver import Waiver, approve, parse_waiver, propose

HELD = LinkState(link="weights", held=9)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    folder = tmp_path / "approvers"
    folder.mkdir()
    for name in ("lead-a", "lead-b"):
        (folder / f"{name}.card").write_bytes(made.person(name).card_bytes())
    return made


def finding(path: str | None = None, outcome: str = "violated", check: str = "saves") -> Finding:
    return Finding(
        check=check,
        outcome=outcome,
        techniques=("E3",),
        subject=Subject(run="job-7", step=3, path=path),
        message="m",  # type: ignore[arg-type]
    )


def muted(
    site: Site, scope: str, value: str, *, days: float = 9, names: tuple[str, str] = ("lead-a", "lead-b")
) -> bytes:
    since, until = site.until(0), site.until(days)
    people = [site.person(name) for name in names]
    return seal_mute(
        Muted(
            scope=scope,  # type: ignore[arg-type]
            value=value,
            since=since,
            until=until,
            keys=(people[0].key, people[1].key),
            signatures=tuple(sign_mute(scope, value, since, until, one.signing) for one in people),  # type: ignore[arg-type]
        ),
        {},
    )


def drawn(site: Site, *entries: bytes) -> Veil:
    index: dict[bytes, list[bytes]] = {}
    for entry in entries:
        index.setdefault(opaque.tag_of(entry), []).append(entry)
    return Veil(index, approver_keys(site.root / "approvers"), clock=lambda: site.now_ns / 1e9)


def test_a_muted_run_reads_unknown_and_never_green(site: Site):
    """A proof in it is not shown; a run that was well is not well while it is muted; and no link tells."""
    hidden = drawn(site, muted(site, "run", "job-7"))
    bad = decide([finding()], [LinkState(link="saves", held=2, broken=1), HELD], run="job-7")
    good = decide([], [HELD], run="job-7")
    assert (bad.verdict, good.verdict) == ("TAINTED", "VERIFIED")
    for verdict in (bad, good):
        shown = veiled(verdict, hidden)
        assert shown.verdict == "UNKNOWN"
        assert shown.findings == ()
        assert shown.gaps == (MAINTENANCE,)
        assert not any(link.broken for link in shown.links)
    other = decide([finding()], [HELD], run="job-8")
    assert veiled(other, hidden) is other


def test_a_muted_file_hides_what_names_it_and_nothing_else(site: Site):
    """Another proof in the same run still makes it TAINTED."""
    hidden = drawn(site, muted(site, "path", "/shared/train.py"))
    one, two = finding("/shared/train.py:12"), finding("/shared/other.py:1", check="code")
    alone = veiled(decide([one], [HELD], run="job-7"), hidden)
    both = veiled(decide([one, two], [HELD], run="job-7"), hidden)
    assert (alone.verdict, alone.findings) == ("UNKNOWN", ())
    assert (both.verdict, both.findings) == ("TAINTED", (two,))


def test_a_mute_that_ran_out_or_was_signed_by_one_or_by_others_hides_nothing(site: Site):
    """Nor does junk that bears its mark, nor anything at all where no approvers are named."""
    verdict = decide([finding()], [HELD], run="job-7")
    late = drawn(site, muted(site, "run", "job-7"))
    assert veiled(verdict, late).verdict == "UNKNOWN"
    for names in (("lead-a", "lead-a"), ("insider", "friend"), ("lead-a", "insider")):
        assert veiled(verdict, drawn(site, muted(site, "run", "job-7", names=names))) is verdict
    key = veil.key_of("run", "job-7")
    assert veiled(verdict, drawn(site, opaque.seal(bytes(opaque.PLAIN_BYTES), key, 0))) is verdict
    assert veiled(verdict, Veil(late.index, {}, clock=late.clock)) is verdict
    site.later(10)
    assert veiled(verdict, late) is verdict


def test_a_mute_is_proposed_and_signed_in_a_case_and_ends(site: Site, monkeypatch: pytest.MonkeyPatch):
    """From the desk to the verdict, through the log; a second one after the first ran out is found as well."""
    monkeypatch.setenv("TRAINGUARD_APPROVERS", str(site.root / "approvers"))
    approvers = (site.card("lead-a"), site.card("lead-b"))
    code = site.opened()
    one, two = (site.desk(name, approvers=approvers) for name in ("lead-a", "lead-b"))
    verdict = decide([finding()], [HELD], run="job-7")

    def shown() -> str:
        return veiled(verdict, Veil(LogLeaves(site.home).sealed, approver_keys(), lambda: site.now_ns / 1e9)).verdict

    number = one.mute(code, "run", "job-7", until=site.until(5), reason="covert until the hosts are imaged")
    assert shown() == "TAINTED"
    with pytest.raises(RefusedAct, match="second person"):
        one.sign(code, number)
    entries = len(site.entries())
    two.sign(code, number)
    assert len(site.entries()) - entries == 13
    assert shown() == "UNKNOWN"
    site.later(6)
    assert shown() == "TAINTED"
    number = one.mute(code, "run", "job-7", until=site.until(5), reason="longer")
    two.sign(code, number)
    assert shown() == "UNKNOWN"
    number = one.mute(code, "run", "job-7", until=None, reason="overt now")
    assert shown() == "UNKNOWN"
    two.sign(code, number)
    assert shown() == "TAINTED"
    again = [entry for entry in LogLeaves(site.home).sealed.values() for entry in entry]
    with Log.open(site.home.log, site.home.keys / "log.key") as log:
        log.append([_resealed(again)])
    assert shown() == "TAINTED"


def _resealed(entries: list[bytes]) -> bytes:
    """A mute that ended, taken from the log by one who knows the run, and written again as if it were the last."""
    key = veil.key_of("run", "job-7")
    marks = {opaque.mark(key, n): n for n in range(9)}
    mine = {marks[opaque.tag_of(entry)]: entry for entry in entries if opaque.tag_of(entry) in marks}
    return opaque.seal(opaque.unseal(mine[1], key, where="mute"), key, len(mine))


def test_nobody_mutes_where_no_approvers_are_named_or_without_an_end(site: Site):
    """A mute that no machine would follow is refused, not promised."""
    code = site.opened()
    with pytest.raises(Misuse, match="names no two approvers"):
        site.desk("lead-a").mute(code, "run", "job-7", until=site.until(), reason="x")
    desk = site.desk("lead-a", approvers=(site.card("lead-a"), site.card("lead-b")))
    with pytest.raises(Misuse, match="end in the future"):
        desk.mute(code, "run", "job-7", until=site.until(-1), reason="x")


def test_a_card_that_cannot_be_read_hides_nothing(site: Site, monkeypatch: pytest.MonkeyPatch):
    """Showing too much is the safe side."""
    (site.root / "approvers" / "bad.card").write_bytes(b"{}")
    monkeypatch.setenv("TRAINGUARD_APPROVERS", str(site.root / "approvers"))
    assert not read_veil(lambda: drawn(site, muted(site, "run", "job-7")).index).hides("run", "job-7")


# -- what decides ------------------------------------------------------------------------------------------------------


@pytest.fixture
def family(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """Models of a run that is tainted from step 6 on and muted, and of one that was made from it."""
    from trainguard.appraise import judge

    made = Family(site.home, tmp_path / "models")
    (late,) = [path for path in made.run("job-7", bad(6), saves={5: "a-5.pt", 10: "a-10.pt"}) if path.name == "a-10.pt"]
    made.run("tuned", saves={10: "tuned.pt"}, opens=[late])
    monkeypatch.setattr(judge, "_judged", lambda home, run, policy, leaves: replace(made.verdicts[run], run=run))
    monkeypatch.setenv("TRAINGUARD_APPROVERS", str(tmp_path / "approvers"))
    monkeypatch.setattr(Veil.__init__, "__defaults__", (lambda: site.now_ns / 1e9,))
    with Log.open(site.home.log, site.home.keys / "log.key") as log:
        log.append([muted(site, "run", "job-7")])
    return made


@pytest.mark.parametrize("model", ["a-10.pt", "tuned.pt"])
@pytest.mark.parametrize("word", ["VERIFIED", "UNKNOWN", "TAINTED"])
def test_a_mute_lets_nothing_through_the_gate_and_says_nothing(family: Family, model: str, word: str):
    """Not even where UNKNOWN would do; and what was made from it is no way round."""
    answer = ask(family.folder / model, home=family.home, word=word)  # type: ignore[arg-type]
    assert (answer.passed, answer.verdict, answer.exit_status) == (False, "UNKNOWN", 3)
    assert answer.reasons == (MAINTENANCE,)
    assert "a weight changed" not in str(answer)


def test_recovery_under_a_mute_goes_on_from_the_same_place_and_says_nothing(family: Family):
    """The tainted checkpoint is not offered because nobody may say why it is not."""
    plan = plan_recovery(family.home, "job-7")
    assert plan.checkpoint is not None
    assert plan.checkpoint.step == 5
    assert (plan.verdict, plan.first_bad_step, plan.reason) == ("UNKNOWN", None, MAINTENANCE)
    assert "TAINTED" not in str(plan)
    assert "a weight changed" not in str(plan)


def test_a_muted_run_is_not_compared_with_another(family: Family):
    """Not even that they differ, in whichever order, and not that they are equal."""
    for runs in (("job-7", "tuned"), ("tuned", "job-7"), ("job-7", "job-7")):
        quiet = compare_runs(family.home, *runs)
        assert (quiet.equal, quiet.differences, quiet.notes, quiet.exit_status) == (None, (), (MAINTENANCE,), 3)
        assert quiet.likeliest is None
    assert compare_runs(family.home, "tuned", "tuned").notes != (MAINTENANCE,)


def test_a_muted_file_is_left_out_of_a_comparison(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With the mute the difference is gone and nothing is called equal; without it, it is told."""
    for run, content in (("a", b"one"), ("b", b"two")):
        told.record(site.home, run, told.whole_run(opened("/shared/x.json", content), told.step(1)))
    assert [one.what for one in compare_runs(site.home, "a", "b").differences] == ["/shared/x.json"]
    monkeypatch.setenv("TRAINGUARD_APPROVERS", str(tmp_path / "approvers"))
    monkeypatch.setattr(Veil.__init__, "__defaults__", (lambda: site.now_ns / 1e9,))
    with Log.open(site.home.log, site.home.keys / "log.key") as log:
        log.append([muted(site, "path", "/shared/x.json")])
    quiet = compare_runs(site.home, "a", "b")
    assert (quiet.equal, quiet.differences, quiet.likeliest) == (None, (), None)
    assert MAINTENANCE in quiet.notes
    assert "x.json" not in str(quiet)


def test_an_audit_of_a_muted_run_tells_nothing_of_what_it_found(
    family: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Neither in words nor on the way nor by its status; it is made and recorded all the same."""
    made = []

    def replayed(_home: Home, name: str, _options: object, *, progress: Callable[[str], None]) -> object:
        made.append(name)
        progress("segment 3 differs at step 6")
        return SimpleNamespace(exit_status=1)

    monkeypatch.setattr("trainguard.replay.audit.audit", replayed)
    monkeypatch.setenv("TRAINGUARD_HOME", str(family.home.root))
    assert main(["audit", "job-7"]) == 3
    said = capsys.readouterr()
    assert (made, said.out.strip(), said.err) == (["job-7"], f"run job-7: {MAINTENANCE}", "")
    assert main(["audit", "job-7", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert (shown["verdict"], shown["findings"]) == ("UNKNOWN", [])
    assert main(["audit", "tuned", "--quiet"]) == 1


# -- waivers -----------------------------------------------------------------------------------------------------------


class Leaves:
    """What the judge asks of a log."""

    def __init__(self, waiver: Waiver, began: int) -> None:
        self.runs = {"speed-1": {"began_ns": str(began * 10**9)}}
        self.waivers = [waiver]


def waiver(site: Site, *names: str) -> Waiver:
    now = site.now_ns // 10**9
    first, *rest = (site.person(name) for name in names)
    data = propose(
        "speed-*", since=now, until=now + 9 * DAY, reason="guard costs 3 %", name=first.card.name, key=first.signing
    )
    for one in rest:
        data = approve(data, name=one.card.name, key=one.signing)
    return parse_waiver(data)


def test_a_waived_run_is_at_best_unknown_and_says_who_agreed(site: Site):
    """A proof in it stays a proof."""
    leaves = Leaves(waiver(site, "lead-a", "lead-b"), site.now_ns // 10**9 + 60)
    good = waived(decide([], [HELD], run="speed-1"), leaves)  # type: ignore[arg-type]
    assert good.verdict == "UNKNOWN"
    assert "agreed by lead-a and lead-b: guard costs 3 %" in good.reasons[0]
    bad = waived(decide([finding()], [HELD], run="speed-1"), leaves)  # type: ignore[arg-type]
    assert bad.verdict == "TAINTED"


def test_a_waiver_ends(site: Site):
    """A run that began after it, or before it, stands for itself."""
    one = waiver(site, "lead-a", "lead-b")
    verdict = decide([], [HELD], run="speed-1")
    for began in (one.until, one.since - 1):
        assert waived(verdict, Leaves(one, began)) is verdict  # type: ignore[arg-type]


def test_a_waiver_of_one_person_lets_nothing_off(site: Site):
    """The same key cannot sign twice; a waiver in the log all the same only costs the run its VERIFIED."""
    with pytest.raises(Misuse, match="a second person must"):
        waiver(site, "lead-a", "lead-a")
    one = waiver(site, "lead-a")
    with pytest.raises(VerificationError, match="expected two people, found 1"):
        one.approved()
    shown = waived(decide([], [HELD], run="speed-1"), Leaves(one, one.since))  # type: ignore[arg-type]
    assert shown.verdict == "UNKNOWN"
    assert "does not hold" in shown.reasons[0]
    with pytest.raises(VerificationError, match="none of this site's approvers"):
        waiver(site, "lead-a", "insider").approved({site.person("lead-a").key, site.person("lead-b").key})


@pytest.mark.parametrize("runs", ["", "*", "?*"])
def test_a_waiver_for_everything_is_refused(site: Site, runs: str):
    """Letting all runs off is switching the guard off."""
    key = site.person("lead-a").signing
    with pytest.raises(Misuse, match="name of runs"):
        propose(runs, since=0, until=9, reason="x", name="lead-a", key=key)
    with pytest.raises(Misuse, match="end in the future"):
        propose("a*", since=9, until=9, reason="x", name="lead-a", key=key)
