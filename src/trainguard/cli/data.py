"""`trainguard data add|list|withdraw|prove|verify`: where training data comes from, and what of it was used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from trainguard.cli.verdict import is_path
from trainguard.errors import Misuse
from trainguard.home import Home


@click.group("data")
def command() -> None:
    """Sources of training data: signed entries in the log. Content decides, never names."""


@command.command("add")
@click.option("--licence", "--license", required=True, help="Licence or its SPDX id.")
@click.option("--use", required=True, help="What it may be used for, such as training or evaluation.")
@click.option("--terms", help="Other terms: a contract, an address.")
@click.option("--name", help="What to call this shard; PATH if not given.")
@click.option("--rows", metavar="FIRST:END", help="Only these rows of the file, as the job's data set counts them.")
@click.option("--json", "as_json", is_flag=True, help="Print the entry as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.argument("source")
@click.argument("path", type=click.Path(path_type=Path))
def adding(
    licence: str,
    use: str,
    terms: str | None,
    name: str | None,
    rows: str | None,
    as_json: bool,
    quiet: bool,
    source: str,
    path: Path,
) -> int:
    """Register the file or folder PATH as data of SOURCE. Reads all of it."""
    from trainguard.sources.register import add, parse_rows

    added = add(
        Home.find(),
        source=source,
        path=path,
        licence=licence,
        use=use,
        terms=terms,
        name=name,
        rows=parse_rows(rows) if rows is not None else None,
    )
    if as_json:
        _document({"schema": "trainguard/data-added/v1", "entry": added.entry, "notes": added.notes})
    elif not quiet:
        from trainguard.render.data import added_lines

        click.echo("\n".join(added_lines(added)))
    return 0


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print them as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
def listing(as_json: bool, quiet: bool) -> int:
    """Every source with its shards. Exit status: 0, or 3 where an entry cannot be read."""
    from trainguard.archive import LogLeaves
    from trainguard.sources.register import listed, read_register

    home = Home.find()
    register = read_register(LogLeaves(home), home)
    sources = listed(register)
    if as_json:
        told = [{"source": one.name, "withdrawn": one.withdrawn, "shards": one.added} for one in sources]
        _document({"schema": "trainguard/data/v1", "sources": told, "problems": register.problems})
    elif not quiet:
        from trainguard.render.data import list_lines

        click.echo("\n".join(list_lines(sources, register.problems)))
    return 3 if register.problems else 0


@command.command("withdraw")
@click.option("--reason", required=True, help="Why it may not be used any more.")
@click.option("--json", "as_json", is_flag=True, help="Print the entry as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.argument("source")
def withdrawing(reason: str, as_json: bool, quiet: bool, source: str) -> int:
    """Record that SOURCE may not be used from now on. This cannot be undone."""
    from trainguard.sources.register import withdraw

    entry = withdraw(Home.find(), source=source, reason=reason)
    if as_json:
        _document({"schema": "trainguard/data-withdrawn/v1", "entry": entry})
    elif not quiet:
        click.echo(f"{source}: withdrawn at {entry.when} (leaf {entry.leaf})")
    return 0


@command.command("prove")
@click.option("--not-used", "source", required=True, metavar="SOURCE", help="The source in question.")
@click.option("--since-withdrawal", is_flag=True, help="Ask only about batches after the source was withdrawn.")
@click.option("--assume-native", multiple=True, metavar="PACKAGE", help="Take it that its native code read no data.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Sign the answer, log it, and write it here.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("subject")
def proving(
    source: str,
    since_withdrawal: bool,
    assume_native: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    quiet: bool,
    subject: str,
) -> int:
    """Show from the log that SOURCE was not used by SUBJECT, a run or a checkpoint, nor by what it was made from.

    Exit status: 0 not used, 1 used, 3 cannot be told.
    """
    from trainguard.digest import write_durably
    from trainguard.sources.answer import ask, sign_answer

    home = Home.find()
    which: dict[str, Any] = {"checkpoint": Path(subject)} if is_path(home, subject) else {"run": home.find_run(subject)}
    answer = ask(home, source=source, since_withdrawal=since_withdrawal, assume_native=assume_native, **which)
    if output is not None:
        write_durably(output.absolute(), sign_answer(home, answer))
    if as_json:
        _document(answer)
    elif not quiet:
        from trainguard.render.data import answer_lines

        click.echo("\n".join(answer_lines(answer)))
        if output is not None:
            click.echo(f"signed and logged; written to {output}")
    return answer.exit_status


@command.command("verify")
@click.option(
    "--key", "key_path", type=click.Path(path_type=Path), help="Public key (PEM); this machine's if not given."
)
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("file", type=click.Path(path_type=Path))
def verifying(key_path: Path | None, quiet: bool, file: Path) -> int:
    """Check a signed answer: the signature, and where its log is here, that the log still holds what it rests on.

    Exit status: 0 it holds, 1 it does not, 3 it cannot be read.
    """
    from trainguard.envelope import load_public_key
    from trainguard.errors import Unavailable
    from trainguard.sources.answer import ANSWER_LIMIT_BYTES, recheck, verify_answer

    home = Home.find()
    try:
        with file.open("rb") as opened:
            data = opened.read(ANSWER_LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{file}: signed answer cannot be read: {error.strerror}") from error
    key = load_public_key(key_path if key_path is not None else home.keys / "attestation.pub")
    answer = verify_answer(data, [key], where=str(file))
    said = "the log here holds every row it names" if recheck(home, answer) else "there is no log here to look it up in"
    if not quiet:
        click.echo(
            f"{file}: {answer.source}, {answer.subject}: {answer.answer.replace('_', ' ')}; signature holds; {said}"
        )
    return 0


def _document(value: object) -> None:
    if isinstance(value, dict) and not value:
        raise Misuse("nothing to print")
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
