"""Containers: what is read, what is refused, and that every byte is accounted for."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from trainguard.scan import ScanPolicy, Verdict
from trainguard.scan.source import BytesSource
from trainguard.scan.vet import judge_source
from trainguard.testing import forge
from trainguard.testing.forge import BENIGN, call, lz4_stored, named, stream, tar_of, torch_zip, touch, zip_of

EVIL = stream(touch("never"))


def judged(data: bytes, name: str = "model.bin", policy: ScanPolicy | None = None, in_folder: bool = True):
    """(verdict, format, rules of the reasons)."""
    notes, (form, _) = judge_source(BytesSource(data), policy or ScanPolicy(), name, in_folder=in_folder)
    return notes.verdict, form, [reason.rule for reason in notes.reasons]


# zip -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_plain_zip_is_judged_by_its_members(compression: int) -> None:
    """A zip is as good as what is in it."""
    assert judged(zip_of([("a.pkl", BENIGN), ("d/b.txt", b"hello")], compression=compression))[0] is Verdict.SAFE
    assert judged(zip_of([("a.txt", b"hello"), ("b", EVIL)], compression=compression))[0] is Verdict.UNSAFE


def _edit(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def test_local_headers_must_repeat_the_directory() -> None:
    """Name, method, flags, sizes and checksum of the local header are compared with the directory."""
    data = zip_of([("a.txt", b"hello")])
    assert judged(data)[0] is Verdict.SAFE
    for position, new in ((30, b"b"), (8, b"\x08"), (6, b"\x01"), (18, b"\x04"), (22, b"\x06"), (14, b"\0\0\0\0")):
        assert judged(_edit(data, position, new))[0] is Verdict.UNSAFE, position


@pytest.mark.parametrize(
    "names", [("a", "a"), ("a", "A"), ("../a",), ("/a",), ("a\\b",), ("a/../b",), ("data/x", "DATA/X")], ids=str
)
def test_names_must_be_plain_and_unique(names: tuple[str, ...]) -> None:
    """Readers disagree on repeated names, and unpackers on names that climb."""
    assert judged(zip_of([(name, b"x") for name in names]))[0] is Verdict.UNSAFE


def test_bytes_before_between_and_behind_members_are_refused() -> None:
    """A gap is where another format hides."""
    data = zip_of([("a.txt", b"hello"), ("b.txt", b"hello")])
    second = data.index(b"PK\3\4", 4)
    for broken in (b"x" + data, data + b"x", data[:second] + b"gap" + data[second:]):
        assert judged(broken)[0] is Verdict.UNSAFE


def test_symbolic_links_and_second_names_in_a_zip_are_refused() -> None:
    """A link would point an unpacker elsewhere; a Unicode path field gives some readers another name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert judged(buffer.getvalue())[0] is Verdict.UNSAFE
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("a.txt")
        info.extra = struct.pack("<HHBI", 0x7075, 10, 1, zlib.crc32(b"a.txt")) + b"b.pkl"
        archive.writestr(info, "x")
    assert judged(buffer.getvalue())[0] is Verdict.UNSAFE


