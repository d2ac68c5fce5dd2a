"""What every importer shares: bounded reading, keys, and claims put together without circles of their own making."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.incident.claims import EDGE_LIMIT, SCHEMA, ClaimedNode, Claims
from trainguard.incident.graph import Kind

FILES_LIMIT = 200_000
FILE_LIMIT_BYTES = 64 << 20
NODE_LIMIT = 1_000_000
NAME_LIMIT = 150
LABEL_LIMIT = 200


class Gathered:
    """Collects nodes and edges; `claims` gives what was collected, or raises."""

    def __init__(self, by: str, where: str) -> None:
        self._by = by
        self._where = where
        self._nodes: dict[str, ClaimedNode] = {}
        self._edges: dict[tuple[str, str], None] = {}

    def node(self, kind: Kind, name: str, label: str) -> str:
        """The key of a node, added once."""
        key = f"{kind}:{safe(name)}"
        if key not in self._nodes:
            if len(self._nodes) >= NODE_LIMIT:
                raise MalformedEvidence(f"{self._where}: expected at most {NODE_LIMIT} nodes, found more")
            self._nodes[key] = ClaimedNode(key=key, kind=kind, label=label[:LABEL_LIMIT])
        return key

    def edge(self, source: str, target: str) -> None:
        """`target` was made from `source`. Nothing is made from itself, and the earlier of two opposite edges stays."""
        if source == target or (target, source) in self._edges:
            return
        if len(self._edges) >= EDGE_LIMIT:
            raise MalformedEvidence(f"{self._where}: expected at most {EDGE_LIMIT} edges, found more")
        self._edges[source, target] = None

    @property
    def claims(self) -> Claims:
        """Everything. Raises MalformedEvidence where the edges go in a circle."""
        circle = _circle(list(self._edges))
        if circle:
            raise MalformedEvidence(
                f"{self._where}: expected that what was made comes after what it was made from, found a circle: "
                f"{' -> '.join(key[:60] for key in circle[:6])}",
                next_step="correct the record there: nothing of it was taken over",
            )
        return Claims(schema=SCHEMA, by=self._by, nodes=tuple(self._nodes.values()), edges=tuple(self._edges))


def safe(name: str) -> str:
    """A name as it can stand in a key: printable, bounded; long ones by their digest."""
    quoted = urllib.parse.quote(name, safe="/:@.,+=~-_")
    if len(quoted) <= NAME_LIMIT and quoted:
        return quoted
    return f"{quoted[:60]}~{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:32]}"


def read_bounded(path: Path, limit: int = FILE_LIMIT_BYTES) -> bytes:
    """The content of a regular file. Raises Unavailable, or MalformedEvidence over the limit."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise MalformedEvidence(f"{path}: expected at most {limit} bytes, found more")
    return data


def read_text(path: Path, limit: int = FILE_LIMIT_BYTES) -> str:
    """As `read_bounded`, in UTF-8."""
    try:
        return read_bounded(path, limit).decode()
    except UnicodeDecodeError as error:
        raise MalformedEvidence(f"{path}: expected UTF-8, found byte {error.start} that is none") from None


def parse_json(data: bytes | str, where: str) -> Any:
    """A JSON value. Raises MalformedEvidence."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not JSON: {str(error)[:100]}") from None


def find_files(root: Path, name: str, depth: int) -> Iterator[Path]:
    """Files called `name` at most `depth` folders below `root`, in order; links to folders are not followed."""
    seen = 0
    waiting = [(root, 0)]
    while waiting:
        folder, level = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise Unavailable(f"{folder}: cannot be read: {error.strerror}") from error
        for entry in entries:
            seen += 1
            if seen > FILES_LIMIT:
                raise MalformedEvidence(f"{root}: expected at most {FILES_LIMIT} entries, found more")
            if entry.is_dir(follow_symlinks=False) and level < depth:
                waiting.append((Path(entry.path), level + 1))
            elif entry.name == name and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


def flat_yaml(text: str, where: str) -> dict[str, str | list[str] | None]:
    """Top-level `key: value` pairs of a YAML file: text, null, or a list of texts; anything nested is None.

    Only what the importers' files hold. Raises MalformedEvidence for a line that is none of it.
    """
    found: dict[str, str | list[str] | None] = {}
    key: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line[0] in " \t" or line.startswith("- "):
            item = line.strip()
            known = found.get(key) if key is not None else None
            if key is not None and item.startswith("- ") and (known is None or isinstance(known, list)):
                found[key] = [*(known or []), _scalar(item[2:])]
            continue
        key, colon, value = line.partition(":")
        if not colon:
            raise MalformedEvidence(f"{where}: line {number}: expected `key: value`, found {line[:60]!r}")
        key = key.strip().strip("'\"")
        found[key] = _value(value.strip())
    return found


def _value(text: str) -> str | list[str] | None:
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(item) for item in text[1:-1].split(",") if item.strip()]
    if text in ("", "null", "~", "{}", "|", ">") or text.startswith(("{", "|", ">", "&", "*", "!")):
        return None
    return _scalar(text)


def _scalar(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    return text.partition(" #")[0].strip()


def texts(value: object) -> list[str]:
    """A text as a list of one, a list of texts as it is; anything else is nothing."""
    if isinstance(value, str):
        return [value] if value else []
    return [one for one in value if isinstance(one, str) and one] if isinstance(value, list) else []


def _circle(edges: list[tuple[str, str]]) -> list[str]:
    """Keys of one circle in order, or nothing."""
    out: dict[str, list[str]] = {}
    waiting: dict[str, int] = {}
    for source, target in edges:
        out.setdefault(source, []).append(target)
        waiting[target] = waiting.get(target, 0) + 1
        waiting.setdefault(source, 0)
    free = [key for key, count in waiting.items() if not count]
    while free:
        for target in out.get(free.pop(), ()):
            waiting[target] -= 1
            if not waiting[target]:
                free.append(target)
    held = {key for key, count in waiting.items() if count > 0}
    if not held:
        return []
    into = {target: source for source, target in edges if source in held and target in held}
    at, path = next(key for key in waiting if key in into), []
    while at not in path:
        path.append(at)
        at = into[at]
    return [*reversed(path[path.index(at) :]), path[-1]]
