"""A run under a lock, in memory: the record of what was measured, and the blobs it names."""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import sha256_hex
from trainguard.evidence import Evidence
from trainguard.lockfile import Code, Launch, Measurement, Tree, make_lock


def under_lock(root: str, files: Mapping[str, str], *, locked: bool = True) -> tuple[Evidence, dict[str, bytes]]:
    """The record of a measurement of code in `root`, as the lock approves it; `files`: name → SHA-256."""
    made = Measurement(
        cwd=root,
        launch=Launch(argv=(), kind="script"),
        interpreter=None,
        code=Code(root=root),
        trees={"code": Tree(name="code", root=root, files={name: f"{digest} 1" for name, digest in files.items()})},
        distributions={},
    )
    lock = make_lock(made, ec.generate_private_key(ec.SECP256R1()), made="", approvals=()).data
    name = sha256_hex(lock)
    body = {"blob": made.digest, "attempt": 0} | ({"lock": name} if locked else {})
    record = Evidence(n=0, at=0, source="supervisor", kind="measurement", body=body)
    return record, {made.digest: made.encode(), name: lock}
