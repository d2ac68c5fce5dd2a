"""The official schemas that exports are held to (tests/vectors/schemas)."""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "vectors" / "schemas"


@functools.cache
def read(name: str) -> Any:
    """One schema by its file's name without the endings."""
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


@functools.cache
def validator(name: str, pointer: str = "") -> Any:
    """A validator for a schema, or for a part of it; others that it refers to are the ones beside it."""
    jsonschema = pytest.importorskip("jsonschema")
    referencing = pytest.importorskip("referencing")
    beside = [read(path.name.removesuffix(".json.gz")) for path in FOLDER.glob("*.json.gz")]
    resources = []
    for schema in beside:
        named = schema.get("$id") or schema["id"]
        found = referencing.Resource.from_contents(schema, referencing.jsonschema.DRAFT202012)
        resources += [(named, found), (named.split("/schema/")[-1].replace("http://cyclonedx.org/", ""), found)]
    registry = referencing.Registry().with_resources(resources)
    schema = read(name)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    top = {"$ref": f"{schema['$id']}{pointer}"} if pointer else schema
    checker = jsonschema.FormatChecker(("uuid",))
    checker.checks("date-time")(_is_time)
    checker.checks("uri")(lambda text: re.fullmatch(r"[a-z][a-z0-9+.-]*:\S+", text) is not None)
    return kind(top, registry=registry, format_checker=checker)


def errors(found: Any, name: str, pointer: str = "") -> list[str]:
    """Where `found` departs from the schema, one line each."""
    said = sorted(validator(name, pointer).iter_errors(found), key=lambda error: error.json_path)
    return [f"{error.json_path}: {error.message[:200]}" for error in said]


def _is_time(text: str) -> bool:
    return re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text) is not None
