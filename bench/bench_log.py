"""What the transparency log costs, against a bare loop that writes and syncs the same bytes.

    python bench/bench_log.py [--entries 100000] [--folder DIR]

Prints CPU time beside wall time, because a shared machine makes the latter vary; the ratio to the bare loop, taken in
the same run on the same disk, is what to compare between machines. Budgets are those of the design: 250 appends/s at
batch 1, 12,000 at 100, 40,000 at 1000, proofs below 2 ms at a million entries, an audit of them below 4 s, reopening
below 50 ms.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from trainguard.log import Log, LogReader

ENTRY_BYTES = 300
PUBLISH_EVERY = 20_000


def entry(number: int) -> bytes:
    """300 bytes that differ from one another."""
    return (b"%020d" % number) * (ENTRY_BYTES // 20)


def timed(work) -> tuple[float, float]:
    """(wall, CPU) seconds of `work()`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(folder: Path, commits: int, batch: int) -> None:
    """Write and fdatasync as many bytes as the entries have, and nothing else."""
    data = bytes(batch * ENTRY_BYTES)
    with open(folder / f"bare-{batch}", "wb", buffering=0) as file:
        for _ in range(commits):
            file.write(data)
            os.fdatasync(file.fileno())


def appends(log: Log, commits: int, batch: int) -> None:
    """Append in commits of `batch`."""
    for number in range(commits):
        log.append([entry(number * batch + i) for i in range(batch)])


def bench_appends(folder: Path) -> None:
    for batch, commits in ((1, 400), (100, 100), (1000, 40)):
        rates, ratios, cpu_us = [], [], []
        for trial in range(3):
            with Log.open(folder / f"log-{batch}-{trial}", folder / "log.key") as log:
                wall, cpu = timed(lambda log=log, commits=commits, batch=batch: appends(log, commits, batch))
            bare_wall, _ = timed(lambda commits=commits, batch=batch: bare(folder, commits, batch))
            rates.append(commits * batch / wall)
            ratios.append(wall / bare_wall)
            cpu_us.append(cpu / commits / batch * 1e6)
        print(
            f"append, batch {batch:5}: {statistics.median(rates):9,.0f} entries/s (best {max(rates):,.0f}), "
            f"{min(cpu_us):6.1f} CPU-us each, {statistics.median(ratios):.2f} x the bare write+fdatasync loop"
        )


def bench_large(folder: Path, count: int) -> None:
    log = Log.open(folder / "large", folder / "log.key")
    publishes = []
    for start in range(0, count, 1000):
        log.append([entry(i) for i in range(start, min(start + 1000, count))])
        if not (start + 1000) % PUBLISH_EVERY:
            publishes.append(timed(log.publish))
    log.publish()
    each = sorted(wall for wall, _ in publishes)
    if each:
        print(
            f"publish of {PUBLISH_EVERY:,} more: {each[len(each) // 2]:.2f} s wall, "
            f"{statistics.median(cpu for _, cpu in publishes):.2f} CPU-s (median)"
        )
    log.append([b"after the last publish"])
    log.close()
    reopened = [timed(lambda: Log.open(folder / "large", folder / "log.key").close()) for _ in range(10)]
    print(
        f"reopen at {count:,}: {min(w for w, _ in reopened) * 1e3:.1f} ms wall, best of 10 (CPU "
        f"{min(c for _, c in reopened) * 1e3:.1f} ms)"
    )
    bench_reading(folder, count)
    held = sum(path.stat().st_size for path in (folder / "large").rglob("*") if path.is_file())
    print(f"on disk: {held / count:.0f} bytes an entry of {ENTRY_BYTES}")


def bench_reading(folder: Path, count: int) -> None:
    vkey = folder / "log.vkey"
    reader = LogReader(folder / "large", vkey)
    wall, cpu = timed(reader.head)
    print(f"reader's first head: {wall * 1e3:.1f} ms wall, {cpu * 1e3:.1f} ms CPU")
    source = random.Random(1)
    for name, call in (("inclusion", reader.inclusion), ("consistency", reader.consistency)):
        each = sorted(timed(lambda call=call: call(source.randrange(count))) for _ in range(1000))
        print(
            f"{name} proof at {count:,}: p50 {each[500][0] * 1e3:.2f} ms, p99 {each[990][0] * 1e3:.2f} ms, "
            f"max {each[-1][0] * 1e3:.2f} ms"
        )
    wall, cpu = timed(LogReader(folder / "large", vkey).verify)
    print(f"full audit of {count:,}: {wall:.2f} s wall, {cpu:.2f} CPU-s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000, help="size of the log that is proved and audited")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk is what is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bench_appends(Path(name))
        bench_large(Path(name), options.entries)


if __name__ == "__main__":
    main()
