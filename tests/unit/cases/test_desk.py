"""Rooms: who gets in, who gets out, what is logged, and what is said to whom."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from tests.helpers.cases import Site, incident

from trainguard import opaque
from trainguard.cases import sealed
from trainguard.cases.desk import Desk, NoSuchCase, RefusedAct
from trainguard.cases.identity import new_identity
from trainguard.cases.records import Subject
from trainguard.errors import Misuse, TrainguardError, Unavailable, VerificationError
from trainguard.render.case import case_view, document


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def refused(call: object) -> str:
    with pytest.raises(TrainguardError) as caught:
        call()  # type: ignore[operator]
    return f"{type(caught.value).__name__} {caught.value.exit_status} {caught.value} {caught.value.next_step}"


def test_a_case_is_one_when_two_people_signed(site: Site):
    """Before it only they see it; then the members they named do, with the incident as it was taken in."""
    members = (site.grant("reader-c", "reader"),)
    code = site.desk("lead-a").open(
        [incident()], second=site.card("lead-b"), reason="why", until=site.until(), members=members
    )
    assert [line.stage for line in site.desk("lead-b").cases()] == ["proposed"]
    assert site.desk("reader-c").cases() == []
    site.desk("lead-b").sign(code, 0)
    view = site.desk("reader-c").show(code)
    assert view.state.stage == "open"
    assert view.incidents[0]["id"] == "inc-0123456789"
    assert view.state.members[site.person("reader-c").key].granted_by == ("lead-a", "lead-b")


def test_one_person_does_not_make_two(site: Site):
    """Signing twice, or with two cards of one key, is refused, and the former is written down."""
    with pytest.raises(RefusedAct, match="same key"):
        site.desk("lead-a").open([incident()], second=site.card("lead-a"), reason="why", until=site.until())
    code = site.opened()
    number = site.desk("lead-a").grant(code, site.card("friend"), role="reader", reason="helps", until=site.until())
    with pytest.raises(RefusedAct, match="a second person must sign"):
        site.desk("lead-a").sign(code, number)
    assert site.desk("friend").cases() == []
    view = site.desk("lead-b").show(code)
    assert [seen.record.said.why for seen in view.seen if seen.record.kind == "refused"] != []


def test_who_the_evidence_names_is_kept_out_whoever_grants(site: Site):
    """By account, and by the account that the process acts under though the card says nothing of it."""
    site.person("insider")
    code = site.opened()
    said = refused(
        lambda: site.desk("lead-a").grant(code, site.card("insider"), role="lead", reason="x", until=site.until())
    )
    assert "insider is named by the evidence" in said
    assert "1 case" in said
    site.person("other-name", accounts=("other",))
    with pytest.raises(RefusedAct, match="other-name cannot be in this case"):
        site.desk("other-name", also=("uid 54242",)).open(
            [incident()], second=site.card("lead-a"), reason="x", until=site.until()
        )


def test_a_member_whom_a_later_incident_names_is_out_at_once(site: Site):
    """And cannot read what is written from then on."""
    code = site.opened(site.grant("inv-c"))
    assert site.desk("inv-c").cases()
    site.desk("lead-a").add(code, [incident("inv-c", 54243, name="inc-1111111111")])
    assert site.desk("inv-c").cases() == []
    assert refused(lambda: site.desk("inv-c").show(code)) == refused(lambda: site.desk("stranger").show(code))
    site.desk("lead-a").note(code, "inv-c is in the evidence")
    holders = site.desk("lead-a").show(code).state.holders
    assert site.person("inv-c").key not in holders


def test_an_exclusion_that_anybody_could_have_forged_can_be_lifted_by_two_and_a_firm_one_never(site: Site):
    """A git author is what somebody wrote; framing must not keep the investigators out."""
    forged = Subject(kind="author", value="lead-b@example.org", why="wrote train.py:3", firm=False)
    site.person("lead-b", authors=("lead-b@example.org",))
    desk, more = site.desk("lead-a"), {"second": site.card("lead-b"), "reason": "x", "until": site.until()}
    with pytest.raises(RefusedAct, match="wrote train"):
        desk.open([incident()], subjects=(forged,), **more)  # type: ignore[arg-type]
    code = desk.open([incident()], subjects=(forged,), lifts=(forged.name,), **more)  # type: ignore[arg-type]
    assert code
    firm = Subject(kind="account", value="lead-b", why="sent the signal", firm=True)
    with pytest.raises(RefusedAct, match="sent the signal"):
        desk.open([incident()], subjects=(firm,), lifts=(firm.name,), **more)  # type: ignore[arg-type]


def test_the_second_person_looks_again_at_whom_the_evidence_names(site: Site):
    """A proposer who leaves somebody out is found out by the one who signs."""
    code = site.desk("lead-a").open(
        [incident()], second=site.card("lead-b"), reason="x", until=site.until(), subjects=()
    )
    with pytest.raises(RefusedAct, match="leaves out uid 54242"):
        site.desk("lead-b").sign(code, 0)


def test_strangers_leavers_and_those_whose_time_ran_out_hear_one_sentence(site: Site):
    """The same as for a name that no case has: words, status, and what is written."""
    code = site.opened(site.grant("brief", days=2), site.grant("gone"), site.grant("thrown-out"))
    site.desk("gone").leave(code, reason="another team")
    number = site.desk("lead-a").remove(code, "thrown-out", reason="no need to know")
    site.desk("lead-b").sign(code, number)
    site.later(3)
    before = len(site.entries())
    for name in ("brief", "gone", "thrown-out", "stranger", None):
        desk = site.desk(name)
        for verb in (
            desk.show,
            lambda n, d=desk: d.note(n, "x"),
            lambda n, d=desk: d.sign(n, 0),
            lambda n, d=desk: d.trace(n, "x"),
        ):
            assert refused(lambda v=verb: v(code)) == refused(lambda v=verb: v("no-such-case")).replace(
                "no-such-case", code
            )
        assert desk.cases() == []
    assert (len(site.entries()) - before) == 5 * (4 * 2 + 1) * sealed.UNIT_ENTRIES


def test_every_call_of_anybody_writes_the_same(site: Site):
    """One unit of entries of one size and one of files of one size, whether it was a read, a grant or nothing."""
    site.person("stranger")
    code = site.opened(site.grant("inv-c"))
    number = site.desk("lead-a").grant(code, site.card("inv-d"), role="reader", reason="x", until=site.until())
    calls = [
        lambda: site.desk("stranger").cases(),
        lambda: site.desk(None).cases(),
        lambda: site.desk("lead-a").cover(),
        lambda: site.desk("lead-a").show(code),
        lambda: site.desk("lead-b").sign(code, number),
        lambda: site.desk("inv-c").note(code, "seen on {node-1|node-2|node-3|node-4|node-5}"),
        lambda: site.desk("lead-a").hold(code, reason="counsel asks"),
    ]
    for call in calls:
        entries, files = len(site.entries()), len(site.files())
        call()
        assert len(site.entries()) - entries == sealed.UNIT_ENTRIES
        assert len(site.files()) - files == sealed.UNIT_FILES
    assert {len(entry) for entry in site.entries()[1:]} == {opaque.ENTRY_BYTES}
    assert {path.stat().st_size for path in site.files()} == {sealed.FILE_BYTES}


def test_what_cannot_be_logged_is_not_shown(site: Site):
    """The key of the log taken away: a member is told so, and gets nothing; so is a stranger."""
    code = site.opened()
    key = site.home.keys / "log.key"
    key.rename(key.with_suffix(".away"))
    for name in ("lead-a", "stranger"):
        with pytest.raises(Unavailable, match="signing key is not there"):
            site.desk(name).show(code)


def test_reads_are_in_the_record_before_they_are_answered(site: Site):
    """Who, what, when; also the one that is being answered."""
    code = site.opened(site.grant("inv-c"))
    site.desk("inv-c").show(code)
    site.desk("inv-c").trace(code, "some text")
    view = site.desk("lead-a").show(code)
    reads = [
        (view.state.called(seen.author), seen.record.said.what) for seen in view.seen if seen.record.kind == "read"
    ]
    assert reads == [("inv-c", "show"), ("inv-c", "trace"), ("lead-a", "show")]


def test_a_new_member_reads_back_and_a_former_one_not_forward(site: Site):
    """A grant hands on the keys before; a removal changes the key, and no old one opens a later record."""
    code = site.opened(site.grant("inv-c"))
    number = site.desk("lead-a").remove(code, "inv-c", reason="done")
    site.desk("lead-b").sign(code, number)
    number = site.desk("lead-a").grant(code, site.card("inv-d"), role="reader", reason="new", until=site.until())
    site.desk("lead-b").sign(code, number)
    view = site.desk("inv-d").show(code)
    assert [seen.record.n for seen in view.seen] == list(range(len(view.seen)))
    assert view.incidents[0]["id"] == "inc-0123456789"
    keys = {seen.record.said.previous for seen in view.seen if seen.record.kind == "epoch"}
    last = [seen for seen in view.seen if seen.record.kind == "sign"][-1]
    entry = site.entries()[last.leaf]
    for key in keys:
        with pytest.raises(VerificationError):
            sealed.open_header(entry, bytes.fromhex(key), where="entry")


@pytest.mark.parametrize("harm", ["altered", "gone"])
def test_a_tampered_file_of_the_case_is_said_to_members_and_to_nobody_else(site: Site, harm: str):
    """One sentence that names the record; nothing is shown; a stranger hears what he always hears."""
    code = site.opened()
    read = {path: path.read_bytes() for path in site.files()}
    for path, data in read.items():
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1])) if harm == "altered" else path.unlink()
    with pytest.raises(VerificationError, match=r"record 0 \(leaf \d+\): .* (was altered|is gone)") as caught:
        site.desk("lead-a").show(site.desk("lead-a").cases()[0].code)
    assert caught.value.exit_status == 1
    with pytest.raises(NoSuchCase):
        site.desk("stranger").show(code)
    for path, data in read.items():
        path.write_bytes(data)
    assert site.desk("lead-a").show(code).state.stage == "open"


def test_a_clock_that_goes_back_shows_nothing(site: Site):
    """Else a membership that ran out would run again."""
    code = site.opened()
    site.later(-10)
    with pytest.raises(Unavailable, match=r"clock is 86\d,\d{3} s before"):
        site.desk("lead-a").show(code)
    assert "clock" in site.desk("lead-a").cases()[0].broken


def test_a_log_that_was_cut_shows_to_who_saw_more(site: Site, tmp_path: Path):
    """The identity remembers how far it saw each case."""
    import shutil

    code = site.opened()
    shutil.copytree(site.home.log, tmp_path / "older")
    site.desk("lead-a").show(code)
    shutil.rmtree(site.home.log)
    shutil.copytree(tmp_path / "older", site.home.log)
    with pytest.raises(VerificationError, match="you have seen 3 records"):
        site.desk("lead-a").show(code)


def test_in_legal_hold_nothing_is_deleted_and_no_lead_runs_out(site: Site):
    """Purging is refused until two people end the hold; evidence nobody can open would be deleted evidence."""
    code = site.opened()
    lead = site.desk("lead-a")
    lead.hold(code, reason="counsel asks")
    for stage in ("contained", "eradicated", "recovered"):
        lead.move(code, stage, severity=None, reason="done")  # type: ignore[arg-type]
    site.desk("lead-b").sign(code, lead.move(code, "closed", severity="high", reason="done"))
    site.later(60)
    assert lead.show(code).state.stage == "closed"
    with pytest.raises(RefusedAct, match="legal hold: nothing of it can be deleted"):
        lead.propose_purge(code, reason="old")
    number = lead.hold(code, reason="counsel agrees", release=True)
    assert lead.show(code).state.held
    site.desk("lead-b").sign(code, number)
    assert refused(lambda: lead.show(code)) == refused(lambda: site.desk("stranger").show(code))


def test_a_closed_case_is_purged_by_two_and_keeps_its_record(site: Site):
    """Contents go; who did what stays."""
    code = site.opened()
    lead, other = site.desk("lead-a"), site.desk("lead-b")
    with pytest.raises(RefusedAct, match="only a closed case"):
        lead.propose_purge(code, reason="old")
    for stage in ("contained", "eradicated", "recovered"):
        lead.move(code, stage, severity=None, reason="done")  # type: ignore[arg-type]
    other.sign(code, lead.move(code, "closed", severity=None, reason="done"))
    files = len(site.files())
    number = lead.propose_purge(code, reason="retention is over")
    other.sign(code, number)
    assert len(site.files()) == files + 2 * sealed.UNIT_FILES - 1
    view = lead.show(code)
    assert view.incidents == ()
    assert view.state.incidents[0].id == "inc-0123456789"


def test_an_illegal_move_changes_nothing(site: Site):
    """The stages are a table."""
    code = site.opened()
    with pytest.raises(RefusedAct, match="from open a case goes to contained, not to recovered"):
        site.desk("lead-a").move(code, "recovered", severity=None, reason="x")
    assert site.desk("lead-a").show(code).state.stage == "open"


def test_a_reader_reads_and_does_nothing_else(site: Site):
    """And is told so; it is written down."""
    code = site.opened(site.grant("reader-c", "reader"))
    with pytest.raises(RefusedAct, match="a note needs an investigator"):
        site.desk("reader-c").note(code, "x")
    assert site.desk("reader-c").show(code)


def test_an_export_needs_two_and_is_made_once(site: Site):
    """Its digest is logged before the bytes are given out."""
    code = site.opened()
    lead = site.desk("lead-a")
    number = lead.propose_export(code, reason="for counsel")
    with pytest.raises(RefusedAct, match="no export that two people signed"):
        lead.exported(code, number, lambda view: b"x")
    site.desk("lead-b").sign(code, number)
    assert lead.exported(code, number, lambda view: b"bundle") == b"bundle"
    with pytest.raises(RefusedAct, match="no export that two people signed"):
        lead.exported(code, number, lambda view: b"x")


def test_where_approvers_are_named_only_they_open_grant_and_sign(site: Site):
    """And a room that others made and sealed to somebody's card is not shown to them as a case."""
    approvers = (site.card("lead-a"), site.card("lead-b"))
    strangers = site.desk("x").open([incident()], second=site.card("lead-a"), reason="bait", until=site.until())
    assert site.desk("lead-a", approvers=approvers).cases() == []
    with pytest.raises(NoSuchCase):
        site.desk("lead-a", approvers=approvers).sign(strangers, 0)
    with pytest.raises(RefusedAct, match="approvers"):
        site.desk("x", approvers=approvers).open(
            [incident()], second=site.card("lead-a"), reason="x", until=site.until()
        )
    code = site.opened(site.grant("lead-c", "lead"))
    with pytest.raises(RefusedAct, match="approvers"):
        site.desk("lead-c", approvers=approvers).grant(
            code, site.card("y"), role="reader", reason="x", until=site.until()
        )


