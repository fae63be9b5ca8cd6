"""`offramp serve`: artifacts on a port, until a signal stops it.

SIGTERM and SIGINT: no new connection is taken, what was accepted is answered, and the exit status is 0. What takes
longer than `--drain-seconds` is refused, and stderr says how much. A second SIGINT answers nothing more. SIGHUP reads
every model's path again; a model that cannot be read stays as it was, and stderr says why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from ..commands import Command, byte_size, positive
from ..errors import OfframpError, UsageError
from ..process import usable_cores
from .app import app
from .engine import BatchingEngine
from .guard import GuardedSocket, guarded
from .host import ModelHost
from .limits import Settings
from .metrics import Metrics
from .recording import Recording
from .work import Engine, Host, Recorder

_LOOK = 0.1  # seconds between looks for a second interrupt
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def seconds(text: str) -> float:
    """An argparse type: a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def port(text: str) -> int:
    """An argparse type: a port, 0 for any that is free."""
    if text.isascii() and text.isdigit() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 0 to 65535")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve artifacts over HTTP and WebSocket: each row is answered when its exit speaks."
    parser.epilog = "A page at / shows the server at work. SIGHUP reads all models again; SIGTERM answers, then stops."
    add = parser.add_argument
    add("artifacts", nargs="+", metavar="[NAME=]ARTIFACT", help="directory or zip; the name is its file's by default")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=port, default=8000, metavar="N", help="0 takes a free one (default 8000)")
    add("--memory-budget", type=byte_size, metavar="SIZE", help="of all segments, like 2GiB (default: no limit)")
    add("--policy", choices=["lru", "lfu", "cost"], default="lru", help="which segments leave memory first")
    add("--threads", type=positive, default=1, metavar="N", help="threads per stage (default 1)")
    add("--workers", type=positive, metavar="N", help="stages that run at the same time (default: cores / threads)")
    add("--providers", metavar="P,...", help="ONNX Runtime providers in order (default: CUDA if there, CPU)")
    add("--max-batch", type=positive, default=32, metavar="N", help="rows of one call of a stage (default 32)")
    add("--queue-rows", type=positive, default=4096, metavar="N", help="rows of a model that may wait (default 4096)")
    add(
        "--queue-bytes", type=byte_size, default=512 << 20, metavar="SIZE",
        help="of the inputs of a model's rows that wait or run; --record may take a quarter more (default 512MiB)",
    )  # fmt: skip
    add(
        "--latency-budget-ms", type=seconds, default=50.0, metavar="MS",
        help="a row waits at most so long for others to fill a batch, and only while others run (default 50)",
    )  # fmt: skip
    add("--token-file", type=Path, metavar="F", help="file with the token that clients must send")
    add("--insecure", action="store_true", help="listen beyond this machine without a token")
    add("--record", type=Path, metavar="DIR", help="keep a sample of rows, with the backbone's own answer, in a store")
    add("--record-rate", type=share, default=0.01, metavar="R", help="share of rows that are watched (default 0.01)")
    add("--record-limit", type=byte_size, default=1 << 30, metavar="SIZE", help="of the store (default 1GiB)")
    add("--seed", type=int, default=0, metavar="N", help="which rows are watched (default 0)")
    add("--max-message", type=byte_size, default=16 << 20, metavar="SIZE", help="of one request (default 16MiB)")
    add(
        "--max-json-bytes", type=byte_size, default=4 << 20, metavar="SIZE",
        help="of it in JSON, read or written; larger tensors go in binary (default 4MiB)",
    )  # fmt: skip
    add("--max-rows", type=positive, default=4096, metavar="N", help="of one request (default 4096)")
    add("--max-connections", type=positive, default=256, metavar="N", help="at the same time (default 256)")
    add("--idle-seconds", type=seconds, default=60.0, metavar="S", help="until a silent socket is closed (default 60)")
    add(
        "--drain-seconds", type=seconds, default=30.0, metavar="S",
        help="for what was accepted, once the server is told to stop; what is left is refused (default 30)",
    )  # fmt: skip


