"""Other ways to train a head, against the plain one: what was tried, and what it brought.

    python -m benchmarks.variants [--task resnet20] [--seeds 2] [--epochs 30]

    chained     a head also reads the log-probabilities of the head before it (Zero Time Waste, Wolczyk et al. 2021)
    left over   a head learns from the rows only that the heads before it are less than 95 % sure about
    close       rows weigh more the closer the head's own decision on them is
    softened    targets and answers at temperature 2 (Hinton et al. 2015)
    in halves   every batch is learned from in two steps
    hinted      a head also learns to tell the backbone's last features, with weight 10 (Romero et al. 2015)
    both        hinted, in halves

All learn at the same few places, from the same batches of one stream, from the same first weights. Exits are chosen and
judged on ten random splits of rows no head has learned from; differences are taken split by split. A chained head
needs the head before it even where that one is no exit; its compute is not charged here, so what is said of chained
heads is the most they could bring. Writes benchmarks/results/variants.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.resplits import SPLITS, Answers, judge
from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS, Task
from benchmarks.trained import made_ready
from offramp.compiler import Head, HeadConfig, Options, Ready, Training, calibrate, costs, default_heads
from offramp.compiler.augment import find_augmentation, identity
from offramp.compiler.distill import fresh_head
from offramp.compiler.learner import Learner, divergence, softened
from offramp.compiler.measure import machine, versions
from offramp.compiler.progress import bar
from offramp.compiler.record import Recording
from offramp.compiler.stream import Observed, Stream, mix
from offramp.passes import row_shape
from offramp.runtime.process import usable_cores

RESULTS = Path(__file__).parent / "results" / "variants.json"
PLAIN = "plain"
HINT = 10.0
HALVES, HINTED = ("in halves", "both"), ("hinted", "both")
VARIANTS = (PLAIN, "chained", "left over", "close", "softened", "in halves", "hinted", "both")
PLACES = 6
SURE = 0.95
ASKED = (("certified", 0.01), ("certified", 0.02), ("joint", 0.005), ("joint", 0.01), ("joint", 0.02))
HEAD = ("heads", *(f"{policy} {tolerance:.1%}" for policy, tolerance in ASKED))


class Chained(nn.Module):
    """A head whose last layer reads the log-probabilities of another one too."""

    def __init__(self, head: nn.Module, classes: int) -> None:
        super().__init__()
        self.head, self.before = head, nn.Linear(classes, classes, bias=False)
        nn.init.zeros_(self.before.weight)

    def forward(self, x: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """[B, ...], [B, K] logits of the head before -> logits [B, K]."""
        logits: torch.Tensor = self.head(x)
        return logits if before is None else logits + self.before(before.log_softmax(1))


@dataclass(frozen=True, eq=False)
class Heads:
    """One variant's heads, from shallow to deep."""

    variant: str
    learners: list[Learner]

    def answers(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of every head, [B, K] each; a head is shown what the one before it said, without its gradient."""
        found: list[torch.Tensor] = []
        for learner, value in zip(self.learners, values, strict=False):  # behind them come the backbone's features
            before = (found[-1].detach() if found else None,) if self.variant == "chained" else ()
            found.append(learner.module(value, *before))
        return found

    def learn(self, observed: Observed) -> None:
        """One step of every head, or one for each half of the batch."""
        parts = 2 if self.variant in HALVES else 1
        halves = zip(*(value.chunk(parts) for value in observed.values), strict=True)
        for target, (*values, features) in zip(observed.target.chunk(parts), halves, strict=True):
            self._step(target, values, features)

    def _step(self, target: torch.Tensor, values: Sequence[torch.Tensor], features: torch.Tensor) -> None:
        left = torch.ones(len(target))
        if self.variant == "softened":
            target = softened(target, 2.0)
        for learner in self.learners:
            learner.optimiser.zero_grad(set_to_none=True)
        losses = []
        for learner, logits in zip(self.learners, self.answers(values), strict=True):
            sure = logits.detach().softmax(1)
            weight = left
            if self.variant == "close":
                own = sure.gather(1, target.argmax(1, keepdim=True))[:, 0]
                weight = 0.2 + 4 * own * (1 - own)
            scale = 2.0 if self.variant == "softened" else 1.0
            loss = (weight * divergence(target, logits / scale)).sum() / weight.sum().clamp_min(1.0)
            losses.append(scale**2 * loss)
            if learner.hint is not None:
                losses.append(learner.hint_weight * learner.hint.loss(features))
            if self.variant == "left over":
                left = left * (sure.amax(1) < SURE)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        for learner in self.learners:
            learner.optimiser.step()
            learner.schedule.step()


def trained(task: Task, ready: Ready, options: Options) -> list[Heads]:
    """All variants' heads with the best weights of each."""
    backbone, training, seed = ready.backbone, options.training, options.seed
    name, augment = find_augmentation(training.augment, backbone.inputs)
    log(f"{len(VARIANTS)} variants at {len(ready.candidates)} places, seed {seed}, augmentation {name}")
    stream = Stream(backbone, ready.candidates, ready.rows, training.batch, augment, seed, hints=True)
    configs: dict[str, HeadConfig] = default_heads(backbone, ready.candidates)
    steps = len(stream.shuffled(task.learn, 0)) * training.epochs
    every = []
    for variant in VARIANTS:
        learners = []
        for index, place in enumerate(ready.candidates):
            shape = row_shape(backbone, place.name)
            head = fresh_head(configs[place.name], shape, backbone.classes, mix(seed, index))
            head = Chained(head, backbone.classes) if variant == "chained" else head
            more, features = 2 if variant in HALVES else 1, stream.features if variant in HINTED else 0
            learners.append(Learner(head, steps * more, training.learning_rate, training, features))
        every.append(Heads(variant, learners))
    for epoch in range(training.epochs):
        _train(every, True)
        pieces = stream.shuffled(task.learn, epoch)
        for observed in bar(stream.augmented(pieces, epoch), f"epoch {epoch + 1}/{training.epochs}", len(pieces)):
            for heads in every:
                heads.learn(observed)
        said = answers(every, stream, task.validate)
        for heads, one in zip(every, said, strict=True):
            target = torch.from_numpy(one.backbone)
            for learner, logits in zip(heads.learners, one.logits, strict=True):
                learner.judge(float(divergence(target, torch.from_numpy(logits)).mean()))
    for heads in every:
        for learner in heads.learners:
            learner.finished()
    return every


def answers(every: Sequence[Heads], stream: Stream, rows: np.ndarray) -> list[Recording]:
    """What each variant's heads say of some rows, in one pass."""
    _train(every, False)
    targets: list[torch.Tensor] = []
    logits: list[list[torch.Tensor]] = [[] for _ in every]
    with torch.no_grad():
        for observed in stream.plain(rows):
            targets.append(observed.target)
            for heads, own in zip(every, logits, strict=True):
                own.append(torch.stack(heads.answers(observed.values)))
    target = torch.cat(targets).numpy()
    return [Recording(torch.cat(own, 1).numpy(), target) for own in logits]


def _train(every: Sequence[Heads], learning: bool) -> None:
    for heads in every:
        for learner in heads.learners:
            learner.module.train(learning)


def given(task: Task, options: Options) -> list[Answers]:
    """Each variant's answers on the rows to score and to judge by, one training seed."""
    ready = made_ready(task, options)
    every = trained(task, ready, options)
    stream = Stream(ready.backbone, ready.candidates, ready.rows, options.training.batch, identity, options.seed)
    asked = np.concatenate([task.score, task.judged])
    held, said = answers(every, stream, task.validate), answers(every, stream, asked)
    configs = default_heads(ready.backbone, ready.candidates)
    like = [Head(c, configs[c.name], nn.Identity(), 0.0) for c in ready.candidates]  # the chain's own cost is left out
    price = costs(ready.backbone, like)
    return [Answers(one, calibrate(kept), task.labels[asked], price) for kept, one in zip(held, said, strict=True)]


def judged(by_seed: Sequence[Sequence[Answers]], options: Options, seen: int) -> list[dict[str, Any]]:
    """Every variant under every policy and tolerance, over the splits of all training seeds."""
    rows = []
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        for policy, tolerance in ASKED:
            asked = replace(options, policy=policy, tolerance=tolerance)
            outcomes: list[list[dict[str, float]]] = []
            for index in range(len(VARIANTS)):
                jobs = [(seed[index], asked, split, seen) for seed in by_seed for split in range(SPLITS)]
                outcomes.append(list(pool.map(judge, *zip(*jobs, strict=True))))
            plain = [o["saved"] for o in outcomes[0]]
            for variant, own in zip(VARIANTS, outcomes, strict=True):
                gained = [o["saved"] - p for o, p in zip(own, plain, strict=True)]
                told = {"saved": [o["saved"] for o in own], "gained": gained}
                told |= {"disagreement": [o["disagreement"] for o in own]}
                figures = {name: {"mean": mean(some), "sd": stdev(some)} for name, some in told.items()}
                rows.append({"variant": variant, "policy": policy, "tolerance": tolerance, **figures})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The README's table: compute saved by plain heads, and what others save more."""
    lines = []
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        key, sign = ("saved", "") if variant == PLAIN else ("gained", "+")
        lines.append([variant, *(f"{r[key]['mean'] * 100:{sign}.1f} ± {r[key]['sd'] * 100:.1f}" for r in own)])
    return markdown(HEAD, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="resnet20")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = TASKS[args.task](0)
    training = Training(epochs=args.epochs, hint=HINT)
    options = Options(training=training, threads=args.threads, max_candidates=PLACES)
    by_seed = [given(task, replace(options, seed=seed)) for seed in range(args.seeds)]
    rows = judged(by_seed, options, len(task.score))
    told = {
        "command": "python -m benchmarks.variants", "machine": machine(), "versions": versions(), "task": args.task,
        "seeds": args.seeds, "epochs": args.epochs, "threads": args.threads, "splits": SPLITS, "results": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("variants", table(rows))


if __name__ == "__main__":
    main()
