"""Distributed checkpoints in the check *saves*: a row of archives in one file, told save by save."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainguard.appraise.saves import Saves
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.seal.prints import read_prints

pytestmark = pytest.mark.torch
KEY = "00" * 16


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Bodies of the frames that saves of this process are told in."""
    torch = pytest.importorskip("torch")
    from trainguard.watch import saves

    frames: list[dict[str, Any]] = []
    client = SimpleNamespace(settings={"key": KEY}, send=lambda kind, body, step=None: frames.append(dict(body)))
    state = saves.Saves(client, torch)  # type: ignore[arg-type]
    asked = [(saves.PRIORITY, state.tag, lambda storage, location: None), *torch.serialization._package_registry]
    monkeypatch.setattr(torch.serialization, "_package_registry", asked)
    frames.append({"flush": lambda: state.flush(last=True)})
    return frames


def saved(folder: Path, told: list[dict[str, Any]]) -> Path:
    """A distributed checkpoint of three tensors and an object; its file."""
    import torch
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"a": torch.ones(3), "b": torch.arange(4.0), "c": {"x": [torch.ones(2)]}, "step": 3}, checkpoint_id=folder
        )
    told.pop(0)["flush"]()
    return folder / "__0_0.distcp"


def judged(path: Path, frames: list[dict[str, Any]]) -> tuple[list[Finding], LinkState]:
    """What the check says of the file as it is now."""
    prints = read_prints(path, KEY)
    assert prints is not None
    context = SimpleNamespace(
        run="r", policy=SimpleNamespace(approves=lambda *_: False), blob=lambda digest: prints.encode()
    )
    check = Saves(context)  # type: ignore[arg-type]
    findings: list[Finding] = []
    records = [("save", "process", body) for body in frames]
    records += [("seal", "supervisor", {"path": str(path), "prints": "0" * 64})]
    for number, (kind, source, body) in enumerate(records):
        process = 0 if source == "process" else None
        told = Evidence(
            n=number, at=number, kind=kind, source=source, body=body, process=process, leaf=number, hash="0" * 64
        )
        findings += check.see(told)
    *more, link = check.end()
    assert isinstance(link, LinkState)
    return findings + [item for item in more if isinstance(item, Finding)], link


def test_every_archive_of_the_row_is_compared(told: list[dict[str, Any]], tmp_path: Path) -> None:
    """Each tensor was told of by its own save, to the file it went to; the object beside them holds no storage."""
    path = saved(tmp_path / "ckpt", told)
    findings, link = judged(path, told)
    assert findings == []
    assert (link.held, link.broken, link.blind) == (1, 0, ())


def test_a_tensor_altered_in_the_row_is_named(told: list[dict[str, Any]], tmp_path: Path) -> None:
    """Same size, same place, other bytes: named by the checkpoint's own metadata."""
    import torch

    path = saved(tmp_path / "ckpt", told)
    old, new = (torch.arange(4.0).mul(factor).numpy().tobytes() for factor in (1.0, 1.5))
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    (finding,), link = judged(path, told)
    assert (finding.outcome, finding.techniques, finding.subject.tensor) == ("violated", ("E9",), "b")
    assert (link.held, link.broken) == (0, 1)


def test_a_row_nobody_told_of_is_blind(told: list[dict[str, Any]], tmp_path: Path) -> None:
    """Not checked, with its reason; never a finding."""
    path = saved(tmp_path / "ckpt", told)
    findings, link = judged(path, [body for body in told if "storages" not in body])
    assert findings == []
    assert (link.held, link.broken, len(link.blind)) == (0, 0, 1)
