"""The bundle: one encoder, one strict decoder, the schemas' constraints, and no way around the signature."""

import base64
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import canonical_json, sha256_hex
from trainguard.envelope import public_pem
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.log.note import Verifier
from trainguard.seal import seal_path, verify_seal
from trainguard.seal.bundle import (
    Bundle,
    Facts,
    Signed,
    encode_bundle,
    encode_statement,
    fingerprint,
    hashedrekord,
    sign,
)
from trainguard.seal.ledger import home_verifier, read_ledger, verify_entry
from trainguard.seal.manifest import read_manifest, root_digest
from trainguard.seal.parse import BUNDLE_LIMIT_BYTES, parse_bundle, verify_bundle

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
FACTS = Facts(
    run="r",
    step=3,
    previous_leaf=7,
    previous_payload="0" * 64,
    lock="1" * 64,
    origin="trainguard.local",
    log_size=9,
    live="equal",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without tensors."""
    root = tmp_path / "m"
    (root / "empty").mkdir(parents=True)
    (root / "a.bin").write_bytes(b"a")
    (root / "b.bin").write_bytes(b"b")
    (root / ".gitignore").write_text("x")
    return root


def bundled(payload: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    return encode_bundle(sign(payload, key), fingerprint(key.public_key()), None)


def read(data: bytes) -> Any:
    return verify_bundle(parse_bundle(data, where="x"), [KEY.public_key()], where="x")


def test_a_bundle_comes_back_as_it_was_sealed(folder: Path) -> None:
    """parse and verify invert encode, facts and entries and all."""
    manifest = read_manifest(folder)
    seal = read(bundled(encode_statement(manifest, FACTS)))
    assert seal.facts == FACTS
    assert tuple(seal.entries[name] for name in sorted(seal.entries)) == manifest.entries
    assert (seal.name, seal.hash_type, seal.complete, seal.others) == ("m", "sha256", True, (".gitignore", "empty"))
    assert seal.signer == hashlib.sha256(public_pem(KEY.public_key())).hexdigest()


def test_blake3_seals_have_no_dirhash(folder: Path) -> None:
    """dirHash is SHA-256 of every file; computing it would undo the choice. The signature binds the names anyway."""
    seal = read(bundled(encode_statement(read_manifest(folder, hash_type="blake3"), Facts())))
    assert (seal.hash_type, seal.dir_hash, seal.facts) == ("blake3", None, Facts())


def test_the_schemas_hold(folder: Path) -> None:
    """What the four OMS v1.0 JSON schemas ask of bundle, envelope, statement and predicate."""
    bundle = json.loads(bundled(encode_statement(read_manifest(folder), FACTS)))
    assert set(bundle) == {"mediaType", "verificationMaterial", "dsseEnvelope"}
    assert bundle["mediaType"].startswith("application/vnd.dev.sigstore.bundle")
    assert set(bundle["dsseEnvelope"]) == {"payload", "payloadType", "signatures"}
    assert set(bundle["dsseEnvelope"]["signatures"][0]) <= {"sig", "keyid"}
    value = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert set(value) == {"_type", "subject", "predicateType", "predicate"}
    assert set(value["predicate"]) == {"resources", "serialization"}
    assert set(value["predicate"]["serialization"]) == {"method", "hash_type", "allow_symlinks", "ignore_paths"}
    assert all(set(digest) <= set("0123456789abcdef") for digest in value["subject"][0]["digest"].values())
    names = [resource["name"] for resource in value["predicate"]["resources"]]
    assert names == sorted(names) == ["a.bin", "b.bin"]


def test_a_small_seal_is_a_small_file(tmp_path: Path) -> None:
    """About 5 KB: signature, log entry and proof included."""
    path = tmp_path / "c.bin"
    path.write_bytes(b"x")
    seal_path(Home(tmp_path / "state"), path, run="r", step=1)
    assert (tmp_path / "c.bin.sig").stat().st_size < 5000


def test_another_key_and_a_wrong_hint_are_refused(folder: Path) -> None:
    """The hint is not signed, so it has to be the signer's."""
    payload = encode_statement(read_manifest(folder), FACTS)
    with pytest.raises(VerificationError, match="signature is not by"):
        read(bundled(payload, OTHER))
    signed = sign(payload, KEY)
    with pytest.raises(VerificationError, match="names key"):
        read(encode_bundle(signed, fingerprint(OTHER.public_key()), None))


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(extra=1),
        lambda v: v["predicate"].update(extra=1),
        lambda v: v.update(predicateType="https://model_signing/Digests/v0.1"),
        lambda v: v.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda v: v["subject"].append(v["subject"][0]),
        lambda v: v["subject"][0]["digest"].update(sha256="0" * 64),
        lambda v: v["subject"][0]["digest"].update(dirHash="0" * 64),
        lambda v: v["subject"][0].update(name=""),
        lambda v: v["subject"][0].update(name=3),
        lambda v: v["subject"][0]["annotations"].update(step=-1),
        lambda v: v["subject"][0]["annotations"].update(step=True),
        lambda v: v["subject"][0]["annotations"].update(run="a/b"),
        lambda v: v["subject"][0]["annotations"].update(live="maybe"),
        lambda v: v["subject"][0]["annotations"].update(others=[{}]),
        lambda v: v["predicate"]["resources"].reverse(),
        lambda v: v["predicate"].update(resources=[]),
        lambda v: v["predicate"]["resources"].append(v["predicate"]["resources"][-1]),
        lambda v: v["predicate"]["resources"][0].update(name="../a.bin"),
        lambda v: v["predicate"]["resources"][0].update(name="/a.bin"),
        lambda v: v["predicate"]["resources"][0].update(name="a//b"),
        lambda v: v["predicate"]["resources"][0].update(name="a\nb"),
        lambda v: v["predicate"]["resources"][0].update(digest="AB" * 32),
        lambda v: v["predicate"]["resources"][0].update(digest="ab"),
        lambda v: v["predicate"]["resources"][0].update(algorithm="md5"),
        lambda v: v["predicate"]["resources"][0]["annotations"].update(mode="99999"),
        lambda v: v["predicate"]["resources"][0]["annotations"].update(size="3"),
        lambda v: v["predicate"]["resources"][0]["annotations"].update(tensors=[1]),
        lambda v: v["predicate"]["serialization"].update(method="shards", shard_size=9),
        lambda v: v["predicate"]["serialization"].update(hash_type="md5"),
        lambda v: v.update(subject={}),
        lambda v: v.update(predicate=[]),
    ],
)
def test_a_signed_statement_that_is_not_a_seal_is_malformed(folder: Path, change: Callable[[Any], None]) -> None:
    """Signed is not enough: one typed error, never a KeyError."""
    value = json.loads(encode_statement(read_manifest(folder), FACTS))
    change(value)
    with pytest.raises(MalformedEvidence):
        read(bundled(canonical_json(value)))


