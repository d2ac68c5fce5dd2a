"""SARIF 2.1.0: the shape code scanning dashboards need, and that nothing reads as clean that was not read."""

from __future__ import annotations

import json
from pathlib import Path

from trainguard.render.sarif import sarif
from trainguard.scan import vet
from trainguard.testing.forge import BENIGN, named, stream, torch_zip, touch


def log_of(path: Path) -> dict:
    """The one run of the log, after a trip through JSON."""
    log = json.loads(json.dumps(sarif([vet(path)])))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    return run


def test_clean_file_has_no_results(tmp_path: Path) -> None:
    """An artifact with its hash, no result, execution successful."""
    (tmp_path / "a.pkl").write_bytes(BENIGN)
    run = log_of(tmp_path)
    assert run["results"] == []
    assert run["invocations"] == [{"executionSuccessful": True}]
    assert run["artifacts"][0]["hashes"]["sha-256"]


def test_results_have_level_place_and_rule(tmp_path: Path) -> None:
    """Unsafe is an error, unknown a warning; the rule is declared; the place is the file and the member."""
    (tmp_path / "a b.pt").write_bytes(torch_zip(stream(touch("x"))))
    (tmp_path / "b.pkl").write_bytes(stream(named("mine", "C") + b")\x81"))
    run = log_of(tmp_path)
    assert {result["level"] for result in run["results"]} == {"error", "warning"}
    declared = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert declared == {result["ruleId"] for result in run["results"]}
    assert "scan/global" in declared
    places = {result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for result in run["results"]}
    assert any(place.endswith("a%20b.pt") for place in places)
    (inside,) = [result for result in run["results"] if result["level"] == "error"]
    assert inside["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == "archive/data.pkl"
    assert all(result["message"]["text"] and result["partialFingerprints"] for result in run["results"])


def test_unread_file_makes_the_run_unsuccessful(tmp_path: Path) -> None:
    """A file that could not be judged is a result and says so."""
    run = log_of(tmp_path / "missing")
    assert run["invocations"] == [{"executionSuccessful": False}]
    assert [result["level"] for result in run["results"]] == ["note"]
