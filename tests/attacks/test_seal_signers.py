"""E10: seals by keys that may not sign, or might not any more. Each is one sentence and status 1 or 3."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trainguard.cli import main
from trainguard.errors import Misuse
from trainguard.home import Home
from trainguard.seal import seal_path, verify_seal
from trainguard.seal.manifest import seal_path_of

DAYS = 864_000.0
NOW = time.time()


def at(offset: float) -> str:
    """A time `offset` seconds from now, as TOML writes it."""
    return datetime.fromtimestamp(NOW + offset, UTC).isoformat()


def trust(path: Path, *entries: tuple[str, Home, str], witness: str = "") -> Path:
    """A trust file of (name, whose key, more lines)."""
    tables = [
        f'[[signer]]\nname = "{name}"\nkey = """\n{(home.keys / "attestation.pub").read_text()}"""\n{more}\n'
        for name, home, more in entries
    ]
    more = f'[[witness]]\nvkey = "{witness}"\n' if witness else ""
    path.write_text('schema = "trainguard/signers/v1"\n' + "".join(tables) + more)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "ckpt"
    root.mkdir()
    (root / "weights.bin").write_bytes(bytes(range(200)))
    return root


@pytest.fixture
def where(tmp_path: Path, folder: Path) -> Home:
    """The home that sealed the folder just now."""
    home = Home(tmp_path / "state")
    seal_path(home, folder, run="r", step=1)
    return home


def test_a_key_the_file_names_is_upheld_at_home_and_elsewhere(tmp_path: Path, where: Home, folder: Path) -> None:
    """Among others, within its time."""
    other = Home(tmp_path / "other")
    seal_path(other, folder / "weights.bin")
    (folder / "weights.bin.sig").unlink()
    file = trust(
        tmp_path / "t.toml", ("other", other, ""), ("ours", where, f"not_before = {at(-DAYS)}\nnot_after = {at(DAYS)}")
    )
    report = verify_seal(folder, home=where, signers=file)
    assert (report.status, report.signed_by, report.findings) == ("upheld", "ours", ())
    assert report.checked == ("signature", "logged", "signer", "newest", "content")
    elsewhere = verify_seal(folder, home=None, signers=file, log_key=where.keys / "log.vkey")
    assert (elsewhere.status, elsewhere.signed_by) == ("upheld", "ours")


def test_an_unknown_key_is_refused(tmp_path: Path, where: Home, folder: Path) -> None:
    """A perfectly valid seal, by a key that the file does not name."""
    other = Home(tmp_path / "other")
    (tmp_path / "other.bin").write_bytes(b"x")
    seal_path(other, tmp_path / "other.bin")
    report = verify_seal(folder, home=other, signers=trust(tmp_path / "t.toml", ("other", other, "")))
    assert (report.status, report.exit_status) == ("violated", 1)
    assert [f.message for f in report.findings] == ["sealed by a key that the trust file does not name"]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (f"revoked = {at(-DAYS)}", "violated", "sealed after the key 'ours' was revoked"),
        (f'revoked = {at(-DAYS)}\nreason = "lost"', "violated", "sealed after the key 'ours' was revoked (lost)"),
        (f"not_after = {at(-DAYS)}", "violated", "sealed after the key 'ours' had expired"),
        (f"not_before = {at(DAYS)}", "violated", "sealed before the key 'ours' was valid"),
        (f"revoked = {at(DAYS)}", "upheld", None),
        (f"not_after = {at(DAYS)}\nnot_before = {at(-DAYS)}", "upheld", None),
    ],
    ids=["revoked", "revoked-with-reason", "expired", "not-yet-valid", "revoked-later", "within"],
)
def test_a_key_out_of_its_time_is_refused(
    tmp_path: Path, where: Home, folder: Path, more: str, status: str, message: str | None
) -> None:
    """By the time its entry in our log says."""
    report = verify_seal(folder, home=where, signers=trust(tmp_path / "t.toml", ("ours", where, more)))
    assert (report.status, report.exit_status) == (status, {"violated": 1, "upheld": 0}[status])
    assert [f.message for f in report.findings] == ([message] if message else [])
    assert all(f.techniques == ("E10",) for f in report.findings)


def test_a_revoked_key_is_undecided_without_a_witness(tmp_path: Path, where: Home, folder: Path) -> None:
    """Its own word, that it sealed before it was revoked, is what a thief would say."""
    file = trust(tmp_path / "t.toml", ("ours", where, f"revoked = {at(-5.0)}"))
    alone = verify_seal(folder, home=None, signers=file)
    assert (alone.status, alone.exit_status) == ("unknown", 3)
    assert any("no witness says" in f.message for f in alone.findings)


def test_an_expired_key_is_undecided_where_no_log_tells_the_time(tmp_path: Path, where: Home, folder: Path) -> None:
    """Copied elsewhere, with nothing but the trust file."""
    file = trust(tmp_path / "t.toml", ("ours", where, f"not_after = {at(-DAYS)}"))
    report = verify_seal(folder, home=None, signers=file)
    assert (report.status, report.exit_status) == ("unknown", 3)
    assert any("when it sealed this is not known" in f.message for f in report.findings)


def cosigned(seal: Path, name: str, key: Ed25519PrivateKey, moment: int) -> str:
    """Put a witness's cosignature on the tree head in a seal, as a witness would; returns the witness's vkey."""
    bundle = json.loads(seal.read_bytes())
    head = bundle["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]["checkpoint"]
    text = head["envelope"].partition("\n\n")[0] + "\n"
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    number = hashlib.sha256(name.encode() + b"\n\x04" + raw).digest()[:4]
    value = number + moment.to_bytes(8, "big") + key.sign(f"cosignature/v1\ntime {moment}\n{text}".encode())
    head["envelope"] += f"— {name} {base64.b64encode(value).decode()}\n"
    seal.write_text(json.dumps(bundle))
    return f"{name}+{number.hex()}+{base64.b64encode(bytes([4]) + raw).decode()}"


def test_a_witness_upholds_what_a_key_sealed_before_it_was_revoked(tmp_path: Path, where: Home, folder: Path) -> None:
    """And what a witness saw only later stays undecided; a witness nobody listed says nothing."""
    key, seal = Ed25519PrivateKey.generate(), seal_path_of(folder)
    untouched = seal.read_bytes()
    vkey = cosigned(seal, "witness.example", key, int(NOW) - 5)
    more = f"revoked = {at(-2)}\nnot_after = {at(-2)}"
    file = trust(tmp_path / "t.toml", ("ours", where, more), witness=vkey)
    report = verify_seal(folder, home=None, signers=file, log_key=where.keys / "log.vkey")
    assert (report.status, report.checked) == ("upheld", ("signature", "logged", "signer", "content"))
    unlisted = trust(tmp_path / "u.toml", ("ours", where, more))
    assert verify_seal(folder, home=None, signers=unlisted, log_key=where.keys / "log.vkey").status == "unknown"
    without_log_key = verify_seal(folder, home=None, signers=file)  # the head itself is not proved then
    assert without_log_key.status == "unknown"
    seal.write_bytes(untouched)
    cosigned(seal, "witness.example", key, int(NOW) + 5)
    assert verify_seal(folder, home=None, signers=file, log_key=where.keys / "log.vkey").status == "unknown"


def test_a_key_that_was_replaced_keeps_its_seals_in_the_chain(tmp_path: Path, where: Home, folder: Path) -> None:
    """Rotation: the log has entries by both keys; the older checkpoint put back is still a rollback."""
    old = Home(tmp_path / "old")
    old.keys.mkdir(parents=True)
    for name in ("attestation.pem", "attestation.pub"):
        shutil.move(where.keys / name, old.keys / name)
    before = seal_path_of(folder).read_bytes()
    weights = folder / "weights.bin"
    first = weights.read_bytes()
    weights.write_bytes(b"newer")
    seal_path(where, folder, run="r", step=2)
    file = trust(tmp_path / "t.toml", ("new", where, ""), ("old", old, ""))
    assert verify_seal(folder, home=where, signers=file).signed_by == "new"
    weights.write_bytes(first)
    seal_path_of(folder).write_bytes(before)
    report = verify_seal(folder, home=where, signers=file)
    assert (report.status, report.signed_by) == ("violated", "old")
    assert {f.techniques[0] for f in report.findings} == {"E6"}


def test_the_verb_says_it_in_a_line_and_exits_so(
    tmp_path: Path, where: Home, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0, 1, 3, and one sentence for a file that is no trust file."""
    monkeypatch.setenv("TRAINGUARD_HOME", str(where.root))
    file = trust(tmp_path / "t.toml", ("ours", where, ""))
    assert main(["verify", "--signers", str(file), str(folder)]) == 0
    assert "signer     ours, key " in capsys.readouterr().out
    trust(file, ("ours", where, f"revoked = {at(-DAYS)}"))
    assert main(["verify", "--signers", str(file), str(folder)]) == 1
    assert "sealed after the key 'ours' was revoked" in capsys.readouterr().out
    file.write_text("nonsense")
    with pytest.raises(SystemExit) as left:
        main(["verify", "--signers", str(file), str(folder)])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "not a trust file" in said
    assert "Traceback" not in said


def test_a_key_and_a_trust_file_at_once_is_misuse(tmp_path: Path, where: Home, folder: Path) -> None:
    """Which of the two would count?"""
    with pytest.raises(Misuse, match="expected one"):
        verify_seal(folder, home=where, key=where.keys / "attestation.pub", signers=tmp_path / "t.toml")
