"""Signed notes: a text and who signed it (C2SP signed-note v1.0.0, Ed25519 type 0x01 only).

    <text, ending in newline>
    <blank line>
    — <key name> <base64(key id, 4 bytes big-endian || signature)>

Implements parsing, encoding, signing and verification with one key, and the `vkey` text form of a public key,
`<name>+<key id, 8 hex>+<base64(0x01 || 32-byte public key)>`. Cosignatures of other types are carried and ignored.

    note = sign_note("example.com/log\\n0\\n…\\n", signer)
    verify_note(note, parse_vkey(vkey), where="checkpoint")      # the text
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from trainguard.errors import MalformedEvidence, Misuse, VerificationError

ED25519 = b"\x01"
"""Signature type identifier byte of plain Ed25519 note signatures."""
NOTE_LIMIT_BYTES = 1 << 20
"""Go's sumdb/note takes notes up to 1 MB; 16 post-quantum signatures, which every reader must take, fit."""
SIGNATURE_LIMIT = 100
"""Go's limit; C2SP asks for at least 16."""
NAME_LIMIT_BYTES = 255
"""Key names and origins: the longest that C2SP witnesses take."""
_DASH = "\u2014 "
_NAME = re.compile(r"[^\s+\x00-\x1f]+")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One signature line."""

    name: str
    """Key name."""
    key_id: int
    """Unsigned, 32 bits."""
    value: bytes
    """The signature proper, 1 byte or more; its form depends on the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A parsed note. Nothing in it has been verified."""

    text: str
    """With its final newline, without the blank line after it."""
    signatures: tuple[Signature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A public note key: what one must have from elsewhere to believe a note."""

    name: str
    """Key name; for a log, its origin."""
    public_key: bytes
    """32 bytes, RFC 8032."""

    def __post_init__(self) -> None:
        check_name(self.name, where="vkey")
        if len(self.public_key) != 32:
            raise MalformedEvidence(f"vkey: expected a public key of 32 bytes, found {len(self.public_key)}")

    @property
    def key_id(self) -> int:
        """SHA-256(name || 0x0A || 0x01 || public key)[:4]."""
        return key_id(self.name, self.public_key)

    @property
    def vkey(self) -> str:
        """The text form; `parse_vkey` is its inverse."""
        return f"{self.name}+{self.key_id:08x}+{base64.b64encode(ED25519 + self.public_key).decode()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A private note key. Make it with `Signer.of`."""

    verifier: Verifier
    """Its public half, and the name it signs under."""
    key: Ed25519PrivateKey

    @classmethod
    def of(cls, name: str, key: Ed25519PrivateKey) -> Signer:
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return cls(verifier=Verifier(name=name, public_key=raw), key=key)

    @property
    def name(self) -> str:
        return self.verifier.name


def key_id(name: str, public_key: bytes) -> int:
    """The key id C2SP recommends for an Ed25519 key."""
    return int.from_bytes(hashlib.sha256(name.encode() + b"\n" + ED25519 + public_key).digest()[:4], "big")


def check_name(name: str, *, where: str = "key name") -> None:
    """Raise MalformedEvidence unless `name` can name a key: not empty, no space, no plus, no control character."""
    if not _NAME.fullmatch(name) or len(name.encode()) > NAME_LIMIT_BYTES:
        raise MalformedEvidence(
            f"{where}: expected a name of 1 to {NAME_LIMIT_BYTES} bytes with no space, '+' or "
            f"control character, found {name[:80]!r}"
        )


def parse_vkey(text: str) -> Verifier:
    """The public key in `text`, with or without a newline at its end."""
    parts = text.removesuffix("\n").split("+", 2)
    if len(text) > NAME_LIMIT_BYTES + 100 or len(parts) != 3:
        raise MalformedEvidence(f"vkey: expected '<name>+<8 hex>+<base64>', found {text[:80]!r}")
    data = decode_base64(parts[2], where="vkey")
    if data[:1] != ED25519:
        raise MalformedEvidence(f"vkey: expected an Ed25519 key (type 01), found type {data[:1].hex() or 'none'}")
    verifier = Verifier(name=parts[0], public_key=data[1:])
    if f"{verifier.key_id:08x}" != parts[1]:
        raise MalformedEvidence(f"vkey: expected key id {verifier.key_id:08x} for this key, found {parts[1][:20]!r}")
    return verifier


