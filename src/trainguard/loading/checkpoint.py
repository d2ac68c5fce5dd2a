"""Open a checkpoint: hold its bytes, vet them, verify their seal, and load what was held.

 (1) copy every file into memory nobody can write to (hold.py)
 (2) vet the copies; anything but safe is refused (scan/)
 (3) verify the seal, if there is one or one is required, and compare the copies with what it sealed (seal/)
 (4) resolve the names the files need, each from where its library is installed (names.py)
 (5) load the copies with those names and no others (loaders.py)

Steps 1 to 3 import nothing and call nothing that the checkpoint names. The caller still owes: whether the run that made
the checkpoint is to be believed (`trainguard verdict`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainguard.errors import Misuse, Unavailable
from trainguard.finding import worst_first
from trainguard.home import Home
from trainguard.loading.distributed import METADATA, load_distributed
from trainguard.loading.hold import Held, hold
from trainguard.loading.loaders import LOADERS
from trainguard.loading.names import resolve_all
from trainguard.loading.refusals import (
    LoadRefused,
    NotWhatWasSealed,
    SealMissing,
    UnsafeCheckpoint,
    UnvettedCheckpoint,
)
from trainguard.scan import FileReport, Reason, ScanPolicy, Verdict, vet_file, worst
from trainguard.scan.trust import parse_trust_line
from trainguard.scan.vet import stand_ins, walk
from trainguard.seal.bundle import Seal
from trainguard.seal.hashing import SHARDED, new_hasher
from trainguard.seal.manifest import SEAL_NAME, SEAL_SUFFIX, SINGLE
from trainguard.seal.verify import verify_sealed

SealRule = Literal["if-present", "required", "ignore"]
SEALED_ABOVE = 3
"""Folders above a file in which a seal that covers it is looked for."""
CHUNK_BYTES = 1 << 20


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    policy: ScanPolicy | None = None,
    seal: SealRule = "if-present",
    home: Home | None = None,
    key: Path | None = None,
    signers: Path | None = None,
    run: str | None = None,
    newest: bool = False,
) -> Any:
    """The content of the checkpoint at `path`: of a file, what it holds; of a folder, a dict by file name.

    path: a torch, safetensors, pickle, joblib, numpy or JSON file; a folder of such files, in which text and other
    files without data are vetted and left out; or the folder of a distributed checkpoint: then its state dict.
    map_location: as torch.load takes it; None leaves tensors where they were saved.
    policy: budgets, tier and trust of the scan (spec/scan.md).
    seal: `required` refuses what has no seal; `ignore` does not look for one.
    home, key, signers, run, newest: as `trainguard.seal.verify_seal` takes them; home defaults to that of `Home.find`.

    Raises a LoadRefused (UnsafeCheckpoint, UnvettedCheckpoint, NotWhatWasSealed, SealMissing, ModuleShadowed) before
    anything of the checkpoint is imported or unpickled; Misuse where there is no checkpoint at `path`; Unavailable
    where it could not be read, judged or compared. Needs as much memory again as the files have, while they are loaded.
    """
    policy = policy or ScanPolicy()
    trusted = frozenset(parse_trust_line(line).name for line in policy.trust)
    place = Path(path)
    if seal not in ("if-present", "required", "ignore"):
        raise Misuse(f"seal={seal!r}: expected 'if-present', 'required' or 'ignore'")
    with contextlib.ExitStack() as stack:
        folder = place.is_dir()
        held = _hold_folder(place, policy, stack) if folder else {SINGLE: stack.enter_context(hold(place))}
        reports = {name: _vet(place, name, one, policy, folder) for name, one in held.items()}
        _refuse_unsafe(place, reports, tuple(stand_ins(list(reports.values()))) if folder else ())
        if seal != "ignore":
            asked = _Asked(home=home, key=key, signers=signers, run=run, newest=newest)
            _check_seal(place, held, required=seal == "required", asked=asked)
        names = {name for report in reports.values() for name in report.globals}
        allowed = resolve_all(names, trusted=trusted)
        if not folder:
            return _load(place, SINGLE, held[SINGLE], reports[SINGLE], allowed, map_location)
        return _load_folder(place, held, reports, allowed, map_location)


# -- 1, 2: hold and vet -----------------------------------------------------------------------------------------------


def _hold_folder(place: Path, policy: ScanPolicy, stack: contextlib.ExitStack) -> dict[str, Held]:
    """Every file of the folder, by its relative name. Raises where the folder itself cannot be walked."""
    held: dict[str, Held] = {}
    for item in walk(place, policy):
        if isinstance(item, Reason):
            kind = Unavailable if item.verdict is Verdict.ERROR else UnvettedCheckpoint
            raise kind(item.what)
        name = os.path.relpath(item, place)
        held[name] = stack.enter_context(hold(item))
    if not held:
        raise Misuse(f"{place}: expected a checkpoint, found an empty folder")
    return held


def _vet(place: Path, name: str, held: Held, policy: ScanPolicy, in_folder: bool) -> FileReport:
    shown = name if in_folder else str(place)
    return vet_file(held.descriptor, policy, name=shown, in_folder=in_folder)


def _refuse_unsafe(place: Path, reports: Mapping[str, FileReport], more: tuple[Reason, ...]) -> None:
    """Raise for the worst of what was found; return where everything is safe."""
    verdict = worst([report.verdict for report in reports.values()] + [reason.verdict for reason in more])
    if verdict is Verdict.SAFE:
        return
    report = next((report for report in reports.values() if report.verdict is verdict), None)
    reason = next((r for r in (report.reasons if report else more) if r.verdict is verdict), None)
    file = place if report is None or report.path == str(place) else place / report.path
    inside = f"!{reason.member}" if reason and reason.member else ""
    at = f" at byte {reason.offset}" if reason and reason.offset is not None else ""
    message = f"{file}{inside}{at}: {reason.what if reason else verdict.value}"
    if verdict is Verdict.UNSAFE:
        raise UnsafeCheckpoint(f"{message}; nothing was loaded", next_step="keep the file, and find out who wrote it")
    if verdict is Verdict.UNKNOWN:
        lines = sorted({line for one in reports.values() for line in one.trust_lines})
        step = f"if you know it, trust it by name: ScanPolicy(trust={tuple(lines)!r})" if lines else None
        raise UnvettedCheckpoint(f"{message}; nothing was loaded", next_step=step)
    raise Unavailable(f"{message}; nothing was loaded")


# -- 3: the seal ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the caller wants of the seal, as verify_seal takes it."""

    home: Home | None
    key: Path | None
    signers: Path | None
    run: str | None
    newest: bool

    @property
    def anything(self) -> bool:
        return self.newest or any(value is not None for value in (self.key, self.signers, self.run))


