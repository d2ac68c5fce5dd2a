"""What torch.save is given, digested in the process, and what the file holds, digested outside: equal, or named."""

from __future__ import annotations

import io
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainguard.appraise.interface import Context
from trainguard.appraise.saves import Saves as Check
from trainguard.digest import sha256_hex
from trainguard.evidence import Evidence
from trainguard.finding import Finding, LinkState
from trainguard.policy import Approval, Policy
from trainguard.seal import prints
from trainguard.seal.prints import Prints, parse_prints, read_prints
from trainguard.watch import saves
from trainguard.watch.saves import Saves

pytestmark = pytest.mark.torch
KEY = "0f" * 32


class Client:
    """Keeps frames as the supervisor would record them."""

    def __init__(self) -> None:
        self.settings = {"key": KEY}
        self.sent: list[dict[str, Any]] = []
        self.faults: list[str] = []

    def send(self, kind: str, body: dict[str, Any], step: int | None = None) -> None:
        self.sent.append({**body, "storages": list(body.get("storages", ()))} if "storages" in body else body)

    def fault(self, place: str, error: BaseException) -> None:
        self.faults.append(f"{place}: {error!r}")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A process whose saves are listened to, without leaving a trace in torch."""
    told = Client()
    told.state = Saves(told, torch)  # type: ignore[arg-type, attr-defined]
    entry = (saves.PRIORITY, told.state.tag, lambda storage, location: None)  # type: ignore[attr-defined]
    registry = sorted([entry, *torch.serialization._package_registry], key=lambda item: item[0])
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    yield told
    assert told.faults == []


def judge(
    client: Client, *paths: Path, end: bool = True, approve: tuple[Approval, ...] = ()
) -> tuple[list[Finding], LinkState]:
    """The check over the process's frames and the files as they are now."""
    client.state.flush(between=True, last=end)  # type: ignore[attr-defined]
    blobs: dict[str, bytes] = {}
    records = [("process", "save", body) for body in client.sent]
    for path in paths:
        found = read_prints(path, KEY)
        data = found.encode() if found is not None else b""
        blobs[sha256_hex(data)] = data
        records.append(("supervisor", "seal", {"path": str(path), "prints": sha256_hex(data) if found else None}))
    check = Check(Context(run="r", policy=Policy(approve=approve), blob=lambda digest: blobs[digest]))
    findings: list[Finding] = []
    for number, (source, kind, body) in enumerate(records):
        findings += check.see(Evidence(n=number, at=0, source=source, kind=kind, body=body, process=3))
    *late, state = check.end()
    assert isinstance(state, LinkState)
    return [*findings, *(item for item in late if isinstance(item, Finding))], state


def value() -> dict[str, Any]:
    """Two layers that share nothing, one large enough to be sampled, a view, a tied weight, an empty tensor."""
    generator = torch.Generator().manual_seed(1)
    big = torch.randn(700, 700, generator=generator)
    tied = torch.randn(4, generator=generator)
    return {"model": {"big": big, "row": big[3], "a": tied, "b": tied, "none": torch.empty(0)}, "step": 3}


def test_the_rules_on_both_sides_are_the_same() -> None:
    """Writer and judge share only the format."""
    for name in ("SAMPLED_BYTES", "PIECES", "PIECE_BYTES", "WHOLE_BYTES", "DIGEST_DIGITS", "STORAGES_LIMIT"):
        assert getattr(saves, name) == getattr(prints, name)
    for size in (0, 1, 1 << 20, (1 << 20) + 1, 3 << 30):
        assert saves.pieces(KEY, size) == prints.pieces(KEY, size)
        assert all(start >= 0 and start + length <= size for start, length in saves.pieces(KEY, size))


