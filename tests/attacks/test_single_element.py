"""E4: one element of one tensor, changed once by a thread. No sample of 64 elements is likely to hold it."""

import sys
from pathlib import Path

import pytest
from tests.helpers.guarded import run

SCRIPT = """
import threading, time, torch
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
now = 0
def nudge():
    while now < 30: time.sleep(0.001)
    with torch.no_grad(): model[0].weight[77, 13] += 0.01
if {attack}: threading.Thread(target=nudge, daemon=True).start()
for now in range(1, 61):
    time.sleep(0.005)
    optimizer.zero_grad(); model(torch.randn(8, 64)).pow(2).mean().backward(); optimizer.step()
"""


@pytest.mark.torch
@pytest.mark.slow
def test_one_changed_element_of_sixteen_thousand_is_named(tmp_path: Path) -> None:
    """Every element finite, the change within the weights' own range, and no update is wrong."""
    (tmp_path / "train.py").write_text(SCRIPT.format(attack=True))
    done = run(tmp_path, sys.executable, "train.py", options=("--links", "all"))
    (finding,) = (f for f in done.by("weights") if f["outcome"] == "violated")
    assert finding["techniques"][0] == "E4"
    assert finding["subject"]["tensor"] == "0.weight"
    assert 30 <= finding["subject"]["step"] <= 45
    assert done.link("optimizer")["broken"] == 0


@pytest.mark.torch
@pytest.mark.nightly
def test_without_the_thread_nothing_is_found(tmp_path: Path) -> None:
    """The same script, quiet."""
    (tmp_path / "train.py").write_text(SCRIPT.format(attack=False))
    done = run(tmp_path, sys.executable, "train.py", options=("--links", "all"))
    assert not done.by("weights")
    assert done.link("weights")["held"] == 59
