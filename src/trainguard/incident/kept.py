"""A lineage kept in a file, so that a question to it does not read the whole log again (spec: docs/lineage.md).

    keep(lineage, home, path)
    kept = read_kept(path); kept.lineage, kept.tree_size

What is kept is derived: it says for which tree head it was drawn and proves nothing. Whoever can write the file can
change the answer, so a decision (gate, recover, damage) never reads one.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from trainguard.archive import LogLeaves
from trainguard.digest import sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.home import Home
from trainguard.incident.graph import Graph, Packed
from trainguard.incident.lineage import Lineage

SCHEMA = "trainguard/kept-lineage/v1"
LIMIT_BYTES = 1 << 30


class Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds, in MessagePack."""

    schema: str
    origin: str
    tree_size: int
    """Entries of the log that it was drawn from."""
    head: str
    """SHA-256 of the signed tree head."""
    graph: Packed


def keep(lineage: Lineage, home: Home, path: Path) -> None:
    """Write `lineage`, drawn from the log of `home` as it is now, to `path`."""
    head = LogLeaves(home).head
    kept = Kept(
        schema=SCHEMA,
        origin=head.origin,
        tree_size=head.size,
        head=sha256_hex(head.note.encode()),
        graph=lineage.graph.packed(),
    )
    write_durably(path.absolute(), msgspec.msgpack.encode(kept))


def read_kept(path: Path) -> tuple[Kept, Lineage]:
    """What `keep` wrote. Raises MalformedEvidence for anything else, Unavailable if it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > LIMIT_BYTES:
        raise MalformedEvidence(f"{path}: expected a kept lineage of at most {LIMIT_BYTES} bytes, found more")
    try:
        kept = msgspec.msgpack.decode(data, type=Kept)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedEvidence(
            f"{path}: not a kept lineage: {error}", next_step="trainguard lineage --keep FILE makes one"
        ) from None
    if kept.schema != SCHEMA:
        raise MalformedEvidence(f"{path}: expected schema {SCHEMA}, found {kept.schema[:60]!r}")
    return kept, Lineage(graph=Graph.unpacked(kept.graph), verdicts={}, seals=())