def named(words: list[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH` -> paths by name. Raises `UsageError` for a name twice, or one that is no name."""
    paths: dict[str, Path] = {}
    for word in words:
        before, equals, after = word.partition("=")
        split = bool(equals) and _NAME.fullmatch(before) is not None
        path = Path(after if split else word)
        name = before if split else path.stem or path.resolve().stem
        if not _NAME.fullmatch(name):
            raise UsageError(f"{word}: {name!r} is not a name for a model; write NAME={word} with letters and digits")
        if name in paths:
            raise UsageError(f"{word}: the name {name!r} is taken by {paths[name]}; write NAME={word}")
        paths[name] = path
    return paths


def settings_of(args: argparse.Namespace) -> Settings:
    """Limits, and who may ask. Raises `UsageError`: a token file that is not one, a network without a token."""
    token = _token(args.token_file) if args.token_file is not None else None
    local = _is_loopback(args.host)
    if not local and token is None and not args.insecure:
        raise UsageError(
            f"{args.host} can be reached from other machines; give --token-file, or --insecure to let anybody ask"
        )
    hosts = frozenset({"localhost", "127.0.0.1", "::1", args.host.lower()}) if local and token is None else None
    return Settings(
        token=token,
        hosts=hosts,
        max_message=args.max_message,
        max_json_bytes=args.max_json_bytes,
        max_rows=args.max_rows,
        max_connections=args.max_connections,
        idle_seconds=args.idle_seconds,
        drain_seconds=args.drain_seconds,
    )


def _token(path: Path) -> str:
    try:
        token = path.read_text("ascii").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not plain text"
        raise UsageError(f"{path}: cannot be read as a token ({reason}); give a file with one line") from error
    if not token or any(not "!" <= character <= "~" for character in token):
        raise UsageError(f"{path}: holds no token; write one line without spaces into it")
    return token


def _addresses(host: str, number: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {host!r} is not an address of this machine ({error}); give one like 127.0.0.1"
        ) from error
    return [(family, address) for family, _, _, _, address in found]


def _is_loopback(host: str) -> bool:
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in _addresses(host, 0))


def listening(host: str, number: int) -> socket.socket:
    """A socket that listens. Raises `UsageError` where the port cannot be had."""
    family, address = _addresses(host, number)[0]
    # The protocol is named: asyncio sends small messages at once only where it sees that a socket is TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"port {number} of {host} cannot be had ({error.strerror or error}); "
            "stop what holds it or give another --port"
        ) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's server, which says when it serves, and answers what was accepted before it closes connections."""

    def __init__(
        self, config: uvicorn.Config, engine: Engine, web: Starlette, patience: float, ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine, self._web, self._patience, self._ready = engine, web, patience, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises as uvicorn's."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse, answer, send, close, in this order."""
        infer, streams = self._web.state.infer, self._web.state.streams
        infer.closing = True
        for server in self.servers:
            server.close()
        await self._unless_forced(asyncio.to_thread(self._engine.close, self._patience))
        if self.force_exit:
            await asyncio.to_thread(self._engine.close, 0.0)
        # What the engine delivered until now lies in the outboxes, or waits in the loop before this.
        await self._unless_forced(streams.drained())
        if self.force_exit:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)

    async def _unless_forced(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for it, or until somebody interrupts a second time; it is not waited for then."""
        task = asyncio.create_task(work)
        while not task.done() and not self.force_exit:
            await asyncio.wait({task}, timeout=_LOOK)
        if task.done():
            task.result()


def server(
    engine: Engine, host: Host, observer: Metrics, settings: Settings, ready: Callable[[], None] = lambda: None
) -> Server:
    """The server, to be given its listening sockets with `run`; `should_exit` stops it from any thread."""
    web = app(engine, host, observer, settings)
    config = uvicorn.Config(
        web,
        http=guarded(settings),
        ws=GuardedSocket,
        ws_max_size=settings.max_message,
        ws_per_message_deflate=False,  # a small message must not become a large one
        # Whoever is silent or does not read is found by the settings' own clocks. A socket whose answers pile up is not
        # read meanwhile, its answers to our pings neither.
        ws_ping_interval=None,
        timeout_graceful_shutdown=math.ceil(settings.send_seconds) + 1,
        access_log=False,
        log_level="error",
        server_header=False,
        proxy_headers=False,
        lifespan="off",
    )
    return Server(config, engine, web, settings.drain_seconds, ready)


class Signals:
    """What signals ask for from the first moment on, acted upon once there is a server.

    While it runs uvicorn's own handlers take what stops it, and raise it once more for these, which does nothing then.
    """

    def __init__(self) -> None:
        self.stop = False
        self._reload = False
        self._host: Host | None = None
        self._swapping = threading.Lock()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch them within, in the main thread."""
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._hang_up
        before = {each: signal.signal(each, handler) for each, handler in handlers.items()}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def attach(self, host: Host) -> None:
        """From now on its models can be read again; they are, if that was asked for before."""
        self._host = host
        if self._reload:
            self._swap(host)

    def _stop(self, *_: object) -> None:
        self.stop = True

    def _hang_up(self, *_: object) -> None:
        if self._host is None:
            self._reload = True
        else:
            self._swap(self._host)

    def _swap(self, host: Host) -> None:
        threading.Thread(target=swap_all, args=(host, self._swapping), daemon=True).start()


def swap_all(host: Host, swapping: threading.Lock) -> None:
    """Read every model again, one signal after the other; what cannot be read stays as it was."""
    with swapping:
        for name in host.names():
            try:
                host.swap(name)
            except OfframpError as error:
                sys.stderr.write(f"offramp: {name} stays as it was: {' '.join(str(error).split())}\n")


def _build(
    args: argparse.Namespace, paths: dict[str, Path], observer: Metrics, stack: contextlib.ExitStack
) -> tuple[BatchingEngine, ModelHost]:
    """-> engine and host; the stack closes what they need, in the right order."""
    providers = args.providers.split(",") if args.providers else None
    host = ModelHost(
        paths,
        budget=args.memory_budget,
        policy=args.policy,
        threads=args.threads,
        providers=providers,
        observer=observer,
    )
    stack.callback(host.close)
    recorder: Recorder | None = None
    if args.record is not None:
        recording = Recording(args.record, rate=args.record_rate, seed=args.seed, limit=args.record_limit)
        stack.callback(recording.close)
        observer.record(recording)
        recorder = recording
    engine = BatchingEngine(
        host,
        workers=args.workers or max(1, usable_cores() // args.threads),
        max_batch=args.max_batch,
        queue_rows=args.queue_rows,
        queue_bytes=args.queue_bytes,
        latency_budget=args.latency_budget_ms / 1e3,
        observer=observer,
        recorder=recorder,
    )
    stack.callback(engine.close, 0.0)
    return engine, host


def _run(args: argparse.Namespace) -> int:
    settings, paths = settings_of(args), named(args.artifacts)
    signals = Signals()
    with signals.caught(), contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(args.host, args.port))
        observer = Metrics()
        engine, host = _build(args, paths, observer, stack)
        number = listener.getsockname()[1]
        signals.attach(host)

        def ready() -> None:
            if signals.stop:  # before uvicorn looked for it
                running.should_exit = True
            else:
                _greet(args.host, number, paths, settings)

        running = server(engine, host, observer, settings, ready)
        running.run([listener])
    return 0


def _greet(host: str, number: int, paths: dict[str, Path], settings: Settings) -> None:
    """Say what is served and where, once it is."""
    width = max(map(len, paths))
    place = f"[{host}]" if ":" in host else host
    lines = [f"  {name:<{width}}  {path}" for name, path in paths.items()]
    asks = "anybody who reaches it" if settings.hosts is None else "anybody on this machine"
    asks = asks if settings.token is None else "whoever has the token"
    lines += [f"answers {asks}; page at /, metrics at /metrics, models at /v1/models"]
    sys.stdout.write("\n".join([*lines, f"serving at http://{place}:{number}", ""]))
    sys.stdout.flush()


serve = Command("serve artifacts: every row is answered when its exit speaks", _configure, _run)
