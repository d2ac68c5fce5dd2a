"""The transparency log: what was acknowledged cannot be taken back or rewritten unseen (spec/log.md).

    from trainguard.log import Log, LogReader

    with Log.open(home.log, home.keys / "log.key") as log:
        [index] = log.append([entry])              # durable when it returns
        head = log.publish()
    reader = LogReader(home.log, home.keys / "log.vkey")
    entries = list(reader.entries(0, reader.head().size))

Only the supervisor and the server append; anyone may read.
"""

from trainguard.log.audit import Audit
from trainguard.log.keys import load_verifier, vkey_path
from trainguard.log.proof import Proof, encode_proof, parse_proof, verify_proof
from trainguard.log.reader import LogReader
from trainguard.log.store import Log
from trainguard.log.tree_head import TreeHead

__all__ = [
    "Audit",
    "Log",
    "LogReader",
    "Proof",
    "TreeHead",
    "encode_proof",
    "load_verifier",
    "parse_proof",
    "verify_proof",
    "vkey_path",
]
