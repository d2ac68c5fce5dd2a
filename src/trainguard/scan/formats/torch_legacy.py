"""torch's format before 1.6 (torch/serialization.py, _legacy_save), still written with one argument.

pickle: magic · pickle: version · pickle: {endianness, sizes} · pickle: the object · pickle: storage keys
then for every key, in order: elements (int64) and the bytes. Nothing behind.
"""

from __future__ import annotations

from trainguard.scan import claims
from trainguard.scan.formats.interface import Job
from trainguard.scan.machine import PICKLE, TORCH_LEGACY, Loader, Trace
from trainguard.scan.source import PartSource
from trainguard.scan.values import Map


def judge(job: Job, position: int) -> tuple[str, str]:
    """Judge the four pickles after the magic, which ends at `position`, and the storages that must fill the rest."""
    traces: list[Trace] = []
    begin = position
    sections: tuple[Loader, ...] = (PICKLE, PICKLE, TORCH_LEGACY, PICKLE)
    from trainguard.scan.formats.pickles import LEGACY_VERSION, judge_stream

    for loader in sections:
        trace = judge_stream(job, position, loader)
        if trace is None:
            return "torch-legacy", "torch"
        traces.append(trace)
        position = trace.end
    if traces[0].value != LEGACY_VERSION:
        job.unsafe("torch-legacy", f"version section: expected {LEGACY_VERSION}", begin)
    info = traces[1].value.text_keys() if type(traces[1].value) is Map else None
    if info is None or info.get("little_endian") is not True:
        job.unsafe("torch-legacy", "system section: expected a dict with little_endian True", traces[0].end)
    _check_storages(job, traces[2], traces[3].value, position)
    return "torch-legacy", "torch"


def _check_storages(job: Job, trace: Trace, keys: object, position: int) -> None:
    if type(keys) is not list or sorted(map(repr, keys)) != sorted(map(repr, trace.storages)):
        job.unsafe("torch-legacy", "storage list: expected exactly the keys the object names", position)
        return
    places: dict[str, PartSource] = {}
    for key in keys:
        size = trace.storages[key]
        numel = int.from_bytes(job.source.read(position, 8), "little", signed=True)
        if numel < 0 or (size % numel if numel else size) or position + 8 + size > job.source.size:
            job.unsafe("geometry", f"storage {key!a}: {numel} elements where the object says {size} bytes", position)
            return
        places[key] = PartSource(job.source, position + 8, size)
        position += 8 + size
    if position != job.source.size:
        job.unsafe("trailing", f"{job.source.size - position} bytes behind the last storage", position)
    claims.check(job, trace.claims, places.get)
