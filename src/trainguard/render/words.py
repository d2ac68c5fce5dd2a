"""What the values of a verdict are called when people read them: shared by the terminal and the HTML report.

Nothing here decides anything. Every text that comes from a record goes through `plain`, because it was written by
whoever controls the training process.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainguard.appraise.verdict import Coverage, Level, Verdict, Word
from trainguard.finding import Finding, LinkState, Outcome
from trainguard.render.line import plain

MEANING: dict[Word, str] = {
    "VERIFIED": "Every claim of this level was checked and held.",
    "TAINTED": "Something in this run is proved not to be what was approved, or not what the run says it did.",
    "SUSPECT": "Something in this run looks wrong; its cause is open.",
    "UNKNOWN": "No finding is shown against it, and not everything that this level claims was looked at.",
}

LEVELS: dict[Level, tuple[str, str]] = {
    "TIL-0": ("nothing was recorded", "anyone"),
    "TIL-1": ("measured, watched, sealed and logged on the same host", "root on that host"),
    "TIL-2": (
        "lock, signing keys and log are kept off the node; silence is an alarm",
        "the run's own approved code; an administrator of the log",
    ),
    "TIL-3": (
        "segments drawn after sealing were replayed on a clean host",
        "someone who holds both the host and the verifier",
    ),
    "TIL-4": (
        "independent witnesses cosign, two stacks replay, two people approve changes",
        "a colluding quorum",
    ),
}
"""level → (what holds, who can still deceive); spec/levels.md."""

OUTCOME_WORDS: dict[Outcome, str] = {
    "violated": "violated",
    "suspicious": "suspicious",
    "not_checked": "not checked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Findings of one check with one outcome: the first of them, and how many more say the same."""

    check: str
    outcome: Outcome
    findings: tuple[Finding, ...]

    @property
    def techniques(self) -> tuple[str, ...]:
        """Catalogue ids of the group, most likely first, each once."""
        return tuple(dict.fromkeys(technique for finding in self.findings for technique in finding.techniques))

    @property
    def steps(self) -> str:
        """`step 7`, `steps 7 to 400`, or nothing where no step applies."""
        steps = sorted({f.subject.step for f in self.findings if f.subject.step is not None})
        if not steps:
            return ""
        return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def grouped(findings: Sequence[Finding]) -> list[Group]:
    """Findings by outcome, worst first, and check; the order inside a group is kept."""
    by: dict[tuple[Outcome, str], list[Finding]] = {}
    for finding in findings:
        by.setdefault((finding.outcome, finding.check), []).append(finding)
    order = list(OUTCOME_WORDS)
    groups = [Group(check=check, outcome=outcome, findings=tuple(f)) for (outcome, check), f in by.items()]
    return sorted(groups, key=lambda group: order.index(group.outcome))


def distinct(findings: Sequence[Finding]) -> list[Finding]:
    """The first finding of each message, in order."""
    return list({finding.message: finding for finding in reversed(findings)}.values())[::-1]


def without(group: Group, shown: Sequence[Finding]) -> Group:
    """What of a group has not been shown yet; findings are told apart by identity."""
    seen = {id(finding) for finding in shown}
    left = tuple(finding for finding in group.findings if id(finding) not in seen)
    return Group(check=group.check, outcome=group.outcome, findings=left)


def counted(findings: Sequence[Finding]) -> str:
    """`1 violated, 2 suspicious`; `none`."""
    outcomes = [finding.outcome for finding in findings]
    parts = (f"{outcomes.count(outcome)} {word}" for outcome, word in OUTCOME_WORDS.items() if outcome in outcomes)
    return ", ".join(parts) or "none"


def coverage_sentence(coverage: Coverage) -> str:
    """How many steps were checked and replayed, and the chance that replay would have found tampering."""
    if not coverage.steps:
        return "no optimizer step was recorded"
    checked = f"{coverage.watched_steps:,} of {plural(coverage.steps, 'step')} checked in full"
    if not coverage.replayed_steps:
        return f"{checked}, none replayed"
    chances = " and ".join(
        f"{chance:.0%} for {float(fraction):.0%} tampered"
        for fraction, chance in coverage.detection_probability.items()
    )
    return f"{checked}, {coverage.replayed_steps:,} replayed (detection: {chances})"


def level_sentence(level: Level) -> str:
    """What the level stands on and who could still deceive it."""
    holds, deceiver = LEVELS[level]
    return f"{holds}; could still be deceived by {deceiver}"


def link_counts(link: LinkState) -> str:
    """`388 held, 12 broken`; `nothing checked`."""
    parts = [f"{link.held:,} held"] if link.held else []
    parts += [f"{link.broken:,} broken"] if link.broken else []
    return ", ".join(parts) or "nothing checked"


def link_word(link: LinkState) -> str:
    """The state shown: that of the link, or `unused` for one this level does not need and that had nothing to check."""
    idle = not (link.required or link.held or link.broken or link.blind or link.explained)
    return "unused" if idle else link.state


def link_notes(link: LinkState) -> list[str]:
    """Reasons of blindness and approvals that explain departures, made safe to show."""
    notes = [plain(reason) for reason in link.blind]
    notes += [f"approved: {plain(place)}" for place in link.explained]
    if link.state == "blind" and not notes:
        notes.append("nothing of it was seen")
    return notes if link.required else [*notes, "not needed for this verdict"]


def next_steps(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Commands worth running now, each with what it gives. Only verbs that exist."""
    run = shlex.quote(verdict.run or "latest")
    if verdict.verdict in ("TAINTED", "SUSPECT"):
        yield f"trainguard show {run} --html report.html", "the report, to read and to hand on"
    yield f"trainguard explain {run}", "where each link held, broke or was blind"
    if verdict.lock is None:
        yield "trainguard lock -- CMD", "approve what runs now, for the next run"
    yield "trainguard log verify", "check the log all of this rests on"


def plural(number: int, noun: str, several: str | None = None) -> str:
    """`1 step`, `1,024 steps`, `2 processes`. several: the word for more than one, where no ending makes it."""
    if several is not None and number != 1:
        return f"{number:,} {several}"
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def duration(nanoseconds: float) -> str:
    """A span of time in the unit a person would use: `840 µs`, `12.3 ms`, `4.0 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = nanoseconds / 1e9
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Bytes in the unit a person would use: `912 B`, `4.2 kB`, `1.1 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{count} B"
