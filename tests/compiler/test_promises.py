"""What torch promises of an operator holds in ONNX too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import captured
from torch import nn
from torch.nn import functional as F

from offramp.compiler.emit import backbone_model

TOKENS, WINDOW = 6, 2


def assert_same_in_onnx(model: nn.Module, atol: float = 1e-5, rtol: float = 0.0, **inputs: torch.Tensor) -> None:
    """The emitted backbone's probabilities are the model's, for all the rows and for one."""
    model.eval()
    backbone = captured(model, **inputs)
    session = ort.InferenceSession(backbone_model(backbone).proto, providers=["CPUExecutionProvider"])
    for count in (len(next(iter(inputs.values()))), 1):
        rows = {name: x[:count] for name, x in inputs.items()}
        with torch.no_grad():
            expected = torch.softmax(model(**rows), 1)
        found = session.run(None, {name: x.numpy() for name, x in rows.items()})[0]
        np.testing.assert_allclose(found, expected.numpy(), atol=atol, rtol=rtol)


class Windowed(nn.Module):
    """Every token attends to itself and the one before, if they are there; all tokens are averaged in the end."""

    def __init__(self, minus_infinity: bool) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(4, 12), nn.Linear(4, 3)
        self.minus_infinity = minus_infinity
        place = torch.arange(TOKENS)
        self.register_buffer("window", ((place[:, None] - place[None]) < WINDOW) & (place[:, None] >= place[None]))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        allowed = (self.window & mask.bool()[:, None, :])[:, None]
        if self.minus_infinity:
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        query, key, value = self.mix(x)[:, None].chunk(3, dim=-1)
        return self.last(F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).mean((1, 2)))


@pytest.mark.parametrize("minus_infinity", [False, True])
def test_a_token_with_nothing_to_attend_to_gets_zeros(minus_infinity: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, TOKENS, 4, generator=generator)
    length = torch.tensor([1, 2, 3, 4, 5, 6, 2, 3])
    mask = (torch.arange(TOKENS) < length[:, None]).long()
    torch.manual_seed(0)
    assert_same_in_onnx(Windowed(minus_infinity), x=x, mask=mask)


class TinyEpsilon(nn.Module):
    """A root-mean-square norm whose epsilon is all that is left of a row of zeros."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon, self.last = epsilon, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class TinyWeight(TinyEpsilon):
    """The same, its epsilon a weight without dimensions."""

    def __init__(self, epsilon: float) -> None:
        super().__init__(epsilon)
        self.register_buffer("held", torch.tensor(epsilon, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x * torch.rsqrt(self.held + x.pow(2).mean(-1, keepdim=True)))


class TinyLess(TinyEpsilon):
    """The same, less the number's negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - -self.epsilon))


class NearlyOne(nn.Module):
    """Numbers so close to one that they are taken for it, told apart by what is left of their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((x * 1.000007 - x) * 1e5 + (x / 1.000007 - x) * 3e5)


def test_a_number_that_is_nearly_one_is_not_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(NearlyOne(), x=x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("norm", [TinyEpsilon, TinyWeight, TinyLess])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-8, 1e-12, 1e-20, torch.finfo(torch.float32).tiny])
def test_a_tiny_number_added_is_not_nothing(norm: type[TinyEpsilon], epsilon: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)) * 1e-5
    x[3:5] = 0
    assert_same_in_onnx(norm(epsilon), x=x, rtol=1e-4, atol=1e-6)


class Blocks(nn.Module):
    """Attention within blocks beside heads, as NesT does it, and once with the heads folded into the batch."""

    def __init__(self, dimensions: int, masked: bool) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(4, 12), nn.Linear(4, 3)
        self.shape = {3: (4,), 5: (2, 2, 1)}[dimensions]
        self.register_buffer("seen", torch.ones(TOKENS, TOKENS).tril().bool() if masked else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(x)[:, None].expand(-1, 4, -1, -1).unflatten(1, self.shape).chunk(3, dim=-1)
        if len(self.shape) == 1:
            query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=self.seen)
        return self.last(attended.reshape(x.size(0), -1, 4).mean(1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dimensions", [3, 5])
def test_attention_over_any_number_of_dimensions(dimensions: int, masked: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(Blocks(dimensions, masked), x=x)


class Attends(nn.Module):
    """Two heads, with what else attention may be told."""

    def __init__(self, **told: Any) -> None:
        super().__init__()
        self.mix, self.last, self.told = nn.Linear(4, 24), nn.Linear(4, 3), told

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        if self.told.get("enable_gqa"):
            key, value = key[:, :1], value[:, :1]
        return self.last(F.scaled_dot_product_attention(query, key, value, **self.told).mean((1, 2)))


@pytest.mark.parametrize("told", [{}, {"scale": 3.0}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_attention_as_it_is_told(told: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(Attends(**told), x=x)


class Bent(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.mix, self.bend, self.last = nn.Linear(6, 8), nn.GELU(approximate), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.bend(self.mix(x)))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(Bent(approximate), x=x * 3)


def test_onnxruntime_fuses_gelu(tmp_path: Path) -> None:
    backbone = captured(Bent("none").eval(), x=torch.randn(8, 6))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    ort.InferenceSession(backbone_model(backbone).proto, options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert operators & {"Gelu", "BiasGelu"}
    assert "Erf" not in operators


class Less(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.rsub(x, 2.0) + torch.rsub(x, 0.5, alpha=3.0))


def test_a_number_less_a_tensor() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(Less(), x=x)


class Pooled(nn.Module):
    """BiT's stem: a map, negative at its border as well, padded with a number and pooled."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.stem, self.value, self.last = nn.Conv2d(1, 4, 3), value, nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(self.stem(x) - 2.0, (1, 1, 0, 2), value=self.value)
        return self.last(F.max_pool2d(padded, 3, 2).mean(3).flatten(1))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_padded_map_is_pooled_with_its_padding(value: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(Pooled(value), x=x)


class Clipped(nn.Module):
    """One value clipped between several pairs of learned bounds, as before every projection of Gemma 4."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.low, self.high = nn.Parameter(-torch.arange(1.0, 4.0) / 2), nn.Parameter(torch.arange(1.0, 4.0) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2.0
        bounds = zip(self.low.unbind(), self.high.unbind(), strict=True)
        return sum((self.last(torch.clamp(x, low, high)) for low, high in bounds), torch.zeros(3))


def test_one_value_clipped_several_times() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    assert_same_in_onnx(Clipped(), x=x)
