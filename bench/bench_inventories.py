"""What code and inventory links cost: `python bench/bench_inventories.py [pairs]`. Process CPU, in pairs in one run.

1. `import torch`, plain and under watch (warm private cache): seconds of CPU of the child, least and median.
2. One training of 120 small steps under watch: the guard's own time a step, as its frames state it.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainguard.testing.guarded import run_guarded

TRAIN = """
import torch
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(12)])
optimizer = torch.optim.AdamW(model.parameters())
for step in range(120):
    optimizer.zero_grad(); model(torch.randn(32, 64)).square().mean().backward(); optimizer.step()
"""


def cpu(action: Callable[[], object]) -> float:
    """Seconds of CPU that children used while `action` ran."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        command = [sys.executable, "-c", "import torch"]
        run_guarded(command, cwd=folder, cache=cache)
        plain, guarded = [], []
        for _ in range(pairs):
            plain.append(cpu(lambda: subprocess.run(command, cwd=folder, check=True)))
            guarded.append(cpu(lambda: run_guarded(command, cwd=folder, cache=cache)))
        for name, values in (("plain", plain), ("guarded", guarded)):
            print(f"import torch, {name}: least {min(values):.2f} s, median {statistics.median(values):.2f} s CPU")
        (Path(folder) / "train.py").write_text(TRAIN)
        records, _ = run_guarded([sys.executable, "train.py"], cwd=folder, cache=cache)
        own = [record.body["own_ns"] / 1e6 for record in records if record.kind == "step"]
        print(f"own time a step: first {own[0]:.1f} ms, median {statistics.median(own):.2f} ms, sum {sum(own):.0f} ms")


if __name__ == "__main__":
    main()
