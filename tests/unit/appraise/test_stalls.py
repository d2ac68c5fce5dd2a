"""Check *stalls* on records made by hand: what a sleep weighs, who waits for whom, and who is merely slow."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.unit.appraise.test_origin import A, measurement

from trainguard.appraise.interface import Context
from trainguard.appraise.stalls import Stalls, _wilson
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.lockfile import make_lock
from trainguard.policy import Approval, Policy

TORCH = "/env/lib/site-packages/torch"
SCRIPT = "/job/train.py:20:<module>"
STEP = f"{TORCH}/optim/optimizer.py:500:wrapper"
BACKWARD = f"{TORCH}/autograd/graph.py:80:_engine_run_backward"
COLLECTIVE = f"{TORCH}/distributed/distributed_c10d.py:90:all_reduce"
LOADER = f"{TORCH}/utils/data/dataloader.py:60:__next__"
MS = 1_000_000


class Run:
    """A run of some ranks whose steps take 100 ms."""

    def __init__(self, *, locked: bool = False, ranks: int = 1, approve: tuple[Approval, ...] = ()) -> None:
        blobs: dict[str, bytes] = {}
        self.check = Stalls(Context(run="r", policy=Policy(approve=approve), blob=blobs.__getitem__))
        self.findings: list[Finding] = []
        self.n = self.ask = 0
        self.now = 0
        self.steps = dict.fromkeys(range(ranks), 0)
        self.add("start", {"command": ["python", "train.py"], "cwd": "/job"})
        known = measurement(code={"train.py": f"{A} 1", "opt.py": f"{A} 1"})
        body: dict[str, Any] = {"blob": "m", "lock": None}
        blobs["m"] = known.encode()
        if locked:
            lock = make_lock(known, ec.generate_private_key(ec.SECP256R1()), made="")
            body["lock"] = hashlib.sha256(lock.data).hexdigest()
            blobs[body["lock"]] = lock.data
        body["blob"] = known.digest
        blobs[known.digest] = known.encode()
        self.add("measurement", body)
        for rank in self.steps:
            env = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            self.add("process", {"hello": {"env": env}}, rank)

    def add(self, kind: str, body: dict[str, Any], rank: int | None = None, step: int | None = None) -> None:
        source = "process" if kind in ("step", "stack") else "supervisor"
        named = rank if len(self.steps) > 1 else None
        record = Evidence(
            n=self.n, at=self.now, source=source, kind=kind, body=body, process=rank, rank=named, step=step
        )
        self.n += 1
        self.findings += list(self.check.see(record))

    def train(self, steps: int = 1, *, wall_ns: int = 100 * MS) -> Run:
        for _ in range(steps):
            self.now += wall_ns
            for rank in self.steps:
                self.steps[rank] += 1
                self.add("step", {"wall_ns": wall_ns}, rank, self.steps[rank])
        return self

    def asks(self, why: str, *stack: str, rank: int = 0, call: str = "clock_nanosleep", **more: Any) -> Run:
        self.ask += 1
        frames = list(stack)
        answer = {"ask": self.ask, "id": hash(stack), "frames": frames, "same": True, "done": self.steps[rank]}
        self.add("stack", answer | {"since_ns": more.get("elapsed_ns", 0)}, rank)
        body = {"ask": self.ask, "why": why, "call": call, "samples": 1, "median_ns": 100 * MS, **more}
        self.add("stall", body, rank, self.steps[rank])
        return self

    def pace(self, rank: int = 0, **more: Any) -> None:
        body = {"window_ns": 10_000 * MS, "samples": 200, "running": 150, "asleep": {}, **more}
        self.add("pace", body, rank, self.steps[rank])

    def sleeps(self, *stack: str, times: int = 2, **more: Any) -> Run:
        for _ in range(times):
            self.train().asks("asleep", *stack, **more)
        return self.train()

    def end(self) -> LinkState:
        out = list(self.check.end())
        self.findings += [each for each in out if isinstance(each, Finding)]
        (link,) = (each for each in out if isinstance(each, LinkState))
        return link


@pytest.mark.parametrize(
    ("locked", "stack", "outcome"),
    [
        (False, ("/job/opt.py:5:slow", STEP, SCRIPT), "suspicious"),
        (False, ("/usr/lib/python3.11/threading.py:300:wait", "/job/opt.py:5:slow", BACKWARD, SCRIPT), "suspicious"),
        (False, (f"{TORCH}/optim/adamw.py:9:step", STEP, SCRIPT), "suspicious"),
        (False, ("/elsewhere/x.py:5:slow", STEP, SCRIPT), "suspicious"),
        (False, ("<string>:1:f", STEP, SCRIPT), "suspicious"),
        (False, (SCRIPT,), None),
        (False, ("/job/data.py:9:__getitem__", LOADER, SCRIPT), None),
        (False, (f"{TORCH}/utils/file_baton.py:50:wait", f"{TORCH}/nn/modules/module.py:1:_call_impl", SCRIPT), None),
        (False, (f"{TORCH}/distributed/elastic/x.py:1:run", SCRIPT), None),
        (True, ("/job/opt.py:5:slow", STEP, SCRIPT), None),
        (True, ("/job/planted.py:5:slow", STEP, SCRIPT), "violated"),
        (True, ("/elsewhere/x.py:5:slow", LOADER, SCRIPT), "violated"),
        (True, (f"{TORCH}/__init__.py:9:f", STEP, SCRIPT), None),
    ],
)
def test_what_a_sleep_weighs_depends_on_where_its_line_is(
    locked: bool, stack: tuple[str, ...], outcome: str | None
) -> None:
    """Locked code explains, planted code proves; without a lock only torch's own calls make it a finding at once."""
    run = Run(locked=locked).train(20).sleeps(*stack)
    assert {finding.outcome for finding in run.findings} == ({outcome} if outcome else set())
    assert all(finding.techniques == ("F7",) for finding in run.findings)


