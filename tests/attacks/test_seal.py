"""Checkpoints at rest under attack: S11 (weights and optimizer edited), S12 (rollback, deletion), E3 and E5 to E10."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.helpers.checkpoints import bytes_of, home, safetensors_ranges, save_file, save_folder, seal, torch_ranges

from trainguard.errors import TrainguardError, Unavailable
from trainguard.home import Home
from trainguard.seal import SealReport, seal_path, verify_seal
from trainguard.seal.manifest import seal_path_of

pytestmark = pytest.mark.torch


def techniques(report: SealReport) -> set[str]:
    """The likeliest technique of every finding."""
    return {finding.techniques[0] for finding in report.findings if finding.techniques}


def tensors(report: SealReport) -> set[str]:
    """Every tensor that is named."""
    return {finding.subject.tensor for finding in report.findings if finding.subject.tensor}


def keys_of(value: object, name: str = "") -> set[str]:
    """All keys of nested dicts."""
    if not isinstance(value, dict):
        return {name}
    return {key for inner, child in value.items() for key in keys_of(child, f"{name}/{inner}")}


@pytest.fixture
def where(tmp_path: Path) -> Home:
    return home(tmp_path)


# -- S11: E3, E5 ------------------------------------------------------------------------------------------------------


def test_a_layer_scaled_and_a_moment_zeroed_are_named(tmp_path: Path, where: Home) -> None:
    """S11. Size and key set are unchanged and everything is finite: what one would look at by hand stays green."""
    path = save_file(tmp_path / "victim-b.pt", 37)
    seal(where, path, 37)
    before, size = torch.load(path, weights_only=True), path.stat().st_size
    edited = torch.load(path, weights_only=True)
    edited["model"]["block.1.weight"] *= 1.01
    edited["optimizer"]["state"][2]["exp_avg"].zero_()
    torch.save(edited, path)

    assert path.stat().st_size == size
    assert keys_of(torch.load(path, weights_only=True)) == keys_of(before)
    assert all(t.isfinite().all() for t in edited["model"].values())

    frozen = bytes_of(tmp_path)
    report = verify_seal(path, home=where)
    assert (report.status, report.exit_status) == ("violated", 1)
    assert tensors(report) == {"model.block.1.weight", "optimizer.state[2].exp_avg"}
    assert {f.subject.tensor: f.techniques for f in report.findings} == {
        "model.block.1.weight": ("E3",),
        "optimizer.state[2].exp_avg": ("E5",),
    }
    assert {(f.subject.run, f.subject.step) for f in report.findings} == {("run-a", 37)}
    assert all(f.evidence and f.evidence[0].leaf == report.leaf for f in report.findings)
    assert bytes_of(tmp_path) == frozen


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda s: s["optimizer"]["param_groups"][0].update(lr=1e-2), "optimizer.param_groups[0] (values)"),
        (
            lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.5, 0.95)),
            "optimizer.param_groups[0].betas (values)",
        ),
        (lambda s: s["scheduler"].update(last_epoch=1), "scheduler (values)"),
        (lambda s: s["rng_state"].add_(1), "rng_state"),
        (lambda s: s["optimizer"]["state"][0]["step"].add_(100), "optimizer.state[0].step"),
    ],
    ids=["learning rate", "beta", "schedule", "rng", "step count"],
)
def test_training_state_is_named_where_it_was_edited(
    tmp_path: Path, where: Home, edit: Callable[[dict], None], named: str
) -> None:
    """E5: not only tensors; a learning rate is a float inside a pickle."""
    path = save_file(tmp_path / "c.pt", 5)
    seal(where, path, 5)
    edited = torch.load(path, weights_only=True)
    edit(edited)
    torch.save(edited, path)
    report = verify_seal(path, home=where)
    assert tensors(report) == {named}
    assert techniques(report) == {"E5"}


def test_one_flipped_bit_names_its_tensor(tmp_path: Path, where: Home) -> None:
    """E3 in a safetensors shard: one bit of one element."""
    path = save_folder(tmp_path / "step-9", 9)
    seal(where, path, 9)
    shard = path / "model-00002-of-00002.safetensors"
    start, _ = safetensors_ranges(shard)["head.weight"]
    data = bytearray(shard.read_bytes())
    data[start + 5] ^= 1
    shard.write_bytes(data)
    report = verify_seal(path, home=where)
    assert tensors(report) == {"head.weight"}
    assert techniques(report) == {"E3"}
    assert report.findings[0].subject.path == "step-9/model-00002-of-00002.safetensors"


def test_a_tensor_added_or_removed_is_named(tmp_path: Path, where: Home) -> None:
    """Keys that `strict=False` would skip in silence (E7)."""
    path = save_file(tmp_path / "c.pt", 1)
    seal(where, path, 1)
    edited = torch.load(path, weights_only=True)
    edited["model"]["extra.weight"] = edited["model"].pop("head.weight")
    torch.save(edited, path)
    report = verify_seal(path, home=where)
    assert {"model.extra.weight", "model.head.weight"} <= tensors(report)


def test_a_reinterpreted_tensor_is_named(tmp_path: Path, where: Home) -> None:
    """The same bytes under another shape are another tensor."""
    path = save_file(tmp_path / "c.pt", 1)
    seal(where, path, 1)
    edited = torch.load(path, weights_only=True)
    edited["model"]["embed.weight"] = edited["model"]["embed.weight"].reshape(4, 16)
    torch.save(edited, path)
    assert tensors(verify_seal(path, home=where)) == {"model.embed.weight"}


# -- S12: E6, E8 ------------------------------------------------------------------------------------------------------


def test_an_older_checkpoint_put_back_is_refused(tmp_path: Path, where: Home) -> None:
    """S12. Its own signature is valid, its bytes are exactly what was sealed."""
    old, new = save_file(tmp_path / "ckpt-500.pt", 500), save_file(tmp_path / "ckpt-900.pt", 900)
    seal(where, old, 500)
    seal(where, new, 900)
    shutil.copy(old, new)
    shutil.copy(seal_path_of(old), seal_path_of(new))
    assert verify_seal(old, home=where).status == "upheld"
    report = verify_seal(new, home=where)
    assert report.status == "violated"
    assert techniques(report) == {"E6"}
    assert {"signature", "logged", "content"} <= set(report.checked)
    assert "newest" not in report.checked


def test_the_last_checkpoint_overwritten_by_an_earlier_one_of_itself_is_refused(tmp_path: Path, where: Home) -> None:
    """`last.pt` is written over and over; a copy of yesterday's is put back, seal and all."""
    path = save_file(tmp_path / "last.pt", 500)
    seal(where, path, 500)
    for file in (path, seal_path_of(path)):
        shutil.copy(file, f"{file}.kept")
    save_file(path, 900)
    seal(where, path, 900)
    assert verify_seal(path, home=where).status == "upheld"
    for file in (path, seal_path_of(path)):
        Path(f"{file}.kept").replace(file)
    report = verify_seal(path, home=where)
    assert (report.status, techniques(report)) == ("violated", {"E6"})


