"""Claims of trackers: read as they are written, refused where they are not, and never able to clear anything."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import told

from trainguard.cli import main
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError, Unavailable
from trainguard.home import Home
from trainguard.incident.claims import Claims
from trainguard.incident.graph import Graph, Node
from trainguard.incident.importers import READERS, read_any
from trainguard.incident.importers.gather import Gathered, flat_yaml, safe
from trainguard.incident.importers.wandb import records
from trainguard.incident.lineage import checkpoint_key, root_of

RUN, OTHER = "a" * 32, "b" * 32


def edges(claims: Claims) -> set[tuple[str, str]]:
    """Edges by label."""
    labels = {node.key: node.label for node in claims.nodes}
    return {(labels[source], labels[target]) for source, target in claims.edges}


# -- MLflow ----------------------------------------------------------------------------------------


def put(root: Path, place: str, /, **values: object) -> None:
    """A meta.yaml as MLflow's file store writes it."""
    path = root / place / "meta.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key}: {'null' if value is None else value}\n" for key, value in values.items()))


@pytest.fixture
def mlruns(tmp_path: Path) -> Path:
    """Two runs: the first made a model from a data set, the second went on from it and evaluated its own."""
    root = tmp_path / "mlruns"
    put(root, "0", experiment_id="'0'", name="Default")
    put(root, f"1/{RUN}", run_id=RUN, run_name="first", tags="[]")
    put(root, f"1/{OTHER}", run_id=OTHER, run_name="second", tags="[]")
    put(root, "1/models/m-1", model_id="m-1", name="base", source_run_id=RUN)
    put(root, "1/models/m-2", model_id="m-2", name="chat", source_run_id=OTHER)
    put(root, "1/datasets/d1", digest="d1", name="acme", source='\'{"uri":"data/a"}\'')
    put(root, f"1/{RUN}/inputs/x", source_id="d1", source_type="DATASET", destination_type="RUN", tags="{}")
    put(root, f"1/{OTHER}/inputs/y", source_id="m-1", source_type="MODEL", destination_type="RUN")
    put(root, f"1/{OTHER}/inputs/z", source_id="m-2", source_type="MODEL", destination_type="RUN")
    put(root, f"1/{OTHER}/outputs/m-2", destination_id="m-2", destination_type="MODEL_OUTPUT", source_type="RUN_OUTPUT")
    return root


EXPECTED = {
    ("MLflow data set acme", "MLflow run first"),
    ("MLflow run first", "MLflow model base"),
    ("MLflow model base", "MLflow run second"),
    ("MLflow run second", "MLflow model chat"),
}


def test_a_file_store_of_mlflow_is_read(mlruns: Path) -> None:
    """Data set → run → model → run → model; evaluating its own model is no circle."""
    assert edges(read_any(f"mlflow:{mlruns}")) == EXPECTED


def database(path: Path, *extra: str) -> Path:
    """The same as a SQLite store."""
    with sqlite3.connect(path) as connection:
        connection.executescript(
            f"""
            CREATE TABLE runs (run_uuid TEXT, name TEXT);
            CREATE TABLE logged_models (model_id TEXT, name TEXT, source_run_id TEXT);
            CREATE TABLE datasets (dataset_uuid TEXT, name TEXT, digest TEXT);
            CREATE TABLE inputs (source_type TEXT, source_id TEXT, destination_type TEXT, destination_id TEXT);
            INSERT INTO runs VALUES ('{RUN}', 'first'), ('{OTHER}', 'second');
            INSERT INTO logged_models VALUES ('m-1', 'base', '{RUN}'), ('m-2', 'chat', '{OTHER}');
            INSERT INTO datasets VALUES ('u1', 'acme', 'd1');
            INSERT INTO inputs VALUES ('DATASET', 'u1', 'RUN', '{RUN}'),
              ('RUN_INPUT', '{OTHER}', 'MODEL_INPUT', 'm-1'), ('RUN_OUTPUT', '{OTHER}', 'MODEL_OUTPUT', 'm-2');
            {";".join(extra)}
            """
        )
    connection.close()
    return path