def test_two_cases_of_one_name_are_told_apart_by_their_ids(site: Site):
    """Somebody who seals a room of the same name to a member does not lock them out of theirs."""
    code = site.opened()
    site.desk("x").open([incident()], second=site.card("lead-a"), reason="bait", until=site.until(), code=code)
    with pytest.raises(Misuse, match="2 cases open to you") as caught:
        site.desk("lead-a").show(code)
    ids = str(caught.value.next_step).removeprefix("name one by: ").split(", ")
    assert {site.desk("lead-a").show(one).state.members[site.person("lead-a").key].card.name for one in ids} == {
        "lead-a"
    }


def test_a_card_that_borrows_the_key_of_a_member_is_no_second_person(site: Site):
    """Another signing key over the same sealing key is the same pair of eyes."""
    from msgspec.structs import replace

    fake = new_identity("lead-z")
    card = replace(fake.card, sealing=site.card("lead-a").sealing)
    with pytest.raises(RefusedAct, match="same key"):
        site.desk("lead-a").open([incident()], second=card, reason="x", until=site.until())
    code = site.opened()
    with pytest.raises(RefusedAct, match="sealing key of another member"):
        site.desk("lead-a").grant(code, card, role="reader", reason="x", until=site.until())


def test_a_room_takes_ten(site: Site):
    """What one call can deliver keys to; an eleventh is refused."""
    members = [site.grant(f"m-{n}", "reader") for n in range(8)]
    code = site.opened(*members)
    with pytest.raises(RefusedAct, match="at most 10 members"):
        site.desk("lead-a").grant(code, site.card("m-9"), role="reader", reason="x", until=site.until())
    with pytest.raises(Misuse, match="at most 10"):
        site.desk("lead-a").open(
            [incident()],
            second=site.card("lead-b"),
            reason="x",
            until=site.until(),
            members=[*members, site.grant("m-8")],
        )


