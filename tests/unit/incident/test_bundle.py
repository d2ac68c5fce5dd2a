"""A bundle holds anywhere with nothing but Python, and not one byte of it can be changed unseen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from trainguard.appraise.judge import judge_run
from trainguard.archive import RunWriter
from trainguard.digest import sha256_hex
from trainguard.envelope import load_or_create_key
from trainguard.home import Home
from trainguard.incident import offline
from trainguard.incident.bundle import make_bundle
from trainguard.incident.correlate import Incident, incidents
from trainguard.log import Log
from trainguard.policy import Policy


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Incident]:
    """A run in which a process reported that does not descend from the job."""
    home = Home(tmp_path_factory.mktemp("home"))
    home.prepare()
    key = load_or_create_key(home.keys / "attestation.pem")
    with Log.open(home.log, home.keys / "log.key") as log:
        writer = RunWriter(home, "r1", log, key)
        policy = home.store_blob(msgspec.json.encode(Policy()))
        body = {"command": ["python", "train.py"], "cwd": "/job", "host": "node-3", "policy": policy, "lock": None}
        body["account"] = {"uid": 1001, "loginuid": "1001", "session": "3"}
        writer.begin({"run": "r1", **body})
        writer.add("start", body)
        writer.add("process", {"of_the_job": False, "hello": {}}, process=0, pid=77, uid=1002)
        writer.seal()
        writer.add("end", {"status": 0})
        writer.seal(final=True)
        writer.close()
        log.publish()
    assert judge_run(home, "r1").verdict == "SUSPECT"
    (incident,) = [each for each in incidents(home) if each.kind == "G"]
    return home, incident


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


def rewritten(bundle: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """What somebody who knows the format makes: one file changed, the manifest and the zip made to fit."""
    files = offline.unpack(bundle)
    files[name] = change(files[name])
    manifest = json.loads(files[offline.MANIFEST])
    manifest["files"][name] = sha256_hex(files[name])
    files[offline.MANIFEST] = json.dumps(manifest, separators=(",", ":")).encode()
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
    bundle: bytes, folder: str, old: bytes, new: bytes, reason: str
) -> None:
    name = first(bundle, folder)
    altered = rewritten(bundle, name, lambda data: data.replace(old, new, 1))
    with pytest.raises(offline.Refused, match=reason):
        offline.verify(altered)


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
