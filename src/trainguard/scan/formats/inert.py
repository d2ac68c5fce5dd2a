"""Binary files that stand beside checkpoints and name no code: images, TensorBoard events."""

from __future__ import annotations

import struct

from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import Source

IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
RECORD_BYTES = 64 << 20


def _sniff_image(head: bytes, source: Source) -> bool:
    return head.startswith(IMAGES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _nothing(job: Job) -> None:
    """Images run nothing; whether they are something else as well is asked of every file."""


def _table() -> tuple[int, ...]:
    made = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        made.append(value)
    return tuple(made)


_CRC32C = _table()


def masked_crc32c(data: bytes) -> int:
    """The masked CRC-32C of TFRecord files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _sniff_events(head: bytes, source: Source) -> bool:
    return len(head) >= 16 and masked_crc32c(head[:8]) == struct.unpack_from("<I", head, 8)[0]


def _judge_events(job: Job) -> None:
    """TFRecord: u64 length, its CRC, data, the data's CRC; up to the end."""
    position = 0
    while position < job.source.size:
        job.meter.check_time()
        head = job.source.read(position, 12)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 12 or masked_crc32c(head[:8]) != struct.unpack_from("<I", head, 8)[0] or length > RECORD_BYTES:
            job.unsafe("events", "expected a record, found something else", position)
            return
        position += 16 + length
    if position != job.source.size:
        job.unsafe("events", "ends inside a record", position)


IMAGE = Format(name="image", loader="none", sniff=_sniff_image, judge=_nothing)
EVENTS = Format(name="tfrecord", loader="tensorboard", sniff=_sniff_events, judge=_judge_events)
