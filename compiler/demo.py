"""The demo: a small residual network on real handwritten digits, compiled and run.

scikit-learn's digits are 1,797 real scans, 8 x 8 pixels. Half of them train the backbone; the other half is
the unlabelled traffic that `compile` sees. The labels of that half are used in the report only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from .progress import Say, bar

EPOCHS = 40
_BATCH = 64


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, width, H / stride, W / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Six residual blocks for 8 x 8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 1, 1)
        self.blocks = nn.Sequential(
            Block(32, 32, 1),
            Block(32, 32, 1),
            Block(32, 64, 2),
            Block(64, 64, 1),
            Block(64, 64, 1),
            Block(64, 64, 1),
        )
        self.classify = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, 1, 8, 8] -> logits [B, 10]."""
        logits: torch.Tensor = self.classify(self.blocks(F.relu(self.stem(image))).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """A trained network and rows it has not seen."""

    model: DigitsResNet
    images: np.ndarray  # [rows, 1, 8, 8] float32 in [0, 1]
    labels: np.ndarray  # [rows] int64


def train_digits(seed: int, say: Say, epochs: int = EPOCHS) -> Digits:
    """Train on one half of the digits; the other half comes back with the network."""
    found = load_digits()
    images = (found.images / 16).astype(np.float32)[:, None]
    labels = found.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(images))
    train, rest = np.split(order, [len(order) // 2])
    x, y = torch.from_numpy(images[train]), torch.from_numpy(labels[train])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsResNet()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        steps = epochs * (len(x) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
        for _ in bar(range(epochs), "train the demo's backbone", epochs):
            for rows in torch.randperm(len(x))[: len(x) // _BATCH * _BATCH].view(-1, _BATCH):
                optimiser.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
    model.eval()
    with torch.no_grad():
        right = model(torch.from_numpy(images[rest])).argmax(1).numpy() == labels[rest]
    say(f"trained a residual network on {len(train)} digits; {right.mean():.1%} right on the other {len(rest)}")
    return Digits(model, images[rest], labels[rest])
