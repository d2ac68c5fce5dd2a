"""The language-neutral vectors of tests/vectors/log, and a whole log as the first release wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.log import LogReader, parse_proof, verify_proof
from trainguard.log.journal import Record, Tail, parse_records
from trainguard.log.merkle import leaf_hash, verify_consistency, verify_inclusion
from trainguard.log.note import parse_vkey
from trainguard.log.proof import encode_proof
from trainguard.log.tiles import decode_bundle
from trainguard.log.tree_head import verify_tree_head

VECTORS = Path(__file__).parents[2] / "vectors" / "log"


def merkle(case: dict) -> None:
    path, root = [bytes.fromhex(h) for h in case["path"]], bytes.fromhex(case.get("root", ""))
    if case["kind"] == "inclusion":
        verify_inclusion(leaf_hash(bytes.fromhex(case["entry"])), case["index"], case["size"], path, root)
    else:
        old_root, new_root = bytes.fromhex(case["old_root"]), bytes.fromhex(case["new_root"])
        verify_consistency(case["old"], old_root, case["new"], new_root, path)


def tree_heads(case: dict) -> None:
    head = verify_tree_head(case["note"].encode(), parse_vkey(case["vkey"]), where=case["name"])
    assert (head.size, head.root.hex(), head.note) == (case["size"], case["root"], case["note"])


def bundles(case: dict) -> None:
    entries = decode_bundle(bytes.fromhex(case["bundle"]), case["count"], where=case["name"])
    assert [entry.hex() for entry in entries] == case["entries"]


def journal(case: dict) -> None:
    *records, tail = parse_records(bytes.fromhex(case["segment"]), where=case["name"])
    assert isinstance(tail, Tail)
    assert all(isinstance(record, Record) for record in records)
    assert (len(records), tail.torn_bytes, tail.closed) == (case["records"], case["torn_bytes"], case["closed"])


def proofs(case: dict) -> None:
    proof = parse_proof(case["proof"].encode())
    assert encode_proof(proof) == case["proof"]
    verify_proof(proof, bytes.fromhex(case["entry"]), parse_vkey(case["vkey"]))


KINDS: tuple[Callable[[dict], None], ...] = (merkle, tree_heads, bundles, journal, proofs)
CASES = [
    pytest.param(check, case, id=f"{check.__name__}-{case.get('kind', '')}-{case['name']}")
    for check in KINDS
    for case in json.loads((VECTORS / f"{check.__name__}.json").read_text())
]


@pytest.mark.parametrize(("check", "case"), CASES)
def test_each_vector_is_taken_or_refused_as_it_says(check: Callable[[dict], None], case: dict) -> None:
    """`error` null: taken. malformed: MalformedEvidence. verification: VerificationError and no more."""
    if case["error"] is None:
        check(case)
        return
    with pytest.raises(VerificationError) as caught:
        check(case)
    assert isinstance(caught.value, MalformedEvidence) == (case["error"] == "malformed"), case["why"]


def test_every_kind_of_vector_has_cases_that_are_taken_and_cases_that_are_refused() -> None:
    """A file that only knows one outcome tests nothing."""
    for check in KINDS:
        errors = [case.values[1]["error"] for case in CASES if case.values[0] is check]
        assert None in errors
        assert len(set(errors)) > 1


def test_the_log_that_the_first_release_wrote_still_verifies() -> None:
    """What any release ever logged verifies today (tests/vectors/log/release-0.1: never regenerated)."""
    folder = VECTORS / "release-0.1"
    reader = LogReader(folder / "log", folder / "log.vkey")
    audit = reader.verify()
    assert (audit.head.size, audit.published) == (303, 300)
    assert [entry[:8] for entry in reader.entries(298)] == [
        b"entry 29",
        b"entry 29",
        b"entry 30",
        b"entry 30",
        b"entry 30",
    ]
    proof = parse_proof((folder / "entry-299.tlog-proof").read_bytes())
    assert verify_proof(proof, b"entry 299", parse_vkey((folder / "log.vkey").read_text())).size == 303
