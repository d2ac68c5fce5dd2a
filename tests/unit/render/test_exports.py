"""Exports are valid by the official schemas, say what the log says, and are the same bytes every time."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.helpers import told
from tests.helpers.schemas import errors
from tests.helpers.sourced import digest, opened, shard
from tests.helpers.told import HOSTILE

from trainguard.appraise.verdict import Verdict, decide
from trainguard.archive import LogLeaves
from trainguard.cli import main
from trainguard.finding import Citation, Finding, LinkState, Subject
from trainguard.home import Home
from trainguard.incident.attribute import Attribution, Candidate
from trainguard.incident.correlate import Incident
from trainguard.incident.facts import Read, RunFacts, run_facts
from trainguard.incident.graph import Node, Standing
from trainguard.incident.outward import Model, Terms, model_of, terms_of
from trainguard.lockfile import Distribution
from trainguard.render.attacks import outside, table
from trainguard.render.cyclonedx import bill
from trainguard.render.ocsf import detection_events, finding_uid, incident_event
from trainguard.render.openlineage import run_events
from trainguard.render.techniques import TITLES
from trainguard.seal import seal_path
from trainguard.seal.ledger import SealLeaf

RUN_EVENT = "#/$defs/RunEvent"


def findings(text: str = "odd") -> list[Finding]:
    cited = (Citation(leaf=7, hash="ab" * 32),)
    where = Subject(run="r", rank=0, step=12, tensor=text, path=f"/job/{text}.py:4")
    return [
        Finding(
            check="optimizer", outcome="violated", techniques=("C4", "B3"), subject=where, message=text, evidence=cited
        ),
        Finding(check="inputs", outcome="suspicious", techniques=("B2",), message=text, expected=text, found=text),
        Finding(check="processes", outcome="not_checked", message=text),
    ]


def verdict(text: str = "odd") -> Verdict:
    return decide(findings(text), [LinkState(link="code", held=1)], run="r", steps=20, watched_steps=20)


def facts(text: str = "x", **more: Any) -> RunFacts:
    seal = SealLeaf(leaf=9, hash="cd" * 32, name=text, place=f"/out/{text}", root="ef" * 32, payload="", envelope="")
    told_of: dict[str, Any] = {
        "run": "r",
        "host": "node-7",
        "command": ("python", f"{text}.py"),
        "began_ns": 1_700_000_000_000_000_000,
        "ended_ns": 1_700_000_100_000_000_123,
        "ended": True,
        "status": 0,
        "steps": 20,
        "leaf": 3,
        "lock": "aa" * 32,
        "reads": (
            Read(path=f"/d/{text}", sha256="11" * 32, size=5, leaf=4),
            Read(path="/d/b", sha256="22" * 32, step=3),
        ),
        "seals": (seal,),
        "times": {"ab" * 32: 1_700_000_050_000_000_000},
    }
    return RunFacts(**(told_of | more))


def model(text: str = "x", **more: Any) -> Model:
    whole: dict[str, Any] = {
        "name": text,
        "root": "ef" * 32,
        "files": {text: "33" * 32},
        "facts": facts(text),
        "verdict": verdict(text),
        "standing": Standing(word="SUSPECT", because=("run:r",)),
        "step": 20,
        "leaf": 9,
        "ancestors": (Node(key="checkpoint:ff", kind="checkpoint", label=text, word="TAINTED"),),
        "packages": (Distribution(name="torch", version="2.13.0+cpu", tree="site-packages"),),
    }
    return Model(**(whole | more))


TERMS: Terms = {"11" * 32: [{"source": "acme", "licence": "CC-BY-4.0", "use": "training"}]}
TEXTS = pytest.mark.parametrize(
    "text", ["plain", HOSTILE, "ü" * 3000, "a\nb\t\u2028"], ids=["plain", "hostile", "long", "lines"]
)


@TEXTS
def test_every_finding_is_a_valid_detection_finding(text: str) -> None:
    """OCSF 1.7.0, class 2004, whatever an attacker named things."""
    events = list(detection_events(verdict(text), facts()))
    assert [errors(event, "ocsf-1.7.0-detection_finding") for event in events] == [[], [], []]
    assert [event["severity"] for event in events] == ["High", "Medium", "Informational"]
    assert events[0]["time"] == 1_700_000_050_000
    assert events[0]["unmapped"]["subject"]["step"] == 12


def test_the_same_finding_has_the_same_identity_and_another_one_another() -> None:
    """Sent twice it is one finding."""
    first, second = findings()[:2]
    assert finding_uid(first, "r") == finding_uid(findings()[0], "r")
    assert len({finding_uid(first, "r"), finding_uid(second, "r"), finding_uid(first, "s")}) == 3


@TEXTS
def test_an_incident_is_a_valid_incident_finding(text: str) -> None:
    """OCSF 1.7.0, class 2005; it accuses nobody and is assigned to nobody."""
    candidate = Candidate(level="A1", what=text, score=0.5, confidence=0.5, supports=(text,))
    event = incident_event(
        Incident(
            id="inc-0123456789",
            run="r",
            kind=text,
            severity="critical",
            first_step=12,
            last_step=12,
            ranks=(0,),
            findings=tuple(findings(text)),
            techniques=("C4", "B2"),
            attribution=Attribution(candidates=(candidate,), sentence=text),
            affected=(text,),
        ),
        facts(),
    )
    assert errors(event, "ocsf-1.7.0-incident_finding") == []
    assert (event["severity"], event["assignee_group"]) == ("Critical", {"name": "unassigned"})
    assert len(event["finding_info_list"]) == 3


@pytest.mark.parametrize("spec", ["1.6", "1.7"])
@TEXTS
def test_a_model_is_a_valid_bill_of_materials(text: str, spec: str) -> None:
    """CycloneDX, with data, licence, ancestor, package and verdict."""
    made = bill(model(text), terms=TERMS, spec=spec)
    assert errors(json.loads(json.dumps(made)), f"bom-{spec}.schema") == []
    data = [part for part in made["components"] if part["type"] == "data"]
    assert data[0]["licenses"] == [{"license": {"name": "CC-BY-4.0"}}]
    assert "licenses" not in data[1]
    told_of = {one["name"]: one["value"] for one in made["metadata"]["component"]["properties"]}
    assert (told_of["trainguard:verdict"], told_of["trainguard:own-verdict"]) == ("SUSPECT", "TAINTED")
    assert made["dependencies"][0]["dependsOn"] == [part["bom-ref"] for part in made["components"]]


def test_every_reference_in_a_bill_is_unique_and_leads_somewhere() -> None:
    """The schema does not check this; tools that read bills do."""
    made = bill(model(), terms=TERMS)
    top = made["metadata"]["component"]
    refs = [part["bom-ref"] for part in (top, *top["components"], *top["pedigree"]["ancestors"], *made["components"])]
    assert len(set(refs)) == len(refs)
    assert {each["ref"] for each in made["dependencies"]} <= set(refs)
    assert {each["ref"] for each in top["modelCard"]["modelParameters"]["datasets"]} <= set(refs)


def test_a_model_of_which_little_is_known_is_a_valid_bill() -> None:
    """No data, no ancestors, no packages, no step."""
    bare = model(step=None, leaf=None, ancestors=(), packages=(), facts=facts(reads=(), lock=None))
    assert errors(json.loads(json.dumps(bill(bare))), "bom-1.6.schema") == []


@TEXTS
@pytest.mark.parametrize(("status", "kind"), [(0, "COMPLETE"), (1, "FAIL"), (None, "ABORT")])
def test_a_run_is_valid_openlineage(text: str, status: int | None, kind: str) -> None:
    """START with inputs, the end with outputs; one run id in both."""
    events = run_events(facts(text, status=status), verdict(text), origin="log", terms=TERMS)
    events = json.loads(json.dumps(events))
    assert [errors(event, "OpenLineage", RUN_EVENT) for event in events] == [[], []]
    assert [event["eventType"] for event in events] == ["START", kind]
    assert len({event["run"]["runId"] for event in events}) == 1
    assert events[0]["inputs"][0]["facets"]["trainguard_content"]["sources"] == TERMS["11" * 32]
    facet = events[1]["outputs"][0]["facets"]["version"]
    assert errors({"version": facet}, "DatasetVersionDatasetFacet") == []
    assert errors({"jobType": events[0]["job"]["facets"]["jobType"]}, "JobTypeJobFacet") == []
    failed = events[1]["run"]["facets"].get("errorMessage")
    assert (failed is not None) == (status == 1)
    assert failed is None or errors({"errorMessage": failed}, "ErrorMessageRunFacet") == []


def test_a_run_that_goes_on_has_no_end_event() -> None:
    """And a run of another log has another id."""
    [start] = run_events(facts(ended=False), verdict(), origin="log")
    [other] = run_events(facts(ended=False), verdict(), origin="other")
    assert start["eventType"] == "START"
    assert start["run"]["runId"] != other["run"]["runId"]


@pytest.mark.parametrize(
    ("schema", "pointer", "path", "value"),
    [
        ("ocsf-1.7.0-detection_finding", "", ["severity_id"], 12),
        ("ocsf-1.7.0-detection_finding", "", ["finding_info", "invented"], 1),
        ("bom-1.6.schema", "", ["metadata", "component", "type"], "model"),
        ("bom-1.7.schema", "", ["serialNumber"], "urn:uuid:1"),
        ("OpenLineage", RUN_EVENT, ["run", "runId"], "r"),
        ("OpenLineage", RUN_EVENT, ["eventTime"], "yesterday"),
    ],
)
def test_the_schemas_refuse_what_is_wrong(schema: str, pointer: str, path: list[str], value: object) -> None:
    """The tests above can fail."""
    made: dict[str, Any] = {
        "ocsf-1.7.0-detection_finding": next(detection_events(verdict(), facts())),
        "bom-1.6.schema": bill(model(), spec="1.6"),
        "bom-1.7.schema": bill(model(), spec="1.7"),
        "OpenLineage": run_events(facts(), verdict(), origin="log")[0],
    }[schema]
    made = copy.deepcopy(made)
    assert errors(json.loads(json.dumps(made)), schema, pointer) == []
    at = made
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    assert errors(json.loads(json.dumps(made)), schema, pointer) != []


def test_exports_are_the_same_bytes_every_time() -> None:
    """A pure function of what they are given."""
    made = [
        json.dumps(
            [list(detection_events(verdict(), facts())), bill(model()), run_events(facts(), verdict(), origin="l")]
        )
        for _ in range(2)
    ]
    assert made[0] == made[1]


# -- techniques -------------------------------------------------------------------------------------------------------


def test_the_table_knows_every_id_of_the_catalogue_and_no_other() -> None:
    """One row each; frameworks with a pinned release."""
    assert set(table().techniques) == set(TITLES)
    assert {key: one.version for key, one in table().frameworks.items()} == {"atlas": "5.6.0", "attack": "19.0"}


def test_ids_are_of_their_framework_and_names_of_the_pinned_release() -> None:
    """All ids have a name; those that ATT&CK retired before its release 19 are not used."""
    for near in table().techniques.values():
        assert all(uid.startswith("AML.T") and uid in table().names for uid in near.atlas)
        assert all(uid.startswith("T1") and len(uid) in (5, 9) for uid in near.attack)
        assert all(uid in table().names for uid in near.attack)


def test_every_attack_id_and_name_stands_in_the_data_that_are_vendored() -> None:
    """MITRE's data of release 18.1, but for the few ids that are new in 19; none that 19 replaced."""
    folder = Path(__file__).parents[2] / "vectors" / "attack"
    before = json.loads(gzip.decompress((folder / "enterprise-18.1.json.gz").read_bytes()))
    changes = json.loads((folder / "changes-19.json").read_bytes())
    used = {uid for near in table().techniques.values() for uid in near.attack}
    assert not used & set(changes["replaced"])
    assert set(changes["new"]) == used - set(before)
    for uid in used:
        assert table().names[uid] == {**before, **changes["new"]}[uid]
    assert len(before) == 691, "all of them, so that an id that is not there shows"
    assert str(len(used & set(before))) == table().frameworks["attack"].checked.split(" ", 1)[0]


