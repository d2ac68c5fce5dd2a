"""Verify a sealed checkpoint: is it, byte for byte and name for name, what was sealed, and should it be here?

    report = verify_seal(Path("checkpoints/latest"), home=Home.find())
    report.status, report.findings

Steps, numbered as in the code:
 1. the bundle file: bounded, strictly parsed
 2. its signature, by the expected key or one of a trust file: before anything else of the checkpoint is read
 3. the log: is the seal in it, is it the newest of its place, was anything after it deleted or sealed twice; and, by
    a trust file, was its key valid when it sealed
 4. names, kinds, sizes and modes against the seal: nothing is opened for this
 5. the bytes, streamed once
 6. for files that differ: the tensors that changed, and whether the file is another seal's
The caller still owes: loading exactly these bytes (nothing here stops a change after the last read), and whether the
run itself is to be believed (`trainguard verdict`). What could not be checked is a finding with its reason.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.envelope import load_public_key
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.finding import worst_first
from trainguard.home import Home
from trainguard.log import load_verifier
from trainguard.log.note import Verifier
from trainguard.seal.bundle import Bundle, Seal, digest_of, fingerprint
from trainguard.seal.case import Case
from trainguard.seal.content import check_content
from trainguard.seal.freshness import check_logged, check_newest, check_run, check_signer, means_newest
from trainguard.seal.ledger import RUN, Ledger, SealLeaf, home_verifier, read_ledger
from trainguard.seal.manifest import SEAL_SUFFIX, read_manifest, resolve, root_digest, seal_path_of
from trainguard.seal.parse import BUNDLE_LIMIT_BYTES, parse_bundle, verify_bundle
from trainguard.seal.report import LOGGED, SIGNATURE, SealReport, status_of
from trainguard.seal.signers import Signers, load_signers


def verify_seal(
    path: Path,
    *,
    home: Home | None = None,
    key: Path | None = None,
    signers: Path | None = None,
    log_key: str | Path | None = None,
    run: str | None = None,
    newest: bool = False,
) -> SealReport:
    """Verify the checkpoint at `path` against its seal and our log.

    home: whose log and key to use; None for neither.
    key: file with the public key to trust instead of home's; what is signed by another is refused (E10).
    signers: a trust file instead (spec/seal.md): whose keys may have signed it, and when they were good.
    log_key: vkey (text or file) of the log that must hold the seal, where home has no log.
    run: the run the checkpoint must be of. newest: it must be the newest of its run.
    Bad evidence becomes findings. Raises Misuse or Unavailable where there is nothing to verify, or no key.
    """
    return verify_sealed(path, home=home, key=key, signers=signers, log_key=log_key, run=run, newest=newest)[0]


def verify_sealed(
    path: Path,
    *,
    home: Home | None = None,
    key: Path | None = None,
    signers: Path | None = None,
    log_key: str | Path | None = None,
    run: str | None = None,
    newest: bool = False,
) -> tuple[SealReport, Seal | None]:
    """As verify_seal, with the seal that was believed, for callers that compare bytes they hold with its entries."""
    trust = _trust_file(key, signers)
    public, others, own = _trusted_keys(home, key, trust)
    ledger = read_ledger(home, public, *others) if home is not None and own else None
    missing = _if_deleted(path, ledger, public)
    if missing is not None:
        return missing, None
    place = resolve(path)
    case = Case(path=path, place=place, public=public, ledger=ledger, others=others, seal_file=seal_path_of(place))
    case.trust = trust
    bundle = _bundle(case)  # 1, 2
    if bundle is not None and case.seal is not None:  # 3
        check_logged(case, bundle, case.seal, _log_verifier(home, log_key, own), required=own and key is None)
    if case.seal is not None:
        check_signer(case, case.seal, bundle)
        check_run(case, case.seal, run)
        check_newest(case, case.seal, must=newest or means_newest(path))
        check_content(case, case.seal)  # 4, 5, 6
    return _report(case), case.seal


def _trust_file(key: Path | None, signers: Path | None) -> Signers | None:
    if signers is None:
        return None
    if key is not None:
        raise Misuse("a key and a trust file: expected one of them", next_step="name the key in the trust file")
    return load_signers(signers)


def _trusted_keys(
    home: Home | None, key: Path | None, trust: Signers | None
) -> tuple[ec.EllipticCurvePublicKey, tuple[ec.EllipticCurvePublicKey, ...], bool]:
    """The key to begin with, further ones that may have signed, and whether one of them signs for `home`."""
    if trust is None:
        public, own = _trusted_key(home, key)
        return public, (), own
    ours = home.keys / "attestation.pub" if home is not None else None
    signer = trust.find(fingerprint(load_public_key(ours))) if ours is not None and ours.exists() else None
    first = signer or trust.signers[0]
    return first.key, tuple(one.key for one in trust.signers if one is not first), signer is not None


def _trusted_key(home: Home | None, key: Path | None) -> tuple[ec.EllipticCurvePublicKey, bool]:
    """The key to trust, and whether it is the one that signs for `home`."""
    ours = home.keys / "attestation.pub" if home is not None else None
    if key is not None:
        public = load_public_key(key)
        own = ours is not None and ours.exists() and fingerprint(load_public_key(ours)) == fingerprint(public)
        return public, own
    if ours is None or not ours.exists():
        raise Unavailable(
            f"{home.root if home else 'no state folder'}: no key to verify with",
            next_step="name the signer's public key: --key PUB, or set TRAINGUARD_HOME",
        )
    return load_public_key(ours), True


def _log_verifier(home: Home | None, log_key: str | Path | None, own: bool) -> Verifier | None:
    if log_key is not None:
        return load_verifier(log_key)
    return home_verifier(home) if home is not None and own else None


def _if_deleted(path: Path, ledger: Ledger | None, public: ec.EllipticCurvePublicKey) -> SealReport | None:
    """E8: nothing lies at `path`, and the log says that a sealed checkpoint did."""
    if ledger is None or not _is_gone(path):
        return None
    place = Path(os.path.realpath(path))
    leaf = ledger.newest(place=str(place))
    if leaf is None:
        return None
    case = Case(path=path, place=place, public=public, ledger=ledger, seal_file=place, leaf=leaf)
    case.say(
        "violated",
        ("E8",),
        f"{place.name} is gone; the log says it was sealed here",
        expected=f"root {leaf.root} ({leaf.called})",
        found="nothing at this path",
    )
    return _report(case)


def _is_gone(path: Path) -> bool:
    """Whether nothing lies there, a link that leads nowhere included; what may not be looked at is not gone."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


