"""The seals our own log holds: what existed, in which order, where. Against it, old, doubled and missing seals show.

Every seal is two neighbouring log entries: its signature as a Rekor v2 `hashedrekord`, which cosign and sigstore-go can
find in our log, and right after it a `seal/v1` statement, which says for which run, step and place it was made. The
second is what `read_ledger` returns; entries of other kinds are passed over without parsing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import canonical_json, sha256_hex
from trainguard.envelope import PAYLOAD_TYPE, PREDICATE_BASE, sign_statement, statement, verify_statement
from trainguard.errors import MalformedEvidence, TrainguardError, VerificationError
from trainguard.finding import Citation
from trainguard.home import Home
from trainguard.log import LogReader, Proof, TreeHead, load_verifier, verify_proof
from trainguard.log.note import Verifier
from trainguard.seal.bundle import Bundle, LogEntry, Seal, Signed, fingerprint, hashedrekord
from trainguard.seal.parse import verify_bundle

PREDICATE = "seal/v1"
RUN = "run"
"""`source` of a seal that the supervisor made as a run saved; such a seal has no bundle file beside the checkpoint."""
_HASHEDREKORD = b'{"apiVersion":"0.0.2","kind":"hashedrekord",'


class SealLeaf(msgspec.Struct, frozen=True, kw_only=True):
    """One `seal/v1` statement as it stands in the log."""

    leaf: int
    """Its own index; its signature's entry is the one before."""
    hash: str
    """SHA-256 of the entry, hex."""
    name: str
    place: str
    """Absolute path the checkpoint lay at when it was sealed, links followed."""
    root: str
    """OMS root digest, hex."""
    payload: str
    """SHA-256 of the seal's signed payload: its identity."""
    envelope: str
    """SHA-256 of its DSSE envelope, kept as a blob."""
    run: str | None = None
    step: int | None = None
    dir_hash: str | None = None
    live: str | None = None
    source: str = "command"
    """`command`: someone asked for the seal; `run`: the supervisor made it as the run saved."""
    sealed_at: str = ""
    """Clock of the sealing host, nanoseconds since the epoch, decimal."""

    @property
    def citation(self) -> Citation:
        """For findings that rest on it."""
        return Citation(leaf=self.leaf, hash=self.hash)

    @property
    def called(self) -> str:
        """`ckpt.pt (run r, step 3, leaf 8)`."""
        parts = [f"run {self.run}" if self.run else "", f"step {self.step}" if self.step is not None else ""]
        return f"{self.name} ({', '.join([p for p in parts if p] + [f'leaf {self.leaf}'])})"


@dataclass(frozen=True, slots=True)
class Ledger:
    """All seals of one log, oldest first."""

    home: Home
    reader: LogReader
    seals: tuple[SealLeaf, ...]

    @property
    def head(self) -> TreeHead:
        """The signed head all of it is under."""
        return self.reader.head()

    def extends(self, head: TreeHead) -> bool:
        """Whether the log still holds the entries that `head`, seen elsewhere, was signed for."""
        return head.size <= self.head.size and self.reader.root_at(head.size) == head.root

    def find(self, payload: str) -> SealLeaf | None:
        """The entry of the seal with that identity."""
        return next((seal for seal in reversed(self.seals) if seal.payload == payload), None)

    def newest(self, *, place: str | None = None, run: str | None = None) -> SealLeaf | None:
        """The last seal of a place, of a run, or of both."""
        return next((seal for seal in reversed(self.seals) if _fits(seal, place, run)), None)

    def of_run(self, run: str | None) -> tuple[SealLeaf, ...]:
        """The seals of a run in order; none for None."""
        return tuple(seal for seal in self.seals if run is not None and seal.run == run)

    def kept(self, leaf: SealLeaf, key: ec.EllipticCurvePublicKey, *more: ec.EllipticCurvePublicKey) -> Seal | None:
        """The whole seal as we kept it, verified anew by any of the keys; None where our copy is gone or altered."""
        return next((seal for k in (key, *more) if (seal := self._kept(leaf, k)) is not None), None)

    def _kept(self, leaf: SealLeaf, key: ec.EllipticCurvePublicKey) -> Seal | None:
        where = f"leaf {leaf.leaf}"
        try:
            envelope = json.loads(self.home.blob(leaf.envelope))
            signed = Signed(
                payload=base64.b64decode(envelope["payload"]),
                signature=base64.b64decode(envelope["signatures"][0]["sig"]),
            )
            return verify_bundle(Bundle(signed=signed, hint=fingerprint(key), entry=None), [key], where=where)
        except (TrainguardError, ValueError, KeyError, TypeError, IndexError):
            return None


def _fits(seal: SealLeaf, place: str | None, run: str | None) -> bool:
    return (place is None or seal.place == place) and (run is None or seal.run == run)


