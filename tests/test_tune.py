"""Tuning: the times of a machine decide which exits are asked, the records what they may answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import Compiled

from offramp.runtime import load, open_artifact
from offramp.runtime.artifact import write_artifact
from offramp.runtime.cli import main
from offramp.runtime.errors import ArtifactError, InputError, StorageError, UsageError
from offramp.runtime.manifest import Plan
from offramp.runtime.selection import CERTIFIED, Records, disagreement, rows_needed
from offramp.runtime.stage_times import StageTimes, measure_stages
from offramp.runtime.tune import (
    Objective,
    Stored,
    _lost,
    best_set,
    evaluated,
    expected_ms,
    read_records,
    retuned,
    stage_costs,
    tune,
)


def times(head: tuple[float, ...], stage: float = 1.0, sizes: tuple[int, ...] = (1, 4)) -> StageTimes:
    """Stages that take `stage` ms a row, heads that take `head`."""
    rows = np.array(sizes, float)
    silent = np.outer(np.full(len(head) + 1, stage), rows)
    return StageTimes(sizes, silent, silent + np.outer([*head, 0.0], rows), np.zeros(len(silent)))


def test_calls_between_measured_sizes_are_interpolated() -> None:
    found = StageTimes((1, 4, 8), np.array([[1.0, 4.0, 6.0]]), np.array([[2.0, 5.0, 7.0]]), np.zeros(1))
    assert found.call(0, np.array([0, 1, 2, 6, 8]), False) == pytest.approx([0, 1, 2, 5, 6])
    assert float(found.call(0, 6, True)) == 6.0


def test_compaction_pays_from_the_share_at_which_a_stage_saves_more_than_gathering_costs() -> None:
    silent = np.array([[1.0, 4.0], [1.0, 4.0], [2.0, 2.0]])
    found = StageTimes((1, 4), silent, silent, np.array([0.25, 0.25, 0.0]))
    # c rows dropped of n: (n - c) * 0.25 < c * 1 from a share of 0.2 on; the last stage takes no longer for more rows.
    assert found.worth_dropping() == pytest.approx((0.2, 1.0))


def test_the_mean_counts_every_stage_for_the_rows_that_reach_it() -> None:
    exits = np.array([0, 2, 1, 2])
    mean = Objective(batch=4)
    assert mean.of(exits, (True, True), times((0.5, 0.25))) == pytest.approx((4 * 1.5 + 3 * 1.25 + 2) / 4)
    assert mean.of(exits, (False, True), times((0.5, 0.25))) == pytest.approx((4 + 3 * 1.25 + 2) / 4)


def test_rows_that_do_not_fill_their_last_batch_make_no_batch_larger() -> None:
    exits = np.arange(10) % 2
    once = Objective(batch=4).of(exits, (), times((0, 0)))
    assert Objective(batch=4).of(np.resize(exits, 12), (), times((0, 0))) == once
    assert once == pytest.approx((4 + 2) / 4), "all rows of a batch at the first stage, every second at the next"


def test_a_percentile_is_of_the_time_until_each_row_is_answered() -> None:
    exits = np.array([0, 2, 1, 2])
    alone = Objective(batch=1, percentile=100)
    assert alone.of(exits, (True, True), times((0.5, 0.25))) == pytest.approx(1.5 + 1.25 + 1)
    half = Objective(batch=1, percentile=50)
    assert half.of(exits, (True, True), times((0.5, 0.25))) == pytest.approx((2.75 + 3.75) / 2)


def test_objectives_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="percentile 0"):
        Objective(percentile=0)
    with pytest.raises(UsageError, match="batch 0"):
        Objective(batch=0)


def test_the_best_set_is_found_by_trying_all_and_by_leaving_out() -> None:
    worth = {0: -1.0, 1: 2.0, 2: 3.0, 3: -2.0, 4: 0.5, 5: -1.0, 6: 1.0, 7: -0.1}

    def price(some: tuple[int, ...]) -> float:
        return 10 - sum(worth[e] for e in some)

    assert best_set(4, price) == (1, 2)
    assert best_set(8, price) == (1, 2, 4, 6), "one after the other is left out"
    assert best_set(3, lambda some: 1.0) == (), "of equals the fewest"


def records(rows: int, seed: int) -> Records:
    """Two exits whose confidence is the chance that they agree."""
    rng = np.random.default_rng(seed)
    sure = 1 - rng.random((rows, 2)) ** np.array([3.0, 4.0])
    return Records(sure.astype(np.float32), rng.random((rows, 2)) < sure)


def stored(rows: int = 1500, sets: int = 1) -> Stored:
    parts = ("select", "certify", "test")
    return Stored({part: records(rows, seed) for seed, part in enumerate(parts)}, None, sets, 0.05)


def with_policy(compiled: Compiled, policy: str) -> Compiled:
    plans = (Plan(0.01, policy, (0.5, 0.5), None), Plan(0.03, policy, (0.5, 0.5), None))
    return replace(compiled, manifest=replace(compiled.manifest, plans=plans, default_plan=1))


@pytest.mark.parametrize(
    ("head", "asked"), [((0.0, 0.0), (True, True)), ((0.9, 0.0), (False, True)), ((9.0, 9.0), (False, False))]
)
def test_an_exit_is_asked_where_its_time_pays(
    compiled: Compiled, head: tuple[float, float], asked: tuple[bool, bool]
) -> None:
    manifest = with_policy(compiled, "joint").manifest
    plans = retuned(manifest, stored(), times(head), Objective())
    assert [plan.tolerance for plan in plans] == [0.01, 0.03]
    assert tuple(t is not None for t in plans[1].thresholds) == asked
    for plan in plans:
        limits = [math.inf if t is None else t for t in plan.thresholds]
        assert disagreement(stored().recorded["select"], (0, 1), limits) <= plan.tolerance


def test_certificates_pay_for_what_the_certification_rows_decided_before(compiled: Compiled) -> None:
    manifest = with_policy(compiled, CERTIFIED).manifest
    free = times((0.0, 0.0))
    once = retuned(manifest, stored(sets=1), free, Objective())[1].certificate
    thrice = retuned(manifest, stored(sets=3), free, Objective())[1].certificate
    assert once is not None
    assert thrice is not None
    assert once.delta == thrice.delta == 0.05
    assert once.bound <= 0.03
    assert thrice.bound <= 0.03
    assert thrice.observed <= once.observed
    few = rows_needed(0.03, 0.05)
    scarce = retuned(manifest, stored(rows=few, sets=3), free, Objective())
    assert [(p.policy, p.certificate) for p in scarce] == [("predicted", None)] * 2, "too few for a third of delta"
    assert _lost(scarce[1], stored(rows=few, sets=3)).startswith(
        f"the plan for 0.03 is not certified any more: where 3 sets of exits were decided between, "
        f"{rows_needed(0.03, 0.05 / 3)} certification rows are needed and the artifact has {few}"
    )


def test_costs_are_milliseconds_of_a_full_batch() -> None:
    costs = stage_costs(times((0.5, 0.25)), 4)
    assert costs.segment == pytest.approx([1, 1, 1])
    assert costs.head == pytest.approx([0.5, 0.25])


def test_the_records_tell_what_the_eager_run_told(compiled: Compiled) -> None:
    """Evaluation from the records alone, for the plan that was evaluated when the artifact was made."""
    manifest = compiled.manifest
    kept = read_records(open_artifact(compiled.path))
    found, expected = evaluated(manifest, manifest.plans[manifest.default_plan], kept), manifest.evaluation
    assert [e.exit_rate for e in found.exits] == pytest.approx([e.exit_rate for e in expected.exits])
    assert [e.agreement for e in found.exits] == pytest.approx([e.agreement for e in expected.exits])
    assert [e.accuracy for e in found.exits] == pytest.approx([e.accuracy for e in expected.exits])
    for name in ("disagreement", "accuracy", "flops", "regret"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name
    assert found.disagreement_interval == pytest.approx(expected.disagreement_interval, abs=1e-6)


def test_stages_are_measured_at_every_size_rows_come_down_to(compiled: Compiled) -> None:
    found = measure_stages(open_artifact(compiled.path), 6, 1, rounds=1)
    assert found.sizes == (1, 2, 4, 6)
    assert found.silent.shape == found.asked.shape == (len(compiled.manifest.exits), 4)
    assert (found.asked >= found.silent).all()
    assert (found.silent > 0).all()
    assert (found.gather[:-1] > 0).all()
    assert all(0 <= share <= 1 for share in found.worth_dropping())


def test_a_tuned_artifact_answers_by_its_new_plans(compiled: Compiled, tmp_path: Path) -> None:
    made = tune(compiled.path, tmp_path / "tuned", objective=Objective(batch=4), threads=1, tolerance=0.05)
    assert made == open_artifact(tmp_path / "tuned").manifest
    assert made.plans[made.default_plan].tolerance == 0.05
    assert made.measured.tuned is not None
    assert made.measured.tuned.batches == (1, 2, 4)
    kept = read_records(open_artifact(compiled.path)).recorded["select"]
    with load(tmp_path / "tuned", threads=1) as session, load(compiled.path, threads=1) as before:
        images = compiled.digits.images
        assert session.run(images).exits.shape == (len(images),)
        backbone = before.run(images, tolerance=0.0).classes
        assert np.array_equal(session.run(images, tolerance=0.0).classes, backbone)
        silent = [t is None for t in made.plans[made.default_plan].thresholds]
        left = np.bincount(session.run(images).exits, minlength=len(made.exits))
        assert not left[:-1][silent].any(), "an exit that is not asked answers nothing"
        limits = [math.inf if t is None else t for t in made.plans[made.default_plan].thresholds]
        assert disagreement(kept, range(kept.candidates), limits) <= 0.05
    gained = made.measured.tuned
    assert gained.after_ms == pytest.approx(
        expected_ms(
            made.plans[made.default_plan], kept, Objective(batch=4),
            StageTimes(gained.batches, np.array(gained.silent_ms), np.array(gained.asked_ms), np.zeros(0)),
        )
    )  # fmt: skip


def test_the_command_shows_before_and_after(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "images.npy", compiled.digits.images[:20])
    words = ["tune", str(compiled.path), "-o", str(tmp_path / "t"), "--batch", "2", "--threads", "1"]
    assert main([*words, "--percentile", "95", "--data", str(tmp_path / "images.npy")]) == 0
    said = capsys.readouterr().out
    for part in ("every exit silent", "before", "after", "95 % of rows are answered", "tuned artifact in"):
        assert part in said


def test_what_cannot_be_tuned_is_refused_and_leaves_nothing(compiled: Compiled, tmp_path: Path) -> None:
    def without(gone: str, out: str) -> Path:
        """The artifact but for some files."""
        manifest = compiled.manifest
        kept = {name: spec for name, spec in manifest.files.items() if not name.startswith(gone)}
        stages = manifest.stages if gone != "stages/" else ()
        names = [*kept, *manifest.measured.files]
        files = {name: (compiled.path / name).read_bytes() for name in names}
        write_artifact(tmp_path / out, replace(manifest, files=kept, stages=stages), files)
        return tmp_path / out

    with pytest.raises(ArtifactError, match=r"records\.npz: is not there"):
        tune(without("records.npz", "bare"), tmp_path / "out", threads=1)
    with pytest.raises(UsageError, match="has no stages to measure"):
        tune(without("stages/", "whole"), tmp_path / "out", threads=1)
    with pytest.raises(UsageError, match="tolerance 2 is not a share"):
        tune(compiled.path, tmp_path / "out", threads=1, tolerance=2)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises((UsageError, StorageError), match="taken"):
        tune(compiled.path, tmp_path / "taken", threads=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "taken", "whole"]


def test_rows_to_measure_on_are_checked_and_repeated(compiled: Compiled, tmp_path: Path) -> None:
    rows = {spec.name: compiled.digits.images[:3] for spec in compiled.manifest.inputs}
    tune(compiled.path, tmp_path / "few", objective=Objective(4), rows=rows)
    for wrong in ({"other": compiled.digits.images[:3]}, {name: values[:0] for name, values in rows.items()}):
        with pytest.raises(InputError):
            tune(compiled.path, tmp_path / "wrong", objective=Objective(4), rows=wrong)
    assert not (tmp_path / "wrong").exists()


def test_the_command_reads_a_folder_of_images_as_the_artifact_says(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replace(compiled.manifest, preprocessing="resize=8x8")
    names = [*manifest.files, *manifest.measured.files]
    write_artifact(tmp_path / "a", manifest, {name: (compiled.path / name).read_bytes() for name in names})
    asked: list[object] = []

    def stop(*_: object, preprocessing: str | None, **__: object) -> None:
        asked.append(preprocessing)
        raise InputError("as far as this test goes")

    monkeypatch.setattr("offramp.runtime.commands.open_data", stop)
    assert main(["tune", str(tmp_path / "a"), "-o", str(tmp_path / "t"), "--data", str(tmp_path)]) == 2
    assert asked == ["resize=8x8"]