# -- 1, 2: bundle and signature ---------------------------------------------------------------------------------------


def _bundle(case: Case) -> Bundle | None:
    """The bundle beside the checkpoint if it is a seal by the trusted key; else findings, and our log's copy of it."""
    data = _read_bundle(case)
    try:
        bundle = _believed(case, data) if data is not None else None
    except MalformedEvidence as error:
        bundle = None
        case.say("violated", ("E10",), f"the seal cannot be believed: {error}")
    later = _later_run_seal(case)
    if bundle is not None and later is None:
        return bundle
    _by_log(case, later or _logged_seal(case, missing=data is None))
    return None


def _believed(case: Case, data: bytes) -> Bundle | None:
    """The bundle in `data` once its signature holds; a finding and None where another key signed it."""
    bundle = parse_bundle(data, where=case.seal_file.name)
    try:
        case.seal = verify_bundle(bundle, [case.public, *case.others], where=case.seal_file.name)
    except MalformedEvidence:
        raise
    except VerificationError as error:
        _not_the_signer(case, bundle, error)
        return None
    case.public = next(key for key in (case.public, *case.others) if fingerprint(key) == case.seal.signer)
    case.checked.append(SIGNATURE)
    return bundle


def _not_the_signer(case: Case, bundle: Bundle, error: VerificationError) -> None:
    trust = case.trust
    if trust is not None and trust.find(bundle.hint) is None:
        message = "sealed by a key that the trust file does not name"
        expected = f"one of the {len(trust.signers)} keys in {Path(trust.where).name}"
    else:
        message = f"the seal is not by the expected signer: {error}"
        expected = f"signed by {fingerprint(case.public)}"
    case.say("violated", ("E10",), message, expected=expected, found=f"key {bundle.hint[:64]}")


