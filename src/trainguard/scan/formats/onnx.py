"""ONNX (onnx.proto, ModelProto) and sentencepiece models: protobufs without a magic, known by their whole shape.

An ONNX graph runs only operators, but data may lie in other files (`external_data`, CVE-2024-27318, CVE-2025-51480) and
operators may come from custom domains that load libraries or run Python (`PyOp`).
"""

from __future__ import annotations

from trainguard.scan.formats import protobuf
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.formats.protobuf import BYTES, VARINT, BadProtobuf
from trainguard.scan.source import Source
from trainguard.scan.verdict import Verdict

DOMAINS = frozenset(("", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft"))
MODEL_FIELDS = {
    1: VARINT,
    2: BYTES,
    3: BYTES,
    4: BYTES,
    5: VARINT,
    6: BYTES,
    7: BYTES,
    8: BYTES,
    14: BYTES,
    20: BYTES,
} | {
    25: BYTES,
    26: BYTES,
}
GRAPH, OPSETS, TRAINING, FUNCTIONS = 7, 8, 20, 25
NODES, INITIALIZERS, SPARSE = 1, 5, 15
ATTRIBUTES, DOMAIN, OP_TYPE = 5, 7, 4
DEPTH = 32
TEXT_BYTES = 4096


def _shape(source: Source, known: dict[int, int], most: int) -> set[int] | None:
    """Field numbers of the message when all are known with their wire types, else None."""
    seen: set[int] = set()
    try:
        for count, (number, kind, _, _) in enumerate(protobuf.fields(source, 0, source.size)):
            if known.get(number) != kind or count > most:
                return None
            seen.add(number)
    except BadProtobuf:
        return None
    return seen


def _sniff_onnx(head: bytes, source: Source) -> bool:
    if head[:1] not in (b"\x08", b"\x12", b"\x3a", b"\x42") or source.size < 8:
        return False
    seen = _shape(source, MODEL_FIELDS, 10_000)
    return seen is not None and GRAPH in seen


def _sniff_sentencepiece(head: bytes, source: Source) -> bool:
    if head[:1] != b"\x0a":
        return False
    seen = _shape(source, {1: BYTES, 2: BYTES, 3: BYTES, 4: BYTES, 5: BYTES}, 2_000_000)
    return seen is not None and {1, 2} <= seen


def _judge_onnx(job: Job) -> None:
    try:
        for number, _, offset, length in protobuf.fields(job.source, 0, job.source.size):
            if number == GRAPH:
                _graph(job, offset, offset + length, 0)
            elif number == TRAINING:
                _training(job, offset, offset + length)
            elif number == OPSETS:
                _domain(job, _text_of(job.source, offset, length, 1), offset)
            elif number == FUNCTIONS:
                _function(job, offset, offset + length)
    except BadProtobuf as error:
        job.unsafe("onnx", f"broken message: {error}")


def _training(job: Job, start: int, end: int) -> None:
    """TrainingInfoProto: two graphs more."""
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        if number in (1, 2) and kind == BYTES:
            _graph(job, offset, offset + length, 0)


def _function(job: Job, start: int, end: int) -> None:
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        if number == 7 and kind == BYTES:
            _node(job, offset, offset + length, 0)
        elif number == 11 and kind == BYTES:
            _attribute(job, offset, offset + length, 0)


def _graph(job: Job, start: int, end: int, depth: int) -> None:
    if depth > DEPTH:
        raise BadProtobuf("graphs nested too deeply")
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        job.meter.check_time()
        if kind != BYTES:
            continue
        if number == NODES:
            _node(job, offset, offset + length, depth)
        elif number == INITIALIZERS:
            _tensor(job, offset, offset + length)
        elif number == SPARSE:
            _sparse(job, offset, offset + length)


def _node(job: Job, start: int, end: int, depth: int) -> None:
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        if kind != BYTES:
            continue
        if number == DOMAIN:
            _domain(job, _text(job.source, offset, length), offset)
        elif number == ATTRIBUTES:
            _attribute(job, offset, offset + length, depth)


def _attribute(job: Job, start: int, end: int, depth: int) -> None:
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        if kind == BYTES and number in (6, 11):
            _graph(job, offset, offset + length, depth + 1)
        elif kind == BYTES and number in (5, 10):
            _tensor(job, offset, offset + length)
        elif kind == BYTES and number in (22, 23):
            _sparse(job, offset, offset + length)


def _sparse(job: Job, start: int, end: int) -> None:
    """A sparse tensor is two tensors: its values and their indices."""
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        if kind == BYTES and number in (1, 2):
            _tensor(job, offset, offset + length)


def _tensor(job: Job, start: int, end: int) -> None:
    """External data may only lie in a plainly named file beside the model."""
    for number, kind, offset, length in protobuf.fields(job.source, start, end):
        if number != 13 or kind != BYTES:
            continue
        if _text_of(job.source, offset, length, 1) == "location":
            location = _text_of(job.source, offset, length, 2)
            parts = location.split("/")
            if not location or "\\" in location or ":" in location or location.startswith("/") or ".." in parts:
                job.unsafe("onnx", f"external data at {location[:120]!a}: outside the model's folder", offset)


def _domain(job: Job, domain: str, offset: int) -> None:
    if domain not in DOMAINS:
        job.note(
            Verdict.UNKNOWN,
            "onnx",
            f"operators of domain {domain[:80]!a}: they come from a library or Python code of their own",
            offset=offset,
            global_name=f"onnx.domain.{domain}"[:120],
            use="call",
        )


def _text(source: Source, offset: int, length: int) -> str:
    return source.read(offset, min(length, TEXT_BYTES)).decode("utf-8", "replace")


def _text_of(source: Source, start: int, length: int, field: int) -> str:
    """The text in one field of a small message; the last one counts, as protobuf says."""
    found = ""
    for number, kind, offset, size in protobuf.fields(source, start, start + length):
        if number == field and kind == BYTES:
            found = _text(source, offset, size)
    return found


def _nothing(job: Job) -> None:
    """A sentencepiece model is a table of pieces."""


ONNX = Format(name="onnx", loader="onnx", sniff=_sniff_onnx, judge=_judge_onnx)
SENTENCEPIECE = Format(name="sentencepiece", loader="sentencepiece", sniff=_sniff_sentencepiece, judge=_nothing)
