"""Tools that others wrote accept our seals unmodified and offline, and refuse tampered ones.

`tools/readers.sh .venv-tools`, which `make test` runs, gets model_signing and cosign without root; Go with
golang-golang-x-mod-dev and openssl are looked for on PATH. What is not there is skipped with its reason.
TRAINGUARD_MODEL_SIGNING, TRAINGUARD_COSIGN, TRAINGUARD_OPENSSL name others.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import schemas

from trainguard.deliver import EVENTS, sealed_events
from trainguard.digest import canonical_json
from trainguard.envelope import PREDICATE_BASE, load_or_create_key, pre_authentication_encoding
from trainguard.home import Home
from trainguard.seal import seal_path, verify_seal
from trainguard.seal.ledger import home_verifier, trusted_root
from trainguard.seal.manifest import go_dirhash, seal_path_of

pytestmark = pytest.mark.tool

GO_LIBRARIES = Path("/usr/share/gocode")
"""Where Debian's golang-*-dev packages lie."""

TOOLS = Path(__file__).parents[2] / ".venv-tools" / "bin"
"""Where tools/readers.sh puts them."""

Ran = subprocess.CompletedProcess[str]


def tool(variable: str, name: str) -> str:
    """The program that `variable` names, or `name` on PATH or among our tools; skips where there is none."""
    found = os.environ.get(variable) or shutil.which(name) or str(TOOLS / name)
    if not Path(found).exists():
        pytest.skip(f"{name} is not installed (tools/readers.sh .venv-tools, or put it on PATH, or set {variable})")
    return str(Path(found).absolute())