def test_rollback_with_the_later_ones_deleted_names_them(tmp_path: Path, where: Home) -> None:
    """S12 whole: step 500 put where 900 was, 700 deleted; everything after 500 is listed from the log."""
    paths = {step: save_folder(tmp_path / f"step-{step}", step) for step in (500, 700, 900)}
    for step, path in paths.items():
        seal(where, path, step)
    shutil.rmtree(paths[900])
    shutil.rmtree(paths[700])
    shutil.copytree(paths[500], paths[900])
    report = verify_seal(paths[900], home=where)
    assert report.status == "violated"
    assert techniques(report) == {"E6", "E8"}
    assert any("step-700" in finding.message for finding in report.findings)


def test_deletion_alone_is_seen_at_the_checkpoint_that_is_left(tmp_path: Path, where: Home) -> None:
    """E8: auto-resume would pick step 500 without a word; a retention rule could have done it, so it is suspicious."""
    paths = {step: save_file(tmp_path / f"{step}.pt", step) for step in (500, 700, 900)}
    for step, path in paths.items():
        seal(where, path, step)
    for step in (700, 900):
        paths[step].unlink()
    report = verify_seal(paths[500], home=where)
    assert (report.status, report.exit_status, techniques(report)) == ("unknown", 3, {"E8"})
    asked = verify_seal(paths[500], home=where, newest=True)
    assert (asked.status, techniques(asked)) == ("violated", {"E6", "E8"})


