"""Vet a file or a folder: open, hash, recognise by content, judge, and report. The engine of `trainguard scan`.

 (1) open without blocking and without believing the name; refuse what is not a regular file
 (2) hash every byte
 (3) recognise by content only and judge (formats/)
 (4) ask of everything: would an unpickler, a zip reader or a tar reader make something else of these bytes?
 (5) compare size and times with those at (1); a file that changed has no verdict

The verdict is about the bytes that were hashed. Between (2) and (3) the same descriptor is read twice; a writer who
changes content and then restores size, mtime *and* ctime needs root. Who loads must load the bytes that were hashed.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainguard.scan.budget import Meter, OverBudget
from trainguard.scan.formats import SHAPED, STRONG, Format, pickles, tar, text, zips
from trainguard.scan.formats.interface import HEAD_BYTES, Job, Notes, printable
from trainguard.scan.limits import VERSION, ScanPolicy
from trainguard.scan.source import Changed, FileSource, Source
from trainguard.scan.trust import Trust, parse_trust_line
from trainguard.scan.verdict import FileReport, Reason, Report, Verdict, worst

CHUNK_BYTES = 1 << 20
SPARSE_BYTES = 8 << 30
SPARSE_SHARE = 64
"""A file over SPARSE_BYTES of which less than one byte in SPARSE_SHARE is stored is a hole that only takes time to
read; file systems that compress come nowhere near it with anything but zeros."""

WEIGHTS = re.compile(
    r"model|weight|checkpoint|ckpt|consolidated|adapter|pytorch|diffusion|lora|ema|epoch|step|last|best|final|\.distcp\Z"
    r"|\.safetensors\Z|\.gguf\Z|\.onnx\Z|\.keras\Z|\.h5\Z",
    re.IGNORECASE,
)
SIDE = re.compile(
    r"rng|random|optim|sched|scaler|args|config|metadata|trainer|sampler|dataloader|tokenizer|vocab|loss|index|\.json\Z"
    r"|\.py\Z|\.txt\Z|\.md\Z|\.ya?ml\Z",
    re.IGNORECASE,
)
"""Names of side files; they only choose the technique a reason is filed under, never whether a file is looked at."""


SHADOWED = frozenset(("torch", "numpy", "transformers", "joblib", "sklearn", "lightning", "accelerate"))
"""Libraries the lists believe, beside the standard library."""


class NotVetted(Exception):
    """A path that cannot be judged; the message is one sentence."""


def vet(path: str | os.PathLike[str], policy: ScanPolicy | None = None) -> Report:
    """The verdict on a file, or on every file of a folder whatever its name. Never raises for what it finds.

    Raises Misuse for a trust line in `policy` that is none.
    """
    policy = policy or ScanPolicy()
    for line in policy.trust:
        parse_trust_line(line)
    started = time.process_time()
    shown = os.fspath(path)
    files: list[FileReport] = []
    reasons: list[Reason] = []
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        files.append(_unread(shown, _open_error(shown, error)))
    else:
        if stat.S_ISDIR(mode):
            for item in walk(Path(path), policy):
                if isinstance(item, Reason):
                    reasons.append(item)
                else:
                    files.append(vet_file(item, policy, name=os.path.relpath(item, path), in_folder=True))
            if not files and not reasons:
                reasons.append(_reason(Verdict.ERROR, "folder", f"{printable(shown)}: an empty folder; nothing to vet"))
            reasons += stand_ins(files)
        else:
            files.append(vet_file(path, policy, name=shown))
    return Report(
        path=printable(shown, 4096),
        verdict=worst([file.verdict for file in files] + [reason.verdict for reason in reasons]),
        tier=policy.tier,
        policy=policy.fingerprint,
        version=VERSION,
        files=tuple(files),
        reasons=tuple(reasons),
        seconds=round(time.process_time() - started, 3),
    )


def vet_file(
    file: int | str | os.PathLike[str],
    policy: ScanPolicy | None = None,
    *,
    name: str | None = None,
    in_folder: bool = False,
) -> FileReport:
    """The verdict on one file: an open descriptor (left open, its position untouched) or a path.

    name: what the report calls it. in_folder: whether it is one of many, which makes a side file E2 and an empty file
    harmless. Give the descriptor you will load from: then nothing can be put between check and use.
    """
    policy = policy or ScanPolicy()
    shown = name if name is not None else (f"fd {file}" if isinstance(file, int) else os.fspath(file))
    try:
        descriptor = file if isinstance(file, int) else _open(file, shown)
    except NotVetted as error:
        return _unread(shown, str(error), in_folder=in_folder)
    try:
        return _vet_descriptor(descriptor, policy, shown, in_folder)
    except NotVetted as error:
        return _unread(shown, str(error), in_folder=in_folder)
    finally:
        if not isinstance(file, int):
            os.close(descriptor)


def _open(path: str | os.PathLike[str], shown: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise NotVetted(_open_error(shown, error)) from error


def _open_error(shown: str, error: OSError) -> str:
    return f"{printable(shown, 4096)}: cannot be opened: {error.strerror or 'unknown error'}"


def _vet_descriptor(descriptor: int, policy: ScanPolicy, shown: str, in_folder: bool) -> FileReport:
    try:
        before = os.fstat(descriptor)
    except OSError as error:
        raise NotVetted(_open_error(shown, error)) from error
    if not stat.S_ISREG(before.st_mode):
        raise NotVetted(f"{printable(shown, 4096)}: expected a regular file, found {_kind(before.st_mode)}")
    if before.st_size > SPARSE_BYTES and before.st_blocks * 512 < before.st_size // SPARSE_SHARE:
        stored = before.st_blocks * 512
        raise NotVetted(f"{printable(shown, 4096)}: {before.st_size} bytes, of which {stored} are stored; not read")
    try:
        digest = _digest(descriptor, before.st_size, policy)
        source = FileSource(descriptor, before.st_size)
        notes, (form, loader) = judge_source(
            source, policy, shown, sha256=digest if policy.digest == "sha256" else None, in_folder=in_folder
        )
        after = os.fstat(descriptor)
    except Changed as error:
        raise NotVetted(f"{printable(shown, 4096)}: became shorter while it was read") from error
    except OSError as error:
        raise NotVetted(f"{printable(shown, 4096)}: cannot be read: {error.strerror or 'unknown error'}") from error
    if _identity(before) != _identity(after):
        raise NotVetted(f"{printable(shown, 4096)}: changed while it was read; scan it again when nothing writes to it")
    return FileReport(
        path=printable(shown, 4096),
        verdict=notes.verdict,
        format=form,
        loader=loader,
        size=before.st_size,
        sha256=digest if policy.digest == "sha256" else None,
        blake3=digest if policy.digest == "blake3" else None,
        reasons=tuple(sorted(notes.reasons, key=lambda reason: -reason.verdict.rank)),
        globals=tuple(sorted(printable(name) for name in notes.globals)),
        second_opinion="; ".join(sorted(notes.opinions)) or "not needed",
    )


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
        stat.S_IFDIR: "a folder",
    }
    return kinds.get(stat.S_IFMT(mode), "another kind")


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


def _hasher(policy: ScanPolicy) -> _Hasher:
    if policy.digest == "blake3":
        from blake3 import blake3

        return blake3()
    return hashlib.sha256()


def _digest(descriptor: int, size: int, policy: ScanPolicy) -> str:
    hasher = _hasher(policy)
    buffer = bytearray(min(CHUNK_BYTES, size + 1))
    view = memoryview(buffer)
    offset = 0
    while count := os.preadv(descriptor, [buffer], offset):
        hasher.update(view[:count])
        offset += count
    return hasher.hexdigest()


def judge_source(
    source: Source, policy: ScanPolicy, name: str, *, sha256: str | None = None, in_folder: bool = False
) -> tuple[Notes, tuple[str, str]]:
    """(what was found, (format, loader)) for bytes that are already open. For callers that hold the bytes."""
    notes = Notes(technique=technique_for(name, in_folder=in_folder), limit=policy.reasons)
    job = Job(
        source=source,
        notes=notes,
        meter=Meter(policy),
        trust=Trust(policy, sha256),
        judge=judge,
        name=name.rpartition("/")[2],
        in_folder=in_folder,
    )
    collecting = gc.isenabled()
    gc.disable()  # millions of small stand-ins without cycles: collecting them costs a fifth of the time and finds none
    try:
        return notes, judge(job)
    except OverBudget as error:
        job.note(Verdict.ERROR, "budget", f"{error}; not read further")
    except RecursionError:
        job.note(Verdict.ERROR, "budget", "nested too deeply; not read further")
    except MemoryError:
        job.note(Verdict.ERROR, "budget", "needs more memory than there is; not read further")
    finally:
        if collecting:
            gc.enable()
    return notes, ("none", "none")


def technique_for(name: str, *, in_folder: bool) -> str:
    """E2 for what stands beside the weights, E1 for the checkpoint itself."""
    base = name.rpartition("/")[2]
    if base == ".metadata" or SIDE.search(base):
        return "E2"
    return "E1" if WEIGHTS.search(base) or not in_folder else "E2"


def judge(job: Job) -> tuple[str, str]:
    """Recognise a job's bytes by content and judge them; then ask whether they are something else as well."""
    if not job.source.size:
        if not job.members and not job.in_folder:
            job.note(Verdict.ERROR, "empty", "an empty file; nothing to vet")
        return "empty", "none"
    head = job.source.read(0, HEAD_BYTES)
    found = next((kind for kind in STRONG if kind.sniff(head, job.source)), None)
    if found is None and not text.looks_like_text(head):
        found = next((kind for kind in SHAPED if kind.sniff(head, job.source)), None)
    if found is not None:
        result = found.judge(job) or (found.name, found.loader)
    else:
        result = _judge_rest(job)
    _judge_second_face(job, found, head, result[0])
    return result


