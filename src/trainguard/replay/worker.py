"""Performs one task: `python -m trainguard.replay.worker TASK OUTCOME`, files, or `-` for stdin and stdout.

What every executor starts, on whatever machine. Exit status 0 once there is an outcome (which may say why nothing could
be replayed), 2 where the task is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from trainguard.errors import TrainguardError
from trainguard.replay.tasks import TASK_LIMIT_BYTES, parse_task, perform, write_outcome


def main(words: list[str]) -> int:
    """Words: task, outcome."""
    if len(words) != 2:
        sys.stderr.write("usage: python -m trainguard.replay.worker TASK OUTCOME (files, or - for stdin and stdout)\n")
        return 2
    given, wanted = words
    try:
        data = sys.stdin.buffer.read(TASK_LIMIT_BYTES + 1) if given == "-" else Path(given).read_bytes()
        task = parse_task(data)
    except (TrainguardError, OSError) as error:
        sys.stderr.write(f"{given}: {error}\n")
        return 2
    outcome = perform(task)
    if wanted == "-":
        sys.stdout.buffer.write(msgspec.json.encode(outcome))
        sys.stdout.buffer.flush()
    else:
        write_outcome(Path(wanted), outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
