"""A newer artifact takes the place of the one served, again and again, and no request is lost over it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from engine_help import Receiver
from host_help import PATIENCE, STAGES, K, Loads, Told, taken, until
from soak_help import MODEL, behaved, server, stop, together
from tiny import THRESHOLDS, batch, reference, tiny_files, tiny_manifest

from offramp.runtime import ArtifactError, open_artifact, write_artifact
from offramp.runtime.artifact import keep_open
from offramp.runtime.manifest import Manifest
from offramp.runtime.serve.engine import BatchingEngine
from offramp.runtime.serve.host import ModelHost
from offramp.runtime.serve.work import Asked

SWAPS = 12


def write(path: Path, version: int) -> None:
    """The tiny artifact, told from others by the name of its backbone; all answer alike."""
    files = tiny_files()
    manifest = tiny_manifest(files)
    write_artifact(path, replace(manifest, backbone=replace(manifest.backbone, name=f"tiny{version}")), files)


def put(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """An artifact, zipped where the path says so, in the place of what stands there."""
    if path.suffix != ".zip":
        write_artifact(path, manifest, files)
        return
    folder = path.with_suffix("")
    write_artifact(folder, manifest, files)
    Path(shutil.make_archive(f"{folder}.draft", "zip", folder)).replace(path)


async def swapping(url: str, path: Path) -> list[str]:
    """-> the digest served after every swap."""
    digests = []
    async with aiohttp.ClientSession(url) as session:
        for version in range(1, SWAPS + 1):
            write(path, version)
            async with session.post(f"/v2/repository/models/{MODEL}/load") as answer:
                assert answer.status == 200, await answer.text()
            async with session.get("/v1/models") as answer:
                digests.append((await answer.json())["models"][0]["digest"])
    return digests


def test_swaps_under_load_lose_nothing(tmp_path: Path) -> None:
    path, said = tmp_path / "tiny.offramp", tmp_path / "said.txt"
    write(path, 0)

    async def all_at_once(url: str) -> list[str]:
        clients = asyncio.create_task(together([behaved(url, seed, 150) for seed in range(3)]))
        digests = await swapping(url, path)
        assert all(tally.answered and not tally.refused for tally in await clients)
        return digests

    with server(path, said, "--workers", "2", "--threads", "1") as (process, url):
        digests = asyncio.run(all_at_once(url))
        assert len(set(digests)) == SWAPS
        assert stop(process) == 0
    assert "Traceback" not in said.read_text()


@pytest.mark.parametrize("name", ["tiny.offramp", "tiny.zip"])
def test_a_replaced_version_still_loads_its_deep_stages(tmp_path: Path, name: str) -> None:
    path, files = tmp_path / name, tiny_files()
    put(path, tiny_manifest(files), files)
    host = ModelHost({MODEL: str(path)}, budget=15 * K, load=Loads([10, 10, 10]))
    old = host.hold(MODEL)
    other = {name: data + b"newer" if name == old.manifest.stages[2].file else data for name, data in files.items()}
    put(path, replace(tiny_manifest(other), default_plan=0), other)
    host.swap(MODEL)
    assert host.hold(MODEL) is not old
    rows = batch(4)
    hidden = np.zeros((4, 8), np.float32)
    feed = {"h1": hidden, "skip": hidden, "side": rows["side"]}
    stage = taken(old, 2)  # of a file that is not there any more
    assert len(stage.session.run(["confidence"], {name: feed[name] for name in stage.inputs})[0]) == 4
    old.give(2)
    old.release()
    host.close()


def test_a_request_may_name_the_version_that_answers(tmp_path: Path) -> None:
    path = tmp_path / "tiny.offramp"
    write(path, 0)
    told = Told()
    host = ModelHost({MODEL: str(path)}, observer=told)
    engine = BatchingEngine(host, workers=1)
    old = host.hold(MODEL)
    write(path, 1)
    host.swap(MODEL)
    receiver = Receiver(20)
    engine.submit(MODEL, batch(20), Asked(), receiver, old)
    old.release()
    assert receiver.wait().exits() == reference(batch(20), THRESHOLDS)[1].tolist()
    until(lambda: len(told.of("evicted")) == STAGES)  # by nobody held any more
    engine.close(PATIENCE)
    host.close()


@pytest.mark.parametrize("name", ["tiny.offramp", "tiny.zip"])
def test_an_artifact_kept_open_is_read_after_it_was_replaced(tmp_path: Path, name: str) -> None:
    path, files = tmp_path / name, tiny_files()
    put(path, tiny_manifest(files), files)
    loose = open_artifact(path)
    kept = keep_open(loose)
    path.rename(tmp_path / "gone")
    for name, data in tiny_files().items():
        assert kept.read(name) == data
    with pytest.raises(ArtifactError, match="does not exist"):
        loose.read("report.html")
    assert kept.kept is not None
    kept.kept.close()
    with pytest.raises(ArtifactError, match=r"let go of while it was read .*closed"):
        kept.read("report.html")
