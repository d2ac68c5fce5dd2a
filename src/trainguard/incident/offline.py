"""Verifies an evidence bundle with nothing but Python 3.8 or newer: no package, no network.

    python verify.py BUNDLE.zip [--log-key FINGERPRINT] [--attestation-key FINGERPRINT]

This very file is `verify.py` in every bundle, and `trainguard incident verify` runs it too. Whoever does not trust the
copy in the bundle takes one from elsewhere. What it checks, in this order:

 1. container     the zip is, byte for byte, what its files make (stored, sorted, no dates): nothing hides in it
 2. manifest      every file has the SHA-256 that MANIFEST.json states, and there are no others
    signature     the attestation key signed that manifest, and so every word in the bundle
 3. tree head     signed by the log's key (Ed25519, RFC 8032)
 4. leaves        each is in the tree under that head (RFC 6962)
 5. statements    each is signed by the attestation key (ECDSA P-256, FIPS 186-5, over DSSE)
 6. segments      each is of the incident's run, has the SHA-256 that its statement states, and its records chain
 7. incident      every record it cites is in one of these segments, and its name is the digest of what it is made of

The keys are in the bundle. That they are the right ones only somebody else can say: compare the two fingerprints that
it prints with those you got another way, or give them as options.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import zipfile
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

_Ed = Tuple[int, int, int, int]
_Point = Tuple[int, int]
_Files = Mapping[str, bytes]

LIMIT_BYTES = 1 << 30
FILE_LIMIT = 10000
MANIFEST = "MANIFEST.json"
SIGNATURE, PREDICATE, BASE = "SIGNATURE.json", "bundle/v1", "https://trainguard.dev/attestation/"
NAMES = re.compile(
    r"README\.txt|verify\.py|(?:leaves|proofs)/(?:0|[1-9][0-9]{0,14})\.json|segments/(?:0|[1-9][0-9]{0,14})\.spool"
)
HEAD, LOG_KEY, ATTESTATION_KEY, INCIDENT = "tree-head.txt", "keys/log.vkey", "keys/attestation.pem", "incident.json"
EPOCH = (1980, 1, 1, 0, 0, 0)


class Refused(Exception):
    """The bundle does not hold; the message says what and where."""


# -- Ed25519 (RFC 8032, section 5.1) and ECDSA over P-256 (FIPS 186-5), verification only -----------------------------

_P = 2**255 - 19
_L = 2**252 + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_I = pow(2, (_P - 1) // 4, _P)


def _ed_x(y: int, sign: int) -> Optional[int]:
    if y >= _P:
        return None
    squared = (y * y - 1) * pow(_D * y * y + 1, _P - 2, _P) % _P
    if squared == 0:
        return None if sign else 0
    x = pow(squared, (_P + 3) // 8, _P)
    if (x * x - squared) % _P:
        x = x * _I % _P
    if (x * x - squared) % _P:
        return None
    return _P - x if x & 1 != sign else x


def _ed_add(a: _Ed, b: _Ed) -> _Ed:
    x1, y1, z1, t1 = a
    x2, y2, z2, t2 = b
    m, n = (y1 - x1) * (y2 - x2) % _P, (y1 + x1) * (y2 + x2) % _P
    c, d = 2 * t1 * t2 * _D % _P, 2 * z1 * z2 % _P
    e, f, g, h = n - m, d - c, d + c, n + m
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _ed_times(k: int, point: _Ed) -> _Ed:
    total: _Ed = (0, 1, 1, 0)
    while k:
        if k & 1:
            total = _ed_add(total, point)
        point = _ed_add(point, point)
        k >>= 1
    return total


def _ed_point(data: bytes) -> Optional[_Ed]:
    y = int.from_bytes(data, "little")
    sign = y >> 255
    y &= (1 << 255) - 1
    x = _ed_x(y, sign)
    return None if x is None else (x, y, 1, x * y % _P)


def ed25519_holds(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) of `message` is by `public` (32 bytes)."""
    if len(public) != 32 or len(signature) != 64:
        return False
    a, r, s = _ed_point(public), _ed_point(signature[:32]), int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= _L:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % _L
    base_y = 4 * pow(5, _P - 2, _P) % _P
    base_x = _ed_x(base_y, 0) or 0
    left = _ed_times(s, (base_x, base_y, 1, base_x * base_y % _P))
    right = _ed_add(r, _ed_times(h, a))
    same_x = (left[0] * right[2] - right[0] * left[2]) % _P == 0
    return same_x and (left[1] * right[2] - right[1] * left[2]) % _P == 0


