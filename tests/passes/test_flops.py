"""FLOPs: a multiply and an add are two; fused attention counts; nothing is allocated or changed."""

from __future__ import annotations

import torch
from models import Attention, Chain, captured, rows, sentences
from torch import nn

from offramp.passes import module_flops, node_flops


def test_dense_layers() -> None:
    backbone = captured(Chain)
    counted = node_flops(backbone.graph_module, backbone.batch_symbol)
    assert {name: n for name, n in counted.items() if n} == {
        "linear": 2 * 6 * 16,
        "linear_1": 2 * 16 * 16,
        "linear_2": 2 * 16 * 4,
    }


def test_convolutions() -> None:
    assert module_flops(nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 9)) == 2 * (3 * 3 * 3) * 8 * 5 * 5


def test_fused_attention() -> None:
    """Four heads' worth of scores and of weighted values, on a CPU backbone."""
    backbone = captured(Attention, **sentences(8))
    counted = node_flops(backbone.graph_module, backbone.batch_symbol)
    heads, tokens, width = 2, 5, 4
    assert counted["scaled_dot_product_attention"] == 2 * 2 * heads * tokens * tokens * width


def test_counting_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert module_flops(module, (6,)) == 2 * 6 * 4
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module(rows(3)).device.type == "cpu"
