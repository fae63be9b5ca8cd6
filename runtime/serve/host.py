"""Models by name within one budget of memory: which of their segments are loaded, and when.

    opening       the first stage of every model is loaded before the host is there, as many as fit
    post-loading  a thread loads deeper ones, the shallow ones of all models first, where they fit beside the others
    on demand     what `take` does not find is loaded before anything else, in order of asking; others go for it
    swapping      a name's new version has its first stage in memory before it takes the name; the files of the old one
                  are held open, so that requests it still has may load its deep stages

So serving begins with the first stages, a model shrinks to its early stages where memory is short and grows back when
its deep ones are asked for: the papers' "post-loading" and "memory-adaptive models". `policies` says who goes first,
`shelf` when, `memory` how much each takes.

Refused: no model, an artifact without stages, what `open_artifact` and `load` refuse, a first stage larger than the
whole budget.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from ..artifact import Artifact, keep_open, open_artifact
from ..errors import OfframpError, StorageError, UnknownModelError, UsageError
from ..execution import Stage
from ..manifest import Manifest, dump_manifest
from ..process import hand_back
from .loader import Load, Loader, stage_bytes
from .parts import Part, Slot
from .policies import POLICIES
from .shelf import Evict, LoadPart, Shelf
from .work import Observer, SegmentState, Silent

PolicyName = Literal["lru", "lfu", "cost"]
Unit = Literal["segment", "model"]
_LOG = logging.getLogger(__name__)


class Version:
    """One version of a model: what `ModelHost.hold` gives. See `work.Hosted`."""

    def __init__(self, name: str, number: int, artifact: Artifact, unit: Unit, shelf: Shelf) -> None:
        self._name, self._artifact, self._manifest, self._shelf = name, artifact, artifact.manifest, shelf
        self._digest = hashlib.sha256(dump_manifest(artifact.manifest)).hexdigest()
        self._slots = [Slot(index, stage_bytes(artifact, index)) for index in range(len(artifact.manifest.stages))]
        groups = [self._slots] if unit == "model" else [[slot] for slot in self._slots]
        self.parts = [Part(name, number, artifact, depth, slots) for depth, slots in enumerate(groups)]
        self._part_of = [part for part in self.parts for _ in part.slots]
        self._holders = 0
        self._replaced = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def digest(self) -> str:
        return self._digest

    def take(self, stage: int) -> Stage | None:
        return self._shelf.take(self._part_of[stage], self._slots[stage])

    def give(self, stage: int) -> None:
        self._shelf.give(self._part_of[stage])

    def hold(self) -> None:
        """One more may use it until `release`."""
        with self._shelf.lock:
            self._holders += 1

    def release(self) -> None:
        with self._shelf.lock:
            if not self._holders:
                raise UsageError(f"{self._name} is released more often than it was held; release once for each hold")
            self._holders -= 1
            self._retire()

    def replace(self) -> None:
        """Its name belongs to another version now."""
        with self._shelf.lock:
            self._replaced = True
            self._retire()

    def states(self) -> list[SegmentState]:
        """Its stages as they are now."""
        with self._shelf.lock:
            return [
                SegmentState(self._name, slot.index, part.loaded, slot.sizes.bytes, slot.uses, slot.load_seconds)
                for slot, part in zip(self._slots, self._part_of, strict=True)
            ]

    def close(self) -> None:
        """Nothing is loaded of it any more."""
        if self._artifact.kept is not None:
            self._artifact.kept.close()

    def _retire(self) -> None:
        if self._replaced and not self._holders:
            self._shelf.forget(self.parts)
            self.close()


class ModelHost:
    """See `work.Host`, whose promises it keeps."""

    def __init__(
        self,
        paths: Mapping[str, str | os.PathLike[str]],
        *,
        budget: int | None = None,
        policy: PolicyName = "lru",
        threads: int | None = 1,
        unit: Unit = "segment",
        providers: Sequence[str] | None = None,
        observer: Observer | None = None,
        load: Load | None = None,
    ) -> None:
        """`paths` of artifacts by the names they are served under; `budget` in bytes of memory for their stages.

        `unit` "model" loads and evicts all stages of a model together. `threads` and `providers` as for `load`.
        `load` puts one stage into memory; None: as `Loader` does.
        """
        _check(paths, budget, policy, unit)
        self._paths, self._unit = dict(paths), unit
        self._observer: Observer = observer or Silent()
        self._load_stage = load or Loader(threads, providers)
        self._shelf = Shelf(budget, POLICIES[policy])
        self._listeners: list[Callable[[], None]] = []
        self._swapping = threading.Lock()
        self._versions = 0
        self._newest = {name: self._open(name) for name in self._paths}  # all are checked before any is loaded
        for version in self._newest.values():
            self._begin(version)
        self._thread = threading.Thread(target=self._work, name="offramp-loader", daemon=True)
        self._thread.start()

    def hold(self, name: str) -> Version:
        """The newest version, see `work.Host.hold`."""
        with self._shelf.lock:
            version = self._newest.get(name)
            if version is None:
                raise UnknownModelError(f"no model {name!r} here; served are {', '.join(self._newest)}")
            version.hold()
            return version

    def names(self) -> list[str]:
        """Of the models, in the order they were given."""
        return list(self._newest)

    def swap(self, name: str) -> None:
        """Take what now stands at the model's path, see `work.Host.swap`; nothing where that is what is served.

        Raises `StorageError` too, where the new first stage is larger than the whole budget.
        """
        self.hold(name).release()  # raises where there is no such model
        with self._swapping:
            old, new = self._newest[name], self._open(name)
            if new.digest == old.digest:
                return
            self._shelf.fetch(new.parts)
            with self._shelf.lock:
                self._newest[name] = new
            old.replace()
            new.give(0)

    def listen(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever a stage was loaded or failed to be, from the thread that loads."""
        self._listeners.append(changed)

    def segments(self) -> list[SegmentState]:
        """Every stage of the newest version of every model."""
        return [state for version in list(self._newest.values()) for state in version.states()]

    def memory(self) -> int:
        """Bytes that all stages in memory take, those of versions that were replaced included."""
        return self._shelf.bytes()

    def close(self) -> None:
        """Let go of all stages, after a loading that is running. What was taken stays usable for who has it."""
        self._shelf.close()
        self._thread.join()
        self._evict(self._shelf.clear())
        for version in self._newest.values():
            version.close()

    def _open(self, name: str) -> Version:
        artifact = keep_open(open_artifact(self._paths[name]))
        if not artifact.manifest.stages:
            raise UsageError(f"{self._paths[name]}: holds no stages to serve; compile with target onnx-segments")
        self._versions += 1
        return Version(name, self._versions, artifact, self._unit, self._shelf)

    def _begin(self, version: Version) -> None:
        """The first part of a version, where there is room. Raises what its loading ends in."""
        self._shelf.add(version.parts)
        first = version.parts[0]
        self._shelf.check(first)
        if not self._shelf.fits(first):
            return
        again = True
        while again:
            self._load(self._shelf.loading(first))
            if first.error is not None:
                raise first.error
            gone = self._shelf.evictions()
            if gone is not None:  # it turned out larger than the room there was
                self._evict(gone)
            again = self._shelf.doubts(first)

    def _work(self) -> None:
        while (job := self._shelf.next()) is not None:
            if isinstance(job, Evict):
                self._evict(job)
                continue
            if isinstance(job, LoadPart):
                self._load(job)
            for changed in tuple(self._listeners):
                _say(changed)

    def _load(self, job: LoadPart) -> None:
        part, stages = job.part, []
        try:
            for slot in part.slots:
                stages.append(self._load_stage(part.artifact, slot.index))  # noqa: PERF401  # none is lost on failure
        except OfframpError as error:
            self._shelf.failed(part, error)
            return
        except Exception as error:  # noqa: BLE001  # whatever it is, those who wait must hear of it
            said = f"{part.title} could not be loaded ({type(error).__name__}: {error}); look at the machine's memory"
            self._shelf.failed(part, StorageError(said))
            return
        self._shelf.loaded(job, stages)
        for slot, loaded in zip(part.slots, stages, strict=True):
            _say(self._observer.loaded, part.model, slot.index, loaded.seconds, slot.sizes.bytes)

    def _evict(self, job: Evict) -> None:
        job.stages.clear()
        hand_back()
        for part in job.parts:
            for slot in part.slots:
                _say(self._observer.evicted, part.model, slot.index)


def _say(call: Callable[..., None], *given: object) -> None:
    """Tell a neighbour; its failure is not the others', nor the end of loading."""
    try:
        call(*given)
    except Exception:  # noqa: BLE001  # whatever it is
        _LOG.exception("who was told of a stage failed")


def _check(paths: Mapping[str, str | os.PathLike[str]], budget: int | None, policy: str, unit: str) -> None:
    if not paths:
        raise UsageError("no model to serve; give the path of at least one artifact")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise UsageError(f"a memory budget of {budget!r} bytes holds nothing; give a whole number from 1 up, or None")
    for name, value, kind in (("policy", policy, PolicyName), ("unit", unit, Unit)):
        if value not in get_args(kind):
            raise UsageError(f"{name} is {value!r}; give one of {', '.join(get_args(kind))}")