def test_honest_saves_hold_by_path_by_renaming_and_by_content(tmp_path: Path, client: Client) -> None:
    """A path, an open file, a temporary file moved into place, a buffer written by hand, a copy."""
    state = client.state  # type: ignore[attr-defined]
    torch.save(value(), tmp_path / "a.pt")
    with (tmp_path / "b.pt").open("wb") as file:
        torch.save(value(), file)
    torch.save(value(), tmp_path / "tmp")
    state.on_rename((str(tmp_path / "tmp"), str(tmp_path / "c.pt")))
    (tmp_path / "tmp").rename(tmp_path / "c.pt")
    buffer = io.BytesIO()
    torch.save({**value(), "more": torch.ones(3)}, buffer)
    (tmp_path / "d.pt").write_bytes(buffer.getvalue())
    (tmp_path / "e.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    findings, link = judge(client, *(tmp_path / f"{name}.pt" for name in "abcde"))
    assert not findings
    assert (link.held, link.broken, link.blind) == (5, 0, ())


@pytest.mark.parametrize("tensor", ["big", "a"])
def test_a_tensor_altered_between_memory_and_file_is_named(tmp_path: Path, client: Client, tensor: str) -> None:
    """E9: one element of one tensor; size, keys and checksums as they should be."""
    path = tmp_path / "a.pt"
    torch.save(value(), path)
    client.state.flush()  # type: ignore[attr-defined]
    sent = len(client.sent)
    altered = value()
    altered["model"][tensor].view(-1)[-1] += 1
    torch.save(altered, path)
    del client.sent[sent:]
    client.state._frame = {}  # type: ignore[attr-defined]
    (finding,), link = judge(client, path)
    assert (finding.outcome, finding.techniques) == ("violated", ("E9",))
    assert finding.subject.tensor is not None
    assert f"model.{tensor}" in finding.subject.tensor.split(", ")
    assert link.broken == 1
    approve = (Approval(check="saves", place=str(path)),)
    assert not judge(client, path, approve=approve)[0]


def test_nothing_is_said_of_a_file_before_its_process_told_of_all_it_saved(tmp_path: Path, client: Client) -> None:
    """The process was killed after a save it could not tell of: an honest file, and no finding."""
    path = tmp_path / "a.pt"
    torch.save(value(), path)
    client.state.flush()  # type: ignore[attr-defined]
    torch.save({"model": {"big": torch.zeros(700, 700), "a": torch.zeros(4)}}, path)
    client.state._frame = {}  # type: ignore[attr-defined]
    findings, link = judge(client, path, end=False)
    assert not findings
    assert "did not tell to the end" in link.blind[0]


def test_where_values_may_honestly_change_meanwhile_a_difference_is_only_suspicious(
    tmp_path: Path, client: Client
) -> None:
    """Shared memory, and a thread other than the one that trains."""
    path = tmp_path / "a.pt"
    shared = torch.ones(8).share_memory_()
    torch.save({"w": shared}, path)
    client.state.flush()  # type: ignore[attr-defined]
    assert client.sent[-1]["sure"] is False
    sent = len(client.sent)
    torch.save({"w": shared * 2}, path)
    del client.sent[sent:]
    client.state._frame = {}  # type: ignore[attr-defined]
    (finding,), _ = judge(client, path)
    assert finding.outcome == "suspicious"
    client.state.steppers.add(threading.get_ident())  # type: ignore[attr-defined]
    for target, sure in ((path, True), (tmp_path / "b.pt", False)):
        client.sent.clear()
        thread = threading.Thread(target=torch.save, args=({"w": torch.ones(2)}, target))
        thread.start() if not sure else torch.save({"w": torch.ones(2)}, target)
        if not sure:
            thread.join()
        client.state.flush()  # type: ignore[attr-defined]
        assert client.sent[0]["sure"] is sure


@pytest.mark.parametrize(("change", "found"), [("nothing", 0), ("one", 1), ("all", 0), ("half", 0)])
def test_a_safetensors_file_is_compared_with_the_weights_of_the_next_step(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, change: str, found: int
) -> None:
    """One layer otherwise is suspicious; an average, or a file with other types, is no finding."""
    from safetensors.torch import save_file

    model = Model()
    weights = {p.untyped_storage().data_ptr(): (n, weakref.ref(p)) for n, p in model.named_parameters()}
    monkeypatch.setattr(saves, "_weights", lambda: dict(weights))
    state = client.state  # type: ignore[attr-defined]
    state.steppers.add(threading.get_ident())
    state.on_write((str(tmp_path / "config.json"), "w", os.O_WRONLY))
    saved = {f"base.{name}": tensor.detach().clone() for name, tensor in model.named_parameters()}
    if change == "one":
        saved["base.layers.3.weight"] *= 1.01
    elif change == "all":
        saved = {name: tensor * 0.999 for name, tensor in saved.items()}
    elif change == "half":
        saved = {name: tensor.half() for name, tensor in saved.items()}
    save_file(saved, tmp_path / "model.safetensors")
    save_file(saved, tmp_path / "alone.safetensors.tmp")
    findings, link = judge(client, tmp_path / "model.safetensors")
    assert [(f.outcome, f.techniques, f.subject.tensor) for f in findings] == [
        ("suspicious", ("E9",), "base.layers.3.weight")
    ] * found
    assert link.held == (change == "nothing")
    assert bool(link.blind) == (change in ("all", "half"))


def test_weights_are_digested_only_where_something_was_saved(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cost in steps that save nothing; a read is no write; an old file is no news."""
    from safetensors.torch import save_file

    state = client.state  # type: ignore[attr-defined]
    state.steppers.add(threading.get_ident())
    monkeypatch.setattr(saves, "_weights", lambda: 1 / 0)
    save_file({"w": torch.ones(2)}, tmp_path / "old.safetensors")
    os.utime(tmp_path / "old.safetensors", (1, 1))
    state.on_write((str(tmp_path / "a"), "r", os.O_RDONLY))
    state.flush(between=True)
    state.on_write((str(tmp_path / "log.txt"), "a", os.O_WRONLY))
    state.flush(between=True)
    assert not client.sent


def test_a_storage_on_a_device_is_sampled_at_the_same_places(client: Client) -> None:
    """Piece by piece, never copied whole; a storage of the processor stands in for one of a device."""
    for size in (100, 3 << 20):
        storage = torch.arange(size, dtype=torch.int64).to(torch.uint8).untyped_storage()
        here = client.state._digest(storage, "0")  # type: ignore[attr-defined]
        there = client.state._digest_elsewhere(storage, "0", size)  # type: ignore[attr-defined]
        assert there[:3] == here[:3]
        assert (there[3] is None) == (size > saves.SAMPLED_BYTES)


class Model(torch.nn.Module):
    """Layers enough for a majority."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(12))


def test_a_copy_given_in_place_of_one_weight_is_suspicious(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patched torch.save, or a state dict hook, scales one layer on the way; all others are the weights."""
    model = Model()

    def weights() -> dict[int, tuple[str, Any]]:
        return {p.untyped_storage().data_ptr(): (n, weakref.ref(p)) for n, p in model.named_parameters()}

    monkeypatch.setattr(saves, "_weights", weights)
    for name, factor, found in (("a", 1.01, 1), ("b", 1.0, 0)):
        client.sent.clear()
        saved = dict(model.state_dict())
        saved["layers.1.weight"] = saved["layers.1.weight"] * factor
        torch.save({"model": saved}, tmp_path / f"{name}.pt")
        findings, _ = judge(client, tmp_path / f"{name}.pt")
        assert [(f.outcome, f.techniques, f.subject.tensor) for f in findings] == [
            ("suspicious", ("E9",), "model.layers.1.weight")
        ] * found
    client.sent.clear()
    averaged = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "ema": averaged}, tmp_path / "c.pt")
    torch.save(averaged, tmp_path / "d.pt")
    findings, link = judge(client, tmp_path / "c.pt", tmp_path / "d.pt")
    assert not findings
    assert link.held == 2


def test_another_model_whose_weights_have_the_same_names_is_not_what_was_replaced(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained student of the same shape lies in memory while the teacher is saved as a whole module."""
    teacher, student = Model(), Model()

    def weights() -> dict[int, tuple[str, Any]]:
        both = [pair for model in (teacher, student) for pair in model.named_parameters()]
        return {p.untyped_storage().data_ptr(): (name, weakref.ref(p)) for name, p in both}

    monkeypatch.setattr(saves, "_weights", weights)
    torch.save({"model": teacher.state_dict()}, tmp_path / "a.pt")
    findings, link = judge(client, tmp_path / "a.pt")
    assert (findings, link.held) == ([], 1)


def test_files_that_torch_did_not_save_are_blind_or_left_out(tmp_path: Path, client: Client) -> None:
    """Another format has no prints; a torch file that nobody told of is a reason, no finding."""
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text").write_text("hello")
    os.mkfifo(tmp_path / "fifo")
    for name in ("old.pt", "text", "fifo", "missing"):
        assert read_prints(tmp_path / name, KEY) is None
    assert not client.sent
    with torch.serialization.skip_data():
        torch.save({"w": torch.ones(2)}, tmp_path / "empty.pt")
    findings, link = judge(client, tmp_path / "old.pt", tmp_path / "empty.pt")
    assert not findings
    assert link.blind == (f"{tmp_path / 'empty.pt'}: no process told of saving it",)


def test_listening_changes_nothing_of_what_is_saved(tmp_path: Path, client: Client) -> None:
    """The same bytes, and torch's generator untouched."""
    before = torch.get_rng_state()
    torch.save(value(), tmp_path / "a.pt")
    assert torch.equal(before, torch.get_rng_state())
    client.state._take = lambda storage: 1 / 0  # type: ignore[attr-defined]
    (tmp_path / "b").mkdir()
    torch.save(value(), tmp_path / "b" / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b" / "a.pt").read_bytes()
    assert client.faults
    client.faults.clear()


def test_frames_and_prints_that_are_not_as_specified_are_passed_over() -> None:
    """A process can write what it likes."""
    check = Check(Context(run="r", policy=Policy(), blob=lambda _: b"[]"))
    for body in (
        {},
        {"save": "1"},
        {"save": 1, "storages": 3, "began_ns": 1, "ended_ns": 1},
        {"save": 1, "storages": [[1], ["0", "x", 3, None]], "began_ns": 1, "ended_ns": 2, "sure": True},
        {"save": 1, "left": [3]},
        {"told_ns": "soon"},
    ):
        assert list(check.see(Evidence(n=0, at=0, source="process", kind="save", body=body, process=1))) == []
    seal = Evidence(n=1, at=0, source="supervisor", kind="seal", body={"path": "/a", "prints": "00" * 32})
    assert list(check.see(seal)) == []
    (link,) = check.end()
    assert isinstance(link, LinkState)
    assert "cannot be read" in link.blind[0]
    encoded = Prints(mtime_ns=1, storages=(("0", 4, "a", None, "w"),))
    assert parse_prints(encoded.encode()) == encoded