def test_a_former_member_cannot_hand_out_a_key_of_their_own(site: Site):
    """What they write under it is ignored; what members write is read on."""
    code = site.opened(site.grant("inv-c"))
    old = site.desk("inv-c").show(code)
    number = site.desk("lead-a").remove(code, "inv-c", reason="done")
    site.desk("lead-b").sign(code, number)
    import base64

    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    from trainguard.log import Log

    room, key, first = old.state.room, b"k" * 32, len(site.desk("lead-b").show(code).seen)
    reader = site.card("lead-b")
    signed = sealed.delivered(room, key.hex(), first, reader.sealing)
    signature = site.person("inv-c").signing.sign(signed, ec.ECDSA(hashes.SHA256()))
    what = sealed.Delivery(
        room=room,
        key=key.hex(),
        first=first,
        author=site.person("inv-c").key,
        signature=base64.b64encode(signature).decode(),
    )
    data, file_key = sealed.seal_file(b"junk")
    name = sealed.store(site.home.root / "vault", data)
    header = sealed.Header(room=room, n=first, previous="0" * 64, file=name, key=file_key.hex())
    with Log.open(site.home.log, site.home.keys / "log.key") as log:
        log.append([sealed.deliver(what, reader.mailbox), sealed.seal_header(header, key)])
    view = site.desk("lead-b").show(code)
    assert len(view.seen) == first + 1
    assert site.desk("lead-a").show(code).seen[-1].record.kind == "read"


