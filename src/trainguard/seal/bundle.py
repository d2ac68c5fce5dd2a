"""One seal, one file: an OpenSSF Model Signing v1.0 bundle (Sigstore bundle v0.3 over DSSE over in-toto Statement v1).

    payload = encode_statement(manifest, facts)
    signed = sign(payload, key)
    data = encode_bundle(signed, hint, entry)               # bytes of model.sig; parse.py reads them

What OMS has no word for stands in annotations, which are signed and allowed by its schemas: run, step, previous seal,
lock and log in `subject[0].annotations`, with what OMS ignores; mode, size and tensors of each file in its resource.
Extra keys in the predicate would break the schemas.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import canonical_json, sha256_hex
from trainguard.envelope import PAYLOAD_TYPE, STATEMENT_TYPE, pre_authentication_encoding, public_pem
from trainguard.errors import MalformedEvidence
from trainguard.seal.manifest import (
    OMS_IGNORED,
    SEAL_NAME,
    SINGLE,
    Entry,
    Manifest,
    directory_hash,
    root_digest,
)

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
RECORD = "trainguard/seal/v1"
"""In `subject[0].annotations.seal`: sizes, modes and what OMS ignores are sealed too."""
STEP_LIMIT = 1 << 53

_ECDSA = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a seal says of a checkpoint beyond its bytes. None: not known when it was sealed."""

    run: str | None = None
    step: int | None = None
    """Optimizer steps done, from 1; 0 for weights no step has touched."""
    previous_leaf: int | None = None
    """Log leaf of the seal before this one: of the same run, or of the same place where there is no run."""
    previous_payload: str | None = None
    """SHA-256 of that seal's signed payload."""
    lock: str | None = None
    """SHA-256 of the lock the run ran against."""
    origin: str | None = None
    """Name of the log the seal was entered in."""
    log_size: int | None = None
    """Entries of that log just before: the seal is not older than the last of them."""
    live: str | None = None
    """`equal` or `differs`: the file against the digest taken while it was written; None: none was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A payload with its signature."""

    payload: bytes
    signature: bytes
    """ECDSA P-256 with SHA-256 over the DSSE PAE, DER."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """Where the seal stands in a log (Sigstore TransparencyLogEntry, Rekor v2). Nothing in it has been verified."""

    index: int
    key_id: bytes
    """SHA-256 of the log's name, newline, type byte and public key, 32 bytes."""
    size: int
    root: bytes
    path: tuple[bytes, ...]
    note: str
    """The signed tree head, verbatim."""
    body: bytes
    """The log entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A parsed bundle. Nothing in it has been verified."""

    signed: Signed
    hint: str
    """Fingerprint of the signer's key, as the bundle claims it."""
    entry: LogEntry | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What a verified bundle says."""

    name: str
    hash_type: str
    single: bool
    entries: Mapping[str, Entry]
    """By name, with digests."""
    root: str
    """OMS root digest, SHA-256 hex."""
    dir_hash: str | None
    """dirHash, hex; None where the hash type is not SHA-256 or another tool made the seal."""
    facts: Facts
    payload_digest: str
    """SHA-256 of the signed payload, hex: the seal's identity."""
    signer: str
    """Fingerprint of the key that signed it: SHA-256 of its PEM, hex."""
    complete: bool
    """Made by trainguard: modes, sizes and what OMS ignores are sealed too."""
    ignored: tuple[str, ...] = ()
    """Paths the seal leaves out on purpose (another tool's ignore_paths)."""
    others: tuple[str, ...] = ()
    """Names of entries that OMS does not list."""


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """The hint model_signing writes: SHA-256 of the PEM of the key, hex."""
    return sha256_hex(public_pem(key))


# -- writing ----------------------------------------------------------------------------------------------------------


def encode_statement(manifest: Manifest, facts: Facts) -> bytes:
    """The payload: canonical JSON of the statement. `manifest` must have been read with its digests."""
    digest = {"sha256": root_digest(digest_of(e) for e in manifest.resources)}
    if manifest.hash_type == "sha256":
        digest["dirHash"] = directory_hash(named_files(manifest.name, manifest.entries))
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": manifest.name, "digest": digest, "annotations": _annotations(manifest, facts)}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "resources": [_resource(entry, manifest.hash_type) for entry in manifest.resources],
                "serialization": {
                    "method": "files",
                    "hash_type": manifest.hash_type,
                    "allow_symlinks": any(entry.kind == "link" for entry in manifest.entries),
                    "ignore_paths": [] if manifest.single else sorted((*OMS_IGNORED, SEAL_NAME)),
                },
            },
        }
    )


