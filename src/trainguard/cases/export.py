"""A case as one zip that can be checked without the room's key (spec/case.md, 8).

    data = make_bundle(home, view)
    checked = verify_bundle(offline.unpack(data))

For every record: its log entry with the inclusion proof, the key of that one entry, and the sealed file it leads to. So
a reader opens these records and no other, and sees that each stood in the log, in this order, signed by who was a
member. Incidents go in as they were taken in, each with its own evidence bundle where the evidence is still there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trainguard import __version__, opaque
from trainguard.cases import sealed
from trainguard.cases.desk import View
from trainguard.cases.records import NO_RECORD, Open, parse_record, verify_record
from trainguard.cases.room import Seen, vault_of
from trainguard.cases.state import State
from trainguard.digest import canonical_json, sha256_hex
from trainguard.errors import MalformedEvidence, TrainguardError, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.incident import bundle, offline
from trainguard.incident.correlate import Incident
from trainguard.log import LogReader
from trainguard.log.merkle import leaf_hash, verify_inclusion
from trainguard.log.note import parse_vkey
from trainguard.log.tree_head import verify_tree_head

SCHEMA = "trainguard/case-bundle/v1"
LIMIT_BYTES = 1 << 30


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle was found to hold."""

    schema: str = "trainguard/case-check/v1"
    code: str
    stage: str
    records: int
    first_at: str
    last_at: str
    """Nanoseconds since the epoch, decimal, by the clocks of those who wrote them."""
    signers: dict[str, str]
    """Key id → name."""
    incidents: tuple[str, ...]
    log_origin: str
    log_size: int
    log_key: str
    """SHA-256 of the log's public key: compare it with one you got another way."""


def make_bundle(home: Home, view: View) -> bytes:
    """The bundle of a case as its reader sees it. Raises VerificationError where something of it does not hold."""
    reader = LogReader(home.log, home.keys / "log.vkey")
    files = {
        offline.HEAD: reader.head().note.encode(),
        offline.LOG_KEY: (home.keys / "log.vkey").read_bytes(),
        "notes.json": msgspec.json.encode([[seen.record.n, text] for seen, text in view.notes]),
        "README.txt": README.format(version=__version__).encode(),
    }
    for seen in view.seen:
        files |= _record(home, reader, seen, view.keys[seen.record.n])
    for one in view.incidents:
        files[f"incidents/{one['id']}.json"] = canonical_json(one)
        files |= _evidence(home, one)
    listed = {name: sha256_hex(data) for name, data in sorted(files.items())}
    files[offline.MANIFEST] = msgspec.json.encode({"schema": SCHEMA, "case": view.state.code, "files": listed})
    return offline.pack(files)


README = """A case, exported by trainguard {version} after two people agreed.

    trainguard case verify THIS.zip

records/<n>/ holds one record each: entry, as it stands in the log; proof.json, that it does; key, of this entry alone;
file, which the entry names and opens. incidents/ is what was taken in, evidence/ the bundle of each incident, which
checks with nothing but Python (its own verify.py). notes.json is the exporter's own copy of each note.
"""


def read_bundle(path: Path) -> dict[str, bytes]:
    """The files of the zip at `path`. Raises Unavailable, or MalformedEvidence for what is no such zip."""
    try:
        if path.stat().st_size > LIMIT_BYTES:
            raise MalformedEvidence(f"{path}: more than {LIMIT_BYTES} bytes, the limit")
        return offline.unpack(path.read_bytes())
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read: {error.strerror}") from error
    except offline.Refused as error:
        raise MalformedEvidence(f"{path}: {error}") from error