def test_zip64_archives_are_read() -> None:
    """Sizes in zip64 fields, as writers use them for streams of unknown length."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, archive.open("a.txt", "w", force_zip64=True) as member:
        member.write(b"hello")
    assert judged(buffer.getvalue())[0] is Verdict.SAFE


# torch zip -------------------------------------------------------------------------------------------------------


def _with_storage(size: int, numel: int = 4, extra: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    pid = forge.value(("storage", named("torch", "FloatStorage"), "0", "cpu", numel)) + b"Q"
    hooks = call(named("collections", "OrderedDict"))
    tensor = call(named("torch._utils", "_rebuild_tensor_v2"), pid, 0, (4,), (1,), False, hooks)
    return torch_zip(stream(tensor, 2), extra=(("archive/data/0", bytes(size)), *extra))


def test_records_and_storages_match_one_to_one() -> None:
    """Right size: safe. Wrong size or missing: unsafe. A record nobody names: unknown."""
    assert judged(_with_storage(16)) == (Verdict.SAFE, "torch-zip", [])
    assert judged(_with_storage(12))[0] is Verdict.UNSAFE
    assert judged(torch_zip(stream(forge.value(1), 2), extra=(("archive/data/0", b"x"),)))[0] is Verdict.UNKNOWN
    assert judged(_with_storage(16, extra=(("archive/evil.py", b"x"),)))[0] is Verdict.UNSAFE


def test_bytes_behind_the_pickle_of_a_torch_zip_are_refused() -> None:
    """data.pkl ends at its STOP."""
    assert judged(torch_zip(BENIGN + b"x"))[0] is Verdict.UNSAFE


def test_torchscript_is_unknown() -> None:
    """TorchScript brings code of its own: nobody can vet it by names."""
    data = zip_of([("m/data.pkl", BENIGN), ("m/constants.pkl", BENIGN), ("m/code/x.py", b"def f(): pass")])
    assert judged(data)[:2] == (Verdict.UNKNOWN, "torchscript")


def test_row_of_torch_zips_is_a_distributed_checkpoint() -> None:
    """.distcp: archives that tile the file; a gap or a bad one among them is refused."""
    good = torch_zip(BENIGN)
    assert judged(good * 3)[:2] == (Verdict.SAFE, "distcp")
    assert judged(good + b"gap" + good)[0] is Verdict.UNSAFE
    assert judged(good + torch_zip(EVIL) + good)[0] is Verdict.UNSAFE


# compressed ------------------------------------------------------------------------------------------------------

PACKERS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zlib": zlib.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_stored,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_content_is_judged(kind: str) -> None:
    """Safe inside is safe; evil inside, a cut stream or bytes behind it are not."""
    pack = PACKERS[kind]
    assert judged(pack(BENIGN))[0] is Verdict.SAFE
    assert judged(pack(EVIL))[0] is Verdict.UNSAFE
    assert judged(pack(BENIGN)[:-3])[0] is not Verdict.SAFE
    assert judged(pack(BENIGN) + b"tail")[0] is Verdict.UNSAFE


def test_lz4_blocks_with_matches_unfold() -> None:
    """A real compressed block: literals, then an overlapping match."""
    from trainguard.scan.budget import Meter
    from trainguard.scan.formats.lz4 import BadLz4, unfold_block

    out = bytearray()
    unfold_block(b"\x16a\1\0\x50bcdef", out, floor=0, most=100, meter=Meter(ScanPolicy()))
    assert bytes(out) == b"a" * 11 + b"bcdef"
    with pytest.raises(BadLz4):
        unfold_block(b"\x16a\x09\0\x50bcdef", bytearray(), floor=0, most=100, meter=Meter(ScanPolicy()))


def test_zstandard_is_never_clean_where_it_cannot_be_read() -> None:
    """Unknown on Pythons without it; judged on those with it. A bare header is safe on neither."""
    assert judged(b"\x28\xb5\x2f\xfd" + bytes(20))[0] is not Verdict.SAFE


# tar -------------------------------------------------------------------------------------------------------------


def test_tar_is_judged_by_its_members() -> None:
    """Plain and gzipped, with long names."""
    assert judged(tar_of([("a/b.txt", b"x"), ("c" * 150, BENIGN)]))[:2] == (Verdict.SAFE, "tar")
    assert judged(tar_of([("a", torch_zip(BENIGN))], "w:gz"))[0] is Verdict.SAFE
    assert judged(tar_of([("a", EVIL)], "w:gz"))[0] is Verdict.UNSAFE


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_tar_with_anything_but_files_and_folders_is_refused(kind: bytes) -> None:
    """Links and devices act on the disk of whoever unpacks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("x")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert judged(buffer.getvalue())[0] is Verdict.UNSAFE


def test_tar_that_climbs_or_does_not_end_is_refused() -> None:
    """Traversal, repeated names, missing end blocks, bytes behind the end."""
    assert judged(tar_of([("../a", b"x")]))[0] is Verdict.UNSAFE
    assert judged(tar_of([("a", b"x"), ("a", b"y")]))[0] is Verdict.UNSAFE
    good = tar_of([("a", b"x")])
    assert judged(good[:1024])[0] is Verdict.UNSAFE
    assert judged(good[:-1] + b"x")[0] is Verdict.UNSAFE


# arrays and tensors ----------------------------------------------------------------------------------------------


