"""REINFORCE on balancing a pole: one update after each episode, and no two episodes are equally long."""

import argparse
import hashlib
import math
import random

import torch
from torch import nn
from torch.distributions import Categorical


class Pole:
    """An inverted pendulum on a cart, pushed left or right fifty times a second until it falls or 200 ticks pass."""

    def __init__(self, draw):
        self.state = [draw.uniform(-0.05, 0.05) for _ in range(4)]
        self.ticks = 0

    def push(self, right):
        place, speed, angle, turn = self.state
        force, sine, cosine = (10.0 if right else -10.0), math.sin(self.state[2]), math.cos(self.state[2])
        common = (force + 0.05 * turn * turn * sine) / 1.1
        bend = (9.8 * sine - cosine * common) / (0.5 * (4 / 3 - 0.1 * cosine * cosine / 1.1))
        pull = common - 0.05 * bend * cosine / 1.1
        self.state = [place + 0.02 * speed, speed + 0.02 * pull, angle + 0.02 * turn, turn + 0.02 * bend]
        self.ticks += 1
        return abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.21 or self.ticks >= 200


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=25, help="episodes, with one update after each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)

    policy = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for step in range(1, args.steps + 1):
        pole, chances, over = Pole(draw), [], False
        while not over:
            choice = Categorical(logits=policy(torch.tensor(pole.state)))
            action = choice.sample()
            chances.append(choice.log_prob(action))
            over = pole.push(bool(action))
        returns, following = [], 0.0
        for _ in chances:
            following = 1 + 0.99 * following
            returns.insert(0, following)
        worth = torch.tensor(returns)
        worth = (worth - worth.mean()) / (worth.std() + 1e-6)
        loss = -(torch.stack(chances) * worth).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step} loss {loss.item():.4f} ticks {pole.ticks}")
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in policy.parameters())).hexdigest())


if __name__ == "__main__":
    main()
