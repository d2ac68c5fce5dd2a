"""Logistic regression as in a lesson: no optimizer, the weights are moved by hand along their gradients."""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    for step in range(1, args.steps + 1):
        x = torch.randn(64, 2)
        inside = (x.square().sum(1, keepdim=True) < 1.4).float()
        loss = F.binary_cross_entropy_with_logits(model(x), inside)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= args.lr * p.grad
                p.grad = None
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
