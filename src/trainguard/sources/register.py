"""The register of data sources: signed entries in the log, in their order (spec/data.md).

Two acts: `add` (a shard of a source, its licence or terms, what it may be used for) and `withdraw` (the source is not
to be used from then on, and why). Nothing is taken out again: a source that was withdrawn stays withdrawn.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from trainguard.archive import LogLeaves
from trainguard.digest import sha256_hex
from trainguard.envelope import load_or_create_key, sign_statement, statement
from trainguard.errors import MalformedEvidence, Misuse, TrainguardError
from trainguard.finding import Citation
from trainguard.home import Home
from trainguard.log import Log
from trainguard.sources.shard import Shard, parse_shard, read_shard

PREDICATE = "data/v1"
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
TEXT_LIMIT = 500


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One `data/v1` statement as it stands in the log."""

    leaf: int
    entry: str
    """SHA-256 of the log entry, hex."""
    action: Literal["add", "withdraw"]
    source: str
    at: str
    """Clock of the registering host, nanoseconds since the epoch, decimal."""
    by: dict[str, Any] = {}
    """Host and account that registered it, as that host said."""
    shard: str | None = None
    manifest: str | None = None
    """SHA-256 of the shard's manifest, kept as a blob."""
    licence: str | None = None
    terms: str | None = None
    use: str | None = None
    reason: str | None = None
    """Of a withdrawal."""
    rows: tuple[int, int] | None = None
    files: int = 0
    bytes: int = 0

    @property
    def citation(self) -> Citation:
        """For answers that rest on it."""
        return Citation(leaf=self.leaf, hash=self.entry)

    @property
    def when(self) -> str:
        """UTC, RFC 3339."""
        return time_text(int(self.at))


@dataclass(slots=True)
class Source:
    """One source with its shards."""

    name: str
    added: list[Entry] = field(default_factory=list)
    shards: dict[str, Shard] = field(default_factory=dict)
    """Manifest digest → shard."""
    withdrawn: Entry | None = None
    """The first withdrawal."""


@dataclass(slots=True)
class Register:
    """Everything that was registered in one log."""

    sources: dict[str, Source] = field(default_factory=dict)
    contents: dict[str, list[tuple[Source, Shard, Entry]]] = field(default_factory=dict)
    """SHA-256 of a file → what it was registered as; one content may be of several sources."""
    problems: list[str] = field(default_factory=list)
    """Entries that cannot be used, one sentence each."""

    def of(self, name: str) -> Source:
        """The source `name`. Raises Misuse for one that was never registered."""
        try:
            return self.sources[name]
        except KeyError:
            known = ", ".join(sorted(self.sources)[:8]) or "none"
            raise Misuse(
                f"source {name[:200]!r}: expected one that is registered, found {known}",
                next_step="trainguard data add SOURCE PATH --licence L --use U",
            ) from None


def read_register(leaves: LogLeaves, home: Home) -> Register:
    """The register in a log that was read and verified. A manifest that is gone or altered is a problem, no error."""
    register = Register()
    for body in leaves.data:
        try:
            entry = msgspec.convert(body, Entry)
            if not (entry.at.isascii() and entry.at.isdigit() and len(entry.at) < 20):
                raise MalformedEvidence(f"leaf {entry.leaf}: expected a time in nanoseconds")
            _take(register, entry, home)
        except (msgspec.ValidationError, TrainguardError) as error:
            register.problems.append(f"leaf {body.get('leaf')}: {error}")
    return register


