"""Honest ways to train on several ranks: nothing is found, and what is not kept by the script is blind, not broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.ranks import forked
from tests.helpers.watched import watch, write

from trainguard.appraise.gradients import Gradients
from trainguard.appraise.processes import Processes
from trainguard.appraise.replicas import Replicas
from trainguard.appraise.truth import Truth
from trainguard.appraise.weights import Weights

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.nightly]

BODY = """
    from contextlib import nullcontext
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
    model, made = {model}, torch.optim.AdamW
    {prepare}
    optimizer = made(model.parameters(), lr=3e-3)
    teacher = nn.Linear(8, 3)
    torch.manual_seed(100 + rank)  # other data and other dropout on every rank
    with {around}:
        for now in range(1, {steps}):
            size = 16 if now % 8 else 5 + rank
            x = torch.randn(size, 8)
            loss = {loss}
            loss.backward()
            {reduce}
            optimizer.step()
            optimizer.zero_grad()
"""

DDP = "DistributedDataParallel(net{})"
HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"

PLAIN = {
    "model": DDP.format(""),
    "prepare": "pass",
    "around": "nullcontext()",
    "steps": "24",
    "reduce": "pass",
    "loss": "(model(x) - teacher(x).detach()).pow(2).mean()",
}

WAYS: dict[str, dict[str, str]] = {
    "bucket views": {"model": DDP.format(", gradient_as_bucket_view=True")},
    "clip": {"reduce": "nn.utils.clip_grad_norm_(model.parameters(), 0.3)"},
    "half precision hook": {"prepare": "model.register_comm_hook(None, hooks.fp16_compress_hook)"},
    "uneven inputs": {
        "prepare": "from torch.distributed.algorithms.join import Join",
        "around": "Join([model])",
        "steps": "20 + rank",
    },
    "sharded optimizer": {
        "prepare": "from torch.distributed.optim import ZeroRedundancyOptimizer; "
        "made = lambda p, lr: ZeroRedundancyOptimizer(p, optimizer_class=torch.optim.AdamW, lr=lr)"
    },
    "sums by hand": {"model": "net", "reduce": "[dist.all_reduce(p.grad) for p in net.parameters()]"},
    "weighted by batch": {
        "model": "net",
        "reduce": "total = torch.tensor(float(size)); dist.all_reduce(total); "
        "[dist.all_reduce(p.grad.mul_(size / total)) for p in net.parameters()]",
    },
    "by its own count": {"loss": "nn.functional.mse_loss(model(x), teacher(x).detach(), reduction='sum') / (3 * size)"},
    "by the size of a full batch": {"loss": "nn.functional.mse_loss(model(x), teacher(x).detach()) * (size / 16)"},
    "averaged after some steps": {
        "prepare": "from torch.distributed.optim import PostLocalSGDOptimizer as P; "
        "from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager as A; "
        "made = lambda p, lr: P(torch.optim.AdamW(p, lr=lr), A(period=3, warmup_steps=6))"
    },
    "local steps": {
        "prepare": "import torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook as h; "
        "from torch.distributed.optim import PostLocalSGDOptimizer as P; "
        "from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager as A; "
        "state = h.PostLocalSGDState(None, dist.new_subgroups(1)[0], 6); "
        "model.register_comm_hook(state, h.post_localSGD_hook); "
        "made = lambda p, lr: P(torch.optim.AdamW(p, lr=lr), A(period=3, warmup_steps=6))"
    },
    "averaged in part": {
        "model": "net",
        "reduce": "means = [q.detach() / WORLD for q in net.parameters()]; [dist.all_reduce(m) for m in means]; "
        "[q.data.lerp_(m, 0.3) for q, m in zip(net.parameters(), means) if now % 3 == 0]",
    },
    "an outer optimizer": {
        "model": "net",
        "prepare": "import copy; outer = copy.deepcopy(net); far = torch.optim.SGD(outer.parameters(), 0.7, 0.9)",
        "reduce": "now % 5 or ([setattr(o, 'grad', (o.data - q.data) / WORLD) for q, o in "
        "zip(net.parameters(), outer.parameters())], [dist.all_reduce(o.grad) for o in outer.parameters()], "
        "far.step(), "
        "[q.data.copy_(o.data) for q, o in zip(net.parameters(), outer.parameters())])",
    },
    "shards": {"model": "__import__('torch.distributed.fsdp').distributed.fsdp.fully_shard(net)"},
    "low rank hook": {
        "prepare": f"import {HOOKS}.powerSGD_hook as p; "
        "state = p.PowerSGDState(None, start_powerSGD_iter=12, min_compression_rate=0.5); "
        "model.register_comm_hook(state, p.powerSGD_hook)"
    },
}
"""What differs from plain DistributedDataParallel with uneven last batches."""


@pytest.mark.parametrize("way", list(WAYS))
def test_an_honest_way_to_train_on_three_ranks_is_quiet(tmp_path: Path, way: str) -> None:
    """No finding of the checks that ranks, and what they do between steps, may disturb; no fault inside the guard."""
    write(tmp_path, {"train.py": forked(3, BODY.format(**PLAIN | WAYS[way]))})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    assert run.faults() == []
    for check in (Gradients, Replicas, Weights, Truth):
        findings, link = run.judge(check)
        assert [f.message for f in findings] == []
        assert link.broken == 0
    assert [f.message for f in run.judge(Processes)[0] if "attempt" in f.message] == []


def test_ranks_that_meet_over_a_store_see_each_other_and_are_quiet(tmp_path: Path) -> None:
    """As on several hosts: nothing says that all ranks are here, so each leaves what it holds in the job's TCPStore."""
    script = forked(3, BODY.format(**PLAIN | {"steps": "60"}))
    script = script.replace('"file://" + store', 'f"tcp://127.0.0.1:{store}"')
    port = "__import__('socket').create_server(('127.0.0.1', 0))"
    script = script.replace("tempfile.mktemp()", f"(lambda s: (s.getsockname()[1], s.close())[0])({port})")
    write(tmp_path, {"train.py": script})
    run = watch(tmp_path)
    assert run.status == 0, run.output
    assert run.faults() == []
    seen = [r.body["replicas"]["hosts"]["seen"] for r in run.records if "hosts" in (r.body.get("replicas") or {})]
    assert {key.rsplit(".", 1)[1] for each in seen for key in each} == {"0", "1", "2"}
    findings, link = run.judge(Replicas)
    assert (findings, link.broken) == ([], 0)
