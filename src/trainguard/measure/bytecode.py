"""Is a `.pyc` what its source compiles to? Asked of the job's own interpreter, which compiles the source again.

Comparing costs about 3 ms a file, so it is done for those that are new or differ from the lock, and for all of them
on request. Answers are kept by the digests of both files, never by name or time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainguard.errors import Unavailable
from trainguard.measure.cache import StatCache
from trainguard.measure.interpreter import ask

BATCH = 256
SECONDS = 120.0
_CACHED = re.compile(r"^(.*/)?__pycache__/([^/]+?)\.[^./]+(\.opt-[12])?\.pyc$")


def source_of(pyc: str) -> str:
    """The source that belongs to `…/__pycache__/name.tag.pyc`, or the path itself for a `.pyc` without one."""
    match = _CACHED.match(pyc)
    return f"{match.group(1) or ''}{match.group(2)}.py" if match else pyc


def compare(
    root: Path,
    candidates: Mapping[str, str],
    sources: Mapping[str, str],
    *,
    executable: Path,
    env: Mapping[str, str],
    cache: StatCache,
) -> dict[str, str]:
    """Path of each `.pyc` in `candidates` (path → `<sha256> <state>`) → same, differs or unreadable.

    sources: path → `<sha256> <size>` of the sources below the same root.
    """
    results: dict[str, str] = {}
    open_questions: list[tuple[str, str]] = []
    for pyc, value in sorted(candidates.items()):
        key = f"bytecode:{value[:64]}:{sources.get(source_of(pyc), '')[:64]}:{executable}"
        known = cache.facts.get(key)
        if known is not None:
            results[pyc] = known
        else:
            open_questions.append((pyc, key))
    for start in range(0, len(open_questions), BATCH):
        batch = open_questions[start : start + BATCH]
        for (pyc, key), answer in zip(batch, _ask(root, [pyc for pyc, _ in batch], executable, env), strict=True):
            results[pyc] = answer
            if answer != "unreadable":
                cache.remember(key, answer)
    return results


def _ask(root: Path, pycs: Sequence[str], executable: Path, env: Mapping[str, str]) -> list[str]:
    """One answer for each; a `.pyc` that brings its reader down is found by halving."""
    pairs = [[str(root / source_of(pyc)), str(root / pyc)] for pyc in pycs]
    try:
        answers = ask(executable, "bytecode", env, given=pairs, seconds=SECONDS)
        if isinstance(answers, list) and len(answers) == len(pycs):
            return [answer if answer in ("same", "differs") else "unreadable" for answer in answers]
    except Unavailable:
        pass
    if len(pycs) == 1:
        return ["unreadable"]
    half = len(pycs) // 2
    return _ask(root, pycs[:half], executable, env) + _ask(root, pycs[half:], executable, env)
