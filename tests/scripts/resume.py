"""Train half the steps, save everything, and let a new process load it and do the rest: same end as in one go.

python resume.py             # two processes, one after the other
python resume.py --whole     # one process; prints the same digest
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def batches(seed, first, last):
    """(step, batch) for steps `first` to `last` of an endless shuffled stream, the same wherever it is entered."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 6, generator=draw)
    loader = DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=32, shuffle=True, generator=draw)
    step = 0
    while True:
        for batch in loader:
            step += 1
            if step > last:
                return
            if step >= first:
                yield step, batch


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--whole", action="store_true", help="do not stop half way")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    model = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.97)
    first, last = 1, args.steps
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        first = state["step"] + 1
    elif not args.whole:
        last = args.steps // 2

    for step, (x, y) in batches(args.seed, first, last):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)

    if last < args.steps:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"step": last, "random": torch.get_rng_state()}, args.out / "half.pt")
        rest = ["--steps", str(args.steps), "--seed", str(args.seed), "--resume", str(args.out / "half.pt")]
        raise SystemExit(subprocess.run([sys.executable, __file__, *rest], check=False).returncode)
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
