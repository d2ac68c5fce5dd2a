"""The lock file: one writer, one strict reader, each the other's inverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from trainguard.digest import canonical_json
from trainguard.envelope import key_id
from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.lockfile import (
    Code,
    Launch,
    Lock,
    Measurement,
    Tree,
    make_lock,
    pack_contents,
    parse_lock,
    parse_measurement,
    read_lock,
    unpack_contents,
    verify_lock,
)
from trainguard.policy import Approval

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
SHA = "ab" * 32


def a_measurement(**changes: Any) -> Measurement:
    plain = Measurement(
        cwd="/home/victim-a/job",
        launch=Launch(argv=("python", "train.py"), kind="script", script="train.py"),
        interpreter=None,
        code=Code(root="/home/victim-a/job"),
        trees={"code": Tree(name="code", root="/home/victim-a/job", files={"train.py": f"{SHA} 12"})},
        distributions={},
        environment={"PYTHONHASHSEED": "0", "HF_HOME": "/ü\n"},
    )
    return msgspec.structs.replace(plain, **changes)


def a_lock(**changes: Any) -> Lock:
    return make_lock(
        a_measurement(**changes),
        KEY,
        made="2026-11-22T00:00:00Z",
        approvals=[Approval(check="weights", place="a.py:4")],
    )


def test_a_lock_reads_back_as_it_was_made() -> None:
    """make_lock and parse_lock are each other's inverse."""
    lock = a_lock()
    assert parse_lock(lock.data, where="lock") == lock
    verify_lock(lock, [KEY.public_key()])
    assert lock.signer == key_id(KEY.public_key())


def test_canonical_bytes_are_those_of_rfc_8785() -> None:
    """For the values that occur, so that any other implementation computes the same digest."""
    measurement = a_measurement()
    assert measurement.encode() == canonical_json(msgspec.to_builtins(measurement))


@given(st.dictionaries(st.text(st.characters(max_codepoint=0xD7FF)), st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_file_names_encode_canonically_and_read_back(files: dict[str, str]) -> None:
    """Names are the attacker's."""
    measurement = a_measurement(trees={"code": Tree(name="code", root="/", files=files)})
    data = measurement.encode()
    assert data == canonical_json(msgspec.to_builtins(measurement))
    assert parse_measurement(data, where="blob") == measurement


def test_white_space_and_field_order_are_free() -> None:
    """A lock survives a formatter; only values are signed."""
    lock = a_lock()
    again = parse_lock(json.dumps(json.loads(lock.data), indent=4).encode(), where="lock")
    assert again.measurement == lock.measurement
    verify_lock(again, [KEY.public_key()])


@pytest.mark.parametrize(
    "edit",
    [
        lambda lock: lock["measurement"]["trees"]["code"]["files"].update({"train.py": "cd" * 32 + " 12"}),
        lambda lock: lock["measurement"]["trees"]["code"]["files"].update({"more.py": SHA + " 1"}),
        lambda lock: lock["measurement"]["environment"].clear(),
        lambda lock: lock["measurement"].update(notes=["nothing"]),
        lambda lock: lock["approvals"].append({"check": "environment", "place": "train.py", "reason": ""}),
        lambda lock: lock.update(approvals=[]),
        lambda lock: lock.update(made="2020-01-01T00:00:00Z"),
        lambda lock: lock.update(contents=SHA),
        lambda lock: lock["envelope"].update(a_lock(cwd="/elsewhere").envelope),
    ],
)
def test_any_edit_of_what_was_signed_is_refused(edit: Any) -> None:
    """G6: a baseline that was changed after it was approved."""
    lock = json.loads(a_lock().data)
    edit(lock)
    with pytest.raises(VerificationError):
        parse_lock(json.dumps(lock).encode(), where="lock")


def test_a_lock_resigned_with_another_key_is_known_by_its_signer_and_refused() -> None:
    """G6: an insider approves his own edit."""
    forged = make_lock(a_measurement(cwd="/x"), OTHER, made="2026-11-22T00:00:00Z")
    parsed = parse_lock(forged.data, where="lock")
    with pytest.raises(VerificationError, match="none of the 1 known keys"):
        verify_lock(parsed, [KEY.public_key()])


def test_a_signature_over_another_statement_does_not_carry_over() -> None:
    """The envelope of one lock in the body of another, key id included."""
    lock = msgspec.structs.replace(a_lock(), envelope=a_lock(cwd="/x").envelope)
    with pytest.raises(VerificationError):
        verify_lock(lock, [KEY.public_key()])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON, or cut off"),
        (b"not a lock", "not JSON, or cut off"),
        (a_lock().data[: len(a_lock().data) // 2], "not JSON, or cut off"),
        (b"{}", "expected schema trainguard/lock/v1, found ''"),
        (b'{"schema": "trainguard/lock/v9"}', "found 'trainguard/lock/v9'"),
        (b'{"schema": "trainguard/lock/v1"}', "missing required field"),
        (b"[" * 100_000, "lock: "),
        (a_lock().data.replace(b'"approvals"', b'"approvals": [], "extra": 1, "approvals"', 1), "lock: "),
    ],
)
def test_what_is_no_lock_is_refused_in_one_sentence(data: bytes, words: str) -> None:
    """Truncated, of another version, with unknown fields, deeply nested."""
    with pytest.raises(MalformedEvidence) as caught:
        parse_lock(data, where="lock")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lock_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="there is no lock") as caught:
        read_lock(tmp_path / "trainguard.lock")
    assert "trainguard lock" in str(caught.value.next_step)


def test_a_measurement_that_is_not_canonical_is_refused() -> None:
    """Two byte strings for one value would have two digests."""
    data = json.dumps(json.loads(a_measurement().encode())).encode()
    with pytest.raises(MalformedEvidence, match="canonical"):
        parse_measurement(data, where="blob")


def test_a_pack_of_contents_reads_back_and_a_bomb_is_refused() -> None:
    texts = {SHA: b"a = 1\n"}
    assert unpack_contents(pack_contents(texts), where="contents") == texts
    with pytest.raises(MalformedEvidence, match="not a pack"):
        unpack_contents(b"garbage", where="contents")
    import zlib

    bomb = zlib.compressobj(9)
    data = b"".join(bomb.compress(bytes(1 << 24)) for _ in range(20)) + bomb.flush()
    with pytest.raises(MalformedEvidence, match="more than"):
        unpack_contents(data, where="contents")