def _read_bundle(case: Case) -> bytes | None:
    """The bytes of the bundle file, None where there is none."""
    try:
        descriptor = os.open(case.seal_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"{case.seal_file}: seal cannot be opened: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unavailable(f"{case.seal_file}: expected a seal in a regular file, found another kind")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(BUNDLE_LIMIT_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{case.seal_file}: seal cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _later_run_seal(case: Case) -> SealLeaf | None:
    """The seal by which a watched run sealed this place after the one beside it was made, if there is one.

    A watched run leaves no bundle beside its files, so an older one may still lie there.
    """
    if case.ledger is None or case.seal is None:
        return None
    leaf = case.ledger.find(case.seal.payload_digest)
    newest = case.ledger.newest(place=str(case.place))
    if leaf is None or newest is None or newest.source != RUN or newest.leaf <= leaf.leaf:
        return None
    return newest


def _logged_seal(case: Case, *, missing: bool) -> SealLeaf | None:
    """Without a seal to believe beside it: the one our log has for this place, or else for these bytes.

    Raises Unavailable where nothing was ever sealed here. A bundle that should be there and is not is a finding.
    """
    ledger = case.ledger
    leaf = ledger.newest(place=str(case.place)) if ledger is not None else None
    if not missing:
        return leaf
    if leaf is None and ledger is not None:
        leaf = _by_content(case, ledger)
    if leaf is None:
        raise Unavailable(
            f"{case.path}: has no seal ({case.seal_file.name} is not there)",
            next_step=_sealing_hint(case.place),
        )
    if leaf.source != RUN:
        case.say(
            "violated",
            ("E8", "E10"),
            f"the seal of {case.place.name} is gone; the log says it was sealed",
            expected=f"{case.seal_file.name} ({leaf.called})",
            found="no such file",
            cites=(leaf.citation,),
        )
    return leaf


def _by_content(case: Case, ledger: Ledger) -> SealLeaf | None:
    """The newest seal a watched run made of exactly these bytes, wherever they lay then."""
    candidates = {seal.root: seal for seal in ledger.seals if seal.source == RUN}
    if not candidates:
        return None
    manifest = read_manifest(case.place, tensors=False)
    return candidates.get(root_digest(digest_of(entry) for entry in manifest.resources))


def _by_log(case: Case, leaf: SealLeaf | None) -> None:
    """Go by the log's own entry and the copy of the seal we kept, which is verified anew."""
    case.leaf = leaf
    if leaf is None or case.ledger is None:
        return
    case.seal = case.ledger.kept(leaf, case.public, *case.others)
    if case.seal is None:
        case.blocking = True
        case.say("not_checked", (), "the content was not checked: our copy of the seal is gone or was altered")
    elif not case.broken:
        case.checked = [SIGNATURE, LOGGED]


def _sealing_hint(place: Path) -> str:
    if place.name.endswith(SEAL_SUFFIX):
        return "name the checkpoint, not its seal"
    return f"seal it where it is made: trainguard seal {place.name}"


# -- the answer -------------------------------------------------------------------------------------------------------


def _report(case: Case) -> SealReport:
    seal, leaf = case.seal, case.leaf
    findings = tuple(worst_first(case.findings))
    status = status_of(findings, blocking=case.blocking)
    return SealReport(
        path=str(case.path),
        status=status,
        seal=str(case.seal_file) if seal is not None and os.path.lexists(case.seal_file) else None,
        name=seal.name if seal else leaf.name if leaf else None,
        run=seal.facts.run if seal else leaf.run if leaf else None,
        step=seal.facts.step if seal else leaf.step if leaf else None,
        signer=seal.signer if seal else None,
        signed_by=case.signed_by,
        root=seal.root if seal else leaf.root if leaf else None,
        dir_hash=seal.dir_hash if seal else leaf.dir_hash if leaf else None,
        hash_type=seal.hash_type if seal else None,
        files=case.files,
        bytes=case.bytes,
        leaf=leaf.leaf if leaf else None,
        lock=seal.facts.lock if seal else None,
        live=seal.facts.live if seal else None,
        checked=tuple(case.checked),
        notes=tuple(case.notes),
        findings=findings,
    )
