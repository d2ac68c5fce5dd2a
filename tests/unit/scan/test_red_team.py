"""Ways around the scan that were tried against it, each with what must come of it.

Those that were live once are proved so: the file is loaded in a child process and its marker appears.
"""

from __future__ import annotations

import base64
import json
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from trainguard.scan import ScanPolicy, Verdict
from trainguard.scan.formats import hdf5
from trainguard.scan.source import BytesSource
from trainguard.scan.vet import judge_source
from trainguard.testing.forge import BENIGN, call, named, stream, text, touch, value, zip_of


def verdict_of(data: bytes, name: str = "model.bin") -> Verdict:
    notes, _ = judge_source(BytesSource(data), ScanPolicy(), name, in_folder=True)
    return notes.verdict


# joblib files that pickle.load reads otherwise --------------------------------------------------------------------


def wrapped(alignment: int | None, behind: bytes, length: int, before: bytes = b"") -> bytes:
    """A joblib file of one array of bytes: `behind` follows the BUILD, `before` lies on the stack under it."""
    dtype = call(named("numpy", "dtype"), "u1", False, True)
    state = text("subclass") + named("numpy", "ndarray") + text("shape") + value((length,)) + text("order") + text("C")
    state += text("dtype") + dtype + text("allow_mmap") + b"\x89"
    if alignment is not None:
        state += text("numpy_array_alignment_bytes") + value(alignment)
    made = named("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81(" + state + b"db"
    return b"\x80\x04(" + before + made + behind + b"t."


def array_is_code(marker: str) -> bytes:
    """Array bytes that are a call and a STOP."""
    code = touch(marker) + b"."
    return wrapped(None, code, len(code))


def padding_is_code(marker: str) -> bytes:
    """A padding length that is an opcode, and its padding the rest."""
    code = f"posix\nmkdir\n(V{marker}\ntR.".encode()
    return wrapped(255, b"c" + code.ljust(ord("c"), b".") + b"x", 1)


def array_uses_the_stack(marker: str) -> bytes:
    """The names lie on the stack as harmless text; the array's bytes are only what joins and calls them."""
    code = b"0\x93h\0\x85R."  # drop the wrapper, STACK_GLOBAL, the marker from the memo, call
    return wrapped(None, code, len(code), text(marker) + b"q\0" + text("posix") + text("mkdir"))


@pytest.mark.torch
@pytest.mark.parametrize("make", [array_is_code, padding_is_code, array_uses_the_stack])
def test_array_bytes_that_are_opcodes_to_a_plain_unpickler_are_refused(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """joblib.load skips them; pickle.load of the same file runs them, and does so here in a child."""
    pytest.importorskip("joblib")
    marker = tmp_path / "marker"
    path = tmp_path / "model.pkl"
    path.write_bytes(make(str(marker)))
    assert verdict_of(path.read_bytes(), "model.pkl") is Verdict.UNSAFE
    assert not marker.exists()
    child = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", child, str(path)], capture_output=True, timeout=100, check=False)
    assert marker.exists()


@pytest.mark.parametrize("alignment", [None, 16])
def test_honest_array_bytes_are_not_taken_for_opcodes(alignment: int | None) -> None:
    """Numbers, and text that happens to hold letters opcodes have."""
    for data in (bytes(64), bytes(range(256)), b"coffee\ncups\n" * 3, struct.pack("<8d", *map(float, range(8)))):
        padding = b"" if alignment is None else b"\x05" + b"\xff" * 5
        file = wrapped(alignment, padding + data, len(data))
        assert verdict_of(file, "model.joblib") is Verdict.SAFE


# pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        # An attribute called like the method that fills: found first by an unpickler, and called with the items.
        named("collections", "Counter") + b")\x81}" + text("x") + named("torch", "Size") + b"sb" + text("a") + b"K\1s",
        # The member of an enum is one for the whole process: state given to it changes every later comparison.
        call(named("re", "RegexFlag"), 2) + b"}" + text("_value_") + b"K\0sb",
        call(named("numpy", "void"), 1 << 30),
        call(named("fractions", "Fraction"), "1e999999999"),
        # Bytes that numpy would take for pointers to objects.
        call(named("numpy", "dtype"), "V8", False, True) + value((3, "|", None, None, None, 8, 1, 63)) + b"b",
        call(named("re", "_compile"), "a" * 5000, 0),
        call(named("array", "array"), "d", [named("torch", "Size")]),
    ],
)  # fmt: skip
def test_listed_names_used_as_nothing_writes_them_are_refused(body: bytes) -> None:
    """Every name here is on the lists."""
    assert verdict_of(stream(body)) is Verdict.UNSAFE


