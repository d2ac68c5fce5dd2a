"""Scan reports as text for people: one line a file that is not safe, its reasons, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from trainguard.scan.verdict import FileReport, Reason, Report, Verdict, safe_globals_snippet, worst

REASONS_SHOWN = 8
WORDS = {
    Verdict.SAFE: "safe",
    Verdict.UNKNOWN: "UNKNOWN",
    Verdict.ERROR: "ERROR",
    Verdict.UNSAFE: "UNSAFE",
}


def render_scan(reports: Sequence[Report], *, quiet: bool = False) -> str:
    """The whole answer as lines of text, worst files first; with `quiet` only what is not safe.

    A file's content reaches this text only through `printable`, so it holds no control characters.
    """
    lines: list[str] = []
    for report in reports:
        lines += [f"{WORDS[reason.verdict]:8}{reason.what}" for reason in report.reasons]
        for file in sorted(report.files, key=lambda file: -file.verdict.rank):
            if file.verdict is not Verdict.SAFE:
                lines += _file(file)
            elif not quiet:
                lines.append(f"{'safe':8}{file.path}  ({file.format}, for {file.loader}, {_digest(file)})")
    if not quiet or lines:
        lines += _trust(reports)
        lines.append(_summary(reports))
    return "\n".join(lines)


def _file(file: FileReport) -> list[str]:
    lines = [f"{WORDS[file.verdict]:8}{file.path}  ({file.format})"]
    lines += [f"        {_place(reason)}{reason.what}" for reason in file.reasons[:REASONS_SHOWN]]
    if len(file.reasons) > REASONS_SHOWN:
        lines.append(f"        … and {len(file.reasons) - REASONS_SHOWN} more reasons")
    return lines


def _place(reason: Reason) -> str:
    parts = [reason.member or "", f"byte {reason.offset}" if reason.offset is not None else ""]
    place = " ".join(part for part in parts if part)
    return f"[{reason.technique}] {place}: " if place else f"[{reason.technique}] "


def _digest(file: FileReport) -> str:
    return f"sha256:{file.sha256[:12]}" if file.sha256 else f"blake3:{(file.blake3 or '')[:12]}"


def _trust(reports: Sequence[Report]) -> list[str]:
    """What would settle the unknowns: lines for a trust file, and the snippet for torch."""
    wanted = sorted({line for report in reports for line in report.trust_lines})
    if not wanted:
        return []
    lines = ["", "If you know these and what they do, put them into a file and give it with --trust:"]
    lines += [f"    {line}" for line in wanted]
    names = {name for report in reports for file in report.files if _only_unknown(file) for name in file.globals}
    snippet = safe_globals_snippet(names)
    if snippet:
        lines += ["and load with torch's own restricted unpickler:", *(f"    {line}" for line in snippet.splitlines())]
    return [*lines, ""]


def _only_unknown(file: FileReport) -> bool:
    return file.verdict is Verdict.UNKNOWN and file.loader == "torch"


def _summary(reports: Sequence[Report]) -> str:
    files = [file for report in reports for file in report.files]
    counts = {verdict: sum(file.verdict is verdict for file in files) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count)
    overall = worst(report.verdict for report in reports)
    tier = reports[0].tier if reports else "training"
    return f"{overall.value}: {len(files)} file{'s' if len(files) != 1 else ''} ({told or 'none'}), tier {tier}"
