"""Everything that the documents on one incident are drawn from, read once from the log.

    dossier = make_dossier(home, "inc-4f", prices=prices)
    dossier.incident, dossier.damage, dossier.family, dossier.source

Nothing in it depends on when it was made: the same log gives the same dossier, and so the same documents.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import VerificationError
from trainguard.home import Home
from trainguard.incident.correlate import Incident, find, incidents
from trainguard.incident.damage import NO_PRICES, Damage, Prices, assess
from trainguard.incident.lineage import Family, family, read_lineage


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The log that something was drawn from."""

    leaves: int
    """Entries."""
    root: str
    """Root hash of the tree head, hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dossier:
    """See the module."""

    incident: Incident
    family: Family
    """Everything in the log."""
    damage: Damage
    """Of the incident's run and of what was made from it."""
    source: Source
    began: int | None
    """When the first record that a finding rests on was written, nanoseconds since the epoch."""
    ended: int | None
    """The last such record."""
    running: bool
    """Whether the record of the run goes on."""


def source_of(home: Home) -> Source:
    """The log's head as it is now. Raises as LogLeaves does."""
    head = LogLeaves(home).head
    return Source(leaves=head.size, root=head.root.hex())


def make_dossier(home: Home, name: str, *, prices: Prices = NO_PRICES, device: str | None = None) -> Dossier:
    """The dossier of the incident whose id is or begins with `name`. Raises Misuse and as `read_lineage` does."""
    lineage = read_lineage(home)
    incident = find(incidents(home, lineage=lineage), name)
    began, ended = _moments(home, incident)
    return Dossier(
        incident=incident,
        family=family(lineage),
        damage=assess(home, prices=prices, device=device, runs=[incident.run], lineage=lineage),
        source=source_of(home),
        began=began,
        ended=ended,
        running=RunReader(home, incident.run).running,
    )


def _moments(home: Home, incident: Incident) -> tuple[int | None, int | None]:
    wanted = {citation.hash for finding in incident.findings for citation in finding.evidence}
    at: list[int] = []
    with contextlib.suppress(VerificationError):  # the verdict says so: check `log`
        at.extend(record.at for record in RunReader(home, incident.run).records() if record.hash in wanted)
    return min(at, default=None), max(at, default=None)
