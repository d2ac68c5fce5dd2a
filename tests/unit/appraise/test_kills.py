"""Check *kills* on records made by hand: who may signal whom, and what an end without a sender is called."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from trainguard.appraise.interface import Context
from trainguard.appraise.kills import BASE_RATE_PER_GPU_DAY, Kills, _at_least
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.policy import Approval, Policy

SUPERVISOR, AGENT, RANK0, RANK1, LOADER = 10, 20, 30, 31, 40
PARENTS = {AGENT: SUPERVISOR, RANK0: AGENT, RANK1: AGENT, LOADER: RANK0}
Body = dict[str, Any]


def no_blob(_digest: str) -> bytes:
    raise AssertionError("no content is read")


def ancestry(pid: int, parents: dict[int, int], names: dict[int, str]) -> list[list[Any]]:
    chain = []
    while pid in parents:
        pid = parents[pid]
        name = names.get(pid, "python3.11")
        chain.append([pid, pid * 7, name, [name, "x"]])
    return chain


class Job:
    """An agent with two ranks, one of which has a loader worker."""

    def __init__(self, policy: Policy | None = None, *, ledger: str = "on") -> None:
        self.check = Kills(Context(run="r", policy=policy or Policy(), blob=no_blob))
        self.parents = dict(PARENTS)
        self.names: dict[int, str] = {}
        self.findings: list[Finding] = []
        self.n = 0
        self.add("ledger", {"state": ledger, "reason": "why", "child": AGENT, "supervisor": SUPERVISOR, "keeper": 11})
        self.greet(AGENT, None)
        self.greet(RANK0, 0)
        self.greet(RANK1, 1)
        self.greet(LOADER, 0)

    def add(self, kind: str, body: Body, **fields: Any) -> None:
        source = "process" if kind in ("kill", "foreign", "spawn") else "supervisor"
        record = Evidence(n=self.n, at=self.n * 10**9, source=source, kind=kind, body=body, **fields)
        self.n += 1
        self.findings += list(self.check.see(record))

    def greet(self, pid: int, rank: int | None) -> None:
        env = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": "2"}
        facts = {"ppid": self.parents[pid], "start_ticks": pid * 7, "cmdline": ["python", "train.py"]}
        self.add("process", {"hello": {"env": env}, **facts}, pid=pid, rank=rank)

    def facts(self, pid: int, exe: str = "/usr/bin/python3.11", words: Sequence[str] = ("python", "train.py")) -> Body:
        chain = ancestry(pid, self.parents, self.names)
        start = {"pid": pid, "uid": 1000, "euid": 1000, "exe": exe, "cmdline": list(words), "cwd": "/job"}
        return start | {"start_ticks": pid * 7, "ancestry": chain}

    def signal(self, sender: Body, target: int, number: int = 9, call: str = "kill") -> None:
        body = {"call": call, "signal": number, "sender": sender, "target": target, "targets": [self.facts(target)]}
        self.add("signalled", body, pid=sender["pid"], uid=1000)

    def state(self) -> LinkState:
        out = list(self.check.end())
        self.findings += [o for o in out if isinstance(o, Finding)]
        (link,) = (o for o in out if isinstance(o, LinkState))
        return link


def test_a_rank_that_kills_another_rank_is_proved() -> None:
    """Neither launched the other; sender, account and target stand in the message, the place in the subject."""
    job = Job()
    job.add("kill", {"pid": RANK1, "signal": 9, "place": "/job/train.py:7"}, pid=RANK0)
    job.signal(job.facts(RANK0), RANK1)
    (finding,) = job.findings
    assert (finding.outcome, finding.techniques, finding.subject.rank) == ("violated", ("F8",), 1)
    assert finding.subject.path == "/job/train.py:7"
    assert "process 30, rank 0 of account 1000 (python train.py) sent SIGKILL to process 31, rank 1" in finding.message
    assert job.state().state == "broken"


@pytest.mark.parametrize("number", [1, 2, 15, 19, 11, 6])
def test_every_signal_that_ends_or_stops_counts(number: int) -> None:
    """SIGTERM, SIGSTOP, SIGSEGV and others are sent by hand as easily as SIGKILL."""
    job = Job()
    job.signal(job.facts(RANK0), RANK1, number)
    assert len(job.findings) == 1


@pytest.mark.parametrize("number", [10, 12, 17, 18, 28, 34])
def test_messages_between_processes_are_no_finding(number: int) -> None:
    """SIGUSR1, SIGCONT and real-time signals are how programs talk."""
    job = Job()
    job.signal(job.facts(RANK0), RANK1, number)
    assert job.findings == []


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_may_be_ended_before_its_hello_is_read(reaped: bool) -> None:
    """`Process.start(); terminate()`: the ledger tells of the signal first, and the process may be gone by then."""
    job = Job()
    job.parents[50] = RANK0
    job.signal(job.facts(RANK0), 50, 15)
    facts = {"ppid": RANK0, "start_ticks": None if reaped else 50 * 7, "cmdline": ["python", "train.py"]}
    job.add("process", {"hello": {"env": {}}, **facts}, pid=50)
    job.add("exit", {"said_bye": False, "greeted": True, "ended": {"status": None, "signal": 15}}, pid=50)
    assert (job.findings, job.state().blind) == ([], ())


def test_what_an_earlier_owner_of_a_pid_was_sent_explains_nothing() -> None:
    """The kernel gives pids again."""
    job = Job()
    job.parents[50] = RANK0
    job.signal(job.facts(RANK0), 50, 15)
    job.add("process", {"hello": {"env": {}}, "ppid": RANK0, "start_ticks": 999, "cmdline": ["python"]}, pid=50)
    job.add("exit", {"said_bye": False, "greeted": True, "ended": {"status": None, "signal": 15}}, pid=50)
    assert any("whose sender is outside the job" in reason for reason in job.state().blind)


@pytest.mark.parametrize(("sender", "target"), [(AGENT, RANK1), (AGENT, LOADER), (RANK0, LOADER), (RANK0, RANK0)])
def test_whoever_started_a_process_may_end_it(sender: int, target: int) -> None:
    """The agent its workers and their helpers, a rank its loader, everyone itself."""
    job = Job()
    job.signal(job.facts(sender), target, 15)
    assert job.findings == []
    assert job.state().held == 1


def test_a_process_whose_parent_ended_still_belongs_to_it() -> None:
    """At the time of the signal the target hangs below the supervisor; its hello named its parent."""
    job = Job()
    job.parents[LOADER] = SUPERVISOR
    job.signal(job.facts(RANK0), LOADER)
    assert job.findings == []


def test_descending_from_the_supervisor_makes_nobody_kin() -> None:
    """A process that left its parent is given to the supervisor, from which everything descends."""
    job = Job()
    job.parents[50] = SUPERVISOR
    job.signal(job.facts(50, "/usr/bin/kill", ("kill", "-9", "31")), RANK1)
    assert [f.outcome for f in job.findings] == ["violated"]


def test_bin_kill_acts_for_whoever_started_it() -> None:
    """A launching shell may use it on its ranks; a rank may not use it on another, and its line is named."""
    job = Job()
    job.parents |= {60: AGENT, 61: RANK0, 62: 61}
    job.signal(job.facts(60, "/usr/bin/pkill", ("pkill", "-f", "train.py")), RANK1)
    assert job.findings == []
    job.names[61] = "dash"
    job.add("spawn", {"args": ["kill -9 31"], "place": "/job/evil.py:3"}, pid=RANK0)
    job.signal(job.facts(62, "/usr/bin/kill", ("kill", "-9", "31")), RANK1)
    (finding,) = job.findings
    assert finding.outcome == "violated"


def test_a_shell_started_by_a_rank_is_named_by_the_line_that_started_it() -> None:
    """os.system runs `sh -c TEXT`; TEXT is what the guard heard from the rank."""
    job = Job()
    job.parents[61] = RANK0
    job.add("spawn", {"args": ["kill -9 31"], "place": "/job/evil.py:3"}, pid=RANK0)
    job.signal(job.facts(61, "/usr/bin/dash", ("sh", "-c", "kill -9 31")), RANK1)
    assert job.findings[0].subject.path == "/job/evil.py:3"


def test_a_process_that_ends_itself_through_a_tool_is_no_finding() -> None:
    """`subprocess.run(["kill", str(os.getpid())])`."""
    job = Job()
    job.parents[62] = RANK0
    job.signal(job.facts(62, "/usr/bin/kill", ("kill", "30")), RANK0)
    assert job.findings == []


def test_a_python_renamed_to_kill_is_still_the_rank_it_is() -> None:
    """Only processes that never said hello are followed upwards."""
    job = Job()
    job.signal(job.facts(RANK0, "/tmp/kill"), RANK1)
    assert len(job.findings) == 1


def test_a_child_that_ends_its_parent_may_be_a_watchdog() -> None:
    """Open, not proved; an approval of its place explains it."""
    job = Job()
    job.add("kill", {"pid": RANK0, "signal": 9, "place": "/job/watchdog.py:5"}, pid=LOADER)
    job.signal(job.facts(LOADER), RANK0)
    assert [f.outcome for f in job.findings] == ["suspicious"]
    approved = Job(Policy(approve=(Approval(check="kills", place="/job/watchdog.py:5"),)))
    approved.add("kill", {"pid": RANK0, "signal": 9, "place": "/job/watchdog.py:5"}, pid=LOADER)
    approved.signal(approved.facts(LOADER), RANK0)
    assert approved.findings == []
    assert approved.state().explained == ("/job/watchdog.py:5",)


def test_the_same_signal_again_is_one_finding() -> None:
    """Repetition is counted by the ledger, not by findings."""
    job = Job()
    for _ in range(5):
        job.signal(job.facts(RANK0), RANK1, 19)
    assert len(job.findings) == 1


def test_reaching_into_another_rank_is_suspicious() -> None:
    """ptrace and process_vm_writev change a process without a signal (B8); some MPI transports do it honestly."""
    for call in ("ptrace", "process_vm_writev"):
        job = Job()
        job.signal(job.facts(RANK0), RANK1, call=call)
        assert [(f.outcome, f.techniques[0]) for f in job.findings] == [("suspicious", "B8")]


def test_a_signal_to_the_guard_itself_is_a_finding() -> None:
    """Ending the keeper or the supervisor blinds the record (G7)."""
    job = Job()
    job.parents[11] = SUPERVISOR
    job.signal(job.facts(RANK0), 11)
    assert job.findings[0].techniques[0] == "G7"


def ended(job: Job, pid: int, number: int, *, group: int = 0, host: int = 0) -> None:
    body = {"ended": {"status": None, "signal": number}, "out_of_memory": {"group": group, "host": host}}
    job.add("exit", body, pid=pid, rank=1)


def test_running_out_of_memory_is_not_sabotage() -> None:
    """N4: SIGKILL with the control group's counter moved is the kernel's doing, and no finding."""
    job = Job()
    ended(job, RANK1, 9, group=1)
    state = job.state()
    assert job.findings == []
    assert "out of memory" in " ".join(state.blind)


def test_one_kill_for_memory_does_not_excuse_the_next() -> None:
    """The counters are compared with what they were at the last end."""
    job = Job()
    ended(job, RANK1, 9, group=1)
    ended(job, RANK0, 9, group=1)
    assert [f.outcome for f in job.findings] == ["not_checked"]
    assert "outside the job or is the kernel" in job.findings[0].message


def test_a_segfault_is_a_crash() -> None:
    """S8: without a sender it is the kernel's answer to what the process did."""
    job = Job()
    ended(job, RANK1, 11)
    assert job.findings == []
    assert "rank 1 was ended by SIGSEGV: a crash" in " ".join(job.state().blind)


