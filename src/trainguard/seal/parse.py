"""Read a seal back: bounded, strict, and believed only once its signature holds.

    bundle = parse_bundle(data, where="model.sig")
    seal = verify_bundle(bundle, [public_key], where="model.sig")

Bytes are verified as stored, never re-encoded. Seals of other OMS tools are read too, where a key signed `files`.
Only VerificationError and MalformedEvidence come out.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import parse_sha256, sha256_hex
from trainguard.envelope import PAYLOAD_TYPE, STATEMENT_TYPE, pre_authentication_encoding
from trainguard.errors import MalformedEvidence, VerificationError
from trainguard.home import RUN_NAME
from trainguard.seal.bundle import (
    MEDIA_TYPE,
    PREDICATE_TYPE,
    RECORD,
    STEP_LIMIT,
    Bundle,
    Facts,
    LogEntry,
    Seal,
    Signed,
    b64,
    digest_of,
    encode_entry,
    fingerprint,
    named_files,
)
from trainguard.seal.hashing import DIGEST_BYTES, SHARDED
from trainguard.seal.manifest import SINGLE, Entry, Kind, directory_hash, root_digest

BUNDLE_LIMIT_BYTES = 64 << 20
"""A seal of 100,000 files with 50,000 tensors has about 25 MB."""
TEXT_LIMIT = 4096
NOTE_LIMIT = 1 << 20
"""Tree heads with post-quantum cosignatures are long."""
_ECDSA = ec.ECDSA(hashes.SHA256())


def parse_bundle(data: bytes, *, where: str) -> Bundle:
    """The bundle in `data`; raises MalformedEvidence naming `where` for anything the format forbids."""
    if len(data) > BUNDLE_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: {len(data)} bytes, limit {BUNDLE_LIMIT_BYTES}")
    outer = parse_json(data, where=where)
    try:
        _keys(outer, {"mediaType", "verificationMaterial", "dsseEnvelope"})
        if outer["mediaType"] != MEDIA_TYPE:
            _refuse(f"mediaType {str(outer['mediaType'])[:80]!r}")
        envelope, material = outer["dsseEnvelope"], outer["verificationMaterial"]
        _keys(envelope, {"payload", "payloadType", "signatures"})
        if envelope["payloadType"] != PAYLOAD_TYPE:
            _refuse(f"payloadType {str(envelope['payloadType'])[:80]!r}")
        (signature,) = envelope["signatures"]
        _keys(signature, {"sig"}, {"keyid"})
        signed = Signed(payload=_unb64(envelope["payload"]), signature=_unb64(signature["sig"]))
        _keys(material, {"publicKey"}, {"tlogEntries", "timestampVerificationData"})
        _keys(material["publicKey"], {"hint"})
        entries = material.get("tlogEntries") or []
        if len(entries) > 1:
            _refuse(f"{len(entries)} log entries")
        entry = _parse_entry(entries[0]) if entries else None
        return Bundle(signed=signed, hint=_text(material["publicKey"]["hint"]), entry=entry)
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise MalformedEvidence(f"{where}: not a model signing bundle with one key signature: {_why(error)}") from error


def _parse_entry(value: Any) -> LogEntry:
    _keys(value, {"logIndex", "logId", "kindVersion", "inclusionProof", "canonicalizedBody", "integratedTime"})
    proof = value["inclusionProof"]
    _keys(proof, {"logIndex", "rootHash", "treeSize", "hashes", "checkpoint"})
    _keys(proof["checkpoint"], {"envelope"})
    entry = LogEntry(
        index=_decimal(value["logIndex"]),
        key_id=_unb64(value["logId"]["keyId"]),
        size=_decimal(proof["treeSize"]),
        root=_unb64(proof["rootHash"]),
        path=tuple(_unb64(text) for text in proof["hashes"][:65]),
        note=_text(proof["checkpoint"]["envelope"], NOTE_LIMIT),
        body=_unb64(value["canonicalizedBody"]),
    )
    if encode_entry(entry) != value:
        _refuse("log entry is not in its one form")
    return entry


def verify_bundle(bundle: Bundle, keys: Sequence[ec.EllipticCurvePublicKey], *, where: str) -> Seal:
    """What the bundle says, if one of `keys` signed it.

    1. the signature, over the payload's bytes; 2. the statement, strictly; 3. its root digest and dirHash, recomputed.
    The caller still owes: the log entry (`check_entry`), the files, and whether this seal is the newest.
    Raises VerificationError when no key fits, MalformedEvidence for a signed statement that is not a seal.
    """
    encoded = pre_authentication_encoding(PAYLOAD_TYPE, bundle.signed.payload)
    signer = next((key for key in keys if _signed_by(key, bundle.signed.signature, encoded)), None)
    if signer is None:
        raise VerificationError(
            f"{where}: signature is not by {' or '.join(fingerprint(k)[:16] for k in keys)}; "
            f"the bundle names key {bundle.hint[:16]!r}"
        )
    if bundle.hint != fingerprint(signer):
        raise VerificationError(f"{where}: names key {bundle.hint[:16]!r}, was signed by {fingerprint(signer)[:16]}")
    return _parse_statement(bundle.signed.payload, fingerprint(signer), where=where)


def _signed_by(key: ec.EllipticCurvePublicKey, signature: bytes, encoded: bytes) -> bool:
    try:
        key.verify(signature, encoded, _ECDSA)
    except InvalidSignature:
        return False
    return True


def _parse_statement(payload: bytes, signer: str, *, where: str) -> Seal:
    value = parse_json(payload, where=f"{where}: signed payload")
    try:
        _keys(value, {"_type", "subject", "predicateType", "predicate"})
        if value["_type"] != STATEMENT_TYPE or value["predicateType"] != PREDICATE_TYPE:
            _refuse(f"statement of type {str(value['predicateType'])[:80]!r}")
        (subject,) = value["subject"]
        predicate = value["predicate"]
        _keys(predicate, {"resources", "serialization"})
        hash_type, ignored = _parse_serialization(predicate["serialization"])
        annotations = subject.get("annotations") or {}
        others = [_parse_other(item, hash_type) for item in annotations.get("others", [])]
        parse = _parse_shards if SHARDED in hash_type else _parse_resources
        resources = parse(predicate["resources"], hash_type)
        seal = Seal(
            name=_text(subject["name"]),
            hash_type=hash_type,
            single=[entry.name for entry in resources] in ([SINGLE], [subject["name"]]) and not others,
            entries=_by_name(resources, others),
            root=parse_sha256(subject["digest"]["sha256"], where=where),
            dir_hash=subject["digest"].get("dirHash"),
            facts=_parse_facts(annotations, where),
            payload_digest=sha256_hex(payload),
            signer=signer,
            complete=annotations.get("seal") == RECORD,
            ignored=ignored,
            others=tuple(entry.name for entry in others),
        )
        _check_digests(seal, resources)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MalformedEvidence(f"{where}: signed, but not as a model signature v1.0: {_why(error)}") from error
    return seal


def _parse_serialization(value: Any) -> tuple[str, tuple[str, ...]]:
    _keys(value, {"method", "hash_type", "allow_symlinks"}, {"ignore_paths", "shard_size"})
    if value["method"] not in ("files", "shards"):
        _refuse(f"serialization method {str(value['method'])[:40]!r}; expected `files` or `shards`")
    hash_type = value["hash_type"]
    if hash_type not in DIGEST_BYTES:
        _refuse(f"hash type {str(hash_type)[:40]!r}")
    if value["method"] == "shards":
        hash_type = f"{hash_type}{SHARDED}{_shard_bytes(value['shard_size'])}"
    return hash_type, tuple(_text(path) for path in value.get("ignore_paths", []))


def _shard_bytes(value: Any) -> int:
    """Bytes of a shard. The tool writes it as a float, as protobuf's JSON has no integers."""
    if type(value) not in (int, float) or not 1 <= value < STEP_LIMIT or value != int(value):
        _refuse(f"shard size {str(value)[:40]!r}")
    return int(value)


