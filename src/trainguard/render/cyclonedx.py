"""A model as a CycloneDX ML-BOM (1.6 or 1.7): its bytes, what made it, the data and models it was made from.

Components: the model with a model card and its pedigree, the models it went on from, every content that its run read
(with source and licence where registered), and the packages that the run's lock approved. Verdict, level and log leaf
are properties under `trainguard:`. The document is a pure function of log and model: made twice, it is the same bytes.
"""

from __future__ import annotations

import urllib.parse
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainguard import __version__
from trainguard.incident.facts import Read
from trainguard.incident.graph import Node
from trainguard.incident.outward import Model, Terms
from trainguard.lockfile import Distribution
from trainguard.render.openlineage import time_text

SPECS = ("1.6", "1.7")
BOMS = uuid.UUID("a0a5f2f2-3f43-5b0c-8f0e-9a4a2f6f6f02")
DATA_LIMIT = 10_000


def bill(model: Model, *, terms: Terms | None = None, spec: str = "1.6") -> dict[str, Any]:
    """The bill as a JSON-able dict. spec: 1.6 or 1.7."""
    ref = f"model:{model.root}"
    data = [_data(read, terms or {}) for read in model.facts.reads[:DATA_LIMIT]]
    bases = [_base(node) for node in model.ancestors]
    packages = [_package(one) for one in model.packages]
    parts = [*bases, *data, *packages]
    made_from = [part["bom-ref"] for part in (*bases, *data)]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{spec}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": spec,
        "serialNumber": f"urn:uuid:{uuid.uuid5(BOMS, f'{model.root}/{model.facts.run}/{model.leaf}')}",
        "version": 1,
        "metadata": {
            "timestamp": time_text(model.facts.ended_ns),
            "tools": {"components": [{"type": "application", "name": "trainguard", "version": __version__}]},
            "component": _model(model, ref, data, bases),
        },
        "components": parts,
        "dependencies": [
            {"ref": ref, "dependsOn": [*made_from, *(package["bom-ref"] for package in packages)]},
            *({"ref": part["bom-ref"], "dependsOn": []} for part in parts),
        ],
    }


def _model(model: Model, ref: str, data: Sequence[Mapping[str, Any]], bases: list[dict[str, Any]]) -> dict[str, Any]:
    files = [
        {"type": "file", "bom-ref": f"{ref}#{name}", "name": name, "hashes": _hashes(digest)}
        for name, digest in sorted(model.files.items())
    ]
    card: dict[str, Any] = {"modelParameters": {"datasets": [{"ref": one["bom-ref"]} for one in data]}}
    if not data:
        card = {"modelParameters": {}}
    return {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": model.name,
        "version": f"step-{model.step}" if model.step is not None else model.facts.run,
        "components": files,
        "pedigree": {"ancestors": [{**base, "bom-ref": f"{base['bom-ref']}:ancestor"} for base in bases]},
        "modelCard": card,
        "properties": list(_properties(model)),
    }


def _properties(model: Model) -> Iterator[dict[str, str]]:
    told: dict[str, object] = {
        "run": model.facts.run,
        "step": model.step,
        "root-digest": model.root,
        "leaf": model.leaf,
        "verdict": model.standing.word,
        "own-verdict": model.verdict.verdict,
        "level": model.verdict.level,
        "lock": model.facts.lock,
        "steps": model.facts.steps,
        "contents-left-out": model.facts.reads_left_out + max(0, len(model.facts.reads) - DATA_LIMIT),
    }
    for name, value in told.items():
        if value is not None:
            yield {"name": f"trainguard:{name}", "value": str(value)}


def _base(node: Node) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": f"base:{node.key}",
        "name": node.label,
        "properties": [{"name": "trainguard:verdict", "value": node.word}],
    }


def _data(read: Read, terms: Terms) -> dict[str, Any]:
    known = terms.get(read.sha256, ())
    part: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data:{read.sha256}:{urllib.parse.quote(read.path)}",
        "name": read.path.rsplit("/", 1)[-1] or read.path,
        "hashes": _hashes(read.sha256),
        "data": [{"type": "dataset", "name": read.path}],
        "properties": [
            {"name": "trainguard:path", "value": read.path},
            {"name": "trainguard:witnessed", "value": "true"},
            *({"name": "trainguard:source", "value": one["source"]} for one in known),
            *({"name": "trainguard:use", "value": one["use"]} for one in known),
        ],
    }
    licences = [{"license": {"name": name}} for name in dict.fromkeys(one["licence"] for one in known)]
    return part | ({"licenses": licences} if licences else {})


def _package(package: Distribution) -> dict[str, Any]:
    purl = f"pkg:pypi/{urllib.parse.quote(package.name)}@{urllib.parse.quote(package.version)}"
    return {"type": "library", "bom-ref": purl, "name": package.name, "version": package.version, "purl": purl}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]
