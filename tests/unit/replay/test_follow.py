"""A run that goes on is audited piece by piece: only what cannot be changed any more is decided on, and only once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from tests.helpers.told import step
from tests.unit.replay.test_plan import run as run_of

from trainguard.appraise.judge import judge_run
from trainguard.archive import LogLeaves, RunWriter
from trainguard.envelope import load_or_create_key
from trainguard.errors import Misuse, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.log import Log
from trainguard.replay.audit import Options, Report, Result
from trainguard.replay.compare import Difference
from trainguard.replay.follow import Follower, decisions, follow
from trainguard.replay.keys import drop_key, held_key, hold_key
from trainguard.replay.plan import Segment, lot, make_nonce

KEY = "5a" * 32
HEAD = {"size": 7, "root": "aa" * 32}
OPTIONS = Options(follow=True, budget=1.0)


class Going:
    """A run of two ranks, recorded step by step as a supervisor would, into a real log."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "state")
        self.home.prepare()
        self.cwd = folder / "work"
        self.cwd.mkdir()
        self.log = Log.open(self.home.log, self.home.keys / "log.key")
        self.writer = RunWriter(self.home, "r", self.log, load_or_create_key(self.home.keys / "attestation.pem"))
        self.made = [0, 0]
        self.over = False

    def begin(self, **fields: Any) -> None:
        commitment = hashlib.sha256(KEY.encode()).hexdigest()
        told = {"command": ["python", "train.py"], "cwd": str(self.cwd), "began_ns": "1", "key_sha256": commitment}
        self.writer.begin(told | fields)
        hold_key(self.home, "r", KEY)

    def steps(self, until: int, *, ranks: Sequence[int] = (0, 1), **build: Any) -> None:
        """Both ranks, or one, up to step `until`."""
        for rank in ranks:
            for number in range(self.made[rank] + 1, until + 1):
                commits: dict[str, Any] = {"rng": [f"{number}"], "modes": "m", "groups": "g"}
                if number == 1:
                    commits |= {"world": [rank, 2], "tensors": ["w"], "build": {"torch": "2"} | build}
                kind, body, where = step(number, process=rank, rank=rank, commits=commits)
                self.writer.add(kind, body, **where)
            self.made[rank] = until

    def point(self, number: int, *, ranks: Sequence[int] = (0, 1)) -> None:
        """The state of each rank after a step, hashed by the supervisor."""
        for rank in ranks:
            body = {"name": f"p{rank}-step-{number:08}", "index_sha256": "0" * 64, "data_blake3": "0" * 64, "bytes": 1}
            self.writer.add("point_sealed", body, step=number)

    def sealed(self, until: int, point: int | None = None) -> None:
        """Steps, a sealed state, and all of it in the log."""
        self.steps(until)
        if point is not None:
            self.point(point)
        self.writer.seal()

    def end(self) -> None:
        """In an orderly way: the record has the key."""
        self.writer.add("end", {"status": 0, "signal": None, "key": KEY})
        self.writer.seal(final=True)
        drop_key(self.home, "r")
        self.kill()

    def kill(self) -> None:
        """The supervisor is gone: whatever it had not sealed is not in the log."""
        if not self.over:
            self.over = True
            self.writer.close()


@pytest.fixture
def going(tmp_path: Path) -> Iterator[Going]:
    found = Going(tmp_path)
    yield found
    found.kill()
    found.log.close()


class Told(Follower):
    """Replays nothing: every segment is equal, but for the one with this step."""

    def __init__(
        self, going: Going, *moves: Callable[[], object], differs: int = 0, options: Options = OPTIONS
    ) -> None:
        self.said: list[str] = []
        self.groups: list[list[tuple[int, int]]] = []
        left = iter(moves)

        def wait(seconds: float) -> None:
            assert 1.0 <= seconds <= 60.0
            move = next(left, None)
            assert move is not None, f"it waits for nothing; {self.said}"
            self.now += 61.0
            move()

        self.now = 0.0
        super().__init__(going.home, "r", options, progress=self.said.append, wait=wait, clock=lambda: self.now)
        self._differs = differs

    selftest: ClassVar[dict[str, Any]] = {"passed": True}

    def _selftest(self) -> dict[str, Any]:
        return self.selftest

    def _match(self, selftest: object) -> None:
        pass

    def _group(self, group: Sequence[Segment]) -> list[dict[str, Any]]:
        self.groups.append([(segment.first, segment.last) for segment in group])
        return [msgspec.to_builtins(self._of(segment)) for segment in group if segment.first <= (self._differs or 1e9)]

    def _of(self, segment: Segment) -> Result:
        where = {"segment": segment.number, "first": segment.first, "last": segment.last, "way": "warp"}
        if segment.first <= self._differs <= segment.last:
            difference = Difference(step=self._differs, link="raw", rank=1, expected="1", found="2")
            return Result(outcome="differs", difference=difference, confirmed=True, **where)
        return Result(outcome="equal", compared=segment.steps, **where)


