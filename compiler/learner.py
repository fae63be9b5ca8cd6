"""A learner: one head in training, with an optimiser, a schedule and the best weights so far of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from offramp.runtime.errors import UsageError

from .hint import Hint, last_dense
from .stream import LAYOUT, lay_out
from .training import Training

_WARM = 20  # the first 1/20 of the steps warms up
HALVED = {"cuda": torch.bfloat16}  # by kind of device: what autocast takes; float16 would need its losses scaled


class Learner:
    """Trains one head on a stream of `(target [B, K], value [B, ...])` for `steps` steps.

    AdamW under a cosine schedule behind a warm-up; float32, but on CUDA under autocast to bfloat16. Of all weights it
    was told to `judge`, it keeps those with the least loss, and after so many judgements in a row without a lower one
    as the training waits for it is `stopped`.
    """

    def __init__(
        self, module: nn.Module, steps: int, learning_rate: float, training: Training, features: int = 0
    ) -> None:
        """`features`: how many of the backbone's come with every batch as a hint; 0 for none."""
        lay_out(module, LAYOUT)
        self.module = module.to(training.device)
        last = last_dense(self.module) if features and training.hint else None
        self.hint, self.hint_weight = None if last is None else Hint(self.module, last, features), training.hint
        self.kind, self.soften, self.waits = torch.device(training.device).type, training.soften, training.waits
        self.steps = max(1, steps)
        learned = [*module.parameters(), *(self.hint.parameters() if self.hint else ())]
        self.optimiser = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=training.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)
        self.loss = math.inf  # KL in nats, the least so far
        self.waited = 0  # judgements since then
        self._best = self._weights()

    def _rate(self, step: int) -> float:
        """A factor of the learning rate."""
        warm = max(1, self.steps // _WARM)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, self.steps - warm))))

    def learn(self, target: torch.Tensor, value: torch.Tensor, features: torch.Tensor | None = None) -> None:
        """One step on one batch; `features` [B, D] are the backbone's, where it hints."""
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.kind, HALVED.get(self.kind), enabled=self.kind in HALVED):
            logits = self.module(value)
        logits, scale = logits.float(), self.soften**2  # the square keeps gradients as large as they were
        if self.soften != 1:
            target, logits = softened(target, self.soften), logits / self.soften
        loss = scale * divergence(target, logits).mean()
        if self.hint is not None and features is not None:
            loss = loss + self.hint_weight * self.hint.loss(features)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.schedule.step()

    def judge(self, loss: float) -> None:
        """Told the loss of the present weights on rows it does not learn from, keep them if they are the best."""
        self.waited += 1
        if loss < self.loss:
            self.loss, self._best, self.waited = loss, self._weights(), 0

    @property
    def stopped(self) -> bool:
        """Whether it is not worth more steps."""
        return self.waited >= self.waits

    def finished(self) -> nn.Module:
        """The head with its best weights, frozen, in evaluation mode."""
        self.module.load_state_dict(self._best)
        if self.hint is not None:
            self.hint.forget()
        lay_out(self.module, torch.contiguous_format)
        return self.module.cpu().eval().requires_grad_(False)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, for `torch.save`."""
        return {
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self._best,
            "loss": self.loss,
            "waited": self.waited,
            "hint": None if self.hint is None else self.hint.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a learner made alike. Raises `UsageError` where its head has other weights."""
        try:
            self.module.load_state_dict(state["module"])
            self.optimiser.load_state_dict(state["optimiser"])
            if self.hint is not None:
                self.hint.restore(state["hint"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                "the checkpoint to go on from holds heads that are built otherwise today; remove its folder, which "
                "ends in .work or is what --work names, to train them anew"
            ) from error
        self.schedule.load_state_dict(state["schedule"])
        self._best, self.loss, self.waited = state["best"], state["loss"], state["waited"]


def divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities `[B, K]` of the backbone, logits `[B, K]` of a head -> KL(backbone || head) `[B]`, nats."""
    return F.kl_div(F.log_softmax(logits, 1), target, reduction="none").sum(1)


def softened(target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities `[B, K]` as they would be had their logits been divided by `temperature`."""
    soft = target ** (1 / temperature)
    return soft / soft.sum(1, keepdim=True)
