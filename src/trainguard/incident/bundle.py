"""An incident with all it rests on, in one zip that anyone can check offline (spec/bundle.md).

    data = make_bundle(home, incident)
    summary = offline.verify(data)

Whole segments go in, because a segment is what was signed: a record out of its segment proves nothing. So a bundle
shows everything those segments hold; read it before you hand it on.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from trainguard import __version__
from trainguard.archive import LogLeaves, SegmentLeaf
from trainguard.digest import sha256_hex
from trainguard.envelope import load_or_create_key, sign_statement, statement
from trainguard.errors import Unavailable, VerificationError
from trainguard.home import Home
from trainguard.incident import offline
from trainguard.incident.correlate import Incident
from trainguard.log import LogReader

SCHEMA = "trainguard/bundle/v2"
README = """Evidence bundle of an incident, made by trainguard {version}.

    python verify.py THIS.zip

checks all of it with nothing but Python 3.8 or newer: signatures, Merkle proofs, segments, citations. It prints the
fingerprints of the two keys; compare them with those you got another way. incident.json is what is claimed, signed
with everything else here by SIGNATURE.json;
segments/ holds the records it rests on, one JSON document a line after its chain value; leaves/ the signed
statements, proofs/ their inclusion proofs.
"""


def make_bundle(home: Home, incident: Incident) -> bytes:
    """The bundle of `incident`: the same bytes every time it is made from the same log.

    Signed as a whole by the key of the log's statements. Raises VerificationError where the log does not hold,
    Unavailable where the evidence is gone.
    """
    leaves = LogLeaves(home)
    reader = LogReader(home.log, home.keys / "log.vkey")
    begin = leaves.runs.get(incident.run)
    if begin is None:
        raise Unavailable(f"run {incident.run}: the log holds no statement of it")
    cited = {citation.leaf for finding in incident.findings for citation in finding.evidence}
    segments = [leaf for leaf in leaves.segments.get(incident.run, ()) if leaf.leaf in cited]
    files = {
        "incident.json": msgspec.json.encode(incident),
        "README.txt": README.format(version=__version__).encode(),
        "verify.py": Path(offline.__file__).read_bytes(),
        offline.HEAD: leaves.head.note.encode(),
        offline.LOG_KEY: (home.keys / "log.vkey").read_bytes(),
        offline.ATTESTATION_KEY: (home.keys / "attestation.pub").read_bytes(),
    }
    for index in sorted({int(begin["leaf"]), *(leaf.leaf for leaf in segments)}):
        (entry,) = reader.entries(index, index + 1)
        files[f"leaves/{index}.json"] = entry
        files[f"proofs/{index}.json"] = msgspec.json.encode([h.hex() for h in reader.inclusion(index).path])
    for leaf in segments:
        files[f"segments/{leaf.leaf}.spool"] = _segment(home, incident.run, leaf)
    listed = {name: sha256_hex(data) for name, data in sorted(files.items())}
    manifest = msgspec.json.encode({"schema": SCHEMA, "incident": incident.id, "files": listed})
    files[offline.MANIFEST] = manifest
    files[offline.SIGNATURE] = _signed(home, incident, manifest)
    return offline.pack(files)


def _signed(home: Home, incident: Incident, manifest: bytes) -> bytes:
    """What this home says of the whole bundle: that it made it. The same bytes every time."""
    subject = [{"name": offline.MANIFEST, "digest": {"sha256": sha256_hex(manifest)}}]
    said = statement(offline.PREDICATE, {"incident": incident.id, "run": incident.run}, subject)
    return sign_statement(said, load_or_create_key(home.keys / "attestation.pem"), repeatable=True)


def _segment(home: Home, run: str, leaf: SegmentLeaf) -> bytes:
    try:
        with (home.run(run) / "spool").open("rb") as file:
            file.seek(leaf.offset)
            data = file.read(leaf.bytes)
    except OSError as error:
        raise Unavailable(f"run {run}: its records cannot be read: {error.strerror}") from error
    if sha256_hex(data) != leaf.sha256:
        raise VerificationError(f"run {run}: segment {leaf.segment} (leaf {leaf.leaf}) is not what was sealed")
    return data
