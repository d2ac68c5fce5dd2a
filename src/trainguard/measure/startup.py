"""Code that runs without being imported: `.pth` and `.start` lines, sitecustomize, entry points, preloaded libraries.

`site` executes the lines of `<site folder>/*.pth` that begin with `import` (and, from Python 3.15, PEP 829 `.start`
entries); only files directly in a site folder count, so a model saved as `weights.pth` in a package is none. `torch`
calls every entry point of group torch.backends while it is imported; the dynamic loader runs what LD_PRELOAD, LD_AUDIT
and /etc/ld.so.preload name.
"""

from __future__ import annotations

import ast
import configparser
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from trainguard.errors import Unavailable
from trainguard.lockfile import Distribution, Hook
from trainguard.measure.files import read_small

TEXT_LIMIT_BYTES = 1 << 20
LINES = 20
LINE_CHARACTERS = 200
CUSTOMIZE = ("sitecustomize", "usercustomize")
PRELOADERS = ("LD_PRELOAD", "LD_AUDIT")
SYSTEM_PRELOAD = Path("/etc/ld.so.preload")
MAPPING = re.compile(r"^MAPPING\b[^=\n]*=\s*(\{[^\n]*\})", re.MULTILINE)
OWN_TOOLS = {"_virtualenv.pth": b"import _virtualenv"}
"""Start-up files that uv and virtualenv put into every environment they make, in no RECORD, with exactly this text."""


def site_hooks(site: Path, tree: str, owners: Mapping[str, Distribution], made_by: Sequence[str]) -> Iterator[Hook]:
    """The `.pth` files with executable lines, and the `.start` files, directly in `site`.

    owners: path below the site folder → distribution whose RECORD lists it.
    """
    for path in sorted(site.glob("*.pth")) + sorted(site.glob("*.start")):
        data = _bytes(path)
        if data is None:
            continue
        kind = path.suffix[1:]
        lines = _lines(data)
        runs = lines if kind == "start" else [line for line in lines if line.startswith(("import ", "import\t"))]
        if not runs or (made_by and OWN_TOOLS.get(path.name) == data.strip()):
            continue
        owner = owners.get(path.name)
        agrees = owner is not None and path.name not in owner.mismatched
        yield Hook(
            kind=kind,
            place=f"{tree}/{path.name}",
            digest=hashlib.sha256(data).hexdigest(),
            runs=_short(runs),
            distribution=owner.name if owner is not None and agrees else None,
        )


def pth_folders(site: Path) -> list[Path]:
    """Folders that the `.pth` files of `site` add to sys.path, as `site` would: existing ones, in order."""
    folders = []
    for path in sorted(site.glob("*.pth")):
        for line in _lines(_bytes(path) or b""):
            if line.startswith(("import ", "import\t", "#")):
                continue
            folder = Path(os.path.normpath(site / line))
            if folder.is_dir() and folder not in folders:
                folders.append(folder)
    return folders


def editable_folders(site: Path) -> list[tuple[str, Path]]:
    """(module, its folder) of packages that setuptools maps to a source folder by an import hook of its own."""
    found = []
    for finder in sorted(site.glob("__editable__*_finder.py")):
        match = MAPPING.search((_bytes(finder) or b"").decode("utf-8", "replace"))
        try:
            mapping = ast.literal_eval(match.group(1)) if match else {}
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        for module, folder in sorted(mapping.items()) if isinstance(mapping, dict) else ():
            if isinstance(module, str) and isinstance(folder, str) and Path(folder).is_dir():
                found.append((module, Path(folder)))
    return found


def customize_hooks(
    path: Sequence[tuple[str, Path]],
    value: Callable[[Path], str],
    owners: Mapping[str, Mapping[str, Distribution]],
) -> Iterator[Hook]:
    """sitecustomize and usercustomize on any folder of sys.path. path: (tree, folder) in order.

    Every one is listed, not only the first that wins: removing the winner would start the next.
    """
    for tree, folder in path:
        for name in CUSTOMIZE:
            for candidate in (*sorted(folder.glob(f"{name}.*")), folder / name / "__init__.py"):
                if candidate.suffix not in (".py", ".pyc", ".so") or not candidate.is_file():
                    continue
                inside = str(candidate.relative_to(folder))
                owner = owners.get(tree, {}).get(inside)
                try:
                    digest = value(candidate)[:64]
                except Unavailable:
                    digest = "unreadable"
                yield Hook(
                    kind=name,
                    place=f"{tree}/{inside}",
                    digest=digest,
                    runs=_short(_lines(_bytes(candidate) or b"") if candidate.suffix == ".py" else []),
                    distribution=owner.name if owner is not None and inside not in owner.mismatched else None,
                )


def entry_points(folder: Path, tree: str, owner_of: Callable[[str], str | None]) -> Iterator[Hook]:
    """Every entry point declared below `folder` (`*.dist-info`, `*.egg-info`), console scripts excepted.

    owner_of(info folder name): the distribution, or None where no RECORD stands behind it.
    """
    for info in sorted([*folder.glob("*.dist-info"), *folder.glob("*.egg-info")]):
        data = _bytes(info / "entry_points.txt")
        if data is None:
            continue
        parser = configparser.ConfigParser(delimiters=("=",), strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        try:
            parser.read_string(data.decode("utf-8", "replace"))
        except configparser.Error:
            continue
        for group in parser.sections():
            if group in ("console_scripts", "gui_scripts"):
                continue
            for name, value in parser.items(group):
                text = f"{group}: {name} = {value}"[:400]
                yield Hook(
                    kind="entry_point",
                    place=text,
                    digest=hashlib.sha256(f"{tree}\n{text}".encode()).hexdigest(),
                    distribution=owner_of(info.name),
                )


def preloads(env: Mapping[str, str], value: Callable[[Path], str], system: Path = SYSTEM_PRELOAD) -> Iterator[Hook]:
    """Libraries the dynamic loader is told to load first, by variable or by the system's own list."""
    for name in PRELOADERS:
        for entry in env.get(name, "").replace(":", " ").split():
            yield Hook(kind="preload", place=f"{name}: {Path(entry).name}", digest=_digest(Path(entry), value))
    for line in _lines(_bytes(system) or b""):
        for entry in line.split():
            yield Hook(kind="preload", place=f"{system}: {Path(entry).name}", digest=_digest(Path(entry), value))


def _digest(path: Path, value: Callable[[Path], str]) -> str:
    try:
        return value(path)[:64]
    except Unavailable:
        return "unreadable"


def _bytes(path: Path) -> bytes | None:
    return read_small(path, TEXT_LIMIT_BYTES)


def _lines(data: bytes) -> list[str]:
    text = data.decode("utf-8-sig", "backslashreplace")
    return [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _short(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(line[:LINE_CHARACTERS] for line in lines[:LINES])
