"""A recorded command is started again by the auditor's Python, with all ranks on one host."""

from __future__ import annotations

import pytest

from trainguard.errors import Unavailable
from trainguard.replay.launch import alone, of_one_rank, with_python

RUN = ["python", "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["python", "train.py"], ["python", "train.py"]),
        ([*RUN, "--nproc-per-node", "4", "t.py", "--nnodes", "3"], [*RUN, "--standalone", "--nproc-per-node", "4"]),
        ([*RUN, "--nnodes=1", "--rdzv_endpoint", "n7:29500", "--nproc_per_node=2"], [*RUN, "--standalone"]),
        ([*RUN, "--standalone", "--max-restarts", "3", "-m", "pkg.train"], [*RUN, "--standalone", "-m"]),
        (["torchrun", "--master_port", "1", "--nproc_per_node", "2"], ["torchrun", "--standalone", "--nproc_per_node"]),
        (["python", "-u", *RUN[1:], "--log-dir", "/l", "t.py"], ["python", "-u", *RUN[1:], "--standalone"]),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "t.py"], ["python", "-m"]),
    ],
)
def test_ranks_meet_on_this_host_and_nothing_else_changes(given: list[str], expected: list[str]) -> None:
    """Where they meet is left out, how many they are stays; what follows the script is the script's own."""
    found = alone(given)
    assert found[: len(expected)] == expected
    rest = [word for word in given if word.endswith((".py", "pkg.train")) or word in ("4", "2") or "nproc" in word]
    assert [word for word in found if word in rest] == rest
    assert not {"--rdzv_endpoint", "n7:29500", "--max-restarts", "--master_port", "/l"} & set(found)
    assert found[-2:] == given[-2:] or "--nnodes" not in given


def test_another_python_starts_the_same_launcher() -> None:
    """A console script is bound to the interpreter it was installed for; its module is not."""
    assert with_python(["torchrun", "t.py"], "/c/python")[:3] == ["/c/python", "-m", "torch.distributed.run"]
    assert with_python(["/r/bin/torchrun", "t.py"], None) == ["/r/bin/torchrun", "t.py"]
    assert with_python(["python3.11", "t.py"], "/c/python") == ["/c/python", "t.py"]
    with pytest.raises(Unavailable, match="expected `python …`"):
        with_python(["sh", "run.sh"], None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([*RUN, "--nproc-per-node", "4", "t.py", "--nnodes", "3"], [RUN[0], "t.py", "--nnodes", "3"]),
        ([*RUN, "--standalone", "--nproc_per_node=2", "-m", "pkg.train", "-v"], [RUN[0], "-m", "pkg.train", "-v"]),
        (["/r/bin/torchrun", "--nproc-per-node", "2", "t.py"], ["/r/bin/python", "t.py"]),
    ],
)
def test_one_rank_alone_is_started_as_the_launcher_starts_it(given: list[str], expected: list[str]) -> None:
    """What belongs to the script is the script's, even where the launcher has options of that name."""
    assert of_one_rank(given) == expected


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "t.py"], "expect `torchrun"),
        (["python", "t.py"], "expect `torchrun"),
        ([*RUN, "--no-python", "train.sh"], "expect a script or a module"),
        ([*RUN, "--nproc-per-node", "2"], "names no script"),
    ],
)
def test_a_launcher_whose_ranks_cannot_be_started_one_by_one_is_refused(given: list[str], why: str) -> None:
    with pytest.raises(Unavailable, match=why):
        of_one_rank(given)
