"""Sizes: at which of them a traced graph is right, where dimensions are free.

Tracing notes what it took for granted of free sizes: ranges, which an artifact keeps, and conditions that no range
tells (`h <= w`, `n != 11`), for a model may branch on either. So the graph is run beside the model at other sizes,
and at some that break such a condition. A model that does not run there itself, or does the same, does no harm.
Where the two answer otherwise, lengths nobody asked for are free up to the data's, if that is right, or not at all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from offramp.runtime.errors import ModelError
from offramp.runtime.manifest import ANY, Range

from .arguments import Call
from .independence import TOLERANCE, difference
from .quiet import quiet

Symbol = Any  # sympy's, and its expressions
Sizes = Mapping[Symbol, int]

_UNBOUNDED = 1 << 20  # what torch says of a size that may be anything is far beyond
_LONGEST = 4096  # that is tried
_COMBINED = 4096  # sizes looked through for one that breaks a condition
_FEW = 2  # rows, where they are made more than twice as long
_SIZE = r"L\[[^()]*\]\.size\(\)\[\d+\]"
_TOLD = re.compile(rf"{_SIZE} (== {_SIZE}|[<>]=? \d+)")
# Sizes that are tried; the data's may be the largest there is, so the smaller ones come first.
_OTHERS: tuple[Callable[[int, int, int], int], ...] = (
    lambda n, least, most: n - 1,
    lambda n, least, most: n - 2,
    lambda n, least, most: n // 2,
    lambda n, least, most: n + 1,
    lambda n, least, most: 2 * n,
    lambda n, least, most: max(2, least),  # 1 often is a broadcast
    lambda n, least, most: n if most > _LONGEST else most,
)


@dataclass(frozen=True)
class Free:
    """Free dimensions of a graph's inputs, the batch aside."""

    places: tuple[tuple[str, int, Symbol], ...]  # input, dimension, its size
    data: Sizes  # of the data, by symbol
    ranges: Mapping[Symbol, Range]  # by symbol
    conditions: tuple[Symbol, ...]  # true of the data, beside the ranges
    settled: tuple[tuple[str, int, int], ...]  # likewise those that were asked to be free, and that tracing found fixed

    def range_of(self, size: Symbol) -> Range:
        """Of a symbol, or an expression that grows with its one symbol."""
        if size in self.ranges:
            return self.ranges[size]
        (symbol, *others) = size.free_symbols
        least, most = self.ranges.get(symbol, ANY)
        if others or not size.subs(symbol, least + 1) > size.subs(symbol, least):
            return ANY
        return int(size.subs(symbol, least)), None if most is None else int(size.subs(symbol, most))

    def within(self, size: Callable[[int, int, int], int]) -> dict[Symbol, int]:
        """`size(n, least, most)` of every symbol that is n in the data, or the nearest in its range."""
        made = {}
        for symbol, n in self.data.items():
            least, most = self.ranges[symbol]
            top = _UNBOUNDED if most is None else most
            made[symbol] = min(top, max(least, size(n, least, top)))
        return made


def free_sizes(placeholders: Iterable[fx.Node], constraints: Mapping[Any, Any], batch: str) -> Free:
    """What torch found of an exported program's inputs."""
    places: list[tuple[str, int, Symbol]] = []
    settled: list[tuple[str, int, int]] = []
    data: dict[Symbol, int] = {}
    environment: Any = None  # one for the whole program
    for node in placeholders:
        for dimension, size in enumerate(node.meta["val"].shape):
            if not dimension or not isinstance(size, torch.SymInt):
                continue
            symbols = size.node.expr.free_symbols
            if not symbols:
                settled.append((str(node.target), dimension, int(size)))
            elif batch not in map(str, symbols):
                environment = size.node.shape_env
                known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
                data |= {symbol: int(known[symbol]) for symbol in symbols}
                places.append((str(node.target), dimension, size.node.expr))
    ranges = {symbol: _range(constraints.get(symbol)) for symbol in data}
    guards = () if environment is None else environment.guards
    conditions = dict.fromkeys(environment.replace(guard.expr) for guard in guards)
    told = tuple(c for c in conditions if c.free_symbols and c.free_symbols <= data.keys())
    return Free(tuple(places), data, ranges, told, tuple(settled))


def _range(known: Any) -> Range:
    if known is None:
        return ANY
    least, most = max(1, known.lower), min(_UNBOUNDED, known.upper)
    return int(least), None if most >= _UNBOUNDED else int(most)


def unchecked(program: ExportedProgram) -> list[str]:
    """Conditions that a saved program was traced under, in torch's words, that neither ranges nor shared words tell.

    There is no model to try beside it.
    """
    return [line for line in getattr(program, "_guards_code", None) or () if not _TOLD.fullmatch(line)]