def run(*command: object, **options: Any) -> Ran:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "state")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with files below, files that OMS ignores, an empty file and an odd name."""
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "weights.bin").write_bytes(bytes(range(256)) * 20)
    (root / "sub-b").write_bytes(b"sorts before sub/ as text, behind it as a path")
    (root / "sub" / "ein Modell.bin").write_bytes(b"b")
    (root / "empty").write_bytes(b"")
    (root / ".gitattributes").write_text("x")
    return root


@pytest.fixture
def model_signing() -> str:
    return tool("TRAINGUARD_MODEL_SIGNING", "model_signing")


@pytest.fixture
def cosign(tmp_path: Path, home: Home) -> Callable[..., Ran]:
    """cosign verify-blob-attestation with our key, in a home of its own; without the network it has nothing else."""
    program = tool("TRAINGUARD_COSIGN", "cosign")

    def verify(bundle: Path, digest: str, algorithm: str = "sha256", *more: object, key: Path | None = None) -> Ran:
        options = ("--type", "https://model_signing/signature/v1.0", "--digest", digest, "--digestAlg", algorithm)
        environment = os.environ | {"HOME": str(tmp_path / "cosign-home"), "HTTPS_PROXY": "http://127.0.0.1:9"}
        return run(
            program, "verify-blob-attestation", "--bundle", bundle, "--key", key or home.keys / "attestation.pub",
            *options, *more, env=environment,
        )  # fmt: skip

    return verify


def tampered(folder: Path) -> dict[str, Path]:
    """Copies of a sealed folder, each changed in one way."""
    made = {name: folder.parent / f"copy-{name}" for name in ("changed", "extra", "missing", "renamed")}
    for copy in made.values():
        shutil.copytree(folder, copy)
    (made["changed"] / "weights.bin").write_bytes(bytes(5120))
    (made["extra"] / "more").write_bytes(b"")
    (made["missing"] / "empty").unlink()
    (made["renamed"] / "weights.bin").rename(made["renamed"] / "other.bin")
    return made


def test_model_signing_upholds_our_seal_and_refuses_tampering(model_signing: str, home: Home, folder: Path) -> None:
    """The reference implementation of OMS, its command and its library: change, extra, missing, renamed."""
    seal_path(home, folder, run="r", step=1)
    copies = tampered(folder)
    public = home.keys / "attestation.pub"

    def verify(place: Path) -> Ran:
        return run(model_signing, "verify", "key", place, "--public_key", public, "--signature", seal_path_of(place))

    assert verify(folder).returncode == 0
    assert verify(copies["changed"]).returncode != 0
    code = (
        "import sys, pathlib; from model_signing import verifying\n"
        "for place in sys.argv[2:]:\n"
        "    try:\n"
        "        verifying.Config().use_elliptic_key_verifier(public_key=sys.argv[1]).verify(\n"
        "            pathlib.Path(place), pathlib.Path(place) / 'model.sig')\n"
        "        print('upheld')\n"
        "    except ValueError: print('refused')\n"
    )
    python = Path(model_signing).resolve().with_name("python")
    done = run(python, "-c", code, public, folder, *copies.values())
    assert done.stdout.split() == ["upheld", *["refused"] * 4], done.stderr


def test_model_signing_upholds_a_seal_of_many_files(model_signing: str, home: Home, tmp_path: Path) -> None:
    """Four hundred in nested folders, whose names sort otherwise as text than as paths."""
    root = tmp_path / "many"
    for number in range(400):
        place = root / ("part" if number % 3 else "part-b") / f"{number % 7}.x"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"shard {number}.bin").write_bytes(b"%d" % number)
    seal_path(home, root)
    public = home.keys / "attestation.pub"
    command = (model_signing, "verify", "key", root, "--public_key", public, "--signature", seal_path_of(root))
    assert run(*command).returncode == 0
    (root / "part" / "1.x" / "shard 1.bin").write_bytes(b"2")
    assert run(*command).returncode != 0


def test_model_signing_upholds_a_seal_of_one_file(model_signing: str, home: Home, tmp_path: Path) -> None:
    """Under another name too."""
    path = tmp_path / "c.pt"
    path.write_bytes(b"weights")
    seal_path(home, path)
    moved = path.rename(tmp_path / "moved.pt")
    public = home.keys / "attestation.pub"
    done = run(model_signing, "verify", "key", moved, "--public_key", public, "--signature", f"{path}.sig")
    assert done.returncode == 0, done.stderr


def test_model_signings_library_upholds_a_blake3_seal(model_signing: str, home: Home, folder: Path) -> None:
    """Its command line hashes with SHA-256 whatever the seal says; its library reads the hash type."""
    seal_path(home, folder, hash_type="blake3")
    code = (
        "import sys; from model_signing import verifying\n"
        "verifying.Config().use_elliptic_key_verifier(public_key=sys.argv[1]).set_hashing_config(\n"
        "    __import__('model_signing').hashing.Config().use_file_serialization(hashing_algorithm='blake3')\n"
        "    .set_ignored_paths(paths=[sys.argv[3]])).verify(sys.argv[2], sys.argv[3])\n"
    )
    python = Path(model_signing).resolve().with_name("python")
    arguments = (home.keys / "attestation.pub", folder, seal_path_of(folder))
    done = run(python, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    (folder / "weights.bin").write_bytes(b"other")
    assert run(python, "-c", code, *arguments).returncode != 0


def test_we_uphold_what_model_signing_signed(model_signing: str, home: Home, folder: Path) -> None:
    """With its key: content is checked, and what it does not say is said to be unchecked."""
    seal_path(home, folder)
    key = home.keys / "attestation.pem"
    other = Home(folder.parent / "nothing")
    seal_path_of(folder).unlink()
    done = run(model_signing, "sign", "key", folder, "--private_key", key, "--signature", seal_path_of(folder))
    assert done.returncode == 0, done.stderr
    report = verify_seal(folder, home=other, key=home.keys / "attestation.pub")
    assert (report.status, report.checked) == ("upheld", ("signature", "content"))
    (folder / "weights.bin").write_bytes(b"other")
    assert verify_seal(folder, home=other, key=home.keys / "attestation.pub").status == "violated"


SHARDED = (
    "import sys; from model_signing import hashing, signing\n"
    "hashes = hashing.Config().use_shard_serialization(hashing_algorithm=sys.argv[4], shard_size=1000)\n"
    "signing.Config().use_elliptic_key_signer(private_key=sys.argv[1]).set_hashing_config(\n"
    "    hashes.set_ignored_paths(paths=[sys.argv[3]])).sign(sys.argv[2], sys.argv[3])\n"
)


@pytest.mark.parametrize("algorithm", ["sha256", "blake2"])
def test_we_uphold_what_model_signing_signed_in_shards(
    model_signing: str, home: Home, folder: Path, algorithm: str
) -> None:
    """Its library's other method: upheld as it is, refused with the shard named, cut, grown, swapped and missing."""
    seal_path(home, folder)
    seal_path_of(folder).unlink()
    (folder / "a b:0:9").write_bytes(bytes(2000))
    python = Path(model_signing).resolve().with_name("python")
    done = run(python, "-c", SHARDED, home.keys / "attestation.pem", folder, seal_path_of(folder), algorithm)
    assert done.returncode == 0, done.stderr
    other, public = Home(folder.parent / "nothing"), home.keys / "attestation.pub"
    report = verify_seal(folder, home=other, key=public)
    assert (report.status, report.checked) == ("upheld", ("signature", "content"))
    weights = (folder / "weights.bin").read_bytes()
    assert len(weights) == 5120
    for content, where in (
        (weights[:3000] + b"X" + weights[3001:], "begins at byte 3000"),
        (weights[:-1], "begins at byte 5000"),
        (weights + b"X", "begins at byte 5000"),
        (weights[1000:2000] + weights[:1000] + weights[2000:], "begins at byte 0"),
    ):
        (folder / "weights.bin").write_bytes(content)
        report = verify_seal(folder, home=other, key=public)
        assert report.status == "violated"
        assert any(where in finding.message for finding in report.findings), report.findings
    (folder / "weights.bin").write_bytes(weights)
    (folder / "a b:0:9").unlink()
    (folder / "more").write_bytes(b"x")
    messages = [finding.message for finding in verify_seal(folder, home=other, key=public).findings]
    assert any("'a b:0:9' is missing" in message for message in messages)
    assert any("'more' was not there" in message for message in messages)