def test_a_memory_kill_does_not_hide_a_sender() -> None:
    """Where the ledger names one, that is the cause, whatever the counters say."""
    job = Job()
    job.signal(job.facts(RANK0), RANK1)
    ended(job, RANK1, 9, group=1, host=1)
    assert "sent by process 30" in " ".join(job.state().blind)


def test_the_commands_end_names_its_sender_and_is_a_reason() -> None:
    """A command ended by a signal did not do what was asked, whoever sent it: never VERIFIED."""
    job = Job()
    job.signal(job.facts(AGENT), AGENT)
    job.add("end", {"status": None, "signal": 9})
    state = job.state()
    assert state.required
    assert "the command was ended by SIGKILL, sent by itself" in " ".join(state.blind)


def test_a_cancelled_job_names_who_signalled_the_supervisor() -> None:
    """The scheduler's SIGTERM comes to the supervisor, which passes it on."""
    job = Job()
    job.add("signal", {"signal": 15, "from_pid": 5, "from_uid": 0, "sender": {"cmdline": ["slurmstepd"]}})
    job.add("end", {"status": None, "signal": 15})
    assert "process 5 of account 0 (slurmstepd)" in " ".join(job.state().blind)


def test_without_a_ledger_pythons_own_kills_are_still_judged() -> None:
    """The audit event of os.kill names the sender; what is missing is said, and does not by itself cost the verdict."""
    job = Job(ledger="unavailable")
    job.add("kill", {"pid": RANK1, "signal": 9, "place": "/job/train.py:7"}, pid=RANK0)
    job.add("kill", {"pid": LOADER, "signal": 15, "place": "/job/train.py:9"}, pid=RANK0)
    assert [f.subject.path for f in job.findings] == ["/job/train.py:7"]
    state = Job(ledger="unavailable").state()
    assert not state.required
    assert "no kill ledger here: why" in " ".join(state.blind)


