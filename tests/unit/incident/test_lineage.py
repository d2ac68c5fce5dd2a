"""Taint flows down what was made from what, by content, and reaches nothing else; the cleared list is complete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.helpers import told
from tests.helpers.family import Family, finding, verdict
from tests.helpers.sourced import shard

from trainguard.archive import RunReader
from trainguard.cli import main
from trainguard.errors import MalformedEvidence, Misuse, Unavailable
from trainguard.finding import Citation
from trainguard.home import Home
from trainguard.incident.claims import parse_claims
from trainguard.incident.graph import Standing
from trainguard.incident.lineage import Lineage, checkpoint_key, read_lineage, root_of, run_key
from trainguard.incident.lineage import family as listed
from trainguard.seal.write import seal_path
from trainguard.sources.register import withdraw


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    family = Family(Home(tmp_path / "home"), tmp_path / "models")
    family.judged(monkeypatch)
    return family


def standing(lineage: Lineage, path: Path) -> Standing:
    return lineage.standing_of(checkpoint_key(root_of(path)))


def test_taint_reaches_every_descendant_and_no_one_else(made: Family) -> None:
    early, late = made.run("bad", finding(6), saves={5: "bad-5.pt", 10: "bad-10.pt"})
    (child,) = made.run("child", opens=[late], saves={10: "child.pt"})
    (grandchild,) = made.run("grandchild", opens=[child], saves={10: "grandchild.pt"})
    (before,) = made.run("before", opens=[early], saves={10: "before.pt"})
    (apart,) = made.run("apart", saves={10: "apart.pt"})
    lineage = read_lineage(made.home)
    words = {path.stem: standing(lineage, path).word for path in (early, late, child, grandchild, before, apart)}
    assert words == {
        "bad-5": "VERIFIED",
        "bad-10": "TAINTED",
        "child": "TAINTED",
        "grandchild": "TAINTED",
        "before": "VERIFIED",
        "apart": "VERIFIED",
    }
    said = lineage.reasons(standing(lineage, grandchild))
    assert said[0].startswith("bad-10.pt (run bad, step 10): weights at step 6")
    assert said[-1] == "grandchild.pt (run grandchild, step 10) was made from it"


def test_steps_are_counted_anew_after_a_restart_and_what_came_before_still_counts(made: Family) -> None:
    """A finding at step 9 of the first attempt is about what the second attempt saves at its step 4.

    An earlier version compared the two numbers, and called what went on from edited weights verified.
    """
    lines = [told.start(), told.process(0, 0), *(told.step(n, 0, 0) for n in range(1, 10))]
    lines += [*told.leave(0), told.process(1, 0), *(told.step(n, 1, 0) for n in range(1, 6))]
    seals = {}
    for name, step, after in (("first.pt", 4, 6), ("second.pt", 4, 17)):
        path = made.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        seals[path] = (step, after, seal_path(made.home, path, run="a", step=step, source="run").leaf)
    for step, after, leaf in sorted(seals.values(), key=lambda each: -each[1]):
        lines.insert(after, ("seal", {"path": "x", "leaf": leaf, "findings": []}, {"step": step}))
    told.record(made.home, "a", [*lines, *told.leave(1), told.end()])
    records = list(RunReader(made.home, "a").records())
    cited = next(record for record in records if record.kind == "step" and record.step == 9)
    assert cited.hash is not None
    made.verdicts["a"] = verdict(replace(finding(9), evidence=(Citation(leaf=cited.leaf or 0, hash=cited.hash),)))
    lineage = read_lineage(made.home)
    assert {path.name: standing(lineage, path).word for path in seals} == {
        "first.pt": "VERIFIED",
        "second.pt": "TAINTED",
    }


def test_a_file_is_known_by_what_is_in_it_and_not_by_its_name(made: Family) -> None:
    (bad,) = made.run("bad", finding(1), saves={10: "bad.pt"})
    renamed = made.folder / "innocent-name.pt"
    shutil.copy(bad, renamed)
    (child,) = made.run("child", opens=[renamed], saves={10: "child.pt"})
    other = made.folder / "else" / "bad.pt"
    other.parent.mkdir()
    other.write_text("same name, other bytes")
    (stranger,) = made.run("stranger", opens=[other], saves={10: "stranger.pt"})
    lineage = read_lineage(made.home)
    assert standing(lineage, child).word == "TAINTED"
    assert standing(lineage, stranger).word == "VERIFIED"


def test_a_run_that_reads_its_own_checkpoint_is_no_ancestor_of_itself(made: Family) -> None:
    path = made.folder / "own.pt"
    path.parent.mkdir(parents=True)
    path.write_text("a")
    made.run("loop", finding(7), opens=[path])
    made.save("loop", 5, "own.pt", "a")
    lineage = read_lineage(made.home)
    assert standing(lineage, path).word == "VERIFIED"
    assert lineage.graph.ancestors(run_key("loop")) == ["start:loop"]


def test_suspicion_and_ignorance_flow_down_as_themselves(made: Family) -> None:
    (odd,) = made.run("odd", finding(2, "suspicious"), saves={10: "odd.pt"})
    (blind,) = made.run("blind", gaps=["no lock"], saves={10: "blind.pt"})
    (a,) = made.run("a", opens=[odd, blind], saves={10: "a.pt"})
    (b,) = made.run("b", opens=[blind], saves={10: "b.pt"})
    lineage = read_lineage(made.home)
    assert (standing(lineage, a).word, standing(lineage, b).word) == ("SUSPECT", "UNKNOWN")


def test_the_list_is_complete_and_each_line_is_in_one_part(made: Family) -> None:
    (bad,) = made.run("bad", finding(1), saves={10: "bad.pt"})
    made.run("child", opens=[bad], saves={10: "child.pt"})
    made.run("good", saves={10: "good.pt"})
    made.run("blind", gaps=["no lock"])
    lineage = read_lineage(made.home)
    whole = listed(lineage)
    parts = [{line.label for line in part} for part in (whole.affected, whole.unknown, whole.cleared)]
    assert parts == [
        {"run bad", "bad.pt (run bad, step 10)", "run child", "child.pt (run child, step 10)"},
        {"run blind"},
        {"run good", "good.pt (run good, step 10)"},
    ]
    assert whole.exit_status == 1
    near = listed(lineage, run_key("good"))
    assert {line.label for line in near.cleared} == {"run good", "good.pt (run good, step 10)"}
    assert near.exit_status == 0
    assert listed(lineage, run_key("blind")).exit_status == 3
    child = next(line for line in whole.affected if line.label == "run child")
    assert child.made_from == ("bad.pt (run bad, step 10)",)
    with pytest.raises(Misuse, match="nothing of that name"):
        listed(lineage, "run:nobody")


def test_a_claim_casts_doubt_and_neither_clears_nor_condemns(made: Family) -> None:
    (bad,) = made.run("bad", finding(1), saves={10: "bad.pt"})
    (good,) = made.run("good", saves={10: "good.pt"})
    lineage = read_lineage(made.home)
    roots = {path.stem: checkpoint_key(root_of(path)) for path in (bad, good)}
    edges = f'[["{roots["bad"]}", "release:one"], ["{roots["good"]}", "release:two"]]'
    nodes = ",".join(f'{{"key": "release:{n}", "kind": "release", "label": "{n}"}}' for n in ("one", "two"))
    document = f'{{"schema": "trainguard/claims/v1", "by": "a tracker", "nodes": [{nodes}], "edges": {edges}}}'
    parse_claims(document.encode(), where="claims").join(lineage.graph)
    assert lineage.standing_of("release:one").word == "SUSPECT"
    assert lineage.standing_of("release:two").word == "UNKNOWN"


def test_claims_in_a_circle_are_refused_and_named(made: Family) -> None:
    made.run("good")
    lineage = read_lineage(made.home)
    document = b'{"schema": "trainguard/claims/v1", "by": "x", "edges": [["data:a", "data:b"], ["data:b", "data:a"]]}'
    parse_claims(document, where="claims").join(lineage.graph)
    with pytest.raises(MalformedEvidence, match=r"circle among .*data:a"):
        lineage.standing_of("data:a")


def test_without_a_log_there_is_nothing_to_say(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.prepare()
    with pytest.raises((Misuse, Unavailable)):
        read_lineage(home)


def test_a_kept_lineage_answers_without_the_log_and_says_how_old_it_is(
    made: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same document as the log gives; any node can be asked for by its key; what is no such file is refused."""
    monkeypatch.setenv("TRAINGUARD_HOME", str(made.home.root))
    (late,) = made.run("bad", finding(6), saves={10: "bad-10.pt"})
    made.run("child", opens=[late], saves={10: "child.pt"})
    kept = tmp_path / "lineage.bin"
    assert main(["lineage", "--keep", str(kept), "--json", str(late)]) == 1
    first = capsys.readouterr().out
    assert main(["lineage", "--kept", str(kept), "--json", str(late)]) == 1
    again = capsys.readouterr()
    assert again.out == first
    assert "child.pt" in first
    assert "as of" in again.err
    assert "the log here has" not in again.err
    made.run("later")
    assert main(["lineage", "--kept", str(kept), "--json", checkpoint_key(root_of(late))]) == 1
    again = capsys.readouterr()
    assert again.out == first
    assert "the log here has" in again.err
    kept.write_bytes(kept.read_bytes()[:-9])
    for path, status, said in ((kept, 1, "not a kept lineage"), (tmp_path / "none", 3, "cannot be read")):
        with pytest.raises(SystemExit) as left:
            main(["lineage", "--kept", str(path)])
        assert left.value.code == status
        assert said in capsys.readouterr().err


def test_what_a_run_was_made_from_is_told_with_lock_data_source_and_licence(made: Family, tmp_path: Path) -> None:
    """By content, whatever the file is called; nothing of it is listed as a result, or clears or taints."""
    shard(made.home, tmp_path, "acme/books", "a.bin", b"rows")
    shard(made.home, tmp_path, "other", "b.bin", b"never read")
    (base,) = made.run("a", opens=[copied(tmp_path / "elsewhere.bin", b"rows")], saves={10: "a.pt"})
    told_of = listed(read_lineage(made.home), checkpoint_key(root_of(base)))
    (line,) = [line for line in told_of.cleared if line.label.startswith("a.pt")]
    assert "a.bin of acme/books (CC-BY-4.0)" in line.made_from
    assert not any("other" in source for source in line.made_from)
    assert {one.kind for one in (*told_of.affected, *told_of.unknown, *told_of.cleared)} <= {"run", "checkpoint"}
    withdraw(made.home, source="acme/books", reason="the author asked")
    again = listed(read_lineage(made.home), run_key("a"))
    assert "a.bin of acme/books (CC-BY-4.0, withdrawn)" in again.cleared[0].made_from


def copied(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
