"""Candidates: the cuts where an exit is worth considering, and a reason for every node that is not.

A filter is a function `(node, context) -> reason or None`; the first that refuses a node gives its reason.
The rules, in the order they are asked:

1. single dominator   no path to the output goes round the node (else: which node bypasses it)
2. one tensor         a tuple is not a value a head can read
3. batch first        dimension 0 is exactly the batch symbol, the value is float32 of rank 2 to 4 and its
                      number of features does not vary
4. inference          dropout and batch norm only rescale what stands before them, unless that lies inside a
                      component (5) that they end
5. component          the value leaves a first-level component of the model (paper, 3.1), where components
                      are known; containers, and modules that are little more than a chain of equal
                      modules, are looked into
6. side inputs        what must travel with the rows can be compacted and stays within the byte bound
7. enough left        the compute behind it is worth skipping
8. not a duplicate    no compute lies between it and a neighbour that is cheaper to carry or read
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from .backbone import Backbone, depends_on_data, free_dimensions, is_size, is_view, module_path, value_name
from .cuts import Cut, ValueGraph, analyse, row_bytes

_AT_INFERENCE = {
    "batch_norm": "batch norm: only rescales its input at inference",
    "dropout": "dropout: disabled at inference",
}
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


@dataclass(frozen=True)
class Candidate:
    """A place where an exit may go."""

    name: str  # of the node in the backbone's graph
    place: str  # module path
    shape: tuple[int | str, ...]  # of the cut, dimension 0 is "batch"
    side_inputs: tuple[str, ...]
    side_bytes: int  # per row
    flops_before: float  # per row, spent when the cut is known
    flops_after: float  # per row, saved by leaving here


@dataclass(frozen=True)
class Refusal:
    """A node that is not a candidate, and why."""

    name: str
    place: str
    reason: str
    rule: str  # that refused it: a filter's name, or what else there is


@dataclass(frozen=True)
class Candidates:
    """Every node considered, in graph order."""

    kept: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class Limits:
    """Bounds the filters use."""

    least_left: float = 0.05  # share of the backbone's FLOPs that must remain behind a candidate
    side_bytes: int = 4 << 20  # per row


@dataclass(frozen=True, eq=False)
class Context:
    """What a filter may look at."""

    values: ValueGraph
    limits: Limits
    cuts: dict[fx.Node, Cut] = field(repr=False)

    @cached_property
    def dominators(self) -> frozenset[fx.Node]:
        return frozenset(self.values.dominators)

    @cached_property
    def components(self) -> frozenset[str]:
        """Module paths whose outputs count as boundaries; empty when the model has no modules."""
        return frozenset(first_level_components(self.values))


Filter = Callable[[fx.Node, Context], str | None]


def single_dominator(node: fx.Node, context: Context) -> str | None:
    if node in context.dominators:
        return None
    around, joins = context.values.bypass(node)
    return f"not a single dominator: {around.name if around else 'an input'} goes round it to {joins.name}"


def one_tensor(node: fx.Node, context: Context) -> str | None:
    return None if isinstance(node.meta.get("val"), torch.Tensor) else "holds several tensors; a head reads one"


def batch_first(node: fx.Node, context: Context) -> str | None:
    value: torch.Tensor = node.meta["val"]
    if not context.values.is_compactable(node):
        first = str(value.shape[0]) if value.dim() else "nothing"
        return f"dimension 0 is {first}, not the batch: rows cannot be dropped here"
    if value.dtype != torch.float32:
        return f"holds {value.dtype}; heads read float32"
    if any(depends_on_data(size) for size in value.shape):
        return "its size depends on the data"
    if not 2 <= value.dim() <= 4:
        return f"rank {value.dim()}: heads read [B, D], [B, T, D] or [B, C, H, W]"
    features = 1 if value.dim() == 4 else value.dim() - 1
    if not isinstance(value.shape[features], int):
        return f"dimension {features} varies: heads read a fixed number of features there"
    return None


def changes_at_inference(node: fx.Node, context: Context) -> str | None:
    origin = node.args[0] if node.target is operator.getitem else node
    assert isinstance(origin, fx.Node)
    why = next((why for name, why in _AT_INFERENCE.items() if name in str(origin.target)), None)
    if why is None:
        return None
    before = origin.args[0]
    ends = isinstance(before, fx.Node) and leaves_component(before, context) and not leaves_component(node, context)
    return None if ends else why


def leaves_component(node: fx.Node, context: Context) -> str | None:
    if not context.components:
        return None
    own = [path for path in _stack(node) if path in context.components]
    if not own or any(path not in _stack(user) for path in own for user in node.users):
        return None
    following = next(iter(node.users))
    if len(node.users) == 1 and _only_rearranges(following) and batch_first(following, context) is not None:
        return leaves_component(following, context)  # what leaves is the same numbers in an order no head reads
    return f"inside {own[-1]}: not at the boundary of a first-level component"


def _only_rearranges(node: fx.Node) -> bool:
    """The same numbers in another order or shape."""
    return is_view(node) or node.target is torch.ops.aten.reshape.default


def side_inputs(node: fx.Node, context: Context) -> str | None:
    cut = context.cuts[node] = context.values.cut(node)
    if cut.stuck and is_size(cut.stuck[0]):
        return f"the size {cut.stuck[0].meta['val']} is read behind it, and nothing that can travel has it"
    if cut.stuck:
        return f"{cut.stuck[0].name} is read behind it and its dimension 0 is not the batch"
    if cut.side_bytes > context.limits.side_bytes:
        names = ", ".join(value_name(n) for n in cut.side_inputs)
        bound = context.limits.side_bytes
        return f"side inputs {names} take {cut.side_bytes:,} bytes a row, over the bound of {bound:,}"
    return None


def enough_left(node: fx.Node, context: Context) -> str | None:
    total = context.values.total_flops()
    left = 1 - context.values.flops_until(node) / total if total else 0.0
    if left < context.limits.least_left:
        return f"only {left:.1%} of the compute is left behind it"
    return None


FILTERS: tuple[Filter, ...] = (
    single_dominator,
    one_tensor,
    batch_first,
    changes_at_inference,
    leaves_component,
    side_inputs,
    enough_left,
)


def find_candidates(
    backbone: Backbone, *, filters: Sequence[Filter] = FILTERS, limits: Limits | None = None
) -> Candidates:
    """`Backbone` (normalised) -> every node considered, kept or refused with a reason."""
    values = analyse(backbone)
    context = Context(values, limits or Limits(), {})
    kept: list[fx.Node] = []
    reasons: dict[fx.Node, tuple[str, str]] = {}  # and the rule
    considered = [n for n in backbone.graph.nodes if n in values.graph and n.op == "call_function"]
    for node in considered:
        why = next(((r, f.__name__) for f in filters if (r := f(node, context)) is not None), None)
        if why is None:
            kept.append(node)
        else:
            reasons[node] = why
    for node, better in _duplicates(kept, values):
        kept.remove(node)
        reasons[node] = f"duplicate of its neighbour {better.name}: no compute lies between them", "duplicate"
    total = values.total_flops()
    return Candidates(
        kept=tuple(_candidate(n, context, total) for n in kept),
        refused=tuple(Refusal(n.name, module_path(n), *reasons[n]) for n in considered if n in reasons),
    )


def _candidate(node: fx.Node, context: Context, total: float) -> Candidate:
    cut = context.cuts.get(node) or context.values.cut(node)
    before = context.values.flops_until(node)
    words = free_dimensions(context.values.backbone)
    sizes = node.meta["val"].shape[1:]
    shape = ("batch", *(int(s) if isinstance(s, int) else words.get(str(s), str(s)) for s in sizes))
    sides = tuple(value_name(n) for n in cut.side_inputs)
    return Candidate(node.name, module_path(node), shape, sides, cut.side_bytes, before, total - before)


def _duplicates(kept: Sequence[fx.Node], values: ValueGraph) -> list[tuple[fx.Node, fx.Node]]:
    """(refused, kept instead) within runs of candidates with no compute between them.

    Of a run the one that is cheapest to carry stays; between equals a higher rank (a map says more than its
    flattened copy), then the later one (after the activation).
    """
    runs: dict[float, list[fx.Node]] = defaultdict(list)
    for node in kept:
        runs[values.flops_until(node)].append(node)
    duplicates = []
    for run in runs.values():
        best = min(run, key=lambda n: (row_bytes(n.meta["val"]), -n.meta["val"].dim(), -values.order[n]))
        duplicates += [(n, best) for n in run if n is not best]
    return duplicates


def _stack(node: fx.Node) -> list[str]:
    """Module paths around a node, outermost first, the root left out."""
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]


def first_level_components(values: ValueGraph) -> set[str]:
    """Paths of the modules whose outputs count as component boundaries.

    Starting from the model's children these are looked into, and their children count as well: a container, a
    module with more than half of the model's compute, a module almost all of whose compute lies in several children
    of one class, and a module half of whose compute lies in a container of several blocks of one class, a block
    being a module of modules of modules.
    """
    tree = _ModuleTree(values)
    components: set[str] = set()
    todo = list(tree.children[""])
    while todo:
        path = todo.pop()
        components.add(path)
        if tree.is_container(path) or tree.is_chain(path) or tree.is_wrapper(path) or tree.is_stage(path):
            todo += list(tree.children[path])
    return components


class _ModuleTree:
    """The modules that the backbone's nodes come from: class, compute and children of each, by path."""

    def __init__(self, values: ValueGraph) -> None:
        self.compute: dict[str, float] = defaultdict(float)
        self.kinds: dict[str, str] = {}
        self.children: dict[str, dict[str, None]] = defaultdict(dict)
        self.total = values.total_flops()
        for node in values.backbone.graph.nodes:
            above = ""
            for path, kind in (node.meta.get("nn_module_stack") or {}).values():
                if not path:
                    continue
                self.kinds[path] = kind if isinstance(kind, str) else kind.__name__
                self.compute[path] += values.flops.get(node.name, 0.0)
                self.children[above][path] = None
                above = path

    def is_container(self, path: str) -> bool:
        return self.kinds[path].endswith(_CONTAINERS)

    def is_chain(self, path: str) -> bool:
        below = self._below(path)
        return self._repeated(below) and sum(self.compute[c] for c in below) >= 0.9 * self.compute[path]

    def is_wrapper(self, path: str) -> bool:
        return bool(self._below(path)) and self.total > 0 and self.compute[path] > self.total / 2

    def is_stage(self, path: str) -> bool:
        for child in self.children[path]:
            blocks = [c for c in self.children[child] if self._depth(c) >= 2]
            if self.is_container(child) and self._repeated(blocks) and self.compute[child] >= self.compute[path] / 2:
                return True
        return False

    def _below(self, path: str) -> list[str]:
        """Children that hold modules, or would."""
        return [c for c in self.children[path] if self.children[c] or self.is_container(c)]

    def _repeated(self, paths: Sequence[str]) -> bool:
        return max(Counter(self.kinds[p] for p in paths).values(), default=0) > 1

    def _depth(self, path: str) -> int:
        """How many levels of modules lie below; `defaultdict` must not grow here."""
        return max((1 + self._depth(c) for c in self.children.get(path, ())), default=0)