def test_one_look_is_not_enough_and_two_are() -> None:
    """A finding after the second look, once another step has followed."""
    run = Run().train(10).asks("asleep", "/job/opt.py:5:slow", STEP, SCRIPT).train()
    assert run.findings == []
    run.asks("asleep", "/job/opt.py:5:slow", STEP, SCRIPT)
    assert run.findings == []
    run.train()
    assert [(f.subject.step, f.subject.path) for f in run.findings] == [(11, "/job/opt.py:5")]


def test_sleeps_after_the_last_step_are_not_training() -> None:
    """A script may wait as long as it likes once it is done."""
    run = Run().train(10)
    for _ in range(50):
        run.asks("asleep", "/job/opt.py:5:slow", STEP, SCRIPT)
    run.end()
    assert run.findings == []


def test_an_answer_of_a_thread_that_has_moved_on_counts_for_nothing() -> None:
    """Only a line at which the thread still lay is the sleep's."""
    run = Run().train(10)
    for _ in range(5):
        run.train()
        run.ask += 1
        run.add("stack", {"ask": run.ask, "id": 1, "frames": [SCRIPT], "same": False, "done": run.steps[0]}, 0)
        run.add("stall", {"ask": run.ask, "why": "asleep", "call": "nanosleep", "samples": 1}, 0, run.steps[0])
    run.train().end()
    assert run.findings == []


def test_the_loss_is_a_range_for_one_rank_and_for_all() -> None:
    """Half of all looks asleep in 100 s: about 50 s, times four at most."""
    run = Run(ranks=4).train(990)
    run.sleeps("/job/opt.py:5:slow", STEP, SCRIPT, times=9)
    run.pace(window_ns=100_000 * MS, samples=1000, asleep={"clock_nanosleep": 500})
    run.end()
    (balance,) = [f for f in run.findings if " slept " in f.message]
    low, high = _wilson(500, 1000)
    assert f"slept {low * 99.9:.1f} to {high * 99.9:.1f} s" in balance.message
    assert "0.013 device-hours lost (this rank alone) to 0.059 (all 4 ranks" in balance.message
    assert balance.subject.rank == 0


def test_an_own_line_between_steps_is_a_finding_only_when_it_costs_much() -> None:
    """Without a lock: five percent of the time and a second."""
    for asleep, outcome in ((2, set()), (60, {"suspicious"})):
        run = Run().train(1000)
        run.pace(window_ns=100_000 * MS, samples=1000, asleep={"clock_nanosleep": asleep})
        run.sleeps(SCRIPT)
        run.end()
        assert {finding.outcome for finding in run.findings} == outcome


def test_a_throttled_rank_and_a_crowded_one_are_named_as_that() -> None:
    """N5, and the trap of S7: beside the sleeping rank, accused of nothing."""
    run = Run(ranks=3).train(100)
    run.sleeps("/job/opt.py:5:slow", STEP, SCRIPT, times=8)
    run.pace(0, asleep={"clock_nanosleep": 40}, cpus=2, nice=0)
    run.pace(1, throttled=90, throttled_ns=4_000 * MS, queue_ns=5_000 * MS, cpus=2, nice=0)
    run.pace(2, queue_ns=3_000 * MS, cpus=1, nice=10)
    link = run.end()
    assert {finding.subject.rank for finding in run.findings} == {0}
    (balance,) = [f for f in run.findings if " slept " in f.message]
    assert "rank 1 is slow for another reason: throttled" in balance.message
    assert "rank 2 is slow for another reason: co-tenant load" in balance.message
    assert any(
        "rank 1: throttled: the quota of its control group held it back for 4.0 of 10.0 s" in b for b in link.blind
    )
    assert any("at nice 10, on 1 processors where another rank has 2" in note for note in link.blind)


def test_load_alone_is_a_note() -> None:
    """A busy machine makes slow steps, and they are nobody's."""
    run = Run().train(100)
    for _ in range(10):
        run.asks("slow", SCRIPT, call="running", elapsed_ns=900 * MS, queue_ns=800 * MS).train(wall_ns=900 * MS)
    run.pace(queue_ns=8_000 * MS)
    link = run.end()
    assert run.findings == []
    assert link.required is False
    assert any("co-tenant load" in note for note in link.blind)
    assert not any("slow steps" in note for note in link.blind)