def _npy(descr: str, shape: str, data: bytes) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def test_npy_accounts_for_every_byte() -> None:
    """The data is exactly what shape and dtype say; several arrays may follow each other."""
    good = _npy("'<f8'", "(2,)", bytes(16))
    assert judged(good)[:2] == (Verdict.SAFE, "npy")
    assert judged(good + good)[0] is Verdict.SAFE
    assert judged(_npy("[('a', '<i4'), ('b', 'U3', (2,))]", "(3,)", bytes(3 * 28)))[0] is Verdict.SAFE
    for bad in (good[:-1], good + b"x", _npy("'<f8'", "(-2,)", b""), _npy("__import__('os')", "(2,)", bytes(16))):
        assert judged(bad)[0] is Verdict.UNSAFE


def _safetensors(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_safetensors_header_must_tile_the_data() -> None:
    """Holes, overlaps, wrong sizes, unknown keys and repeated keys are refused."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert judged(_safetensors({"w": entry, "__metadata__": {"format": "pt"}}, bytes(8)))[:2] == (
        Verdict.SAFE,
        "safetensors",
    )
    assert judged(_safetensors({"w": entry}, bytes(9)))[0] is Verdict.UNSAFE
    assert judged(_safetensors({"w": entry, "v": entry}, bytes(8)))[0] is Verdict.UNSAFE
    assert judged(_safetensors({"w": entry | {"shape": [3]}}, bytes(8)))[0] is Verdict.UNSAFE
    assert judged(_safetensors({"w": entry | {"x": 1}}, bytes(8)))[0] is Verdict.UNSAFE
    assert judged(_safetensors({"w": entry, "__metadata__": {"a": [1]}}, bytes(8)))[0] is Verdict.UNSAFE
    text = json.dumps({"w": entry})[:-1].encode() + b"," + json.dumps({"w": entry})[1:].encode()
    assert judged(struct.pack("<Q", len(text)) + text + bytes(8))[0] is Verdict.UNSAFE


def test_safetensors_whose_length_looks_like_a_pickle_is_still_safetensors() -> None:
    """A header of 0x0480 bytes begins like PROTO 4; and a pickle dressed up that way is refused as both."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    good = struct.pack("<Q", 0x480) + header + b" " * (0x480 - len(header)) + b"x"
    assert judged(good)[:2] == (Verdict.SAFE, "safetensors")
    dressed = b'\x80\x04C\x05\0\0\0\0{"0' + touch("x") + b"."
    assert judged(dressed + bytes(2000))[0] is Verdict.UNSAFE


def test_gguf_template_is_looked_at() -> None:
    """An ordinary template passes, one that reaches for attributes does not."""
    good = forge._gguf("{% for m in messages %}{{ m['role'] + ': ' + m.content | trim }}{% endfor %}")
    assert judged(good)[:2] == (Verdict.SAFE, "gguf")
    assert judged(forge._gguf("{{ x.__class__ }}"))[0] is Verdict.UNSAFE
    assert judged(good[:-4])[0] is Verdict.UNSAFE


def test_onnx_with_data_beside_it_passes_and_outside_does_not() -> None:
    """External data may only lie in a plainly named file of the folder."""
    assert judged(forge._onnx("weights.bin", ""))[:2] == (Verdict.SAFE, "onnx")
    for place in ("../x", "/etc/passwd", "a/../../x", "c:\\x"):
        assert judged(forge._onnx(place, ""))[0] is Verdict.UNSAFE
    assert judged(forge._onnx("", "ai.onnx.contrib"))[0] is Verdict.UNKNOWN


# configs ---------------------------------------------------------------------------------------------------------


def _keras(config: object) -> bytes:
    return zip_of([("config.json", json.dumps(config).encode()), ("metadata.json", b"{}")])


def test_keras_config_of_known_layers_passes() -> None:
    """Known classes of known modules; anything else is unknown, code is unsafe."""
    dense = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 3}, "registered_name": None}
    model = {"module": "keras", "class_name": "Sequential", "config": {"layers": [dense]}}
    assert judged(_keras(model))[:2] == (Verdict.SAFE, "keras")
    assert judged(_keras(model | {"class_name": "Mine"}))[0] is Verdict.UNKNOWN
    assert judged(_keras({"class_name": "Lambda", "module": "keras.layers"}))[0] is Verdict.UNSAFE
    assert judged(_keras({"class_name": "run", "module": "subprocess"}))[0] is Verdict.UNSAFE


