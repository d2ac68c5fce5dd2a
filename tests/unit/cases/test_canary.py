"""Notes that say whose copy they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.cases import Site

from trainguard.cases import canary
from trainguard.cases.canary import settled
from trainguard.errors import Misuse

TEMPLATE = "We replay job-7 on {Monday|Tuesday|Friday} from {node-3|node-9|node-12}, starting at {nine|ten}."


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_member_reads_another_copy_and_a_leak_names_it(site: Site):
    """Reworded, in capitals, with other spacing: the marks remain."""
    code = site.opened(site.grant("inv-c"), site.grant("inv-d"))
    site.desk("lead-a").note(code, TEMPLATE)
    copies = {name: site.desk(name).show(code).notes[0][1] for name in ("lead-a", "lead-b", "inv-c", "inv-d")}
    assert len(set(copies.values())) == 4
    leaked = "heard that\n  " + copies["inv-c"].upper().replace("WE REPLAY JOB-7", "they will look")
    found = settled(site.desk("lead-a").trace(code, leaked))
    assert found is not None
    assert found.name == "inv-c"


def test_what_carries_no_mark_or_several_names_nobody(site: Site):
    """Nor does a note without alternatives; nor one that somebody else wrote."""
    code = site.opened(site.grant("inv-c"))
    site.desk("lead-a").note(code, TEMPLATE)
    site.desk("lead-a").note(code, "a plain note, Monday, node-3")
    lead = site.desk("lead-a")
    assert lead.trace(code, "nothing of it") == []
    assert settled(lead.trace(code, "Monday Tuesday Friday node-3 node-9 node-12 nine ten")) is None
    assert site.desk("lead-b").trace(code, site.desk("inv-c").show(code).notes[0][1]) == []


def test_a_marked_note_cannot_be_told_from_a_plain_one_by_its_size(site: Site):
    """What a reader could measure of the sealed copies is the same."""
    cards = {site.person(name).key: site.card(name) for name in ("lead-a", "lead-b", "inv-c")}
    marked = canary.make(TEMPLATE, cards, site.card("lead-a"))
    plain = canary.make("We replay job-7.", cards, site.card("lead-a"))
    for content in (marked, plain):
        assert {len(copy) for copy in content["copies"].values()} == {len(next(iter(plain["copies"].values())))}
        assert len(content["own"]) == len(plain["own"])


def test_who_joins_later_has_no_copy(site: Site):
    """A copy made afterwards would be one that somebody else has too."""
    code = site.opened()
    site.desk("lead-a").note(code, TEMPLATE)
    number = site.desk("lead-a").grant(code, site.card("inv-c"), role="reader", reason="x", until=site.until())
    site.desk("lead-b").sign(code, number)
    assert site.desk("inv-c").show(code).notes[0][1] == "(written before you joined)"


def test_too_few_or_nested_alternatives_are_refused(site: Site):
    """Before anything is written."""
    cards = {site.person(name).key: site.card(name) for name in ("lead-a", "lead-b", "inv-c")}
    with pytest.raises(Misuse, match="make 2 copies, 3 members need one each"):
        canary.make("at {nine|ten}", cards, site.card("lead-a"))
    with pytest.raises(Misuse, match="is part of"):
        canary.make("on {node 3|node 3 b|node 4}", cards, site.card("lead-a"))
    with pytest.raises(Misuse, match="printable"):
        canary.make("", cards, site.card("lead-a"))


def test_copies_lie_as_far_apart_as_they_go(site: Site):
    """With marks to spare, no two copies share more than they must, so a part of a leak is enough."""
    cards = {site.person(name).key: site.card(name) for name in ("lead-a", "lead-b", "inv-c")}
    content = canary.make("{a1|a2|a3} {b1|b2|b3} {c1|c2|c3}", cards, site.card("lead-a"))
    copies = [str(canary.mine(content, site.person(name))).split() for name in ("lead-a", "lead-b", "inv-c")]
    for at, one in enumerate(copies):
        for other in copies[at + 1 :]:
            assert all(a != b for a, b in zip(one, other, strict=True))
