"""skops archives: `schema.json` is a tree of nodes that name classes, functions and methods; arrays lie beside it.

Every `__module__`.`__class__` must be on a list of the tier, whatever the loader node calls itself (CVE-2025-54412,
CVE-2025-54413 let a node's label and its real type differ).
"""

from __future__ import annotations

from typing import Any

from trainguard.scan.formats import jsons
from trainguard.scan.formats.interface import Job
from trainguard.scan.formats.zips import BadZip, Member, judge_member, open_member
from trainguard.scan.values import Global

LOADERS = frozenset(
    (
        "DictNode",
        "ListNode",
        "SetNode",
        "TupleNode",
        "ObjectNode",
        "SliceNode",
        "TypeNode",
        "JsonNode",
        "BytesNode",
        "BytearrayNode",
        "NdArrayNode",
        "MaskedArrayNode",
        "RandomStateNode",
        "RandomGeneratorNode",
        "DTypeNode",
        "SparseMatrixNode",
        "TreeNode",
        "BunchNode",
        "CVSplitterNode",
        "LossNode",
        "OrderedDictNode",
        "DefaultDictNode",
        "CachedNode",
    )
)
CODE_LOADERS = frozenset(
    ("FunctionNode", "PartialNode", "MethodNode", "OperatorFuncNode", "ReduceNode", "ConstructorNode")
)


def judge(job: Job, members: list[Member]) -> tuple[str, str]:
    """Judge a skops archive."""
    for member in members:
        if member.name != "schema.json":
            judge_member(job, member)
            continue
        try:
            inner = job.inside(member.name, open_member(job, member))
            _schema(inner, jsons.parse(inner.source.read(0, inner.source.size), job.policy))
        except (BadZip, jsons.BadJson, jsons.TooBig) as error:
            job.unsafe("skops", f"schema: {error or 'too large'}", member.data)
    return "skops", "skops"


def _schema(job: Job, value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        if not isinstance(item, dict):
            continue
        pending.extend(item.values())
        if "__class__" in item or "__loader__" in item:
            _node(job, item)


def _node(job: Job, node: dict[str, Any]) -> None:
    module, name, loader = node.get("__module__"), node.get("__class__"), node.get("__loader__")
    if not isinstance(module, str) or not isinstance(name, str):
        job.unsafe("skops", "a node without its module and class as text")
        return
    full = f"{module}.{name}"
    if loader in CODE_LOADERS:
        job.unlisted(Global(full, None), "call", 0)
    elif loader not in LOADERS:
        job.unsafe("skops", f"node of unknown kind {str(loader)[:60]!a}")
    elif job.trust.find(full) is None:
        job.unlisted(Global(full, None), "instance", 0)