def test_a_frame_of_a_process_cannot_pose_as_the_ledger() -> None:
    """Only the supervisor's records count for who signalled whom."""
    job = Job()
    body = {"call": "kill", "signal": 9, "sender": job.facts(RANK0), "target": RANK1, "targets": [job.facts(RANK1)]}
    job.findings += job.check.see(Evidence(n=99, at=1, source="process", kind="signalled", body=body, pid=RANK0))
    assert job.findings == []


@pytest.mark.parametrize("body", [{}, {"sender": 3}, {"call": "kill", "sender": {}, "targets": "x"}])
def test_a_malformed_entry_is_itself_a_finding(body: Body) -> None:
    """It never raises."""
    job = Job()
    job.add("signalled", body)
    assert [f.outcome for f in job.findings] == ["not_checked"]


def test_what_hostile_facts_contain_does_not_matter() -> None:
    """Any JSON in any place."""
    job = Job()
    for junk in (None, 3, "x", [], [[1]], {"a": 1}):
        target = {"pid": RANK1, "ancestry": junk, "start_ticks": junk, "cmdline": junk}
        sender = {"pid": RANK0, "ancestry": junk, "exe": junk, "cmdline": junk, "cwd": junk}
        job.add("signalled", {"call": "kill", "signal": 9, "sender": sender, "targets": [target], "target": junk})
        msgspec.json.encode(job.findings)


