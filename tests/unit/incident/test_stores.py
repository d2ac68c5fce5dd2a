"""What object stores say of who wrote an object: read strictly, linked by name alone, and never more than claimed."""

from __future__ import annotations

import datetime
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.family import Family, finding

from trainguard.cli import main
from trainguard.errors import Misuse, TrainguardError, Unavailable
from trainguard.home import Home
from trainguard.incident.correlate import Incident, incidents
from trainguard.incident.stores import (
    LIMIT_BYTES,
    LINE_LIMIT_BYTES,
    parse_mapping,
    read_store_log,
    writers,
    writings,
)

BEGAN = datetime.datetime.fromtimestamp(1_700_000_000, datetime.UTC)
KEY = "team-a/step 10.pt"


def at(seconds: float) -> datetime.datetime:
    """So long after the runs of `Family` begin."""
    return BEGAN + datetime.timedelta(seconds=seconds)


def cloudtrail(moment: datetime.datetime, who: str = "insider", event: str = "PutObject", **more: Any) -> bytes:
    identity = {"type": "IAMUser", "arn": f"arn:aws:iam::000000000000:user/{who}"}
    record = {
        "eventTime": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "eventName": event,
        "userIdentity": identity,
        "sourceIPAddress": "198.51.100.7",
        "userAgent": "client/1",
        "requestParameters": {"bucketName": "models", "key": KEY},
        "responseElements": {"x-amz-version-id": "v2"},
        "requestID": "r1",
    }
    return json.dumps({"Records": [record | more]}).encode()


def access(moment: datetime.datetime, who: str = "insider", event: str = "PutObject", status: int = 200) -> bytes:
    operation = {"PutObject": "REST.PUT.OBJECT", "DeleteObject": "REST.DELETE.OBJECT"}.get(event, "REST.GET.OBJECT")
    time = moment.strftime("%d/%b/%Y:%H:%M:%S +0000")
    return (
        f"owner models [{time}] 198.51.100.7 arn:aws:iam::000000000000:user/{who} r1 {operation} team-a/step%2010.pt "
        f'"PUT /models/team-a/step%2010.pt HTTP/1.1" {status} - - 4000 41 28 "-" "client/1" v2 host SigV4 -\n'
    ).encode()


def audit(moment: datetime.datetime, who: str = "insider", event: str = "PutObject", code: int = 0) -> bytes:
    method = {"PutObject": "storage.objects.create", "DeleteObject": "storage.objects.delete"}.get(event, "get")
    payload = {
        "methodName": method,
        "resourceName": f"projects/_/buckets/models/objects/{KEY}",
        "authenticationInfo": {"principalEmail": f"{who}@project.iam.gserviceaccount.com"},
        "requestMetadata": {"callerIp": "198.51.100.7", "callerSuppliedUserAgent": "client/1"},
        "status": {"code": code} if code else {},
    }
    time = moment.strftime("%Y-%m-%dT%H:%M:%S.123456789Z")
    return json.dumps({"timestamp": time, "insertId": "r1", "protoPayload": payload}).encode() + b"\n"


def azure(moment: datetime.datetime, who: str = "insider", event: str = "PutObject", status: int = 201) -> bytes:
    operation = {"PutObject": "PutBlockList", "DeleteObject": "DeleteBlob"}.get(event, "GetBlob")
    record = {
        "time": moment.strftime("%Y-%m-%dT%H:%M:%S.1234567Z"),
        "operationName": operation,
        "uri": "https://account.blob.core.windows.net:443/models/team-a/step%2010.pt?comp=blocklist",
        "statusCode": str(status),
        "callerIpAddress": "198.51.100.7:5000",
        "identity": {"type": "OAuth", "requester": {"objectId": who}},
        "properties": {"userAgentHeader": "client/1"},
        "correlationId": "r1",
    }
    return json.dumps(record).encode() + b"\r\n"


FORMS: dict[str, tuple[Callable[..., bytes], str]] = {
    "cloudtrail": (cloudtrail, f"s3://models/{KEY}"),
    "access log": (access, f"s3://models/{KEY}"),
    "cloud audit": (audit, f"gs://models/{KEY}"),
    "azure": (azure, f"az://account/models/{KEY}"),
}