def _parse_resources(values: Any, hash_type: str) -> list[Entry]:
    return [_parse_resource(item, hash_type) for item in values]


def _parse_shards(values: Any, hash_type: str) -> list[Entry]:
    """One entry per file from resources `<path>:<start>:<end>`, whose digest is that of all its shards in order.

    The shards of a file MUST follow each other from 0 without a gap, all but the last of full size.
    """
    base, _, shard = hash_type.partition(SHARDED)
    found: dict[str, tuple[int, list[str]]] = {}
    for item in values:
        path, start, end = _text(item["name"]).rsplit(":", 2)
        if item["algorithm"] != hash_type:
            _refuse(f"{path[:80]!r} hashed by {str(item['algorithm'])[:40]!r}, not {hash_type}")
        reached, digests = found.setdefault(_name(path), (0, []))
        length = _decimal(end) - _decimal(start)
        if _decimal(start) != reached or reached % int(shard) or not 0 < length <= int(shard) or path != [*found][-1]:
            _refuse(f"shard {start}-{end} of {path[:80]!r} does not follow the one that ends at {reached}")
        digests.append(_hex(item["digest"], base))
        found[path] = (_decimal(end), digests)
    return [
        Entry(name=name, kind="file", mode=None, size=size, digest="".join(digests))
        for name, (size, digests) in found.items()
    ]


def _parse_resource(value: Any, hash_type: str) -> Entry:
    about = value.get("annotations") or {}
    if value["algorithm"] != hash_type:
        _refuse(f"{str(value['name'])[:80]!r} hashed by {str(value['algorithm'])[:40]!r}, not {hash_type}")
    target = about.get("target")
    return Entry(
        name=_name(value["name"]),
        kind="file" if target is None else "link",
        mode=_mode(about.get("mode")),
        size=_number(about.get("size")),
        digest=_hex(value["digest"], hash_type),
        target=None if target is None else _text(target),
        tensors=_table(about.get("tensors")),
    )


