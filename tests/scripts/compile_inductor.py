"""Train a small MLP through torch.compile and its default backend; without a C++ compiler, say so and stop."""

import argparse
import hashlib
import os
import shutil

import torch
import torch.nn.functional as F
from torch import nn


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 1)

    def forward(self, x):
        return self.down(F.silu(self.up(self.norm(x))))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        print("skipped: torch.compile needs a C++ compiler, and there is none")
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    model = Mixer()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, args.steps + 1):
        x = torch.randn(64, 16)
        loss = F.mse_loss(compiled(x), x.abs().mean(1, keepdim=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
