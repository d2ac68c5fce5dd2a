"""The example in spec/log.md is what the program writes."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from trainguard.log import Log, LogReader, encode_proof

SPEC = Path(__file__).parents[3] / "spec" / "log.md"


def test_the_example_of_the_specification_is_made_as_it_says(tmp_path: Path) -> None:
    """Tree head, proof and first bytes of the journal, from the key and entries named there."""
    key = tmp_path / "log.key"
    key.touch(mode=0o600)
    key.write_bytes(
        Ed25519PrivateKey.from_private_bytes(bytes(range(32))).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    with Log.open(tmp_path / "log", key, origin="log.example.org") as log:
        log.append([b"entry %d" % i for i in range(5)])
        head = log.publish()
    text = SPEC.read_text()
    proof = encode_proof(LogReader(tmp_path / "log", tmp_path / "log.vkey").inclusion(3)).partition("\n\n")[0]
    journal = (tmp_path / "log/journal" / ("0" * 20)).read_bytes()
    for line in (*head.note.splitlines(), *proof.splitlines()):
        assert not line or f"    {line}\n" in text
    for at in range(0, 48, 16):
        assert f"    {journal[at : at + 16].hex(' ')}  " in text
