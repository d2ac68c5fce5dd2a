"""Folders from which compiled or downloaded code is taken without asking: who could have written into them?

Their entries change with every honest run, so their content is recorded only where code is kept by name (remote modules
of the hub); for the others owner and mode tell whether another account could have put something there.
"""

from __future__ import annotations

import getpass
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainguard.lockfile import Cache
from trainguard.measure.walk import Limits, Walker

LIMITS = Limits(files=20_000, bytes=1 << 30, depth=12)


def measure_caches(env: Mapping[str, str], walker: Walker) -> Iterator[Cache]:
    """The caches that exist, with permission bits and whether another account owns them."""
    for name, folder, by_name in _folders(env):
        try:
            info = folder.stat()
        except OSError:
            continue
        if not stat.S_ISDIR(info.st_mode):
            continue
        files = {}
        if by_name:
            found = walker.tree(folder, fresh=True, limits=LIMITS, want=lambda path: path.endswith(".py"))
            files = found.files
        foreign = info.st_uid not in (0, os.getuid())
        yield Cache(name=name, path=str(folder), mode=stat.S_IMODE(info.st_mode), foreign=foreign, files=files)


def compiler_caches(env: Mapping[str, str]) -> tuple[Path, ...]:
    """Folders where torch's compilers keep what they made themselves, in formats of their own, existing or not."""
    return tuple(folder for name, folder, by_name in _folders(env) if not by_name)


def _folders(env: Mapping[str, str]) -> list[tuple[str, Path, bool]]:
    """(name, folder, whether code is kept there by name) by each tool's own rule for its default."""
    home = Path(env.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(env.get("HF_HOME") or cache / "huggingface")
    temporary = Path(env.get("TMPDIR") or "/tmp")  # noqa: S108 - where torch puts it
    try:
        account = getpass.getuser()
    except (KeyError, OSError):
        account = str(os.getuid())
    return [
        ("inductor", Path(env.get("TORCHINDUCTOR_CACHE_DIR") or temporary / f"torchinductor_{account}"), False),
        ("triton", Path(env.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"), False),
        ("extensions", Path(env.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions"), False),
        ("cuda", Path(env.get("CUDA_CACHE_PATH") or home / ".nv" / "ComputeCache"), False),
        ("remote modules", Path(env.get("HF_MODULES_CACHE") or hub / "modules"), True),
    ]
