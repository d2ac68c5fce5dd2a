"""Differential fuzzing of the pickle machine against CPython's C and Python unpicklers.

    python bench/fuzz_scan.py --seconds 600 [--seed 1]

A mutant the machine calls safe must make both unpicklers (with an inert stub for every name) resolve the same names and
persistent ids in the same order and stop at the same byte, without an exception. Anything else is printed with its
bytes in hex and ends the run with status 1. Seeds are real streams of every protocol and random programs of opcodes.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pickle
import pickletools
import random
import struct
import sys
import time
from typing import Any

from trainguard.scan import second_opinion
from trainguard.scan.budget import Meter, OverBudget
from trainguard.scan.limits import ScanPolicy
from trainguard.scan.machine import PICKLE, TORCH_ZIP, Loader, Machine, Trace
from trainguard.scan.rules import Refused
from trainguard.scan.second_opinion import Inert, Opinion
from trainguard.scan.source import BytesSource
from trainguard.scan.trust import Trust
from trainguard.scan.values import Global
from trainguard.testing import forge

POLICY = ScanPolicy(operations=20_000, values=20_000, seconds=2.0)
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


class _PythonWatcher(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The Python unpickler with stubs."""

    def find_class(self, module: str, name: str) -> Any:
        self.opinion.globals.append((module, name))
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        if not self.persistent:
            raise pickle.UnpicklingError("a persistent id")
        self.opinion.persistent += 1
        return self.inert


def python_reads(data: bytes, *, persistent: bool) -> Opinion:
    """As second_opinion.read, by the Python unpickler."""
    file = io.BytesIO(data)
    unpickler = _PythonWatcher(file, encoding="latin-1")
    unpickler.opinion, unpickler.inert, unpickler.persistent = Opinion(), Inert(), persistent
    try:
        unpickler.load()
    except Exception as error:
        unpickler.opinion.error = f"{type(error).__name__}: {error}"[:200]
    unpickler.opinion.end = file.tell()
    return unpickler.opinion


def machine_reads(data: bytes, loader: Loader) -> Trace | None:
    """The machine's trace when it finds nothing wrong at all, else None."""
    unlisted: list[Global] = []
    machine = Machine(
        BytesSource(data),
        0,
        loader=loader,
        trust=TRUST,
        meter=Meter(POLICY),
        on_unlisted=lambda name, use, offset: unlisted.append(name),
        on_nested=lambda source, offset: None,
    )
    try:
        trace = machine.run()
    except (Refused, OverBudget):
        return None
    return None if unlisted else trace


TRUST = Trust(POLICY)


def seeds() -> list[tuple[bytes, Loader]]:
    """Streams to start from."""
    values: list[Any] = [
        {"a": [1, 2.5, None, True, "x", b"y", (1, 2, 3, 4)], 5: {6, 7}, (1, "t"): frozenset({1})},
        collections.OrderedDict(a=1, b=[2]),
        [collections.Counter("abc"), collections.deque([1], 3), collections.defaultdict(list, {1: [1]})],
        argparse.Namespace(a=1, b=datetime.timedelta(1)),
        [1 << 70, -1, 255, 65535, 1 << 31, "ä€", "\n", 1e300, complex(1, 2), slice(1), range(2)],
        bytearray(b"abc"),
    ]
    made = [(pickle.dumps(value, protocol=protocol), PICKLE) for value in values for protocol in range(6)]
    tensor = forge.call(
        forge.named("torch._utils", "_rebuild_tensor_v2"),
        forge.value(("storage", forge.named("torch", "FloatStorage"), "0", "cpu", 4)) + b"Q",
        0,
        (4,),
        (1,),
        False,
        forge.call(forge.named("collections", "OrderedDict")),
    )
    made += [(forge.stream(forge.value({"w": tensor}), protocol), TORCH_ZIP) for protocol in (2, 3, 4, 5)]
    return made


