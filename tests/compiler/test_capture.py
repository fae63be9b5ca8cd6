"""Capture: any way a model may be given leads to the same backbone, and what cannot be captured says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Chain, captured, rows
from torch import nn
from torch.export import Dim, export

from offramp.compiler import capture, load_model
from offramp.compiler.outputs import detect_scores
from offramp.runtime.errors import BatchDependentError, InputError, ModelError


class Two(Chain):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x * scale)


def test_a_single_input_may_have_any_name() -> None:
    assert [i.name for i in captured(Chain, whatever=rows(4)).inputs] == ["x"]
    assert [i.name for i in captured(Chain, x=rows(4)).inputs] == ["x"]


def test_several_inputs_go_by_name_in_any_order() -> None:
    torch.manual_seed(0)
    model, x, scale = Two(), rows(4), rows(4, seed=1)
    backbone = capture(model, {"scale": scale, "x": x})
    given = {"x": x, "scale": scale}
    torch.testing.assert_close(backbone.graph_module(*(given[i.name] for i in backbone.inputs)), model(x, scale))
    with pytest.raises(InputError, match=r"Two.forward has no parameter depth; it has x, scale"):
        capture(model, {"x": x, "depth": scale})


def test_the_backbone_is_the_model_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4))
    model(rows(50))  # moves the running statistics
    model.train()
    model[3].eval()
    backbone = capture(model, {"x": rows(4)})
    assert [m.training for m in model] == [True, True, True, False, True]
    assert model.training
    torch.testing.assert_close(backbone.graph_module(rows(5)), model.eval()(rows(5)))
    assert (backbone.classes, backbone.scores, backbone.name) == (4, "logits", "Sequential")


def test_capturing_twice_gives_the_same_backbone() -> None:
    assert captured(Chain).fingerprint() == captured(Chain).fingerprint()
    torch.manual_seed(1)
    assert capture(Chain(), {"x": rows(8)}).fingerprint() != captured(Chain).fingerprint()


def test_the_number_of_example_rows_leaves_no_trace() -> None:
    assert captured(Chain, x=rows(2)).fingerprint() == captured(Chain, x=rows(7)).fingerprint()


@pytest.mark.parametrize(
    ("last", "kind"),
    [(nn.Identity(), "logits"), (nn.Softmax(1), "probabilities"), (nn.LogSoftmax(1), "log_probabilities")],
)
def test_the_kind_of_score_is_found(last: nn.Module, kind: str) -> None:
    assert captured(nn.Sequential(Chain(), last)).scores == kind


def test_positive_logits_are_still_logits() -> None:
    assert detect_scores(torch.tensor([[1.0, 2.0], [0.5, 0.5]])) == "logits"


def test_buffers_and_parameter_lists_come_along() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
            self.register_buffer("mean", torch.randn(6), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = torch.relu((x - self.mean) @ weight)
            return x

    model = Odd()
    backbone = capture(model, {"x": rows(4)})
    torch.testing.assert_close(backbone.graph_module(rows(3)), model(rows(3)))
    assert backbone.parameters() == 72


def saved(model: nn.Module, path: Path, dynamic: bool) -> Path:
    shapes = {"x": {0: Dim("batch")}} if dynamic else None
    torch.export.save(export(model.eval(), (rows(4),), dynamic_shapes=shapes), path)
    return path


def test_a_saved_program_is_the_same_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(Chain(), tmp_path / "model.pt2", dynamic=True)
    backbone = capture(load_model(str(path)), {"x": rows(4)})
    torch.testing.assert_close(backbone.graph_module(rows(5)), captured(Chain).graph_module(rows(5)))
    assert backbone.batch_symbol


def test_a_saved_program_with_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    path = saved(Chain(), tmp_path / "model.pt2", dynamic=False)
    with pytest.raises(ModelError, match=r"input x has the fixed batch size 4; export it with a dynamic dimension 0"):
        capture(load_model(str(path)), {"x": rows(4)})


class Output(Chain):
    """Turns the scores into something else."""

    def __init__(self, turn: object) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, x: torch.Tensor) -> object:
        assert callable(self.turn)
        return self.turn(super().forward(x))


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (lambda s: s.argmax(1), r"returns torch.int64 \[batch\], not one score vector per row"),
        (lambda s: s[:, None], r"returns torch.float32 \[batch, 1, 4\], not one score vector"),
        (lambda s: s.sum(0, keepdim=True), r"returns torch.float32 \[1, 4\], not one score vector"),
        (lambda s: s.double(), r"returns torch.float64 \[batch, 4\].*float32 scores"),
        (lambda s: s / 0, "score that is not finite for row 0 of the data"),
    ],
)
def test_refused_outputs(turn: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        captured(Output(turn))


def test_refused_rows_that_depend_on_each_other() -> None:
    with pytest.raises(BatchDependentError, match="when other rows share its batch; early exits need rows"):
        captured(Output(lambda s: s - s.mean(0)))


def test_refused_randomness() -> None:
    with pytest.raises(ModelError, match="answers the same rows otherwise every time it runs; export it in eval mode"):
        captured(Output(lambda s: torch.nn.functional.dropout(s, 0.5)))


class WritesInput(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x /= 255
        return super().forward(x)


def test_refused_writes_into_the_input() -> None:
    with pytest.raises(ModelError, match="WritesInput writes into its input x when it runs; let it work on a copy"):
        captured(WritesInput)


def test_refused_control_flow_with_torchs_reason() -> None:
    with pytest.raises(ModelError, match=r"Output cannot be exported: .*data-dependent"):
        captured(Output(lambda s: s if s.sum() > 0 else s + 1))


@pytest.mark.parametrize("given", [rows(4)[:, :5], rows(4).double(), rows(4).long()])
def test_refused_rows_the_model_does_not_run_on(given: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"Chain does not run on the data \(x .*\[4, .\]\).*shape and dtype"):
        captured(Chain, x=given)


def test_refused_examples() -> None:
    with pytest.raises(InputError, match="at least 2"):
        captured(Chain, x=rows(1))
    with pytest.raises(InputError, match="same number of example rows"):
        captured(Two, x=rows(4), scale=rows(3))


@pytest.mark.parametrize("name", ["probabilities", "exit", "thresholds"])
def test_refused_inputs_named_like_the_artifacts_own(name: str) -> None:
    space: dict[str, object] = {}
    exec(f"def forward(self, {name}):\n    return Chain.forward(self, {name})", {"Chain": Chain}, space)
    model = type("Named", (Chain,), space)()
    with pytest.raises(ModelError, match=f"an artifact has a '{name}' of its own; rename"):
        capture(model, {name: rows(4)})


def test_a_model_that_writes_to_its_own_state_is_refused() -> None:
    class Counting(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return super().forward(x)

    with pytest.raises(ModelError, match="writes to its own state"):
        captured(Counting)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, rows(4))])
def test_torchscript_is_refused(make: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"is TorchScript, which torch\.export does not read"):
        capture(make(Chain().eval()), {"x": rows(4)})


def test_a_model_that_reads_no_input_is_refused() -> None:
    class Constant(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last.bias.expand(x.shape[0], 4)

    with pytest.raises(ModelError, match="answers the same whatever it is given"):
        captured(Constant)
