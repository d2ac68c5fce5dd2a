"""Processes that go on after they stopped talking: found from outside, whatever they said before."""

from __future__ import annotations

from typing import Any

import pytest
from tests.helpers.recorded import context
from tests.unit.watch.test_supervisor import Records, python, watch

from trainguard.appraise.processes import Processes
from trainguard.finding import Finding
from trainguard.watch import processes

SPIN = """
end = time.process_time() + {seconds}
while time.process_time() < end: pass
"""


def appraise(records: Records) -> list[Finding]:
    check = Processes(context())
    return [finding for record in records for finding in check.see(record)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainguard.watch.supervisor.UNHEARD_GRACE_SECONDS", 0.6)
    monkeypatch.setattr(processes.Unheard, "__init__", _with_bye(processes.Unheard.__init__, 0.5))


def _with_bye(real: Any, seconds: float) -> Any:
    def init(self: Any, **fields: Any) -> None:
        real(self, **{"bye_cpu_seconds": seconds, **fields})

    return init


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("c.socket.close()", "without a word"),
        ("c.close()", "after saying goodbye"),
        ("os.closerange(3, 100)", "without a word"),
    ],
)
def test_a_process_that_closes_its_connection_and_goes_on_is_found(act: str, said: str) -> None:
    """By the guard's own object, by its goodbye, or by closing every descriptor."""
    code = (
        "import os, time\nfrom _trainguard import bootstrap\nc = bootstrap._client\n" + act + SPIN.format(seconds=1.5)
    )
    ended, records = watch(*python(code), links="none")
    assert ended.status == 0
    (found,) = appraise(records)
    assert (found.outcome, found.techniques[0]) == ("suspicious", "G7")
    assert said in found.message


@pytest.mark.parametrize(
    "code",
    [
        "import os, sys, time\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1.5)'])",
        "import os, time\nos.execv('/bin/sleep', ['sleep', '1.5'])",
        "import os, time\nif os.fork() == 0: os._exit(0)\nos.wait(); time.sleep(1)",
        "import atexit, time\natexit.register(lambda: time.sleep(1.5))",
        "import os, time\ntime.sleep(0.3); os._exit(0)",
    ],
)
def test_exec_fork_slow_exits_and_hard_exits_are_no_silence(code: str) -> None:
    """The next program says its own hello, or is no Python; leaving may take its time."""
    ended, records = watch(*python(code), links="none")
    assert ended.status == 0
    assert records.of("unheard") == []
    assert appraise(records) == []


def test_a_program_put_in_place_of_a_guarded_one_does_not_inherit_its_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    """`exec` of an isolated interpreter: the same pid, which had said hello before."""
    monkeypatch.setattr("trainguard.watch.supervisor.HELLO_GRACE_SECONDS", 0.3)
    code = "import os, sys\nos.execv(sys.executable, [sys.executable, '-I', '-c', 'import time; time.sleep(2)'])"
    _, records = watch(*python(code), links="none")
    (silent,) = records.of("silent")
    assert "-I" in silent.body["cmdline"]


def test_a_second_connection_of_one_process_is_found() -> None:
    """Frames of its own making, beside the guard's own."""
    code = """
        import json, os, socket, time
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        link.connect(os.environ["TRAINGUARD_SOCKET"])
        link.send(json.dumps({"k": "hello", "q": 0, "b": {}}).encode())
        link.recv(65536)
        link.send(json.dumps({"k": "step", "q": 1, "s": 1, "b": {"opt": 0}}).encode())
        time.sleep(0.3)
    """
    _, records = watch(*python(code), links="none")
    (found,) = appraise(records)
    assert (found.outcome, found.techniques) == ("suspicious", ("G4", "G11"))
    assert "second connection" in found.message
