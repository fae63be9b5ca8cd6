"""Pixels that nothing reads: neither computed nor carried, and the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import captured
from torch import nn
from torch.nn import functional as F

from offramp.compiler.emit import backbone_model, stage_models
from offramp.compiler.emit.unread import EVERY, without_unread
from offramp.passes import Backbone, ExitPlan, ExitProgram, PlannedExit, build_program, find_candidates

SIZE = 14
aten = torch.ops.aten


class Bottleneck(nn.Module):
    """As in the first ResNets: a block's stride is in its first convolution, of 1 x 1, and in its shortcut's."""

    def __init__(self, entering: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(entering, width, 1, stride, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.third = nn.Conv2d(width, 2 * width, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (width, width, 2 * width))
        self.shortcut = nn.Conv2d(entering, 2 * width, 1, stride) if stride > 1 or entering != 2 * width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = F.relu(self.norms[0](self.first(x)))
        found = F.relu(self.norms[1](self.second(found)))
        return F.relu(self.norms[2](self.third(found)) + (x if self.shortcut is None else self.shortcut(x)))


class Layers(nn.Module):
    """A stem and three layers of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        for index, (entering, width, stride) in enumerate([(16, 8, 1), (16, 16, 2), (32, 32, 2)]):
            layer = nn.Sequential(Bottleneck(entering, width, stride), Bottleneck(2 * width, width))
            self.add_module(f"layer{index}", layer)
        self.last = nn.Linear(64, 4)
        for name, values in self.state_dict().items():
            if "norms" in name and values.is_floating_point():
                values.uniform_(0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for layer in (self.layer0, self.layer1, self.layer2):
            x = layer(x)
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return captured(Layers().eval(), x=torch.rand(4, 3, SIZE, SIZE))


def images(size: int = SIZE) -> torch.Tensor:
    return torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(1))


def exits_at(backbone: Backbone, places: Sequence[str]) -> ExitProgram:
    """Heads that read every pixel."""
    cuts = {c.place: c for c in find_candidates(backbone).kept if c.place in places}
    heads = {}
    for place in places:
        shape = next(n for n in backbone.graph.nodes if n.name == cuts[place].name).meta["val"].shape
        heads[cuts[place].name] = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2] * shape[3], 4))
    plan = ExitPlan(tuple(PlannedExit(cuts[place].name, 1.0, 0.5) for place in places))
    return build_program(backbone, plan, heads)


