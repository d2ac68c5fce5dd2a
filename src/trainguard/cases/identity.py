"""Who somebody is to a case: two private keys on their own disk, and a public card that others seal to.

    identity = create_identity(path, name="mara", accounts=("mara",), authors=("mara@example.org",))
    data = identity.card_bytes()                 # self-signed; hand it to whoever opens a case
    card = parse_card(data, where="mara.card")

An identity lies outside the state folder, because whoever administers that folder may be who is looked for. The
signing key is ECDSA P-256 (envelope.py), the sealing key X25519. A card claims accounts and git authors; the two people
who sign a grant vouch for them, and the process's own account counts beside them (people.py).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from trainguard.digest import write_durably
from trainguard.envelope import PREDICATE_BASE, key_id, sign_statement, statement, verify_statement
from trainguard.errors import MalformedEvidence, Misuse, Unavailable
from trainguard.veil import approvers_folder

IDENTITY_SCHEMA = "trainguard/identity/v1"
CARD_LIMIT_BYTES = 16 << 10
IDENTITY_LIMIT_BYTES = 64 << 10
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@+-]{0,63}")
LISTED = 32
"""Accounts and authors a card may claim, each."""
MINE = ".config/trainguard/identity.json"


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What others know of a person: a name, what they act under, and two public keys."""

    name: str
    """As they are called in the case; letters, digits, space and `._@+-`, at most 64."""
    accounts: tuple[str, ...] = ()
    """Account names or uids they work under."""
    authors: tuple[str, ...] = ()
    """Mail addresses or names they commit under."""
    signing: str
    """ECDSA P-256 public key: SubjectPublicKeyInfo, DER, base64."""
    sealing: str
    """X25519 public key: 32 bytes, hex."""

    @property
    def public(self) -> ec.EllipticCurvePublicKey:
        """The key that checks this person's signatures. Raises MalformedEvidence."""
        try:
            key = serialization.load_der_public_key(base64.b64decode(self.signing, validate=True))
        except (ValueError, TypeError, binascii.Error) as error:
            raise MalformedEvidence(f"card of {self.name[:64]!r}: expected an ECDSA P-256 key: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise MalformedEvidence(f"card of {self.name[:64]!r}: expected an ECDSA P-256 key, found another kind")
        return key

    @property
    def key(self) -> str:
        """Id of the signing key: what a person is known by, 64 hex digits."""
        return key_id(self.public)

    @property
    def mailbox(self) -> X25519PublicKey:
        """The key that things are sealed to. Raises MalformedEvidence."""
        try:
            return X25519PublicKey.from_public_bytes(bytes.fromhex(self.sealing))
        except ValueError as error:
            raise MalformedEvidence(f"card of {self.name[:64]!r}: expected an X25519 key: {error}") from error


@dataclass(frozen=True, slots=True)
class Identity:
    """A person's card with its private halves. Where it came from, so that memory can be kept beside it."""

    card: Card
    signing: ec.EllipticCurvePrivateKey
    sealing: X25519PrivateKey
    path: Path | None = None

    @property
    def key(self) -> str:
        return self.card.key

    def card_bytes(self) -> bytes:
        """The card as a file to hand on: a DSSE statement `card/v1`, signed by the key it names."""
        body = msgspec.to_builtins(self.card)
        subject = [{"name": f"cards/{self.card.name}", "digest": {"sha256": self.key}}]
        return sign_statement(statement("card/v1", body, subject), self.signing)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: str
    card: Card
    signing: str
    """PKCS#8 PEM."""
    sealing: str
    """PKCS#8 PEM."""


def identity_path() -> Path:
    """TRAINGUARD_IDENTITY if set, else a file of the caller's own home folder: never in the state folder."""
    named = os.environ.get("TRAINGUARD_IDENTITY")
    return Path(named).absolute() if named else Path.home() / MINE


def new_identity(name: str, *, accounts: Sequence[str] = (), authors: Sequence[str] = ()) -> Identity:
    """Fresh keys with a card. Raises Misuse for a name or list that a card cannot hold."""
    signing, sealing = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()
    der = signing.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    card = Card(
        name=name,
        accounts=tuple(accounts),
        authors=tuple(authors),
        signing=base64.b64encode(der).decode(),
        sealing=sealing.public_key().public_bytes_raw().hex(),
    )
    try:
        check_card(card, "card")
    except MalformedEvidence as error:
        raise Misuse(str(error)) from error
    return Identity(card, signing, sealing)


def create_identity(
    path: Path, *, name: str, accounts: Sequence[str] = (), authors: Sequence[str] = (), passphrase: bytes | None = None
) -> Identity:
    """Make an identity in the file `path` (mode 0600), once. Raises Misuse where one lies there already."""
    if os.path.lexists(path):
        raise Misuse(f"{path}: an identity is there already", next_step="trainguard case card shows it")
    made = new_identity(name, accounts=accounts, authors=authors)
    how: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    )
    pems = [
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how).decode()
        for key in (made.signing, made.sealing)
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Unavailable(f"{path.parent}: folder cannot be made: {error.strerror}") from error
    file = _File(schema=IDENTITY_SCHEMA, card=made.card, signing=pems[0], sealing=pems[1])
    write_durably(path, msgspec.json.encode(file), mode=0o600)
    return Identity(made.card, made.signing, made.sealing, path)


