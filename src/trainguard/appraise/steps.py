"""Step frames as typed values: strict, bounded, and with the numbers unpacked (spec/evidence.md, "Step frames").

Everything here comes from a process that may be the attacker's. `parse_` functions raise MalformedEvidence with what
was expected and what was found; no other error comes out of them.
"""

from __future__ import annotations

import array
import base64
import binascii
import math
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from trainguard.errors import MalformedEvidence

TENSORS_LIMIT = 256
VALUES_LIMIT = 1 << 17
SHADOW_LIMIT = 64
SCALAR_KEYS = frozenset({"step", "mu_product", "eta", "mu"})
"""State entries with one value for a whole tensor."""


class _Blob(msgspec.Struct, forbid_unknown_fields=True):
    f: str
    b: str


class _Differ(msgspec.Struct):
    """One weight or state entry that a shadow has otherwise."""

    name: str
    what: str
    differ: int
    of: int
    at: list[int] = []
    before: list[float | str] = []
    live: list[float | str] = []
    twin: list[float | str] = []
    ratio: float | str | None = None
    off: float | str | None = None


class _Shadow(msgspec.Struct):
    """What a twin of the optimizer made of the same step, or why there was none."""

    off: str | None = None
    source: list[tuple[str, str]] = []
    scope: str = ""
    tensors: int = 0
    elements: int = 0
    calls: int = 0
    live: str = ""
    twin: str = ""
    again: str | None = None
    course: int | None = None
    covers: list[int] = []
    values: _Blob | None = None
    differ: list[_Differ] = []


class _Sample(msgspec.Struct):
    """The value of link *optimizer*."""

    kinds: tuple[str, str | None, str] = msgspec.field(name="class")
    tensors: list[tuple[str, int, int, int, str, str]]
    hyper: dict[str, dict[str, Any]] = {}
    extra: list[str] = []
    left_out: dict[str, int] = {}
    shared: bool = False
    at: list[tuple[int, int, int]] = []
    grad: list[bool | str] = []
    local: list[bool] = []
    state: list[list[str]] = []
    state_after: list[list[str]] = []
    before: _Blob | None = None
    after: _Blob | None = None
    shadow: _Shadow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Differing:
    """A weight or state entry that the twin has otherwise than the live optimizer."""

    name: str
    what: str
    """"weight", or the key of the state."""
    differ: int
    of: int
    at: list[int]
    """Flat indices of the elements given, those that differ most first."""
    before: list[float]
    live: list[float]
    twin: list[float]
    ratio: float | None
    """Of a weight: the live change along the twin's, in units of the twin's."""
    off: float | None
    """Of a weight: length of the difference of the two changes, in units of the twin's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """What a twin made from the optimizer's source did with copies of the same step (watch/shadow.py)."""

    off: str | None
    """Why there was none; everything else is empty then."""
    source: list[tuple[str, str]]
    """Path and SHA-256 of every source file it was made from."""
    scope: str
    """"all", or the name of the one tensor that was repeated."""
    tensors: int
    live: str
    twin: str
    again: str | None
    """Digest of a second twin, made where the first differed."""
    course: int | None
    """The first closure call at which the twin's weights were not the live ones."""
    values: dict[int, list[float]]
    """Tensor of the sample → the twin's weights at the sampled places."""
    differ: list[Differing]

    @property
    def agrees(self) -> bool:
        """Whether the twin gave, by its own account, what the live optimizer did."""
        return self.live == self.twin and not self.differ and self.course is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Some elements of one tensor, before and after an update."""

    name: str
    group: int
    position: int
    numel: int
    dtype: str
    device: str
    at: tuple[int, int, int]
    """offset, stride, count of the flat indices sampled."""
    weight: list[float]
    grad: list[float] | None
    """The gradient used; None where there was none or it could not be sampled (`grad_reason`)."""
    grad_reason: str | None
    local: list[float] | None
    """The gradient right after backward."""
    state: dict[str, list[float]]
    weight_after: list[float]
    state_after: dict[str, list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What link *optimizer* recorded of one step."""

    kind: str
    """Class of the optimizer, with its module."""
    base: str | None
    """The nearest class in torch.optim among its bases."""
    step_of: str
    """The function that its step() is."""
    hyper: dict[int, dict[str, Any]]
    extra: dict[str, float]
    left_out: dict[str, int]
    tensors: list[Tensor]
    shared: bool = False
    """Whether other processes may write to the weights."""
    shadow: Shadow | None = None


def parse_sample(value: Any) -> Sample:
    """The value of link *optimizer* of a checked step."""
    raw = _convert(value, _Sample)
    count = len(raw.tensors)
    if count > TENSORS_LIMIT:
        raise MalformedEvidence(f"optimizer: {count} tensors in one sample, limit {TENSORS_LIMIT}")
    if count and {len(raw.at), len(raw.grad), len(raw.local), len(raw.state), len(raw.state_after)} != {count}:
        raise MalformedEvidence(f"optimizer: lists of different length for {count} tensors")
    before, after = _Reader(raw.before), _Reader(raw.after)
    extra = {name: before.take(1)[0] for name in raw.extra}
    tensors = [_tensor(raw, index, before, after) for index in range(count)]
    before.finish()
    after.finish()
    return Sample(
        kind=raw.kinds[0],
        base=raw.kinds[1],
        step_of=raw.kinds[2],
        hyper={_index(group): values for group, values in raw.hyper.items()},
        extra=extra,
        left_out=raw.left_out,
        tensors=tensors,
        shared=raw.shared,
        shadow=_shadow(raw.shadow, tensors) if raw.shadow is not None else None,
    )


