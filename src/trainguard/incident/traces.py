"""What a file says of who made it: its owner, who may write it, who committed the very line and whether that is signed.

    HERE.inode(path), HERE.lines(path, 12)      # as things lie on this machine now

Attribution asks a `Sources` and never the disk itself, so that it can be told what another host said, or a script.

None of it names who held the keyboard. An owner is an account; the author that git shows is text which anybody can set,
unless the commit is signed, and then it is the holder of a key. The repository may be an attacker's: git is asked with
every setting switched off that could make it run a program of the repository's choosing, or believe its own list of
signers.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

GIT_SECONDS = 10.0
OUTPUT_LIMIT_BYTES = 1 << 20
SIGNED: dict[str, Literal["good", "bad", "none", "unknown"]] = {"G": "good", "U": "good", "B": "bad", "N": "none"}
"""git's %G?: U is a signature that holds by a key that nobody vouches for; it still is that key's."""
NAME = re.compile(r"[\x20-\x7e]{1,200}")


class Inode(msgspec.Struct, frozen=True, kw_only=True):
    """Who owns a file and who may write it."""

    uid: int
    mode: int | None = None
    """Permission bits; None where only the owner is known."""
    changed_ns: int | None = None
    """When the inode last changed (ctime), nanoseconds since the epoch."""
    written_ns: int | None = None
    """When the content last changed (mtime); its owner can set it to any time."""
    folder_uid: int | None = None
    folder_mode: int | None = None

    @property
    def writable_by_others(self) -> bool:
        """Whether an account other than the owner may change its content."""
        return self.mode is not None and bool(self.mode & 0o022)

    @property
    def replaceable_by_others(self) -> bool:
        """Whether others may put another file under its name: the folder is theirs to write, and not sticky."""
        mode = self.folder_mode
        return mode is not None and bool(mode & 0o022) and not mode & 0o1000


class Authorship(msgspec.Struct, frozen=True, kw_only=True):
    """Who committed a line, as git tells it."""

    commit: str
    """Hex; empty where the file is not as it was committed."""
    identity: str = ""
    """Author as the commit states it: a claim."""
    committer: str = ""
    """Who committed it, as the commit states: after a rebase or an amended commit another than the author. A signature
    is the committer's. Empty where not asked."""
    signed: Literal["good", "bad", "none", "unknown"] = "none"
    key: str | None = None
    """Fingerprint of the key whose signature holds."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where attribution asks about files."""

    inode: Callable[[Path], Inode | None]
    lines: Callable[[Path, int], Authorship | None]


def look_at(path: Path) -> Inode | None:
    """The inode of `path` as it is now, links not followed; None where it is gone or out of reach."""
    try:
        status, folder = os.lstat(path), path.parent.stat()
    except (OSError, ValueError):
        return None
    return Inode(
        uid=status.st_uid,
        mode=None if stat.S_ISLNK(status.st_mode) else status.st_mode & 0o7777,  # a link's own mode says nothing
        changed_ns=status.st_ctime_ns,
        written_ns=status.st_mtime_ns,
        folder_uid=folder.st_uid,
        folder_mode=folder.st_mode & 0o7777,
    )


def who_wrote(path: Path, line: int) -> Authorship | None:
    """The commit that `line` (from 1) of `path` comes from; None where git does not say."""
    folder, name = path.parent, path.name
    committed = _git(folder, "rev-parse", "--verify", f"HEAD:./{name}")
    present = _git(folder, "hash-object", "--no-filters", "--", name)
    if committed is None or present is None:
        return None
    if committed != present:
        return Authorship(commit="")
    told = _git(folder, "blame", "--no-textconv", "--porcelain", "-L", f"{line},{line}", "HEAD", "--", name)
    commit = (told or "").split(" ", 1)[0]
    if re.fullmatch(r"[0-9a-f]{40,64}", commit) is None:
        return None
    shown = _git(folder, "log", "-1", "--no-show-signature", "--format=%an <%ae>%x00%cn <%ce>%x00%G?%x00%GF", commit)
    parts = (shown or "").split("\0")
    if len(parts) != 4:
        return None
    author, committer = (part if NAME.fullmatch(part) else ascii(part)[:200] for part in parts[:2])
    state = SIGNED.get(parts[2], "unknown")
    return Authorship(commit=commit, identity=author, committer=committer, signed=state, key=parts[3][:100] or None)


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None when it is absent, fails, takes long or says too much."""
    off = {
        "core.fsmonitor": "false",
        "core.hooksPath": "/dev/null",
        "diff.external": "",
        "blame.ignoreRevsFile": "",
        "gpg.program": "gpg",
        "gpg.ssh.program": "ssh-keygen",
        "gpg.x509.program": "gpgsm",
        "gpg.ssh.allowedSignersFile": "/dev/null",
        "gpg.ssh.revocationFile": "",
        "log.showSignature": "false",
    }
    options = [word for name, value in off.items() for word in ("-c", f"{name}={value}")]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": os.environ.get("HOME", "/"),
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "LC_ALL": "C",
    }
    try:
        done = subprocess.run(
            ["git", "--no-pager", "--no-replace-objects", *options, *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if done.returncode or len(done.stdout) > OUTPUT_LIMIT_BYTES:
        return None
    return done.stdout.decode("utf-8", "replace").strip()


HERE = Sources(inode=look_at, lines=who_wrote)
"""This machine, now."""
