"""A Wasserstein GAN as first published: three critic steps each round, and the critic's weights clamped by hand."""

import argparse
import hashlib

import torch
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30, help="of the generator; the critic takes three times as many")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer_c = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    optimizer_g = torch.optim.RMSprop(generator.parameters(), lr=1e-3)

    for step in range(1, args.steps + 1):
        for _ in range(3):
            real = torch.randn(64, 2) @ torch.tensor([[0.5, 0.2], [0.0, 0.3]]) + 1
            fake = generator(torch.randn(64, 4)).detach()
            loss_c = critic(fake).mean() - critic(real).mean()
            optimizer_c.zero_grad()
            loss_c.backward()
            optimizer_c.step()
            for p in critic.parameters():
                p.data.clamp_(-0.05, 0.05)
        loss_g = -critic(generator(torch.randn(64, 4))).mean()
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        if step % 10 == 0:
            print(f"step {step} critic {loss_c.item():.5f} generator {loss_g.item():.5f}")

    weights = [*generator.parameters(), *critic.parameters()]
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in weights)).hexdigest())


if __name__ == "__main__":
    main()
