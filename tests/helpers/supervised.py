"""Run a command under the real supervisor, with its records in memory, and appraise them with one check."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.guarded import clean_environment
from tests.helpers.watched import cache_folder

from trainguard.appraise.interface import Check, Context
from trainguard.evidence import Evidence, unfold
from trainguard.finding import Finding, LinkState
from trainguard.policy import Approval, Policy
from trainguard.watch.supervisor import Ended, Settings, Supervisor, blocked_signals


class Records(list[Evidence]):
    """A recorder that keeps everything in memory."""

    def add(self, kind: str, body: dict[str, Any], *, source: str = "supervisor", **fields: Any) -> Evidence:
        self.append(Evidence(n=len(self), at=time.time_ns(), source=source, kind=kind, body=body, **fields))
        return self[-1]

    def seal(self, *, final: bool = False) -> int | None:
        return None


@dataclass(frozen=True)
class Supervised:
    """A finished command."""

    ended: Ended
    records: list[Evidence]

    def of(self, kind: str) -> list[Evidence]:
        """Records of one kind."""
        return [record for record in self.records if record.kind == kind]

    def judge(self, check: type[Check], *approvals: Approval) -> tuple[list[Finding], LinkState]:
        """The findings of one check, and the balance of its link."""
        appraiser = check(Context(run="test", policy=Policy(approve=approvals), blob={}.__getitem__))
        findings = [finding for record in self.records for each in unfold(record) for finding in appraiser.see(each)]
        ends = list(appraiser.end())
        findings += [end for end in ends if isinstance(end, Finding)]
        (link,) = [end for end in ends if isinstance(end, LinkState)]
        return findings, link


def supervise(
    folder: Path, command: Sequence[str] = (), *, env: Mapping[str, str] | None = None, **options: Any
) -> Supervised:
    """Run `command` (default: `python train.py`) in `folder`; options are Supervisor's and Settings' fields."""
    records = Records()
    records.add("start", {"run": "test", "command": ["python", "train.py"], "cwd": str(folder), "lock": None})
    outer = {name: options.pop(name) for name in list(options) if name not in Settings.__dataclass_fields__}
    settings = Settings(pycache=str(cache_folder()), **options)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with blocked_signals() as mask:
            supervisor = Supervisor(records, settings, **outer)
            ended = supervisor.run(
                list(command) or [sys.executable, "train.py"], clean_environment() | dict(env or {}), mask=mask
            )
    finally:
        os.chdir(before)
    return Supervised(ended, list(records))