def test_a_deleted_checkpoint_is_not_just_a_missing_file(tmp_path: Path, where: Home) -> None:
    """E8: the log remembers what lay here; where it does not, the path is just wrong."""
    path = save_file(tmp_path / "c.pt", 3)
    seal(where, path, 3)
    path.unlink()
    report = verify_seal(path, home=where)
    assert (report.status, report.exit_status, techniques(report)) == ("violated", 1, {"E8"})
    (tmp_path / "latest").symlink_to("c.pt")
    assert techniques(verify_seal(tmp_path / "latest", home=where)) == {"E8"}
    with pytest.raises(Unavailable, match="No such file"):
        verify_seal(tmp_path / "never-there.pt", home=where)


def test_a_link_called_latest_must_lead_to_the_newest(tmp_path: Path, where: Home) -> None:
    """E6, E7: the link is what gets edited; the checkpoints are all genuine."""
    for step in (500, 900):
        seal(where, save_folder(tmp_path / f"step-{step}", step), step)
    latest = tmp_path / "latest"
    latest.symlink_to("step-900")
    assert verify_seal(latest, home=where).status == "upheld"
    latest.unlink()
    latest.symlink_to("step-500")
    report = verify_seal(latest, home=where)
    assert (report.status, techniques(report)) == ("violated", {"E6"})
    assert verify_seal(tmp_path / "step-500", home=where).status == "upheld"


def test_a_log_put_back_to_an_older_state_is_seen(tmp_path: Path, where: Home) -> None:
    """E6 against the log itself: the seal carries a tree head that the shortened log cannot extend."""
    path = save_file(tmp_path / "a.pt", 1)
    seal(where, path, 1)
    shutil.copytree(where.log, tmp_path / "kept")
    path2 = save_file(tmp_path / "b.pt", 2)
    seal(where, path2, 2)
    shutil.rmtree(where.log)
    shutil.copytree(tmp_path / "kept", where.log)
    report = verify_seal(path2, home=where)
    assert report.status == "violated"
    assert techniques(report) == {"E6"}


def test_without_its_log_a_seal_is_not_green(tmp_path: Path, where: Home) -> None:
    """Deleting the log is not a way to hide a rollback: its absence is not knowing."""
    path = save_file(tmp_path / "a.pt", 1)
    seal(where, path, 1)
    shutil.rmtree(where.log)
    report = verify_seal(path, home=where)
    assert (report.status, report.exit_status) == ("unknown", 3)
    assert [f.outcome for f in report.findings] == ["not_checked"]


# -- E7 ---------------------------------------------------------------------------------------------------------------


def test_a_shard_of_another_step_is_named_with_its_origin(tmp_path: Path, where: Home) -> None:
    """E7: each shard is genuine and was sealed; they do not belong together."""
    old, new = save_folder(tmp_path / "step-500", 500), save_folder(tmp_path / "step-900", 900)
    seal(where, old, 500)
    seal(where, new, 900)
    shutil.copy(old / "model-00001-of-00002.safetensors", new)
    report = verify_seal(new, home=where)
    assert report.status == "violated"
    assert "E7" in techniques(report)
    assert any("step 500" in (finding.found or "") for finding in report.findings)
    assert tensors(report) == {"embed.weight", "block.0.weight"}


