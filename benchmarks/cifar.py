"""The CIFAR-10 ResNets of He et al. (2016, section 4.2) and the images, as `../shared/data` holds them.

Public sources, if you do not have that folder: the weights are those of akamaster/pytorch_resnet_cifar10
(BSD-2 style), the images the CIFAR-10 test set. Both are for research use and not part of this repository.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from offramp.compiler import RowSplits, split_rows

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def data_dir() -> Path:
    """Where the real weights and images lie: `OFFRAMP_DATA`, else `../shared/data` beside the checkout."""
    return Path(os.environ.get("OFFRAMP_DATA", Path(__file__).parents[2] / "shared" / "data"))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and shortcut "A": every second pixel, new channels zero."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = (width - channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, width, H / stride, W / stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """6n + 2 layers for 32 x 32 images."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, 1, blocks)
        self.layer2 = self._layer(16, 32, 2, blocks)
        self.layer3 = self._layer(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _layer(channels: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(channels, width, stride), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 32, 32] -> logits [B, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20() -> CifarResNet:
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    return CifarResNet(9)


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images, normalised: float32 [10000, 3, 32, 32] and labels int64 [10000]."""
    with zipfile.ZipFile(data_dir() / "cifar10" / "test_webp.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".webp"))
        tiles = [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names]
        label_file = next(n for n in archive.namelist() if n.endswith("labels.npy"))
        labels = np.load(io.BytesIO(archive.read(label_file)), allow_pickle=False)
    images = [t.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(2500, 32, 32, 3) for t in tiles]
    pixels = np.concatenate(images).astype(np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(0, 3, 1, 2)), labels.astype(np.int64)


def untouched_rows() -> tuple[np.ndarray, np.ndarray]:
    """(looked at, untouched): two halves of the 10,000 images.

    While defaults were picked (head shapes, augmentation, the certificate's path), heads learned from the second half
    and were scored on the first. So reported figures come from the second, which no choice has been scored on, with
    heads that learn from the first.
    """
    early = split_rows(10_000, 0)
    return np.concatenate([early.select, early.certify, early.test]), np.concatenate([early.distil, early.calibrate])


def report_splits(seed: int) -> RowSplits:
    """The looked-at half: 4,500 to learn from, 500 to calibrate on; the other: 2,000 select, 1,500 certify and test."""
    known, fresh = untouched_rows()
    generator = np.random.default_rng([seed, 1])
    known, fresh = generator.permutation(known), generator.permutation(fresh)
    return RowSplits(seed, known[:4500], known[4500:], *np.split(fresh, [2000, 3500]))
