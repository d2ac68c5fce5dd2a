"""A checkpoint against its seal: names, kinds, sizes and modes, then bytes, then the tensors that changed.

Steps 4 to 6 of verify.py.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping

from trainguard.finding import Outcome
from trainguard.seal.bundle import Seal
from trainguard.seal.case import Case
from trainguard.seal.distributed import pieces
from trainguard.seal.hashing import DIGEST_BYTES, SHARDED
from trainguard.seal.ledger import SealLeaf
from trainguard.seal.manifest import (
    OMS_IGNORED,
    SEAL_NAME,
    SINGLE,
    Entry,
    NotSealable,
    list_entries,
    read_manifest,
)
from trainguard.seal.report import CONTENT
from trainguard.seal.tensors import PIECE, is_training_state

TENSORS_SHOWN = 100
"""Findings per file that name a tensor; beyond it one finding counts the rest."""
GROWTH_BYTES = 1 << 20
"""A file more than twice as long as it was sealed, and this much more, changed: no need to read it to say so."""
SEALS_SEARCHED = 256
"""Newest other seals in which a file that differs is looked for."""
_DANGEROUS_BITS = stat.S_ISUID | stat.S_ISGID
_SUSPICIOUS_BITS = stat.S_ISVTX | stat.S_IWOTH | 0o111


def check_content(case: Case, seal: Seal) -> None:
    """Names, kinds, sizes, modes; then bytes; then tensors."""
    try:
        listed = {entry.name: entry for entry in list_entries(case.place)}
    except NotSealable as error:
        case.say("violated", ("E7", "E2"), f"holds what cannot have been sealed: {error}")
        return
    sealed = _renamed_single(seal, listed)
    before = len(case.findings)
    _check_names(case, seal, sealed, listed)
    common = [name for name in sealed if name in listed]
    files = [name for name in common if listed[name].kind != "folder" and sealed[name].kind != "folder"]
    to_read = frozenset(files) - _check_grown(case, sealed, listed, files)
    if to_read:
        read = read_manifest(case.place, hash_type=seal.hash_type, tensors=False, only=to_read)
        changed = {e.name for e in read.entries if e.name in to_read and e.digest != sealed[e.name].digest}
        _check_changed(case, seal, sealed, sorted(changed))
        case.files = len(to_read)
        case.bytes = sum(listed[name].size or 0 for name in to_read if listed[name].kind == "file")
    _check_modes(case, sealed, listed)
    if len(case.findings) == before and to_read:
        case.checked.append(CONTENT)


def _check_grown(
    case: Case, sealed: Mapping[str, Entry], listed: Mapping[str, Entry], files: list[str]
) -> frozenset[str]:
    """Files that are so much longer than they were sealed that reading them would only cost time."""
    grown = set()
    for name in files:
        was, now = sealed[name].size, listed[name].size
        if was is None or now is None or now <= 2 * was + GROWTH_BYTES:
            continue
        grown.add(name)
        file = case.place.name if name == SINGLE else name
        message = f"{file} is not the file that was sealed; it is far longer, and was not read"
        techniques = ("E5",) if is_training_state("", file) else ("E3", "E5")
        case.say(_outcome(name), techniques, message, file=name, expected=f"{was} bytes", found=f"{now} bytes")
    return frozenset(grown)


def _renamed_single(seal: Seal, listed: Mapping[str, Entry]) -> Mapping[str, Entry]:
    """The sealed entries; a single file goes by SINGLE, whatever it is called now or was called then."""
    if seal.single and set(listed) == {SINGLE}:
        (entry,) = seal.entries.values()
        return {SINGLE: entry}
    return seal.entries


def _check_names(case: Case, seal: Seal, sealed: Mapping[str, Entry], listed: Mapping[str, Entry]) -> None:
    if (SINGLE in listed) != (SINGLE in sealed):
        kinds = ("a folder", "one file") if SINGLE in listed else ("one file", "a folder")
        case.say("violated", ("E7",), f"was sealed as {kinds[0]}, is {kinds[1]}", expected=kinds[0], found=kinds[1])
        return
    _check_missing(case, sealed, listed)
    _check_extra(case, seal, sealed, listed)
    if seal.complete:
        _check_kinds(case, sealed, listed)


def _check_missing(case: Case, sealed: Mapping[str, Entry], listed: Mapping[str, Entry]) -> None:
    for name in sorted(set(sealed) - set(listed)):
        if sealed[name].kind == "folder" and any(other.startswith(f"{name}/") for other in listed):
            continue  # no longer empty: what is in it is reported as extra
        message = f"{_kind(sealed[name])} {name!r} is missing"
        case.say(_outcome(name), ("E8", "E7"), message, file=name, expected="sealed", found="missing")


def _check_extra(case: Case, seal: Seal, sealed: Mapping[str, Entry], listed: Mapping[str, Entry]) -> None:
    for name in sorted(set(listed) - set(sealed)):
        if _left_out(seal, name) or (listed[name].kind == "folder" and not seal.complete):
            continue
        if SHARDED in seal.hash_type and not listed[name].size and listed[name].kind == "file":
            continue  # an empty file has no shard, so a sharded seal cannot speak of it
        kind = _kind(listed[name])
        message = f"{kind} {name!r} was not there when it was sealed"
        case.say(_outcome(name), ("E7", "E2"), message, file=name, expected="not in the seal", found=kind)


def _check_kinds(case: Case, sealed: Mapping[str, Entry], listed: Mapping[str, Entry]) -> None:
    for name in sorted(set(listed) & set(sealed)):
        before, now = sealed[name], listed[name]
        if (now.kind, now.target) != (before.kind, before.target):
            message = f"{name!r} is another kind of thing than was sealed"
            case.say("violated", ("E7",), message, file=name, expected=_shown(before), found=_shown(now))


def _shown(entry: Entry) -> str:
    return _kind(entry) + (f" to {entry.target!r}" if entry.target is not None else "")


def _outcome(name: str) -> Outcome:
    """git rewrites its own folder when asked for a status, and no loader reads it."""
    return "suspicious" if name.startswith(".git/") else "violated"


def _left_out(seal: Seal, name: str) -> bool:
    """Whether another tool's seal does not cover `name`: what OMS ignores, what it was told to, and folders."""
    if seal.complete:
        return False
    return any(name == path or name.startswith(f"{path}/") for path in (*seal.ignored, *OMS_IGNORED, SEAL_NAME))