def test_without_an_identity_there_is_nothing_to_see_and_nothing_to_do(site: Site):
    """List is empty; acting says how to get one."""
    assert Desk(site.home, None).cases() == []
    with pytest.raises(Unavailable, match="no identity here"):
        site.desk(None).open([incident()], second=site.card("lead-a"), reason="x", until=site.until())


def test_a_membership_in_the_past_is_refused(site: Site):
    """At opening and at granting."""
    with pytest.raises(Misuse, match="end in the future"):
        site.desk("lead-a").open([incident()], second=site.card("lead-b"), reason="x", until=site.until(-1))
    code = site.opened()
    with pytest.raises(Misuse, match="ends in the future"):
        site.desk("lead-a").grant(code, site.card("y"), role="reader", reason="x", until=site.until(-1))


def test_two_who_act_at_once_both_stand_in_the_record(site: Site):
    """Calls wait for each other; no record is lost or written over."""
    from concurrent.futures import ThreadPoolExecutor

    code = site.opened()
    desks = [site.desk("lead-a"), site.desk("lead-b")]
    with ThreadPoolExecutor(2) as pool:
        numbers = list(pool.map(lambda n: desks[n % 2].note(code, f"note {n}"), range(6)))
    view = site.desk("lead-a").show(code)
    assert len(set(numbers)) == 6
    assert {text for _, text in view.notes} == {f"note {n}" for n in range(6)}
    assert view.strange == ()


