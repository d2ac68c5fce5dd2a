"""Files that seem newer than a run, and are what was measured when it began.

A file's change time moves when another name is made for it: uv, conda and `cp -l` do that to whole environments, and
anybody may do it to spoil an audit. The run's own measurement, which is in the log since before step 0, has the SHA-256
of every installed file; one that still has it is the file the run could read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from trainguard.digest import file_sha256
from trainguard.errors import TrainguardError
from trainguard.lockfile import Measurement

NEWER_KEPT = 4096
"""As many are told at most (watch/warp.py); where there are that many, more may be newer and none is believed."""


def really_newer(paths: Iterable[str], measured: Measurement | None) -> list[str]:
    """Those of `paths` (real ones) that are not, byte for byte, what was measured at the start."""
    told = list(dict.fromkeys(paths))
    if measured is None or len(told) >= NEWER_KEPT:
        return told
    known = _digests(measured)
    return [path for path in told if not _same(path, known.get(path))]


def _digests(measured: Measurement) -> dict[str, str]:
    """Absolute path → `<sha256> <size>`."""
    found = {
        os.path.normpath(f"{tree.root}/{name}"): digest
        for tree in measured.trees.values()
        for name, digest in tree.files.items()
    }
    for package in measured.distributions.values():
        tree = measured.trees.get(package.tree)
        if tree is not None:
            found.update({os.path.normpath(f"{tree.root}/{name}"): digest for name, digest in package.files.items()})
    return found


def _same(path: str, digest: str | None) -> bool:
    if digest is None or digest.startswith("->"):
        return False
    sha256, _, size = digest.partition(" ")
    try:
        return str(Path(path).stat().st_size) == size and file_sha256(path) == sha256
    except (TrainguardError, OSError):
        return False
