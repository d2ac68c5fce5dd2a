"""The supervisor: the command is passed through untouched, and what the kernel says of it is recorded."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainguard.errors import Misuse
from trainguard.evidence import Evidence
from trainguard.watch.supervisor import Ended, Settings, Supervisor, blocked_signals


class Records(list[Evidence]):
    """A recorder that keeps everything in memory."""

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence:
        self.append(Evidence(n=len(self), at=time.time_ns(), source=source, kind=kind, body=body, **fields))
        return self[-1]

    def seal(self, *, final: bool = False) -> int | None:
        return None

    def of(self, kind: str) -> list[Evidence]:
        return [record for record in self if record.kind == kind]


def watch(*command: str, links: str = "governed") -> tuple[Ended, Records]:
    records = Records()
    with blocked_signals() as mask:
        ended = Supervisor(records, Settings(links=links)).run(command, os.environ, mask=mask)
    return ended, records


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


def test_the_exit_status_is_the_commands() -> None:
    """A status passes through, and the process is known by pid and account from the kernel."""
    ended, records = watch(*python("raise SystemExit(7)"))
    assert (ended.status, ended.signal) == (7, None)
    (process,) = records.of("process")
    assert process.uid == os.getuid()
    assert process.body["of_the_job"] is True
    assert records.of("exit")[0].body["said_bye"] is True
    assert records[-1].kind == "end"


def test_a_command_killed_by_a_signal_says_which() -> None:
    """SIGKILL of the command is its end, not ours."""
    ended, records = watch(*python("import os; os.kill(os.getpid(), 9)"))
    assert (ended.status, ended.signal) == (None, 9)
    (kill,) = records.of("kill")
    assert kill.body["signal"] == 9


def test_a_command_that_does_not_exist_is_a_usage_error() -> None:
    """One sentence; nothing was started."""
    with pytest.raises(Misuse, match="no-such-command: no such command"):
        watch("no-such-command")


def test_a_file_that_is_not_executable_is_a_usage_error(tmp_path: Path) -> None:
    """The next step says how to run a script."""
    (tmp_path / "x.py").write_text("")
    with pytest.raises(Misuse, match="not executable"):
        watch(str(tmp_path / "x.py"))


def test_a_script_without_an_interpreter_line_is_a_usage_error(tmp_path: Path) -> None:
    """A shell would guess `sh`; we say what is missing."""
    (tmp_path / "x").write_text("echo hello\n")
    (tmp_path / "x").chmod(0o755)
    with pytest.raises(Misuse, match="not a program"):
        watch(str(tmp_path / "x"))


def test_forked_children_and_child_interpreters_say_hello() -> None:
    """Every interpreter of the job is its own process in the record."""
    _, records = watch(
        *python(
            """
            import os, subprocess, sys
            subprocess.run([sys.executable, "-c", "pass"])
            pid = os.fork()
            os._exit(0) if pid == 0 else os.waitpid(pid, 0)
            """
        )
    )
    assert len(records.of("process")) == 3
    forked = [r for r in records.of("process") if r.body["hello"]["forked_from"]]
    assert len(forked) == 1


def test_a_child_that_escapes_with_isolation_is_known_before_it_runs() -> None:
    """`python -I` loads no boot file; the guarded parent reports the command and the line."""
    _, records = watch(*python("import subprocess, sys; subprocess.run([sys.executable, '-I', '-c', 'pass'])"))
    (spawn,) = records.of("spawn")
    assert "-I" in spawn.body["args"]


def test_a_silent_interpreter_is_found_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is itself `python -I` never says hello; the process table shows it."""
    monkeypatch.setattr("trainguard.watch.supervisor.HELLO_GRACE_SECONDS", 0.3)
    _, records = watch(sys.executable, "-I", "-c", "import time; time.sleep(1.5)")
    (silent,) = records.of("silent")
    assert "-I" in silent.body["cmdline"]


def test_links_none_still_records_processes() -> None:
    """With every in-process check off, who ran is still known."""
    ended, records = watch(*python("pass"), links="none")
    assert ended.status == 0
    assert len(records.of("process")) == 1