def named_files(name: str, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """(name, digest) of all files, for dirHash; a checkpoint that is one file goes by its own name."""
    return ((name if e.name == SINGLE else e.name, digest_of(e)) for e in entries if e.kind != "folder")


def digest_of(entry: Entry) -> str:
    """The entry's digest. Raises MalformedEvidence where it was not read."""
    if entry.digest is None:
        raise MalformedEvidence(f"{entry.name}: not read, so it cannot be sealed")
    return entry.digest


def _annotations(manifest: Manifest, facts: Facts) -> dict[str, Any]:
    previous = {"leaf": facts.previous_leaf, "payload": facts.previous_payload}
    log = {"origin": facts.origin, "size": facts.log_size}
    named = {
        "run": facts.run,
        "step": facts.step,
        "previous": previous if facts.previous_leaf is not None else None,
        "lock": facts.lock,
        "log": log if facts.origin is not None else None,
        "live": facts.live,
    }
    return {
        "seal": RECORD,
        "others": [_other(entry) for entry in manifest.others],
        **{key: value for key, value in named.items() if value is not None},
    }


def _resource(entry: Entry, hash_type: str) -> dict[str, Any]:
    about: dict[str, Any] = {"size": entry.size}
    if entry.mode is not None:
        about["mode"] = f"{entry.mode:04o}"
    if entry.target is not None:
        about["target"] = entry.target
    if entry.tensors is not None:
        about["tensors"] = dict(entry.tensors)
    return {"name": entry.name, "algorithm": hash_type, "digest": digest_of(entry), "annotations": about}


def _other(entry: Entry) -> dict[str, Any]:
    values = {
        "name": entry.name,
        "kind": entry.kind,
        "mode": None if entry.mode is None else f"{entry.mode:04o}",
        "size": entry.size,
        "digest": entry.digest,
        "target": entry.target,
    }
    return {key: value for key, value in values.items() if value is not None}


def sign(payload: bytes, key: ec.EllipticCurvePrivateKey) -> Signed:
    """`payload` signed as DSSE asks."""
    return Signed(payload=payload, signature=key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload), _ECDSA))


def hashedrekord(signed: Signed, key: ec.EllipticCurvePublicKey) -> bytes:
    """The log entry of a signature: a Rekor v2 `hashedrekord` 0.0.2, canonical JSON, over the SHA-256 of the DSSE PAE.

    cosign and sigstore-go recompute exactly these bytes from bundle and key.
    """
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    encoded = pre_authentication_encoding(PAYLOAD_TYPE, signed.payload)
    return canonical_json(
        {
            "apiVersion": "0.0.2",
            "kind": "hashedrekord",
            "spec": {
                "hashedRekordV002": {
                    "data": {"algorithm": "SHA2_256", "digest": b64(hashlib.sha256(encoded).digest())},
                    "signature": {
                        "content": b64(signed.signature),
                        "verifier": {
                            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                            "publicKey": {"rawBytes": b64(der)},
                        },
                    },
                }
            },
        }
    )


def encode_bundle(signed: Signed, hint: str, entry: LogEntry | None) -> bytes:
    """The bytes of the bundle file; `parse_bundle` is the inverse."""
    return canonical_json(
        {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": hint},
                "tlogEntries": [] if entry is None else [encode_entry(entry)],
            },
            "dsseEnvelope": {
                "payload": b64(signed.payload),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": b64(signed.signature)}],
            },
        }
    )


def encode_entry(entry: LogEntry) -> dict[str, Any]:
    """The entry in Sigstore's one form."""
    return {
        "logIndex": str(entry.index),
        "logId": {"keyId": b64(entry.key_id)},
        "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
        "integratedTime": "0",
        "inclusionProof": {
            "logIndex": str(entry.index),
            "rootHash": b64(entry.root),
            "treeSize": str(entry.size),
            "hashes": [b64(value) for value in entry.path],
            "checkpoint": {"envelope": entry.note},
        },
        "canonicalizedBody": b64(entry.body),
    }


def b64(data: bytes) -> str:
    """Standard base64 with padding."""
    return base64.b64encode(data).decode()
