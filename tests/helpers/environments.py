"""Real virtual environments with torch, made in a second: hard links of what this interpreter has installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NAMES = ("torch", "numpy", "typing-extensions", "sympy", "mpmath", "networkx", "filelock", "fsspec", "jinja2")
"""torch and what it imports."""


def torch_environment(prefix: Path) -> Path:
    """An environment at `prefix` with torch and nothing of ours; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=100)
    site = next((prefix / "lib").glob("python3*/site-packages"))
    here = Path(sysconfig.get_paths()["purelib"])
    for name in (*NAMES, "markupsafe", "setuptools"):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in sorted({file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}):
            if (here / top).is_dir():
                shutil.copytree(here / top, site / top, copy_function=_linked, ignore=shutil.ignore_patterns("*.pyc"))
            elif (here / top).is_file():
                _linked(here / top, site / top)
    return prefix / "bin" / "python"


def _linked(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
