"""Link *inputs*: every file the process opens for reading or writing."""

from __future__ import annotations

from .client import Client


def install(client: Client) -> None:
    """Listen to `open` audit events."""
