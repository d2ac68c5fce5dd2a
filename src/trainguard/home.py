"""Where state lies: `.trainguard/` of the working folder, or `TRAINGUARD_HOME`.

.trainguard/keys/attestation.{pem,pub}  log.{key,vkey}    keys/ is mode 0700
.trainguard/log/                                          the transparency log (spec/log.md)
.trainguard/runs/<run>/spool                              records of one run (spec/evidence.md)
.trainguard/blobs/<sha256>                                locks and measurements, by content
.trainguard/cache/                                        stat cache, private bytecode; never evidence
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from trainguard.digest import parse_sha256, sha256_hex, write_durably
from trainguard.errors import Misuse, Unavailable, VerificationError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Run ids are file names and travel in URLs: no slash, no space, at most 100 characters."""

BLOB_LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Home:
    """The folders of one installation. Making one touches nothing; `prepare` creates them."""

    root: Path

    @classmethod
    def find(cls) -> Home:
        """TRAINGUARD_HOME if set, else `.trainguard` in the working folder."""
        named = os.environ.get("TRAINGUARD_HOME")
        return cls(Path(named).absolute() if named else Path.cwd() / ".trainguard")

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def cache(self) -> Path:
        """TRAINGUARD_CACHE if set (a fast local disk, say, when the state lies on a shared one), else `cache/`."""
        named = os.environ.get("TRAINGUARD_CACHE")
        return Path(named).absolute() if named else self.root / "cache"

    def prepare(self) -> None:
        """Create the folders, private where keys lie. Raises Unavailable if the disk will not have it."""
        try:
            for folder in (self.root, self.log, self.runs, self.blobs):
                folder.mkdir(parents=True, exist_ok=True)
            for private in (self.keys, self.cache):
                private.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(
                f"{self.root}: state folder cannot be made: {error.strerror}",
                next_step="set TRAINGUARD_HOME to a folder you can write",
            ) from error

    def run(self, name: str) -> Path:
        """The folder of the run `name`, existing or not. Raises Misuse for a name no run can have."""
        if not RUN_NAME.fullmatch(name):
            raise Misuse(f"run {name[:100]!r}: expected letters, digits, '.', '_' or '-', at most 100 characters")
        return self.runs / name

    def find_run(self, name: str) -> str:
        """The id of the one run called `name`: its id, a unique beginning of it, or `latest`."""
        known = sorted((p.name for p in self.runs.iterdir() if p.is_dir()) if self.runs.is_dir() else ())
        if name == "latest" and known:
            return max(known, key=lambda run: (self.runs / run).stat().st_ctime_ns)
        matches = [run for run in known if run == name] or [run for run in known if run.startswith(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise Misuse(f"run {name!r}: expected one run, {len(matches)} begin with it: {', '.join(matches[:5])}")
        raise Misuse(f"run {name!r}: no such run in {self.root}", next_step="list the runs with: trainguard runs")

    def store_blob(self, data: bytes) -> str:
        """Keep `data` by content; returns its SHA-256. Storing the same bytes again writes nothing."""
        digest = sha256_hex(data)
        path = self.blobs / digest
        if not path.exists():
            write_durably(path, data)
        return digest

    def blob(self, digest: str) -> bytes:
        """The bytes with that SHA-256, checked on the way in."""
        path = self.blobs / parse_sha256(digest, where="blob")
        try:
            if path.stat().st_size > BLOB_LIMIT_BYTES:
                raise VerificationError(f"{path}: larger than {BLOB_LIMIT_BYTES} bytes")
            data = path.read_bytes()
        except OSError as error:
            raise Unavailable(f"{path}: stored evidence cannot be read: {error.strerror}") from error
        if sha256_hex(data) != digest:
            raise VerificationError(f"{path}: content does not have the digest it is named by; it was altered")
        return data
