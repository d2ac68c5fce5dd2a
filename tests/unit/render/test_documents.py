"""Documents to hand on: what each must say and must not, however long and hostile the record; the same bytes again."""

from __future__ import annotations

import dataclasses
import datetime
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.helpers import pdfa
from tests.helpers.told import HOSTILE

from trainguard.errors import Misuse, Unavailable
from trainguard.evidence import Evidence
from trainguard.finding import Citation, Finding, Subject
from trainguard.incident import attribute as module
from trainguard.incident.attribute import Facts, attribute
from trainguard.incident.authored import Action, Authored, Event, Notice, Went, read_authored
from trainguard.incident.correlate import Incident, severity
from trainguard.incident.damage import Beside, Claim, Damage, Price
from trainguard.incident.dossier import Dossier, Source
from trainguard.incident.lineage import Family, Line
from trainguard.incident.losses import Range, Row
from trainguard.incident.recover import Candidate, Ends, Plan
from trainguard.render.aftermath import authority_page, blast_page, review_page
from trainguard.render.documents import certificate_page, damage_page, flash_page, pdf_of, plain_page
from trainguard.render.incident import incident_page

SOURCE = Source(leaves=912, root="ab" * 32)
HASH = "c" * 64
PRICE = Price(device="H100", currency="USD", low=2.0, likely=3.0, high=4.0, basis="list", date="2026-03-01")
HOURS = Range(low=1.0, likely=2.0, high=4.5)


@pytest.fixture
def weasyprint() -> Any:
    """The module; a skip where it, or the text library it needs, is not on this machine."""
    try:
        import weasyprint as module
    except (ImportError, OSError) as error:
        pytest.skip(f"needs WeasyPrint: {error}")
    return module


@pytest.fixture(autouse=True)
def accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {1001: "victim-b", 1002: "insider"}
    monkeypatch.setattr(module, "_name", lambda uid: f"{names.get(uid, 'account')} (uid {uid})")


def row(kind: str = "tainted", why: str = "edited") -> Row:
    return Row(kind=kind, run="r1", rank=0, process=0, from_step=4, to_step=90, hours=HOURS, why=why, leaf=7)  # type: ignore[arg-type]


def damage(rows: int = 2) -> Damage:
    return Damage(
        hours=HOURS,
        parts={"tainted": HOURS, "idle": Range(likely=0.5, high=0.5)},
        rows=tuple(replace(row(), from_step=4 + index) for index in range(rows)),
        devices=4,
        runs=("r1",),
        money=HOURS.times(PRICE.range),
        price=PRICE,
        claims=(Claim(by="manager of team-b", what="people", currency="USD", amount=250000, date="2026-11-20"),),
        outside=(
            Beside(
                text="8,000 GPUs",
                stated=8000,
                log_shows=Range(low=4, likely=4, high=4),
                answer="not supported",
                why="less",
            ),
        ),
        unknown=("r9",),
    )


def made(findings: int = 1, *, text: str = "process 412 sent SIGKILL to rank 1", hostile: bool = False) -> Dossier:
    """A kill as victim-b from insider's session, with more findings of the same kind."""
    message = HOSTILE + text if hostile else text
    found = tuple(
        Finding(
            check="kills",
            outcome="violated" if index == 0 else "suspicious",
            techniques=("F8",),
            subject=Subject(run="r1", rank=1, step=40 + index),
            message=f"{message} ({index})",
            evidence=(Citation(leaf=9, hash=HASH),),
        )
        for index in range(findings)
    )
    sender = {"pid": 412, "cmdline": [message, "-c"], "uid": 1001, "loginuid": 1002, "session": 7}
    sender |= {"ancestry": [[400, 1, message, ["bash"]]]}
    record = Evidence(n=7, at=10**18, source="supervisor", kind="signalled", body={"sender": sender}, hash=HASH, leaf=9)
    told = attribute(found, Facts(host=message[:80] if hostile else "node-3", uid=1001, by_hash={HASH: record}))
    many = 200 if hostile else 2
    labels = tuple(f"model-{index}.pt {message if hostile else ''}" for index in range(many))
    lines = tuple(Line(key=label, kind="checkpoint", label=label, word="TAINTED") for label in labels)
    clean = tuple(replace(line, label=f"clean {line.label}", word="VERIFIED") for line in lines)
    incident = Incident(
        id="inc-0123456789",
        run="r1",
        kind="F",
        severity=severity(found),
        first_step=40,
        last_step=40 + findings - 1,
        ranks=(1,),
        findings=found,
        techniques=("F8",),
        attribution=told,
        affected=labels,
    )
    return Dossier(
        incident=incident,
        family=Family(affected=lines, cleared=clean),
        damage=damage(),
        source=SOURCE,
        began=10**18,
        ended=10**18 + 10**9,
        running=True,
    )


def streams(pdf: bytes) -> list[bytes]:
    """The streams of a PDF, unpacked where they are packed."""
    found = []
    for packed in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, flags=re.S):
        try:
            found.append(zlib.decompress(packed))
        except zlib.error:
            found.append(packed)
    return found


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))