def encode_note(note: Note) -> str:
    """The note as text. Raises Misuse for what `parse_note` would refuse."""
    lines = [
        f"{_DASH}{s.name} {base64.b64encode(s.key_id.to_bytes(4, 'big') + s.value).decode()}\n" for s in note.signatures
    ]
    encoded = note.text + "\n" + "".join(lines)
    if parse_note(encoded.encode(), where="note") != note:
        raise Misuse("note: text or signature that the format cannot hold")
    return encoded


def parse_note(data: bytes, *, where: str) -> Note:
    """The note in `data`; raises MalformedEvidence naming `where` for anything the format forbids."""
    if len(data) > NOTE_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: note of {len(data)} bytes, limit {NOTE_LIMIT_BYTES}")
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedEvidence(f"{where}: note is not UTF-8 at byte {error.start}") from error
    if _CONTROL.search(whole):
        raise MalformedEvidence(f"{where}: control character in a note")
    text, blank, tail = whole.rpartition("\n\n")
    if not blank or not text or not tail.endswith("\n"):
        raise MalformedEvidence(f"{where}: expected a text, a blank line and signature lines")
    lines = tail[:-1].split("\n")
    if len(lines) > SIGNATURE_LIMIT:
        raise MalformedEvidence(f"{where}: {len(lines)} signatures, limit {SIGNATURE_LIMIT}")
    return Note(text=text + "\n", signatures=tuple(_parse_signature(line, where) for line in lines))


def _parse_signature(line: str, where: str) -> Signature:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    if not line.startswith(_DASH) or not space:
        raise MalformedEvidence(f"{where}: expected '— <key name> <base64>', found {line[:80]!r}")
    check_name(name, where=f"{where}: key name")
    data = decode_base64(encoded, where=f"{where}: signature of {name[:80]}")
    if len(data) < 5:
        raise MalformedEvidence(f"{where}: signature of {name[:80]}: expected 5 bytes or more, found {len(data)}")
    return Signature(name=name, key_id=int.from_bytes(data[:4], "big"), value=data[4:])


def decode_base64(text: str, *, where: str) -> bytes:
    """Strict RFC 4648 section 4: what comes out re-encodes to `text`, so no two texts mean the same bytes."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError) as error:
        raise MalformedEvidence(f"{where}: not base64: {text[:80]!r}") from error
    if base64.b64encode(data).decode() != text:
        raise MalformedEvidence(f"{where}: not canonical base64: {text[:80]!r}")
    return data


def sign_note(text: str, signer: Signer) -> str:
    """The signed note over `text`, which ends in a newline."""
    signature = Signature(name=signer.name, key_id=signer.verifier.key_id, value=signer.key.sign(text.encode()))
    return encode_note(Note(text=text, signatures=(signature,)))


def verify_note(data: bytes, verifier: Verifier, *, where: str) -> str:
    """The text of the note in `data` if `verifier`'s key signed it.

    Signatures by other keys are ignored, as the specification demands. One by this key that fails refuses the note.
    """
    note = parse_note(data, where=where)
    ours = [s for s in note.signatures if (s.name, s.key_id) == (verifier.name, verifier.key_id)]
    if not ours:
        raise VerificationError(
            f"{where}: expected a signature by {verifier.name} (key {verifier.key_id:08x}), found "
            + _signers(note.signatures)
        )
    key = Ed25519PublicKey.from_public_bytes(verifier.public_key)
    for signature in ours:
        try:
            key.verify(signature.value, note.text.encode())
        except InvalidSignature:
            raise VerificationError(
                f"{where}: the signature by {verifier.name} (key {verifier.key_id:08x}) is not over this text"
            ) from None
    return note.text


def _signers(signatures: Sequence[Signature]) -> str:
    return ", ".join(f"{s.name[:80]} (key {s.key_id:08x})" for s in signatures[:5])