@pytest.mark.parametrize("code", ["", "a\x1b[31mb", "x" * 65, "a\nb"])
def test_a_code_name_is_what_can_be_read_to_somebody(site: Site, code: str):
    """Refused by the tool; and a room that somebody made with one by another tool is none."""
    more = {"second": site.card("lead-b"), "reason": "x", "until": site.until()}
    with pytest.raises(Misuse, match="code name"):
        site.desk("lead-a").open([incident()], code=code, **more)  # type: ignore[arg-type]


def test_junk_sealed_to_a_member_does_no_harm(site: Site):
    """Deliveries of rooms that are not there, of keys that are none, from the future or before the first record."""
    from trainguard.log import Log

    code = site.opened()
    room = site.desk("lead-a").show(code).state.room
    mailbox = site.card("lead-a").mailbox
    odd = [
        {"room": "x", "key": "zz", "first": 0},
        {"room": room, "key": "00" * 32, "first": -5},
        {"room": room, "key": "", "first": 3},
        {"room": room, "key": "", "first": 10**12},
        {"room": "\x1b[31m" * 20, "key": "11" * 32, "first": 7},
    ]
    entries = [
        sealed.deliver(sealed.Delivery(author="a" * 64, signature="!", **one), mailbox)  # type: ignore[arg-type]
        for one in odd
    ]
    with Log.open(site.home.log, site.home.keys / "log.key") as log:
        log.append([*entries, opaque.MAGIC + bytes(opaque.ENTRY_BYTES - 8)])
    assert [line.code for line in site.desk("lead-a").cases()] == [code]
    assert site.desk("lead-a").show(code).strange == ()
    for path in site.files():
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(VerificationError, match="was altered"):
        site.desk("lead-a").show(site.desk("lead-a").cases()[0].code)


