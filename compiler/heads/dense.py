"""Heads for vectors `[B, D]` and for tokens `[B, T, D]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .family import Family, Settings, Shape, Space

_DENSE_SPACE: Space = {"dense": {"_type": "choice", "_value": [1, 2]}}
_POOLS = ("class+mean", "class", "mean", "max", "attention")


class DenseHead(nn.Module):
    """[B, D] -> logits [B, K]: layer norm, dense, ReLU, dense; without `hidden` only the last."""

    def __init__(self, features: int, classes: int, hidden: int | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.classify = nn.Linear(features if hidden is None else hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, K]."""
        logits: torch.Tensor = self.classify(self.hidden(self.norm(x)))
        return logits


class TokensHead(nn.Module):
    """[B, T, D] -> logits [B, K]: tokens pooled to one vector, then a dense head.

    `pool`: the first token, the mean or the maximum over all, first and mean side by side, or a mean weighted by a
    learned query (attention pooling).
    """

    def __init__(self, features: int, classes: int, hidden: int | None, pool: str = "class+mean") -> None:
        super().__init__()
        self.pool = pool
        self.query = nn.Linear(features, 1) if pool == "attention" else None
        self.dense = DenseHead(2 * features if pool == "class+mean" else features, classes, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, K]."""
        logits: torch.Tensor = self.dense(self._pooled(x))
        return logits

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.query is not None:
            return (torch.softmax(self.query(x), 1) * x).sum(1)
        if self.pool == "class":
            return x[:, 0]
        if self.pool == "mean":
            return x.mean(1)
        if self.pool == "max":
            return x.amax(1)
        return torch.cat([x[:, 0], x.mean(1)], dim=1)


def _dense(settings: Mapping[str, Any]) -> str:
    return "dense" if settings["hidden"] is None else f"dense {settings['hidden']}"


def _tokens(settings: Mapping[str, Any]) -> str:
    return f"{settings.get('pool', _POOLS[0])}, {_dense(settings)}"


def has_hidden(choices: Settings) -> bool:
    """Whether there is a dense layer before the last. Raises `ValueError` for more than one."""
    if choices["dense"] not in (1, 2):
        raise ValueError(f"{choices['dense']} dense layers, where 1 and 2 are known")
    return bool(choices["dense"] == 2)


def _hidden(shape: Shape, width: int, choices: Settings) -> Settings:
    return {"hidden": width if has_hidden(choices) else None}


DENSE = Family(
    rank=2,
    build=lambda shape, classes, settings: DenseHead(shape[-1], classes, **settings),
    default=lambda shape, width: {"hidden": width},
    describe=_dense,
    space=_DENSE_SPACE,
    chosen=_hidden,
)

TOKENS = Family(
    rank=3,
    build=lambda shape, classes, settings: TokensHead(shape[-1], classes, **settings),
    default=lambda shape, width: {"hidden": width},
    describe=_tokens,
    space={**_DENSE_SPACE, "pool": {"_type": "choice", "_value": list(_POOLS)}},
    chosen=lambda shape, width, choices: {**_hidden(shape, width, choices), "pool": choices["pool"]},
)
