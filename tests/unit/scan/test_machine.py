"""The pickle machine: what each kind of stream makes of the stack, and what it refuses."""

from __future__ import annotations

import argparse
import collections
import pickle
import struct

import pytest

from trainguard.scan.budget import Meter, OverBudget
from trainguard.scan.limits import ScanPolicy
from trainguard.scan.machine import JOBLIB, PICKLE, TORCH_ZIP, Loader, Machine, Malformed, Trace
from trainguard.scan.rules import Refused
from trainguard.scan.source import BytesSource
from trainguard.scan.trust import Trust
from trainguard.scan.values import Global
from trainguard.testing.forge import call, named, raw, stack_named, stream, text, value

POLICY = ScanPolicy()


def run(data: bytes, loader: Loader = PICKLE, policy: ScanPolicy = POLICY) -> tuple[Trace, list[tuple[str, str]]]:
    """(trace, unlisted names with their last use)."""
    unlisted: dict[str, str] = {}

    def note(name: Global, use: str, offset: int) -> None:
        unlisted[name.name] = use

    machine = Machine(
        BytesSource(data),
        0,
        loader=loader,
        trust=Trust(policy),
        meter=Meter(policy),
        on_unlisted=note,
        on_nested=lambda source, offset: None,
    )
    return machine.run(), sorted(unlisted.items())


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back_as_they_are(protocol: int) -> None:
    """Constants, tuples and lists stand for themselves at every protocol."""
    thing = [1, -7, 1 << 80, 2.5, None, True, False, "text", "ä\n", (1, 2), (1, 2, 3, 4), [], ()]
    trace, unlisted = run(pickle.dumps(thing, protocol=protocol))
    assert trace.value == thing
    assert unlisted == []


@pytest.mark.parametrize("protocol", range(6))
def test_names_are_recorded_in_order(protocol: int) -> None:
    """What find_class would be asked for, with Python 2 names mapped below protocol 3."""
    data = pickle.dumps([collections.OrderedDict(), {1}, argparse.Namespace()], protocol=protocol)
    trace, unlisted = run(data)
    assert ("collections", "OrderedDict") in trace.globals
    assert ("argparse", "Namespace") in trace.globals
    assert not any(module == "__builtin__" for module, _ in trace.globals)
    assert unlisted == []


def test_end_is_the_byte_after_stop() -> None:
    """Bytes behind STOP are not taken."""
    trace, _ = run(pickle.dumps(1) + b"rest")
    assert trace.end == len(pickle.dumps(1))


def test_memo_is_real() -> None:
    """A memo entry that is overwritten gives the new value, and shared objects are the same object."""
    trace, _ = run(stream(b"K\1q\0" + b"0" + b"K\2q\0" + b"0" + b"h\0"))
    assert trace.value == 2
    shared: list[int] = []
    trace, _ = run(pickle.dumps((shared, shared)))
    assert trace.value[0] is trace.value[1]


def test_unlisted_call_is_noted_with_its_strongest_use() -> None:
    """Naming, instantiating and calling are told apart; simulation goes on and finds the next name."""
    data = stream(named("a.b", "Named") + named("a.b", "Made") + b")\x81" + call(named("a.b", "called"), 1) + b"\x87")
    _, unlisted = run(data)
    assert unlisted == [("a.b.Made", "instance"), ("a.b.Named", "value"), ("a.b.called", "call")]


def test_dotted_name_is_another_name() -> None:
    """`module:Outer.inner` is never the listed `module.Outer.inner`."""
    _, unlisted = run(stream(stack_named("collections", "abc.Mapping")))
    assert unlisted == [("collections:abc.Mapping", "value")]


