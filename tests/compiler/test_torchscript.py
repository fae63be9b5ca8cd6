"""The TorchScript file: the eager answers for any batch, thresholds changed by a method, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import (
    INF,
    Attention,
    Bypass,
    Chain,
    Residual,
    Routed,
    Shared,
    Sized,
    Tuples,
    captured,
    rows,
    sentences,
    with_exits,
)
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from offramp.compiler import Options, Training, capture, compile, emit
from offramp.compiler.emit.torchscript import check_torchscript, torchscript_model
from offramp.passes import Backbone, ExitProgram, Limits, find_candidates
from offramp.runtime import load, open_artifact
from offramp.runtime.errors import ModelError, UsageError

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit ends with Python 3.13")

KINDS = [Chain, Residual, Bypass, Shared, Tuples, Sized, Routed, Attention]
LIMITS = {"all at once": (-INF, -INF), "none": (INF, INF), "second alone": (INF, -INF), "mixed": ()}


@dataclass(frozen=True)
class Scripted:
    program: ExitProgram
    data: bytes
    module: torch.jit.ScriptModule
    inputs: Callable[[int], tuple[torch.Tensor, ...]]  # rows -> the model's inputs
    mixed: tuple[float, ...]

    def limits(self, plan: str) -> tuple[float, ...]:
        return (LIMITS[plan] or self.mixed)[: len(self.mixed)]


def program_of(backbone: Backbone, most: int = 2) -> ExitProgram:
    found = find_candidates(backbone, limits=Limits(least_left=0.0)).kept
    places = [c.name for c in found][:: max(1, len(found) // most)][:most]
    return with_exits(backbone, places, [0.4, 0.5][: len(places)])


def loaded(data: bytes) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(data))


def scripted(program: ExitProgram, inputs: Callable[[int], tuple[torch.Tensor, ...]]) -> Scripted:
    data = torchscript_model(program)
    # At the median of every exit about half of the rows that come there leave.
    mixed = program.all_exits(*inputs(257))[:-1].amax(2).median(1).values
    return Scripted(program, data, loaded(data), inputs, tuple(mixed.tolist()))


def numbers(count: int) -> tuple[torch.Tensor, ...]:
    return (rows(count, seed=2),)


def words(count: int) -> tuple[torch.Tensor, ...]:
    return tuple(sentences(count, seed=2).values())


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> Scripted:
    if request.param is Attention:
        return scripted(program_of(captured(Attention, **sentences(8))), words)
    return scripted(program_of(captured(request.param)), numbers)


@pytest.fixture(scope="module")
def chain() -> Scripted:
    return scripted(program_of(captured(Chain)), numbers)


def assert_eager(made: Scripted, plan: str, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    limits = made.limits(plan)
    expected, exits = made.program.with_thresholds(limits)(*inputs)
    made.module.set_thresholds(torch.tensor(limits))
    answer, left = made.module(*inputs)
    assert (answer.dtype, left.dtype) == (torch.float32, torch.int64)
    assert left.tolist() == exits.tolist()
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=0)
    return exits


@pytest.mark.parametrize("plan", LIMITS)
@pytest.mark.parametrize("count", [0, 1, 3, 32, 257])
def test_the_eager_answers(model: Scripted, plan: str, count: int) -> None:
    # Twice and more: TorchScript compiles anew after it has seen a call, for the shapes it saw.
    for _ in range(3):
        exits = assert_eager(model, plan, model.inputs(count))
    if plan == "mixed" and count == 257:
        assert len(exits.unique()) == len(model.program.segments)


class Sequences(nn.Module):
    """Two layers over sequences of any length; positions, lengths and squares of them are asked for everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(20, 8), nn.Embedding(32, 8)
        self.mix = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.last = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        x = self.embed(ids) + self.place(torch.arange(length, device=ids.device))
        weight = torch.full((length, length), 1.0 / length).tril()
        for layer in self.mix:
            x = torch.relu(layer(weight @ x)).reshape(ids.shape[0], length * 8).reshape(-1, length, 8)
        alike = (x @ x.transpose(1, 2)).reshape(ids.shape[0], length**2).mean(1)
        return self.last(F.pad(x, (0, 0, 0, 2)).sum(1) / length + alike[:, None])


def test_a_second_free_dimension() -> None:
    torch.manual_seed(0)
    ids = sentences(257)["ids"]
    free = {"ids": {0: Dim("batch"), 1: Dim("length", min=2, max=32)}}
    exported = torch.export.export(Sequences().eval(), (), {"ids": ids}, dynamic_shapes=free)
    made = scripted(program_of(capture(exported, {"ids": ids})), lambda count: (ids[:count],))
    assert len(assert_eager(made, "mixed", (ids,)).unique()) > 1
    for length in (2, 3, 17, 32):
        other = torch.randint(0, 20, (9, length), generator=torch.Generator().manual_seed(length))
        for plan in LIMITS:
            assert_eager(made, plan, (other,))


def test_thresholds_have_the_plans_as_default(chain: Scripted) -> None:
    fresh = loaded(chain.data)
    exits = chain.program(rows(50))[1]
    assert fresh.thresholds().tolist() == pytest.approx(chain.program.plan.thresholds)
    assert fresh(rows(50))[1].tolist() == exits.tolist()


def test_thresholds_belong_to_the_module(chain: Scripted) -> None:
    module = loaded(chain.data)
    given = torch.tensor([INF, 0.0], dtype=torch.float64)
    module.set_thresholds(given)
    given.fill_(0.0)
    module.thresholds().fill_(0.0)
    assert module.thresholds().dtype == torch.float32
    assert module(rows(5))[1].tolist() == [1] * 5


