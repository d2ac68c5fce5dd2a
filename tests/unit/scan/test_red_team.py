"""Ways around the scan that were tried against it, each with what must come of it.

Those that were live once are proved so: the file is loaded in a child process and its marker appears.
"""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from trainguard.scan import ScanPolicy, Verdict
from trainguard.scan.source import BytesSource
from trainguard.scan.vet import judge_source
from trainguard.testing.forge import call, named, stream, text, touch, value, zip_of


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
