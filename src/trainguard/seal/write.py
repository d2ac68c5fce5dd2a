"""Seal a checkpoint: read it, sign what was read, enter it in the log, lay the bundle beside it.

    report = seal_path(Home.find(), Path("checkpoints/step-900"), run="…", step=900)

Order, and why: the files are read before anything is promised; the seal before this one is looked up and the new one
logged under one lock, so the chain has no forks; the bundle file comes last, because it carries the proof that it was
logged. A crash in between leaves a log entry without a bundle file, which sealing again heals.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.archive import Appender
from trainguard.digest import parse_sha256, write_durably
from trainguard.envelope import load_or_create_key
from trainguard.errors import Misuse, Unavailable
from trainguard.finding import Finding
from trainguard.home import RUN_NAME, Home
from trainguard.log import Log, LogReader, load_verifier
from trainguard.seal.bundle import (
    STEP_LIMIT,
    Bundle,
    Facts,
    Seal,
    encode_bundle,
    encode_statement,
    fingerprint,
    sign,
)
from trainguard.seal.freshness import collisions, live_differs
from trainguard.seal.hashing import DIGEST_BYTES
from trainguard.seal.ledger import RUN, Ledger, entries_of, entry_of, read_ledger
from trainguard.seal.manifest import SINGLE, Manifest, read_manifest, resolve, seal_path_of
from trainguard.seal.parse import verify_bundle
from trainguard.seal.report import SealReport, status_of

HASH_TYPES = ("sha256", "blake3")


def seal_path(
    home: Home,
    path: Path,
    *,
    run: str | None = None,
    step: int | None = None,
    lock: str | None = None,
    live_digest: str | Mapping[str, str] | None = None,
    hash_type: str = "sha256",
    log: Appender | None = None,
    source: str = "command",
) -> SealReport:
    """Seal the file or folder `path` with the attestation key of `home`, and log it.

    run, step, lock: what the checkpoint belongs to; lock is the SHA-256 of the lock file.
    live_digest: `algorithm:hex` taken while the file was written (hashing.TeeHash), or one per name in a folder; where
    it differs from what lies on the disk, the seal says so for good and the report is violated (E9).
    log: the log, where the caller has it open; else it is opened for this call.
    source: `command`, or `run` for what a watched run saved: then no bundle file is written beside it.
    The report's findings tell of an older seal this one collides with. Raises Misuse, Unavailable or
    VerificationError where nothing could be sealed.
    """
    _check_arguments(run, step, lock, hash_type)
    place = resolve(path)
    if source != RUN:
        _check_writable(seal_path_of(place))
    manifest = read_manifest(place, hash_type=hash_type)
    live = _live(place, live_digest, manifest)
    home.prepare()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_at_a_time(home))
        key = load_or_create_key(home.keys / "attestation.pem")
        appender = log if log is not None else stack.enter_context(Log.open(home.log, home.keys / "log.key"))
        ledger = read_ledger(home, key.public_key())
        if ledger is None:
            raise Unavailable(f"{home.log}: the log cannot be read back")
        previous = ledger.newest(run=run) if run is not None else ledger.newest(place=str(place))
        facts = Facts(
            run=run,
            step=step,
            previous_leaf=previous.leaf if previous else None,
            previous_payload=previous.payload if previous else None,
            lock=lock,
            origin=ledger.head.origin,
            log_size=ledger.head.size,
            live=live,
        )
        seal, leaf = _enter(home, place, manifest, facts, key, appender, source)
    return _report(path, place, manifest, seal, leaf, _findings(seal, place, ledger, source), source)


def _check_arguments(run: str | None, step: int | None, lock: str | None, hash_type: str) -> None:
    if run is not None and not RUN_NAME.fullmatch(run):
        raise Misuse(f"run {run[:100]!r}: expected letters, digits, '.', '_' or '-', at most 100 characters")
    if step is not None and not 0 <= step < STEP_LIMIT:
        raise Misuse(f"step {step}: expected a number from 0 up to 2**53")
    if hash_type not in HASH_TYPES:
        raise Misuse(f"hash {hash_type[:40]!r}: expected {' or '.join(HASH_TYPES)}")
    if lock is not None:
        parse_sha256(lock, where="lock")


def _check_writable(seal: Path) -> None:
    """Refuse before the log has an entry, rather than after."""
    if not os.access(seal.parent, os.W_OK | os.X_OK):
        raise Unavailable(
            f"{seal}: the seal could not be written: the folder cannot be written to",
            next_step="seal where the checkpoint is made, or copy it to a folder you can write",
        )


@contextlib.contextmanager
def _one_at_a_time(home: Home) -> Iterator[None]:
    """Sealing waits for sealing, across processes."""
    try:
        descriptor = os.open(home.root / "seal.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(f"{home.root / 'seal.lock'}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _enter(
    home: Home,
    place: Path,
    manifest: Manifest,
    facts: Facts,
    key: ec.EllipticCurvePrivateKey,
    log: Appender,
    source: str,
) -> tuple[Seal, int]:
    """Sign, keep, log, write the bundle file; returns the seal as a verifier will read it, and its leaf."""
    public = key.public_key()
    signed = sign(encode_statement(manifest, facts), key)
    hint = fingerprint(public)
    seal = verify_bundle(Bundle(signed=signed, hint=hint, entry=None), [public], where=str(place))
    signature, index, envelope = entries_of(signed, seal, place, key, source=source, now_ns=time.time_ns())
    home.store_blob(envelope)
    first, leaf = log.append([signature, index])
    if source != RUN:  # a watched run gets no files of ours beside its own; the log and our store keep the seal
        vkey = home.keys / "log.vkey"
        reader = LogReader(home.log, vkey)
        entry = entry_of(reader.inclusion(first), reader.head(), load_verifier(vkey), signature)
        write_durably(seal_path_of(place), encode_bundle(signed, hint, entry))
    return seal, leaf


def _live(place: Path, live_digest: str | Mapping[str, str] | None, manifest: Manifest) -> str | None:
    """`equal` or `differs`, None where there is nothing to compare."""
    if live_digest is None:
        return None
    claimed = {SINGLE: live_digest} if isinstance(live_digest, str) else dict(live_digest)
    if not claimed:
        return None
    for name, digest in claimed.items():
        algorithm, _, value = digest.partition(":")
        if algorithm not in DIGEST_BYTES or len(value) != 2 * DIGEST_BYTES[algorithm]:
            raise Misuse(f"live digest of {name!r}: expected 'sha256:<hex>' or 'blake3:<hex>', found {digest[:40]!r}")
        if value != _digest_by(place, manifest, name, algorithm):
            return "differs"
    return "equal"


def _digest_by(place: Path, manifest: Manifest, name: str, algorithm: str) -> str | None:
    """Digest of one file, read again where the manifest has another algorithm's; None where there is no such file."""
    if algorithm != manifest.hash_type:
        manifest = read_manifest(place, hash_type=algorithm, tensors=False, only=frozenset({name}))
    return next((entry.digest for entry in manifest.entries if entry.name == name), None)


def _findings(seal: Seal, place: Path, ledger: Ledger, source: str) -> tuple[Finding, ...]:
    """What is odd about this seal beside the ones before it."""
    found = list(collisions(seal, str(place), source, ledger.seals))
    if seal.facts.live == "differs":
        found.append(live_differs(seal, place.name))
    return tuple(found)


def _report(
    path: Path, place: Path, manifest: Manifest, seal: Seal, leaf: int, findings: tuple[Finding, ...], source: str
) -> SealReport:
    return SealReport(
        path=str(path),
        status=status_of(findings, blocking=False),
        seal=str(seal_path_of(place)) if source != RUN else None,
        name=seal.name,
        run=seal.facts.run,
        step=seal.facts.step,
        signer=seal.signer,
        root=seal.root,
        dir_hash=seal.dir_hash,
        hash_type=seal.hash_type,
        files=sum(entry.kind != "folder" for entry in manifest.entries),
        bytes=sum(entry.size or 0 for entry in manifest.entries if entry.kind == "file"),
        leaf=leaf,
        lock=seal.facts.lock,
        live=seal.facts.live,
        findings=findings,
    )
