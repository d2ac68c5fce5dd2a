"""Numeric flags as torch itself states them, read back in a clean process of the job's own interpreter.

Importing torch costs seconds, so the answer is kept under a digest of everything it depends on. It also runs the
installed torch: it is asked only when its files are the approved ones, or when there is nothing yet to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from trainguard.digest import sha256_hex
from trainguard.errors import Unavailable
from trainguard.lockfile import Numeric
from trainguard.measure.cache import StatCache
from trainguard.measure.interpreter import ask

SECONDS = 120.0
DECIDES = re.compile(
    r"(TORCH_|PYTORCH_|ATEN_|NVIDIA_TF32|CUBLAS|CUDNN|MKL|OMP_|ONEDNN|DNNL|KMP_|OPENBLAS|CUDA_VISIBLE|LD_LIBRARY_PATH$)\w*"
)
"""Variables the clean process sees. None of them names code to load; TORCH_DEVICE_BACKEND_AUTOLOAD is forced off."""


def read_back(
    executable: Path, folders: Sequence[str], env: Mapping[str, str], *, installed: str, cache: StatCache
) -> tuple[Numeric | None, str | None]:
    """The flags, or None with a note. folders: sys.path beyond the standard library; installed: digest of what is
    installed there, part of the key under which the answer is kept."""
    variables = {name: value for name, value in sorted(env.items()) if DECIDES.fullmatch(name)}
    variables["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    text = json.dumps([str(executable), list(folders), variables, installed], sort_keys=True)
    key = "numeric:" + sha256_hex(text.encode())
    answer = cache.facts.get(key)
    if answer is None:
        try:
            found = ask(executable, "numeric", env, given=list(folders), variables=variables, seconds=SECONDS)
        except Unavailable as error:
            return None, f"numeric flags were not read back: {error}"
        answer = json.dumps(found)
        cache.remember(key, answer)
    try:
        return msgspec.json.decode(answer.encode(), type=Numeric | None), None
    except msgspec.DecodeError as error:
        return None, f"numeric flags were not read back: {error}"
