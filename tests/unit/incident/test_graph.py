"""Taint flows down witnessed edges; a claim can cast doubt and never clear; a circle is refused."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainguard.appraise.verdict import Word
from trainguard.errors import MalformedEvidence
from trainguard.incident.claims import parse_claims
from trainguard.incident.graph import RANK, Graph, Node, Packed

WORDS: tuple[Word, ...] = ("VERIFIED", "UNKNOWN", "SUSPECT", "TAINTED")


def graph_of(words: dict[str, Word], *edges: tuple[str, str], claimed: tuple[tuple[str, str], ...] = ()) -> Graph:
    """Artifacts with their own words, and what was made from what."""
    graph = Graph()
    for key, word in words.items():
        graph.add(Node(key=key, kind="artifact", label=key, word=word))
    for source, target in edges:
        graph.join(source, target, witnessed=True)
    for source, target in claimed:
        graph.join(source, target, witnessed=False)
    return graph


def test_a_descendant_of_a_tainted_model_is_tainted_and_an_unrelated_one_stays_verified() -> None:
    graph = graph_of(
        {"base": "TAINTED", "tuned": "VERIFIED", "served": "VERIFIED", "other": "VERIFIED"},
        ("base", "tuned"),
        ("tuned", "served"),
    )
    standings = graph.standings()
    assert standings["served"].word == "TAINTED"
    assert standings["served"].because == ("base", "tuned", "served")
    assert standings["other"].word == "VERIFIED"
    assert standings["other"].because == ("other",)


def test_taint_over_a_claimed_edge_arrives_as_doubt() -> None:
    standings = graph_of({"base": "TAINTED", "copy": "VERIFIED"}, claimed=(("base", "copy"),)).standings()
    assert standings["copy"].word == "SUSPECT"


def test_a_witnessed_edge_outweighs_a_claimed_one_in_either_order() -> None:
    for first in (True, False):
        graph = graph_of({"base": "TAINTED", "copy": "VERIFIED"})
        graph.join("base", "copy", witnessed=first)
        graph.join("base", "copy", witnessed=not first)
        assert graph.standings()["copy"].word == "TAINTED"


def test_what_only_an_edge_names_is_unknown() -> None:
    assert graph_of({"made": "VERIFIED"}, ("never recorded", "made")).standings()["made"].word == "UNKNOWN"


def test_a_circle_of_claims_is_refused_by_name() -> None:
    graph = graph_of({"a": "VERIFIED", "b": "VERIFIED"}, claimed=(("a", "b"), ("b", "a")))
    with pytest.raises(MalformedEvidence, match=r"circle among \['a', 'b'\]"):
        graph.standings()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), st.integers(0, 1 << 32))
def test_every_standing_is_the_worst_of_the_node_and_all_it_was_made_from(words: list[Word], seed: int) -> None:
    """Against a second way to say it: the maximum over all ancestors."""
    draw = random.Random(seed)
    keys = [f"n{index:02}" for index in range(len(words))]
    edges = [(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :] if draw.random() < 0.3]
    graph = graph_of(dict(zip(keys, words, strict=True)), *edges)
    standings = graph.standings()
    own = dict(zip(keys, words, strict=True))
    for key in keys:
        worst = max((own[near] for near in [key, *graph.ancestors(key)]), key=RANK.__getitem__)
        assert standings[key].word == worst
        assert own[standings[key].because[0]] == worst
        assert set(graph.ancestors(key)) == {near for near in keys if key in graph.descendants(near)}


def test_a_circle_names_its_members_alone_and_who_claims_it() -> None:
    """Not what lies behind it."""
    graph = graph_of({"a": "VERIFIED", "behind": "VERIFIED"}, ("b", "behind"))
    graph.join("a", "b", witnessed=False, by="tracker")
    graph.join("b", "a", witnessed=False, by="registry")
    with pytest.raises(MalformedEvidence, match=r"circle among \['a', 'b'\], claimed by registry, tracker"):
        graph.standings()
    with pytest.raises(MalformedEvidence, match=r"circle among \['own'\]"):
        graph_of({"own": "VERIFIED"}, ("own", "own")).standings()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), st.integers(0, 1 << 32))
def test_a_packed_graph_gives_the_same_answers(words: list[Word], seed: int) -> None:
    """Nodes, edges with who claims them, standings and reach."""
    draw = random.Random(seed)
    keys = [f"n{index}" for index in range(len(words) + 1)]
    graph = graph_of(dict(zip(keys, words, strict=False)))
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            if draw.random() < 0.4:
                graph.join(a, b, witnessed=draw.random() < 0.5, by=draw.choice(["", "leaf 3"]))
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(graph.packed()), type=Packed)
    again = Graph.unpacked(packed)
    assert list(again.edges) == list(graph.edges)
    assert again.nodes == graph.nodes
    for key in graph.standings().words:
        assert again.standings()[key] == graph.standings()[key]
        assert again.ancestors(key) == graph.ancestors(key)
        assert again.made_from(key) == graph.made_from(key)
    again.join(keys[0], "later", witnessed=True)
    assert "later" in again.descendants(keys[0])


@pytest.mark.parametrize(
    "change",
    [
        {"keys": ("a", "a")},
        {"keys": ("a",)},
        {"targets": ((2,), ())},
        {"targets": ((-1,), ())},
        {"claimed": {0: (0,)}},
        {"claimed": {7: ()}},
        {"nodes": (Node(key="c", kind="run", label="c"),)},
    ],
)
def test_a_packed_graph_that_no_graph_packs_to_is_refused(change: dict[str, Any]) -> None:
    packed = graph_of({"a": "VERIFIED", "b": "VERIFIED"}, ("a", "b")).packed()
    with pytest.raises(MalformedEvidence, match="lineage: expected"):
        Graph.unpacked(msgspec.structs.replace(packed, **change))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not a claims file"),
        (b'{"schema": "trainguard/claims/v2", "by": "x"}', "expected schema trainguard/claims/v1"),
        (b'{"schema": "trainguard/claims/v1", "by": "x", "edges": [["model", "run:a"]]}', "expected keys as kind:name"),
        (b'{"schema": "trainguard/claims/v1", "by": "x", "edges": [["run:a", "run:a"]]}', "made from itself"),
        (b'{"schema": "trainguard/claims/v1", "by": "x", "verified": true}', "not a claims file"),
    ],
)
def test_claims_that_are_not_as_specified_are_refused(text: bytes, reason: str) -> None:
    with pytest.raises(MalformedEvidence, match=reason):
        parse_claims(text, where="claims.json")


def test_a_claim_about_a_known_artifact_does_not_change_what_is_known() -> None:
    graph = graph_of({"run:a": "VERIFIED"})
    text = b"""{"schema": "trainguard/claims/v1", "by": "tracker", "edges": [["run:a", "release:1"]],
               "nodes": [{"key": "run:a", "kind": "run", "label": "x"},
                         {"key": "release:1", "kind": "release", "label": "1"}]}"""
    parse_claims(text, where="claims.json").join(graph)
    standings = graph.standings()
    assert standings["run:a"].word == "VERIFIED"
    assert standings["release:1"].word == "UNKNOWN"
