"""A bundle holds anywhere with nothing but Python, and not one byte of it can be changed unseen."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from trainguard.appraise.judge import judge_run
from trainguard.archive import LogLeaves, RunReader, RunWriter
from trainguard.digest import sha256_hex
from trainguard.envelope import load_or_create_key, sign_statement, statement
from trainguard.errors import VerificationError
from trainguard.finding import Citation
from trainguard.home import Home
from trainguard.incident import offline
from trainguard.incident.bundle import make_bundle
from trainguard.incident.correlate import Incident, incidents
from trainguard.log import Log, LogReader
from trainguard.policy import Policy


def recorded_in(home: Home, *runs: str) -> tuple[Home, Incident]:
    """Runs in each of which a process reported that does not descend from the job, and the incident of the first."""
    home.prepare()
    key = load_or_create_key(home.keys / "attestation.pem")
    with Log.open(home.log, home.keys / "log.key") as log:
        for run in runs:
            writer = RunWriter(home, run, log, key)
            policy = home.store_blob(msgspec.json.encode(Policy()))
            body = {"command": ["python", "train.py"], "cwd": "/job", "host": "node-3", "policy": policy, "lock": None}
            body["account"] = {"uid": 1001, "loginuid": "1001", "session": "3"}
            writer.begin({"run": run, **body})
            writer.add("start", body)
            writer.add("process", {"of_the_job": False, "hello": {}}, process=0, pid=77, uid=1002)
            writer.seal()
            writer.add("end", {"status": 0})
            writer.seal(final=True)
            writer.close()
        log.publish()
    assert judge_run(home, runs[0]).verdict == "SUSPECT"
    (incident,) = [each for each in incidents(home) if each.kind == "G" and each.run == runs[0]]
    return home, incident


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Incident]:
    """A run in which a process reported that does not descend from the job."""
    return recorded_in(Home(tmp_path_factory.mktemp("home")), "r1")


@pytest.fixture(scope="module")
def bundle(recorded: tuple[Home, Incident]) -> bytes:
    return make_bundle(*recorded)


def test_a_bundle_holds_and_is_the_same_every_time(recorded: tuple[Home, Incident], bundle: bytes) -> None:
    summary = offline.verify(bundle)
    assert summary["incident"] == recorded[1].id
    assert summary["citations"] >= 1
    assert make_bundle(*recorded) == bundle


def test_it_needs_nothing_but_python(bundle: bytes, tmp_path: Path) -> None:
    """No environment, no package, another folder: the verifier is the one that lies in the bundle."""
    (tmp_path / "b.zip").write_bytes(bundle)
    (tmp_path / "verify.py").write_bytes(offline.unpack(bundle)["verify.py"])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "verify.py", "b.zip"],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds: incident inc-" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(
    os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="only root becomes another account"
)
def test_another_account_of_the_machine_believes_it_with_another_python(bundle: bytes) -> None:
    """Nobody's account, no home, no environment, the system's interpreter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "b.zip").write_bytes(bundle)
        (folder / "verify.py").write_bytes(offline.unpack(bundle)["verify.py"])
        done = subprocess.run(
            ["/usr/bin/python3", "-I", "-S", "-B", "verify.py", "b.zip"],
            cwd=folder, env={}, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "holds: incident inc-" in done.stdout


def test_any_of_a_thousand_random_alterations_is_refused_and_named(bundle: bytes) -> None:
    draw = random.Random(20261122)
    for _ in range(1000):
        altered = bytearray(bundle)
        kind = draw.randrange(4)
        place = draw.randrange(len(bundle))
        if kind == 0:
            altered[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del altered[place : place + draw.randrange(1, 50)]
        elif kind == 2:
            altered[place:place] = draw.randbytes(draw.randrange(1, 50))
        else:
            altered[place:] = altered[place:][::-1]
        if bytes(altered) == bundle:
            continue
        with pytest.raises(offline.Refused, match=r"container|MANIFEST|leaves|proofs|segments|keys|tree-head|incident"):
            offline.verify(bytes(altered))


def fitted(files: dict[str, bytes]) -> dict[str, bytes]:
    """With a manifest that fits."""
    manifest = json.loads(files[offline.MANIFEST])
    outside = {offline.MANIFEST, offline.SIGNATURE}
    manifest["files"] = {name: sha256_hex(data) for name, data in sorted(files.items()) if name not in outside}
    files[offline.MANIFEST] = json.dumps(manifest, separators=(",", ":")).encode()
    return files


def resigned(home: Home, files: dict[str, bytes]) -> bytes:
    """What somebody makes who has the attestation key: manifest, signature and zip made to fit."""
    fitted(files)
    subject = [{"name": offline.MANIFEST, "digest": {"sha256": sha256_hex(files[offline.MANIFEST])}}]
    key = load_or_create_key(home.keys / "attestation.pem")
    files[offline.SIGNATURE] = sign_statement(statement(offline.PREDICATE, {}, subject), key, repeatable=True)
    return offline.pack(files)


def first(bundle: bytes, folder: str) -> str:
    return max(name for name in offline.unpack(bundle) if name.startswith(folder))


@pytest.mark.parametrize(
    ("folder", "old", "new", "reason"),
    [
        ("incident.json", b'"outcome":"suspicious"', b'"outcome":"violated"', "expected the name"),
        ("incident.json", b'"hash":"', b'"hash":"0', "cites record"),
        ("segments/", b'"pid":77', b'"pid":78', "not those that leaf"),
        ("leaves/", b'"payload":"e', b'"payload":"f', "not in the log"),
        ("proofs/", b'"', b'"00', "expected a list of hashes"),
        ("tree-head.txt", b"trainguard.local\n", b"trainguard.local\n1", "not signed by the log's key"),
    ],
)
def test_a_rewritten_bundle_is_refused_by_what_was_signed(
    recorded: tuple[Home, Incident], bundle: bytes, folder: str, old: bytes, new: bytes, reason: str
) -> None:
    """Behind the signature over all of it, each part holds by itself, also against who has that key."""
    files, name = offline.unpack(bundle), first(bundle, folder)
    files[name] = files[name].replace(old, new, 1)
    with pytest.raises(offline.Refused, match=r"SIGNATURE\.json: signed for another manifest"):
        offline.verify(offline.pack(fitted(dict(files))))
    with pytest.raises(offline.Refused, match=reason):
        offline.verify(resigned(recorded[0], files))


def test_a_bundle_under_other_keys_is_refused_where_the_right_ones_are_known(bundle: bytes) -> None:
    prints = offline.verify(bundle)["fingerprints"]
    assert offline.verify(bundle, log_key=prints["log"], attestation_key=prints["attestation"])
    with pytest.raises(offline.Refused, match="log key: expected fingerprint"):
        offline.verify(bundle, log_key="0" * 64)


def test_a_missing_leaf_and_a_file_too_many_are_named(bundle: bytes) -> None:
    files = offline.unpack(bundle)
    name = first(bundle, "segments/")
    with pytest.raises(offline.Refused, match="differ: " + name):
        offline.verify(offline.pack({k: v for k, v in files.items() if k != name}))
    with pytest.raises(offline.Refused, match=r"differ: extra\.txt"):
        offline.verify(offline.pack({**files, "extra.txt": b"x"}))


def test_the_signatures_are_those_of_the_library() -> None:
    """Against cryptography: made there, checked here; one bit off is refused; DER in another form is refused."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for turn in range(5):
        message = b"message %d" % turn
        edward = ed25519.Ed25519PrivateKey.generate()
        raw = edward.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        signature = edward.sign(message)
        assert offline.ed25519_holds(raw, message, signature)
        assert not offline.ed25519_holds(raw, message + b"!", signature)
        assert not offline.ed25519_holds(raw, message, signature[:-1] + bytes([signature[-1] ^ 1]))
        key = ec.generate_private_key(ec.SECP256R1())
        numbers = key.public_key().public_numbers()
        der = key.sign(message, ec.ECDSA(hashes.SHA256()))
        assert offline.ecdsa_holds((numbers.x, numbers.y), message, der)
        assert not offline.ecdsa_holds((numbers.x, numbers.y), message + b"!", der)
        assert not offline.ecdsa_holds((numbers.x, numbers.y), message, der + b"\0")
        assert not offline.ecdsa_holds((numbers.x, numbers.y ^ 1), message, der)


def test_bad_input_is_one_sentence_and_a_status(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    assert offline.run([]) == (2, offline.run([])[1])
    assert offline.run([str(tmp_path / "none.zip")])[0] == 3
    status, said = offline.run([str(tmp_path / "x.zip")])
    assert status == 1
    assert said.startswith("REFUSED: container: not a whole zip")


# -- what somebody makes who knows the format and has no key -----------------------------------------------------------


def incident_with(**change: Any) -> Callable[[dict[str, bytes]], None]:
    """Another incident.json: fields of the incident, or of its attribution, or of its first finding."""

    def rewrite(files: dict[str, bytes]) -> None:
        told = json.loads(files["incident.json"])
        for name, value in change.items():
            place = (
                told if name in told else told["attribution"] if name in told["attribution"] else told["findings"][0]
            )
            assert name in place
            place[name] = value
        files["incident.json"] = json.dumps(told, separators=(",", ":")).encode()

    return rewrite


def swapped(first: str, second: str) -> Callable[[dict[str, bytes]], None]:
    """The contents of the first and of the last file of two folders, the other way round."""

    def rewrite(files: dict[str, bytes]) -> None:
        a = min(name for name in files if name.startswith(first))
        b = max(name for name in files if name.startswith(second))
        assert a != b
        files[a], files[b] = files[b], files[a]

    return rewrite


def head_with(change: Callable[[str], str]) -> Callable[[dict[str, bytes]], None]:
    def rewrite(files: dict[str, bytes]) -> None:
        files["tree-head.txt"] = change(files["tree-head.txt"].decode()).encode()

    return rewrite


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({name: data})


def own_log(files: dict[str, bytes]) -> None:
    """A log of his own with the same leaves: keys, head and proofs fit together."""
    names = sorted(name for name in files if name.startswith("leaves/"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with Log.open(path / "log", path / "log.key") as log:
            entries = {int(name[7:-5]): files[name] for name in names}
            log.append([entries.get(n, b"filler %d" % n) for n in range(max(entries) + 1)])
            log.publish()
        reader = LogReader(path / "log", path / "log.vkey")
        files["tree-head.txt"] = reader.head().note.encode()
        files["keys/log.vkey"] = (path / "log.vkey").read_bytes()
        for name in names:
            proof = [each.hex() for each in reader.inclusion(int(name[7:-5])).path]
            files[f"proofs/{name[7:]}"] = json.dumps(proof, separators=(",", ":")).encode()


SENTENCE = "On host node-3 account victim-b (uid 1002) sabotaged the run."
FORGERIES: dict[str, Callable[[dict[str, bytes]], None]] = {
    "the sentence accuses somebody": incident_with(sentence=SENTENCE),
    "the candidates are gone": incident_with(candidates=[]),
    "circumstances that nobody told": incident_with(around=["as told by nobody"]),
    "another severity": incident_with(severity="critical"),
    "models are cleared": incident_with(affected=["another-model.pt"]),
    "a finding's place is another": incident_with(subject={"run": "r1", "step": None, "rank": None, "path": "/x:1"}),
    "a finding expected something else": incident_with(expected="victim-b"),
    "the verifier always says yes": put("verify.py", b"print('holds: incident inc-0000000000')"),
    "the instructions are others": put("README.txt", b"This is to be trusted."),
    "a file more, and listed": put("STATEMENT.txt", b"signed by nobody"),
    "a leaf more, that is none": put("leaves/999.json", b"{}"),
    "proofs of another leaf": swapped("proofs/", "proofs/"),
    "leaves in another order": swapped("leaves/", "leaves/"),
    "a proof for a leaf": swapped("leaves/", "proofs/"),
    "tree head without its last line": head_with(lambda text: text.rsplit("\n", 2)[0]),
    "tree head without its signature": head_with(lambda text: text.split("\n\n")[0] + "\n\n"),
    "tree head of a smaller tree": head_with(lambda text: text.replace(text.split("\n")[1], "1", 1)),
    "tree head with a further signature": head_with(lambda text: text + "\u2014 witness.example AAAAAAAAAAAAAAAA\n"),
    "another log with the same leaves": own_log,
    "another attestation key": lambda files: files.update({"keys/attestation.pem": other_public()}),
}


def other_public() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_that_fits_its_manifest_is_refused(bundle: bytes, name: str) -> None:
    """Whatever is said in a bundle is said by who signed it, its words on persons and models above all."""
    files = offline.unpack(bundle)
    FORGERIES[name](files)
    with pytest.raises(offline.Refused):
        offline.verify(offline.pack(fitted(files)))


def zipped(
    files: dict[str, bytes], how: int = zipfile.ZIP_STORED, comment: bytes = b"", twice: str = "", system: int = 3
) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", how) as archive:
        warnings.simplefilter("ignore")
        archive.comment = comment
        for name in [*sorted(files), *([twice] if twice else [])]:
            info = zipfile.ZipInfo(name, offline.EPOCH)
            info.create_system = system
            archive.writestr(info, files[name], compress_type=how)
    return out.getvalue()


@pytest.mark.parametrize("how", ["twice", "comment", "deflated", "before", "behind", "other system", "other date"])
def test_the_same_files_in_another_zip_are_refused(bundle: bytes, how: str) -> None:
    """Duplicate names, a comment, compression, something in front or behind: readers would differ on what is in it."""
    files = offline.unpack(bundle)
    made = {
        "twice": lambda: zipped(files, twice="incident.json"),
        "comment": lambda: zipped(files, comment=b"seen by the court"),
        "deflated": lambda: zipped(files, zipfile.ZIP_DEFLATED),
        "before": lambda: b"#!/bin/sh\n" + bundle,
        "behind": lambda: bundle + b"\0",
        "other system": lambda: zipped(files, system=0),
        "other date": lambda: bundle.replace(b"\x00\x00\x21\x00", b"\x00\x00\x22\x00"),
    }[how]()
    with pytest.raises(offline.Refused, match="container"):
        offline.verify(made)


def signed_over(bundle: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The bundle with another signature file, the manifest as it was."""
    files = offline.unpack(bundle)
    outer = json.loads(files[offline.SIGNATURE])
    change(outer)
    files[offline.SIGNATURE] = json.dumps(outer, sort_keys=True, separators=(",", ":")).encode()
    return offline.pack(files)


def higher(outer: dict[str, Any]) -> None:
    """The other signature that holds as well: -s in place of s."""
    r, s = decode_dss_signature(base64.b64decode(outer["signatures"][0]["sig"]))
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    outer["signatures"][0]["sig"] = base64.b64encode(encode_dss_signature(r, order - s)).decode()


def test_a_signature_has_one_form(bundle: bytes) -> None:
    """The same key and text in other bytes are refused too, so that a bundle has one SHA-256."""
    for change in (
        higher,
        lambda outer: outer.update(note="x"),
        lambda outer: outer["signatures"][0].update(keyid="0" * 64),
        lambda outer: outer["signatures"][0].pop("keyid"),
    ):
        with pytest.raises(offline.Refused, match=r"SIGNATURE\.json: not in the one form"):
            offline.verify(signed_over(bundle, change))
    files = offline.unpack(bundle)
    files[offline.SIGNATURE] += b"\n"
    with pytest.raises(offline.Refused, match=r"SIGNATURE\.json: not in the one form"):
        offline.verify(offline.pack(files))
    del files[offline.SIGNATURE]
    with pytest.raises(offline.Refused, match=r"SIGNATURE\.json: missing"):
        offline.verify(offline.pack(files))


def test_a_statement_that_the_key_signed_for_something_else_signs_no_bundle(recorded: tuple[Home, Incident]) -> None:
    """A segment's statement out of the log, say."""
    home, _ = recorded
    bundle = make_bundle(*recorded)
    files = offline.unpack(bundle)
    key = load_or_create_key(home.keys / "attestation.pem")
    subject = [{"name": offline.MANIFEST, "digest": {"sha256": sha256_hex(files[offline.MANIFEST])}}]
    for value in (statement("segment/v1", {}, subject), statement(offline.PREDICATE, {}, [])):
        files[offline.SIGNATURE] = sign_statement(value, key, repeatable=True)
        with pytest.raises(offline.Refused, match="signed for another manifest, or for something else"):
            offline.verify(offline.pack(files))


def test_who_has_the_key_cannot_add_a_file_or_cite_another_run(tmp_path: Path) -> None:
    """A bundle is a bundle, whoever signs it: no further files, and no segments of other runs."""
    home, incident = recorded_in(Home(tmp_path / "home"), "r1", "r2")
    files = offline.unpack(make_bundle(home, incident))
    assert offline.verify(resigned(home, dict(files)))
    with pytest.raises(offline.Refused, match=r"\.\./x\.txt: not a file of a bundle"):
        offline.verify(resigned(home, {**files, "../x.txt": b"x"}))
    (segment, *_) = LogLeaves(home).segments["r2"]
    (entry,) = LogReader(home.log, home.keys / "log.vkey").entries(segment.leaf, segment.leaf + 1)
    path = LogReader(home.log, home.keys / "log.vkey").inclusion(segment.leaf).path
    spool = (home.run("r2") / "spool").read_bytes()[segment.offset : segment.offset + segment.bytes]
    more = {f"leaves/{segment.leaf}.json": entry, f"segments/{segment.leaf}.spool": spool}
    more |= {f"proofs/{segment.leaf}.json": json.dumps([each.hex() for each in path]).encode()}
    with pytest.raises(offline.Refused, match="records of run r2, and the incident is of run r1"):
        offline.verify(resigned(home, {**files, **more}))


def test_a_verifier_says_when_the_one_in_the_bundle_is_another(recorded: tuple[Home, Incident], tmp_path: Path) -> None:
    """It may be older, and signed as it is; whoever runs it knows that it is not this one."""
    home, _ = recorded
    files = offline.unpack(make_bundle(*recorded))
    (tmp_path / "b.zip").write_bytes(offline.pack(files))
    assert "is another one than this" not in offline.run([str(tmp_path / "b.zip")])[1]
    (tmp_path / "b.zip").write_bytes(resigned(home, {**files, "verify.py": b"print('holds')"}))
    assert "the verify.py in the bundle is another one than this" in offline.run([str(tmp_path / "b.zip")])[1]


def test_records_of_another_run_are_no_evidence_of_this_one(tmp_path: Path) -> None:
    """Both runs are in one log, under one key; a finding on the first cites a record of the second."""
    home, incident = recorded_in(Home(tmp_path / "home"), "r1", "r2")
    others = LogLeaves(home).segments["r2"]
    stray = next(r for r in RunReader(home, "r2").records() if r.kind == "process")
    cited = msgspec.structs.replace(incident.findings[0], evidence=(Citation(leaf=stray.leaf, hash=stray.hash),))
    forged = msgspec.structs.replace(incident, findings=(cited, *incident.findings[1:]))
    assert others
    with pytest.raises((offline.Refused, VerificationError)):
        offline.verify(make_bundle(home, forged))
