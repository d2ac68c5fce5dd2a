"""`trainguard probe`: launchers are taken off a command; wrong options are one sentence."""

from pathlib import Path

import pytest

from trainguard.cli.probe import _identity, _sizes, unwrapped
from trainguard.errors import Misuse


@pytest.mark.parametrize(
    ("command", "alone"),
    [
        ("python train.py --lr 1", "python train.py --lr 1"),
        ("python3 -m torch.distributed.run --nproc-per-node 8 train.py x", "python3 train.py x"),
        ("python -m torch.distributed.run --nproc-per-node=8 --standalone train.py", "python train.py"),
        ("python -m torch.distributed.run --nnodes 2 -m package.train --lr 1", "python -m package.train --lr 1"),
        ("python -m accelerate.commands.launch --num_processes 8 --multi_gpu t.py", "python t.py"),
        ("python -m torch.distributed.runner x", "python -m torch.distributed.runner x"),
    ],
)
def test_a_launcher_is_taken_off(command: str, alone: str) -> None:
    """What remains is what every rank runs."""
    assert unwrapped(command.split()) == alone.split()


def test_torchrun_leaves_the_interpreter_of_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script must run in the environment that torchrun belongs to."""
    (tmp_path / "torchrun").write_text("#!/opt/env/bin/python3\n")
    (tmp_path / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unwrapped(["torchrun", "--nproc-per-node", "2", "t.py"]) == ["/opt/env/bin/python3", "t.py"]
    with pytest.raises(Misuse, match="accelerate: no such command"):
        unwrapped(["accelerate", "launch", "t.py"])


def test_a_launcher_without_a_script_is_a_usage_error() -> None:
    """The next step says what to give."""
    with pytest.raises(Misuse, match="expected a script"):
        unwrapped(["python", "-m", "torch.distributed.run", "--standalone"])


@pytest.mark.parametrize("text", ["", "0", "1", "x", "256,-1", "99999999", ",".join(["4"] * 17)])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    """Bounded whole numbers from 2 up."""
    with pytest.raises(Misuse, match="--world-size"):
        _sizes(text)


def test_sizes_are_sorted_and_told_once() -> None:
    """The order of the options does not matter."""
    assert _sizes("4096, 256,256") == [256, 4096]


@pytest.mark.parametrize("text", ["host", "host=", "shell=x", "gpus=many", "time=yesterday"])
def test_identities_that_are_none_are_refused(text: str) -> None:
    """Known names with values of their kind."""
    with pytest.raises(Misuse, match="--as"):
        _identity(text)
