"""`trainguard doctor`: is this machine set up well?"""

from __future__ import annotations

import sys

import click
import msgspec

from trainguard.cli._view import show
from trainguard.home import Home


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the readings as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
def command(as_json: bool, quiet: bool) -> int:
    """Look at Python, torch, kernel, permissions, disk, clock, and who can write what a job imports.

    Exit status: 0 usable, 1 something must be put right, 3 something could not be told.
    """
    from trainguard.measure.machine import machine

    readings = machine(Home.find().root)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"schema": "trainguard/doctor/v1", "readings": readings}) + b"\n")
    elif not quiet:
        from trainguard.render.checkup import checkup_view

        show(lambda ascii_only: checkup_view(readings, ascii_only=ascii_only))
    states = {reading.state for reading in readings}
    return 1 if "fail" in states else 3 if "unknown" in states else 0
