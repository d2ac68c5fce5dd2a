"""Journal, edge and proof files: one encoder, one strict decoder, each the other's inverse."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.log import journal
from trainguard.log.edge import Edge, encode_edge, parse_edge, read_edge
from trainguard.log.journal import Record, Tail, encode_close, encode_record, parse_records
from trainguard.log.merkle import Frontier, leaf_hash
from trainguard.log.note import Signer
from trainguard.log.proof import Proof, encode_proof, parse_proof
from trainguard.log.tiles import encode_bundle
from trainguard.log.tree_head import sign_tree_head

SIGNER = Signer.of("log.example.org", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))

_batches = st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=5), max_size=6)


def segment(batches: list[list[bytes]]) -> tuple[bytes, list[int]]:
    """A segment of those commits after the record of size 0, and where each record ends."""
    data, size, ends = encode_record(0, 0, b"note", b""), 0, []
    ends.append(len(data))
    for batch in batches:
        data += encode_record(size, len(batch), b"note", encode_bundle(batch))
        size += len(batch)
        ends.append(len(data))
    return data, ends


@settings(deadline=None)
@given(_batches, st.booleans())
def test_a_segment_reads_back_as_it_was_written(batches: list[list[bytes]], closed: bool) -> None:
    """Records, their places and the end; from any record on as from the start."""
    data, ends = segment(batches)
    *records, tail = parse_records(data + (encode_close() if closed else b""), where="s")
    assert [record.entries for record in records] == [[], *batches]
    assert [record.end for record in records] == ends
    assert tail == Tail(len(data), closed=closed)
    *later, _ = parse_records(data[ends[0] :], base=ends[0], where="s")
    assert later == records[1:]


@settings(deadline=None)
@given(_batches, st.data())
def test_a_segment_cut_anywhere_is_its_whole_records_and_a_torn_end(
    batches: list[list[bytes]], data: st.DataObject
) -> None:
    """No cut is taken for damage, and none loses a whole record."""
    whole, ends = segment(batches)
    cut = data.draw(st.integers(0, len(whole)))
    *records, tail = parse_records(whole[:cut], where="s")
    kept = [end for end in ends if end <= cut]
    assert [record.end for record in records] == kept
    assert tail == Tail(kept[-1] if kept else 0, torn_bytes=cut - (kept[-1] if kept else 0))


@settings(deadline=None)
@given(_batches, st.data())
def test_any_flipped_bit_of_a_segment_is_damage(batches: list[list[bytes]], data: st.DataObject) -> None:
    """Never a torn end, never another record."""
    whole = bytearray(segment(batches)[0])
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(MalformedEvidence):
        list(parse_records(bytes(whole), where="s"))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_segment_or_malformed(data: bytes) -> None:
    """No other exception, with and without a sound header before them."""
    for prefix in (b"", encode_record(0, 0, b"n", b""), b"TGJ1"):
        with contextlib.suppress(MalformedEvidence):
            *_, tail = parse_records(prefix + data, where="s")
            assert isinstance(tail, Tail)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(15),
        bytes(12) + b"\xff\xff\xff\xff",
        bytes(11) + b"\x01" + bytes(4),
        bytes(8) + b"\xff" * 4 + bytes(4),
    ],
)
def test_a_record_with_a_right_checksum_and_a_wrong_content_is_malformed(payload: bytes) -> None:
    """Too short, a note beyond the end, entries that are not there."""
    fields = b"TGJ1" + len(payload).to_bytes(4, "big") + zlib.crc32(payload).to_bytes(4, "big")
    with pytest.raises(MalformedEvidence):
        list(parse_records(fields + zlib.crc32(fields).to_bytes(4, "big") + payload + b"x", where="s"))


def test_a_record_longer_than_the_limit_is_refused_before_it_is_read() -> None:
    """The length is bounded first."""
    fields = b"TGJ1" + (journal.RECORD_LIMIT_BYTES + 1).to_bytes(4, "big") + bytes(4)
    with pytest.raises(MalformedEvidence, match="damaged header"):
        list(parse_records(fields + zlib.crc32(fields).to_bytes(4, "big"), where="s"))


def test_a_walk_refuses_gaps_between_and_inside_segments(tmp_path: Path) -> None:
    """Every entry follows the one before, across files."""
    (tmp_path / "journal").mkdir()
    data, _ = segment([[b"a"], [b"b"]])
    journal.segment_path(tmp_path, 0).write_bytes(data)
    start = journal.find(tmp_path, 1)
    assert start is not None
    assert [item.size for _, item in journal.walk(tmp_path, start) if isinstance(item, Record)] == [0, 1, 2]
    journal.segment_path(tmp_path, 3).write_bytes(encode_record(3, 1, b"n", b"\0\1c"))
    with pytest.raises(MalformedEvidence, match="begins with entry 2"):
        list(journal.walk(tmp_path, start))
    journal.segment_path(tmp_path, 3).unlink()
    journal.segment_path(tmp_path, 2).write_bytes(encode_record(3, 1, b"n", b"\0\1c"))
    with pytest.raises(MalformedEvidence, match="expected entry 2, found 3"):
        list(journal.walk(tmp_path, start))
    journal.segment_path(tmp_path, 0).write_bytes(data + b"torn")
    with pytest.raises(MalformedEvidence, match="yet newer segments follow"):
        list(journal.walk(tmp_path, start))
    assert journal.find(tmp_path / "nowhere", 0) is None


def test_a_segment_that_is_a_link_or_a_folder_is_not_read(tmp_path: Path) -> None:
    """Journals are regular files."""
    (tmp_path / "journal").mkdir()
    os.symlink("/dev/zero", journal.segment_path(tmp_path, 0))
    with pytest.raises(Unavailable):
        journal.read_segment(tmp_path, 0)
    journal.segment_path(tmp_path, 1).mkdir()
    with pytest.raises(MalformedEvidence):
        journal.read_segment(tmp_path, 1)
    os.mkfifo(journal.segment_path(tmp_path, 2))
    with pytest.raises(MalformedEvidence):
        journal.read_segment(tmp_path, 2)


def edge_of(count: int) -> Edge:
    frontier = Frontier()
    frontier.extend([leaf_hash(b"%d" % i) for i in range(count)])
    return Edge(7, 1234, sign_tree_head(count, frontier.root(), SIGNER), frontier)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 256, 1000])
def test_edges_round_trip(count: int) -> None:
    """parse ∘ encode is the identity."""
    edge = edge_of(count)
    assert parse_edge(encode_edge(edge), SIGNER.verifier, where="e") == edge


def test_any_flipped_bit_or_missing_byte_of_an_edge_is_refused() -> None:
    """Exhaustive for a small one."""
    data = encode_edge(edge_of(5))
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerificationError):
            parse_edge(bytes(flipped), SIGNER.verifier, where="e")
    for length in range(len(data)):
        with pytest.raises(VerificationError):
            parse_edge(data[:length], SIGNER.verifier, where="e")


def test_an_edge_with_other_hashes_under_a_right_checksum_is_refused() -> None:
    """The signed root decides, not the checksum; so do their number and the key."""
    good = edge_of(5)
    for peaks in ([bytes(32), good.frontier.peaks[1]], good.frontier.peaks[:1], [*good.frontier.peaks, bytes(32)]):
        forged = Edge(good.segment, good.offset, good.head, Frontier(5, peaks))
        with pytest.raises(VerificationError):
            parse_edge(encode_edge(forged), SIGNER.verifier, where="e")
    other = Signer.of("other.example", SIGNER.key)
    with pytest.raises(VerificationError):
        parse_edge(encode_edge(good), other.verifier, where="e")


def test_an_empty_edge_is_none(tmp_path: Path) -> None:
    """What a power cut can leave of a file that is never synced."""
    assert read_edge(tmp_path, SIGNER.verifier) is None
    (tmp_path / "edge").touch()
    assert read_edge(tmp_path, SIGNER.verifier) is None


_proofs = st.builds(
    Proof,
    index=st.integers(0, 2**63 - 1),
    path=st.lists(st.binary(min_size=32, max_size=32), max_size=64).map(tuple),
    note=st.just(sign_tree_head(1, bytes(32), SIGNER).note),
    extra=st.none() | st.binary(max_size=100),
)


@settings(deadline=None)
@given(_proofs)
def test_proofs_round_trip(proof: Proof) -> None:
    """parse ∘ encode is the identity, extra data or not."""
    assert parse_proof(encode_proof(proof).encode()) == proof


@settings(deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda t: f"c2sp.org/tlog-proof@v1\n{t}".encode()))
def test_any_bytes_are_a_proof_or_malformed(data: bytes) -> None:
    """What parses encodes to the same bytes."""
    try:
        proof = parse_proof(data)
    except MalformedEvidence:
        return
    assert encode_proof(proof).encode() == data