def test_a_stranger_who_connects_is_not_taken_for_the_job(tmp_path: Path) -> None:
    """A process that does not descend from the command is marked so, whatever it claims."""
    code = f"""
        import os, pathlib, time
        pathlib.Path({str(tmp_path / "socket")!r}).write_text(os.environ["TRAINGUARD_SOCKET"])
        while not pathlib.Path({str(tmp_path / "done")!r}).exists():
            time.sleep(0.02)
    """
    stranger = textwrap.dedent(
        f"""
        import json, pathlib, socket, time
        target = pathlib.Path({str(tmp_path / "socket")!r})
        while not (target.exists() and target.read_text()):
            time.sleep(0.02)
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.connect(target.read_text())
        link.send(json.dumps({{"k": "hello", "q": 0, "b": {{"env": {{"RANK": "3"}}}}}}).encode())
        link.recv(65536)
        link.send(b"not a frame")
        link.close()
        pathlib.Path({str(tmp_path / "done")!r}).touch()
        """
    )
    outside = subprocess.Popen([sys.executable, "-c", stranger])
    supervisor = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_supervisor import watch
        _, records = watch(sys.executable, "-c", {textwrap.dedent(code)!r})
        assert [r.body["of_the_job"] for r in records.of("process")].count(False) == 1, records
        assert len(records.of("malformed")) == 1, records
        """
    )
    assert subprocess.run([sys.executable, "-c", supervisor]).returncode == 0
    assert outside.wait(10) == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_supervisor_reaches_the_command(tmp_path: Path, sent: signal.Signals) -> None:
    """Schedulers signal the process they started: that is us, and the command must hear it."""
    ready = tmp_path / "ready"
    command = textwrap.dedent(
        f"""
        import pathlib, signal, sys, time
        signal.signal({int(sent)}, lambda *_: sys.exit(42))
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(20)
        """
    )
    supervisor = textwrap.dedent(
        f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_supervisor import watch
        ended, records = watch(sys.executable, "-c", {command!r})
        assert len(records.of("signal")) == 1, records
        sys.exit(ended.status)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", supervisor])
    deadline = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(20) == 42


def test_when_the_supervisor_is_killed_the_command_goes_on(tmp_path: Path) -> None:
    """Training is never harmed by our end: it finishes, and its results are there."""
    result, ready = tmp_path / "result", tmp_path / "ready"
    command = textwrap.dedent(
        f"""
        import pathlib, subprocess, sys, time
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(1)
        for _ in range(50):
            subprocess.run(["true"])
        pathlib.Path({str(result)!r}).write_text("finished")
        """
    )
    supervisor = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_supervisor import watch
        watch(sys.executable, "-c", {command!r})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", supervisor])
    deadline = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while not result.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert result.read_text() == "finished"


def test_a_keeper_that_ends_with_the_command_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's filter goes a moment before the command can be waited for; its keeper may be collected first."""
    keeper, child = 77, 78
    ends = {
        keeper: SimpleNamespace(si_pid=keeper, si_code=os.CLD_EXITED, si_status=0),
        child: SimpleNamespace(si_pid=child, si_code=os.CLD_EXITED, si_status=3),
    }
    waiting = [ends[keeper], ends[child]]

    def waitid(kind: int, pid: int, flags: int) -> Any:
        return ends[pid] if kind == os.P_PID else waiting.pop(0)

    records = Records()
    supervisor = Supervisor(records, Settings())
    supervisor._ledger.keeper = keeper
    monkeypatch.setattr(os, "waitid", waitid)
    assert supervisor._reap(child)
    assert supervisor._ended == (3, None)
    assert not records.of("ledger")


def test_a_goodbye_of_a_process_that_left_a_question_unread_is_heard(tmp_path: Path) -> None:
    """The kernel tells of the reset before it gives what was sent: the last words come after it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        process = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process.connect(str(tmp_path / "s"))
        records = Records()
        supervisor = Supervisor(records, Settings())
        supervisor._accept(listener)
    (peer,) = supervisor._peers.values()
    peer.link.send(b"where are you?")
    process.send(b'{"k": "bye", "q": 0, "b": {}}')
    process.close()
    supervisor._read(peer)
    (left,) = records.of("exit")
    assert left.body["said_bye"] is True
    assert not supervisor._peers
