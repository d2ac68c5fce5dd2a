"""`trainguard doctor`: is this machine set up well?"""

from __future__ import annotations

import shutil
import sys

import click
import msgspec

from trainguard.cli._session import warn
from trainguard.cli._view import show
from trainguard.errors import Misuse
from trainguard.home import Home


@click.command("doctor")
@click.option("--numerics", is_flag=True, help="Measure how far honest arithmetic differs here; takes minutes.")
@click.option("--python", metavar="PYTHON", help="With --numerics: whose torch is measured; by default ours.")
@click.option("--json", "as_json", is_flag=True, help="Print the readings as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
def command(numerics: bool, python: str | None, as_json: bool, quiet: bool) -> int:
    """Look at Python, torch, kernel, permissions, disk, clock, and who can write what a job imports.

    With --numerics: calibrate this machine, so that runs of another build can be replayed on it and compared by size.

    Exit status: 0 usable, 1 something must be put right, 3 something could not be told.
    """
    if numerics:
        return _numerics(python, as_json=as_json, quiet=quiet)
    if python is not None:
        raise Misuse("--python: expected together with --numerics")
    from trainguard.measure.machine import machine

    readings = machine(Home.find().root)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode({"schema": "trainguard/doctor/v1", "readings": readings}) + b"\n")
    elif not quiet:
        from trainguard.render.checkup import checkup_view

        show(lambda ascii_only: checkup_view(readings, ascii_only=ascii_only))
    states = {reading.state for reading in readings}
    return 1 if "fail" in states else 3 if "unknown" in states else 0


def _numerics(given: str | None, *, as_json: bool, quiet: bool) -> int:
    """Calibrate this machine, keep the result signed, and show it."""
    from trainguard.replay.numerics import calibrate, store

    python = sys.executable if given is None else shutil.which(given)
    if python is None:
        raise Misuse(f"--python {given}: expected a Python interpreter, found no such program")
    calibration = calibrate(python, progress=(lambda _text: None) if quiet or as_json else warn)
    path = store(Home.find(), calibration)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(calibration) + b"\n")
    elif not quiet:
        from trainguard.render.checkup import numerics_view

        show(lambda _ascii_only: numerics_view(calibration, str(path)))
    return 0
