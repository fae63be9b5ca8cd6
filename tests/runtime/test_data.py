"""Every form of `--data`, and every reason to refuse it."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from offramp.runtime import ArrayRows, InputError, Rows, TensorSpec, UsageError, batches, fit_rows, open_data
from offramp.runtime.errors import StorageError
from offramp.runtime.images import Preprocessing, parse_preprocessing

X = (TensorSpec("x", "float32", ("batch", 4)),)
XY = (*X, TensorSpec("y", "int64", ("batch", "length")))


def real(rows: int = 6) -> np.ndarray:
    return np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)


def everything(rows: Rows) -> dict[str, np.ndarray]:
    return rows.take(np.arange(len(rows)))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_an_npy_is_one_mapped_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", real())
    rows = open_data(tmp_path / "d.npy", inputs=X)
    assert (len(rows), rows.input_names, rows.labels) == (6, ("x",), None)
    np.testing.assert_array_equal(rows.take(np.array([4, 0]))["x"], real()[[4, 0]])
    assert open_data(str(tmp_path / "d.npy"), inputs=None).input_names == ("input",)
    np.testing.assert_array_equal(everything(fit_rows(open_data(tmp_path / "d.npy", inputs=None), X))["x"], real())


@pytest.mark.parametrize("name", ["x", "anything"])
def test_an_npz_of_one_input_may_call_it_anything(tmp_path: Path, name: str) -> None:
    rows = open_data(save(tmp_path / "d.npz", **{name: real(), "labels": np.arange(6)}), inputs=X)
    assert rows.input_names == ("x",)
    assert rows.labels is not None
    np.testing.assert_array_equal(rows.labels, np.arange(6))


def test_an_npz_of_several_inputs_goes_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", y=np.ones((6, 3), np.int64), x=real())
    rows = open_data(path, inputs=XY)
    assert rows.input_names == ("x", "y")
    assert list(rows.take(np.arange(2))) == ["x", "y"]
    with pytest.raises(InputError, match="unknown: 'y'"):
        open_data(path, inputs=X)


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    rows = open_data(save(tmp_path / "d.npz", labels=real()), inputs=(TensorSpec("labels", "float32", ("batch", 4)),))
    assert rows.input_names == ("labels",)
    assert rows.labels is None


def bad_value() -> np.ndarray:
    values = real()
    values[3, 1] = np.nan
    return values


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": real()[:0]}, "holds no rows"),
        ({}, "holds no rows"),
        ({"labels": np.arange(3)}, "holds no rows"),
        ({"x": np.float32(1)}, "holds no rows"),
        ({"x": bad_value()}, "'x' holds NaN or infinity, first in row 3"),
        ({"x": real().astype(np.float64)}, r"float64, the model takes float32; .*astype"),
        ({"x": real()[:, :3]}, r"shape \(6, 3\), the model takes \(batch, 4\)"),
        ({"x": np.array(["a"])}, "give numbers"),
        ({"x": np.array([{}], object)}, "cannot be read as arrays .*allow_pickle"),
        ({"x": real(), "y": real(5)}, "different numbers of rows"),
        ({"x": real(), "labels": np.arange(5)}, "one integer for each of the 6 rows"),
        ({"x": real(), "labels": np.ones(6)}, "labels are float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_data(save(tmp_path / "d.npz", **arrays), inputs=X)


@pytest.mark.parametrize("values", [real()[:0], bad_value(), real().astype(np.int32), np.array([None])])
def test_an_npy_is_checked_alike(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "d.npy", values)
    with pytest.raises(InputError, match=r"no rows|row 3|int32|cannot be read"):
        open_data(tmp_path / "d.npy", inputs=X)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    np.savez(tmp_path / "d.npz", x=real(100))
    np.save(tmp_path / "d.npy", real(100))
    path = tmp_path / f"d{suffix}"
    whole = path.read_bytes()
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read as arrays"):
            open_data(path, inputs=None)


def test_an_altered_header_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", real())
    whole = (tmp_path / "d.npy").read_bytes()
    for byte in b" }'(,x":
        for position in range(10, 80):
            (tmp_path / "d.npy").write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            with contextlib.suppress(InputError):  # a space for a space changes nothing
                open_data(tmp_path / "d.npy", inputs=X)


@pytest.mark.parametrize("given", [{"x": [[1.0]]}, {"x": None}, {"x": real(), "y": (1, 2)}])
def test_what_is_no_array_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match=r"is a (list|NoneType|tuple); pass a numpy array"):
        ArrayRows(given)
    with pytest.raises(InputError, match="labels are a list; pass a numpy array of integers"):
        ArrayRows({"x": real()}, [0, 1])  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "says"), [(">f4", "'float32'"), (">i8", "'int64'"), (np.longdouble, "'float64'")])
def test_numbers_that_models_do_not_take_are_refused(kind: Any, says: str) -> None:
    with pytest.raises(InputError, match=rf"which models do not take; give \.astype\({says}\)"):
        ArrayRows({"x": real().astype(kind)})


class Lazy:
    """Rows of a class of one's own."""

    labels = np.arange(6)
    input_names = ("mine",)

    def __init__(self, values: np.ndarray, name: str = "mine") -> None:
        self.values, self.name = values, name

    def __len__(self) -> int:
        return 6

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name: self.values[indices]}


