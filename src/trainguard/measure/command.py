"""What a command really starts: the chain of programs, the interpreter at its end, and the script it is given.

Nothing is executed here. `python train.py`, `python -m pkg`, `torchrun train.py`, any console script (through its
`#!` line), `env A=1 nice python …` (the first later word that is a Python program), and shell scripts (the first word
in their text that names Python or a launcher) are resolved; for anything else the interpreter is None, which the
caller turns into a note.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainguard.errors import Misuse
from trainguard.measure.files import read_small

PYTHON = re.compile(r"(python|pypy)[0-9.]*t?")
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh"})
LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch", "deepspeed")
VALUE_OPTIONS = frozenset({"-W", "-X", "--check-hash-based-pycs"})
"""Options of Python that take the next word as their value."""

SWITCHING = frozenset(
    {"uv", "poetry", "pipenv", "pdm", "hatch", "pixi", "conda", "mamba", "micromamba", "docker", "podman", "nerdctl"}
    | {"singularity", "apptainer", "ssh", "sudo", "su", "kubectl"}
)
"""Programs that start what follows in another environment than ours: another Python may be the one that runs."""

SCRIPT_WORDS = re.compile(r"(?<![\w/.-])((?:[\w./-]*/)?(?:python[0-9.]*|torchrun|accelerate|deepspeed))(?=\s)")
SHELL_SCRIPT_LIMIT_BYTES = 1 << 20
SHEBANG_LIMIT_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One program of the chain."""

    role: str
    """command, launcher or interpreter; see lockfile.Program."""
    path: Path


@dataclass(slots=True)
class Resolved:
    """What a command resolves to."""

    kind: str = "binary"
    steps: list[Step] = field(default_factory=list)
    interpreter: Path | None = None
    """The Python executable as it would be called: a virtual environment's link is not followed."""
    options: list[str] = field(default_factory=list)
    """Options before the script, such as -I, -O and -W."""
    script: Path | None = None
    module: str | None = None
    notes: list[str] = field(default_factory=list)


