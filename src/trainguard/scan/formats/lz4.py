"""LZ4 frames (lz4_Frame_format 1.6.4, lz4_Block_format), as joblib writes them; in plain Python, within the budget.

Checksums are not verified: a wrong one makes loaders fail, never run something else.
"""

from __future__ import annotations

from trainguard.scan.budget import Meter
from trainguard.scan.source import Source

BLOCK_BYTES = {4: 1 << 16, 5: 1 << 18, 6: 1 << 20, 7: 4 << 20}
HISTORY_BYTES = 1 << 16


class BadLz4(Exception):
    """The frame is broken."""


def unfold_frame(source: Source, meter: Meter) -> tuple[bytes, int]:
    """(content, bytes behind the frame). Raises BadLz4, OverBudget."""
    head = source.read(0, 15)
    if len(head) < 7 or head[4] >> 6 != 1 or head[4] & 0x01 or head[5] & 0x8F or head[5] >> 4 & 7 not in BLOCK_BYTES:
        raise BadLz4("header of an unknown shape (dictionaries are not read)")
    flags, largest = head[4], BLOCK_BYTES[head[5] >> 4 & 7]
    offset = 7 + (8 if flags & 0x08 else 0)
    out = bytearray()
    while True:
        raw = source.read(offset, 4)
        if len(raw) < 4:
            raise BadLz4("ends without its end mark")
        offset += 4
        size = int.from_bytes(raw, "little")
        if not size:
            break
        length = size & 0x7FFFFFFF
        block = source.read(offset, length)
        if length > largest or len(block) != length:
            raise BadLz4("block runs past the end")
        offset += length + (4 if flags & 0x10 else 0)
        before = len(out)
        if size >> 31:
            out += block
        else:
            unfold_block(block, out, floor=0 if not flags & 0x20 else before, most=largest, meter=meter)
        meter.spend_inflated(len(out) - before)
    offset += 4 if flags & 0x04 else 0
    return bytes(out), source.size - offset


def unfold_block(block: bytes, out: bytearray, *, floor: int, most: int, meter: Meter) -> None:
    """Append what `block` unfolds to, at most `most` bytes; matches may reach back to `floor` of `out`."""
    position, start = 0, len(out)
    try:
        while True:
            token = block[position]
            position += 1
            literals = token >> 4
            if literals == 15:
                literals, position = _more(block, position, literals)
            if position + literals > len(block) or len(out) - start + literals > most:
                raise BadLz4("literals run past the block")
            out += block[position : position + literals]
            position += literals
            if position == len(block):
                return
            back = block[position] | block[position + 1] << 8
            position += 2
            length = token & 15
            if length == 15:
                length, position = _more(block, position, length)
            length += 4
            if not back or back > len(out) - floor or len(out) - start + length > most:
                raise BadLz4("match outside the history")
            _copy(out, back, length)
    except IndexError as error:
        raise BadLz4("block ends in the middle of a sequence") from error


def _more(block: bytes, position: int, length: int) -> tuple[int, int]:
    while True:
        byte = block[position]
        position += 1
        length += byte
        if byte != 255:
            return length, position


def _copy(out: bytearray, back: int, length: int) -> None:
    begin = len(out) - back
    if back >= length:
        out += out[begin : begin + length]
        return
    pattern = bytes(out[begin:])
    out += (pattern * (length // back + 1))[:length]
