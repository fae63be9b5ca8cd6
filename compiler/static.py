"""The smaller static model: what a person could deploy in place of early exits, judged on the same rows.

It is captured as the backbone is, from the same rows, so that it is refused before any training; it is never
trained, compiled or packed.

Refused: rows it does not run on (InputError), other classes than the backbone's, and what `capture` refuses
(ModelError).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from offramp.passes import Backbone, node_flops
from offramp.runtime.data import Rows
from offramp.runtime.errors import ModelError
from offramp.runtime.manifest import StaticEvaluation

from .capture import capture
from .evaluate import regret
from .record import record
from .signature import Signature


def capture_static(
    model: nn.Module | ExportedProgram,
    example: Mapping[str, torch.Tensor],
    name: str | None,
    backbone: Backbone,
    said: Signature,
) -> Backbone:
    """The static model and example inputs by name -> its graph, if it answers what `backbone` answers.

    What was `said` of the backbone's outputs is tried where the model does not speak for itself.
    """
    title = name or f"static {type(model).__name__}"
    try:
        static = capture(model, example, name=title)
    except ModelError:
        if said.output is None and said.scores is None:
            raise
        static = capture(model, example, name=title, output=said.output, scores=said.scores)
    if static.classes != backbone.classes:
        raise ModelError(
            f"{static.name} answers {static.classes} classes, {backbone.name} {backbone.classes}; "
            "compare with a model trained for the same classes"
        )
    return static


def evaluate_static(
    static: Backbone, data: Rows, rows: np.ndarray, backbone: np.ndarray, labels: np.ndarray | None
) -> StaticEvaluation:
    """Run it over `rows` of `data`; `backbone` [rows, K] holds the backbone's probabilities for them."""
    classes = record(static, [], data, rows, "static model").backbone_classes
    return StaticEvaluation(
        name=static.name,
        parameters=static.parameters(),
        flops=float(sum(node_flops(static.graph_module, static.batch_symbol).values())),
        disagreement=float((classes != backbone.argmax(1)).mean()),
        regret=float(regret(backbone, classes).mean()),
        accuracy=None if labels is None else float((classes == labels).mean()),
    )