def test_two_shards_swapped_are_refused(tmp_path: Path, where: Home) -> None:
    """The root digest is blind to names; the check is not."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    one, two = path / "model-00001-of-00002.safetensors", path / "model-00002-of-00002.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert verify_seal(path, home=where).status == "violated"


def test_another_runs_checkpoint_is_refused(tmp_path: Path, where: Home) -> None:
    """E7: victim-a's path, victim-b's checkpoint; and --run says what was meant."""
    mine, other = save_file(tmp_path / "mine.pt", 4), save_file(tmp_path / "other.pt", 5)
    seal(where, mine, 4, run="run-a")
    seal(where, other, 5, run="run-b")
    asked = verify_seal(other, home=where, run="run-a")
    assert (asked.status, techniques(asked)) == ("violated", {"E7"})
    shutil.copy(other, mine)
    shutil.copy(seal_path_of(other), seal_path_of(mine))
    swapped = verify_seal(mine, home=where)
    assert (swapped.status, techniques(swapped)) == ("violated", {"E7"})


@pytest.mark.parametrize("name", ["extra.bin", ".gitattributes", "sub/pickle.pkl", ".hidden"])
def test_files_put_in_beside_are_refused(tmp_path: Path, where: Home, name: str) -> None:
    """E2, E7: also those that OMS verifiers look past."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("x")
    report = verify_seal(path, home=where)
    assert report.status == "violated"
    assert any(name in finding.message for finding in report.findings)


@pytest.mark.parametrize(
    "put_in",
    [
        lambda p: os.mkfifo(p / "data.bin"),
        lambda p: (p / "data.bin").symlink_to("/etc/hostname"),
        lambda p: (p / "data.bin").symlink_to("nowhere"),
        lambda p: (p / "data.bin").symlink_to("data.bin"),
        lambda p: (p / "folder").symlink_to("."),
    ],
    ids=["fifo", "link outside", "dangling link", "link to itself", "link to a folder"],
)
def test_what_can_never_be_sealed_is_a_finding_in_a_sealed_folder(
    tmp_path: Path, where: Home, put_in: Callable[[Path], None]
) -> None:
    """Nothing of it is opened, so nothing hangs; and it cannot be sealed over either."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    put_in(path)
    report = verify_seal(path, home=where)
    assert (report.status, techniques(report)) == ("violated", {"E7"})
    with pytest.raises(Unavailable):
        seal_path(where, path, run="run-a", step=2)


def test_a_set_uid_bit_is_refused_and_an_empty_folder_seen(tmp_path: Path, where: Home) -> None:
    """Two things that pass an OMS verifier."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    (path / "config.json").chmod(0o4777)
    assert techniques(verify_seal(path, home=where)) == {"E7"}
    (path / "config.json").chmod(0o644)
    assert verify_seal(path, home=where).status == "upheld"
    (path / "empty").mkdir()
    report = verify_seal(path, home=where)
    assert report.status == "violated"
    assert "empty folder 'empty'" in report.findings[0].message