def strides(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Of those convolutions that have longer ones than 1, by their place."""
    found = {
        node.name.removesuffix("/Conv"): list(one.ints)
        for node in model.graph.node
        if node.op_type == "Conv"
        for one in node.attribute
        if one.name == "strides"
    }
    return {name: stride for name, stride in found.items() if stride != [1, 1]}


def answers(models: Sequence[onnx.ModelProto], rows: torch.Tensor) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """What the stages say, one after the other, and the shapes of what goes from each to the next."""
    live, said, shapes = {"x": rows.numpy()}, [], []
    for model in models:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = dict(zip([one.name for one in session.get_outputs()], session.run(None, live), strict=True))
        said.append(values.pop("probabilities"))
        del values["confidence"]
        shapes += [value.shape for value in values.values()]
        live = values
    return np.stack(said), shapes


@pytest.mark.parametrize(
    ("places", "carried", "expected"),
    [
        (["layer0.0"], [(16, 14, 14)], [{}, {"layer0.1.second": [2, 2], "layer1.1.second": [2, 2]}]),
        (["layer0.1"], [(16, 7, 7)], [{}, {"layer1.1.second": [2, 2]}]),
        (["layer0.1", "layer1.1"], [(16, 7, 7), (32, 4, 4)], [{}, {}, {}]),
        (["layer1.0"], [(32, 7, 7)], [{"layer0.1.second": [2, 2]}, {"layer1.1.second": [2, 2]}]),
    ],
)
def test_what_is_not_read_is_not_there(
    backbone: Backbone, places: Sequence[str], carried: list[tuple[int, ...]], expected: list[dict[str, list[int]]]
) -> None:
    program, rows = exits_at(backbone, places), images()
    models = stage_models(program)
    said, shapes = answers(models, rows)
    assert [shape[1:] for shape in shapes] == carried
    assert [strides(model) for model in models] == expected
    np.testing.assert_allclose(said, program.all_exits(rows).detach().numpy(), atol=1e-6)


def test_the_plain_backbone_stays_as_it_came(backbone: Backbone) -> None:
    plain, laid = (onnx.load_from_string(backbone_model(backbone, rewritten=blocks).proto) for blocks in (False, True))
    assert strides(plain) == {f"layer{n}.0.{name}": [2, 2] for n in (1, 2) for name in ("first", "shortcut")}
    assert strides(laid) == {f"layer{n}.1.second": [2, 2] for n in (0, 1)}
    feed = {"x": images().numpy()}
    one, other = (
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for model in (plain, laid)
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


class Small(nn.Module):
    """A map `[B, 8, H, W]` made by a convolution, and what a test makes of it."""

    def __init__(self, read: Callable[[Small, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.read = read
        self.before = nn.Conv2d(3, 8, 3, padding=1)
        self.by_two, self.by_three = nn.Conv2d(8, 4, 1, 2), nn.Conv2d(8, 4, 1, 3)
        self.padded, self.wide = nn.Conv2d(8, 4, 1, 2, padding=1), nn.Conv2d(8, 4, 2, 2)
        self.mixed, self.two_by_three = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1, (2, 3))
        self.around = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 8, 3)
        self.line = nn.Parameter(torch.rand(SIZE))
        self.channels = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, x)


def squeezed(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x.mean((2, 3), keepdim=True))


READ_WHOLE: dict[str, Callable[[Small, torch.Tensor], torch.Tensor]] = {
    "different steps": lambda m, x: m.by_two(y := m.before(x)).sum() + m.by_three(y).sum(),
    "padding": lambda m, x: m.padded(m.before(x)),
    "larger kernel": lambda m, x: m.wide(m.before(x)),
    "output": lambda m, x: torch.cat([m.by_two(y := m.before(x)).flatten(1), y.flatten(1)], 1),
    "transposed": lambda m, x: m.by_two(m.up(x)),
    "spread along W": lambda m, x: m.by_two(m.before(x) * m.line),
    "an input": lambda m, x: m.by_two(torch.cat([x, x, x[:, :2]], 1)),
}
THINNED: dict[str, tuple[Callable[[Small, torch.Tensor], torch.Tensor], list[list[int]]]] = {
    "by two": (lambda m, x: m.by_two(F.gelu(m.before(x))), [[2, 2], [1, 1]]),
    "by two and three": (lambda m, x: m.two_by_three(m.before(x)), [[2, 3], [1, 1]]),
    "through another": (lambda m, x: m.by_three(F.silu(m.mixed(m.before(x)))), [[3, 3], [1, 1], [1, 1]]),
    "channels": (lambda m, x: m.by_two(m.before(x) * m.channels + 1.0), [[2, 2], [1, 1]]),
    "gate": (lambda m, x: m.by_two((y := m.before(x)) * squeezed(y)), [[1, 1], [1, 1]]),
    "itself": (lambda m, x: m.by_two((y := m.before(x)) + y), [[2, 2], [1, 1]]),
    "both of a sum": (lambda m, x: m.by_two((y := m.before(x)) + m.mixed(F.relu(y))), [[2, 2], [1, 1], [1, 1]]),
    "one of a sum": (lambda m, x: m.by_two((y := m.before(x)) + m.around(F.relu(y))), [[1, 1], [2, 2], [1, 1]]),
}  # fmt: skip


def graph_of(model: nn.Module, size: int = SIZE) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    module = torch.export.export(model.eval(), (images(size),)).run_decompositions({}).module()
    assert isinstance(module, torch.fx.GraphModule)
    return module


def given_strides(module: torch.fx.GraphModule) -> list[list[int]]:
    """Of convolutions in the graph's order."""
    convolutions = module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    return [list(node.args[3]) if len(node.args) > 3 else [1, 1] for node in convolutions]


@pytest.mark.parametrize("read", READ_WHOLE.values(), ids=READ_WHOLE)
def test_a_map_that_is_read_otherwise_is_made_whole(read: Callable[[Small, torch.Tensor], torch.Tensor]) -> None:
    module = graph_of(Small(read))
    thinned, _ = without_unread(module)
    assert [node.target for node in thinned.graph.nodes] == [node.target for node in module.graph.nodes]
    assert given_strides(thinned) == given_strides(module)


@pytest.mark.parametrize("size", [SIZE, 11])
@pytest.mark.parametrize(("read", "expected"), THINNED.values(), ids=THINNED)
def test_a_map_of_which_single_pixels_are_read_is_made_of_them(
    read: Callable[[Small, torch.Tensor], torch.Tensor], expected: list[list[int]], size: int
) -> None:
    module = graph_of(Small(read), size)
    thinned, step = without_unread(module)
    assert step == EVERY, "no cut was named"
    assert given_strides(thinned) == expected
    torch.testing.assert_close(thinned(images(size))[0], module(images(size)))
    for node in thinned.graph.nodes:
        if node.target is aten.conv2d.default:
            made = node.target(*(a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args))
            assert node.meta["val"].shape == made.shape, "later passes read shapes"


def test_the_older_operator_of_convolutions_is_known_too() -> None:
    for read, expected in ((THINNED["by two"][0], [[2, 2], [1, 1]]), (READ_WHOLE["transposed"], [[1, 1], [2, 2]])):
        torch.manual_seed(0)
        exported = torch.export.export(Small(read).eval(), (images(),)).run_decompositions()
        module = exported.module()
        assert isinstance(module, torch.fx.GraphModule)
        thinned, _ = without_unread(module)
        convolutions = thinned.graph.find_nodes(op="call_function", target=aten.convolution.default)
        assert [list(node.args[3]) for node in convolutions] == expected
        torch.testing.assert_close(thinned(images())[0], module(images()))