def _check_seal(place: Path, held: Mapping[str, Held], *, required: bool, asked: _Asked) -> None:
    """Verify the seal and that the held bytes are the sealed ones; return where there is none and none is needed."""
    home = asked.home if asked.home is not None else Home.find()
    sealed_at, prefix = _sealed_at(place)
    must = required or asked.anything or sealed_at is not None
    if not must and not (home.keys / "attestation.pub").exists():
        return
    try:
        report, seal = verify_sealed(
            sealed_at or place, home=home, key=asked.key, signers=asked.signers, run=asked.run, newest=asked.newest
        )
    except Unavailable as error:
        if not must and "has no seal" in str(error):
            return
        if "has no seal" in str(error):
            raise SealMissing(f"{error}; nothing was loaded", next_step=error.next_step) from error
        raise
    if report.status == "violated" or seal is None:
        found = tuple(worst_first(list(report.findings)))
        first = found[0].message if found else "its seal cannot be believed"
        raise NotWhatWasSealed(
            f"{place}: {first}; nothing was loaded",
            next_step=f"see what changed: trainguard verify {sealed_at or place}",
            findings=found,
        )
    if report.status != "upheld":
        why = report.findings[0].message if report.findings else "it could not be checked"
        raise Unavailable(f"{place}: its seal could not be verified: {why}; nothing was loaded")
    _compare(place, held, prefix, seal)


