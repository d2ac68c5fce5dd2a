"""Signed notes and tree heads: the bytes of the specifications, and refusal of everything else."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trainguard.errors import MalformedEvidence, Misuse, VerificationError
from trainguard.log.note import (
    Note,
    Signature,
    Signer,
    check_name,
    encode_note,
    parse_note,
    parse_vkey,
    sign_note,
    verify_note,
)
from trainguard.log.tree_head import encode_body, parse_body, parse_decimal, sign_tree_head, verify_tree_head

SIGNER = Signer.of("example.org/log", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = Signer.of("witness.example", Ed25519PrivateKey.from_private_bytes(bytes(32)))
NOTE = sign_note("some text\n", SIGNER)

PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_NOTE = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
"""The example of Go's package sumdb/note: a key and note made by another implementation."""


def test_a_note_and_key_made_by_another_implementation_verify() -> None:
    """The documented example of golang.org/x/mod/sumdb/note."""
    verifier = parse_vkey(PETER)
    assert verifier.vkey == PETER
    assert verify_note(PETER_NOTE.encode(), verifier, where="note").startswith("If you think cryptography")


def test_signing_verifying_and_the_text_form_of_a_key_are_inverses() -> None:
    """What is signed verifies with the key parsed from its own text."""
    assert verify_note(NOTE.encode(), parse_vkey(SIGNER.verifier.vkey), where="note") == "some text\n"
    assert parse_vkey(SIGNER.verifier.vkey + "\n") == SIGNER.verifier


def test_signatures_by_unknown_keys_are_ignored_but_not_enough() -> None:
    """A witness's line beside the log's changes nothing; alone it proves nothing."""
    both = NOTE + sign_note("some text\n", OTHER).rpartition("\n\n")[2]
    assert verify_note(both.encode(), SIGNER.verifier, where="note") == "some text\n"
    with pytest.raises(VerificationError, match="expected a signature by example"):
        verify_note(sign_note("some text\n", OTHER).encode(), SIGNER.verifier, where="note")


def test_a_failing_signature_by_the_known_key_refuses_the_note_even_beside_a_good_one() -> None:
    """C2SP: clients should reject the whole note."""
    bad = Signature(name=SIGNER.name, key_id=SIGNER.verifier.key_id, value=bytes(64))
    good = parse_note(NOTE.encode(), where="note").signatures[0]
    for order in ((bad, good), (good, bad), (bad,)):
        note = encode_note(Note(text="some text\n", signatures=order))
        with pytest.raises(VerificationError, match="not over this text"):
            verify_note(note.encode(), SIGNER.verifier, where="note")


def test_the_same_name_with_another_key_id_is_an_unknown_key() -> None:
    """Name and id together name a key."""
    impostor = Signer.of(SIGNER.name, OTHER.key)
    with pytest.raises(VerificationError, match="expected a signature"):
        verify_note(sign_note("some text\n", impostor).encode(), SIGNER.verifier, where="note")


LINE = NOTE.rpartition("\n\n")[2]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text\n",
        b"text\n\n",
        b"text" + LINE.encode(),
        f"text\n{LINE}".encode(),
        f"\n\n{LINE}"[1:].encode(),
        NOTE[:-1].encode(),
        (NOTE + "\n").encode(),
        (NOTE + "x\n").encode(),
        NOTE.encode() + b"\xff",
        NOTE.replace("some", "so\tme").encode(),
        NOTE.replace("some", "so\rme").encode(),
        NOTE.replace("some", "so\0me").encode(),
        NOTE.replace("— ", "- ").encode(),
        NOTE.replace("— ", "—  ").encode(),
        NOTE.replace("example.org/log ", "example.org/log").encode(),
        NOTE.replace("example.org/log", "example+org").encode(),
        NOTE.replace("example.org/log", "example\u00a0org").encode(),
        f"text\n\n— n {base64.b64encode(bytes(4)).decode()}\n".encode(),
        "text\n\n— n AAAAAAB=\n".encode(),
        "text\n\n— n AAAAAAA\n".encode(),
        "text\n\n— n AAAA AAAA\n".encode(),
        "text\n\n— n !!!!AAAAAAA=\n".encode(),
        ("text\n\n" + LINE * 101).encode(),
        b"x" * (1 << 20) + NOTE.encode(),
    ],
)
def test_anything_the_note_format_forbids_is_malformed(data: bytes) -> None:
    """One kind of error for all of it, and no other exception."""
    with pytest.raises(MalformedEvidence, match="here"):
        parse_note(data, where="here")


def test_a_text_may_hold_blank_lines_and_16_signatures_are_taken() -> None:
    """The signatures begin after the last blank line; C2SP asks for room for 16."""
    note = sign_note("one\n\ntwo\n", SIGNER)
    assert verify_note((note + LINE * 0).encode(), SIGNER.verifier, where="note") == "one\n\ntwo\n"
    assert len(parse_note(("one\n\ntwo\n\n" + LINE * 16).encode(), where="note").signatures) == 16


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u2003b", "a\nb", "a\x00b", "x" * 256])
def test_a_name_that_cannot_name_a_key_is_refused(name: str) -> None:
    """Empty, with a space of any alphabet, a plus, a control character, or too long."""
    with pytest.raises(MalformedEvidence):
        check_name(name)
    with pytest.raises((Misuse, MalformedEvidence)):
        encode_note(Note(text="t\n", signatures=(Signature(name=name, key_id=1, value=b"x"),)))