def test_rows_of_a_class_of_one_s_own() -> None:
    rows = fit_rows(Lazy(real()), X)
    assert (len(rows), rows.input_names) == (6, ("x",))
    assert rows.labels is not None
    np.testing.assert_array_equal(rows.labels, np.arange(6))
    np.testing.assert_array_equal(rows.take(np.array([4, 0]))["x"], real()[[4, 0]])
    assert rows.take(np.arange(0))["x"].shape == (0, 4)


def test_rows_of_a_class_of_one_s_own_are_checked_when_they_are_taken() -> None:
    with pytest.raises(InputError, match=r"Lazy\.take\(\[0\]\): input 'x' is float64"):
        fit_rows(Lazy(real().astype(np.float64)), X)
    with pytest.raises(InputError, match=r"Lazy\.take\(\[0\]\): inputs missing: 'x'"):
        fit_rows(Lazy(real()), XY)
    rows = fit_rows(Lazy(bad_value()), X)
    rows.take(np.array([0, 2]))
    with pytest.raises(InputError, match=r"Lazy\.take\(\[2, 3\]\): input 'x' holds NaN"):
        rows.take(np.array([2, 3]))

    class Short(Lazy):
        def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"mine": self.values[indices[:1]]}

    with pytest.raises(InputError, match=r"Short\.take\(\[2, 3\]\) gives 1 rows"):
        fit_rows(Short(real()), X).take(np.array([2, 3]))


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent.npy", "does not exist"), ("d.csv", "neither .npy nor .npz"), ("a b:c", "exist")],
)
def test_what_is_no_data_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(InputError, match=message):
        open_data(tmp_path / name, inputs=X)


