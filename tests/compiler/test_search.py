"""Head search: trials share a stream, a restart changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Chain, Interrupted, captured, noisy
from torch import nn

from offramp.compiler import (
    FAMILIES,
    Costs,
    Family,
    HeadConfig,
    Options,
    Records,
    Training,
    build_head,
    compile,
    default_heads,
    distil,
    record,
    register_family,
)
from offramp.compiler.augment import identity
from offramp.compiler.compile import keep_beyond_chance
from offramp.compiler.kept import Kept
from offramp.compiler.learner import Learner
from offramp.compiler.memory import groups
from offramp.compiler.search import Found, Search, saved_at, search_heads, shortlist, worth
from offramp.compiler.stream import Stream
from offramp.passes import Backbone, Candidate, find_candidates
from offramp.runtime.data import ArrayRows
from offramp.runtime.errors import ModelError, UsageError

SEARCH = Search(engine="tpe", trials=3, waves=2, epochs=2)
TRAINING = Training(epochs=3, batch=32, augment=noisy)
LEARN, SELECT = np.arange(200), np.arange(200, 300)


def test_worth_is_the_compute_saved_less_the_price() -> None:
    sure = np.linspace(1, 0, 100, dtype=np.float32)
    agrees = np.ones(100, bool)
    agrees[60:] = False
    assert saved_at(sure, agrees, 0.8, 0.05, [0.0, 0.02, 1.0]) == pytest.approx(
        [0.6 * 0.8 - 0.05, 0.62 * 0.8 - 0.05, 0.75]
    )
    assert saved_at(sure, ~agrees, 0.8, 0.05, [0.0]) == [0.0], "an exit that costs more than it saves is left out"
    assert worth(sure, agrees, 0.8, 0.05, 0.02) == pytest.approx((0.61 + 0.62 + 0.64) / 3 * 0.8 - 0.05)


def test_a_shortlist_leaves_out_what_its_neighbours_do_as_well() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random((400, 3), dtype=np.float32)
    agrees = rng.random((400, 3)) < sure
    agrees[:, 2], sure[:, 2] = agrees[:, 1], sure[:, 1]  # the third says what the second says, and later
    costs = Costs(np.array([0.2, 0.2, 0.1, 0.5]), np.array([0.01, 0.01, 0.01]))
    assert shortlist(Records(sure, agrees), costs, 0.05, 2) == (0, 1)
    assert shortlist(Records(sure, agrees), costs, 0.05, 3) == (0, 1, 2)
    useless = np.array([True, False, True])
    assert shortlist(Records(sure, agrees & useless), costs, 0.05, 2) == (0, 2)


def sure_chain(width: int = 16) -> Chain:
    """Its answers differ from row to row, so there is something to learn."""
    torch.manual_seed(0)
    model = Chain().eval()
    if width != 16:
        model.first, model.second = torch.nn.Linear(6, width), torch.nn.Linear(width, width)
        model.last = torch.nn.Linear(width, 4)
    with torch.no_grad():
        model.last.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return captured(sure_chain())


@pytest.fixture(scope="module")
def candidates(backbone: Backbone) -> tuple[Candidate, ...]:
    return find_candidates(backbone).kept


@pytest.fixture(scope="module")
def data() -> ArrayRows:
    return ArrayRows({"x": np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)})


def stream(backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows) -> Stream:
    return Stream(backbone, candidates, data, 32, noisy, 0)


def count_passes(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    passes: list[int] = []
    observe = stream.observe

    def counted(batch: Mapping[str, torch.Tensor], rows: np.ndarray) -> Any:
        passes.append(len(next(iter(batch.values()))))
        return observe(batch, rows)

    monkeypatch.setattr(stream, "observe", counted)
    return passes


@pytest.mark.parametrize("budget", [0, 30_000, 10**9])
def test_kept_values_are_read_again_and_are_the_same_within_and_past_the_budget(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path, budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = stream(backbone, candidates, data)
    passes = count_passes(source, monkeypatch)
    kept = Kept(source, tmp_path / "values", budget)
    turns = []
    for _ in range(2):
        passes.clear()
        turns.append([list(kept.epoch(LEARN, e)) for e in range(3)] + [list(kept.plain("select", SELECT))])
        rows = sum(passes)
        if len(turns) == 1:
            assert rows == 700
        else:
            assert rows == {0: 700, 30_000: rows, 10**9: 0}[budget]
            assert budget != 30_000 or 0 < rows < 700
    for one, two in zip(*turns, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.target, b.target)
            assert all(torch.equal(v, w) for v, w in zip(a.values, b.values, strict=True))
    held = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert held <= budget


def test_rows_that_are_shown_again_are_kept_once_whatever_their_order(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = Stream(backbone, candidates, data, 32, identity, 0)
    passes = count_passes(source, monkeypatch)
    kept, none = Kept(source, tmp_path / "values", 10**9), Kept(source, tmp_path / "none", 0)
    for epoch in (2, 0):
        passes.clear()
        read = list(kept.epoch(LEARN, epoch))
        assert sum(passes) == (len(LEARN) if epoch == 2 else 0)
        for one, other in zip(read, none.epoch(LEARN, epoch), strict=True):
            torch.testing.assert_close(one.target, other.target)
            for a, b in zip(one.values, other.values, strict=True):
                torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)  # half precision of what rounds otherwise
    kept.close()
    assert not list(tmp_path.iterdir())


class Words(nn.Module):
    """Sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.mix(self.embed(ids))).mean(1))