def sharded(names: list[str], *, shard: Any = 4.0, algorithm: str = "sha256-sharded-4") -> bytes:
    """A signed statement of method `shards`, as model_signing writes it, over shards of these names."""
    digests = [sha256_hex(name.encode()) for name in names]
    root = root_digest(iter(digests))
    resources = [
        {"name": name, "algorithm": algorithm, "digest": digest} for name, digest in zip(names, digests, strict=True)
    ]
    serialization = {"method": "shards", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
    return canonical_json(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": "m", "digest": {"sha256": root}}],
            "predicateType": "https://model_signing/signature/v1.0",
            "predicate": {"resources": resources, "serialization": serialization | {"shard_size": shard}},
        }
    )


def test_shards_are_read_as_the_files_they_make() -> None:
    """Sizes from the last shard's end, colons in names, and either order of paths that tools write."""
    seal = read(bundled(sharded(["a/x:0:4", "a/x:4:5", "a-b:1:0:4"])))
    assert seal.hash_type == "sha256-sharded-4"
    assert {name: (entry.size, len(entry.digest or "")) for name, entry in seal.entries.items()} == {
        "a/x": (5, 128),
        "a-b:1": (4, 64),
    }


@pytest.mark.parametrize(
    ("names", "shard", "algorithm"),
    [
        (["a:4:8"], 4, "sha256-sharded-4"),
        (["a:0:4", "a:8:12"], 4, "sha256-sharded-4"),
        (["a:0:4", "a:0:4"], 4, "sha256-sharded-4"),
        (["a:0:3", "a:3:4"], 4, "sha256-sharded-4"),
        (["a:0:5"], 4, "sha256-sharded-4"),
        (["a:0:0"], 4, "sha256-sharded-4"),
        (["a:0:4", "b:0:4", "a:4:8"], 4, "sha256-sharded-4"),
        (["a:00:4"], 4, "sha256-sharded-4"),
        (["a"], 4, "sha256-sharded-4"),
        (["../a:0:4"], 4, "sha256-sharded-4"),
        (["b:0:4", "a:0:4"], 4, "sha256-sharded-4"),
        (["a:0:4"], 4, "sha256"),
        (["a:0:4"], 4, "sha256-sharded-5"),
        (["a:0:4"], 4.5, "sha256-sharded-4"),
        (["a:0:4"], 0, "sha256-sharded-0"),
        (["a:0:4"], True, "sha256-sharded-1"),
        (["a:0:4"], float("1e300"), "sha256-sharded-4"),
        ([], 4, "sha256-sharded-4"),
    ],
)
def test_shards_that_do_not_tile_their_files_are_malformed(names: list[str], shard: Any, algorithm: str) -> None:
    """A gap, a repetition, a short one inside, one too long, an empty one, files mixed, other sizes than were said."""
    with pytest.raises(MalformedEvidence):
        read(bundled(sharded(names, shard=shard, algorithm=algorithm)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"a":1,"a":2}',
        b'{"mediaType":NaN}',
        b"9" * 10_000,
        b'{"mediaType":"x","verificationMaterial":{},"dsseEnvelope":{}}',
    ],
)
def test_what_is_not_a_bundle_is_malformed(data: bytes) -> None:
    """Empty, cut, nested without end, doubled keys, NaN."""
    with pytest.raises(MalformedEvidence, match="x: "):
        parse_bundle(data, where="x")


