"""Exit heads: small classifiers over a cut's value, as plain configurations that build modules.

A family belongs to one kind of activation; a `HeadConfig` names the family and its settings and is all that
an artifact stores of a head's architecture. The default of each family spends no more than 3.5 percent of the
backbone's compute:

    conv    [B, C, H, W]  convolutions with batch norm; mean and maximum of every map, dense
    tokens  [B, T, D]     first token and mean over tokens, layer norm, dense, dense
    dense   [B, D]        layer norm, dense, dense
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offramp.passes import module_flops
from offramp.runtime.errors import UsageError

BUDGET = 0.035  # of the backbone's FLOPs, for a default head
_WIDTHS = (8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class HeadConfig:
    """A head's architecture: enough to build it again."""

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """One phrase for a table."""
        return FAMILIES[self.family].describe(self.settings)


class ConvHead(nn.Module):
    """[B, C, H, W] -> logits [B, K]: convolution, batch norm, ReLU for every width; pooling; dense.

    The dense layer sees mean and maximum over the map, of the head's input and after every convolution: next to
    no compute, and a maximum tells that something is there where a mean tells how much of it.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], kernel: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.ModuleList()
        for entering, width, stride in zip((channels, *widths), widths, strides, strict=False):
            convolution = nn.Conv2d(entering, width, kernel, stride, kernel // 2, bias=False)
            self.features.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        self.classify = nn.Linear(2 * (channels + sum(widths)), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, K]."""
        pooled = [x.mean((2, 3)), x.amax((2, 3))]
        for layer in self.features:
            x = layer(x)
            pooled += [x.mean((2, 3)), x.amax((2, 3))]
        logits: torch.Tensor = self.classify(torch.cat(pooled, 1))
        return logits


class DenseHead(nn.Module):
    """[B, D] -> logits [B, K]: layer norm, dense, ReLU, dense."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, hidden)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, K]."""
        logits: torch.Tensor = self.classify(torch.relu(self.hidden(self.norm(x))))
        return logits


class TokensHead(nn.Module):
    """[B, T, D] -> logits [B, K]: the first token beside the mean of all, then a dense head."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.dense = DenseHead(2 * features, classes, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, K]."""
        logits: torch.Tensor = self.dense(torch.cat([x[:, 0], x.mean(1)], dim=1))
        return logits


@dataclass(frozen=True)
class Family:
    """One kind of head. Shapes leave the batch dimension out."""

    rank: int  # of the cut, batch included
    build: Callable[[tuple[int, ...], int, Mapping[str, Any]], nn.Module]  # (shape, classes, settings)
    sizes: Callable[[tuple[int, ...], int], Mapping[str, Any]]  # (shape, width) -> settings of that width
    describe: Callable[[Mapping[str, Any]], str]


def _conv_sizes(shape: tuple[int, ...], width: int) -> Mapping[str, Any]:
    """Maps of low-level features want a deeper head: four convolutions on large maps, three on small ones."""
    side = min(shape[1:])
    kernel = 3 if side >= 3 else 1
    if side > 8:
        return {"widths": [width, width, 2 * width, 2 * width], "kernel": kernel, "strides": [2, 1, 2, 1]}
    return {
        "widths": [width, width * 3 // 2, 2 * width],
        "kernel": kernel,
        "strides": [2 if side > 4 else 1, 1, 1],
    }


def _describe_conv(settings: Mapping[str, Any]) -> str:
    convs = [f"{w}/{s}" for w, s in zip(settings["widths"], settings["strides"], strict=True)]
    return f"conv{settings['kernel']} {' '.join(convs)}"


FAMILIES: dict[str, Family] = {
    "conv": Family(4, lambda shape, k, s: ConvHead(shape[0], k, **s), _conv_sizes, _describe_conv),
    "tokens": Family(
        3, lambda shape, k, s: TokensHead(shape[-1], k, **s), lambda _, w: {"hidden": w},
        lambda s: f"first+mean, dense {s['hidden']}",
    ),
    "dense": Family(
        2, lambda shape, k, s: DenseHead(shape[-1], k, **s), lambda _, w: {"hidden": w},
        lambda s: f"dense {s['hidden']}",
    ),
}  # fmt: skip


def build_head(config: HeadConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A fresh head for values `[B, *shape]`; weights come from torch's global generator."""
    if config.family not in FAMILIES:
        raise UsageError(f"head family {config.family!r} is unknown; use one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family].build(shape, classes, config.settings)


def default_head(shape: tuple[int, ...], classes: int, backbone_flops: float) -> HeadConfig:
    """The widest head of the family for this rank that stays within `BUDGET`; the narrowest if none does."""
    name = next(n for n, family in FAMILIES.items() if family.rank == len(shape) + 1)
    best = HeadConfig(name, FAMILIES[name].sizes(shape, _WIDTHS[0]))
    for width in _WIDTHS[1:]:
        wider = HeadConfig(name, FAMILIES[name].sizes(shape, width))
        if head_flops(wider, shape, classes) > BUDGET * backbone_flops:
            break
        best = wider
    return best


def head_flops(config: HeadConfig, shape: tuple[int, ...], classes: int) -> int:
    """FLOPs per row; nothing is allocated."""
    with torch.device("meta"):
        return module_flops(build_head(config, shape, classes), shape)