def _take(register: Register, entry: Entry, home: Home) -> None:
    source = register.sources.setdefault(entry.source, Source(entry.source))
    if entry.action == "withdraw":
        source.withdrawn = source.withdrawn or entry
        return
    source.added.append(entry)
    if entry.manifest is None:
        raise MalformedEvidence("an added shard names no manifest")
    shard = parse_shard(home.blob(entry.manifest), where=f"manifest {entry.manifest[:16]}")
    source.shards[entry.manifest] = shard
    for digest, size in shard.contents.items():
        if size:  # every empty file has the same content
            register.contents.setdefault(digest, []).append((source, shard, entry))


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What `add` did."""

    entry: Entry
    shard: Shard
    notes: tuple[str, ...] = ()
    """What the person who registers should know: content that is registered already, or left out."""


def add(
    home: Home,
    *,
    source: str,
    path: Path,
    licence: str,
    use: str,
    terms: str | None = None,
    name: str | None = None,
    rows: tuple[int, int] | None = None,
) -> Added:
    """Register the shard at `path` as of `source`: signed, in the log. Reads all of its bytes.

    Raises Misuse for a source that was withdrawn, for a name no source can have, or a path that is no data.
    """
    _checked(source, licence=licence, use=use, terms=terms, name=name)
    home.prepare()
    known = _known(home)
    old = known.sources.get(source)
    if old is not None and old.withdrawn is not None:
        raise Misuse(
            f"source {source}: withdrawn at {old.withdrawn.when} (leaf {old.withdrawn.leaf}): nothing is added to it",
            next_step="register data that came by another right under a source name of its own",
        )
    shard = read_shard(path, name=name, rows=rows)
    body = {
        "action": "add",
        "source": source,
        "shard": shard.name,
        "manifest": home.store_blob(shard.encode()),
        "licence": licence,
        "terms": terms,
        "use": use,
        "rows": list(rows) if rows is not None else None,
        "files": len(shard.files),
        "bytes": sum(shard.contents.values()),
    }
    entry = _log(home, body, f"data/{source}/{shard.name}", body["manifest"])
    return Added(entry=entry, shard=shard, notes=(*_doubles(known, source, shard), *shard.left_out))


def withdraw(home: Home, *, source: str, reason: str) -> Entry:
    """Record that `source` is not to be used any more, now. Raises Misuse where it is unknown or withdrawn already."""
    _checked(source, reason=reason)
    home.prepare()
    known = _known(home).of(source)
    if known.withdrawn is not None:
        raise Misuse(f"source {source}: withdrawn already, at {known.withdrawn.when} (leaf {known.withdrawn.leaf})")
    body = {"action": "withdraw", "source": source, "reason": reason}
    return _log(home, body, f"data/{source}", sha256_hex(source.encode()))


def _known(home: Home) -> Register:
    if not (home.log / "journal").is_dir():
        return Register()
    return read_register(LogLeaves(home), home)


def _doubles(known: Register, source: str, shard: Shard) -> list[str]:
    """Other sources that hold some of this content already; a withdrawn one counts on under any name."""
    found: dict[str, int] = {}
    for digest in shard.contents:
        for other in {entry[0].name for entry in known.contents.get(digest, ())} - {source}:
            found[other] = found.get(other, 0) + 1
    said = []
    for other, count in found.items():
        gone = known.sources[other].withdrawn is not None
        tail = ", which was withdrawn: its use still counts as use of that source" if gone else ""
        said.append(f"{count} of {len(shard.contents)} contents are registered as of {other} too{tail}")
    return said


def _log(home: Home, body: Mapping[str, Any], name: str, digest: object) -> Entry:
    by = {"host": platform.node(), "uid": os.getuid()}
    whole = {key: value for key, value in {**body, "at": str(time.time_ns()), "by": by}.items() if value is not None}
    key = load_or_create_key(home.keys / "attestation.pem")
    entry = sign_statement(statement(PREDICATE, whole, [{"name": name, "digest": {"sha256": str(digest)}}]), key)
    with Log.open(home.log, home.keys / "log.key") as log:
        [leaf] = log.append([entry])
        log.publish()
    return msgspec.convert({**whole, "leaf": leaf, "entry": sha256_hex(entry)}, Entry)


def _checked(source: str, **texts: str | None) -> None:
    if SOURCE_NAME.fullmatch(source) is None:
        raise Misuse(f"source {source[:80]!r}: expected letters, digits and . _ : / @ + -, at most 200 characters")
    for what, text in texts.items():
        if text is not None and not (0 < len(text) <= TEXT_LIMIT and text.isprintable()):
            raise Misuse(f"{what}: expected 1 to {TEXT_LIMIT} printable characters, found {text[:40]!r}")


def time_text(ns: int) -> str:
    """A time in nanoseconds since the epoch as UTC, RFC 3339, to the second."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_rows(text: str) -> tuple[int, int]:
    """`FIRST:END`. Raises Misuse for anything else."""
    found = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
    if found is None:
        raise Misuse(f"--rows {text[:40]!r}: expected FIRST:END, such as 0:5000")
    return int(found[1]), int(found[2])


def listed(register: Register) -> Sequence[Source]:
    """All sources by name."""
    return [register.sources[name] for name in sorted(register.sources)]
