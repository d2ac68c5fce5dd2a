"""A place to run the job's script again without touching anything of the run's: a copy of its working folder.

What lay in the folder when the run began is copied; what was written since is left out, since it may be the run's own
output (a newest checkpoint would otherwise be resumed from). Large files are linked, not copied: the replayed process
refuses to open anything outside the sandbox for writing (watch/warp.py). Words of the command that are absolute paths
into the working folder, or that did not exist when the run began, are led into the sandbox too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainguard.errors import Unavailable

COPY_LIMIT_BYTES = 1 << 20
"""Larger files are linked."""

FILES_LIMIT = 50_000
SKIPPED = frozenset({".git", ".trainguard", "__pycache__", ".venv", "node_modules"})


@dataclass(slots=True)
class Sandbox:
    """A prepared folder. `work` stands for the run's working folder."""

    root: Path
    origin: Path
    """The run's working folder."""
    began_ns: int
    """When the run began; files changed since are its output, or were altered."""
    unchanged: frozenset[str] = frozenset()
    """Files known to have the content that they had then, whatever their times say."""
    left_out: list[str] = field(default_factory=list)
    """Files that changed since the run began, relative to `origin`; at most 100."""

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    def prepare(self, *, skip: Sequence[Path] = ()) -> None:
        """Make it. skip: folders not to copy. Raises Unavailable where the folder cannot be read or is too large."""
        if not self.origin.is_dir():
            raise Unavailable(f"{self.origin}: the run's working folder is not there any more")
        try:
            for folder in (self.work, self.temporary, self.root / "outside"):
                folder.mkdir(parents=True, mode=0o700)
            self._copy({path.resolve() for path in (*skip, self.root)})
        except OSError as error:
            raise Unavailable(f"{self.origin}: cannot be copied for replay: {error}") from error

    def _copy(self, skip: set[Path]) -> None:
        files = 0
        for top, folders, names in os.walk(self.origin):
            here = Path(top)
            folders[:] = [n for n in folders if n not in SKIPPED and not self._skips(here / n, skip)]
            target = self.work / here.relative_to(self.origin)
            kept = [name for name in names if self._was_there(here / name)]
            if here == self.origin or kept or not self._is_new(here):
                target.mkdir(parents=True, exist_ok=True)
            for name in kept:
                files += 1
                if files > FILES_LIMIT:
                    raise Unavailable(
                        f"{self.origin}: more than {FILES_LIMIT:,} files; replay copies its working folder"
                    )
                target.mkdir(parents=True, exist_ok=True)
                _bring(here / name, target / name)

    def _skips(self, folder: Path, skip: set[Path]) -> bool:
        return folder.resolve() in skip or (folder / "pyvenv.cfg").exists()

    def _was_there(self, path: Path) -> bool:
        try:
            status = path.lstat()
        except OSError:
            return False
        if max(status.st_mtime_ns, status.st_ctime_ns) < self.began_ns or str(path) in self.unchanged:
            return True
        if len(self.left_out) < 100:
            self.left_out.append(str(path.relative_to(self.origin)))
        return False

    def _is_new(self, folder: Path) -> bool:
        """Whether a folder without old files in it was changed since: it may have been made by the run."""
        return folder.stat().st_mtime_ns >= self.began_ns

    def command(self, words: Sequence[str]) -> list[str]:
        """The command with its paths led into the sandbox."""
        return [words[0], *(self._led(word) for word in words[1:])]

    def _led(self, word: str) -> str:
        option, sign, value = word.partition("=")
        if sign and option.startswith("-") and os.path.isabs(value):  # noqa: PTH117 - a word, maybe no path
            return option + sign + self._path(value)
        return self._path(word) if os.path.isabs(word) else word  # noqa: PTH117

    def _path(self, word: str) -> str:
        path = Path(os.path.normpath(word))
        if path.is_relative_to(self.origin):
            return str(self.work / path.relative_to(self.origin))
        if _existed(path, self.began_ns):
            return word
        return str(self.root / "outside" / path.relative_to("/"))

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.root, ignore_errors=True)


def _existed(path: Path, began_ns: int) -> bool:
    """Whether a path was there before. A folder's time changes with its entries, so one old entry is enough."""
    try:
        status = path.lstat()
        if max(status.st_mtime_ns, status.st_ctime_ns) < began_ns:
            return True
        with os.scandir(path) as entries:
            return any(entry.stat(follow_symlinks=False).st_ctime_ns < began_ns for entry in entries)
    except OSError:
        return False


def _bring(source: Path, target: Path) -> None:
    if source.is_symlink():
        link = source.readlink()
        target.symlink_to(link if link.is_absolute() else (source.parent / link).resolve())
    elif not source.is_file():
        return
    elif source.stat().st_size > COPY_LIMIT_BYTES:
        target.symlink_to(source)
    else:
        shutil.copy2(source, target)