def test_the_base_rate_is_stated_beside() -> None:
    """419 interruptions in 54 days on 16,384 GPUs: 4.7e-4 a GPU-day."""
    assert round(BASE_RATE_PER_GPU_DAY, 6) == 0.000474
    assert _at_least(1, 0.1) == pytest.approx(0.0951626)
    assert _at_least(3, 1e-6) == pytest.approx(1.67e-19, rel=0.01)
    job = Job()
    ended(job, RANK1, 11)
    assert "1 interruption(s)" in " ".join(job.state().blind)


def leave(job: Job, pid: int, rank: int, status: int, error: Body | None = None) -> None:
    """A rank says goodbye with its exception, and is gone."""
    record = {"dropped": 0, "faults": {}} | ({"error": error} if error else {})
    before = len(job.findings)
    bye = Evidence(n=job.n, at=job.n * 10**9, source="process", kind="bye", body=record, pid=pid, rank=rank)
    job.n += 1
    job.findings += list(job.check.see(bye))
    job.add("exit", {"ended": {"status": status, "signal": None}}, pid=pid, rank=rank)
    assert len(job.findings) == before


def was_ended(job: Job, pid: int, rank: int | None, number: int = 9, **memory: Any) -> None:
    """A process was ended by a signal."""
    counters = {"group": None, "host": None, "named": None} | memory
    job.add("exit", {"ended": {"status": None, "signal": number}, "out_of_memory": counters}, pid=pid, rank=rank)