@dataclass(frozen=True, eq=False)
class Trial:
    """A model, how it is called, and the graph that was traced of it; the graph gives one of the model's outputs."""

    model: nn.Module
    call: Call
    graph: fx.GraphModule
    position: int
    free: Free

    def agrees(self, sizes: Sizes) -> bool | None:
        """Whether the graph answers as the model does at these sizes.

        None when the model itself does not run then, its lengths may have to be even, say; when it has no finite
        answer; and for the data's own sizes.
        """
        if sizes == self.free.data:
            return None
        resized = _resized(self.call.inputs(), self.free, sizes)
        call = self.call.with_inputs(resized)
        with quiet(), torch.no_grad():
            try:
                expected = pytree.tree_leaves(call(self.model))[self.position]
            except Exception:  # noqa: BLE001  # a person's own code, at a length it may refuse in any way it likes
                return None
            try:
                answer = self.graph(*call.inputs().values())
            except Exception:  # noqa: BLE001  # the same code, traced
                return False
        if answer.shape != expected.shape:
            return False
        finite = torch.isfinite(expected).reshape(len(expected), -1).all(1).nonzero().flatten()
        return bool(difference(expected, answer[finite], finite) <= TOLERANCE) if len(finite) else None

    def all_agree(self) -> bool:
        """Whether the graph is right at the next smaller sizes, and wrong at none."""
        found = self._found()
        return bool(next(found)) and all(one is not False for one in found)

    def no_longer(self) -> Trial:
        """The same, with no size beyond the data's."""
        ranges = {symbol: (self.free.ranges[symbol][0], n) for symbol, n in self.free.data.items()}
        return replace(self, free=replace(self.free, ranges=ranges))

    def check(self, title: str) -> None:
        """Whatever was asked to be free is so at some other size at least, and then the graph is right."""
        places = ", ".join(f"{dimension} of {name}" for name, dimension, _ in self.free.places)
        runs = False
        for one in self._found():
            if one is False:
                raise ModelError(
                    f"{title}, exported, answers otherwise than itself when dimension {places} has another size; "
                    "leave dynamic out"
                )
            runs = runs or one is True
        if not runs:
            raise ModelError(f"{title} runs at no other size of dimension {places} than the data's; leave dynamic out")

    def from_one(self) -> Free:
        """With ranges that begin at 1, if the graph is right there: torch has all that it finds begin at 2."""
        ranges = {s: (1 if least == 2 else least, most) for s, (least, most) in self.free.ranges.items()}
        wider = replace(self.free, ranges=ranges)
        return wider if self.agrees(wider.within(lambda n, least, most: least)) else self.free

    def _found(self) -> Iterator[bool | None]:
        """What `agrees` says of one size after the other, the first of `_OTHERS` first; each is tried once."""
        broken = (_breaking(condition, self.free) for condition in self.free.conditions)
        tried: set[tuple[int, ...]] = set()
        for sizes in itertools.chain(map(self.free.within, _OTHERS), filter(None, broken)):
            key = tuple(sizes[symbol] for symbol in self.free.data)
            if key not in tried:
                tried.add(key)
                yield self.agrees(sizes)


def _breaking(condition: Symbol, free: Free) -> dict[Symbol, int] | None:
    """Sizes within the ranges at which a condition does not hold."""
    symbols = sorted(condition.free_symbols, key=str)
    for sizes in itertools.islice(itertools.product(*(_some(s, condition, free) for s in symbols)), _COMBINED):
        chosen = dict(zip(symbols, sizes, strict=True))
        try:
            holds = bool(condition.subs(chosen))
        except (ArithmeticError, TypeError):  # a division by a size that is 0 then, or nothing that is true or false
            continue
        if not holds:
            return {**free.data, **chosen}
    return None


def _some(symbol: Symbol, condition: Symbol, free: Free) -> list[int]:
    """Sizes where a condition on the symbol may break: beside the data's, and beside every number in it."""
    n, (least, most) = free.data[symbol], free.ranges[symbol]
    middles = [n, 2 * n, n // 2, *(int(number) for number in condition.atoms() if number.is_Integer)]
    near = dict.fromkeys(middle + step for middle, step in itertools.product(middles, (0, -1, 1, -2, 2)))
    top = _LONGEST if most is None else min(most, _LONGEST)
    return [size for size in (*near, *range(2, 9)) if least <= size <= top]


def _resized(example: Mapping[str, torch.Tensor], free: Free, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The same rows at other sizes: cut, or begun again where they end; a few of them where they are much longer."""
    longer = any(sizes[symbol] > 2 * n for symbol, n in free.data.items())
    made = {name: value[: _FEW if longer else None] for name, value in example.items()}
    for name, dimension, size in free.places:
        wanted = max(1, int(size.subs(sizes)))
        made[name] = made[name].index_select(dimension, torch.arange(wanted) % example[name].shape[dimension])
    return made
