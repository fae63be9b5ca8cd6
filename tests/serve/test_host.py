"""The host as others use it: threads, artifacts on disk, versions that come and go."""

from __future__ import annotations

import dataclasses
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from host_help import CPU, PATIENCE, STAGES, K, Loads, Told, taken, until, used, write_models
from tiny import batch, reference_all, tiny_files, tiny_manifest, write_tiny

import offramp.runtime
from offramp.runtime import ArtifactError, StorageError, UsageError, write_artifact
from offramp.runtime.errors import UnknownModelError
from offramp.runtime.execution import carry
from offramp.runtime.serve.host import ModelHost, Version
from offramp.runtime.serve.memory import measurable

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("host"), NAMES)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of an artifact that a test may change."""
    return write_tiny(tmp_path / "a").path


def changed(path: Path) -> str:
    """Another version of the artifact at `path`, with the same answers."""
    files = tiny_files()
    manifest = dataclasses.replace(tiny_manifest(files), preprocessing="none at all")
    write_artifact(path, manifest, files)
    return str(path)


def answers(version: Version, rows: dict[str, np.ndarray]) -> np.ndarray:
    """[E, B, K] of every exit, stage by stage through the host."""
    live, probabilities = rows, []
    for index in range(STAGES):
        stage = taken(version, index)
        values = stage.session.run(stage.fetched, {name: live[name] for name in stage.inputs})
        version.give(index)
        probabilities.append(values[-2])
        live = carry(stage, live, values[:-2])
    return np.stack(probabilities)


def settled(host: ModelHost) -> None:
    """Wait for all stages to be in memory."""
    until(lambda: all(state.loaded for state in host.segments()))


def test_first_stages_are_there_at_once_and_the_others_follow(paths: dict[str, str], told: Told) -> None:
    loads = Loads([10, 20, 30])
    host = ModelHost(paths, budget=200 * K, observer=told, load=loads)
    assert [state.model for state in host.segments() if state.loaded and state.stage == 0] == NAMES
    settled(host)
    assert told.of("loaded") == [(name, stage) for stage in range(STAGES) for name in NAMES]
    assert told.of("evicted") == []
    assert host.names() == NAMES
    assert host.memory() == 180 * K
    used(host.hold("b"), 0, 0, 2)
    states = {(state.model, state.stage): state for state in host.segments()}
    assert (states["b", 0].uses, states["b", 1].uses, states["b", 2].bytes) == (2, 0, 30 * K)
    host.close()
    assert host.memory() == 0


def test_answers_are_those_of_the_model(paths: dict[str, str]) -> None:
    host = ModelHost(paths, providers=CPU)
    rows = batch(7)
    np.testing.assert_allclose(answers(host.hold("a"), rows), reference_all(rows), atol=1e-5)
    assert all(state.loaded and state.load_seconds > 0 for state in host.segments() if state.model == "a")
    host.close()


def test_what_is_asked_for_goes_before_what_is_not(paths: dict[str, str], told: Told) -> None:
    loads = Loads([10, 10, 10])
    host = ModelHost(paths, observer=told, load=HeldUp(loads))
    until(lambda: len(loads.calls) == 4)
    assert host.hold("c").take(2) is None
    assert host.hold("b").take(2) is None
    loads.open.set()
    settled(host)
    assert told.of("loaded")[3:6] == [("a", 1), ("c", 2), ("b", 2)]
    host.close()


class HeldUp:
    """Loads first stages at once, the others when the doors open."""

    def __init__(self, loads: Loads) -> None:
        self.loads = loads

    def __call__(self, artifact, index):  # type: ignore[no-untyped-def]
        if index == 1 and len(self.loads.calls) == 3:
            self.loads.open.clear()
        return self.loads(artifact, index)


def test_models_shrink_to_their_early_stages_and_grow_again(paths: dict[str, str], told: Told) -> None:
    host = ModelHost(paths, budget=60 * K, observer=told, load=Loads([10, 10, 10]))
    until(lambda: len(told.of("loaded")) == 6)
    versions = {name: host.hold(name) for name in NAMES}
    used(versions["a"], 0, 1, 2)
    used(versions["b"], 0, 1, 2)
    assert host.memory() == 60 * K
    assert {(s.model, s.stage) for s in host.segments() if s.loaded} == {*((n, s) for n in "ab" for s in range(3))}
    used(versions["c"], 0)
    assert told.of("evicted")[-1] == ("a", 2)
    host.close()


def test_a_model_as_a_whole(paths: dict[str, str], told: Told) -> None:
    host = ModelHost(paths, budget=60 * K, observer=told, load=Loads([10, 10, 10]), unit="model")
    assert [state.loaded for state in host.segments()] == [True] * 6 + [False] * 3
    used(host.hold("b"), 0)
    used(host.hold("c"), 2)
    assert told.of("evicted") == [("a", stage) for stage in range(STAGES)]
    assert told.of("loaded")[-3:] == [("c", stage) for stage in range(STAGES)]
    host.close()


def test_an_altered_file_is_told_once_and_read_again(path: Path) -> None:
    host = ModelHost({"a": str(path)}, budget=15 * K, load=Loads([10, 10, 10]))
    version, file = host.hold("a"), path / "stages" / "2.onnx"
    bytes_ = file.read_bytes()
    file.write_bytes(bytes_[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"stages/2\.onnx: altered since it was written"):
        taken(version, 2)
    file.write_bytes(bytes_)
    assert version.take(2) is None
    taken(version, 2)
    host.close()


def test_whatever_fails_the_loader_goes_on(paths: dict[str, str]) -> None:
    class Broken(Told):
        def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None:
            super().loaded(model, stage, seconds, bytes)
            raise ValueError("an observer's own mistake")

    told, loads = Broken(), Loads([10, 10, 10])
    loads.failures[("a", 1)] = MemoryError("no more")
    host = ModelHost(paths, observer=told, load=loads)
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise ValueError("a listener's own mistake")

    host.listen(broken)
    until(lambda: len(told.of("loaded")) >= 7)
    version = host.hold("a")
    with pytest.raises(StorageError, match=r"a: stage 1 could not be loaded .MemoryError: no more"):
        taken(version, 1)
    taken(version, 1)
    settled(host)
    assert calls
    host.close()


def test_more_than_the_budget(paths: dict[str, str]) -> None:
    with pytest.raises(StorageError, match=r"a: stage 0 takes .* the budget for all models is"):
        ModelHost(paths, budget=5000 * K, load=Loads([6000, 10, 10]))
    with pytest.raises(StorageError, match="a: the model of 3 stages takes"):
        ModelHost(paths, budget=5000 * K, load=Loads([2000, 2000, 2000]), unit="model")
    host = ModelHost(paths, budget=5000 * K, load=Loads([10, 10, 6000]))
    version = host.hold("a")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"a: stage 2 takes 11\.44 MiB of memory, .* raise the memory budget"):
            taken(version, 2)
    used(version, 0, 1)
    host.close()


def test_arguments(paths: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model to serve"):
        ModelHost({})
    for budget in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match="memory budget of"):
            ModelHost(paths, budget=budget)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="policy is 'best'; give one of lru, lfu, cost"):
        ModelHost(paths, policy="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unit is 'row'; give one of segment, model"):
        ModelHost(paths, unit="row")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads is 0"):
        ModelHost(paths, threads=0)
    with pytest.raises(ArtifactError, match="does not exist"):
        ModelHost({"a": str(tmp_path / "nowhere")})
    files = tiny_files()
    manifest = tiny_manifest(files)
    listed = {name: spec for name, spec in manifest.files.items() if not name.startswith("stages/")}
    whole = dataclasses.replace(manifest, stages=(), files=listed)
    write_artifact(tmp_path / "whole", whole, {name: files[name] for name in whole.all_files()})
    with pytest.raises(UsageError, match="holds no stages to serve; compile with target onnx-segments"):
        ModelHost({"a": str(tmp_path / "whole")})
    host = ModelHost(paths, load=Loads([1, 1, 1]))
    for call in (host.hold, host.swap):
        with pytest.raises(UnknownModelError, match="no model 'z' here; served are a, b, c"):
            call("z")
    host.close()


def test_a_version_lives_until_all_have_let_go(path: Path, told: Told) -> None:
    host = ModelHost({"a": str(path)}, observer=told, load=Loads([10, 10, 10]))
    settled(host)
    first, again = host.hold("a"), host.hold("a")
    assert first is again
    changed(path)
    taken(first, 1)
    host.swap("a")
    newest = host.hold("a")
    assert newest.digest != first.digest
    assert newest.manifest.preprocessing == "none at all"
    assert host.segments()[0].loaded
    settled(host)
    assert told.of("evicted") == []
    first.release()
    used(first, 0)
    again.release()
    until(lambda: len(told.of("evicted")) == 2)
    assert ("a", 1) not in told.of("evicted"), "it is taken"
    first.give(1)
    until(lambda: len(told.of("evicted")) == 3)
    assert host.memory() == 30 * K
    with pytest.raises(UsageError, match="released by all who held it"):
        first.take(0)
    with pytest.raises(UsageError, match="released more often than it was held"):
        again.release()
    host.close()


def test_a_swap_that_fails_changes_nothing(path: Path) -> None:
    loads = Loads([10, 10, 10])
    host = ModelHost({"a": str(path)}, load=loads)
    settled(host)
    old = host.hold("a")
    host.swap("a")
    assert host.hold("a") is old, "the same version stands there"
    changed(path)
    loads.failures[("a", 0)] = StorageError("it does not fit")
    with pytest.raises(StorageError, match="it does not fit"):
        host.swap("a")
    (path / "report.html").write_text("altered")
    with pytest.raises(ArtifactError, match=r"report\.html"):
        host.swap("a")
    assert host.hold("a") is old
    used(old, 0, 1, 2)
    assert host.memory() == 30 * K
    shutil.rmtree(path)
    changed(path)
    host.swap("a")
    assert host.hold("a") is not old
    host.close()


def test_a_first_stage_whose_file_alone_exceeds_the_budget_is_refused_at_the_start(paths: dict[str, str]) -> None:
    loads = Loads([10, 20, 30])
    with pytest.raises(StorageError, match=r"a: stage 0 takes .* the budget for all models is 0\.00 MiB"):
        ModelHost(paths, budget=100, load=loads)
    assert not loads.calls


def test_a_swap_makes_room_in_a_full_budget(path: Path) -> None:
    host = ModelHost({"a": str(path)}, budget=30 * K, load=Loads([10, 10, 10]))
    settled(host)
    old = host.hold("a")
    changed(path)
    host.swap("a")
    new = host.hold("a")
    assert new is not old
    used(new, 0)
    used(old, 2)
    old.release()
    settled(host)
    host.close()


def test_closing(paths: dict[str, str]) -> None:
    host = ModelHost(paths, budget=25 * K, load=Loads([10, 10, 10]))
    version = host.hold("a")
    stage = taken(version, 0)
    waiting = threading.Event()
    host.listen(waiting.set)
    host.close()
    version.give(0)
    version.release()
    rows = batch(2)
    assert len(stage.session.run(stage.fetched, {"x": rows["x"]})) == 4, "who has it may use it"
    with pytest.raises(UsageError, match="the host was closed"):
        version.take(0)
    with pytest.raises(UsageError, match="the host was closed"):
        host.hold("b").take(1)
    host.close()


def test_a_swap_ends_when_the_host_is_closed(path: Path) -> None:
    loads = Loads([10, 10, 10])
    host = ModelHost({"a": str(path)}, budget=15 * K, load=loads)
    loads.open.clear()
    assert host.hold("a").take(1) is None
    until(lambda: len(loads.calls) == 2)
    changed(path)
    failures: list[BaseException] = []

    def swap() -> None:
        try:
            host.swap("a")
        except UsageError as error:
            failures.append(error)

    threads = [threading.Thread(target=swap), threading.Thread(target=host.close)]
    for thread in threads:
        thread.start()
    until(lambda: bool(failures))
    loads.open.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert "the host was closed" in str(failures[0])


def in_threads(*works: Callable[[], object]) -> None:
    """Call all at once; none may raise."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # told below
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=[work], daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_models_that_do_not_fit_together_both_get_on(paths: dict[str, str]) -> None:
    host = ModelHost(paths, budget=10 * K, load=Loads([10, 10, 10]))

    def walk(name: str) -> None:
        for _ in range(15):
            used(host.hold(name), *range(STAGES))

    in_threads(*(lambda name=name: walk(name) for name in NAMES))
    host.close()


