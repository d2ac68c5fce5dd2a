"""Putting a renderable on stdout: colour and width of the terminal, or plain lines where it is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(view: Callable[[bool], RenderableType]) -> None:
    """Print `view(ascii_only)`. Where stdout is no terminal, lines carry no trailing blanks: they end up in files."""
    from trainguard.render import terminal

    screen = terminal.screen()
    renderable = view(not terminal.unicode_able(screen))
    if screen.is_terminal:
        screen.print(renderable)
        return
    text = terminal.as_text(renderable, width=screen.width)
    lines = "".join(line.rstrip() + "\n" for line in text.splitlines())
    sys.stdout.write(lines.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