def test_a_missing_file_is_named(tmp_path: Path, where: Home) -> None:
    """Training would go on without its optimizer state."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    (path / "optimizer.pt").unlink()
    report = verify_seal(path, home=where)
    assert report.status == "violated"
    assert "'optimizer.pt' is missing" in report.findings[0].message


# -- E9 ---------------------------------------------------------------------------------------------------------------


def test_a_save_path_that_writes_something_else_is_sealed_as_such(tmp_path: Path, where: Home) -> None:
    """E9: the digest taken while writing and the file on the disk disagree; the seal says so for good."""
    from trainguard.seal.hashing import TeeHash

    path = tmp_path / "c.pt"
    with path.open("wb") as file:
        tee = TeeHash(file)
        torch.save(torch.arange(100.0), tee)
    live = tee.digest()
    honest = seal_path(where, path, run="run-a", step=1, live_digest=live)
    assert (honest.status, honest.live) == ("upheld", "equal")
    torch.save(torch.arange(100.0) * 1.01, path)
    report = seal_path(where, path, run="run-a", step=2, live_digest=live)
    assert (report.status, report.live, techniques(report)) == ("violated", "differs", {"E9"})
    again = verify_seal(path, home=where)
    assert again.status == "violated"
    assert "E9" in techniques(again)


# -- E10 --------------------------------------------------------------------------------------------------------------


def test_re_signing_with_another_key_is_refused_and_the_edit_still_named(tmp_path: Path, where: Home) -> None:
    """E10: a perfectly valid seal by someone else. Our log still has the real one, so the tensor is named."""
    path = save_file(tmp_path / "c.pt", 8)
    seal(where, path, 8)
    edited = torch.load(path, weights_only=True)
    edited["model"]["head.weight"] *= 1.01
    torch.save(edited, path)
    insider = Home(tmp_path / "insider")
    seal_path(insider, path, run="run-a", step=8)
    assert verify_seal(path, home=insider).status == "upheld"
    report = verify_seal(path, home=where)
    assert report.status == "violated"
    assert techniques(report) == {"E10", "E3"}
    assert tensors(report) == {"model.head.weight"}


def test_a_stolen_key_used_off_the_log_is_refused(tmp_path: Path, where: Home) -> None:
    """E10: the right key, but our log never heard of the seal."""
    path = save_file(tmp_path / "c.pt", 8)
    seal(where, path, 8)
    insider = Home(tmp_path / "insider")
    insider.prepare()
    for name in ("attestation.pem", "attestation.pub"):
        shutil.copy(where.keys / name, insider.keys / name)
    save_file(path, 9)
    seal_path(insider, path, run="run-a", step=8)
    report = verify_seal(path, home=where)
    assert (report.status, techniques(report)) == ("violated", {"E10"})


def test_two_seals_for_one_step_are_both_doubted(tmp_path: Path, where: Home) -> None:
    """E10 with our own key through our own door: the log shows two contents for one step."""
    path = save_file(tmp_path / "c.pt", 8)
    seal(where, path, 8)
    save_file(path, 9)
    made = seal_path(where, path, run="run-a", step=8)
    assert (made.status, techniques(made)) == ("unknown", {"E10"})
    report = verify_seal(path, home=where)
    assert (report.status, report.exit_status, techniques(report)) == ("unknown", 3, {"E10"})


def test_the_same_bytes_for_two_steps_are_doubted(tmp_path: Path, where: Home) -> None:
    """E6 by laundering: an old checkpoint is copied and sealed anew as a later step."""
    old = save_file(tmp_path / "500.pt", 500)
    seal(where, old, 500)
    new = Path(shutil.copy(old, tmp_path / "900.pt"))
    made = seal_path(where, new, run="run-a", step=900)
    assert techniques(made) == {"E6"}
    assert verify_seal(new, home=where).exit_status == 3


def test_a_removed_seal_does_not_make_a_checkpoint_unsealed(tmp_path: Path, where: Home) -> None:
    """The log says there was one; its copy still names what changed."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    seal_path_of(path).unlink()
    (path / "config.json").write_text("{}")
    report = verify_seal(path, home=where)
    assert report.status == "violated"
    assert any("config.json" in finding.message for finding in report.findings)


