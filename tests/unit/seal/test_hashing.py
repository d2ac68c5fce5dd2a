"""TeeHash: writes through, digests what was written, never breaks a save."""

import ast
import hashlib
import importlib.util
import io
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from trainguard.seal import hashing
from trainguard.seal.hashing import SLICE_BYTES, TeeHash, open_tee


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_the_digest_is_that_of_everything_written(parts: list[bytes]) -> None:
    """However it is cut."""
    for algorithm, whole in (("sha256", hashlib.sha256), ("blake3", blake3)):
        file = io.BytesIO()
        tee = TeeHash(file, algorithm)
        assert [tee.write(part) for part in parts] == [len(part) for part in parts]
        assert file.getvalue() == b"".join(parts)
        assert tee.digest() == f"{algorithm}:{whole(b''.join(parts)).hexdigest()}"
        assert tee.size == len(file.getvalue())


def test_large_and_typed_buffers_are_written_whole() -> None:
    """More than a slice; a memoryview of doubles."""
    data = memoryview(bytearray(range(256)) * 4096).cast("d")
    file = io.BytesIO()
    tee = TeeHash(file)
    assert tee.write(data) == data.nbytes > 2 * SLICE_BYTES
    assert tee.digest() == "sha256:" + hashlib.sha256(file.getvalue()).hexdigest()


class Short(io.RawIOBase):
    """A raw file that takes three bytes at a time."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        taken = bytes(data[:3])
        self.data += taken
        return len(taken)


def test_short_writes_are_finished() -> None:
    """Only what the file took is digested, until it took all."""
    file = Short()
    tee = TeeHash(file)
    assert tee.write(b"0123456789") == 10
    assert file.data == b"0123456789"
    assert tee.digest() == "sha256:" + hashlib.sha256(b"0123456789").hexdigest()


def test_writing_elsewhere_than_at_the_end_gives_up_the_digest(tmp_path: Path) -> None:
    """A zip made by Python goes back to fill in its headers; the file is right, the digest is none."""
    with open_tee(tmp_path / "c.zip") as tee:
        with zipfile.ZipFile(tee, "w") as made:
            made.writestr("a", "b")
        assert tee.digest() is None
        assert "not sequential" in (tee.reason or "")
    assert zipfile.ZipFile(tmp_path / "c.zip").read("a") == b"b"


def test_moving_about_and_coming_back_is_fine() -> None:
    """tell, seek to the end, read: nothing was written elsewhere."""
    tee = TeeHash(io.BytesIO())
    tee.write(b"abc")
    tee.seek(0)
    tee.seek(0, 2)
    tee.write(b"d")
    assert tee.tell() == 4
    assert tee.digest() == "sha256:" + hashlib.sha256(b"abcd").hexdigest()
    tee.truncate(2)
    assert tee.digest() is None


def test_an_unknown_algorithm_does_not_break_the_save() -> None:
    """No digest, and why; the bytes are written."""
    file = io.BytesIO()
    tee = TeeHash(file, "md5")
    pickle.dump([1, 2], tee)
    assert pickle.loads(file.getvalue()) == [1, 2]
    assert tee.digest() is None
    assert "md5" in (tee.reason or "")


def test_without_blake3_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training environment need not have it."""
    monkeypatch.setitem(sys.modules, "blake3", None)
    tee = TeeHash(io.BytesIO(), "blake3")
    tee.write(b"x")
    assert (tee.digest(), bool(tee.reason)) == (None, True)


def test_errors_of_the_file_are_the_files_own() -> None:
    """A full disk looks to the training script as it always did."""

    class Full(io.BytesIO):
        def write(self, _data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        TeeHash(Full()).write(b"x")


def test_it_stands_alone() -> None:
    """Loaded by file path, under another name, with only the standard library."""
    source = Path(hashing.__file__)
    tops = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert tops <= {"__future__", "hashlib", "os", "typing", "blake3"}
    spec = importlib.util.spec_from_file_location("elsewhere", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TeeHash(io.BytesIO()).digest() == "sha256:" + hashlib.sha256(b"").hexdigest()
