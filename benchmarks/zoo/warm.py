"""Imported once by the server that models' processes are forked from: what torch and we import on first use.

So no model's seconds hold another's imports. Two things make the sweep itself cheaper by a third: the exporter's
table of operators, which it builds anew for every stage, is built once; and what the imports left is not looked
through again by every model's garbage collections.
"""

from __future__ import annotations

import functools
import gc
import importlib

import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from offramp.compiler import capture
from offramp.compiler.emit import ALL_TARGETS, emit
from offramp.passes import find_candidates

from . import check as check
from .program import program_with_exits

for _library in ("torchvision.models", "timm", "transformers.modeling_utils", "transformers.masking_utils"):
    importlib.import_module(_library)
torch.set_num_threads(1)
_built_once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
setattr(ONNXRegistry, "from_torchlib", _built_once)  # noqa: B010  # typed as a method
_rows = torch.rand(8, 1, 3, 3)
_model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
_backbone = capture(_model, {"x": _rows})
emit(program_with_exits(_backbone, find_candidates(_backbone).kept[:1], (_rows,)), ALL_TARGETS)
gc.collect()
gc.freeze()
gc.set_threshold(200_000, 50, 1000)
