"""Floating-point operations, per node and per row.

Counted by torch's `FlopCounterMode` (a multiply and an add are two) on the meta device: on CPU the counter
gives 0 for fused attention. Operations without a formula there (activations, norms, pooling) count 0, as in
the papers; so do those that the meta device cannot run, because the size of their result depends on the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .backbone import captured_size, depends_on_data

_BATCH = 2


class _NodeCounter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode, batch_symbol: str) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.counter = counter
        self.batch_symbol = batch_symbol
        self.flops: dict[str, float] = {}
        self.sized_by_data = any(depends_on_data(n.meta.get("val")) for n in module.graph.nodes)

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        try:
            value = super().run_node(n)
        except RuntimeError as error:  # which NotImplementedError is
            # Sizes that only values tell do not fit together here, each counted as one.
            if not (isinstance(error, NotImplementedError) or self.sized_by_data):
                raise
            value = pytree.tree_map(self._stand_in, n.meta["val"])
        self.flops[n.name] = (self.counter.get_total_flops() - before) / _BATCH
        return value

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return meta_like(value, self.batch_symbol)
        return 1 if depends_on_data(value) else value

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return super().call_function(target, args, kwargs)


def meta_like(value: torch.Tensor, batch_symbol: str, batch: int = _BATCH) -> torch.Tensor:
    """A meta tensor shaped like a fake value: the batch symbol becomes `batch`, others their captured size.

    A size that depends on the data has none; it counts as one per row.
    """
    shape = [batch if str(s) == batch_symbol or depends_on_data(s) else captured_size(s) for s in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")


def node_flops(module: fx.GraphModule, batch_symbol: str) -> dict[str, float]:
    """FLOPs per row of every node, by node name, at the sizes the model was captured with."""
    inputs = [meta_like(node.meta["val"], batch_symbol) for node in module.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        interpreter = _NodeCounter(module, counter, batch_symbol)
        interpreter.run(*inputs)
    return interpreter.flops


def module_flops(module: nn.Module, *shapes: tuple[int, ...]) -> int:
    """FLOPs per row of a module on float inputs of the given shapes, batch dimension left out."""
    training = module.training
    module.eval()
    state = {name: tensor.to("meta") for name, tensor in module.state_dict(keep_vars=True).items()}
    inputs = tuple(torch.empty((_BATCH, *shape), device="meta") for shape in shapes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, state, inputs)
    module.train(training)
    return int(counter.get_total_flops()) // _BATCH
