"""Tensor tables: every tensor by its name, from headers and a pickle nobody runs."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.checkpoints import save_safetensors, state

from trainguard.seal.skeleton import Opaque, flatten, read_skeleton
from trainguard.seal.tensors import Digester, Layout, Range, is_training_state, read_layout

pytestmark = pytest.mark.torch


def layout_of(path: Path) -> Layout | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_layout(descriptor, path.stat().st_size)
    finally:
        os.close(descriptor)


def saved(tmp_path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, tmp_path / "c.pt", **options)
    return tmp_path / "c.pt"


def names(layout: Layout | None) -> set[str]:
    return {r.name for r in layout.ranges} if layout else set()


def test_a_training_checkpoint_names_every_tensor(tmp_path: Path) -> None:
    """Weights, moments, RNG state: with the bytes each has in the file."""
    value = state(3)
    path = saved(tmp_path, value)
    layout = layout_of(path)
    assert layout is not None
    assert {f"model.{name}" for name in value["model"]} <= names(layout)
    assert {f"optimizer.state[{i}].exp_avg" for i in range(4)} <= names(layout)
    data = path.read_bytes()
    by_name = {r.name: data[r.start : r.end] for r in layout.ranges}
    assert by_name["model.head.weight"] == value["model"]["head.weight"].numpy().tobytes()
    assert by_name["rng_state"] == value["rng_state"].numpy().tobytes()
    assert "optimizer.param_groups[0] (values)" in layout.values


def test_safetensors_names_every_tensor(tmp_path: Path) -> None:
    """Offsets count from the end of the header."""
    weights = state(1)["model"]
    path = save_safetensors(tmp_path / "m.safetensors", weights)
    layout = layout_of(path)
    assert names(layout) == set(weights)
    data = path.read_bytes()
    assert layout is not None
    assert {r.name: data[r.start : r.end] for r in layout.ranges}["head.weight"] == weights[
        "head.weight"
    ].numpy().tobytes()


def test_our_safetensors_reader_agrees_with_the_library(tmp_path: Path) -> None:
    """Every dtype it writes."""
    library = pytest.importorskip("safetensors.torch")
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64]
    library.save_file({str(k): torch.ones(3, 5).to(k) for k in kinds}, tmp_path / "m.safetensors")
    layout = layout_of(tmp_path / "m.safetensors")
    assert layout is not None
    widths = {r.name: r.end - r.start for r in layout.ranges}
    assert widths == {str(k): 15 * torch.empty(0, dtype=k).element_size() for k in kinds}


@pytest.mark.parametrize(
    "kind", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint16]
)
def test_dtypes_have_their_width(tmp_path: Path, kind: torch.dtype) -> None:
    """The range is exactly the tensor's bytes."""
    layout = layout_of(saved(tmp_path, {"x": torch.ones(7).to(kind)}))
    assert layout is not None
    (found,) = layout.ranges
    assert found.end - found.start == 7 * torch.empty(0, dtype=kind).element_size()


def test_views_and_tied_tensors_have_their_own_ranges(tmp_path: Path) -> None:
    """Two names on one storage; a slice covers only its part; a transpose spans all."""
    base = torch.arange(100.0)
    layout = layout_of(saved(tmp_path, {"a": base, "tied": base, "part": base[10:20], "t": base.reshape(10, 10).t()}))
    assert layout is not None
    spans = {r.name: (r.start, r.end) for r in layout.ranges}
    assert spans["a"] == spans["tied"] == spans["t"]
    assert spans["part"] == (spans["a"][0] + 40, spans["a"][0] + 80)


