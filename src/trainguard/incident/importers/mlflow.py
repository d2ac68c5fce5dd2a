"""MLflow: a file store (`mlruns/`) or a SQLite store (`mlflow.db`), read without MLflow.

Taken over: runs, the data sets and models that they say they used, and the models they say they made. A model that a
run both made and used (to evaluate it) was made by it.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.incident.claims import Claims
from trainguard.incident.importers.gather import Gathered, find_files, flat_yaml, read_text

META = "meta.yaml"
META_BYTES = 1 << 20
DATABASE_BYTES = 8 << 30
ROWS_LIMIT = 1_000_000
SECONDS_STEPS = 50_000_000
"""Virtual machine steps of SQLite after which reading is given up: a crafted database can make one query endless."""
IDENTITY = re.compile(r"[A-Za-z0-9_-]{1,64}")

Row = tuple[str, str, str, str, str]
"""What, and up to four texts of it."""


def read(path: Path) -> Claims:
    """The claims of the store at `path`. Raises Unavailable or MalformedEvidence."""
    rows = list(_database(path) if path.is_file() else _folder(path))
    made = Gathered(f"mlflow at {path.name}", str(path))
    runs = {
        one: made.node("artifact", f"mlflow/run/{one}", f"MLflow run {name or one}")
        for _, one, name, *_ in _of(rows, "run")
    }
    models = {
        one: made.node("artifact", f"mlflow/model/{one}", f"MLflow model {name or one}")
        for _, one, name, *_ in _of(rows, "model")
    }
    data = {
        one: made.node("data", f"mlflow/data/{name}@{digest}", f"MLflow data set {name}")
        for _, one, name, digest, _ in _of(rows, "data")
    }
    for _, model, _, run, _ in _of(rows, "model"):
        if run in runs:
            made.edge(runs[run], models[model])
    for _, run, model, *_ in _of(rows, "made"):
        if run in runs and model in models:
            made.edge(runs[run], models[model])
    for _, run, one, *_ in _of(rows, "used"):
        source = models.get(one) or data.get(one)
        if run in runs and source is not None:
            made.edge(source, runs[run])
    return made.claims


def _of(rows: list[Row], what: str) -> Iterator[Row]:
    return (row for row in rows if row[0] == what)


# -- folders ---------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Iterator[Row]:
    if not path.is_dir():
        raise Unavailable(f"{path}: expected an MLflow store, found nothing there")
    count = 0
    for meta in find_files(path, META, 4):
        parts = meta.relative_to(path).parts
        kind = parts[-3] if len(parts) >= 3 else ""
        text = _Texts(flat_yaml(read_text(meta, META_BYTES), str(meta)))
        count += 1
        if kind == "models" and text("model_id"):
            yield "model", _identity(text("model_id"), meta), text("name"), text("source_run_id"), ""
        elif kind == "datasets" and text("name"):
            yield "data", parts[-2], text("name"), text("digest"), ""
        elif kind == "inputs" and text("source_type") in ("DATASET", "MODEL"):
            yield "used", parts[-4], text("source_id"), "", ""
        elif kind == "outputs" and text("destination_type") == "MODEL_OUTPUT":
            yield "made", parts[-4], text("destination_id"), "", ""
        elif len(parts) == 3 and text("run_id"):
            yield "run", _identity(text("run_id"), meta), text("run_name"), "", ""
    if not count:
        raise MalformedEvidence(f"{path}: expected an MLflow store, found no {META} in it")


class _Texts:
    """The values of one file that are texts."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def __call__(self, name: str) -> str:
        """The value of `name`, or nothing where it is no text."""
        value = self._values.get(name)
        return value[:500] if isinstance(value, str) else ""


def _identity(text: str, where: Path) -> str:
    if IDENTITY.fullmatch(text) is None:
        raise MalformedEvidence(f"{where}: expected an id of letters, digits, _ and -, found {text[:60]!r}")
    return text


# -- SQLite ----------------------------------------------------------------------------------------------------------

QUERIES = (
    ("run", "SELECT run_uuid, name, '', '' FROM runs"),
    ("model", "SELECT model_id, name, source_run_id, '' FROM logged_models"),
    ("data", "SELECT dataset_uuid, name, digest, '' FROM datasets"),
    (
        "used",
        "SELECT destination_id, source_id, '', '' FROM inputs WHERE source_type = 'DATASET'",
    ),
    ("used", "SELECT source_id, destination_id, '', '' FROM inputs WHERE destination_type = 'MODEL_INPUT'"),
    ("made", "SELECT source_id, destination_id, '', '' FROM inputs WHERE destination_type = 'MODEL_OUTPUT'"),
)


def _database(path: Path) -> Iterator[Row]:
    """Rows of a copy-free, read-only, untrusted connection: no extensions, no schema code, bounded work."""
    if path.stat().st_size > DATABASE_BYTES:
        raise MalformedEvidence(f"{path}: expected a database of at most {DATABASE_BYTES} bytes, found more")
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    except sqlite3.Error as error:
        raise Unavailable(f"{path}: cannot be opened: {error}") from None
    steps = [0]

    def budget() -> int:
        steps[0] += 1
        return int(steps[0] > SECONDS_STEPS // 10_000)

    try:
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.set_progress_handler(budget, 10_000)
        known = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if "runs" not in known:
            raise MalformedEvidence(f"{path}: expected an MLflow database, found no table of runs")
        for what, query in QUERIES:
            if query.split(" FROM ")[1].split(" ")[0] not in known:
                continue
            for number, row in enumerate(connection.execute(query)):
                if number >= ROWS_LIMIT:
                    raise MalformedEvidence(f"{path}: expected at most {ROWS_LIMIT} rows of a kind, found more")
                first, second, third, fourth = (one[:500] if isinstance(one, str) else "" for one in row)
                yield what, first, second, third, fourth
    except sqlite3.Error as error:
        raise MalformedEvidence(f"{path}: not an MLflow database: {error}") from None
    finally:
        connection.close()
