"""Installed packages: every file of every distribution, against its own RECORD and listed for the lock.

RECORD alone is no control (it lists no hash for `.pyc`, and whoever edits a file can edit RECORD too); it is read
because it says which file belongs to which package, and because a stale one is a finding without any lock.
Reads: PEP 376 / PEP 627 RECORD, core metadata Name and Version, INSTALLER.
"""

from __future__ import annotations

import binascii
import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from trainguard.errors import Unavailable
from trainguard.lockfile import Distribution
from trainguard.measure.files import read_small
from trainguard.measure.walk import Found

RECORD_LIMIT_BYTES = 32 << 20
METADATA_LIMIT_BYTES = 64 << 10


def distributions(
    site: Path, found: Found, *, tree: str, prefix: Path, outside: Callable[[Path], str]
) -> list[Distribution]:
    """The distributions whose `.dist-info` lies in `site`; their files are moved out of `found.files`.

    prefix: files that RECORD lists outside `site` are read only below it (console scripts). outside(path): the value
    of such a file; raises Unavailable.
    """
    info: dict[str, list[str]] = {}
    for path in found.files:
        if ".dist-info/" in path:
            info.setdefault(path.split("/", 1)[0], []).append(path)
    return [
        _distribution(site, folder, own, found, tree=tree, prefix=prefix, outside=outside)
        for folder, own in sorted(info.items())
        if folder.endswith(".dist-info")
    ]


def _distribution(
    site: Path,
    folder: str,
    own: list[str],
    found: Found,
    *,
    tree: str,
    prefix: Path,
    outside: Callable[[Path], str],
) -> Distribution:
    name, version = _name_and_version(site / folder)
    files: dict[str, str] = {}
    mismatched: list[str] = []
    missing = 0
    for path, digest in _record(site / folder / "RECORD"):
        value = found.files.pop(path, None)
        if value is None and path.startswith("../"):
            value = _outside(site, path, prefix, outside)
            digest = ""  # installers rewrite the first line of scripts, not always RECORD
        if value is None:
            missing += not path.endswith(".pyc")
            continue
        files[path] = value
        if digest and not value.startswith(digest):
            mismatched.append(path)
    for path in own:
        if path in found.files:
            files[path] = found.files.pop(path)
    return Distribution(
        name=name,
        version=version,
        tree=tree,
        installer=_small(site / folder / "INSTALLER").strip()[:40],
        files=files,
        mismatched=tuple(mismatched),
        missing=missing,
    )


def _outside(site: Path, path: str, prefix: Path, outside: Callable[[Path], str]) -> str | None:
    place = Path(os.path.normpath(site / path))
    if not place.is_relative_to(prefix):
        return None
    try:
        return outside(place)
    except (Unavailable, OSError, ValueError):
        return None


def _name_and_version(folder: Path) -> tuple[str, str]:
    """From METADATA's header; from the folder's name where that is not there."""
    header = _small(folder / "METADATA").split("\n\n", 1)[0]
    fields = dict(re.findall(r"^(Name|Version): *(\S+)", header, re.MULTILINE))
    stem, _, version = folder.name.removesuffix(".dist-info").partition("-")
    return normalised(fields.get("Name", stem)), fields.get("Version", version)[:100]


def normalised(name: str) -> str:
    """PEP 503: one spelling for each project."""
    return re.sub(r"[-_.]+", "-", name).lower()[:200]


def _small(path: Path) -> str:
    return (read_small(path, METADATA_LIMIT_BYTES) or b"").decode("utf-8", "replace").replace("\r\n", "\n")


def _record(path: Path) -> Iterator[tuple[str, str]]:
    """(path, SHA-256 in hex or empty) for each line of a RECORD; nothing for one that is absent or absurd.

    Lines of bytecode are left out: RECORD lists it without a hash.
    """
    text = (read_small(path, RECORD_LIMIT_BYTES) or b"").decode("utf-8", "backslashreplace")
    if '"' in text or "\\" in text:
        try:
            for row in csv.reader(io.StringIO(text)):
                if len(row) == 3 and row[0]:
                    yield row[0].replace("\\", "/"), _hex(row[1])
        except csv.Error:
            return  # the rest of its files count as belonging to no package
        return
    for line in text.splitlines():  # the quick way, for nearly all of them
        name, _, rest = line.partition(",")
        if rest.startswith("sha256="):
            yield name, _hex(rest.partition(",")[0])
        elif name and not name.endswith(".pyc"):
            yield name, ""


def _hex(field: str) -> str:
    if not field.startswith("sha256="):
        return ""
    try:
        return binascii.a2b_base64(field[7:].replace("-", "+").replace("_", "/") + "=").hex()
    except (binascii.Error, ValueError):
        return "not a digest"