def test_a_database_of_mlflow_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    """Read-only: not even a journal appears beside it."""
    path = database(tmp_path / "mlflow.db")
    before = path.read_bytes()
    assert edges(read_any(f"mlflow:{path}")) == EXPECTED
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_view_in_place_of_a_table_is_not_run(tmp_path: Path) -> None:
    """Only tables are read: a view is code of whoever wrote the file."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, i, i FROM n"
    path = database(tmp_path / "m.db", "DROP TABLE datasets", f"CREATE VIEW datasets AS {endless}")
    assert ("MLflow run first", "MLflow model base") in edges(read_any(f"mlflow:{path}"))


def test_models_that_are_made_from_each_other_are_refused_with_the_circle(mlruns: Path) -> None:
    """base → second → chat → first → base: nothing of it is taken over."""
    put(mlruns, f"1/{RUN}/inputs/q", source_id="m-2", source_type="MODEL", destination_type="RUN")
    with pytest.raises(MalformedEvidence, match=r"found a circle: artifact:mlflow/.* -> ") as refused:
        read_any(f"mlflow:{mlruns}")
    assert "nothing of it was taken over" in str(refused.value.next_step)


@pytest.mark.parametrize("text", ["run_id: ../../etc\n", "no colon\n", "run_id: 'a b'\n"])
def test_a_run_with_an_id_that_none_can_have_is_refused(mlruns: Path, text: str) -> None:
    """Strictly parsed."""
    (mlruns / "1" / RUN / "meta.yaml").write_text(text)
    with pytest.raises(MalformedEvidence):
        read_any(f"mlflow:{mlruns}")


def test_a_store_that_is_none_is_said(tmp_path: Path) -> None:
    """Missing, empty, and a file of another kind."""
    with pytest.raises(Unavailable):
        read_any(f"mlflow:{tmp_path / 'none'}")
    with pytest.raises(MalformedEvidence, match=r"found no meta\.yaml"):
        read_any(f"mlflow:{tmp_path}")
    (tmp_path / "x.db").write_bytes(b"no database at all, " * 100)
    with pytest.raises(MalformedEvidence, match="not an MLflow database"):
        read_any(f"mlflow:{tmp_path / 'x.db'}")


# -- Weights & Biases ------------------------------------------------------------------------------


def field(number: int, content: bytes) -> bytes:
    """One protobuf field with bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def wandb_file(*contents: bytes) -> bytes:
    """A run file of these records, cut into blocks as wandb does."""
    out = bytearray(b":W&B\xe1\xbe\x00")
    for content in contents:
        first, rest = True, content
        while first or rest:
            left = 32768 - len(out) % 32768
            if left < 7:
                out += b"\0" * left
                left = 32768
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if not rest else 2) if first else (3 if rest else 4)
            out += struct.pack("<IHB", zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
            first = False
    return bytes(out)


WANDB = (
    field(17, field(1, b"run1") + field(8, b"proud-sky-1")),
    field(25, field(3, b"acme/data:v0")),
    field(8, field(5, b"model") + field(6, b"abc") + field(12, b"m" * 100_000)),
)


def test_an_offline_run_of_wandb_is_read(tmp_path: Path) -> None:
    """Also where a record spans several blocks."""
    folder = tmp_path / "offline-run-1"
    folder.mkdir()
    (folder / "run-run1.wandb").write_bytes(wandb_file(*WANDB))
    assert edges(read_any(f"wandb:{folder}")) == {
        ("W&B artifact acme/data:v0", "W&B run proud-sky-1"),
        ("W&B run proud-sky-1", "W&B artifact model@abc"),
    }


def test_exported_json_of_wandb_is_read(tmp_path: Path) -> None:
    """As its public API names artifacts."""
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([{"run": "r", "name": "n", "used": ["e/p/d:v0"], "logged": ["e/p/m:v1", 3]}]))
    assert edges(read_any(f"wandb:{path}")) == {
        ("W&B artifact e/p/d:v0", "W&B run n"),
        ("W&B run n", "W&B artifact e/p/m:v1"),
    }
    path.write_text('[{"name": "no run"}]')
    with pytest.raises(MalformedEvidence, match="entry 0"):
        read_any(f"wandb:{path}")