def spans(report: Report) -> list[tuple[int, int]]:
    return [(draw.first, draw.last) for draw in report.draws]


# -- what is decided, and when -----------------------------------------------------------------------------------------


def test_only_segments_that_a_sealed_state_ends_are_decided_on_while_the_run_goes_on() -> None:
    """The stretch behind the last sealed state may still become anything; it is decided on when the run is over."""
    run = run_of(3)
    during = decisions(run, [], head=HEAD, drawn="bb", share=1.0, over=False)
    assert [(draw.first, draw.last) for draw in during] == [(1, 10), (11, 20), (21, 30)]
    assert [draw.why for draw in during] == ["first", "lot", "lot"]
    (last,) = decisions(run, during, head={"size": 9, "root": "cc" * 32}, drawn="bb", share=1.0, over=True)
    assert (last.first, last.last, last.size) == (31, 40, 9)


def test_a_decision_hangs_on_the_head_that_the_segment_was_seen_under() -> None:
    """Another root, another draw: who knows the auditor's number before the segment is in the log knows nothing."""
    run = run_of(200)
    drawn = []
    for root in ("aa", "ab", "ac"):
        found = decisions(run, [], head={"size": 7, "root": root * 32}, drawn="bb", share=0.2, over=True)
        drawn.append(tuple(draw.segment for draw in found if draw.why))
    assert len(set(drawn)) == 3
    assert all(0 in each and 20 <= len(each) <= 65 for each in drawn)


def test_anybody_can_draw_again_from_what_the_report_says() -> None:
    """Head and number of the auditor give the nonce, the nonce gives the lot."""
    for draw in decisions(run_of(50), [], head=HEAD, drawn="bb", share=0.3, over=True)[1:]:
        nonce = make_nonce("r", draw.root, draw.size, "bb")
        assert (lot(nonce, draw.segment) < 0.3) == (draw.why == "lot")


def test_a_rank_that_writes_no_sealed_state_puts_nothing_off() -> None:
    """After fifty steps and two minutes without one a segment ends with what steps committed to."""
    run = run_of(2, every=60)
    first = decisions(run, [], head=HEAD, drawn="bb", share=1.0, over=False, unsealed=170)
    assert [(draw.first, draw.last) for draw in first] == [(1, 60), (61, 120), (121, 170)]
    rest = decisions(run_of(4, every=60), first, head={**HEAD, "size": 8}, drawn="bb", share=1.0, over=True)
    assert [(draw.segment, draw.first, draw.last) for draw in rest] == [(3, 171, 180), (4, 181, 240), (5, 241, 300)]


def test_what_was_decided_stands() -> None:
    """Called again under another head, nothing is drawn twice: an auditor cannot draw until it likes the outcome."""
    run = run_of(50)
    first = decisions(run, [], head=HEAD, drawn="bb", share=0.3, over=False)
    assert decisions(run, first, head={"size": 99, "root": "dd" * 32}, drawn="bb", share=0.3, over=False) == []


def test_alarms_do_not_crowd_out_the_lot_nor_the_budget() -> None:
    """Of segments with something unusual as many steps are replayed as of others: a job that sets off alarms at every
    step has the lot still drawn beside them, and no more than twice the budget replayed."""
    alarmed = run_of(99, alarms=tuple(range(5, 1000, 10)))
    found = decisions(alarmed, [], head=HEAD, drawn="bb", share=0.1, over=True)
    quiet = decisions(run_of(99), [], head=HEAD, drawn="bb", share=0.1, over=True)
    assert {d.segment for d in quiet if d.why == "lot"} == {d.segment for d in found if d.why == "lot"}
    assert 5 <= sum(d.why == "unusual" for d in found) <= 10


# -- what is not there yet ---------------------------------------------------------------------------------------------


