"""What a run told of itself, against two clean replays of the whole command: metrics, saves, where it ended (C10).

Steps may all be equal and the result still be another: a metric is multiplied before it is written, so that another
checkpoint is the best one, or training stops early. Compared are

    numbers in text files that the command wrote (JSON, CSV, logs), where all words around them are the same
    after which steps a path was saved
    whether a clean replay goes on after the run's last step

The second replay runs with a clock that is three times as fast: times, rates and whatever else comes from the clock
are others in it, and only what both replays agree on is held against the run. What is left is deterministic as far as
two replays can show, so it is suspicious, never violated: a decision may hang on something else that was not recorded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from trainguard.finding import Finding, Subject
from trainguard.replay.files import Kept, in_the_run
from trainguard.replay.rerun import Rerun

CLOCK = 3.0
"""How much faster the second replay's clock runs."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".log", ".yaml", ".yml")
FILE_LIMIT_BYTES = 64 << 10
FILES_LIMIT = 20
AFTER_NS = 2_000_000_000
"""A file that changed later than this after the run's end may have been changed by somebody else."""

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4}|\d{1,2}:\d{2}(?::\d{2})?|(?<!\d)(?:19|20)\d{6}(?!\d)"
)
"""Dates and times of day: two replays of one day agree on them, and the run was on another."""
CAUSES = "alternatives: something else that decides it and was not recorded, or a file edited right after the run"


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a run told otherwise than a clean replay."""

    what: str
    path: str | None
    step: int
    expected: str
    found: str


def written_texts(folder: Path, since_ns: int) -> dict[str, str]:
    """Small text files below `folder` that were written since, by relative path."""
    found: dict[str, str] = {}
    for top, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(top) / name
            if path.suffix.lower() in SUFFIXES and len(found) < FILES_LIMIT:
                text = _text(path, since_ns, None)
                if text is not None:
                    found[str(path.relative_to(folder))] = text
    return found


def departures(
    found: Rerun, *, last: int, cwd: str, began_ns: int, ended_ns: int, files: Sequence[Kept]
) -> list[Departure]:
    """Everything that a replay from the first step to the command's end tells otherwise than the run did."""
    if found.reached > last:
        return [
            Departure(
                what=f"the run ended after step {last}, and the command goes on", path=None, step=last,
                expected=f"at least step {found.reached}", found=f"step {last}",
            )
        ]  # fmt: skip
    texts = (_numbers(Path(cwd) / name, text, last, began_ns, ended_ns) for name, text in found.texts.items())
    return [*(each for some in texts for each in some), *_saves(found, cwd, files)]


def findings(run: str, first: Sequence[Departure], second: Sequence[Departure]) -> Iterator[Finding]:
    """Of what both replays agree on, one for each file or path."""
    seen: set[str | None] = set()
    for departure in first:
        if departure not in second or departure.path in seen:
            continue
        seen.add(departure.path)
        more = sum(each.path == departure.path and each in second for each in first) - 1
        also = f" (and {more} more)" if more else ""
        yield Finding(
            check="replay",
            outcome="suspicious",
            techniques=("C10",),
            subject=Subject(run=run, rank=0, step=departure.step, path=departure.path),
            message=f"{departure.what}{also}, in two clean replays with different clocks; every step compared is "
            f"equal; {CAUSES}",
            expected=departure.expected,
            found=departure.found,
        )


def _numbers(path: Path, clean: str, last: int, began_ns: int, ended_ns: int) -> Iterator[Departure]:
    run = _text(path, began_ns, ended_ns + AFTER_NS)
    run, clean = run and DATE.sub("", run), DATE.sub("", clean)
    if run is None or run == clean or NUMBER.sub("0", run) != NUMBER.sub("0", clean):
        return
    for place, (was, now) in enumerate(zip(NUMBER.finditer(run), NUMBER.finditer(clean), strict=True)):
        if was.group() != now.group():
            line = run.count("\n", 0, was.start()) + 1
            around = " ".join(run[max(0, was.start() - 40) : was.start()].split())[-30:]
            yield Departure(
                what=f"{path}, line {line}, number {place + 1} (after {around!r}) is not what the command gives",
                path=str(path), step=last, expected=now.group(), found=was.group(),
            )  # fmt: skip


def _saves(found: Rerun, cwd: str, files: Sequence[Kept]) -> Iterator[Departure]:
    """Files that the run saved after a step after which the replay, which saves that path too, does not."""
    made: dict[str, list[int]] = {}
    for save in found.saved:
        if save.path is not None:
            made.setdefault(os.path.realpath(in_the_run(save.path, found.root, cwd)), []).append(save.step)
    for path, step in found.written:
        made.setdefault(os.path.realpath(in_the_run(path, found.root, cwd)), []).append(step)
    for file in files:
        steps = made.get(os.path.realpath(file.path))
        if steps and not any(file.since <= step <= max(file.until, file.step + 1) for step in steps):
            shown = ", ".join(map(str, sorted(set(steps))[:5]))
            yield Departure(
                what=f"{file.path} was saved after step {file.step}, and the command saves it at other steps",
                path=file.path, step=file.step, expected=f"after step {shown}", found=f"after step {file.step}",
            )  # fmt: skip


def _text(path: Path, since_ns: int, until_ns: int | None) -> str | None:
    """A small text file that was written in that time; None for what is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        if changed < since_ns or (until_ns is not None and changed > until_ns) or status.st_size > FILE_LIMIT_BYTES:
            return None
        try:
            return file.read(FILE_LIMIT_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError):
            return None


def told_by(texts: Mapping[str, object]) -> dict[str, str]:
    """Texts as another machine gave them, bounded."""
    kept = ((str(name), text) for name, text in list(texts.items())[:FILES_LIMIT])
    return {name: text for name, text in kept if isinstance(text, str) and len(text) <= FILE_LIMIT_BYTES}
