"""A taint answer over 100,000 artifacts and 1,000,000 edges (budget: 2 CPU-s): is it tainted, why, what came of it?

python bench/bench_lineage.py

The answer is asked of a lineage that is there, in memory or as `trainguard lineage --keep` wrote it; what it costs to
read that and to put the graph together is told apart.
"""

from __future__ import annotations

import random
import time

import msgspec

from trainguard.incident.graph import Graph, Node, Packed
from trainguard.incident.lineage import Lineage, family

ARTIFACTS, EDGES = 100_000, 1_000_000


def drawn() -> tuple[list[Node], list[tuple[str, str]]]:
    """Artifacts in the order they were made, each edge from an earlier one to a later one; 1 in 1,000 tainted."""
    draw = random.Random(0)
    nodes = []
    for index in range(ARTIFACTS):
        word = "TAINTED" if index % 1000 == 999 else "VERIFIED"
        nodes.append(Node(key=f"artifact:{index:06}", kind="artifact", label=str(index), word=word))
    pairs = (sorted(draw.sample(range(ARTIFACTS), 2)) for _ in range(EDGES))
    return nodes, [(f"artifact:{a:06}", f"artifact:{b:06}") for a, b in pairs]


def main() -> None:
    nodes, edges = drawn()
    began = time.process_time()
    graph = Graph()
    for node in nodes:
        graph.add(node)
    for source, target in edges:
        graph.join(source, target, witnessed=True)
    built = time.process_time()
    key = nodes[ARTIFACTS // 2].key
    standings = graph.standings()
    standing = standings[key]
    below = graph.descendants(key)
    told = time.process_time()
    listed = family(Lineage(graph=graph, verdicts={}, seals=(), _standings=standings), key)
    lines = time.process_time()
    data = msgspec.msgpack.encode(graph.packed())
    kept = time.process_time()
    again = Graph.unpacked(msgspec.msgpack.decode(data, type=Packed))
    read = time.process_time()
    same = again.standings()[key] == standing and again.descendants(key) == below
    asked = time.process_time()
    count = len(listed.affected) + len(listed.unknown) + len(listed.cleared)
    tainted = sum(word == "TAINTED" for word in standings.words.values())
    print(
        f"build {built - began:.2f} CPU-s, answer {told - built:.2f} CPU-s: {standing.word} through "
        f"{len(standing.because)} artifacts, {len(below):,} descend from it; {tainted:,} of {ARTIFACTS:,} tainted; "
        f"listing all {count:,} lines {lines - told:.2f} CPU-s\n"
        f"kept, {len(data) / 1e6:.1f} MB: read {read - kept:.2f} CPU-s, answer {asked - read:.2f} CPU-s, same: {same}"
    )


if __name__ == "__main__":
    main()
