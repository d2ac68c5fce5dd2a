"""What was saved is held to what the same step of a replay saves: E9 without any check in the training process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainguard.evidence import Evidence
from trainguard.replay.committed import Account
from trainguard.replay.files import Altered, first_altered, kept_files, written_natively
from trainguard.replay.rerun import Rerun, Saved
from trainguard.seal.prints import Prints

KEY = "5a" * 32
SECOND = 1_000_000_000
WALLS = dict.fromkeys(range(1, 100), SECOND)

Storages = dict[str, tuple[int, str, str | None]]


def weights(step: int, **changed: str) -> Storages:
    """Three storages of one save; "0" never changes (an embedding that is not trained)."""
    digests = {"0": "frozen", "1": f"a{step}", "2": f"b{step}"} | {key[1:]: value for key, value in changed.items()}
    return {name: (64, digest, digest) for name, digest in digests.items()}


def saved(step: int, path: str | None = "/box/work/last.pt", storages: Storages | None = None, **more: Any) -> Saved:
    return Saved(
        process=0, number=step, step=step, path=path, storages=storages or weights(step), **{"aside": False, **more}
    )


def altered(
    files: list[tuple[int, Storages]], made: list[Saved], walls: dict[int, int] | None = None
) -> Altered | None:
    """files: (step, storages) of what the run sealed at /run/last.pt."""
    blobs: dict[str, bytes] = {}
    records = []
    for step, storages in files:
        rows = tuple((name, *storage, f"model.{name}") for name, storage in storages.items())
        blobs[f"{step}"] = Prints(mtime_ns=0, storages=rows).encode()
        body = {"path": "/run/last.pt", "prints": f"{step}"}
        records.append(Evidence(n=len(records), at=0, source="supervisor", kind="seal", body=body, step=step))
    kept = kept_files(records, blobs.__getitem__, WALLS if walls is None else walls)
    return first_altered(kept, Rerun(account=Account(), saved=made, root="/box"), "/run")


def test_files_that_hold_what_their_steps_had_are_equal() -> None:
    """A path that is written again and again: each version is some save's, whatever the times say."""
    made = [saved(step) for step in (10, 20, 30)]
    assert altered([(10, weights(10)), (30, weights(20))], made) is None


def test_a_tensor_that_was_altered_on_its_way_is_named() -> None:
    """E9: one tensor of the file that was written after step 20."""
    found = altered([(10, weights(10)), (20, weights(20, _2="x"))], [saved(step) for step in (10, 20, 30)])
    assert found is not None
    assert (found.step, found.tensor, found.tensors, found.of) == (20, "model.2", 1, 3)
    assert (found.expected, found.found) == ("b20", "x")


def test_a_file_of_another_step_is_not_what_it_should_be() -> None:
    """Everything differs: the whole of an older state was written in its place."""
    found = altered([(20, weights(3))], [saved(10), saved(20)])
    assert found is not None
    assert (found.step, found.tensors) == (20, 2)


def test_what_was_saved_outside_of_what_was_replayed_is_not_judged() -> None:
    """The replay began at step 20; the file at step 10 has no save to be held to."""
    assert altered([(10, weights(10))], [saved(20), saved(30)]) is None
    assert altered([(10, weights(10, _2="x"))], []) is None


def test_a_save_beside_the_training_is_not_judged() -> None:
    """Another thread saved it: what it read may have been changing, in the run and in the replay."""
    assert altered([(20, weights(20, _1="torn"))], [saved(20, aside=True)]) is None


def test_a_save_into_memory_is_found_by_its_layout() -> None:
    """Frameworks save into a buffer and write that; another layout is another file."""
    assert altered([(20, weights(20))], [saved(20, path=None)]) is None
    found = altered([(20, weights(20, _1="x"))], [saved(20, path=None)])
    assert found is not None
    assert found.tensor == "model.1"
    assert altered([(20, weights(20, _1="x"))], [saved(20, path=None, storages={"0": (8, "y", "y")})]) is None


def test_where_steps_are_shorter_than_file_times_are_exact_a_file_may_be_of_an_earlier_step() -> None:
    """Steps of a millisecond: the file seems to be written two steps later than it was."""
    short = dict.fromkeys(range(1, 100), SECOND // 1000)
    assert altered([(22, weights(20, _1="x"))], [saved(20)]) is None
    found = altered([(22, weights(20, _1="x"))], [saved(20)], short)
    assert found is not None
    assert found.step == 20


@pytest.mark.parametrize("digest", [None, "other"])
def test_digests_of_samples_decide_where_not_all_was_digested(digest: str | None) -> None:
    """Past the budget only samples are known; a whole digest counts where both sides have one."""
    storages = {"0": (1 << 22, "sampled", digest)}
    again: Storages = {"0": (1 << 22, "sampled", "whole")}
    assert (altered([(20, storages)], [saved(20, storages=again)]) is None) == (digest is None)


def test_a_native_file_is_read_where_the_replay_left_it(tmp_path: Path) -> None:
    """safetensors tells nobody what it writes. Written twice, only the last is still there, and nothing is said."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    from trainguard.seal.prints import read_prints

    path = tmp_path / "model.safetensors"
    safetensors.save_file({"w": torch.ones(4)}, path)
    prints = read_prints(path, KEY)
    assert prints is not None
    body = {"path": str(path), "prints": "p"}
    record = Evidence(n=0, at=0, source="supervisor", kind="seal", body=body, step=20)
    kept = kept_files([record], lambda _: prints.encode(), WALLS)

    def judged(*written: int) -> Altered | None:
        told = [(str(path.resolve()), step) for step in written]
        rerun = Rerun(account=Account(), written=told, native=written_natively(told, KEY))
        return first_altered(kept, rerun, "/")

    assert judged(20) is None
    safetensors.save_file({"w": torch.full((4,), 1.01)}, path)
    found = judged(20)
    assert found is not None
    assert found.tensor == "w"
    assert judged(10, 20) is None
