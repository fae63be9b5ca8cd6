"""Training keeps to its memory budget, as the operating system counts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PLACES, BATCH, MIB = 32, 128, 1 << 20

# Prints by how many bytes the process's peak grew while heads learned.
TRAIN = f"""
import sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from offramp.compiler import Options, RowSplits, Training, prepare, train
from offramp.compiler.memory import give_back

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 16, 3, 1, 1), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()) for _ in range({PLACES + 2}))
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))

def status(line):
    text = Path("/proc/self/status").read_text()
    return int(text.split(line + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
rows = np.random.default_rng(0).standard_normal((340, 3, 32, 32)).astype(np.float32)
parts = np.split(np.arange(340), [256, 280, 300, 320])
budget = int(sys.argv[1]) or None
training = Training(epochs=1, batch={BATCH}, augment="none", kept_bytes=0)
options = Options(policy="joint", training=training, memory_budget=budget, max_candidates={PLACES})
ready = prepare(Net().eval(), rows, options=options, splits=RowSplits(0, *parts))
give_back()
Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
before = status("VmRSS")
heads = train(ready, options, Path(sys.argv[2]))
print(len(heads), status("VmHWM") - before)
"""


def grown(budget: int, folder: Path) -> tuple[int, int]:
    """(heads trained, bytes the process grew by); 0: no budget."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(budget), str(folder)], capture_output=True, text=True, check=True
    )
    heads, size = done.stdout.split()[-2:]
    return int(heads), int(size)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_training_keeps_to_its_memory_budget(tmp_path: Path) -> None:
    unbound, free = grown(0, tmp_path / "free")
    bound, kept = grown(250 * MIB, tmp_path / "bound")
    assert bound == unbound > 25
    assert kept <= 250 * MIB < free
