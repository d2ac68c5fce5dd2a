"""An audit on the terminal: what was drawn, what came of it, and how sure that makes."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from trainguard.appraise.replay import TAMPERED_FRACTIONS, detection
from trainguard.render.line import finding_line, plain
from trainguard.replay.audit import Report, Result
from trainguard.replay.explain import Cause


def audit_view(report: Report, *, ascii_only: bool = False) -> RenderableType:
    """The report as lines."""
    lines = [Text(f"run {report.run}: {_headline(report)}", style="bold")]
    lines += [Text("  " + _segment_line(result)) for result in report.results]
    lines += [Text("  " + finding_line(finding), style="red") for finding in report.findings]
    lines += [Text("  " + line) for line in _tolerances(report)]
    for cause in (result.cause for result in report.results):
        if cause is not None:
            lines += [Text("  " + text) for text in cause_lines(cause)]
    lines.append(Text("  " + _odds(report)))
    lines.append(Text("  " + _selftest(report)))
    lines.append(
        Text(f"  replayed on this host{_turns(report)}, {_where(report)}; logged as leaf {report.leaf}", style="dim")
    )
    return Group(*lines)


def _turns(report: Report) -> str:
    ranks = report.environment.get("ranks")
    return f", its ranks {plain(str(ranks))}" if ranks else ""


def _where(report: Report) -> str:
    environment = report.environment
    if not environment.get("apart"):
        return "in the run's own environment: what it shares with the run it cannot see (--env takes another)"
    python = plain(str(environment.get("python")))
    if environment.get("approved"):
        return f"with {python}, measured and as the lock approves"
    return f"with {python}, which is not shown to be the approved one: {plain(str(environment.get('reason')))}"


def _headline(report: Report) -> str:
    equal = sum(result.outcome == "equal" for result in report.results)
    total = len(report.plan.segments)
    if any(finding.outcome == "violated" for finding in report.findings):
        return "a replay gives something else"
    if report.findings:
        return "a replay on another build lies further off than honest arithmetic; that is no proof"
    if equal == len(report.plan.chosen):
        share = f"{report.replayed_steps} of {report.steps} steps"
        return f"{equal} of {total} segments replayed, equal {_how(report)} ({share})"
    return f"{equal} of {len(report.plan.chosen)} drawn segments could be replayed"


def _how(report: Report) -> str:
    return "within tolerance" if any(result.reading for result in report.results) else "bit for bit"


def _segment_line(result: Result) -> str:
    way = "from the sealed state" if result.way == "warp" else "from the first step"
    text = f"segment {result.segment}: steps {result.first} to {result.last}: {result.outcome}"
    if result.outcome == "equal":
        text += f" ({way}, {result.seconds:.0f} s)"
    return text + (f"; {plain(result.reason)}" if result.reason else "")


def _tolerances(report: Report) -> list[str]:
    """The largest effect that a comparison by size would have hidden, in words, segment by segment."""
    return [f"segment {result.segment}: {result.reading.words}" for result in report.results if result.reading]


CONFIDENCE = {
    "reproduced": "reproduced: with this the step gives the recorded bytes, on every link",
    "consistent": "consistent: the recorded values lie where this would put them",
    "none": "none: no known cause gives what was recorded",
}


def cause_lines(cause: Cause) -> list[str]:
    """Why a step differs, how sure that is, and what else it may be."""
    lines = [f"cause, step {cause.step}: {plain(cause.words)}", f"  confidence {CONFIDENCE[cause.confidence]}"]
    if cause.reason:
        lines.append(f"  {plain(cause.reason)}")
    if cause.alternatives:
        lines.append(f"  as well explained by: {'; '.join(plain(each) for each in cause.alternatives)}")
    if cause.lasting is not None:
        lines.append(
            "  it goes on in the step after" if cause.lasting else "  once: the step after follows from it alone"
        )
    lines.append(f"  {cause.tried} trials, {cause.seconds:.0f} s")
    return lines


def _odds(report: Report) -> str:
    total = len(report.plan.segments)
    equal = sum(result.outcome == "equal" for result in report.results)
    odds = ", ".join(
        f"{share:.0%} of segments tampered: {detection(total, equal, share):.0%}" for share in TAMPERED_FRACTIONS
    )
    return f"chance to have found tampering: {odds}"


def _selftest(report: Report) -> str:
    passed = report.selftest.get("passed")
    if passed is True:
        return "self-test: the planted fault was found"
    if passed is False:
        return "self-test: the planted fault was NOT found; this audit counts for nothing"
    return f"self-test: could not be made: {plain(str(report.selftest.get('reason')))}"
