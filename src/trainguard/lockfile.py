"""The lock: what was approved to run, and the measurement it is compared with (spec/lock.md).

A *measurement* is everything that decides what a command will do, taken on one host at one moment: code, installed
files, start-up hooks, native libraries, environment, data, command. A *lock* is a measurement that somebody approved,
with the approvals, signed. Both banks speak these types and meet nowhere else: `measure` makes them, `appraise`
compares them.

    lock = read_lock(Path("trainguard.lock"))            # structure and digests hold, or it raises
    verify_lock(lock, [public_key])                      # signed by one of ours, or it raises
    lock.measurement.distributions["torch"].version

Paths inside a tree are relative to its root, so a lock holds on every host that has the same content, wherever it lies.
Canonical bytes are JSON with sorted keys, no white space and no floats (RFC 8785 for the values that occur): equal
measurements have equal digests on every machine. The file on disk is the same JSON, indented, so it reads in a diff.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trainguard.digest import canonical_json, parse_sha256, sha256_hex
from trainguard.errors import MalformedEvidence, Unavailable, VerificationError
from trainguard.policy import Approval

if TYPE_CHECKING:  # measuring and comparing need no cryptography; only make_lock and verify_lock load it
    from cryptography.hazmat.primitives.asymmetric import ec

LOCK_SCHEMA = "trainguard/lock/v1"
MEASUREMENT_SCHEMA = "trainguard/measurement/v1"
PREDICATE = "measurement/v1"
LOCK_NAME = "trainguard.lock"
LOCK_LIMIT_BYTES = 64 << 20
"""33,000 files make about 5 MB."""
CONTENTS_LIMIT_BYTES = 256 << 20

INSTALLER_FILES = (".dist-info/RECORD", ".dist-info/INSTALLER", ".dist-info/REQUESTED", ".dist-info/direct_url.json")
"""Ends of paths that installers write as they like: two honest installs of one package differ in them."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a lock consists of: immutable, and nothing in it that a reader would pass over."""


