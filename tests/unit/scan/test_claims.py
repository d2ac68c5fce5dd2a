"""Numbers in tensors that native code believes are read: indices of sparse tensors, shapes of nested ones.

torch does not look at them when it loads: each forgery here loads under `weights_only`, and its first use would read or
write outside the tensor.
"""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from typing import Any

import pytest

from trainguard.scan import ScanPolicy, Verdict
from trainguard.scan.source import BytesSource
from trainguard.scan.vet import judge_source

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


def saved(value: Any, *, zipped: bool = True) -> bytearray:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return bytearray(buffer.getvalue())


def edited(data: bytearray, key: str, index: int, number: int) -> bytes:
    """The file with one int64 of one storage changed; torch checks no checksum of a storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(f"data/{key}"))
    name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
    struct.pack_into("<q", data, info.header_offset + 30 + name + extra + 8 * index, number)
    return bytes(data)


def judged(data: bytes) -> tuple[Verdict, str]:
    notes, _ = judge_source(BytesSource(bytes(data)), ScanPolicy(), "model.pt")
    return notes.verdict, " ".join(reason.what for reason in notes.reasons)


def made(layout: str) -> Any:
    eye = torch.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if layout == "nested":
            return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        block = (2, 2) if layout in ("bsr", "bsc") else None
        return eye.to_sparse() if layout == "coo" else getattr(eye, f"to_sparse_{layout}")(*([block] if block else []))


FORGED = [
    ("coo", "0", 0, 99, "index 99 in a dimension of 4"),
    ("coo", "0", 1, -1, "index -1"),
    ("csr", "0", 0, 1, "pointer 1"),
    ("csr", "0", 1, 100, "below the one before"),
    ("csr", "0", 4, 3, "end at 3"),
    ("csr", "1", 4, 4, "index 4"),
    ("csc", "1", 5, 1 << 40, "index 1099511627776"),
    ("bsr", "1", 2, 2, "index 2 in a dimension of 2"),
    ("bsc", "1", 2, -7, "index -7"),
    ("nested", "1", 0, 6, "outside its 5 numbers"),
    ("nested", "2", 0, 9, "outside its 5 numbers"),
    ("nested", "3", 1, 3, "outside its 5 numbers"),
    ("nested", "3", 1, -1, "outside its 5 numbers"),
]


@pytest.mark.parametrize(("layout", "key", "index", "number", "why"), FORGED)
def test_numbers_that_lead_outside_are_refused(layout: str, key: str, index: int, number: int, why: str) -> None:
    """The honest file is safe; one number changed, torch still loads it (nested ones may fail), and we refuse it."""
    data = saved(made(layout))
    assert judged(bytes(data)) == (Verdict.SAFE, "")
    forged = edited(data, key, index, number)
    verdict, what = judged(forged)
    assert (verdict, why in what) == (Verdict.UNSAFE, True), what
    if layout != "nested":
        assert torch.load(io.BytesIO(forged), weights_only=True).shape == (4, 4)


def test_honest_sparse_and_nested_tensors_are_safe() -> None:
    """Empty, hybrid, batched, 32-bit, scalar, repeated and many indices; parts without elements; the legacy format."""
    relu = torch.randn(60, 40, generator=torch.Generator().manual_seed(1)).relu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = [
            torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (3, 3)),
            torch.sparse_coo_tensor(torch.zeros(0, 1, dtype=torch.long), torch.ones(1), ()),
            torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.ones(2), (3,)),
            torch.randn(3, 4, 4).to_sparse(1),
            torch.ones(2, 4, 4).to_sparse_csr(),
            relu.to_sparse(),
            relu.to_sparse_bsc((3, 2)),
            torch.sparse_csr_tensor(torch.tensor([0, 1, 1]).int(), torch.tensor([1]).int(), torch.ones(1), (2, 2)),
            torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 0), torch.ones(1, 2)]),
        ]
    for value in values:
        assert judged(saved({"w": value})) == (Verdict.SAFE, "")
    assert judged(saved(values[5], zipped=False)) == (Verdict.SAFE, "")


def test_shapes_that_do_not_fit_are_refused() -> None:
    """Fewer values than indices, a dense part of another shape, a matrix of other rows: said by the pickle alone."""
    data = bytes(saved(made("csr")))
    size = data.index(b"Size")
    shape = data.index(b"K\x04K\x04\x86", size)
    wrong = data[:shape] + b"K\x05K\x04\x86" + data[shape + 5 :]
    assert judged(wrong)[0] is Verdict.UNSAFE


def test_indices_that_cannot_be_read_are_not_clean() -> None:
    """In a big-endian file, and where the storages are no part of the file: unknown, with the reason."""
    data = bytes(saved(made("coo")))
    assert judged(data.replace(b"little", b"big\0\0\0"))[0] is not Verdict.SAFE
    import pickle

    verdict, what = judged(pickle.dumps(made("coo")))
    assert (verdict, "cannot be checked" in what) == (Verdict.UNKNOWN, True)
