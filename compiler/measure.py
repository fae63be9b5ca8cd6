"""Measuring: milliseconds per row of plain backbone and artifact, both in ONNX Runtime, interleaved.

Every round runs the same rows through the backbone in one session, through the artifact, and through each
stage alone on the rows that reach it; what is compared is the ratio within a round, so that a busy machine
slows both sides. The sum over stages is the ideal: no executor can beat it, and what lies between it and the
artifact's time is the executor's own.

The other plans of the dial are timed against the backbone in the same way, in fewer rounds and for the report only.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from offramp.runtime.artifact import Artifact
from offramp.runtime.data import Rows
from offramp.runtime.engine import EngineSession, ModelBytes
from offramp.runtime.execution import ASK, Executor, Segments, SingleFile
from offramp.runtime.manifest import Timing
from offramp.runtime.process import usable_cores
from offramp.runtime.session import Session

from .progress import bar

BATCHES = (1, 32)
ROUNDS = 30
DIAL_SHARE = 5  # of the rounds one in so many times the whole dial
_SECONDS = 0.1  # per side and round: long enough for the clock, short enough to interleave
_PROVIDERS = ["CPUExecutionProvider"]

Batch = dict[str, np.ndarray]


class Bench:
    """Backbone and artifact side by side on this machine's CPU."""

    def __init__(self, artifact: Artifact, backbone: ModelBytes, threads: int) -> None:
        self.threads = threads
        self.backbone = EngineSession(backbone, "backbone", _PROVIDERS, threads, strict=True)
        manifest = artifact.manifest
        self.stages = [
            EngineSession(artifact.model(s.file), s.file, _PROVIDERS, threads, strict=True) for s in manifest.stages
        ]
        self.specs = manifest.stages
        self.thresholds = np.array(manifest.thresholds(), np.float32)
        executor: Executor
        if self.stages:
            executor = Segments(manifest, self.stages)
        else:
            whole = EngineSession(artifact.model("model.onnx"), "model.onnx", _PROVIDERS, threads, strict=True)
            executor = SingleFile(manifest, whole)
        self.session = Session(artifact, executor)

    def timing(self, data: Rows, rows: np.ndarray, batch: int, rounds: int, seed: int) -> Timing:
        """Time `batch` rows at a time, drawn from `rows`, over `rounds` rounds."""
        draw, calls = self._warmed(data, rows, batch, seed)
        plain, ours, alone = [], [], []
        for index in bar(range(rounds), f"measure batch {batch}", rounds):
            work = draw(calls)
            sides: list[Callable[[], None]] = [
                lambda work=work: plain.append(_seconds(self._backbone, work)),  # type: ignore[misc]
                lambda work=work: ours.append(_seconds(self.session.run, work)),  # type: ignore[misc]
                lambda work=work: alone.append(self.stages_alone(work)),  # type: ignore[misc]
            ]
            for side in sides[index % 3 :] + sides[: index % 3]:
                side()
        per_row = 1e3 / (calls * batch)
        ratios = np.array(ours) / np.array(plain)
        stages = np.array(alone) * per_row  # [rounds, stages]
        return Timing(
            batch=batch,
            threads=self.threads,
            rounds=rounds,
            backbone_ms=float(np.median(plain)) * per_row,
            offramp_ms=float(np.median(ours)) * per_row,
            ratio=float(np.median(ratios)),
            ratio_quartiles=(float(np.quantile(ratios, 0.25)), float(np.quantile(ratios, 0.75))),
            ideal_over=float(np.median(np.array(ours) / np.array(alone).sum(1))) if self.stages else None,
            ideal_ms=float(np.median(stages.sum(1))) if self.stages else None,
            stage_ms=tuple(float(m) for m in np.median(stages, axis=0)),
        )

    def dial(
        self, data: Rows, rows: np.ndarray, batch: int, rounds: int, seed: int, plans: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Thresholds [exits - 1] of every plan -> its ratio, offramp / backbone, median over rounds."""
        draw, calls = self._warmed(data, rows, batch, seed)
        ratios = []
        for _ in bar(range(rounds), f"measure the dial at batch {batch}", rounds):
            work = draw(calls)
            plain = _seconds(self._backbone, work)
            ratios.append([_seconds(self._under(limits), work) / plain for limits in plans])
        return tuple(float(ratio) for ratio in np.median(ratios, axis=0))

    def _warmed(self, data: Rows, rows: np.ndarray, batch: int, seed: int) -> tuple[Callable[[int], list[Batch]], int]:
        """-> what draws so many batches, and how many of them the clock needs; both sides have run."""
        generator = np.random.default_rng([seed, batch])

        def draw(calls: int) -> list[Batch]:
            return [data.take(generator.choice(rows, batch, replace=len(rows) < batch)) for _ in range(calls)]

        warm = draw(3)
        for one in warm:
            self._backbone(one)
            self.session.run(one)
        return draw, int(np.clip(_SECONDS / max(_seconds(self._backbone, warm) / len(warm), 1e-6), 1, 256))

    def _under(self, thresholds: Sequence[float]) -> Callable[[Batch], object]:
        return lambda batch: self.session.run(batch, thresholds=thresholds)

    def _backbone(self, batch: Batch) -> None:
        self.backbone.run(["probabilities"], batch)

    def stages_alone(self, work: Sequence[Batch]) -> list[float]:
        """Seconds each stage takes over the rows of `work` that reach it, outside the executor."""
        seconds = [0.0] * len(self.stages)
        for batch in work:
            live: Mapping[str, np.ndarray] = batch
            for index, (stage, spec) in enumerate(zip(self.stages, self.specs, strict=True)):
                kept = [name for name in spec.outputs if name in spec.carries]
                feed = {name: live[name] for name in stage.inputs if name != ASK}
                if ASK in stage.inputs:
                    feed[ASK] = np.array(self.thresholds[index] < np.inf)
                start = time.perf_counter()
                values = stage.run([*kept, "probabilities", "confidence"], feed)
                seconds[index] += time.perf_counter() - start
                if index == len(self.stages) - 1:
                    break
                stays = np.flatnonzero(~(values[-1] >= self.thresholds[index]))
                if not len(stays):
                    break
                known = {**live, **dict(zip(kept, values, strict=False))}
                live = {name: known[name].take(stays, axis=0) for name in spec.carries}
        return seconds


def _seconds(call: Callable[[Batch], object], work: Sequence[Batch]) -> float:
    start = time.perf_counter()
    for batch in work:
        call(batch)
    return time.perf_counter() - start


def machine() -> str:
    """One line that says what was measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {usable_cores()} cores, {platform.system()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Of the packages that made and measured the artifact."""
    found = {}
    for name in ("offramp", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