_Q = 2**256 - 2**224 + 2**192 + 2**96 - 1
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)


def _p256_add(a: Optional[_Point], b: Optional[_Point]) -> Optional[_Point]:
    if a is None:
        return b
    if b is None:
        return a
    if a[0] == b[0]:
        if (a[1] + b[1]) % _Q == 0:
            return None
        slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], _Q - 2, _Q) % _Q
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], _Q - 2, _Q) % _Q
    x = (slope * slope - a[0] - b[0]) % _Q
    return x, (slope * (a[0] - x) - a[1]) % _Q


def _p256_times(k: int, point: Optional[_Point]) -> Optional[_Point]:
    total: Optional[_Point] = None
    while k:
        if k & 1:
            total = _p256_add(total, point)
        point = _p256_add(point, point)
        k >>= 1
    return total


def ecdsa_holds(public: _Point, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (DER) of `message` with SHA-256 is by the P-256 point `public` (x, y)."""
    pair = _der_pair(signature)
    if pair is None or not all(0 < each < _N for each in pair):
        return False
    x, y = public
    if not (0 <= x < _Q and 0 <= y < _Q and (y * y - x * x * x + 3 * x - _B) % _Q == 0):
        return False
    r, s = pair
    e, w = int.from_bytes(hashlib.sha256(message).digest(), "big"), pow(s, _N - 2, _N)
    point = _p256_add(_p256_times(e * w % _N, _G), _p256_times(r * w % _N, public))
    return point is not None and point[0] % _N == r


def _der_pair(data: bytes) -> Optional[_Point]:
    """The two integers of a DER SEQUENCE, in their one form; None for anything else."""
    if len(data) < 8 or data[0] != 0x30 or data[1] != len(data) - 2:
        return None
    found: List[int] = []
    at = 2
    while at < len(data):
        if len(found) == 2 or data[at] != 2 or at + 2 > len(data):
            return None
        size = data[at + 1]
        body = data[at + 2 : at + 2 + size]
        if len(body) != size or not body or body[0] & 0x80 or (body[0] == 0 and size > 1 and not body[1] & 0x80):
            return None
        found.append(int.from_bytes(body, "big"))
        at += 2 + size
    return (found[0], found[1]) if len(found) == 2 else None


def p256_of_pem(text: str) -> Tuple[_Point, bytes]:
    """The point in a PEM SubjectPublicKeyInfo of an uncompressed P-256 key, and its DER."""
    lines = text.strip().split("\n")
    if lines[:1] != ["-----BEGIN PUBLIC KEY-----"] or lines[-1:] != ["-----END PUBLIC KEY-----"]:
        raise Refused(f"{ATTESTATION_KEY}: expected a public key in PEM")
    der = base64.b64decode("".join(lines[1:-1]), validate=True)
    head = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
    if len(der) != 91 or not der.startswith(head) or der[26] != 4:
        raise Refused(f"{ATTESTATION_KEY}: expected an uncompressed P-256 key")
    return (int.from_bytes(der[27:59], "big"), int.from_bytes(der[59:], "big")), der


# -- the container -----------------------------------------------------------------------------------------------------


def pack(files: Mapping[str, bytes]) -> bytes:
    """The one zip that these files make: stored, sorted by name, no dates, no attributes. files: name → bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3
            archive.writestr(info, files[name])
    return out.getvalue()


def unpack(data: bytes) -> Dict[str, bytes]:
    """The files in a bundle. Raises Refused for a zip that is not exactly what its files make."""
    if len(data) > LIMIT_BYTES:
        raise Refused("container: expected at most %d bytes, found %d" % (LIMIT_BYTES, len(data)))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > FILE_LIMIT or sum(info.file_size for info in infos) > LIMIT_BYTES:
                raise Refused("container: more or larger files than a bundle may have")
            files = {info.filename: archive.read(info) for info in infos if info.compress_type == zipfile.ZIP_STORED}
            names = [info.filename for info in infos]
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise Refused(f"container: not a whole zip: {error}") from None
    if len(names) != len(set(names)) or set(names) != set(files):
        raise Refused("container: expected each file once and stored as it is")
    if pack(files) != data:
        raise Refused("container: the zip is not what its files make: bytes were added, moved or changed in it")
    return files


# -- what is in it -----------------------------------------------------------------------------------------------------


def verify(data: bytes, log_key: Optional[str] = None, attestation_key: Optional[str] = None) -> Dict[str, Any]:
    """Check a bundle (bytes). Returns a summary; raises Refused at the first thing that does not hold.

    log_key, attestation_key: the fingerprints (SHA-256, hex) that its keys must have.
    """
    files = unpack(data)
    _check_manifest(files)
    vkey, origin, public = _vkey(_text(files, LOG_KEY))
    point, der = p256_of_pem(_text(files, ATTESTATION_KEY))
    prints = {"log": hashlib.sha256(public).hexdigest(), "attestation": hashlib.sha256(der).hexdigest()}
    for name, wanted in (("log", log_key), ("attestation", attestation_key)):
        if wanted is not None and wanted.lower() != prints[name]:
            raise Refused(f"{name} key: expected fingerprint {wanted}, found {prints[name]}")
    _check_signature(files, point, prints["attestation"])
    size, root = _head(_text(files, HEAD), vkey, origin, public)
    statements = _statements(files, size, root, point)
    incident = _json(files, INCIDENT)
    records, kinds = _records(files, statements, incident["run"])
    cited = _incident(incident, records)
    return {
        "incident": incident["id"],
        "run": incident["run"],
        "fingerprints": prints,
        "tree_size": size,
        "leaves": len(statements),
        "records": len(records),
        "citations": cited,
        "kinds": kinds,
        "files": len(files),
        "verifier": hashlib.sha256(files["verify.py"]).hexdigest() if "verify.py" in files else None,
    }


def _check_manifest(files: _Files) -> None:
    manifest = _json(files, MANIFEST)
    listed = manifest.get("files")
    if manifest.get("schema") != "trainguard/bundle/v2" or not isinstance(listed, dict):
        raise Refused(f"{MANIFEST}: expected schema trainguard/bundle/v2 with files")
    others = set(files) - {MANIFEST, SIGNATURE}
    if set(listed) != others:
        odd = sorted(set(listed) ^ others)[:4]
        raise Refused("{}: the files listed and those there differ: {}".format(MANIFEST, ", ".join(odd)))
    for name in sorted(others):
        found = hashlib.sha256(files[name]).hexdigest()
        if found != listed[name]:
            raise Refused(f"{name}: expected sha256 {listed[name]}, found {found}")


def _check_signature(files: _Files, point: _Point, fingerprint: str) -> None:
    """The manifest is signed, by the key that is shown, in the one form that a signature of it has."""
    text = _text(files, SIGNATURE)
    value = _signed(SIGNATURE, text.encode(), point)
    outer = json.loads(text)
    (only,) = outer["signatures"]
    pair = _der_pair(base64.b64decode(only["sig"]))
    again = {
        "payload": base64.b64encode(base64.b64decode(outer["payload"])).decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"keyid": fingerprint, "sig": base64.b64encode(base64.b64decode(only["sig"])).decode()}],
    }
    if pair is None or pair[1] > _N // 2 or json.dumps(again, sort_keys=True, separators=(",", ":")) != text:
        raise Refused(f"{SIGNATURE}: not in the one form that it has")
    stated = [{"name": MANIFEST, "digest": {"sha256": hashlib.sha256(files[MANIFEST]).hexdigest()}}]
    if value.get("predicateType") != BASE + PREDICATE or value.get("subject") != stated:
        raise Refused(f"{SIGNATURE}: signed for another manifest, or for something else")
    odd = [
        n
        for n in files
        if not NAMES.fullmatch(n) and n not in (MANIFEST, SIGNATURE, HEAD, LOG_KEY, ATTESTATION_KEY, INCIDENT)
    ]
    if odd:
        raise Refused("{}: not a file of a bundle".format(", ".join(sorted(odd)[:4])))