def test_listed_names_used_as_libraries_write_them_pass() -> None:
    """The same names, as pickled by Python itself."""
    import array
    import collections
    import fractions
    import http
    import re

    things = [
        collections.Counter("aab"),
        re.IGNORECASE,
        fractions.Fraction(1, 3),
        re.compile("a.b"),
        http.HTTPStatus.OK,
    ]
    for protocol in range(6):
        data = pickle.dumps([*things, array.array("d", [1.5])], protocol=protocol)
        assert verdict_of(data) is Verdict.SAFE, protocol


# models -----------------------------------------------------------------------------------------------------------

PLAIN = {"module": "keras", "class_name": "Sequential", "config": {}}
LAMBDA = {"name": "x", "module": "keras.layers", "class_name": "Lambda", "config": {}}


def test_keras_config_too_long_to_read_is_not_clean() -> None:
    """Padded past the limit, it was once judged as any JSON."""
    config = json.dumps(LAMBDA).encode() + b" " * (17 << 20)
    assert verdict_of(zip_of([("config.json", config), ("metadata.json", b"{}")]), "m.keras") is not Verdict.SAFE


def h5(*texts: str) -> bytes:
    return b"\x89HDF\r\n\x1a\n" + bytes(100) + b"model_config\0" + b"\0".join(text.encode() for text in texts) + b"\0"


@pytest.mark.parametrize(
    "texts",
    [
        (json.dumps(PLAIN), json.dumps(LAMBDA)),
        (json.dumps(LAMBDA), json.dumps(PLAIN)),
        (json.dumps(PLAIN), json.dumps(LAMBDA).replace("class_name", "cl\\u0061ss_name")),
        (json.dumps(PLAIN), json.dumps(LAMBDA).replace('"name"', '"\\u006eame"')),
        (json.dumps(PLAIN), '{"broken, "class_name": "Lambda"}'),
    ],
)
def test_a_plain_config_does_not_hide_another_in_hdf5(texts: tuple[str, ...]) -> None:
    """Whichever comes first, whatever its first key, however its keys are written."""
    assert verdict_of(h5(json.dumps(PLAIN)), "m.h5") is Verdict.SAFE
    assert verdict_of(h5(*texts), "m.h5") is not Verdict.SAFE


def field(number: int, content: bytes) -> bytes:
    """One length-delimited field of a protobuf message."""
    tag = number << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + bytes([len(content)]) + content


@pytest.mark.parametrize("where", ["initializer", "sparse", "attribute"])
def test_onnx_external_data_is_looked_for_in_every_tensor(where: str) -> None:
    """Initializers, sparse ones, and tensors of attributes may all lie in another file."""

    def model(location: bytes) -> bytes:
        tensor = field(8, b"w") + field(13, field(1, b"location") + field(2, location))
        graph = {
            "initializer": field(5, tensor),
            "sparse": field(15, field(1, tensor)),
            "attribute": field(1, field(4, b"Constant") + field(5, field(1, b"a") + field(22, field(1, tensor)))),
        }[where]
        return b"\x08\x08" + field(2, b"p") + field(7, graph + field(2, b"g")) + field(8, field(1, b"") + b"\x10\x11")

    assert verdict_of(model(b"w.data"), "m.onnx") is Verdict.SAFE
    assert verdict_of(model(b"../../w"), "m.onnx") is Verdict.UNSAFE


# templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ (x,)|map(attribute='__class__')|first }}",
        "{{ x|map('attr', y) }}",
        "{{ x|selectattr('__class__') }}",
        "{{ x|groupby('__class__') }}",
        "{{ x['%sclass%s'|format('_'*2, '_'*2)] }}",
        "{% set u = '_' %}{{ x[(u~u)~'class'~(u~u)] }}",
        "{{ x[['_', '_class_', '_']|join] }}",
        "{{ x['%c'|format(95)*2 ~ 'class'] }}",
        "{{ x['--class--'|replace('-', '_')] }}",
        "{{ ''['%c%cclass%c%c'|format(95,95,95,95)] }}",
        "{{ messages[0][('_','_')|join ~ 'class'] }}",
        "{% set u = '\\x5f\\x5fclass\\x5f\\x5f' %}{{ ''[u] }}",
        "{{ ''['ssalc'|reverse] }}",
        "{{ ''[dict(a=1)|list|first] }}",
        "{% for k in dict(a=1) %}{{ ''[k] }}{% endfor %}",
        "{% set k = 'a' * 2 %}{{ x[k] }}",
        "{% set a = 'cla' %}{% set b = 'ss' %}{{ x[a + b] }}",
        "{% set k %}cla{{ 'ss' }}{% endset %}{{ x[k] }}",
        "{% macro m(k) %}{{ x[k] }}{% endmacro %}{{ m('%s' | format(y)) }}",
        "{% macro m(k='a'|upper) %}{{ x[k] }}{% endmacro %}{{ m() }}",
        "{% macro m(k) %}{{ x[k] }}{% endmacro %}{% set f = m %}{{ f('a') }}",
        "{% set ns = namespace(k='a') %}{% set ns.k = ns.k ~ 'b' %}{{ x[ns.k] }}",
        "{% set l = ['a' | upper] %}{{ x[l[0]] }}",
        "{% for k in ['a' ~ 'b'] %}{{ x[k] }}{% endfor %}",
        "{{ x | map(attribute='a' ~ 'b') | list }}",
        "{{ x | map('map', 'a' ~ 'b') | list }}",
        "{{ x | sort(attribute=y | lower) }}",
        "{{ x | join(',', 'a' ~ 'b') }}",
        "{{ x['a' if y else ('b' | upper)] }}",
        "{{ x[loop.cycle('a', 'b')] }}",
        "{{ x[bos_token] }}",
        "{{ x['a,b'.split(',')[0]] }}",
        "{{ x[y.split('z')[0] ~ ''] }}",
    ],
)
def test_templates_that_put_an_attribute_together_are_refused(template: str) -> None:
    """By filters that take a name as text, and by text made on the way."""
    assert verdict_of(json.dumps({"chat_template": template}).encode(), "tokenizer_config.json") is Verdict.UNSAFE


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] | replace('_', ' ') }}{{ turns[loop.index0 - 1]['x'] }}{% endfor %}",
        "{{ tools | map(attribute='function') | list }}{{ params[name] }}{{ '<|im_start|>' + messages[0].role }}",
        "{{ tool.name | replace('-', '_') }}{{ messages[1:] }}{{ 'tool_' + name }}{{ '100%' }}",
        "{% set ns = namespace(found=false) %}{{ messages | selectattr('role', 'equalto', 'user') | first }}",
        "{% for k, v in tool.items() %}{{ tool[k] }}{% endfor %}{{ x[messages | length - 1]['role'] }}",
        "{% set ns = namespace(last=-1) %}{% set ns.last = loop.index0 %}{{ messages[ns.last] }}",
        "{% macro m(spec, names) %}{{ spec[names[0]] }}{% endmacro %}{{ m(tool.parameters, ['type', 'format']) }}",
        "{% generation %}{{ content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}{{ '_' * 40 }}",
        "{{ messages | map(attribute='content') | join('_') }}{% break %}{{ x[loop.index0 % 2 == 0] }}",
        "{{ {'user': 'U', 'bot': 'B'}[m['role']] }}{{ x | selectattr('name', 'equalto', 'a' ~ b) | list }}",
        "{{ text[:n | default(3)] }}{% set space = tool.name.split('.')[0] %}{{ known[space] }}",
        "{{ .System }} {{ if .Prompt }}[INST]{{ end }}",
    ],
)
def test_ordinary_templates_pass(template: str) -> None:
    """What chat templates do: subscripts by name and by number, filters, replaced underscores."""
    assert verdict_of(json.dumps({"chat_template": template}).encode(), "tokenizer_config.json") is Verdict.SAFE


def test_a_list_of_templates_in_gguf_is_not_taken_as_read() -> None:
    """A reader that takes one would render its texts."""
    key, template = b"tokenizer.chat_template", b"{{ x.__class__ }}"
    pair = (
        struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", len(template)) + template
    )
    assert verdict_of(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair, "m.gguf") is not Verdict.SAFE


