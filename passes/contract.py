"""The contract of a pass: `requires` -> `call` -> `ensures`.

A pass takes a subject (a `Backbone` or an `ExitProgram`), returns one of the same or a later kind and says
whether it changed anything. Calling a pass checks both ends, so a pass that breaks its promise is found at
its own door and not three passes later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from offramp.runtime.errors import PassError

In = TypeVar("In")
Out = TypeVar("Out")


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
            raise PassError(f"{self.name} cannot run here: {'; '.join(missing)}")
        result = self.call(subject)
        if broken := self.ensures(result.subject):
            raise PassError(f"{self.name} broke its contract (a bug in the pass): {'; '.join(broken)}")
        if not result.modified and id(result.subject) != id(subject):
            raise PassError(f"{self.name} says it changed nothing but returned another subject (a bug in the pass)")
        return result
