"""A GAN on points around a ring: generator and discriminator, each with an Adam of its own."""

import argparse
import hashlib

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

NOISE = 8


def ring(count):
    angle = torch.randint(8, (count,)) * (torch.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60, help="of each of the two optimizers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    generator = nn.Sequential(
        nn.Linear(NOISE, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    discriminator = nn.Sequential(
        spectral_norm(nn.Linear(2, 64)), nn.LeakyReLU(0.2), spectral_norm(nn.Linear(64, 64)), nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )  # fmt: skip
    criterion = nn.BCEWithLogitsLoss()
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)

    for step in range(1, args.steps + 1):
        # The discriminator learns to tell real from false ...
        optimizer_d.zero_grad()
        loss_real = criterion(discriminator(ring(64)), ones)
        loss_real.backward()
        fake = generator(torch.randn(64, NOISE))
        loss_fake = criterion(discriminator(fake.detach()), zeros)
        loss_fake.backward()
        optimizer_d.step()
        # ... and the generator to be taken for real. Its backward pass leaves gradients in the discriminator too.
        optimizer_g.zero_grad()
        loss_g = criterion(discriminator(fake), ones)
        loss_g.backward()
        optimizer_g.step()
        if step % 10 == 0:
            print(f"step {step} loss_d {(loss_real + loss_fake).item():.4f} loss_g {loss_g.item():.4f}")

    weights = [*generator.parameters(), *discriminator.parameters()]
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in weights)).hexdigest())


if __name__ == "__main__":
    main()