def load_identity(path: Path, *, passphrase: bytes | None = None) -> Identity:
    """The identity in `path`.

    Raises Unavailable where there is none, Misuse where others could read it or a passphrase is missing or wrong,
    MalformedEvidence for a file that is none.
    """
    data = _read_private(path)
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{path}: not an identity: {error}") from error
    if file.schema != IDENTITY_SCHEMA:
        raise MalformedEvidence(f"{path}: expected schema {IDENTITY_SCHEMA}, found {file.schema[:60]!r}")
    check_card(file.card, str(path))
    signing, sealing = (_private(pem, passphrase, path) for pem in (file.signing, file.sealing))
    if not isinstance(signing, ec.EllipticCurvePrivateKey) or not isinstance(sealing, X25519PrivateKey):
        raise MalformedEvidence(f"{path}: expected an ECDSA P-256 and an X25519 private key, found other kinds")
    if (
        key_id(signing.public_key()) != file.card.key
        or sealing.public_key().public_bytes_raw().hex() != file.card.sealing
    ):
        raise MalformedEvidence(f"{path}: its keys are not the ones its card names")
    return Identity(file.card, signing, sealing, path)


def parse_card(data: bytes, *, where: str) -> Card:
    """The card in `data`, signed by the key it names: proof that its owner holds that key, not of who they are.

    Raises MalformedEvidence or VerificationError.
    """
    if len(data) > CARD_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: {len(data)} bytes, limit {CARD_LIMIT_BYTES}")
    from trainguard.cases.records import payload_of

    value = payload_of(data, where)
    if value.get("predicateType") != PREDICATE_BASE + "card/v1":
        raise MalformedEvidence(f"{where}: expected a card, found a statement of another type")
    card = to_card(value.get("predicate"), where)
    verify_statement(data, [card.public], where=where)
    return card


def read_card(path: Path) -> Card:
    """The card in the file `path`, as `parse_card`. Raises Unavailable where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(CARD_LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: card cannot be read: {error.strerror}") from error
    return parse_card(data, where=str(path))


def read_approvers(folder: Path | None = None) -> tuple[Card, ...]:
    """The cards of those whom this machine lets open cases, grant and mute; none where no such folder is.

    Raises as `read_card` for a card that does not hold: a site that names approvers must not lose one unnoticed.
    """
    folder = folder if folder is not None else approvers_folder()
    if not folder.is_dir():
        return ()
    return tuple(read_card(path) for path in sorted(folder.iterdir()) if path.suffix == ".card")


def to_card(value: object, where: str) -> Card:
    """A card from decoded JSON, checked. Raises MalformedEvidence."""
    try:
        card = msgspec.convert(value, Card)
    except msgspec.ValidationError as error:
        raise MalformedEvidence(f"{where}: not a card: {error}") from error
    check_card(card, where)
    return card


def fingerprint(key: str) -> str:
    """The first 16 hex digits of a key's id in groups of four: what two people read to each other."""
    return " ".join(key[at : at + 4] for at in range(0, 16, 4))


def check_card(card: Card, where: str) -> None:
    """Raises MalformedEvidence for a name, list or key that a card cannot hold."""
    if not NAME.fullmatch(card.name):
        raise MalformedEvidence(f"{where}: name: expected letters, digits, space or ._@+-, found {card.name[:64]!r}")
    for field, values in (("accounts", card.accounts), ("authors", card.authors)):
        if len(values) > LISTED or any(not 0 < len(value) <= 128 or not value.isprintable() for value in values):
            raise MalformedEvidence(f"{where}: {field}: expected at most {LISTED} of at most 128 printable characters")
    _ = card.public, card.mailbox


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unavailable(
            f"{path}: there is no identity here", next_step="make one with: trainguard case identity --name NAME"
        ) from None
    except OSError as error:
        raise Unavailable(f"{path}: identity cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedEvidence(f"{path}: expected a file, found another kind")
        if status.st_mode & 0o077:
            raise Misuse(
                f"{path}: expected an identity only its owner can read, found mode {status.st_mode & 0o777:o}",
                next_step=f"chmod 600 {path}, and ask who could have read it",
            )
        data = file.read(IDENTITY_LIMIT_BYTES + 1)
    if len(data) > IDENTITY_LIMIT_BYTES:
        raise MalformedEvidence(f"{path}: more than {IDENTITY_LIMIT_BYTES} bytes, the limit")
    return data


def _private(pem: str, passphrase: bytes | None, path: Path) -> object:
    sealed = "ENCRYPTED" in pem[:80]
    if sealed and passphrase is None:
        raise Misuse(f"{path}: this identity needs its passphrase", next_step="run it in a terminal, which asks for it")
    try:
        return serialization.load_pem_private_key(pem.encode(), passphrase if sealed else None)
    except (ValueError, TypeError) as error:
        if sealed:
            raise Misuse(f"{path}: the passphrase does not fit") from error
        raise MalformedEvidence(f"{path}: expected private keys in PEM: {error}") from error
