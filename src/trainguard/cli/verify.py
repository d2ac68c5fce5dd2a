"""`trainguard verify PATH`: is a checkpoint what was sealed, and the one that should be here."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.cli._progress import working
from trainguard.home import Home


@click.command("verify")
@click.option("--key", type=click.Path(path_type=Path), help="Public key (PEM) that must have signed it.")
@click.option(
    "--signers",
    type=click.Path(path_type=Path),
    help="Trust file: whose keys may have signed it, and from when to when.",
)
@click.option("--log-key", help="Public key (vkey, or a file with it) of the log that must hold it.")
@click.option("--run", help="Run it must be of.")
@click.option("--newest", is_flag=True, help="It must be the newest checkpoint of its run.")
@click.option("--json", "as_json", is_flag=True, help="Print the report.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("path", type=click.Path(path_type=Path))
def command(
    key: Path | None,
    signers: Path | None,
    log_key: str | None,
    run: str | None,
    newest: bool,
    as_json: bool,
    quiet: bool,
    path: Path,
) -> int:
    """Verify PATH against its seal and the log, naming the files and tensors that changed.

    Exit status: 0 is what was sealed, 1 is not, 3 could not tell.
    """
    from trainguard.seal import verify_seal

    home = Home.find()
    with working(f"verifying {path}", shown=not quiet):
        report = verify_seal(path, home=home, key=key, signers=signers, log_key=log_key, run=run, newest=newest)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    elif not quiet:
        from trainguard.render.verify import verify_lines

        print("\n".join(verify_lines(report)))
    return report.exit_status
