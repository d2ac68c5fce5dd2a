"""Notes that say whose copy they are: every member's own, sealed to them alone (spec/case.md, 5).

    content = make("we replay {Monday|Tuesday} on {node-3|node-9}", cards, author)
    mine(content, identity)                       # "we replay Tuesday on node-3"
    trace(content, author_key, leaked, 7, names)  # whose copy that text carries

Every note is stored like this, with alternatives or without, padded to the same sizes, so that a reader cannot tell a
marked one from a plain one. Only its author can open the assignment. What a match shows is whose copy a text came
from: not who passed it on, nor that they meant to.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from trainguard.cases import sealed
from trainguard.cases.identity import Card, Identity
from trainguard.errors import MalformedEvidence, Misuse

SLOT = re.compile(r"\{([^{}|]{1,80}(?:\|[^{}|]{1,80})+)\}")
TEXT_LIMIT = 2000
COMBINATIONS = 4096
"""Of which the copies are chosen as far apart as they go."""
COPY_BYTES = 512
OWN_BYTES = 4096


class Match(msgspec.Struct, frozen=True, kw_only=True):
    """How well one member's copy of one note fits a text."""

    note: int
    """Number of its record."""
    name: str
    key: str
    fits: int
    """Marks of this copy that the text carries."""
    of: int
    """Marks of the note that the text decides: those of which it carries exactly one alternative."""


def make(template: str, cards: Mapping[str, Card], author: Card) -> dict[str, Any]:
    """The content of a note: a sealed copy for each of `cards`, and the assignment sealed to `author`.

    Raises Misuse where the alternatives are too few for that many copies, or hide in each other.
    """
    text = template.strip()
    if not text or len(text) > TEXT_LIMIT or not text.replace("\n", " ").isprintable():
        raise Misuse(f"case note: expected 1 to {TEXT_LIMIT} printable characters")
    slots = [tuple(part.strip() for part in match.split("|")) for match in SLOT.findall(text)]
    for slot in slots:
        _check(slot)
    chosen = _assign(slots, len(cards))
    assigned = dict(zip(cards, chosen, strict=True))
    copies = {key: _seal(_filled(text, assigned[key]), card, COPY_BYTES) for key, card in cards.items()}
    own = json.dumps({"template": text, "assigned": assigned})
    return {"copies": copies, "own": _seal(own, author, OWN_BYTES)}


def mine(content: Any, identity: Identity) -> str | None:
    """The caller's copy; None where there is none for them."""
    copies = content.get("copies") if isinstance(content, dict) else None
    text = copies.get(identity.key) if isinstance(copies, dict) else None
    return _open(text, identity.sealing)


def trace(content: Any, key: X25519PrivateKey, text: str, note: int, names: Mapping[str, str]) -> list[Match]:
    """How well each copy of a note fits `text`; empty where the note carries no marks or is not the caller's."""
    own = _open(content.get("own") if isinstance(content, dict) else None, key)
    if own is None:
        return []
    try:
        stored = json.loads(own)
        template, assigned = str(stored["template"]), dict(stored["assigned"])
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedEvidence(f"note {note}: its assignment cannot be read: {error}") from error
    slots = [tuple(part.strip() for part in match.split("|")) for match in SLOT.findall(template)]
    leaked = _plain(text)
    carried = [[word for word in slot if _carries(leaked, word)] for slot in slots]
    decided = [at for at, words in enumerate(carried) if len(words) == 1]
    return [
        Match(
            note=note,
            name=names.get(one, one[:16]),
            key=one,
            fits=sum(words[at] == carried[at][0] for at in decided),
            of=len(decided),
        )
        for one, words in assigned.items()
        if decided
    ]


def settled(matches: Sequence[Match]) -> Match | None:
    """The one copy that fits in every mark of its note while no other does; None where that is open."""
    whole = [match for match in matches if match.fits == match.of]
    return whole[0] if len(whole) == 1 else None


def _check(slot: tuple[str, ...]) -> None:
    plain = [_plain(word) for word in slot]
    for one, other in itertools.permutations(plain, 2):
        if not one or _carries(other, one):
            raise Misuse(f"case note: alternatives must be told apart: {one!r} is part of {other!r}")


def _assign(slots: Sequence[tuple[str, ...]], count: int) -> list[list[str]]:
    """`count` different choices from the slots, as far from each other as they go."""
    if not slots:
        return [[] for _ in range(count)]
    total = 1
    for slot in slots:
        total *= len(slot)
    if total < count:
        raise Misuse(
            f"case note: its alternatives make {total} copies, {count} members need one each",
            next_step="add alternatives: {Monday|Tuesday|Friday}, or further marks",
        )
    random = secrets.SystemRandom()
    if total <= COMBINATIONS:
        pool = [list(words) for words in itertools.product(*slots)]
    else:
        pool = [list(words) for words in {tuple(random.choice(slot) for slot in slots) for _ in range(COMBINATIONS)}]
    random.shuffle(pool)
    chosen = [pool.pop()]
    while len(chosen) < count:
        best = max(pool, key=lambda words: min(_apart(words, other) for other in chosen))
        pool.remove(best)
        chosen.append(best)
    random.shuffle(chosen)
    return chosen


def _apart(one: Sequence[str], other: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _filled(template: str, words: Sequence[str]) -> str:
    waiting = iter(words)
    return SLOT.sub(lambda _: next(waiting), template)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _carries(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(_plain(word))}(?!\w)", text) is not None


def _seal(text: str, card: Card, step: int) -> str:
    data = text.encode()
    framed = len(data).to_bytes(4, "big") + data
    return sealed.seal_to(framed.ljust(-(-len(framed) // step) * step, b"\0"), card.mailbox)


def _open(text: object, key: X25519PrivateKey) -> str | None:
    plain = sealed.open_from(text, key) if isinstance(text, str) else None
    if plain is None:
        return None
    return plain[4 : 4 + int.from_bytes(plain[:4], "big")].decode("utf-8", "replace")