def read_ledger(home: Home, key: ec.EllipticCurvePublicKey, *more: ec.EllipticCurvePublicKey) -> Ledger | None:
    """The ledger of the log in `home`, or None where there is no log. Raises VerificationError for a damaged log.

    key, more: the attestation keys that sign `seal/v1` statements; one, until a key is replaced.
    """
    vkey = home.keys / "log.vkey"
    if not vkey.exists() or not (home.log / "journal").is_dir():
        return None
    reader = LogReader(home.log, vkey)
    head = reader.head()
    return Ledger(home, reader, tuple(_seals(reader.entries(0, head.size), (key, *more))))


def _seals(entries: Iterator[bytes], keys: tuple[ec.EllipticCurvePublicKey, ...]) -> Iterator[SealLeaf]:
    after_signature = False
    for index, entry in enumerate(entries):
        if after_signature and (leaf := _seal_leaf(index, entry, keys)) is not None:
            yield leaf
        after_signature = entry.startswith(_HASHEDREKORD)


def _seal_leaf(index: int, entry: bytes, keys: tuple[ec.EllipticCurvePublicKey, ...]) -> SealLeaf | None:
    """The statement in `entry`, or None where it is another's or another kind."""
    try:
        value = verify_statement(entry, keys, where=f"leaf {index}")
        if value["predicateType"] != PREDICATE_BASE + PREDICATE:
            return None
        return msgspec.convert({**value["predicate"], "leaf": index, "hash": sha256_hex(entry)}, SealLeaf)
    except (VerificationError, msgspec.ValidationError):
        return None


def entries_of(
    signed: Signed, seal: Seal, place: Path, key: ec.EllipticCurvePrivateKey, *, source: str, now_ns: int
) -> tuple[bytes, bytes, bytes]:
    """The two log entries of a seal, and the envelope to keep under the digest that the second names."""
    envelope = canonical_json(
        {
            "payload": base64.b64encode(signed.payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signed.signature).decode()}],
        }
    )
    facts = seal.facts
    body: dict[str, Any] = {
        "name": seal.name,
        "place": str(place),
        "root": seal.root,
        "dir_hash": seal.dir_hash,
        "payload": seal.payload_digest,
        "envelope": sha256_hex(envelope),
        "run": facts.run,
        "step": facts.step,
        "live": facts.live,
        "source": source,
        "sealed_at": str(now_ns),
    }
    subject = [{"name": seal.name, "digest": {"sha256": seal.root}}]
    return (
        hashedrekord(signed, key.public_key()),
        sign_statement(statement(PREDICATE, body, subject), key),
        envelope,
    )


def log_key_id(verifier: Verifier) -> bytes:
    """Rekor v2's log id: the note key's hash in full, SHA-256(name, 0x0A, 0x01, public key)."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(verifier.name.encode() + b"\n\x01" + verifier.public_key)
    return digest.finalize()


def entry_of(proof: Proof, head: TreeHead, verifier: Verifier, body: bytes) -> LogEntry:
    """The inclusion proof as the bundle carries it."""
    return LogEntry(
        index=proof.index,
        key_id=log_key_id(verifier),
        size=head.size,
        root=head.root,
        path=proof.path,
        note=proof.note,
        body=body,
    )


def verify_entry(bundle: Bundle, key: ec.EllipticCurvePublicKey, verifier: Verifier, *, where: str) -> TreeHead:
    """The signed tree head that proves the bundle's signature is in `verifier`'s log.

    Every field of the entry must be what the proof makes it. Raises VerificationError or MalformedEvidence otherwise.
    """
    entry = bundle.entry
    if entry is None:
        raise MalformedEvidence(f"{where}: has no log entry")
    if entry.body != hashedrekord(bundle.signed, key):
        raise VerificationError(f"{where}: its log entry is not of this signature")
    proof = Proof(index=entry.index, path=entry.path, note=entry.note)
    head = verify_proof(proof, entry.body, verifier, where=f"{where}: log entry")
    if (head.size, head.root, log_key_id(verifier)) != (entry.size, entry.root, entry.key_id):
        raise VerificationError(f"{where}: its log entry says otherwise than the signed tree head in it")
    return head


def trusted_root(verifiers: list[Verifier]) -> dict[str, Any]:
    """A Sigstore trusted_root.json that names our logs, for `cosign … --trusted-root` and sigstore-go."""
    return {
        "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
        "tlogs": [_trusted_log(verifier) for verifier in verifiers],
        "certificateAuthorities": [],
        "ctlogs": [],
        "timestampAuthorities": [],
    }


def _trusted_log(verifier: Verifier) -> dict[str, Any]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    der = Ed25519PublicKey.from_public_bytes(verifier.public_key).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return {
        "baseUrl": f"https://{verifier.name}",
        "hashAlgorithm": "SHA2_256",
        "publicKey": {
            "rawBytes": base64.b64encode(der).decode(),
            "keyDetails": "PKIX_ED25519",
            "validFor": {"start": "1970-01-01T00:00:00Z"},
        },
        "logId": {"keyId": base64.b64encode(log_key_id(verifier)).decode()},
    }


def home_verifier(home: Home) -> Verifier | None:
    """The public key of the log in `home`, or None where there is none."""
    vkey = home.keys / "log.vkey"
    return load_verifier(vkey) if vkey.exists() else None
