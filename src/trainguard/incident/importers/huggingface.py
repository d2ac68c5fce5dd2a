"""Hugging Face: what a model folder says it was made from.

Read are the model card (front matter of README.md: `base_model`, `datasets`), adapter_config.json
(`base_model_name_or_path`), config.json (`_name_or_path`) and the `__metadata__` of safetensors files (`base_model`). A
name that is a folder on this machine is that folder's checkpoint, by content; any other is a model of that name.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from trainguard.errors import MalformedEvidence, TrainguardError, Unavailable
from trainguard.incident.claims import Claims
from trainguard.incident.importers.gather import Gathered, flat_yaml, parse_json, read_text, texts
from trainguard.incident.lineage import root_of

CARD_BYTES = 4 << 20
CONFIG_BYTES = 16 << 20
HEADER_BYTES = 100 << 20
FILES_LIMIT = 2_000


def read(path: Path) -> Claims:
    """The claims of the model folder `path`; reads all of it. Raises Unavailable or MalformedEvidence."""
    if not path.is_dir():
        raise Unavailable(f"{path}: expected the folder of a model, found nothing of the kind")
    made = Gathered(f"Hugging Face metadata in {path.name}", str(path))
    subject = made.node("checkpoint", root_of(path), f"model in {path.name}")
    found = [*_card(path), *_configs(path), *_headers(path)]
    for kind, name in found:
        if kind == "data":
            made.edge(made.node("data", f"huggingface/{name}", f"Hugging Face data set {name}"), subject)
        else:
            made.edge(_model(made, name, path), subject)
    return made.claims


def _model(made: Gathered, name: str, beside: Path) -> str:
    """The node of a model by its name; by content where it is a folder here."""
    for folder in (Path(name), beside.parent / name) if not name.startswith("~") else ():
        if folder.is_dir() and folder.resolve() != beside.resolve():
            try:
                return made.node("checkpoint", root_of(folder), f"model in {folder.name}")
            except TrainguardError:
                break
    return made.node("artifact", f"huggingface/{name}", f"Hugging Face model {name}")


def _card(path: Path) -> Iterator[tuple[str, str]]:
    card = path / "README.md"
    if not card.is_file():
        return
    lines = read_text(card, CARD_BYTES).splitlines()
    if not lines or lines[0].strip() != "---":
        return
    end = next((number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise MalformedEvidence(f"{card}: expected front matter that ends with ---, found no end")
    values = flat_yaml("\n".join(lines[1:end]), str(card))
    yield from (("model", name) for name in texts(values.get("base_model")))
    yield from (("data", name) for name in texts(values.get("datasets")))


def _configs(path: Path) -> Iterator[tuple[str, str]]:
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        file = path / name
        if not file.is_file():
            continue
        value = parse_json(read_text(file, CONFIG_BYTES), str(file))
        if not isinstance(value, dict):
            raise MalformedEvidence(f"{file}: expected a JSON object, found {type(value).__name__}")
        yield from (("model", one) for one in texts(value.get(key)))


def _headers(path: Path) -> Iterator[tuple[str, str]]:
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if len(files) > FILES_LIMIT:
        raise MalformedEvidence(f"{path}: expected at most {FILES_LIMIT} safetensors files, found {len(files)}")
    for file in files:
        with file.open("rb") as opened:
            head = opened.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < size <= min(HEADER_BYTES, os.fstat(opened.fileno()).st_size - 8):
                raise MalformedEvidence(f"{file}: expected the header of a safetensors file, found a length of {size}")
            try:
                header = json.loads(opened.read(size))
            except (ValueError, RecursionError):
                raise MalformedEvidence(f"{file}: expected the header of a safetensors file, found no JSON") from None
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        if isinstance(metadata, dict):
            yield from (("model", name) for name in texts(metadata.get("base_model")))
