"""The console script `offramp`: finds the command, calls it, and turns what goes wrong into one line.

`inspect` and `run` are in every installation. The other commands belong to rooms the runtime must not import;
they are entry points of the group `offramp.commands` and loaded only when called, so that `--help` does not
wait for torch and an installation without it says which extra to install.

Exit status: 0 done, 2 an `OfframpError` or a wrong argument, 130 interrupted, 141 the reader of stdout left.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from .commands import INSPECT, RUN, TUNE, Command
from .errors import OfframpError, UsageError

__all__ = ["Command", "main"]

GROUP = "offramp.commands"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
BUILT_IN = {"inspect": INSPECT, "run": RUN, "tune": TUNE}
# Known without loading anything; other plug-ins are listed by name.
SUMMARIES = {
    "candidates": "list the places in a model that can carry an exit, and why others cannot",
    "compile": "model + unlabelled data + tolerance -> artifact",
    "demo": "train, compile and run a small network on real digits",
    "serve": "answer over HTTP and WebSocket, each row when its exit speaks",
    "space": "print the search space of exit heads, to edit and pass back",
}
# The extra that brings a command's dependencies, and what they are called; all others train.
EXTRAS = {"serve": ("serve", "own")}
_TRAINING = ("compile", "training")
_ROAD = ("candidates", "space", "compile", "inspect", "run", "tune", "serve", "demo")

_EPILOG = """\
the road:
  offramp candidates mymodels:resnet20 --data images.npy       where could exits go?
  offramp compile mymodels:resnet20 --weights resnet20.safetensors \\
      --data images.npy --tolerance 0.01 -o resnet20.offramp    build them, 1 % disagreement allowed
  offramp inspect resnet20.offramp                              what did it save?
  offramp run resnet20.offramp --data images.npy -o answers.npz
  offramp serve resnet20.offramp                                answer rows as they come

`offramp COMMAND --help` explains each command.
"""


class _Parser(argparse.ArgumentParser):
    """What is wrong with the arguments is an error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line -> its exit status."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except OfframpError as error:
        _complain(f"offramp: error: {error}")
        return 2
    except KeyboardInterrupt:
        _complain("offramp: interrupted; nothing half-written was left")
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except OSError as error:
        if error.errno not in _FULL or not _stdout_is_full():
            raise
        _forget_stdout()
        _complain(
            f"offramp: error: standard output: could not be written ({error.strerror}); free space or redirect it"
        )
        return 2
    return status


def _stdout_is_full() -> bool:
    """Whether a line more cannot be written to stdout."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _forget_stdout() -> None:
    """The interpreter flushes stdout once more at exit; give it somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(argv: list[str]) -> int:
    plugins = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_overview(plugins.keys()))
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        sys.stdout.write(f"offramp {own_version()}\n")
        return 0
    name, rest = argv[0], argv[1:]
    if name in BUILT_IN:
        command = BUILT_IN[name]
    elif name in plugins:
        command = _load(plugins[name])
    elif name in SUMMARIES:
        extra, _ = EXTRAS.get(name, _TRAINING)
        raise UsageError(f"offramp {name} is not in this installation; run pip install 'offramp[{extra}]'")
    else:
        known = ", ".join(_names(plugins.keys()))
        raise UsageError(f"no command {name!r}; choose from {known}, or see offramp --help")
    parser = _Parser(
        prog=f"offramp {name}",
        description=command.summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.configure(parser)
    try:
        args = parser.parse_args(rest)
    except SystemExit as stop:  # argparse ends the process; a caller of main() wants the status
        return stop.code if isinstance(stop.code, int) else 2
    return command.run(args)


def _load(entry: importlib.metadata.EntryPoint) -> Command:
    try:
        loaded = entry.load()
    except ImportError as error:
        missing = f"missing: {error.name}" if error.name else str(error)
        extra, kind = EXTRAS.get(entry.name, _TRAINING)
        raise UsageError(
            f"offramp {entry.name} needs its {kind} dependencies: pip install 'offramp[{extra}]' ({missing})"
        ) from error
    return Command(loaded.summary, loaded.configure, loaded.run)


def _names(plugins: Iterable[str]) -> list[str]:
    """All commands, those of the road first and in its order."""
    known = {*BUILT_IN, *SUMMARIES, *plugins}
    return [*_ROAD, *sorted(known - {*_ROAD})]


def _overview(plugins: Iterable[str]) -> str:
    summaries = {**SUMMARIES, **{name: command.summary for name, command in BUILT_IN.items()}}
    lines = ["usage: offramp COMMAND ...", ""]
    lines += [
        "Early exits for trained classifiers: easy inputs are answered early, predictions stay the same",
        "",
    ]
    lines += ["commands:", *(f"  {name:<12} {summaries.get(name, 'a plug-in')}" for name in _names(plugins))]
    return "\n".join([*lines, "", _EPILOG])


def own_version() -> str:
    """Of the installed package."""
    try:
        return importlib.metadata.version("offramp")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _complain(message: str) -> None:
    sys.stderr.write(" ".join(message.split()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
