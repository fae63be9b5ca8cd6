"""Hints: which value of a backbone they are made of, what is learned from them, and what is left of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Chain, captured, noisy
from torch import nn

from offramp.compiler import HeadConfig, Training, build_head, default_heads, distil
from offramp.compiler.augment import identity
from offramp.compiler.hint import Hint, last_dense
from offramp.compiler.kept import Kept
from offramp.compiler.learner import Learner
from offramp.compiler.memory import groups
from offramp.compiler.stream import FEATURES, Stream
from offramp.passes import Backbone, find_candidates, last_features
from offramp.runtime.data import ArrayRows

WIDE = 3 * FEATURES - 7


class Maps(nn.Module):
    """Ends in a convolution that scores every pixel, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score = nn.Conv2d(3, WIDE, 3), nn.Conv2d(WIDE, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.relu(self.first(x))).mean((2, 3)).softmax(1)


class Tokens(nn.Module):
    """Ends in the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.mix(self.embed(ids))))[:, 0]


class Video(nn.Module):
    """Its last layer reads what no head could."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score = nn.Linear(24, 24), nn.Conv3d(2, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.relu(self.first(x)).view(-1, 2, 3, 2, 2)).mean((2, 3, 4))


def value_of(backbone: Backbone, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, D] the hint of some rows."""
    stream = Stream(backbone, [], ArrayRows({n: t.numpy() for n, t in rows.items()}), 8, identity, 0, hints=True)
    found = stream.observe(rows, np.arange(len(next(iter(rows.values())))))
    assert found.hint is not None
    assert found.hint.shape[1] == stream.features
    return found.hint


def test_a_hint_is_what_the_last_layer_with_compute_reads() -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), torch.randn(8, 6)
    read: list[torch.Tensor] = []
    model.last.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(x)
    torch.testing.assert_close(value_of(captured(model), {"x": x}), read[0])


def test_maps_and_tokens_hint_by_their_means_and_many_features_by_some() -> None:
    torch.manual_seed(0)
    maps, x = Maps().eval(), torch.randn(8, 3, 8, 8)
    expected = torch.relu(maps.first(x)).mean((2, 3))[:, ::3]
    assert expected.shape[1] <= FEATURES
    torch.testing.assert_close(value_of(captured(maps, x=x), {"x": x}), expected, rtol=1e-4, atol=1e-5)

    tokens, ids = Tokens().eval(), torch.randint(20, (8, 5))
    torch.testing.assert_close(
        value_of(captured(tokens, ids=ids), {"ids": ids}), torch.relu(tokens.mix(tokens.embed(ids))).mean(1)
    )


def test_a_last_layer_that_reads_what_no_head_could_hints_by_what_stands_before() -> None:
    backbone = captured(Video, x=torch.randn(8, 24))
    name = last_features(backbone)
    assert name is not None
    node = next(n for n in backbone.graph.nodes if n.name == name)
    assert node.meta["val"].dim() == 2


def test_a_hint_is_learned_to_the_end_where_the_head_reads_as_much() -> None:
    torch.manual_seed(0)
    features = torch.randn(256, 5) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 1.0]) + 7
    head = nn.Sequential(nn.Linear(5, 3))
    last = last_dense(head)
    assert last is not None
    hint = Hint(head, last, 5)
    optimiser = torch.optim.Adam(hint.parameters(), lr=0.05)
    losses = []
    for _ in range(300):
        head((features - 7) / features.std(0))
        loss = hint.loss(features)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert losses[0] == pytest.approx(1, rel=0.3), "in deviations, whatever the features' sizes"
    assert losses[-1] < 0.2, "but the one that hardly moves"


def test_rows_without_finite_features_are_left_out_and_too_few_tell_nothing() -> None:
    torch.manual_seed(0)
    head, x, features = nn.Sequential(nn.Linear(5, 3)), torch.randn(6, 5), torch.randn(6, 4)
    last = last_dense(head)
    assert last is not None
    hint = Hint(head, last, 4)
    head(x[1:])
    without = hint.loss(features[1:])
    head(x)
    features[0, 2] = torch.nan
    assert hint.loss(features).item() == without.item() > 0
    assert hint.loss(features).item() == 0, "nothing was read since"
    head(x[:1])
    assert hint.loss(torch.ones(1, 4)).item() == 0
    head.eval()(x)
    assert hint.loss(torch.ones(6, 4)).item() == 0, "what is judged is not learned from"


@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 8, 8)])
def test_heads_of_every_kind_take_hints_and_keep_nothing_of_them(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    name = {1: "dense", 2: "tokens", 3: "conv"}[len(shape)]
    settings = {"widths": [6], "kernel": 3, "strides": [1]} if name == "conv" else {"hidden": 8}
    head = build_head(HeadConfig(name, settings), shape, 3)
    names = set(head.state_dict())
    learner = Learner(head, 40, 1e-2, Training(), 7)
    assert learner.hint is not None
    target, value, features = torch.full((16, 3), 1 / 3), torch.randn(16, *shape), torch.randn(16, 7)
    before = [p.clone() for p in learner.hint.parameters()]
    for _ in range(3):
        learner.learn(target, value, features)
    assert all(not torch.equal(a, b) for a, b in zip(before, learner.hint.parameters(), strict=True))
    again = Learner(build_head(HeadConfig(name, settings), shape, 3), 40, 1e-2, Training(), 7)
    again.restore(copy.deepcopy(learner.state()))
    for one in (learner, again):
        one.learn(target, value, features)
    assert all(torch.equal(a, b) for a, b in zip(learner.hint.parameters(), again.hint.parameters(), strict=True))
    finished = learner.finished()
    assert set(finished.state_dict()) == names
    assert not any(m._forward_pre_hooks for m in finished.modules())


def test_a_head_without_a_dense_layer_learns_without_hints() -> None:
    head = nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = Learner(head, 2, 1e-3, Training(), 7)
    learner.learn(torch.full((4, 3), 1 / 3), torch.randn(4, 4, 6, 6), torch.randn(4, 7))
    assert learner.hint is None


def test_hints_are_kept_with_the_values_and_change_what_heads_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = captured(Chain)
    candidates = find_candidates(backbone).kept
    rows = np.arange(200)
    data = ArrayRows({"x": np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)})
    stream = Stream(backbone, candidates, data, 32, noisy, 0, hints=True)
    kept = Kept(stream, tmp_path / "values", 10**9)
    first, again = list(kept.epoch(rows, 0)), list(kept.epoch(rows, 0))
    assert (tmp_path / "values").exists()
    for one, other in zip(first, again, strict=True):
        assert one.hint is not None
        assert other.hint is not None
        assert len(one.values) == len(candidates) + 1
        assert torch.equal(one.hint, other.hint)

    def weights(training: Training) -> torch.Tensor:
        heads = distil(
            backbone, candidates, default_heads(backbone, candidates), data, learn=rows,
            validate=np.arange(200, 300), training=training, seed=0,
        )  # fmt: skip
        return torch.cat([p.flatten() for head in heads for p in head.module.parameters()])

    training = Training(epochs=2, batch=32)
    assert not torch.equal(weights(training), weights(replace(training, hint=0.0)))


def test_what_tells_hints_is_counted_into_the_memory_that_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = captured(Chain)
    candidates = find_candidates(backbone).kept
    budget = next(b for b in range(10_000, 10**7, 10_000) if _fits(backbone, b))
    monkeypatch.setattr("offramp.compiler.memory.hinted", lambda backbone: ("", 10_000))
    assert not _fits(backbone, budget)
    assert len(groups(backbone, candidates, 32, 1, None)) == 1


def _fits(backbone: Backbone, budget: int) -> bool:
    from offramp.runtime.errors import UsageError

    try:
        return len(groups(backbone, find_candidates(backbone).kept, 32, 1, budget)) == 1
    except UsageError:
        return False