def test_cosign_upholds_our_seal_by_root_and_by_dirhash(
    cosign: Callable[..., Ran], home: Home, folder: Path, tmp_path: Path
) -> None:
    """Our log is the transparency log it checks: no --insecure flag, no network."""
    report = seal_path(home, folder, run="r", step=1)
    root = tmp_path / "trusted_root.json"
    root.write_text(json.dumps(trusted_root([v for v in [home_verifier(home)] if v])))
    bundle = seal_path_of(folder)
    for digest, algorithm in ((report.root, "sha256"), (report.dir_hash, "dirHash")):
        done = cosign(bundle, digest, algorithm, "--trusted-root", root)
        assert (done.returncode, "Verified OK" in done.stderr) == (0, True), done.stderr
    assert cosign(bundle, "0" * 64, "sha256", "--trusted-root", root).returncode != 0
    other = Home(tmp_path / "other")
    seal_path(other, folder / "weights.bin")
    done = cosign(bundle, report.root, "sha256", "--trusted-root", root, key=other.keys / "attestation.pub")
    assert done.returncode != 0


def test_cosign_upholds_sealed_events_and_no_others(home: Home, tmp_path: Path) -> None:
    """What a webhook is sent, as an attestation of the events: by a signature alone, no log is asked."""
    program = tool("TRAINGUARD_COSIGN", "cosign")
    key = load_or_create_key(home.keys / "attestation.pem")
    events = [{"class_uid": 2004, "message": "größer"}]
    (tmp_path / "envelope").write_bytes(sealed_events(events, key, at=1_700_000_000))
    environment = os.environ | {"HOME": str(tmp_path / "cosign-home"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    options = ("--insecure-ignore-tlog", "--type", f"{PREDICATE_BASE}{EVENTS}", "--key", home.keys / "attestation.pub")
    for content, status in ((canonical_json(events), 0), (canonical_json([*events, {}]), 1)):
        (tmp_path / "events").write_bytes(content)
        done = run(
            program, "verify-blob-attestation", "--signature", tmp_path / "envelope", *options, tmp_path / "events",
            env=environment,
        )  # fmt: skip
        assert done.returncode == status, done.stderr


def damaged_entries(bundle: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The bundle with its log entry missing, moved, and under a head that was altered."""
    made = {}
    for name in ("missing", "moved", "head", "path"):
        copy = json.loads(json.dumps(bundle))
        entries = copy["verificationMaterial"]["tlogEntries"]
        if name == "missing":
            entries.clear()
        elif name == "moved":
            entries[0]["logIndex"] = entries[0]["inclusionProof"]["logIndex"] = "1"
        elif name == "head":
            head = entries[0]["inclusionProof"]["checkpoint"]
            head["envelope"] = head["envelope"].replace("\n2\n", "\n3\n")
        else:
            entries[0]["inclusionProof"]["hashes"][0] = base64.b64encode(bytes(32)).decode()
        made[name] = copy
    return made


def test_cosign_refuses_a_seal_our_log_does_not_hold(
    cosign: Callable[..., Ran], home: Home, folder: Path, tmp_path: Path
) -> None:
    """So its yes above is about inclusion."""
    report = seal_path(home, folder, run="r", step=1)
    root = tmp_path / "trusted_root.json"
    root.write_text(json.dumps(trusted_root([v for v in [home_verifier(home)] if v])))
    for name, damaged in damaged_entries(json.loads(seal_path_of(folder).read_bytes())).items():
        bundle = tmp_path / f"{name}.sig"
        bundle.write_text(json.dumps(damaged))
        done = cosign(bundle, report.root, "sha256", "--trusted-root", root)
        assert done.returncode != 0, name


def test_cosign_refuses_a_seal_of_another_log(
    cosign: Callable[..., Ran], home: Home, folder: Path, tmp_path: Path
) -> None:
    """The right attestation key, a log whose key is not trusted."""
    report = seal_path(home, folder)
    other = Home(tmp_path / "other")
    seal_path(other, folder / "weights.bin")
    root = tmp_path / "trusted_root.json"
    root.write_text(json.dumps(trusted_root([v for v in [home_verifier(other)] if v])))
    assert cosign(seal_path_of(folder), report.root, "sha256", "--trusted-root", root).returncode != 0


def test_openssl_verifies_the_signature(home: Home, folder: Path, tmp_path: Path) -> None:
    """Over the DSSE encoding of the payload, with the public key as it lies in the home."""
    openssl = tool("TRAINGUARD_OPENSSL", "openssl")
    seal_path(home, folder)
    envelope = json.loads(seal_path_of(folder).read_bytes())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    for data, status in ((payload, 0), (payload + b" ", 1)):
        (tmp_path / "pae").write_bytes(pre_authentication_encoding(envelope["payloadType"], data))
        public = home.keys / "attestation.pub"
        done = run(openssl, "dgst", "-sha256", "-verify", public, "-signature", tmp_path / "sig", tmp_path / "pae")
        assert done.returncode == status, done.stderr


def test_dirhash_is_gos(home: Home, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """golang.org/x/mod/sumdb/dirhash over the same folder, links to files included, without the seal."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    if not (GO_LIBRARIES / "src/golang.org/x/mod/sumdb/dirhash").is_dir():
        pytest.skip("golang.org/x/mod is not installed (package golang-golang-x-mod-dev)")
    build = tmp_path_factory.mktemp("go")
    environment = os.environ | {
        "GO111MODULE": "off", "GOPATH": str(GO_LIBRARIES), "GOFLAGS": "", "GOCACHE": str(build / "cache"),
    }  # fmt: skip
    source = Path(__file__).parent / "dirhash" / "main.go"
    subprocess.run(["go", "build", "-o", build / "dirhash", source], check=True, env=environment, cwd=build)
    (folder / "link.bin").symlink_to("weights.bin")
    report = seal_path(home, folder)
    seal_path_of(folder).unlink()
    assert run(build / "dirhash", folder).stdout.strip() == go_dirhash(report.dir_hash or "")


@pytest.mark.parametrize("kind", ["folder", "file", "blake3"])
def test_the_published_schemas_hold(home: Home, folder: Path, kind: str) -> None:
    """The four JSON schemas of OMS v1.0, as published."""
    place = folder / "weights.bin" if kind == "file" else folder
    seal_path(home, place, run="r", step=1, hash_type="blake3" if kind == "blake3" else "sha256")
    bundle = json.loads(seal_path_of(place).read_bytes())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    parts = {"bundle": bundle, "envelope": bundle["dsseEnvelope"], "statement": payload}
    parts["predicate"] = payload["predicate"]
    assert [line for name, part in parts.items() for line in schemas.errors(part, f"oms-1.0-{name}")] == []
    payload["predicate"]["serialization"]["run"] = "r"  # what we must not write
    assert schemas.errors(payload["predicate"], "oms-1.0-predicate")
