"""Train a small transformer whose weights are sharded over two ranks (fully_shard, gloo on CPU).

torchrun --nproc_per_node 2 fsdp2_two_ranks.py
python fsdp2_two_ranks.py        # starts the same by itself
"""

import argparse
import hashlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Model(nn.Module):
    """Learns to answer each symbol with its successor, and to name the first one in the last place."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.place = nn.Embedding(12, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 16)

    def forward(self, index):
        target = (index + 1) % 16
        target[:, -1] = index[:, 0]
        x = self.embedding(index) + self.place(torch.arange(12))
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*launcher, *sys.argv])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(args.seed)  # the same weights, and the same dropout, on every rank

    model = Model()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    draw = torch.Generator().manual_seed(args.seed + dist.get_rank())  # other batches on every rank
    for step in range(1, args.steps + 1):
        loss = model(torch.randint(16, (16, 12), generator=draw))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 and dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)

    whole = [p.full_tensor().detach() for p in model.parameters()]
    if dist.get_rank() == 0:
        print("digest", hashlib.sha256(b"".join(p.numpy().tobytes() for p in whole)).hexdigest())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
