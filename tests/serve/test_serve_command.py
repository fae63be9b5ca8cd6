"""`offramp serve`: its arguments, what it refuses, and what signals do to a process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import batch, write_tiny
from web_help import PATIENCE, as_lists
from websockets.sync.client import connect

import offramp.runtime
from offramp.runtime.cli import main
from offramp.runtime.commands import byte_size
from offramp.runtime.errors import InputError, UsageError
from offramp.runtime.serve import command
from offramp.runtime.serve.metrics import Metrics
from offramp.runtime.serve.work import Asked

HELP = Path(__file__).with_name("command_help.py")


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.serve.configure(parser)
    return parser.parse_args(["a.offramp", *words])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["a.offramp"], {"a": "a.offramp"}),
        (["some/where/resnet-20.offramp", "b=x/y.zip"], {"resnet-20": "some/where/resnet-20.offramp", "b": "x/y.zip"}),
        (["x/a=b.offramp"], None),
        (["m=a=b"], {"m": "a=b"}),
        (["two words.offramp"], None),
        (["../"], None),
        (["a.offramp", "b/a.zip"], None),
        (["x=a.offramp", "x=b.offramp"], None),
    ],
)
def test_models_go_by_their_files_names_or_the_ones_given(words: list[str], names: dict[str, str] | None) -> None:
    if names is not None:
        assert command.named(words) == {name: Path(path) for name, path in names.items()}
        return
    with pytest.raises(UsageError, match="NAME="):
        command.named(words)


@pytest.mark.parametrize(
    ("text", "bytes"),
    [("100", 100), ("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("3kb", 3000), ("0", None), ("-1", None), ("a", None),
     ("GiB", None), ("1e9", None), ("nan", None), ("9" * 400, None)],
)  # fmt: skip
def test_sizes(text: str, bytes: int | None) -> None:
    if bytes is not None:
        assert byte_size(text) == bytes
        return
    with pytest.raises(argparse.ArgumentTypeError):
        byte_size(text)


@pytest.mark.parametrize(
    "words",
    [("--port", "70000"), ("--port", "-1"), ("--memory-budget", "much"), ("--record-rate", "1.5"), ("--policy", "best"),
     ("--idle-seconds", "0"), ("--idle-seconds", "nan"), ("--max-rows", "0"), ("--max-json-bytes", "0"),
     ("--latency-budget-ms", "-1")],
)  # fmt: skip
def test_wrong_arguments_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parsed(*words)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_the_loopback_needs_no_token_but_its_own_names(host: str) -> None:
    settings = command.settings_of(parsed("--host", host))
    assert settings.token is None
    assert settings.hosts is not None
    assert {"localhost", "127.0.0.1", host} <= settings.hosts


def test_a_network_without_a_token_is_refused(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(UsageError, match="--token-file, or --insecure"):
            command.settings_of(parsed("--host", host))
    assert command.settings_of(parsed("--host", "0.0.0.0", "--insecure")).hosts is None
    (tmp_path / "token").write_text("  secret\n")
    settings = command.settings_of(parsed("--host", "0.0.0.0", "--token-file", str(tmp_path / "token")))
    assert (settings.token, settings.hosts) == ("secret", None)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"two words", b"two\nlines", "schlüssel".encode(), b"\xff"])
def test_a_token_file_that_is_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path}: "):
        command.settings_of(parsed("--token-file", str(path)))


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="is not an address of this machine"):
        command.settings_of(parsed("--host", "no.such.host.invalid"))
    with pytest.raises(UsageError, match=r"port 0 of 192\.0\.2\.1 cannot be had"):
        command.listening("192.0.2.1", 0)


def test_small_messages_are_sent_at_once() -> None:
    """Nagle's wait for an acknowledgement would hold every batch's answers back for 40 ms."""

    async def no_delay() -> int:
        found: asyncio.Queue[int] = asyncio.Queue()

        async def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            await found.put(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with command.listening("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accepted, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                first = await asyncio.wait_for(found.get(), PATIENCE)
                writer.close()
        return first

    assert asyncio.run(no_delay()) != 0


def test_limits_reach_the_server() -> None:
    words = "--max-message 1MiB --max-json-bytes 3kB --max-rows 7 --max-connections 3 --idle-seconds 2.5"
    settings = command.settings_of(parsed(*words.split()))
    found = (settings.max_message, settings.max_rows, settings.max_connections, settings.idle_seconds)
    assert found == (1 << 20, 7, 3, 2.5)
    assert (settings.max_json_bytes, command.settings_of(parsed()).max_json_bytes) == (3000, 4 << 20)


def test_the_queue_s_bounds_reach_the_engine(tmp_path: Path) -> None:
    args = parsed("--queue-rows", "40", "--queue-bytes", "1KiB")
    paths = {"tiny": write_tiny(tmp_path / "tiny").path}
    with contextlib.ExitStack() as stack:
        engine, _ = command._build(args, paths, Metrics(), stack)
        with pytest.raises(InputError, match="41 rows, the server takes 40"):
            engine.submit("tiny", batch(41), Asked(), print)
        with pytest.raises(InputError, match="1440 bytes of inputs, the server takes 1024"):
            engine.submit("tiny", batch(40), Asked(), print)


def begun(*words: str) -> subprocess.Popen[str]:
    """The process."""
    root = Path(offramp.runtime.__file__).parents[2]
    folders = [root, HELP.parents[1] / "runtime", HELP.parent]
    return subprocess.Popen(
        [sys.executable, str(HELP), *words, "--port", "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def process(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """-> the process, and its address once it serves."""
    started = begun(*words)
    assert started.stdout is not None
    assert started.stderr is not None
    try:
        lines = []
        while not lines or not lines[-1].startswith("serving at "):
            lines.append(started.stdout.readline())
            assert lines[-1], started.stderr.read()
        yield started, lines[-1].removeprefix("serving at http://").strip()
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_was_accepted_and_ends_well(stop: signal.Signals) -> None:
    with process("tiny=a.offramp", "--max-batch", "1") as (started, place):
        with connect(f"ws://{place}/v1/models/tiny/stream") as sock:
            sock.send(json.dumps({"inputs": as_lists(batch(50))}))
            sock.send("{")
            assert "error" in json.loads(sock.recv(timeout=PATIENCE)), "so the batch before it is taken"
            started.send_signal(stop)
            found = [json.loads(sock.recv(timeout=PATIENCE)) for _ in range(50)]
            assert {each["row"] for each in found} == set(range(50))
        out, err = started.communicate(timeout=PATIENCE)
        assert (started.returncode, out, err) == (0, "host closed\n", ""), err
        with pytest.raises(OSError):
            socket.create_connection(place.split(":"), timeout=PATIENCE)  # type: ignore[arg-type]


def test_a_hang_up_reads_every_model_again() -> None:
    with process("one=a.offramp", "broken=b.offramp", "two=c.offramp") as (started, _):
        assert started.stdout is not None
        assert started.stderr is not None
        for _ in range(2):
            started.send_signal(signal.SIGHUP)
            assert [started.stdout.readline() for _ in range(2)] == ["swapped one\n", "swapped two\n"]
            assert "broken stays as it was: broken.offramp: truncated" in started.stderr.readline()
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=PATIENCE)
        assert started.returncode == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_models_are_loaded_stops_the_server_once_it_is_there(stop: signal.Signals) -> None:
    started = begun("tiny=a.offramp", "--seed", str(int(stop)))
    out, err = started.communicate(timeout=PATIENCE)
    assert (started.returncode, out, err) == (0, "host closed\n", "")


def test_a_hang_up_while_models_are_loaded_reads_them_again() -> None:
    started = begun("one=a.offramp", "two=c.offramp", "--seed", str(int(signal.SIGHUP)))
    assert started.stdout is not None
    missing = {"swapped one\n", "swapped two\n", "serving"}
    while missing:
        line = started.stdout.readline()
        assert line, missing
        missing -= {line, line.split(" ")[0]}
    started.terminate()
    started.communicate(timeout=PATIENCE)
    assert started.returncode == 0


def test_it_says_what_is_served_and_to_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("secret")
    for words, says in (
        ((), "anybody on this machine"),
        (("--token-file", str(tmp_path / "token")), "whoever has the token"),
    ):
        command._greet("::1", 81, {"a": Path("x/a.offramp"), "long": Path("y")}, command.settings_of(parsed(*words)))
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["  a     x/a.offramp", "  long  y"]
        assert says in lines[2]
        assert lines[3] == "serving at http://[::1]:81"


def plug_in(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    entries = [SimpleNamespace(name="serve", load=load)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("offramp: error: ")
    assert err.count("\n") == 1
    return err


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plug_in(monkeypatch, lambda: command.serve)
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert main(["serve", "a.offramp", "--port", str(number)]) == 2
    assert f"port {number} of 127.0.0.1 cannot be had (Address already in use)" in complaint(capsys)


def test_other_mistakes_are_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plug_in(monkeypatch, lambda: command.serve)
    for words, says in (
        (["--host", "0.0.0.0"], "--insecure"),
        (["--token-file", "/nowhere/token"], "/nowhere/token: cannot be read"),
        (["--memory-budget", "much"], "'much' is no size such as"),
        (["--port", "x"], "'x' is not a port"),
    ):
        assert main(["serve", "a.offramp", *words]) == 2
        assert says in complaint(capsys)


def test_without_its_dependencies_it_says_which_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'starlette'", name="starlette")

    plug_in(monkeypatch, missing)
    assert main(["serve", "a.offramp"]) == 2
    assert "pip install 'offramp[serve]' (missing: starlette)" in complaint(capsys)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert main(["serve", "a.offramp"]) == 2
    assert "pip install 'offramp[serve]'" in complaint(capsys)
