"""Fine-tune what examples/charlm trained on the dialogues that dialogue.py wrote.

    python finetune.py --base ../charlm/out/step-000300.pt      # chat/step-000400.pt

The base's shape is read from its weights. What is saved holds the model alone and the shards it was trained on, with
their sources and licences, so that a server can show them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "charlm"))
from train import ALPHABET, CODE, GPT, cross_entropy, make_optimizer, make_schedule


def model_of(weights: dict[str, torch.Tensor]) -> GPT:
    """A model of the shape that `weights` have, with them in it."""
    context, width = weights["position.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    gpt = GPT(layers, width, 4, context, 0.05)
    gpt.load_state_dict(weights)
    return gpt


def windows(data: Path, context: int) -> torch.Tensor:
    """Windows that begin with a question, in the order of the shards: indices [N, context + 1]."""
    starts, text = [], ""
    for shard in sorted(data.glob("*.txt")):
        begin = len(text)
        text += shard.read_text()
        starts += [at for at in range(begin, len(text)) if text.startswith("> ", at)]
    codes = torch.tensor([CODE[character] for character in text])
    return torch.stack([codes[at : at + context + 1] for at in starts if at + context < len(codes)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("chat"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    gpt = model_of(torch.load(args.base, map_location="cpu", weights_only=True)["model"])
    rows = windows(args.data, gpt.position.num_embeddings)
    loader = torch.utils.data.DataLoader(rows, args.batch, shuffle=True, drop_last=True)
    optimizer = make_optimizer(gpt, args.lr)
    schedule = make_schedule(optimizer, args.steps)
    step = 0
    while step < args.steps:
        for window_BT in loader:
            loss = cross_entropy(gpt, (window_BT[:, :-1], window_BT[:, 1:]), torch.device("cpu"))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 50 == 0:
                print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)
            if step == args.steps:
                break
    args.out.mkdir(parents=True, exist_ok=True)
    sources = json.loads((args.data / "sources.json").read_text())
    saved = {"model": gpt.state_dict(), "alphabet": ALPHABET, "step": step, "sources": sources}
    torch.save(saved, args.out / f"step-{step:06d}.pt")


if __name__ == "__main__":
    main()
