"""Regression with a moving average of the weights, put into the model for each evaluation and taken out again."""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@torch.no_grad()
def evaluate_with_average(model, average, x, y):
    """Loss of the averaged weights, in the place of the trained ones, which come back unchanged."""
    kept = [weight.detach().clone() for weight in model.parameters()]
    for weight, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        weight.copy_(mean)
    model.eval()
    loss = F.mse_loss(model(x), y).item()
    model.train()
    for weight, old in zip(model.parameters(), kept, strict=True):
        weight.copy_(old)
    return loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    def batch(count):
        x = torch.rand(count, 2) * 4 - 2
        return x, (x[:, :1] * 2).sin() * x[:, 1:].cos()

    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Dropout(0.05), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    x_test, y_test = batch(256)
    for step in range(1, args.steps + 1):
        x, y = batch(64)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        if step % 10 == 0:
            averaged = evaluate_with_average(model, average, x_test, y_test)
            print(f"step {step} loss {loss.item():.4f} averaged {averaged:.4f}")

    weights = [*model.parameters(), *average.parameters()]
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in weights)).hexdigest())


if __name__ == "__main__":
    main()
