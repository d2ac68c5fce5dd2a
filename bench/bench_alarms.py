"""How often the scan cries wolf: held-out sets of files that libraries really write.

    V/bin/python bench/bench_alarms.py make third OUT       # V: a Python that has the libraries of the set
    python bench/bench_alarms.py scan OUT                   # verdicts by library, alarms, rate

`make` runs every function of bench/alarms/<set>.py that this Python has the library for, and says which it has not.
`scan` needs only trainguard. A set counts as held out until a list is changed with its verdicts in view; which that is
stands in docs/checks/scan.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

SETS = Path(__file__).parent / "alarms"
FRAMEWORK = "_objects"
"""Functions whose name ends so write whole objects: scanned with the framework tier."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"alarms_{name}", SETS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make(name: str, out: Path) -> int:
    """Fill `out` with one folder per function of the set; returns how many could not be made."""
    module = load(name)
    missing = 0
    for maker_name, maker in inspect.getmembers(module, inspect.isfunction):
        if maker_name.startswith("_") or maker.__module__ != module.__name__:
            continue
        place = out / maker_name
        if place.exists():
            continue
        place.mkdir(parents=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                maker(place)
        except Exception as error:
            missing += 1
            print(f"not made: {maker_name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return missing


def scan(out: Path, *, as_json: bool, only: str) -> int:
    """Vet every folder as its user would; print what is not safe, and the rate."""
    from trainguard.scan import ScanPolicy, Verdict, vet

    counts: dict[str, Counter[str]] = {}
    alarms: list[tuple[str, str, str, str]] = []
    for place in sorted(p for p in out.iterdir() if p.is_dir() and only in p.name):
        tier = "framework" if place.name.endswith(FRAMEWORK) else "training"
        files = vet(place, ScanPolicy(tier=tier)).files  # type: ignore[arg-type]
        counts[place.name] = Counter(file.verdict.value for file in files)
        for file in files:
            if file.verdict is not Verdict.SAFE:
                why = file.reasons[0].what if file.reasons else ""
                alarms.append((place.name, file.path, file.verdict.value, why))
    files_of = {name: sum(count.values()) for name, count in counts.items()}
    wrong = {name: files_of[name] - count["safe"] for name, count in counts.items()}
    if as_json:
        print(json.dumps({"files": files_of, "alarms": wrong, "list": alarms}, indent=1))
        return 0
    for alarm in alarms:
        print("{}/{}: {}: {}".format(*alarm))
    for name, total in files_of.items():
        print(f"{name:24} {total:4} files {wrong[name]:4} alarms")
    for kind, chosen in (("runs and state", False), ("whole objects", True)):
        names = [name for name in files_of if name.endswith(FRAMEWORK) == chosen]
        bad, total = sum(wrong[n] for n in names), sum(files_of[n] for n in names)
        print(f"{kind}: {bad} of {total} files alarm ({100 * bad / max(total, 1):.1f} %)")
    bad, total = sum(wrong.values()), sum(files_of.values())
    print(f"all: {bad} of {total} files alarm ({100 * bad / max(total, 1):.1f} %)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb")
    making = verbs.add_parser("make")
    making.add_argument("set")
    making.add_argument("out", type=Path)
    scanning = verbs.add_parser("scan")
    scanning.add_argument("out", type=Path)
    scanning.add_argument("--json", action="store_true")
    scanning.add_argument("--only", default="", help="only folders with this in their name")
    asked = parser.parse_args()
    if asked.verb == "make":
        return make(asked.set, asked.out)
    if asked.verb == "scan":
        return scan(asked.out, as_json=asked.json, only=asked.only)
    print(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
