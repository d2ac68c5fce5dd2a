"""Scripted incidents against what the log is said to show: who stands first, what it cost, what is tainted.

python bench/bench_incidents.py [--seeds 5] [--verbose]
python bench/bench_incidents.py --calibration    the table of incident/calibration.py again, and whether it is that
python bench/bench_incidents.py --across         fitted on one set, read on the other

Goals: the right account first in 95 % or more, a framed account never, the loss within 5 % of the truth with the truth
inside low and high, taint on every descendant and on nothing else, and nobody accused of hardware faults and honest
oddities.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from trainguard.incident.calibration import TABLE, Band, calibrated, tally
from trainguard.testing.casebook import CASEBOOK
from trainguard.testing.incidents import SCRIPTS, Score, Script, play, score

SETS = {"the first set": SCRIPTS, "the casebook": CASEBOOK}
GROUPS = {
    "act": "acts",
    "frame": "acts made to look like another's",
    "hardware": "hardware and nature",
    "honest": "honest oddities",
}


def scores(scripts: tuple[Script, ...], seeds: int) -> list[Score]:
    """Every script with every seed."""
    found = []
    for seed in range(seeds):
        for script in scripts:
            with tempfile.TemporaryDirectory() as folder:
                found.append(score(play(script, Path(folder), seed=seed)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--across", action="store_true")
    options = parser.parse_args()
    if options.calibration:
        return calibration()
    if options.across:
        return across()
    told = [table(name, scripts, options) for name, scripts in SETS.items()]
    return 0 if all(told) else 1


def table(name: str, scripts: tuple[Script, ...], options: argparse.Namespace) -> bool:
    """Print how a set was told; whether the first account is right in 95 % and no framed one ever is first."""
    began = time.process_time()
    found = scores(scripts, options.seeds)
    print(
        f"{name:34}{'n':>7}{'first right':>13}{'framed first':>14}"
        f"{'loss right':>12}{'worst loss':>12}{'taint right':>13}"
    )
    for group, words in GROUPS.items():
        part = [each for each in found if each.group == group]
        claimed = [each for each in part if each.truth_hours]
        off = [abs(e.hours.likely / e.truth_hours - 1) for e in claimed if e.hours is not None and e.truth_hours]
        worst = f"{max(off):.2%}" if off else "-"
        first, framed = f"{sum(e.right for e in part)}/{len(part)}", sum(e.framed for e in part)
        loss = f"{sum(e.loss_is_right for e in claimed)}/{len(claimed)}"
        taint = f"{sum(e.spread for e in part)}/{len(part)}"
        print(f"{words:34}{len(part):7}{first:>13}{framed:>14}{loss:>12}{worst:>12}{taint:>13}")
    seconds = time.process_time() - began
    print(f"{len(found)} incidents in {seconds:.1f} CPU-s, {1000 * seconds / len(found):.0f} ms each")
    wrong = [e for e in found if not (e.right and e.loss_is_right and e.spread) or e.framed]
    for each in wrong if options.verbose else wrong[:10]:
        print(f"  {each.group} {each.name}: {each.said} {each.hours} {each.truth_hours} {dict(each.words)}")
    right = sum(e.right for e in found) / len(found)
    return right >= 0.95 and not any(e.framed for e in found)


def calibration() -> int:
    """Print the table; 0 where it is the one that is checked in."""
    table = tally(seen(SCRIPTS) + seen(CASEBOOK))
    print(table_of(table))
    print("as checked in" if table == TABLE else f"checked in is another:\n{table_of(TABLE)}")
    return 0 if table == TABLE else 1


def across() -> int:
    """What would have been shown for one set, had the table been fitted on the other one only."""
    accounts = {name: seen(scripts) for name, scripts in SETS.items()}
    first, second = accounts
    for fitted, read in ((first, second), (second, first)):
        table = tally(accounts[fitted])
        print(f"fitted on {fitted}, read on {read}:")
        print(f"{'shown':>12}{'n':>7}{'right':>8}")
        shown = [(calibrated(score, table), right) for score, right in accounts[read]]
        for value in sorted({value for value, _ in shown}):
            part = [right for one, right in shown if one == value]
            print(f"{value:12.0%}{len(part):7}{sum(part) / len(part):8.0%}")
        plain, brier = (
            sum((value - right) ** 2 for value, right in each) / len(each) for each in (accounts[read], shown)
        )
        print(f"Brier score of scores {plain:.3f}, of what is shown {brier:.3f}")
    return 0


def seen(scripts: tuple[Script, ...]) -> list[tuple[float, bool]]:
    """Every account among the candidates of every script, once: other seeds are the same constellation."""
    return [account for each in scores(scripts, 1) for account in each.accounts]


def table_of(table: tuple[Band, ...]) -> str:
    """As it stands in the source, with the shares."""
    return "\n".join(
        f"    ({begin}, {right}, {total}),  # {(right + 1) / (total + 2):.0%}" for begin, right, total in table
    )


if __name__ == "__main__":
    sys.exit(main())