# keras and diffusers ----------------------------------------------------------------------------------------------


def test_a_keras_class_that_is_no_name_is_refused() -> None:
    """A list with a Lambda in it is no class; whoever reads it as one must not be given it."""
    layer = {"class_name": ["Lambda"], "module": "keras.layers", "config": {}}
    config = {"class_name": "Sequential", "module": "keras", "config": {"layers": [layer]}}
    assert verdict_of(keras_archive(config)) is Verdict.UNSAFE
    layer["class_name"] = "Dense"
    assert verdict_of(keras_archive(config)) is Verdict.SAFE


def keras_archive(config: object) -> bytes:
    return zip_of(
        [
            ("metadata.json", json.dumps({"keras_version": "3.0.0"}).encode()),
            ("config.json", json.dumps(config).encode()),
            ("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(200)),
        ]
    )


def test_pairs_of_a_pipeline_index_are_imports_and_elsewhere_they_are_words() -> None:
    """diffusers imports what model_index.json names; a list of two blocks in a component's config is no import."""
    index = {"_class_name": "P", "_diffusers_version": "0.4", "unet": ["evil_module", "UNet"]}
    assert verdict_of(json.dumps(index).encode(), "model_index.json") is Verdict.UNKNOWN
    blocks = {
        "_class_name": "UNet",
        "_diffusers_version": "0.4",
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    }
    assert verdict_of(json.dumps(blocks).encode(), "config.json") is Verdict.SAFE


# Extra fields, metadata, places and programs in plain texts ---------------------------------------------------------


def zip_with_extra(local: bytes, central: bytes) -> bytes:
    """A torch zip whose pickle has these extra fields in its local header and in the directory."""
    out, directory = b"", b""
    for name, data in ((b"archive/data.pkl", BENIGN), (b"archive/version", b"3\n")):
        extras = (local, central) if name.endswith(b"pkl") else (b"", b"")
        fields = struct.pack("<HHHHHIIIH", 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name))
        directory += b"PK\1\2\x14\0" + fields + struct.pack("<HHHHII", len(extras[1]), 0, 0, 0, 0, len(out))
        directory += name + extras[1]
        out += b"PK\3\4" + fields + struct.pack("<H", len(extras[0])) + name + extras[0] + data
    return out + directory + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 2, 2, len(directory), len(out), 0)


def extra(kind: int, content: bytes) -> bytes:
    return struct.pack("<HH", kind, len(content)) + content


SECOND_NAME = extra(0x7075, struct.pack("<BI", 1, zlib.crc32(b"archive/data.pkl")) + b"archive/evil.pkl")


@pytest.mark.parametrize("side", ["local", "central"])
@pytest.mark.parametrize(
    "field",
    [
        SECOND_NAME,
        extra(1, struct.pack("<QQ", 9999, 9999)),
        extra(0x9901, bytes(7)),
        extra(0x4150, touch("x")),
        b"\1\0\xff\xff",
        extra(0x5455, bytes(5)) * 2,
    ],
    ids=["second-name", "other-size", "encryption", "unknown-kind", "past-its-end", "twice"],
)
def test_extra_fields_that_readers_use_differently_are_refused(field: bytes, side: str) -> None:
    """A second name, other sizes, encryption, hidden bytes: in either header."""
    data = zip_with_extra(field if side == "local" else b"", field if side == "central" else b"")
    assert verdict_of(data, "model.pt") is Verdict.UNSAFE


def test_idle_extra_fields_pass() -> None:
    """torch's padding, times and owners, wide sizes that agree, and the zeros Java leaves."""
    size = len(BENIGN)
    for field in (extra(0x4246, b"Z" * 40), extra(0x5455, bytes(5)) + extra(0x7875, bytes(11)), extra(0xCAFE, b"")):
        assert verdict_of(zip_with_extra(field, b""), "model.pt") is Verdict.SAFE
    assert verdict_of(zip_with_extra(extra(1, struct.pack("<QQ", size, size)), b"\0\0"), "model.pt") is Verdict.SAFE


