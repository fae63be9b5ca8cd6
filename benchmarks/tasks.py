"""Trained classifiers and real rows to compile them with, and which rows may touch what.

    resnet20, resnet56   CIFAR-10; heads learn from and are stopped on the half that defaults were picked on
    resnet56_long        the same, searched heads trained for 90 epochs, in batches of 64, by hints of 10
    resnet50             ImageNet weights on ten classes; heads learn from images most of which the backbone was
                         trained on
    sst2                 a six-layer BERT on SST-2's sentences; heads learn from the training set, which the backbone
                         was fine-tuned on

All are judged on rows that no default was picked on and no head has learned from. Sources: see `../shared/data`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cifar import data_dir, load_images, resnet20, resnet56, untouched_rows
from benchmarks.imagenet import ResNet50
from benchmarks.imagenet import load_images as load_traffic
from offramp.compiler import Options, load_weights
from offramp.runtime.data import ArrayRows

TOKENS = 64  # sentences are cut and padded to as many


@dataclass(frozen=True, eq=False)
class Task:
    """One model and its rows; the index arrays are disjoint."""

    name: str
    model: nn.Module
    rows: ArrayRows
    labels: np.ndarray  # [rows] int64
    learn: np.ndarray  # heads learn from them
    validate: np.ndarray  # when their training stops, and their temperatures
    score: np.ndarray  # a search is scored on them; afterwards they choose exits, and judge nothing
    judged: np.ndarray  # dealt into select, certify and test, again and again
    training: Mapping[str, Any] = field(default_factory=dict)  # what it needs other than the defaults
    search: Mapping[str, Any] = field(default_factory=dict)
    max_candidates: int = Options.max_candidates
    policy: str = Options.policy  # of the artifact
    kinds: tuple[str, ...] = ("searched", "default")  # of heads that are trained for it


def cifar(name: str, build: Callable[[], nn.Module], seed: int) -> Task:
    """A CIFAR-10 ResNet of He et al."""
    images, labels = load_images()
    known, fresh = (np.random.default_rng([seed, part]).permutation(rows) for part, rows in enumerate(untouched_rows()))
    model = build()
    load_weights(model, data_dir() / "cifar10" / f"{name}.safetensors")
    rows = ArrayRows({"x": images}, labels)
    return Task(name, model, rows, labels, known[:4500], known[4500:], fresh[:1500], fresh[1500:])


def resnet56_long(seed: int) -> Task:
    """What the searched heads of ResNet-56 gain from more epochs, twice the steps in each, and heavier hints."""
    task = cifar("resnet56", resnet56, seed)
    training = {"epochs": 90, "batch": 64, "hint": 10.0}
    return replace(task, name="resnet56_long", training=training, kinds=("searched",))


class Sentiment(nn.Module):
    """BERT, the mean over the tokens that are there, two classes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(**config), add_pooling_layer=False)
        self.head = nn.Linear(int(config["hidden_size"]), 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Tokens `[B, T]` int64 and their mask `[B, T]` -> logits `[B, 2]`."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask[:, :, None].to(hidden.dtype)
        logits: torch.Tensor = self.head((hidden * there).sum(1) / there.sum(1))
        return logits


def sst2(seed: int) -> Task:
    """The text classifier."""
    from tokenizers import Tokenizer

    folder = data_dir() / "sst2"
    model = Sentiment(json.loads((folder / "config.json").read_text()))
    load_weights(model, folder / "minilm_l6_sst2.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    read = []
    for part in ("train", "dev", "test"):
        with (folder / f"{part}.tsv").open(newline="") as file:
            read.append(list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)))
    lines = [line for part in read for line in part]
    encoded = tokenizer.encode_batch([sentence for _, sentence in lines])
    arrays = {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
    }
    labels = np.array([int(label) for label, _ in lines], np.int64)
    learn, dev = len(read[0]), len(read[0]) + len(read[1])
    known = np.random.default_rng(seed).permutation(learn)
    fresh = np.random.default_rng([seed, 1]).permutation(np.arange(learn, len(lines)))
    score = len(lines) - dev  # as many rows to choose by as dev has and test has to judge, both from both
    return Task(
        "sst2", model, ArrayRows(arrays, labels), labels, known[500:], known[:500], fresh[: len(fresh) - score],
        fresh[len(fresh) - score :],
    )  # fmt: skip


def save_rows(file: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Arrays by their names, in an `.npz` file."""
    np.savez(file, **rows)  # type: ignore[arg-type]  # numpy's stub takes a flag among the names


def unpadded(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sentences `[B, T]` of the text classifier, cut to the longest of the batch: behind it there is padding only."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: np.ascontiguousarray(values[:, :longest]) for name, values in batch.items()}


def imagenet(seed: int) -> Task:
    """ResNet-50 on ten classes. Few rows, places and epochs, for an epoch costs minutes; rows as they are, so that the
    backbone's values can be kept. Unseen images are too few to certify 1 %."""
    traffic, known = load_traffic("traffic_4000", 3000, seed)
    fresh, unknown = load_traffic("trueval_500", 500, seed)
    model = ResNet50()
    load_weights(model, data_dir() / "imagenet" / "resnet50_v1.safetensors")
    labels = np.concatenate([known, unknown])
    rows = ArrayRows({"x": np.concatenate([traffic, fresh])}, labels)
    order = np.arange(len(labels))
    return Task(
        "resnet50", model, rows, labels, order[:2500], order[2500:2700], order[2700:3000], order[3000:],
        training={"augment": "none", "epochs": 8, "batch": 64, "kept_bytes": 16 << 30},
        search={"trials": 4, "waves": 1, "epochs": 2}, max_candidates=5, policy="joint",
    )  # fmt: skip


TASKS: dict[str, Callable[[int], Task]] = {
    "resnet20": lambda seed: cifar("resnet20", resnet20, seed),
    "resnet56": lambda seed: cifar("resnet56", resnet56, seed),
    "resnet56_long": resnet56_long,
    "resnet50": imagenet,
    "sst2": sst2,
}