class Tree(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One folder that was read whole, or one file."""

    name: str
    """Role and, after a colon, which of them: code, stdlib, site-packages, user-site, path:…, data:…, weights:…"""
    root: str
    """Absolute path where it was measured; information, never compared."""
    files: dict[str, str] = {}
    """Path below the root → `<sha256> <size in bytes>`, or `-> <target>` for a symbolic link."""
    bytecode: dict[str, str] = {}
    """Path of a `.pyc` → `<sha256 of what follows its 16-byte header> <state>`. States: live (Python would run it
    instead of the source), checked and unchecked (validated by a hash of the source, or never; PEP 552), sourceless
    (importable without any source). Those that Python would not run are left out: stale, orphaned, of another tag."""
    recompiled: dict[str, str] = {}
    """Path of a live `.pyc` that was compared with its source → same, differs or unreadable."""


class Distribution(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One installed package. Its files lie in the tree `tree` but are listed here and nowhere else."""

    name: str
    """Normalised (PEP 503)."""
    version: str
    tree: str
    installer: str = ""
    """What INSTALLER says: pip, uv, conda."""
    files: dict[str, str] = {}
    """As in `Tree`; relative to the site folder, as in RECORD."""
    mismatched: tuple[str, ...] = ()
    """Files whose content is not what RECORD says."""
    missing: int = 0
    """How many files RECORD lists that are not there (slimmed images)."""


class Hook(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Code that runs without anybody importing it."""

    kind: str
    """pth, start, sitecustomize, usercustomize or entry_point."""
    place: str
    """`<tree>/<path>`, or `<group>: <name> = <value>` for an entry point."""
    digest: str
    """SHA-256 of the file; of the text of the entry for an entry point."""
    runs: tuple[str, ...] = ()
    """The lines that are executed, each at most 200 characters; at most 20."""
    distribution: str | None = None
    """The installed package whose RECORD lists it with this very hash."""


class Shadow(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A module that hides an installed or standard one of the same name."""

    module: str
    place: str
    """`<tree>/<path>` of the one that wins."""
    hides: str
    """`<tree>/<path>` of the one that loses, or `the standard library`."""


class Program(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One link of the chain from the command to Python."""

    role: str
    """command, launcher, interpreter, libpython or preload."""
    path: str
    """As resolved; information."""
    name: str
    """Base name; compared."""
    digest: str
    """SHA-256 of the file. For a script that starts with `#!` and our interpreter: of what follows that line."""
    size: int = 0


class Launch(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The command and what it resolves to."""

    argv: tuple[str, ...]
    """The command as given, the first word by its base name."""
    kind: str
    """script, module, code, console, shell, binary."""
    script: str | None = None
    """Path of the training script below the code root, or absolute where it lies elsewhere; None for -m and -c."""
    module: str | None = None
    chain: tuple[Program, ...] = ()
    world: dict[str, str] = {}
    """World size and ranks, from variables and launcher options; information."""
    seeds: dict[str, str] = {}
    """Options and variables that set a seed."""


class Interpreter(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The Python that would run the job, which may be another one than ours."""

    executable: str
    version: str
    implementation: str
    cache_tag: str
    prefix: str
    base_prefix: str
    path: tuple[str, ...]
    """sys.path as the job would see it, in order; information (the trees are compared)."""
    user_site: bool
    """Whether the user's own site folder is on the path."""


class Code(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the job's own code stands in version control."""

    root: str
    commit: str | None = None
    dirty: str | None = None
    """SHA-256 of the difference between commit and working tree; None when there is none or it is not known."""
    changed: tuple[str, ...] = ()
    """Tracked files that differ from the commit."""


class Numeric(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Flags as torch itself states them, read back in a clean process; values are JSON text."""

    flags: dict[str, str]
    dispatcher: str
    """SHA-256 over the dispatch table of every operator."""
    overrides: tuple[str, ...] = ()
    """Operators with a kernel registered from a Python file, at most 50: `<operator> <file:line>`."""


class Cache(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A folder from which compiled or downloaded code is taken without asking."""

    name: str
    path: str
    mode: int
    """Permission bits."""
    foreign: bool = False
    """Whether it belongs to an account that is neither the job's nor root."""
    files: dict[str, str] = {}
    """As in `Tree`; only for code that is kept by name (remote modules), else empty."""


class Declared(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user said at lock time, so that preflight and run look at the same things."""

    data: tuple[str, ...] = ()
    """Data paths beyond those in the command, as given."""
    outputs: tuple[str, ...] = ()
    """Folders and files that the job writes: never compared."""


class Measurement(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what a command will do, on one host, at one moment."""

    schema: str = MEASUREMENT_SCHEMA
    cwd: str
    launch: Launch
    interpreter: Interpreter | None
    code: Code
    trees: dict[str, Tree]
    distributions: dict[str, Distribution]
    hooks: tuple[Hook, ...] = ()
    shadows: tuple[Shadow, ...] = ()
    native: dict[str, str] = {}
    """`<tree>/<path>` of a native library → GNU build id; its content stands among the files."""
    environment: dict[str, str] = {}
    """Variables that matter and their values; what looks secret is `sha256:<hex>`."""
    numeric: Numeric | None = None
    caches: tuple[Cache, ...] = ()
    declared: Declared = Declared()
    bytecode: str = "new"
    """Which `.pyc` were compiled again: new (those that differ from the lock, if there was one), all, or inert (none,
    because the job was given a private bytecode folder)."""
    notes: tuple[str, ...] = ()
    """What could not be measured and why, one sentence each. A note is never green."""

    def encode(self) -> bytes:
        """The bytes that are hashed, stored and signed."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def file_count(self) -> int:
        """Files that were measured, bytecode aside."""
        files = sum(len(tree.files) for tree in self.trees.values())
        return files + sum(len(package.files) for package in self.distributions.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hex."""
        return hashlib.sha256(self.encode()).hexdigest()


class Plan(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What approved runs of the command had in common (docs/checks/plan.md)."""

    runs: tuple[str, ...]
    """Their ids."""
    worlds: tuple[int, ...]
    """Ranks that they had; ascending, each once."""
    steps: int
    """Optimizer steps that each rank of each of them made, at least."""
    values: dict[str, str]
    """What → its value, JSON. `rank N: …` where it is one rank's own, else of every rank."""
    varied: tuple[str, ...] = ()
    """What differs between them, and is held to nothing."""


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement that somebody approved."""

    measurement: Measurement
    plan: Plan | None = None
    approvals: tuple[Approval, ...] = ()
    made: str = ""
    """UTC time of making, RFC 3339; the signer's claim."""
    contents: str | None = None
    """SHA-256 of the pack of source texts kept beside it for showing differences; not needed to compare."""
    envelope: dict[str, Any]
    """DSSE envelope over the statement that binds all of the above."""
    data: bytes = b""
    """The bytes of the file as read or made."""
    trusted: bool = False
    """Whether a known key was found to have signed it; set by whoever knows the keys, never by a reader."""

    @property
    def digest(self) -> str:
        """SHA-256 of the lock file's bytes, hex."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def signer(self) -> str:
        """Id of the key that claims to have signed: 64 hex digits, not yet believed."""
        return str(self.envelope["signatures"][0]["keyid"])

    @property
    def predicate(self) -> dict[str, Any]:
        """What the signed statement must say for this lock."""
        planned = {} if self.plan is None else {"plan": sha256_hex(msgspec.json.encode(self.plan, order="sorted"))}
        return planned | {
            "schema": LOCK_SCHEMA,
            "measurement": self.measurement.digest,
            "approvals": sha256_hex(msgspec.json.encode(self.approvals, order="sorted")),
            "made": self.made,
            "contents": self.contents,
        }


class _Schema(msgspec.Struct):
    schema: str = ""


class _File(Part, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The file as it lies on disk."""

    schema: str
    made: str
    contents: str | None
    approvals: tuple[Approval, ...]
    envelope: dict[str, Any]
    measurement: Measurement
    plan: Plan | None = None


def parse_measurement(data: bytes, *, where: str) -> Measurement:
    """The measurement in canonical JSON bytes; the inverse of `Measurement.encode`.

    Raises MalformedEvidence for another schema, an unknown or missing field, a wrong type, or over 64 MiB.
    """
    _bounded(data, where)
    _known_schema(data, MEASUREMENT_SCHEMA, where)
    measurement: Measurement = _decoded(data, Measurement, where)
    if measurement.encode() != data:
        raise MalformedEvidence(f"{where}: not in canonical form; the same values encode to other bytes")
    return measurement


def make_lock(
    measurement: Measurement,
    key: ec.EllipticCurvePrivateKey,
    *,
    made: str,
    approvals: Sequence[Approval] = (),
    contents: str | None = None,
    plan: Plan | None = None,
) -> Lock:
    """A lock over `measurement`, signed with `key`. made: UTC time, RFC 3339."""
    from trainguard.envelope import sign_statement, statement

    approved = tuple(approvals)
    unsigned = Lock(measurement=measurement, plan=plan, approvals=approved, made=made, contents=contents, envelope={})
    subject = [{"name": "measurement", "digest": {"sha256": measurement.digest}}]
    envelope = msgspec.json.decode(sign_statement(statement(PREDICATE, unsigned.predicate, subject), key))
    file = _File(
        schema=LOCK_SCHEMA,
        made=made,
        contents=contents,
        approvals=unsigned.approvals,
        envelope=envelope,
        measurement=measurement,
        plan=plan,
    )
    data = msgspec.json.format(msgspec.json.encode(file, order="sorted"), indent=1) + b"\n"
    return msgspec.structs.replace(unsigned, envelope=envelope, data=data)


def parse_lock(data: bytes, *, where: str) -> Lock:
    """The lock in `data`, the bytes of a lock file; the inverse of `make_lock(…).data`.

    Holds afterwards: schema and every field known, and the statement in the envelope speaks of exactly this
    measurement and these approvals. Still owed by the caller: `verify_lock`, that a known key signed the statement.
    Raises MalformedEvidence or VerificationError, one sentence.
    """
    _bounded(data, where)
    _known_schema(data, LOCK_SCHEMA, where)
    file: _File = _decoded(data, _File, where)
    if file.contents is not None:
        parse_sha256(file.contents, where=f"{where}: contents")
    if file.plan is not None:
        _readable(file.plan, where)
    lock = Lock(
        measurement=file.measurement,
        plan=file.plan,
        approvals=file.approvals,
        made=file.made,
        contents=file.contents,
        envelope=file.envelope,
        data=data,
    )
    _same_statement(_claimed(lock.envelope, where), lock, where)
    return lock


def verify_lock(lock: Lock, keys: Sequence[ec.EllipticCurvePublicKey], *, where: str = LOCK_NAME) -> None:
    """Raises VerificationError unless one of `keys` signed this lock."""
    from trainguard.envelope import verify_statement

    _same_statement(verify_statement(canonical_json(lock.envelope), keys, where=where), lock, where)


def read_lock(path: Path) -> Lock:
    """The lock file `path`, as `parse_lock`. Raises Unavailable when it is not there or cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(LOCK_LIMIT_BYTES + 1)
    except FileNotFoundError as error:
        raise Unavailable(
            f"{path}: there is no lock", next_step="approve what runs now with: trainguard lock -- CMD…"
        ) from error
    except OSError as error:
        raise Unavailable(f"{path}: lock cannot be read: {error.strerror}") from error
    return parse_lock(data, where=str(path))


def pack_contents(texts: Mapping[str, bytes]) -> bytes:
    """A pack of file contents by SHA-256: zlib-compressed MessagePack."""
    return zlib.compress(msgspec.msgpack.encode(dict(texts)), level=1)


def unpack_contents(data: bytes, *, where: str) -> dict[str, bytes]:
    """The contents in a pack; the inverse of `pack_contents`. Each must still be checked against its digest.

    Raises MalformedEvidence for bytes that are no pack or unfold to more than 256 MiB.
    """
    machine = zlib.decompressobj()
    try:
        raw = machine.decompress(data, CONTENTS_LIMIT_BYTES)
        if machine.unconsumed_tail:
            raise MalformedEvidence(f"{where}: pack unfolds to more than {CONTENTS_LIMIT_BYTES} bytes")
        return msgspec.msgpack.decode(raw, type=dict[str, bytes])
    except (zlib.error, msgspec.DecodeError) as error:
        raise MalformedEvidence(f"{where}: not a pack of file contents: {error}") from error


def _bounded(data: bytes, where: str) -> None:
    if len(data) > LOCK_LIMIT_BYTES:
        raise MalformedEvidence(f"{where}: more than {LOCK_LIMIT_BYTES} bytes, the limit")


def _known_schema(data: bytes, expected: str, where: str) -> None:
    try:
        found = msgspec.json.decode(data, type=_Schema).schema
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: not JSON, or cut off: {error}") from error
    if found != expected:
        raise MalformedEvidence(
            f"{where}: expected schema {expected}, found {found[:80]!r}",
            next_step="if another version of trainguard wrote it, use that version or lock again",
        )


def _decoded(data: bytes, kind: Any, where: str) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: {error}") from error


def _readable(plan: Plan, where: str) -> None:
    """Raises MalformedEvidence unless every value of the plan is JSON and it is of some run and some world."""
    if not plan.runs or not plan.worlds:
        raise MalformedEvidence(
            f"{where}: plan: expected the runs it was made of and their number of ranks, found none"
        )
    for key, value in plan.values.items():
        try:
            msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise MalformedEvidence(f"{where}: plan: {key[:200]}: expected JSON: {error}") from error


def _claimed(envelope: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The statement in `envelope`, whoever signed it."""
    try:
        (signature,) = envelope["signatures"]
        parse_sha256(signature["keyid"], where=f"{where}: key id")
        claimed = msgspec.json.decode(base64.b64decode(envelope["payload"], validate=True), type=dict[str, Any])
    except (KeyError, TypeError, ValueError, binascii.Error, msgspec.DecodeError, RecursionError) as error:
        raise MalformedEvidence(f"{where}: envelope: expected one signed statement: {error}") from error
    return claimed


def _same_statement(claimed: Mapping[str, Any], lock: Lock, where: str) -> None:
    predicate, kind = claimed.get("predicate"), str(claimed.get("predicateType"))
    if not kind.endswith(f"/{PREDICATE}") or predicate != lock.predicate:
        named = str(predicate.get("measurement")) if isinstance(predicate, dict) else "nothing"
        raise VerificationError(
            f"{where}: the lock was edited: its signed statement speaks of measurement {named[:16]}…, "
            f"the file holds {lock.measurement.digest[:16]}…, or approvals differ",
            next_step="restore the approved file, or approve what runs now with: trainguard lock -- CMD…",
        )