def test_a_rank_that_fails_by_itself_is_quoted() -> None:
    """Status, exception and line; what the launcher then does to the others is said too."""
    job = Job()
    leave(job, RANK1, 1, 1, {"type": "ValueError", "text": "loss is nan", "place": "/job/train.py:9"})
    job.signal(job.facts(AGENT), RANK0, 15)
    was_ended(job, RANK0, 0, 15)
    notes = job.state().blind
    assert "process 31, rank 1 ended by itself with status 1: ValueError at /job/train.py:9: loss is nan" in notes
    assert any(
        "rank 0 was ended by SIGTERM, sent by" in n and "after process 31, rank 1 had failed" in n for n in notes
    )
    assert job.findings == []


@pytest.mark.parametrize("text", ["Connection closed by peer [10.0.0.3]:4711", "NCCL error: remote process exited"])
def test_a_lost_peer_points_outside_this_host_unless_a_rank_here_failed(text: str) -> None:
    """N4: node loss, as the ranks that are left tell it."""
    error = {"type": "RuntimeError", "text": text, "place": "/env/torch/x.py:3"}
    job = Job()
    leave(job, RANK0, 0, 1, error)
    assert any("a node or its network went away" in note for note in job.state().blind)
    job = Job()
    was_ended(job, RANK1, 1, 11)
    leave(job, RANK0, 0, 1, error)
    assert any("lost a peer after process 31, rank 1 had failed" in note for note in job.state().blind)
    assert job.findings == []


def test_the_kernels_log_names_what_memory_ended() -> None:
    """Also where no counter of the control group can be read."""
    job = Job()
    was_ended(job, RANK1, 1, named=[RANK1])
    assert any(
        "the kernel's log says that it ended this process because memory ran out" in n for n in job.state().blind
    )
    assert job.findings == []


@pytest.mark.parametrize(
    ("exe", "words"), [("/usr/sbin/slurmstepd", "Slurm"), ("/usr/bin/containerd-shim-runc-v2", "the container engine")]
)
def test_a_schedulers_cancel_is_called_that(exe: str, words: str) -> None:
    """SIGTERM to the supervisor, passed on to the command."""
    job = Job()
    sender = {"exe": exe, "cmdline": [exe.rpartition("/")[2]]}
    job.add("signal", {"signal": 15, "from_pid": 7, "from_uid": 0, "sender": sender})
    job.add("end", {"status": None, "signal": 15, "out_of_memory": {}})
    assert any(f"sent to the supervisor by {words}, process 7 of account 0" in note for note in job.state().blind)


def test_a_sender_that_cannot_be_seen_from_here_is_no_process_zero() -> None:
    """In a container the kernel gives pid 0 for who lives outside it."""
    job = Job()
    job.add("signal", {"signal": 15, "from_pid": 0, "from_uid": 0, "sender": {}})
    job.add("end", {"status": None, "signal": 15, "out_of_memory": {}})
    assert any("not visible from here" in note for note in job.state().blind)


