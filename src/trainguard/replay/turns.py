"""Many ranks, one process at a time: what a job of any size did can be replayed on a machine that holds one rank of it.

    result = in_turn(job, ranks=4, until=16, begin=8, points=…)

Rank 0 runs alone until it needs what another rank gives to a collective; what it gave itself is kept, and the process
ends. Rank 1 runs, then the others, each as far as what is there allows; then rank 0 again, from the beginning of the
segment. A segment of n steps that reduce once each takes about n · (ranks - 1) + 1 starts, and the memory of one rank.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainguard.replay.committed import Account
from trainguard.replay.launch import of_one_rank
from trainguard.replay.rerun import Job, Rerun, Turn, heard, rerun

THREADS = {"OMP_NUM_THREADS": "1"}
"""torchrun sets it for several ranks on one host, where nobody did."""


def in_turn(
    job: Job, *, ranks: int, until: int, points: Mapping[int, Path] | None = None, limit_seconds: float = 600.0,
    **options: Any,
) -> Rerun:  # fmt: skip
    """As `rerun` with that many ranks, but with one process at a time. Raises Unavailable, Misuse."""
    began = time.monotonic()
    folder = job.root / "turns"
    folder.mkdir(exist_ok=True)
    job = replace(job, command=of_one_rank(job.command), environment={**THREADS, **job.environment})
    latest: dict[int, Rerun] = {}
    waiting: dict[int, Sequence[str]] = dict.fromkeys(range(ranks), ())
    while waiting:
        rank = next((r for r, names in waiting.items() if all((folder / name).exists() for name in names)), None)
        if rank is None:
            break  # each waits for another
        for old in (job.root / "points").glob(f"p{rank}-*"):
            shutil.rmtree(old, ignore_errors=True)
        turn = Turn(rank=rank, ranks=ranks, folder=folder)
        spare = max(0.0, limit_seconds - (time.monotonic() - began))
        found = latest[rank] = rerun(job, until=until, points=points, limit_seconds=spare, turn=turn, **options)
        del waiting[rank]
        if found.waits and not found.timed_out:
            waiting[rank] = found.waits  # behind the others
        elif found.reached < until:
            break
    return _together(latest, time.monotonic() - began)


def _together(latest: Mapping[int, Rerun], seconds: float) -> Rerun:
    """What the last turn of every rank said, as if all had run at once."""
    tape = [frame for rank in sorted(latest) for frame in latest[rank].tape]
    result = heard(tape)
    result.tape = tape
    last = list(latest.values())[-1] if latest else Rerun(account=Account())
    for name in ("status", "timed_out", "output"):
        setattr(result, name, getattr(last, name))
    result.malformed = next((each.malformed for each in latest.values() if each.malformed), None)
    for each in latest.values():
        result.folders.update(each.folders)
    result.seconds = seconds
    return result
