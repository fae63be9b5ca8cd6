"""Models of a few layers, and the way from one to a backbone and an exit program. Rows are six numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from offramp.compiler import Options, Training, build_head, capture, default_head
from offramp.compiler.demo import Digits
from offramp.passes import Backbone, ExitPlan, ExitProgram, PlannedExit, build_program, row_shape
from offramp.runtime import Manifest
from offramp.runtime.data import ArrayRows

INF = float("inf")
QUICK = Options(tolerance=0.02, policy="joint", training=Training(epochs=3), batches=())


@dataclass(frozen=True)
class Compiled:
    """An artifact and what it was made from."""

    path: Path
    manifest: Manifest
    digits: Digits

    def plans(self) -> list[tuple[float, ...]]:
        """Thresholds: nobody is asked, all leave at the first exit, some leave, and each exit alone is asked."""
        exits = len(self.manifest.exits) - 1
        alone = [tuple(INF if other != one else 0.9 for other in range(exits)) for one in range(exits)]
        return [(INF,) * exits, (0.0,) * exits, self.manifest.thresholds(), *alone]


class Chain(nn.Module):
    """Three layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


class Residual(Chain):
    """The second layer has a shortcut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(x + self.second(x)))


class Bypass(Chain):
    """As in a DenseNet, the first layer's value goes round the second."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = F.relu(self.first(x))
        second = F.relu(self.second(first))
        return self.last(torch.cat([first, second], 1))


class Routed(Chain):
    """After the first layer two experts, each given its own rows: how many, only values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        expert = (x[:, 0] > x[:, 1]).long()
        order = expert.sort(stable=True)[1]
        counts = F.one_hot(expert, 2).sum(0).tolist()
        ours, theirs = x[order].split(counts)
        mixed = torch.cat([self.second(ours), self.other(theirs)])
        return self.last(F.relu(torch.zeros_like(x).index_add(0, order, mixed)))


class Shared(Chain):
    """The same layer three times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        for _ in range(3):
            x = F.relu(self.second(x))
        return self.last(x)


class Tuples(nn.Module):
    """A batch norm on the way, whose node holds three tensors, and a split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.norm(self.first(x)).chunk(2, dim=1)
        return self.last(torch.sigmoid(gate) * value)


class Sized(nn.Module):
    """Every layer asks for the batch size, and one works on rows times tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(4, 4), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.size(0)
        x = F.relu(self.first(x)).view(rows, 3, 4)
        x = F.relu(self.second(x.reshape(rows * 3, 4)))
        x = torch.relu(x.view(rows, 12) + 0.1)
        return self.last(x.reshape(rows, 3, 4).reshape(rows, 12))


class Attention(nn.Module):
    """Two blocks of attention over tokens; both read the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.ModuleList([nn.Linear(8, 24) for _ in range(2)])
        self.last = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = torch.where(mask.bool(), torch.tensor(0.0), torch.tensor(-1e9))[:, None, None, :]
        return self.last(self.attended(ids, hidden)[:, 0])

    def attended(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, T]` and attention's own mask -> `[B, T, 8]`."""
        x = self.embed(ids)
        for layer in self.mix:
            parts = layer(x).view(x.size(0), x.size(1), 3, 2, 4).permute(2, 0, 3, 1, 4)
            query, key, value = parts.unbind(0)
            seen = F.scaled_dot_product_attention(query, key, value, attn_mask=hidden)
            x = x + seen.transpose(1, 2).reshape(x.shape)
        return x


class Interrupted(ArrayRows):
    """Rows whose reader presses Ctrl-C after some batches."""

    left = 0

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().take(indices)


def noisy(batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> Mapping[str, torch.Tensor]:
    """An augmentation of the caller's own."""
    return {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in batch.items()}


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """[count, 6]"""
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def sentences(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and mask, [count, 5] int64; the first token is always there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (count, 5), generator=generator)
    mask = torch.randint(0, 2, (count, 5), generator=generator)
    mask[:, 0] = 1
    return {"ids": ids, "mask": mask}


def captured(kind: Callable[[], nn.Module] | nn.Module, **inputs: torch.Tensor) -> Backbone:
    """The model, its weights from seed 0, as a backbone; rows of six numbers unless inputs are given."""
    torch.manual_seed(0)
    model = kind if isinstance(kind, nn.Module) else kind()
    return capture(model, inputs or {"x": rows(8)})


def with_exits(backbone: Backbone, cuts: Sequence[str], thresholds: Sequence[float] | None = None) -> ExitProgram:
    """A program with a fresh default head at each cut."""
    thresholds = thresholds or [0.3] * len(cuts)
    heads = {}
    for seed, cut in enumerate(cuts):
        torch.manual_seed(seed)
        shape = row_shape(backbone, cut)
        heads[cut] = build_head(default_head(shape, backbone.classes, 1e4), shape, backbone.classes)
    exits = tuple(PlannedExit(cut, 0.5, t) for cut, t in zip(cuts, thresholds, strict=True))
    return build_program(backbone, ExitPlan(exits), heads)