def test_an_unknown_id_has_no_neighbour_and_a_repeated_one_is_told_once() -> None:
    """A newer trainguard may have written it."""
    assert list(outside(["Z9"])) == []
    told_of = [one.uid for one in outside(["C1", "C4", "C1"])]
    assert told_of == ["AML.T0018.000", "T1565.003"]


# -- from a log -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A log with one run that read registered data and saved a checkpoint."""
    made = Home(tmp_path / "state")
    monkeypatch.setenv("TRAINGUARD_HOME", str(made.root))
    shard(made, tmp_path, "acme", "a.bin", b"rows")
    told.record(made, "r", told.whole_run(opened("/d/a.bin", b"rows"), told.step(1)))
    silent = ("silent", {"pid": 9, "cmdline": ["python", "-I", "x.py"]}, {"pid": 9})
    told.record(made, "bad", told.whole_run(silent, told.step(1)))
    (tmp_path / "model.bin").write_bytes(b"weights")
    seal_path(made, tmp_path / "model.bin", run="r", step=1)
    return made


def test_every_export_of_a_real_log_is_valid_through_the_command_line(
    home: Home, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The verbs, their files, and where it goes by default."""
    assert main(["export", "ocsf", "bad", "--json"]) == 0
    events = json.loads(capfdbinary.readouterr().out)
    assert events
    assert all(errors(event, "ocsf-1.7.0-detection_finding") == [] for event in events)
    assert main(["export", "openlineage", "r", "-o", str(tmp_path / "events")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [errors(event, "OpenLineage", RUN_EVENT) for event in lines] == [[], []]
    assert lines[1]["inputs"][0]["name"] == f"sha256:{digest(b'rows')}"
    assert len(lines[1]["outputs"]) == 1
    capfdbinary.readouterr()
    assert main(["export", "cyclonedx", str(tmp_path / "model.bin")]) == 0
    made = json.loads(capfdbinary.readouterr().out)
    assert errors(made, "bom-1.6.schema") == []
    [data] = [part for part in made["components"] if part["type"] == "data"]
    assert data["licenses"] == [{"license": {"name": "CC-BY-4.0"}}]


def test_an_incident_of_a_real_log_is_valid(home: Home, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """By its id."""
    assert main(["incident", "list", "--json"]) == 1
    [incident, *_] = json.loads(capfdbinary.readouterr().out)["incidents"]
    assert main(["export", "ocsf", incident["id"]]) == 0
    event = json.loads(capfdbinary.readouterr().out)
    assert errors(event, "ocsf-1.7.0-incident_finding") == []
    assert event["metadata"]["uid"] == incident["id"]


def test_what_nobody_sealed_has_no_bill(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A usage error that says where to look."""
    (tmp_path / "other.bin").write_bytes(b"others")
    with pytest.raises(SystemExit) as ended:
        main(["export", "cyclonedx", str(tmp_path / "other.bin")])
    assert ended.value.code == 2
    assert "no run is known" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "ocsf", str(tmp_path / "other.bin")])


def test_facts_stop_where_the_record_breaks(home: Home) -> None:
    """What is proved before that is still told."""
    spool = told.spool(home, "r")
    spool.write_bytes(b"x" + spool.read_bytes()[1:])
    broken = run_facts(home, "r", leaves=LogLeaves(home))
    assert (broken.reads, broken.steps, broken.ended) == ((), 0, True)
    assert terms_of(home) == {digest(b"rows"): [{"source": "acme", "licence": "CC-BY-4.0", "use": "training"}]}
    assert msgspec.json.encode(broken)


def test_a_model_knows_its_files_by_content(home: Home, tmp_path: Path) -> None:
    """A single file goes by its name."""
    assert model_of(home, tmp_path / "model.bin").files == {"model.bin": digest(b"weights")}