def test_the_notice_says_what_to_do_and_nothing_about_who() -> None:
    """It goes to people outside the case; what a finding says names accounts."""
    page = text_of(flash_page(made(text="process 412 of account 1001, victim-b, sent SIGKILL")))
    for word in ("inc-0123456789", "2001-09-09 01:46:40 UTC", "still running", "device-hours", "trainguard recover r1"):
        assert word in page
    for word in ("victim-b", "insider", "1001", "1002", "412", "session"):
        assert word not in page


def test_the_plain_report_keeps_facts_conclusions_and_unknowns_apart_and_names_no_person() -> None:
    page = text_of(plain_page(made()))
    order = [
        "1 What is on record",
        "2 What follows from it",
        "3 Spoken for",
        "4 What it touched",
        "5 What is not known",
    ]
    places = [page.index(title) for title in order]
    assert places == sorted(places)
    assert "On host node-3 at 2001-09-09 01:46:40 UTC" in page
    assert "We have no independent evidence of who controlled it" in page
    assert "login session 7 of account insider" in page
    spoken_for = page[places[2] : places[3]]
    assert "victim-b" in spoken_for
    assert "somebody else's session" in spoken_for.replace("&#39;", "'")
    assert "sabotage" not in page.lower()
    assert "clean model-0.pt" in page


def test_what_speaks_against_stands_beside_what_speaks_for() -> None:
    page = text_of(plain_page(made()))
    assert "What speaks for it" in page
    assert "or: stolen credentials" in page


def test_the_damage_statement_keeps_measured_claimed_and_said_apart() -> None:
    page = text_of(damage_page(damage(), SOURCE, scope="all runs of this log"))
    for words in ("spoilt work", "waiting for a restart", "250,000.00 USD", "8,000 GPUs", "not supported", "r9"):
        assert words in page
    assert page.index("Claimed by people") > page.index("Not counted")
    assert "and 20 more rows" in text_of(damage_page(damage(420), SOURCE, scope="x"))


CHOSEN = Candidate(place="/m/a-5.pt", step=5, leaf=4, root="ef" * 32, word="VERIFIED", intact="yes")
PLAN = Plan(
    run="r1",
    verdict="TAINTED",
    first_bad_step=6,
    checkpoint=CHOSEN,
    later=(replace(CHOSEN, place="/m/a-8.pt", step=8, word="TAINTED", why="edited at step 6"),),
    command=("python", "train.py", "--resume", "/m/a-5.pt"),
    command_from="as run r2 resumed",
)
EQUAL = Ends(resumed="r2", reference="r0", resumed_checkpoint="b.pt", reference_checkpoint="c.pt", tensors=14)


def test_a_certificate_needs_a_verified_checkpoint_replay_and_an_equal_end() -> None:
    full = text_of(certificate_page(PLAN, SOURCE, detection={"0.1": 0.98}, ends=EQUAL))
    assert "Recovery certificate" in full
    assert "equal: 14 tensors, bit for bit" in full
    assert "/m/a-8.pt" in full


@pytest.mark.parametrize(
    ("plan", "detection", "ends", "missing"),
    [
        (replace(PLAN, checkpoint=None), {"0.1": 0.98}, EQUAL, "no checkpoint of the run"),
        (replace(PLAN, checkpoint=replace(CHOSEN, word="UNKNOWN")), {"0.1": 0.98}, EQUAL, "is UNKNOWN, not VERIFIED"),
        (PLAN, {"0.1": 0.0}, EQUAL, "nothing of the run was replayed"),
        (PLAN, {"0.1": 0.98}, None, "has not been compared"),
        (PLAN, {"0.1": 0.98}, replace(EQUAL, differing=("w",)), "does not end where the reference does"),
    ],
)
def test_without_one_of_them_it_is_a_plan_that_says_what_is_missing(
    plan: Plan, detection: dict[str, float], ends: Ends | None, missing: str
) -> None:
    page = text_of(certificate_page(plan, SOURCE, detection=detection, ends=ends))
    assert "not a certificate" in page
    assert missing in page


DRAWN: dict[str, Callable[[Dossier], str]] = {
    "flash": flash_page,
    "plain": plain_page,
    "reach": blast_page,
    "review": review_page,
    "authority": authority_page,
}


def pages(name: str) -> str:
    """A document from a record as long and hostile as records get."""
    if name in DRAWN:
        return DRAWN[name](made(900, text="x" * 900, hostile=True))
    if name == "damage":
        return damage_page(damage(3), SOURCE, scope=HOSTILE)
    plan = replace(PLAN, later=PLAN.later * 200, command=("python", HOSTILE), checkpoint=replace(CHOSEN, place=HOSTILE))
    return certificate_page(plan, SOURCE, detection={"0.1": 0.98}, ends=EQUAL)


AT = datetime.datetime(2001, 9, 11, 4, tzinfo=datetime.UTC)
AUTHORED = Authored(
    notice=Notice(found=AT, by="security operations", why="weights were modified", internal_only=False),
    event=(Event(at=AT, by="on-call of team-a", text="the run was stopped"),),
    went=(Went(how="lucky", text="somebody read the log"),),
    action=(Action(what="two people approve", owner="platform", due="2001-12-01"),),
)


