"""Makes the vectors beside this file, from the specifications and not from trainguard's code.

    python tests/vectors/log/generate.py        # writes files that are not there yet; never touches one that is

Language-neutral JSON: a list of cases, each with `name`, `why`, its inputs, and `error`: null where it must be taken,
"malformed" where the bytes are not of the format, "verification" where they are but do not hold. Bytes are hex, except
notes and proofs, which are text. Keys are Ed25519 with the private key 00 01 … 1f.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HERE = Path(__file__).parent
ORIGIN = "log.example.org"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def key_id(name: str) -> bytes:
    return hashlib.sha256(name.encode() + b"\n\x01" + PUBLIC).digest()[:4]


def vkey(name: str) -> str:
    return f"{name}+{key_id(name).hex()}+{b64(bytes([1]) + PUBLIC)}"


def line(name: str, text: str) -> str:
    return f"\u2014 {name} {b64(key_id(name) + KEY.sign(text.encode()))}\n"


def note(text: str, name: str = ORIGIN) -> str:
    return text + "\n" + line(name, text)


def head(size: int, root: bytes, name: str = ORIGIN) -> str:
    return note(f"{name}\n{size}\n{b64(root)}\n", name)


def leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def root(leaves: list[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return hashlib.sha256(b"\x01" + root(leaves[:k]) + root(leaves[k:])).digest()


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), root(leaves[k:])]
    return [*path(m - k, leaves[k:]), root(leaves[:k])]


def consistency(m: int, leaves: list[bytes], whole: bool = True) -> list[bytes]:
    if m == len(leaves):
        return [] if whole else [root(leaves)]
    k = split(len(leaves))
    if m <= k:
        return [*consistency(m, leaves[:k], whole), root(leaves[k:])]
    return [*consistency(m - k, leaves[k:], False), root(leaves[:k])]


ENTRIES = [b"entry %d" % i for i in range(300)]
LEAVES = [leaf(entry) for entry in ENTRIES]


def merkle() -> list[dict]:
    """`leaf hashes of "entry 0", "entry 1", …`"""
    cases = []

    def inclusion(
        name: str, why: str, size: int, index: int, hashes: list[bytes], error: str | None, tree=None
    ) -> None:
        cases.append(
            {
                "name": name, "why": why, "kind": "inclusion", "entry": (ENTRIES[index % 300]).hex(), "index": index,
                "size": size, "root": (tree or root(LEAVES[:size])).hex(), "path": [h.hex() for h in hashes],
                "error": error,
            }
        )  # fmt: skip

    for size in (1, 2, 3, 5, 8, 64, 65, 255, 256, 257, 300):
        for index in sorted({0, size // 2, size - 1}):
            inclusion(
                f"size-{size}-index-{index}", "as the RFC builds it", size, index, path(index, LEAVES[:size]), None
            )
    good = path(3, LEAVES[:7])
    inclusion("path-short", "last hash missing", 7, 3, good[:-1], "verification")
    inclusion("path-long", "a hash too many", 7, 3, [*good, good[0]], "verification")
    inclusion("path-swapped", "two hashes exchanged", 7, 3, [good[1], good[0], *good[2:]], "verification")
    inclusion("index-plus-1", "proof of the neighbour", 7, 4, good, "verification")
    inclusion("index-beyond", "index equals size", 7, 7, good, "verification")
    inclusion("other-root", "root of another size", 7, 3, good, "verification", root(LEAVES[:6]))
    inclusion("hash-of-31-bytes", "not a SHA-256", 7, 3, [good[0][:31], *good[1:]], "verification")
    for old, new in (
        (0, 0),
        (0, 5),
        (1, 1),
        (1, 2),
        (3, 7),
        (4, 7),
        (6, 8),
        (64, 65),
        (255, 256),
        (256, 300),
        (257, 300),
    ):
        cases.append(
            {
                "name": f"{old}-to-{new}", "why": "as the RFC builds it", "kind": "consistency", "old": old,
                "old_root": root(LEAVES[:old]).hex(), "new": new, "new_root": root(LEAVES[:new]).hex(),
                "path": [h.hex() for h in (consistency(old, LEAVES[:new]) if old else [])], "error": None,
            }
        )  # fmt: skip
    fork = [*LEAVES[:2], leaf(b"forged"), *LEAVES[3:7]]
    cases.append(
        {
            "name": "fork", "why": "the new tree replaced an old entry", "kind": "consistency", "old": 4,
            "old_root": root(LEAVES[:4]).hex(), "new": 7, "new_root": root(fork).hex(),
            "path": [h.hex() for h in consistency(4, fork)], "error": "verification",
        }
    )  # fmt: skip
    cases.append(
        {
            "name": "empty-with-a-root", "why": "size 0 has one root", "kind": "consistency", "old": 0,
            "old_root": root(LEAVES[:1]).hex(), "new": 1, "new_root": root(LEAVES[:1]).hex(), "path": [],
            "error": "verification",
        }
    )  # fmt: skip
    return cases


def tree_heads() -> list[dict]:
    r5 = root(LEAVES[:5])
    text = f"{ORIGIN}\n5\n{b64(r5)}\n"
    good = head(5, r5)
    cases = [
        ("good", "one signature by the log", good, None),
        ("empty-tree", "size 0", head(0, root([])), None),
        ("cosigned", "lines by unknown keys are ignored", good + line("witness.example", text), None),
        ("extension", "extension lines are signed and ignored", note(text + "extension\n"), None),
        ("no-signature", "nothing after the blank line", text + "\n", "malformed"),
        ("unknown-key", "signed by a witness only", note(text, "witness.example"), "verification"),
        ("other-text", "signature over size 5 on size 6", good.replace("\n5\n", "\n6\n"), "verification"),
        ("other-origin", "the key's name is not the origin", note(text.replace(ORIGIN, "b.example")), "verification"),
        ("size-leading-zero", "05", note(text.replace("\n5\n", "\n05\n")), "malformed"),
        ("size-plus", "+5", note(text.replace("\n5\n", "\n+5\n")), "malformed"),
        ("size-2-63", "not a signed 64-bit number", note(text.replace("\n5\n", f"\n{2**63}\n")), "malformed"),
        ("root-short", "31 bytes", note(f"{ORIGIN}\n5\n{b64(r5[:31])}\n"), "malformed"),
        ("root-unpadded", "base64 without its =", note(text.replace("=", "")), "malformed"),
        ("crlf", "carriage returns", note(text.replace("\n", "\r\n")), "malformed"),
        ("hyphen", "a hyphen for the em dash", good.replace("\u2014", "-"), "malformed"),
        ("trailing-newline", "a byte more", good + "\n", "malformed"),
        (
            "trailing-bits",
            "base64 that re-encodes otherwise",
            good[:-3] + chr(ord(good[-3]) + 1) + good[-2:],
            "malformed",
        ),
    ]
    return [
        {"name": name, "why": why, "vkey": vkey(ORIGIN), "note": value, "error": error}
        | ({} if error else {"size": int(value.split("\n")[1]), "root": base64.b64decode(value.split("\n")[2]).hex()})
        for name, why, value, error in cases
    ]


def bundle(entries: list[bytes]) -> bytes:
    return b"".join(struct.pack(">H", len(entry)) + entry for entry in entries)


def bundles() -> list[dict]:
    full = bundle(ENTRIES[:256])
    cases = [
        ("none", "no entries", b"", 0, None),
        ("three", "one of them empty", bundle([b"a", b"", b"ccc"]), 3, None),
        ("full", "256 entries", full, 256, None),
        ("cut", "last byte missing", full[:-1], 256, "malformed"),
        ("cut-length", "half a length", full + b"\0", 257, "malformed"),
        ("one-more", "an entry more than named", full, 255, "malformed"),
        ("one-less", "an entry less than named", full, 257, "malformed"),
        ("overlong", "a length beyond the end", b"\xff\xff" + bytes(10), 1, "malformed"),
    ]
    return [
        {"name": name, "why": why, "bundle": data.hex(), "count": count, "error": error}
        | ({} if error else {"entries": [e.hex() for e in decode(data)]})
        for name, why, data, count, error in cases
    ]


def decode(data: bytes) -> list[bytes]:
    entries = []
    while data:
        (length,) = struct.unpack(">H", data[:2])
        entries.append(data[2 : 2 + length])
        data = data[2 + length :]
    return entries


def header(payload: bytes) -> bytes:
    fields = b"TGJ1" + struct.pack(">II", len(payload), zlib.crc32(payload))
    return fields + struct.pack(">I", zlib.crc32(fields))


def record(first: int, entries: list[bytes], signed: str) -> bytes:
    text = signed.encode()
    payload = struct.pack(">QII", first, len(entries), len(text)) + text + bundle(entries)
    return header(payload) + payload


def journal() -> list[dict]:
    zero = record(0, [], head(0, root([])))
    one = record(0, ENTRIES[:1], head(1, root(LEAVES[:1])))
    two = record(1, ENTRIES[1:3], head(3, root(LEAVES[:3])))
    all_ = zero + one + two
    flipped = bytearray(all_)
    flipped[-1] ^= 1
    lengthened = bytearray(all_)
    lengthened[len(zero) + len(one) + 4] ^= 1
    cases = [
        ("new", "the first record of a log", zero, 1, 0, False, None),
        ("three-records", "0, 1 and 2 entries", all_, 3, 0, False, None),
        ("empty", "created, not yet written", b"", 0, 0, False, None),
        ("closed", "a newer segment follows", all_ + header(b""), 3, 0, True, None),
        ("torn-header", "15 bytes of a header", all_ + one[:15], 3, 15, False, None),
        ("torn-payload", "one byte missing", all_ + two[:-1], 3, len(two) - 1, False, None),
        ("torn-zeros", "what a power cut can leave", all_ + bytes(100), 3, 100, False, None),
        ("flipped-bit", "in the last entry", bytes(flipped), 0, 0, False, "malformed"),
        (
            "flipped-length",
            "a longer length must not pass for a torn record",
            bytes(lengthened),
            0,
            0,
            False,
            "malformed",
        ),
        ("after-close", "bytes after the end", all_ + header(b"") + one, 0, 0, False, "malformed"),
        ("garbage", "neither record nor zeros", all_ + b"x" * 40, 0, 0, False, "malformed"),
        (
            "none-in-the-middle",
            "no entries, not at 0",
            record(3, [], head(3, root(LEAVES[:3]))),
            0,
            0,
            False,
            "malformed",
        ),
    ]
    return [
        {"name": name, "why": why, "segment": data.hex(), "records": count, "torn_bytes": torn, "closed": closed,
         "error": error}
        for name, why, data, count, torn, closed, error in cases
    ]  # fmt: skip


def proofs() -> list[dict]:
    def text(index: int, size: int, extra: str = "") -> str:
        hashes = "".join(b64(h) + "\n" for h in path(index, LEAVES[:size]))
        return f"c2sp.org/tlog-proof@v1\n{extra}index {index}\n{hashes}\n{head(size, root(LEAVES[:size]))}"

    good = text(200, 300)
    cases = [
        ("good", "entry 200 of 300", 200, good, None),
        ("extra", "with extra data, not authenticated", 200, text(200, 300, "extra aGVsbG8=\n"), None),
        ("single", "a tree of one needs no hashes", 0, text(0, 1), None),
        ("other-entry", "the neighbour's bytes", 201, good, "verification"),
        ("other-index", "index altered", 200, good.replace("index 200", "index 201"), "verification"),
        ("index-beyond", "index equals size", 200, good.replace("index 200", "index 300"), "verification"),
        ("other-version", "v2", 200, good.replace("@v1", "@v2"), "malformed"),
        ("leading-zero", "index 0200", 200, good.replace("index 200", "index 0200"), "malformed"),
        ("no-index", "line missing", 200, good.replace("index 200\n", ""), "malformed"),
        ("no-head", "cut after the hashes", 200, good.partition("\n\n")[0] + "\n\n", "malformed"),
        (
            "short-hash",
            "31 bytes",
            200,
            good.replace(b64(path(200, LEAVES)[0]), b64(path(200, LEAVES)[0][:31])),
            "malformed",
        ),
        (
            "one-hash-less",
            "first hash missing",
            200,
            good.replace(b64(path(200, LEAVES)[0]) + "\n", ""),
            "verification",
        ),
    ]
    return [
        {"name": name, "why": why, "vkey": vkey(ORIGIN), "entry": ENTRIES[entry].hex(), "proof": value, "error": error}
        for name, why, entry, value, error in cases
    ]


def main() -> None:
    for make in (merkle, tree_heads, bundles, journal, proofs):
        target = HERE / f"{make.__name__}.json"
        if target.exists():
            print(f"{target.name}: kept")
            continue
        target.write_text(json.dumps(make(), indent=1, ensure_ascii=False) + "\n")
        print(f"{target.name}: written")


if __name__ == "__main__":
    main()
