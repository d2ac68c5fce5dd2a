"""Budgets of a scan: every limit an attacker can reach for, as a field with its unit and its precedent."""

from __future__ import annotations

from typing import Literal

import msgspec

from trainguard.digest import canonical_json, sha256_hex

MIB = 1 << 20

VERSION = "2026.4"
"""Version of the machine, its rules and the shipped lists; a verdict holds for this version only."""

Tier = Literal["weights", "training", "framework"]


class ScanPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a scan may spend and whom it believes. Over any limit the verdict is error, never safe."""

    tier: Tier = "training"
    """weights: tensors and plain containers · training: + RNG, optimizer, arguments, DCP metadata, numpy ·
    framework: + generated lists of library classes (whole modules, fitted estimators)."""
    trust: tuple[str, ...] = ()
    """The user's own lines, `module.qualname USE [sha256:HEX]`, as parsed and checked by `trust.parse_trust`."""
    digest: Literal["sha256", "blake3"] = "sha256"
    """What binds the verdict to the bytes. SHA-256 is what seals and in-toto use; BLAKE3 is three times as fast."""
    operations: int = 4_000_000
    """Pickle opcodes per file. A 100,000-tensor checkpoint has 3.0 million; largest published MoE shards 0.4."""
    values: int = 2_000_000
    """Containers and calls alive in the machine (about 100 bytes each). 100,000 tensors need 0.8 million."""
    seconds: float = 8.0
    """CPU seconds for one file, hashing aside."""
    inflate_bytes: int = 64 * MIB
    """Bytes a compressed stream may unfold to, per file. torch never compresses; joblib's default is off."""
    pickle_bytes: int = 64 * MIB
    """Stream handed to the second opinion; larger ones are judged by the machine alone, and the report says so."""
    constant_bytes: int = 1 << 16
    """Strings up to this length are kept by value; longer ones as (offset, length) only."""
    integer_digits: int = 4300
    """Decimal digits of one integer, CPython's own limit (sys.int_info.default_max_str_digits)."""
    members: int = 250_000
    """Members of one archive. 100,000 tensors make 100,006."""
    depth: int = 6
    """Containers inside containers. tar.gz of a folder with torch zips is 3."""
    json_bytes: int = 32 * MIB
    """Text parsed as JSON. The largest public tokenizer.json is 33 MB: up to twice this, only keys are read."""
    json_nodes: int = 1_000_000
    """Brackets and commas in JSON that is parsed to objects."""
    header_bytes: int = 100_000_000
    """safetensors header; the reference reader's own limit (MAX_HEADER_SIZE)."""
    files: int = 100_000
    """Files of one folder."""
    folder_depth: int = 32
    """Folders inside folders."""
    reasons: int = 64
    """Reasons kept per file; the verdict still counts every one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field and the version: what a verdict is bound to besides the bytes."""
        return sha256_hex(canonical_json({"version": VERSION, **msgspec.to_builtins(self)}))