def test_a_run_file_that_is_cut_off_is_read_so_far_and_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    """The run may still be going on; a changed byte is no run of wandb's making."""
    data = wandb_file(*WANDB[:2])
    assert list(records(data[:-3], "x")) == [WANDB[0]]
    for at in (0, 9, len(data) - 1):
        with pytest.raises(MalformedEvidence):
            list(records(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "x"))


# -- OpenLineage -----------------------------------------------------------------------------------


def event(run: str = RUN, inputs: Sequence[str] = (), outputs: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """A run event."""
    sets = [[{"namespace": "s3", "name": name} for name in names] for names in (inputs, outputs)]
    whole = {"eventType": "COMPLETE", "producer": "p", "run": {"runId": run}, "job": {"namespace": "n", "name": "j"}}
    return whole | {"inputs": sets[0], "outputs": sets[1]} | more


def lines(path: Path, *events: Any) -> str:
    path.write_text("\n".join(json.dumps(each) for each in events))
    return f"openlineage:{path}"


def test_openlineage_events_are_read(tmp_path: Path) -> None:
    """A table that is read and written is not made from itself; events about a job alone say nothing."""
    named = lines(tmp_path / "e", event(inputs=["a", "b"], outputs=["b", "c"]), {"producer": "p", "job": {}})
    assert edges(read_any(named)) == {
        ("s3: a", "OpenLineage run of j"),
        ("s3: b", "OpenLineage run of j"),
        ("OpenLineage run of j", "s3: c"),
    }


def test_our_own_events_come_back_to_our_own_nodes(tmp_path: Path) -> None:
    """As claims."""
    own = event(run=OTHER, run_=0)
    own["run"]["facets"] = {"trainguard_run": {"run": "r7"}}
    own["outputs"] = [{"namespace": "trainguard", "name": f"checkpoint:{'ab' * 32}"}]
    claims = read_any(lines(tmp_path / "e", own))
    assert claims.edges == (("run:r7", f"checkpoint:{'ab' * 32}"),)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        {"producer": "p", "run": {}, "job": {}},
        event(inputs_=0) | {"inputs": {}},
        event() | {"inputs": [{"name": "x"}]},
        event() | {"run": "r"},
    ],
)
def test_an_event_that_is_none_is_refused_with_its_line(tmp_path: Path, wrong: Any) -> None:
    """Line 2 of 2."""
    with pytest.raises(MalformedEvidence, match="line 2"):
        read_any(lines(tmp_path / "e", event(), wrong))
    (tmp_path / "e").write_text(json.dumps(event()) + "\n" + "[" * 100_000)
    with pytest.raises(MalformedEvidence, match="line 2"):
        read_any(f"openlineage:{tmp_path / 'e'}")


def test_a_circle_over_several_runs_is_refused(tmp_path: Path) -> None:
    """a → run 1 → b → run 2 → a."""
    circle = [event(run="1", inputs=["a"], outputs=["b"]), event(run="2", inputs=["b"], outputs=["a"])]
    with pytest.raises(MalformedEvidence, match="found a circle"):
        read_any(lines(tmp_path / "e", *circle))


