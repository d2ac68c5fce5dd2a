"""What a scan costs: CPU seconds and peak memory, against the peers that are installed.

    python bench/bench_scan.py [--peers FOLDER_OF_A_VENV/bin] [--only NAME]

Peers come from `sh tools/peers.sh .venv-tools/peers`; one that is not installed is skipped and the table says so. Files
are made on the fly in a temporary folder (the large ones are sparse). Every tool is its own process, start-up included;
CPU is user + system of that process, memory its peak (VmHWM). Budgets (DESIGN 13): 1 GiB <= 0.6 CPU-s and <= 50 MiB,
100,000 tensors <= 3 CPU-s.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from trainguard.testing import forge

GIB = 1 << 30
TENSORS = 100_000


def storage(key: str, numel: int) -> bytes:
    """Opcodes of a persistent id."""
    return forge.value(("storage", forge.named("torch", "FloatStorage"), key, "cpu", numel)) + b"Q"


def tensor(key: str, numel: int) -> bytes:
    """Opcodes of a flat float tensor."""
    hooks = forge.call(forge.named("collections", "OrderedDict"))
    arguments = (storage(key, numel), 0, (numel,), (1,), False, hooks)
    return forge.call(forge.named("torch._utils", "_rebuild_tensor_v2"), *arguments)


def small(path: Path) -> None:
    """A torch checkpoint of a few hundred bytes: start-up."""
    path.write_bytes(forge.torch_zip(forge.BENIGN))


def torch_zip_1gib(path: Path) -> None:
    """A torch zip with one 1 GiB record, sparse; the CRC of zeros is computed, not stored data."""
    pickled = forge.stream(tensor("0", GIB // 4), 2)
    zeros, crc = bytes(1 << 20), 0
    for _ in range(GIB >> 20):
        crc = zlib.crc32(zeros, crc)
    members = [("archive/data.pkl", pickled, zlib.crc32(pickled), len(pickled)), ("archive/data/0", b"", crc, GIB)]
    directory = b""
    with path.open("wb") as file:
        for name, data, checksum, size in members:
            offset = file.tell()
            fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, checksum, size, size, len(name), 0)
            file.write(b"PK\3\4" + fields + name.encode() + data)
            file.seek(size - len(data), os.SEEK_CUR)
            directory += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, offset)
            directory += name.encode()
        start = file.tell()
        file.write(directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 2, 2, len(directory), start, 0))


def safetensors_1gib(path: Path) -> None:
    """safetensors of one tensor, sparse."""
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (GIB // 4, GIB)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + GIB)


def numpy_pickle_1gib(path: Path) -> None:
    """A raw pickle with 1 GiB of bytes inside, sparse."""
    with path.open("wb") as file:
        file.write(b"\x80\x04\x8e" + struct.pack("<Q", GIB))
        file.seek(GIB, os.SEEK_CUR)
        file.write(b".")


def many_tensors(path: Path) -> None:
    """A torch zip of 100,000 tensors of one float, as torch writes it."""
    import torch

    torch.set_num_threads(1)
    torch.save({f"layers.{index // 10}.w{index % 10}": torch.zeros(1) for index in range(TENSORS)}, path)


def many_opcodes(path: Path) -> None:
    """A pickle of 3.3 million opcodes."""
    path.write_bytes(pickle.dumps([list(range(8)) for _ in range(300_000)], protocol=4))


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "start-up": ("small.pt", small),
    "torch zip, 1 GiB": ("big.pt", torch_zip_1gib),
    "safetensors, 1 GiB": ("big.safetensors", safetensors_1gib),
    "raw pickle, 1 GiB": ("big.pkl", numpy_pickle_1gib),
    "100,000 tensors": ("many.pt", many_tensors),
    "3 M opcodes": ("opcodes.pkl", many_opcodes),
}

OURS = "import sys; from trainguard.cli import main; sys.exit(main(sys.argv[1:]))"
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.returncode)
"""
"""A small process between, so that the peak of the child is not hidden by the size of this one."""

FICKLING = "import sys, fickling.fickle as f; f.Pickled.load(open(sys.argv[1], 'rb'))"


def tools(peers: Path | None) -> dict[str, list[str] | str]:
    """Tool → command, or why it is absent."""
    made: dict[str, list[str] | str] = {
        "trainguard": [sys.executable, "-c", OURS, "scan", "--quiet"],
        "trainguard --digest blake3": [sys.executable, "-c", OURS, "scan", "--quiet", "--digest", "blake3"],
    }
    for name, arguments in {"picklescan": ["-p"], "modelscan": ["-p"], "fickling": ["--check-safety"]}.items():
        found = shutil.which(name, path=str(peers) if peers else None)
        made[name] = [found, *arguments] if found else "skipped: not installed"
    return made


def measured(command: list[str], path: Path, limit: float = 180) -> str:
    """`CPU-s / MiB (status)` of one run."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command, str(path)], capture_output=True, text=True, timeout=limit, check=True
        )
    except subprocess.TimeoutExpired:
        return f"over {limit:g} s, stopped"
    seconds, mebibytes, status = done.stdout.split()
    return f"{float(seconds):.2f} / {float(mebibytes):.0f} ({status})"


def warm(path: Path) -> None:
    """Read the file once, so that the first tool does not pay for filling the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


def main() -> int:
    """Make the files, run the tools, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    beside = Path(__file__).parents[1] / ".venv-tools" / "peers" / "bin"
    parser.add_argument("--peers", type=Path, default=beside, help="bin folder of a virtual environment with peers")
    parser.add_argument("--only", help="only files whose name holds this")
    options = parser.parse_args()
    commands = tools(options.peers)
    print("CPU-s / peak MiB (exit status), start-up included")
    with tempfile.TemporaryDirectory() as folder:
        for title, (name, make) in FILES.items():
            if options.only and options.only not in title:
                continue
            path = Path(folder) / name
            make(path)
            warm(path)
            for tool, command in commands.items():
                print(
                    f"{title:22}{tool:28}{command if isinstance(command, str) else measured(command, path)}", flush=True
                )
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
