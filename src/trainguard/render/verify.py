"""A sealing or a verification of a checkpoint in plain lines. Values in, text out; --json has all of it."""

from __future__ import annotations

from collections.abc import Iterator

from trainguard.finding import Finding
from trainguard.render.line import finding_line, plain
from trainguard.seal.report import SealReport

FINDINGS_SHOWN = 20
_VERDICT = {
    "upheld": "UPHELD: is what was sealed",
    "violated": "VIOLATED: do not load it",
    "unknown": "UNKNOWN: could not tell",
}


def verify_lines(report: SealReport) -> Iterator[str]:
    """The answer first, then what it rests on, then the findings, worst first."""
    yield plain(f"{report.path}: {_VERDICT[report.status]}{_of(report)}")
    yield from _facts(report)
    if report.checked:
        yield f"  checked    {', '.join(report.checked)}"
    for note in report.notes:
        yield plain(f"  note       {note}")
    yield from _finding_lines(report.findings)


def seal_lines(report: SealReport) -> Iterator[str]:
    """Where the seal lies and what it binds; then what is odd about it."""
    yield plain(f"{report.path}: sealed{_of(report)}")
    yield plain(f"  seal       {report.seal}")
    yield from _facts(report)
    yield from _finding_lines(report.findings)


def _of(report: SealReport) -> str:
    parts = [f"run {report.run}" if report.run else "", f"step {report.step}" if report.step is not None else ""]
    known = ", ".join(part for part in parts if part)
    return f" ({known})" if known else ""


def _facts(report: SealReport) -> Iterator[str]:
    if report.files:
        yield f"  content    {report.files} {'file' if report.files == 1 else 'files'}, {size(report.bytes)}"
    if report.root:
        yield f"  root       {report.root}"
    if report.signer:
        leaf = f", log entry {report.leaf}" if report.leaf is not None else ""
        name = f"{report.signed_by}, " if report.signed_by else ""
        yield plain(f"  signer     {name}key {report.signer[:16]}{leaf}")


def _finding_lines(findings: tuple[Finding, ...]) -> Iterator[str]:
    for finding in findings[:FINDINGS_SHOWN]:
        yield f"  {finding_line(finding)}"
        if finding.expected:
            yield plain(f"      expected {finding.expected}")
        if finding.found:
            yield plain(f"      found    {finding.found}")
    if len(findings) > FINDINGS_SHOWN:
        yield f"  and {len(findings) - FINDINGS_SHOWN} more findings: --json lists them"


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
