"""Keeps the text of approved source files, so that a later difference can be shown as text and not only as hashes.

It serves the reader, never the comparison: a missing or altered pack changes no finding (every text is looked up by
its SHA-256 and checked against it).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainguard.digest import sha256_hex
from trainguard.lockfile import Measurement, pack_contents

TEXT_SUFFIXES = (
    ".py", ".pth", ".start", ".sh", ".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".txt", ".csv", ".tsv", ".jinja"
)  # fmt: skip
FILE_LIMIT_BYTES = 256 << 10
PACK_LIMIT_BYTES = 96 << 20
FIRST = ("torch", "transformers", "accelerate", "lightning", "pytorch-lightning", "deepspeed", "datasets", "numpy")
"""Packages whose text is kept first when not all of it fits: those that decide what a training run computes."""


def pack_sources(measurement: Measurement) -> bytes:
    """A pack of every source text of `measurement` that still has its measured content, up to 96 MiB of text."""
    texts: dict[str, bytes] = {}
    total = 0
    for path, value in _candidates(measurement):
        digest, _, size = value.partition(" ")
        if digest in texts or not size.isdigit() or int(size) > FILE_LIMIT_BYTES:
            continue
        if total + int(size) > PACK_LIMIT_BYTES:
            break
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if sha256_hex(data) == digest:
            texts[digest] = data
            total += len(data)
    return pack_contents(texts)


def _candidates(measurement: Measurement) -> Iterator[tuple[Path, str]]:
    for tree in measurement.trees.values():
        if tree.name != "stdlib":
            yield from _texts(Path(tree.root), tree.files)
    order = {name: index for index, name in enumerate(FIRST)}
    packages = sorted(measurement.distributions.values(), key=lambda p: (order.get(p.name, len(order)), len(p.files)))
    for package in packages:
        yield from _texts(Path(measurement.trees[package.tree].root), package.files)
    if "stdlib" in measurement.trees:
        yield from _texts(Path(measurement.trees["stdlib"].root), measurement.trees["stdlib"].files)


def _texts(root: Path, files: dict[str, str]) -> Iterator[tuple[Path, str]]:
    for path, value in sorted(files.items()):
        if path.endswith(TEXT_SUFFIXES):
            yield root / path, value
