"""Tables beside checkpoints are known by their shape; the one thing in them that runs code is found in every form."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from trainguard.scan import Verdict, vet_file
from trainguard.scan.formats.tables import NEEDLES, PICKLED

FOOTER = b"schema and row groups"


def parquet(middle: bytes = b"", footer: bytes = FOOTER) -> bytes:
    return b"PAR1" + middle + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def arrow(middle: bytes = b"") -> bytes:
    return b"ARROW1\0\0" + b"\xff\xff\xff\xff\x10\0\0\0" + bytes(16) + middle + b"ARROW1"


def stream(middle: bytes = b"") -> bytes:
    return b"\xff\xff\xff\xff\x10\0\0\0" + bytes(16) + middle


HONEST = {
    "parquet": parquet(),
    "arrow": arrow(),
    "arrow-stream": stream(),
    "matlab": b"MATLAB 5.0 MAT-file, somewhere".ljust(124) + b"\x00\x01IM" + bytes(64),
    "catboost": b"CBM1" + (8).to_bytes(4, "little") + bytes(16),
}


@pytest.mark.parametrize("name", sorted(HONEST))
def test_tables_are_safe_by_their_own_loader(tmp_path: Path, name: str) -> None:
    """Whatever they are called."""
    path = tmp_path / "x"
    path.write_bytes(HONEST[name])
    report = vet_file(path)
    assert (report.verdict, report.format) == (Verdict.SAFE, name.removesuffix("-stream")), report.reasons


@pytest.mark.parametrize(
    "data",
    [
        parquet()[:-1],
        parquet()[:-8] + (1 << 20).to_bytes(4, "little") + b"PAR1",
        arrow()[:-1],
        b"PAR1",
        parquet(PICKLED),
        arrow(PICKLED),
        stream(PICKLED),
        arrow(bytes((1 << 20) - 40) + PICKLED),
    ],
    ids=[
        "cut",
        "footer-too-long",
        "arrow-cut",
        "short",
        "parquet-pickled",
        "arrow-pickled",
        "stream-pickled",
        "across",
    ],
)
def test_broken_tables_and_pickled_column_types_are_unsafe(tmp_path: Path, data: bytes) -> None:
    """CVE-2023-47248: an extension type that pyarrow used to unpickle while it read the schema."""
    path = tmp_path / "x.parquet"
    path.write_bytes(data)
    assert vet_file(path).verdict is Verdict.UNSAFE


@pytest.mark.parametrize("before", range(7))
@pytest.mark.parametrize("behind", range(4))
def test_the_word_is_found_in_base64_wherever_it_starts(before: int, behind: int) -> None:
    """Parquet keeps the Arrow schema as base64."""
    text = base64.b64encode(b"\x07" * before + PICKLED + b"\xfe" * behind)
    assert any(needle in text for needle in NEEDLES)
    assert not any(needle in base64.b64encode(b"arrow.qy_extension_type" + bytes(before)) for needle in NEEDLES)


def test_a_table_that_is_a_pickle_too_is_a_polyglot(tmp_path: Path) -> None:
    """`PAR1` begins with an opcode; what follows must not be a call."""
    path = tmp_path / "x.parquet"
    path.write_bytes(b"MATLAB 5.0 MAT-file\n" + bytes(200))
    assert vet_file(path).verdict is not Verdict.SAFE
    path.write_bytes(parquet() + b"PK\5\6" + bytes(18))
    assert vet_file(path).verdict is Verdict.UNSAFE


def test_a_safetensors_header_of_any_length_is_no_polyglot(tmp_path: Path) -> None:
    """Its length's first byte may be any opcode: INT, LONG and LONG4 read far, and read nothing a number could be."""
    for length in (0x49, 0x4C, 0x8B, 0x1249, 0x1A8B, 0x5049, 0x8A, 0x46, 0x53):
        text = b'{"__metadata__":{"a":"' + b"x" * (length - 25) + b'"}}' if length > 40 else b""
        path = tmp_path / f"{length:x}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text.ljust(length))
        assert len(text) == length
        report = vet_file(path)
        assert report.verdict is Verdict.SAFE, (hex(length), report.reasons)
