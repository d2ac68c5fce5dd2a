"""`trainguard audit --ranks-in-turn`: a job of several ranks is replayed with one process at a time."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.e2e.test_audit import audit, replays
from tests.e2e.test_audit_ranks import ACT, record

from trainguard.archive import LogLeaves
from trainguard.home import Home

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]
"""A replay starts about as many processes as it has steps and ranks."""


def test_a_fault_that_waits_for_four_ranks_is_found_by_one_process(tmp_path: Path) -> None:
    """S6 and S9: there never are two ranks at once here, let alone four, and still everything that asks finds four."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "sitecustomize.py").write_text(ACT.replace("seen[0] == 13", "seen[0] == 5"))
    record(tmp_path, 4, PYTHONPATH=str(plant))
    status, verdict = audit(tmp_path, "--segments", "0", "--ranks-in-turn")
    assert (status, verdict["verdict"]) == (1, "TAINTED")
    (finding,) = replays(verdict)
    assert finding["outcome"] == "violated"
    assert (finding["subject"]["step"], finding["subject"]["rank"]) == (5, 2)
    assert finding["techniques"][0] == "F2"
    assert "rank 2 gave -1 times its gradient to the reduction" in finding["message"]
    assert "clean small test run proves nothing" in finding["message"]


def test_two_clean_ranks_are_equal_from_their_sealed_states(tmp_path: Path) -> None:
    """Where the warp goes forward no rank waits for another; behind it all of them reduce for real."""
    record(tmp_path, 2)
    status, verdict = audit(tmp_path, "--segments", "2", "--ranks-in-turn")
    assert (status, replays(verdict)) == (0, [])
    home = Home(tmp_path / ".trainguard")
    (body,) = LogLeaves(home).audits["r"]
    report = msgspec.json.decode(home.blob(body["report"]))
    (result,) = report["results"]
    assert (result["way"], result["outcome"], result["compared"]) == ("warp", "equal", 8)
    assert report["environment"]["ranks"] == "in turn, one process at a time (2)"
