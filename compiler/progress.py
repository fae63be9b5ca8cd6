"""Progress bars for whatever takes longer than two seconds; none where no terminal watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Say = Callable[[str], None]  # receives one line


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar named `what` on standard error."""
    return iter(tqdm(items, desc=what, total=total, delay=2, disable=None, leave=False, dynamic_ncols=True))
