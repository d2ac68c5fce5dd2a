"""Signed statements: DSSE v1 envelopes around in-toto Statement v1, ECDSA P-256 with SHA-256.

Implements secure-systems-lab/dsse protocol v1.0.2 (PAE, single signature) and in-toto attestation Statement v1.
Bytes are signed as stored: the payload is kept exactly as it was signed and never re-encoded before checking.

    envelope = sign_statement(statement, key)      # JSON bytes
    statement = verify_statement(envelope, [public_key])
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from trainguard.digest import canonical_json, write_durably
from trainguard.errors import MalformedEvidence, Unavailable, VerificationError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_BASE = "https://trainguard.dev/attestation/"
"""Prefix of our own predicate types: run/v1, measurement/v1, segment/v1, audit/v1, finding/v1, incident/v1."""

ENVELOPE_LIMIT_BYTES = 64 * 1024
"""C2SP tlog-tiles entries are at most 65,535 bytes; larger evidence goes by digest."""

_ECDSA = ec.ECDSA(hashes.SHA256())
_REPEATABLE = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE PAE: `DSSEv1 SP len(type) SP type SP len(body) SP body`."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo in DER, hex."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def statement(predicate: str, body: Mapping[str, Any], subject: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An in-toto Statement v1 with our predicate type `predicate` (such as `segment/v1`)."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": list(subject),
        "predicateType": PREDICATE_BASE + predicate,
        "predicate": dict(body),
    }


def sign_statement(value: Mapping[str, Any], key: ec.EllipticCurvePrivateKey, *, repeatable: bool = False) -> bytes:
    """The DSSE envelope, as JSON bytes, of a statement signed with `key`.

    repeatable: the same bytes every time: a nonce drawn from key and text (RFC 6979), the lower of the two values of s.
    """
    payload = canonical_json(value)
    encoded = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    signature = _lower(key.sign(encoded, _REPEATABLE)) if repeatable else key.sign(encoded, _ECDSA)
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
        }
    )


def _lower(signature: bytes) -> bytes:
    r, s = decode_dss_signature(signature)
    return encode_dss_signature(r, min(s, _P256_ORDER - s))


def verify_statement(
    envelope: bytes,
    keys: Sequence[ec.EllipticCurvePublicKey],
    *,
    where: str = "envelope",
    limit_bytes: int = ENVELOPE_LIMIT_BYTES,
) -> dict[str, Any]:
    """The statement in `envelope` if one of `keys` signed it. limit_bytes: larger where it is no entry of a log.

    Raises MalformedEvidence for anything that is not one DSSE envelope with one signature over an in-toto
    Statement v1, VerificationError when no key fits.
    """
    if len(envelope) > limit_bytes:
        raise MalformedEvidence(f"{where}: {len(envelope)} bytes, limit {limit_bytes}")
    try:
        outer = json.loads(envelope)
        if set(outer) != {"payload", "payloadType", "signatures"} or outer["payloadType"] != PAYLOAD_TYPE:
            raise MalformedEvidence(f"{where}: expected a DSSE envelope of type {PAYLOAD_TYPE}")
        payload = base64.b64decode(outer["payload"], validate=True)
        (only,) = outer["signatures"]
        signature = base64.b64decode(only["sig"], validate=True)
    except (ValueError, TypeError, KeyError, binascii.Error, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not a DSSE envelope with one signature: {error}") from error
    encoded = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    if not any(_signed_by(key, signature, encoded) for key in keys):
        raise VerificationError(
            f"{where}: signature {str(only.get('keyid'))[:16]} is by none of the {len(keys)} known keys"
        )
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: signed payload is not JSON: {error}") from error
    if (
        not isinstance(value, dict)
        or value.get("_type") != STATEMENT_TYPE
        or not isinstance(value.get("predicate"), dict)
    ):
        raise MalformedEvidence(f"{where}: expected an in-toto Statement v1 with a predicate")
    return value


def _signed_by(key: ec.EllipticCurvePublicKey, signature: bytes, encoded: bytes) -> bool:
    try:
        key.verify(signature, encoded, _ECDSA)
    except InvalidSignature:
        return False
    return True


def load_or_create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The attestation key at `path` (PKCS#8 PEM, mode 0600), made on first use with its `.pub` beside it."""
    if not path.exists():
        _create_key(path)
    try:
        loaded = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise Unavailable(f"{path}: attestation key cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise MalformedEvidence(f"{path}: expected an ECDSA P-256 private key in PEM: {error}") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or not isinstance(loaded.curve, ec.SECP256R1):
        raise MalformedEvidence(f"{path}: expected an ECDSA P-256 private key, found another kind")
    return loaded


def _create_key(path: Path) -> None:
    """Make a key, once: of several processes that come here first together, one makes it and all use it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{path}: attestation key cannot be made: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(path.with_suffix(".pub"), public_pem(key.public_key()))
        write_durably(path, pem, mode=0o600)
    finally:
        os.close(lock)


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo in PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The ECDSA P-256 public key in the PEM file `path`."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise Unavailable(f"{path}: public key cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise MalformedEvidence(f"{path}: expected an ECDSA P-256 public key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MalformedEvidence(f"{path}: expected an ECDSA P-256 public key, found another kind")
    return key
