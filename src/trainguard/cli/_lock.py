"""Whose approval is a lock? Shared by the verbs that rely on one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from trainguard.home import Home
from trainguard.lockfile import Lock

APPROVERS = "approvers"
"""`<state>/keys/approvers/*.pub`: public keys (PEM) of those who may approve, besides this machine's own."""


def with_trust(home: Home, lock: Lock, *, keys: Sequence[Path] = (), where: str) -> Lock:
    """`lock` with `trusted` set where a known key signed it: one of `keys`, an approver's, or this machine's own.

    Raises VerificationError when it names a known key and the signature is not by that key.
    """
    from trainguard.envelope import key_id, load_public_key
    from trainguard.lockfile import verify_lock

    own = home.keys / "attestation.pub"
    approvers = sorted((home.keys / APPROVERS).glob("*.pub"))
    known = [load_public_key(path) for path in (*keys, *approvers, *([own] if own.exists() else ()))]
    fitting = [key for key in known if key_id(key) == lock.signer]
    if not fitting:
        return lock
    verify_lock(lock, fitting, where=where)
    return msgspec.structs.replace(lock, trusted=True)