def written(folder: Path, data: bytes, name: str = "store.log") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_tells_who_wrote_what_from_where_and_when(tmp_path: Path, form: str, packed: bool) -> None:
    make, url = FORMS[form]
    data = make(at(5))
    (entry,) = read_store_log(written(tmp_path, gzip.compress(data) if packed else data)).entries
    assert (entry.url, entry.act, entry.address, entry.agent) == (url, "wrote", "198.51.100.7", "client/1")
    assert "insider" in entry.principal
    assert entry.at_ns // 10**9 == 1_700_000_005
    assert (entry.request, entry.source) == ("r1", "store.log:1")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_reading_an_object_and_what_was_refused_are_no_writing(tmp_path: Path, form: str) -> None:
    make, _ = FORMS[form]
    refused = {
        "cloudtrail": lambda: cloudtrail(at(5), errorCode="AccessDenied"),
        "access log": lambda: access(at(5), status=403),
        "cloud audit": lambda: audit(at(5), code=7),
        "azure": lambda: azure(at(5), status=403),
    }[form]()
    for data in (make(at(5), event="GetObject"), refused):
        log = read_store_log(written(tmp_path, data))
        assert log.entries == ()
        assert len(log.covers) == 1, "it still tells which time it covers"


def test_a_session_name_points_at_nobody(tmp_path: Path) -> None:
    """S14: whoever may assume a role calls the session what they like, also by a colleague's name."""
    identity = {
        "type": "AssumedRole",
        "arn": "arn:aws:sts::000000000000:assumed-role/trainer/victim-a",
        "sessionContext": {"sessionIssuer": {"arn": "arn:aws:iam::000000000000:role/trainer"}},
    }
    (entry,) = read_store_log(written(tmp_path, cloudtrail(at(5), userIdentity=identity))).entries
    assert (entry.principal, entry.chosen) == ("arn:aws:iam::000000000000:role/trainer", "victim-a")
    line = access(at(5)).replace(b"arn:aws:iam::000000000000:user/insider", identity["arn"].encode())  # type: ignore
    (entry,) = read_store_log(written(tmp_path, line)).entries
    assert (entry.principal, entry.chosen) == ("arn:aws:sts::000000000000:assumed-role/trainer", "victim-a")


def test_the_name_of_a_federated_user_points_at_nobody_either(tmp_path: Path) -> None:
    """The one who asked for the token chose it."""
    identity = {
        "type": "FederatedUser",
        "arn": "arn:aws:sts::000000000000:federated-user/victim-a",
        "sessionContext": {"sessionIssuer": {"arn": "arn:aws:iam::000000000000:user/insider"}},
    }
    (entry,) = read_store_log(written(tmp_path, cloudtrail(at(5), userIdentity=identity))).entries
    assert (entry.principal, entry.chosen) == ("arn:aws:iam::000000000000:user/insider", "victim-a")


def test_only_what_a_mapping_covers_is_linked_and_the_longest_prefix_wins(tmp_path: Path) -> None:
    entries = read_store_log(written(tmp_path, cloudtrail(at(5)))).entries
    mapping = parse_mapping(["/mnt=s3://other", "/mnt/ckpt/=s3://models/team-a/"])
    one, other, none = writings([f"/mnt/ckpt/{KEY[7:]}", "/mnt/x.pt", "/home/x.pt"], entries, mapping)
    assert len(one.entries) == 1
    assert (other.url, other.entries) == ("s3://other/x.pt", ())
    assert none.url is None