def test_values_whose_size_differs_from_row_to_row_are_not_kept(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 20, (64, 5))

    class Uneven(ArrayRows):
        def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"ids": super().take(indices)["ids"][:, : 4 + int(indices[0]) // 32]}

    backbone = captured(Words, ids=torch.from_numpy(ids[:8]))
    candidates = find_candidates(backbone).kept
    kept = Kept(Stream(backbone, candidates, Uneven({"ids": ids}), 32, identity, 0), tmp_path / "values", 10**9)
    for _ in range(2):
        assert [o.values[0].shape[1] for o in kept.plain("all", np.arange(64))] == [4, 5]
    assert not list((tmp_path / "values").iterdir())


def searched(
    backbone: Backbone, candidates: tuple[Candidate, ...], rows: ArrayRows, folder: Path,
    search: Search = SEARCH, training: Training = TRAINING, seed: int = 0, said: list[str] | None = None,
) -> Found:  # fmt: skip
    return search_heads(
        backbone, candidates, rows, learn=LEARN, select=SELECT, tolerance=0.05, search=search, training=training,
        seed=seed, folder=folder, report=(said if said is not None else []).append,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    return searched(backbone, candidates, data, tmp_path_factory.mktemp("whole"))


def test_every_candidate_gets_a_head_and_half_of_a_wave_goes_on(
    whole: Found, candidates: tuple[Candidate, ...]
) -> None:
    assert set(whole.configs) == set(whole.rates) == {c.name for c in candidates}
    assert len(whole.trials) == len(candidates) * 4, "three proposals and the default head each"
    for index, candidate in enumerate(candidates):
        own = [t for t in whole.trials if t["candidate"] == index]
        assert sum(t["default"] for t in own) == 1
        assert sorted(max(t["scores"]) for t in own) == [1, 2, 2, 2], "of two proposals one is dropped halfway"
        best = max((t for t in own if 2 in t["scores"]), key=lambda t: t["scores"][2])
        assert whole.configs[candidate.name].settings == best["settings"]
        assert whole.configs[candidate.name].family in FAMILIES


def test_each_batch_goes_through_the_backbone_once_for_all_trials(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path, whole: Found,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    passes: list[int] = []
    observe, learn, steps = Stream.observe, Learner.learn, []

    def counted(self: Stream, batch: Mapping[str, torch.Tensor], rows: np.ndarray) -> Any:
        passes.append(len(next(iter(batch.values()))))
        return observe(self, batch, rows)

    def stepped(self: Learner, target: torch.Tensor, *rest: torch.Tensor) -> None:
        steps.append(len(target))
        learn(self, target, *rest)

    monkeypatch.setattr(Stream, "observe", counted)
    monkeypatch.setattr(Learner, "learn", stepped)
    found = searched(backbone, candidates, data, tmp_path)
    assert found == whole
    assert sum(passes) == 2 * len(LEARN) + len(SELECT), "two epochs and the selection rows, whatever the trials"
    assert sum(steps) == len(candidates) * (3 + 2 + 1 + 1) * len(LEARN), "of two proposals one goes on, of one it does"
    assert [p.name for p in tmp_path.iterdir()] == ["search.pt"]


@pytest.mark.parametrize("engine", ["tpe", "evolution", "built-in"])
@pytest.mark.parametrize("after", [8, 12, 16, 20, 26])
def test_an_interrupted_search_goes_on_to_the_same_heads(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path, engine: str, after: int
) -> None:
    search, training = replace(SEARCH, engine=engine), replace(TRAINING, kept_bytes=0)
    expected = searched(backbone, candidates, data, tmp_path / "whole", search, training)
    rows = Interrupted(data.take(np.arange(300)))
    rows.left = after
    with pytest.raises(KeyboardInterrupt):
        searched(backbone, candidates, rows, tmp_path / "cut", search, training)
    assert not (tmp_path / "cut" / "values").exists()
    said: list[str] = []
    assert searched(backbone, candidates, data, tmp_path / "cut", search, training, said=said) == expected
    assert any(line.startswith("search goes on after") for line in said) == (after > 8)


def test_only_the_shortlist_is_trained_to_the_end(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    options = Options(
        tolerance=1.0, policy="joint", batches=(), targets=("onnx-segments",), training=Training(epochs=2, batch=32),
        search=Search(engine="built-in", trials=1, waves=1, epochs=2, shortlist=1),
    )  # fmt: skip
    said: list[str] = []
    manifest = compile(sure_chain(64), rows, tmp_path / "one", options=options, say=said.append)
    assert "1 of 2 candidates go on, those whose exits save most together" in said
    assert any(line.startswith("distilling 1 heads on") for line in said)
    assert len(manifest.exits) <= 2


def test_a_search_is_taken_up_whatever_the_epochs_of_the_training_after_it(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path
) -> None:
    said: list[str] = []
    first = searched(backbone, candidates, data, tmp_path)
    again = searched(backbone, candidates, data, tmp_path, training=replace(TRAINING, epochs=7), said=said)
    assert any("goes on" in line for line in said) and again.configs == first.configs


def test_another_jobs_checkpoint_is_not_taken_up(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows, tmp_path: Path
) -> None:
    searched(backbone, candidates, data, tmp_path)
    said: list[str] = []
    searched(backbone, candidates, data, tmp_path, seed=1, said=said)
    assert not any("goes on" in line for line in said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "oracle"}, "search engine 'oracle' is unknown; use one of none, tpe"),
        ({"trials": 1}, "1 trials in 2 waves"),
        ({"waves": 0}, "in 0 waves"),
        ({"epochs": 1}, "1 epochs of search"),
        ({"shortlist": 0}, "a shortlist of 0 candidates"),
        ({"spaces": {"tree": {}}}, "head family 'tree', which is none of conv"),
        ({"spaces": {"dense": {}}}, "the search space is empty"),
        ({"spaces": {"dense": {"cost": {"_type": "choice", "_value": [0.1]}}}}, "search space of dense lacks dense"),
    ],
)
def test_refused_searches(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Search(**{"engine": "tpe", **given})


def test_a_compile_searches_within_its_memory_and_stores_what_it_found(tmp_path: Path) -> None:
    model = sure_chain(64)
    rows = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    options = Options(
        tolerance=1.0, policy="joint", batches=(), targets=("onnx-segments",), training=Training(epochs=20, batch=32),
        search=Search(engine="tpe", trials=2, waves=1, epochs=2), memory_budget=360_000,
    )  # fmt: skip
    said: list[str] = []
    manifest = compile(model, rows, tmp_path / "one", options=options, work=tmp_path / "work", say=said.append)
    assert "the memory budget takes the 2 candidates in 2 groups, one after the other" in said
    assert sum(line.startswith("searched 3 heads at 1 candidates") for line in said) == 2
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"heads0", "heads1", "search0", "search1"}
    early = [e for e in manifest.exits if e.head != "backbone"]
    assert early, said
    for spec in early:
        family, *settings = spec.head_config.items()
        assert build_head(HeadConfig(family[1], dict(settings)), (64,), 4)
    again = compile(model, rows, tmp_path / "two", options=options)
    assert again.exits == manifest.exits
    assert again.files == manifest.files
    said.clear()
    one = replace(options, search=replace(options.search, shortlist=1))
    compile(model, rows, tmp_path / "three", options=one, say=said.append)
    assert "of all groups' candidates 1 go on" in said
    assert sum(line.startswith("distilling") for line in said) == 1


def test_candidates_go_in_groups_that_keep_to_the_memory(backbone: Backbone, candidates: tuple[Candidate, ...]) -> None:
    assert groups(backbone, candidates, 32, 1, None) == [candidates]
    assert groups(backbone, candidates, 32, 1, 10**9) == [candidates]
    assert groups(backbone, candidates, 32, 1, 62_000) == [(c,) for c in candidates]
    with pytest.raises(UsageError, match="training at relu takes about"):
        groups(backbone, candidates, 32, 1, 1000)


def test_a_head_that_learned_nothing_is_dropped_with_that_reason(
    backbone: Backbone, candidates: tuple[Candidate, ...], data: ArrayRows
) -> None:
    configs = default_heads(backbone, candidates)
    heads = distil(
        backbone,
        candidates,
        configs,
        data,
        learn=LEARN,
        validate=SELECT,
        training=Training(epochs=30, batch=32),
        seed=0,
    )
    recording = record(backbone, heads, data, SELECT, "select")
    kept, left = keep_beyond_chance(heads, recording, lambda line: None)
    assert kept == heads
    assert np.array_equal(left.logits, recording.logits)
    said: list[str] = []
    hopeless = (replace(heads[0], loss=1.0), *heads[1:])
    kept, left = keep_beyond_chance(hopeless, recording, said.append)
    assert kept == heads[1:]
    assert np.array_equal(left.logits, recording.logits[1:])
    assert said[0].startswith(f"dropped {candidates[0].place}: its head learned hardly anything (1 nats")
    said.clear()
    kept, left = keep_beyond_chance([replace(h, loss=1.0) for h in heads], recording, said.append)
    assert len(kept) == len(heads) and left is recording
    assert said[0].startswith("no head learned more than one answer for all of 100 rows would tell")


def test_a_family_of_ones_own_is_the_default_and_searched_beside_the_others(
    backbone: Backbone,
    candidates: tuple[Candidate, ...],
    data: ArrayRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offramp.compiler.heads.family.FAMILIES", dict(FAMILIES))
    own = Family(
        rank=2,
        build=lambda shape, classes, given: torch.nn.Linear(shape[0], classes),
        default=lambda shape, width: {},
        describe=lambda given: "linear",
    )
    register_family("linear", own)
    found = searched(backbone, candidates, data, tmp_path)
    for index in range(len(candidates)):
        tried = [t for t in found.trials if t["candidate"] == index]
        assert [t["family"] for t in tried if t["default"]] == ["linear"]
        assert {t["family"] for t in tried} == {"linear", "dense"}


def test_a_model_that_fails_on_one_row_is_told_apart_from_heads_that_learn_nothing(data: ArrayRows) -> None:
    class Standardised(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))

    model = Standardised().eval()
    rows = data.take(np.arange(200))["x"]
    found = captured(model, x=torch.from_numpy(rows[:8]))
    rows[150] = 1.0  # no spread: 0 / 0
    blank = ArrayRows({"x": rows})
    with pytest.raises(ModelError, match="not finite for row 150 of the data"):
        list(stream(found, find_candidates(found).kept, blank).plain(np.arange(100, 200)))
    with pytest.raises(ModelError, match="not finite for row 150 of the data"):
        record(found, (), blank, np.arange(200), "all")