def safetensors(metadata: object) -> bytes:
    header = json.dumps({"__metadata__": metadata, "w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


def test_a_pickle_in_the_metadata_of_safetensors_is_refused_however_it_is_spelled() -> None:
    """As characters, in base64 of both alphabets, in hex; ordinary metadata passes."""
    run = stream(touch("x"), 2)
    spelled = [run.decode("latin-1"), base64.b64encode(run).decode(), base64.urlsafe_b64encode(run).decode(), run.hex()]
    for payload in spelled:
        assert verdict_of(safetensors({"format": "pt", "note": payload}), "model.safetensors") is Verdict.UNSAFE
    words = {
        "format": "pt",
        "modelspec.title": "coffee and cups",
        "ss_tag_frequency": '{"a": {"b": 12}}',
        "x": "cafe" * 9,
    }
    assert verdict_of(safetensors(words), "model.safetensors") is Verdict.SAFE


LAMBDA = {"module": "keras", "class_name": "Sequential", "config": {"layers": [
    {"module": "keras.layers", "class_name": "Lambda", "config": {"function": ["4wE=", None, None]}}]}}  # fmt: skip


def test_a_keras_config_is_one_wherever_it_lies() -> None:
    """Keras opens an archive without metadata.json, and a model from JSON alone."""
    config = json.dumps(LAMBDA).encode()
    assert verdict_of(zip_of([("config.json", config)]), "model.keras") is Verdict.UNSAFE
    assert verdict_of(config, "architecture.json") is Verdict.UNSAFE
    plain = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": []}}
    assert verdict_of(json.dumps(plain).encode(), "architecture.json") is Verdict.SAFE


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.safetensors.index.json", {"metadata": {}, "weight_map": {"w": "../../evil.safetensors"}}),
        ("pytorch_model.bin.index.json", {"weight_map": {"w": "/tmp/evil.bin"}}),
        ("pytorch_model.bin.index.json", {"weight_map": {"w": "C:\\evil.bin"}}),
        (
            "modules.json",
            [{"idx": 0, "name": "0", "path": "../evil", "type": "sentence_transformers.models.Transformer"}],
        ),
        ("config.json", {"a": [{"_target_": ["os", "system"]}]}),
        ("config.json", {"py/function": "os.system"}),
        ("config.json", {"text_config": {"attn_implementation": {"": "owner/kernel"}}}),
        ("tokenizer_config.json", {"chat_templates": {"x": "{{ cycler.__init__ }}"}}),
        ("config.json", {"system_prompt": "{{ cycler.__init__ }}"}),
        ("notes.ipynb", {"cells": [], "nbformat": 4}),
    ],
)
def test_configs_that_lead_elsewhere_or_carry_programs_are_not_clean(name: str, config: object) -> None:
    """Shards and modules outside the folder, callables spelled otherwise, templates under other keys, notebooks."""
    assert verdict_of(json.dumps(config).encode(), name) is not Verdict.SAFE


def test_configs_of_this_folder_pass() -> None:
    """Shards beside the index, modules below it, prompts with braces of other kinds."""
    for config in (
        {"metadata": {"total_size": 4}, "weight_map": {"w": "model-00001-of-00002.safetensors"}},
        [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}],
        {
            "prompts": {"query": "Instruct: {task}\nQuery: "},
            "prompt_template": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        },
    ):
        assert verdict_of(json.dumps(config).encode(), "config.json") is Verdict.SAFE


@pytest.mark.parametrize("name", ["chat_template.txt", "template", "prompt", "vicuna.txt", "system_prompt.cfg"])
def test_a_template_needs_no_name_of_one(name: str) -> None:
    """Servers take a template from any file; a page for people is not one."""
    text = b"{{ cycler.__init__.__globals__.os.system('x') }}"
    assert verdict_of(text, name) is Verdict.UNSAFE
    assert verdict_of(text, "README.md") is Verdict.SAFE
    assert verdict_of(b"{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", name) is Verdict.SAFE


def test_a_template_that_formats_an_attribute_is_refused() -> None:
    """str.format follows dots outside a sandbox."""
    assert verdict_of(b"{{ '{0.__class__.__init__}'.format(messages) }}", "chat_template.jinja") is Verdict.UNSAFE
    assert verdict_of(b"{{ '{0} and {name}'.format(1, name=2) }}", "chat_template.jinja") is Verdict.SAFE


