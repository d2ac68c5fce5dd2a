"""Which names a file may use, and for what: exact `module.qualname`, never a package.

The lists are data (`lists/*.json`), one file per library, with where each came from. A name has a *kind*; the kind
says by which rule it may be called, instantiated, given state, or filled with items. A use without a rule is refused.
A user's own file adds names, one a line: `module.qualname USE [sha256:HEX]`, USE being value, instance or call.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainguard.errors import Misuse
from trainguard.scan.limits import ScanPolicy, Tier
from trainguard.scan.rules import KINDS, Kind

LISTS = Path(__file__).with_name("lists")
"""The shipped lists. A plain path: importlib.resources would cost more than all of them."""

TIERS: tuple[Tier, ...] = ("weights", "training", "framework")

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*([.:][A-Za-z_]\w*)(\.[A-Za-z_]\w*)*\Z", re.ASCII)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", re.ASCII)
LINE = re.compile(r"(?P<name>\S+)\s+(?P<use>value|instance|call)(\s+sha256:(?P<sha256>[0-9a-f]{64}))?\Z")

USES = {"value": "constant", "instance": "instance", "call": "anything"}
"""A trust line's USE → the kind the name gets."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A name on a list."""

    name: str
    kind: str
    rules: Kind
    tier: str


class Trust:
    """The names one file may use: the lists of a tier and the user's lines."""

    def __init__(self, policy: ScanPolicy, sha256: str | None = None) -> None:
        """`sha256` of the file about to be judged; lines bound to another hash do not count."""
        self._names = _names_up_to(policy.tier)
        self._user = {line.name: line for line in map(parse_trust_line, policy.trust) if line.sha256 in (None, sha256)}
        self.tier = policy.tier

    def find(self, name: str) -> Listed | None:
        """The entry for `name` (`module.qualname`), or None. The user's line wins over a list."""
        line = self._user.get(name)
        if line is not None:
            return Listed(name, USES[line.use], KINDS[USES[line.use]], "user")
        entry = self._names.get(name)
        return Listed(name, entry[0], KINDS[entry[0]], entry[1]) if entry is not None else None

    def could_import(self, module: str, name: str) -> bool:
        """Whether bytes that are no pickle by their looks mean this name: it is of the standard library, a list, or
        a module in a package. A label file that reads `cat`, `dog` means none."""
        if not IDENTIFIER.match(module) or not IDENTIFIER.match(name):
            return False
        top = module.partition(".")[0]
        return top in sys.stdlib_module_names or self.find(f"{module}.{name}") is not None or "." in module


@dataclass(frozen=True, slots=True)
class TrustLine:
    """One line of a trust file."""

    name: str
    use: str
    sha256: str | None


def parse_trust_line(text: str) -> TrustLine:
    """One trust line; raises Misuse when it is not one or names something that runs code."""
    match = LINE.match(text.strip())
    if match is None or not NAME.match(match["name"]):
        raise Misuse(
            f"trust: expected 'module.qualname value|instance|call [sha256:HEX]', found {text.strip()[:120]!r}"
        )
    if runs_code(match["name"]):
        raise Misuse(f"trust: {match['name']} runs code given by the file and cannot be trusted by name")
    return TrustLine(match["name"], match["use"], match["sha256"])


def parse_trust(data: bytes, *, where: str) -> tuple[str, ...]:
    """The lines of a trust file, checked; `#` starts a comment. Raises Misuse naming `where` and the line."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Misuse(f"{where}: not UTF-8 text: {error}") from error
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        wanted = line.partition("#")[0].strip()
        if not wanted:
            continue
        try:
            parse_trust_line(wanted)
        except Misuse as error:
            raise Misuse(f"{where}:{number}: {error}") from error
        lines.append(wanted)
    return tuple(lines)


@functools.cache
def _names_up_to(tier: str) -> dict[str, tuple[str, str]]:
    """name → (kind, tier) for `tier` and everything below it. What one tier may only name, a higher may make."""
    wanted = TIERS[: TIERS.index(tier) + 1] if tier in TIERS else TIERS[:2]
    names: dict[str, tuple[str, str]] = {}
    for shelf in _shelves(framework="framework" in wanted):
        for level in wanted:
            for kind, members in shelf["tiers"].get(level, {}).items():
                for name in members:
                    if names.get(name, ("named",))[0] == "named":
                        names[name] = (kind, level)
    return names


def tier_of(name: str) -> str | None:
    """The lowest tier whose lists hold `name`, or None. Reads every list; for messages only."""
    entry = _names_up_to("framework").get(name)
    return entry[1] if entry else None


def _shelves(*, framework: bool) -> list[dict[str, Any]]:
    files = sorted(path.name for path in LISTS.glob("*.json"))
    prefixes = ("core", "training_", "framework_") if framework else ("core", "training_")
    wanted = [name for name in files if name.startswith(prefixes)]
    return [json.loads((LISTS / name).read_text()) for name in wanted]


@functools.cache
def _dangerous() -> tuple[frozenset[str], frozenset[str]]:
    data = json.loads((LISTS / "dangerous.json").read_text())
    return frozenset(data["modules"]), frozenset(data["names"])


def runs_code(name: str) -> bool:
    """Whether `name` is known to run code, start programs or reach files.

    It only chooses between the words unknown and unsafe, which both refuse; the gate is the lists above.
    """
    modules, names = _dangerous()
    if name in names:
        return True
    parts = name.replace(":", ".").split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts)))
