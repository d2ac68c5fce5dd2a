"""README and the formats people build on say what the code does: verbs, words, levels, every field, a real example."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from trainguard.appraise.verdict import EXIT_STATUS, Coverage, Verdict
from trainguard.cli import VERBS
from trainguard.finding import Finding, LinkState, Subject
from trainguard.render.words import LEVELS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
VERDICT = (ROOT / "spec" / "verdict.md").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_readme_shows_every_verb(verb: str):
    """Nobody has to find a verb by chance."""
    assert re.search(rf"`{verb}\b|trainguard {verb}\b|, `{verb}\b", README)


def test_readme_names_no_verb_that_does_not_exist():
    """Nor is one promised."""
    named = set(re.findall(r"trainguard ([a-z]+)\b", "\n".join(re.findall(r"^    trainguard .*", README, re.M))))
    assert named <= set(VERBS)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_of_the_readme_leads_somewhere(link: str):
    """Files move; the first page must not point into nothing."""
    assert (ROOT / link).exists()


@pytest.mark.parametrize("word", EXIT_STATUS)
def test_every_word_is_explained_with_its_exit_status(word: str):
    """In the README and, with the number, in the specification."""
    assert f"**{word}**" in README
    row = next(line for line in VERDICT.splitlines() if line.startswith(f"| `{word}`"))
    assert row.rstrip(" |").endswith(f"| {EXIT_STATUS[word]}")


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_in_the_readme_and_the_specification(level: str):
    """One table, three places, the same levels."""
    assert f"| {level} |" in README
    assert f"| {level} |" in (ROOT / "spec" / "levels.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *(field for kind in (Verdict, Finding, LinkState, Subject) for field in kind.__struct_fields__),
        *(f"coverage.{field}" for field in Coverage.__struct_fields__),
    ],
)
def test_every_field_of_the_document_is_specified(name: str):
    """A field nobody wrote down is one nobody can rely on."""
    assert f"`{name}`" in VERDICT or f"`{name}." in VERDICT


def test_the_example_in_the_specification_is_a_verdict():
    """It decodes strictly, encodes to the same values, and its word follows from its finding."""
    (example,) = re.findall(r"```json\n(.*?)```", VERDICT, re.S)
    verdict = msgspec.json.decode(example, type=Verdict)
    assert msgspec.json.decode(msgspec.json.encode(verdict)) == msgspec.json.decode(example)
    assert verdict.verdict == "TAINTED"
    assert verdict.findings[0].outcome == "violated"
