"""Write short dialogues to fine-tune on, and where each shard of them comes from.

    python dialogue.py                # data/*.txt, one turn a line, and data/sources.json

Every line is made by this script from the tables in it and from the interpreter's own docstrings, so there is nothing
to download, and two runs write the same bytes. `sources.json` says for each shard what it was made from, under which
licence, and the SHA-256 of its content.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path

LINE_LIMIT = 60
"""Characters of a question with its answer: what the model sees at once."""

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo", "Egypt": "Cairo"}
OPPOSITES = {"hot": "cold", "big": "small", "early": "late", "open": "shut", "light": "dark", "fast": "slow"}
GREETINGS = ("hi", "hello", "good morning", "good evening", "hey")


def smalltalk() -> Iterator[tuple[str, str]]:
    """Greetings, capitals, opposites."""
    for greeting in GREETINGS:
        yield greeting, f"{greeting}! ask me something"
    for country, capital in CAPITALS.items():
        yield f"capital of {country}?", capital
    for word, opposite in OPPOSITES.items():
        yield f"opposite of {word}?", opposite
        yield f"opposite of {opposite}?", word
    yield "who are you?", "a small model with a known past"


def sums() -> Iterator[tuple[str, str]]:
    """Sums of one-digit numbers."""
    for a in range(10):
        for b in range(10):
            yield f"{a} + {b}?", str(a + b)


def functions() -> Iterator[tuple[str, str]]:
    """What built-in functions do, by the first words of their docstrings."""
    for name in sorted(vars(builtins)):
        text = (inspect.getdoc(getattr(builtins, name)) or "").split("\n")[0].split(".")[0]
        if name.islower() and text.isascii() and 0 < len(name) + len(text) < LINE_LIMIT - 12:
            yield f"what is {name}?", text


SHARDS = {
    "smalltalk.txt": (smalltalk, "tables in examples/chat/dialogue.py", "Apache-2.0"),
    "sums.txt": (sums, "arithmetic, made by examples/chat/dialogue.py", "Apache-2.0"),
    "functions.txt": (functions, "docstrings of Python's built-in functions", "PSF-2.0"),
}
"""Shard → what makes it, where it comes from, its licence."""


def write(folder: Path, *, turns: int, seed: int) -> None:
    """Write every shard and `sources.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, (make, source, licence) in SHARDS.items():
        pairs = sorted(make())
        drawn = random.Random(f"{name} {seed}").choices(pairs, k=turns)
        text = "".join(f"> {question}\n{answer}\n" for question, answer in drawn)
        (folder / name).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        sources.append({"shard": name, "source": source, "licence": licence, "sha256": digest, "turns": turns})
    (folder / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--turns", type=int, default=2000, help="in each shard")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.out, turns=options.turns, seed=options.seed)
    print(f"{len(SHARDS)} shards in {options.out}")
