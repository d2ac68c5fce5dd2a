"""What a command resolves to, without running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainguard.errors import Misuse
from trainguard.measure.command import Resolved, resolve
from trainguard.testing.installed import InstalledEnvironment


@pytest.fixture
def place(tmp_path: Path) -> InstalledEnvironment:
    made = InstalledEnvironment(tmp_path)
    for name in ("train.py", "pkg/__init__.py", "pkg/train.py"):
        (made.job / name).parent.mkdir(exist_ok=True)
        (made.job / name).write_text("")
    made.install("torchish", "1.0", {"torchish.py": ""}, scripts={"torchrun": "main()\n", "accelerate": "main()\n"})
    return made


def resolved(place: InstalledEnvironment, *argv: str, **variables: str) -> Resolved:
    return resolve(argv, cwd=place.job, env=place.environment | variables)


@pytest.mark.parametrize(
    ("argv", "kind", "script", "module"),
    [
        (["python", "train.py", "--lr", "1"], "script", "train.py", None),
        (["python", "-u", "-X", "dev", "-W", "error", "train.py"], "script", "train.py", None),
        (["python", "-m", "pkg.train"], "module", None, "pkg.train"),
        (["python", "-um", "pkg.train"], "module", None, "pkg.train"),
        (["python", "-c", "print(1)", "train.py"], "code", None, None),
        (["python", "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py"], "module", "train.py",
         "torch.distributed.run"),
        (["torchrun", "--nproc_per_node", "2", "train.py", "--lr", "1"], "console", "train.py", None),
        (["torchrun", "-m", "pkg.train"], "console", None, "pkg.train"),
        (["accelerate", "launch", "train.py"], "console", "train.py", None),
        (["env", "A=1", "nice", "python", "train.py"], "script", "train.py", None),
        (["bash", "-c", "python train.py --lr 1"], "shell", "train.py", None),
    ],
)  # fmt: skip
def test_the_interpreter_and_the_script_are_found_behind_every_launcher(
    place: InstalledEnvironment, argv: list[str], kind: str, script: str | None, module: str | None
) -> None:
    found = resolved(place, *argv)
    assert (found.kind, found.module) == (kind, module)
    assert found.script == (place.job / script if script else None)
    assert found.interpreter == place.python


def test_a_shell_script_is_followed_to_the_first_python_it_names(place: InstalledEnvironment) -> None:
    script = place.job / "start.sh"
    script.write_text("#!/bin/bash\n# python old.py\nset -e\nexport A=1\nexec torchrun \\\n  --nnodes 1 train.py\n")
    script.chmod(0o755)
    found = resolved(place, "./start.sh")
    assert (found.kind, found.script, found.interpreter) == ("shell", place.job / "train.py", place.python)
    assert [step.path.name for step in found.steps] == ["start.sh", "bash", "torchrun", "python"]


def test_a_script_with_its_own_first_line_is_a_script(place: InstalledEnvironment) -> None:
    script = place.job / "train.py"
    script.write_text("#!/usr/bin/env python\n")
    script.chmod(0o755)
    found = resolved(place, "./train.py")
    assert (found.kind, found.script, found.interpreter) == ("script", script, place.python)


def test_behind_uv_the_projects_own_environment_is_measured_and_behind_conda_it_is_said(
    place: InstalledEnvironment,
) -> None:
    for name in ("uv", "conda"):
        (place.prefix / "bin" / name).write_bytes(b"\x7fELF")
        (place.prefix / "bin" / name).chmod(0o755)
    own = place.job / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.symlink_to(place.python)
    found = resolved(place, "uv", "run", "python", "train.py")
    assert (found.interpreter, found.notes) == (own, [])
    found = resolved(place, "conda", "run", "-n", "x", "python", "train.py")
    assert "may start another Python" in found.notes[0]


def test_a_command_without_python_says_so(place: InstalledEnvironment) -> None:
    found = resolved(place, "/bin/true")
    assert found.interpreter is None
    assert "no Python interpreter" in found.notes[0]


@pytest.mark.parametrize("argv", [[], ["no-such-program"], ["./absent.sh"]])
def test_a_command_that_names_no_program_is_misuse(place: InstalledEnvironment, argv: list[str]) -> None:
    with pytest.raises(Misuse):
        resolved(place, *argv)
