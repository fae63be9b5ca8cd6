"""Hints: what a head's last layer reads is to tell what the backbone's last layer reads (FitNets, Romero et al. 2015).

The backbone's probabilities say little of a row it is sure about; its last features say much of every row. Where rows
are few, heads that learn both answer as the backbone does more often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_STILL = 1e-3  # added to a feature's deviation, so that one which hardly moves asks for little


class Hint:
    """A linear map from what the last dense layer of a head reads to features of the backbone, learned beside it.

    It starts at zero, which needs no random numbers, and is forgotten with the training.
    """

    def __init__(self, head: nn.Module, last: nn.Linear, features: int) -> None:
        self.weight = nn.Parameter(last.weight.new_zeros(features, last.in_features))
        self.bias = nn.Parameter(last.weight.new_zeros(features))
        self._read: torch.Tensor | None = None
        self._hook = last.register_forward_pre_hook(lambda _, given: self._note(given) if head.training else None)

    def _note(self, given: tuple[Any, ...]) -> None:
        self._read = given[0] if given else None

    def loss(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[B, D]` of the rows the head has just answered -> mean squared error in their own deviations.

        0 where nothing can be told: a row with a feature that is not finite is left out, and one row has no deviation.
        """
        read, self._read = self._read, None
        fine = torch.isfinite(features).all(1)
        if read is None or int(fine.sum()) < 2:
            return features.new_zeros(())
        read = read.float() if read.dim() == 2 else read.float().flatten(1, -2).mean(1)
        features = features[fine]
        features = (features - features.mean(0)) / (features.std(0) + _STILL)
        return F.mse_loss(F.linear(read[fine], self.weight, self.bias), features)

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def state(self) -> dict[str, torch.Tensor]:
        """For `restore`."""
        return {"weight": self.weight.detach(), "bias": self.bias.detach()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Raises `RuntimeError` where the state is another head's."""
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])

    def forget(self) -> None:
        """Leave the head as it was built."""
        self._hook.remove()


def last_dense(head: nn.Module) -> nn.Linear | None:
    """The dense layer that a head answers by, if it has one: the last."""
    return next((m for m in reversed(list(head.modules())) if isinstance(m, nn.Linear)), None)
