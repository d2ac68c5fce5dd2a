"""DSSE statements: only what a known key signed comes back."""

import base64
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainguard.envelope import (
    key_id,
    load_or_create_key,
    load_public_key,
    pre_authentication_encoding,
    sign_statement,
    statement,
    verify_statement,
)
from trainguard.errors import MalformedEvidence, VerificationError

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
VALUE = statement("run/v1", {"run": "a"}, [{"name": "runs/a", "digest": {"sha256": "0" * 64}}])

SIGNED = sign_statement(VALUE, KEY)


def test_a_signed_statement_comes_back_unchanged() -> None:
    """verify_statement inverts sign_statement for the signer's key, among others."""
    assert verify_statement(sign_statement(VALUE, KEY), [OTHER.public_key(), KEY.public_key()]) == VALUE


def test_another_signer_is_refused() -> None:
    """A valid signature by an unknown key is not good enough (E10)."""
    with pytest.raises(VerificationError, match="none of the 1 known keys"):
        verify_statement(sign_statement(VALUE, OTHER), [KEY.public_key()])


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=200)
@given(st.data())
def test_any_flipped_bit_is_refused_or_changes_nothing(data: st.DataObject) -> None:
    """No altered envelope yields another statement; only VerificationError leaves."""
    envelope = bytearray(SIGNED)
    envelope[data.draw(st.integers(0, len(envelope) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(VerificationError):
        assert verify_statement(bytes(envelope), [KEY.public_key()]) == VALUE


@pytest.mark.parametrize(
    "envelope",
    [b"", b"[]", b"{}", b"null", b'"x"', b"[" * 100_000, b"\xff", b'{"payload":1,"payloadType":2,"signatures":[]}'],
)
def test_what_is_no_envelope_is_malformed(envelope: bytes) -> None:
    """Junk is refused as malformed, whatever JSON makes of it."""
    with pytest.raises(MalformedEvidence):
        verify_statement(envelope, [KEY.public_key()])


def test_two_signatures_are_refused() -> None:
    """Sigstore bundles carry exactly one."""
    outer = json.loads(sign_statement(VALUE, KEY))
    outer["signatures"] *= 2
    with pytest.raises(MalformedEvidence, match="one signature"):
        verify_statement(json.dumps(outer).encode(), [KEY.public_key()])


def test_the_pre_authentication_encoding_is_dsse_v1() -> None:
    """The example of the DSSE specification."""
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_signature_over_a_payload_that_is_no_statement_is_refused() -> None:
    """A signer's key also signs other things; they are not statements."""
    payload = b'{"a":1}'
    kind = "application/vnd.in-toto+json"
    from cryptography.hazmat.primitives import hashes

    signature = KEY.sign(pre_authentication_encoding(kind, payload), ec.ECDSA(hashes.SHA256()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    with pytest.raises(MalformedEvidence, match="Statement v1"):
        verify_statement(json.dumps(envelope).encode(), [KEY.public_key()])


def test_a_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    """The first use makes the key (0600) and its public half; later uses load the same."""
    path = tmp_path / "keys" / "attestation.pem"
    key = load_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_key(path).private_numbers() == key.private_numbers()
    assert load_public_key(path.with_suffix(".pub")).public_numbers() == key.public_key().public_numbers()


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    """The sentence names the file and what was expected."""
    (tmp_path / "k.pem").write_bytes(b"hello")
    with pytest.raises(MalformedEvidence, match=r"k\.pem: expected an ECDSA P-256 private key"):
        load_or_create_key(tmp_path / "k.pem")


def test_processes_that_come_first_together_use_one_key(tmp_path: Path) -> None:
    """The key is made once, whoever comes first; the public half always belongs to it."""
    code = (
        "import sys; from pathlib import Path; from trainguard.envelope import *;"
        "print(key_id(load_or_create_key(Path(sys.argv[1])).public_key()))"
    )
    path = tmp_path / "keys" / "attestation.pem"
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    used = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert used == {key_id(load_public_key(path.with_suffix(".pub")))}
