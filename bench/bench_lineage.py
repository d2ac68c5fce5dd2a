"""A taint answer over 100,000 artifacts and 1,000,000 edges (budget: 2 CPU-s).

python bench/bench_lineage.py
"""

from __future__ import annotations

import random
import time

from trainguard.incident.graph import Graph, Node

ARTIFACTS, EDGES = 100_000, 1_000_000


def build() -> Graph:
    """Artifacts in the order they were made, each edge from an earlier one to a later one; 1 in 1,000 tainted."""
    draw = random.Random(0)
    graph = Graph()
    for index in range(ARTIFACTS):
        word = "TAINTED" if index % 1000 == 999 else "VERIFIED"
        graph.add(Node(key=f"artifact:{index:06}", kind="artifact", label=str(index), word=word))
    for _ in range(EDGES):
        a, b = sorted(draw.sample(range(ARTIFACTS), 2))
        graph.join(f"artifact:{a:06}", f"artifact:{b:06}", witnessed=True)
    return graph


def main() -> None:
    began = time.process_time()
    graph = build()
    built = time.process_time()
    standings = graph.standings()
    told = time.process_time()
    tainted = sum(word == "TAINTED" for word in standings.words.values())
    chain = max(len(standings[key].because) for key in list(graph.nodes)[:: ARTIFACTS // 100])
    print(f"build {built - began:.2f} CPU-s, standings {told - built:.2f} CPU-s, {tainted:,} tainted, chain {chain}")


if __name__ == "__main__":
    main()
