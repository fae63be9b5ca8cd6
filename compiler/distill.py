"""Distillation: every candidate's head learns to answer as the backbone does, without a label.

Each batch goes through the frozen backbone once, and the heads of all candidates learn from the values it passes
(see `stream`). The loss is KL(backbone || head) on the backbone's probabilities, and beside it the error in telling its
last features (see `hint`); of all epochs each head keeps the weights with the least KL on rows it does not learn from,
and stops once that has not fallen for a while.

Training interrupted after an epoch goes on from its checkpoint to the very same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from offramp.passes import Backbone, Candidate, row_shape
from offramp.runtime.data import Rows

from .augment import find_augmentation, identity_of
from .checkpoint import load_state, make_folder, save_state
from .heads import HeadConfig, Shape, build_head, default_head, find_family
from .kept import Kept
from .learner import Learner, divergence
from .progress import bar
from .stream import Observed, Stream, mix
from .training import Training

CHECKPOINT = "heads.pt"


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
    folder: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Head, ...]:
    """Train one head per candidate.

    `rates` are learning rates by candidate name where they are not the training's.

    `learn` and `validate` are row indices into `data`. In `folder` lie kept values and, after each epoch, the state:
    a later call with the same arguments goes on from it. Without one both live in a temporary folder. `report` gets
    one line per event a person should know of.
    """
    name, _ = find_augmentation(training.augment, backbone.inputs)
    report(f"distilling {len(candidates)} heads on {len(learn)} rows, {training.epochs} epochs, augmentation {name}")
    stream = training.stream(backbone, candidates, data, seed)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offramp-")))
        make_folder(folder)
        kept = stack.enter_context(contextlib.closing(Kept(stream, folder / "values", training.kept_bytes)))
        trainer = _Trainer(stream, kept, configs, learn, validate, training, rates or {})
        start = trainer.resume(folder / CHECKPOINT)
        if start:
            report(f"resuming after epoch {start} of {training.epochs}")
        for epoch in range(start, training.epochs):
            if not trainer.live():
                report(f"no head's loss fell any more: stopped after epoch {epoch} of {training.epochs}")
                break
            trainer.learn_epoch(epoch)
            trainer.keep_best()
            trainer.save(folder / CHECKPOINT, epoch + 1)
        return trainer.heads()


class _Trainer:
    """The state of one distillation: a learner per candidate."""

    def __init__(
        self,
        stream: Stream,
        kept: Kept,
        configs: Mapping[str, HeadConfig],
        learn: np.ndarray,
        validate: np.ndarray,
        training: Training,
        rates: Mapping[str, float],
    ) -> None:
        self.stream, self.kept, self.configs, self.rates = stream, kept, configs, rates
        self.learn, self.validate, self.training = learn, validate, training
        backbone, candidates = stream.backbone, stream.candidates
        self.batches = len(stream.shuffled(learn, 0))  # of every epoch
        self.learners = [
            Learner(
                fresh_head(configs[c.name], row_shape(backbone, c.name), backbone.classes, mix(stream.seed, index)),
                self.batches * training.epochs, rates.get(c.name, training.learning_rate), training, stream.features,
            )
            for index, c in enumerate(candidates)
        ]  # fmt: skip

    def live(self) -> dict[int, Learner]:
        """Those that still learn, by the position of their candidate."""
        return {index: learner for index, learner in enumerate(self.learners) if not learner.stopped}

    def learn_epoch(self, epoch: int) -> None:
        live = self.live()
        for learner in live.values():
            learner.module.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.stream.seed, epoch + 2_000_003))
            what = f"distil epoch {epoch + 1}/{self.training.epochs}, {len(live)} heads"
            for observed in bar(self._observed(epoch), what, self.batches):
                for index, learner in live.items():
                    learner.learn(observed.target, observed.values[index], observed.hint)
                observed.values.clear()

    def _observed(self, epoch: int) -> Iterator[Observed]:
        if self.stream.repeats:
            return self.kept.epoch(self.learn, epoch)
        return self.stream.augmented(self.stream.shuffled(self.learn, epoch), epoch)  # nobody asks for it again

    def keep_best(self) -> None:
        """Measure every head on the validation rows; keep the weights of those that improved."""
        live = self.live()
        losses = mean_losses(live, self.kept.plain("validate", self.validate))
        for learner, loss in zip(live.values(), losses, strict=True):
            learner.judge(loss)

    def heads(self) -> tuple[Head, ...]:
        configs = [self.configs[candidate.name] for candidate in self.stream.candidates]
        return tuple(
            Head(candidate, config, find_family(config.family).finish(learner.finished()), learner.loss)
            for candidate, learner, config in zip(self.stream.candidates, self.learners, configs, strict=True)
        )

    def fingerprint(self) -> str:
        """What the checkpoint belongs to: backbone, heads, rows, settings, seed."""
        digest = hashlib.sha256(job_fingerprint(self.stream, self.learn, self.validate).encode())
        configs = {
            c.name: [self.configs[c.name].family, dict(self.configs[c.name].settings)] for c in self.stream.candidates
        }
        digest.update(
            repr((configs, dict(self.rates), asdict(replace(self.training, augment=None)), self.stream.seed)).encode()
        )
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
    """Backbone, augmentation and row indices in full, of the rows themselves some: enough to tell jobs apart."""
    digest = hashlib.sha256(stream.backbone.fingerprint().encode())
    if stream.backbone.scores != "logits":  # the graph says nothing of it
        digest.update(stream.backbone.scores.encode())
    digest.update(identity_of(stream.augment).encode())
    for part in parts:
        digest.update(f"{len(part)} rows ".encode() + part.tobytes())
    some = parts[0][:: max(1, len(parts[0]) // 64)]
    for name, array in stream.data.take(some).items():
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fresh_head(config: HeadConfig, shape: Shape, classes: int, seed: int) -> nn.Module:
    """A head with weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_head(config, shape, classes)


def mean_losses(learners: Mapping[int, Learner], observed: Iterable[Observed]) -> list[float]:
    """KL in nats over all rows of the heads of some learners, by the position of the value each reads.

    Heads are left in evaluation mode.
    """
    for learner in learners.values():
        learner.module.eval()
    total, rows = torch.zeros(len(learners), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in observed:
            rows += len(batch.target)
            for place, (index, learner) in enumerate(learners.items()):
                total[place] += float(divergence(batch.target, learner.module(batch.values[index])).sum())
            batch.values.clear()
    return list((total / rows).tolist())
