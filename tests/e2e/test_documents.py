"""Every document on an incident by its verb, from a log, with the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainguard.cli import main
from trainguard.testing.incidents import SCRIPTS, play


def test_each_verb_writes_its_document_and_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = play(next(each for each in SCRIPTS if each.name == "rank killed by a planted line"), tmp_path, seed=1)
    monkeypatch.setenv("TRAINGUARD_HOME", str(played.home.root))

    def written(*words: str) -> str:
        pages = []
        for name in ("one.html", "two.html"):
            assert main([*words, "--html", str(tmp_path / name)]) in (0, 1, 3)
            pages.append((tmp_path / name).read_text())
        assert pages[0] == pages[1]
        return pages[0]

    assert main(["incident", "list", "--json"]) == 1
    name = json.loads(capsys.readouterr().out)["incidents"][0]["id"]
    assert "Notice of an incident" in written("incident", "report", name, "--kind", "flash")
    assert "What follows from it" in written("incident", "report", name, "--kind", "plain")
    assert "Incident report" in written("incident", "report", name)
    assert "work lost with a killed process" in written("damage")
    plan = written("recover", "attacked")
    assert "attacked-8.pt" in plan
    assert "not a certificate" in plan
    with pytest.raises(SystemExit) as refused:
        main(["incident", "report", name])
    assert refused.value.code == 2
