"""Bad input to `candidates` and `compile`: one clear line, exit status 2, a typed exception, nothing half-written.

What concerns artifacts, providers and a missing onnxruntime is tested with the runtime.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import INF, Chain, rows
from torch import nn
from torch.export import Dim, export

import offramp.runtime
from offramp.compiler import Options, Training, compile, distill, load_model, load_weights
from offramp.compiler.search import Search
from offramp.runtime import cli
from offramp.runtime.errors import (
    BatchDependentError,
    InputError,
    ModelError,
    NoCandidateError,
    OfframpError,
    UsageError,
)

ROWS = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
QUICK = Options(policy="joint", training=Training(epochs=1), batches=())


class Ends(Chain):
    """Scores turned into something else; as `zoo:name` on the command line."""

    def __init__(self, turn: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, x: torch.Tensor) -> object:
        return self.turn(super().forward(x))


ZOO = """
import numpy as np, torch
from models import Chain
from test_bad_input import Ends
good = Chain
branching = lambda: Ends(lambda s: s if s.sum() > 0 else s + 1)
shallow = lambda: torch.nn.Linear(6, 4)
dependent = lambda: Ends(lambda s: s - s.mean(0))
classes = lambda: Ends(lambda s: s.argmax(1))
tokens = lambda: Ends(lambda s: s[:, None])
several = lambda: Ends(lambda s: (s, s))
multilabel = lambda: Ends(torch.sigmoid)
broken = lambda: 1 / 0
shapeless = lambda: torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Softmax(1))
wide = lambda: torch.nn.Linear(6, 9)
number = 3
text = lambda: "no model"
def good_rows(): yield np.zeros((200, 6), np.float32)
def bad_rows(): yield "no rows"
"""

MODELS: dict[str, tuple[type[OfframpError], str]] = {
    "branching": (ModelError, "cannot be exported"),
    "shallow": (NoCandidateError, "has no place for an exit"),
    "dependent": (BatchDependentError, "rows that do not depend on each other"),
    "classes": (ModelError, "not one score vector per row; wrap it"),
    "tokens": (ModelError, "not one score vector per row; wrap it"),
    "several": (ModelError, "2 of them may be the scores; name one"),
    "multilabel": (ModelError, "the classes do not exclude each other"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with `zoo` to import and good rows beside it."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "zoo.py").write_text(ZOO)
    np.save(sources / "rows.npy", ROWS)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(sources))
    monkeypatch.delitem(sys.modules, "zoo", raising=False)
    return tmp_path / "work"


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must be refused, and give its one line back."""

    def run(*argv: str) -> str:
        before = sorted(here.rglob("*"))
        capfd.readouterr()
        assert cli.main(argv) == 2
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert out == ""
        errors = [line for line in lines if line.startswith("offramp: error: ")]
        assert len(errors) == 1
        assert [line for line in lines if not line.startswith("offramp: ")] == []
        assert sorted(here.rglob("*")) == before, "half-written output"
        return errors[0]

    return run


def rows_file(here: Path, array: np.ndarray) -> str:
    path = here.parent / "sources" / "given.npy"
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_compiled(here: Path, refused: Callable[..., str], name: str) -> None:
    kind, says = MODELS[name]
    model = importlib.import_module("zoo").__dict__[name]()
    with pytest.raises(kind, match=says):
        compile(model, ROWS, here / "out", options=QUICK)
    good = str(here.parent / "sources" / "rows.npy")
    assert says in refused("compile", f"zoo:{name}", "--data", good, "-o", "out", "--epochs", "1")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "shallow"])
def test_candidates_refuses_the_same_models(here: Path, refused: Callable[..., str], name: str) -> None:
    assert MODELS[name][1] in refused("candidates", f"zoo:{name}", "--shape", "6")


def test_no_candidate_is_explained_by_refusals(here: Path) -> None:
    with pytest.raises(NoCandidateError, match=r"linear \(.*\): only 0.0% of the compute is left behind it"):
        compile(nn.Linear(6, 4), ROWS, here / "out", options=QUICK)


BAD_ROWS: list[tuple[np.ndarray, str]] = [
    (ROWS[:, :5], "does not run on the data (x float32 [8, 5])"),
    (ROWS[:, :, None], "does not run on the data (x float32 [8, 6, 1])"),
    (ROWS.astype(np.float64), "does not run on the data (x float64 [8, 6])"),
    (ROWS.astype(np.uint8), "does not run on the data (x uint8 [8, 6])"),
    (np.where(np.arange(200)[:, None] == 17, np.float32(np.nan), ROWS), "NaN or infinity, first in row 17"),
    (np.where(np.arange(200)[:, None] == 3, np.float32(INF), ROWS), "NaN or infinity, first in row 3"),
    (ROWS[:0], "holds no rows"),
    (ROWS[:100], "has 100 rows; the splits need at least 160"),
]


