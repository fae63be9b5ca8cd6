"""ImageNet: a trained ResNet-50 and images of ten classes; see `../shared/data` for what they are and where from.

Ten classes of a thousand: traffic with locality, as the papers assume. Most of the 4,000 are of ImageNet's training
set, which the backbone has seen; the 500 are genuine validation images.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cifar import data_dir
from offramp.runtime.images import open_images

PREPROCESSING = "resize=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225"
UNPACKED = Path("build") / "imagenet"
_EPSILON = 1e-3  # of this backbone's batch norms


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; strides in the first one, as in version 1."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width, _EPSILON)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, _EPSILON)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width, _EPSILON)
        self.downsample: nn.Module | None = None
        if channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width, _EPSILON))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, 4 * width, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50, version 1 (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, _EPSILON)
        self.layer1 = self._layer(64, 64, 3, 1)
        self.layer2 = self._layer(256, 128, 4, 2)
        self.layer3 = self._layer(512, 256, 6, 2)
        self.layer4 = self._layer(1024, 512, 3, 2)
        self.fc = nn.Linear(2048, 1000)

    @staticmethod
    def _layer(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Bottleneck(channels, width, stride), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] -> logits [B, 1000]."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


def load_images(name: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of `imagenette_<name>.zip` -> float32 [count, 3, 224, 224] and their classes of the thousand."""
    folder = UNPACKED / name
    if not folder.is_dir():
        with zipfile.ZipFile(data_dir() / "imagenet" / f"imagenette_{name}.zip") as archive:
            archive.extractall(folder)
    rows = open_images(folder, PREPROCESSING, "x", "folders")
    synsets = sorted({path.name for path in folder.iterdir() if path.is_dir()})
    words = (data_dir() / "imagenet" / "synset_words.txt").read_text().splitlines()
    known = {line.split()[0]: index for index, line in enumerate(words)}
    classes = np.array([known[synset] for synset in synsets], np.int64)
    picked = np.random.default_rng(seed).permutation(len(rows))[:count]
    assert rows.labels is not None
    return rows.take(picked)["x"], classes[rows.labels[picked]]
