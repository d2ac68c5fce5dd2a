"""An LSTM language model whose output layer is its embedding, trained with Adagrad and hidden state carried over."""

import argparse
import hashlib
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn

ROWS, SPAN = 16, 16


class Model(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.1)
        self.head = nn.Linear(width, 128)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.head.weight = self.embedding.weight

    def forward(self, index, state):
        output, state = self.lstm(self.embedding(index), state)
        return self.head(output), state


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")[:40_000]
    columns = torch.tensor(list(text)).view(ROWS, -1).T.contiguous()
    model = Model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05, lr_decay=1e-3)
    state, start = None, 0
    for step in range(1, args.steps + 1):
        if start + SPAN >= len(columns):
            state, start = None, 0
        index, target = columns[start : start + SPAN], columns[start + 1 : start + 1 + SPAN]
        start += SPAN
        if state is not None:
            state = tuple(part.detach() for part in state)
        logits, state = model(index, state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.25)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f}")
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())


if __name__ == "__main__":
    main()
