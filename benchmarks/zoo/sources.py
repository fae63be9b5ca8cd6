"""Which models the zoo holds, and how to build each with random weights and small rows.

    torchvision    every classification model it lists
    timm           of every module that registers models, the one with the fewest parameters; its `test_` models are
                   stand-ins made for tests and do not count
    transformers   every architecture of the auto classes for sequences and images, tiny (`configs.py`)

All have `CLASSES` classes, so that confidences of random heads differ from row to row by more than rounding. Rows
are made, not read: images of smooth patches under noise, sentences of random tokens with padding at the end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 10
Rows = Callable[[int, int], dict[str, torch.Tensor]]  # (count, seed) -> rows by input name


class Unbuildable(Exception):  # noqa: N818  # a fact about the library, not an error of ours
    """The library cannot build this model here; the message is its reason."""


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    library: str
    name: str  # as its library calls it, or for transformers `type/Architecture`


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode and rows it runs on."""

    model: nn.Module
    rows: Rows


def images(size: int, channels: int = 3, name: str = "x") -> Rows:
    """Rows `[count, channels, size, size]` float32 that differ in pattern, brightness and contrast."""

    def make(count: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        patches = torch.randn(count, channels, 4, 4, generator=generator)
        smooth = F.interpolate(patches, size=(size, size), mode="bilinear")
        noise = torch.randn(count, channels, size, size, generator=generator)
        contrast = torch.rand(count, 1, 1, 1, generator=generator) + 0.5
        return {name: contrast * (smooth + 0.3 * noise)}

    return make


def build(entry: Entry) -> Built:
    """`Entry` -> `Built`. Raises `Unbuildable`."""
    return _BUILDERS[entry.library](entry.name)


def entries(library: str, cache: Path) -> list[Entry]:
    """All models of one library; what is slow to find out is kept in the folder `cache`."""
    return [Entry(library, name) for name in _LISTS[library](cache)]


# --- torchvision ---------------------------------------------------------------------------------------------------

# Prefix of the name -> image size, where 64 is too small for the layers, and arguments that make a size legal.
_TORCHVISION_SIZES: dict[str, int] = {"inception": 96, "maxvit": 224, "swin": 128, "alexnet": 96}
_TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit_h": {"image_size": 56},
    "vit": {"image_size": 64},
    "googlenet": {"init_weights": False},
    "inception": {"init_weights": False},
}


def _list_torchvision(cache: Path) -> list[str]:
    models = importlib.import_module("torchvision.models")
    return list(models.list_models(module=models))


def _build_torchvision(name: str) -> Built:
    models = importlib.import_module("torchvision.models")
    options = next((o for prefix, o in _TORCHVISION_ARGUMENTS.items() if name.startswith(prefix)), {})
    size = next((s for prefix, s in _TORCHVISION_SIZES.items() if name.startswith(prefix)), 64)
    size = options.get("image_size", size)
    model = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return Built(settled(model, images(size)), images(size))


# --- timm ----------------------------------------------------------------------------------------------------------

_TIMM_LARGE = 320
_TIMM_SIZES = (96, 128, 160, 192)  # tried in turn where the model does not insist on a size


def _list_timm(cache: Path) -> list[str]:
    timm = importlib.import_module("timm")
    kept = cache / f"timm-{timm.__version__}.json"
    if not kept.is_file():
        smallest = {module: _smallest(timm, module) for module in timm.list_modules()}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(smallest, indent=1))
    return [name for name in json.loads(kept.read_text()).values() if name]


def _smallest(timm: Any, module: str) -> str | None:
    """The model with the fewest parameters of one module."""
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=module):
        if not name.startswith("test_"):
            with torch.device("meta"):
                try:
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
                except (RuntimeError, NotImplementedError, ValueError):  # it computes with values when it is built
                    continue
    return min(sizes, key=lambda n: sizes[n]) if sizes else None


def _build_timm(name: str) -> Built:
    timm = importlib.import_module("timm")
    model = timm.create_model(name, num_classes=CLASSES).eval()
    config = model.default_cfg
    channels, _, usual = config["input_size"]
    if usual > _TIMM_LARGE:  # a map of a thousand by a thousand shows nothing a smaller one does not
        with contextlib.suppress(TypeError, AssertionError, ValueError):
            model, usual = timm.create_model(name, num_classes=CLASSES, img_size=224).eval(), 224
    sizes = (usual,) if config.get("fixed_input_size") else (*(s for s in _TIMM_SIZES if s < usual), usual)
    for size in sizes:
        rows = images(size, channels)
        if size == usual or _runs(model, rows):
            return Built(settled(model, rows), rows)
    raise AssertionError("the usual size is always taken")


def _runs(model: nn.Module, rows: Rows) -> bool:
    try:
        with torch.no_grad():
            _call(model, rows(2, 0))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


# --- random weights ------------------------------------------------------------------------------------------------


def settled(model: nn.Module, rows: Rows) -> nn.Module:
    """The model with batch norms that have seen rows: with fresh statistics a deep network's values explode."""
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    momentum = _set_momentum(norms, [None] * len(norms))
    try:
        with torch.no_grad():
            for norm in norms:
                norm.train()
            _call(model, rows(8, 1))
    finally:
        model.eval()
        _set_momentum(norms, momentum)
    return model


def _call(model: nn.Module, rows: dict[str, torch.Tensor]) -> None:
    if len(rows) == 1:
        model(*rows.values())
    else:
        model(**rows)


def _set_momentum(norms: Iterable[nn.Module], momentum: Iterable[float | None]) -> list[float | None]:
    before = []
    for norm, value in zip(norms, momentum, strict=True):
        before.append(norm.momentum)
        norm.momentum = value  # type: ignore[assignment]
    return before  # type: ignore[return-value]


def _list_transformers(cache: Path) -> list[str]:
    from . import configs

    return configs.architectures()


def _build_transformers(name: str) -> Built:
    from . import configs

    return configs.build(name)


_LISTS: dict[str, Callable[[Path], list[str]]] = {
    "torchvision": _list_torchvision,
    "timm": _list_timm,
    "transformers": _list_transformers,
}
_BUILDERS: dict[str, Callable[[str], Built]] = {
    "torchvision": _build_torchvision,
    "timm": _build_timm,
    "transformers": _build_transformers,
}
LIBRARIES = tuple(_LISTS)
