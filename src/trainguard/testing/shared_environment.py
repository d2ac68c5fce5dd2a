"""A second environment with the very bytes of this one's torch, made in about a second, safe to tamper with.

    place = SharedEnvironment(folder)
    place.build()
    with place.edited("torch/optim/adam.py", change):      # this environment's own torch is never touched
        subprocess.run([place.python, "train.py"])

Files are hard links to the installed ones where the file system allows, else small files are copied and large ones
are symbolic links. An edit puts a new file in the place of the link; the old link is kept aside and put back. As in
`InstalledEnvironment`, a link to this Python, a pyvenv.cfg and a site folder are all that PEP 405 asks for.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import marshal
import os
import py_compile
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainguard.errors import Unavailable

COPIED_BYTES = 256 << 10
"""Where hard links are refused, files up to this size are copied and larger ones linked symbolically."""

HEADER_BYTES = 16
"""PEP 552: magic, flags, source mtime and size."""


class SharedEnvironment:
    """`root` becomes the environment: `bin/python`, `pyvenv.cfg` and one site folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.python = root / "bin" / "python"
        self.site = root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        self._aside = root.with_name(root.name + ".aside")

    def build(self, names: Sequence[str] = ("torch", "numpy")) -> int:
        """Make the environment with the packages `names` and what they require; returns the number of files.

        Raises Unavailable where one of `names` is not installed beside the Python that runs this.
        """
        base = Path(getattr(sys, "_base_executable", sys.executable))
        for folder in (self.site, self.python.parent, self._aside):
            folder.mkdir(parents=True, exist_ok=True)
        self.python.symlink_to(base)
        (self.root / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
        return sum(self._share(distribution) for distribution in _closure(names))

    def _share(self, distribution: importlib.metadata.Distribution) -> int:
        made = 0
        folders: set[Path] = set()
        for file in distribution.files or ():
            source, target = Path(str(file.locate())), Path(os.path.normpath(self.site / file))
            if not target.is_relative_to(self.root) or not source.is_file():
                continue
            if target.parent not in folders:
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.add(target.parent)
            made += _link(source, target)
        return made

    # -- what an insider could do -------------------------------------------------------------------------------

    @contextmanager
    def edited(self, path: str, change: Callable[[str], str], *, record: bool = True) -> Iterator[None]:
        """The source file `path` with another text, its times as before; with `record`, RECORD says its new hash.
        All is put back afterwards."""
        text = (self.site / path).read_text()
        with self._replaced(path, change(text).encode()):
            row = self._record_of(path) if record else None
            if row is None:
                yield
                return
            with self._replaced(row, self._recorded(row, path)):
                yield

    @contextmanager
    def edited_bytecode(self, path: str, change: Callable[[str], str]) -> Iterator[None]:
        """Only the cached bytecode of `path` replaced, by that of another text; the source stays as it is."""
        cached = self.bytecode(path)
        header = (self.site / cached).read_bytes()[:HEADER_BYTES]
        source = self.site / path
        code = compile(change(source.read_text()), str(source), "exec", dont_inherit=True)
        with self._replaced(cached, header + marshal.dumps(code)):
            yield

    def bytecode(self, path: str) -> str:
        """Path below the site folder of the cached bytecode of `path`, compiled first where the installer did not."""
        file = Path(path)
        cached = file.parent / "__pycache__" / f"{file.stem}.{sys.implementation.cache_tag}.pyc"
        if not (self.site / cached).is_file():
            py_compile.compile(str(self.site / path), cfile=str(self.site / cached), doraise=True)
        return str(cached)

    # -- what a careful administrator would look at -------------------------------------------------------------

    def record_agrees(self, folder: str) -> bool:
        """Whether every file below `folder` that a RECORD lists with a hash has that hash: the naive control."""
        for record in self.site.glob("*.dist-info/RECORD"):
            for row in _rows(record.read_text()):
                if (
                    row[0].startswith(folder + "/")
                    and row[1]
                    and row[1] != _record_hash((self.site / row[0]).read_bytes())
                ):
                    return False
        return True

    def source_digest(self, folder: str) -> str:
        """One SHA-256 over every `.py` below `folder`: another naive control."""
        hasher = hashlib.sha256()
        for path in sorted((self.site / folder).rglob("*.py")):
            hasher.update(path.read_bytes())
        return hasher.hexdigest()

    def remove(self) -> None:
        """Delete the environment; the installed files it shared stay."""
        for folder in (self.root, self._aside):
            shutil.rmtree(folder, ignore_errors=True)

    # -- files --------------------------------------------------------------------------------------------------

    @contextmanager
    def _replaced(self, path: str, data: bytes) -> Iterator[None]:
        place = self.site / path
        status = place.stat()
        aside = self._aside / hashlib.sha256(path.encode()).hexdigest()
        place.rename(aside)
        try:
            place.write_bytes(data)
            os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
            yield
        finally:
            aside.replace(place)

    def _record_of(self, path: str) -> str | None:
        for record in self.site.glob("*.dist-info/RECORD"):
            if any(row[0] == path for row in _rows(record.read_text())):
                return str(record.relative_to(self.site))
        return None

    def _recorded(self, record: str, path: str) -> bytes:
        """RECORD with the hash and size that `path` has now."""
        data = (self.site / path).read_bytes()
        rows = [
            [path, _record_hash(data), str(len(data))] if row[0] == path else row
            for row in _rows((self.site / record).read_text())
        ]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def _closure(names: Sequence[str]) -> list[importlib.metadata.Distribution]:
    """The installed packages `names` and, of what they require, those that are installed."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name in names:
                raise Unavailable(
                    f"{name}: not installed beside {sys.executable}", next_step=f"install it there: pip install {name}"
                ) from error
            continue
        found[name] = distribution
        required = (text for text in distribution.requires or () if "extra ==" not in text)
        waiting.extend(match[0] for text in required if (match := re.match(r"[A-Za-z0-9._-]+", text)))
    return [found[name] for name in sorted(found)]


def _link(source: Path, target: Path) -> int:
    try:
        os.link(source, target)
    except FileExistsError:
        return 0
    except OSError:  # another file system, or a kernel that lets only the owner link
        if source.stat().st_size > COPIED_BYTES:
            target.symlink_to(source)
        else:
            shutil.copy2(source, target)
    return 1


def _rows(text: str) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(text)) if row]


def _record_hash(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
