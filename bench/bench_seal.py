"""What sealing costs: GB per CPU-second to seal and to verify, start-up, and what the tee adds to torch.save.

    python bench/bench_seal.py [--gigabytes 2] [--folder DIR]

Each figure stands beside a bare reader of the same bytes in the same run (hashlib in a loop, `openssl dgst`,
`sha256sum`, and model_signing: `sh tools/readers.sh .venv-tools`, or TRAINGUARD_MODEL_SIGNING), because the ratio is
what carries over to another machine. CPU time is user and system time of the child. Budgets are those of the design:
verify at least 1.3 GB per CPU-second with SHA-256 and 3 with BLAKE3, at most 80 MB, at most 0.25 CPU-seconds to start;
the tee at most 0.8 CPU-seconds per GB with SHA-256 and 0.2 with BLAKE3.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import blake3

TRIALS = 3
TENSOR_BYTES = 32 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made [the system's temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["TRAINGUARD_HOME"] = str(Path(folder) / "state")
        path = Path(folder) / "checkpoint.pt"
        # In a process of its own: a child's peak memory starts from its parent's.
        making = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(path, arguments.gigabytes))
        making.start()
        making.join()
        bench_files(path)
        bench_start(Path(folder) / "small.bin")
        bench_tee(Path(folder))
        bench_live(Path(folder))


def make_checkpoint(path: Path, gigabytes: float) -> None:
    """A torch file of random tensors of 32 MiB, so that its table has names as a real one has."""
    import torch

    torch.set_num_threads(1)
    count = max(1, int(gigabytes * 1e9 / TENSOR_BYTES))
    generator = torch.Generator().manual_seed(1)
    block = torch.randint(0, 256, (TENSOR_BYTES,), dtype=torch.uint8, generator=generator)
    torch.save({f"layer.{i}.weight": block + (i % 256) for i in range(count)}, path)


def bench_files(path: Path) -> None:
    size = path.stat().st_size / 1e9
    print(f"{'reader, one file of ' + format(size, '.2f') + ' GB':44} GB/CPU-s   wall s    MB  of bare")
    bare: dict[str, float] = {}
    for name, hash_type, command in readers(path):
        runs = [run(command) for _ in range(TRIALS)]
        cpu, wall, megabytes = min(r[0] for r in runs), min(r[1] for r in runs), min(r[2] for r in runs)
        rate = size / cpu
        bare.setdefault(hash_type, rate)
        print(f"{name:44} {rate:8.2f} {wall:8.2f} {megabytes:5.0f}  {rate / bare[hash_type]:5.0%}")


LOOP = """
import sys, hashlib, os
from blake3 import blake3
h = {'sha256': hashlib.sha256, 'blake3': blake3}[sys.argv[1]]()
b = bytearray(1 << 20); v = memoryview(b); f = os.open(sys.argv[2], 0)
while n := os.readv(f, [b]): h.update(v[:n])
"""


def readers(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(name, hash, command); sealing goes first where verifying needs its seal."""
    ours = [sys.executable, "-m", "trainguard"]
    for hash_type in ("sha256", "blake3"):
        yield f"bare loop, {hash_type}", hash_type, [sys.executable, "-c", LOOP, hash_type, str(path)]
        yield f"trainguard seal, {hash_type}", hash_type, [*ours, "seal", "--hash", hash_type, "--quiet", str(path)]
        yield f"trainguard verify, {hash_type}", hash_type, [*ours, "verify", "--quiet", str(path)]
    for name, *command in (("openssl", "dgst", "-sha256"), ("sha256sum",)):
        if shutil.which(name):
            yield f"{name}", "sha256", [name, *command, str(path)]
    beside = Path(__file__).parents[1] / ".venv-tools" / "bin" / "model_signing"  # tools/readers.sh puts it there
    peer = os.environ.get("TRAINGUARD_MODEL_SIGNING") or (str(beside) if beside.exists() else None)
    if peer:
        key, signature = Path(os.environ["TRAINGUARD_HOME"]) / "keys", path.with_suffix(".peer")
        sign = ["sign", "key", str(path), "--private_key", str(key / "attestation.pem"), "--signature", str(signature)]
        check = [
            "verify",
            "key",
            str(path),
            "--public_key",
            str(key / "attestation.pub"),
            "--signature",
            str(signature),
        ]
        yield "model_signing sign", "sha256", [peer, *sign]
        yield "model_signing verify", "sha256", [peer, *check]