@pytest.mark.parametrize("tag", ["!new:os.system", "!apply:os.system", "!name:os.system", "!module:os"])
def test_yaml_that_a_speech_toolkit_would_call_is_not_clean(tag: str) -> None:
    """HyperPyYAML's own tags name what is imported and called; its references do not."""
    assert verdict_of(f"a: {tag}\n  - x\n".encode(), "hyperparams.yaml") is not Verdict.SAFE
    assert verdict_of(b"a: 1\nb: !ref <a>\nc: 'so new: it is'\n", "hyperparams.yaml") is Verdict.SAFE


@pytest.mark.parametrize("name", ["kernel.cu", "op.cpp", "setup.js", "Makefile", "Dockerfile", ".envrc", "fit.R"])
def test_source_and_scripts_beside_a_model_are_not_clean(name: str) -> None:
    """Extensions are built from source as they are imported; the rest is run by its name."""
    assert verdict_of(b"all: ;\n", name) is Verdict.UNKNOWN


def test_bytes_of_a_length_are_refused() -> None:
    """`bytes(range(2**36))` asks for 64 GiB before it looks at the first number."""
    many = call(named("builtins", "range"), b"\x8a\x05\0\0\0\0\x10")
    for kind in ("bytes", "bytearray"):
        assert verdict_of(stream(call(named("builtins", kind), many), 3), "x.pkl") is Verdict.UNSAFE


def test_onnx_training_graphs_and_function_defaults_are_looked_at() -> None:
    """External data may hide in graphs that only training runs, and in a function's default attributes."""
    outside = field(13, field(1, b"location") + field(2, b"../../etc/passwd"))
    training = b"\x08\x08" + field(7, b"\x12\1g") + field(20, field(1, field(5, outside)))
    function = b"\x08\x08" + field(7, b"\x12\1g") + field(25, field(11, field(5, outside)))
    assert verdict_of(training, "model.onnx") is Verdict.UNSAFE
    assert verdict_of(function, "model.onnx") is Verdict.UNSAFE


# Places and names in pickled state ----------------------------------------------------------------------------------


def lightning(instantiator: object) -> bytes:
    """A checkpoint of plain values whose hyper-parameters name what the loader shall call."""
    return stream(value({"hyper_parameters": {"lr": 1, "_instantiator": instantiator}, "state_dict": {}}))


def test_a_checkpoint_that_names_what_lightning_imports_is_unknown() -> None:
    """Plain text that `weights_only` lets pass; the loader imports and calls it; its command line's own is safe."""
    assert verdict_of(lightning("evil.run"), "last.ckpt") is Verdict.UNKNOWN
    assert verdict_of(lightning(call(named("builtins", "str"), "evil.run")), "last.ckpt") is Verdict.UNKNOWN
    assert verdict_of(lightning("os.system"), "last.ckpt") is Verdict.UNSAFE
    for honest in ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module", None):
        assert verdict_of(lightning(honest), "last.ckpt") is Verdict.SAFE
    good, bad = text("lightning.pytorch.cli.instantiate_module"), text("evil.run")
    computed = call(named("builtins", "str"), "_instantiator") + bad
    assert verdict_of(stream(b"(" + computed + b"d"), "last.ckpt") is Verdict.UNSAFE
    twice = b"(" + text("_instantiator") + good + text("_instantiator") + bad + b"d"
    assert verdict_of(stream(twice), "last.ckpt") is Verdict.UNKNOWN


def dcp_metadata(place: str) -> bytes:
    state = {"relative_path": place, "offset": 0, "length": 8}
    return stream(named("torch.distributed.checkpoint.filesystem", "_StorageInfo") + b")\x81" + value(state) + b"b")


@pytest.mark.parametrize("place", ["../outside.distcp", "/tmp/x.distcp", "a/../../x", "C:\\x", "~/x"])
def test_distributed_metadata_that_leads_out_of_its_folder_is_refused(place: str) -> None:
    """DCP reads its shards from wherever the metadata says, vetted and sealed or not."""
    assert verdict_of(dcp_metadata(place), ".metadata") is Verdict.UNSAFE
    assert verdict_of(dcp_metadata("__0_0.distcp"), ".metadata") is Verdict.SAFE