def test_a_hypothesis_says_who_thought_it_when_and_what_spoke_for_and_against(site: Site):
    """All of it is in the record, in the document and in what a member sees; none of it can be altered."""
    code = site.opened(site.grant("inv-c"), site.grant("reader-d", "reader"))
    desk = site.desk("lead-a")
    first = desk.suppose(code, "the side file was edited by hand")
    second = site.desk("inv-c").suppose(code, "the deployment job put an old side file back")
    site.desk("inv-c").weigh(code, first, "against", "its inode is older than the run", cites=["leaf:12"])
    desk.weigh(code, first, "for", "its writer had no deployment", cites=["inc-0123456789", "record:3"])
    desk.settle(code, second, "refuted", reason="the job did not run that day")
    desk.settle(code, first, "supported", reason="nothing else is left so far")
    view = site.desk("reader-d").show(code)
    told = document(view)["hypotheses"]
    assert [(one["n"], one["by"], one["worth"]) for one in told] == [
        (first, "lead-a", "supported"),
        (second, "inv-c", "refuted"),
    ]
    assert [(one["side"], one["by"], one["cites"]) for one in told[0]["weighed"]] == [
        ("against", "inv-c", ["leaf:12"]),
        ("for", "lead-a", ["inc-0123456789", "record:3"]),
    ]
    assert int(told[0]["at"]) < int(told[0]["weighed"][0]["at"]) < int(told[0]["weighed"][1]["at"])
    said = [line["said"] for line in document(view)["record"]]
    assert f"against hypothesis {first}: its inode is older than the run [leaf:12]" in said
    console = Console(width=160, file=io.StringIO())
    console.print(case_view(view))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "against: its inode is older than the run [leaf:12]" in shown
    assert "for: nothing was written down" in shown, "of the second, told as plainly"


def test_nothing_is_supported_alone_or_on_nothing(site: Site):
    """What else it could be has to be written down first; a refused try is in the record."""
    code = site.opened(site.grant("reader-c", "reader"))
    desk = site.desk("lead-a")
    only = desk.suppose(code, "it was sabotage")
    with pytest.raises(RefusedAct, match="write down what else it could be"):
        desk.settle(code, only, "supported", reason="obvious")
    desk.suppose(code, "a fault in the approved commit")
    with pytest.raises(RefusedAct, match="nothing in this case speaks for"):
        desk.settle(code, only, "supported", reason="obvious")
    with pytest.raises(RefusedAct, match="no hypothesis 99"):
        desk.weigh(code, 99, "for", "x")
    with pytest.raises(Misuse, match="to cite"):
        desk.weigh(code, only, "for", "x", cites=["my feeling"])
    with pytest.raises(RefusedAct, match="a hypothesis needs an investigator"):
        site.desk("reader-c").suppose(code, "x")
    view = desk.show(code)
    assert view.state.thoughts[only].worth == "open"
    assert [seen.record.kind for seen in view.seen].count("refused") == 4


def test_a_stranger_learns_nothing_of_hypotheses(site: Site):
    """One answer for a case that is not theirs and for none at all."""
    code = site.opened()
    number = site.desk("lead-a").suppose(code, "x")
    site.desk("lead-a").suppose(code, "y")
    for act in (
        lambda name: site.desk("stranger").suppose(name, "x"),
        lambda name: site.desk("stranger").weigh(name, number, "for", "x"),
        lambda name: site.desk("stranger").settle(name, number, "dropped", reason="x"),
    ):
        heard = refused(lambda call=act: call(code))
        assert heard.replace(code, "X") == refused(lambda call=act: call("no-such")).replace("no-such", "X")