def resolve(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Resolved:
    """See the module. Raises Misuse when the first word names no program."""
    if not argv:
        raise Misuse("no command given", next_step="put it after --, as in: trainguard lock -- python train.py")
    found = Resolved()
    program = _which(argv[0], cwd, env)
    if program is None:
        raise Misuse(f"{argv[0]}: no such program on PATH or below {cwd}")
    _follow(found, program, list(argv[1:]), cwd, env)
    if found.interpreter is None:
        found.notes.append(
            f"{argv[0]}: no Python interpreter could be found in this command; packages were not measured"
        )
    return found


def _follow(found: Resolved, program: Path, rest: list[str], cwd: Path, env: Mapping[str, str]) -> None:
    name = program.name
    if PYTHON.fullmatch(name):
        found.steps.append(Step(role="interpreter", path=program))
        found.interpreter = program
        _python_words(found, rest, cwd)
    elif name in SHELLS:
        found.steps.append(Step(role="command", path=program))
        _shell_words(found, rest, cwd, env)
    elif (shebang := _shebang(program)) is not None:
        _script_program(found, program, shebang, rest, cwd, env)
    else:
        found.steps.append(Step(role="command", path=program))
        _wrapped(found, rest, cwd, env)


def _script_program(
    found: Resolved, program: Path, shebang: list[str], rest: list[str], cwd: Path, env: Mapping[str, str]
) -> None:
    """A file that starts with `#!`: a console script or a shell script."""
    found.steps.append(Step(role="launcher", path=program))
    words = [word for word in shebang if not (word == "-S" or "=" in word)]
    if Path(words[0]).name == "env" and len(words) > 1:
        words = words[1:]
    runner = _which(words[0], cwd, env)
    if runner is None:
        found.notes.append(f"{program}: its interpreter {words[0]} does not exist")
    elif PYTHON.fullmatch(runner.name):
        found.steps.append(Step(role="interpreter", path=runner))
        found.kind, found.interpreter, found.options = "console", runner, words[1:]
        if program.suffix == ".py":
            found.kind, found.script = "script", program
        else:
            _launched(found, rest, cwd)
    elif runner.name in SHELLS:
        found.steps.append(Step(role="command", path=runner))
        _shell_text(found, program, cwd, env)


def _python_words(found: Resolved, words: list[str], cwd: Path) -> None:
    """The words after `python`: options, then -c, -m or a script."""
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        word = words[at]
        if word == "-c" or (not word.startswith("--") and word.endswith("c") and not word.startswith(("-W", "-X"))):
            found.kind = "code"
            found.options += [word] if word != "-c" else []
            return
        if word == "-m" or (not word.startswith("--") and word.endswith("m") and not word.startswith(("-W", "-X"))):
            found.kind = "module"
            found.module = words[at + 1] if at + 1 < len(words) else None
            if found.module in LAUNCHER_MODULES:
                _launched(found, words[at + 2 :], cwd)
            return
        found.options.append(word)
        at += 1
        if word in VALUE_OPTIONS and at < len(words):
            found.options.append(words[at])
            at += 1
    if at < len(words):
        found.kind = "script"
        found.script = _inside(cwd, words[at])


def _launched(found: Resolved, words: list[str], cwd: Path) -> None:
    """A launcher's words: the first that is a Python file is the script, or what follows -m is the module."""
    for index, word in enumerate(words):
        if word in ("-m", "--module") and index + 1 < len(words) and "/" not in words[index + 1]:
            found.module = words[index + 1]
            return
        if word.endswith(".py") and os.path.isfile(path := _inside(cwd, word)):  # noqa: PTH113 - too long a word is no path
            found.script = path
            return


def _shell_words(found: Resolved, words: list[str], cwd: Path, env: Mapping[str, str]) -> None:
    found.kind = "shell"
    for index, word in enumerate(words):
        if word.startswith("-") and "c" in word and not word.startswith("--") and index + 1 < len(words):
            _from_text(found, words[index + 1], cwd, env)
            return
        if not word.startswith(("-", "+")):
            script = _inside(cwd, word)
            found.steps.append(Step(role="launcher", path=script))
            _shell_text(found, script, cwd, env)
            return


def _shell_text(found: Resolved, script: Path, cwd: Path, env: Mapping[str, str]) -> None:
    found.kind = "shell"
    text = read_small(script, SHELL_SCRIPT_LIMIT_BYTES)
    if text is None:
        found.notes.append(f"{script}: cannot be read as a file")
        return
    _from_text(found, text.decode("utf-8", "replace"), cwd, env)


def _from_text(found: Resolved, text: str, cwd: Path, env: Mapping[str, str]) -> None:
    """The first Python program that a piece of shell names, and the first `.py` file after it."""
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")) + "\n"
    match = SCRIPT_WORDS.search(text)
    program = _which(match.group(1), cwd, env) if match else None
    if match is None or program is None:
        return
    words = re.split(r"[\s\\]+", text[match.end() :].partition("\n\n")[0])
    _follow(found, program, [word.strip("\"'") for word in words if word], cwd, env)
    found.kind = "shell"


def _wrapped(found: Resolved, words: list[str], cwd: Path, env: Mapping[str, str]) -> None:
    """`env`, `nice`, `numactl`, `srun …`: the first later word that is a Python program or a script run by one."""
    wrapper = found.steps[-1].path.name
    if wrapper in SWITCHING:
        env = _switched(found, wrapper, cwd, env)
    for index, word in enumerate(words):
        if word.startswith("-") or "=" in word:
            continue
        program = _which(word, cwd, env)
        if program is None:
            continue
        shebang = _shebang(program)
        if PYTHON.fullmatch(program.name) or program.name in SHELLS or (shebang and "python" in " ".join(shebang)):
            _follow(found, program, words[index + 1 :], cwd, env)
            return


def _switched(found: Resolved, wrapper: str, cwd: Path, env: Mapping[str, str]) -> Mapping[str, str]:
    """The environment behind `uv run` and its like: the project's own `.venv`, where there is one; else a note."""
    for folder in (cwd, *cwd.parents):
        if wrapper in ("uv", "poetry", "pdm", "pipenv") and (folder / ".venv" / "bin" / "python").exists():
            return dict(env) | {"PATH": f"{folder / '.venv' / 'bin'}:{env.get('PATH', os.defpath)}"}
    found.notes.append(
        f"{wrapper} may start another Python than the one on PATH; lock the command it starts, inside what it starts"
    )
    return env


def _which(word: str, cwd: Path, env: Mapping[str, str]) -> Path | None:
    """The program `word` names, absolute, links not followed."""
    if "/" in word:
        path = _inside(cwd, word)
        return path if os.path.isfile(path) and os.access(path, os.X_OK) else None  # noqa: PTH113 - as above
    found = shutil.which(word, path=env.get("PATH", os.defpath))
    return _inside(cwd, found) if found else None


def _inside(cwd: Path, word: str) -> Path:
    return Path(os.path.normpath(cwd / word))


def _shebang(program: Path) -> list[str] | None:
    """The words after `#!`, or None for a file that does not start with it."""
    first = read_small(program, SHEBANG_LIMIT_BYTES)
    if first is None or not first.startswith(b"#!"):
        return None
    words = first[2:].split(b"\n", 1)[0].decode("utf-8", "replace").split()
    return words or None