def _vkey(text: str) -> Tuple[bytes, str, bytes]:
    name, _, rest = text.strip().partition("+")
    number, _, encoded = rest.partition("+")
    key = _base64(encoded, LOG_KEY)
    if len(key) != 33 or key[:1] != b"\1":
        raise Refused(f"{LOG_KEY}: expected an Ed25519 key")
    identity = hashlib.sha256(name.encode() + b"\n" + key).digest()[:4]
    if identity.hex() != number:
        raise Refused(f"{LOG_KEY}: its key id is not that of its key")
    return identity, name, key[1:]


def _head(note: str, identity: bytes, origin: str, public: bytes) -> Tuple[int, bytes]:
    text, gap, signatures = note.partition("\n\n")
    text += "\n"
    ours = []
    for line in signatures.split("\n"):
        parts = line.split(" ")
        if len(parts) == 3 and parts[0] == "\u2014" and parts[1] == origin:
            value = _base64(parts[2], HEAD)
            if value[:4] == identity:
                ours.append(value[4:])
    if not gap or not any(ed25519_holds(public, text.encode(), signature) for signature in ours):
        raise Refused(f"{HEAD}: not signed by the log's key")
    lines = text.split("\n")
    if lines[0] != origin or not lines[1].isdigit():
        raise Refused(f"{HEAD}: expected the head of {origin}")
    return int(lines[1]), _base64(lines[2], HEAD)


