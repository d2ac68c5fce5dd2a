"""The list of runs as values: what `trainguard runs` shows, in text and in JSON.

What a run is called, when it began and how it ended come from the verified log. Its word is drawn anew from the
records, never from a file that says so; that takes time, so it is done for the newest runs first until a budget is
used up, and the rest say that they were not judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from trainguard.appraise.judge import judge_run
from trainguard.appraise.verdict import Level, Word
from trainguard.archive import LogLeaves, RunReader
from trainguard.errors import TrainguardError, VerificationError
from trainguard.home import Home

BUDGET_SECONDS = 1.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One run in the list."""

    run: str
    began: int | None = None
    """Nanoseconds since the epoch, by the supervisor's clock; None where no record can be read."""
    command: tuple[str, ...] = ()
    state: str = "unrecorded"
    """ended, running, unended (the record has no end), or unrecorded (the log holds no statement of it)."""
    steps: int | None = None
    """Optimizer steps recorded; None where the run was not judged."""
    verdict: Word | None = None
    """None where it was not judged; `reason` says why."""
    level: Level | None = None
    reason: str | None = None


def rows(
    home: Home, *, budget_seconds: float = BUDGET_SECONDS, clock: Callable[[], float] = time.monotonic
) -> list[Row]:
    """All runs of the log and of the runs folder, newest first.

    budget_seconds: runs are judged until this much time has passed; infinity judges all of them.
    Raises Misuse where there is no log and VerificationError where it does not verify.
    """
    leaves = LogLeaves(home)
    folders = {path.name for path in home.runs.iterdir() if path.is_dir()} if home.runs.is_dir() else set()
    listed = sorted((_row(home, run, leaves) for run in folders | leaves.runs.keys()), key=_newest_first)
    return list(_judged(home, leaves, listed, clock() + budget_seconds, clock))


def _newest_first(row: Row) -> tuple[int, str]:
    return -(row.began or 0), row.run


def _row(home: Home, run: str, leaves: LogLeaves) -> Row:
    reader = RunReader(home, run, leaves=leaves)
    if reader.begin is None:
        return Row(run=run, reason="the log holds no statement of this run")
    command = reader.begin.get("command")
    words = tuple(str(word) for word in command) if isinstance(command, list) else ()
    state = "ended" if reader.ended else "running" if reader.running else "unended"
    return Row(run=run, began=_began(reader), command=words, state=state)


def _began(reader: RunReader) -> int | None:
    try:
        return next((record.at for record in reader.records()), None)
    except VerificationError:
        return None  # the verdict will say so


def _judged(
    home: Home, leaves: LogLeaves, listed: list[Row], deadline: float, clock: Callable[[], float]
) -> Iterator[Row]:
    for row in listed:
        if row.state == "unrecorded":
            yield row
        elif clock() >= deadline:
            yield msgspec.structs.replace(row, reason="not judged, to keep the list fast")
        else:
            yield _with_verdict(home, leaves, row)


def _with_verdict(home: Home, leaves: LogLeaves, row: Row) -> Row:
    try:
        verdict = judge_run(home, row.run, leaves=leaves)
    except VerificationError as error:
        return msgspec.structs.replace(row, verdict="TAINTED", reason=str(error))
    except TrainguardError as error:
        return msgspec.structs.replace(row, reason=str(error))
    return msgspec.structs.replace(row, verdict=verdict.verdict, level=verdict.level, steps=verdict.coverage.steps)
