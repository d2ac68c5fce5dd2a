"""Run the real command line in tests: a folder, a command, and the verdict it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 100


@dataclass(frozen=True, slots=True)
class Guarded:
    """A finished `trainguard run --json`."""

    status: int
    stdout: str
    """What the command itself printed."""
    stderr: str
    verdict: dict[str, Any]

    def techniques(self, *outcomes: str) -> set[str]:
        """Most likely technique of every finding with one of `outcomes` (default: violated and suspicious)."""
        wanted = outcomes or ("violated", "suspicious")
        return {f["techniques"][0] for f in self.findings if f["outcome"] in wanted and f["techniques"]}

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The findings of the verdict."""
        return list(self.verdict["findings"])

    def by(self, check: str) -> list[dict[str, Any]]:
        """Findings of one check."""
        return [f for f in self.findings if f["check"] == check]

    def link(self, name: str) -> dict[str, Any]:
        """The state of one link."""
        (state,) = (link for link in self.verdict["links"] if link["link"] == name)
        return dict(state)


def trainguard(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Any verb, in `folder`, with its state in `folder/.trainguard`."""
    return subprocess.run(
        [sys.executable, "-m", "trainguard", *arguments],
        cwd=folder,
        env=clean_environment() | (env or {}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def run(folder: Path, *command: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Guarded:
    """`trainguard run --json OPTIONS -- COMMAND` in `folder`."""
    done = trainguard(folder, "run", "--json", *options, "--", *command, env=env)
    lines = done.stdout.splitlines()
    try:
        verdict = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise AssertionError(f"no verdict; stdout {done.stdout!r}, stderr {done.stderr!r}") from error
    return Guarded(done.returncode, "\n".join(lines[:-1]), done.stderr, verdict)


def clean_environment() -> dict[str, str]:
    """The environment without what test runners and guards put into it, threads limited as on a busy machine."""
    dropped = ("TRAINGUARD_", "PYTEST_", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "COV_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    # One cache for all tests: a cold one costs seconds of hashing and compiling in every test folder.
    cache = Path(tempfile.gettempdir()) / f"trainguard-tests-{os.getuid()}"
    return kept | {"OMP_NUM_THREADS": "1", "TRAINGUARD_CACHE": str(cache)}
