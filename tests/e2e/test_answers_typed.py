"""S14, S15 and N1 to N7 as somebody types them: verbs of the command line on a recorded history, and their answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainguard.cli import main
from trainguard.incident import correlate
from trainguard.testing import incidents as scripted
from trainguard.testing.casebook import CASEBOOK
from trainguard.testing.incidents import INSIDER, SCRIPTS, VICTIM_B, Played, play

Ask = Callable[..., tuple[int, str, str]]
BY_NAME = {script.name: script for script in (*SCRIPTS, *CASEBOOK)}


@pytest.fixture
def history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[Played, Ask]]:
    """Play a script, and a way to type verbs on it. Who owns files is the script's; short runs count as whole."""
    monkeypatch.setattr("trainguard.incident.lineage.judge_run", scripted._judge)

    def set_up(name: str) -> tuple[Played, Ask]:
        one = play(BY_NAME[name], tmp_path, seed=7)
        monkeypatch.setenv("TRAINGUARD_HOME", str(one.home.root))
        asked = correlate.incidents

        def with_sources(home: Any, **options: Any) -> Any:
            return asked(home, **{"sources": one.sources, **options})

        monkeypatch.setattr(correlate, "incidents", with_sources)
        monkeypatch.setattr("trainguard.incident.dossier.incidents", with_sources)

        def ask(*words: object) -> tuple[int, str, str]:
            try:
                status = main([str(word) for word in words])
            except SystemExit as left:
                status = int(left.code or 0)
            said = capsys.readouterr()
            return int(status or 0), said.out, said.err

        return one, ask

    return set_up


def named(told: dict[str, Any]) -> list[int]:
    """Accounts that stand first or are what the trace points to."""
    found = []
    for one in told["incidents"]:
        candidates = one["attribution"]["candidates"]
        before_host = [c for c in candidates[: _host_at(candidates)] if c["uid"] is not None]
        found += [c["uid"] for c in before_host[:1]]
    return found


def _host_at(candidates: list[dict[str, Any]]) -> int:
    return next((at for at, one in enumerate(candidates) if one["level"] in ("A0", "A1")), len(candidates))


NATURE = {
    "N1 silent bit flip": "one bit of one weight",
    "N2 honest bug in an approved commit": "average of weights in the own script",
    "N3 library upgraded": "administrator upgraded a library",
    "N4 out of memory": "out of memory",
    "N4 node lost": "node lost",
    "N5 co-tenant load": "co-tenant load",
    "N6 own configuration edited with approval": "own configuration edited, approved",
    "N7 two small differences that nobody made": "two flipped bits",
}


@pytest.mark.parametrize("name", NATURE)
def test_nature_and_honest_work_accuse_no_account(history: Callable[[str], tuple[Played, Ask]], name: str) -> None:
    """Whatever is suspicious about it, no account stands first, and no sentence names a person."""
    _, ask = history(NATURE[name])
    _, out, _ = ask("incident", "list", "--json")
    told = json.loads(out)
    assert named(told) == []
    assert "sabotage" not in out.lower()
    for one in told["incidents"]:
        assert "does not show which process or account" in one["attribution"]["sentence"]


def test_s14_a_kill_as_victim_b_is_told_as_the_insiders_session_and_edited_evidence_is_told(
    history: Callable[[str], tuple[Played, Ask]], tmp_path: Path
) -> None:
    """Account used, session it came from, how sure, alternatives; then the record is edited, and nothing is green."""
    one, ask = history("victim logged in at the same moment")
    status, out, _ = ask("incident", "list", "--json")
    told = json.loads(out)
    assert (status, named(told)) == (1, [INSIDER])
    name = told["incidents"][0]["id"]
    attribution = told["incidents"][0]["attribution"]
    assert any(str(VICTIM_B) in line for line in attribution["excluded"])
    _, shown, _ = ask("incident", "show", name)
    assert "login session 7" in shown
    assert "none of them is a person" in shown
    assert ask("incident", "report", name, "--kind", "plain", "--html", tmp_path / "p.html")[0] == 0
    assert "somebody else" in (tmp_path / "p.html").read_text()

    spool = one.home.run("attacked") / "spool"
    whole = spool.read_bytes()
    spool.write_bytes(whole.replace(b'"loginuid":1003', b'"loginuid":1002', 1))
    status, out, _ = ask("verdict", "attacked", "--json")
    assert (status, json.loads(out)["verdict"]) == (1, "TAINTED")
    spool.write_bytes(whole[: len(whole) // 2])
    status, out, _ = ask("verdict", "attacked", "--json")
    assert status != 0, "cut"
    assert "log" in {finding["check"] for finding in json.loads(out)["findings"]}
    spool.write_bytes(whole)
    journal = max((path for path in (one.home.log / "journal").iterdir()), key=lambda path: path.stat().st_size)
    journal.write_bytes(journal.read_bytes()[:-200])
    assert ask("log", "verify")[0] == 1, "the log was cut"


def test_s15_words_damage_way_on_and_a_package_that_another_python_believes(
    history: Callable[[str], tuple[Played, Ask]], tmp_path: Path
) -> None:
    """What is tainted, what is not, what it cost, from where to go on; and the bundle, by a bare interpreter."""
    one, ask = history("side file of a hook")
    _, out, _ = ask("lineage", "--json")
    words = {
        line["label"].split(" (")[0]: line["word"] for part in ("affected", "cleared") for line in json.loads(out)[part]
    }
    assert (words["run tuned"], words["tuned-6.pt"], words["run apart"]) == ("TAINTED", "TAINTED", "VERIFIED")
    _, out, _ = ask("damage", "--json")
    hours = json.loads(out)["hours"]
    assert one.truth.hours == pytest.approx(hours["likely"], rel=0.05)
    assert hours["low"] <= one.truth.hours <= hours["high"]
    _, out, _ = ask("recover", "attacked", "--json")
    assert json.loads(out)["checkpoint"]["place"].endswith("attacked-8.pt")
    name = json.loads(ask("incident", "list", "--json")[1])["incidents"][0]["id"]
    assert ask("incident", "export", name, "-o", tmp_path / "e.zip")[0] == 0
    extract = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract('verify.py', sys.argv[2])"
    subprocess.run([sys.executable, "-I", "-S", "-c", extract, tmp_path / "e.zip", tmp_path], check=True)
    bare = [sys.executable, "-I", "-S", tmp_path / "verify.py", tmp_path / "e.zip"]
    believed = subprocess.run(bare, capture_output=True, text=True, check=False, env={})
    assert believed.returncode == 0, believed.stdout + believed.stderr