def test_modules_parameters_and_objects_are_followed(tmp_path: Path) -> None:
    """Ordered dicts with attributes, Parameters, nested lists and tuples, numpy's RNG state, an object."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    value = OrderedDict(sd=module.state_dict(), p=[torch.nn.Parameter(torch.ones(2)), (torch.zeros(1),)], m=module)
    found = names(layout_of(saved(tmp_path, value)))
    assert {"sd.0.weight", "sd.1.running_mean", "p[0]", "p[1][0]"} <= found
    assert any("weight" in name and name.startswith("m") for name in found)


def test_a_pickle_that_would_run_code_is_only_read(tmp_path: Path) -> None:
    """The marker file is not made; the tensors are named all the same."""
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(marker), "w"))

    layout = layout_of(saved(tmp_path, {"w": torch.ones(2), "x": Payload()}))
    assert "w" in names(layout)
    assert not marker.exists()


def test_a_changed_global_changes_the_values(tmp_path: Path) -> None:
    """Which function a pickle calls is part of the table."""
    first, second = (flatten(read_skeleton(pickle.dumps({"f": f}, 2)))[1] for f in (len, eval))
    assert first != second


def test_the_digest_does_not_depend_on_how_the_file_is_cut(tmp_path: Path) -> None:
    """Whole or byte by byte, overlapping ranges and all."""
    base = torch.arange(64.0)
    path = saved(tmp_path, {"a": base, "b": base[3:9], "c": torch.zeros(0)})
    layout, data = layout_of(path), memoryview(path.read_bytes())
    assert layout is not None
    tables = []
    for chunk in (1, 7, 1000, len(data)):
        digester = Digester(layout)
        for at in range(0, len(data), chunk):
            digester.update(at, data[at : at + chunk])
        tables.append(digester.digests())
    assert all(table == tables[0] for table in tables)
    assert {"a", "b", "c"} <= set(tables[0])


def test_a_file_of_plain_values_has_a_table(tmp_path: Path) -> None:
    """`scheduler.pt` has no tensor, and is worth editing all the same."""
    layout = layout_of(saved(tmp_path, {"last_epoch": 3, "base_lrs": [0.1]}))
    assert layout is not None
    assert (layout.ranges, set(layout.values)) == ((), {" (values)", "base_lrs (values)"})


def test_other_formats_have_no_table(tmp_path: Path) -> None:
    """JSON, text, an old torch file, a plain zip without a pickle, nothing at all."""
    for number, data in enumerate((b"", b"{}", b"hello" * 100, pickle.dumps([1, 2]))):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert layout_of(path) is None


def test_a_zip_without_a_readable_pickle_is_named_by_record(tmp_path: Path) -> None:
    """Better than no name at all."""
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02garbage")
        made.writestr("archive/data/0", bytes(64))
    assert names(layout_of(path)) == {"data.pkl", "data/0"}


def test_zip64_and_python_zips_are_read(tmp_path: Path) -> None:
    """A record written with 64-bit sizes."""
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(path, "w") as made, made.open("a/data/0", "w", force_zip64=True) as record:
        record.write(bytes(100))
    layout = layout_of(path)
    assert layout is not None
    assert [(r.name, r.end - r.start) for r in layout.ranges] == [("data/0", 100)]


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 60]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}},
        {"a": []},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [True, 4]}},
        [1],
    ],
)
def test_lying_safetensors_headers_have_no_table(tmp_path: Path, header: Any) -> None:
    """None, never an exception, never a read outside the file."""
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert layout_of(path) is None


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_never_raises(tmp_path: Path, seed: int) -> None:
    """50 damaged files each: flipped, cut and spliced."""
    draw = random.Random(seed)
    genuine = saved(tmp_path, state(seed)).read_bytes()
    path = tmp_path / "d.pt"
    for _ in range(50):
        data = bytearray(genuine)
        for _ in range(draw.randrange(1, 30)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        tail = draw.choice([0, 0, 30, 300])
        path.write_bytes(bytes(data[: len(data) - tail]))
        layout = layout_of(path)
        assert layout is None or all(0 <= r.start <= r.end <= len(data) for r in layout.ranges)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    """The opcode walk never acts and never fails otherwise."""
    for prefix in (b"", b"\x80\x02"):
        try:
            flatten(read_skeleton(prefix + data + b"."))
        except ValueError:
            continue


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=10,
    ),
    st.sampled_from([0, 1, 2, 3, 4, 5]),
)
def test_plain_values_are_rebuilt_in_every_protocol(value: Any, protocol: int) -> None:
    """Containers and plain values come out as they are, where no code is needed to make them."""
    data = pickle.dumps(value, protocol)
    found = read_skeleton(data)
    if protocol >= 3 or (b"codecs" not in data and b"__builtin__" not in data):  # how bytes were pickled before 3
        assert found == value


def test_a_pickle_that_refers_to_itself_ends() -> None:
    """And one that doubles at every level."""
    loop: list[Any] = []
    loop.append(loop)
    flatten(read_skeleton(pickle.dumps(loop)))
    bomb: list[Any] = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    assert len(flatten(read_skeleton(pickle.dumps(bomb)))[1]) <= 61


def test_too_many_operations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound, then no table by name."""
    monkeypatch.setattr("trainguard.seal.skeleton.OPERATION_LIMIT", 10)
    with pytest.raises(ValueError, match="more than 10 operations"):
        read_skeleton(pickle.dumps(list(range(100))))


def test_views_that_cover_a_file_many_times_fall_back_to_records(tmp_path: Path) -> None:
    """Digesting them all would be a way to stall us."""
    base = torch.arange(4096.0)
    found = names(layout_of(saved(tmp_path, {str(i): base[i:] for i in range(50)})))
    assert found == {"data.pkl", "data/0"}


def test_opaque_things_keep_their_parts() -> None:
    """A call is its function's name and its arguments."""
    found = read_skeleton(b"cos\nsystem\n(Vecho\ntR.")
    assert isinstance(found, Opaque)
    assert (found.what, found.parts) == ("os system", ["echo"])


def test_ranges_that_end_past_the_stream_are_still_closed() -> None:
    """A file that became shorter meanwhile gives another digest, not an exception."""
    digester = Digester(Layout((Range(0, 10, "a", b""), Range(20, 30, "b", b""))))
    digester.update(0, memoryview(b"12345"))
    assert set(digester.digests()) == {"a", "b"}


@pytest.mark.parametrize(
    ("name", "file", "training"),
    [
        ("model.head.weight", "ckpt.pt", False),
        ("head.weight", "model-00001-of-00002.safetensors", False),
        ("optimizer.state[3].exp_avg", "ckpt.pt", True),
        ("optimizer_states[0].state[1].exp_avg_sq", "last.ckpt", True),
        ("state[3].exp_avg", "optimizer.pt", True),
        ("cpu", "rng_state_0.pth", True),
        ("rng_state", "ckpt.pt", True),
        ("(values)", "scheduler.pt", True),
        ("model.step_embed.weight", "ckpt.pt", False),
    ],
)
def test_training_state_is_told_from_weights(name: str, file: str, training: bool) -> None:
    """E5 or E3."""
    assert is_training_state(name, file) is training


def test_the_values_table_is_small_for_big_optimizers() -> None:
    """Steps kept as plain numbers for every parameter do not blow up the seal."""
    buffer = io.BytesIO()
    pickle.dump({"state": {i: {"step": 3, "lr": 1.0} for i in range(1000)}, "z": 1}, buffer)
    from trainguard.seal.tensors import _grouped

    assert len(_grouped(flatten(read_skeleton(buffer.getvalue()))[1])) <= 64