def test_a_pointer_to_another_checkpoint_stays_in_its_folder() -> None:
    """DeepSpeed's `latest` holds the name of a folder beside it."""
    assert verdict_of(b"../../victim/global_step900\n", "latest") is Verdict.UNSAFE
    assert verdict_of(b"global_step900\n", "latest") is Verdict.SAFE


# Numbers that numpy, torch and GGUF readers believe ------------------------------------------------------------------


def dtype(code: str, *state: object) -> bytes:
    made = call(named("numpy", "dtype"), code, False, True)
    return made + value(state) + b"b" if state else made


def random_state(position: int) -> bytes:
    key = call(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), (0,), b"C\1b")
    key += value((1, (624,), dtype("u4"), False, b"B" + struct.pack("<I", 2496) + bytes(2496))) + b"b"
    state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}, "has_gauss": 0, "gauss": 0}
    return stream(call(named("numpy.random._pickle", "__randomstate_ctor"), "MT19937") + value(state) + b"b", 3)


def test_a_generator_that_would_read_outside_its_buffer_is_refused() -> None:
    """numpy reads key[pos] without looking: a position of a billion ends the process at the next random number."""
    for position in (-1, 625, 1 << 30):
        assert verdict_of(random_state(position), "rng.pkl") is Verdict.UNSAFE
    for position in (0, 624):
        assert verdict_of(random_state(position), "rng.pkl") is Verdict.SAFE


def test_dtypes_that_hold_themselves_or_miss_a_field_are_refused() -> None:
    """numpy follows such a circle, or a name without its field, in native code."""
    itself = dtype("V8") + b"q\5" + value((3, "|", (b"h\5", (1,)), None, None, 8, 1, 0)) + b"b"
    later = dtype("V8") + b"q\5" + b"0" + dtype("V8", 3, "|", (b"h\5", (1,)), None, None, 8, 1, 0) + b"q\6"
    later += b"0h\5" + value((3, "|", (b"h\6", (1,)), None, None, 8, 1, 0)) + b"b"
    missing = dtype("V8", 3, "|", None, ("b",), {"a": (dtype("f8"), 0)}, 8, 1, 0)
    for made in (itself, later, missing):
        assert verdict_of(stream(made, 3), "x.pkl") is Verdict.UNSAFE
    plain = dtype("V8", 3, "|", None, ("a",), {"a": (dtype("f8"), 0)}, 8, 1, 0)
    assert verdict_of(stream(plain, 3), "x.pkl") is Verdict.SAFE


@pytest.mark.parametrize(("scales", "axis"), [([1, 1], 99), ([1, 1], -5), ([1, 1], 0), ([1] * 5, 1)])
def test_channels_of_a_quantized_tensor_fit_its_shape(scales: list[int], axis: int) -> None:
    """One scale and zero point for each index of an axis that is there."""

    def quantized(scales: list[int], axis: int) -> bytes:
        storage = value(("storage", named("torch", "QInt8Storage"), "0", "cpu", 16)) + b"Q"
        channels = (named("torch", "per_channel_affine"), scales, [0] * len(scales), axis)
        hooks = call(named("collections", "OrderedDict"))
        body = call(named("torch._utils", "_rebuild_qtensor"), storage, 0, (4, 4), (4, 1), channels, False, hooks)
        members = [("a/data.pkl", stream(body, 2)), ("a/byteorder", b"little"), ("a/data/0", bytes(16))]
        return zip_of([*members, ("a/version", b"3\n")])

    assert verdict_of(quantized([1] * 4, 1), "m.pt") is Verdict.SAFE
    assert verdict_of(quantized(scales, axis), "m.pt") is Verdict.UNSAFE


def gguf(
    tensors: list[tuple[tuple[int, ...], int, int]], data: bytes, pairs: list[tuple[str, str]] | None = None
) -> bytes:
    """A GGUF file of (shape, type, offset) tensors and text pairs."""

    def words(given: str) -> bytes:
        return struct.pack("<Q", len(given)) + given.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs or []))
    head += b"".join(words(key) + struct.pack("<I", 8) + words(told) for key, told in pairs or [])
    for number, (shape, kind, offset) in enumerate(tensors):
        head += words(f"t{number}") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data


