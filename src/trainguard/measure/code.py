"""The job's own code: which folder it is, what belongs to it, and where it stands in version control.

The root is the top of the git work tree that holds the script, else the script's folder; never `/` or a home folder.
Git is asked with every setting switched off that could make it run a program, because the repository may be the
attacker's: file-system monitor, hooks, external diffs, content filters.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainguard.lockfile import Code
from trainguard.measure.walk import Limits

CODE_SUFFIXES = frozenset({".py", ".pyc", ".so", ".pyx"})
"""Always taken: what an import may run."""
NATIVE_SOURCES = frozenset({".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"})
CONFIG_SUFFIXES = frozenset(
    {".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".sh", ".bash", ".jinja", ".ipynb", ".model", ".env"}
)
"""Taken when tracked, or where nothing is tracked: a run may write such files beside its code."""
VOCABULARY = frozenset({"vocab.txt", "merges.txt", "meta.pkl", "spiece.model", "tokenizer.model"})
WRITTEN_FOLDER = re.compile(
    r"(^|/)(outputs?|results?|runs?|logs?|checkpoints?|ckpts?|checkpoint-[^/]*|multirun|tmp|\.?cache)/"
)
WRITTEN_NAME = re.compile(
    r"metric|result|history|trainer_state|summary|eval|(^|[-_./])(log|logs|state|stats)[-_.]", re.I
)
"""Where nothing is tracked, configuration files in such folders or with such names are taken for a run's own."""
FILE_LIMIT_BYTES = 16 << 20
LIMITS = Limits(files=100_000, bytes=4 << 30, depth=24, file_bytes=FILE_LIMIT_BYTES)

SKIPPED = frozenset(
    {".git", ".hg", ".svn", ".trainguard", ".tox", ".nox", ".eggs", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
    | {".ipynb_checkpoints", ".hypothesis", "node_modules"}
)
WRITTEN_BY_TRACKERS = frozenset({"wandb", "mlruns", "lightning_logs", "tb_logs"})
"""Folders that experiment trackers fill; taken all the same where they can be imported."""
GIT_SECONDS = 20.0
DIFF_LIMIT_BYTES = 256 << 20


@dataclass(slots=True)
class Root:
    """The folder of the job's code."""

    path: Path
    tracked: frozenset[str] | None = None
    """Files in git's index, below the root; None outside a work tree or where git will not say."""
    top_only: bool = False
    """Whether only the folder itself is read, because what lies below is a home folder or a whole disk."""
    code: Code = field(default_factory=lambda: Code(root=""))
    notes: list[str] = field(default_factory=list)


def find_root(script: Path | None, cwd: Path, env_home: str | None) -> Root:
    """The code root for `script`, or for a job without one (`-m`, `-c`) that of the working folder."""
    start = script.parent if script is not None else cwd
    start = Path(os.path.realpath(start))
    top = _git(start, "rev-parse", "--show-toplevel")
    path = Path(top.decode("utf-8", "surrogateescape").rstrip("\n")) if top else start
    if _too_wide(path, env_home):
        path, top = start, None
    root = Root(path=path, top_only=_too_wide(path, env_home))
    if root.top_only:
        root.notes.append(f"{path}: a home folder or a whole disk is not read through; only the files directly in it")
    if not top:
        if _has_git(path):
            root.notes.append(f"{path}: git will not say what is tracked and committed; commit and changes are unknown")
        root.code = Code(root=str(path))
        return root
    _ask_git(root)
    return root


def _too_wide(path: Path, home: str | None) -> bool:
    homes = {os.path.realpath(folder) for folder in (home, os.path.expanduser("~")) if folder}  # noqa: PTH111
    return path == Path(path.anchor) or str(path) in homes or str(path) in ("/home", "/root", "/tmp", "/var", "/usr")  # noqa: S108


def _has_git(path: Path) -> bool:
    return any((folder / ".git").exists() for folder in (path, *path.parents))


def _ask_git(root: Root) -> None:
    path = root.path
    listed = _git(path, "ls-files", "-z")
    if listed is not None:
        names = listed.decode("utf-8", "backslashreplace").split("\0")
        root.tracked = frozenset(name for name in names if name)
    commit = _git(path, "rev-parse", "--verify", "HEAD")
    filters = _filters_off(path)
    changed = _git(path, *filters, "diff", "--no-ext-diff", "--no-textconv", "--name-only", "-z", "HEAD") or b""
    dirty = None
    if changed:
        patch = _git(path, *filters, "diff", "--no-ext-diff", "--no-textconv", "--binary", "--full-index", "HEAD")
        dirty = hashlib.sha256(patch).hexdigest() if patch is not None else None
    root.code = Code(
        root=str(path),
        commit=commit.decode().strip() if commit else None,
        dirty=dirty,
        changed=tuple(sorted(name for name in changed.decode("utf-8", "backslashreplace").split("\0") if name))[:1000],
    )


def _filters_off(path: Path) -> list[str]:
    """Options that empty every content filter the repository configures: `git diff` would run them."""
    names = _git(path, "config", "--name-only", "-z", "--get-regexp", r"^filter\..*\.(clean|process|smudge)$") or b""
    options = []
    for name in names.decode("utf-8", "replace").split("\0"):
        if name:
            options += ["-c", f"{name}=", "-c", f"{name.rsplit('.', 1)[0]}.required=false"]
    return options


def _git(folder: Path, *words: str) -> bytes | None:
    """Standard output of git with everything off that runs programs; None when it is absent, fails or takes long."""
    off = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "diff.external="]
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.environ.get("HOME", "/"),
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            ["git", "--no-pager", *off, *words],
            cwd=folder,
            env=env,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and len(done.stdout) <= DIFF_LIMIT_BYTES else None


class Selection:
    """Decides which folders and files below a code root belong to the code."""

    def __init__(self, root: Path, tracked: frozenset[str] | None, outputs: Sequence[Path], *, top_only: bool) -> None:
        """outputs: what the job writes; a folder that holds tracked files is code whatever the command calls it."""
        self._root = root
        self._tracked = tracked
        holding = {str(parent) for name in tracked or () for parent in (root / name).parents} | {str(root)}
        self._outputs = frozenset(str(path) for path in outputs) - holding
        self._top_only = top_only

    def skip_folder(self, path: str, name: str) -> bool:
        """Whether the folder `path` (below the root) is left out."""
        if name == "__pycache__":
            return False
        place = self._root / path
        if self._top_only or name in SKIPPED or name.endswith(".egg-info") or str(place) in self._outputs:
            return True
        if name in WRITTEN_BY_TRACKERS and not (place / "__init__.py").exists():
            return True
        return (place / "pyvenv.cfg").exists()

    def want(self, path: str) -> bool:
        """Whether the file `path` (below the root) belongs to the code."""
        if str(self._root / path) in self._outputs:
            return False
        suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - strings, once per file
        if suffix in CODE_SUFFIXES:
            return True
        if self._tracked is not None and path not in self._tracked:
            return False
        if self._tracked is None and (WRITTEN_FOLDER.search(path) or WRITTEN_NAME.search(os.path.basename(path))):  # noqa: PTH119
            return False
        return suffix in CONFIG_SUFFIXES or suffix in NATIVE_SOURCES or os.path.basename(path) in VOCABULARY  # noqa: PTH119
