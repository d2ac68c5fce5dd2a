"""Trees and proofs against a second implementation that follows the RFC's recursive definitions word for word."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainguard.errors import Misuse, VerificationError
from trainguard.log import merkle

SIZES = 70
"""Exhaustive up to here: every size, index and pair of sizes; passes 64, a power of two, and its edges."""


def naive_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = largest_power_below(len(leaves))
    return hashlib.sha256(b"\x01" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def largest_power_below(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def naive_path(m: int, leaves: list[bytes]) -> list[bytes]:
    """PATH of RFC 6962 section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = largest_power_below(len(leaves))
    if m < k:
        return [*naive_path(m, leaves[:k]), naive_root(leaves[k:])]
    return [*naive_path(m - k, leaves[k:]), naive_root(leaves[:k])]


def naive_consistency(m: int, leaves: list[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF of RFC 6962 section 2.1.2."""
    if m == len(leaves):
        return [] if whole else [naive_root(leaves)]
    k = largest_power_below(len(leaves))
    if m <= k:
        return [*naive_consistency(m, leaves[:k], whole), naive_root(leaves[k:])]
    return [*naive_consistency(m - k, leaves[k:], False), naive_root(leaves[:k])]


LEAVES = [hashlib.sha256(b"\x00leaf %d" % i).digest() for i in range(SIZES)]
ROOTS = [naive_root(LEAVES[:size]) for size in range(SIZES + 1)]


def node(height: int, index: int) -> bytes:
    return naive_root(LEAVES[index << height : (index + 1) << height])


def test_leaf_and_node_hashes_are_those_of_the_rfc() -> None:
    """0x00 before an entry, 0x01 before two hashes."""
    assert merkle.leaf_hash(b"x") == hashlib.sha256(b"\x00x").digest()
    assert merkle.node_hash(b"l" * 32, b"r" * 32) == hashlib.sha256(b"\x01" + b"l" * 32 + b"r" * 32).digest()


def test_roots_of_every_small_size_agree_however_they_are_computed() -> None:
    """By appending one by one, in one go, and from perfect subtrees."""
    growing = merkle.Frontier()
    for size in range(SIZES + 1):
        whole = merkle.Frontier()
        whole.extend(LEAVES[:size])
        assert growing.root() == whole.root() == merkle.root_at(size, node) == ROOTS[size]
        assert merkle.Frontier.of(size, node) == whole
        growing.extend(LEAVES[size : size + 1])


def test_inclusion_proofs_of_every_small_size_and_index_are_the_rfcs_and_verify() -> None:
    """2,485 proofs: each equals the naive one and upholds."""
    for size in range(1, SIZES + 1):
        for index in range(size):
            path = merkle.inclusion_path(index, size, node)
            assert list(path) == naive_path(index, LEAVES[:size])
            merkle.verify_inclusion(LEAVES[index], index, size, path, ROOTS[size])


def test_consistency_proofs_of_every_pair_of_small_sizes_are_the_rfcs_and_verify() -> None:
    """2,556 proofs, sizes 0 and equal ones too."""
    for new in range(SIZES + 1):
        for old in range(new + 1):
            path = merkle.consistency_path(old, new, node)
            assert list(path) == ([] if old == 0 else naive_consistency(old, LEAVES[:new]))
            merkle.verify_consistency(old, ROOTS[old], new, ROOTS[new], path)


def test_an_inclusion_proof_holds_for_nothing_else() -> None:
    """Another index, size, leaf or root, one hash less, more, swapped or changed: all refused, sizes up to 20."""
    other = b"\x07" * 32
    for size in range(1, 21):
        for index in range(size):
            path = merkle.inclusion_path(index, size, node)
            good = (LEAVES[index], index, size, path, ROOTS[size])
            wrong = [(other, *good[1:]), (*good[:4], other), (*good[:3], (*path, other), good[4])]
            wrong += [(*good[:3], (other, *path), good[4]), (good[0], -1, *good[2:]), (good[0], size, *good[2:])]
            wrong += [(good[0], i, *good[2:]) for i in range(size) if i != index]
            wrong += [(*good[:3], path[:at] + path[at + 1 :], good[4]) for at in range(len(path))]
            wrong += [(*good[:3], (*path[:at], other, *path[at + 1 :]), good[4]) for at in range(len(path))]
            for arguments in wrong:
                with pytest.raises(VerificationError):
                    merkle.verify_inclusion(*arguments)


def test_a_consistency_proof_holds_for_nothing_else() -> None:
    """Another root on either side, sizes exchanged, hashes less, more or changed: all refused, sizes up to 20."""
    other = b"\x07" * 32
    for new in range(2, 21):
        for old in range(1, new):
            path = merkle.consistency_path(old, new, node)
            good = (old, ROOTS[old], new, ROOTS[new], path)
            wrong = [(old, other, *good[2:]), (*good[:3], other, path), (new, ROOTS[new], old, ROOTS[old], path)]
            wrong += [(*good[:4], (*path, other)), (*good[:4], ()), (*good[:4], (other, *path))]
            wrong += [(*good[:4], path[:at] + path[at + 1 :]) for at in range(len(path))]
            wrong += [(*good[:4], (*path[:at], other, *path[at + 1 :])) for at in range(len(path))]
            for arguments in wrong:
                with pytest.raises(VerificationError):
                    merkle.verify_consistency(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, b"\x07" * 32, 3, ROOTS[3], ()),
        (0, ROOTS[0], 3, ROOTS[3], (ROOTS[3],)),
        (3, ROOTS[3], 3, ROOTS[2], ()),
        (3, ROOTS[3], 3, ROOTS[3], (ROOTS[3],)),
        (2, ROOTS[2], 3, ROOTS[3], (LEAVES[2][:31],)),
        (2, ROOTS[2], 3, ROOTS[3], (LEAVES[2],) * 70),
    ],
)
def test_trivial_and_ill_formed_consistency_proofs_are_not_waved_through(arguments: tuple) -> None:
    """Size 0 needs the empty root, equal sizes equal roots, hashes 32 bytes, a path its limit."""
    with pytest.raises(VerificationError):
        merkle.verify_consistency(*arguments)


def test_a_proof_that_cannot_be_is_a_misuse() -> None:
    """Indexes and sizes outside the tree."""
    with pytest.raises(Misuse):
        merkle.inclusion_path(3, 3, node)
    with pytest.raises(Misuse):
        merkle.consistency_path(4, 3, node)


def test_levels_collect_the_hashes_of_tiles() -> None:
    """Every 256th leaf completes one hash of the level above, and every 65,536th one of the next."""
    levels: list[list[bytes]] = [[]]
    frontier = merkle.Frontier()
    leaves = [hashlib.sha256(b"%d" % i).digest() for i in range(65536 + 300)]
    frontier.extend(leaves, levels)
    assert levels[0] == leaves
    assert levels[1] == [naive_root(leaves[at : at + 256]) for at in range(0, 65536 + 256, 256)]
    assert levels[2] == [merkle.perfect_root(b"".join(leaves[:65536]))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12))
def test_the_same_leaves_in_any_batches_give_the_same_tree(batches: list[int]) -> None:
    """Whole or bit by bit."""
    leaves = [hashlib.sha256(b"%d" % i).digest() for i in range(sum(batches))]
    frontier, at = merkle.Frontier(), 0
    for count in batches:
        frontier.extend(leaves[at : at + count])
        at += count
    assert frontier.root() == naive_root(leaves)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 2**40), st.data())
def test_proofs_verify_in_trees_too_large_to_build(size: int, data: st.DataObject) -> None:
    """All leaves equal, so any perfect subtree has a known hash: sizes up to 2**40."""
    ladder = [b"\x11" * 32]
    while len(ladder) < 42:
        ladder.append(merkle.node_hash(ladder[-1], ladder[-1]))
    same = lambda height, _: ladder[height]  # noqa: E731
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size))
    root = merkle.root_at(size, same)
    merkle.verify_inclusion(ladder[0], index, size, merkle.inclusion_path(index, size, same), root)
    path = merkle.consistency_path(old, size, same)
    merkle.verify_consistency(old, merkle.root_at(old, same), size, root, path)
