"""Small checkpoints as training frameworks write them, and a home to seal them in. No global generator is touched."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainguard.home import Home
from trainguard.seal import SealReport, seal_path

LAYERS = ("embed", "block.0", "block.1", "head")


def state(step: int) -> dict[str, Any]:
    """Model, AdamW state, schedule and RNG state of a tiny net after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"{layer}.weight": torch.randn(8, 8, generator=generator) for layer in LAYERS}
    moments = {
        index: {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.randn(8, 8, generator=generator),
            "exp_avg_sq": torch.rand(8, 8, generator=generator),
        }
        for index in range(len(LAYERS))
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": list(range(len(LAYERS)))}]
    return {
        "model": weights,
        "optimizer": {"state": moments, "param_groups": groups},
        "scheduler": {"last_epoch": step, "base_lrs": [1e-3]},
        "rng_state": generator.get_state(),
        "step": step,
    }


def save_file(path: Path, step: int) -> Path:
    """One `torch.save` file with everything."""
    torch.save(state(step), path)
    return path


def save_folder(path: Path, step: int) -> Path:
    """A folder as the transformers Trainer leaves one: two safetensors shards and the training state beside them."""
    whole = state(step)
    path.mkdir(parents=True)
    names = list(whole["model"])
    for index, part in enumerate((names[:2], names[2:]), 1):
        save_safetensors(path / f"model-0000{index}-of-00002.safetensors", {n: whole["model"][n] for n in part})
    torch.save(whole["optimizer"], path / "optimizer.pt")
    torch.save(whole["scheduler"], path / "scheduler.pt")
    torch.save({"cpu": whole["rng_state"]}, path / "rng_state.pth")
    (path / "config.json").write_text('{"hidden_size": 8}\n')
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The safetensors format, written out: header length, header, float32 tensors back to back."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def safetensors_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Name → [start, end) of the bytes of each tensor in the file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {n: (start + t["data_offsets"][0], start + t["data_offsets"][1]) for n, t in header.items()}


def torch_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Name → [start, end) of the bytes of each tensor in a torch zip; each has a storage of its own.

    torch numbers storages as it meets them, so walking the loaded value in order gives each record its name.
    """
    found: dict[str, tuple[int, int]] = {}
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.rpartition("/")[2]: info for info in archive.infolist() if "/data/" in info.filename}
    for number, name in enumerate(_tensor_names(torch.load(path, weights_only=True), "")):
        info = records[str(number)]
        name_bytes, extra_bytes = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + name_bytes + extra_bytes
        found[name] = (start, start + info.file_size)
    return found


def _tensor_names(value: object, name: str) -> Iterator[str]:
    if isinstance(value, torch.Tensor):
        yield name
    elif isinstance(value, dict):
        for key, child in value.items():
            inner = f"[{key}]" if isinstance(key, int) else f".{key}" if name else str(key)
            yield from _tensor_names(child, name + inner)
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _tensor_names(child, f"{name}[{index}]")


def home(path: Path) -> Home:
    """A home whose keys and log are made by the first seal."""
    return Home(path / "state")


def seal(where: Home, path: Path, step: int | None = None, run: str | None = "run-a") -> SealReport:
    """Seal `path` and insist that there was nothing to say."""
    report = seal_path(where, path, run=run, step=step)
    if report.findings:
        raise RuntimeError(f"sealing {path} was not quiet: {report.findings}")
    return report


def bytes_of(path: Path) -> dict[str, bytes]:
    """Every file under `path` (or itself) with its bytes, to show what did not change."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file): file.read_bytes() for file in files}