@pytest.mark.parametrize(("rows", "says"), BAD_ROWS, ids=[s[:40] for _, s in BAD_ROWS])
def test_rows_that_do_not_fit(here: Path, refused: Callable[..., str], rows: np.ndarray, says: str) -> None:
    with pytest.raises(InputError) as caught:
        compile(Chain(), rows, here / "out", options=QUICK)
    line = refused("compile", "zoo:good", "--data", rows_file(here, rows), "-o", "out")
    # The command line does not know the input's name before the model does.
    for text in (str(caught.value), line):
        assert says.replace("(x ", "(") in text.replace("(x ", "(")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("nothing.npy", "does not exist; give a .npy, an .npz"),
        ("zoo:bad_rows", "pass a numpy array"),
        ("zoo:nothing", "has no 'nothing'"),
    ],
)
def test_data_that_is_none(refused: Callable[..., str], data: str, says: str) -> None:
    assert says in refused("compile", "zoo:good", "--data", data, "-o", "out")
    assert says in refused("candidates", "zoo:good", "--data", data)


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**Chain().state_dict(), **changes}


class Malicious:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pickle-ran",)


WEIGHTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("w.pt", lambda p: torch.save(state(**{"last.weight": torch.ones(5, 16)}), p), "size mismatch for last.weight"),
    ("w.pt", lambda p: torch.save({"first.weight": torch.ones(16, 6)}, p), "do not fit Chain: no first.bias"),
    ("w.pt", lambda p: torch.save(state(extra=torch.ones(1)), p), "do not fit Chain: unknown extra"),
    ("w.pt", lambda p: torch.save([1, 2], p), "hold something else than tensors by name"),
    ("w.pt", lambda p: torch.save({0: torch.ones(1)}, p), "hold something else than tensors by name"),
    ("w.pt", lambda p: torch.save({"state_dict": state()}, p), "hold something else than tensors by name"),
    ("w.pt", lambda p: torch.save(Chain(), p), "not readable"),
    ("w.pt", lambda p: p.write_bytes(pickle.dumps(Malicious())), "not readable"),
    ("w.pt", lambda p: p.write_bytes(b"hello"), "not readable"),
    ("w.pt", lambda p: p.write_bytes(b""), "not readable"),
    ("w.safetensors", lambda p: p.write_bytes(b"hello"), "not readable"),
    ("w.safetensors", lambda p: None, "no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "says"), WEIGHTS, ids=[f"{n}-{s}" for n, _, s in WEIGHTS])
def test_weights_that_do_not_fit(
    here: Path, refused: Callable[..., str], name: str, write: Callable[[Path], object], says: str
) -> None:
    path = here.parent / "sources" / name
    write(path)
    with pytest.raises((ModelError, UsageError), match=says):
        load_weights(Chain(), path)
    assert says in refused("candidates", "zoo:good", "--shape", "6", "--weights", str(path))
    assert not (here / "pickle-ran").exists()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("zoo", "neither package.module:callable nor a .pt2"),
        (":good", "neither package.module:callable nor a .pt2"),
        ("zoo:nothing", "has no 'nothing'"),
        ("nowhere:model", "cannot be imported"),
        ("zoo:broken", "cannot be built: ZeroDivisionError"),
        ("zoo:number", "cannot be built: TypeError"),
        ("zoo:text", "gives str, not a torch.nn.Module"),
        ("nothing.pt2", "no such file"),
    ],
)
def test_models_that_are_none(here: Path, refused: Callable[..., str], spec: str, says: str) -> None:
    with pytest.raises((ModelError, UsageError), match=says):
        load_model(spec)
    assert says in refused("candidates", spec, "--shape", "6")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_a_pt2_that_is_none(here: Path, refused: Callable[..., str], content: bytes) -> None:
    path = here.parent / "sources" / "model.pt2"
    path.write_bytes(content)
    assert "not a readable .pt2" in refused("candidates", str(path))


def test_a_pt2_with_a_fixed_batch(here: Path, refused: Callable[..., str]) -> None:
    path = here.parent / "sources" / "model.pt2"
    torch.export.save(export(Chain(), (torch.zeros(4, 6),)), path)
    assert "has the fixed batch size 4; export it with a dynamic dimension 0" in refused("candidates", str(path))
    assert "brings its own weights" in refused("candidates", str(path), "--weights", "w.pt")


