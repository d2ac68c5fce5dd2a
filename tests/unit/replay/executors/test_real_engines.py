"""The same tasks on the real engines, where they are: a Slurm and a Ray that the test starts itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from tests.helpers import slurm
from tests.unit.replay.executors.test_engines import WORKER, performed

from trainguard.replay.executors import chosen
from trainguard.replay.tasks import NotPerformed

pytestmark = pytest.mark.nightly


@pytest.fixture
def worker(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return (sys.executable, str(path))


@pytest.mark.timeout(400)
def test_a_real_slurm_performs_an_array_of_tasks(
    tmp_path: Path, worker: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """munged, slurmctld and slurmd on loopback; sbatch takes one array; every outcome comes back, a failure is said."""
    pytest.importorskip("submitit")
    if (why := slurm.missing()) is not None:
        pytest.skip(f"no Slurm: {why}")
    (tmp_path / "cluster").mkdir()
    with slurm.cluster(tmp_path / "cluster") as env:
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, env[name])
        executor = chosen("slurm", worker=worker, settings={"slurm_partition": "audit", "cpus_per_task": "1"})
        assert performed(executor, tmp_path, 4, 5, 6) == ["node", "node", "node"]
        assert len(list((tmp_path / "slurm").glob("*_submission.sh"))) == 1
        with pytest.raises(NotPerformed, match=r"1 of 1 tasks left no outcome: job .* ended with status 1"):
            performed(executor, tmp_path, 13)


@pytest.mark.timeout(400)
def test_a_real_ray_performs_tasks(tmp_path: Path, worker: tuple[str, ...]) -> None:
    """A Ray of this machine, for as long as the audit runs; outcomes come back, a failure is said."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    import ray

    executor = chosen("ray", worker=worker, settings={"num_cpus": "1"})
    assert performed(executor, tmp_path, 4, 5) == ["node", "node"]
    assert not ray.is_initialized()
    with pytest.raises(NotPerformed, match="no room here"):
        performed(executor, tmp_path, 13)
