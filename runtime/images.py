"""A folder of images as rows of one input: decoded when taken, preprocessed as stated, never guessed.

The preprocessing is one line of comma-separated steps, recorded in the manifest as it was given:

    resize=256            shorter side to 256 pixels, or resize=224x192 for height x width
    crop=224              centre square, or crop=224x192
    mode=RGB | L          three channels (the default) or grey
    bilinear | bicubic    filter of resize; bilinear is the default, both with antialiasing
    mean=0.5:0.5:0.5      per channel, after scaling to 0..1
    std=0.5:0.5:0.5

A row is `((pixels / 255) - mean) / std`, [C, H, W] float32. Needs Pillow, imported on first use.
Refused: an unknown step, a file that is no image, a crop larger than its image, images of different sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, UsageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_STEPS = "resize, crop, mode, mean, std, bilinear, bicubic"


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to a row; see the module docstring."""

    resize: tuple[int, ...] = ()  # (shorter side,) or (height, width)
    crop: tuple[int, int] | None = None  # height, width
    mode: str = "RGB"
    filter: str = "bilinear"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def parse_preprocessing(text: str) -> Preprocessing:
    """The line of the module docstring -> `Preprocessing`."""
    steps: dict[str, Any] = {}
    for step in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = step.partition("=")
        try:
            if step in ("bilinear", "bicubic"):
                steps["filter"] = step
            elif name == "mode" and value in ("RGB", "L"):
                steps["mode"] = value
            elif name == "resize":
                steps[name] = _pixels(value)
            elif name == "crop":
                sizes = _pixels(value)
                steps[name] = (sizes[0], sizes[-1])
            elif name in ("mean", "std"):
                steps[name] = tuple(float(number) for number in value.split(":"))
            else:
                raise ValueError("unknown step")
        except ValueError as error:
            raise UsageError(
                f"preprocessing step {step!r} is not understood; use {_STEPS}, as in resize=256,crop=224"
            ) from error
    preprocessing = dataclasses.replace(Preprocessing(), **steps)
    channels = 1 if preprocessing.mode == "L" else 3
    for name in ("mean", "std"):
        numbers = getattr(preprocessing, name)
        if len(numbers) not in (1, channels) or not np.isfinite(numbers).all():
            raise UsageError(f"preprocessing {name} has {len(numbers)} numbers for {channels} channels; give one each")
    if 0.0 in preprocessing.std:
        raise UsageError("preprocessing std holds 0; give the standard deviation of each channel")
    return preprocessing


class ImageRows:
    """Images decoded lazily; see `data.Rows` for the protocol."""

    def __init__(
        self, paths: Sequence[Path], preprocessing: Preprocessing, name: str, labels: np.ndarray | None
    ) -> None:
        self._paths = paths
        self._preprocessing = preprocessing
        self.input_names = (name,)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """[n] -> {name: [n, C, H, W] float32}"""
        rows = [self._row(self._paths[index]) for index in indices]
        for row, index in zip(rows, indices, strict=True):
            if row.shape != rows[0].shape:
                raise InputError(
                    f"{self._paths[index]}: {row.shape} differs from {rows[0].shape} of another image; "
                    "add resize=HxW or crop=HxW to the preprocessing"
                )
        return {self.input_names[0]: np.stack(rows)} if rows else {self.input_names[0]: self._none()}

    def renamed(self, name: str) -> ImageRows:
        """The same rows for an input called `name`."""
        return ImageRows(self._paths, self._preprocessing, name, self.labels)

    def _none(self) -> np.ndarray:
        return self._row(self._paths[0])[None][:0]

    def _row(self, path: Path) -> np.ndarray:
        steps = self._preprocessing
        image = _decode(path, steps)
        pixels = np.asarray(image, np.float32) / np.float32(255)
        channels_last = pixels if pixels.ndim == 3 else pixels[:, :, None]
        scaled = (channels_last - np.array(steps.mean, np.float32)) / np.array(steps.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def open_images(folder: Path, preprocessing: str | None, name: str, labels: str | None) -> ImageRows:
    """All images below `folder`, in the order of their paths; what is hidden is left out, thumbnails for one."""
    if preprocessing is None:
        raise UsageError(
            f"{folder}: a folder of images needs its preprocessing stated; "
            "give one like 'resize=256,crop=224,mean=0.485:0.456:0.406,std=0.229:0.224:0.225'"
        )
    steps = parse_preprocessing(preprocessing)
    _pillow()
    paths = sorted(path for path in folder.rglob("*") if _is_image(path, folder))
    if not paths:
        raise InputError(f"{folder}: holds no image; give a folder with {', '.join(sorted(SUFFIXES))} files")
    indices: np.ndarray | None = None
    if labels == "folders":
        classes = sorted({path.relative_to(folder).parts[0] for path in paths})
        named = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        if empty := sorted(named - {*classes}):
            raise InputError(
                f"{folder / empty[0]}: holds no image, and classes are numbered by all folders' names; "
                "put its images there or remove it"
            )
        if any(path.parent == folder for path in paths):
            raise InputError(f"{folder}: labels from folders, but images lie outside any; sort them by class")
        indices = np.array([classes.index(path.relative_to(folder).parts[0]) for path in paths], np.int64)
    return ImageRows(paths, steps, name, indices)


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("a folder of images needs Pillow; run pip install pillow") from error
    return Image


def _decode(path: Path, steps: Preprocessing) -> Any:
    pillow = _pillow()
    try:
        with pillow.open(path) as file:
            _check_depth(path, file.mode)
            image = file.convert(steps.mode)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be decoded ({error}); remove or replace it") from error
    width, height = image.size
    if steps.resize:
        if len(steps.resize) == 2:
            height, width = steps.resize
        else:
            side, short = steps.resize[0], min(width, height)
            # Truncated, as torchvision does: such models expect its pixel counts.
            width, height = int(side * width / short), int(side * height / short)
        resampling = pillow.Resampling.BICUBIC if steps.filter == "bicubic" else pillow.Resampling.BILINEAR
        image = image.resize((width, height), resampling)
    if steps.crop:
        tall, wide = steps.crop
        if tall > height or wide > width:
            raise InputError(
                f"{path}: {height}x{width} pixels, smaller than crop={tall}x{wide}; put a resize before it"
            )
        top, left = round((height - tall) / 2), round((width - wide) / 2)
        image = image.crop((left, top, left + wide, top + tall))
    return image


def _check_depth(path: Path, mode: str) -> None:
    """Pillow would clip deeper pixels to 255, not scale them."""
    if mode in ("I", "F") or mode.startswith("I;"):
        raise InputError(f"{path}: has pixels of more than 8 bits; scale it to 8, or give its rows as an .npy")


def _pixels(text: str) -> tuple[int, ...]:
    sizes = tuple(int(number) for number in text.split("x"))
    if len(sizes) > 2 or min(sizes) < 1:
        raise ValueError("not a size")
    return sizes
