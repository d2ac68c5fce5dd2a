"""Four short trainings, each under another schedule: one cycle with momentum, chained, on a plateau, warm restarts."""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler


def one_cycle(model, steps):
    """The rate goes up and down once, and momentum the other way."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, cycle_momentum=True)
    return optimizer, lambda step, loss: schedule.step()


def chained(model, steps):
    """Linear warm-up, then a cosine; AdamW in two groups with rates of their own."""
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - 5))
    schedule = lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[5])
    return optimizer, lambda step, loss: schedule.step()


def on_plateau(model, steps):
    """The rate halves when the loss has not improved for a while: nobody can know when."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03, amsgrad=True)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    return optimizer, lambda step, loss: schedule.step(loss)


def warm_restarts(model, steps):
    """A cosine that starts again every ten steps, stepped by fractions of an epoch."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=5e-3, momentum=0.5, centered=True)
    schedule = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10)
    return optimizer, lambda step, loss: schedule.step(step)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    total = hashlib.sha256()
    for build in (one_cycle, chained, on_plateau, warm_restarts):
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer, advance = build(model, args.steps)
        for step in range(1, args.steps + 1):
            x = torch.randn(32, 8)
            loss = F.huber_loss(model(x), x.square().sum(1, keepdim=True) / 8)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            advance(step, loss.item())
        print(f"{build.__name__} loss {loss.item():.4f} lr {optimizer.param_groups[0]['lr']:.6f}")
        total.update(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
    print("digest", total.hexdigest())


if __name__ == "__main__":
    main()
