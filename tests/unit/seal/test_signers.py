"""The trust file of signers: strictly read, and a key counts only for its time."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trainguard.envelope import public_pem
from trainguard.errors import MalformedEvidence, Unavailable
from trainguard.seal.signers import (
    LIMIT_BYTES,
    Signer,
    When,
    Witness,
    judge,
    load_signers,
    parse_signers,
    witnessed_at,
)

KEY = ec.derive_private_key(7, ec.SECP256R1()).public_key()
PEM = public_pem(KEY).decode()
HEAD = 'schema = "trainguard/signers/v1"\n'


def table(more: str = "", *, name: str = "a", pem: str = PEM) -> str:
    return f'[[signer]]\nname = "{name}"\nkey = """\n{pem}"""\n{more}\n'


def witness_vkey(name: str, key: Ed25519PrivateKey, kind: bytes = b"\x04") -> str:
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    number = hashlib.sha256(name.encode() + b"\n" + kind + raw).digest()[:4]
    return f"{name}+{number.hex()}+{base64.b64encode(kind + raw).decode()}"


def test_a_trust_file_is_read_whole() -> None:
    """Names, keys, times with any zone, reason, witnesses."""
    other = public_pem(ec.derive_private_key(8, ec.SECP256R1()).public_key()).decode()
    text = HEAD + table("not_before = 1970-01-01T01:00:00+01:00\nnot_after = 1970-01-01T00:01:00Z")
    text += table('revoked = 1970-01-01T00:00:30.5Z\nreason = "lost"', name="b", pem=other)
    text += f'[[witness]]\nvkey = "{witness_vkey("w.example", Ed25519PrivateKey.generate())}"\n'
    signers = parse_signers(text.encode(), where="t")
    first, second = signers.signers
    assert (first.name, first.not_before, first.not_after, first.revoked) == ("a", 0.0, 60.0, None)
    assert (second.name, second.revoked, second.reason) == ("b", 30.5, "lost")
    assert signers.find(first.fingerprint) is first
    assert signers.find("0" * 64) is None
    assert [witness.name for witness in signers.witnesses] == ["w.example"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected schema"),
        ('schema = "trainguard/signers/v2"\n' + table(), "expected schema"),
        (HEAD, "no \\[\\[signer\\]\\]"),
        (HEAD + "signer = 3", "expected \\[\\[signer\\]\\] tables"),
        (HEAD + "extra = 1\n" + table(), "'extra' is none of"),
        (HEAD + table("not_befor = 2026-01-01T00:00:00Z"), "'not_befor' is none of"),
        (HEAD + table("not_after = 2026-01-01T00:00:00"), "with its zone"),
        (HEAD + table("not_after = 2026-01-01"), "with its zone"),
        (HEAD + table('not_after = "2026-01-01T00:00:00Z"'), "with its zone"),
        (HEAD + table("not_before = 2027-01-01T00:00:00Z\nnot_after = 2026-01-01T00:00:00Z"), "lies before"),
        (HEAD + table('reason = "x"'), "reason without revoked"),
        (HEAD + table('revoked = 2026-01-01T00:00:00Z\nreason = "\\u001b[31m"'), "printable"),
        (HEAD + table() + table(name="b"), "key .* stands twice"),
        (HEAD + table() + table(pem=PEM.replace("a", "b", 1)), "PEM|twice"),
        (HEAD + table(name="a b"), "signer name"),
        (HEAD + table(name="\\u202e"), "signer name"),
        (HEAD + '[[signer]]\nname = "a"\n', "public key in PEM"),
        (HEAD + '[[signer]]\nname = "a"\nkey = "/etc/passwd"\n', "public key in PEM"),
        (HEAD + table() + "[[signer]]\nname = 'a'", "PEM|twice"),
        (HEAD + table() + "[[witness]]\nvkey = 'x'", "expected vkey"),
        (HEAD + table() + "name = 'a'\nname = 'a'", "not a trust file"),
        ("\x00", "not a trust file"),
        ("a" * (LIMIT_BYTES + 1), "limit of a trust file"),
        ("a = " + "[" * 100_000, "not a trust file"),
    ],
)
def test_what_is_no_trust_file_is_refused_in_one_sentence(text: str, why: str) -> None:
    """Unknown fields, times without a zone, doubled keys: each would let a rule silently not apply."""
    with pytest.raises(MalformedEvidence, match=why) as refused:
        parse_signers(text.encode(), where="trust.toml")
    assert str(refused.value).startswith("trust.toml: ")
    assert "\n" not in str(refused.value)


def test_another_kind_of_key_is_refused() -> None:
    """P-384 and Ed25519 keys sign no seals; a witness needs a cosignature key."""
    for key in (ec.generate_private_key(ec.SECP384R1()).public_key(), Ed25519PrivateKey.generate().public_key()):
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        with pytest.raises(MalformedEvidence, match="P-256"):
            parse_signers((HEAD + table(pem=pem)).encode(), where="t")
    vkey = witness_vkey("w", Ed25519PrivateKey.generate(), b"\x01")
    with pytest.raises(MalformedEvidence, match="type 04"):
        parse_signers(f'{HEAD}{table()}[[witness]]\nvkey = "{vkey}"'.encode(), where="t")
    vkey = witness_vkey("w", Ed25519PrivateKey.generate()).replace("w+", "v+")
    with pytest.raises(MalformedEvidence, match="key id"):
        parse_signers(f'{HEAD}{table()}[[witness]]\nvkey = "{vkey}"'.encode(), where="t")


def test_a_trust_file_that_cannot_be_read_is_unavailable(tmp_path: Path) -> None:
    """Not there, a folder, a name with a zero byte."""
    for path in (tmp_path / "none", tmp_path, Path("a\0b")):
        with pytest.raises(Unavailable, match="trust file"):
            load_signers(path)


def signer(**times: float) -> Signer:
    return Signer(name="a", key=KEY, fingerprint="f", **times)


@pytest.mark.parametrize(
    ("times", "when", "outcome"),
    [
        ({}, When(existed_by=1000), None),
        ({"not_before": 10, "not_after": 20}, When(existed_by=15), None),
        ({"not_before": 10, "not_after": 20}, When(existed_by=1000, said=15), None),
        ({"not_before": 10, "not_after": 20}, When(existed_by=15, witnessed=True), None),
        ({"not_after": 20}, When(existed_by=1000), "not_checked"),
        ({"not_after": 20}, When(existed_by=1000, said=21), "violated"),
        ({"not_after": 20}, When(existed_by=1000, said=20), None),
        ({"not_after": 20}, When(existed_by=1000, said=15, not_earlier=21), "violated"),
        ({"not_before": 10}, When(existed_by=1000, said=9), "violated"),
        ({"not_before": 10}, When(existed_by=9, witnessed=True), "violated"),
        ({"not_before": 10}, When(existed_by=9), "violated"),
        ({"not_before": 10}, When(existed_by=1000), None),
        ({"revoked": 20}, When(existed_by=19, witnessed=True), None),
        ({"revoked": 20}, When(existed_by=20, witnessed=True), "not_checked"),
        ({"revoked": 20}, When(existed_by=1000, said=20), "violated"),
        ({"revoked": 20}, When(existed_by=1000, said=19), "not_checked"),
        ({"revoked": 20}, When(existed_by=1000, said=19, not_earlier=25), "violated"),
        ({"revoked": 20}, When(existed_by=1000), "not_checked"),
        ({"revoked": 2000}, When(existed_by=1000), None),
        ({"revoked": 20, "not_after": 10}, When(existed_by=1000, said=30), "violated"),
    ],
)
def test_a_key_counts_only_for_its_time(times: dict[str, float], when: When, outcome: str | None) -> None:
    """The whole table of spec/seal.md, both sides of each bound."""
    doubt = judge(signer(**times), when)
    assert (doubt.outcome if doubt else None) == outcome
    assert doubt is None or (doubt.message and doubt.expected and doubt.found)


def test_the_earliest_cosignature_of_a_listed_witness_is_the_time() -> None:
    """Strangers, other keys, wrong lengths and signatures over another head say nothing."""
    text = "log.example\n5\n" + base64.b64encode(bytes(32)).decode() + "\n"
    keys = {name: Ed25519PrivateKey.generate() for name in ("one", "two", "stranger")}

    def line(name: str, time: int, head: str = text, key: str | None = None, cut: int = 72) -> str:
        value = keys[key or name].sign(f"cosignature/v1\ntime {time}\n{head}".encode())
        number = bytes.fromhex(witness_vkey(name, keys[name]).split("+")[1])
        return f"— {name} {base64.b64encode(number + (time.to_bytes(8, 'big') + value)[:cut]).decode()}\n"

    def raw(name: str) -> bytes:
        return keys[name].public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    witnesses = [Witness(name=name, public_key=raw(name)) for name in ("one", "two")]
    note = text + "\n" + line("stranger", 5) + line("two", 90) + line("one", 80)
    assert witnessed_at(note, witnesses) == 80
    assert witnessed_at(note, witnesses[1:]) == 90
    assert witnessed_at(note, ()) is None
    for bad in (line("one", 7, head="other\n"), line("one", 7, key="two"), line("one", 7, cut=71), line("one", 0)):
        assert witnessed_at(text + "\n" + bad + line("two", 90), witnesses) == 90
