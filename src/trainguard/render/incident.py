"""An incident for people: in the terminal and as a page. Facts, inferences and what is not known stand apart."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainguard.incident.attribute import Candidate
from trainguard.incident.correlate import Incident
from trainguard.incident.lineage import Family
from trainguard.incident.stores import Entry, Writers
from trainguard.render.html import render_page
from trainguard.render.line import plain
from trainguard.render.techniques import GROUPS, labelled
from trainguard.render.terminal import commands, heading, moment
from trainguard.render.words import plural

FINDINGS_SHOWN = 40
ROWS_SHOWN = 2000
"""Findings beyond the first that the page lists in a table, one line each."""
NOT_KNOWN = (
    "Who controlled an account at that time: software cannot tell, and this report does not say.",
    "Intent: an honest mistake can look the same.",
    "What happened before the guard was in place, and what it was blind to (trainguard explain RUN).",
)
SEVERITY_STYLE = {"critical": "bold red", "high": "red", "medium": "yellow", "low": ""}


def list_view(known: Sequence[Incident]) -> RenderableType:
    """One line an incident."""
    if not known:
        return Text("no incident: no verdict shown here has a violated or suspicious finding")
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for one in known:
        what = f"{kind_of(one)}: {plain(one.findings[0].message, 160)}"
        table.add_row(one.id, Text(one.severity, style=SEVERITY_STYLE[one.severity]), one.run, steps_of(one), what)
    return table


def incident_view(incident: Incident) -> RenderableType:
    """All of one incident."""
    said = Text(plain(incident.attribution.sentence, 600))
    parts: list[RenderableType] = [
        Text(f"{incident.id}  {incident.severity}  {kind_of(incident)}", style="bold"),
        Text(f"run {incident.run}, {steps_of(incident)}, {plural(len(incident.findings), 'finding')}"),
        Text(),
        said,
        Text(),
        heading("From where", "candidates, likeliest first; none of them is a person"),
        _candidates(incident.attribution.candidates),
    ]
    if incident.attribution.excluded:
        parts += [
            Text(),
            heading("Spoken for", "named by the record, which speaks against suspecting them"),
            Text("\n".join(map(plain, incident.attribution.excluded))),
        ]
    parts += [Text(), heading("Findings"), _findings(incident)]
    parts += [Text(), heading("Made from this run", "affected with it")]
    parts.append(Text("\n".join(plain(label) for label in incident.affected[:FINDINGS_SHOWN]) or "nothing"))
    parts += [Text(), heading("Not known"), Text("\n".join(NOT_KNOWN)), Text(), heading("Next")]
    parts.append(
        commands(
            [
                (f"trainguard recover {incident.run}", "the last good checkpoint and how to go on"),
                ("trainguard lineage", "what is affected, and what is not"),
                (f"trainguard damage {incident.run}", "what it cost"),
                (f"trainguard incident report {incident.id} --html report.html", "this as a page to hand on"),
            ]
        )
    )
    return Group(*parts)


def writers_view(told: Writers) -> RenderableType:
    """What an object store's log says of an incident's files; what it cannot say."""
    parts: list[RenderableType] = [Text(f"{told.incident}  run {told.run}", style="bold")]
    parts += [Text("By the store's own log: claimed, and no candidate. A principal is no person.", style="dim"), Text()]
    for file in told.files:
        parts += [heading(plain(file.path, 200), plain(file.url or "in no store that --map names", 200))]
        table = Table.grid(padding=(0, 2))
        for _ in range(3):
            table.add_column(no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        for entry in file.entries[:FINDINGS_SHOWN]:
            text = Text(plain(entry.principal, 200), style="bold")
            text.append(f"\n{plain(', '.join(_details(entry)), 400)}", style="not bold")
            table.add_row(moment(entry.at_ns), entry.act, told.when(entry), text)
        more = len(file.entries) - FINDINGS_SHOWN
        if more > 0:
            table.add_row("", "", "", f"and {more} more: --json")
        none = "nothing of it in these logs" if file.url is not None else "not looked for"
        parts += [table if file.entries else Text(none), Text()]
    unknown = [*told.gaps, "who used a principal's keys; whether the log was delivered whole; how its clock went"]
    parts += [heading("Not known"), Text("\n".join(plain(line, 300) for line in unknown))]
    return Group(*parts)


def _details(entry: Entry) -> list[str]:
    """Kind, session, address, program, version, place in the log."""
    said = [entry.kind, f"from {entry.address}" if entry.address else "", entry.agent or ""]
    said += [f"used by {entry.caller}" if entry.caller else ""]
    said += [f"session named {entry.chosen} (by whoever opened it)" if entry.chosen else ""]
    said += [f"version {entry.version}" if entry.version else "", entry.source]
    return [each for each in said if each]


def _candidates(candidates: Sequence[Candidate]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(ratio=1, overflow="fold")
    for one in candidates:
        text = Text(plain(one.what, 200), style="bold")
        for sign, lines in (("for: ", one.supports), ("against: ", one.against), ("or: ", one.alternatives)):
            text.append("".join(f"\n{sign}{plain(line, 300)}" for line in lines), style="not bold")
        table.add_row(one.level, f"{one.confidence:.0%}", text)
    return table


def _findings(incident: Incident) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for finding in incident.findings[:FINDINGS_SHOWN]:
        step = f"step {finding.subject.step}" if finding.subject.step is not None else "run"
        table.add_row(finding.outcome, step, plain(f"{finding.check}: {finding.message}", 300))
    more = len(incident.findings) - FINDINGS_SHOWN
    if more > 0:
        table.add_row("", "", f"and {more} more")
    return table


def kind_of(incident: Incident) -> str:
    """The group of techniques in words."""
    return GROUPS.get(incident.kind, "of no known kind")


def steps_of(incident: Incident) -> str:
    """`steps 12 to 40`, `step 12`, or `the whole run`."""
    if incident.first_step is None:
        return "the whole run"
    if incident.first_step == incident.last_step:
        return f"step {incident.first_step}"
    return f"steps {incident.first_step} to {incident.last_step}"


def incident_page(incident: Incident, family: Family) -> str:
    """The report as one HTML page, without scripts."""
    values = {
        "incident": incident,
        "kind": kind_of(incident),
        "steps": steps_of(incident),
        "techniques": [labelled(plain(technique, 40)) for technique in incident.techniques[:12]],
        "findings": [
            {
                "outcome": f.outcome,
                "where": steps_of_finding(f.subject.step, f.subject.rank, f.subject.tensor),
                "message": plain(f"{f.check}: {f.message}", 600),
                "expected": plain(f.expected, 300) if f.expected else None,
                "found": plain(f.found, 300) if f.found else None,
                "leaves": [citation.leaf for citation in f.evidence[:6]],
            }
            for f in incident.findings[:FINDINGS_SHOWN]
        ],
        "rows": [
            {
                "outcome": f.outcome,
                "where": steps_of_finding(f.subject.step, f.subject.rank, f.subject.tensor),
                "message": plain(f"{f.check}: {f.message}", 300),
                "leaf": f.evidence[0].leaf if f.evidence else None,
            }
            for f in incident.findings[FINDINGS_SHOWN : FINDINGS_SHOWN + ROWS_SHOWN]
        ],
        "more": max(0, len(incident.findings) - FINDINGS_SHOWN - ROWS_SHOWN),
        "around": [plain(line, 400) for line in incident.attribution.around],
        "affected": [plain(line.label) for line in family.affected][:200],
        "cleared": [plain(line.label) for line in family.cleared][:200],
        "undecided": [plain(line.label) for line in family.unknown][:200],
        "not_known": NOT_KNOWN,
    }
    return render_page("incident.html", values)


def steps_of_finding(step: int | None, rank: int | None, tensor: str | None) -> str:
    """`step 12, rank 0, lm_head.weight`; empty where none applies."""
    parts = [
        f"step {step}" if step is not None else "",
        f"rank {rank}" if rank is not None else "",
        plain(tensor or ""),
    ]
    return ", ".join(part for part in parts if part)
