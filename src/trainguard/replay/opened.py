"""What a replay opened, against our seals: checkpoints altered or put back before the run began (E3, E5, E6; S11, S12).

A replay loads the same checkpoint as the run did, so an edit between save and resume gives it the same steps. But it
says which files it read, and those that our log has a seal of are verified: what the job began from is then what an
earlier run sealed, or the tensors that are not are named. Nothing of the run's own account is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from trainguard.envelope import load_public_key
from trainguard.errors import TrainguardError
from trainguard.finding import Finding
from trainguard.home import Home
from trainguard.replay.files import in_the_run
from trainguard.seal.ledger import SealLeaf, read_ledger
from trainguard.seal.verify import verify_seal
from trainguard.watch.outputs import is_model_file


def opened_findings(
    home: Home, run: str, read: Sequence[str], *, root: str, cwd: str, began_ns: int
) -> Iterator[Finding]:
    """What is wrong with sealed files that a replay of `run` read. read: real paths; root, cwd: its sandbox, and the
    folder that it stands for. Files that changed since the run began, or that it sealed itself, are not its input."""
    paths = [
        path for path in map(Path, dict.fromkeys(in_the_run(each, root, cwd) for each in read)) if _old(path, began_ns)
    ]
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