def test_an_oversized_bundle_is_refused_by_its_size() -> None:
    """Before it is parsed."""
    with pytest.raises(MalformedEvidence, match="limit"):
        parse_bundle(b" " * (BUNDLE_LIMIT_BYTES + 1), where="x")


def test_every_single_flipped_bit_of_a_bundle_is_noticed(tmp_path: Path) -> None:
    """Signed part, signature, hint, log entry, proof: 1,500 positions, none can change unseen."""
    home = Home(tmp_path / "state")
    path = tmp_path / "c.bin"
    path.write_bytes(b"x")
    seal_path(home, path, run="r", step=1)
    genuine = (tmp_path / "c.bin.sig").read_bytes()
    key = read_ledger_key(home)
    verifier = home_verifier(home)
    assert verifier is not None
    draw = random.Random(5)
    for _ in range(1500):
        data = bytearray(genuine)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        with pytest.raises(VerificationError):
            read_all(bytes(data), key, verifier)


def read_all(data: bytes, key: ec.EllipticCurvePublicKey, verifier: Verifier) -> None:
    """Everything that is checked without the checkpoint."""
    bundle = parse_bundle(data, where="x")
    verify_bundle(bundle, [key], where="x")
    verify_entry(bundle, key, verifier, where="x")


def read_ledger_key(home: Home) -> ec.EllipticCurvePublicKey:
    from trainguard.envelope import load_public_key

    return load_public_key(home.keys / "attestation.pub")


def test_base64_has_one_form() -> None:
    """The unused bits of the last character are not a place to hide a change."""
    signed = Signed(payload=b"x", signature=b"y")
    data = encode_bundle(signed, "h", None)
    assert parse_bundle(data, where="x").signed == signed
    with pytest.raises(MalformedEvidence, match="one form"):
        parse_bundle(data.replace(b'"eA=="', b'"eB=="'), where="x")


def test_the_log_entry_is_bound_to_signature_and_log(tmp_path: Path) -> None:
    """An entry of another seal, or of another log, does not do."""
    home, other = Home(tmp_path / "state"), Home(tmp_path / "other")
    bundles = []
    for number, where in enumerate((home, home, other)):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes([number]))
        seal_path(where, path)
        bundles.append(parse_bundle(Path(f"{path}.sig").read_bytes(), where="x"))
    key, verifier = read_ledger_key(home), home_verifier(home)
    assert verifier is not None
    assert verify_entry(bundles[0], key, verifier, where="x").size == 2
    mixed = Bundle(signed=bundles[0].signed, hint=bundles[0].hint, entry=bundles[1].entry)
    with pytest.raises(VerificationError, match="not of this signature"):
        verify_entry(mixed, key, verifier, where="x")
    other_verifier = home_verifier(other)
    assert other_verifier is not None
    with pytest.raises(VerificationError):
        verify_entry(bundles[0], key, other_verifier, where="x")
    bare = Bundle(signed=bundles[0].signed, hint=bundles[0].hint, entry=None)
    with pytest.raises(MalformedEvidence, match="has no log entry"):
        verify_entry(bare, key, verifier, where="x")