@pytest.mark.parametrize("word", ["", "x=s3://b", "/a", "/a=http://b/c", "/a=s3://"])
def test_a_mapping_that_says_nothing_is_refused(word: str) -> None:
    with pytest.raises(Misuse, match="expected /LOCAL/PREFIX"):
        parse_mapping([word])


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "nothing in it": b'{"Records": []}',
    "no records": b'{"Records": 7}',
    "a number for a record": b'{"Records": [7]}',
    "another log": b'{"kind": "pod", "name": "x"}',
    "no zone": cloudtrail(at(5)).replace(b'Z", "eventName', b'", "eventName'),
    "not a time": b'{"eventTime": "NaN", "eventName": "PutObject"}',
    "a time of another kind": b'{"eventTime": 1e400, "eventName": "PutObject"}',
    "deep": b"[" * 100_000,
    "many": b"[" + b"{}," * 4_000_001 + b"{}]",
    "an escape in a field": b'{"\\u001b[31m": 1}',
    "text": b"GET /models HTTP/1.1\n",
    "a wild month": access(at(5)).replace(b"/Nov/", b"/Foo/"),
    "half a line": access(at(5))[:80],
    "a long line": b"x" * (LINE_LIMIT_BYTES + 1),
    "cut": gzip.compress(cloudtrail(at(5)))[:-9],
    "no gzip": b"\x1f\x8b" + b"x" * 40,
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_what_is_no_log_of_a_store_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unavailable) as told:
        read_store_log(written(tmp_path, HOSTILE[name]))
    assert "store.log" in str(told.value)
    assert len(str(told.value)) < 400
    assert told.value.exit_status == 3
    assert "\x1b" not in str(told.value)


def test_wrong_kinds_of_values_never_raise_anything_else(tmp_path: Path) -> None:
    """Every field of every form by every kind of value."""
    for make in (cloudtrail, audit, azure):
        record = json.loads(make(at(5)).splitlines()[0])
        record = record.get("Records", [record])[0]
        for field in record:
            for wrong in (None, True, -1, 1.5, "x" * 5000, [], {}, [[]], {"a": {"b": 1}}):
                path = written(tmp_path, json.dumps([record | {field: wrong}]).encode())
                try:
                    read_store_log(path)
                except TrainguardError:
                    continue


def test_a_bomb_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="at most"):
        read_store_log(written(tmp_path, gzip.compress(bytes(LIMIT_BYTES + 10), 1)))


def test_what_was_delivered_twice_is_told_once(tmp_path: Path) -> None:
    """On two lines of one log; another request is another act."""
    entries = read_store_log(written(tmp_path, access(at(5)) * 2 + access(at(6)))).entries
    assert [entry.source for entry in entries] == ["store.log:1", "store.log:3"]


def test_quotes_in_a_request_neither_blind_the_reader_nor_forge_what_it_tells(tmp_path: Path) -> None:
    """Who sends it writes URI, referrer and program name: a status, a version, or a refusal of the whole log."""
    for old, new in (
        (b'"client/1" v2', b'"client" forged "1" v2'),
        (b'"-" "client', b'"a"b" "client'),
        (b" HTTP/1.1", b'?x=" 403 - HTTP/1.1'),
    ):
        (entry,) = read_store_log(written(tmp_path, access(at(5)).replace(old, new))).entries
        assert (entry.act, entry.version, entry.agent) == ("wrote", None, None)
    began = time.process_time()
    read_store_log(written(tmp_path, access(at(5))[:-1] + b'" ' * 200_000))
    assert time.process_time() - began < 20, "no pattern runs away"


def test_a_service_account_used_by_another_is_told_with_who_used_it(tmp_path: Path) -> None:
    record = json.loads(audit(at(5)))
    chain = [{"firstPartyPrincipal": {"principalEmail": "somebody@project.example"}}]
    record["protoPayload"]["authenticationInfo"]["serviceAccountDelegationInfo"] = chain
    (entry,) = read_store_log(written(tmp_path, json.dumps(record).encode())).entries
    assert entry.caller == "somebody@project.example"


def test_keys_of_requests_are_written_encoded_twice_and_those_of_the_stores_own_work_once(tmp_path: Path) -> None:
    """Two objects whose names differ in one escape are told apart."""
    batch = access(at(5)).replace(b"REST.PUT.OBJECT", b"BATCH.DELETE.OBJECT").replace(b"%2010", b"%252010")
    (entry,) = read_store_log(written(tmp_path, batch)).entries
    assert entry.key == "team-a/step%2010.pt"
    (entry,) = read_store_log(written(tmp_path, access(at(5)).replace(b"%2010", b"%252010"))).entries
    assert entry.key == KEY


