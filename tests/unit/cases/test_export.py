"""An exported case can be checked without its key, and any byte of it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.cases import Site

from trainguard.cases.export import make_bundle, read_bundle, verify_bundle
from trainguard.digest import sha256_hex
from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.incident import offline


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    site = Site(tmp_path)
    code = site.opened(site.grant("inv-c"))
    lead = site.desk("lead-a")
    lead.note(code, "seen on node-3")
    number = lead.propose_export(code, reason="counsel")
    site.desk("lead-b").sign(code, number)
    path = tmp_path / "case.zip"
    path.write_bytes(lead.exported(code, number, lambda view: make_bundle(site.home, view)))
    return read_bundle(path)


def relisted(files: dict[str, bytes], **changed: bytes) -> dict[str, bytes]:
    """The files with others in their place and a manifest that fits."""
    files = {**files, **changed}
    manifest = json.loads(files[offline.MANIFEST])
    manifest["files"] = {name: sha256_hex(data) for name, data in files.items() if name != offline.MANIFEST}
    return {**files, offline.MANIFEST: json.dumps(manifest).encode()}


def test_a_bundle_holds_and_says_who_signed(files: dict[str, bytes]):
    """Records, in order, under the log's head; the room's key is not in it."""
    checked = verify_bundle(files)
    assert checked.stage == "open"
    assert set(checked.signers.values()) == {"lead-a", "lead-b", "inv-c"}
    assert checked.incidents == ("inc-0123456789",)
    assert checked.records == 6


@pytest.mark.parametrize(
    "name",
    ["records/2/entry", "records/2/key", "records/2/file", "records/2/proof.json", "incidents/inc-0123456789.json"],
)
def test_an_altered_file_is_found_with_and_without_a_manifest_that_fits(files: dict[str, bytes], name: str):
    """The manifest finds the careless; proofs, keys and digests find the others."""
    data = bytearray(files[name])
    at = data.rindex(b"a") if name.endswith("proof.json") and b"a" in data else len(data) // 2
    data[at] = ord("b") if name.endswith(("json", "key")) and data[at] != ord("b") else data[at] ^ 1
    for harmed in ({**files, name: bytes(data)}, relisted(files, **{name: bytes(data)})):
        with pytest.raises(VerificationError):
            verify_bundle(harmed)


def test_a_record_left_out_is_found(files: dict[str, bytes]):
    """The chain and the numbers close."""
    kept = {name: data for name, data in files.items() if not name.startswith("records/1/")}
    renamed = {name.replace("records/2/", "records/1/"): data for name, data in kept.items()}
    with pytest.raises(VerificationError, match="record 1"):
        verify_bundle(relisted(renamed))


@pytest.mark.parametrize("name", ["MANIFEST.json", "tree-head.txt", "keys/log.vkey"])
def test_a_part_that_is_missing_or_junk_is_one_sentence(files: dict[str, bytes], name: str):
    """Never another exception."""
    with pytest.raises(VerificationError):
        verify_bundle({key: data for key, data in files.items() if key != name})
    with pytest.raises(VerificationError):
        verify_bundle({**files, name: b"junk"} if name == "MANIFEST.json" else relisted(files, **{name: b"junk"}))


def test_a_file_that_is_no_bundle(tmp_path: Path):
    """Is said to be none."""
    path = tmp_path / "x.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(MalformedEvidence, match="not a whole zip"):
        read_bundle(path)