def test_a_busy_stage_keeps_nobody_waiting_for_ever(paths: dict[str, str]) -> None:
    """Two threads relay one stage so that it is never free; a third still gets its own."""
    host = ModelHost(paths, budget=10 * K, load=Loads([10, 10, 10]))
    done, baton = threading.Event(), threading.Barrier(2)

    def relay() -> None:
        version = host.hold("a")
        while not done.is_set():
            mine = version.take(0)
            try:
                baton.wait(0.05)  # while both have it
            except threading.BrokenBarrierError:
                baton.reset()
            if mine is not None:
                version.give(0)

    def other() -> None:
        for _ in range(3):
            used(host.hold("b"), 0)
        done.set()

    in_threads(relay, relay, other)
    host.close()


@pytest.mark.parametrize("unit", ["segment", "model"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "cost"])
def test_many_threads_get_right_answers_while_versions_change(tmp_path: Path, policy: str, unit: str) -> None:
    paths = write_models(tmp_path, NAMES)
    told, sizes = Told(), [10, 20, 30]
    host = ModelHost(paths, budget=70 * K, policy=policy, unit=unit, observer=told, load=Loads(sizes))  # type: ignore[arg-type]
    over: list[int] = []
    host.listen(lambda: over.append(host.memory()))

    def client(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(12):
            version, rows = host.hold(draw.choice(NAMES)), batch(draw.randint(1, 5), draw.randint(0, 99))
            np.testing.assert_allclose(answers(version, rows), reference_all(rows), atol=1e-5)
            version.release()

    def swapper() -> None:
        for turn in range(6):
            if turn % 2:
                shutil.rmtree(paths["b"])
                write_tiny(Path(paths["b"]))
            else:
                changed(Path(paths["b"]))
            host.swap("b")

    def steady(seed: int) -> None:
        while True:
            try:
                return client(seed)
            except ArtifactError:  # "b" was read in the middle of being replaced
                continue

    in_threads(*(lambda seed=seed: steady(seed) for seed in range(4)), swapper)
    until(lambda: host.memory() <= 70 * K)
    assert over
    before = len(told.of("evicted"))
    host.close()  # until then a stage may still be loading
    assert len(told.of("evicted")) == len(told.of("loaded")) >= before > 0
    assert host.memory() == 0


@pytest.mark.skipif(not measurable(), reason="this system does not tell")
def test_sizes_are_what_the_process_takes(tmp_path: Path) -> None:
    """The sum of all stages' sizes against what the process grew by, in a process of its own."""
    path = str(write_tiny(tmp_path / "a").path)
    script = (
        "import sys\n"
        "from offramp.runtime.serve.host import ModelHost\n"
        "from offramp.runtime.serve.memory import in_use\n"
        "paths = {f'm{i}': sys.argv[1] for i in range(60)}\n"
        "ModelHost({'warm': sys.argv[1]}).close()\n"
        "before = in_use()\n"
        "host = ModelHost(paths)\n"
        "while not all(state.loaded for state in host.segments()): pass\n"
        "after, told = in_use(), host.memory()\n"
        "host.close()\n"
        "print(told, after - before, after - in_use())\n"
    )
    environment = {"PYTHONPATH": str(Path(offramp.runtime.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script, path], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    said, grown, given_back = map(int, done.stdout.split())
    assert 0.8 < said / grown < 1.25
    assert given_back > 0.8 * said
