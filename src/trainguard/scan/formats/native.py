"""Machine code, bytecode, and archives nobody unpacks here: what has no business beside weights."""

from __future__ import annotations

from trainguard.scan.formats.interface import Format, Job
from trainguard.scan.source import Source

CODE = {
    b"\x7fELF": "ELF machine code",
    b"MZ": "a Windows program",
    b"\xfe\xed\xfa\xce": "Mach-O machine code",
    b"\xfe\xed\xfa\xcf": "Mach-O machine code",
    b"\xce\xfa\xed\xfe": "Mach-O machine code",
    b"\xcf\xfa\xed\xfe": "Mach-O machine code",
    b"\xca\xfe\xba\xbe": "Mach-O or Java code",
    b"\0asm": "WebAssembly",
    b"#!": "a script with an interpreter line",
}
ARCHIVES = {
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "RAR",
    b"MSCF": "a cabinet archive",
    b"\x1f\x9d": "compress (.Z)",
    b"LZIP": "lzip",
}


def _known(table: dict[bytes, str], head: bytes) -> str | None:
    return next((what for magic, what in table.items() if head.startswith(magic)), None)


def is_bytecode(head: bytes) -> bool:
    """CPython's .pyc: a magic number that ends in CR LF, then flags 0 to 3 (PEP 552)."""
    return len(head) >= 16 and head[2:4] == b"\r\n" and head[4:8] in (b"\0\0\0\0", b"\1\0\0\0", b"\3\0\0\0")


def _sniff_code(head: bytes, source: Source) -> bool:
    return _known(CODE, head) is not None or is_bytecode(head)


def _judge_code(job: Job) -> None:
    head = job.source.read(0, 32)
    job.unsafe("code", f"{_known(CODE, head) or 'Python bytecode'}: runs when loaded", 0)


def _sniff_archive(head: bytes, source: Source) -> bool:
    return _known(ARCHIVES, head) is not None


def _judge_archive(job: Job) -> None:
    what = _known(ARCHIVES, job.source.read(0, 32))
    job.unsafe(
        "archive", f"{what}: cannot be read here, and loaders that can would read it; unpack it and scan that", 0
    )


CODE_FORMAT = Format(name="code", loader="none", sniff=_sniff_code, judge=_judge_code)
ARCHIVE_FORMAT = Format(name="archive", loader="none", sniff=_sniff_archive, judge=_judge_archive)
