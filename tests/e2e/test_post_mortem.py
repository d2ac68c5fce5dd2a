"""S14 and S15 from the log alone: evidence attacked and an account framed; and what is left to say on day 60."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainguard.appraise.judge import judge_run
from trainguard.incident import offline
from trainguard.incident.bundle import make_bundle
from trainguard.incident.correlate import incidents
from trainguard.incident.damage import assess
from trainguard.incident.lineage import checkpoint_key, read_lineage, root_of, run_key
from trainguard.incident.recover import plan_recovery, quarantine
from trainguard.testing import incidents as scripted
from trainguard.testing.incidents import INSIDER, SCRIPTS, VICTIM_B, Played, play


def played(name: str, folder: Path) -> Played:
    return play(next(script for script in SCRIPTS if script.name == name), folder, seed=14)


def test_s14_an_edited_record_is_reported_and_the_framed_account_is_not_the_actor(tmp_path: Path) -> None:
    """A kill as victim-b from insider's session; then somebody edits the record, and cuts it."""
    one = played("kill as victim-b from insider's session", tmp_path)
    (incident,) = incidents(one.home, sources=one.sources)
    account = incident.attribution.account
    assert account is not None
    assert account.uid == INSIDER
    assert account.what.startswith("login session 7")
    assert account.alternatives, "with what else it may be"
    assert any(str(VICTIM_B) in line for line in incident.attribution.excluded)
    assert incident.attribution.candidates[0].uid != VICTIM_B

    spool = one.home.run("attacked") / "spool"
    whole = spool.read_bytes()
    edited = whole.replace(b'"loginuid":1003', b'"loginuid":1002', 1)
    assert edited != whole
    spool.write_bytes(edited)
    told = [finding for finding in judge_run(one.home, "attacked").findings if finding.check == "log"]
    assert [finding.outcome for finding in told] == ["violated"]
    spool.write_bytes(whole[: len(whole) // 2])
    assert any(finding.check == "log" for finding in judge_run(one.home, "attacked").findings)
    journal = one.home.log / "journal"
    (entry,) = [path for path in sorted(journal.iterdir()) if path.is_file()][:1]
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(bytes(data))
    assert judge_run(one.home, "base").verdict == "TAINTED", "nothing that the log says can be relied on"


def test_s15_taint_damage_recovery_and_a_package_that_verifies_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model has its word; the descendant is tainted and the unrelated one verified; there is a way on."""
    monkeypatch.setattr("trainguard.incident.lineage.judge_run", scripted._judge)
    one = played("side file of a hook", tmp_path)
    lineage = read_lineage(one.home)
    models = one.home.root.parent / "models"
    words = {path.name: lineage.standing_of(checkpoint_key(root_of(path))).word for path in sorted(models.iterdir())}
    assert words == {
        "apart-5.pt": "VERIFIED",
        "attacked-16.pt": "TAINTED",
        "attacked-24.pt": "TAINTED",
        "attacked-8.pt": "UNKNOWN",  # nothing against it; the script records too little to claim more
        "base-5.pt": "VERIFIED",
        "tuned-6.pt": "TAINTED",
    }
    chain = lineage.reasons(lineage.standing_of(run_key("tuned")))
    assert chain[0].startswith("attacked-24.pt")

    damage = assess(one.home, lineage=lineage)
    assert set(damage.runs) == {"attacked", "tuned"}
    assert damage.hours.low < damage.hours.likely < damage.hours.high
    assert one.truth.hours == pytest.approx(damage.hours.likely, rel=0.05)

    plan = plan_recovery(one.home, "attacked")
    assert plan.checkpoint is not None
    assert Path(plan.checkpoint.place).name == "attacked-8.pt"
    assert {Path(moved.place).name for moved in quarantine(plan)} == {"attacked-16.pt", "attacked-24.pt"}

    (incident,) = incidents(one.home, lineage=lineage, sources=one.sources)
    bundle = make_bundle(one.home, incident)
    assert offline.verify(bundle)["incident"] == incident.id
