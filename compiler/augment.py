"""Augmentation for distillation: the backbone labels whatever it is shown, so more inputs are free targets.

An augmentation maps a batch of inputs by name to another batch and a seeded generator to its randomness.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import CodeType

import torch

from offramp.passes import Input
from offramp.runtime.errors import UsageError

Batch = Mapping[str, torch.Tensor]
Augment = Callable[[Batch, torch.Generator], Batch]


def identity(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch as it is."""
    return batch


def flip_shift(batch: Batch, generator: torch.Generator) -> Batch:
    """Every image `[C, H, W]` mirrored with probability 1/2 and shifted by up to an eighth of its size."""
    return {name: _flip_shift(x, generator) if x.dim() == 4 else x for name, x in batch.items()}


def flip_shift_mix(batch: Batch, generator: torch.Generator) -> Batch:
    """`flip_shift`, then half of the rows blended with another row of the batch (mixup, Zhang et al. 2018).

    A blend has no label, but the backbone has an answer for it, and one that a head cannot learn by heart: on
    a few thousand rows heads memorise anything less (Beyer et al. 2022 find the same for distillation).
    """
    batch = flip_shift(batch, generator)
    rows = len(next(iter(batch.values())))
    partner = torch.randperm(rows, generator=generator)
    weight = torch.where(torch.rand(rows, generator=generator) < 0.5, torch.rand(rows, generator=generator), 1.0)

    def blend(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        share = weight.to(x.dtype).view(-1, *(1 for _ in x.shape[1:]))
        return share * x + (1 - share) * x[partner]

    return {name: blend(x) for name, x in batch.items()}


def _flip_shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    rows, _, height, width = images.shape
    mirrored = torch.rand(rows, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    reach_y, reach_x = max(1, height // 8), max(1, width // 8)
    # Edges repeat: a constant border is something the backbone may never have seen.
    padded = torch.nn.functional.pad(images, (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    y = torch.randint(0, 2 * reach_y + 1, (rows,), generator=generator)
    x = torch.randint(0, 2 * reach_x + 1, (rows,), generator=generator)
    index_y = (y.view(-1, 1) + torch.arange(height)).view(rows, 1, height, 1)
    index_x = (x.view(-1, 1) + torch.arange(width)).view(rows, 1, 1, width)
    row = torch.arange(rows).view(rows, 1, 1, 1)
    channel = torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[row, channel, index_y, index_x]


AUGMENTATIONS: dict[str, Augment] = {
    "none": identity,
    "flip-shift": flip_shift,
    "flip-shift-mix": flip_shift_mix,
}


def default_augmentation(inputs: tuple[Input, ...]) -> str:
    """`flip-shift-mix` for one colour image of at least 24 x 24 pixels, `none` for anything else."""
    if len(inputs) == 1 and len(inputs[0].shape) == 4:
        _, channels, height, width = inputs[0].shape
        if channels == 3 and isinstance(height, int) and isinstance(width, int) and min(height, width) >= 24:
            return "flip-shift-mix"
    return "none"


def find_augmentation(given: str | Augment | None, inputs: tuple[Input, ...]) -> tuple[str, Augment]:
    """A named set, a function of the caller's, or None for the default of these inputs -> its name and the function.

    Raises `UsageError` for a name that is unknown.
    """
    if given is None:
        given = default_augmentation(inputs)
    if not isinstance(given, str):
        return name_of(given), given
    if given not in AUGMENTATIONS:
        raise UsageError(
            f"augmentation {given!r} is unknown; use one of {', '.join(AUGMENTATIONS)} or package.module:function"
        )
    return given, AUGMENTATIONS[given]


def apply(augment: Augment, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch augmented. Raises `UsageError` where the function fails or gives other names, shapes or dtypes."""
    remedy = "it takes tensors by input name and a torch.Generator, and gives as many like them"
    try:
        made = augment(batch, generator)
    except Exception as error:  # a person's own function: anything may come out of it
        raise UsageError(
            f"augmentation {name_of(augment)} failed on a batch ({type(error).__name__}: {error}); {remedy}"
        ) from error
    for name, x in batch.items():
        other = made.get(name) if isinstance(made, Mapping) else None
        if not isinstance(other, torch.Tensor) or other.shape != x.shape or other.dtype != x.dtype:
            raise UsageError(
                f"augmentation {name_of(augment)} does not give {name} {x.dtype} {list(x.shape)}; {remedy}"
            )
    return made


def identity_of(augment: Augment) -> str:
    """What tells one augmentation from another: its name, and of a person's own the code and what is bound to it."""
    if augment in AUGMENTATIONS.values():
        return name_of(augment)
    if isinstance(augment, functools.partial):
        return f"{identity_of(augment.func)} of {augment.args!r} {sorted(augment.keywords.items())!r}"
    called = augment if hasattr(augment, "__code__") else vars(type(augment)).get("__call__")
    told = _told(getattr(called, "__code__", None))
    return f"{name_of(augment)} {told!r} {getattr(augment, '__dict__', {})!r}{_bound(called)}"


def _bound(function: object) -> str:
    """What a function was made with: defaults, and what it closes over."""
    cells = getattr(function, "__closure__", None) or ()
    closed = [_told(getattr(cell.cell_contents, "__code__", cell.cell_contents)) for cell in cells]
    parts = (getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None), closed)
    return "".join(f" {part!r}" for part in parts if part)


def _told(code: object) -> object:
    """What a function does, the functions inside it too; a constant is itself."""
    if not isinstance(code, CodeType):
        return code
    return (code.co_code, code.co_names, tuple(_told(constant) for constant in code.co_consts))


def name_of(augment: Augment) -> str:
    """`package.module:function`, or the type of an object that is no function."""
    named = augment if hasattr(augment, "__qualname__") else type(augment)
    return f"{named.__module__}:{named.__qualname__}"
