"""Replay points: everything a training process would need to go on from here, as plain bytes in the run's own folder.

    RUN/points/p<process>-step-<n>/data         raw bytes of tensors, one after another, each at a multiple of 64
    RUN/points/p<process>-step-<n>/index.json   {"version": 1, "step", "tensors": [[name, dtype, [shape], offset,
                                                 bytes]], "numbers": {name: number}, "python": […], "numpy": […]}

Names: `param/<root>/<name>`, `buffer/<root>/<name>`, `loose/<opt>/<position>` (a parameter of no module),
`state/<opt>/<position>/<key>` (also under `numbers`), `rng/torch`, `rng/cuda/<device>`. Never a pickle. The process
says `point`; the supervisor's side hashes the files and logs the digests (replay/points.py reads and checks them).

When: as often as the budget of time and storage allows (settings `points_percent`, `points_mb`), never closer than
LEAST steps; once the storage is full every other point goes and the distance doubles, so a run of any length keeps a
bounded number, evenly spread.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

from . import roots, sample, shares
from .client import Client

if TYPE_CHECKING:
    from .engine import Step

LEAST = 10
GUESSED_BYTES_PER_SECOND = 5e8
ALIGN = 64


class Writer:
    """Decides when a point is due and writes it."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.folder = str(client.settings.get("points") or "")
        self.share = float(client.settings.get("points_percent", 0.5)) / 100.0
        self.limit = int(float(client.settings.get("points_mb", 512)) * (1 << 20))
        self.fixed = int(client.settings.get("points_every") or 0)
        """Distance in steps where the settings fix it."""
        self.at = frozenset(client.settings.get("points_at") or ())
        """Exactly these steps and no others: in a replay."""
        self.every = 0
        self.cost_ns = 0.0
        self.wall_ns = 0.0
        self.size = 0
        self.kept: List[Tuple[int, str, int]] = []
        """(step, folder, bytes) of every point that is still there."""

    def ahead(self, number: int) -> int:
        """Steps from step `number` on until one that a point may be due at; 1 where the very next may be."""
        if not self.folder:
            return 1 << 30
        if self.at or not self.every:
            return 1
        return self.every - number % self.every

    def offer(self, step: Step, spent_ns: int) -> None:
        """A step has ended: write a point if one is due."""
        if not self.folder:
            return
        if self.at:
            if step.number in self.at:
                self._write(step)
            return
        if step.wall_ns and step.number > 2:
            self.wall_ns += (step.wall_ns - self.wall_ns) * (0.1 if self.wall_ns else 1.0)
        if not self.every and step.number >= (self.fixed or LEAST) - 1:
            self.every = self.fixed or self._distance(step)
        if not self.every or step.number % self.every:
            return
        began = time.perf_counter_ns()
        written = self._write(step)
        self.cost_ns = float(time.perf_counter_ns() - began)
        if written:
            self._settle(step)

    def _distance(self, step: Step) -> int:
        """Steps between points that the budget of time allows; 0 where not even one fits the storage."""
        self.size = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(step))
        if self.size > self.limit:
            self.client.send("point", {"none": "one point is %d bytes, the limit %d" % (self.size, self.limit)})
            self.folder = ""
            return 0
        cost = self.size / GUESSED_BYTES_PER_SECOND * 1e9
        steps = max(LEAST, -(-(int(cost / max(self.share * self.wall_ns, 1.0)) + 1) // LEAST) * LEAST)
        if shares.world(step.torch)[1] == 1:
            return steps
        every = LEAST
        while every < steps:
            every *= 2  # so that points of ranks that measured other times still lie at common steps
        return every

    def _write(self, step: Step) -> bool:
        name = "p%d-step-%08d" % (int(self.client.settings.get("process", 0)), step.number)
        folder = os.path.join(self.folder, name)
        try:
            os.makedirs(folder + ".part", mode=0o700, exist_ok=True)
            size = write(step, folder + ".part")
            os.rename(folder + ".part", folder)
        except OSError as error:
            shutil.rmtree(folder + ".part", ignore_errors=True)
            self.client.send("point", {"none": "cannot be written: %s" % error.strerror}, step.number)
            self.folder = ""
            return False
        self.kept.append((step.number, folder, size))
        self.client.send("point", {"name": name, "bytes": size}, step.number)
        return True

    def _settle(self, step: Step) -> None:
        """Keep to the storage: drop every other point and double the distance; adapt to what writing really cost."""
        if not self.fixed and self.cost_ns > 2 * self.share * self.wall_ns * self.every:
            self.every *= 2
        while sum(size for _, _, size in self.kept) + self.size > self.limit and len(self.kept) > 1:
            self.every *= 2
            gone = [point for point in self.kept if point[0] % self.every]
            self.kept = [point for point in self.kept if not point[0] % self.every]
            for _, folder, _ in gone:
                shutil.rmtree(folder, ignore_errors=True)
            self.client.send("point", {"dropped": [number for number, _, _ in gone]}, step.number)
            if not gone:
                return


def write(step: Step, folder: str) -> int:
    """Write the state after `step` into `folder`; returns how many bytes."""
    torch = step.torch
    lines: List[List[Any]] = []
    offset = 0
    with open(os.path.join(folder, "data"), "wb", buffering=0) as file:
        for name, tensor in _tensors(step):
            plain = sample.plain(tensor.detach()).cpu().contiguous()
            nbytes = plain.numel() * plain.element_size()
            lines.append([name, str(plain.dtype)[6:], list(plain.shape), offset, nbytes])
            if nbytes:
                _put(file, ctypes.string_at(plain.data_ptr(), nbytes) if nbytes < 4096 else _memory(plain, nbytes))
            spare = -nbytes % ALIGN
            if spare:
                _put(file, b"\0" * spare)
            offset += nbytes + spare
    index = {"version": 1, "step": step.number, "tensors": lines, "numbers": _numbers(step), **_streams(torch)}
    data = json.dumps(index, separators=(",", ":")).encode()
    with open(os.path.join(folder, "index.json"), "wb", buffering=0) as file:
        _put(file, data)
    return offset + len(data)


def _put(file: Any, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _memory(tensor: Any, nbytes: int) -> Any:
    return (ctypes.c_char * nbytes).from_address(tensor.data_ptr())


def named(torch: Any, engine: Any) -> List[Tuple[str, Any]]:
    """Parameters and buffers of every root module, in an order that a second process of the same script repeats.

    Roots with a trained parameter are numbered from 0; others (a teacher, an average) are x0, x1, …, since whether one
    that nobody uses any more is still there is up to the garbage collector.
    """
    trained = {id(entry.param) for _, _, track in optimizers(engine) for entry in track.entries}
    found: List[Tuple[str, Any]] = []
    numbers = {"": 0, "x": 0}
    for root in roots.roots():
        kind = "" if any(id(param) in trained for param in root.parameters()) else "x"
        key = "%s%d" % (kind, numbers[kind])
        numbers[kind] += 1
        found.extend(("param/%s/%s" % (key, name), tensor) for name, tensor in root.named_parameters())
        found.extend(("buffer/%s/%s" % (key, name), tensor) for name, tensor in root.named_buffers())
    return [(name, tensor) for name, tensor in found if _has_values(torch, tensor)]


def _has_values(torch: Any, tensor: Any) -> bool:
    """Dense, and not only a shape: a skeleton on the meta device has none."""
    return tensor.layout is torch.strided and not tensor.is_meta


def optimizers(engine: Any) -> List[Tuple[int, Any, Any]]:
    """(index, optimizer, track) of every live optimizer, in order of first step."""
    alive = [(track.opt, track.ref(), track) for track in list(engine.tracks.values())]
    return sorted(((opt, optimizer, track) for opt, optimizer, track in alive if optimizer is not None), key=_first)


def _first(item: Tuple[int, Any, Any]) -> int:
    return item[0]


def loose(torch: Any, engine: Any, known: List[Tuple[str, Any]]) -> List[Tuple[str, Any]]:
    """Parameters that an optimizer holds and no root module does."""
    held = {id(tensor) for _, tensor in known}
    return [
        ("loose/%d/%d" % (opt, entry.position), entry.param)
        for opt, _, track in optimizers(engine)
        for entry in track.entries
        if id(entry.param) not in held and _has_values(torch, entry.param)
    ]


def _tensors(step: Step) -> List[Tuple[str, Any]]:
    torch = step.torch
    found = named(torch, step.engine)
    found += loose(torch, step.engine, found)
    for opt, optimizer, track in optimizers(step.engine):
        for entry in track.entries:
            for key, value in (optimizer.state.get(entry.param) or {}).items():
                if isinstance(value, torch.Tensor) and _has_values(torch, value):
                    found.append(("state/%d/%d/%s" % (opt, entry.position, key), value))
    found.append(("rng/torch", torch.default_generator.get_state()))
    if torch.cuda.is_initialized():
        found.extend(("rng/cuda/%d" % i, each.get_state()) for i, each in enumerate(torch.cuda.default_generators))
    return found


def _numbers(step: Step) -> Dict[str, Any]:
    return {
        "state/%d/%d/%s" % (opt, entry.position, key): value
        for opt, optimizer, track in optimizers(step.engine)
        for entry in track.entries
        for key, value in (optimizer.state.get(entry.param) or {}).items()
        if isinstance(value, (int, float))
    }


def _streams(torch: Any) -> Dict[str, Any]:
    import random
    import sys

    version, inner, gauss = random.getstate()
    out: Dict[str, Any] = {"python": [version, list(inner), gauss], "numpy": None}
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        kind, keys, place, has_gauss, cached = numpy.get_state()
        out["numpy"] = [kind, [int(key) for key in keys], int(place), int(has_gauss), float(cached)]
    return out