@pytest.mark.parametrize(
    ("config", "verdict"),
    [
        ({"model_type": "bert", "hidden_size": 8}, Verdict.SAFE),
        ({"auto_map": {}}, Verdict.SAFE),
        ({"attn_implementation": "flash_attention_2"}, Verdict.SAFE),
        ({"auto_map": {"AutoModel": "m.Model"}}, Verdict.UNKNOWN),
        ({"deep": [{"auto_map": {"AutoModel": "m.Model"}}]}, Verdict.UNKNOWN),
        ({"auto_map": {"AutoModel": "owner/repo--m.Model"}}, Verdict.UNSAFE),
        ({"_attn_implementation_internal": "owner/kernel"}, Verdict.UNSAFE),
        ({"trust_remote_code": True}, Verdict.UNSAFE),
        ({"_target_": "os.system"}, Verdict.UNKNOWN),
        ({"auto_mapping": {"parent_library": "evil"}}, Verdict.UNKNOWN),
        ({"chat_template": "{{ ''.__class__ }}"}, Verdict.UNSAFE),
        ({"chat_template": [{"name": "x", "template": "{{ x|attr('y') }}"}]}, Verdict.UNSAFE),
        ([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Pooling"}], Verdict.SAFE),
        ([{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}], Verdict.UNKNOWN),
    ],
)
def test_json_configs(config: object, verdict: Verdict) -> None:
    """Keys that make a loader import are found at any depth; the same keys without a name are not."""
    assert judged(json.dumps(config).encode(), "config.json")[0] is verdict


def test_json_with_a_repeated_key_is_refused() -> None:
    """Two readers would take different values."""
    assert judged(b'{"a": 1, "a": 2}')[0] is Verdict.UNSAFE


def test_large_json_is_read_by_its_keys() -> None:
    """Past the node limit only keys are read, escapes included."""
    policy = ScanPolicy(json_nodes=100)
    filler = b",".join(b'"k%d": 1' % n for n in range(200))
    assert judged(b"{" + filler + b"}", policy=policy)[0] is Verdict.SAFE
    assert judged(b"{" + filler + b', "auto\\u005fmap": "m.X"}', policy=policy)[0] is Verdict.UNKNOWN


# everything else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name", "verdict", "form"),
    [
        (b"# Title\n\nSome words.\n", "README.md", Verdict.SAFE, "text"),
        (b"cat\ndog\nbird\n", "labels.txt", Verdict.SAFE, "text"),
        (b"certifi\nclick\nnumpy\n", "requirements.txt", Verdict.SAFE, "text"),
        (b"Version 1", "VERSION", Verdict.SAFE, "text"),
        (b"lr: 0.1\n", "config.yaml", Verdict.SAFE, "yaml"),
        (b"a: !!python/name:os.system\n", "config.yaml", Verdict.UNSAFE, "yaml"),
        (b"import torch\n", "modeling.py", Verdict.UNKNOWN, "python"),
        (b"\x7fELF" + bytes(60), "weights", Verdict.UNSAFE, "code"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "logo.png", Verdict.SAFE, "image"),
        (b"\x00\x01\x02\x03" * 20, "blob", Verdict.UNKNOWN, "unknown"),
        (b"", "empty", Verdict.SAFE, "empty"),
        (b"cthis\ns\nbroken", "notes.txt", Verdict.UNSAFE, "text"),
    ],
)
def test_other_files(data: bytes, name: str, verdict: Verdict, form: str) -> None:
    """Text is inert unless a loader imports it by name or an unpickler would act on it; unknown is not clean."""
    assert judged(data, name)[:2] == (verdict, form)


def test_tensorboard_events_are_known_by_their_checksums() -> None:
    """TFRecord framing; a broken frame is refused."""
    from trainguard.scan.formats.inert import masked_crc32c

    head = struct.pack("<Q", 5)
    record = head + struct.pack("<I", masked_crc32c(head)) + b"hello" + bytes(4)
    assert judged(record * 2)[:2] == (Verdict.SAFE, "tfrecord")
    assert judged(record + record[:-2])[0] is Verdict.UNSAFE


def test_several_pickles_in_a_row_are_all_judged() -> None:
    """A loader may load again; what is behind the first pickle counts."""
    assert judged(BENIGN * 3)[0] is Verdict.SAFE
    assert judged(BENIGN + EVIL)[0] is Verdict.UNSAFE
    assert judged(BENIGN + b"\0\0")[0] is Verdict.UNSAFE


def test_nesting_is_bounded(tmp_path: Path) -> None:
    """Deeper than the policy allows is an error, never clean."""
    data = BENIGN
    for _ in range(12):
        data = zip_of([("x", data)])
    assert judged(data)[0] is Verdict.ERROR