@pytest.mark.parametrize("wrong", [[0.5], [0.5, 0.5, 0.5], [[0.5, 0.5]], [0.5, float("nan")]])
def test_thresholds_that_do_not_fit_are_refused(chain: Scripted, wrong: list[float]) -> None:
    with pytest.raises(torch.jit.Error, match="give 2 thresholds in one dimension, infinity for an exit that never"):
        chain.module.set_thresholds(torch.tensor(wrong))


def test_a_confidence_that_is_not_a_number_stays(chain: Scripted) -> None:
    broken = rows(3)
    broken[1] = float("nan")
    chain.module.set_thresholds(torch.tensor([-INF, -INF]))
    assert chain.module(broken)[1].tolist() == chain.program.with_thresholds([-INF, -INF])(broken)[1].tolist()
    assert chain.module(broken)[1].tolist() == [0, 2, 0]


def test_stages_nobody_needs_do_not_run(chain: Scripted) -> None:
    def layers(limits: tuple[float, float]) -> int:
        chain.module.set_thresholds(torch.tensor(limits))
        with torch.profiler.profile() as profile:
            chain.module(rows(5))
        return sum(event.count for event in profile.key_averages() if event.key == "aten::linear")

    everything = layers((INF, INF))
    assert 0 < layers((-INF, -INF)) < layers((INF, -INF)) < everything


def test_no_exit_at_all() -> None:
    program = with_exits(captured(Chain), [])
    module = loaded(torchscript_model(program))
    answer, exits = module(rows(3))
    assert exits.tolist() == [0, 0, 0]
    torch.testing.assert_close(answer, program(rows(3))[0])
    module.set_thresholds(torch.zeros(0))


class Mirrored(nn.Module):
    """Its weight is a few rows of a large tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.first.weight = nn.Parameter(torch.randn(50_000, 6)[:16])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


def test_only_the_models_weights_are_in_the_file() -> None:
    program = with_exits(captured(Mirrored), [])
    data = torchscript_model(program)
    assert len(data) < 20_000
    torch.testing.assert_close(loaded(data)(rows(3))[0], program(rows(3))[0])


def test_emitting_again_gives_the_same_bytes(chain: Scripted) -> None:
    torchscript_model(program_of(captured(Residual)))
    assert torchscript_model(program_of(captured(Chain))) == chain.data


_EMIT = """
import hashlib
from models import Chain, captured
from test_torchscript import program_of
from offramp.compiler.emit.torchscript import torchscript_model
print(hashlib.sha256(torchscript_model(program_of(captured(Chain)))).hexdigest())
"""


def test_another_process_in_another_folder_gives_the_same_bytes(chain: Scripted, tmp_path: Path) -> None:
    script = tmp_path / "emit.py"
    script.write_text(_EMIT)
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hashlib.sha256(chain.data).hexdigest()]


def test_no_path_of_this_machine_is_in_the_file(chain: Scripted) -> None:
    with zipfile.ZipFile(io.BytesIO(chain.data)) as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    for path in (Path(__file__).parents[2], Path(torch.__file__).parent):
        assert str(path).encode() not in contents


def test_torchs_deprecation_is_not_passed_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchscript_model(program_of(captured(Chain)))


class Foreign(Chain):
    """Its last operator belongs to no installed libtorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.offramp_tests.twice(super().forward(x))


def test_an_operator_that_is_not_libtorchs_is_named(tmp_path: Path) -> None:
    with torch.library._scoped_library("offramp_tests", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        options = Options(targets=("torchscript",), policy="joint", training=Training(epochs=1))
        with pytest.raises(ModelError, match=r"cannot be translated to TorchScript: operator offramp_tests.twice"):
            compile(Foreign(), rows(400).numpy(), tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(UsageError, match=r"needs Python 3\.13 or older, this is 3\.14; leave the target out"):
        Options(targets=("onnx", "torchscript"))


def test_a_torch_without_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    says = r"needs a torch that scripts, torch .* does not \(unset PYTORCH_JIT if it is set\); leave the target out"
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "script", lambda module: module)  # what torch does under PYTORCH_JIT=0
        with pytest.raises(UsageError, match=says):
            check_torchscript()
    monkeypatch.delattr(torch.jit, "script")
    with pytest.raises(UsageError, match=says):
        Options(targets=("torchscript",))


def test_only_the_targets_asked_for(chain: Scripted) -> None:
    specs, files = emit(chain.program, ["torchscript"])
    assert (specs, files) == ((), {"model.ts": chain.data})
    program = with_exits(captured(Chain), [])
    assert sorted(emit(program, ["torchscript", "onnx"])[1]) == ["model.onnx", "model.ts"]
    assert "model.ts" not in emit(program)[1]


def test_an_artifact_of_torchscript_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = Options(tolerance=1.0, targets=("torchscript",), training=Training(epochs=1), max_candidates=1)
    manifest = compile(Chain().eval(), rows(400).numpy(), tmp_path / "out", options=options)
    assert manifest.stages == ()
    assert manifest.measured.timings == ()
    artifact = open_artifact(tmp_path / "out")
    module = loaded(artifact.read("model.ts"))
    assert module.thresholds().tolist() == pytest.approx(manifest.thresholds())
    assert module(rows(7))[0].shape == (7, 4)
    with pytest.raises(UsageError, match="holds TorchScript only, which torch and libtorch run and this runtime does"):
        load(tmp_path / "out")
