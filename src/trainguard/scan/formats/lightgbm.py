"""LightGBM's text models: a head, trees, and the parameters they were made with (`src/boosting/gbdt_model_text.cpp`).

Nothing in one is code, but LightGBM follows the node numbers it reads without asking whether they lie in the tree. So
the shape is checked: as many nodes, leaves and features as are announced, children inside the tree, and each tree as
long as the head says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainguard.scan.formats.interface import Job

HEAD_LIMIT = 64 << 20
NUMBER = re.compile(r"-?\d{1,9}\Z")
PER_NODE = ("split_feature", "split_gain", "threshold", "decision_type", "left_child", "right_child")
PER_NODE_OPTIONAL = ("internal_value", "internal_weight", "internal_count")
PER_LEAF = ("leaf_value", "leaf_weight", "leaf_count")


class Broken(Exception):
    """Not a model as LightGBM writes it."""


def looks_like_model(start: bytes) -> bool:
    """Whether text begins as LightGBM's models do."""
    return start.startswith((b"tree\nversion=", b"tree\nnum_class="))


def judge(job: Job) -> tuple[str, str]:
    """Judge text that begins as a model does."""
    if job.source.size > HEAD_LIMIT:
        job.unknown("lightgbm", f"a model of {job.source.size} bytes, limit {HEAD_LIMIT}")
        return "lightgbm", "lightgbm"
    try:
        check(job.source.read(0, job.source.size).decode(), job)
    except Broken as error:
        job.unsafe("lightgbm", str(error))
    except UnicodeDecodeError:
        job.unsafe("lightgbm", "text that is not UTF-8")
    return "lightgbm", "lightgbm"


def check(text: str, job: Job | None = None) -> None:
    """Raise Broken unless every tree of the model has the shape it announces."""
    head, found, rest = text.partition("\n\n")
    facts = _fields(head.split("\n")[1:])
    features = _number(facts.get("max_feature_idx", ""), "max_feature_idx") + 1
    if len(facts.get("feature_names", "").split(" ")) != features:
        raise Broken(f"head: {features} features, and another number of names")
    sizes = [_number(size, "tree_sizes") for size in facts.get("tree_sizes", "").split()]
    body, ended, _ = rest.partition("end of trees")
    if not found or not ended:
        raise Broken("ends inside its trees")
    if "tree_sizes" in facts and sum(sizes) != len(body.encode()):
        raise Broken("head: tree_sizes are not those of the trees")
    for number, block in enumerate(_blocks(body)):
        if job is not None:
            job.meter.check_time()
        _check_tree(number, _fields(block), features)


def _blocks(body: str) -> Iterator[list[str]]:
    lines: list[str] = []
    for line in body.split("\n"):
        if line.startswith("Tree="):
            if lines:
                yield lines
            lines = [line]
        elif line:
            lines.append(line)
    if lines:
        yield lines


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition("=")
        if name in fields:
            raise Broken(f"{name[:40]!a} stands twice")
        fields[name] = value
    return fields


def _number(text: str, what: str) -> int:
    if not NUMBER.match(text):
        raise Broken(f"{what}: expected a number, found {text[:40]!a}")
    return int(text)


def _check_tree(number: int, fields: dict[str, str], features: int) -> None:
    where = f"tree {number}"
    if fields.get("Tree") != str(number):
        raise Broken(f"{where}: expected it here, found {fields.get('Tree', '')[:40]!a}")
    leaves = _number(fields.get("num_leaves", ""), f"{where}: num_leaves")
    if leaves < 1:
        raise Broken(f"{where}: {leaves} leaves")
    nodes = leaves - 1
    for names, count, required in (
        (PER_NODE, nodes, True),
        (PER_NODE_OPTIONAL, nodes, False),
        (PER_LEAF[:1], leaves, True),
        (PER_LEAF[1:], leaves, False),
    ):
        for name in names:
            items = fields.get(name, "").split()
            if len(items) != count and (items or required):
                raise Broken(f"{where}: {name} has {len(items)} entries, expected {count}")
    _check_children(where, fields, nodes, leaves)
    for text in fields.get("split_feature", "").split():
        if not 0 <= _number(text, f"{where}: split_feature") < features:
            raise Broken(f"{where}: splits by feature {text}, and there are {features}")
    _check_categories(where, fields)
    _check_linear(where, fields, leaves, features)


def _check_children(where: str, fields: dict[str, str], nodes: int, leaves: int) -> None:
    """Every node but the first, and every leaf, is the child of exactly one node: else a walk may never end."""
    children = [
        _number(text, f"{where}: child")
        for name in ("left_child", "right_child")
        for text in fields.get(name, "").split()
    ]
    if sorted(child for child in children if child >= 0) != list(range(1, nodes)):
        raise Broken(f"{where}: its nodes are no tree")
    if nodes and sorted(~child for child in children if child < 0) != list(range(leaves)):
        raise Broken(f"{where}: its leaves are not each in one place")


def _check_categories(where: str, fields: dict[str, str]) -> None:
    """Sets of categories lie between boundaries: ascending from 0, the last the number of words."""
    count = _number(fields.get("num_cat", "0"), f"{where}: num_cat")
    kinds, thresholds = fields.get("decision_type", "").split(), fields.get("threshold", "").split()
    for kind, threshold in zip(kinds, thresholds, strict=True):
        by_category = _number(kind, f"{where}: decision_type") & 1
        if by_category and not 0 <= _number(threshold, f"{where}: threshold") < count:
            raise Broken(f"{where}: asks for set {threshold} of categories, and there are {count}")
    if not count:
        return
    bounds = [_number(text, f"{where}: cat_boundaries") for text in fields.get("cat_boundaries", "").split()]
    words = fields.get("cat_threshold", "").split()
    if len(bounds) != count + 1 or bounds[0] or bounds != sorted(bounds) or bounds[-1] != len(words):
        raise Broken(f"{where}: its sets of categories do not lie inside its table")


def _check_linear(where: str, fields: dict[str, str], leaves: int, features: int) -> None:
    """Leaves that hold a linear model name as many features and coefficients as they announce."""
    if fields.get("is_linear", "0") == "0":
        return
    counts = [_number(text, f"{where}: num_features") for text in fields.get("num_features", "").split()]
    named = [_number(text, f"{where}: leaf_features") for text in fields.get("leaf_features", "").split()]
    coefficients = fields.get("leaf_coeff", "").split()
    if len(counts) != leaves or min(counts) < 0 or not sum(counts) == len(named) == len(coefficients):
        raise Broken(f"{where}: its leaves do not hold the features they announce")
    if any(not 0 <= feature < features for feature in named):
        raise Broken(f"{where}: a leaf uses a feature that is not there")
