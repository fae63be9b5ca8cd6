"""Splits, heads, augmentation, distillation and calibration: seeded, frozen, and resumed to the very bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Chain, Interrupted, captured, noisy

from offramp.compiler import (
    AUGMENTATIONS,
    FAMILIES,
    Head,
    HeadConfig,
    Recording,
    RowSplits,
    Training,
    build_head,
    calibrate,
    check_splits,
    default_head,
    default_heads,
    distil,
    record,
    split_rows,
)
from offramp.compiler.augment import default_augmentation
from offramp.compiler.heads import BUDGET, head_flops
from offramp.compiler.learner import Learner, softened
from offramp.compiler.stream import Observed, Stream
from offramp.passes import Backbone, Candidate, Input, find_candidates
from offramp.runtime.data import ArrayRows
from offramp.runtime.errors import InputError, StorageError, UsageError

PARTS = ("distil", "calibrate", "select", "certify", "test")
TRAINING = Training(epochs=3, batch=32)


@given(st.integers(160, 2000), st.integers(0, 5))
def test_splits_are_disjoint_and_cover_all_rows(rows: int, seed: int) -> None:
    splits = split_rows(rows, seed)
    together = np.concatenate([getattr(splits, part) for part in PARTS])
    assert sorted(together) == list(range(rows))
    assert min(len(getattr(splits, part)) for part in PARTS) >= 8


def test_splits_follow_the_seed() -> None:
    first, again, other = split_rows(500, 3), split_rows(500, 3), split_rows(500, 4)
    assert np.array_equal(first.distil, again.distil)
    assert not np.array_equal(first.distil, other.distil)


def test_too_few_rows_are_told_how_many_are_needed() -> None:
    with pytest.raises(InputError, match="has 159 rows; the splits need at least 160"):
        split_rows(159, 0)


@pytest.mark.parametrize(
    ("part", "rows", "said"),
    [
        ("test", [0], "split test has 1 rows; it needs at least 8"),
        ("certify", [*range(20, 29), 500], "the splits name row 500"),
        ("certify", [*range(20, 29), -1], "or a negative one"),
        ("select", [0, *range(100, 110)], "share rows"),
    ],
)
def test_splits_of_ones_own_are_checked(part: str, rows: list[int], said: str) -> None:
    own = RowSplits(0, *np.arange(500).reshape(5, 100))
    check_splits(own, 500)
    with pytest.raises(InputError, match=said):
        check_splits(replace(own, **{part: np.array(rows)}), 500)


SHAPES = [(3, 32, 32), (7, 9, 5), (16, 1, 1), (4, 2, 11), (5, 24), (197, 33), (1, 8), (17,), (1,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_family_reads_every_size(shape: tuple[int, ...]) -> None:
    config = default_head(shape, 7, 1e6)
    head = build_head(config, shape, 7).eval()
    assert FAMILIES[config.family].rank == len(shape) + 1
    assert head(torch.randn(2, *shape)).shape == (2, 7)
    assert config.describe()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("flops", [1e4, 1e6, 1e8, 1e10])
def test_a_default_head_keeps_the_budget_unless_it_is_the_narrowest(shape: tuple[int, ...], flops: float) -> None:
    config = default_head(shape, 10, flops)
    narrowest = default_head(shape, 10, 0.0)
    assert config == narrowest or head_flops(config, shape, 10) <= BUDGET * flops
    assert head_flops(narrowest, shape, 10) <= head_flops(config, shape, 10)


def test_a_config_builds_the_same_shapes_again() -> None:
    config = default_head((8, 6, 6), 10, 1e7)
    again = HeadConfig(config.family, dict(config.settings))
    shapes = [{n: t.shape for n, t in build_head(c, (8, 6, 6), 10).state_dict().items()} for c in (config, again)]
    assert shapes[0] == shapes[1]
    with pytest.raises(UsageError, match="head family 'tree' is unknown; use one of conv, tokens, dense"):
        build_head(HeadConfig("tree"), (8,), 10)


@pytest.mark.parametrize("hidden", [None, 5])
def test_a_trained_head_says_the_same_without_its_norm(hidden: int | None) -> None:
    torch.manual_seed(0)
    config = HeadConfig("conv", {"widths": [6], "kernel": 3, "strides": [1], "grid": 2, "hidden": hidden})
    head = build_head(config, (3, 8, 8), 4)
    maps = torch.tensor([0.01, 1.0, 100.0]).view(1, 3, 1, 1) * torch.rand(64, 3, 8, 8) + 5
    for _ in range(30):
        head(maps)
    before = head.eval()(maps)
    after = FAMILIES["conv"].finish(head)
    torch.testing.assert_close(after(maps), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in after.modules())
    assert torch.equal(FAMILIES["conv"].finish(after)(maps), after(maps)), "once is enough"


def test_a_feature_that_never_moved_in_training_cannot_shout() -> None:
    torch.manual_seed(0)
    head = build_head(HeadConfig("conv", {"widths": [], "kernel": 1, "strides": []}), (2, 4, 4), 3)
    for _ in range(200):
        head(torch.cat([torch.rand(64, 1, 4, 4), torch.zeros(64, 1, 4, 4)], 1))
    head = FAMILIES["conv"].finish(head.eval())
    quiet, loud = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    loud[:, 1] = 0.1
    assert (head(loud) - head(quiet)).abs().max() < 5


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_follows_its_generator_and_keeps_shapes(name: str) -> None:
    batch = {"image": torch.rand(6, 3, 9, 8), "id": torch.arange(6)}
    first, again, other = (AUGMENTATIONS[name](batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in batch.items()}
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["id"], batch["id"])
    assert torch.equal(first["image"], other["image"]) == (name == "none")


def test_shifted_images_hold_only_pixels_they_had() -> None:
    images = torch.arange(3 * 64.0).view(3, 1, 8, 8)
    shifted = AUGMENTATIONS["flip-shift"]({"image": images}, torch.Generator().manual_seed(0))["image"]
    for image, source in zip(shifted, images, strict=True):
        assert set(image.flatten().tolist()) <= set(source.flatten().tolist())


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (("batch", 3, 32, 32), "flip-shift-mix"),
        (("batch", 1, 32, 32), "none"),
        (("batch", 3, 8, 8), "none"),
        (("batch", 6), "none"),
    ],
)
def test_only_colour_photographs_are_mirrored_by_default(shape: tuple[int | str, ...], name: str) -> None:
    assert default_augmentation((Input("x", torch.float32, shape),)) == name


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return captured(Chain)


@pytest.fixture(scope="module")
def candidates(backbone: Backbone) -> tuple[Candidate, ...]:
    return find_candidates(backbone).kept


@pytest.fixture(scope="module")
def data() -> ArrayRows:
    return ArrayRows({"x": np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)})


def trained(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training = TRAINING,
    seed: int = 0, folder: Path | None = None, said: list[str] | None = None,
) -> tuple[Head, ...]:  # fmt: skip
    return distil(
        backbone, candidates, default_heads(backbone, candidates), data, learn=np.arange(200),
        validate=np.arange(200, 300), training=training, seed=seed, folder=folder,
        report=(said if said is not None else []).append,
    )  # fmt: skip


def same(one: tuple[Head, ...], other: tuple[Head, ...]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(t, b.module.state_dict()[n]) for a, b in pairs for n, t in a.module.state_dict().items()
    ) and [h.loss for h in one] == [h.loss for h in other]


@pytest.fixture(scope="module", params=["every epoch another", "the same, none kept"])
def training(request: pytest.FixtureRequest) -> Training:
    """Both go through the backbone in every epoch."""
    return replace(TRAINING, augment=noisy) if "another" in request.param else replace(TRAINING, kept_bytes=0)


@pytest.fixture(scope="module")
def whole(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training
) -> tuple[Head, ...]:
    """Three epochs without interruption."""
    return trained(backbone, candidates, data, training)


def test_heads_learn_and_the_backbone_does_not(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows
) -> None:
    before = backbone.fingerprint()
    short = trained(backbone, candidates, data, replace(TRAINING, epochs=1))
    long = trained(backbone, candidates, data, replace(TRAINING, epochs=20))
    assert all(after.loss < 0.5 * first.loss for first, after in zip(short, long, strict=True))
    assert backbone.fingerprint() == before
    assert not any(head.module.training for head in long)


def test_a_head_stops_when_its_loss_no_longer_falls(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wild = replace(TRAINING, epochs=40, learning_rate=0.3, patience=2)
    said: list[str] = []
    stopped = trained(backbone, candidates, data, wild, folder=tmp_path / "whole", said=said)
    ended = re.fullmatch(r"no head's loss fell any more: stopped after epoch (\d+) of 40", said[-1])
    assert ended is not None
    assert int(ended.group(1)) < 40

    learned: dict[int, int] = {}
    learn = Learner.learn

    def counted(self: Learner, *batch: torch.Tensor) -> None:
        learned[id(self)] = learned.get(id(self), 0) + 1
        learn(self, *batch)

    monkeypatch.setattr(Learner, "learn", counted)
    rows = Interrupted(data.take(np.arange(300)))
    rows.left = 40
    with pytest.raises(KeyboardInterrupt):
        trained(backbone, candidates, rows, replace(wild, kept_bytes=0), folder=tmp_path / "work")
    learned.clear()
    whole = trained(backbone, candidates, data, replace(wild, kept_bytes=0))
    assert len(learned) == len(candidates)
    assert len(set(learned.values())) > 1, "each stops on its own"
    assert same(trained(backbone, candidates, data, replace(wild, kept_bytes=0), folder=tmp_path / "work"), whole)
    patient = trained(backbone, candidates, data, replace(wild, patience=40))
    assert all(more.loss <= less.loss for more, less in zip(patient, stopped, strict=True))


def test_patience_is_a_third_of_all_epochs_unless_told() -> None:
    assert [Training(epochs=n).waits for n in (1, 30, 31, 90)] == [1, 10, 11, 30]
    assert Training(epochs=30, patience=4).waits == 4


def test_softened_targets_are_those_of_cooler_logits() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(softened(logits.softmax(1), 3.0), (logits / 3).softmax(1))


def test_heads_learn_from_softened_targets_too(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows
) -> None:
    short = trained(backbone, candidates, data, replace(TRAINING, epochs=1, soften=2.0))
    long = trained(backbone, candidates, data, replace(TRAINING, epochs=20, soften=2.0))
    assert all(after.loss < 0.5 * first.loss for first, after in zip(short, long, strict=True))


def test_heads_learn_under_autocast_as_well(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = replace(TRAINING, epochs=20)
    plain = trained(backbone, candidates, data, longer)
    monkeypatch.setattr("offramp.compiler.learner.HALVED", {"cpu": torch.bfloat16})
    halved = trained(backbone, candidates, data, longer)
    assert not same(plain, halved)
    for one, other in zip(plain, halved, strict=True):
        assert other.loss < 1.3 * one.loss
        assert {value.dtype for value in other.module.state_dict().values()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="trains on a GPU")
def test_heads_learn_on_a_gpu_and_serve_on_the_cpu(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows
) -> None:
    longer = replace(TRAINING, epochs=20)
    plain = trained(backbone, candidates, data, longer)
    there = trained(backbone, candidates, data, replace(longer, device="cuda"))
    for one, other in zip(plain, there, strict=True):
        assert other.loss < 1.3 * one.loss
        assert {str(value.device) for value in other.module.state_dict().values()} == {"cpu"}


def test_same_seed_same_weights(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training, whole: tuple[Head, ...]
) -> None:
    torch.manual_seed(1234)  # what the caller's own generator does is no matter
    state = torch.get_rng_state()
    assert same(trained(backbone, candidates, data, training), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(trained(backbone, candidates, data, training, seed=1), whole)


def test_rows_that_are_shown_again_go_through_the_backbone_once(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    passes: list[int] = []
    observe = Stream.observe

    def counted(self: Stream, batch: Mapping[str, torch.Tensor], rows: np.ndarray) -> Observed:
        passes.append(len(next(iter(batch.values()))))
        return observe(self, batch, rows)

    monkeypatch.setattr(Stream, "observe", counted)
    kept = trained(backbone, candidates, data, folder=tmp_path)
    assert sum(passes) == 300, "what it learns from and what it is validated on, whatever the epochs"
    assert [p.name for p in tmp_path.iterdir()] == ["heads.pt"]
    passes.clear()
    computed = trained(backbone, candidates, data, replace(TRAINING, kept_bytes=0))
    assert sum(passes) > 3 * 300
    for one, other in zip(kept, computed, strict=True):  # batches of other rows round otherwise
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


@pytest.fixture
def work(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training, tmp_path: Path
) -> Iterator[Path]:
    """What an interruption in the second or third epoch leaves behind."""
    rows = Interrupted(data.take(np.arange(300)))
    rows.left = 24  # an epoch takes 6 to 8 batches, 4 to validate and one to fingerprint
    with pytest.raises(KeyboardInterrupt):
        trained(backbone, candidates, rows, training, folder=tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["heads.pt"]
    yield tmp_path / "work"


def test_an_interrupted_training_goes_on_to_the_same_weights(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training,
    whole: tuple[Head, ...], work: Path,
) -> None:  # fmt: skip
    said: list[str] = []
    assert same(trained(backbone, candidates, data, training, folder=work, said=said), whole)
    assert said[-1] in ("resuming after epoch 1 of 3", "resuming after epoch 2 of 3")
    assert [p.name for p in work.iterdir()] == ["heads.pt"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no zip", b"\x80\x04N.", "a list"])
def test_a_damaged_checkpoint_only_costs_time(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training,
    whole: tuple[Head, ...], tmp_path: Path, content: bytes | str,
) -> None:  # fmt: skip
    path = tmp_path / "heads.pt"
    torch.save([1], path) if isinstance(content, str) else path.write_bytes(content)
    said: list[str] = []
    assert same(trained(backbone, candidates, data, training, folder=tmp_path, said=said), whole)
    assert not any("resuming" in line for line in said)


def test_a_truncated_checkpoint_only_costs_time(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training,
    whole: tuple[Head, ...], work: Path,
) -> None:  # fmt: skip
    checkpoint = work / "heads.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert same(trained(backbone, candidates, data, training, folder=work), whole)


def test_another_jobs_checkpoint_is_not_taken_up(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, training: Training, work: Path
) -> None:
    said: list[str] = []
    trained(backbone, candidates, data, training, seed=7, folder=work, said=said)
    assert not any("resuming" in line for line in said)


def test_a_folder_that_cannot_be_made_is_found_before_training(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    rows = Interrupted(data.take(np.arange(300)))
    rows.left = 1
    with pytest.raises(StorageError, match="cannot be made"):
        trained(backbone, candidates, rows, folder=tmp_path / "file" / "work")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0}, "0 epochs"),
        ({"batch": 1}, "batches of 1"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"weight_decay": -1.0}, "weight decay -1.0"),
        ({"kept_bytes": -1}, "-1 bytes"),
        ({"soften": 0.5}, "softened by 0.5"),
        ({"hint": -1.0}, "hints of weight -1.0"),
        ({"hint": float("nan")}, "hints of weight nan"),
        ({"patience": 0}, "a patience of 0 epochs"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"augment": "rotate"}, "augmentation 'rotate' is unknown; use one of none, flip-shift"),
    ],
)
def test_refused_training(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Training(**settings)  # type: ignore[arg-type]


def sampled(scale: float = 1.0, rows: int = 20_000) -> Recording:
    """Logits whose softmax is the distribution the backbone's classes are drawn from, times `scale`."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, 5)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    classes = (shares.cumsum(1) > rng.random((rows, 1))).argmax(1)
    return Recording((logits * scale).astype(np.float32)[None], np.eye(5, dtype=np.float32)[classes])


