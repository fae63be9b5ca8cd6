"""The space heads are searched in: every head of it can be built, emitted, priced and trained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offramp.compiler import (
    HeadConfig,
    build_head,
)
from offramp.compiler.emit.translate import Example, to_onnx
from offramp.compiler.heads import (
    COST,
    Family,
    Settings,
    Shape,
    Space,
    configure,
    default_head,
    families_for,
    head_flops,
    register_family,
    search_space,
)
from offramp.compiler.search.engine import Proposal
from offramp.compiler.search.trial import learning_rate
from offramp.runtime.errors import UsageError


def drawn(space: Space) -> st.SearchStrategy[Mapping[str, Any]]:
    """Any one choice of each entry."""
    kinds = {
        key: st.sampled_from(entry["_value"]) if entry["_type"] == "choice" else st.floats(*entry["_value"])
        for key, entry in space.items()
    }
    return st.fixed_dictionaries(kinds)


@pytest.mark.parametrize("shape", [(3, 32, 32), (7, 9, 5), (16, 1, 1), (4, 2, 11), (5, 24), (197, 33), (17,)])
def test_every_head_of_a_space_reads_its_value_and_keeps_its_price(shape: Shape) -> None:
    family = families_for(shape)[0]

    @given(drawn(search_space(family)), st.sampled_from([1e4, 1e6, 1e8]))
    @settings(max_examples=25)
    def check(choices: Mapping[str, Any], flops: float) -> None:
        config = configure(family, shape, 7, flops, choices)
        head = build_head(config, shape, 7).eval()
        assert head(torch.randn(2, *shape)).shape == (2, 7)
        assert config.describe()
        narrowest = configure(family, shape, 7, 0.0, choices)
        assert config == narrowest or head_flops(config, shape, 7) <= choices[COST] * flops

    check()


class Called(torch.nn.Module):
    """As a stage calls its head: with a list of values."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.head(values[0])


@pytest.mark.parametrize("shape", [(6, 12, 12), (4, 2, 6), (5, 24), (17,)])
def test_every_kind_of_head_has_a_form_in_onnx(shape: Shape) -> None:
    family = families_for(shape)[0]
    space = search_space(family)
    longest = max(len(entry["_value"]) for entry in space.values() if entry["_type"] == "choice")
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for turn in range(longest):
        choices = {k: e["_value"][turn % len(e["_value"])] for k, e in space.items()}
        torch.manual_seed(turn)
        head = build_head(configure(family, shape, 4, 1e5, choices), shape, 4).eval()
        model = to_onnx(Called(head), [Example("x", x, ())], ["logits"])
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for rows in (1, 3):
            with torch.no_grad():
                found = session.run(None, {"x": x[:rows].numpy()})[0]
                np.testing.assert_allclose(found, head(x[:rows]).numpy(), atol=1e-5)


def test_a_head_over_a_size_that_varies_fixes_none() -> None:
    choices = {k: e["_value"][-1] for k, e in search_space("conv").items()}
    assert configure("conv", (4, 8, 8), 3, 1e6, choices).settings["grid"] == 4
    free = configure("conv", (4, 8, 8), 3, 1e6, choices, varies=True)
    assert free.settings["grid"] == 1
    assert build_head(free, (4, 8, 8), 3).eval()(torch.randn(2, 4, 11, 5)).shape == (2, 3)


def test_a_family_of_ones_own_is_searched_and_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(shape: Shape, width: int, choices: Settings) -> Settings:
        return {"bias": choices["bias"]}

    plain = Family(
        rank=2,
        build=lambda shape, classes, given: torch.nn.Linear(shape[0], classes, bias=given["bias"]),
        default=lambda shape, width: {"bias": True},
        describe=lambda given: "linear",
        space={"bias": {"_type": "choice", "_value": [True, False]}},
        chosen=chosen,
    )
    monkeypatch.setattr("offramp.compiler.heads.family.FAMILIES", {})
    register_family("linear", plain)
    assert default_head((6,), 3, 1e6).family == "linear"
    config = configure("linear", (6,), 3, 1e6, {"bias": False, COST: 0.01})
    assert build_head(config, (6,), 3).bias is None
    with pytest.raises(UsageError, match="'linear' is registered already"):
        register_family("linear", plain)
    with pytest.raises(UsageError, match="lacks bias"):
        configure("linear", (6,), 3, 1e6, {COST: 0.01})


def test_strided_convolutions_of_one_pixel_are_convolutions_of_every_second_one() -> None:
    """Written so because oneDNN crashes in the backward pass of the other form, on two threads."""
    head = build_head(HeadConfig("conv", {"widths": [12, 24], "kernel": 1, "strides": [1, 2]}), (16, 9, 8), 10)
    strided = head.features[1]
    x = torch.randn(4, 12, 9, 8, generator=torch.Generator().manual_seed(0))
    weight = next(m for m in strided if isinstance(m, nn.Conv2d)).weight
    torch.testing.assert_close(strided[1](strided[0](x)), nn.functional.conv2d(x, weight, stride=2))


LEARN_EACH = """
import random, sys, torch
from offramp.compiler import Training
from offramp.compiler.distill import fresh_head
from offramp.compiler.heads import configure, search_space
from offramp.compiler.learner import Learner
torch.set_num_threads(2)
random.seed(0)
space = search_space("conv")
for shape in [(16, 32, 32), (32, 16, 16), (64, 8, 8)] * 15:
    drawn = {key: random.choice(entry["_value"]) for key, entry in space.items()}
    config = configure("conv", shape, 10, 1e8, drawn)
    print(config, flush=True)
    value = torch.randn(33, *shape).contiguous(memory_format=torch.channels_last)
    learner = Learner(fresh_head(config, shape, 10, 0), 2, 1e-3, Training())
    learner.learn(torch.softmax(torch.randn(33, 10), 1), value)
print("all")
"""


def test_heads_of_the_space_learn_on_two_threads() -> None:
    """In a process of its own: some form of a convolution may crash the library below."""
    done = subprocess.run([sys.executable, "-c", LEARN_EACH], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "all", done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("edited", "says"),
    [
        ({"kernel": "3"}, "search space of conv, kernel: '3' means nothing to it; choose among 1, 3"),
        ({"kind": "Separable"}, "kind: 'Separable' means nothing to it; choose among plain, separable"),
        ({"stride": 0, "convolutions": 2}, "no head can be made of"),
        ({"dense": 3}, "3 dense layers, where 1 and 2 are known"),
        ({COST: "much"}, "no head can be made of"),
    ],
)
def test_an_edited_space_that_makes_no_head_is_refused(edited: Settings, says: str) -> None:
    choices = {k: e["_value"][-1] for k, e in search_space("conv").items()}
    with pytest.raises(UsageError, match=says):
        configure("conv", (4, 8, 8), 3, 1e6, {**choices, **edited})


@pytest.mark.parametrize("rate", ["x", 0.0, True, float("nan")])
def test_a_learning_rate_that_is_none_is_refused(rate: object) -> None:
    with pytest.raises(UsageError, match="is no learning rate"):
        learning_rate(Proposal(0, {"learning_rate": rate}), 1e-3)
