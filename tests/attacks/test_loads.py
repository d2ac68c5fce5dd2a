"""S1 and S2: code in the pickles of a checkpoint. By policy `stop` nothing of it runs; by `log` it is named."""

from __future__ import annotations

import gzip
import os
import pickle
import sys
from pathlib import Path

import joblib
import numpy
import pytest
import torch
from tests.helpers.guarded import Guarded, run

PYTHON = sys.executable
LOAD = """
import gzip, pickle, sys
import joblib, numpy, torch
from torch.distributed.checkpoint import FileSystemReader

torch.set_num_threads(1)

def attempt(name, load):
    try:
        load()
        print(name, "loaded")
    except RuntimeError as error:
        print(name, type(error).__name__, error)
    except AttributeError:
        print(name, "loaded")

attempt("good", lambda: torch.load("good.pt"))
attempt("torch", lambda: torch.load("base.pt", weights_only=False))
attempt("pickle", lambda: pickle.load(open("base.pkl", "rb")))
attempt("memory", lambda: pickle.loads(open("raw.bin", "rb").read()[1:]))
attempt("npy", lambda: numpy.load("o.npy", allow_pickle=True))
attempt("npz", lambda: list(numpy.load("o.npz", allow_pickle=True).values()))
attempt("gz", lambda: pickle.load(gzip.open("b.pkl.gz")))
attempt("joblib", lambda: joblib.load("b.joblib"))
attempt("dcp", lambda: FileSystemReader("dcp").read_metadata())
attempt("rng", lambda: torch.load("step-9/rng_state.pth", weights_only=False))
attempt("text", lambda: pickle.load(open("plain.pkl", "rb")))
"""
NAMES = ("torch", "pickle", "memory", "npy", "npz", "gz", "joblib", "dcp", "rng", "text")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path, *, shell: bool = False) -> None:
        self.marker = marker
        self.shell = shell

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"mkdir {self.marker}",)) if self.shell else (os.mkdir, (str(self.marker),))


def plant(folder: Path) -> None:
    """One file for each way to unpickle, and a clean one."""
    for name in ("dcp", "step-9"):
        (folder / name).mkdir()
    at = {name: Payload(folder / f"marker-{name}", shell=name == "memory") for name in NAMES}
    torch.save({"w": torch.ones(2)}, folder / "good.pt")
    torch.save({"w": torch.ones(2), "x": at["torch"]}, folder / "base.pt")
    torch.save({"cpu": torch.ones(2), "x": at["rng"]}, folder / "step-9" / "rng_state.pth")
    (folder / "base.pkl").write_bytes(pickle.dumps(at["pickle"]))
    (folder / "plain.pkl").write_bytes(pickle.dumps(at["text"], protocol=0))
    (folder / "raw.bin").write_bytes(b"!" + pickle.dumps(at["memory"]))
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(at["dcp"]))
    numpy.save(folder / "o.npy", numpy.array([at["npy"]], dtype=object), allow_pickle=True)
    numpy.savez(folder / "o.npz", x=numpy.array([at["npz"]], dtype=object))
    with gzip.open(folder / "b.pkl.gz", "wb") as file:
        file.write(pickle.dumps(at["gz"]))
    joblib.dump(at["joblib"], folder / "b.joblib", compress=3)


def load_all(folder: Path, policy: str) -> tuple[Guarded, dict[str, str]]:
    """Run LOAD under `policy`: how it ended, and what came of each attempt."""
    (folder / "load.py").write_text(LOAD)
    (folder / "policy.toml").write_text(f'load = "{policy}"\n')
    done = run(folder, PYTHON, "load.py", options=("--policy", "policy.toml"))
    told = {name: rest for name, _, rest in (line.partition(" ") for line in done.stdout.splitlines())}
    return done, told


def markers(folder: Path) -> set[str]:
    """Which payloads ran."""
    return {path.name.removeprefix("marker-") for path in folder.glob("marker-*")}