def _judge_rest(job: Job) -> tuple[str, str]:
    """Without a magic: a pickle of protocol 0 or 1, text, or something nobody knows."""
    if pickles.is_plain_pickle(job):
        return pickles.judge(job)
    if text.is_text(job.source):
        return text.judge(job)
    job.unknown("format", f"content of no known format, beginning {job.source.read(0, 8)!r}")
    return "unknown", "none"


def _judge_second_face(job: Job, found: Format | None, head: bytes, form: str) -> None:
    """Refuse bytes that another loader reads as something else."""
    if form in ("pickle", "joblib", "torch-legacy"):
        pass
    elif why := pickles.acts_like_pickle(job):
        job.unsafe("polyglot", f"an unpickler reads these bytes too: {why}", 0)
    if found is not tar.TAR and tar.is_header(head[: tar.BLOCK]):
        job.unsafe(
            "polyglot", "begins with a tar header as well: tarfile and torch's old reader open it as an archive", 0
        )
    # A tar may well end with a zip; it was judged as a member, and so was a member that only ends like one.
    if found not in (zips.ZIP, tar.TAR) and _ends_like_zip(job.source):
        job.unsafe("polyglot", "ends with a zip directory as well: zip readers open it as an archive")


def _ends_like_zip(source: Source) -> bool:
    """Whether zip readers that search from the end would find a directory: the last 64 KiB hold its end record."""
    tail = source.read(max(0, source.size - 65_557), 65_557)
    position = tail.rfind(b"PK\5\6")
    while position >= 0:
        comment = int.from_bytes(tail[position + 20 : position + 22], "little")
        if position + 22 <= len(tail) and position + 22 + comment <= len(tail):
            size = int.from_bytes(tail[position + 12 : position + 16], "little")
            at = source.size - len(tail) + position
            if size <= at and source.read(at - size, 4) == b"PK\1\2":
                return True
        position = tail.rfind(b"PK\5\6", 0, position)
    return False