def _parse_other(value: Any, hash_type: str) -> Entry:
    kinds: dict[str, Kind] = {"file": "file", "folder": "folder", "link": "link"}
    kind = kinds[value["kind"]]
    return Entry(
        name=_name(value["name"]),
        kind=kind,
        mode=_mode(value.get("mode")),
        size=_number(value.get("size")),
        digest=None if kind == "folder" else _hex(value["digest"], hash_type),
        target=_text(value["target"]) if kind == "link" else None,
    )


def _by_name(resources: list[Entry], others: list[Entry]) -> dict[str, Entry]:
    names = [entry.name for entry in resources]
    entries = {entry.name: entry for entry in (*resources, *others)}
    in_order = names in (sorted(names), sorted(names, key=lambda name: name.split("/")))
    if not resources or not in_order or len(entries) != len(resources) + len(others):
        _refuse("resources are not one or more, sorted by name or by parts of the path, and without repetition")
    return entries


def _check_digests(seal: Seal, resources: list[Entry]) -> None:
    root = root_digest(digest_of(entry) for entry in resources)
    if root != seal.root:
        _refuse(f"root digest is {seal.root}, its resources hash to {root}")
    if seal.complete and seal.hash_type == "sha256":
        found = directory_hash(named_files(seal.name, list(seal.entries.values())))
        if found != seal.dir_hash:
            _refuse(f"dirHash is {str(seal.dir_hash)[:64]}, its files have {found}")


def _parse_facts(value: Mapping[str, Any], where: str) -> Facts:
    previous, log = value.get("previous") or {}, value.get("log") or {}
    run, live = value.get("run"), value.get("live")
    if run is not None and not (isinstance(run, str) and RUN_NAME.fullmatch(run)):
        _refuse(f"run {str(run)[:80]!r}")
    if live not in (None, "equal", "differs"):
        _refuse(f"live {str(live)[:80]!r}")
    return Facts(
        run=run,
        step=_number(value.get("step")),
        previous_leaf=_number(previous.get("leaf")),
        previous_payload=parse_sha256(previous["payload"], where=where) if previous else None,
        lock=parse_sha256(value["lock"], where=where) if "lock" in value else None,
        origin=_text(log["origin"]) if log else None,
        log_size=_number(log.get("size")),
        live=live,
    )


def parse_json(data: bytes, *, where: str) -> Any:
    """Strict JSON: UTF-8, no repeated keys, no NaN. Raises MalformedEvidence naming `where`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            _refuse("a key stands twice")
        return value

    def never(text: str) -> Any:
        _refuse(f"{text} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=never)
    except (ValueError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not JSON: {_why(error)}") from error


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _why(error: BaseException) -> str:
    return f"{type(error).__name__ + ': ' if isinstance(error, KeyError) else ''}{error}"[:300]


def _keys(value: Any, needed: set[str], allowed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    if not isinstance(value, dict) or not needed <= set(value) <= needed | allowed:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        _refuse(f"expected {sorted(needed)}, found {str(found)[:120]}")


def _unb64(text: Any) -> bytes:
    """Standard base64 in its one form: the bits that padding leaves over are zero."""
    data = base64.b64decode(text, validate=True)
    if b64(data) != text:
        _refuse("base64 is not in its one form")
    return data


def _text(value: Any, limit: int = TEXT_LIMIT) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        _refuse(f"expected 1 to {limit} characters, found {str(value)[:80]!r}")
    return value


def _name(value: Any) -> str:
    """A resource name in its one form (OMS section 6.1.2)."""
    name = _text(value)
    parts = name.split("/")
    if name != SINGLE and ({"", ".", ".."} & set(parts) or "\n" in name):
        _refuse(f"name {name[:80]!r}")
    return name


def _hex(value: Any, hash_type: str) -> str:
    text = _text(value)
    if len(text) != 2 * DIGEST_BYTES[hash_type] or not set(text) <= set("0123456789abcdef"):
        _refuse(f"{hash_type} digest {text[:80]!r}")
    return text


def _number(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 <= value < STEP_LIMIT):
        return value
    _refuse(f"number {str(value)[:80]!r}")


def _decimal(value: Any) -> int:
    text = _text(value)
    if not text.isascii() or not text.isdigit() or len(text) > 19 or str(int(text)) != text:
        _refuse(f"number {text[:80]!r}")
    return int(text)


def _mode(value: Any) -> int | None:
    if value is None:
        return None
    mode = int(_text(value), 8)
    if f"{mode:04o}" != value or mode > 0o7777:
        _refuse(f"mode {value[:80]!r}")
    return mode


def _table(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(digest, str) for digest in value.values()):
        _refuse("tensor table")
    return value
