"""Train a two-layer GPT on bytes in a memory-mapped file, with batches drawn by hand and the rate set by hand."""

import argparse
import hashlib
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CONTEXT, BATCH, ACCUMULATE = 32, 8, 2
WARMUP, PEAK, LOWEST = 5, 3e-3, 3e-4

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(args.seed)
args.out.mkdir(parents=True, exist_ok=True)

corpus = "".join(topics[name] for name in sorted(topics)).encode()
for split, text in (("train", corpus[:200_000]), ("val", corpus[200_000:220_000])):
    np.frombuffer(text, dtype=np.uint8).tofile(args.out / f"{split}.bin")


def get_batch(split):
    # Opened anew each time, because a memmap that stays open keeps every page it has touched.
    data = np.memmap(args.out / f"{split}.bin", dtype=np.uint8, mode="r")
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,)).tolist()
    rows = np.stack([data[start : start + CONTEXT + 1] for start in starts]).astype(np.int64)
    return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


class Model(nn.Module):
    def __init__(self, width=48, heads=4):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.zeros(CONTEXT, width))
        layer = {"dim_feedforward": 4 * width, "dropout": 0.1, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **layer) for _ in range(2))
        self.head = nn.Linear(width, 256)

    def forward(self, index, target):
        mask = nn.Transformer.generate_square_subsequent_mask(index.shape[1])
        x = self.token(index) + self.place
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), target.flatten())


def rate(step):
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, args.steps - WARMUP)
    return LOWEST + 0.5 * (PEAK - LOWEST) * (1 + math.cos(math.pi * done))


@torch.no_grad()
def estimate():
    model.eval()
    losses = [model(*get_batch("val"))[1].item() for _ in range(4)]
    model.train()
    return sum(losses) / len(losses)


model = Model()
decay = [weight for weight in model.parameters() if weight.dim() > 1]
plain = [weight for weight in model.parameters() if weight.dim() <= 1]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
scaler = torch.amp.GradScaler("cpu", enabled=False)
first = 0
if args.resume:
    checkpoint = torch.load(args.out / "ckpt.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    first = checkpoint["step"]

batch = get_batch("train")
for step in range(first, args.steps):
    for group in optimizer.param_groups:
        group["lr"] = rate(step)
    if step % 10 == 0 and step > first:
        print(f"step {step} val loss {estimate():.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, args.out / "ckpt.pt")
    for _ in range(ACCUMULATE):
        _, loss = model(*batch)
        batch = get_batch("train")
        scaler.scale(loss / ACCUMULATE).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    print(f"step {step + 1} loss {loss.item():.4f}")

print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