# -- Hugging Face ----------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A model folder with everything that names an ancestor, and its base beside it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights.bin").write_bytes(b"base weights")
    folder = tmp_path / "adapter"
    folder.mkdir()
    card = (
        "---\nlicense: mit\nbase_model:\n- acme/base\n- 'acme/other'\ndatasets: [acme/data, \"acme/more\"]\n---\n# It\n"
    )
    (folder / "README.md").write_text(card)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    (folder / "config.json").write_text(json.dumps({"_name_or_path": ""}))
    header = json.dumps({"__metadata__": {"base_model": "acme/merged"}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def test_the_metadata_of_a_model_folder_is_read(adapter: Path) -> None:
    """Card, adapter, safetensors; a base that is a folder here is known by its content."""
    claims = read_any(f"huggingface:{adapter}")
    assert edges(claims) == {
        (name, "model in adapter")
        for name in (
            "Hugging Face model acme/base",
            "Hugging Face model acme/other",
            "Hugging Face model acme/merged",
            "Hugging Face data set acme/data",
            "Hugging Face data set acme/more",
            "model in base",
        )
    }
    assert (checkpoint_key(root_of(adapter.parent / "base")), checkpoint_key(root_of(adapter))) in claims.edges


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("README.md", b"---\nbase_model: x\n"),
        ("README.md", b"---\nnonsense\n---\n"),
        ("README.md", b"---\n\xff\n---\n"),
        ("config.json", b"["),
        ("adapter_config.json", b"[]"),
        ("model.safetensors", b"\xff" * 20),
        ("model.safetensors", struct.pack("<Q", 4) + b"oops"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(adapter: Path, name: str, data: bytes) -> None:
    """By the file's name; never passed over."""
    (adapter / name).write_bytes(data)
    with pytest.raises(MalformedEvidence, match=name):
        read_any(f"huggingface:{adapter}")


# -- what claims can do ----------------------------------------------------------------------------


def graph() -> Graph:
    """A VERIFIED run that saved a checkpoint, and a TAINTED one."""
    made = Graph()
    for run, word in (("good", "VERIFIED"), ("bad", "TAINTED")):
        made.add(Node(key=f"start:{run}", kind="start", label=run, run=run))
        made.add(Node(key=f"run:{run}", kind="run", label=run, word=word, run=run))  # type: ignore[arg-type]
        made.add(Node(key=f"checkpoint:{run}", kind="checkpoint", label=run, word=word))  # type: ignore[arg-type]
        made.join(f"start:{run}", f"run:{run}", witnessed=True)
        made.join(f"start:{run}", f"checkpoint:{run}", witnessed=True)
    return made


def claimed(*pairs: tuple[str, str]) -> Claims:
    return Claims(schema="trainguard/claims/v1", by="a tracker", edges=pairs)


def test_a_claim_clears_nothing_and_casts_doubt() -> None:
    """A release that is claimed to be made from a VERIFIED checkpoint is UNKNOWN; from a TAINTED one it is SUSPECT."""
    known = graph()
    claimed(("checkpoint:good", "release:a"), ("checkpoint:bad", "release:b")).join(known)
    standings = known.standings()
    words = {key: standings[key].word for key in ("release:a", "release:b", "checkpoint:good", "checkpoint:bad")}
    assert words == {
        "release:a": "UNKNOWN",
        "release:b": "SUSPECT",
        "checkpoint:good": "VERIFIED",
        "checkpoint:bad": "TAINTED",
    }


def test_what_a_run_is_claimed_to_be_made_from_reaches_its_checkpoints() -> None:
    """The run went on from something that nobody witnessed: what it saved is not VERIFIED any more."""
    known = graph()
    claimed(("artifact:mlflow/model/m-1", "run:good")).join(known)
    assert known.standings()["checkpoint:good"].word == "UNKNOWN"


def test_a_claim_in_the_opposite_direction_of_what_was_witnessed_is_answered() -> None:
    """A checkpoint that is claimed to be an input of the run that made it: a circle, named."""
    known = graph()
    claimed(("checkpoint:good", "run:good")).join(known)
    with pytest.raises(MalformedEvidence, match="circle") as refused:
        known.standings()
    assert "claimed edges" in str(refused.value.next_step)


def test_a_tracker_run_that_our_run_named_is_our_run() -> None:
    """Its inputs are claimed inputs of our run, its models claimed outputs; nodes of other runs stay their own."""
    tracker = "artifact:mlflow/run/x"
    claims = claimed(("data:d", tracker), (tracker, "artifact:mlflow/model/m"), ("data:d", "artifact:mlflow/run/y"))
    known = graph()
    claims.known_as({tracker: "run:bad", "artifact:mlflow/run/y": "artifact:mlflow/run/y"}).join(known)
    assert known.standings()["artifact:mlflow/model/m"].word == "SUSPECT"
    assert {edge.source for edge in known.made_from("start:bad")} == {"data:d"}
    assert known.made_from("artifact:mlflow/run/y")


def test_an_unknown_kind_is_a_usage_error(tmp_path: Path) -> None:
    """With the kinds that there are."""
    with pytest.raises(Misuse, match="mlflow, wandb, openlineage, huggingface"):
        read_any("dvc:dvc.lock")
    with pytest.raises(Unavailable):
        read_any(str(tmp_path / "claims.json"))


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and edges: one sentence, no memory."""
    monkeypatch.setattr("trainguard.incident.importers.gather.NODE_LIMIT", 3)
    made = Gathered("x", "x")
    for number in range(3):
        made.node("data", str(number), "n")
    with pytest.raises(MalformedEvidence, match="at most 3 nodes"):
        made.node("data", "3", "n")
    monkeypatch.setattr("trainguard.incident.importers.gather.EDGE_LIMIT", 3)
    for number in range(1, 4):
        made.edge("data:0", f"data:{number}")
    with pytest.raises(MalformedEvidence, match="at most 3 edges"):
        made.edge("data:0", "data:4")


@given(st.text(max_size=300))
def test_every_name_can_stand_in_a_key(name: str) -> None:
    """Printable and bounded, and another name is another key."""
    key = safe(name) if name else safe("?")
    assert key.isascii()
    assert key.isprintable()
    assert " " not in key
    assert len(key) <= 150


@settings(max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(sorted(READERS)))
def test_no_bytes_make_a_reader_fail_in_another_way(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kind: str
) -> None:
    """Only typed errors come out, whatever is in the file."""
    folder = tmp_path_factory.mktemp("any")
    path = folder / "run-x.wandb"
    path.write_bytes(data)
    (folder / "meta.yaml").write_bytes(data)
    (folder / "README.md").write_bytes(data)
    for where in (folder, path):
        try:
            read_any(f"{kind}:{where}")
        except TrainguardError:
            continue


def test_flat_yaml_reads_what_the_importers_meet() -> None:
    """Texts, lists in both forms, nulls, quotes, nested things that are passed over."""
    text = (
        "a: x\nb: 'it''s'\nc:\n- one\n- \"two\"\nd: [x, 'y']\ne: null\nf:\n  g: 1\n# said\nh: z # why\ni:\n  - deep\n"
    )
    assert flat_yaml(text, "x") == {
        "a": "x",
        "b": "it's",
        "c": ["one", "two"],
        "d": ["x", "y"],
        "e": None,
        "f": None,
        "h": "z",
        "i": ["deep"],
    }


def test_the_verb_shows_claimed_nodes_as_unknown_and_saves_what_it_read(
    tmp_path: Path, mlruns: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """A run that had MLflow's first run open is that run: data set → our run → model."""
    home = Home(tmp_path / "state")
    monkeypatch.setenv("TRAINGUARD_HOME", str(home.root))
    told.record(home, "ours", told.whole_run(told.step(1, trackers=[["mlflow", RUN, "file"]])))
    saved = tmp_path / "claims.json"
    assert main(["lineage", "--json", "--claims", f"mlflow:{mlruns}", "--save-claims", str(saved)]) == 3
    family = json.loads(capfdbinary.readouterr().out)
    told_of = {line["label"]: line for line in family["unknown"]}
    assert told_of["run ours"]["made_from"] == ["MLflow data set acme (claimed)"]
    assert told_of["MLflow model base"]["made_from"] == ["run ours (claimed)"]
    assert "MLflow run first" not in told_of
    assert read_any(str(saved)) == read_any(f"mlflow:{mlruns}")


@pytest.mark.nightly
def test_what_mlflow_itself_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of the installed version, not our idea of it."""
    mlflow = pytest.importorskip("mlflow")
    from mlflow.entities import Dataset, DatasetInput, LoggedModelInput, LoggedModelOutput

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.create_experiment("e")
    first, second = (client.create_run(experiment).info.run_id for _ in range(2))
    client.log_inputs(first, [DatasetInput(Dataset("acme", "d1", "local", "{}"), [])])
    base = client.create_logged_model(experiment, name="base", source_run_id=first)
    client.log_inputs(second, models=[LoggedModelInput(base.model_id)])
    chat = client.create_logged_model(experiment, name="chat", source_run_id=second)
    client.log_outputs(second, models=[LoggedModelOutput(chat.model_id, 0)])
    claims = read_any(f"mlflow:{tmp_path / 'mlruns'}")
    assert {node.label for node in claims.nodes} >= {"MLflow data set acme", "MLflow model base", "MLflow model chat"}
    assert len(claims.edges) == 4
