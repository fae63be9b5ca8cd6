"""Dimensions: which ones vary, and what they are called.

Dimension 0 of every input is the batch. Token ids and masks (integers of rank 2) are tried with a free length, so
that a model captured from padded rows also runs on shorter ones; a model that fixes the length keeps it. Anything
else varies where a person says so.

A free dimension has a range, within which the model does what was traced: a model may branch on a length, or hold as
many positions as it was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from offramp.passes import Input
from offramp.passes.backbone import captured_size
from offramp.runtime.errors import ModelError, UsageError
from offramp.runtime.manifest import Range

from .signature import BATCH
from .sizes import Free

SEQUENCE = "sequence"  # what a free length is called, unless a person says otherwise

Words = Mapping[str, Mapping[int, str]]


def asked(dynamic: Words, example: Mapping[str, torch.Tensor], title: str) -> dict[str, tuple[int, ...]]:
    """Free dimensions by input as said; refuses inputs and dimensions that are not there."""
    for name, words in dynamic.items():
        if name not in example:
            raise UsageError(f"dynamic: {title} has no input {name}; it has {', '.join(example)}")
        for dimension in words:
            if dimension >= example[name].dim():
                shape = list(example[name].shape)
                raise UsageError(f"dynamic: input {name} {shape} of {title} has no dimension {dimension}")
    return {name: tuple(words) for name, words in dynamic.items()}


def tried(dynamic: Words, example: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Free dimensions nobody spoke of: the length of token ids and masks."""
    return {
        name: (1,)
        for name, value in example.items()
        if name not in dynamic and value.dim() == 2 and value.shape[1] > 2 and _is_integer(value.dtype)
    }


def batch_symbol(placeholders: Sequence[fx.Node], title: str) -> str:
    """The symbol that is dimension 0 of every input; refuses a fixed batch, or several."""
    symbols = set()
    for node in placeholders:
        value = node.meta["val"]
        if value.dim() == 0 or not isinstance(value.shape[0], torch.SymInt):
            first = value.shape[0] if value.dim() else "none"
            raise ModelError(
                f"{title}: input {node.target} has the fixed batch size {first}; "
                "export it with a dynamic dimension 0 (dynamic_shapes={0: Dim('batch')})"
            )
        symbols.add(str(value.shape[0]))
    if len(symbols) != 1:
        raise ModelError(f"{title}: its {len(symbols)} inputs do not share one batch dimension; give them the same Dim")
    return symbols.pop()


def fixed(title: str, name: str, dimension: int, size: object) -> str:
    """What a model is refused for that has one size where it was said to be free."""
    return f"{title} fixes dimension {dimension} of input {name} at {size}; leave it out of dynamic"


def described(placeholders: Sequence[fx.Node], dynamic: Words, batch: str, free: Free, title: str) -> tuple[Input, ...]:
    """The graph's inputs with every free dimension named; refuses one that was said to be free and is not."""
    words = {batch: BATCH}
    for name, dimension, size in _sizes(placeholders):
        said = dynamic.get(name, {}).get(dimension)
        if said is None:
            continue
        if not isinstance(size, torch.SymInt) or str(size) == batch:
            raise ModelError(fixed(title, name, dimension, BATCH if str(size) == batch else size))
        if words.setdefault(str(size), said) != said:
            raise ModelError(
                f"{title} needs {words[str(size)]!r} and {said!r} (dimension {dimension} of input {name}) to be equal; "
                "give them one word"
            )
    words |= _default_words(placeholders, words)
    spans: dict[str, Range] = {}
    for _, _, size in free.places:
        span, word = free.range_of(size), words[str(size)]
        spans[word] = _common(span, spans.get(word, span))
    return tuple(_input(node, words, spans) for node in placeholders)


def _common(one: Range, other: Range) -> Range:
    tops = [most for _, most in (one, other) if most is not None]
    return max(one[0], other[0]), min(tops, default=None)


def _default_words(placeholders: Sequence[fx.Node], taken: Mapping[str, str]) -> dict[str, str]:
    """Names for the sizes nobody named, by symbol.

    Lengths that are equal in the data are one, though the model might take a mask that is longer than its tokens.
    """
    nameless = [(n, d, s) for n, d, s in _sizes(placeholders) if isinstance(s, torch.SymInt) and str(s) not in taken]
    lengths: dict[int, str] = {}
    for name, dimension, size in nameless:
        if _is_length(placeholders, name, dimension):
            lengths.setdefault(captured_size(size), f"{name}_{SEQUENCE}")
    if len(lengths) == 1 and SEQUENCE not in taken.values():
        lengths = dict.fromkeys(lengths, SEQUENCE)
    words: dict[str, str] = {}
    for name, dimension, size in nameless:
        is_length = _is_length(placeholders, name, dimension)
        words.setdefault(str(size), lengths[captured_size(size)] if is_length else f"{name}_{dimension}")
    return words


def _input(node: fx.Node, words: Mapping[str, str], spans: Mapping[str, Range]) -> Input:
    value = node.meta["val"]
    shape = tuple(s if isinstance(s, int) else words[str(s)] for s in value.shape)
    own = {word: spans[word] for word in shape if isinstance(word, str) and word in spans}
    return Input(str(node.target), value.dtype, shape, own)


def _sizes(placeholders: Sequence[fx.Node]) -> list[tuple[str, int, int | torch.SymInt]]:
    return [(str(n.target), d, size) for n in placeholders for d, size in enumerate(n.meta["val"].shape) if d]


def _is_length(placeholders: Sequence[fx.Node], name: str, dimension: int) -> bool:
    value = next(n.meta["val"] for n in placeholders if str(n.target) == name)
    return dimension == 1 and value.dim() == 2 and _is_integer(value.dtype)


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