def test_candidates_without_a_shape(refused: Callable[..., str]) -> None:
    assert "give --data D, or --shape" in refused("candidates", "zoo:shapeless")
    assert "'6,x' is not a list of sizes" in refused("candidates", "zoo:good", "--shape", "6,x")
    large = refused("candidates", "zoo:good", "--shape", "3,90000000,90000000")
    assert "rows of 3x90000000x90000000 numbers do not fit into memory" in large


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tolerance", "1.5"), "tolerance 1.5 is not a share of rows"),
        (("--tolerance", "nan"), "tolerance nan is not a share of rows"),
        (("--seed", "-1"), "seed -1 is negative"),
        (("--augment", "rotate"), "augmentation 'rotate' is unknown; use one of none, flip-shift"),
        (("--augment", "zoo:nothing"), "has no 'nothing'; check the name"),
        (("--augment", "zoo:number"), "augmentation 3 is neither a name nor a function"),
        (("--device", "abacus"), "device 'abacus' cannot be used here"),
        (("--device", "meta"), "device 'meta' cannot be used here (it holds no values)"),
        (("--space", "mine.json"), "--space without a search; give --search tpe too, or leave it out"),
        (("--static", "zoo:wide"), "wide answers 9 classes, good 4; compare with a model trained for the same classes"),
        (("--static", "zoo:nothing"), "has no 'nothing'; check the name"),
        (("--static-weights", "w.pt"), "--static-weights without a model they belong to; give --static too"),
    ],
)
def test_options_out_of_range(refused: Callable[..., str], flags: tuple[str, str], says: str) -> None:
    assert says in refused("compile", "zoo:good", "--data", "zoo:good_rows", "-o", "out", *flags)


def test_too_few_rows_for_the_guarantee_are_refused_before_training(here: Path, refused: Callable[..., str]) -> None:
    data = str(here.parent / "sources" / "rows.npy")
    line = refused("compile", "zoo:good", "--data", data, "-o", "out")
    assert "30 rows cannot certify a tolerance of 0.01 at delta 0.05: 299 are needed" in line
    assert "delta 1.5 is not a probability" in refused(
        "compile", "zoo:good", "--data", data, "-o", "out", "--delta", "1.5"
    )


@pytest.mark.parametrize(("flag", "value"), [("--target", "tflite"), ("--policy", "greedy"), ("--search", "oracle")])
def test_unknown_choices_name_the_known_ones(
    here: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert cli.main(["compile", "zoo:good", "--data", "zoo:good_rows", "-o", "out", flag, value]) == 2
    (last,) = capsys.readouterr().err.splitlines()
    assert f"argument {flag}: invalid choice: '{value}' (choose from" in last
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read (No such file or directory); print one with `offramp space`"),
        ("{", "is no JSON"),
        ("[1]", "holds no spaces by head family"),
        ('{"tree": {"x": {"_type": "choice", "_value": [1]}}}', "head family 'tree', which is none of conv"),
        ('{"dense": {"dense": {"_type": "choice", "_value": 1}}}', "search space, dense: choice wants a list"),
    ],
)
def test_a_space_that_is_none_is_refused(
    here: Path, refused: Callable[..., str], content: str | None, says: str
) -> None:
    space = here.parent / "space.json"
    if content is not None:
        space.write_text(content)
    common = ("compile", "zoo:good", "--data", "zoo:good_rows", "-o", "out", "--search", "tpe")
    assert says in refused(*common, "--space", str(space))


def test_a_memory_budget_that_holds_no_candidate_is_refused(here: Path, refused: Callable[..., str]) -> None:
    common = ("compile", "zoo:good", "--data", "zoo:good_rows", "-o", "out", "--tolerance", "0.3")
    assert "the memory budget is 0 MiB; give it more" in refused(*common, "--memory-budget", "10KiB")
    assert "'much' is no size such as 500MiB" in refused(*common, "--memory-budget", "much")


def test_a_foreign_output_is_refused_before_training(here: Path, refused: Callable[..., str]) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    (here / "file").write_text("mine too")
    for out, says in (
        ("out", "holds 'thesis.tex', which no artifact put there"),
        ("file", "not an artifact directory"),
    ):
        assert says in refused("compile", "zoo:good", "--data", "zoo:good_rows", "-o", out)


def test_an_output_that_cannot_be_written_is_refused_before_training(here: Path, refused: Callable[..., str]) -> None:
    (here / "file").write_text("")
    assert "choose another output" in refused(
        "compile", "zoo:good", "--data", "zoo:good_rows", "-o", "file/out", "--policy", "joint"
    )