@pytest.mark.parametrize(
    "vkey",
    [
        "",
        "name",
        "name+12345678",
        PETER.replace("c74f20a3", "c74f20a4"),
        PETER.replace("c74f20a3", "C74F20A3"),
        PETER[:-4],
        PETER.replace("PeterNeumann", "Peter Neumann"),
        PETER + "\n\n",
        "n+00000000+" + base64.b64encode(b"\x02" + bytes(32)).decode(),
        "n+00000000+",
        "x" * 1000,
    ],
)
def test_a_vkey_that_is_not_one_is_refused(vkey: str) -> None:
    """Wrong id, type, length, case or base64."""
    with pytest.raises(MalformedEvidence):
        parse_vkey(vkey)


def test_a_tree_head_has_the_bytes_of_the_specification() -> None:
    """Origin, size, root, blank line, signature."""
    head = sign_tree_head(7, b"\xaa" * 32, SIGNER)
    root = base64.b64encode(b"\xaa" * 32).decode()
    assert head.note.startswith(f"example.org/log\n7\n{root}\n\n— example.org/log ")
    assert verify_tree_head(head.note.encode(), SIGNER.verifier, where="head") == head


def test_extension_lines_are_signed_and_ignored() -> None:
    """C2SP lets a log add lines; they are no part of a TreeHead."""
    note = sign_note(encode_body(SIGNER.name, 1, bytes(32)) + "more\n", SIGNER)
    assert verify_tree_head(note.encode(), SIGNER.verifier, where="head").size == 1


@pytest.mark.parametrize(
    "body",
    [
        "example.org/log\n",
        "example.org/log\n1\n",
        "example.org/log\n01\n" + encode_body("x", 0, bytes(32)).split("\n", 2)[2],
        "example.org/log\n+1\n" + encode_body("x", 0, bytes(32)).split("\n", 2)[2],
        "example.org/log\n-1\n" + encode_body("x", 0, bytes(32)).split("\n", 2)[2],
        "example.org/log\n١\n" + encode_body("x", 0, bytes(32)).split("\n", 2)[2],
        f"example.org/log\n{2**63}\n" + encode_body("x", 0, bytes(32)).split("\n", 2)[2],
        "example.org/log\n1\nAAAA\n",
        encode_body("example.org/log", 1, bytes(31)),
        encode_body("example.org/log", 1, bytes(32)) + "\n",
        encode_body("example.org/log", 1, bytes(32)) + "ext\n\next\n",
        encode_body("", 1, bytes(32)),
    ],
)
def test_a_signed_text_that_is_no_tree_head_is_malformed(body: str) -> None:
    """A good signature does not excuse a bad body."""
    with pytest.raises(MalformedEvidence):
        verify_tree_head(sign_note(body, SIGNER).encode(), SIGNER.verifier, where="head")


def test_a_tree_head_of_another_origin_is_refused() -> None:
    """A key signs for its own log only."""
    note = sign_note(encode_body("example.org/other", 1, bytes(32)), SIGNER)
    with pytest.raises(VerificationError, match="expected origin"):
        verify_tree_head(note.encode(), SIGNER.verifier, where="head")


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32))
def test_bodies_round_trip(size: int, root: bytes) -> None:
    """parse ∘ encode is the identity, and sizes have one spelling."""
    assert parse_body(encode_body("o", size, root), where="b") == ("o", size, root)
    assert parse_decimal(str(size), where="n") == size


_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), min_size=1).map(lambda t: t + "\n")
_names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters="+"), min_size=1)
_signatures = st.builds(
    Signature,
    name=_names.filter(lambda n: len(n.encode()) < 256),
    key_id=st.integers(0, 2**32 - 1),
    value=st.binary(min_size=1, max_size=80),
)


@settings(deadline=None)
@given(_texts, st.lists(_signatures, min_size=1, max_size=5))
def test_notes_round_trip(text: str, signatures: list[Signature]) -> None:
    """encode, then parse, gives the same note; what parses re-encodes to the same bytes."""
    note = Note(text=text, signatures=tuple(signatures))
    encoded = encode_note(note)
    assert parse_note(encoded.encode(), where="n") == note


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_parse_or_are_malformed(data: bytes) -> None:
    """Nothing but MalformedEvidence comes out, and what parses means exactly those bytes."""
    try:
        note = parse_note(data, where="n")
    except MalformedEvidence:
        return
    assert encode_note(note).encode() == data


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * len(NOTE.encode()) - 1))
def test_any_flipped_bit_of_a_signed_note_is_refused(bit: int) -> None:
    """Text, name, key id, signature, punctuation: each bit counts."""
    data = bytearray(NOTE.encode())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(VerificationError):
        verify_note(bytes(data), SIGNER.verifier, where="note")
