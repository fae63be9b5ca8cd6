"""Heads for feature maps `[B, C, H, W]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .dense import has_hidden
from .family import Family, Settings, Shape

_LARGE = 8  # maps with longer sides are halved twice where there are convolutions enough
_STILL = 1e-3  # variance added to a feature's own, so that one which hardly moved in training cannot shout later


class ConvHead(nn.Module):
    """[B, C, H, W] -> logits [B, K]: convolution, batch norm, ReLU for every width; pooling; dense.

    The dense layer sees mean and maximum over the map, of the head's input and after every convolution (`reads`
    "last": after the last one only): next to no compute, and a maximum tells that something is there where a mean
    tells how much of it. With `grid` > 1 it sees the last map's means over `grid` x `grid` parts as well. With
    `hidden` it is two dense layers. `separable` convolutions go depthwise, then pointwise.

    What the dense layers see is normed while they learn, for means and maxima of different maps differ in size by
    orders; `folded` moves the norm into the first dense layer, where it costs nothing.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        widths: Sequence[int],
        kernel: int,
        strides: Sequence[int],
        *,
        separable: bool = False,
        reads: str = "every",
        grid: int = 1,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.every, self.grid = reads == "every", grid
        self.features = nn.ModuleList()
        for entering, width, stride in zip((shape[0], *widths), widths, strides, strict=False):
            convolution = _separable if separable else _plain
            parts = convolution(entering, width, kernel, stride)
            self.features.append(nn.Sequential(*parts, nn.BatchNorm2d(width), nn.ReLU()))
        maps = [shape[0], *widths] if self.every else [[shape[0], *widths][-1]]
        seen = 2 * sum(maps) + (maps[-1] * grid * grid if grid > 1 else 0)
        self.norm: nn.Module = nn.BatchNorm1d(seen, _STILL, affine=False)
        self.hidden = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(seen, hidden), nn.ReLU())
        self.classify = nn.Linear(seen if hidden is None else hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, K]."""
        pooled = [*_pooled(x)] if self.every or not self.features else []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if self.every or index == len(self.features) - 1:
                pooled += _pooled(x)
        if self.grid > 1:
            pooled.append(F.adaptive_avg_pool2d(x, self.grid).flatten(1))
        logits: torch.Tensor = self.classify(self.hidden(self.norm(torch.cat(pooled, 1))))
        return logits

    def folded(self) -> ConvHead:
        """In place, once trained: the same head without its norm."""
        if isinstance(self.norm, nn.BatchNorm1d):
            dense = self.hidden[0] if isinstance(self.hidden, nn.Sequential) else self.classify
            assert isinstance(dense, nn.Linear)
            _fold(self.norm, dense)
            self.norm = nn.Identity()
        return self


def _fold(norm: nn.BatchNorm1d, dense: nn.Linear) -> None:
    """In place: `dense` does of [B, D] what it did behind `norm`."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        dense.weight.mul_(torch.rsqrt(variance + norm.eps))
        dense.bias.sub_(dense.weight @ mean)


def _pooled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean((2, 3)), x.amax((2, 3))


class Subsample(nn.Module):
    """[B, C, H, W] -> every `stride`-th row and column."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / stride, W / stride], rounded up."""
        return x[:, :, :: self.stride, :: self.stride]


def _plain(entering: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    if kernel == 1 and stride > 1:  # the same, and oneDNN's backward pass of a strided 1 x 1 convolution crashes
        return [Subsample(stride), nn.Conv2d(entering, width, 1, bias=False)]
    return [nn.Conv2d(entering, width, kernel, stride, kernel // 2, bias=False)]


def _separable(entering: int, width: int, kernel: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(entering, entering, kernel, stride, kernel // 2, groups=entering, bias=False)
    return [depthwise, nn.Conv2d(entering, width, 1, bias=False)]


def _default(shape: Shape, width: int) -> Settings:
    """Maps of low-level features want a deeper head: four convolutions on large maps, three on small ones."""
    side = min(shape[1:])
    kernel = 3 if side >= 3 else 1
    if side > _LARGE:
        return {"widths": [width, width, 2 * width, 2 * width], "kernel": kernel, "strides": [2, 1, 2, 1]}
    return {
        "widths": [width, width * 3 // 2, 2 * width],
        "kernel": kernel,
        "strides": [2 if side > 4 else 1, 1, 1],
    }


def _chosen(shape: Shape, width: int, choices: Settings) -> Settings:
    """The later half of the convolutions is twice as wide. Large maps are halved by the first, whatever the choice,
    and by the third: at full size a head costs little compute, and much time for the memory it moves."""
    count, large = int(choices["convolutions"]), min(shape[1:]) > _LARGE
    side, first = min(shape[1:]), 2 if large else choices["stride"]
    strides = [first if i == 0 else 2 if i == 2 and large else 1 for i in range(count)]
    small = [-(-size // math.prod(strides)) for size in shape[1:]]
    return {
        "widths": [width if i < (count + 1) // 2 else 2 * width for i in range(count)],
        "kernel": min(choices["kernel"], side if side % 2 else side - 1 or 1),
        "strides": strides,
        "separable": choices["kind"] == "separable",
        "reads": choices["reads"],
        "grid": math.gcd(choices["grid"], *small),  # other parts of a map have no form in ONNX
        "hidden": 2 * width if has_hidden(choices) else None,
    }


def _describe(settings: Mapping[str, Any]) -> str:
    convs = [f"{w}/{s}" for w, s in zip(settings["widths"], settings["strides"], strict=True)]
    kind = "separable" if settings.get("separable") else "conv"
    parts = [f"{kind}{settings['kernel']} {' '.join(convs)}" if convs else "pooled"]
    if settings.get("grid", 1) > 1:
        parts.append(f"grid {settings['grid']}")
    if settings.get("hidden") is not None:
        parts.append(f"dense {settings['hidden']}")
    return ", ".join(parts)


CONV = Family(
    rank=4,
    build=lambda shape, classes, settings: ConvHead(shape, classes, **settings),
    default=_default,
    describe=_describe,
    finish=lambda head: head.folded() if isinstance(head, ConvHead) else head,
    space={
        "convolutions": {"_type": "choice", "_value": [0, 1, 2, 3, 4]},
        "kind": {"_type": "choice", "_value": ["plain", "separable"]},
        "kernel": {"_type": "choice", "_value": [1, 3]},
        "stride": {"_type": "choice", "_value": [1, 2]},
        "reads": {"_type": "choice", "_value": ["every", "last"]},
        "grid": {"_type": "choice", "_value": [1, 2, 4]},
        "dense": {"_type": "choice", "_value": [1, 2]},
    },
    chosen=_chosen,
    free={"grid": 1},
)
