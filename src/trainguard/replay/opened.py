"""What a replay opened, against seals and lock: checkpoints altered or put back before the run began (E3, E5, E6; S11,
S12), data that is not what was approved (D5 to D7).

A replay loads the same checkpoint as the run did, so an edit between save and resume gives it the same steps. But it
says which files it read, and those that our log has a seal of are verified: what the job began from is then what an
earlier run sealed, or the tensors that are not are named. Data that the lock lists is held to the lock in the same way.
Nothing of the run's own account is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from trainguard.digest import HEX_SHA256_LENGTH, file_sha256
from trainguard.envelope import load_public_key
from trainguard.errors import TrainguardError
from trainguard.finding import Finding, Subject
from trainguard.home import Home
from trainguard.lockfile import Lock, Measurement
from trainguard.replay.files import in_the_run
from trainguard.seal.ledger import SealLeaf, read_ledger
from trainguard.seal.verify import verify_seal
from trainguard.watch.outputs import is_model_file


def opened_findings(
    home: Home, run: str, read: Sequence[str], *, root: str, cwd: str, began_ns: int
) -> Iterator[Finding]:
    """What is wrong with sealed files that a replay of `run` read. read: real paths; root, cwd: its sandbox, and the
    folder that it stands for. Files that changed since the run began, or that it sealed itself, are not its input."""
    paths = _inputs(read, root, cwd, began_ns)
    if not paths:
        return
    try:
        ledger = read_ledger(home, load_public_key(home.keys / "attestation.pub"))
    except TrainguardError:
        return
    for path in paths:
        seal = ledger.newest(place=str(path)) if ledger is not None else None
        if seal is None or _own(seal, run) or not is_model_file(path):
            continue
        try:
            found = verify_seal(path, home=home).findings
        except TrainguardError:
            continue
        yield from (_ours(each, run, path) for each in found if each.outcome == "violated")


def unapproved_findings(
    lock: Lock | None,
    measured: Measurement | None,
    run: str,
    read: Sequence[str],
    *,
    root: str,
    cwd: str,
    began_ns: int,
) -> Iterator[Finding]:
    """Data and weights that the lock lists, that a replay of `run` read, and that are another content.

    measured: of the run's own host, which says where the trees of the lock lie there; else they lie where they were
    approved. The other arguments are those of `opened_findings`.
    """
    approved = _approved(lock, measured)
    for path in _inputs(read, root, cwd, began_ns) if approved else ():
        expected = approved.get(str(path))
        if expected is None:
            continue
        try:
            found = file_sha256(path)
        except TrainguardError:
            continue
        if found != expected:
            yield Finding(
                check="replay",
                outcome="violated",
                techniques=("D5", "D6", "D7"),
                subject=Subject(run=run, path=str(path)),
                message=f"the command reads {path}, which was another file when the run began than the lock approves",
                expected=f"SHA-256 {expected}",
                found=f"SHA-256 {found}",
            )


def _approved(lock: Lock | None, measured: Measurement | None) -> dict[str, str]:
    """Path on the run's host → SHA-256 that the lock has for it, of data and weights."""
    if lock is None:
        return {}
    there = measured.trees if measured is not None else {}
    found = {}
    for name, tree in lock.measurement.trees.items():
        if not name.startswith(("data:", "weights:")):
            continue
        root = Path(there[name].root if name in there else tree.root)
        for below, value in tree.files.items():
            digest = value.split(" ", 1)[0]
            alone = len(tree.files) == 1 and root.name == below  # a file that is a tree by itself
            if len(digest) == HEX_SHA256_LENGTH:
                found[str(root if alone else root / below)] = digest
    return found


def _inputs(read: Sequence[str], root: str, cwd: str, began_ns: int) -> list[Path]:
    """Files of the run's host that a replay read, and that are as they were when the run began."""
    paths = map(Path, dict.fromkeys(in_the_run(each, root, cwd) for each in read))
    return [path for path in paths if _old(path, began_ns)]


def _ours(finding: Finding, run: str, path: Path) -> Finding:
    """As a finding of the audit about what the run began from."""
    subject = msgspec.structs.replace(finding.subject, run=run, path=str(path))
    message = f"the command reads {path}, and that is not what was sealed: {finding.message}"
    return msgspec.structs.replace(finding, check="replay", subject=subject, message=message)


def _own(seal: SealLeaf, run: str) -> bool:
    return seal.run == run


def _old(path: Path, began_ns: int) -> bool:
    """Whether the file is as it was when the run began."""
    try:
        status = path.stat()
    except OSError:
        return False
    return max(status.st_mtime_ns, status.st_ctime_ns) < began_ns
