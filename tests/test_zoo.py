"""Architectures as different as can be, from capture to the answers of every backend, weights random.

The whole zoo is `make zoo`. These are transformers' own models from tiny configurations, and a DenseNet written down
here; what each must offer as places for exits is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo import check, sources
from benchmarks.zoo.report import page
from benchmarks.zoo.sources import Built, images
from offramp.compiler import capture, keep_independent
from offramp.compiler.capture import bind
from offramp.passes import Candidates, Limits, find_candidates
from offramp.runtime.errors import NoCandidateError

ALL = Limits(least_left=0.0)
LAYERS = 3


class DenseBlock(nn.Module):
    """Layers that each read what all before them made."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x]
        for layer in self.layers:
            made.append(F.relu(layer(torch.cat(made, 1))))
        return torch.cat(made, 1)


class Transition(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2))


class DenseNet(nn.Module):
    """Three dense blocks of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block1, self.transition1 = DenseBlock(8, 8), Transition(32)
        self.block2, self.transition2 = DenseBlock(16, 8), Transition(40)
        self.block3, self.classify = DenseBlock(20, 8), nn.Linear(44, sources.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.transition1(self.block1(self.stem(x)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.classify(x.mean((2, 3)))


def densenet() -> Built:
    torch.manual_seed(0)
    rows = images(32)
    return Built(sources.settled(DenseNet(), rows), rows)


def library(name: str) -> Callable[[], Built]:
    return lambda: sources.build(sources.Entry("transformers", name))


MODELS: dict[str, Callable[[], Built]] = {
    "densenet": densenet,
    "resnet": library("resnet/ResNetForImageClassification"),
    "mobilenet_v2": library("mobilenet_v2/MobileNetV2ForImageClassification"),
    "efficientnet": library("efficientnet/EfficientNetForImageClassification"),
    "poolformer": library("poolformer/PoolFormerForImageClassification"),
    "levit": library("levit/LevitForImageClassification"),
    "vit": library("vit/ViTForImageClassification"),
    "deit": library("deit/DeiTForImageClassification"),
    "swin": library("swin/SwinForImageClassification"),
    "bert": library("bert/BertForSequenceClassification"),
    "squeezebert": library("squeezebert/SqueezeBertForSequenceClassification"),
    "xlm": library("xlm/XLMForSequenceClassification"),
    "gpt2": library("gpt2/GPT2ForSequenceClassification"),
    "llama": library("llama/LlamaForSequenceClassification"),
    "t5": library("t5/T5ForSequenceClassification"),
    "qwen2_moe": library("qwen2_moe/Qwen2MoeForSequenceClassification"),
}


# Those whose graphs are much like another's are here for the places they offer alone.
DOZEN = [name for name in MODELS if name not in ("mobilenet_v2", "deit", "llama", "squeezebert")]


@pytest.mark.parametrize("name", DOZEN)
def test_every_backend_gives_the_eager_runs_answers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exits, for emitting is what takes time here; the zoo has three."""
    monkeypatch.setattr(check, "EXITS", 2)
    monkeypatch.setattr(check, "SECONDS", 1.0)
    row: check.Row = {}
    check.examine(MODELS[name](), name, row, tmp_path)
    assert set(row["backends"]) == set(check.ALL_TARGETS)
    assert all(backend["holds"] for backend in row["backends"].values())
    assert len(row["exits"]) == 2
    assert {0, 1, 3} <= set(row["batches"])


def candidates(name: str) -> Candidates:
    built = MODELS[name]()
    example = built.rows(8, 0)
    backbone = capture(built.model, example, name=name)
    return keep_independent(backbone, find_candidates(backbone, limits=ALL), bind(backbone.inputs, example, name))


def ends(found: Candidates, place: str) -> int:
    """How many candidates lie at the end of one of the model's modules, or in what it ends with."""
    return sum(c.place == place or c.place.startswith(f"{place}.") for c in found.kept)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit", "vit.layers.{}"),
        ("deit", "deit.layers.{}"),
        ("bert", "bert.encoder.layer.{}"),
        ("squeezebert", "transformer.encoder.layers.{}"),  # channels before tokens: the value before the turn is read
        ("gpt2", "transformer.h.{}"),
        ("llama", "model.layers.{}"),
    ],
)
def test_transformers_have_a_cut_after_every_block(name: str, blocks: str) -> None:
    found = candidates(name)
    for index in range(LAYERS - 1):  # no compute lies between the last block and what reads it
        assert ends(found, blocks.format(index)) >= 1, [c.place for c in found.kept]


def test_an_attention_mask_travels_to_every_block() -> None:
    found = candidates("bert")
    inner = [c for c in found.kept if ".layer." in c.place][:-1]
    assert len(inner) >= LAYERS - 1
    assert all(c.side_inputs and 0 < c.side_bytes <= Limits().side_bytes for c in inner)
    tight = Limits(least_left=0.0, side_bytes=inner[0].side_bytes - 1)
    built = MODELS["bert"]()
    refused = find_candidates(capture(built.model, built.rows(8, 0)), limits=tight).refused
    assert any("over the bound of" in r.reason for r in refused)


def test_swin_is_cut_between_blocks() -> None:
    found = candidates("swin")
    blocks = [f"swin.encoder.layers.{stage}.blocks.{block}" for stage in range(2) for block in range(2)]
    for block in blocks[:-1]:
        assert ends(found, block) == 1, [c.place for c in found.kept]


def test_densenet_is_cut_between_dense_blocks_only() -> None:
    found = candidates("densenet")
    between = ["stem", "block1", "transition1.3", "block2", "transition2.3"]
    assert [c.place for c in found.kept][: len(between)] == between
    assert not any(".layers" in c.place for c in found.kept)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet"])
def test_every_block_of_inverted_residuals_ends_in_a_cut(name: str) -> None:
    """Those without a shortcut end in a batch norm."""
    built = MODELS[name]()
    kinds = ("MobileNetV2InvertedResidual", "EfficientNetBlock")
    blocks = [path for path, module in built.model.named_modules() if type(module).__name__ in kinds]
    found = candidates(name)
    assert len(blocks) > 6
    assert [path for path in blocks if not ends(found, path)] == []


def test_a_model_without_a_place_is_refused_with_a_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = Built(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), images(8))
    row: check.Row = {}
    with pytest.raises(NoCandidateError, match="has no place for an exit among"):
        check.examine(built, "shallow", row, tmp_path)
    assert row["candidates"] == 0
    assert row["refusals"]


def test_the_page_counts_and_gives_reasons() -> None:
    passed = {"library": "timm", "name": "a", "depth": "full", "outcome": "passed", "seconds": 2.0, "candidates": 3}
    refused = {"library": "timm", "name": "b", "depth": "full", "outcome": "refused", "reason": "shuffles | rows"}
    missing = {"library": "timm", "name": "c", "depth": "full", "outcome": "unbuildable", "reason": "needs natten"}
    begun = {**passed, "name": "d", "depth": "candidates"}
    results = [passed, refused, missing, begun]
    text = page({"versions": {"torch": "2"}, "machine": "a machine", "listed": {"timm": 6}, "results": results})
    assert "| timm | 6 | 1 | 1 | 1 | 0 | 1 | 2 | 20.0% |" in text
    assert "- `b`: refused, shuffles \\| rows" in text
    assert "2.0 s for the median model" in text