def run(command: list[str]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds, peak MB of one child that must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    message = child.stderr.read() if child.stderr else b""
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.stderr:
        child.stderr.close()
    if child.returncode:
        sys.exit(f"{' '.join(command)}: status {child.returncode}: {message.decode()[-300:]}")
    return usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1000


def bench_start(path: Path) -> None:
    """A checkpoint of three bytes: what is left is start-up."""
    path.write_bytes(b"abc")
    ours = [sys.executable, "-m", "trainguard"]
    for verb in ("seal", "verify"):
        cpu = min(run([*ours, verb, "--quiet", str(path)])[0] for _ in range(2 * TRIALS))
        print(f"{'start-up, trainguard ' + verb:44} {cpu:8.3f} CPU-s")
    bare = min(run([sys.executable, "-c", "pass"])[0] for _ in range(2 * TRIALS))
    print(f"{'start-up, python alone':44} {bare:8.3f} CPU-s")


def bench_tee(folder: Path) -> None:
    """torch.save of 1 GB plain, through the tee, and saved and then read again; CPU-seconds per GB that each adds."""
    import torch

    from trainguard.seal.hashing import TeeHash

    block = torch.randint(0, 256, (TENSOR_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    value = {str(i): block + i for i in range(30)}
    size = 30 * TENSOR_BYTES / 1e9
    path = folder / "saved.pt"

    def plain() -> None:
        with path.open("wb") as file:
            torch.save(value, file)

    def tee(algorithm: str) -> Callable[[], None]:
        def save() -> None:
            with path.open("wb") as file:
                torch.save(value, TeeHash(file, algorithm))

        return save

    def again(new: Callable[[], object]) -> Callable[[], None]:
        def save() -> None:
            plain()
            hasher = new()
            buffer = bytearray(1 << 20)
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    hasher.update(memoryview(buffer)[:count])  # type: ignore[attr-defined]

        return save

    ways = {
        "plain": plain,
        "tee, sha256": tee("sha256"),
        "save and read again, sha256": again(hashlib.sha256),
        "tee, blake3": tee("blake3"),
        "save and read again, blake3": again(blake3.blake3),
    }
    costs = dict.fromkeys(ways, float("inf"))
    for _ in range(TRIALS + 2):  # in turns, so that a busy minute falls on all of them
        for name, way in ways.items():
            before = resource.getrusage(resource.RUSAGE_SELF)
            way()
            after = resource.getrusage(resource.RUSAGE_SELF)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            costs[name] = min(costs[name], spent / size)
    for name, cost in costs.items():
        added = "" if name == "plain" else f", adds {cost - costs['plain']:.3f}"
        print(f"{'torch.save of 1 GB, ' + name:44} {cost:8.3f} CPU-s/GB{added}")


def bench_live(folder: Path) -> None:
    """What digesting the storages in memory (watch/saves.py) adds to torch.save: small, middling and large."""
    import torch

    from trainguard.watch import saves

    class Client:
        settings: ClassVar[dict[str, str]] = {"key": "0f" * 32}

        def send(self, kind: str, body: dict[str, Any], step: int | None = None) -> None:
            """Nobody listens."""

        def fault(self, place: str, error: BaseException) -> None:
            sys.exit(f"{place}: {error!r}")

    registry = torch.serialization._package_registry
    path = folder / "saved.pt"
    for tensors, elements in ((150, 1 << 12), (100, 1 << 19), (30, 8 << 20)):
        value = {str(i): torch.full((elements,), float(i)) for i in range(tensors)}
        costs = {False: float("inf"), True: float("inf")}
        whole = 0
        for _ in range(TRIALS + 2):
            for watched in costs:
                state = saves.Saves(Client(), torch)  # type: ignore[arg-type]
                entry = (saves.PRIORITY, state.tag, lambda storage, location: None)
                registry[:0] = [entry] if watched else []
                before = time.process_time()
                torch.save(value, path)
                costs[watched] = min(costs[watched], time.process_time() - before)
                if watched:
                    registry.remove(entry)
                    whole = sum(line[3] is not None for line in state._frame["storages"])
        size, added = tensors * elements * 4 / 1e6, costs[True] - costs[False]
        print(
            f"{f'torch.save of {size:.1f} MB in {tensors} tensors, watched':44} {costs[True] * 1e3:8.1f} CPU-ms, adds"
            f" {added * 1e3:.1f} ms ({added / costs[False]:.0%}); {whole} of {tensors} digested whole"
        )


if __name__ == "__main__":
    main()
