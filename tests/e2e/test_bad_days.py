"""Everything that can go wrong around a run: one clear sentence, the right status, nothing acknowledged lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import clean_environment, run, trainguard

from trainguard.errors import TrainguardError
from trainguard.home import Home
from trainguard.log import LogReader

PYTHON = sys.executable
STEPS = """
import sys, time, torch
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    optimizer.zero_grad(); model(torch.ones(3, 4)).pow(2).mean().backward(); optimizer.step()
    if len(sys.argv) > 2: print(step, flush=True); time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "steps.py").write_text(STEPS)
    return tmp_path


def start(project: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PYTHON, "-m", "trainguard", "run", "--name", "r", "--json", "--", *command],
        cwd=project,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    """Read the command's stdout until `line`."""
    if process.stdout is None:
        raise AssertionError("stdout is not piped")
    for read in process.stdout:
        if read.strip() == line:
            return
    raise AssertionError(f"the command ended before it printed {line!r}")


def test_a_command_that_does_not_exist_is_a_usage_error(project: Path) -> None:
    """Status 2 and one sentence with the next step; the run is on record as never started."""
    done = trainguard(project, "run", "--name", "r", "--", "no-such-command")
    assert done.returncode == 2
    assert "no-such-command: no such command" in done.stderr
    assert "next: check its spelling" in done.stderr
    verdict = json.loads(trainguard(project, "verdict", "r", "--json").stdout)
    assert verdict["verdict"] == "UNKNOWN"
    assert any("was not started" in reason for reason in verdict["reasons"])


def test_a_crash_keeps_its_status_and_its_traceback(project: Path) -> None:
    """The command's own stderr and status pass through."""
    done = run(project, PYTHON, "-c", "raise ValueError('of the script')")
    assert done.status == 1
    assert "ValueError: of the script" in done.stderr


@pytest.mark.parametrize("status", [1, 3, 42, 255])
def test_an_exit_status_passes_through(project: Path, status: int) -> None:
    """Whatever the command returns is what `run` returns."""
    assert run(project, "sh", "-c", f"exit {status}").status == status


