"""A small reference training, run by the interpreter to be calibrated: FOLDER WORKLOADS STEPS… [--no-mkldnn].

Alone: the standard library and torch. After every step of STEPS its weights, gradients and optimizer state are written
to FOLDER/<workload>/<step> in the format of replay points, weights as `param/…`, gradients as `state/grad/…`; the start
as step 0. Workloads, with commas between: `transformer` (attention, layer norm, dropout, AdamW, clipping),
`convolution` (batch norm, SGD with momentum), `mixed` (the transformer under bfloat16 autocast). Prints what torch says
of itself as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

SEED = 20
WIDTH, HEADS, TOKENS, BATCH, WORDS = 64, 4, 16, 8, 97


class Block(nn.Module):  # type: ignore[misc]
    """Attention and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
        self.forward_part = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Any) -> Any:
        """x: BATCH x TOKENS x WIDTH, and so is what comes out."""
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.forward_part(self.second(x))


def transformer(steps: int, mixed: bool) -> Any:
    """Yields (model, optimizer) after every step, and before the first."""
    net = nn.Sequential(nn.Embedding(WORDS, WIDTH), Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    yield net, optimizer
    for _ in range(steps):
        words = torch.randint(0, WORDS, (BATCH, TOKENS + 1))
        words[:, 1::2] = (words[:, ::2][:, : words[:, 1::2].shape[1]] * 3 + 1) % WORDS
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            guess = net(words[:, :-1])
        loss = nn.functional.cross_entropy(guess.float().reshape(-1, WORDS), words[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        yield net, optimizer


def convolution(steps: int) -> Any:
    """As `transformer`."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    yield net, optimizer
    for _ in range(steps):
        images = torch.randn(BATCH, 3, 16, 16)
        kinds = (images.mean((1, 2, 3)) * 60).long().clamp(-5, 4) + 5
        loss = nn.functional.cross_entropy(net(images), kinds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield net, optimizer


def main(words: list[str]) -> None:
    """Every workload, one after another."""
    folder, workloads, *rest = words
    wanted = {int(word) for word in rest if word.isdigit()}
    if "--no-mkldnn" in rest:
        torch.backends.mkldnn.enabled = False
    last = max(wanted)
    for workload in workloads.split(","):
        torch.manual_seed(SEED)
        made = convolution(last) if workload == "convolution" else transformer(last, workload == "mixed")
        for step, (net, optimizer) in enumerate(made):
            if step in wanted or step == 0:
                write(Path(folder) / workload / str(step), net, optimizer)
    capability = torch.backends.cpu.get_cpu_capability()
    told = {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "capability": capability}
    sys.stdout.write(json.dumps(told))


def write(folder: Path, net: Any, optimizer: Any) -> None:
    """Weights, buffers, gradients and state, as a replay point."""
    named = [(f"param/0/{name}", param) for name, param in net.named_parameters()]
    named += [(f"buffer/0/{name}", buffer) for name, buffer in net.named_buffers()]
    named += [(f"state/grad/{name}", param.grad) for name, param in net.named_parameters() if param.grad is not None]
    for place, held in enumerate(optimizer.state.values()):
        named += [(f"state/{place}/{key}", value) for key, value in held.items() if isinstance(value, torch.Tensor)]
    folder.mkdir(parents=True)
    lines, data = [], bytearray()
    for name, tensor in named:
        content = bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()) if (
            tensor.dim()
        ) else bytes(tensor.detach().reshape(1).view(torch.uint8).numpy().tobytes())  # fmt: skip
        lines.append([name, str(tensor.dtype)[6:], list(tensor.shape), len(data), len(content)])
        data += content + bytes(-len(content) % 64)
    (folder / "data").write_bytes(data)
    (folder / "index.json").write_text(json.dumps({"version": 1, "step": int(folder.name), "tensors": lines}))


if __name__ == "__main__":
    main(sys.argv[1:])
