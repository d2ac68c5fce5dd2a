"""Identities and cards: strict, private, and no more than they prove."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainguard.cases.identity import (
    create_identity,
    fingerprint,
    load_identity,
    new_identity,
    parse_card,
    read_approvers,
)
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError, Unavailable, VerificationError


def test_an_identity_is_made_once_and_read_back(tmp_path: Path):
    """In a file that only its owner reads."""
    path = tmp_path / "a" / "identity.json"
    made = create_identity(path, name="mara", accounts=("mara",))
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_identity(path).card == made.card
    with pytest.raises(Misuse, match="there already"):
        create_identity(path, name="mara")
    path.chmod(0o640)
    with pytest.raises(Misuse, match="found mode 640"):
        load_identity(path)
    with pytest.raises(Unavailable, match="no identity here"):
        load_identity(tmp_path / "none")


def test_a_passphrase_is_needed_where_one_was_set(tmp_path: Path):
    """Missing and wrong are told apart; neither opens it."""
    path = tmp_path / "identity.json"
    made = create_identity(path, name="mara", passphrase=b"correct horse")
    assert load_identity(path, passphrase=b"correct horse").key == made.key
    with pytest.raises(Misuse, match="needs its passphrase"):
        load_identity(path)
    with pytest.raises(Misuse, match="does not fit"):
        load_identity(path, passphrase=b"wrong")


def test_a_card_is_signed_by_the_key_it_names(tmp_path: Path):
    """Another name over the same signature, or another's key, does not hold."""
    made = new_identity("mara", accounts=("mara",))
    assert parse_card(made.card_bytes(), where="card") == made.card
    outer = json.loads(made.card_bytes())
    outer["payload"] = json.loads(new_identity("eve").card_bytes())["payload"]
    with pytest.raises(VerificationError):
        parse_card(json.dumps(outer).encode(), where="card")
    assert fingerprint(made.key).replace(" ", "") == made.key[:16]


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"payload":"e30=","signatures":[{}]}', b"x" * (17 << 10)])
def test_what_is_no_card_is_one_sentence(data: bytes):
    """Never another exception."""
    with pytest.raises(VerificationError):
        parse_card(data, where="card")


@pytest.mark.parametrize("name", ["", "a\nb", "-x", "x" * 65, "<b>"])
def test_a_name_is_what_can_be_read_to_somebody(name: str):
    """No markup, no line breaks, not endless."""
    with pytest.raises(Misuse, match="name: expected"):
        new_identity(name)
    with pytest.raises(Misuse, match="accounts: expected"):
        new_identity("x", accounts=("a\x1b[31m",))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema":"x","card":{},"signing":"","sealing":""}'])
def test_a_file_that_is_no_identity(tmp_path: Path, text: str):
    """Is said to be none."""
    path = tmp_path / "identity.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(MalformedEvidence, match="not an identity"):
        load_identity(path)


def test_a_site_does_not_lose_an_approver_unnoticed(tmp_path: Path):
    """No folder: none are named. A card that does not hold: said, and not skipped."""
    assert read_approvers(tmp_path / "none") == ()
    (tmp_path / "a.card").write_bytes(new_identity("mara").card_bytes())
    assert [card.name for card in read_approvers(tmp_path)] == ["mara"]
    (tmp_path / "b.card").write_bytes(b"{}")
    with pytest.raises(TrainguardError):
        read_approvers(tmp_path)
