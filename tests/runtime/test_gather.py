"""The model written by hand that takes rows: valid ONNX, and numpy's `take` in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.runtime import ArtifactError, TensorSpec
from offramp.runtime.gather import gather_model, kind_of

KINDS = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int8)": np.int8, "tensor(int16)": np.int16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(uint32)": np.uint32, "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}  # fmt: skip


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 4)), min_size=1, max_size=20),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(0, 99),
)
def test_it_takes_rows_of_every_value(kinds: list[tuple[str, int]], have: int, take: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = {}
    for index, (word, rank) in enumerate(kinds):
        shape = (have, *rng.integers(1, 4, (rank or 3) - 1))
        values[f"v{index}"] = rng.integers(0, 2, shape).astype(KINDS[word])
    rows = rng.integers(0, have, take)
    session = onnxruntime.InferenceSession(gather_model(kinds), providers=["CPUExecutionProvider"])
    assert [(value.type, len(value.shape)) for value in session.get_inputs()] == [("tensor(int64)", 1), *kinds]
    taken = session.run([f"g{index}" for index in range(len(kinds))], {"rows": rows, **values})
    for got, value in zip(taken, values.values(), strict=True):
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value.take(rows, axis=0))


def test_it_is_valid_onnx() -> None:
    kinds = [(word, rank) for word in ("tensor(bfloat16)", *KINDS) for rank in range(1, 14)]
    model = onnx.load_model_from_string(gather_model(kinds))
    onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.node) == len(kinds) > 127, "lengths take more than one byte"
    assert {node.op_type for node in model.graph.node} == {"Gather"}


@pytest.mark.parametrize("kind", ["tensor(string)", "seq(tensor(float))"])
def test_what_is_no_tensor_of_numbers_is_refused(kind: str) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be compacted on a device; run on CPU"):
        gather_model([("tensor(float)", 2), (kind, 2)])


@pytest.mark.parametrize(("word", "dtype"), KINDS.items())
def test_an_input_s_kind_is_onnxruntime_s_word(word: str, dtype: type) -> None:
    assert kind_of(TensorSpec("x", np.dtype(dtype).name, ("batch", 3, "length"))) == (word, 3)