def slow_run(*stack: str, locked: bool = False, call: str = "wait4", usual: int = 0) -> tuple[Run, LinkState]:
    run = Run(locked=locked).train(100)
    for turn in range(30):
        run.train().asks("base", *(stack if turn < usual else (SCRIPT,)), call="running")
    for _ in range(10):
        run.asks("slow", *stack, call=call, elapsed_ns=400 * MS).train(wall_ns=600 * MS)
    return run, run.end()


def test_a_wait_of_any_kind_inside_torchs_calls_is_named() -> None:
    """A child process that sleeps for it, a pipe that never fills: half of the time lost, in four steps or more."""
    run, _ = slow_run("/job/opt.py:7:slow", STEP, SCRIPT)
    (finding,) = run.findings
    assert finding.outcome == "suspicious"
    assert "10 slow steps of the training process lost 5.0 s" in finding.message
    assert "waits at /job/opt.py:7 (slow), in optimizer" in finding.message


def test_busy_lines_are_compared_with_the_run_at_large() -> None:
    """Planted code that burns time in slow steps is a finding; the same line everywhere is just the work."""
    planted = ("/job/planted.py:7:burn", STEP, SCRIPT)
    assert [f.outcome for f in slow_run(*planted, locked=True, call="running")[0].findings] == ["suspicious"]
    assert slow_run(*planted, locked=True, call="running", usual=30)[0].findings == []
    run, link = slow_run("/job/opt.py:7:burn", STEP, SCRIPT, call="running")
    assert run.findings == []
    assert any("is busy at /job/opt.py:7 (burn), in optimizer" in note for note in link.blind)


@pytest.mark.parametrize("stack", [(f"{TORCH}/serialization.py:9:save", SCRIPT), (LOADER, SCRIPT), (SCRIPT,)])
def test_checkpoints_loaders_and_evaluation_are_notes(stack: tuple[str, ...]) -> None:
    """Slow steps that every honest job has."""
    assert slow_run(*stack)[0].findings == []


def hang(run: Run, *stands: tuple[tuple[str, ...], str, str, str]) -> None:
    for rank, (stack, call, kind, state) in enumerate(stands):
        more = {"hang": 1, "of": len(stands), "kind": kind, "state": state, "elapsed_ns": 300_000 * MS, "cpu_ns": 0}
        run.asks("hang", *stack, rank=rank, call=call, **more)


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    """Two stand in the all-reduce, one reads a file that never comes."""
    run = Run(ranks=3).train(10)
    waits = ((BACKWARD, SCRIPT), "futex", "waits", "S")
    hang(run, waits, (("/job/opt.py:9:gate", SCRIPT), "read", "waits", "S"), waits)
    (finding,) = run.findings
    assert (finding.outcome, finding.subject.rank, finding.subject.path) == ("suspicious", 1, "/job/opt.py:9")
    assert "waits in read at /job/opt.py:9 (gate), between steps; 2 of 3 ranks wait for it" in finding.message
    assert sum("steps stopped" in note for note in run.end().blind) == 3


def test_a_hang_that_nobody_is_to_blame_for_is_a_note() -> None:
    """All wait (another node has gone), one works, one process serves after its last step."""
    waits = ((COLLECTIVE, SCRIPT), "futex", "waits", "S")
    run = Run(ranks=2).train(10)
    hang(run, waits, waits)
    assert run.findings == []
    saving = (f"{TORCH}/serialization.py:9:save", "/job/opt.py:9:save", SCRIPT)
    for stack, state in (
        (saving, "S"),
        (("/job/opt.py:9:store", f"{TORCH}/serialization.py:9:save"), "S"),
        ((SCRIPT,), "D"),
    ):
        run = Run(ranks=2).train(10)
        hang(run, waits, (stack, "write", "waits", state))
        assert run.findings == []
    locked = Run(ranks=2, locked=True).train(10)
    hang(locked, waits, (("/job/opt.py:9:gate", SCRIPT), "read", "waits", "S"))
    assert locked.findings == []
    single = Run().train(10)
    hang(single, ((SCRIPT,), "accept", "waits", "S"))
    assert single.findings == []
    assert any("waits in accept at /job/train.py:20" in note for note in single.end().blind)


def test_what_hostile_records_contain_does_not_matter() -> None:
    """Wrong types, unknown questions, and stacks without end are passed over."""
    run = Run().train(5)
    for body in ({}, {"ask": "x"}, {"ask": 1, "id": []}, {"ask": 2, "id": 3, "frames": [None, {}] * 99, "done": "x"}):
        run.add("stack", body, 0)
    for body in ({}, {"ask": 2, "why": 7, "call": [], "median_ns": -1}, {"ask": 9, "why": "slow", "elapsed_ns": "x"}):
        run.add("stall", body, 0, 3)
    run.add("pace", {"window_ns": True, "asleep": [], "samples": -4, "cpus": "x"}, 0)
    run.add("pace", {"blind": "no right to look"}, 0)
    link = run.end()
    assert run.findings == []
    assert "the training thread could not be looked at: no right to look" in link.blind