def _kind(entry: Entry) -> str:
    return {"file": "file", "folder": "empty folder", "link": "symbolic link"}[entry.kind]


def _check_modes(case: Case, sealed: Mapping[str, Entry], listed: Mapping[str, Entry]) -> None:
    """Rights a file gained. Rights lost, and other rights gained, come with copying and are let pass."""
    for name, entry in sorted(sealed.items()):
        now = listed.get(name)
        if now is None or now.mode is None or entry.mode is None or now.kind == "folder":
            continue
        gained = now.mode & ~entry.mode
        if gained & (_DANGEROUS_BITS | _SUSPICIOUS_BITS):
            case.say(
                "violated" if gained & _DANGEROUS_BITS else "suspicious",
                ("E7",),
                f"{'file' if name == SINGLE else repr(name)} gained rights since it was sealed",
                file=name,
                expected=f"mode {entry.mode:04o}",
                found=f"mode {now.mode:04o}",
            )


def _check_changed(case: Case, seal: Seal, sealed: Mapping[str, Entry], changed: list[str]) -> None:
    """Say what changed in each file: the tensors, where they can be told, and whose file it is instead."""
    if not changed:
        return
    reread = read_manifest(case.place, hash_type=seal.hash_type, tensors=True, only=frozenset(changed))
    now = {entry.name: entry for entry in reread.entries}
    elsewhere = _index_others(case, seal)
    for name in changed:
        swapped = _check_swapped(case, name, now[name], elsewhere)
        _name_tensors(case, name, sealed[name], now[name], swapped)


def _index_others(case: Case, seal: Seal) -> dict[str, tuple[SealLeaf, str]]:
    """Digest → the other seal and file name it belongs to, for the newest seals our log has."""
    found: dict[str, tuple[SealLeaf, str]] = {}
    if case.ledger is None:
        return found
    for leaf in reversed(case.ledger.seals[-SEALS_SEARCHED:]):
        if leaf.payload == seal.payload_digest:
            continue
        other = case.ledger.kept(leaf, case.public, *case.others)
        if other is None or other.hash_type != seal.hash_type:
            continue
        for name, entry in other.entries.items():
            if entry.digest is not None:
                found.setdefault(entry.digest, (leaf, name))
    return found


