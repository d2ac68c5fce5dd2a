"""Asks the interpreter that would run the job where it looks for code, without letting any of that code run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainguard.errors import Unavailable

PROBE_SECONDS = 30.0
ANSWER_LIMIT_BYTES = 16 << 20
_KEPT = ("HOME", "PATH", "TMPDIR", "SYSTEMROOT")


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """What the interpreter says of itself (`_probe.where`)."""

    executable: str
    version: str
    implementation: str
    cache_tag: str
    prefix: str
    base_prefix: str
    library: str
    """Folder of the standard library."""
    path: tuple[str, ...]
    """sys.path without site folders."""
    sites: tuple[str, ...]
    user: str | None
    made_by: tuple[str, ...]
    """uv or virtualenv, where pyvenv.cfg names one."""
    libpython: str | None


def where(executable: Path, env: Mapping[str, str]) -> Where:
    """Ask `executable`. Raises Unavailable when it does not answer as expected."""
    answer = ask(executable, "where", env)
    try:
        return msgspec.convert(answer, Where)
    except msgspec.ValidationError as error:
        raise Unavailable(f"{executable}: did not say where it looks for code: {error}") from error


def ask(
    executable: Path,
    question: str,
    env: Mapping[str, str],
    *,
    given: Any = None,
    variables: Mapping[str, str] | None = None,
    seconds: float = PROBE_SECONDS,
) -> Any:
    """The answer of `_probe.<question>` run by `executable`, isolated: -I -S, clean environment, cwd `/`.

    variables: the only others it sees. A relocated build that needs LD_LIBRARY_PATH or PYTHONHOME to start gets
    them at a second attempt.
    """
    clean = {name: env[name] for name in _KEPT if name in env} | dict(variables or {})
    home = "PYTHONHOME" in env
    flags = ["-S", "-s"] if home else ["-I", "-S"]
    if home:
        clean["PYTHONHOME"] = env["PYTHONHOME"]
    command = [str(executable), *flags, "-B", "-X", "utf8", "-c", _text(), question]
    try:
        return _run(command, clean, given, seconds)
    except Unavailable:
        if "LD_LIBRARY_PATH" not in env:
            raise
        return _run(command, clean | {"LD_LIBRARY_PATH": env["LD_LIBRARY_PATH"]}, given, seconds)


def _run(command: Sequence[str], env: Mapping[str, str], given: Any, seconds: float) -> Any:
    try:
        done = subprocess.run(
            command,
            env=env,
            cwd="/",
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode == 0 and len(done.stdout) <= ANSWER_LIMIT_BYTES:
            return json.loads(done.stdout)
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"status {done.returncode}"]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = [str(error)[:200]]
    raise Unavailable(f"{command[0]}: the interpreter gave no answer: {reason[0][:300]}")


@functools.cache
def _text() -> str:
    return (Path(__file__).parent / "_probe.py").read_text()


def boot_folder() -> str:
    """Our own start-up folder, which a guarded job has on PYTHONPATH and which is no part of the job."""
    return str(Path(__file__).resolve().parent.parent / "watch" / "boot")


def python_path(env: Mapping[str, str], cwd: Path) -> list[Path]:
    """The folders in PYTHONPATH, absolute, without ours; an empty entry is the working folder."""
    entries = env.get("PYTHONPATH", "")
    folders = [Path(os.path.normpath(cwd / entry)) for entry in entries.split(os.pathsep)] if entries else []
    return [folder for folder in dict.fromkeys(folders) if os.path.realpath(folder) != boot_folder()]
