"""Classify three noisy spirals with an MLP, Adadelta and a rate that falls every epoch."""

import argparse
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset


def spirals(count, seed):
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (count,), generator=draw)
    radius = torch.rand(count, generator=draw)
    angle = 4 * radius + label * 2.094 + 0.15 * torch.randn(count, generator=draw)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), label)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(2, 64)
        self.dropout = nn.Dropout(0.25)
        self.hidden2 = nn.Linear(64, 64)
        self.out = nn.Linear(64, 3)

    def forward(self, x):
        x = F.relu(self.hidden(x))
        x = F.relu(self.hidden2(self.dropout(x)))
        return F.log_softmax(self.out(x), dim=1)


def test(model, loader):
    model.eval()
    right = 0
    with torch.no_grad():
        for x, label in loader:
            right += (model(x).argmax(1) == label).sum().item()
    model.train()
    return right / len(loader.dataset)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    train_loader = DataLoader(spirals(1280, args.seed), batch_size=32, shuffle=True)
    test_loader = DataLoader(spirals(512, args.seed + 1), batch_size=256)
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    step = 0
    while step < args.steps:
        for x, label in train_loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(x), label)
            loss.backward()
            optimizer.step()
            step += 1
            if step % 20 == 0:
                print(f"step {step} loss {loss.item():.4f}")
            if step == args.steps:
                break
        print(f"accuracy {test(model, test_loader):.3f}")
        scheduler.step()
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
