"""What a head is: a plain configuration, and the families that build modules of it.

A family belongs to one kind of activation. A `HeadConfig` names the family and its settings and is all that an
artifact stores of a head's architecture: `build_head` makes the module again, no code is generated.

A family's search space is data, in NNI's JSON form (`{"key": {"_type": "choice", "_value": [...]}}`). It speaks of
shares rather than of sizes where it can: `cost` is the share of the backbone's compute a head may take, and the
width follows from it, so one space serves every backbone and every depth. `learning_rate` belongs to training.
"""

from __future__ import annotations

import bisect
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offramp.passes import module_flops
from offramp.runtime.errors import UsageError

WIDTHS = (8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
BUDGET = 0.035  # of the backbone's FLOPs, for a default head
COST, LEARNING_RATE = "cost", "learning_rate"  # what every space has beside the family's own choices
SHARED_SPACE: Mapping[str, Mapping[str, Any]] = {
    COST: {"_type": "choice", "_value": [0.005, 0.01, 0.02, 0.035]},
    LEARNING_RATE: {"_type": "loguniform", "_value": [1e-3, 1e-2]},
}

Shape = tuple[int, ...]  # of a cut, the batch left out
Settings = Mapping[str, Any]
Space = Mapping[str, Mapping[str, Any]]  # NNI's JSON form


@dataclass(frozen=True)
class HeadConfig:
    """A head's architecture: enough to build it again."""

    family: str
    settings: Settings = field(default_factory=dict)

    def describe(self) -> str:
        """One phrase for a table."""
        return find_family(self.family).describe(self.settings)


def as_trained(head: nn.Module) -> nn.Module:
    """What a family does with a trained head, the same answers without what training needed: by default nothing."""
    return head


@dataclass(frozen=True)
class Family:
    """One kind of head."""

    rank: int  # of the cut, batch included
    build: Callable[[Shape, int, Settings], nn.Module]  # (shape, classes, settings) -> [B, *shape] to logits [B, K]
    default: Callable[[Shape, int], Settings]  # (shape, width) -> settings of the default head that wide
    describe: Callable[[Settings], str]
    finish: Callable[[nn.Module], nn.Module] = as_trained
    space: Space = field(default_factory=dict)  # the family's own choices
    chosen: Callable[[Shape, int, Settings], Settings] | None = None  # (shape, width, one choice of each) -> settings
    free: Settings = field(default_factory=dict)  # choices forced where a size other than the batch varies


FAMILIES: dict[str, Family] = {}


def register_family(name: str, family: Family) -> None:
    """Make a family known by name: the default of its rank from now on, and one that the search tries there.

    Whoever compiles or rebuilds with it must have registered it first; an artifact that is only run needs nothing.
    Raises `UsageError` for a name that is taken.
    """
    if name in FAMILIES:
        raise UsageError(f"head family {name!r} is registered already; choose another name")
    FAMILIES[name] = family


def find_family(name: str) -> Family:
    """Raises `UsageError` for a name nobody registered."""
    if name not in FAMILIES:
        raise UsageError(f"head family {name!r} is unknown; use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def families_for(shape: Shape) -> tuple[str, ...]:
    """Names of the families that read values `[B, *shape]`, the default one first: the one registered last."""
    return tuple(name for name, family in reversed(FAMILIES.items()) if family.rank == len(shape) + 1)


def build_head(config: HeadConfig, shape: Shape, classes: int) -> nn.Module:
    """A fresh head for values `[B, *shape]`; weights come from torch's global generator."""
    return find_family(config.family).build(shape, classes, config.settings)


def default_head(shape: Shape, classes: int, backbone_flops: float) -> HeadConfig:
    """The widest head of the first family for this rank that stays within `BUDGET`; the narrowest if none does."""
    name = families_for(shape)[0]
    return _widest(name, lambda width: find_family(name).default(shape, width), shape, classes, BUDGET * backbone_flops)


def search_space(name: str) -> Space:
    """Everything a search may choose for a family: its own choices, `cost` and `learning_rate`."""
    return {**find_family(name).space, **SHARED_SPACE}


def configure(
    name: str, shape: Shape, classes: int, backbone_flops: float, proposal: Settings, *, varies: bool = False
) -> HeadConfig:
    """One choice of each entry of a space -> the widest head of that kind whose compute keeps to `cost`.

    `varies`: a size of the value other than the batch is free, so the head may fix none. Raises `UsageError` for a
    proposal that leaves out an entry of the family's space, or of which no head can be made.
    """
    family = find_family(name)
    if missing := [key for key in family.space if key not in proposal]:
        raise UsageError(f"proposal for head family {name!r} lacks {', '.join(missing)}; choose one value for each")
    for key, entry in family.space.items():
        _check_choice(name, key, proposal[key], entry)
    choices = {**proposal, **(family.free if varies else {})}
    chosen = family.chosen
    settings = (lambda width: family.default(shape, width)) if chosen is None else (lambda w: chosen(shape, w, choices))
    try:
        return _widest(name, settings, shape, classes, float(proposal.get(COST, BUDGET)) * backbone_flops)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:  # torch's, of sizes that make no module
        raise UsageError(
            f"head family {name!r}: no head can be made of {dict(proposal)} ({str(error).splitlines()[0]:.120}); "
            "start from `offramp space`"
        ) from error


def _check_choice(name: str, key: str, value: object, entry: Mapping[str, Any]) -> None:
    """A word must be one that the family's own space has; a number may be another one."""
    own = entry["_value"] if entry["_type"] == "choice" else [0.0]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value not in own and not (number and all(isinstance(one, int | float) for one in own)):
        raise UsageError(
            f"search space of {name}, {key}: {value!r} means nothing to it; choose among {', '.join(map(str, own))}"
        )


def _widest(name: str, settings: Callable[[int], Settings], shape: Shape, classes: int, most: float) -> HeadConfig:
    def price(width: int) -> int:
        return head_flops(HeadConfig(name, settings(width)), shape, classes)

    within = bisect.bisect_right(WIDTHS, most, key=price)  # wider is dearer
    return HeadConfig(name, settings(WIDTHS[max(within, 1) - 1]))


def head_flops(config: HeadConfig, shape: Shape, classes: int) -> int:
    """FLOPs per row; nothing is allocated."""
    return _flops(config.family, json.dumps(config.settings, sort_keys=True), shape, classes)


@functools.lru_cache(maxsize=4096)  # a search asks for the same few sizes again and again
def _flops(family: str, settings: str, shape: Shape, classes: int) -> int:
    with torch.device("meta"):
        return module_flops(build_head(HeadConfig(family, json.loads(settings)), shape, classes), shape)
