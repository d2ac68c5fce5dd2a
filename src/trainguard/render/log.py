"""The transparency log in words: its head, its entries, an audit. Values in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trainguard.log import Audit, Proof, TreeHead
from trainguard.log.contents import Entry
from trainguard.render.line import plain

_SIGNED = {True: "signed", False: "NOT SIGNED by a known key", None: "signature not checked"}


def head_text(head: TreeHead, key_id: int) -> str:
    """The signed tree head, its signature line and what was checked."""
    return (
        f"log   {plain(head.origin)}\n"
        f"size  {head.size} {_entries(head.size)}\n"
        f"root  {head.root.hex()}\n"
        f"key   {key_id:08x}, signature verified\n"
    )


def entry_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """One line an entry: index, kind, run, summary."""
    for entry in entries:
        yield entry_line(entry) + "\n"


def entry_line(entry: Entry) -> str:
    """`12  segment/v1  run charlm  segment 3, count 40  (signed)`, or size and digest of what is no statement."""
    if entry.statement is None:
        return f"{entry.index:>6}  {entry.bytes} bytes, SHA-256 {entry.sha256}"
    parts = [f"{entry.index:>6}", plain(entry.statement, 60)]
    if entry.run is not None:
        parts.append(f"run {plain(entry.run, 60)}")
    if entry.summary is not None:
        parts.append(plain(entry.summary, 200))
    return "  ".join([*parts, f"({_SIGNED[entry.signed]})"])


def audit_text(audit: Audit, key_id: int) -> str:
    """What an audit that upheld has looked at."""
    torn = f"; {audit.torn_bytes} bytes of an append that was cut off, never acknowledged" if audit.torn_bytes else ""
    return (
        f"upheld: log {plain(audit.head.origin)}, {audit.head.size} {_entries(audit.head.size)}, key {key_id:08x}\n"
        f"  {audit.tiles} tile files ({audit.published} {_entries(audit.published)} published), "
        f"{audit.records} journal records{torn}\n"
        f"  root {audit.head.root.hex()}\n"
    )


def extends_text(kept: TreeHead) -> str:
    """That the log holds a head kept elsewhere."""
    return f"  extends the tree head of size {kept.size} that was kept elsewhere\n"


def proof_text(proof: Proof, head: TreeHead) -> str:
    """What a proof that upheld shows."""
    return f"upheld: entry {proof.index} is in log {plain(head.origin)} of size {head.size}\n"


def progress_text(done: int, total: int) -> str:
    """For a terminal's last line while an audit runs."""
    return f"audited {done:,} of {total:,} entries"


def _entries(count: int) -> str:
    return "entry" if count == 1 else "entries"
