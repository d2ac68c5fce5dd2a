"""Train a small character-level GPT on the text of Python's own standard library.

    python train.py                              # about half a minute on two CPU cores
    python train.py --resume                     # go on from the newest checkpoint in --out
    torchrun --nproc_per_node 2 train.py         # two ranks: gloo on CPUs, NCCL on GPUs

A run that is stopped and resumed ends with the same weights, bit for bit, as one that never stopped: a checkpoint holds
the model, the optimizer, the schedule, every rank's random generators and the place in the data order.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # other characters are dropped from the text
CODE = {character: index for index, character in enumerate(ALPHABET)}


def corpus(limit: int) -> Tensor:
    """The first `limit` characters of Python's help topics and module sources, as indices into ALPHABET."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [*(topics[name] for name in sorted(topics)), *(path.read_text("utf-8", "ignore") for path in modules)]
    return torch.tensor([CODE[character] for character in "\n".join(texts)[:limit] if character in CODE])


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `context` characters that do not overlap, each with the same window one character on as its target."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[index * self.context :][: self.context + 1]
        return window[:-1], window[1:]


class Batches:
    """An endless stream of shuffled batches that goes on from any `place`, by passing over what the epoch had used."""

    def __init__(self, data: Windows, batch: int, workers: int, seed: int, rank: int, world: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.share = DistributedSampler(data, world, rank, seed=seed, drop_last=True) if world > 1 else None
        options = {"num_workers": workers, "drop_last": True, "generator": self.generator}
        self.loader = DataLoader(data, batch, shuffle=self.share is None, sampler=self.share, **options)
        if len(self.loader) == 0:
            raise SystemExit(f"{len(data)} windows are too few for one batch of {batch} on each of {world} ranks")
        self.place = {"epoch": 0, "taken": 0, "generator": self.generator.get_state()}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            epoch, used = self.place["epoch"], self.place["taken"]
            self.generator.set_state(self.place["generator"])
            if self.share is not None:
                self.share.set_epoch(epoch)
            for index, batch in enumerate(self.loader):
                if index >= used:
                    self.place["taken"] = index + 1
                    yield batch
            self.place = {"epoch": epoch + 1, "taken": 0, "generator": self.generator.get_state()}


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a GELU layer four times as wide."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attend(self.norm_attention(x_BTC)))
        return x_BTC + self.dropout(self.down(F.gelu(self.up(self.norm_mlp(x_BTC)))))

    def attend(self, x_BTC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """Decoder-only transformer over ALPHABET with learned positions: index_BT -> logits over the next character."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(len(ALPHABET), width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:  # what ends a residual branch starts smaller, or the sum would grow with depth
                ends_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=(width * (2 * layers if ends_branch else 1)) ** -0.5)

    def forward(self, index_BT: Tensor) -> Tensor:
        x_BTC = self.dropout(self.token(index_BT) + self.position.weight[: index_BT.shape[1]])
        return self.head(self.norm(self.blocks(x_BTC)))


@torch.no_grad()
def sample(gpt: GPT, prompt: str, length: int, seed: int) -> str:
    """`prompt` continued by `length` characters at temperature 0.8, drawn with a generator of its own."""
    gpt.eval()
    draw = torch.Generator().manual_seed(seed)
    written = [CODE[character] for character in prompt]
    for _ in range(length):
        recent = torch.tensor([written[-gpt.position.num_embeddings :]], device=gpt.head.weight.device)
        chances = (gpt(recent)[0, -1].cpu() / 0.8).softmax(-1)
        written.append(int(torch.multinomial(chances, 1, generator=draw)))
    return "".join(ALPHABET[index] for index in written)


def make_optimizer(gpt: GPT, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [weight for weight in gpt.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in gpt.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def make_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up over the first tenth of `steps`, then a cosine down to a tenth of the rate at the end."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    index_BT, target_BT = (part.to(device) for part in batch)
    return F.cross_entropy(model(index_BT).flatten(0, 1), target_BT.flatten())


@torch.no_grad()
def evaluate(gpt: GPT, held_out: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Mean loss over batches of held-out text, with dropout off."""
    gpt.eval()
    losses = [cross_entropy(gpt, batch, device).item() for batch in held_out]
    gpt.train()
    return sum(losses) / len(losses)


def random_state() -> dict:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def write_atomically(value: object, path: Path) -> None:
    """Write `value` so that a crash at any moment leaves `path` either absent or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(wanted: str, out: Path, world: int) -> dict:
    """The checkpoint at path `wanted`, or the newest in `out`, if it fits this number of ranks."""
    path = max(out.glob("step-*.pt"), default=None) if wanted == "newest" else Path(wanted)
    if path is None:
        raise SystemExit(f"no step-*.pt in {out}: name a checkpoint, or train without --resume")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if len(state["random"]) != world:
        raise SystemExit(f"{path} was saved by {len(state['random'])} rank(s), and this run has {world}")
    return state


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="optimizer steps in the whole run")
    add("--batch", type=int, default=16, help="windows per step and rank")
    add("--context", type=int, default=64, help="characters per window")
    add("--corpus", type=int, default=1_000_000, help="characters of text")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--width", type=int, default=128, help="channels, a multiple of the 4 heads")
    add("--dropout", type=float, default=0.05, help="share of activations dropped")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of weights, data order and dropout")
    add("--workers", type=int, default=0, help="processes that load data")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    add("--log-every", type=int, default=10, help="steps between lines")
    add("--eval-every", type=int, default=50, help="steps between evaluations")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--out", type=Path, default=Path("out"), help="folder for checkpoints")
    add("--resume", nargs="?", const="newest", metavar="CHECKPOINT", help="go on from this one, or from the newest")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rank, local, world = (int(os.environ.get(n, d)) for n, d in [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    text = corpus(args.corpus)
    split = len(text) * 9 // 10
    batches = Batches(Windows(text[:split], args.context), args.batch, args.workers, args.seed, rank, world)
    held_out = list(DataLoader(Windows(text[split:], args.context), args.batch))[:8]

    torch.manual_seed(args.seed)  # the same first weights on every rank ...
    gpt = GPT(args.layers, args.width, 4, args.context, args.dropout).to(device)
    torch.manual_seed(args.seed + rank)  # ... and dropout of its own
    random.seed(args.seed + rank)
    optimizer = make_optimizer(gpt, args.lr)
    schedule = make_schedule(optimizer, args.steps)
    parts = {"model": gpt, "optimizer": optimizer, "schedule": schedule}

    done = 0
    if args.resume is not None:
        state = load(args.resume, args.out, world)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, batches.place = state["step"], state["place"]
        set_random_state(state["random"][rank])

    model = DistributedDataParallel(gpt) if world > 1 else gpt
    if rank == 0:
        size = f"{sum(weight.numel() for weight in gpt.parameters()):,}"
        print(f"{size} parameters, {len(text):,} characters, {world} rank(s) on {device.type}, from step {done}")
    stream, seconds, timed = iter(batches), 0.0, 0
    for step in range(done + 1, args.steps + 1):
        began = time.perf_counter()
        loss = cross_entropy(model, next(stream), device)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(gpt.parameters(), args.clip)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        seconds, timed = seconds + time.perf_counter() - began, timed + 1

        if step % args.log_every == 0 and rank == 0:
            pace = f"{1e3 * seconds / timed:6.1f} ms/step"
            print(f"step {step:5d}  loss {loss:.4f}  lr {lr:.2e}  grad norm {norm:.3f}  {pace}", flush=True)
            seconds, timed = 0.0, 0
        if step % args.eval_every == 0 and rank == 0:
            print(f"step {step:5d}  held-out loss {evaluate(gpt, held_out, device):.4f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            states = [random_state()] * world
            if world > 1:
                dist.all_gather_object(states, states[rank])
            if rank == 0:
                saved = {name: part.state_dict() for name, part in parts.items()}
                saved |= {"step": step, "place": batches.place, "random": states}
                write_atomically(saved, args.out / f"step-{step:06d}.pt")

    if rank == 0:
        weights = b"".join(weight.cpu().numpy().tobytes() for weight in gpt.state_dict().values())
        print(f"final weights sha256:{hashlib.sha256(weights).hexdigest()}\n\n{sample(gpt, 'The ', 300, args.seed)}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
