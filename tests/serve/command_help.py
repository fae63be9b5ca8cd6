"""`offramp serve` as a process, with the fake engine and host behind it: `python command_help.py SERVE-ARGUMENTS`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

from web_help import FakeEngine, FakeHost

from offramp.runtime.errors import ArtifactError, OfframpError
from offramp.runtime.serve import command
from offramp.runtime.serve.metrics import Metrics


class Patient(FakeEngine):
    """Answers nothing before it is closed: what it took is under way when the signal comes."""

    def close(self, patience: float) -> None:
        self.go.set()
        super().close(patience)


class Swapped(FakeHost):
    """Says what it does; one of its models cannot be read again."""

    def swap(self, name: str) -> None:
        if name == "broken":
            raise ArtifactError("broken.offramp: truncated; copy it again")
        super().swap(name)
        sys.stdout.write(f"swapped {name}\n")
        sys.stdout.flush()

    def close(self) -> None:
        sys.stdout.write("host closed\n")


def build(args: argparse.Namespace, paths: dict[str, Path], observer: Metrics, stack: contextlib.ExitStack) -> Any:
    host = Swapped(*paths)
    stack.callback(host.close)
    engine = Patient(host, observer)
    if args.max_batch == 1:
        engine.go.clear()
    if args.seed:  # the number of a signal that comes while the models are being loaded
        signal.raise_signal(args.seed)
    return engine, host


if __name__ == "__main__":
    command._build = build
    parser = argparse.ArgumentParser()
    command.serve.configure(parser)
    try:
        sys.exit(command.serve.run(parser.parse_args()))
    except OfframpError as error:
        sys.stderr.write(f"offramp: error: {error}\n")
        sys.exit(2)
