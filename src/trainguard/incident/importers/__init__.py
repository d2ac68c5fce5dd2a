"""Edges that trackers and registries claim, read from their own files (docs/lineage.md).

    claims = read_any("mlflow:mlruns")            # or wandb:, openlineage:, huggingface:, or a claims file of ours
    claims.join(lineage.graph)

Nothing is imported, executed or fetched: files are parsed here, strictly and bounded. What they say is claimed, never
witnessed, so it can cast doubt on a model and can clear none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainguard.errors import Misuse
from trainguard.incident.claims import Claims, read_claims
from trainguard.incident.importers import huggingface, mlflow, openlineage, wandb

READERS: dict[str, Callable[[Path], Claims]] = {
    "mlflow": mlflow.read,
    "wandb": wandb.read,
    "openlineage": openlineage.read,
    "huggingface": huggingface.read,
}


def read_any(named: str) -> Claims:
    """The claims at `KIND:PATH`, or at PATH in our own format.

    Raises Misuse for an unknown kind, Unavailable and MalformedEvidence as the readers do.
    """
    kind, colon, path = named.partition(":")
    if colon and kind in READERS:
        return READERS[kind](Path(path))
    if colon and kind.isalpha() and not Path(named).exists():
        raise Misuse(f"--claims {named[:80]!r}: expected one of {', '.join(READERS)} before the colon, found {kind!r}")
    return read_claims(Path(named))