def _shadow(raw: _Shadow, tensors: list[Tensor]) -> Shadow:
    if len(raw.source) > SHADOW_LIMIT or len(raw.differ) > SHADOW_LIMIT or len(raw.covers) > TENSORS_LIMIT:
        raise MalformedEvidence(f"shadow: a list is longer than {SHADOW_LIMIT}")
    if any(not 0 <= index < len(tensors) for index in raw.covers):
        raise MalformedEvidence("shadow: covers a tensor that was not sampled")
    reader = _Reader(raw.values)
    values = {index: reader.take(tensors[index].at[2]) for index in raw.covers}
    reader.finish()
    return Shadow(
        off=raw.off[:300] if raw.off is not None else None,
        source=[(path[:4096], digest[:64]) for path, digest in raw.source],
        scope=raw.scope[:512],
        tensors=raw.tensors,
        live=raw.live[:64],
        twin=raw.twin[:64],
        again=raw.again[:64] if raw.again is not None else None,
        course=raw.course,
        values=values,
        differ=[_differing(each) for each in raw.differ],
    )


def _differing(raw: _Differ) -> Differing:
    if max(len(raw.at), len(raw.before), len(raw.live), len(raw.twin)) > SHADOW_LIMIT:
        raise MalformedEvidence(f"shadow: more than {SHADOW_LIMIT} elements of one tensor")
    return Differing(
        name=raw.name[:512],
        what=raw.what[:80],
        differ=raw.differ,
        of=raw.of,
        at=raw.at,
        before=[_float(value) for value in raw.before],
        live=[_float(value) for value in raw.live],
        twin=[_float(value) for value in raw.twin],
        ratio=_float(raw.ratio) if raw.ratio is not None else None,
        off=_float(raw.off) if raw.off is not None else None,
    )


def _float(value: float | str) -> float:
    found = number(value)
    return math.nan if found is None else found


def _tensor(raw: _Sample, index: int, before: _Reader, after: _Reader) -> Tensor:
    name, group, position, numel, dtype, device = raw.tensors[index]
    count = raw.at[index][2]
    if not 0 < count <= numel:
        raise MalformedEvidence(f"optimizer: {name[:80]}: {count} elements sampled of {numel}")
    weight = before.take(count)
    grad = raw.grad[index]
    return Tensor(
        name=name[:512],
        group=group,
        position=position,
        numel=numel,
        dtype=dtype,
        device=device,
        at=raw.at[index],
        weight=weight,
        grad=before.take(count) if grad is True else None,
        grad_reason=grad if isinstance(grad, str) else None,
        local=before.take(count) if raw.local[index] else None,
        state={key: before.take(1 if key in SCALAR_KEYS else count) for key in raw.state[index]},
        weight_after=after.take(count),
        state_after={key: after.take(1 if key in SCALAR_KEYS else count) for key in raw.state_after[index]},
    )


class _Reader:
    """Hands out the values of a blob in order."""

    def __init__(self, blob: _Blob | None) -> None:
        self._values = [] if blob is None else unpack(blob.f, blob.b)
        self._used = 0

    def take(self, count: int) -> list[float]:
        end = self._used + count
        if end > len(self._values):
            raise MalformedEvidence(f"sample: {len(self._values)} values, at least {end} described")
        values = self._values[self._used : end]
        self._used = end
        return values

    def finish(self) -> None:
        if self._used != len(self._values):
            raise MalformedEvidence(f"sample: {len(self._values)} values, {self._used} described")


def unpack(kind: str, text: str) -> list[float]:
    """The numbers of a blob: `kind` "<f" or "<d", `text` base64 of little-endian values."""
    if kind not in ("<f", "<d"):
        raise MalformedEvidence(f"sample: number format {kind[:20]!r}, expected '<f' or '<d'")
    size = 4 if kind == "<f" else 8
    if len(text) > VALUES_LIMIT * size * 2:
        raise MalformedEvidence(f"sample: {len(text)} characters, limit {VALUES_LIMIT * size * 2}")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedEvidence(f"sample: not base64: {error}") from error
    if len(data) % size:
        raise MalformedEvidence(f"sample: {len(data)} bytes are no whole number of {size}-byte values")
    values: array.array[float] = array.array("f" if size == 4 else "d")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def parse_blob(value: Any) -> list[float]:
    """The numbers of a blob object."""
    blob = _convert(value, _Blob)
    return unpack(blob.f, blob.b)


def number(value: Any) -> float | None:
    """A hyper-parameter as a float; "nan", "inf" and "-inf" are numbers; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return None


def finite(values: list[float]) -> bool:
    """Whether every value is finite."""
    return all(map(math.isfinite, values))


def _index(text: str) -> int:
    if not text.isdigit() or len(text) > 9:
        raise MalformedEvidence(f"optimizer: group {text[:20]!r} is no index")
    return int(text)


def _convert(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise MalformedEvidence(f"step frame: {str(error)[:200]}") from error
