"""safetensors (format 0.4): u64 header length, JSON, data. Names no code; what is checked is that nothing is hidden.

Offsets must tile the data exactly, every tensor's length must be its shape times its dtype, keys must be unique, and
`__metadata__` may hold text only.
"""

from __future__ import annotations

from typing import Any

from trainguard.scan.budget import OverBudget
from trainguard.scan.formats import jsons, pickles
from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.limits import ScanPolicy
from trainguard.scan.source import Source

_WIDTHS = {
    64: ("F64", "I64", "U64", "C64"),
    128: ("C128",),
    32: ("F32", "I32", "U32"),
    16: ("F16", "BF16", "I16", "U16"),
    8: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    6: ("F6_E2M3", "F6_E3M2"),
    4: ("F4",),
}
BITS = {name: bits for bits, names in _WIDTHS.items() for name in names}
"""Bits per element of each dtype."""
DIMENSIONS = 64
HEADER_NODES = 4_000_000
"""100,000 tensors need 0.8 million brackets and commas."""


class BadTensors(Exception):
    """The header does not describe the data."""


def sniff(head: bytes, source: Source) -> bool:
    """A plausible length and an opening brace."""
    length = int.from_bytes(head[:8], "little") if len(head) >= 9 else 0
    return 2 <= length <= source.size - 8 and head[8:10] in (b'{"', b"{}", b"{ ")


def judge(job: Job) -> None:
    """Check the header against the data."""
    length = int.from_bytes(job.source.read(0, 8), "little")
    if length > min(job.policy.header_bytes, job.policy.json_bytes):
        raise OverBudget(f"safetensors header of {length} bytes, limit {job.policy.json_bytes}")
    raw = job.source.read(8, length)
    policy = ScanPolicy(json_nodes=HEADER_NODES, json_bytes=job.policy.json_bytes)
    try:
        for name, text in _check(jsons.parse(raw.rstrip(b" "), policy), job.source.size - 8 - length).items():
            pickles.note_carried(job, f"__metadata__.{name}", text)
    except jsons.TooBig as error:
        raise OverBudget(f"safetensors header with more than {HEADER_NODES} nodes") from error
    except (jsons.BadJson, BadTensors) as error:
        job.unsafe("safetensors", str(error), 8)


def _check(header: Any, data_bytes: int) -> dict[str, str]:
    """The metadata; raises BadTensors unless the tensors fill the data."""
    if not isinstance(header, dict):
        raise BadTensors("header: expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadTensors("__metadata__: expected text values only")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    position = 0
    for begin, end in spans:
        if begin != position:
            raise BadTensors(f"data: tensor begins at byte {begin}, expected {position}")
        position = end
    if position != data_bytes:
        raise BadTensors(f"data: tensors end at byte {position}, file holds {data_bytes}")
    return metadata


def _span(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadTensors(f"tensor {name[:80]!a}: expected dtype, shape and data_offsets")
    bits, shape, offsets = BITS.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if bits is None or not _naturals(shape) or len(shape) > DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise BadTensors(
            f"tensor {name[:80]!a}: dtype {str(entry['dtype'])[:20]!a}, shape or offsets of an unknown kind"
        )
    total = bits
    for size in shape:
        total *= size
    if total != 8 * (offsets[1] - offsets[0]):
        raise BadTensors(
            f"tensor {name[:80]!a}: {total // 8} bytes by its shape, {offsets[1] - offsets[0]} by its offsets"
        )
    return offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


SAFETENSORS = Format(name="safetensors", loader="safetensors", sniff=sniff, judge=judge)
