"""What was saved, against what the same step of a replay saves (E9; spec/replay.md, "Files").

The supervisor digests every file that a run saves, storage by storage, when it seals it. A replay tells of the same
storages what `torch.save` was given. Equal: the file holds what the step had. Else something altered it on its way, in
memory or in the file; no check in the training process is needed to see it.

A file is compared with the save of the same path after the step that it was written after. Files' times are coarse: it
may be some steps earlier where steps are short. Whatever a file can be held to is tried before it is called another:
paths that are written again and again, and saves into memory that get their name later.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trainguard.errors import TrainguardError
from trainguard.evidence import Evidence
from trainguard.finding import Citation
from trainguard.replay.rerun import Rerun, Saved
from trainguard.seal.prints import Prints, parse_prints, read_prints

FILES_LIMIT = 10_000
COARSE_NS = 40_000_000
"""Times of files and of steps together are at most this far from one another."""

LATE_NS = 2_000_000_000
"""On a busy machine steps are told so much later than a file is seen."""

Storage = tuple[int, str, str | None]


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a run, as it was sealed."""

    path: str
    step: int
    """Steps made when it was written, at most."""
    since: int = 0
    """And at least."""
    until: int = 0
    """The last step that it can have been written after, where steps were told late; 0 where that is not known."""
    form: str
    storages: dict[str, Storage]
    names: dict[str, str]
    """Record → tensors in it."""
    citation: Citation | None = None


class Altered(msgspec.Struct, frozen=True, kw_only=True):
    """A file that holds something else than a replay saved."""

    path: str
    step: int
    tensor: str | None
    """First tensor that differs."""
    tensors: int
    of: int
    expected: str
    found: str


def kept_files(records: Iterable[Evidence], blob: Callable[[str], bytes], walls: Mapping[int, int]) -> tuple[Kept, ...]:
    """Every file that was sealed when the run saved it, where its digests can be read. walls: step → its time, ns."""
    found: list[Kept] = []
    for record in records:
        path, prints = record.body.get("path"), record.body.get("prints")
        if record.kind != "seal" or record.source != "supervisor" or record.step is None or len(found) >= FILES_LIMIT:
            continue
        if not isinstance(path, str) or not isinstance(prints, str):
            continue
        try:
            read = parse_prints(blob(prints))
        except TrainguardError:
            continue
        citation = Citation(leaf=record.leaf, hash=record.hash) if record.leaf is not None and record.hash else None
        kept = _kept(path, record.step, read, citation)
        since, until = _earliest(record.step, walls), _latest(record.step, walls)
        found.append(msgspec.structs.replace(kept, since=since, until=until))
    return tuple(found)


def first_altered(files: Sequence[Kept], found: Rerun, cwd: str) -> Altered | None:
    """The first file, by step, that is not what the replay saved in its place; None where all that can be held to a
    save are equal to one. cwd: the run's working folder, which the sandbox stands for."""
    for file in sorted(files, key=lambda each: (each.step, each.path)):
        altered = _compare(file, _made(file, found, cwd))
        if altered is not None:
            return altered
    return None


def written_natively(
    written: Sequence[tuple[str, int]], key: str
) -> dict[str, list[tuple[str, int, str, str | None, str]]]:
    """Storages of the files that were written once, where they still are; of others only the last version is there."""
    times = Counter(path for path, _ in written)
    prints = {path: read_prints(Path(path), key) for path, count in times.items() if count == 1}
    return {path: list(read.storages) for path, read in prints.items() if read is not None and read.form != "torch"}


def _made(file: Kept, found: Rerun, cwd: str) -> list[Saved]:
    """Saves of the replay that may have made the file."""
    path = os.path.realpath(file.path)
    if file.form == "torch":
        layout = {name: storage[0] for name, storage in file.storages.items()}
        alike = [s for s in found.saved if {n: each[0] for n, each in s.storages.items()} == layout]
        named = [
            s for s in alike if s.path is not None and os.path.realpath(in_the_run(s.path, found.root, cwd)) == path
        ]
        return named or [s for s in alike if s.path is None]
    return [
        Saved(process=0, number=0, step=step, path=path, aside=False, storages=_storages(found.native[written]))
        for written, step in found.written
        if written in found.native and os.path.realpath(in_the_run(written, found.root, cwd)) == path
    ]


def in_the_run(path: str, root: str, cwd: str) -> str:
    """What the run had where a replay has `path` (sandbox.py)."""
    for folder, origin in ((f"{root}/work", cwd), (f"{root}/outside", "/")):
        if path.startswith(folder + "/"):
            return f"{origin.rstrip('/')}/{path[len(folder) + 1 :]}"
    return path


def _storages(rows: Iterable[Sequence[Any]]) -> dict[str, Storage]:
    return {name: (size, sampled, whole) for name, size, sampled, whole, _ in rows}


def _compare(file: Kept, made: Sequence[Saved]) -> Altered | None:
    if any(not _unlike(file, save) for save in made):
        return None
    near = [save for save in made if file.since <= save.step <= file.step + 1 and not save.aside]
    if not near or any(save.aside for save in made):
        return None
    save = min(near, key=lambda each: (len(_unlike(file, each)), abs(each.step - file.step)))
    odd = _unlike(file, save)
    names = [file.names.get(record) or f"storage {record}" for record in odd]
    return Altered(
        path=file.path,
        step=save.step,
        tensor=names[0].split(", ")[0],
        tensors=len(odd),
        of=len(file.storages),
        expected=save.storages[odd[0]][1] if odd[0] in save.storages else "nothing",
        found=file.storages[odd[0]][1] if odd[0] in file.storages else "nothing",
    )


def _earliest(step: int, walls: Mapping[int, int]) -> int:
    """The first step after which a file can have been written that seems to be written after `step`."""
    passed, first = 0, step
    while first > 0 and passed < COARSE_NS:
        passed += walls.get(first, 0) or COARSE_NS
        first -= 1
    return first


def _latest(step: int, walls: Mapping[int, int]) -> int:
    """The last step after which a file can have been written that was seen when `step` was the last one told."""
    passed, last = 0, step
    while passed < LATE_NS and last < max(walls, default=0):
        last += 1
        passed += walls.get(last, 0) or COARSE_NS
    return last


def _unlike(file: Kept, save: Saved) -> list[str]:
    """Records that differ, in the file's order."""
    names = [*file.storages, *(name for name in save.storages if name not in file.storages)]
    return [name for name in names if not _equal(file.storages.get(name), save.storages.get(name))]


def _equal(one: Storage | None, two: Storage | None) -> bool:
    if one is None or two is None or one[:2] != two[:2]:
        return False
    return one[2] is None or two[2] is None or one[2] == two[2]


def _kept(path: str, step: int, prints: Prints, citation: Citation | None) -> Kept:
    return Kept(
        path=path,
        step=step,
        form=prints.form,
        storages=_storages(prints.storages),
        names={name: names for name, _, _, _, names in prints.storages},
        citation=citation,
    )
