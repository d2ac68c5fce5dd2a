"""A lock or a preflight as text: what was approved; what differs, file by file, with the changed lines."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainguard.appraise.verdict import Verdict
from trainguard.finding import Finding
from trainguard.lockfile import Lock, Measurement, Plan
from trainguard.render.line import plain

DIFF_LINES = 40
"""Lines of one difference that are shown."""
DIFFS = 20
"""Files whose difference is shown as text."""
VARIED = 8
"""Names of what reference runs differ in that are shown."""
NOW_LIMIT_BYTES = 1 << 20

COLOURS = {"violated": "31", "suspicious": "33", "not_checked": "36", "+": "32", "-": "31", "VERIFIED": "32"}


def lock_text(out: str, lock: Lock | None, measurement: Measurement, oddities: Sequence[Finding]) -> str:
    """What `trainguard lock` says."""
    lines = []
    if lock is None:
        lines.append(
            "not locked: bytecode differs from its source; nothing should be approved here before that is clear"
        )
    else:
        lines.append(f"{out}: approved {_counts(measurement)}; signed by key {lock.signer[:16]}")
    if measurement.numeric is not None:
        flags = measurement.numeric.flags
        lines.append(
            f"  torch {flags.get('version', '?')}: {len(flags)} numeric flags and the dispatch table read back"
        )
    if lock is not None and lock.plan is not None:
        lines += _plan_lines(lock.plan)
    lines += [f"  {_word(finding)} {' '.join(finding.techniques)}  {plain(finding.message)}" for finding in oddities]
    if lock is not None and any(finding.outcome == "suspicious" for finding in oddities):
        lines.append("  the lock approves what is marked suspicious above; look at it before you rely on this lock")
    return "\n".join(lines) + "\n"


def _plan_lines(plan: Plan) -> Iterator[str]:
    """What approved runs agree in, and what not."""
    ranks = " and ".join(f"{world}" for world in plan.worlds)
    agreed = f"{_number(len(plan.values), 'value')} in which {len(plan.runs)} runs with {ranks} rank"
    yield f"  plan: {agreed}{'s' if plan.worlds[-1] > 1 else ''} agree, over {_number(plan.steps, 'step')}"
    if plan.varied:
        more = f" and {len(plan.varied) - VARIED} more" if len(plan.varied) > VARIED else ""
        yield f"  not in the plan, for they differ: {plain(', '.join(plan.varied[:VARIED]), 1000)}{more}"


def preflight_text(
    verdict: Verdict,
    lock: Lock | None,
    measurement: Measurement | None,
    approved: Mapping[str, bytes],
    *,
    colour: bool,
) -> str:
    """What `trainguard preflight` says. approved: SHA-256 → text as approved, where it was kept."""
    head = f"{verdict.verdict} ({verdict.level})"
    if verdict.findings:
        counted = {outcome: sum(f.outcome == outcome for f in verdict.findings) for outcome in COLOURS}
        head += ": " + ", ".join(f"{count} {_named(outcome)}" for outcome, count in counted.items() if count)
    elif measurement is not None:
        head += f": as approved: {_counts(measurement)}"
    lines = [head]
    shown = 0
    for finding in verdict.findings:
        lines += _finding_lines(finding)
        difference = list(_difference(finding, measurement, approved)) if shown < DIFFS else []
        shown += bool(difference)
        lines += difference
    if lock is not None and verdict.findings:
        lines += ["", f"compared with the lock of {lock.made}, signed by key {lock.signer[:16]}"]
    text = "\n".join(lines) + "\n"
    return _coloured(text) if colour else text


def _counts(measurement: Measurement) -> str:
    trees = measurement.trees
    code = len(trees["code"].files) if "code" in trees else 0
    inputs = sum(len(tree.files) for tree in trees.values() if tree.name.startswith(("data:", "weights:")))
    packages = len(measurement.distributions)
    installed = measurement.file_count - code - inputs
    parts = (
        f"{_number(code, 'file')} of code",
        f"{_number(installed, 'installed file')} in {_number(packages, 'package')}",
        _number(len(measurement.hooks), "start-up hook"),
        _number(len(measurement.environment), "variable"),
        _number(inputs, "data file"),
    )
    return ", ".join(parts)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _word(finding: Finding) -> str:
    return _named(finding.outcome)


def _named(outcome: str) -> str:
    return outcome.replace("_", " ")


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield ""
    ids = f"  {' '.join(finding.techniques)}" if finding.techniques else ""
    place = f"  {plain(finding.subject.path)}" if finding.subject.path else ""
    yield f"{_word(finding)}{ids}{place}"
    yield f"  {plain(finding.message, 1000)}"
    if finding.outcome == "violated" and finding.expected and finding.found and _is_value(finding.expected):
        yield f"  approved {_short(finding.expected)}, now {_short(finding.found)}"


def _is_value(text: str) -> bool:
    return len(text.split(" ")[0]) == 64


def _short(value: str) -> str:
    digest, _, size = value.partition(" ")
    return f"{digest[:16]}… ({size} bytes)" if size.isdigit() else plain(value, 80)


def _difference(finding: Finding, measurement: Measurement | None, approved: Mapping[str, bytes]) -> Iterator[str]:
    """The changed lines, where both texts are at hand."""
    if measurement is None or finding.subject.path is None or finding.expected is None or finding.found is None:
        return
    now = _now(finding.subject.path, finding.found, measurement)
    before = approved.get(finding.expected.split(" ")[0], b"" if finding.expected == "none" else None)
    if (
        before is None
        or now is None
        or (before and hashlib.sha256(before).hexdigest() != finding.expected.split(" ")[0])
    ):
        return
    old, new = (text.decode("utf-8", "replace").splitlines() for text in (before, now))
    lines = list(difflib.unified_diff(old, new, "approved", "now", lineterm="", n=2))
    for line in lines[:DIFF_LINES]:
        yield "  " + plain(line.replace("\t", "    "), 200)
    if len(lines) > DIFF_LINES:
        yield f"  … {len(lines) - DIFF_LINES} more lines"


def _now(place: str, value: str, measurement: Measurement) -> bytes | None:
    """The text that was measured at `place`; nothing when the file has changed again since."""
    for name in sorted(measurement.trees, key=len, reverse=True):
        if place.startswith(name + "/"):
            path = Path(measurement.trees[name].root) / place[len(name) + 1 :]
            break
    else:
        path = Path(measurement.code.root) / place
    try:
        if not path.is_file() or path.stat().st_size > NOW_LIMIT_BYTES:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == value.split(" ")[0] and b"\0" not in data else None


def _coloured(text: str) -> str:
    lines = []
    for line in text.splitlines():
        key = line.split(" ")[0] if line[:1] != " " else line[2:3]
        key = "not_checked" if line.startswith("not checked") else key
        code = COLOURS.get(key)
        lines.append(f"\x1b[{code}m{line}\x1b[0m" if code else line)
    return "\n".join(lines) + "\n"
