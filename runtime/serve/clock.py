"""One thread that calls functions at times: what answers rows at their deadline while every worker is busy."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)
_KEPT = 64  # cancelled alarms that may lie in the heap whatever its size


class Alarm:
    """A call to come; made by `Clock.at`."""

    def __init__(self, clock: Clock, call: Callable[[], None]) -> None:
        self._clock = clock
        self.call: Callable[[], None] | None = call  # None: rung, or cancelled

    def cancel(self) -> None:
        """Do not call, and let go of what the call holds. No harm where it was called already."""
        self._clock.forget(self)


class Clock:
    """Calls in the order of their times, each in the clock's thread. One that raises is logged."""

    def __init__(self, name: str = "offramp-clock") -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._cancelled = 0  # of the alarms in the heap
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def at(self, moment: float, call: Callable[[], None]) -> Alarm:
        """Call at `moment`, `time.monotonic()` seconds; at once where that is past, never once the clock is closed."""
        alarm = Alarm(self, call)
        with self._changed:
            heapq.heappush(self._heap, (moment, next(self._order), alarm))
            if self._heap[0][2] is alarm:
                self._changed.notify()
        return alarm

    def forget(self, alarm: Alarm) -> None:
        """What `Alarm.cancel` does."""
        with self._changed:
            if alarm.call is None:
                return
            alarm.call = None
            self._cancelled += 1
            # Answered requests with deadlines far ahead would otherwise pile up.
            if self._cancelled > max(_KEPT, len(self._heap) // 2):
                self._heap = [entry for entry in self._heap if entry[2].call is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def close(self) -> None:
        """Call nothing more; returns when the call under way has ended."""
        with self._changed:
            self._closed = True
            self._heap.clear()
            self._changed.notify()
        self._thread.join()

    def __len__(self) -> int:
        """Alarms kept, cancelled ones included."""
        with self._changed:
            return len(self._heap)

    def _run(self) -> None:
        while self._call():
            pass

    def _call(self) -> bool:
        """Wait for a call to be due and make it; False: closed. While it waits it holds on to no call that was."""
        call = self._next()
        if call is None:
            return False
        try:
            call()
        except Exception:  # noqa: BLE001  # the calls of others are still to come
            _log.exception("a call at its time failed")
        return True

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                wait = self._heap[0][0] - time.monotonic() if self._heap else threading.TIMEOUT_MAX
                if wait > 0:
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
                    continue
                alarm = heapq.heappop(self._heap)[2]
                call, alarm.call = alarm.call, None
                if call is not None:
                    return call
                self._cancelled -= 1
        return None
