"""Honest handling of sealed checkpoints yields no finding."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tests.helpers.checkpoints import home, save_file, save_folder, seal

from trainguard.home import Home
from trainguard.seal import SealReport, seal_path, verify_seal
from trainguard.seal.manifest import seal_path_of

pytestmark = pytest.mark.torch


@pytest.fixture
def where(tmp_path: Path) -> Home:
    return home(tmp_path)


def silent(report: SealReport) -> bool:
    """Upheld, everything checked, nothing to say."""
    everything = ("signature", "logged", "newest", "content")
    return report.status == "upheld" and not report.findings and report.checked == everything


def test_a_sealed_folder_verifies_elsewhere(tmp_path: Path, where: Home) -> None:
    """Copied without and with its times and modes, moved, renamed."""
    path = save_folder(tmp_path / "step-9", 9)
    seal(where, path, 9)
    (tmp_path / "backup").mkdir()
    shutil.copytree(path, tmp_path / "backup" / "step-9")
    subprocess.run(["cp", "-a", path, tmp_path / "another-name"], check=True)
    assert silent(verify_seal(tmp_path / "backup" / "step-9", home=where))
    assert silent(verify_seal(tmp_path / "another-name", home=where))
    path.rename(tmp_path / "moved")
    assert silent(verify_seal(tmp_path / "moved", home=where))


def test_a_sealed_file_verifies_under_another_name(tmp_path: Path, where: Home) -> None:
    """`cp ckpt.pt best.pt`, with its seal."""
    path = save_file(tmp_path / "ckpt.pt", 9)
    seal(where, path, 9)
    best = Path(shutil.copy(path, tmp_path / "best.pt"))
    shutil.copy(seal_path_of(path), seal_path_of(best))
    assert silent(verify_seal(best, home=where))


def test_times_umask_and_listing_order_do_not_matter(tmp_path: Path, where: Home) -> None:
    """touch, chmod go-rwx, a file written again with the same bytes."""
    path = save_folder(tmp_path / "c", 9)
    seal(where, path, 9)
    for file in path.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    config = path / "config.json"
    data = config.read_bytes()
    config.unlink()
    config.write_bytes(data)
    config.chmod(0o664)
    assert silent(verify_seal(path, home=where))


def test_verifying_many_times_leaves_nothing_behind(tmp_path: Path, where: Home) -> None:
    """The checkpoint, the home and the log are as they were."""
    path = save_folder(tmp_path / "c", 9)
    seal(where, path, 9)
    before = {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))}
    for _ in range(20):
        assert silent(verify_seal(path, home=where))
    assert {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*"))} == before


def test_a_training_run_that_keeps_its_last_three(tmp_path: Path, where: Home) -> None:
    """Seals chained by run, old checkpoints deleted by retention: those that are left are all silent."""
    kept: list[Path] = []
    for step in range(100, 900, 100):
        kept.append(save_file(tmp_path / f"{step}.pt", step))
        seal(where, kept[-1], step)
        while len(kept) > 3:
            old = kept.pop(0)
            old.unlink()
            seal_path_of(old).unlink()
        assert silent(verify_seal(kept[-1], home=where, newest=True))
    assert all(silent(verify_seal(path, home=where)) for path in kept)


def test_a_resumed_run_that_does_steps_again(tmp_path: Path, where: Home) -> None:
    """After a crash at 300, steps 200 and 300 are saved anew with the same bytes, then 400."""
    for step in (100, 200, 300, 200, 300, 400):
        path = save_file(tmp_path / f"{step}.pt", step)
        seal(where, path, step)
    assert all(silent(verify_seal(tmp_path / f"{step}.pt", home=where)) for step in (100, 200, 300, 400))


def test_sealing_the_same_again_is_silent(tmp_path: Path, where: Home) -> None:
    """A script that seals twice, with and without run and step."""
    path = save_file(tmp_path / "c.pt", 9)
    for run, step in (("run-a", 9), ("run-a", 9), (None, None)):
        assert seal(where, path, step, run).status == "upheld"
        assert silent(verify_seal(path, home=where))


def test_files_that_never_change_may_be_sealed_at_every_step(tmp_path: Path, where: Home) -> None:
    """A tokenizer is the same at step 100 and 200; only tensors are expected to move."""
    for step in (100, 200):
        path = tmp_path / f"tokenizer-{step}"
        path.mkdir()
        (path / "tokenizer.json").write_text("{}")
        seal(where, path, step)
        assert silent(verify_seal(path, home=where))


def test_a_run_may_save_twice_in_a_step_and_save_what_it_does_not_train(tmp_path: Path, where: Home) -> None:
    """`last.pt` again after the evaluation; a frozen base model and an unused RNG state at every step."""
    last, base, rng = (tmp_path / name for name in ("last.pt", "base.pt", "rng_state.pth"))
    torch.save({"w": torch.ones(3)}, base)
    torch.save({"cpu": torch.zeros(5, dtype=torch.uint8)}, rng)
    for step in (100, 200):
        for attempt in (0, 1):
            torch.save({"w": torch.full((3,), float(step)), "loss": attempt}, last)
            for path in (last, base, rng):
                assert not seal_path(where, path, run="run-a", step=step, source="run").findings
    assert all(silent(verify_seal(path, home=where)) for path in (last, base, rng))
    seal(where, last, 200)
    seal(where, rng, 200)
    assert silent(verify_seal(last, home=where))
    assert silent(verify_seal(rng, home=where))


def test_a_run_that_keeps_only_its_best(tmp_path: Path, where: Home) -> None:
    """Retention deleted what came after the best: noted, not held against it, unless the newest is asked for."""
    for step in (100, 200, 300):
        path = save_file(tmp_path / f"{step}.pt", step)
        seal_path(where, path, run="run-a", step=step, source="run")
    for step in (100, 300):
        (tmp_path / f"{step}.pt").unlink()
    report = verify_seal(tmp_path / "200.pt", home=where)
    assert silent(report)
    assert report.notes == ("every later checkpoint of the run is gone: 300.pt (run run-a, step 300, leaf 5)",)
    assert verify_seal(tmp_path / "200.pt", home=where, newest=True).status == "violated"


def test_runs_sealing_at_once_do_not_disturb_each_other(tmp_path: Path, where: Home) -> None:
    """Four runs, one home and one log."""
    where.prepare()
    failures: list[BaseException] = []

    def work(run: str) -> None:
        try:
            for step in (1, 2, 3):
                path = save_file(tmp_path / f"{run}-{step}.pt", step)
                report = seal_path(where, path, run=run, step=step)
                if report.findings:
                    raise RuntimeError(report.findings)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"run-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(silent(verify_seal(path, home=where)) for path in tmp_path.glob("*.pt"))


def test_a_folder_with_links_inside_git_files_and_empty_folders(tmp_path: Path, where: Home) -> None:
    """What a clone of a model repository looks like."""
    path = save_folder(tmp_path / "c", 1)
    (path / "pytorch_model.safetensors").symlink_to("model-00001-of-00002.safetensors")
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (path / ".git" / "refs").mkdir(parents=True)
    (path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    seal(where, path, 1)
    assert silent(verify_seal(path, home=where))
    subprocess.run(["cp", "-a", path, tmp_path / "clone"], check=True)
    assert silent(verify_seal(tmp_path / "clone", home=where))


def test_a_key_alone_is_enough_elsewhere(tmp_path: Path, where: Home) -> None:
    """On another machine, with the public keys only: upheld, and it says what it could not check."""
    path = save_file(tmp_path / "c.pt", 1)
    seal(where, path, 1)
    key, log_key = where.keys / "attestation.pub", (where.keys / "log.vkey").read_text().strip()
    for chosen, checked in ((None, ("signature", "content")), (log_key, ("signature", "logged", "content"))):
        report = verify_seal(path, home=Home(tmp_path / "nothing"), key=key, log_key=chosen)
        assert (report.status, report.checked) == ("upheld", checked)
        assert [f.outcome for f in report.findings] == ["not_checked"]


@pytest.mark.parametrize("hash_type", ["sha256", "blake3"])
def test_saving_through_the_tee_gives_the_same_file(tmp_path: Path, where: Home, hash_type: str) -> None:
    """Bit for bit what torch.save writes by itself, and the digest is the file's."""
    from trainguard.seal.hashing import TeeHash

    value = {"w": torch.arange(300_000, dtype=torch.float32), "s": 3}
    torch.save(value, tmp_path / "plain.pt")
    with (tmp_path / "tee.pt").open("wb") as file:
        tee = TeeHash(file, hash_type)
        torch.save(value, tee)
    assert tee.size == (tmp_path / "tee.pt").stat().st_size
    loaded = torch.load(tmp_path / "tee.pt", weights_only=True)
    assert torch.equal(loaded["w"], value["w"])
    report = seal_path(where, tmp_path / "tee.pt", run="r", step=1, live_digest=tee.digest(), hash_type=hash_type)
    assert (report.status, report.live) == ("upheld", "equal")
    assert silent(verify_seal(tmp_path / "tee.pt", home=where))


def test_the_verbs_are_silent_too(tmp_path: Path) -> None:
    """--quiet prints nothing at all, status 0."""
    path = save_file(tmp_path / "c.pt", 1)
    env = {**os.environ, "TRAINGUARD_HOME": str(tmp_path / "state")}
    for verb in (["seal", "--run", "r", "--step", "1"], ["verify"]):
        command = [sys.executable, "-m", "trainguard", *verb, "--quiet", str(path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
