"""Merkle trees of RFC 6962 section 2.1 over plain values: hashes, proofs, and their verification.

Nothing here reads a file. The tree is reached through one function, `node(height, index)`: the hash of the perfect
subtree over leaves `[index << height, (index + 1) << height)`. Verification follows RFC 9162 sections 2.1.3.2 and
2.1.4.2, written apart from the construction so that one checks the other.

    frontier = Frontier()
    frontier.extend([leaf_hash(entry) for entry in entries])
    frontier.root()                                  # MTH(entries)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from trainguard.errors import Misuse, VerificationError

HASH_BYTES = 32
SIZE_LIMIT = 1 << 63
"""Tree sizes are below this: 64-bit readers keep them in a signed integer."""
PATH_LIMIT = 64
"""No proof in a tree below SIZE_LIMIT has more hashes (a consistency proof has at most one more than the height)."""

EMPTY_ROOT = hashlib.sha256(b"").digest()
"""MTH({}) of RFC 6962."""

TILE_HEIGHT = 8
"""Tile levels are this many tree levels apart (C2SP tlog-tiles)."""

Node = Callable[[int, int], bytes]
"""(height, index) → hash of that perfect subtree, 32 bytes."""

_sha256 = hashlib.sha256


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry)."""
    return _sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return _sha256(b"\x01" + left + right).digest()


def perfect_root(hashes: bytes) -> bytes:
    """Root of a perfect tree over concatenated hashes; their count is a power of two."""
    while len(hashes) > HASH_BYTES:
        hashes = b"".join([_sha256(b"\x01" + hashes[at : at + 64]).digest() for at in range(0, len(hashes), 64)])
    return hashes


def split(size: int) -> int:
    """The largest power of two below `size` (size > 1): where RFC 6962 divides a tree."""
    return 1 << ((size - 1).bit_length() - 1)


def peaks(size: int) -> Iterator[tuple[int, int]]:
    """(height, index) of the perfect subtrees that make up a tree of `size` leaves, left to right."""
    start = 0
    for height in reversed(range(size.bit_length())):
        if size >> height & 1:
            yield height, start >> height
            start += 1 << height


def fold_peaks(hashes: Sequence[bytes]) -> bytes:
    """The root over peaks given left to right; the empty tree's root when there are none."""
    if not hashes:
        return EMPTY_ROOT
    root = hashes[-1]
    for peak in reversed(hashes[:-1]):
        root = node_hash(peak, root)
    return root


def root_at(size: int, node: Node) -> bytes:
    """Root of the first `size` leaves of the tree that `node` reads."""
    return fold_peaks([node(height, index) for height, index in peaks(size)])