def test_what_the_nodes_ledger_saw_settles_an_open_end() -> None:
    """Told before or after the end: a scheduler is a note, a stranger a suspicion, the kernel neither."""
    stranger = {"pid": 900, "uid": 1001, "euid": 1001, "exe": "/usr/bin/python3", "cmdline": ["python3", "-c", "x"]}
    for sender, kernel, outcomes in (
        (stranger | {"loginuid": 1001, "session": 5}, False, ["suspicious"]),
        ({"pid": 901, "uid": 0, "exe": "/usr/sbin/slurmstepd", "cmdline": ["slurmstepd"]}, False, []),
        ({"pid": 5, "comm": "kswapd"}, True, []),
    ):
        job = Job()
        job.add("node", {"state": "on"})
        was_ended(job, RANK1, 1)
        job.add("outside", {"signal": 9, "target": RANK1, "kernel": kernel, "sender": sender})
        notes = job.state().blind
        assert [f.outcome for f in job.findings] == outcomes
        assert not any("saw no sender" in note for note in notes)
        if outcomes:
            assert "account 1001" in job.findings[0].message
            assert "session 5" in job.findings[0].message
    job = Job()
    job.add("node", {"state": "on"})
    was_ended(job, RANK1, 1)
    job.state()
    assert [f.outcome for f in job.findings] == ["not_checked"]
    assert "the node's ledger was on and saw no sender" in job.findings[0].message


def test_ranks_that_end_together_are_one_interruption() -> None:
    """And one interruption shows nothing, however short the run was."""
    job = Job()
    was_ended(job, RANK0, 0, 11)
    was_ended(job, RANK1, 1, 11)
    (rate,) = [note for note in job.state().blind if "by nature" in note]
    assert rate.startswith("1 interruption(s)")
    assert rate.endswith("rare, but one event shows nothing")


def test_many_ends_by_unknown_senders_are_suspicious_and_no_proof() -> None:
    """Three in separate hours, in a small job; three crashes are not."""
    for number, outcomes in ((9, {"not_checked", "suspicious"}), (11, set())):
        job = Job()
        for _ in range(3):
            job.n += 3600
            was_ended(job, RANK1, 1, number)
        job.state()
        assert {finding.outcome for finding in job.findings} == outcomes
        rates = [f.message for f in job.findings if f.outcome == "suspicious"]
        assert all("times the natural rate: suspicious, not proof" in message for message in rates)


def test_a_refused_signal_ended_nobody() -> None:
    """deny-signals: the attempt is a finding, a later end is not laid at its door."""
    job = Job()
    body = {"call": "kill", "signal": 9, "sender": job.facts(RANK0), "target": RANK1, "targets": [job.facts(RANK1)]}
    job.add("signalled", body | {"denied": True}, pid=RANK0)
    was_ended(job, RANK1, 1)
    assert "refused and not delivered" in job.findings[0].message
    assert job.findings[1].outcome == "not_checked"


def test_the_guards_own_signals_are_not_laid_at_anybodys_door() -> None:
    """--enforce stop: recorded before anything is sent."""
    job = Job()
    job.add("enforced", {"mode": "stop", "check": "optimizer", "message": "m"})
    was_ended(job, RANK1, 1)
    job.add("end", {"status": None, "signal": 15, "out_of_memory": {}})
    assert job.findings == []
    assert sum("sent by the guard (--enforce stop)" in note for note in job.state().blind) == 2


def test_denial_that_could_not_be_had_is_no_quiet_matter() -> None:
    """Asked for, no ledger: the link is required and blind, so the run is not verified."""
    job = Job(ledger="unavailable")
    job.add(
        "ledger",
        {"state": "unavailable", "reason": "old kernel", "deny": True, "child": AGENT, "supervisor": SUPERVISOR},
    )
    link = job.state()
    assert (link.required, link.state) == (True, "blind")
    assert any("deny-signals was asked for and could not be enforced" in note for note in link.blind)