REFUSED = {
    "a computed name": text("os") + call(named("builtins", "str"), "x") + b"\x93",
    "calling a result": call(call(named("collections", "OrderedDict")), 1),
    "calling a constant": call(named("torch", "float32")),
    "state on a class": named("argparse", "Namespace") + b"}" + text("a") + b"Nsb",
    "state on a dict": b"}}b",
    "state twice": named("argparse", "Namespace") + b")\x81}b}b",
    "a dunder attribute with an object": named("argparse", "Namespace")
    + b")\x81}"
    + text("__call__")
    + named("builtins", "list")
    + b"sb",
    "slots on an ordinary class": named("argparse", "Namespace") + b")\x81N}\x86b",
    "appending to an instance": named("argparse", "Namespace") + b")\x81Na",
    "items of a list": b"]NNs",
    "a method as an item": named("lightning.fabric.utilities.data", "AttributeDict")
    + b")\x81"
    + text("__setstate__")
    + named("builtins", "list")
    + b"s",
    "an extension code": b"\x82\x01",
    "getattr kept as a value": named("builtins", "getattr") + b"\x85",
    "getattr in a list": b"]" + named("builtins", "getattr") + b"a",
    "getattr on a class": call(named("builtins", "getattr"), named("argparse", "Namespace"), "mro"),
    "text to OrderedDict": call(named("collections", "OrderedDict"), "shell"),
    "a length to bytearray": call(named("builtins", "bytearray"), 1 << 30),
    "an unlisted codec": call(named("_codecs", "encode"), "x", "rot13"),
    "a harmful factory": call(named("collections", "defaultdict"), named("torch.storage", "_load_from_bytes")),
    "a persistent id in a plain pickle": text("x") + b"Q",
    "keywords to NEWOBJ_EX": named("argparse", "Namespace") + b")}" + text("a") + b"Ns\x92",
    "a deep key": b"}" + b")" + b"\x85" * 20 + b"Ns",
    "a far memo index": b"Nr\xff\xff\xff\x7f",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    """Each of these is against a rule, whatever surrounds it."""
    with pytest.raises(Refused):
        run(stream(b"0N".join((b"N", REFUSED[what]))))


MALFORMED = {
    "empty": b"",
    "no stop": b"\x80\x04N",
    "empty stack": b"\x80\x04.",
    "no opcode": b"\x80\x04\xff.",
    "protocol 9": b"\x80\x09N.",
    "unread memo": b"\x80\x04h\x05.",
    "tuple without mark": b"\x80\x04Nt.",
    "cut argument": b"\x80\x04X\xff\0\0\0abc",
    "bad text": b"\x80\x04X\2\0\0\0\xff\xfe.",
    "odd dict": b"\x80\x04(Nd.",
    "set as key": b"\x80\x04}\x8fNs.",
    "octal integer": b"I010\n.",
    "infinite by overflow": b"F1e999\n.",
    "frame straddled": b"\x80\x04\x95\2\0\0\0\0\0\0\0K\1\x85.",
    "frame inside frame": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x95\1\0\0\0\0\0\0\0NNNNNNN.",
    "stop inside frame": b"\x80\x04\x95\5\0\0\0\0\0\0\0N.NNN",
    "frame past the end": b"\x80\x04\x95\xff\0\0\0\0\0\0\0N.",
    "below the mark": b"\x80\x04N(\x85.",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_stream_raises(what: str) -> None:
    """Anything an unpickler would stumble over is malformed, never ignored."""
    data = MALFORMED[what]
    if what == "frame straddled":
        data = b"\x80\x04\x95\1\0\0\0\0\0\0\0K\1."
    with pytest.raises(Malformed):
        run(data)


def _tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], hooks: bytes = b"") -> bytes:
    pid = value(("storage", named("torch", "FloatStorage"), "0", "cpu", numel)) + b"Q"
    hooks = hooks or call(named("collections", "OrderedDict"))
    return call(named("torch._utils", "_rebuild_tensor_v2"), pid, offset, size, stride, False, hooks)


def test_tensor_inside_its_storage_is_fine() -> None:
    """Offsets, strides, empty tensors and scalars."""
    for geometry in (
        (4, 0, (2, 2), (2, 1)),
        (4, 3, (), ()),
        (4, 0, (0, 9), (9, 1)),
        (4, 1, (3,), (1,)),
        (1, 0, (9,), (0,)),
    ):
        trace, unlisted = run(stream(_tensor(*geometry)), TORCH_ZIP)
        assert trace.storages == {"0": 4 * geometry[0]}
        assert unlisted == []


@pytest.mark.parametrize(
    "geometry",
    [
        (4, 1, (2, 2), (2, 1)),
        (4, 0, (5,), (1,)),
        (4, 5, (0,), (1,)),
        (4, -1, (1,), (1,)),
        (4, 0, (2,), (-1,)),
        (4, 0, (2,), ()),
    ],
)
def test_tensor_outside_its_storage_is_refused(geometry: tuple[int, int, tuple[int, ...], tuple[int, ...]]) -> None:
    """The class of CVE-2026-24747: views that reach past their storage."""
    with pytest.raises(Refused):
        run(stream(_tensor(*geometry)), TORCH_ZIP)


