"""Train a small CNN on drawn shapes that two loader processes make with numpy and random, momentum and batch norm."""

import argparse
import hashlib
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Shapes(Dataset):
    """Bars, crosses and squares at random places, flipped and made noisy anew at every visit."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        label = index % 3
        image = np.zeros((1, 16, 16), dtype=np.float32)
        row, column = random.randint(2, 8), random.randint(2, 8)
        if label == 0:
            image[0, row, column : column + 6] = 1
        elif label == 1:
            image[0, row : row + 6, column + 3] = image[0, row + 3, column : column + 6] = 1
        else:
            image[0, row : row + 5, column : column + 5] = 1
        if random.random() < 0.5:
            image = image[:, :, ::-1]
        return torch.from_numpy(image + np.random.normal(0, 0.3, image.shape).astype(np.float32)), label


def seed_worker(worker):
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 3),
    )  # fmt: skip
    loader = DataLoader(
        Shapes(480),
        batch_size=24,
        shuffle=True,
        num_workers=args.workers,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(args.seed),
        drop_last=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    step = 0
    while step < args.steps:
        for image, label in loader:
            loss = F.cross_entropy(model(image), label, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.4f}")
            if step == args.steps:
                break
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
