"""From the catalogue's ids to MITRE ATLAS and ATT&CK, by one table with pinned releases (render/techniques.json)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec


class Framework(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One outside catalogue."""

    name: str
    version: str
    checked: str
    """What was compared with its release when the table was made."""


class Near(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outside ids nearest to one of ours."""

    attack: tuple[str, ...] = ()
    atlas: tuple[str, ...] = ()


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole table."""

    schema: str
    provenance: str
    frameworks: dict[str, Framework]
    names: dict[str, str]
    """Outside id → its name, where the release was at hand."""
    techniques: dict[str, Near]


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """One outside technique."""

    framework: str
    """Its name with its release: `MITRE ATLAS 5.6.0`."""
    version: str
    uid: str
    name: str | None = None


@functools.cache
def table() -> Table:
    """The table that this version of trainguard was shipped with."""
    data = (Path(__file__).parent / "techniques.json").read_bytes()
    return msgspec.json.decode(data, type=Table)


def outside(techniques: Iterable[str]) -> Iterator[Outside]:
    """Outside techniques near to these of ours, each once, ATLAS first; none for an id that is not in the table."""
    known = table()
    near = [known.techniques[ours] for ours in techniques if ours in known.techniques]
    for key, ids in (("atlas", [n.atlas for n in near]), ("attack", [n.attack for n in near])):
        framework = known.frameworks[key]
        for uid in dict.fromkeys(uid for several in ids for uid in several):
            yield Outside(
                framework=f"{framework.name} {framework.version}",
                version=framework.version,
                uid=uid,
                name=known.names.get(uid),
            )