@pytest.fixture
def tampered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Incident, Home]:
    """A run, 10 s long, in which a file of a mounted bucket became another."""
    family = Family(Home(tmp_path / "home"), tmp_path)
    path = f"/mnt/ckpt/{KEY[7:]}"
    family.run("bad", finding(3, path=path, techniques=("E3",), message="the checkpoint is not what was sealed"))
    family.judged(monkeypatch)
    (incident,) = incidents(family.home)
    return incident, family.home


def test_who_wrote_an_incidents_object_is_told_beside_the_runs_times(
    tampered: tuple[Incident, Home], tmp_path: Path
) -> None:
    """Before, during and after; and the incident itself stays as it is."""
    incident, home = tampered
    acts = ((-60, "victim-a"), (5, "insider"), (5000, "victim-b"))
    rows = [json.loads(cloudtrail(at(seconds), who))["Records"][0] for seconds, who in acts]
    log = written(tmp_path, json.dumps(rows).encode())
    told = writers(incident, home, [log], {"/mnt/ckpt/": "s3://models/team-a/"})
    (file,) = told.files
    assert [(told.when(entry), entry.principal.rpartition("/")[2]) for entry in file.entries] == [
        ("before the run", "victim-a"),
        ("during the run", "insider"),
        ("after the run", "victim-b"),
    ]
    assert told.gaps == []
    assert incidents(home) == [incident]


def test_a_log_that_does_not_cover_the_run_says_so(
    tampered: tuple[Incident, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Blind is not clean: exit status 3, with the reason."""
    incident, home = tampered
    mapping = {"/mnt/ckpt/": "s3://models/team-a/"}
    log = written(tmp_path, cloudtrail(at(5)))
    gaps = writers(incident, home, [log], mapping).gaps
    assert ["the logs begin" in gaps[0], "the logs end" in gaps[1], len(gaps)] == [True, True, 2]
    around = [written(tmp_path, cloudtrail(at(second)), f"{second}.json") for second in (-60, 5000)]
    (hole,) = writers(incident, home, around, mapping).gaps
    assert "no log covers" in hole, "one ends before the run, and the other begins after it"
    of_another = written(tmp_path, cloudtrail(at(-60)).replace(b'"models"', b'"others"'), "others.json")
    (none,) = writers(incident, home, [of_another], mapping).gaps
    assert none == "s3://models: no record of it is in these logs"
    monkeypatch.setenv("TRAINGUARD_HOME", str(home.root))
    words = ["incident", "writers", incident.id, "--log", str(log), "--map", "/mnt/ckpt=s3://models/team-a"]
    assert main(words) == 3
    out = "".join(capfd.readouterr().out.split())  # lines are as wide as the terminal
    assert "claimed,andnocandidate" in out
    assert main([*words, "--json"]) == 3
    (entry,) = json.loads(capfd.readouterr().out)["files"][0]["entries"]
    assert (entry["act"], entry["principal"]) == ("wrote", "arn:aws:iam::000000000000:user/insider")


def test_an_incident_without_a_file_has_no_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(Home(tmp_path / "home"), tmp_path)
    family.run("bad", finding(3))
    family.judged(monkeypatch)
    (incident,) = incidents(family.home)
    with pytest.raises(Misuse, match="none of its findings is about a file"):
        writers(incident, family.home, [], {})


def test_names_of_a_hostile_log_are_shown_plain(
    tampered: tuple[Incident, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    incident, home = tampered
    log = written(tmp_path, cloudtrail(at(5), "\x1b[31m\u202ewho\n\n", userAgent="\x07\x1b]0;x"))
    monkeypatch.setenv("TRAINGUARD_HOME", str(home.root))
    main(["incident", "writers", incident.id, "--log", str(log), "--map", "/mnt/ckpt=s3://models/team-a"])
    out = capfd.readouterr().out
    assert not {"\x1b", "\u202e", "\x07"} & set(out)
