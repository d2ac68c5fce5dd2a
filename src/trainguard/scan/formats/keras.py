"""Keras 3 archives (`config.json`, `metadata.json`, `model.weights.h5`) and the model configs inside HDF5 files.

A config is a tree of {module, class_name, config, registered_name}. Only classes listed here, from Keras' own modules,
are believed; a Lambda layer carries code, and so do classes that wrap other frameworks or fetch files
(CVE-2025-1550, -8747, -9905, -9906, -12058, -49655).
"""

from __future__ import annotations

import functools
import json
from typing import Any

from trainguard.scan.formats import jsons
from trainguard.scan.formats.interface import Job
from trainguard.scan.formats.zips import Member, judge_member, open_member
from trainguard.scan.trust import LISTS
from trainguard.scan.verdict import Verdict

CONFIG_BYTES = 16 << 20
CODE = frozenset(
    (
        "Lambda",
        "__lambda__",
        "TorchModuleWrapper",
        "TFSMLayer",
        "FlaxLayer",
        "JaxLayer",
        "StringLookup",
        "IntegerLookup",
        "TextVectorization",
        "HashedCrossing",
        "function",
        "__typespec__",
        "Operation",
        "CustomObjectScope",
    )
)
"""Classes that run code of the file or open other files."""


@functools.cache
def _known() -> tuple[frozenset[str], frozenset[str]]:
    data = json.loads((LISTS / "keras.json").read_text())
    return frozenset(data["modules"]), frozenset(data["classes"])


def judge_zip(job: Job, members: list[Member]) -> tuple[str, str]:
    """Judge a `.keras` archive: the config by its classes, every other member like a file."""
    for member in members:
        if member.name == "config.json" and member.size > CONFIG_BYTES:
            job.unknown("keras", f"a config of {member.size} bytes, limit {CONFIG_BYTES}")
        elif member.name == "config.json":
            inner = job.inside(member.name, open_member(job, member))
            try:
                judge_config(inner, jsons.parse(inner.source.read(0, inner.source.size), job.policy))
            except (jsons.BadJson, jsons.TooBig) as error:
                inner.unsafe("keras", f"config: {error or 'too large'}")
        else:
            judge_member(job, member)
    return "keras", "keras"


def judge_config(job: Job, value: Any) -> None:
    """Every class a config names must be a listed one of Keras."""
    modules, classes = _known()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        if not isinstance(item, dict):
            continue
        pending.extend(item.values())
        name = item.get("class_name")
        if not isinstance(name, str):
            if name is not None:
                job.unsafe("keras", f"class_name: expected a name, found {str(name)[:80]!a}")
            continue
        module, registered = item.get("module"), item.get("registered_name")
        if name in CODE or (isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins", "tf_keras")):
            job.unsafe("keras", f"layer {str(module)[:80]}.{name[:80]} carries or imports code")
        elif name not in classes or (module is not None and module not in modules):
            _unlisted(job, module, name)
        elif isinstance(registered, str) and registered not in (name, "Functional", "Sequential") and ">" in registered:
            _unlisted(job, None, registered)


def _unlisted(job: Job, module: Any, name: str) -> None:
    full = f"{module}.{name}" if isinstance(module, str) else name
    job.note(Verdict.UNKNOWN, "keras", f"names {full[:120]!a}, which is on no list", global_name=full, use="call")
