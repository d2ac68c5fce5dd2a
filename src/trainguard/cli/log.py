"""`trainguard log head|show|prove|verify`: the transparency log (spec/log.md)."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from trainguard.errors import Misuse, TrainguardError, Unavailable, VerificationError
from trainguard.home import Home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from trainguard.log import LogReader
    from trainguard.log.note import Verifier

ENTRY_LIMIT_BYTES = 65535
PROGRESS_AFTER_SECONDS = 1.0
_OUTCOMES = {0: "upheld", 1: "violated", 3: "not_checked"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Which log, by which key."""

    folder: Path
    vkey: str

    def reader(self) -> LogReader:
        from trainguard.log import LogReader

        if not self.folder.is_dir():
            raise Misuse(f"{self.folder}: no log here", next_step="record a run first: trainguard run -- CMD")
        return LogReader(self.folder, self.vkey)

    @property
    def verifier(self) -> Verifier:
        from trainguard.log import load_verifier

        return load_verifier(self.vkey)


@click.group("log")
@click.option("--log", "folder", type=click.Path(path_type=Path), help="Folder of the log, if not the home's.")
@click.option("--vkey", help="Public key of the log: its text or a file; by default the one in the home.")
@click.pass_context
def command(context: click.Context, folder: Path | None, vkey: str | None) -> None:
    """The transparency log: what was acknowledged cannot be taken back or rewritten unseen.

    Needs no private key. Exit status: 0 upheld, 1 violated, 2 usage error, 3 could not tell.
    """
    home = Home.find()
    context.obj = _Place(folder or home.log, vkey or str(home.keys / "log.vkey"))


@command.command("head")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-o", "output", type=click.Path(path_type=Path), help="Keep the signed head in this file, elsewhere.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.pass_obj
def head_command(place: _Place, as_json: bool, output: Path | None, quiet: bool) -> None:
    """The signed tree head after the last entry, verified.

    Keep one where the log's host cannot write (-o), and compare later: trainguard log verify --head FILE.
    """
    from trainguard.render.log import head_text

    head = place.reader().head()
    if output is not None:
        _write(output, head.note.encode())
    if as_json:
        _print_json(
            schema="trainguard/log-head/v1", origin=head.origin, size=head.size, root=head.root.hex(), note=head.note
        )
    elif not quiet:
        _print(head_text(head, place.verifier.key_id))


@command.command("show")
@click.argument("start", type=click.IntRange(min=0), required=False)
@click.argument("end", type=click.IntRange(min=0), required=False)
@click.option("--run", help="Only statements about this run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", is_flag=True, help="Print only the indexes.")
@click.pass_obj
def show_command(
    place: _Place, start: int | None, end: int | None, run: str | None, as_json: bool, quiet: bool
) -> None:
    """Entries START up to END, END not included; one entry without END; all without both."""
    from trainguard.log.contents import describe
    from trainguard.render.log import entry_lines

    reader, keys = place.reader(), _attestation_keys()
    first, last = start or 0, reader.head().size
    if start is not None:
        last = end if end is not None else start + 1
    shown = (describe(index, entry, keys) for index, entry in enumerate(reader.entries(first, last), first))
    shown = (entry for entry in shown if run is None or entry.run == run)
    if as_json:
        _print_json(schema="trainguard/log-entries/v1", size=reader.head().size, entries=list(shown))
    elif quiet:
        _print_lines(f"{entry.index}\n" for entry in shown)
    else:
        _print_lines(entry_lines(shown))


