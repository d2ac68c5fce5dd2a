"""`trainguard seal PATH`: sign a checkpoint file or folder and enter it in the log."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.cli._progress import working
from trainguard.digest import file_sha256
from trainguard.home import Home


@click.command("seal")
@click.option("--run", help="Run the checkpoint belongs to.")
@click.option("--step", type=click.IntRange(min=0), help="Optimizer steps done when it was saved.")
@click.option("--lock", type=click.Path(path_type=Path), help="Lock file the run ran against.")
@click.option("--hash", "hash_type", type=click.Choice(["sha256", "blake3"]), default="sha256", help="File digests.")
@click.option("--live", metavar="ALGORITHM:HEX", help="Digest taken while the file was written, to compare with.")
@click.option("--json", "as_json", is_flag=True, help="Print the report.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
@click.argument("path", type=click.Path(path_type=Path))
def command(
    run: str | None,
    step: int | None,
    lock: Path | None,
    hash_type: str,
    live: str | None,
    as_json: bool,
    quiet: bool,
    path: Path,
) -> int:
    """Seal PATH: the bundle goes to PATH/model.sig for a folder, to PATH.sig beside a file.

    Exit status: 0 sealed, 1 sealed as differing from what was saved, 3 not sealed or at odds with an older seal.
    """
    from trainguard.seal import seal_path

    with working(f"sealing {path}", shown=not quiet):
        report = seal_path(
            Home.find(),
            path,
            run=run,
            step=step,
            lock=file_sha256(lock) if lock is not None else None,
            live_digest=live,
            hash_type=hash_type,
        )
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    elif not quiet:
        from trainguard.render.verify import seal_lines

        print("\n".join(seal_lines(report)))
    return report.exit_status
