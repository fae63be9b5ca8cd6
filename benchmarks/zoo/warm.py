"""Imported once by the server that models' processes are forked from: what torch and we import on first use.

So no model's seconds hold another's imports.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from offramp.compiler import capture
from offramp.passes import find_candidates

from . import check as check

for _library in ("torchvision.models", "timm", "transformers.modeling_utils", "transformers.masking_utils"):
    importlib.import_module(_library)
torch.set_num_threads(1)
find_candidates(
    capture(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)), {"x": torch.rand(2, 1, 3, 3)})
)
