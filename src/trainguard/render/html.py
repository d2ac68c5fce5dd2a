"""The report of one run as a page that stands alone: no script, no outside resource, readable without either.

    page = report_page(story)           # text; at most 350 kB however large the run
    write_page(Path("report.html"), page)

Every string of a record passes `plain` and Jinja's autoescape. The page carries a Content-Security-Policy that allows
its one style sheet by hash and nothing else, so even a string that got through could load or run nothing. The page is
a view: it proves nothing itself and says how to check what it shows.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from trainguard import __version__
from trainguard.digest import write_durably
from trainguard.finding import Finding
from trainguard.render import plots, timeline, words
from trainguard.render.line import plain
from trainguard.render.story import Story
from trainguard.render.techniques import labelled
from trainguard.render.terminal import moment

PAGE_LIMIT_BYTES = 350_000

LOCK_CHECK = "environment"
"""The check that compares what is about to run with the lock: its findings form the section on lock differences."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a run one page shows; what is beyond is counted."""

    events: int = 160
    findings: int = 80
    processes: int = 40
    differences: int = 80

    def halved(self) -> Limits:
        """Half of everything, at least one."""
        return Limits(*(max(1, getattr(self, name) // 2) for name in Limits.__dataclass_fields__))


def report_page(story: Story) -> str:
    """The page on `story`. Shows less of a long run until the page is at most PAGE_LIMIT_BYTES."""
    limits = Limits()
    page = _page("report.html", **_values(story, limits))
    while len(page.encode()) > PAGE_LIMIT_BYTES and limits != limits.halved():
        limits = limits.halved()
        page = _page("report.html", **_values(story, limits))
    return page


def write_page(path: Path, page: str) -> None:
    """Write a page so that a reader never sees half of it. Raises Unavailable where the disk will not have it."""
    write_durably(path, page.encode(errors="replace"))


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Another page of ours with the same style sheet and policy; `values` are escaped by the template."""
    return _page(template, **values)


def render_paper(template: str, values: Mapping[str, Any]) -> str:
    """A document to hand on, in the style sheet for paper; `values` are escaped by the template."""
    sheet, source = style("paper.css")
    return _environment().get_template(template).render(sheet=sheet, style_source=source, version=__version__, **values)


# -- values for the template --------------------------------------------------------------------------------------


def _values(story: Story, limits: Limits) -> dict[str, Any]:
    verdict = story.verdict
    compared = verdict.lock is not None
    differences = [finding for finding in verdict.findings if compared and finding.check == LOCK_CHECK]
    others = [finding for finding in verdict.findings if not (compared and finding.check == LOCK_CHECK)]
    curves = story.drawn_curves()
    marked = [finding.subject.step for finding in others if finding.subject.step is not None]
    run = shlex.quote(story.run)
    return {
        "story": story,
        "verdict": verdict,
        "meaning": words.MEANING[verdict.verdict],
        "level": words.level_sentence(verdict.level),
        "coverage": words.coverage_sentence(verdict.coverage),
        "tiles": _tiles(story),
        "facts": timeline.facts(story),
        "strip": plots.strip(story),
        "events": [_event_row(story, event) for event in story.events[: limits.events]],
        "events_more": len(story.events) - limits.events,
        "links": [
            {"name": plain(link.link), "state": words.link_word(link), "held": link.held, "broken": link.broken}
            | {"notes": words.link_notes(link)}
            for link in verdict.links
        ],
        "groups": list(_finding_groups(others, limits.findings)),
        "counted": words.counted(verdict.findings),
        "differences": [_finding_row(finding) for finding in differences[: limits.differences]],
        "differences_more": len(differences) - limits.differences,
        "plots": [plots.plot(curve, marked) for curve in curves],
        "missing_curves": _missing(story),
        "processes": story.processes[: limits.processes],
        "processes_more": len(story.processes) - limits.processes + story.processes_more,
        "reasons": [plain(reason, 600) for reason in verdict.reasons],
        "run_word": run,
        "moment": moment,
        "duration": words.duration,
        "since": lambda at: words.duration(at - story.began) if story.began is not None else "",
        "join": shlex.join,
    }


def _tiles(story: Story) -> list[tuple[str, str, str]]:
    """(label, value, note): the five numbers a reader looks for first."""
    coverage, links = story.verdict.coverage, story.verdict.links
    needed = [link for link in links if link.required]
    held = sum(link.state == "held" for link in needed)
    violated = sum(finding.outcome == "violated" for finding in story.verdict.findings)
    share = f"{story.own_ns / story.step_ns:.2%}" if story.step_ns else "–"
    return [
        ("steps checked in full", f"{coverage.watched_steps:,}", f"of {coverage.steps:,}"),
        ("links that held", f"{held}", f"of {len(needed)} this level needs"),
        ("findings", f"{len(story.verdict.findings):,}", f"{violated:,} violated"),
        ("steps replayed", f"{coverage.replayed_steps:,}", _chance(coverage.detection_probability)),
        ("guard's own time", share, "of the steps' time"),
    ]


def _chance(probability: Mapping[str, float]) -> str:
    if not any(probability.values()):
        return "so replay had no chance to find anything"
    return ", ".join(f"{chance:.0%} if {float(part):.0%} were tampered" for part, chance in probability.items())


def _event_row(story: Story, event: Any) -> dict[str, Any]:
    sign = timeline.TONES[event.tone][0]
    return {
        "when": timeline.since(story, event),
        "tone": event.tone,
        "sign": sign,
        "title": timeline.event_title(event),
        "detail": event.detail,
        "leaf": event.leaf,
    }


def _finding_groups(findings: Sequence[Finding], limit: int) -> Iterator[dict[str, Any]]:
    """Groups of findings, worst first; the limit is shared fairly, so that no check crowds out another."""
    groups = words.grouped(findings)
    each = max(1, limit // max(1, len(groups)))
    for group in groups[:limit]:
        first = words.distinct(group.findings)[:each]
        more = words.without(group, first)
        yield {
            "check": plain(group.check),
            "outcome": group.outcome,
            "word": words.OUTCOME_WORDS[group.outcome],
            "count": len(group.findings),
            "steps": group.steps,
            "rows": [_finding_row(finding) for finding in first],
            "more": len(more.findings),
            "more_steps": more.steps,
        }


def _finding_row(finding: Finding) -> dict[str, Any]:
    subject = finding.subject
    where = [
        ("step", f"{subject.step:,}" if subject.step is not None else None),
        ("rank", str(subject.rank) if subject.rank is not None else None),
        ("tensor", plain(subject.tensor) if subject.tensor else None),
        ("at", plain(subject.path) if subject.path else None),
    ]
    return {
        "outcome": finding.outcome,
        "word": words.OUTCOME_WORDS[finding.outcome],
        "check": plain(finding.check),
        "message": plain(finding.message, 1000),
        "where": [(name, value) for name, value in where if value is not None],
        "expected": plain(finding.expected, 600) if finding.expected is not None else None,
        "found": plain(finding.found, 600) if finding.found is not None else None,
        "techniques": [labelled(plain(technique, 40)) for technique in finding.techniques[:8]],
        "evidence": [(citation.leaf, plain(citation.hash, 64)) for citation in finding.evidence[:6]],
        "evidence_more": max(0, len(finding.evidence) - 6),
    }


def _missing(story: Story) -> list[str]:
    """Why a plot that a reader may look for is not there."""
    if not story.steps:
        return ["No optimizer step was recorded, so there is nothing to plot."]
    missing = []
    if story.curve("learning_rate") is None:
        missing.append("No learning rate was recorded.")
    if story.curve("gradient_norm") is None:
        missing.append("No gradient norm was recorded.")
    if story.curve("loss") is None:
        missing.append(
            "No loss curve: the guard does not read what a script prints, and nothing in this run reported a loss "
            "(an integration can). "
            "A loss curve could not have shown sparse tampering anyway; the links above can."
        )
    return missing


# -- templates ----------------------------------------------------------------------------------------------------


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def style(name: str = "page.css") -> tuple[str, str]:
    """A style sheet and its hash as a Content-Security-Policy source."""
    sheet = (Path(__file__).parent / "templates" / name).read_text()
    return sheet, f"sha256-{base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()}"


def _page(template: str, **values: Any) -> str:
    sheet, source = style()
    return _environment().get_template(template).render(sheet=sheet, style_source=source, version=__version__, **values)
