"""Documents to hand on, one value in, one page of HTML out: notice, report in plain words, damage, recovery.

    flash_page(dossier)           one page for those who have to act now; says nothing about who
    plain_page(dossier)           two pages for legal, personnel and managers
    damage_page(damage, source)   what it cost, with every row
    certificate_page(plan, …)     from which checkpoint to go on, and what was set aside
    write_pdf(path, page, …)      any of them as PDF/A-3b, the same bytes every time

The sentences about from where are those of threat model 8.2: host, process, account, session; never a person. Facts,
conclusions and what is not known stand apart, and what speaks against a conclusion stands beside what speaks for it.
Every string of a record passes `plain` and Jinja's autoescape, and is cut so that a page stays a page.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainguard.digest import write_durably
from trainguard.errors import Unavailable
from trainguard.finding import Finding
from trainguard.incident.attribute import Candidate
from trainguard.incident.correlate import Incident
from trainguard.incident.damage import Damage, Range
from trainguard.incident.dossier import Dossier, Source
from trainguard.incident.lineage import Line
from trainguard.incident.recover import Candidate as Checkpoint
from trainguard.incident.recover import Ends, Plan
from trainguard.render.damage import PARTS, grouped, number, spread
from trainguard.render.html import render_paper
from trainguard.render.incident import steps_of
from trainguard.render.line import plain
from trainguard.render.techniques import GROUPS, TITLES
from trainguard.render.terminal import moment
from trainguard.render.words import plural

FACTS, OTHERS, LISTED, ROWS, SET_ASIDE = 5, 3, 4, 400, 60
"""How much of each list a document shows; what is beyond is counted."""

HEADLINES = {
    "A": "What a training job starts with was changed",
    "B": "Code that was not approved ran inside a training job",
    "C": "The arithmetic of a training job was changed",
    "D": "The data or the randomness of a training job was changed",
    "E": "A model was changed outside its training",
    "F": "A training job was slowed, stopped or split",
    "G": "The record of a training job was interfered with",
    "H": "Rules on people and access were broken",
}
NOT_KNOWN = (
    "Who controlled an account or a process at that time. No software can tell, and this report does not say.",
    "Intent. An honest mistake can look the same.",
    "What happened before the guard was in place, and whatever it was blind to.",
)


# -- notice --------------------------------------------------------------------------------------------------------


def flash_page(dossier: Dossier) -> str:
    """The notice: what, since when, whether it goes on, exposure, what to do. Nothing about from where."""
    incident, damage = dossier.incident, dossier.damage
    affected = [line for line in dossier.family.affected if line.label in incident.affected]
    values = common(dossier) | {
        "in_short": _in_short(dossier),
        "what": kind_of_act(incident),
        "ranks": f"rank {', '.join(map(str, incident.ranks[:8]))}" if incident.ranks else "",
        "ended": _time(dossier.ended),
        "state": "still running: every step adds to the loss" if dossier.running else "ended",
        "exposure": exposure(damage),
        "reach": _reach(affected),
        "actions": list(_actions(dossier)),
        "not_known": NOT_KNOWN[1:],
    }
    return render_paper("flash.html", values)


def kind_of_act(incident: Incident) -> str:
    """What it is by the catalogue and not in the words of a finding, which may name accounts."""
    titles = [TITLES[technique] for technique in incident.techniques if technique in TITLES]
    checks = ", ".join(dict.fromkeys(plain(finding.check, 40) for finding in incident.findings))
    return f"{'; '.join(titles[:3]) or GROUPS.get(incident.kind, 'of no known kind')} (seen by check {checks[:120]})"


def exposure(damage: Damage) -> str:
    """What it cost so far, in a line."""
    said = f"{spread(damage.hours)} device-hours on {plural(damage.devices, 'device')}"
    if damage.money is not None and damage.price is not None:
        said += f"; {spread(damage.money)} {damage.price.currency}"
    return said


def _reach(affected: Sequence[Line]) -> str:
    if not affected:
        return "nothing that this log knows of"
    named = "; ".join(plain(line.label, 80) for line in affected[:4])
    return named + (f"; and {len(affected) - 4} more" if len(affected) > 4 else "")


def _actions(dossier: Dossier) -> Iterator[dict[str, str]]:
    run = shlex.quote(dossier.incident.run)
    if dossier.running:
        yield {"text": "Decide, with legal and security, whether the run is stopped or watched on.", "command": ""}
    yield {"text": "Release nothing that was made from this run:", "command": f"trainguard lineage run:{run}"}
    yield {"text": "See from where to go on; nothing is changed by asking:", "command": f"trainguard recover {run}"}
    yield {
        "text": "Keep the evidence as it is now:",
        "command": f"trainguard incident export {dossier.incident.id} -o evidence.zip",
    }


# -- plain words ---------------------------------------------------------------------------------------------------


def plain_page(dossier: Dossier) -> str:
    """Two pages: facts, conclusions, what speaks against them, cost, reach, what is not known."""
    incident, damage = dossier.incident, dossier.damage
    told = incident.attribution
    candidates = [one for one in told.candidates if one.level != "A0"]
    first = told.account or (candidates[0] if candidates else None)
    others = [one for one in candidates if one is not first]
    facts = _distinct(incident.findings)
    affected = [line for line in dossier.family.affected if line.label in incident.affected]
    cleared = dossier.family.cleared
    values = common(dossier) | {
        "in_short": _in_short(dossier),
        "facts": [_fact(finding) for finding in facts[:FACTS]],
        "facts_more": len(incident.findings) - min(len(facts), FACTS),
        "conclusion": plain(_conclusion(incident, first), 560),
        "first": _candidate(first) if first is not None else None,
        "others": [_other(one) for one in others[:OTHERS]],
        "excluded": [plain(line, 160) for line in told.excluded[:2]],
        "hours": _ends(damage.hours),
        "money": _money(damage),
        "affected": [plain(line.label, 70) for line in affected[:LISTED]],
        "affected_more": max(0, len(affected) - LISTED),
        "cleared": [plain(line.label, 70) for line in cleared[:LISTED]],
        "cleared_more": max(0, len(cleared) - LISTED),
        "not_known": NOT_KNOWN,
    }
    return render_paper("plain.html", values)


def _conclusion(incident: Incident, first: Candidate | None) -> str:
    """The template sentence, about the account where the record points to one."""
    told = incident.attribution
    if first is None or first is told.candidates[0] or told.account is None:
        return told.sentence
    lead = told.candidates[0]
    return (
        f"{told.sentence} The trace leads on to {first.what} (confidence {first.confidence:.0%}); "
        f"{lead.what} is what did it."
    )


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "supports": [plain(line, 130) for line in one.supports[:4]],
        "against": [plain(line, 130) for line in one.against[:3]],
        "alternatives": [plain(line, 80) for line in one.alternatives[:5]],
    }


def _other(one: Candidate) -> dict[str, str]:
    against = "; ".join(one.against[:2])
    return {"what": plain(one.what, 120), "against": plain(against, 150), "sure": f"{one.confidence:.0%}"}


def _fact(finding: Finding) -> dict[str, Any]:
    word = "proved" if finding.outcome == "violated" else "suspicious"
    step = f" Step {finding.subject.step:,}." if finding.subject.step is not None else ""
    leaf = finding.evidence[0].leaf if finding.evidence else None
    return {"text": f"{_message(finding, 180)} ({word}).{step}", "leaf": leaf}


def _distinct(findings: Sequence[Finding]) -> list[Finding]:
    """The first finding of each check and outcome, worst first, then the rest."""
    seen: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        seen.setdefault((finding.check, finding.outcome), finding)
    return [*seen.values(), *(finding for finding in findings if finding not in seen.values())]


# -- damage --------------------------------------------------------------------------------------------------------


def damage_page(damage: Damage, source: Source, *, scope: str) -> str:
    """The statement. scope: what it is about, such as `all runs of this log`."""
    likely = f"{number(damage.hours.likely)} device-hours"
    if damage.money is not None and damage.price is not None:
        likely += f", {number(damage.money.likely)} {damage.price.currency}"
    groups = grouped(damage.rows)
    values = {
        "source": source,
        "headline": f"{likely}, likely, over {plural(len(damage.runs), 'affected run')}",
        "scope": f"{plain(scope, 200)}; {plural(damage.devices, 'device')} at most in one run",
        "parts": [{"words": PARTS[kind], "ends": _ends(hours)} for kind, hours in damage.parts.items()],
        "hours": _ends(damage.hours),
        "money": _money(damage),
        "rows": [
            {
                "kind": PARTS[row.kind],
                "where": plain(row.where, 120),
                "ends": _ends(hours),
                "why": plain(row.why, 160),
                "leaf": row.leaf if row.leaf is not None else "",
            }
            for row, hours in groups[:ROWS]
        ],
        "rows_more": max(0, len(groups) - ROWS),
        "unknown": _names(damage.unknown),
        "claims": [
            {
                "date": plain(claim.date, 20),
                "by": plain(claim.by, 80),
                "what": plain(claim.what, 200),
                "amount": f"{claim.amount:,.2f} {plain(claim.currency, 8)}",
            }
            for claim in damage.claims[: LISTED * 5]
        ],
        "outside": [
            {
                "text": plain(each.text, 200),
                "shows": spread(each.log_shows) if each.log_shows.high else "nothing",
                "answer": each.answer,
                "why": plain(each.why, 200),
            }
            for each in damage.outside[: LISTED * 5]
        ],
    }
    return render_paper("damage.html", values)


def _names(runs: Sequence[str]) -> str:
    named = ", ".join(plain(run, 60) for run in runs[:10])
    return named + (f" and {len(runs) - 10} more" if len(runs) > 10 else "")


def _money(damage: Damage) -> dict[str, Any] | None:
    price = damage.price
    if damage.money is None or price is None:
        return None
    hour = f"{price.low:g} / {price.likely:g} / {price.high:g} {price.currency} an hour of {price.device}"
    basis = f"{hour}, {price.basis} of {price.date}" + (f", {price.source}" if price.source else "")
    return {"currency": plain(price.currency, 8), "ends": _ends(damage.money), "basis": plain(basis, 240)}


# -- recovery ------------------------------------------------------------------------------------------------------


def certificate_page(
    plan: Plan, source: Source, *, detection: Mapping[str, float] | None = None, ends: Ends | None = None
) -> str:
    """The certificate; called a plan where something that a certificate needs is missing.

    detection: of the run that saved the checkpoint, as its verdict states it. ends: the resumed run beside a reference.
    """
    missing = list(_missing(plan, detection, ends))
    chosen = plan.checkpoint
    certified = not missing
    step = f"step {chosen.step}" if chosen is not None and chosen.step is not None else "its last good checkpoint"
    values = {
        "source": source,
        "run": plain(plan.run, 100),
        "plan": plan,
        "bad_step": plan.first_bad_step,
        "certified": certified,
        "headline": f"Run {plain(plan.run, 60)} goes on from {step}" if chosen is not None else "There is no way on",
        "in_short": _standing(plan, certified=certified),
        "missing": missing,
        "chosen": _checkpoint(chosen) | {"root": chosen.root, "leaf": chosen.leaf} if chosen is not None else None,
        "replay": _chance(detection),
        "command": plain(shlex.join(plan.command), 600),
        "command_from": plain(plan.command_from, 200),
        "later": [_checkpoint(one) for one in plan.later[:SET_ASIDE]],
        "later_more": max(0, len(plan.later) - SET_ASIDE),
        "passed_over": [_checkpoint(one) for one in plan.passed_over[:LISTED]],
        "ends": _compared(ends),
    }
    return render_paper("certificate.html", values)


def _missing(plan: Plan, detection: Mapping[str, float] | None, ends: Ends | None) -> Iterator[str]:
    """What keeps a plan from being a certificate."""
    if plan.checkpoint is None:
        yield "no checkpoint of the run is both good and still what was sealed"
        return
    if plan.checkpoint.word != "VERIFIED":
        yield f"the checkpoint is {plan.checkpoint.word}, not VERIFIED: not all that it rests on was looked at"
    if not any((detection or {}).values()):
        yield "nothing of the run was replayed on a clean host (trainguard audit)"
    if ends is None:
        yield "the resumed run has not been compared with one that was never attacked"
    elif not ends.equal:
        yield "the resumed run does not end where the reference does"


def _standing(plan: Plan, *, certified: bool) -> str:
    if plan.checkpoint is None:
        return "Nothing can be certified, and there is nothing to resume from."
    if certified:
        return "The checkpoint below is verified with all it was made from; what was resumed from it ends as it should."
    return "There is a way on. What still keeps this from being a certificate:"


def _chance(detection: Mapping[str, float] | None) -> str:
    if not detection or not any(detection.values()):
        return "nothing was replayed"
    return "; ".join(
        f"had {float(part):.0%} of it been tampered with, {chance:.0%} to find it" for part, chance in detection.items()
    )


def _checkpoint(one: Checkpoint) -> dict[str, Any]:
    step = one.step if one.step is not None else ""
    return {"place": plain(one.place, 160), "step": step, "word": one.word, "why": plain(one.why, 160)}


def _compared(ends: Ends | None) -> dict[str, str] | None:
    if ends is None:
        return None
    pair = f"{plain(ends.resumed_checkpoint, 120)} (run {plain(ends.resumed, 60)}) with "
    pair += f"{plain(ends.reference_checkpoint, 120)} (run {plain(ends.reference, 60)})"
    if ends.equal:
        return {"pair": pair, "result": f"equal: {plural(ends.tensors, 'tensor')}, bit for bit"}
    differ = len(ends.differing) + ends.differing_more
    return {"pair": pair, "result": f"different: {differ} of {plural(ends.tensors, 'tensor')}"}


# -- shared --------------------------------------------------------------------------------------------------------


def common(dossier: Dossier) -> dict[str, Any]:
    """What every document on an incident says at its head."""
    incident = dossier.incident
    return {
        "source": dossier.source,
        "incident": incident,
        "run": plain(incident.run, 100),
        "headline": HEADLINES.get(incident.kind, "Something in a training job is not as it should be"),
        "steps": steps_of(incident),
        "proved": any(finding.outcome == "violated" for finding in incident.findings),
        "began": _time(dossier.began),
    }


def _in_short(dossier: Dossier) -> str:
    incident = dossier.incident
    proved = sum(finding.outcome == "violated" for finding in incident.findings)
    open_ = len(incident.findings) - proved
    kind = GROUPS.get(incident.kind, "no known kind")
    said = " and ".join(
        words
        for number_, words in ((proved, f"{proved:,} proved"), (open_, f"{open_:,} suspicious with its cause open"))
        if number_
    )
    made = (
        plural(len(incident.affected), "checkpoint or run", "checkpoints or runs")
        if incident.affected
        else "nothing that is known of"
    )
    return f"Run {plain(incident.run, 60)}, {kind}. Findings: {said}. Made from it: {made}."


def _message(finding: Finding, limit: int) -> str:
    return plain(finding.message[:1].upper() + finding.message[1:], limit)


def _ends(value: Range) -> list[str]:
    return [number(value.low), number(value.likely), number(value.high)]


def _time(at: int | None) -> str | None:
    return f"{moment(at)} UTC" if at is not None else None


def write_pdf(path: Path, page: str, *, identity: str) -> None:
    """The page as PDF/A-3b, the same bytes every time. Raises Unavailable where WeasyPrint is not installed."""
    write_durably(path, pdf_of(page, identity=identity))


@contextlib.contextmanager
def _no_clock() -> Iterator[None]:
    """Without HarfBuzz-Subset fontTools cuts the fonts, and writes the time into them unless it is told one."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = told or "0"
    try:
        yield
    finally:
        if told is None:
            del os.environ["SOURCE_DATE_EPOCH"]


def pdf_of(page: str, *, identity: str) -> bytes:
    """As `write_pdf`, in memory. identity: names the document; nothing outside the page is ever fetched."""
    try:
        from weasyprint import HTML
        from weasyprint.urls import URLFetcher
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"PDF needs WeasyPrint 70 or newer: {error}", next_step='pip install "trainguard[report]", or use --html'
        ) from None
    identifier = hashlib.sha256(identity.encode()).digest()[:16]
    with warnings.catch_warnings(), _no_clock():
        # WeasyPrint 70 leaves its own colour profile open for the garbage collector.
        warnings.filterwarnings("ignore", message="unclosed file", category=ResourceWarning)
        document = HTML(string=page, url_fetcher=URLFetcher(allowed_protocols=()))
        return bytes(document.write_pdf(pdf_variant="pdf/a-3b", pdf_identifier=identifier))
