"""The contract of a pass: `requires` -> `call` -> `ensures`.

A pass takes a subject (a `Backbone` or an `ExitProgram`), returns one of the same or a later kind and says
whether it changed anything. Calling a pass checks both ends, so a pass that breaks its promise is found at
its own door and not three passes later.

Whoever wants to see passes at work, to write down what each one did or to hold it to the verifier's rules, asks
for it with `observed`; the passes themselves, and those who run them, know nothing of it.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from offramp.runtime.errors import PassError

In = TypeVar("In")
Out = TypeVar("Out")
_TOLD = 5


@dataclass(frozen=True)
class PassResult(Generic[Out]):
    """What a pass made, and whether that differs from what it was given."""

    subject: Out
    modified: bool


class Pass(ABC, Generic[In, Out]):
    """A named step over graphs. Never changes its argument: the result is a new subject or the same one."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, subject: In) -> list[str]:
        """What keeps this pass from running on `subject`, one sentence each; empty if nothing does."""
        return []

    @abstractmethod
    def call(self, subject: In) -> PassResult[Out]:
        """Do the work."""

    def ensures(self, subject: Out) -> list[str]:
        """Which promises the result breaks, one sentence each; empty if none."""
        return []

    def __call__(self, subject: In) -> PassResult[Out]:
        """Run with both checks. Raises `PassError` naming the pass and the broken promises."""
        if missing := self.requires(subject):
            raise PassError(f"{self.name} cannot run here: {_told(missing)}")
        result = self.call(subject)
        if broken := self.ensures(result.subject):
            raise PassError(f"{self.name} broke its contract (a bug in the pass): {_told(broken)}")
        if not result.modified and id(result.subject) != id(subject):
            raise PassError(f"{self.name} says it changed nothing but returned another subject (a bug in the pass)")
        for observer in _observers.get():
            observer(self, subject, result)
        return result


def _told(sentences: list[str]) -> str:
    """The first few, and how many more: one fault often breaks a promise at every layer."""
    more = len(sentences) - _TOLD
    return "; ".join(sentences[:_TOLD]) + (f"; and {more} more" if more > 0 else "")


Observer = Callable[[Pass[Any, Any], Any, PassResult[Any]], None]  # (pass, what it was given, what it made)

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


@contextlib.contextmanager
def observed(*observers: Observer) -> Iterator[None]:
    """Within, every pass that has kept its contract is shown to `observers`, after those already there."""
    token = _observers.set((*_observers.get(), *observers))
    try:
        yield
    finally:
        _observers.reset(token)