@command.command("prove")
@click.argument("index", type=click.IntRange(min=0))
@click.option("-o", "output", type=click.Path(path_type=Path), help="Write the proof here, as NAME.tlog-proof.")
@click.option("--entry", "entry_path", type=click.Path(path_type=Path), help="Write the entry's bytes here too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.pass_obj
def prove_command(
    place: _Place, index: int, output: Path | None, entry_path: Path | None, as_json: bool, quiet: bool
) -> None:
    """A C2SP tlog-proof that entry INDEX is in the log, for checking anywhere, offline; on stdout without -o."""
    from trainguard.log import encode_proof
    from trainguard.render.log import proof_text

    reader = place.reader()
    proof = reader.inclusion(index)
    text = encode_proof(proof)
    if entry_path is not None:
        _write(entry_path, next(iter(reader.entries(index, index + 1))))
    if output is not None:
        _write(output, text.encode())
    if as_json:
        _print_json(schema="trainguard/log-proof/v1", index=index, size=reader.head().size, proof=text)
    elif output is None:
        _print(text)
    elif not quiet:
        _print(proof_text(proof, reader.head()))


@command.command("verify")
@click.option("--proof", "proof_path", type=click.Path(path_type=Path), help="Check this .tlog-proof instead.")
@click.option("--entry", "entry_path", type=click.Path(path_type=Path), help="The entry's bytes that it is about.")
@click.option("--head", "head_path", type=click.Path(path_type=Path), help="Also: the log extends this kept head.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.pass_obj
def verify_command(
    place: _Place,
    proof_path: Path | None,
    entry_path: Path | None,
    head_path: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Audit the log in full: every entry, tile, journal record and signed head.

    With --proof and --entry: check that proof offline, with the log's public key and nothing else.
    """
    if (proof_path is None) != (entry_path is None):
        raise Misuse("expected --proof and --entry together", next_step="see: trainguard log verify --help")
    if proof_path is not None and head_path is not None:
        raise Misuse("expected --head without --proof: a kept head is compared with the log, not with a proof")
    try:
        if proof_path is not None and entry_path is not None:
            text, fields = _verify_proof(place, proof_path, entry_path)
        else:
            text, fields = _audit(place, head_path)
    except (VerificationError, Unavailable) as error:
        if as_json:
            _print_outcome(error.exit_status, str(error), {})
        raise
    if as_json:
        _print_outcome(0, "", fields)
    elif not quiet:
        _print(text)
    return 0


def _audit(place: _Place, head_path: Path | None) -> tuple[str, dict[str, Any]]:
    """The full audit, in words and as fields."""
    from trainguard.log.tree_head import verify_tree_head
    from trainguard.render.log import audit_text, extends_text

    reader = place.reader()
    kept = None
    if head_path is not None:
        kept = verify_tree_head(_read(head_path, 1 << 20), place.verifier, where=str(head_path))
        if kept.size > reader.head().size:
            raise VerificationError(
                f"{place.folder}: {reader.head().size} entries, the kept head {head_path} has {kept.size}: cut back"
            )
        if reader.root_at(kept.size) != kept.root:
            raise VerificationError(f"{place.folder}: does not extend the kept head {head_path}: the log was forked")
    with _progress() as progress:
        audit = reader.verify(progress)
    fields = {
        "size": audit.head.size,
        "root": audit.head.root.hex(),
        "published": audit.published,
        "tiles": audit.tiles,
        "records": audit.records,
        "torn_bytes": audit.torn_bytes,
        "extends": None if kept is None else kept.size,
    }
    return audit_text(audit, place.verifier.key_id) + (extends_text(kept) if kept else ""), fields


def _verify_proof(place: _Place, proof_path: Path, entry_path: Path) -> tuple[str, dict[str, Any]]:
    """One proof file, in words and as fields."""
    from trainguard.log.proof import PROOF_LIMIT_BYTES, parse_proof, verify_proof
    from trainguard.render.log import proof_text

    proof = parse_proof(_read(proof_path, PROOF_LIMIT_BYTES), where=str(proof_path))
    head = verify_proof(proof, _read(entry_path, ENTRY_LIMIT_BYTES), place.verifier, where=str(proof_path))
    return proof_text(proof, head), {"index": proof.index, "size": head.size, "root": head.root.hex()}


def _attestation_keys() -> list[ec.EllipticCurvePublicKey]:
    """The home's attestation key, if it can be read; without it signatures are shown as not checked."""
    from trainguard.envelope import load_public_key

    try:
        return [load_public_key(Home.find().keys / "attestation.pub")]
    except TrainguardError:
        return []


@contextlib.contextmanager
def _progress() -> Any:
    """A callback that keeps one line on stderr, on a terminal, once the work takes longer than a second; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from trainguard.render.log import progress_text

    began, shown = time.monotonic(), False

    def update(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - began > PROGRESS_AFTER_SECONDS:
            shown = True
            sys.stderr.write(f"\r{progress_text(done, total)}\x1b[K")
            sys.stderr.flush()

    callback: Callable[[int, int], None] = update
    try:
        yield callback
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")


def _read(path: Path, limit: int) -> bytes:
    from trainguard.log.tree import read_file

    try:
        return read_file(path, limit)
    except FileNotFoundError as error:
        raise Misuse(f"{path}: no such file") from error


def _write(path: Path, data: bytes) -> None:
    from trainguard.digest import write_durably

    write_durably(path, data)


def _print(text: str) -> None:
    sys.stdout.write(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        _print(line)


def _print_json(**fields: Any) -> None:
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")


def _print_outcome(status: int, message: str, fields: dict[str, Any]) -> None:
    _print_json(schema="trainguard/log-audit/v1", outcome=_OUTCOMES[status], message=message or None, **fields)
