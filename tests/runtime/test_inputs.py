"""What a batch is refused for, and that the message names the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.runtime import InputError, TensorSpec
from offramp.runtime.inputs import Known, check_batch, check_finite

IMAGES = (TensorSpec("x", "float32", ("batch", 3, "side", "side")),)
FIXED = (TensorSpec("rows", "float32", ("batch", 3)), TensorSpec("ages", "float32", ("batch",)))
TOKENS = (TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("mask", "int64", ("batch", "length")))


def image(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def ids(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (image(2, 4, 8, 8), r"input 'x' has shape \(2, 4, 8, 8\), the model takes \(batch, 3, side, side\)"),
        (image(2, 3, 8), r"input 'x' has shape \(2, 3, 8\)"),
        (image(3), "input 'x' has shape"),
        (np.array(1, np.float32), "input 'x' has shape"),
        (image(2, 3, 8, 9), "inputs disagree on 'side': 8 in 'x', 9 in 'x'"),
        (image(2, 3, 8, 8).astype(np.float64), r"is float64, the model takes float32; .*astype\('float32'\)"),
        (image(2, 3, 8, 8).astype(">f4"), "is >f4"),
        (image(2, 3, 8, 8).astype(object), "is object"),
        ([[1.0]], "is a list; pass a numpy array"),
        ({"x": [1.0]}, "input 'x' is a list"),
        ({}, "missing: 'x'; the model takes x"),
        ({"x": image(1, 3, 8, 8), "y": image(1)}, "unknown: 'y'; the model takes x"),
        (None, "is a NoneType"),
    ],
)
def test_a_single_input_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_batch(batch, IMAGES)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (ids(2, 8), "takes 2 inputs; pass a dict with ids, mask"),
        ({"ids": ids(2, 8)}, "missing: 'mask'"),
        ({"ids": ids(2, 8), "mask": ids(3, 8)}, "disagree on 'batch': 2 in 'ids', 3 in 'mask'"),
        ({"ids": ids(2, 8), "mask": ids(2, 9)}, "disagree on 'length': 8 in 'ids', 9 in 'mask'"),
    ],
)
def test_several_inputs_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_batch(batch, TOKENS)


@pytest.mark.parametrize(("least", "most", "says"), [(3, 5, "3 to 5"), (3, None, "3 or more")])
def test_a_named_dimension_has_a_range(least: int, most: int | None, says: str) -> None:
    inputs = tuple(TensorSpec(spec.name, spec.dtype, spec.shape, {"length": (least, most)}) for spec in TOKENS)
    for length in (0, 2, 3, 5, 6):
        batch = {"ids": ids(2, length), "mask": ids(2, length)}
        if least <= length and (most is None or length <= most):
            assert check_batch(batch, inputs)[1] == 2
        else:
            with pytest.raises(
                InputError, match=f"'ids' has {length} for 'length', the model takes {says}; cut or pad"
            ):
                check_batch(batch, inputs)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"rows": image(2, 3), "ages": image(3)}, "disagree on 'batch': 2 in 'rows', 3 in 'ages'"),
        ({"rows": image(2, 4), "ages": image(2)}, "input 'rows' has shape"),
        ({"rows": image(2, 3), "ages": image()}, "input 'ages' has shape"),
        ({"rows": image(2, 3), "ages": ids(2)}, "input 'ages' is int64"),
        ({"rows": image(2, 3), "ages": [1.0, 2.0]}, "input 'ages' is a list"),
        ({"rows": image(2, 3), "age": image(2)}, "missing: 'ages'"),
        ({"rows": image(2, 3), "ages": image(2), "more": image(2)}, "unknown: 'more'"),
        (
            {"rows": image(2, 3), "ages": np.array([1, np.nan], np.float32)},
            "'ages' holds NaN or infinity, first in row 1",
        ),
    ],
)
def test_inputs_of_fixed_shapes_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_batch(batch, FIXED)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_inputs_of_fixed_shapes_come_back_in_the_model_s_order(rows: int) -> None:
    batch = {"ages": image(rows), "rows": image(rows, 3)}
    arrays, count = check_batch(batch, FIXED)
    assert count == rows
    assert list(arrays) == ["rows", "ages"]
    assert arrays is not batch


def test_several_inputs_come_back_in_the_model_s_order() -> None:
    arrays, rows = check_batch({"mask": ids(2, 5), "ids": ids(2, 5)}, TOKENS)
    assert list(arrays) == ["ids", "mask"]
    assert rows == 2


class Lazy:
    """What has an array's dtype and shape, and is none."""

    dtype, shape, ndim = np.dtype(np.int64), (2, 5), 2


def test_a_batch_of_a_known_kind_comes_back_too() -> None:
    known: Known = {}
    for batch in ({"mask": ids(2, 5), "ids": ids(2, 5)}, {"ids": ids(2, 5), "mask": ids(2, 5)}):
        for _ in range(2):
            arrays, rows = check_batch(batch, TOKENS, known)
            assert arrays == batch
            assert arrays is not batch  # the caller may write to its own before the last stage has read it
            assert rows == 2
    assert len(known) == 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": ids(2, 5), "mask": ids(2, 6)}, "disagree on 'length'"),
        ({"ids": ids(2, 5), "mask": ids(3, 5)}, "disagree on 'batch'"),
        ({"ids": ids(2, 5), "mask": ids(2, 5).astype(np.int32)}, "'mask' is int32"),
        ({"ids": ids(2, 5), "mask": Lazy()}, "'mask' is a Lazy"),
        ({"ids": ids(2, 5), "mask": [[0]]}, "'mask' is a list"),
        ({"ids": ids(2, 5), "mark": ids(2, 5)}, "missing: 'mask'"),
        ({"ids": ids(2, 5)}, "missing: 'mask'"),
    ],
)
def test_what_a_known_kind_is_not_is_refused(batch: Any, message: str) -> None:
    known: Known = {}
    check_batch({"ids": ids(2, 5), "mask": ids(2, 5)}, TOKENS, known)
    for _ in range(2):  # and does not become known by it
        with pytest.raises(InputError, match=message):
            check_batch(batch, TOKENS, known)
    assert len(known) == 1


def test_values_of_a_known_kind_are_looked_at() -> None:
    known: Known = {}
    check_batch({"x": image(2, 3, 4, 4)}, IMAGES, known)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match="first in row 1"):
            check_batch({"x": np.stack([image(3, 4, 4), np.full((3, 4, 4), bad, np.float32)])}, IMAGES, known)


def test_only_the_last_kinds_are_known() -> None:
    known: Known = {}
    for rows in range(1, 200):
        check_batch({"x": image(rows, 3, 1, 1)}, IMAGES, known)
        assert 0 < len(known) <= 64


@given(
    rows=st.integers(1, 20),
    data=st.data(),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_the_first_row_that_is_not_finite_is_named(rows: int, data: st.DataObject, bad: float, dtype: Any) -> None:
    places = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, 5)), min_size=1))
    values = np.full((rows, 2, 3), np.finfo(dtype).max, dtype)
    check_finite(values, "x")
    for row, place in places:
        values[row].reshape(-1)[place] = bad
    with pytest.raises(InputError, match=rf"'x' holds NaN or infinity, first in row {min(places)[0] + 100};"):
        check_finite(values, "x", first_row=100)
