"""The insider may read every file of the state folder and sits in the meetings; the case is still not theirs.

Scenario S13 with H1 to H4: several people with their own keys, one state folder, every verb as it is typed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest

from trainguard import opaque
from trainguard.archive import RunWriter
from trainguard.cli import main
from trainguard.envelope import load_or_create_key
from trainguard.home import Home
from trainguard.log import Log, LogReader
from trainguard.policy import Policy

INSIDER_UID = 54242
CODE = "amber-bay-11"
SECRETS = (CODE, "strange process", "lead-a", "lead-b", "inv-c", "imaged", "node-3", "r1 is bad", "counsel")


@dataclasses.dataclass
class Site:
    """One state folder that everybody can read, and each one's own keys elsewhere."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    @property
    def home(self) -> Home:
        return Home(self.root / "state")

    def card(self, name: str) -> Path:
        return self.root / "cards" / f"{name}.card"

    def tg(self, who: str, *words: object) -> tuple[int, str, str]:
        """Type a command as that person; status, stdout, stderr."""
        self.monkeypatch.setenv("TRAINGUARD_IDENTITY", str(self.root / "people" / who / "identity.json"))
        try:
            status = main([str(word) for word in words])
        except SystemExit as left:
            status = int(left.code or 0)
        said = self.capsys.readouterr()
        return int(status or 0), said.out, said.err

    def person(self, name: str, *accounts: str) -> None:
        self.card(name).parent.mkdir(exist_ok=True)
        words = [word for account in accounts or (name,) for word in ("--account", account)]
        assert self.tg(name, "case", "identity", "--name", name, *words, "-o", self.card(name))[0] == 0

    def sealed(self) -> int:
        reader = LogReader(self.home.log, self.home.keys / "log.vkey")
        return sum(opaque.is_sealed(entry) for entry in reader.entries())

    def everything(self) -> bytes:
        return b"\n".join(path.read_bytes() for path in sorted(self.home.root.rglob("*")) if path.is_file())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Site:
    made = Site(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("TRAINGUARD_HOME", str(made.home.root))
    monkeypatch.setenv("TRAINGUARD_APPROVERS", str(tmp_path / "approvers"))
    monkeypatch.setattr("trainguard.cases.people.process_accounts", tuple)  # the test's own account is nobody's here
    _record(made.home)
    for name in ("lead-a", "lead-b", "inv-c"):
        made.person(name)
    made.person("insider", "insider", str(INSIDER_UID))
    (tmp_path / "approvers").mkdir()
    for name in ("lead-a", "lead-b"):
        (tmp_path / "approvers" / f"{name}.card").write_bytes(made.card(name).read_bytes())
    return made


def _record(home: Home) -> None:
    """A run in which a process of the insider's account reported that the job never started."""
    home.prepare()
    key = load_or_create_key(home.keys / "attestation.pem")
    with Log.open(home.log, home.keys / "log.key") as log:
        writer = RunWriter(home, "r1", log, key)
        policy = home.store_blob(msgspec.json.encode(Policy()))
        body = {"command": ["python", "train.py"], "cwd": "/job", "host": "node-7", "policy": policy, "lock": None}
        body["account"] = {"uid": 54001, "loginuid": "54001", "session": "3"}
        writer.begin({"run": "r1", **body})
        writer.add("start", body)
        writer.add("process", {"of_the_job": False, "hello": {}}, process=0, pid=77, uid=INSIDER_UID)
        writer.seal()
        writer.add("end", {"status": 0})
        writer.seal(final=True)
        writer.close()


def _asked(site: Site, who: str) -> list[tuple[int, str, str]]:
    """Everything a stranger can ask about a case by name, and what the verbs answer."""
    card = site.card("insider")
    day = ("--reason", "x", "--until", "30d")
    return [
        site.tg(who, "case", "list"),
        site.tg(who, "case", "list", "--json"),
        site.tg(who, "case", "show", CODE),
        site.tg(who, "case", "show", CODE, "--json"),
        site.tg(who, "case", "sign", "--yes", CODE, "1"),
        site.tg(who, "case", "grant", CODE, card, *day),
        site.tg(who, "case", "note", CODE, "hello"),
        site.tg(who, "case", "suppose", CODE, "hello"),
        site.tg(who, "case", "weigh", CODE, "3", "against", "hello"),
        site.tg(who, "case", "settle", CODE, "3", "dropped", "--reason", "x"),
        site.tg(who, "case", "trace", CODE, card),
        site.tg(who, "case", "export", CODE, "--reason", "x"),
        site.tg(who, "case", "hold", CODE, "--reason", "x"),
        site.tg(who, "case", "leave", CODE, "--reason", "x"),
        site.tg(who, "case", "remove", CODE, "lead-a", "--reason", "x"),
        site.tg(who, "log", "show", "0", "3"),
    ]


def test_the_insider_learns_nothing_and_those_who_look_work_on(site: Site):
    """Before and after there is a case, each question of the insider has the same answer to the last byte."""
    status, out, _ = site.tg("lead-a", "incident", "list", "--json")
    assert status == 1
    names = [one["id"] for one in json.loads(out)["incidents"]]
    name = next(one["id"] for one in json.loads(out)["incidents"] if one["kind"] == "G")
    before, entries = _asked(site, "insider"), site.sealed()
    assert {status for status, _, _ in before} == {0, 2}

    opened = ("--code", CODE, "--reason", "a strange process", "--until", "30d")
    members = ("--with", site.card("lead-b"), "--member", f"{site.card('inv-c')}:investigator")
    status, _, err = site.tg("lead-a", "case", "open", name, *members, *opened)
    assert (status, CODE in err) == (0, True)
    assert site.tg("lead-b", "case", "sign", "--yes", CODE, 0)[0] == 0
    note = "{monday|tuesday|friday}: hosts are imaged, first {node-3|node-9|node-12}; r1 is bad"
    assert site.tg("lead-a", "case", "note", CODE, note)[0] == 0
    status, _, err = site.tg("inv-c", "case", "suppose", CODE, "the strange process belongs to a tool of node-3")
    thought = err.split("hypothesis ")[1].strip()
    words = ("case", "weigh", CODE, thought, "against", "node-3 has no such tool", "--cite", name)
    assert (status, site.tg("lead-a", *words)[0]) == (0, 0)
    mute = ("--run", "r1", "--reason", "until they are imaged", "--until", "9d")
    status, _, err = site.tg("lead-a", "case", "mute", CODE, *mute)
    number = err.split("act ")[1].split()[0]
    assert site.tg("lead-b", "case", "sign", "--yes", CODE, number)[0] == 0

    # list, show and every act by name: the same words, status and number of entries as before there was a case
    middle = site.sealed()
    assert _asked(site, "insider") == before
    assert site.sealed() - middle == entries
    # ordinary lists: the incident is not there, the run is not green, and nothing says why
    assert site.tg("insider", "incident", "list") == (
        0,
        "no incident: no verdict shown here has a violated or suspicious finding\n",
        "",
    )
    assert site.tg("insider", "incident", "show", name)[0] == 2
    status, out, _ = site.tg("insider", "verdict", "r1", "--json")
    verdict = json.loads(out)
    assert (status, verdict["verdict"], verdict["findings"]) == (3, "UNKNOWN", [])
    assert "under maintenance check" in verdict["reasons"]
    _, told, _ = site.tg("insider", "show", "r1")
    assert "does not descend" not in told
    assert "under maintenance check" in told
    for verb in (("runs",), ("explain", "r1"), ("show", "r1"), ("damage",), ("lineage",), ("diff", "r1", "r1")):
        said = "".join(site.tg("insider", *verb)[1:])
        assert not [word for word in (*names, CODE, str(INSIDER_UID)) if word in said], verb
    # the log: sealed entries are sizes and digests
    _, out, _ = site.tg("insider", "log", "show", "--json")
    sealed = [entry for entry in json.loads(out)["entries"] if entry["bytes"] == opaque.ENTRY_BYTES]
    assert len(sealed) == site.sealed()
    assert all(entry["statement"] is entry["run"] is entry["summary"] is None for entry in sealed)
    # every byte of the state folder
    found = site.everything()
    assert not [word for word in (*SECRETS, name) if word.encode() in found]

    # those who look see it all, and that they looked
    assert site.tg("inv-c", "case", "show", CODE)[0] == 0
    status, out, _ = site.tg("lead-a", "case", "show", CODE, "--json")
    case = json.loads(out)
    assert (status, case["incidents"][0]["id"]) == (0, name)
    told = [[one["by"], one["worth"], [line["side"] for line in one["weighed"]]] for one in case["hypotheses"]]
    assert told == [["inv-c", "open", ["against"]]]
    assert ["inv-c", "read (show)"] in [[record["by"], record["said"]] for record in case["record"]]
    assert f"uid {INSIDER_UID}" in [one["value"] for one in case["subjects"]]


def test_a_case_can_be_kept_where_the_insider_does_not_even_see_sealed_entries(site: Site):
    """In a state folder of its own, on what was exported from the one the insider administers."""
    name = json.loads(site.tg("lead-a", "incident", "list", "--json")[1])["incidents"]
    name = next(one["id"] for one in name if one["kind"] == "G")
    bundle = site.root / "evidence.zip"
    assert site.tg("lead-a", "incident", "export", name, "-o", bundle)[0] == 0
    before = site.everything()
    site.monkeypatch.setenv("TRAINGUARD_HOME", str(site.root / "apart"))
    both = ("--bundle", bundle, "--with", site.card("lead-b"), "--code", CODE, "--reason", "x", "--until", "9d")
    assert site.tg("lead-a", "case", "open", *both)[0] == 0
    assert site.tg("lead-b", "case", "sign", "--yes", CODE, 0)[0] == 0
    case = json.loads(site.tg("lead-b", "case", "show", CODE, "--json")[1])
    assert {one["value"]: one["firm"] for one in case["subjects"]} == {f"uid {INSIDER_UID}": True, "uid 54001": False}
    status, _, err = site.tg("lead-a", "case", "grant", CODE, site.card("insider"), "--reason", "x", "--until", "9d")
    assert (status, "named by the evidence" in err) == (1, True)
    assert site.everything() == before
    bundle.write_bytes(bundle.read_bytes()[:-1])
    assert site.tg("lead-a", "case", "add", CODE, "--bundle", bundle)[0] == 1
    assert site.tg("lead-a", "case", "add", CODE)[0] == 2


def test_one_colluding_member_does_not_let_the_insider_in(site: Site):
    """Named by the evidence: refused and written down. Under another name: waits for a second person, for good."""
    name = json.loads(site.tg("lead-a", "incident", "list", "--json")[1])["incidents"]
    name = next(one["id"] for one in name if one["kind"] == "G")
    site.tg(
        "lead-a", "case", "open", name, "--with", site.card("lead-b"), "--code", CODE, "--reason", "x", "--until", "9d"
    )
    site.tg("lead-b", "case", "sign", "--yes", CODE, 0)
    day = ("--reason", "can help", "--until", "9d")
    status, _, err = site.tg("lead-b", "case", "grant", CODE, site.card("insider"), *day)
    assert (status, "named by the evidence" in err) == (1, True)
    site.person("newcomer", "nobody-knows")
    status, _, err = site.tg("lead-b", "case", "grant", CODE, site.card("newcomer"), *day)
    assert status == 0
    number = err.split("act ")[1].split()[0]
    status, _, err = site.tg("lead-b", "case", "sign", "--yes", CODE, number)
    assert (status, "a second person must sign" in err) == (1, True)
    for other in ("insider", "newcomer"):
        assert site.tg(other, "case", "list")[1] == "no case is open to you\n"
        assert site.tg(other, "case", "sign", "--yes", CODE, number)[0] == 2
    case = json.loads(site.tg("lead-a", "case", "show", CODE, "--json")[1])
    refused = [record for record in case["record"] if record["kind"] == "refused"]
    assert [record["by"] for record in refused] == ["lead-b", "lead-b"]
    assert "insider" in refused[0]["said"]
    # and the insider alone opens nothing about themselves, nor with a friend's card twice
    status, _, err = site.tg("insider", "case", "open", name, "--with", site.card("newcomer"), *day)
    assert status == 1


def test_a_leak_is_traced_to_a_copy_a_waiver_takes_two_and_a_bundle_leaves_by_two(site: Site):
    """What the insider hears from a member names the member's copy; "the guard costs 3 %" is no way round."""
    name = json.loads(site.tg("lead-a", "incident", "list", "--json")[1])["incidents"]
    name = next(one["id"] for one in name if one["kind"] == "G")
    members = ("--with", site.card("lead-b"), "--member", site.card("inv-c"), "--code", CODE)
    site.tg("lead-a", "case", "open", name, *members, "--reason", "x", "--until", "9d")
    site.tg("lead-b", "case", "sign", "--yes", CODE, 0)
    note = "we replay on {monday|tuesday|friday}, from {node-3|node-9|node-12}"
    site.tg("lead-a", "case", "note", CODE, note)
    case = json.loads(site.tg("inv-c", "case", "show", CODE, "--json")[1])
    leak = site.root / "leak.txt"
    leak.write_text(f"careful: {case['notes'][0]['text'].removeprefix('we replay on')}\n")
    status, out, _ = site.tg("lead-a", "case", "trace", CODE, leak)
    assert (status, "This is the copy of inv-c" in out) == (0, True)
    assert "not who passed it on" in " ".join(out.split())

    waiver = site.root / "waiver.json"
    terms = ("--runs", "speed-*", "--reason", "the guard costs 3 %", "--until", "9d", "-o", waiver)
    assert site.tg("insider", "case", "waive", *terms)[0] == 0
    status, _, err = site.tg("insider", "case", "waive", "--sign", waiver)
    assert (status, "a second person must" in err) == (2, True)
    status, _, err = site.tg("lead-a", "case", "waive", "--sign", waiver)
    assert (status, "none of this site's approvers" in err) == (1, True)

    status, _, err = site.tg("lead-a", "case", "export", CODE, "--reason", "counsel asks")
    number = err.split("act ")[1].split()[0]
    bundle = site.root / "case.zip"
    assert site.tg("lead-a", "case", "export", CODE, "--act", number, "-o", bundle)[0] == 1
    assert not bundle.exists()
    site.tg("lead-b", "case", "sign", "--yes", CODE, number)
    assert site.tg("lead-a", "case", "export", CODE, "--act", number, "-o", bundle)[0] == 0
    status, out, _ = site.tg("insider", "case", "verify", bundle)
    assert (status, f"case {CODE}: holds" in out) == (0, True)
    bundle.write_bytes(bundle.read_bytes().replace(b"tgseal1", b"tgseal2", 1))
    assert site.tg("lead-a", "case", "verify", bundle)[0] == 1
