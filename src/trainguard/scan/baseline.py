"""A baseline: unknown files that somebody looked at once, so that a check in CI fails only for new ones.

    trainguard scan models/ --write-baseline scan-baseline.json      # look at each, commit the file
    trainguard scan models/ --baseline scan-baseline.json

It accepts bytes, never names: an entry holds for the file with that SHA-256 and exactly those reasons. Files that are
unsafe, or could not be judged, are never accepted, and remote ones have no digest to accept.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from trainguard.digest import canonical_json, parse_sha256, sha256_hex, write_durably
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError, Unavailable
from trainguard.scan.verdict import FileReport, Report, Verdict

SCHEMA = "trainguard/scan-baseline/v1"
LIMIT_BYTES = 16 << 20

Known = tuple[str, str]
"""(SHA-256 of a file, digest of its reasons)"""


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file that was looked at."""

    path: str
    """Where it lay then; for people."""
    sha256: str
    reasons: str
    """SHA-256 over the canonical JSON of rule, global, use and member of every reason, sorted."""
    what: tuple[str, ...]
    """The reasons in words; for people."""


class Baseline(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    schema: str
    files: tuple[Entry, ...]


def is_accepted(file: FileReport, known: frozenset[Known]) -> bool:
    """Whether `file` is unknown, and known to be so."""
    if file.verdict is not Verdict.UNKNOWN or file.sha256 is None:
        return False
    return (file.sha256, _reasons(file)) in known


def load_baseline(path: Path) -> frozenset[Known]:
    """What the baseline at `path` accepts. Raises Misuse for one that is none, Unavailable where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path}: baseline cannot be read: {error.strerror}") from error
    if len(data) > LIMIT_BYTES:
        raise Misuse(f"{path}: baseline of more than {LIMIT_BYTES} bytes")
    try:
        baseline = msgspec.json.decode(data, type=Baseline)
        if baseline.schema != SCHEMA:
            raise Misuse(f"{path}: expected schema {SCHEMA}, found {baseline.schema[:80]!r}")
        return frozenset((parse_sha256(e.sha256, where=str(path)), e.reasons) for e in baseline.files)
    except (msgspec.DecodeError, MalformedEvidence, UnicodeDecodeError) as error:
        raise Misuse(f"{path}: not a scan baseline: {error}") from error


def save_baseline(path: Path, reports: list[Report]) -> int:
    """Write a baseline of every file that is unknown now; how many. Raises Unavailable where it cannot be written."""
    unknown = [file for report in reports for file in report.files if file.verdict is Verdict.UNKNOWN and file.sha256]
    entries = {
        (file.sha256 or "", _reasons(file)): Entry(
            path=file.path,
            sha256=file.sha256 or "",
            reasons=_reasons(file),
            what=tuple(sorted({reason.what for reason in file.reasons})),
        )
        for file in unknown
    }
    baseline = Baseline(schema=SCHEMA, files=tuple(entries[key] for key in sorted(entries)))
    try:
        write_durably(path, msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n")
    except (OSError, TrainguardError) as error:
        raise Unavailable(f"{path}: baseline cannot be written: {error}") from error
    return len(entries)


def _reasons(file: FileReport) -> str:
    rows = sorted([r.rule, r.global_name or "", r.use or "", r.member or ""] for r in file.reasons)
    return sha256_hex(canonical_json(rows))
