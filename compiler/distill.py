"""Distillation: every candidate's head learns to answer as the backbone does, without a label.

Each batch goes through the frozen backbone once, and the heads of all candidates learn from the values it passes
(see `stream`). The loss is KL(backbone || head) on the backbone's probabilities; of all epochs each head keeps the
weights with the least loss on rows it does not learn from.

Training interrupted after an epoch goes on from its checkpoint to the very same weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from offramp.passes import Backbone, Candidate, row_shape
from offramp.runtime.data import Rows
from offramp.runtime.errors import UsageError

from .augment import default_augmentation, find_augmentation
from .checkpoint import load_state, make_folder, save_state
from .heads import HeadConfig, Shape, build_head, default_head
from .learner import Learner, divergence
from .progress import bar
from .stream import Observed, Stream, mix


@dataclass(frozen=True)
class Training:
    """How heads are trained."""

    epochs: int = 50
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    augment: str | None = None  # a name from augment.AUGMENTATIONS; None: by the kind of input

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise UsageError(f"{self.epochs} epochs of batches of {self.batch}: give 1 epoch and batches of 2 or more")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise UsageError(
                f"learning rate {self.learning_rate}, weight decay {self.weight_decay}: "
                "give a positive rate and a decay of 0 or more"
            )
        if self.augment is not None:
            find_augmentation(self.augment)


@dataclass(frozen=True)
class Head:
    """A trained head of one candidate."""

    candidate: Candidate
    config: HeadConfig
    module: nn.Module = field(repr=False)  # in evaluation mode; [B, ...] -> logits [B, K]
    loss: float  # KL in nats on the validation rows

    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.module.parameters())


def default_heads(backbone: Backbone, candidates: Sequence[Candidate]) -> dict[str, HeadConfig]:
    """The default head of every candidate, by candidate name."""
    return {
        c.name: default_head(row_shape(backbone, c.name), backbone.classes, c.flops_before + c.flops_after)
        for c in candidates
    }


def distil(
    backbone: Backbone,
    candidates: Sequence[Candidate],
    configs: Mapping[str, HeadConfig],
    data: Rows,
    *,
    learn: np.ndarray,
    validate: np.ndarray,
    training: Training,
    seed: int,
    rates: Mapping[str, float] | None = None,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Head, ...]:
    """Train one head per candidate.

    `rates` are learning rates by candidate name where they are not the training's.

    `learn` and `validate` are row indices into `data`. With `checkpoint`, the state after each epoch is kept
    there and a later call with the same arguments goes on from it. `report` gets one line per event a person
    should know of.
    """
    name = training.augment or default_augmentation(backbone.inputs)
    training = replace(training, augment=name)
    report(f"distilling {len(candidates)} heads on {len(learn)} rows, {training.epochs} epochs, augmentation {name}")
    trainer = _Trainer(backbone, candidates, configs, data, learn, validate, training, seed, rates or {})
    start = 0
    if checkpoint is not None:
        make_folder(checkpoint.parent)
        start = trainer.resume(checkpoint)
    if start:
        report(f"resuming after epoch {start} of {training.epochs}")
    for epoch in range(start, training.epochs):
        trainer.learn_epoch(epoch)
        trainer.keep_best()
        if checkpoint is not None:
            trainer.save(checkpoint, epoch + 1)
    return trainer.heads()


class _Trainer:
    """The state of one distillation: a learner per candidate."""

    def __init__(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        configs: Mapping[str, HeadConfig],
        data: Rows,
        learn: np.ndarray,
        validate: np.ndarray,
        training: Training,
        seed: int,
        rates: Mapping[str, float],
    ) -> None:
        self.backbone, self.candidates, self.configs, self.rates = backbone, candidates, configs, rates
        self.data, self.learn, self.validate = data, learn, validate
        self.training, self.seed = training, seed
        augment = find_augmentation(training.augment or "none")
        self.stream = Stream(backbone, candidates, data, training.batch, augment, seed)
        steps = len(self.stream.shuffled(learn, 0)) * training.epochs
        self.learners = [
            Learner(
                fresh_head(configs[c.name], row_shape(backbone, c.name), backbone.classes, mix(seed, index)),
                steps, rates.get(c.name, training.learning_rate), training.weight_decay,
            )
            for index, c in enumerate(candidates)
        ]  # fmt: skip

    def learn_epoch(self, epoch: int) -> None:
        pieces = self.stream.shuffled(self.learn, epoch)
        for learner in self.learners:
            learner.module.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, epoch + 2_000_003))
            what = f"distil epoch {epoch + 1}/{self.training.epochs}"
            for observed in bar(self.stream.augmented(pieces, epoch), what, len(pieces)):
                for learner, value in zip(self.learners, observed.values, strict=True):
                    learner.learn(observed.target, value)

    def keep_best(self) -> None:
        """Measure every head on the validation rows; keep the weights of those that improved."""
        for learner, loss in zip(
            self.learners, mean_losses(self.learners, self.stream.plain(self.validate)), strict=True
        ):
            learner.judge(loss)

    def heads(self) -> tuple[Head, ...]:
        return tuple(
            Head(candidate, self.configs[candidate.name], learner.finished(), learner.loss)
            for candidate, learner in zip(self.candidates, self.learners, strict=True)
        )

    def fingerprint(self) -> str:
        """What the checkpoint belongs to: backbone, heads, rows, settings, seed."""
        digest = hashlib.sha256(job_fingerprint(self.stream, self.learn, self.validate).encode())
        configs = {c.name: [self.configs[c.name].family, dict(self.configs[c.name].settings)] for c in self.candidates}
        digest.update(repr((configs, dict(self.rates), asdict(self.training), self.seed)).encode())
        return digest.hexdigest()

    def save(self, path: Path, epochs: int) -> None:
        state = {
            "fingerprint": self.fingerprint(),
            "epochs": epochs,
            "learners": [learner.state() for learner in self.learners],
        }
        save_state(state, path)

    def resume(self, path: Path) -> int:
        """Epochs done according to the checkpoint; 0 if there is none for this very job."""
        state = load_state(path, self.fingerprint())
        if state is None:
            return 0
        for learner, kept in zip(self.learners, state["learners"], strict=True):
            learner.restore(kept)
        return int(state["epochs"])


def job_fingerprint(stream: Stream, *parts: np.ndarray) -> str:
    """Backbone and row indices in full, of the rows themselves some: enough to tell jobs apart."""
    digest = hashlib.sha256(stream.backbone.fingerprint().encode())
    for part in parts:
        digest.update(part.tobytes())
    some = parts[0][:: max(1, len(parts[0]) // 64)]
    for name, array in stream.data.take(some).items():
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fresh_head(config: HeadConfig, shape: Shape, classes: int, seed: int) -> nn.Module:
    """A head with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_head(config, shape, classes)


def mean_losses(learners: Sequence[Learner], observed: Iterable[Observed]) -> list[float]:
    """KL in nats of every learner's head, in order of the values, over all rows; heads are left in evaluation mode."""
    for learner in learners:
        learner.module.eval()
    total, rows = torch.zeros(len(learners), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in observed:
            rows += len(batch.target)
            for index, (learner, value) in enumerate(zip(learners, batch.values, strict=True)):
                total[index] += float(divergence(batch.target, learner.module(value)).sum())
    return list((total / rows).tolist())
