"""Machine instructions changed in memory: found from outside, with file and offset; honest text raises nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.recorded import context

from trainguard.appraise.text import Text
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.policy import Approval, Policy
from trainguard.watch import text

CHILD = """
import _bz2, ctypes, sys
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
act = sys.argv[1]
if act != "none":
    lines = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(_bz2.__file__)]
    page = next(int(line[0].split("-")[1], 16) for line in lines if "x" in line[1]) - 4096
    libc.mprotect(page, 4096, 7)
    was = ctypes.string_at(page + 4000, 1)[0]
    ctypes.memset(page + 4000, was ^ 1, 1)
    if act == "restore":
        ctypes.memset(page + 4000, was, 1)
    libc.mprotect(page, 4096, 5)
print(_bz2.__file__, flush=True)
sys.stdin.read()
"""


@contextmanager
def child(act: str) -> Iterator[tuple[int, str]]:
    """Pid of a process of our own that changed one byte of its own text, or none, and the file it belongs to."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, act], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.pid, process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def appraise(*bodies: dict[str, Any], policy: Policy | None = None) -> tuple[list[Finding], LinkState]:
    check = Text(context(policy))
    records = [
        Evidence(n=n, at=n, source="supervisor", kind="text", body=body, pid=9, process=0)
        for n, body in enumerate(bodies)
    ]
    findings = [finding for record in records for finding in check.see(record)]
    (state,) = [end for end in check.end() if isinstance(end, LinkState)]
    return findings, state


def test_one_byte_of_text_is_found_with_its_file_and_offset() -> None:
    """From /proc alone; the file on disk, its hash and its times are as they were, and that control stays green."""
    with child("change") as (pid, path):
        before = Path(path).read_bytes()
        body = text.look(pid)
        assert Path(path).read_bytes() == before
    (line,) = body["differ"]
    assert line["path"] == path
    assert int(line["expected"][:2], 16) ^ int(line["found"][:2], 16) == 1
    (found,), state = appraise(body)
    assert (found.outcome, found.techniques[0], found.subject.path) == ("violated", "B8", path)
    assert state.broken == 1


def test_a_page_that_was_written_and_put_back_is_counted_and_not_accused() -> None:
    """A debugger that came and went leaves the same trace."""
    with child("restore") as (pid, _):
        body = text.look(pid)
    assert (body["differ"], body["restored"]) == ([], 1)
    assert appraise(body)[0] == []


def test_untouched_text_holds() -> None:
    """No private page in any library of a process that does nothing special."""
    with child("none") as (pid, _):
        body = text.look(pid)
    assert (body["differ"], body["restored"], body["unread"]) == ([], 0, [])
    assert body["mappings"] > 3
    findings, state = appraise(body)
    assert (findings, state.state) == ([], "held")


@pytest.mark.torch
def test_a_process_with_just_in_time_code_has_no_difference() -> None:
    """oneDNN writes machine code of its own into anonymous memory; libraries stay as they are."""
    code = (
        "import sys, torch; torch.set_num_threads(1); torch.nn.Conv2d(3, 8, 3)(torch.randn(2, 3, 16, 16));"
        "print(1, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    body = text.look(process.pid)
    process.stdin.close()
    process.wait(20)
    process.stdout.close()
    assert (body["differ"], body["restored"]) == ([], 0)
    assert body["anonymous"] > 0
    assert body["mappings"] > 20


@pytest.mark.parametrize("fact", [{"tracer": 77}, {"probes": True}])
def test_a_breakpoint_of_a_debugger_or_a_kernel_probe_is_a_suspicion(fact: dict[str, Any]) -> None:
    """Both write to text for a living; the message says that one is there."""
    line = {"path": "/lib/x.so", "offset": 8, "expected": "00", "found": "cc"}
    (found,), _ = appraise({"pages": 1, "differ": [line], **fact})
    assert found.outcome == "suspicious"


def test_a_difference_is_told_once_and_can_be_approved() -> None:
    """The next look sees it again; a profiler that patches a library may be approved by its file."""
    body = {"pages": 1, "differ": [{"path": "/lib/x.so", "offset": 8, "expected": "00", "found": "cc"}]}
    assert len(appraise(body, body)[0]) == 1
    policy = Policy(approve=(Approval(check="text", place="/lib/x.so"),))
    findings, state = appraise(body, policy=policy)
    assert (findings, state.explained) == ([], ("/lib/x.so",))


@pytest.mark.parametrize("body", [{}, {"differ": 3}, {"differ": [3, {}]}, {"error": 3}, {"unread": [3]}])
def test_bad_bodies_raise_nothing(body: dict[str, Any]) -> None:
    """Records are read from a log that others can write."""
    appraise(body)


def test_a_process_that_is_gone_is_said_to_be_unread() -> None:
    """Blind with its reason, and not required."""
    body = text.look(2**22 - 1)
    assert "error" in body
    findings, state = appraise(body)
    assert (findings, state.state, state.required) == ([], "blind", False)


def test_libraries_that_relocate_their_own_text_are_known(tmp_path: Path) -> None:
    """DT_TEXTREL and DF_TEXTREL in the dynamic section; anything that is no ELF file is not."""
    import struct

    def elf(*tags: tuple[int, int]) -> Path:
        dynamic = b"".join(struct.pack("<QQ", *tag) for tag in (*tags, (0, 0)))
        head = b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<Q", 64) + bytes(14) + struct.pack("<HH", 56, 1)
        program = struct.pack("<IIQQQQQQ", 2, 0, 120, 0, 0, len(dynamic), len(dynamic), 8)
        path = tmp_path / f"{len(tags)}{tags[:1]}.so"
        path.write_bytes(head.ljust(64, b"\0") + program + dynamic)
        return path

    assert text._relocates_itself(str(elf((22, 0))))
    assert text._relocates_itself(str(elf((30, 4), (1, 1))))
    assert not text._relocates_itself(str(elf((30, 8), (1, 1), (5, 5))))
    (tmp_path / "x").write_text("no ELF")
    assert not text._relocates_itself(str(tmp_path / "x"))