def test_hooks_must_be_empty_and_stay_empty() -> None:
    """Backward hooks run later; an OrderedDict that is filled after the tensor took it is refused."""
    full = call(named("collections", "OrderedDict"), [(1, 2)])
    with pytest.raises(Refused):
        run(stream(_tensor(4, 0, (4,), (1,), full)), TORCH_ZIP)
    kept = call(named("collections", "OrderedDict")) + b"q\x63"
    with pytest.raises(Refused):
        run(stream(_tensor(4, 0, (4,), (1,), kept) + b"0h\x63K\1K\2s"), TORCH_ZIP)


def test_one_storage_key_means_one_size() -> None:
    """Two persistent ids that disagree about a storage are refused."""
    with pytest.raises(Refused):
        run(stream(_tensor(4, 0, (4,), (1,)) + _tensor(8, 0, (4,), (1,)) + b"\x86"), TORCH_ZIP)


def test_numpy_state_must_fit_its_shape() -> None:
    """Array data has exactly the bytes its shape and dtype need."""
    numpy = pytest.importorskip("numpy")
    good = pickle.dumps(numpy.arange(4.0), protocol=2)
    assert run(good)[1] == []
    with pytest.raises(Refused):
        run(good.replace(b"K\x04\x85", b"K\x05\x85"))


def test_raw_array_bytes_only_in_joblib() -> None:
    """A joblib wrapper in a plain pickle would make its array run as opcodes."""
    from trainguard.testing.forge import _wrapper

    data = b"\x80\x04" + _wrapper("f8", (2,)) + bytes(16) + b"."
    trace, _ = run(data, JOBLIB)
    assert (trace.inline_arrays, trace.end) == (1, len(data))
    with pytest.raises(Refused):
        run(data, PICKLE)


def test_long_bytes_are_not_read() -> None:
    """A long constant is a place, not a copy; shapes are still checked against its length."""

    class Counting(BytesSource):
        taken = 0

        def read(self, offset: int, length: int) -> bytes:
            data = super().read(offset, length)
            Counting.taken += len(data)
            return data

    size = 40 << 20
    source = Counting(b"\x80\x04B" + struct.pack("<I", size) + bytes(size) + b".")
    machine = Machine(
        source,
        0,
        loader=PICKLE,
        trust=Trust(POLICY),
        meter=Meter(POLICY),
        on_unlisted=lambda *_: None,
        on_nested=lambda *_: None,
    )
    assert machine.run().value.length == size
    assert Counting.taken < 10 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04" + b"N0" * 60_000 + b"N.",
        b"\x80\x04" + b"]" * 60_000 + b".",
        b"\x80\x04" + b"X\1\0\0\0a" * 60_000 + b".",
        b"L" + b"9" * 5000 + b"L\n.",
        b"\x80\x04\x8b" + struct.pack("<I", 100_000) + bytes(100_000) + b".",
    ],
    ids=["operations", "containers", "strings", "digits", "wide-integer"],
)
def test_over_budget_raises(data: bytes) -> None:
    """Every limit is a limit."""
    with pytest.raises(OverBudget):
        run(data, policy=ScanPolicy(operations=50_000, values=50_000))


def test_same_result_through_a_window_as_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams longer than the window give the same trace."""
    from trainguard.scan import machine as module

    thing = [{"k": list(range(50)), "t": "x" * 100, "b": bytes(3000)} for _ in range(200)]
    data = pickle.dumps(thing, protocol=4)
    whole, _ = run(data)
    monkeypatch.setattr(module, "WHOLE_BYTES", 1 << 12)
    monkeypatch.setattr(module, "WINDOW_BYTES", 1 << 13)
    windowed, _ = run(data)
    assert (windowed.value, windowed.end, windowed.globals) == (whole.value, whole.end, whole.globals)


def test_nested_bytes_are_handed_on() -> None:
    """torch.storage._load_from_bytes: the bytes come back for a look of their own."""
    seen: list[bytes] = []
    data = stream(call(named("torch.storage", "_load_from_bytes"), raw(b"inner")), 3)
    machine = Machine(
        BytesSource(data),
        0,
        loader=PICKLE,
        trust=Trust(POLICY),
        meter=Meter(POLICY),
        on_unlisted=lambda *_: None,
        on_nested=lambda source, offset: seen.append(source.read(0, 99)),
    )
    machine.run()
    assert seen == [b"inner"]