def test_standard_streams_pass_through(project: Path) -> None:
    """stdin reaches the command; its stdout is its own but for our one last line."""
    done = subprocess.run(
        [PYTHON, "-m", "trainguard", "run", "--quiet", "--", "cat"],
        cwd=project,
        env=clean_environment(),
        input=b"bytes \x00\xff",
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"bytes \x00\xff"
    assert done.stderr == b""


def test_a_command_killed_by_a_signal_ends_us_by_that_signal(project: Path) -> None:
    """Whoever waits for us sees the signal, as without us."""
    done = run(project, PYTHON, "-c", "import os; os.kill(os.getpid(), 9)")
    assert done.status == -signal.SIGKILL
    assert any("SIGKILL" in reason for reason in done.verdict["reasons"])


def test_an_interrupted_run_is_recorded_to_its_end(project: Path) -> None:
    """SIGTERM to us reaches the command; what was recorded stays, and the verdict is not VERIFIED."""
    process = start(project, PYTHON, "steps.py", "400", "0.05")
    wait_for_line(process, "5")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    verdict = json.loads(out.splitlines()[-1])
    assert verdict["verdict"] == "UNKNOWN"
    assert verdict["coverage"]["steps"] >= 5


def test_a_killed_supervisor_never_harms_training_and_is_a_finding(project: Path) -> None:
    """Training finishes without us; the record ends without an end, which is G7."""
    process = start(project, "sh", "-c", f"{PYTHON} steps.py 120 0.05; echo $? > status")
    wait_for_line(process, "80")  # four seconds of steps: two segments are sealed by then
    process.kill()
    process.communicate(timeout=60)  # the pipe closes when the orphaned command is done
    assert (project / "status").read_text() == "0\n"
    verdict = json.loads(trainguard(project, "verdict", "r", "--json").stdout)
    assert verdict["verdict"] == "SUSPECT"
    (finding,) = (f for f in verdict["findings"] if f["check"] == "processes")
    assert finding["techniques"][0] == "G7"
    assert verdict["coverage"]["steps"] > 0


def test_a_child_that_escapes_is_named(project: Path) -> None:
    """`python -I` loads no boot file: the record names the command that started it."""
    done = run(project, PYTHON, "-c", f"import subprocess; subprocess.run([{PYTHON!r}, '-I', '-c', 'pass'])")
    findings = [f for f in done.by("processes") if f["outcome"] == "suspicious"]
    assert findings
    assert "-I" in findings[0]["message"]
    assert findings[0]["techniques"][0] == "G4"


def test_a_state_folder_that_cannot_be_written_is_refused_before_the_start(project: Path) -> None:
    """Nothing runs unrecorded by accident: status 3, one sentence, and the command did not start."""
    (project / "blocked").write_text("a file, not a folder")
    done = trainguard(project, "run", "--", "touch", "ran", env={"TRAINGUARD_HOME": str(project / "blocked")})
    assert done.returncode == 3
    assert "state folder cannot be made" in done.stderr
    assert not (project / "ran").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes read-only folders")
def test_a_read_only_state_folder_is_refused_before_the_start(project: Path) -> None:
    """As above, by permission."""
    (project / ".trainguard").mkdir(mode=0o500)
    done = trainguard(project, "run", "--", "touch", "ran")
    assert done.returncode == 3
    assert not (project / "ran").exists()


def test_a_run_name_is_used_once(project: Path) -> None:
    """A second run of the same name is refused before it starts."""
    run(project, "true", options=("--name", "r"))
    done = trainguard(project, "run", "--name", "r", "--", "touch", "ran")
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert not (project / "ran").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lock"),
        ("{}", "lock"),
        ('{"schema": "trainguard/lock/v99"}', "v99"),
        ("[" * 100_000, "lock"),
    ],
)
def test_a_lock_that_cannot_be_read_stops_the_run(project: Path, text: str, says: str) -> None:
    """Another version, truncation or junk: one sentence, a failing status, nothing started."""
    (project / "trainguard.lock").write_text(text)
    done = trainguard(project, "run", "--", "touch", "ran")
    assert done.returncode in (1, 2, 3)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "ran").exists()


def sealed(project: Path) -> Home:
    """A finished run called r."""
    run(project, PYTHON, "-c", "pass", options=("--name", "r"))
    return Home(project / ".trainguard")


def test_a_truncated_spool_is_suspicious_and_named(project: Path) -> None:
    """The log still knows how long the record was."""
    home = sealed(project)
    spool = home.run("r") / "spool"
    os.truncate(spool, spool.stat().st_size // 2)
    done = trainguard(project, "verdict", "r", "--json")
    verdict = json.loads(done.stdout)
    assert done.returncode == 3
    assert verdict["verdict"] == "SUSPECT"
    finding = verdict["findings"][0]
    assert (finding["check"], finding["techniques"][0]) == ("log", "G2")


def test_an_edited_spool_is_violated_and_named(project: Path) -> None:
    """One changed byte of sealed evidence."""
    home = sealed(project)
    spool = home.run("r") / "spool"
    data = bytearray(spool.read_bytes())
    data[len(data) // 2] ^= 1
    spool.write_bytes(data)
    done = trainguard(project, "verdict", "r", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["findings"][0]["techniques"][0] == "G1"


def test_one_flipped_bit_in_any_file_of_the_log_is_found(project: Path) -> None:
    """`log verify` fails with 1 or 3 and one sentence, whichever file was touched."""
    home = sealed(project)
    files = [p for p in sorted(home.log.rglob("*")) if p.is_file() and p.stat().st_size and p.suffix != ".lock"]
    reader_ok = trainguard(project, "log", "verify")
    assert reader_ok.returncode == 0, reader_ok.stderr
    assert LogReader(home.log, home.keys / "log.vkey").head().size > 0
    for path in files:
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[len(flipped) // 2] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(TrainguardError):
            LogReader(home.log, home.keys / "log.vkey").verify()
        path.write_bytes(original)
