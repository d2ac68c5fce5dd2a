"""`trainguard demo`: the whole story on a small model, every line of it from a real run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trainguard.cli._view import show
from trainguard.home import Home

if TYPE_CHECKING:
    from trainguard.testing.demo import Scene

STEPS = 60
"""Act 3 strikes at step 50."""


@click.command("demo")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--quick", is_flag=True, help="The clean run and two acts only.")
@click.option("--json", "as_json", is_flag=True, help="Print how each act went as one JSON document.")
@click.option("--quiet", is_flag=True, help="Print nothing; the exit status tells.")
def command(out: Path, quick: bool, as_json: bool, quiet: bool) -> int:
    """Train a small model once cleanly and then under five acts of sabotage, on copies, and report on each.

    Exit status: 0 when the clean run is VERIFIED and every act was found, else 1.
    """
    from trainguard.render.html import report_page, write_page
    from trainguard.render.playbill import ending, index_page
    from trainguard.render.story import tell_run
    from trainguard.testing import demo

    aloud = not (as_json or quiet)
    began = time.monotonic()
    scenes: list[demo.Scene] = []
    with _progress(aloud) as say:
        stage = demo.Stage(out, steps=STEPS, say=say)
        say("copying the environment (hard links)")
        stage.build()
        try:
            for act in (demo.CLEAN, *demo.acts(quick=quick)):
                say.title = act.title
                scene = stage.perform(act)
                scenes.append(scene)
                write_page(stage.out / f"{scene.run}.html", report_page(tell_run(Home(stage.home), scene.run)))
                if aloud:
                    say.pause(partial(_show_scene, scene, scenes[0]))
        finally:
            stage.close()
    seconds = time.monotonic() - began
    write_page(stage.out / "index.html", index_page(scenes, seconds, log=str(stage.home)))
    (stage.out / "demo.json").write_bytes(demo.summary(scenes))
    if as_json:
        sys.stdout.buffer.write(demo.summary(scenes) + b"\n")
    elif not quiet:
        sys.stdout.write(f"{ending(scenes, seconds)}\nreports: {stage.out / 'index.html'}\n")
    return 0 if all(scene.as_promised for scene in scenes) else 1


def _show_scene(scene: Scene, clean: Scene) -> None:
    from trainguard.render.playbill import scene_view

    show(lambda ascii_only: scene_view(scene, clean, ascii_only=ascii_only))


class _Say:
    """What is going on, on stderr and only on a terminal."""

    def __init__(self, update: Callable[[str], None], pause: Callable[[Callable[[], None]], None]) -> None:
        self._update = update
        self.pause = pause
        """Call something that prints while the progress line is away."""
        self.title = ""

    def __call__(self, line: str) -> None:
        self._update(f"{self.title}: {line}" if self.title else line)


@contextmanager
def _progress(aloud: bool) -> Iterator[_Say]:
    if not aloud or not sys.stderr.isatty():
        yield _Say(lambda _line: None, lambda action: action())
        return
    from trainguard.render.terminal import screen

    console = screen(stderr=True)
    with console.status("") as status:

        def pause(action: Callable[[], None]) -> None:
            status.stop()
            action()
            status.start()

        yield _Say(lambda line: status.update(line[: max(20, console.width - 4)]), pause)
