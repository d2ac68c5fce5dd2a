"""Train a small CNN on two ranks with DistributedDataParallel over gloo.

torchrun --nproc_per_node 2 ddp_two_ranks.py
python ddp_two_ranks.py          # starts the same by itself
"""

import argparse
import hashlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30, help="batches; every third waits for the next one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*launcher, *sys.argv])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(args.seed)

    model = DistributedDataParallel(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, 4),
        )
    )  # fmt: skip
    draw = torch.Generator().manual_seed(args.seed)
    label = torch.randint(4, (512,), generator=draw)
    image = torch.randn(512, 1, 8, 8, generator=draw) * 0.5
    for index, quarter in enumerate(label.tolist()):  # the label says which quarter is brighter
        row, column = divmod(quarter, 2)
        image[index, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.6
    data = TensorDataset(image, label)
    sampler = DistributedSampler(data, seed=args.seed)
    loader = DataLoader(data, batch_size=16, sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    step, epoch = 0, 0
    while step < args.steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for x, y in loader:
            step += 1
            # Gradients of the first of every three batches stay on the rank, and are reduced with the next ones.
            if step % 3 == 1 and step < args.steps:
                with model.no_sync():
                    F.cross_entropy(model(x), y).backward()
                continue
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            shown = loss.detach().clone()
            dist.all_reduce(shown)
            if dist.get_rank() == 0:
                print(f"step {step} loss {shown.item() / dist.get_world_size():.4f}", flush=True)
            if step >= args.steps:
                break

    if dist.get_rank() == 0:
        print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