def verify_bundle(files: Mapping[str, bytes]) -> Checked:
    """Check everything: manifest, tree head, inclusion, chain, signatures, and that every act could be written.

    Raises VerificationError naming the record that does not hold.
    """
    _manifest(files)
    verifier = parse_vkey(_text(files, offline.LOG_KEY))
    head = verify_tree_head(_bytes(files, offline.HEAD), verifier, where=offline.HEAD)
    state, previous, last_leaf = State(""), NO_RECORD, -1
    incidents: dict[str, str] = {}
    times: list[str] = []
    while f"records/{state.next_n}/entry" in files:
        n = state.next_n
        where = f"record {n}"
        leaf, path = _proof(files, n)
        entry = _bytes(files, f"records/{n}/entry")
        verify_inclusion(leaf_hash(entry), leaf, head.size, path, head.root, where=where)
        plain = opaque.unseal_once(entry, _hex(files, f"records/{n}/key"), where=where)
        header = sealed.parse_header(plain, where=where)
        data = _bytes(files, f"records/{n}/file")
        if header.n != n or header.previous != previous or leaf <= last_leaf or sha256_hex(data) != header.file:
            raise VerificationError(f"{where}: does not follow from the record before it")
        envelope = sealed.open_file(data, bytes.fromhex(header.key), where=where)
        record, author = parse_record(envelope, where=where)
        state.room = state.room or record.case
        card = record.said.proposer.card if isinstance(record.said, Open) and not n else None
        member = state.members.get(author)
        signer = card or (member.card if member is not None else None)
        if signer is None or signer.key != author or record.previous != previous:
            raise VerificationError(f"{where}: is not signed by a member of the case")
        verify_record(envelope, signer, where=where)
        state.apply(record, author, sha256_hex(envelope))
        for ref in getattr(record.said, "incidents", ()):
            incidents[ref.id] = ref.sha256
        previous, last_leaf = sealed.hash_of(entry), leaf
        times.append(record.at)
    if not times:
        raise VerificationError("case: the bundle holds no record")
    for name, digest in incidents.items():
        taken = files.get(f"incidents/{name}.json")
        if taken is not None and sha256_hex(taken) != digest:
            raise VerificationError(f"incidents/{name}.json: is not what was taken in")
    return Checked(
        code=state.code,
        stage=state.stage,
        records=state.next_n,
        first_at=times[0],
        last_at=times[-1],
        signers={key: member.card.name for key, member in state.members.items()},
        incidents=tuple(incidents),
        log_origin=head.origin,
        log_size=head.size,
        log_key=sha256_hex(verifier.vkey.encode()),
    )


def _record(home: Home, reader: LogReader, seen: Seen, key: bytes) -> dict[str, bytes]:
    (entry,) = reader.entries(seen.leaf, seen.leaf + 1)
    where = f"record {seen.record.n}"
    header = sealed.open_header(entry, key, where=where)
    folder = f"records/{seen.record.n}"
    proof = {"leaf": seen.leaf, "path": [node.hex() for node in reader.inclusion(seen.leaf).path]}
    return {
        f"{folder}/entry": entry,
        f"{folder}/key": opaque.once(entry, key).hex().encode(),
        f"{folder}/file": sealed.fetch(vault_of(home), header.file, where=where),
        f"{folder}/proof.json": msgspec.json.encode(proof),
    }


def _evidence(home: Home, one: dict[str, Any]) -> dict[str, bytes]:
    """The incident's own bundle; a line that says why where it cannot be made."""
    try:
        return {f"evidence/{one['id']}.zip": bundle.make_bundle(home, msgspec.convert(one, Incident))}
    except (TrainguardError, msgspec.ValidationError) as error:
        return {f"evidence/{one['id']}.missing.txt": f"{error}\n".encode()}


def _manifest(files: Mapping[str, bytes]) -> None:
    try:
        stated = json.loads(files[offline.MANIFEST])
        listed = stated["files"]
        known = stated["schema"] == SCHEMA and isinstance(listed, dict)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise MalformedEvidence(f"{offline.MANIFEST}: expected the list of files: {error}") from error
    if not known:
        raise MalformedEvidence(f"{offline.MANIFEST}: expected {SCHEMA}")
    found = {name: sha256_hex(data) for name, data in files.items() if name != offline.MANIFEST}
    wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
    if wrong:
        raise VerificationError(f"{wrong[0]}: is not what {offline.MANIFEST} states")


def _proof(files: Mapping[str, bytes], n: int) -> tuple[int, list[bytes]]:
    name = f"records/{n}/proof.json"
    try:
        proof = json.loads(_bytes(files, name))
        return int(proof["leaf"]), [bytes.fromhex(node) for node in proof["path"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedEvidence(f"{name}: not a proof: {error}") from error


def _bytes(files: Mapping[str, bytes], name: str) -> bytes:
    try:
        return files[name]
    except KeyError:
        raise MalformedEvidence(f"{name}: is not in the bundle") from None


def _text(files: Mapping[str, bytes], name: str) -> str:
    return _bytes(files, name).decode("utf-8", "replace")


def _hex(files: Mapping[str, bytes], name: str) -> bytes:
    try:
        return bytes.fromhex(_text(files, name))
    except ValueError as error:
        raise MalformedEvidence(f"{name}: expected hex: {error}") from error
