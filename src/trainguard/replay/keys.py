"""The key of a run that still goes on, for whoever audits it meanwhile: a file beside the keys that sign.

    hold_key(home, run, key)     the supervisor, before the command starts
    held_key(home, run)          an auditor; None where there is none
    drop_key(home, run)          the supervisor, once the record with the key is sealed

Every process of the job is told the key when it says hello, so it is no secret from them. The file keeps it from
everybody else: it lies in the folder of the attestation and log keys, and who can read that could write the log anyway.
Of a run whose supervisor was killed it stays, and an audit can still compare what is keyed.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from trainguard.home import Home

KEY = re.compile(r"[0-9a-f]{64}")
LIMIT_BYTES = 256


def hold_key(home: Home, run: str, key: str) -> None:
    """Keep the key, readable for this account alone. A disk that will not have it costs the auditor, never the run."""
    path = _path(home, run)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key)


def held_key(home: Home, run: str) -> str | None:
    """The key that is kept for `run`, or None. Whether it is the run's own, its commitment tells (committed.py)."""
    try:
        descriptor = os.open(_path(home, run), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(LIMIT_BYTES).decode("ascii", "replace")
    except OSError:
        return None
    return text if KEY.fullmatch(text) else None


def drop_key(home: Home, run: str) -> None:
    """The record has it now."""
    with contextlib.suppress(OSError):
        _path(home, run).unlink()


def _path(home: Home, run: str) -> Path:
    return home.keys / "runs" / f"{home.run(run).name}.key"
