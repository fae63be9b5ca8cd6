"""Distillation: every candidate's head learns to answer as the backbone does, without a label.

One stream: each batch goes through the frozen backbone once, and the heads of all candidates learn from the
values it passes (the papers' medial data set, Eq. 1, made on the fly). The loss is KL(backbone || head) on
the backbone's probabilities. AdamW under a cosine schedule; of all epochs each head keeps the weights with
the least loss on rows it does not learn from.

Everything random in epoch e is drawn from (seed, e), so training interrupted after an epoch goes on from its
checkpoint to the very same weights.
"""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from offramp.passes import Backbone, Candidate, probabilities, row_shape
from offramp.passes.taps import tap
from offramp.runtime.data import Rows
from offramp.runtime.errors import StorageError, UsageError

from .augment import default_augmentation, find_augmentation
from .capture import bind
from .heads import HeadConfig, build_head, default_head
from .progress import bar
from .quiet import quiet

# What torch.load raises for bytes that no torch.save wrote.
_UNREADABLE = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, pickle.PickleError)

_LAYOUT: torch.memory_format = torch.channels_last


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
    checkpoint: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Head, ...]:
    """Train one head per candidate.

    `learn` and `validate` are row indices into `data`. With `checkpoint`, the state after each epoch is kept
    there and a later call with the same arguments goes on from it. `report` gets one line per event a person
    should know of.
    """
    name = training.augment or default_augmentation(backbone.inputs)
    training = replace(training, augment=name)
    report(f"distilling {len(candidates)} heads on {len(learn)} rows, {training.epochs} epochs, augmentation {name}")
    trainer = _Trainer(backbone, candidates, configs, data, learn, validate, training, seed)
    start = 0
    if checkpoint is not None:
        _make_folder(checkpoint.parent)
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
    """The state of one distillation: heads, optimiser, best weights so far."""

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
    ) -> None:
        self.backbone, self.candidates, self.configs = backbone, candidates, configs
        self.data, self.learn, self.validate = data, learn, validate
        self.training, self.seed = training, seed
        self.augment = find_augmentation(training.augment or "none")
        # Convolutions on CPU run a quarter faster on channels-last tensors; the copy leaves the backbone's alone.
        self.taps = copy.deepcopy(tap(backbone, [c.name for c in candidates]))
        _lay_out(self.taps, _LAYOUT)
        self.modules = nn.ModuleList()
        for index, candidate in enumerate(candidates):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_mix(seed, index))
                shape = row_shape(backbone, candidate.name)
                self.modules.append(build_head(configs[candidate.name], shape, backbone.classes))
        _lay_out(self.modules, _LAYOUT)
        self.optimiser = torch.optim.AdamW(
            self.modules.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self.steps = max(1, math.ceil(len(learn) / training.batch)) * training.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)
        self.best_loss = [math.inf] * len(candidates)
        self.best: list[dict[str, torch.Tensor]] = [_copy(m) for m in self.modules]

    def _rate(self, step: int) -> float:
        """Cosine decay behind a warm-up of a twentieth, as a factor of the learning rate."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def learn_epoch(self, epoch: int) -> None:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.learn)
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch + 1_000_003))
        self.modules.train()
        # A last batch of one row has no batch statistics to norm by.
        pieces = [p for p in np.array_split(order, max(1, round(len(order) / self.training.batch))) if len(p) > 1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(self.seed, epoch + 2_000_003))
            for rows in bar(pieces, f"distil epoch {epoch + 1}/{self.training.epochs}"):
                batch = self.augment(tensors(self.data, rows), generator)
                target, values = self._observe(batch)
                self.optimiser.zero_grad(set_to_none=True)
                losses = [divergence(target, m(v)).mean() for m, v in zip(self.modules, values, strict=True)]
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                self.optimiser.step()
                self.schedule.step()

    def keep_best(self) -> None:
        """Measure every head on the validation rows; keep the weights of those that improved."""
        self.modules.eval()
        total = torch.zeros(len(self.modules), dtype=torch.float64)
        with torch.no_grad():
            for rows in batches(self.validate, self.training.batch):
                target, values = self._observe(tensors(self.data, rows))
                for index, (module, value) in enumerate(zip(self.modules, values, strict=True)):
                    total[index] += float(divergence(target, module(value)).sum())
        for index, loss in enumerate((total / len(self.validate)).tolist()):
            if loss < self.best_loss[index]:
                self.best_loss[index] = loss
                self.best[index] = _copy(self.modules[index])

    def _observe(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One pass of the frozen backbone -> its probabilities `[B, K]` and every candidate's value."""
        inputs = bind(self.backbone.inputs, batch, self.backbone.name)
        with torch.no_grad():
            scores, *values = self.taps(*(x.to(memory_format=_LAYOUT) if x.dim() == 4 else x for x in inputs))
            return probabilities(scores, self.backbone.scores, 1.0), values

    def heads(self) -> tuple[Head, ...]:
        found = []
        for index, candidate in enumerate(self.candidates):
            module = self.modules[index]
            module.load_state_dict(self.best[index])
            _lay_out(module, torch.contiguous_format)
            found.append(Head(candidate, self.configs[candidate.name], module.eval(), self.best_loss[index]))
        for parameter in self.modules.parameters():
            parameter.requires_grad_(False)
        return tuple(found)

    def fingerprint(self) -> str:
        """What the checkpoint belongs to: backbone, heads, rows, settings, seed."""
        digest = hashlib.sha256(self.backbone.fingerprint().encode())
        configs = {c.name: [self.configs[c.name].family, dict(self.configs[c.name].settings)] for c in self.candidates}
        digest.update(repr((configs, asdict(self.training), self.seed)).encode())
        digest.update(self.learn.tobytes() + self.validate.tobytes())
        some = self.learn[:: max(1, len(self.learn) // 64)]
        for name, array in self.data.take(some).items():
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: Path, epochs: int) -> None:
        state = {
            "fingerprint": self.fingerprint(),
            "epochs": epochs,
            "modules": self.modules.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "best_loss": self.best_loss,
        }
        partial = path.with_name(path.name + ".partial")
        try:
            torch.save(state, partial)
            partial.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
            raise StorageError(f"{path}: heads in training could not be kept ({_reason(error)}); free space") from error
        finally:
            partial.unlink(missing_ok=True)

    def resume(self, path: Path) -> int:
        """Epochs done according to the checkpoint; 0 if there is none for this very job."""
        if not path.is_file():
            return 0
        try:
            with quiet():
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE:
            return 0  # an unreadable checkpoint only costs the time it would have saved
        if not isinstance(state, dict) or state.get("fingerprint") != self.fingerprint():
            return 0
        self.modules.load_state_dict(state["modules"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.best, self.best_loss = state["best"], state["best_loss"]
        return int(state["epochs"])


def _make_folder(folder: Path) -> None:
    """Before training rather than after an epoch of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({_reason(error)}); choose another output") from error


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0][:200]


def divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities `[B, K]` of the backbone, logits `[B, K]` of a head -> KL(backbone || head) `[B]`, nats."""
    return F.kl_div(F.log_softmax(logits, 1), target, reduction="none").sum(1)


def tensors(data: Rows, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Rows of the data as tensors by input name."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.take(rows).items()}


def batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Row indices in order, in pieces of `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _mix(seed: int, stream: int) -> int:
    """A seed of its own for every stream drawn from one seed."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks this documented form


def _copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