def test_calibrated_logits_keep_their_temperature() -> None:
    assert calibrate(sampled()) == pytest.approx((1.0,), abs=0.03)


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_temperature_follows_the_scale_of_the_logits(scale: float) -> None:
    (plain,), (scaled,) = calibrate(sampled()), calibrate(sampled(scale))
    assert scaled == pytest.approx(scale * plain, rel=2e-3)


def test_a_head_that_always_agrees_has_a_finite_temperature() -> None:
    sure = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]] * 5
    (temperature,) = calibrate(Recording(sure[None], sure))
    assert 0.05 < temperature < 20


def test_a_recording_is_what_heads_and_backbone_answer(
    backbone: Backbone, data: ArrayRows, whole: tuple[Head, ...]
) -> None:
    picked = np.array([7, 3, 200])
    recording = record(backbone, whole, data, picked, "some")
    x = torch.from_numpy(data.take(picked)["x"])
    assert recording.logits.shape == (len(whole), 3, 4)
    assert np.allclose(recording.backbone, torch.softmax(backbone.graph_module(x), 1), atol=1e-6)
    assert recording.classes().shape == (3, len(whole))
    sure = recording.confidence([1.0] * len(whole), "max_probability")
    assert np.allclose(sure[:, 0], torch.softmax(torch.from_numpy(recording.logits[0]), 1).amax(1), atol=1e-6)
