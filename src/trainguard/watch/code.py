"""Link *code*: the hash of exactly the bytes that get compiled."""

from __future__ import annotations

from .client import Client


def install(client: Client) -> None:
    """Hook the source loaders; reports every module file with the SHA-256 of the bytes compiled."""