def snippet(chance: random.Random) -> bytes:
    """One random opcode with a plausible argument."""
    names = [("collections", "OrderedDict"), ("argparse", "Namespace"), ("builtins", "set"), ("torch", "Size")]
    pick = chance.randrange(14)
    if pick == 0:
        return forge.named(*chance.choice(names))
    if pick == 1:
        return forge.stack_named(*chance.choice(names))
    if pick == 2:
        return b"h" + bytes((chance.randrange(8),))
    if pick == 3:
        return b"q" + bytes((chance.randrange(8),))
    if pick == 4:
        return forge.text(chance.choice(("a", "", "é", "__class__")))
    if pick == 5:
        return b"\x95" + struct.pack("<Q", chance.randrange(20))
    if pick == 6:
        return b"I%d\n" % chance.choice((0, 1, -5, 77))
    if pick == 7:
        return b"p%d\n" % chance.randrange(4)
    if pick == 8:
        return b"\x8a\x01" + bytes((chance.randrange(256),))
    if pick == 9:
        return chance.choice((b"S'a'\n", b"Vab\n", b"F1.5\n", b"U\1a", b"C\1a", b"\x8c\1a", b"L12L\n"))
    if pick == 10:
        return b"\x80" + bytes((chance.randrange(7),))
    return chance.choice(OPCODES)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: a byte, a cut, a copy, or opcodes put in."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] = chance.randrange(256)
        elif kind == 1:
            del changed[place : place + chance.randint(1, 4)]
        elif kind == 2:
            other = chance.randrange(len(changed) + 1)
            changed[place:place] = changed[other : other + chance.randint(1, 12)]
        elif kind == 3 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        else:
            changed[place:place] = snippet(chance)
        if not changed:
            changed += b"N."
    return bytes(changed)


def program(chance: random.Random) -> bytes:
    """A random program of up to 30 opcodes."""
    head = b"\x80" + bytes((chance.randrange(6),)) if chance.random() < 0.8 else b""
    return head + b"".join(snippet(chance) for _ in range(chance.randint(1, 30))) + b"."


def divergence(data: bytes, loader: Loader) -> tuple[bool, str | None]:
    """(whether the machine calls it safe, how an unpickler reads it differently)."""
    trace = machine_reads(data, loader)
    if trace is None:
        return False, None
    stream, persistent = data[: trace.end], bool(loader.storage_parts)
    for name, reader in (("C", second_opinion.read), ("Python", python_reads)):
        why = second_opinion.disagreement(trace, 0, reader(stream, persistent=persistent))
        if why:
            return True, f"{name}: {why}"
    return True, None


def fuzz(seconds: float, seed: int, mutants: int = 1 << 62) -> dict[str, Any]:
    """Run for so long, or so many; counts of mutants, safe ones and divergences, with the first divergences."""
    chance, start = random.Random(seed), seeds()
    counts: dict[str, Any] = {"mutants": 0, "safe": 0, "by_opinion": 0, "divergences": []}
    until = time.monotonic() + seconds
    while counts["mutants"] < mutants and time.monotonic() < until:
        data, loader = chance.choice(start)
        mutant = mutate(data, chance) if chance.random() < 0.8 else program(chance)
        counts["mutants"] += 1
        safe, why = divergence(mutant, loader)
        counts["safe"] += safe
        if why and why.startswith("C:"):
            # The scan asks the C unpickler itself and refuses: caught, but counted, for the machine should know.
            counts["by_opinion"] += 1
            counts.setdefault("caught", []).append((mutant.hex(), why))
        elif why:
            counts["divergences"].append((mutant.hex(), why))
        elif safe and len(start) < 2000 and chance.random() < 0.05:
            start.append((mutant, loader))
    return counts


def main() -> int:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts = fuzz(options.seconds, options.seed)
    print({key: value if isinstance(value, int) else len(value) for key, value in counts.items()})
    for data, why in [*counts["divergences"], *counts.get("caught", [])][:20]:
        print(why, data)
    return 1 if counts["divergences"] else 0


if __name__ == "__main__":
    sys.exit(main())