def test_a_wrong_key_is_refused_before_anything_is_read(tmp_path: Path, where: Home) -> None:
    """The signature comes first: a FIFO that would never end is not even listed."""
    path = save_folder(tmp_path / "c", 1)
    seal(where, path, 1)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    key = tmp_path / "other.pub"
    key.write_bytes(other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    os.mkfifo(path / "pipe")
    report = verify_seal(path, home=where, key=key)
    assert (report.status, techniques(report), report.checked) == ("violated", {"E10"}, ())


# -- a thousand -------------------------------------------------------------------------------------------------------


class Mutations:
    """One sealed folder, sabotaged in random ways, one way at a time."""

    def __init__(self, folder: Path) -> None:
        self.home = home(folder)
        self.old, self.new = save_folder(folder / "step-500", 500), save_folder(folder / "step-900", 900)
        seal(self.home, self.old, 500)
        seal(self.home, self.new, 900)
        self.genuine = {step: bytes_of(path) for step, path in ((500, self.old), (900, self.new))}
        self.insider = Home(folder / "insider")
        self.files = sorted(p for p in self.new.iterdir())
        readers = {".safetensors": safetensors_ranges, ".pt": torch_ranges, ".pth": torch_ranges}
        self.ranges = {file: readers.get(file.suffix, lambda path: {})(file) for file in self.files}

    def restore(self) -> None:
        """The folder as it was sealed."""
        for path in self.new.iterdir():
            path.unlink()
        for name, data in self.genuine[900].items():
            Path(name).write_bytes(data)

    def flip(self, draw: random.Random) -> set[str]:
        """One bit of one file; the tensors it lies in."""
        file = draw.choice(self.files)
        data = bytearray(file.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        inside = self.ranges[file]
        file.write_bytes(data)
        return {name for name, (start, end) in inside.items() if start <= at < end}

    def swap(self, draw: random.Random) -> set[str]:
        """Two files of the folder exchanged, or one taken from the other step."""
        one, two = draw.sample(self.files, 2)
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
        return set()

    def mix(self, draw: random.Random) -> set[str]:
        """One file of step 500; some are equal at every step and are left alone."""
        file = draw.choice([f for f in self.files if f.name not in ("config.json",)])
        shutil.copy(self.old / file.name, file)
        return set()

    def roll_back(self, draw: random.Random) -> set[str]:
        """All of step 500, with its seal."""
        for path in self.old.iterdir():
            shutil.copy(path, self.new / path.name)
        return set()

    def re_sign(self, draw: random.Random) -> set[str]:
        """An edit, sealed by another key."""
        named = self.flip(draw)
        seal_path(self.insider, self.new, run="run-a", step=900)
        return named

    def remove(self, draw: random.Random) -> set[str]:
        """One file gone."""
        draw.choice(self.files).unlink()
        return set()

    def add(self, draw: random.Random) -> set[str]:
        """One file more."""
        (self.new / f"{draw.randrange(1 << 30):x}.bin").write_bytes(draw.randbytes(9))
        return set()

    def cut(self, draw: random.Random) -> set[str]:
        """One file shortened."""
        file = draw.choice(self.files)
        file.write_bytes(file.read_bytes()[: -draw.randrange(1, 9)])
        return set()


KINDS = ("flip",) * 6 + ("swap", "mix", "roll_back", "re_sign", "remove", "add", "cut")


@pytest.mark.parametrize("seed", range(8))
def test_a_thousand_random_sabotages_are_all_refused(tmp_path: Path, seed: int) -> None:
    """8 × 130: none passes, none raises, and a flipped bit inside a tensor names exactly that tensor."""
    draw = random.Random(seed)
    mutations = Mutations(tmp_path)
    assert verify_seal(mutations.new, home=mutations.home).status == "upheld"
    for number in range(130):
        kind = draw.choice(KINDS)
        named = getattr(mutations, kind)(draw)
        report = verify_seal(mutations.new, home=mutations.home)
        assert report.status == "violated", f"{kind} {seed}/{number}: {report}"
        assert tensors(report) >= named, f"{kind} {seed}/{number}: {report.findings}"
        if kind == "flip" and named:
            assert tensors(report) == named
        mutations.restore()
    assert verify_seal(mutations.new, home=mutations.home).status == "upheld"


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_seal_of_one_file_never_passes_and_never_crashes(tmp_path: Path, seed: int) -> None:
    """The bundle is an attacker's: bits flipped, cut, repeated, keys exchanged. Refused in one sentence each time."""
    draw = random.Random(seed)
    where = home(tmp_path)
    path = save_file(tmp_path / "c.pt", 3)
    seal(where, path, 3)
    bundle = seal_path_of(path)
    genuine = bundle.read_bytes()
    for _ in range(60):
        data = bytearray(genuine)
        match draw.randrange(4):
            case 0:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 1:
                del data[draw.randrange(len(data)) :]
            case 2:
                at = draw.randrange(len(data))
                data[at:at] = data[at : at + draw.randrange(1, 50)]
            case _:
                value = json.loads(genuine)
                value[draw.choice(list(value))] = draw.choice([None, [], {}, 3, "x", [[]]])
                data = bytearray(json.dumps(value).encode())
        if bytes(data) == genuine:
            continue
        bundle.write_bytes(data)
        with contextlib.suppress(TrainguardError):
            assert verify_seal(path, home=where).status != "upheld"


# -- what a watched run sealed ----------------------------------------------------------------------------------------


def sealed_by_run(where: Home, path: Path, step: int) -> SealReport:
    """As the supervisor seals: nothing is written beside the file."""
    report = seal_path(where, path, run="run-a", step=step, source="run")
    assert not seal_path_of(path).exists()
    return report


def test_what_a_run_sealed_needs_no_file_beside_it(tmp_path: Path, where: Home) -> None:
    """The log and our store hold the seal; edits are named, the file may be moved."""
    path = save_file(tmp_path / "c.pt", 8)
    sealed_by_run(where, path, 8)
    report = verify_seal(path, home=where)
    assert (report.status, report.findings) == ("upheld", ())
    assert report.checked == ("signature", "logged", "newest", "content")
    moved = Path(shutil.copy(path, tmp_path / "moved.pt"))
    assert verify_seal(moved, home=where).status == "upheld"
    edited = torch.load(path, weights_only=True)
    edited["model"]["head.weight"] *= 1.01
    torch.save(edited, path)
    assert tensors(verify_seal(path, home=where)) == {"model.head.weight"}


def test_a_rollback_of_what_a_run_sealed_is_told_as_one(tmp_path: Path, where: Home) -> None:
    """E6: `last.pt` of step 500 put back over step 900."""
    path = save_file(tmp_path / "last.pt", 500)
    sealed_by_run(where, path, 500)
    kept = path.read_bytes()
    save_file(path, 900)
    sealed_by_run(where, path, 900)
    assert verify_seal(path, home=where).status == "upheld"
    path.write_bytes(kept)
    report = verify_seal(path, home=where)
    assert (report.status, techniques(report)) == ("violated", {"E6"})
    assert any("step 500" in finding.message for finding in report.findings)


def test_an_older_seal_left_beside_a_file_a_run_wrote_anew_is_no_finding(tmp_path: Path, where: Home) -> None:
    """Someone sealed `last.pt` by hand; the next watched run overwrote it."""
    path = save_file(tmp_path / "last.pt", 500)
    seal(where, path, 500)
    save_file(path, 900)
    seal_path(where, path, run="run-b", step=900, source="run")
    report = verify_seal(path, home=where)
    assert (report.status, report.run, report.step, report.findings) == ("upheld", "run-b", 900, ())


def test_an_edit_sealed_by_hand_over_what_the_run_saved_is_doubted(tmp_path: Path, where: Home) -> None:
    """E10: the run sealed step 8 as it saved it; someone with the key seals another content for it."""
    path = save_file(tmp_path / "c.pt", 8)
    sealed_by_run(where, path, 8)
    save_file(path, 9)
    made = seal_path(where, path, run="run-a", step=8)
    assert (made.status, techniques(made)) == ("unknown", {"E10"})
    assert verify_seal(path, home=where).exit_status == 3


def test_a_seal_whose_copy_we_lost_is_not_green(tmp_path: Path, where: Home) -> None:
    """Without a file beside it and without our copy there is nothing to compare with."""
    path = save_file(tmp_path / "c.pt", 8)
    sealed_by_run(where, path, 8)
    for blob in where.blobs.iterdir():
        blob.write_bytes(b"altered")
    report = verify_seal(path, home=where)
    assert (report.status, report.exit_status, report.checked) == ("unknown", 3, ())
    assert [finding.outcome for finding in report.findings] == ["not_checked"]