def _sealed_at(place: Path) -> tuple[Path | None, str]:
    """The file or folder whose seal covers `place`, or None, and what the seal calls `place` ("" where it is that)."""
    if place.is_dir():
        if os.path.lexists(place / SEAL_NAME):
            return place, ""
    elif os.path.lexists(f"{place}{SEAL_SUFFIX}"):
        return place, ""
    real = place.absolute()
    for folder in list(real.parents)[:SEALED_ABOVE]:
        if os.path.lexists(folder / SEAL_NAME):
            return folder, real.relative_to(folder).as_posix()
    return None, ""


def _compare(place: Path, held: Mapping[str, Held], prefix: str, seal: Seal) -> None:
    """Each held file is byte for byte an entry of the seal: what verify read and what we hold are the same."""
    for name, one in held.items():
        if name == SEAL_NAME and not prefix:
            continue
        wanted = name if not prefix else prefix if name == SINGLE else f"{prefix}/{name}"
        entry = next(iter(seal.entries.values())) if seal.single and name == SINGLE else seal.entries.get(wanted)
        if entry is None and (name.split("/")[0] in seal.ignored or (SHARDED in seal.hash_type and not one.size)):
            continue
        if entry is None or entry.digest != _digest(one, seal.hash_type):
            raise NotWhatWasSealed(
                f"{place}: {name!r} is not what was sealed as {wanted!r}: it changed while it was opened;"
                " nothing was loaded"
            )


def _digest(held: Held, hash_type: str) -> str:
    hasher = new_hasher(hash_type)
    for at in range(0, held.size, CHUNK_BYTES):
        hasher.update(held.slice(at, CHUNK_BYTES))
    return str(hasher.hexdigest())


# -- 5: load ----------------------------------------------------------------------------------------------------------


def _load_folder(
    place: Path,
    held: Mapping[str, Held],
    reports: Mapping[str, FileReport],
    allowed: Mapping[str, Any],
    map_location: Any,
) -> dict[str, Any]:
    """The state dict of a distributed checkpoint, else a dict by file name (by folder name for distributed ones)."""
    if METADATA in held:
        return _load_distributed(place, held, allowed, map_location)
    loaded: dict[str, Any] = {}
    spread = [name.removesuffix(METADATA) for name in held if name.endswith(f"/{METADATA}")]
    for name, one in held.items():
        inside = next((prefix for prefix in spread if name.startswith(prefix)), None)
        if inside is not None:
            if name == inside + METADATA:
                files = {other.removeprefix(inside): file for other, file in held.items() if other.startswith(inside)}
                loaded[inside.rstrip("/")] = _load_distributed(place / inside, files, allowed, map_location)
        elif (reports[name].format, reports[name].loader) in LOADERS and not name.endswith(SEAL_SUFFIX):
            loaded[name] = _load(place, name, one, reports[name], allowed, map_location)
    return loaded


def _load_distributed(
    place: Path, files: Mapping[str, Held], allowed: Mapping[str, Any], map_location: Any
) -> dict[str, Any]:
    try:
        return load_distributed(files, allowed, map_location)
    except LoadRefused as error:
        raise type(error)(f"{place}: {error.args[0]}", next_step=error.next_step) from error


def _load(place: Path, name: str, held: Held, report: FileReport, allowed: Mapping[str, Any], map_location: Any) -> Any:
    loader = LOADERS.get((report.format, report.loader))
    shown = place if name == SINGLE else place / name
    if loader is None:
        raise Misuse(
            f"{shown}: expected a torch, safetensors, pickle, joblib, numpy or JSON file, found {report.format};"
            " it is safe to read, and not a checkpoint"
        )
    try:
        return loader(held, allowed, map_location)
    except LoadRefused as error:
        raise type(error)(f"{shown}: {error.args[0]}", next_step=error.next_step, findings=error.findings) from error
