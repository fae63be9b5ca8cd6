"""What is computed from weights alone is computed once."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import torch
from models import captured, with_exits
from torch import nn
from torch.nn import functional as F

from offramp.compiler.emit import backbone_model
from offramp.passes import Backbone, FoldWeights, find_candidates, violations
from offramp.passes.backbone import is_size
from offramp.passes.candidates import Limits
from offramp.passes.folding import foldable, numbers

aten = torch.ops.aten


class Standardised(nn.Conv2d):
    """Weight standardisation as timm writes it: a batch norm in training mode over the weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Normaliser(nn.Sequential):
    def __init__(self) -> None:
        layers = [Standardised(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3)]
        super().__init__(*[m for layer in layers for m in (layer, nn.ReLU())], nn.Flatten(), nn.Linear(128, 4))


class Biased(nn.Module):
    """Adds a bias that is spread out from a table, one that is a sum, one that is only turned, one drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turned = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(4, 6))
        self.bias, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spread = self.table.exp().repeat(3)
        return self.last(x + spread + (self.bias + self.shift)) + F.linear(x, self.turned.t().t())


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def targets(backbone: Backbone) -> set[object]:
    return {node.target for node in backbone.graph.nodes}


def test_standardised_weights_become_weights() -> None:
    torch.manual_seed(0)
    model = Normaliser().eval()
    backbone = captured(model, x=images())
    assert not any("batch_norm" in str(target) for target in targets(backbone))
    assert {"0.weight_folded", "2.weight_folded", "4.weight_folded"} <= targets(backbone)
    assert "0.weight" not in dict(backbone.graph_module.named_parameters())
    assert backbone.parameters() == sum(p.numel() for p in model.parameters())
    assert "weight_folded" not in dict(model.named_parameters()), "the model itself stays as it was"
    torch.testing.assert_close(backbone.graph_module(images(3)), model(images(3)))


def test_a_program_of_standardised_weights_keeps_every_rule() -> None:
    torch.manual_seed(0)
    backbone = captured(Normaliser(), x=images())
    places = [c.name for c in find_candidates(backbone, limits=Limits(least_left=0.0)).kept][:2]
    assert len(places) == 2
    assert violations(with_exits(backbone, places)) == []


def test_only_what_pays_is_folded() -> None:
    torch.manual_seed(0)
    model = Biased().eval()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    backbone = captured(model, x=x)
    made = {name.rpartition(".")[2] for name, _ in backbone.graph_module.named_parameters()}
    assert "bias_folded" in made, "a sum of two weights is as large as either"
    assert "turned" in made, "a view of a weight costs nothing at run time"
    assert "table" in made
    assert aten.repeat.default in targets(backbone), "six numbers made of two would grow the artifact"
    assert foldable(backbone) == {}
    torch.testing.assert_close(backbone.graph_module(x), model(x))


def test_what_is_drawn_at_random_is_not_a_weight() -> None:
    backbone = captured(nn.Linear(6, 4))
    graph = backbone.graph
    weight, output = next(n for n in graph.nodes if n.target == "weight"), next(reversed(graph.nodes))
    with graph.inserting_after(weight):
        noise = graph.call_function(aten.rand_like.default, (weight,))
    noise.meta["val"] = weight.meta["val"]
    output.args[0].replace_input_with(weight, noise)
    graph.lint()
    result = FoldWeights()(backbone)
    assert not result.modified
    assert foldable(result.subject) == {}


class Scaled(nn.Module):
    """Divides by a temperature that is a buffer, as a number, and by one that is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hot = torch.relu(self.first(x)) / (self.temperature.exp().item() + 1)
        return self.last(hot) / self.temperature.item()


def test_numbers_read_out_of_weights_are_written_down() -> None:
    backbone = captured(Scaled)
    assert not numbers(backbone)
    assert not any(is_size(node) for node in backbone.graph.nodes if node.op == "call_function")
    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(5, 6)
    torch.testing.assert_close(backbone.graph_module(x), model(x))
    (first, *_) = find_candidates(backbone, limits=Limits(least_left=0.0)).kept
    program = with_exits(backbone, [first.name], [2.0])
    torch.testing.assert_close(program(x)[0], model(x).softmax(1))
    plain = ort.InferenceSession(backbone_model(backbone).proto, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(plain.run(None, {"x": x.numpy()})[0], model(x).softmax(1).detach().numpy(), atol=1e-6)
