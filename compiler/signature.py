"""What a person may say of a model's inputs and outputs where capture would otherwise look or guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offramp.passes.backbone import SCORES
from offramp.runtime.errors import UsageError

BATCH = "batch"  # dimension 0 of every input


@dataclass(frozen=True)
class Signature:
    """Free dimensions, the field that holds the scores, and what kind of scores they are.

    `dynamic` maps an input's name to {dimension: word}; dimensions of the same word have the same size. An input
    that is named there with no dimension at all keeps its captured shape. Raises `UsageError` for what cannot be.
    """

    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    output: str | int | None = None  # name or position; None: found, see `outputs`
    scores: str | None = None  # one of SCORES; None: found

    def __post_init__(self) -> None:
        if self.scores is not None and self.scores not in SCORES:
            raise UsageError(f"scores {self.scores!r} is no kind of score; choose one of {', '.join(SCORES)}")
        for name, words in self.dynamic.items():
            for dimension, word in words.items():
                if dimension < 1:
                    raise UsageError(
                        f"dynamic: dimension {dimension} of {name} is not one to name; 0 is the batch and free already"
                    )
                if not word.isidentifier() or word == BATCH:
                    raise UsageError(f"dynamic: {word!r} cannot name dimension {dimension} of {name}; try 'sequence'")


def parse_dynamic(settings: Sequence[str]) -> dict[str, dict[int, str]]:
    """`["input_ids:1=sequence", "mask:1=sequence"]` -> `Signature.dynamic`; `"input_ids:"` keeps its shape fixed."""
    dynamic: dict[str, dict[int, str]] = {}
    for setting in settings:
        name, colon, rest = setting.partition(":")
        dimension, equals, word = rest.partition("=")
        if not (name and colon) or (rest and not (equals and word and dimension.isdecimal())):
            raise UsageError(f"dynamic {setting!r} is not INPUT:DIMENSION=WORD, such as input_ids:1=sequence")
        words = dynamic.setdefault(name, {})
        if rest:
            words[int(dimension)] = word
    return dynamic
