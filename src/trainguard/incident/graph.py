"""What was made from what, and how far a bad verdict reaches (DESIGN section 10: taint flows down).

    graph = Graph()
    graph.add(Node(key="checkpoint:ab…", …)); graph.join("run:r1", "checkpoint:ab…", witnessed=True)
    standing = graph.standings()["checkpoint:ab…"]      # word, and the chain of nodes it comes from

A node is as good as the worst of itself and all it was made from. Along an edge that our log witnessed a word goes on
as it is. Along an edge that somebody only claims TAINTED arrives as SUSPECT: a claim can neither clear nor condemn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import msgspec

from trainguard.appraise.verdict import Word
from trainguard.errors import MalformedEvidence

Kind = Literal["run", "start", "checkpoint", "lock", "data", "code", "evaluation", "release", "artifact"]

RANK: dict[Word, int] = {"VERIFIED": 0, "UNKNOWN": 1, "SUSPECT": 2, "TAINTED": 3}
"""How bad a word is. SUSPECT outweighs UNKNOWN: something was seen, against nothing was looked at."""

WORDS: tuple[Word, ...] = tuple(sorted(RANK, key=RANK.__getitem__))
_NONE: dict[str, bool] = {}


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One artifact or act. `key` is unique: its kind and what identifies it."""

    key: str
    kind: Kind
    label: str
    """What people call it."""
    word: Word = "VERIFIED"
    """What is known of itself alone; VERIFIED where it only hands on what it was made from."""
    reason: str = ""
    """Why its own word is what it is, one sentence."""
    run: str | None = None
    step: int | None = None
    place: str | None = None
    """Path it lay at."""


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """`target` was made from `source`."""

    source: str
    target: str
    witnessed: bool
    """Our log shows it; False: a tracker or a person says so."""
    by: str = ""
    """Leaf of the log, or who claims it."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How good a node is, all it was made from included."""

    word: Word
    because: tuple[str, ...]
    """Keys from the node that decides, the oldest, down to this one."""


class Standings:
    """The standing of every node of a graph, by key."""

    def __init__(self, words: dict[str, Word], above: dict[str, str]) -> None:
        self.words = words
        self._above = above

    def __getitem__(self, key: str) -> Standing:
        """Raises KeyError for a key that is in no node or edge."""
        chain = [key]
        while chain[-1] in self._above:
            chain.append(self._above[chain[-1]])
        return Standing(word=self.words[key], because=tuple(reversed(chain)))


class Graph:
    """Nodes and edges; adding the same ones again changes nothing."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._into: dict[str, list[str]] = {}
        self._out: dict[str, dict[str, bool]] = {}
        """Source → target → whether it is witnessed."""
        self._by: dict[tuple[str, str], str] = {}

    def add(self, node: Node) -> None:
        """Add a node; of two with one key the worse word stays."""
        known = self.nodes.get(node.key)
        if known is None or RANK[node.word] > RANK[known.word]:
            self.nodes[node.key] = node

    def join(self, source: str, target: str, *, witnessed: bool, by: str = "") -> None:
        """Say that `target` was made from `source`. A witnessed edge outweighs a claimed one."""
        targets = self._out.setdefault(source, {})
        known = targets.get(target)
        if known is not None and (known or not witnessed):
            return
        targets[target] = witnessed
        if known is None:
            self._into.setdefault(target, []).append(source)
        if by:
            self._by[source, target] = by

    @property
    def edges(self) -> Iterator[Edge]:
        """All edges."""
        return (self._edge(source, target) for source, targets in self._out.items() for target in targets)

    def made_from(self, key: str) -> list[Edge]:
        """Edges into a node."""
        return [self._edge(source, key) for source in self._into.get(key, ())]

    def made_with(self, key: str) -> list[Edge]:
        """Edges out of a node."""
        return [self._edge(key, target) for target in self._out.get(key, ())]

    def _edge(self, source: str, target: str) -> Edge:
        by = self._by.get((source, target), "")
        return Edge(source=source, target=target, witnessed=self._out[source][target], by=by)

    def descendants(self, key: str) -> list[str]:
        """Everything made from a node, near ones first; without itself."""
        return self._reach(key, self._out)

    def ancestors(self, key: str) -> list[str]:
        """Everything a node was made from, near ones first; without itself."""
        return self._reach(key, self._into)

    def standings(self) -> Standings:
        """The standing of every node. Raises MalformedEvidence where claimed edges go in a circle.

        Each node hands its rank on once all it was made from has done so (Kahn 1962), so one pass over the edges does.
        """
        keys = self._keys()
        waiting = {key: len(self._into[key]) for key in keys if key in self._into}
        ranks = {key: RANK[self.nodes[key].word] if key in self.nodes else RANK["UNKNOWN"] for key in keys}
        above: dict[str, str] = {}
        free = [key for key in keys if key not in waiting]
        tainted, doubtful = RANK["TAINTED"], RANK["SUSPECT"]
        while free:
            key = free.pop()
            rank = ranks[key]
            for target, witnessed in self._out.get(key, _NONE).items():
                arriving = doubtful if rank == tainted and not witnessed else rank
                if arriving > ranks[target]:
                    ranks[target], above[target] = arriving, key
                left = waiting[target] - 1
                waiting[target] = left
                if not left:
                    free.append(target)
        if any(waiting.values()):
            raise _circle(key for key, left in waiting.items() if left)
        return Standings({key: WORDS[rank] for key, rank in ranks.items()}, above)

    def _keys(self) -> list[str]:
        """All keys, in the order they came, so that answers repeat."""
        return list(dict.fromkeys([*self.nodes, *self._into, *self._out]))

    def _reach(self, key: str, edges: Mapping[str, Iterable[str]]) -> list[str]:
        found: dict[str, None] = {}
        level = [key]
        while level:
            level = [near for at in level for near in edges.get(at, ()) if near not in found and near != key]
            found.update(dict.fromkeys(level))
        return list(found)


def _circle(keys: Iterable[str]) -> MalformedEvidence:
    return MalformedEvidence(
        f"lineage: expected what was made to come after what it was made from, found a circle among {sorted(keys)[:4]}",
        next_step="correct the claimed edges: only those can do this",
    )