def _statements(files: _Files, size: int, root: bytes, point: _Point) -> Dict[int, Any]:
    """Leaf → statement, each proved to be in the log and signed."""
    statements: Dict[int, Any] = {}
    for name in sorted(files):
        if not name.startswith("leaves/") or not name.endswith(".json"):
            continue
        number = name[len("leaves/") : -len(".json")]
        if not number.isdigit():
            raise Refused(f"{name}: expected a leaf's number")
        index, entry = int(number), files[name]
        path = _json(files, f"proofs/{number}.json")
        if not isinstance(path, list) or not all(isinstance(each, str) and len(each) == 64 for each in path):
            raise Refused(f"proofs/{number}.json: expected a list of hashes")
        if _root_from(index, size, hashlib.sha256(b"\0" + entry).digest(), [bytes.fromhex(h) for h in path]) != root:
            raise Refused(f"{name}: not in the log under the signed tree head")
        statements[index] = _signed(name, entry, point)
    return statements


def _root_from(index: int, size: int, node: bytes, path: List[bytes]) -> Optional[bytes]:
    """RFC 9162, section 2.1.3.2."""
    if index >= size:
        return None
    first, second = index, size - 1
    for sibling in path:
        if second == 0:
            return None
        if first & 1 or first == second:
            node = hashlib.sha256(b"\1" + sibling + node).digest()
            while not first & 1 and first:
                first, second = first >> 1, second >> 1
        else:
            node = hashlib.sha256(b"\1" + node + sibling).digest()
        first, second = first >> 1, second >> 1
    return node if second == 0 else None


def _signed(name: str, entry: bytes, point: _Point) -> Any:
    try:
        outer = json.loads(entry.decode())
        payload = base64.b64decode(outer["payload"], validate=True)
        (only,) = outer["signatures"]
        signature = base64.b64decode(only["sig"], validate=True)
        kind = outer["payloadType"].encode()
    except (ValueError, KeyError, TypeError, UnicodeError) as error:
        raise Refused(f"{name}: not a DSSE envelope: {error}") from None
    if not ecdsa_holds(point, b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload), signature):
        raise Refused(f"{name}: not signed by the attestation key")
    return json.loads(payload.decode())