def test_a_run_is_followed_from_before_its_first_step_to_its_end(going: Going) -> None:
    """No statement, no step, one rank alone, a state of one rank, one that is not sealed: not there yet, no error.
    Each segment is replayed while the run goes on, the last one after its end."""
    follower = Told(
        going,
        going.begin,
        lambda: (going.steps(5, ranks=[0]), going.writer.seal()),
        lambda: going.sealed(5),
        lambda: (going.steps(12), going.point(10, ranks=[0]), going.writer.seal()),
        lambda: going.point(10, ranks=[1]),
        lambda: going.writer.seal(),
        lambda: going.sealed(33, point=30),
        lambda: going.sealed(35),
        going.end,
    )
    report = follower.run()
    assert report.exit_status == 0
    assert spans(report) == [(1, 10), (11, 30), (31, 35)]
    assert follower.groups == [[(1, 10)], [(11, 30)], [(31, 35)]]
    assert report.replayed_steps == report.steps == 35
    assert [draw.size for draw in report.draws] == sorted({draw.size for draw in report.draws})
    assert any("no statement" in line for line in follower.said)
    assert any("none of rank 1" in line for line in follower.said)
    verdict = judge_run(going.home, "r")
    assert verdict.coverage.replayed_steps == 35


def test_a_segment_counts_as_fixed_under_a_head_that_holds_every_ranks_state(going: Going) -> None:
    """The head of a decision is not older than the leaf with the state of the last rank."""
    going.begin()
    going.sealed(12)
    leaves: list[int | None] = []

    def second() -> None:
        going.point(10, ranks=[1])
        leaves.append(going.writer.seal())

    follower = Told(going, lambda: (going.point(10, ranks=[0]), going.writer.seal()), second, going.end)
    (draw, _) = follower.run().draws
    assert leaves[0] is not None
    assert draw.size > leaves[0]
    reader = LogLeaves(going.home).head
    assert draw.size <= reader.size


def test_a_run_without_sealed_states_is_audited_while_it_goes_on(going: Going) -> None:
    """Rank 1 writes none, or cannot: after two minutes what is in the log of both ranks is drawn from all the same."""
    going.begin()
    going.sealed(12)
    follower = Told(
        going,
        lambda: (going.steps(60), going.point(10, ranks=[0]), going.writer.seal()),
        lambda: None,
        lambda: going.sealed(62),
        going.end,
    )
    report = follower.run()
    assert spans(report) == [(1, 59), (60, 62)]
    assert follower.groups == [[(1, 59)], [(60, 62)]]
    assert report.exit_status == 0


def test_a_verifier_that_cannot_prove_itself_does_not_wait_for_the_end(going: Going) -> None:
    """Nothing of such an audit would count, so it ends at once, says why, and is no clean one."""
    going.begin()
    going.sealed(12, point=10)
    follower = Told(going)
    follower.selftest = {"passed": None, "reason": "the environment is another one"}  # type: ignore[misc]
    report = follower.run()
    assert (report.exit_status, report.results, report.draws) == (3, (), ())
    assert report.selftest["reason"] == "the environment is another one"


def test_what_has_piled_up_is_replayed_together(going: Going) -> None:
    """While one replay was under way three more segments were sealed: one process replays them all."""
    going.begin()
    for end in (12, 22, 32):
        going.sealed(end, point=end - 2)
    follower = Told(going, going.end)
    follower.run()
    assert follower.groups == [[(1, 10), (11, 20), (21, 30)], [(31, 32)]]


def test_a_difference_is_logged_while_the_run_goes_on_and_ends_the_audit(going: Going) -> None:
    """What comes later follows from it. The verdict says it before the run has ended."""
    going.begin()
    going.sealed(12, point=10)
    follower = Told(going, lambda: going.sealed(42, point=40), differs=27)
    report = follower.run()
    assert report.exit_status == 1
    assert (report.findings[0].subject.step, report.findings[0].subject.rank) == (27, 1)
    (body,) = LogLeaves(going.home).audits["r"]
    assert (body["differs"], body["followed"]) == (1, 2)
    verdict = judge_run(going.home, "r")
    assert (verdict.verdict, [finding.check for finding in verdict.findings]) == ("TAINTED", ["replay"])
    assert not going.over


def test_a_run_whose_supervisor_was_killed_is_audited_as_far_as_its_log_goes(going: Going) -> None:
    """Records that were not sealed prove nothing. The key is where the supervisor kept it."""
    going.begin()
    going.sealed(12, point=10)
    follower = Told(going, lambda: (going.steps(20), going.kill()))
    report = follower.run()
    assert spans(report) == [(1, 10), (11, 12)]
    assert report.exit_status == 0
    assert follower._committed.key == KEY


