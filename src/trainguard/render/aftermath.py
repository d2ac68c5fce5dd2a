"""What is handed on after an incident to those who are not in the case: reach, review, report to an authority.

    blast_page(dossier)               which models and runs are affected, in doubt, unknown, cleared, and why each
    review_page(dossier, authored)    the blameless review: what happened when, what went well, who does what next
    authority_page(dossier, authored) a draft for an authority, with its clock

None of them says from where it came: that stays in the case. What people wrote stands apart from what the log shows,
with its author; what nobody wrote is a line to fill in, never made up.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from trainguard.incident.authored import NOTHING, Authored
from trainguard.incident.dossier import Dossier
from trainguard.incident.lineage import Family, Line
from trainguard.render.documents import HEADLINES, common, exposure, kind_of_act
from trainguard.render.html import render_paper
from trainguard.render.line import plain
from trainguard.render.terminal import moment
from trainguard.render.words import plural

LINES = 400
EVENTS, ACTIONS = 80, 40
WENT = {"well": "What went well", "badly": "What went badly", "lucky": "Where we were lucky"}
WORDS = {
    "TAINTED": "Tampering is proved in it, or in what it was made from. Withdraw it, and tell who uses it.",
    "SUSPECT": "Something in it, or in what it was made from, is open. Do not release it before that is settled.",
    "UNKNOWN": "Not enough of it was looked at to say. That is no suspicion, and no clearance.",
    "VERIFIED": "Checked, with everything it was made from, and nothing was found. It may go on being used.",
}


# -- reach ---------------------------------------------------------------------------------------------------------


def blast_page(dossier: Dossier) -> str:
    """Every run and model of the log in one of four groups, each with the chain that put it there."""
    family = dossier.family
    touched = [label for label in dossier.incident.affected if not label.startswith("start of run ")]
    groups = []
    for word in ("TAINTED", "SUSPECT", "UNKNOWN", "VERIFIED"):
        lines = _of_word(family, word)
        shown = lines[:LINES]
        groups.append(
            {
                "word": word,
                "meaning": WORDS[word],
                "count": len(lines),
                "lines": [_line(line) for line in shown],
                "more": len(lines) - len(shown),
            }
        )
    values = common(dossier) | {
        "headline": _reach_in_words(family),
        "groups": groups,
        "touched": [plain(label, 90) for label in touched[:12]],
        "touched_more": max(0, len(touched) - 12),
    }
    return render_paper("blast.html", values)


def _of_word(family: Family, word: str) -> list[Line]:
    return [line for line in (*family.affected, *family.unknown, *family.cleared) if line.word == word]


def _reach_in_words(family: Family) -> str:
    counts = [(len(_of_word(family, word)), name) for word, name in _COUNTED]
    return ", ".join(f"{count:,} {name}" for count, name in counts)


_COUNTED = (("TAINTED", "tainted"), ("SUSPECT", "in doubt"), ("UNKNOWN", "not known"), ("VERIFIED", "cleared"))


def _line(line: Line) -> dict[str, Any]:
    made_from = ", ".join(plain(source, 60) for source in line.made_from[:3])
    more = len(line.made_from) - 3
    return {
        "kind": line.kind,
        "label": plain(line.label, 110),
        "made_from": f"{made_from}{f' and {more} more' if more > 0 else ''}",
        "why": _chain(line),
    }


def _chain(line: Line) -> str:
    """Where its word comes from: the node that decides, and what lies between. What was found there names accounts."""
    if line.word == "UNKNOWN":
        return "not enough of it was looked at"
    if len(line.because) < 2:
        return "found in it" if line.kind == "run" else "found in the run that made it"
    first = line.because[0].split(": ", 1)[0]
    between = [plain(each.removesuffix(" was made from it"), 50) for each in line.because[1:-1]]
    return " → ".join([plain(first, 60), *between[:3], "this"])


# -- review --------------------------------------------------------------------------------------------------------


def review_page(dossier: Dossier, authored: Authored = NOTHING) -> str:
    """The blameless review. Nothing about from where: causes that can be mended are conditions, not people."""
    values = common(dossier) | {
        "what": _sentence(kind_of_act(dossier.incident)),
        "exposure": exposure(dossier.damage),
        "affected": f"runs and models affected: {len(dossier.family.affected):,}",
        "cleared": f"cleared: {len(dossier.family.cleared):,}; not known: {len(dossier.family.unknown):,}",
        "lag": _lag(dossier, authored),
        "events": list(_events(dossier, authored))[:EVENTS],
        "went": [
            {
                "title": title,
                "lines": [
                    {"text": plain(one.text, 300), "by": plain(one.by, 60)} for one in authored.went if one.how == how
                ][:ACTIONS],
            }
            for how, title in WENT.items()
        ],
        "actions": [
            {"what": plain(one.what, 240), "owner": plain(one.owner, 60), "due": plain(one.due, 30)}
            for one in authored.action[:ACTIONS]
        ],
        "gaps": _gaps(dossier),
    }
    return render_paper("review.html", values)


def _events(dossier: Dossier, authored: Authored) -> Iterator[dict[str, Any]]:
    """One ordered view: UTC, what, and the entry of the log or who says so."""
    rows: list[tuple[int, str, str]] = []
    for at, what in ((dossier.began, "first act on record"), (dossier.ended, "last act on record")):
        if at is not None and not (rows and rows[0][0] == at):
            leaf = _leaf(dossier, first=what.startswith("first"))
            rows.append(
                (at, f"{what}: {kind_of_act(dossier.incident)}", f"entry {leaf}" if leaf is not None else "log")
            )
    for event in authored.event:
        rows.append((_ns(event.at), plain(event.text, 240), f"said by {plain(event.by, 60)}"))
    if authored.notice is not None:
        by = plain(authored.notice.by, 60) or "people"
        rows.append((_ns(authored.notice.found), "people learned of it", f"said by {by}"))
    for at, what, source in sorted(rows):
        yield {"at": moment(at), "what": what, "source": source}


def _leaf(dossier: Dossier, *, first: bool) -> int | None:
    leaves = [citation.leaf for finding in dossier.incident.findings for citation in finding.evidence]
    return (min(leaves) if first else max(leaves)) if leaves else None


def _lag(dossier: Dossier, authored: Authored) -> str:
    """From the first act on record to the moment people learned of it."""
    if dossier.began is None or authored.notice is None:
        return ""
    seconds = (_ns(authored.notice.found) - dossier.began) // 10**9
    if seconds < 0:
        return "people learned of it before the first act on record: look for an earlier one, or set the time right"
    return f"{_span(seconds)} from the first act on record until people learned of it"


def _span(seconds: int) -> str:
    for size, word in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return plural(seconds // size, word)
    return plural(seconds, "second")


def _gaps(dossier: Dossier) -> list[str]:
    """What the record itself says was not looked at: runs of the log that nobody can clear."""
    names = [plain(line.label, 70) for line in dossier.family.unknown if line.kind == "run"]
    said = [f"{name} could not be judged" for name in names[:5]]
    return said + ([f"and {len(names) - 5} more runs"] if len(names) > 5 else [])


def _ns(at: datetime.datetime) -> int:
    return int(at.timestamp()) * 10**9


# -- authority -----------------------------------------------------------------------------------------------------


def authority_page(dossier: Dossier, authored: Authored = NOTHING) -> str:
    """A draft for an authority: what is known is filled in, the rest is marked, and the clock is shown."""
    notice = authored.notice
    affected: Sequence[Line] = [line for line in dossier.family.affected if line.kind != "run"]
    values = common(dossier) | {
        "headline": HEADLINES.get(dossier.incident.kind, "Something in a training job is not as it should be"),
        "what": _sentence(kind_of_act(dossier.incident)),
        "organisation": plain(notice.organisation, 120) if notice else "",
        "contact": plain(notice.contact, 160) if notice else "",
        "found": _time(notice.found) if notice else "",
        "found_by": plain(notice.by, 80) if notice else "",
        "why": plain(notice.why, 900) if notice else "",
        "internal_only": _yes(notice.internal_only if notice else None),
        "danger": bool(notice and notice.imminent_danger),
        "due": _time(notice.due) if notice else "",
        "models": [plain(line.label, 90) for line in affected[:12]],
        "models_more": max(0, len(affected) - 12),
        "exposure": exposure(dossier.damage),
        "state": "still running" if dossier.running else "ended",
        "done": [f"{_time(one.at)}: {plain(one.text, 200)}" for one in authored.event[:12]],
        "next": [f"{plain(one.what, 200)} ({plain(one.owner, 60)})" for one in authored.action[:12]],
    }
    return render_paper("authority.html", values)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _time(at: datetime.datetime) -> str:
    return at.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"