@pytest.mark.parametrize("name", ["flash", "reach", "review", "authority", "damage"])
def test_what_leaves_the_case_names_no_account_and_no_process(name: str) -> None:
    """Whatever a finding says of accounts stays in the technical report and the one in plain words."""
    dossier = made(text="process 412 of account 1001, victim-b, sent SIGKILL")
    page = damage_page(dossier.damage, SOURCE, scope="x") if name == "damage" else DRAWN[name](dossier)
    for word in ("victim-b", "insider", "1001", "1002", "process 412", "session"):
        assert word not in text_of(page)


def test_the_statement_of_reach_says_for_each_model_in_which_of_four_groups_it_is_and_why() -> None:
    dossier = made()
    chained = replace(
        dossier.family.affected[0], because=("run r1: edited by account 1001", "model-0.pt was made from it")
    )
    dossier = dataclasses.replace(dossier, family=replace(dossier.family, affected=(chained,)))
    page = text_of(blast_page(dossier))
    assert "1 tainted, 0 in doubt, 0 not known, 2 cleared" in page
    assert "run r1 → this" in page
    assert "1001" not in page
    assert "clean model-0.pt" in page


def test_the_review_sets_what_people_say_beside_the_record_with_its_source() -> None:
    page = text_of(review_page(made(), AUTHORED))
    for words in ("entry 9", "said by on-call of team-a", "somebody read the log", "two people approve platform"):
        assert words in page
    assert "2 days from the first act on record until people learned of it" in page
    assert page.index("2001-09-09 01:46:40") < page.index("2001-09-11 04:00:00")
    assert "to be filled in" in text_of(review_page(made()))


def test_a_draft_for_an_authority_has_its_clock_and_marks_what_nobody_stated() -> None:
    page = text_of(authority_page(made(), AUTHORED))
    assert "Due by 2001-09-26 04:00 UTC: 15 days" in page
    assert "to be filled in: organisation" in page
    danger = Authored(notice=Notice(found=AT, imminent_danger=True))
    assert "Due by 2001-09-12 04:00 UTC: 24 hours" in text_of(authority_page(made(), danger))
    assert "The clock has no beginning yet" in text_of(authority_page(made()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[notice]\nfound = 2001-09-11T04:00:00", "with their zone"),
        ("[notice]\nfound = 2001-09-11T04:00:00Z\nwho = 'x'", "unknown field `who`"),
        ("[[went]]\nhow = 'fine'\ntext = 'x'", "how"),
        ("[", "not a notes file"),
    ],
)
def test_notes_that_are_not_as_described_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "n.toml").write_text(text)
    with pytest.raises(Misuse, match=said):
        read_authored(tmp_path / "n.toml")


@pytest.mark.parametrize("name", [*DRAWN, "certificate", "damage"])
def test_no_name_of_an_attacker_becomes_markup(name: str) -> None:
    page = pages(name)
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_technical_report_lists_eight_hundred_findings() -> None:
    dossier = made(800)
    page = incident_page(dossier.incident, dossier.family)
    assert page.count("sent SIGKILL to rank 1 (") >= 800
    assert "Circumstances" in page


@pytest.mark.parametrize(("name", "sheets"), [("flash", 1), ("plain", 2)])
def test_one_page_is_one_page_and_two_are_two_and_the_bytes_repeat(weasyprint: Any, name: str, sheets: int) -> None:
    page = pages(name)
    assert len(weasyprint.HTML(string=page).render().pages) <= sheets
    first = pdf_of(page, identity=name)
    assert first == pdf_of(page, identity=name)
    assert first.startswith(b"%PDF-1.7")
    assert b"pdfaid:part" in b"".join(streams(first)), "it says which PDF/A it is"


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*DRAWN, "certificate", "damage"])
def test_every_document_bears_the_marks_of_pdfa_3b(weasyprint: Any, name: str) -> None:
    """Those that can be read without a validator: tests/helpers/pdfa.py lists them with their clauses."""
    page = DRAWN[name](made(3)) if name in DRAWN else pages(name)
    assert pdfa.against(pdf_of(page, identity=name)) == []


@pytest.mark.nightly
def test_a_document_without_the_marks_is_told(weasyprint: Any) -> None:
    """A plain PDF has no output intent and no claim to be PDF/A."""
    plain_pdf = weasyprint.HTML(string="<p>x</p>").write_pdf()
    assert {"no PDF/A output intent", "the metadata do not say PDF/A-3B"} <= set(pdfa.against(plain_pdf))


@pytest.mark.usefixtures("weasyprint")
def test_what_a_document_asks_for_is_not_fetched(tmp_path: Path) -> None:
    """Not even from this disk: a picture that markup names would be read by whoever makes the PDF."""
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP-SECRET-TEXT")
    page = f'<p>x</p><link rel="attachment" href="file://{secret}"><object data="file://{secret}"></object>'
    assert b"TOP-SECRET-TEXT" not in b"".join(streams(pdf_of(page, identity="x")))


def test_without_weasyprint_the_next_step_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(Unavailable, match="needs WeasyPrint"):
        pdf_of("<p>x</p>", identity="x")
