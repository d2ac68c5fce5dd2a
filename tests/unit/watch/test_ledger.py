"""The kill ledger: every signal is told and let through, whatever becomes of the supervisor or the keeper."""

import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainguard.errors import Misuse
from trainguard.watch import keeper, ledger

X86, I386, ARM64 = keeper.ARCH_X86_64, keeper.ARCH_I386, keeper.ARCH_AARCH64
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000


def verdict(arch: int, nr: int, *arguments: int, machine: str = "x86_64") -> int:
    """What the filter answers to one call, by interpreting its instructions as the kernel does."""
    code = ledger.program(ledger.MACHINES[machine][1])
    data = struct.pack("=iIQ6Q", nr & 0x7FFFFFFF, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator = at = 0
    while True:
        operation, if_true, if_false, constant = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x15:
            at += if_true if accumulator == constant else if_false
        else:
            return constant


def test_every_jump_of_the_filter_fits_a_byte_and_stays_inside() -> None:
    """The kernel refuses anything else."""
    for _, architectures in ledger.MACHINES.values():
        code = ledger.program(architectures)
        for at, (_, if_true, if_false, _) in enumerate(code):
            assert max(if_true, if_false) < 256
            assert at + 1 + max(if_true, if_false) < len(code) or code[at][0] == 0x06


@pytest.mark.parametrize(
    ("arch", "nr", "arguments", "answer"),
    [
        (X86, 62, (100, 9), NOTIFY),
        (X86, 62, (100, 15), NOTIFY),
        (X86, 62, (100, 0), ALLOW),
        (X86, 62, (100, 17), ALLOW),
        (X86, 234, (100, 100, 23), ALLOW),
        (X86, 234, (100, 100, 6), NOTIFY),
        (X86, 200, (100, 9), NOTIFY),
        (X86, 424, (3, 9), NOTIFY),
        (X86, 101, (16, 100), NOTIFY),
        (X86, 101, (0, 0), ALLOW),
        (X86, 101, (2, 100), ALLOW),
        (X86, 311, (100,), NOTIFY),
        (X86, 302, (100, 0, 4096), NOTIFY),
        (X86, 302, (100, 0, 1 << 32), NOTIFY),
        (X86, 302, (100, 0, 0), ALLOW),
        (X86, 302, (0, 0, 4096), ALLOW),
        (X86, 0, (), ALLOW),
        (X86, 37, (100, 9), ALLOW),
        (X86, keeper.X32_BIT | 62, (100, 9), NOTIFY),
        (I386, 37, (100, 9), NOTIFY),
        (I386, 62, (100, 9), ALLOW),
        (ARM64, 62, (100, 9), ALLOW),
    ],
)
def test_the_filter_tells_calls_that_reach_another_process(
    arch: int, nr: int, arguments: tuple[int, ...], answer: int
) -> None:
    """Also by 32-bit numbers from a 64-bit process; never for existence checks or one's own limits."""
    assert verdict(arch, nr, *arguments) == answer


@pytest.mark.parametrize(("nr", "answer"), [(129, NOTIFY), (131, NOTIFY), (62, ALLOW), (117, ALLOW)])
def test_the_filter_knows_the_numbers_of_arm(nr: int, answer: int) -> None:
    """kill and tgkill; lseek has x86's number of kill; ptrace with request 0 is harmless."""
    assert verdict(ARM64, nr, 100, 9, 9 if nr == 131 else 0, machine="aarch64") == (
        answer if nr != 117 else verdict(ARM64, 117, 100, machine="aarch64")
    )


class Job:
    """A command under a ledger, without a supervisor."""

    def __init__(self, code: str) -> None:
        self.ledger = ledger.Ledger()
        words = [sys.executable, "-S", "-c", textwrap.dedent(code)]
        self.pid = self.ledger.start(lambda: os.posix_spawn(sys.executable, words, dict(os.environ)))

    def wait(self, seconds: float = 20) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        raise AssertionError("the job hangs")


@pytest.fixture
def job() -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def start(code: str) -> Job:
        jobs.append(Job(code))
        if jobs[-1].ledger.reason is not None:
            jobs[-1].wait()
            pytest.skip(f"no kill ledger here: {jobs[-1].ledger.reason}")
        return jobs[-1]

    yield start
    for one in jobs:
        keeper_pid = one.ledger.keeper
        one.ledger.close()
        if keeper_pid is not None:
            os.waitpid(keeper_pid, 0)  # ends by itself once no process carries the filter


def test_a_signal_is_told_with_sender_and_target_and_arrives(job: Callable[[str], Job]) -> None:
    """SIGKILL of a child: both pids, their accounts and command lines; the child is dead."""
    one = job(
        """
        import os, subprocess, sys
        child = subprocess.Popen(["sleep", "30"])
        while b"sleep" not in open(f"/proc/{child.pid}/cmdline", "rb").read():
            pass  # between fork and exec it has no name of its own yet
        os.kill(child.pid, 9)
        raise SystemExit(child.wait() != -9)
        """
    )
    assert one.wait() == 0
    (told,) = one.ledger.messages()
    assert (told["call"], told["signal"], told["sender"]["pid"]) == ("kill", 9, one.pid)
    assert told["sender"]["uid"] == os.getuid()
    (target,) = told["targets"]
    assert target["cmdline"] == ["sleep", "30"]
    assert target["ancestry"][0][0] == one.pid
    assert target["ancestry"][-1][0] == os.getpid()


def test_the_same_signal_again_is_counted(job: Callable[[str], Job]) -> None:
    """One message at once, then one a second; nothing is lost for it."""
    one = job(
        """
        import os, signal, time
        signal.signal(signal.SIGUSR1, lambda *_: None)
        for turn in (1, 2):
            for _ in range(50):
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1.1)
        """
    )
    assert one.wait() == 0
    time.sleep(0.3)
    told = list(one.ledger.messages())
    assert sum(message["calls"] for message in told) == 100
    assert len(told) <= 6


def test_a_process_group_is_told_by_its_members(job: Callable[[str], Job]) -> None:
    """kill(-group): who was in it at that moment."""
    one = job(
        """
        import os, subprocess
        child = subprocess.Popen(["sleep", "30"], start_new_session=True)
        while b"sleep" not in open(f"/proc/{child.pid}/cmdline", "rb").read():
            pass  # between fork and exec it has no name of its own yet
        os.killpg(child.pid, 15)
        child.wait()
        """
    )
    assert one.wait() == 0
    (told,) = one.ledger.messages()
    assert told["target"] < -1
    assert [target["cmdline"] for target in told["targets"]] == [["sleep", "30"]]


def test_a_command_that_cannot_start_raises_as_without_a_ledger() -> None:
    """The exception of the start passes through, and nothing is left behind."""

    def fail() -> int:
        raise Misuse("no such command")

    one = ledger.Ledger()
    with pytest.raises(Misuse, match="no such command"):
        one.start(fail)
    assert one.listener is None


def test_where_the_kernel_refuses_the_command_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is kept; the job is none the wiser."""

    def refuse() -> tuple[int, bool]:
        raise ledger.Unsupported("not here")

    monkeypatch.setattr(ledger, "install", refuse)
    one = Job("raise SystemExit(3)")
    assert one.wait() == 3
    assert one.ledger.reason == "not here"
    assert one.ledger.keeper is None
    one.ledger.close()


def test_a_stopped_keeper_delays_a_signal_by_a_bound(job: Callable[[str], Job]) -> None:
    """The supervisor answers in its place, and wakes it."""
    one = job(
        """
        import os, signal, sys, time
        sys.stdin.read(0)
        time.sleep(1.0)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGUSR1)
        raise SystemExit(time.monotonic() - began > 3.0)
        """
    )
    time.sleep(0.3)
    assert one.ledger.keeper is not None
    os.kill(one.ledger.keeper, signal.SIGSTOP)
    assert one.wait() == 0
    assert len(list(one.ledger.messages())) == 1


def test_a_killed_keeper_does_not_break_kill(job: Callable[[str], Job]) -> None:
    """The supervisor holds the listener too, so the kernel still has somebody to ask."""
    one = job(
        """
        import os, signal, time
        time.sleep(1.0)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        """
    )
    time.sleep(0.3)
    assert one.ledger.keeper is not None
    os.kill(one.ledger.keeper, 9)
    os.waitpid(one.ledger.keeper, 0)
    one.ledger.start_keeper()
    assert one.wait() == 0


SUPERVISED = """
import os, sys
sys.path.insert(0, {folder!r})
from test_supervisor import watch
watch(sys.executable, "-c", {job!r})
"""

LATE_KILL = """
import os, pathlib, signal, subprocess, time
os.chdir({folder!r})
pathlib.Path("ready").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.02)
child = subprocess.Popen(["sleep", "30"])
began = time.monotonic()
os.kill(child.pid, signal.SIGKILL)
pathlib.Path("said.new").write_text(str(child.wait()) + " " + str(time.monotonic() - began < 2.0))
os.rename("said.new", "said")
"""


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_kill_works_in_a_job_whose_supervisor_is_gone_or_hangs(tmp_path: Path, what: signal.Signals) -> None:
    """Without a keeper the kernel would answer ENOSYS, or wait for ever; training must not notice our end."""
    job_code = LATE_KILL.format(folder=str(tmp_path))
    code = SUPERVISED.format(folder=str(Path(__file__).parent), job=job_code)
    supervisor = subprocess.Popen([sys.executable, "-c", code])
    try:
        _await(tmp_path / "ready")
        supervisor.send_signal(what)
        (tmp_path / "go").touch()
        _await(tmp_path / "said")
    finally:
        supervisor.send_signal(signal.SIGCONT)
        supervisor.kill() if what == signal.SIGKILL else None
        supervisor.wait(timeout=30)
    assert (tmp_path / "said").read_text() == "-9 True"


def test_a_run_inside_a_run_has_one_ledger(tmp_path: Path) -> None:
    """The kernel allows one listener on a tree: the inner run says so and goes on."""
    inner = SUPERVISED.format(folder=str(Path(__file__).parent), job="pass").replace(
        "watch(sys.executable, \"-c\", 'pass')",
        'from pathlib import Path\n_, r = watch("true")\n'
        f"Path({str(tmp_path / 'said')!r}).write_text(str(r.of('ledger')[0].body['reason']))",
    )
    outer = SUPERVISED.format(folder=str(Path(__file__).parent), job=inner)
    subprocess.run([sys.executable, "-c", outer], check=True, timeout=60)
    assert "already listens" in (tmp_path / "said").read_text()


def _await(path: Path) -> None:
    deadline = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


def test_messages_that_are_no_json_object_are_passed_over() -> None:
    """The socket is ours, but a reader is strict all the same."""
    import socket

    one = ledger.Ledger()
    one.ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.ours.setblocking(False)
    for data in (b"x", b"[1]", b'{"call": "kill"}'):
        other.send(data)
    told: list[dict[str, Any]] = list(one.messages())
    assert told == [{"call": "kill"}]
    other.close()
    one.close()


@pytest.mark.skipif(
    os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root to give its rights up"
)
def test_the_ledger_needs_no_privilege(tmp_path: Path) -> None:
    """As account 65534 the kernel wants no_new_privs, for the job alone; senders are named all the same."""
    package = Path(ledger.__file__).parents[2]
    if not all(folder.stat().st_mode & 0o005 == 0o005 for folder in (package, *package.parents)):
        pytest.skip("other accounts cannot read the package")
    code = f"""
    import os, sys
    sys.path.insert(0, {str(package)!r})
    os.setgid(65534); os.setuid(65534); os.chdir("/")
    from trainguard.watch import ledger
    one = ledger.Ledger()
    words = ["sh", "-c", "sleep 20 & kill -9 $!; wait"]
    pid = one.start(lambda: os.posix_spawn("/bin/sh", words, {{"PATH": "/usr/bin:/bin"}}))
    os.waitpid(pid, 0)
    told = [(m["call"], m["signal"], m["sender"]["uid"]) for m in one.messages()]
    own = [line for line in open("/proc/self/status") if line.startswith("NoNewPrivs")][0].split()[1]
    print(one.reason, one.no_new_privs, own, told)
    one.close()
    """
    done = subprocess.run(
        ["/usr/bin/python3", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "None True 0 [('kill', 9, 65534)]", done.stderr