@dataclass(frozen=True, slots=True)
class _Folder:
    path: Path
    depth: int


def walk(root: Path, policy: ScanPolicy) -> Iterator[Path | Reason]:
    """Every file under `root`, sorted, dot files too. Links to files are followed (a hub cache is made of them);
    links to folders only inside `root`. What cannot be read, or is over a limit, comes back as a reason.
    """
    inside = os.path.realpath(root)
    pending, seen, count = [_Folder(root, 0)], {inside}, 0
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(folder.path), key=lambda entry: entry.name)
        except OSError as error:
            yield _reason(Verdict.ERROR, "folder", _open_error(str(folder.path), error))
            continue
        for entry in entries:
            if not entry.is_dir():
                count += 1
                if count > policy.files:
                    yield _reason(Verdict.ERROR, "budget", f"more than {policy.files} files; not read further")
                    return
                yield Path(entry.path)
                continue
            real = os.path.realpath(entry.path)
            if real in seen:
                continue
            seen.add(real)
            if real != inside and not real.startswith(inside + os.sep):
                what = f"{printable(entry.path)}: a link to a folder outside; scan that folder too"
                yield _reason(Verdict.UNKNOWN, "folder", what)
            elif folder.depth >= policy.folder_depth:
                what = f"{printable(entry.path)}: folders nested more than {policy.folder_depth} deep"
                yield _reason(Verdict.ERROR, "budget", what)
            else:
                pending.append(_Folder(Path(entry.path), folder.depth + 1))


def stand_ins(files: list[FileReport]) -> Iterator[Reason]:
    """A source file whose name is that of a module the lists believe would be imported in its place."""
    for file in files:
        parts = file.path.split("/")
        if not file.path.endswith(".py") or len(parts) > 2:
            continue
        name = parts[0] if len(parts) > 1 and parts[-1] == "__init__.py" else parts[-1].removesuffix(".py")
        if name in sys.stdlib_module_names or name in SHADOWED:
            what = f"{file.path}: stands in for the module {name!a} when this folder is on the import path"
            yield _reason(Verdict.UNSAFE, "shadow", what, technique="E2")


def _reason(verdict: Verdict, rule: str, what: str, technique: str = "E2") -> Reason:
    return Reason(verdict=verdict, rule=rule, what=what, technique=technique)


def _unread(shown: str, what: str, *, in_folder: bool = False) -> FileReport:
    return FileReport(
        path=printable(shown, 4096),
        verdict=Verdict.ERROR,
        format="none",
        loader="none",
        size=None,
        reasons=(
            Reason(verdict=Verdict.ERROR, rule="file", what=what, technique=technique_for(shown, in_folder=in_folder)),
        ),
    )
