"""The commands every installation has: `inspect` shows an artifact, `run` answers a data set with it.

Each is a `Command`, the same object the other rooms offer through the entry points `offramp.commands`. They
parse, call the public functions and print; they decide nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .artifact import Artifact, open_artifact
from .data import Rows, batches, open_data
from .errors import StorageError, UsageError
from .manifest import Manifest, dump_manifest
from .paths import beside, folder_at
from .session import Session, load
from .table import human, percent, render
from .trace import read_passes, summary, write_passes
from .tune import Objective, tune


@dataclass(frozen=True)
class Command:
    """One word after `offramp`."""

    summary: str  # one line for the list of commands
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # -> exit status


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 up."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return number


_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def byte_size(text: str) -> int:
    """An argparse type: bytes, plain or with a unit such as 2GiB."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MiB or 2GiB")
    return int(float(found[1]) * unit)


def write_arrays(out: Path, arrays: Mapping[str, Any]) -> None:
    """Write an .npz at exactly `out`: whole or not at all."""
    with arrays_at(out) as write:
        write(arrays)


@contextlib.contextmanager
def arrays_at(out: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """The same in two steps: that nothing can be written there is said before the arrays are worked out."""
    draft = beside(out)

    def write(arrays: Mapping[str, Any]) -> None:
        with _stored(out):
            with draft.open("wb") as file:
                np.savez(file, **arrays)
            draft.replace(out)

    try:
        with _stored(out):
            draft.touch()
        yield write
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _stored(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{out}: could not be written ({error.strerror or error}); free space or choose another output"
        ) from error


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Check an artifact to its last byte and show what it is and what it saved."
    parser.add_argument("artifact", metavar="ARTIFACT", help="directory or zip that compile wrote")
    parser.add_argument("--json", action="store_true", help="print the manifest instead, for other programs")
    parser.add_argument(
        "--passes", type=Path, metavar="DIR", help="write the graph after each of the compiler's passes to a new folder"
    )


def _inspect(args: argparse.Namespace) -> int:
    artifact = open_artifact(args.artifact)
    if args.passes is not None:
        records = read_passes(artifact)
        write_passes(records, args.passes)
        _say(f"{summary(records)}\n\ngraphs and their differences in {args.passes}")
        return 0
    if args.json:
        _say(dump_manifest(artifact.manifest).decode().rstrip("\n"))
        return 0
    _say(f"{render(artifact.manifest)}\n\n{_describe(artifact)}")
    return 0


def _describe(artifact: Artifact) -> str:
    """What the table leaves out: how it was made, and what is in it."""
    manifest = artifact.manifest
    splits, backbone = manifest.splits, manifest.backbone
    rows = f"distil {splits.distil:,}, calibrate {splits.calibrate:,}, select {splits.select:,}"
    lines = ["Made from"]
    lines.append(f"  backbone       fingerprint {backbone.fingerprint[:16]}, gives {backbone.scores}")
    lines += [f"  input          {i.name} {i.dtype} ({', '.join(map(str, i.shape))})" for i in manifest.inputs]
    lines += [f"  preprocessing  {manifest.preprocessing}"] if manifest.preprocessing else []
    lines.append(f"  rows           {rows}, certify {splits.certify:,}, test {splits.test:,}; seed {splits.seed}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.measured.versions.items())
    lines.append(f"  created        {manifest.measured.created} with {versions}")
    lines += ["", "Plans"]
    for index, plan in enumerate(manifest.plans):
        limits = ", ".join("never" if limit is None else f"{limit:.4f}" for limit in plan.thresholds)
        mark = "*" if index == manifest.default_plan else " "
        proof = plan.certificate
        sure = f"{1 - proof.delta:.0%} sure of at most {percent(plan.tolerance, 2)}" if proof else "not certified"
        lines.append(f"  {mark} tolerance {percent(plan.tolerance, 2)}, {plan.policy}: {limits or 'no exit'} ({sure})")
    lines += ["", f"Files in {artifact.path}, all checked"]
    lines += [
        f"  {name:<28} {human(spec.size):>8}B  sha256 {spec.sha256[:16]}" for name, spec in manifest.all_files().items()
    ]
    return "\n".join(lines)


def _configure_run(parser: argparse.ArgumentParser) -> None:
    parser.description = "Answer every row of a data set with an artifact."
    parser.epilog = "The output holds classes, probabilities, exits and confidence, one entry per row."
    parser.add_argument("artifact", metavar="ARTIFACT", help="directory or zip that compile wrote")
    parser.add_argument(
        "--data", required=True, metavar="D", help="a .npy, .npz, folder of images or package.module:callable"
    )
    parser.add_argument("-o", "--output", required=True, metavar="NPZ", help="file to write the answers to")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="rows at a time (default 32)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads per stage (default: physical cores)")
    parser.add_argument(
        "--tolerance", type=float, metavar="T",
        help="share of rows whose answer may differ: the boldest plan of the artifact that is within it answers, 0 is "
        "the backbone alone (default: the plan it was compiled for)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", metavar="P,...", help="ONNX Runtime providers in order (default: CUDA if there, CPU)"
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="capture every stage once and replay it, for small models on a GPU"
    )
    parser.add_argument(
        "--preprocess",
        metavar="STEPS",
        help="for a folder of images, like resize=256,crop=224,std=0.5 (default: the artifact's own)",
    )
    parser.add_argument(
        "--labels",
        choices=["folders"],
        help="take labels from the folders' names, for a folder with one sub-folder per class",
    )


def _run(args: argparse.Namespace) -> int:
    out = Path(args.output)
    if folder_at(out) or not folder_at(out.parent):
        raise UsageError(f"{out}: is a folder or lies in none; give a file name in a folder that exists")
    providers = args.providers.split(",") if args.providers else None
    with (
        load(
            args.artifact,
            providers=providers,
            threads=args.threads,
            tolerance=args.tolerance,
            cuda_graphs=args.cuda_graphs,
        ) as session,
        arrays_at(out) as write,
    ):
        rows = _rows_for(session.manifest, args.data, args.preprocess, args.labels)
        arrays, seconds = _answer(session, rows, args.batch)
        write(arrays)
        _say(_report(arrays, rows.labels, session.exits, seconds))
    _say(f"answers in {out}")
    return 0


def _rows_for(manifest: Manifest, data: str, preprocess: str | None = None, labels: str | None = None) -> Rows:
    """A folder of images becomes rows as where the artifact was compiled, unless said otherwise."""
    preprocessing = preprocess or (manifest.preprocessing if folder_at(Path(data)) else None)
    return open_data(data, inputs=manifest.inputs, preprocessing=preprocessing, labels=labels)


def _answer(session: Session, rows: Rows, size: int) -> tuple[dict[str, np.ndarray], float]:
    """-> the answers to all rows, and the seconds spent in the session, reading not included."""
    answers = []
    seconds = 0.0
    for _, batch in _progress(batches(rows, size), -(-len(rows) // size)):
        start = time.perf_counter()
        answers.append(session.run(batch))
        seconds += time.perf_counter() - start
    names = ("classes", "probabilities", "exits", "confidence")
    return {name: np.concatenate([getattr(answer, name) for answer in answers]) for name in names}, seconds


def _report(arrays: dict[str, np.ndarray], labels: np.ndarray | None, exits: int, seconds: float) -> str:
    rows = len(arrays["classes"])
    lines = [f"{rows:,} rows, {seconds / rows * 1e3:.4f} ms per row"]
    for index, count in enumerate(np.bincount(arrays["exits"], minlength=exits)):
        lines.append(f"  exit {index}  {count:>9,} rows  {percent(count / rows):>7}")
    if labels is not None:
        lines.append(f"  agrees with the labels on {percent(float((arrays['classes'] == labels).mean()), 2)}")
    return "\n".join(lines)


def _progress(steps: Iterator[Any], total: int) -> Iterator[Any]:
    """On a terminal's stderr, for what takes longer than two seconds: a bar where tqdm is installed, else lines."""
    if not sys.stderr.isatty():
        return steps
    try:
        from tqdm import tqdm
    except ImportError:
        return _told(steps, total)
    bar: Iterator[Any] = tqdm(steps, total=total, unit="batch", delay=2, leave=False)
    return bar


def _told(steps: Iterator[Any], total: int, every: float = 2) -> Iterator[Any]:
    """The same steps; a line as soon as so many seconds have passed since the one before."""
    last = time.monotonic()
    for done, step in enumerate(steps):
        if time.monotonic() - last >= every:
            last = time.monotonic()
            sys.stderr.write(f"{done:,} of {total:,} batches\n")
        yield step


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _configure_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure an artifact's stages on this machine, choose again which of its exits to ask and at which thresholds, "
        "from the records it carries, and write that as a new artifact. Needs no training dependency."
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="directory or zip that compile wrote")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the artifact to write")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="rows at a time (default 1)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads per stage (default: physical cores)")
    parser.add_argument(
        "--percentile", type=float, metavar="P",
        help="make the time small within which P %% of rows are answered (default: the mean time of a row)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, metavar="T", help="the new artifact's own tolerance (default: the old one's)"
    )
    parser.add_argument(
        "--data", metavar="D", help="inputs to measure on, as for run; no answer depends on them (default: zeros)"
    )


def _tune(args: argparse.Namespace) -> int:
    rows = None
    if args.data is not None:
        data = _rows_for(open_artifact(args.artifact).manifest, args.data)
        rows = data.take(np.arange(min(args.batch, len(data))))
    objective = Objective(args.batch, args.percentile)
    made = tune(
        args.artifact, args.output, objective=objective, threads=args.threads, tolerance=args.tolerance, rows=rows,
        say=lambda line: _say(f"note: {line}\n"),
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    )  # fmt: skip
    _say(f"{render(made)}\n\ntuned artifact in {args.output}")
    return 0


INSPECT = Command("show what an artifact is, what it saved, and check every file", _configure_inspect, _inspect)
TUNE = Command("choose exits and thresholds again for the machine it runs on", _configure_tune, _tune)
RUN = Command("answer a data set with an artifact", _configure_run, _run)