@pytest.mark.torch
@pytest.mark.slow
def test_by_policy_stop_no_payload_runs_whatever_loads_it(tmp_path: Path) -> None:
    """Ten ways in; before the first opcode of each the job gets one clear error, and the clean file loads."""
    plant(tmp_path)
    done, told = load_all(tmp_path, "stop")
    assert markers(tmp_path) == set()
    assert told.pop("good") == "loaded"
    assert set(told) == set(NAMES)
    for name, text in told.items():
        assert text.startswith("Refused trainguard did not let it be"), name
        assert "posix." in text
    assert done.verdict["verdict"] == "TAINTED"
    named = {Path(f["subject"]["path"]).name for f in done.by("scan") if f["outcome"] == "violated"}
    assert named == {
        *("base.pt", "base.pkl", "o.npy", "o.npz", "b.pkl.gz", "b.joblib", ".metadata", "rng_state.pth", "plain.pkl"),
    }
    assert {"E2"} == {f["techniques"][0] for f in done.by("scan") if Path(f["subject"]["path"]).name == ".metadata"}
    (memory,) = done.by("loads")
    assert "posix.system" in memory["message"]
    line = next(number for number, text in enumerate(LOAD.splitlines(), 1) if '"memory"' in text)
    assert memory["subject"]["path"].endswith(f"load.py:{line}")
    assert done.link("loads")["held"] == 1


@pytest.mark.torch
@pytest.mark.slow
def test_by_policy_log_the_job_is_left_alone_and_every_file_is_named(tmp_path: Path) -> None:
    """The control: without `stop` each payload runs, which shows that it could have."""
    plant(tmp_path)
    done, told = load_all(tmp_path, "log")
    assert markers(tmp_path) == set(NAMES)
    assert set(told.values()) == {"loaded"}
    assert done.verdict["verdict"] == "TAINTED"
    assert len({f["subject"]["path"] for f in done.by("scan") if f["outcome"] == "violated"}) == 9


HONEST = """
import io, multiprocessing, os, pickle, shutil, zipfile
import numpy, torch
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)

def main():
    for worker_batch in DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, num_workers=1):
        pass
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.map(os.system, ["true"])
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2), "rng": numpy.random.RandomState(0).get_state()}, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=False)
    pickle.loads(pickle.dumps({"cache": [numpy.eye(2), os.path.join, shutil.copyfile]}))
    numpy.savez("data.npz", x=numpy.eye(3))
    numpy.load("data.npz")["x"]
    with zipfile.ZipFile("data.zip", "w") as archive:
        archive.writestr("tool.py", "import os; os.system('true')")
        archive.comment = b"a comment that no model reader would accept"
    zipfile.ZipFile("data.zip").read("tool.py")
    torch.save({"w": torch.ones(2)}, "best.pt")
    torch.load("best.pt")
    print("done")

if __name__ == "__main__":
    main()
"""


@pytest.mark.torch
@pytest.mark.slow
def test_honest_loading_is_let_be_even_by_stop(tmp_path: Path) -> None:
    """Workers, process pools, pickles in memory, data archives, what the run itself saved: no refusal, no finding."""
    (tmp_path / "train.py").write_text(HONEST)
    (tmp_path / "policy.toml").write_text('load = "stop"\n')
    done = run(tmp_path, PYTHON, "train.py", options=("--policy", "policy.toml"))
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
    assert not done.by("loads")
    assert not done.by("scan")
    assert not done.by("seal")


UNKNOWN = """
import os, pickle, sys
for name in ("unknown.pkl", "unknown.pkl"):
    try:
        print(pickle.load(open(name, "rb")))
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_nobody_vetted_is_refused_until_the_policy_trusts_it_by_name(tmp_path: Path) -> None:
    """Unknown is not safe; the message has the line for the policy. With `log` it is a reason for blindness."""
    import string

    (tmp_path / "unknown.pkl").write_bytes(pickle.dumps({"t": string.Template("x")}))
    (tmp_path / "load.py").write_text(UNKNOWN)
    (tmp_path / "stop.toml").write_text('load = "stop"\n')
    (tmp_path / "trust.toml").write_text('load = "stop"\nload_trust = ["string.Template instance"]\n')
    stopped = run(tmp_path, PYTHON, "load.py", options=("--policy", "stop.toml"))
    assert stopped.stdout.count("load_trust = ['string.Template instance']") == 2
    assert {f["outcome"] for f in stopped.by("loads")} == {"suspicious"}
    trusted = run(tmp_path, PYTHON, "load.py", options=("--policy", "trust.toml"))
    assert trusted.stdout.count("Template") == 2
    assert not trusted.by("loads")
    logged = run(tmp_path, PYTHON, "load.py")
    assert logged.stdout.count("Template") == 2
    assert not logged.by("loads")
    assert "not known to be safe" in logged.link("loads")["blind"][0]