def _records(files: _Files, statements: Mapping[int, Any], run: str) -> Tuple[Dict[str, int], Dict[str, int]]:
    """Hash of every record in the segments, with its leaf; and how many there are of each kind."""
    records: Dict[str, int] = {}
    kinds: Dict[str, int] = {}
    for leaf in sorted(statements):
        statement = statements[leaf]
        if not statement.get("predicateType", "").endswith("/segment/v1"):
            continue
        name = "segments/%d.spool" % leaf
        if name not in files:
            raise Refused("%s: missing: leaf %d is a segment" % (name, leaf))
        data, body = files[name], statement["predicate"]
        if body["run"] != run:
            raise Refused("%s: records of run %s, and the incident is of run %s" % (name, body["run"], run))
        stated = statement["subject"][0]["digest"]["sha256"]
        if hashlib.sha256(data).hexdigest() != stated or len(data) != body["bytes"]:
            raise Refused("%s: its bytes are not those that leaf %d was made of" % (name, leaf))
        chain = bytes.fromhex(body["chain_before"])
        for number, line in enumerate(data.split(b"\n")[:-1]):
            payload = line[65:]
            chain = hashlib.sha256(chain + payload).digest()
            if chain.hex().encode() != line[:64]:
                raise Refused("%s: record %d does not follow from the one before it" % (name, number))
            kind = json.loads(payload.decode()).get("kind")
            kinds[kind] = kinds.get(kind, 0) + 1
            records[hashlib.sha256(payload).hexdigest()] = leaf
        if chain.hex() != body["chain_after"]:
            raise Refused("%s: its records do not end where leaf %d says" % (name, leaf))
    return records, kinds


def _incident(incident: Any, records: Mapping[str, int]) -> int:
    cited = 0
    made_of = []
    for finding in incident["findings"]:
        subject = finding["subject"]
        made_of.append(
            [
                finding["check"],
                finding["outcome"],
                finding["techniques"],
                subject["step"],
                subject["rank"],
                finding["message"],
            ]
        )
        for citation in finding["evidence"]:
            cited += 1
            if records.get(citation["hash"]) != citation["leaf"]:
                raise Refused(
                    "{}: finding of check {} cites record {} in leaf {}, which is not in the bundle".format(
                        INCIDENT, finding["check"], citation["hash"][:16], citation["leaf"]
                    )
                )
    text = json.dumps([incident["run"], made_of], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    identity = "inc-" + hashlib.sha256(text.encode()).hexdigest()[:10]
    if identity != incident["id"]:
        raise Refused(
            "{}: expected the name {} for these findings, found {}".format(INCIDENT, identity, incident["id"])
        )
    return cited


def _text(files: _Files, name: str) -> str:
    try:
        return files[name].decode()
    except KeyError:
        raise Refused(f"{name}: missing") from None
    except UnicodeError:
        raise Refused(f"{name}: not text") from None


def _json(files: _Files, name: str) -> Any:
    try:
        return json.loads(_text(files, name))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: not JSON: {error}") from None


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Refused(f"{where}: not base64") from None


def run(arguments: Sequence[str]) -> Tuple[int, str]:
    """The program: exit status (0 holds, 1 does not, 2 wrong use, 3 cannot be read) and what to say."""
    options: Dict[str, str] = {}
    paths: List[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("--log-key", "--attestation-key") and words:
            options[word[2:].replace("-", "_")] = words.pop(0)
        else:
            paths.append(word)
    if len(paths) != 1 or paths[0].startswith("-"):
        return 2, "usage: verify.py BUNDLE.zip [--log-key FINGERPRINT] [--attestation-key FINGERPRINT]"
    try:
        with open(paths[0], "rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        return 3, f"{paths[0]}: cannot be read: {error.strerror}"
    try:
        summary = verify(data, **options)
    except Refused as refused:
        return 1, f"REFUSED: {refused}"
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return 1, f"REFUSED: a document in the bundle is not as specified: {type(error).__name__}: {error}"
    lines = [
        f"holds: incident {summary['incident']} of run {summary['run']}",
        f"  {summary['citations']} citations in {summary['records']} records under {summary['leaves']} leaves",
        f"  of a log of {summary['tree_size']} entries",
        *(f"  {name} key {value}" for name, value in sorted(summary["fingerprints"].items())),
    ]
    try:
        with open(__file__, "rb") as file:
            own = hashlib.sha256(file.read()).hexdigest()
    except OSError:
        own = ""
    if summary["verifier"] != own:
        lines.append("  the verify.py in the bundle is another one than this: %s" % summary["verifier"])
    if len(options) < 2:
        lines.append("  compare these fingerprints with those you got another way")
    return 0, "\n".join(lines)


if __name__ == "__main__":
    _status, _said = run(sys.argv[1:])
    sys.stdout.write(_said + "\n")
    sys.exit(_status)
