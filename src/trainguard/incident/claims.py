"""Edges of the lineage that others claim: trackers, registries, people. They can cast doubt, never clear.

A claims file is JSON, at most 64 MiB:

    {"schema": "trainguard/claims/v1", "by": "mlflow of team-a",
     "nodes": [{"key": "release:chat-1", "kind": "release", "label": "chat 1.0"}],
     "edges": [["checkpoint:<root>", "release:chat-1"]]}

A node that is only claimed is UNKNOWN by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.incident.graph import Graph, Kind, Node

SCHEMA = "trainguard/claims/v1"
LIMIT_BYTES = 64 << 20
EDGE_LIMIT = 1_000_000
KEY = re.compile(r"(?:run|checkpoint|lock|data|code|evaluation|release|artifact):[!-~]{1,200}")


class ClaimedNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something a tracker knows."""

    key: str
    kind: Kind
    label: str


class Claims(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one file claims."""

    schema: str
    by: str
    nodes: tuple[ClaimedNode, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()

    def known_as(self, names: Mapping[str, str]) -> Claims:
        """These claims with nodes that we know by a key of our own under that key."""
        nodes = tuple(node for node in self.nodes if names.get(node.key, node.key) == node.key)
        edges = tuple((names.get(source, source), names.get(target, target)) for source, target in self.edges)
        return msgspec.structs.replace(self, nodes=nodes, edges=edges)

    def join(self, graph: Graph) -> None:
        """Add it all to `graph` as claimed."""
        for node in self.nodes:
            if node.key not in graph.nodes:
                reason = f"claimed by {self.by}; no watched run is known for it"
                graph.add(Node(key=node.key, kind=node.kind, label=node.label[:200], word="UNKNOWN", reason=reason))
        for source, target in self.edges:
            # What a run is said to be made from reaches the checkpoints that it saved: they inherit from its start.
            start = f"start:{target.partition(':')[2]}" if target.startswith("run:") else ""
            graph.join(source, start if start in graph.nodes else target, witnessed=False, by=self.by)


def read_claims(path: Path) -> Claims:
    """The claims in `path`. Raises MalformedEvidence for anything that is not as above, Unavailable if unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: claims cannot be read: {error.strerror}") from error
    if len(data) > LIMIT_BYTES:
        raise MalformedEvidence(f"{path}: expected claims of at most {LIMIT_BYTES} bytes, found more")
    return parse_claims(data, where=str(path))


def parse_claims(data: bytes, *, where: str) -> Claims:
    """As `read_claims`, from bytes."""
    try:
        claims = msgspec.json.decode(data, type=Claims)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not a claims file: {error}") from None
    if claims.schema != SCHEMA:
        raise MalformedEvidence(f"{where}: expected schema {SCHEMA}, found {claims.schema[:60]!r}")
    if len(claims.edges) > EDGE_LIMIT:
        raise MalformedEvidence(f"{where}: expected at most {EDGE_LIMIT} edges, found {len(claims.edges)}")
    keys = [node.key for node in claims.nodes] + [key for edge in claims.edges for key in edge]
    wrong = next((key for key in keys if KEY.fullmatch(key) is None), None)
    if wrong is not None:
        raise MalformedEvidence(f"{where}: expected keys as kind:name, found {wrong[:80]!r}")
    own = next((edge[0] for edge in claims.edges if edge[0] == edge[1]), None)
    if own is not None:
        raise MalformedEvidence(f"{where}: {own} is claimed to be made from itself")
    return claims
