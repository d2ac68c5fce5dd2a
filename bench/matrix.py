"""The support matrix as a table: `python bench/matrix.py [--slow]`; exit status 1 where a cell is not as expected."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers import cells


def main() -> int:
    """Print one line per cell, a column per link; returns the exit status."""
    warnings.simplefilter("ignore")
    names = [name for name in cells.CELLS if name not in cells.SLOW or "--slow" in sys.argv]
    width = max(map(len, names))
    print(" ".join([" " * width, *(f"{link:>16}" for link, _ in cells.LINKS)]))
    status = 0
    for name in names:
        outcome = cells.run(name)
        words = [said if said.startswith("held") else "blind" for said in outcome.states.values()]
        print(f"{name:{width}}", *(f"{word:>16}" for word in words))
        for said in outcome.states.values():
            if not said.startswith("held"):
                print(f"{'':{width}}   {said[:150]}")
        for wrong in cells.agrees(name, outcome):
            print(f"{'':{width}}   NOT AS EXPECTED: {wrong[:300]}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
