"""The recording: what goes in comes out, it chooses fairly, it never waits."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from recording_help import PATIENCE, numbers, record_all, recording, sample

from offramp.runtime import InputError, StorageError, UsageError
from offramp.runtime.data import open_data
from offramp.runtime.manifest import TensorSpec
from offramp.runtime.serve.record_format import Row, pack, unpack
from offramp.runtime.serve.record_reading import (
    check_recording,
    export,
    live_disagreement,
    models,
    read_recording,
)
from offramp.runtime.serve.record_store import FILE, SMALLEST, Store
from offramp.runtime.serve.recording import Recording
from offramp.runtime.serve.work import Sample

DTYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "uint64", "float16", "float32", "float64", ">f4")
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
INPUT = st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES))
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@given(st.dictionaries(TEXT, INPUT, min_size=1, max_size=3), TEXT, st.integers(0, 9), st.integers(1, 7), st.data())
def test_a_row_is_read_back_bit_for_bit(
    inputs: dict[str, np.ndarray], model: str, exit_: int, classes: int, data: st.DataObject
) -> None:
    probabilities = arrays.arrays(np.float32, classes, elements=st.floats(0, 1, width=32))
    given_ = Sample(model, "d", inputs, exit_, data.draw(probabilities), data.draw(probabilities), 1234.5678)
    back = unpack(pack(given_), "here")
    assert list(back.inputs) == list(inputs)
    for name, array in inputs.items():
        assert back.inputs[name].dtype == array.dtype
        assert back.inputs[name].shape == array.shape
        assert back.inputs[name].tobytes() == array.tobytes()
    assert (back.early.tobytes(), back.final.tobytes()) == (given_.early.tobytes(), given_.final.tobytes())
    assert (back.model, back.digest, back.exit, back.time) == (model, "d", exit_, 1234.5678)


def test_any_altered_column_is_noticed() -> None:
    row = pack(sample(3))
    for name, value in {
        "model": "other", "digest": "d1", "exit": 1, "disagrees": 1 - row.disagrees, "time": 0.0,
        "checksum": bytes(32), "early": row.final, "final": row.early, "inputs": row.inputs[:-1] + b"\x7f",
    }.items():  # fmt: skip
        with pytest.raises(StorageError, match="here: altered"):
            unpack(type(row)(**{**vars(row), name: value}), "here")


def test_inputs_of_a_view_are_copied_at_once(tmp_path: Path) -> None:
    batch = np.arange(12, dtype=np.float32).reshape(3, 4)
    kept = recording(tmp_path)
    kept.record(Sample("m", "d", {"x": batch[:, 1]}, 0, np.ones(2, np.float32), np.ones(2, np.float32), 1.0))
    batch[:] = -1
    kept.close()
    assert read_recording(tmp_path, "m")[0].inputs["x"].tolist() == [[1, 5, 9]]


def test_rows_come_back_by_model_and_shape(tmp_path: Path) -> None:
    kept = recording(tmp_path)
    short, long = [sample(n, floats=3) for n in range(4)], [sample(n, floats=5) for n in range(4, 10)]
    record_all(kept, [*short[:2], *long, *short[2:], sample(77, model="other")])
    kept.close()
    groups = read_recording(tmp_path, "tiny")
    assert [group.inputs["x"].shape for group in groups] == [(6, 5), (4, 3)]
    for group, expected in zip(groups, (long, short), strict=True):
        assert np.array_equal(group.inputs["x"], np.stack([one.inputs["x"] for one in expected]))
        assert group.exits.tolist() == [one.exit for one in expected]
        assert np.array_equal(group.early, np.stack([one.early for one in expected]))
        assert np.array_equal(group.final, np.stack([one.final for one in expected]))
        assert group.times.tolist() == [one.time for one in expected]
        assert group.digests == ("d0",) * len(expected)
    assert models(tmp_path) == ["other", "tiny"]
    assert check_recording(tmp_path) == 11
    with pytest.raises(UsageError, match="no row of model 'third'; it holds other, tiny"):
        read_recording(tmp_path, "third")


def test_an_export_is_data_to_compile_with(tmp_path: Path) -> None:
    kept = recording(tmp_path / "kept")
    record_all(kept, [*(sample(n) for n in range(5)), sample(9, floats=7)])
    kept.close()
    out = tmp_path / "rows.npz"
    told = export(tmp_path / "kept", "tiny", out)
    assert (told.rows, told.left_out) == (5, 1)
    specs = (TensorSpec("x", "float32", ("batch", 6)), TensorSpec("n", "int64", ("batch", 1)))
    rows = open_data(out, inputs=specs)
    assert len(rows) == 5
    assert np.array_equal(rows.take(np.arange(5))["x"], np.stack([sample(n).inputs["x"] for n in range(5)]))
    with pytest.raises(StorageError, match="could not be written"):
        export(tmp_path / "kept", "tiny", tmp_path / "missing" / "rows.npz")


def test_live_disagreement_counts_one_version(tmp_path: Path) -> None:
    kept = recording(tmp_path)
    old, new = [sample(n) for n in range(30)], [sample(n, digest="d1") for n in range(30, 40)]
    record_all(kept, old + new)
    for digest, samples in (("d0", old), ("d1", new), ("d2", [])):
        disagreeing = sum(one.early.argmax() != one.final.argmax() for one in samples)
        assert live_disagreement(tmp_path, "tiny", digest) == (len(samples), disagreeing)  # while it is open
    kept.close()


def test_a_slow_writer_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = threading.Event(), threading.Event()
    add = Store.add

    def slow(self: Store, rows: Sequence[Row]) -> bool:
        writing.set()
        assert go_on.wait(PATIENCE)
        return add(self, rows)

    monkeypatch.setattr(Store, "add", slow)
    kept = recording(tmp_path, queue=4)
    kept.record(sample(0))
    assert writing.wait(PATIENCE)  # the first is out of the queue
    for number in range(1, 11):
        kept.record(sample(number))
    assert vars(kept.counts()) == {"recorded": 0, "dropped": 6}
    go_on.set()
    kept.close()
    assert vars(kept.counts()) == {"recorded": 5, "dropped": 6}
    assert numbers(tmp_path) == [0, 1, 2, 3, 4]
    kept.record(sample(11))
    assert kept.counts().dropped == 7  # closed


def test_rows_that_cannot_be_kept_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = recording(tmp_path, limit=SMALLEST)
    one = sample(1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            kept.record(sample(0, floats=SMALLEST // 8))
        kept.record(Sample("m", "d", {"x": np.array("text")}, 0, one.early, one.final, 1.0))
        kept.record(one)
        kept.close()
    assert vars(kept.counts()) == {"recorded": 1, "dropped": 4}
    assert [record.name for record in caplog.records] == ["offramp.runtime.serve.recording"]
    assert "give it a larger limit" in caplog.text
    with pytest.raises(InputError, match="only numbers"):
        pack(Sample("m", "d", {"x": np.array("text")}, 0, one.early, one.final, 1.0))


def test_many_threads_record_and_choose_at_once(tmp_path: Path) -> None:
    kept = recording(tmp_path, rate=0.5)
    draws: list[list[np.ndarray]] = [[] for _ in range(4)]

    def work(index: int) -> None:
        for step in range(50):
            draws[index].append(kept.chosen("tiny", step % 7))
            kept.record(sample(index * 1_000 + step))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    kept.close()
    counts = kept.counts()
    assert counts.recorded + counts.dropped == 200
    assert len(numbers(tmp_path)) == counts.recorded
    # Every row number was drawn once: together they hold as many as one thread would have chosen.
    drawn = sum(int(rows.sum()) for each in draws for rows in each)
    alone = Recording(tmp_path / "other", rate=0.5, seed=0, limit=SMALLEST)
    assert drawn == int(alone.chosen("tiny", sum(len(rows) for each in draws for rows in each)).sum())
    alone.close()


@given(st.integers(0, 2**63), st.lists(st.integers(0, 40), max_size=20), st.floats(0, 1))
@settings(max_examples=10)
def test_choosing_depends_on_seed_model_and_row_number_alone(seed: int, parts: list[int], rate: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = (recording(Path(folder) / name, rate=rate, seed=seed) for name in "ab")
        mixed = []
        for rows in parts:
            mixed.append(first.chosen("m", rows))
            first.chosen("other", rows + 1)
        whole = second.chosen("m", sum(parts))
        assert whole.dtype == bool
        assert np.array_equal(np.concatenate([*mixed, np.zeros(0, bool)]), whole)
        first.close()
        second.close()


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 1.0])
def test_choosing_is_unbiased(tmp_path: Path, rate: float) -> None:
    kept = recording(tmp_path, rate=rate, seed=5)
    rows = 200_000
    chosen = {model: kept.chosen(model, rows) for model in ("a", "b")}
    kept.close()
    for each in chosen.values():
        assert abs(each.mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / rows)  # 5 standard errors
    both = (chosen["a"] & chosen["b"]).mean()
    assert abs(both - rate**2) <= 5 * np.sqrt(rate**2 * (1 - rate**2) / rows)  # models are drawn apart


def test_restarting_goes_on_where_it_was(tmp_path: Path) -> None:
    for start in range(0, 30, 10):
        kept = recording(tmp_path)
        record_all(kept, [sample(n) for n in range(start, start + 10)])
        kept.close()
        assert not (tmp_path / f"{FILE}-wal").exists()
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert numbers(tmp_path) == list(range(30))
