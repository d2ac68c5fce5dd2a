"""torch's zip checkpoints (torch/serialization.py, _save): `<root>/data.pkl` and `<root>/data/<key>`, all stored.

What must hold besides the zip rules: one root folder, the first member's; exactly one `data.pkl`; only members torch
writes; every storage the pickle names has a record of just its size, and no record is without a name.
"""

from __future__ import annotations

import re

from trainguard.scan import claims
from trainguard.scan.formats import zips
from trainguard.scan.formats.interface import Job
from trainguard.scan.formats.zips import BadZip, Member
from trainguard.scan.machine import TORCH_ZIP, Trace
from trainguard.scan.source import PartSource, Source

SMALL = {"version": 16, "byteorder": 16, ".format_version": 16, ".storage_alignment": 16, ".data/serialization_id": 64}
"""Members torch writes beside the pickle → the most bytes they may have."""
BYTE_ORDERS = (b"little", b"big")
KEY = re.compile(r"data/[A-Za-z0-9_.-]{1,64}\Z")


def judge(job: Job, members: list[Member]) -> tuple[str, str]:
    """Judge the archive as torch.load reads it."""
    root, slash, _ = members[0].name.partition("/")
    if not slash:
        job.unsafe("torch-zip", f"member {members[0].name!a}: expected everything in one folder")
        return "torch-zip", "torch"
    prefix = root + "/"
    outside = [member for member in members if not member.name.startswith(prefix)]
    for member in outside:
        job.unsafe("torch-zip", f"member {member.name!a}: outside the folder {root!a} that torch reads", member.data)
    records = (
        {member.name[len(prefix) :]: member for member in members if member not in outside}
        if outside
        else {member.name[len(prefix) :]: member for member in members}
    )
    packed = next((member for member in members if member.method != zips.STORED), None)
    if packed is not None:
        job.unsafe("torch-zip", f"member {packed.name!a} is compressed; torch never compresses", packed.data)
        return "torch-zip", "torch"
    if _is_script(records):
        return _judge_script(job, records)
    pickled = records.get("data.pkl")
    if pickled is None:
        job.unsafe("torch-zip", "no data.pkl in the folder that torch reads")
        return "torch-zip", "torch"
    trace = _judge_pickle(job, pickled)
    _check_records(job, records, trace.storages if trace else None)
    if trace:
        claims.check(job, trace.claims, lambda key: _storage(job, records, key))
    return "torch-zip", "torch"


def _storage(job: Job, records: dict[str, Member], key: str) -> Source | None:
    """The bytes of a storage, where they are there and little-endian."""
    order, record = records.get("byteorder"), records.get(f"data/{key}")
    big = order is not None and job.source.read(order.data, min(order.size, 16)) != b"little"
    return None if big or record is None else PartSource(job.source, record.data, record.size)


def _judge_pickle(job: Job, member: Member) -> Trace | None:
    """What data.pkl names; None when it is unsafe."""
    from trainguard.scan.formats.pickles import judge_stream

    inner = job.inside(member.name, PartSource(job.source, member.data, member.size))
    try:
        zips.check_crc(inner.source, member)
    except BadZip as error:
        job.unsafe("zip", str(error), member.data)
        return None
    trace = judge_stream(inner, 0, TORCH_ZIP)
    if trace is None:
        return None
    if trace.end != inner.source.size:
        inner.unsafe("trailing", f"{inner.source.size - trace.end} bytes behind the pickle", trace.end)
    return trace


def _check_records(job: Job, records: dict[str, Member], storages: dict[str, int] | None) -> None:
    """Every member is one torch writes, and records and storages match one to one."""
    wanted = {f"data/{key}": size for key, size in (storages or {}).items()}
    for name, member in records.items():
        if name in wanted or name == "data.pkl":
            continue
        if name in SMALL:
            _check_small(job, name, member)
        elif KEY.match(name):
            if storages is not None:
                job.unknown("torch-zip", f"record {name!a} that data.pkl does not name", member.data)
        else:
            job.unsafe("torch-zip", f"member {name!a}: torch writes none of that name", member.data)
    for name, size in wanted.items():
        record = records.get(name)
        if record is None:
            job.unsafe("torch-zip", f"record {name!a} is missing")
        elif record.size != size:
            job.unsafe("geometry", f"record {name!a}: {record.size} bytes, data.pkl says {size}", record.data)


def _check_small(job: Job, name: str, member: Member) -> None:
    content = job.source.read(member.data, min(member.size, 128))
    fits = member.size <= SMALL[name] and content.strip().isalnum()
    if name == "byteorder":
        fits = content in BYTE_ORDERS
    if not fits:
        job.unsafe("torch-zip", f"member {name!a}: unexpected content {content[:40]!r}", member.data)


def _is_script(records: dict[str, Member]) -> bool:
    return "constants.pkl" in records or any(name.startswith("code/") for name in records)


def _judge_script(job: Job, records: dict[str, Member]) -> tuple[str, str]:
    """TorchScript: its code runs in torch's interpreter when the model is used, so a person must know it."""
    job.unknown("torchscript", "TorchScript archive: it carries code of its own, which no list can vet")
    for name, member in records.items():
        if name.endswith(".pkl"):
            from trainguard.scan.formats.pickles import acts_like_pickle

            inner = job.inside(member.name, PartSource(job.source, member.data, member.size))
            why = acts_like_pickle(inner)
            if why and "torch" not in why:
                inner.unsafe("torchscript", why)
    return "torchscript", "torch.jit"