@dataclass(slots=True)
class Frontier:
    """The right edge of a growing tree: all that appending needs, at most 63 hashes.

    The one mutable value here; `peaks` holds the hashes of `peaks(size)`, left to right.
    """

    size: int = 0
    peaks: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, size: int, node: Node) -> Frontier:
        """The frontier of the first `size` leaves of an existing tree."""
        return cls(size, [node(height, index) for height, index in peaks(size)])

    def copy(self) -> Frontier:
        return Frontier(self.size, list(self.peaks))

    def root(self) -> bytes:
        return fold_peaks(self.peaks)

    def extend(self, leaves: Iterable[bytes], levels: list[list[bytes]] | None = None) -> None:
        """Append leaf hashes. `levels[k]`, where given, collects every subtree of height 8·k that this completes."""
        stack, size = self.peaks, self.size
        for node in leaves:
            if levels is not None:
                levels[0].append(node)
            height, rest = 0, size
            while rest & 1:
                node = _sha256(b"\x01" + stack.pop() + node).digest()
                rest >>= 1
                height += 1
                if levels is not None and not height % TILE_HEIGHT:
                    _collect(levels, height // TILE_HEIGHT, node)
            stack.append(node)
            size += 1
        self.size = size


def _collect(levels: list[list[bytes]], level: int, node: bytes) -> None:
    while len(levels) <= level:
        levels.append([])
    levels[level].append(node)


def inclusion_path(index: int, size: int, node: Node) -> tuple[bytes, ...]:
    """PATH(index, D[size]) of RFC 6962 section 2.1.1: from the leaf's sibling up to the root's child."""
    if not 0 <= index < size:
        raise Misuse(f"inclusion proof: expected an index below the tree size {size}, found {index}")
    path: list[bytes] = []
    low, high = 0, size
    while high - low > 1:
        middle = low + split(high - low)
        if index < middle:
            path.append(_range_root(middle, high, node))
            high = middle
        else:
            path.append(_range_root(low, middle, node))
            low = middle
    return tuple(reversed(path))


def consistency_path(old: int, new: int, node: Node) -> tuple[bytes, ...]:
    """PROOF(old, D[new]) of RFC 6962 section 2.1.2. Empty where `old` is 0 or equals `new`."""
    if not 0 <= old <= new:
        raise Misuse(f"consistency proof: expected sizes 0 <= old <= new, found {old} and {new}")
    if old in (0, new):
        return ()
    path: list[bytes] = []
    low, high, whole = 0, new, True
    while old < high:
        middle = low + split(high - low)
        if old <= middle:
            path.append(_range_root(middle, high, node))
            high = middle
        else:
            path.append(_range_root(low, middle, node))
            low, whole = middle, False
    if not whole:
        path.append(_range_root(low, high, node))
    return tuple(reversed(path))


def _range_root(low: int, high: int, node: Node) -> bytes:
    """MTH(D[low:high]) for a range that RFC 6962's division makes: every left part is perfect and aligned."""
    hashes = []
    while low < high:
        height = (high - low).bit_length() - 1
        hashes.append(node(height, low >> height))
        low += 1 << height
    return fold_peaks(hashes)


def verify_inclusion(
    leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes, *, where: str = "inclusion proof"
) -> None:
    """Raise VerificationError unless `leaf` is at `index` of the tree `(size, root)` (RFC 9162 section 2.1.3.2)."""
    _check_hashes((leaf, root, *path), where)
    if not 0 <= index < size < SIZE_LIMIT:
        raise VerificationError(f"{where}: expected an index below the tree size {size}, found {index}")
    fn, sn, computed = index, size - 1, leaf
    for sibling in path:
        if sn == 0:
            raise VerificationError(f"{where}: {len(path)} hashes are more than leaf {index} of {size} needs")
        if fn & 1 or fn == sn:
            computed = node_hash(sibling, computed)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            computed = node_hash(computed, sibling)
        fn >>= 1
        sn >>= 1
    if sn != 0:
        raise VerificationError(f"{where}: {len(path)} hashes are fewer than leaf {index} of {size} needs")
    if computed != root:
        raise VerificationError(
            f"{where}: leaf {index} of {size}: expected root {root.hex()}, computed {computed.hex()}"
        )


def verify_consistency(
    old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes], *, where: str = "consistency proof"
) -> None:
    """Raise VerificationError unless the tree `(new, new_root)` extends `(old, old_root)` (RFC 9162 section 2.1.4.2).

    Size 0, which the RFC leaves out, is consistent with everything by an empty proof, if its root is MTH({}).
    """
    _check_hashes((old_root, new_root, *path), where)
    if not 0 <= old <= new < SIZE_LIMIT:
        raise VerificationError(f"{where}: expected sizes 0 <= old <= new, found {old} and {new}")
    if old in (0, new):
        _verify_trivial(old, old_root, new, new_root, path, where)
        return
    nodes = list(path) if old & (old - 1) else [old_root, *path]
    if not nodes:
        raise VerificationError(f"{where}: no hashes for sizes {old} and {new}")
    fn, sn = old - 1, new - 1
    while fn & 1:
        fn >>= 1
        sn >>= 1
    from_old = from_new = nodes[0]
    for sibling in nodes[1:]:
        if sn == 0:
            raise VerificationError(f"{where}: {len(path)} hashes are more than sizes {old} and {new} need")
        if fn & 1 or fn == sn:
            from_old, from_new = node_hash(sibling, from_old), node_hash(sibling, from_new)
            while not fn & 1 and fn:
                fn >>= 1
                sn >>= 1
        else:
            from_new = node_hash(from_new, sibling)
        fn >>= 1
        sn >>= 1
    if sn != 0:
        raise VerificationError(f"{where}: {len(path)} hashes are fewer than sizes {old} and {new} need")
    if (from_old, from_new) != (old_root, new_root):
        raise VerificationError(f"{where}: the tree of size {new} does not extend the one of size {old}")


def _verify_trivial(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes], where: str) -> None:
    if path:
        raise VerificationError(f"{where}: expected no hashes for sizes {old} and {new}, found {len(path)}")
    if old == 0 and old_root != EMPTY_ROOT:
        raise VerificationError(f"{where}: size 0 with the root {old_root.hex()}, which is not the empty tree's")
    if old == new and old_root != new_root:
        raise VerificationError(f"{where}: two roots for size {old}: {old_root.hex()} and {new_root.hex()}")


def _check_hashes(hashes: Sequence[bytes], where: str) -> None:
    if len(hashes) > PATH_LIMIT + 2:
        raise VerificationError(f"{where}: {len(hashes) - 2} hashes, limit {PATH_LIMIT}")
    for value in hashes:
        if len(value) != HASH_BYTES:
            raise VerificationError(f"{where}: expected hashes of {HASH_BYTES} bytes, found one of {len(value)}")
