"""A distributed checkpoint (torch.distributed.checkpoint): `.metadata` says which piece of which tensor lies where.

Read here without torch's own reader, because that one gives `.metadata` to a bare `pickle.load` and the values that are
no tensors to `torch.load(weights_only=False)`. Pieces are cut from the held `.distcp` files.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any

from trainguard.loading.hold import Held
from trainguard.loading.loaders import load_torch_stream
from trainguard.loading.names import unpickle
from trainguard.loading.refusals import LoadRefused

METADATA = ".metadata"


def load_distributed(files: Mapping[str, Held], allowed: Mapping[str, Any], map_location: Any) -> dict[str, Any]:
    """The state dict, nested as it was saved. files: the folder's held files by name, METADATA among them.

    Raises LoadRefused where the metadata asks for pieces that are not there or do not fit.
    """
    with files[METADATA].open() as file:
        metadata = unpickle(file, allowed)
    state: dict[str, Any] = {}
    try:
        for name, about in metadata.state_dict_metadata.items():
            value = _value(name, about, metadata.storage_data, files, allowed, map_location)
            _put(state, (metadata.planner_data or {}).get(name, (name,)), value)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise LoadRefused(f"{METADATA}: does not describe these files: {type(error).__name__}: {error}") from error
    return state


def _value(
    name: str,
    about: Any,
    stored: Mapping[Any, Any],
    files: Mapping[str, Held],
    allowed: Mapping[str, Any],
    map_location: Any,
) -> Any:
    """A tensor put together from its pieces, or the value that was saved as bytes."""
    import torch

    pieces = [(key, where) for key, where in stored.items() if key.fqn == name]
    if not hasattr(about, "chunks"):
        ((_, where),) = pieces
        return load_torch_stream(io.BytesIO(_cut(files, where)), allowed, map_location)
    whole = torch.empty(tuple(about.size), dtype=about.properties.dtype)
    filled = 0
    for key, where in pieces:
        chunk = about.chunks[key.index] if key.offset is None else _chunk_at(about, key.offset)
        piece = load_torch_stream(io.BytesIO(_cut(files, where)), allowed, "cpu")
        part = whole
        for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dimension, start, length)
        if part.shape != piece.shape:
            raise ValueError(f"{name}: a piece of shape {list(piece.shape)}, expected {list(part.shape)}")
        part.copy_(piece)
        filled += piece.numel()
    if filled != whole.numel():
        raise ValueError(f"{name}: pieces of {filled} elements, expected {whole.numel()}")
    return whole if map_location is None else whole.to(map_location)


def _chunk_at(about: Any, offset: Any) -> Any:
    return next(chunk for chunk in about.chunks if tuple(chunk.offsets) == tuple(offset))


def _cut(files: Mapping[str, Held], where: Any) -> bytes:
    if getattr(where, "transform_descriptors", None):
        raise ValueError(f"{where.relative_path}: pieces that were transformed when they were saved")
    data = files[where.relative_path].slice(where.offset, where.length)
    if len(data) != where.length:
        raise ValueError(f"{where.relative_path}: a piece runs past its end")
    return data


def _put(state: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set `value` at `path` of nested dicts and lists, as torch's planner recorded it."""
    target = state
    for part, following in itertools.pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(target, list):
            target.extend([None] * (part + 1 - len(target)))
            target[part] = empty if target[part] is None else target[part]
            target = target[part]
        else:
            target = target.setdefault(part, empty)
    last = path[-1]
    if isinstance(target, list):
        target.extend([None] * (last + 1 - len(target)))
    target[last] = value