def test_an_audit_that_was_killed_goes_on_with_what_it_had_decided(going: Going) -> None:
    """Nothing is drawn anew, nothing is replayed twice, and the run was never harmed."""
    going.begin()
    going.sealed(12, point=10)

    def killed() -> None:
        raise KeyboardInterrupt

    first = Told(going, killed)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    going.sealed(22, point=20)
    second = Told(going, going.end)
    report = second.run()
    assert report.draws[0] == first._draws[0]
    assert spans(report) == [(result.first, result.last) for result in report.results] == [(1, 10), (11, 20), (21, 22)]
    assert second.groups == [[(11, 20)], [(21, 22)]]


def test_a_run_that_ends_without_a_step_cannot_be_followed(going: Going) -> None:
    """As any audit of it: one clear sentence."""
    going.begin()
    with pytest.raises(Unavailable, match="expected commits"):
        Told(going, going.end).run()


def test_evidence_that_stays_broken_is_no_waiting(going: Going) -> None:
    """A spool whose bytes are not the sealed ones is not a spool that is being written."""
    going.begin()
    going.sealed(12)
    spool = going.home.run("r") / "spool"
    data = bytearray(spool.read_bytes())
    data[20] ^= 1
    spool.write_bytes(bytes(data))
    with pytest.raises(VerificationError, match="not the ones that were sealed"):
        Told(going, *[lambda: None] * 10).run()


def test_a_log_that_was_rewound_behind_the_follower_is_told(going: Going) -> None:
    """What was read before must be under every later head, entry for entry."""
    going.begin()
    going.sealed(12)
    follower = Told(going)
    follower._look(over=False)
    known = follower._known
    assert known is not None
    known.leaves.head = dataclasses.replace(known.leaves.head, root=b"\0" * 32)
    for _ in range(2):
        with pytest.raises(VerificationError, match="does not hold"):
            follower._look(over=False)


def test_what_is_read_in_pieces_is_what_is_read_at_once(going: Going) -> None:
    """A follower that has seen a run grow has the same of it as one that comes late."""
    early = Told(going)
    going.begin()
    for end in (12, 22, 32):
        going.sealed(end, point=end - 2)
        early._look(over=False)
    going.end()
    early._look(over=True)
    late = Told(going)
    late._look(over=True)
    assert early._head == late._head
    assert early._committed.points == late._committed.points
    for one, two in zip(early._committed.everyone, late._committed.everyone, strict=True):
        assert one.account.steps == two.account.steps


def test_without_the_key_that_is_said_and_another_key_counts_for_none(going: Going) -> None:
    """Whoever can only write into the folder gets nothing compared with a key of his own."""
    going.begin()
    drop_key(going.home, "r")
    hold_key(going.home, "r", "00" * 32)
    going.sealed(12, point=10)
    follower = Told(going, going.end)
    follower.run()
    assert any("the run's key is not there" in line for line in follower.said)
    assert follower._committed.key == KEY  # the record has it in the end


def test_a_run_on_an_accelerator_is_not_followed_on_its_own_machine(going: Going) -> None:
    """A replay there would take the run's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    going.begin(boot_id=boot)
    going.steps(12, devices=["NVIDIA H200"])
    going.writer.seal()
    with pytest.raises(Unavailable, match="NVIDIA H200"):
        Told(going).run()


# -- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_is_kept_for_this_account_alone_and_only_while_the_run_goes_on(tmp_path: Path) -> None:
    """Beside the keys that sign."""
    home = Home(tmp_path)
    home.prepare()
    assert held_key(home, "r") is None
    hold_key(home, "r", KEY)
    assert held_key(home, "r") == KEY
    (path,) = (home.keys / "runs").iterdir()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    drop_key(home, "r")
    drop_key(home, "r")
    assert held_key(home, "r") is None


@pytest.mark.parametrize("text", ["", "5A" * 32, "5a" * 31, "5a" * 33, "x" * 64, "5a" * 32 + "\n"])
def test_what_is_no_key_is_none(tmp_path: Path, text: str) -> None:
    """The file is read strictly."""
    home = Home(tmp_path)
    home.prepare()
    hold_key(home, "r", text)
    assert held_key(home, "r") is None


def test_a_disk_that_will_not_have_the_key_does_not_stop_the_run(tmp_path: Path) -> None:
    """Nothing is raised; the follower then says that there is none."""
    hold_key(Home(tmp_path / "nowhere"), "r", KEY)
    assert held_key(Home(tmp_path / "nowhere"), "r") is None


@pytest.mark.parametrize("wrong", [{"bisect": True}, {"only": (0,)}, {"confidence": 0.9}])
def test_what_needs_the_whole_run_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """Which segments there are is not known yet."""
    with pytest.raises(Misuse, match="--follow"):
        follow(Home(tmp_path), "r", Options(**wrong))