def test_options_of_images_are_refused_elsewhere(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", real())
    with pytest.raises(UsageError, match="for folders of images"):
        open_data(tmp_path / "d.npy", inputs=X, preprocessing="crop=2")
    with pytest.raises(UsageError, match="give 'folders'"):
        open_data(tmp_path / "d.npy", inputs=X, labels="files")


@given(rows=st.integers(1, 50), size=st.integers(1, 60))
def test_batches_cover_all_rows_in_order(rows: int, size: int) -> None:
    parts = list(batches(ArrayRows({"x": real(rows)}), size))
    np.testing.assert_array_equal(np.concatenate([indices for indices, _ in parts]), np.arange(rows))
    np.testing.assert_array_equal(np.concatenate([arrays["x"] for _, arrays in parts]), real(rows))
    assert {len(indices) for indices, _ in parts[:-1]} <= {size}


MODULE = """
import numpy as np
number = 3
def arrays():
    yield np.ones((2, 4), np.float32)
    yield np.zeros((1, 4), np.float32)
def tuples():
    for batch in arrays():
        yield batch, np.arange(len(batch))
def dicts():
    yield {"x": np.ones((2, 4), np.float32), "y": np.ones((2, 5), np.int64), "labels": np.arange(2)}
def nothing():
    return []
def ragged():
    yield np.ones((2, 4)); yield np.ones((2, 5))
def fails():
    yield np.ones((2, 4), np.float32)
    raise RuntimeError("the disk is gone")
def lists():
    yield [1.0]
def triples():
    yield (1, 2, 3)
def half_labelled():
    yield np.ones((2, 4), np.float32)
    yield np.ones((2, 4), np.float32), np.arange(2)
def unpaired():
    yield {"x": np.ones((3, 4)), "y": np.ones((4, 4))}
    yield {"x": np.ones((4, 4)), "y": np.ones((3, 4))}
def mislabelled():
    yield np.ones((2, 4)), np.arange(1)
    yield np.ones((2, 4)), np.arange(3)
def renamed():
    yield {"x": np.ones((2, 4))}
    yield {"y": np.ones((2, 4))}
class Deep:
    rows = staticmethod(arrays)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "feed.py").write_text(MODULE)
    (tmp_path / "wrong.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("feed", None)


@pytest.mark.usefixtures("module")
def test_a_callable_yields_arrays_tuples_or_dicts() -> None:
    for name in ("arrays", "Deep.rows"):
        rows = open_data(f"feed:{name}", inputs=X)
        np.testing.assert_array_equal(everything(rows)["x"], np.array([[1] * 4, [1] * 4, [0] * 4]))
        assert rows.labels is None
    labels = open_data("feed:tuples", inputs=X).labels
    assert labels is not None
    assert labels.tolist() == [0, 1, 0]
    several = open_data("feed:dicts", inputs=XY)
    assert several.input_names == ("x", "y")
    assert several.labels is not None


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("feed:nothing", "feed:nothing: the data holds no rows"),
        ("feed:ragged", "feed:ragged: failed in batch 2"),
        ("feed:fails", "failed in batch 1 .*the disk is gone"),
        ("feed:lists", "feed:lists: input 'input' is a list"),
        ("feed:triples", "tuple of 3"),
        ("feed:unpaired", "a batch has rows that do not go together: 3 of 'x', 4 of 'y'"),
        ("feed:mislabelled", "do not go together: 2 of 'input', 1 of 'labels'; yield as many of each"),
        ("feed:renamed", "batch 1 has y, the first x; yield the same"),
        ("feed:half_labelled", "one integer for each of the 4 rows"),
    ],
)
def test_what_a_callable_yields_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_data(name, inputs=None)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("feed:absent", "has no 'absent'"),
        ("feed:number", "is a int; name a callable"),
        ("feeds:arrays", "No module named 'feeds'"),
        ("wrong:arrays", "nothing_of_that_name"),
    ],
)
def test_a_reference_to_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_data(name, inputs=X)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, shape in (("cat/a.png", (8, 12, 3)), ("cat/b.PNG", (8, 12, 3)), ("dog/c.png", (12, 8))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    (tmp_path / "images" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "images"


def image_spec(channels: int, height: int, width: int) -> tuple[TensorSpec]:
    return (TensorSpec("x", "float32", ("batch", channels, height, width)),)


def test_a_folder_of_images_is_preprocessed_as_stated(folder: Path) -> None:
    rows = open_data(
        folder,
        inputs=image_spec(3, 4, 6),
        preprocessing="crop=4x6,mean=0.1:0.2:0.3,std=0.5:1:2",
        labels="folders",
    )
    assert (len(rows), rows.input_names) == (3, ("x",))
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 0, 1]
    pixels = np.asarray(Image.open(folder / "cat" / "a.png"), np.float32)[2:6, 3:9] / 255
    expected = ((pixels - [0.1, 0.2, 0.3]) / [0.5, 1, 2]).transpose(2, 0, 1)
    taken = rows.take(np.array([2, 0]))["x"]
    assert taken.shape == (2, 3, 4, 6)
    assert taken.dtype == np.float32
    np.testing.assert_allclose(taken[1], expected, atol=1e-6)
    assert open_data(folder, inputs=None, preprocessing="resize=4x4").labels is None


@pytest.mark.parametrize(
    ("steps", "shape"),
    [
        ("resize=4,crop=4", (3, 4, 4)),
        ("resize=16x10", (3, 16, 10)),
        ("resize=6,crop=6,mode=L,mean=0.5,std=0.5,bicubic", (1, 6, 6)),
    ],
)
def test_preprocessing_gives_the_stated_shape(folder: Path, steps: str, shape: tuple[int, int, int]) -> None:
    rows = open_data(folder, inputs=image_spec(*shape), preprocessing=steps)
    assert everything(rows)["x"].shape == (3, *shape)
    assert rows.take(np.arange(0))["x"].shape == (0, *shape)


def test_the_shorter_side_is_resized_and_the_longer_follows(folder: Path) -> None:
    rows = open_data(folder / "cat", inputs=None, preprocessing="resize=4")
    assert everything(rows)["input"].shape == (2, 3, 4, 6)


def test_folders_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="needs its preprocessing stated"):
        open_data(folder, inputs=None)
    with pytest.raises(InputError, match=r"c\.png: .* differs from .*resize=HxW"):
        everything(open_data(folder, inputs=None, preprocessing=""))
    with pytest.raises(InputError, match=r"8x12 pixels, smaller than crop=9x9; put a resize"):
        open_data(folder, inputs=image_spec(3, 9, 9), preprocessing="crop=9")
    with pytest.raises(InputError, match=r"shape \(1, 3, 8, 8\), the model takes \(batch, 3, 9, 9\)"):
        open_data(folder, inputs=image_spec(3, 9, 9), preprocessing="crop=8")
    with pytest.raises(InputError, match="a folder of images is one input"):
        open_data(folder, inputs=XY, preprocessing="crop=8")
    with pytest.raises(InputError, match="lie outside any"):
        open_data(folder / "cat", inputs=None, preprocessing="crop=8", labels="folders")
    (folder / "dog.empty").mkdir()
    with pytest.raises(InputError, match=r"dog\.empty: holds no image, and classes are numbered by all folders' names"):
        open_data(folder, inputs=None, preprocessing="crop=8", labels="folders")
    (folder / "dog.empty").rmdir()
    (folder / ".hidden").mkdir()
    shutil.copy(folder / "cat" / "a.png", folder / ".hidden" / "a.png")
    shutil.copy(folder / "cat" / "a.png", folder / "cat" / "._a.png")
    labels = open_data(folder, inputs=None, preprocessing="crop=8", labels="folders").labels
    assert labels is not None
    assert labels.tolist() == [0, 0, 1]
    (folder / "cat" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"a\.png: cannot be decoded"):
        everything(open_data(folder, inputs=None, preprocessing="crop=8"))
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        open_data(folder / "empty", inputs=None, preprocessing="crop=8")


@pytest.mark.parametrize(("kind", "suffix"), [(np.uint16, "png"), (np.int32, "tif"), (np.float32, "tif")])
def test_images_of_more_than_8_bits_are_refused(tmp_path: Path, kind: type, suffix: str) -> None:
    Image.fromarray(np.full((4, 4), 300, kind)).save(tmp_path / f"deep.{suffix}")
    with pytest.raises(InputError, match=rf"deep\.{suffix}: has pixels of more than 8 bits; scale it to 8"):
        everything(open_data(tmp_path, inputs=None, preprocessing="mode=L"))


def test_without_pillow_the_message_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match="pip install pillow"):
        open_data(folder, inputs=None, preprocessing="crop=8")


def test_a_stated_preprocessing_is_read_whole() -> None:
    text = "resize=256, crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225,bicubic"
    assert parse_preprocessing(text) == Preprocessing(
        (256,), (224, 224), "RGB", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )


@pytest.mark.parametrize(
    "text",
    [
        "flip",
        "resize",
        "resize=0",
        "resize=1x2x3",
        "crop=a",
        "crop=-2",
        "mode=CMYK",
        "mean=x",
        "nearest",
        "std=",
        "mean=1:2",
        "std=0",
        "std=nan",
        "mode=L,mean=1:2:3",
        "mean=inf",
    ],
)
def test_preprocessing_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="preprocessing"):
        parse_preprocessing(text)


def test_files_under_another_name_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((3, 2), np.float32))
    np.savez(tmp_path / "two.npz", x=np.zeros((3, 2), np.float32))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "two.npz").rename(tmp_path / "two.npy")
    with zipfile.ZipFile(tmp_path / "three.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    for name, says in (
        ("one.npz", "it is a .npy under another name"),
        ("two.npy", "it is a .npz under another name"),
        ("three.npz", "'notes.txt' in it is no array"),
    ):
        with pytest.raises(InputError, match=re.escape(says)):
            open_data(tmp_path / name, inputs=None)


def test_a_folder_that_may_not_be_looked_into_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(StorageError, match="cannot be looked at"):
        open_data("/secret/rows.npy", inputs=None)
