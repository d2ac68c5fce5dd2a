"""`trainguard show RUN`: one run as a timeline, a document or a page."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from trainguard.cli._view import show
from trainguard.cli.verdict import named_run
from trainguard.home import Home


@click.command("show")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write the report to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print the story as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing (useful with --html).")
@click.argument("run")
def command(html_path: Path | None, as_json: bool, quiet: bool, run: str) -> int:
    """One run as a timeline: what happened when, how fast, and what was found."""
    from trainguard.render.story import tell_run

    home = Home.find()
    story = tell_run(home, named_run(home, run))
    if html_path is not None:
        from trainguard.render.html import report_page, write_page

        write_page(html_path, report_page(story))
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(story) + b"\n")
    elif html_path is not None:
        sys.stdout.write("" if quiet else f"report written to {html_path}\n")
    elif not quiet:
        from trainguard.render.timeline import story_view

        show(lambda ascii_only: story_view(story, ascii_only=ascii_only))
    return 0
