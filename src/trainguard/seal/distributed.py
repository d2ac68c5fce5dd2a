"""Which tensor a piece of a `.distcp` file is a part of, as the checkpoint's `.metadata` tells. Nothing is unpickled.

    pieces(Path("ckpt"), "__0_0.distcp")            # {"piece at byte 0": "model.weight", …}

`.metadata` pickles a torch.distributed.checkpoint Metadata; its `storage_data` maps MetadataIndex(fqn, offset, index)
to _StorageInfo(relative_path, offset, length). Only names: that a piece changed is told by its digest in the seal.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainguard.seal.skeleton import Opaque, read_skeleton
from trainguard.seal.tensors import PICKLE_LIMIT_BYTES, PIECE

METADATA = ".metadata"


def pieces(folder: Path, file: str) -> dict[str, str]:
    """Piece of `file` → name of its tensor or value; empty where the metadata cannot be followed. Never raises."""
    data = _read(folder / METADATA)
    if data is None:
        return {}
    try:
        storage = next(iter(_storage_data(read_skeleton(data))), {})
        return dict(_named(storage, file))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > PICKLE_LIMIT_BYTES:
            return None
        return os.pread(descriptor, status.st_size, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _storage_data(metadata: Any) -> Iterator[dict[str, Any]]:
    """The table in the state of the Metadata object."""
    for state in metadata.parts if isinstance(metadata, Opaque) else ():
        if isinstance(state, dict) and isinstance(state.get("storage_data"), dict):
            yield state["storage_data"]


def _named(storage: dict[str, Any], file: str) -> Iterator[tuple[str, str]]:
    for label, info in storage.items():
        states = [part for part in info.parts if isinstance(part, dict)] if isinstance(info, Opaque) else []
        for state in states:
            if state.get("relative_path") == file and type(state.get("offset")) is int:
                # The label holds the index's own fields: name, offset of the chunk, number.
                name, _, rest = label.strip("[]").partition(" ")
                yield f"{PIECE}{state['offset']}", f"{name} at {rest}" if rest.strip(" 0") else name
