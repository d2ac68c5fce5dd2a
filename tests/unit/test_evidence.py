"""Spool lines: an exact format with one writer and one strict reader."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainguard.errors import MalformedEvidence
from trainguard.evidence import Evidence, chain_start, decode_lines, encode_line, unfold

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def spool(bodies: list[dict], run: str = "r") -> bytes:
    chain, lines = chain_start(run), []
    for n, body in enumerate(bodies):
        line, chain = encode_line(Evidence(n=n, at=n, source="process", kind="step", body=body, step=n + 1), chain)
        lines.append(line)
    return b"".join(lines)


@given(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), max_size=5))
def test_decoding_inverts_encoding(bodies: list[dict]) -> None:
    """What was written is what is read, with position and step."""
    records = list(decode_lines(spool(bodies), chain_start("r"), first=0, leaf=7))
    assert [r.body for r in records] == bodies
    assert [(r.n, r.step, r.leaf) for r in records] == [(n, n + 1, 7) for n in range(len(bodies))]


@given(st.data())
def test_any_flipped_bit_is_refused(data: st.DataObject) -> None:
    """One flipped bit anywhere in a spool never decodes to records."""
    original = spool([{"a": 1}, {"b": "text"}, {}])
    position = data.draw(st.integers(0, len(original) - 1))
    flipped = bytearray(original)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(MalformedEvidence):
        list(decode_lines(bytes(flipped), chain_start("r"), first=0))


def test_a_spool_of_another_run_is_refused() -> None:
    """The chain starts from the run id, so records cannot be moved between runs."""
    with pytest.raises(MalformedEvidence, match="does not follow"):
        list(decode_lines(spool([{}], "a"), chain_start("b"), first=0))


def test_a_cut_line_is_refused_and_says_where() -> None:
    """A line without its newline was cut."""
    with pytest.raises(MalformedEvidence, match="spool record 1"):
        list(decode_lines(spool([{}, {}])[:-1], chain_start("r"), first=0))


def test_a_record_over_the_limit_is_refused() -> None:
    """One record is at most 1 MiB."""
    with pytest.raises(MalformedEvidence, match="limit 1048576"):
        encode_line(Evidence(n=0, at=0, source="process", kind="x", body={"a": "x" * (1 << 20)}), chain_start("r"))


def test_the_chain_is_what_the_specification_says() -> None:
    """chain_0 = SHA-256(SHA-256("trainguard/spool/v1\\n" || run) || JSON)."""
    line = spool([{}])
    start = hashlib.sha256(b"trainguard/spool/v1\nr").digest()
    assert line[:64].decode() == hashlib.sha256(start + line[65:-1]).hexdigest()


def test_steps_that_travel_together_come_apart_again() -> None:
    """One record for each step, cited as the record they came in."""
    rows = [[5, 0, 3, 2, 20, 4], [7, 1, 1, 1, 9, 3, {"rng": {"seed": 1}}]]
    folded = Evidence(n=9, at=9, source="process", kind="steps", body={"level": 6, "rows": rows}, step=7, hash="ab")
    out = list(unfold(folded))
    assert [(e.kind, e.step, e.hash, e.body["opt"], e.body["index"], e.body["wall_ns"]) for e in out] == [
        ("step", 5, "ab", 0, 3, 10),
        ("step", 6, "ab", 0, 4, 10),
        ("step", 7, "ab", 1, 1, 9),
    ]
    assert out[2].body["rng"] == {"seed": 1}
    assert all(e.body["checked"] is False for e in out)
    other = Evidence(n=0, at=0, source="process", kind="bye")
    assert list(unfold(other)) == [other]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"level": 1, "rows": None},
        {"level": None, "rows": []},
        {"level": 1, "rows": [[1, 0, 1, 1, 0]]},
        {"level": 1, "rows": [[1, 0, 1, 0, 0, 0]]},
        {"level": 1, "rows": [[1, 0, 1, True, 0, 0]]},
        {"level": 1, "rows": [[-1, 0, 1, 1, 0, 0]]},
        {"level": 1, "rows": [[1, 0, 1, 2, 0, 0, {}]]},
        {"level": 1, "rows": [[1, 0, 1, 1, 0, 0, 5]]},
        {"level": 1, "rows": [[1, 0, 1, 1 << 17, 0, 0]]},
    ],
)
def test_a_malformed_record_of_steps_is_refused_whole(body: dict[str, Any]) -> None:
    """Before any step was given out; a row may not stand for more steps than a record may."""
    folded = Evidence(n=9, at=9, source="process", kind="steps", body=body)
    with pytest.raises(MalformedEvidence, match="steps"):
        next(unfold(folded))