@pytest.mark.parametrize(
    ("tensors", "length"),
    [
        ([((1 << 40,), 0, 0)], 64),
        ([((1 << 31, 1 << 31, 4), 0, 0)], 64),
        ([((4,), 0, 60)], 64),
        ([((8,), 0, 0), ((8,), 0, 0)], 64),
        ([((33,), 8, 0)], 64),
        ([((8,), 0, 0)], 96),
    ],
    ids=["past-the-end", "overflow", "elsewhere", "overlapping", "half-a-block", "bytes-behind"],
)
def test_gguf_tensors_tile_the_data(tensors: list[tuple[tuple[int, ...], int, int]], length: int) -> None:
    """Sizes by type and shape, one behind the other, aligned, and nothing behind."""
    assert verdict_of(gguf(tensors, bytes(length)), "m.gguf") is Verdict.UNSAFE


def test_honest_gguf_passes_and_an_unknown_type_is_unknown() -> None:
    """Floats and blocks, with and without the last padding; texts; a vocabulary without tensors."""
    for length in (32 + 34, 96):
        assert verdict_of(gguf([((3,), 0, 0), ((32,), 8, 32)], bytes(length)), "m.gguf") is Verdict.SAFE
    assert verdict_of(gguf([], b"", [("general.name", "a {{ b }}")]), "m.gguf") is Verdict.SAFE
    assert verdict_of(gguf([((4,), 9999, 0)], bytes(32)), "m.gguf") is Verdict.UNKNOWN


def test_gguf_programs_are_found_under_any_key() -> None:
    """Whatever the key's case, whatever the key says; and no key twice."""
    for key in ("tokenizer.Chat_Template", "general.description"):
        assert verdict_of(gguf([], b"", [(key, "{{ x.__class__ }}")]), "m.gguf") is Verdict.UNSAFE
    assert verdict_of(gguf([], b"", [("a", "1"), ("a", "2")]), "m.gguf") is Verdict.UNSAFE


def test_what_mlflow_and_a_router_import_is_not_clean() -> None:
    """MLmodel names the module that loads it; a router names classes."""
    flavour = "flavors:\n  python_function:\n    loader_module: {}\n"
    assert verdict_of(flavour.format("evil").encode(), "MLmodel") is not Verdict.SAFE
    assert verdict_of(flavour.format("mlflow.sklearn").encode(), "MLmodel") is Verdict.SAFE
    router = {"types": {"0": "evil.Cls"}, "structure": {"query": ["0"]}, "parameters": {}}
    assert verdict_of(json.dumps(router).encode(), "router_config.json") is Verdict.UNKNOWN


# HDF5 that opens other files ------------------------------------------------------------------------------------------

HDF5 = Path(__file__).parents[2] / "vectors" / "hdf5"


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_hdf5_that_makes_a_reader_open_other_files_is_not_clean(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """External links, one and many, and raw data are unsafe, virtual datasets unknown; links inside the file pass."""
    monkeypatch.setattr(hdf5, "STEP_BYTES", 1024)
    wanted = {"link": Verdict.UNSAFE, "many": Verdict.UNSAFE, "raw": Verdict.UNSAFE, "vds": Verdict.UNKNOWN}
    for name, verdict in (wanted | {"plain": Verdict.SAFE}).items():
        data = (HDF5 / f"{name}_{version}.h5").read_bytes()
        assert verdict_of(data, "model.h5") is verdict, name
        # Behind other data, across the end of a step: the bytes that declare it are found wherever they lie.
        if name in ("link", "many"):
            for shift in range(0, 160, 7):
                moved = data[:8] + bytes(1024 - 96 - shift) + data[8:]
                assert verdict_of(moved, "model.h5") is Verdict.UNSAFE, shift


def test_an_hdf5_config_across_the_end_of_a_step_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose first bytes end one step and whose last begin the next."""
    monkeypatch.setattr(hdf5, "STEP_BYTES", 1024)
    plain = b'{"class_name": "Sequential", "config": {"layers": []}}'
    for cut in range(1, 24):
        head = b"\x89HDF\r\n\x1a\nmodel_config\0" + plain + b"\0"
        data = head + bytes(1024 - cut - len(head)) + b'{"class_name": "Lambda", "config": {}}\0'
        assert verdict_of(data, "model.h5") is not Verdict.SAFE, cut
