"""Ranks of a job in tests: made-up records of any number of them, and a script that forks cheap real ones."""

from __future__ import annotations

import base64
import json
import struct
import textwrap
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from trainguard.evidence import Evidence

Gradients = dict[str, list[float]]
"""Name of a tensor → sampled gradient."""

FORKED = """
import os, sys, tempfile, traceback
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks as hooks

WORLD = {world}

def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=WORLD)
    {body}
    dist.destroy_process_group()

store, pids = tempfile.mktemp(), []
os.environ["WORLD_SIZE"] = str(WORLD)
for rank in range(WORLD):  # one import of torch for all of them
    os.environ["RANK"] = str(rank)
    pid = os.fork()
    if pid == 0:
        try:
            work(rank, store)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    pids.append(pid)
sys.exit(max(os.waitpid(pid, 0)[1] for pid in pids) > 0)
"""


def forked(world: int, body: str) -> str:
    """A script of `world` gloo ranks; `body` is the code of each, and knows its `rank`."""
    lines = textwrap.dedent(body).strip("\n")
    return FORKED.format(world=world, body=textwrap.indent(lines, "    ").lstrip())


def process(number: int, rank: int, *, restarts: int = 0, environment: dict[str, str] | None = None) -> Evidence:
    """The hello of a rank."""
    env = {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    body: dict[str, Any] = {"hello": {"env": env}, "of_the_job": True, "ppid": 1}
    if environment is not None:
        body["environment"] = environment
    return Evidence(
        n=0, at=0, source="supervisor", kind="process", body=body, process=number, pid=900 + number, rank=rank
    )


def leave(number: int, rank: int) -> Evidence:
    """The end of a rank."""
    return Evidence(n=0, at=0, source="supervisor", kind="exit", body={}, process=number, pid=900 + number, rank=rank)


def frame(rank: int, index: int, *, process: int | None = None, **links: Any) -> Evidence:
    """A step frame of a rank; its process has the rank's number unless told."""
    body = {"opt": 0, "index": index, "checked": True} | links
    number = rank if process is None else process
    return Evidence(
        n=index, at=index, source="process", kind="step", body=body, process=number, rank=rank, step=index, seq=index
    )


def round_of(rank: int, world: int, index: int, *, process: int | None = None, **held: Any) -> Evidence:
    """A round of a rank: what it holds, where `held` does not say otherwise the same on all."""
    value = {"rank": rank, "world": world, "round": index // 5, "weights": f"{index:08x}" * 2, "whole": [index, index]}
    value |= {"state": f"{index:08x}", "hyper": "0" * 8, "buffers": "", "names": ["a", "b"]} | held
    return frame(rank, index, process=process, replicas=value)


def reduced(rank: int, world: int, index: int, local: Gradients, used: Gradients, **said: Any) -> Evidence:
    """A checked step of a rank: its gradients after backward and those it used, at the same places.

    said: further entries of link *gradients*.
    """
    names = list(local)
    before = [x for name in names for x in (*([0.0] * len(local[name])), *used[name], *local[name])]
    after = [0.0] * sum(map(len, local.values()))
    sample = {
        "class": ["torch.optim.sgd.SGD", "torch.optim.sgd.SGD", "torch.optim.sgd.SGD.step"],
        "hyper": {"0": {"lr": 0.1, "n": len(names)}},
        "extra": [],
        "left_out": {},
        "tensors": [[n, 0, i, 1000, "float32", "cpu"] for i, n in enumerate(names)],
        "at": [[0, 1, len(local[n])] for n in names],
        "grad": [True] * len(names),
        "local": [True] * len(names),
        "state": [[] for _ in names],
        "state_after": [[] for _ in names],
        "before": _blob(before),
        "after": _blob(after),
    }
    value = {"armed": True, "calls": [1] * len(names), "world": world} | said
    return frame(rank, index, gradients=value, optimizer=sample)


def all_reduced(
    index: int,
    locals_: Sequence[Gradients],
    shares: Sequence[float] | Callable[[str], Sequence[float]],
    said: Callable[[int], dict[str, Any]] = lambda rank: {},
) -> list[Evidence]:
    """One step of all ranks, reduced with these shares (of every tensor, or by its name)."""
    used = {}
    for name in locals_[0]:
        part = shares(name) if callable(shares) else shares
        used[name] = [
            sum(w * g[name][i] for w, g in zip(part, locals_, strict=True)) for i in range(len(locals_[0][name]))
        ]
    return [reduced(rank, len(locals_), index, local, used, **said(rank)) for rank, local in enumerate(locals_)]


def scattered(
    index: int, locals_: Sequence[Gradients], shares: Sequence[float], odd: int | None = None
) -> list[Evidence]:
    """One step of all ranks that hold shards, reduced with these shares; `odd`: a rank that gathers other weights."""
    world, names = len(locals_), list(locals_[0])
    places = [[name, i % world, [10 * i, 1, len(locals_[0][name])]] for i, name in enumerate(names)]
    records = []
    for rank, local in enumerate(locals_):
        used, weights, held = [], [], []
        for i, name in enumerate(names):
            columns = list(zip(*(each[name] for each in locals_), strict=True))
            weight = [index + i + n / 8 for n in range(len(columns))]
            weights += [1.01 * w for w in weight] if rank == odd else weight
            if i % world == rank:
                used += [sum(s * v for s, v in zip(shares, column, strict=True)) for column in columns]
                held += weight
        value = {"world": world, "rank": rank, "tensors": places, "calls": [1] * len(names)}
        value["local"] = _blob([v for name in names for v in local[name]])
        value |= {"gathered": _blob(weights), "reduced": _blob(used), "held": _blob(held)}
        records.append(frame(rank, index, shards=value, gradients={"armed": True, "world": world}))
    return records


def between(world: int, index: int, olds: Sequence[Gradients], news: Sequence[Gradients]) -> list[Evidence]:
    """Link *weights* of all ranks for the interval before step `index`: sampled weights before and after it."""
    return [between_of(rank, world, index, olds[rank], news[rank]) for rank in range(len(olds))]


def between_of(rank: int, world: int, index: int, old: Gradients, new: Gradients) -> Evidence:
    """The same of one rank."""
    was, now = _digest(old), _digest(new)
    value: dict[str, Any] = {"before": now, "expected": was, "held": was == now}
    value["ranks"] = {"world": world, "was": was, "now": now}
    changed = []
    for name in old:
        if old[name] != new[name]:
            differ = sum(a != b for a, b in zip(old[name], new[name], strict=True))
            entry = {"name": name, "what": "weight", "differ": differ, "of": len(old[name]), "at": [0, 1, 8]}
            changed.append(entry | {"old": _blob(old[name]), "new": _blob(new[name])})
    if changed:
        value["changed"], value["changed_tensors"] = changed, len(changed)
    return frame(rank, index, weights=value)


def _digest(values: Gradients) -> str:
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def _blob(values: Sequence[float]) -> dict[str, str]:
    return {"f": "<d", "b": base64.b64encode(struct.pack(f"<{len(values)}d", *values)).decode()}
