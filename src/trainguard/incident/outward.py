"""Everything about one model, or about the registered data, that an export needs; read from the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from trainguard.appraise.verdict import Verdict, until
from trainguard.archive import LogLeaves
from trainguard.envelope import load_public_key
from trainguard.errors import Misuse, TrainguardError
from trainguard.home import Home
from trainguard.incident.facts import RunFacts, run_facts
from trainguard.incident.graph import Node, Standing
from trainguard.incident.lineage import Lineage, checkpoint_key, read_lineage
from trainguard.lockfile import Distribution, parse_lock
from trainguard.seal.ledger import SealLeaf, read_ledger
from trainguard.seal.manifest import SINGLE, read_manifest, resolve, root_digest
from trainguard.sources.register import read_register

PACKAGES_LIMIT = 5_000
Terms = Mapping[str, Sequence[Mapping[str, str]]]
"""SHA-256 of a content → sources it is registered as of, each with `source`, `licence` and `use`."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What the bill is about."""

    name: str
    root: str
    """OMS root digest, hex."""
    files: Mapping[str, str]
    """Path in the checkpoint → SHA-256."""
    facts: RunFacts
    verdict: Verdict
    """Of its run up to its step."""
    standing: Standing
    """All it was made from included."""
    step: int | None = None
    leaf: int | None = None
    ancestors: tuple[Node, ...] = ()
    """Checkpoints its run went on from."""
    packages: Sequence[Distribution] = ()


def terms_of(home: Home, leaves: LogLeaves | None = None) -> dict[str, list[dict[str, str]]]:
    """SHA-256 of a content → the sources it is registered as of, with licence and use."""
    register = read_register(leaves if leaves is not None else LogLeaves(home), home)
    return {
        digest: [
            {"source": source.name, "licence": entry.licence or "", "use": entry.use or ""}
            for source, _, entry in known
        ]
        for digest, known in register.contents.items()
    }


def seals_of(home: Home) -> tuple[SealLeaf, ...]:
    """Every seal of the log, oldest first."""
    ledger = read_ledger(home, load_public_key(home.keys / "attestation.pub"))
    return ledger.seals if ledger is not None else ()


def model_of(home: Home, path: Path) -> Model:
    """The checkpoint that lies at `path`, with what made it. Reads all of its bytes.

    Raises Misuse where no watched run is known that sealed these bytes.
    """
    manifest = read_manifest(resolve(path), tensors=False)
    root = root_digest(str(entry.digest) for entry in manifest.resources)
    lineage = read_lineage(home)
    key = checkpoint_key(root)
    node = lineage.graph.nodes.get(key)
    if node is None or node.run is None or node.run not in lineage.verdicts:
        raise Misuse(
            f"{path}: expected a checkpoint that a watched run sealed, found bytes of which no run is known",
            next_step="trainguard verify names what the log knows of it",
        )
    verdict = lineage.verdicts[node.run]
    seal = next(seal for seal in lineage.seals if seal.root == root and seal.run == node.run)
    facts = run_facts(home, node.run, leaves=LogLeaves(home), seals=lineage.seals)
    return Model(
        name=path.name,
        root=root,
        files={path.name if entry.name == SINGLE else entry.name: str(entry.digest) for entry in manifest.resources},
        facts=facts,
        verdict=until(verdict, node.step) if node.step is not None else verdict,
        standing=lineage.standing_of(key),
        step=node.step,
        leaf=seal.leaf,
        ancestors=tuple(_bases(lineage, node.run)),
        packages=_packages(home, facts),
    )


def _bases(lineage: Lineage, run: str) -> list[Node]:
    """The checkpoints that the run went on from."""
    edges = lineage.graph.made_from(f"start:{run}")
    nodes = [lineage.graph.nodes.get(edge.source) for edge in edges]
    return [node for node in nodes if node is not None and node.kind == "checkpoint"]


def _packages(home: Home, facts: RunFacts) -> tuple[Distribution, ...]:
    """What the run's lock approved as installed; nothing where it ran without one."""
    if facts.lock is None:
        return ()
    try:
        lock = parse_lock(home.blob(facts.lock), where="lock")
    except TrainguardError:
        return ()
    return tuple(lock.measurement.distributions.values())[:PACKAGES_LIMIT]