def test_a_disk_that_fills_up(here: Path) -> None:
    """No file may grow past two kilobytes, in a process of its own."""
    paths = [str(Path(offramp.runtime.__file__).parents[2]), str(Path(__file__).parent), str(here.parent / "sources")]
    data = str(here.parent / "sources" / "rows.npy")
    flags = ["--data", data, "-o", "out", "--policy", "joint", "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "offramp.runtime", "compile", "zoo:good", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([p for p in [*sys.path, *paths] if p])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    *progress, last = done.stderr.splitlines()
    assert all(line.startswith("offramp: ") for line in progress)
    assert last.startswith("offramp: error: ")
    assert "could not be" in last
    assert "free space" in last
    assert not [p for p in here.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("lambda: None", "augmentation rows:change failed on a batch (TypeError: "),
        ("lambda batch, generator: {}", "augmentation rows:change does not give x torch.float32 [8, 6]"),
        ("lambda batch, generator: [*batch]", "does not give x torch.float32 [8, 6]"),
        ("lambda batch, generator: {name: x[:, :3] for name, x in batch.items()}", "does not give x torch.float32"),
        ("lambda batch, generator: {name: x.double() for name, x in batch.items()}", "does not give x torch.float32"),
    ],
)
def test_augmentations_that_do_not_do(here: Path, refused: Callable[..., str], function: str, says: str) -> None:
    (here.parent / "sources" / "rows.py").write_text(f"change = {function}\nchange.__qualname__ = 'change'\n")
    sys.modules.pop("rows", None)
    common = ("compile", "zoo:good", "--data", "zoo:good_rows", "-o", "out", "--tolerance", "0.3")
    assert says in refused(*common, "--augment", "rows:change")


def test_an_interrupted_compile_goes_on_where_it_was(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after two of forty epochs; started again, the artifact is the one of an undisturbed run."""
    data = str(here.parent / "sources" / "rows.npy")
    common = ["zoo_seeded:good", "--data", data, "--epochs", "40", "--tolerance", "0.3", "--target", "onnx"]
    (here.parent / "sources" / "zoo_seeded.py").write_text(
        "import torch\nfrom models import Chain\ndef good():\n    torch.manual_seed(0)\n    model = Chain()\n"
        "    model.last.weight.data.mul_(20)\n    return model\n"
    )
    monkeypatch.setattr("offramp.compiler.package._timings", lambda artifact, job: ())
    assert cli.main(["compile", *common, "-o", "whole"]) == 0
    save = distill._Trainer.save

    def save_and_stop(trainer: distill._Trainer, path: Path, epochs: int) -> None:
        save(trainer, path, epochs)
        if epochs == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill._Trainer, "save", save_and_stop)
        assert cli.main(["compile", *common, "-o", "out"]) == 130
    assert sorted(p.name for p in here.iterdir()) == ["out.work", "whole"]
    capsys.readouterr()
    assert cli.main(["compile", *common, "-o", "out"]) == 0
    assert "offramp: resuming after epoch 2 of 40" in capsys.readouterr().err.splitlines()
    assert sorted(p.name for p in here.iterdir()) == ["out", "whole"]
    for name in ("model.onnx", "records.npz"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()


def test_candidates_reads_the_shapes_of_a_saved_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two inputs, and nothing but the file: not bad input, but easily taken for it."""

    class Two(Chain):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return super().forward(x * scale)

    shapes = {"x": {0: Dim("batch")}, "scale": {0: Dim("batch")}}
    program = export(Two(), (torch.ones(4, 6), torch.ones(4, 6)), dynamic_shapes=shapes)
    torch.export.save(program, "model.pt2")
    assert cli.main(["candidates", "model.pt2"]) == 0
    assert "relu" in capsys.readouterr().out


def test_one_trial_is_one_wave(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []

    def stop(*_: object, options: Options, **__: object) -> None:
        asked.append(options)
        raise UsageError("as far as this test goes")

    monkeypatch.setattr("offramp.compiler.commands.compile", stop)
    common = ["compile", "zoo:good", "--data", "zoo:good_rows", "-o", "out", "--search", "random"]
    assert cli.main([*common, "--trials", "1"]) == 2
    assert cli.main(common) == 2
    assert [(o.search.trials, o.search.waves) for o in asked] == [(1, 1), (Search.trials, Search.waves)]


def test_the_demo_replaces_no_file_but_its_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("digits.npz", mine=np.arange(3))
    assert cli.main(["demo", "-o", "digits"]) == 2
    assert "digits.npz: is there and no demo wrote it" in capsys.readouterr().err
    Path("digits.npz").write_bytes(b"")
    assert cli.main(["demo", "-o", "digits"]) == 2
    assert Path("digits.npz").read_bytes() == b""


def test_int8_is_not_made_where_threads_are_shared(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr("offramp.runtime.process._shared", [2])
    options = dataclasses.replace(QUICK, precision="int8")
    with pytest.raises(UsageError, match="compile in a process that does not call share_threads"):
        compile(Chain(), rows(300).numpy(), here / "out", options=options)