def _check_swapped(case: Case, name: str, now: Entry, elsewhere: Mapping[str, tuple[SealLeaf, str]]) -> tuple[str, ...]:
    """E6, E7: the file is one that was sealed with another checkpoint. The techniques, none where it is not."""
    if now.digest is None or now.digest not in elsewhere:
        return ()
    leaf, other = elsewhere[now.digest]
    origin = leaf.called if other == SINGLE else f"{other!r} of {leaf.called}"
    put_back = case.leaf is not None and (leaf.place, leaf.run) == (str(case.place), case.leaf.run)
    techniques = ("E6", "E7") if put_back else ("E7", "E6")
    case.say(
        "violated",
        techniques,
        f"{'the file' if name == SINGLE else repr(name)} is {origin}, put {'back' if put_back else 'here'}",
        file=name,
        expected="the file that was sealed with this checkpoint",
        found=origin,
        cites=(leaf.citation,),
    )
    return techniques


def _name_tensors(case: Case, name: str, sealed: Entry, now: Entry, swapped: tuple[str, ...]) -> None:
    """One finding per tensor that differs; one for the file where none can be told. swapped: a whole file's story."""
    file = case.place.name if name == SINGLE else name
    differences = list(_differences(sealed.tensors or {}, now.tensors or {})) if sealed.tensors else []
    names = _pieces(case, name, differences)
    for tensor, what, before, after in [(names.get(t, t), *rest) for t, *rest in differences[:TENSORS_SHOWN]]:
        techniques = swapped or (("E5",) if is_training_state(tensor, file) else ("E3",))
        message = f"{tensor} in {file} {what} since it was sealed"
        case.say("violated", techniques, message, file=name, tensor=tensor, expected=before, found=after)
    if len(differences) > TENSORS_SHOWN:
        case.say("violated", ("E3", "E5"), f"{len(differences) - TENSORS_SHOWN} more tensors differ", file=name)
    if not differences:
        where, before, after = _first_difference(case.seal, sealed, now)
        case.say(
            _outcome(name),
            swapped or (("E5",) if is_training_state("", file) else ("E3", "E5")),
            f"{file} is not the file that was sealed; {_why_unnamed(sealed, now)}{where}",
            file=name,
            expected=f"{sealed.size if sealed.size is not None else '?'} bytes, {before}",
            found=f"{now.size} bytes, {after}",
        )


def _first_difference(seal: Seal | None, sealed: Entry, now: Entry) -> tuple[str, str, str]:
    """(where, digest before, digest now); of a file sealed in shards, the first shard that differs."""
    before, after = sealed.digest or "", now.digest or ""
    base, sharded, size = (seal.hash_type if seal else "").partition(SHARDED)
    if not sharded:
        return "", before, after
    width = 2 * DIGEST_BYTES[base]
    pairs = zip(range(0, len(before) + width, width), range(0, len(after) + width, width), strict=False)
    at = next((at for at, _ in pairs if before[at : at + width] != after[at : at + width]), 0)
    start = at // width * int(size)
    where = f"; the first shard that differs begins at byte {start}"
    return where, before[at : at + width] or "no shard there", after[at : at + width] or "no shard there"


def _pieces(case: Case, name: str, differences: list[tuple[str, str, str, str]]) -> dict[str, str]:
    """Pieces of a distributed checkpoint by the names of their tensors."""
    if not any(tensor.startswith(PIECE) for tensor, *_ in differences):
        return {}
    folder, _, file = name.rpartition("/")
    return pieces(case.place / folder, file)


def _why_unnamed(sealed: Entry, now: Entry) -> str:
    if sealed.tensors is None:
        return "its format has no tensors that could be named"
    return "bytes outside every tensor changed" if now.tensors is not None else "its tensors cannot be read any more"


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """(name, what happened, digest before, digest now); nothing where the file can no longer be read as one."""
    if not now:
        return
    for name in (*before, *(name for name in now if name not in before)):
        if before.get(name) != now.get(name):
            what = "changed" if name in before and name in now else "is gone" if name in before else "was added"
            yield (
                name,
                what,
                f"blake3-128 {before[name]}" if name in before else "absent",
                (f"blake3-128 {now[name]}" if name in now else "absent"),
            )
