"""What was made from what, and how far a bad verdict reaches (DESIGN section 10: taint flows down).

    graph = Graph()
    graph.add(Node(key="checkpoint:ab…", …)); graph.join("run:r1", "checkpoint:ab…", witnessed=True)
    standing = graph.standings()["checkpoint:ab…"]      # word, and the chain of nodes it comes from

A node is as good as the worst of itself and all it was made from. Along an edge that our log witnessed a word goes on
as it is. Along an edge that somebody only claims TAINTED arrives as SUSPECT: a claim can neither clear nor condemn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from trainguard.appraise.verdict import Word
from trainguard.errors import MalformedEvidence

Kind = Literal["run", "start", "checkpoint", "lock", "data", "code", "evaluation", "release", "artifact"]

RANK: dict[Word, int] = {"VERIFIED": 0, "UNKNOWN": 1, "SUSPECT": 2, "TAINTED": 3}
"""How bad a word is. SUSPECT outweighs UNKNOWN: something was seen, against nothing was looked at."""

WORDS: tuple[Word, ...] = tuple(sorted(RANK, key=RANK.__getitem__))


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


class Packed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A graph as it is stored: nodes and edges by their place in `keys`."""

    nodes: tuple[Node, ...]
    keys: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]
    """By place of the source: places of what was made from it."""
    claimed: dict[int, tuple[int, ...]] = {}
    """Of these edges, those that are only claimed."""
    by: tuple[tuple[int, int, str], ...] = ()
    """Source, target, and the leaf or who claims it."""


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
    """Nodes and edges; adding the same ones again changes nothing.

    Inside, a key is a number in the order it came, so that a question walks lists of numbers and hashes no text.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._numbers: dict[str, int] = {}
        self._keys: list[str] = []
        self._sources: list[list[int]] | None = []
        """By number of the target: numbers of the sources; None until the next question asks for it."""
        self._out: list[dict[int, bool]] = []
        """By number of the source: number of the target → whether the edge is witnessed."""
        self._by: dict[tuple[int, int], str] = {}

    def add(self, node: Node) -> None:
        """Add a node; of two with one key the worse word stays."""
        known = self.nodes.get(node.key)
        if known is None or RANK[node.word] > RANK[known.word]:
            self.nodes[node.key] = node
            if known is None and node.key not in self._numbers:
                self._number(node.key)

    def join(self, source: str, target: str, *, witnessed: bool, by: str = "") -> None:
        """Say that `target` was made from `source`. A witnessed edge outweighs a claimed one."""
        numbers = self._numbers
        start, end = numbers.get(source), numbers.get(target)
        if start is None:
            start = self._number(source)
        if end is None:
            end = numbers[target] if source == target else self._number(target)
        targets = self._out[start]
        known = targets.get(end)
        if known is not None and (known or not witnessed):
            return
        targets[end] = witnessed
        self._sources = None
        if by:
            self._by[start, end] = by

    @property
    def edges(self) -> Iterator[Edge]:
        """All edges."""
        return (self._edge(source, target) for source, targets in enumerate(self._out) for target in targets)

    def made_from(self, key: str) -> list[Edge]:
        """Edges into a node."""
        number = self._numbers.get(key)
        return [self._edge(source, number) for source in self._into[number]] if number is not None else []

    def sources_of(self, key: str) -> list[tuple[str, bool]]:
        """Keys that a node was directly made from, each with whether that is witnessed."""
        number = self._numbers.get(key)
        if number is None:
            return []
        return [(self._keys[source], self._out[source][number]) for source in self._into[number]]

    def made_with(self, key: str) -> list[Edge]:
        """Edges out of a node."""
        number = self._numbers.get(key)
        return [self._edge(number, target) for target in self._out[number]] if number is not None else []

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
        nodes, unseen = self.nodes, RANK["UNKNOWN"]
        ranks = [RANK[nodes[key].word] if key in nodes else unseen for key in self._keys]
        above: dict[int, int] = {}
        tainted, doubtful = RANK["TAINTED"], RANK["SUSPECT"]
        for number in self._ordered():
            rank = ranks[number]
            if not rank:
                continue
            for target, witnessed in self._out[number].items():
                arriving = doubtful if rank == tainted and not witnessed else rank
                if arriving > ranks[target]:
                    ranks[target], above[target] = arriving, number
        keys = self._keys
        words = {key: WORDS[rank] for key, rank in zip(keys, ranks, strict=True)}
        return Standings(words, {keys[target]: keys[source] for target, source in above.items()})

    def packed(self) -> Packed:
        """All of it as a value that can be stored; `unpacked` is its inverse."""
        claimed = [[target for target, witnessed in targets.items() if not witnessed] for targets in self._out]
        return Packed(
            nodes=tuple(self.nodes.values()),
            keys=tuple(self._keys),
            targets=tuple(tuple(targets) for targets in self._out),
            claimed={source: tuple(targets) for source, targets in enumerate(claimed) if targets},
            by=tuple((source, target, by) for (source, target), by in self._by.items()),
        )

    @classmethod
    def unpacked(cls, packed: Packed) -> Graph:
        """The graph that was packed. Raises MalformedEvidence for one that cannot have been made by `packed`."""
        graph = cls()
        graph.nodes = {node.key: node for node in packed.nodes}
        graph._keys = list(packed.keys)
        graph._numbers = {key: number for number, key in enumerate(packed.keys)}
        graph._out = [dict.fromkeys(targets, True) for targets in packed.targets]
        count = len(graph._keys)
        ends = {target for targets in packed.targets for target in targets}
        fits = len(graph._numbers) == count == len(graph._out) and graph.nodes.keys() <= graph._numbers.keys()
        if not fits or (ends and not 0 <= min(ends) <= max(ends) < count):
            raise MalformedEvidence("lineage: expected edges between its own nodes, found others")
        for source, targets in packed.claimed.items():
            if not 0 <= source < count or not graph._out[source].keys() >= set(targets):
                raise MalformedEvidence("lineage: expected claims about its own edges, found others")
            graph._out[source].update(dict.fromkeys(targets, False))
        graph._by = {(source, target): by for source, target, by in packed.by}
        graph._sources = None
        return graph

    def _ordered(self) -> list[int]:
        """Numbers of all nodes, each after all it was made from."""
        out = self._out
        waiting = [0] * len(self._keys)
        for targets in out:
            for target in targets:
                waiting[target] += 1
        ordered = [number for number, left in enumerate(waiting) if not left]
        for number in ordered:  # grows while it is walked
            for target in out[number]:
                left = waiting[target] - 1
                waiting[target] = left
                if not left:
                    ordered.append(target)
        if len(ordered) < len(waiting):
            raise self._circle(waiting)
        return ordered

    @property
    def _into(self) -> list[list[int]]:
        if self._sources is None:
            into: list[list[int]] = [[] for _ in self._keys]
            for source, targets in enumerate(self._out):
                for target in targets:
                    into[target].append(source)
            self._sources = into
        return self._sources

    def _number(self, key: str) -> int:
        """A number for a key that has none yet."""
        number = self._numbers[key] = len(self._keys)
        self._keys.append(key)
        self._out.append({})
        self._sources = None
        return number

    def _edge(self, source: int, target: int) -> Edge:
        by = self._by.get((source, target), "")
        witnessed = self._out[source][target]
        return Edge(source=self._keys[source], target=self._keys[target], witnessed=witnessed, by=by)

    def _reach(self, key: str, edges: Sequence[Iterable[int]]) -> list[str]:
        start = self._numbers.get(key)
        if start is None:
            return []
        seen = bytearray(len(self._keys))
        seen[start] = 1
        found = [start]
        for number in found:  # grows while it is walked
            for near in edges[number]:
                if not seen[near]:
                    seen[near] = 1
                    found.append(near)
        keys = self._keys
        return [keys[number] for number in found[1:]]

    def _circle(self, waiting: Sequence[int]) -> MalformedEvidence:
        """What to say of one circle: its members and who claims its edges. waiting: not 0 for what is behind one."""
        at = next(number for number, left in enumerate(waiting) if left)
        path: dict[int, int] = {}
        while at not in path:
            path[at] = next(source for source in self._into[at] if waiting[source])
            at = path[at]
        circle = [at]
        while path[circle[-1]] != at:
            circle.append(path[circle[-1]])
        names = sorted(self._keys[number] for number in circle)
        claims = sorted({by for number in circle if (by := self._by.get((path[number], number)))})
        said = f", claimed by {', '.join(claims[:4])}" if claims else ""
        return MalformedEvidence(
            "lineage: expected what was made to come after what it was made from, "
            f"found a circle among {names[:4]}{said}",
            next_step="correct the claimed edges: only those can do this",
        )
