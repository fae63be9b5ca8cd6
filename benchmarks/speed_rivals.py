"""What `benchmarks.speed` times an artifact against, and what it needs to know of anything that it times.

    plain     the backbone in ONNX Runtime; smaller models likewise
    eager     the backbone in PyTorch under `torch.inference_mode`
    earlyon   version 0.3.0 (PyPI), the nearest peer: the same backbone, one of its heads at each of our exits
              that is at a module's end, for it hooks modules

earlyon is used as its pages say: its own heads, trained by `stage2_train_exits` on the rows our heads learned from,
mirrored at random as its CIFAR loader does, for as many epochs as the results say; temperatures fitted on the rows ours
were; thresholds from `calibrate_thresholds` on the rows that our exits were chosen and certified on, asked for the
accuracy that our artifact loses on the test rows, at its own tolerance and at a wider one. It learns and calibrates
from labels, which ours never sees. One row is answered by `mode="inference"`, more by `forward_inference_batched`,
under which all rows of a batch leave together: what it answers depends on the batch, so its errors are told for every
batch size. Its wrapper is put together here as its `custom_ee` does, whose module cannot be imported without
torchvision.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from benchmarks.tasks import Task
from offramp.compiler import Ready
from offramp.passes import row_shape
from offramp.runtime.engine import EngineSession, ModelBytes
from offramp.runtime.manifest import Manifest

PROVIDERS = ["CPUExecutionProvider"]
_BATCH = 128  # of earlyon's training and calibration, as its command line has it

Batch = dict[str, np.ndarray]
Answered = tuple[np.ndarray, np.ndarray | int]  # classes [B] int64, the exits they left at, or the one that all did


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to answer batches."""

    seconds: Callable[[Sequence[Batch]], float]  # that it takes over some batches
    answer: Callable[[Batch], Answered] | None = None  # None: it is a sum of times and answers nothing
    together: bool = False  # all rows of a batch leave at one exit


def called(run: Callable[[Batch], Any], read: Callable[[Any], Answered], together: bool = False) -> Variant:
    """Answers batch after batch by `run`; `read` tells what that returned. An answer is known when its class is."""

    def seconds(work: Sequence[Batch]) -> float:
        start = time.perf_counter()
        for batch in work:
            read(run(batch))
        return time.perf_counter() - start

    return Variant(seconds, lambda batch: read(run(batch)), together)


def in_onnxruntime(model: ModelBytes, name: str, threads: int) -> Variant:
    """A model without exits in one session."""
    session = EngineSession(model, name, PROVIDERS, threads, strict=True)
    return called(lambda batch: session.run(["probabilities"], batch)[0], _without_exits)


def eager(model: nn.Module) -> Variant:
    """The model as PyTorch runs it."""
    model.eval()

    def run(batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            scores: torch.Tensor = model(**{name: torch.from_numpy(values) for name, values in batch.items()})
        return scores.numpy()

    return called(run, _without_exits)


def _without_exits(scores: np.ndarray) -> Answered:
    return scores.argmax(1), 0


def earlyon(
    folder: Path, task: Task, ready: Ready, manifest: Manifest, losses: Sequence[float], epochs: int, seed: int
) -> list[tuple[Variant, dict[str, Any]]]:
    """earlyon's wrapper, trained once and calibrated to lose so much accuracy -> what is timed, and what it took."""
    sys.path.append(str(folder.resolve()))
    trained = _wrapped(task.model, ready, manifest)
    name, *others = ready.rows.input_names
    assert not others, "earlyon calls a backbone with one tensor"

    def loader(rows: np.ndarray, learning: bool = False) -> DataLoader[Any]:
        data = TensorDataset(torch.from_numpy(ready.rows.take(rows)[name]), torch.from_numpy(task.labels[rows]))
        return DataLoader(data, _BATCH, shuffle=learning, collate_fn=_mirrored if learning else default_collate)

    splits, started = ready.splits, time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train = importlib.import_module("earlyon.training.two_stage_trainer").stage2_train_exits
        train(trained, loader(splits.distil, True), epochs=epochs, on_epoch_end=lambda told: None)
    took = time.perf_counter() - started
    given = []
    for lost in losses:
        wrapper = _wrapped(task.model, ready, manifest)
        wrapper.load_state_dict(trained.state_dict())
        started = time.perf_counter()
        found = importlib.import_module("earlyon.core.thresholds").calibrate_thresholds(
            wrapper, loader(np.concatenate([splits.select, splits.certify])), target_accuracy_drop=lost,
            fit_temperature=True, temperature_loader=loader(splits.calibrate),
        )  # fmt: skip
        told = {
            "version": importlib.import_module("earlyon").__version__,
            "epochs": epochs,
            "seconds": took + time.perf_counter() - started,
            "places": [point.layer_name for point in wrapper.config.exit_points],
            "asked": found.enabled_exits,
            "thresholds": found.thresholds,
            "accuracy_loss": {"wanted": lost, "calibrated": found.accuracy_delta},
        }
        given.append((_answering(wrapper.eval(), name, len(found.thresholds)), told))
    return given


def _answering(wrapper: Any, name: str, last: int) -> Variant:
    """earlyon's wrapper, whose one input is called `name`; the backbone's own answer is exit `last`."""

    def run(batch: Batch) -> Any:
        rows = torch.from_numpy(batch[name])
        return wrapper(rows, mode="inference") if len(rows) == 1 else wrapper.forward_inference_batched(rows)

    def read(result: Any) -> Answered:
        scores = result.prediction if hasattr(result, "prediction") else result.predictions
        return scores.argmax(1).numpy(), result.exit_taken if result.exit_taken >= 0 else last

    return called(run, read, together=True)


def _wrapped(model: nn.Module, ready: Ready, manifest: Manifest) -> Any:
    """A copy of the model with a fresh head of earlyon's at each exit of ours that ends a module."""
    library = importlib.import_module("earlyon")
    classes = manifest.classes
    known = {name for name, _ in model.named_modules()}
    points = [
        library.ExitPoint(f"e{index}", spec.place, row_shape(ready.backbone, spec.cut)[0])
        for index, spec in enumerate(manifest.exits[:-1])
        if spec.place in known
    ]
    heads = {point.name: library.EarlyExitHead(point.in_channels, classes) for point in points}
    config = library.EarlyExitConfig(backbone="custom", num_classes=classes, exit_points=points)
    shape = (1, *manifest.inputs[0].shape[1:])
    return library.EarlyExitWrapper(copy.deepcopy(model).eval(), heads, lambda scores: scores, config, shape)


def _mirrored(rows: list[Any]) -> list[torch.Tensor]:
    """Images [B, C, H, W] and labels [B], every second image, at random, left to right."""
    images, labels = default_collate(rows)
    turned = torch.rand(len(images)) < 0.5
    images[turned] = images[turned].flip(3)
    return [images, labels]
