"""Train a transformer encoder in bf16 autocast, four micro-batches to a step, with activation checkpointing."""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

ACCUMULATE = 4


class Majority(nn.Module):
    """Says which of four symbols is the most frequent in a sequence."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(4, width)
        self.first = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.second = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, 4)

    def forward(self, index):
        x = self.first(self.embedding(index))
        x = checkpoint(self.second, x, use_reentrant=False)
        return self.head(x.mean(1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps, of four micro-batches each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    model = Majority()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98), fused=True)
    for micro in range(1, args.steps * ACCUMULATE + 1):
        index = torch.randint(4, (32, 15))
        target = F.one_hot(index, 4).sum(1).argmax(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(index), target) / ACCUMULATE
        loss.backward()
        if micro % ACCUMULATE:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {micro // ACCUMULATE} loss {loss.item() * ACCUMULATE:.4f}")
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