def test_the_log_entry_has_rekors_shape() -> None:
    """hashedrekord 0.0.2 in canonical JSON over the SHA-256 of the PAE."""
    entry = json.loads(hashedrekord(sign(b"p", KEY), KEY.public_key()))
    assert (entry["kind"], entry["apiVersion"]) == ("hashedrekord", "0.0.2")
    data = entry["spec"]["hashedRekordV002"]["data"]
    pae = b"DSSEv1 28 application/vnd.in-toto+json 1 p"
    assert base64.b64decode(data["digest"]) == hashlib.sha256(pae).digest()


def test_seals_are_chained_by_run(tmp_path: Path) -> None:
    """Each names the one before it, per run; the lock and the log's size stand in it too."""
    home = Home(tmp_path / "state")
    leaves = {}
    for run, step in (("a", 1), ("b", 1), ("a", 2)):
        path = tmp_path / f"{run}{step}.bin"
        path.write_bytes(f"{run}{step}".encode())
        leaves[run, step] = seal_path(home, path, run=run, step=step, lock="5" * 64).leaf
    public = read_ledger_key(home)
    seal = verify_bundle(parse_bundle((tmp_path / "a2.bin.sig").read_bytes(), where="x"), [public], where="x")
    ledger = read_ledger(home, public)
    assert ledger is not None
    assert seal.facts.previous_leaf == leaves["a", 1]
    assert seal.facts.previous_payload == ledger.seals[0].payload
    assert (seal.facts.lock, seal.facts.log_size, seal.facts.origin) == ("5" * 64, 4, "trainguard.local")
    assert [s.name for s in ledger.seals] == ["a1.bin", "b1.bin", "a2.bin"]


def test_the_ledger_passes_over_other_entries(tmp_path: Path) -> None:
    """Seals share the log with runs, and with whatever else was entered."""
    from trainguard.log import Log

    home = Home(tmp_path / "state")
    path = tmp_path / "c.bin"
    path.write_bytes(b"x")
    seal_path(home, path)
    with Log.open(home.log, home.keys / "log.key") as log:
        log.append([b"junk", b'{"apiVersion":"0.0.2","kind":"hashedrekord",', b"{}"])
    seal_path(home, path)
    ledger = read_ledger(home, read_ledger_key(home))
    assert ledger is not None
    assert [s.leaf for s in ledger.seals] == [1, 6]
    assert ledger.kept(ledger.seals[0], read_ledger_key(home)) is not None
    assert verify_seal(path, home=home).status == "upheld"


@pytest.mark.parametrize(
    "arguments",
    [
        {"run": "a/b"},
        {"run": ""},
        {"step": -1},
        {"step": 1 << 53},
        {"hash_type": "md5"},
        {"live_digest": "md5:00"},
        {"live_digest": "sha256:00"},
        {"live_digest": "0" * 64},
    ],
)
def test_arguments_that_cannot_be_meant_are_misuse(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """And nothing is sealed."""
    path = tmp_path / "c.bin"
    path.write_bytes(b"x")
    with pytest.raises(Misuse):
        seal_path(Home(tmp_path / "state"), path, **arguments)
    assert not (tmp_path / "c.bin.sig").exists()


def test_live_digests_by_file_and_by_other_algorithm(tmp_path: Path) -> None:
    """A folder's digests by name; BLAKE3 taken while saving, SHA-256 in the seal."""
    from blake3 import blake3

    home = Home(tmp_path / "state")
    root = tmp_path / "m"
    root.mkdir()
    (root / "a").write_bytes(b"a")
    right = {"a": "blake3:" + blake3(b"a").hexdigest()}
    assert seal_path(home, root, live_digest=right).live == "equal"
    assert seal_path(home, root, live_digest={"b": right["a"]}).live == "differs"
    assert seal_path(home, root, live_digest={}).live is None


def test_without_a_key_nothing_is_verified(tmp_path: Path) -> None:
    """Unavailable with what to do about it."""
    path = tmp_path / "c.bin"
    path.write_bytes(b"x")
    with pytest.raises(Unavailable, match="no key") as caught:
        verify_seal(path, home=Home(tmp_path / "none"))
    assert "--key" in (caught.value.next_step or "")
