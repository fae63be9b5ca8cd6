"""The commands that need torch: `candidates`, `compile`, `demo`. They parse, call the public functions, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from offramp.passes import METRICS, Candidates, find_candidates
from offramp.passes.backbone import SCORES
from offramp.runtime.artifact import check_output
from offramp.runtime.commands import Command, byte_size, positive, write_arrays
from offramp.runtime.data import open_data
from offramp.runtime.errors import InputError, UsageError
from offramp.runtime.reference import is_reference, load_reference
from offramp.runtime.selection import RISKS
from offramp.runtime.session import load
from offramp.runtime.table import human, percent, render

from .arguments import example_inputs
from .augment import AUGMENTATIONS, Augment
from .capture import bind, capture
from .compile import compile
from .costs import COSTS
from .demo import train_digits
from .emit import ALL_TARGETS, TARGETS
from .heads import FAMILIES, search_space
from .independence import keep_independent
from .loading import guess_shape, load_model
from .package import ALL_POLICIES, Options
from .precision import PRECISIONS
from .search import ENGINES, NONE, Search, read_spaces
from .signature import Signature, parse_dynamic
from .stream import tensors
from .training import Training

_DIGITS = "image"  # what the demo's input is called
_MODEL_HELP = "package.module:callable, or a .pt2 saved by torch.export.save"
_DATA_HELP = "a .npy, an .npz, a folder of images (with --preprocess) or package.module:callable yielding batches"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _log(line: str) -> None:
    sys.stderr.write(f"offramp: {line}\n")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="state dict: .safetensors, or a .pt of tensors only"
    )

    parser.add_argument(
        "--output-field", metavar="NAME",
        help="which output holds the scores, by name or position (default: found)",
    )  # fmt: skip
    parser.add_argument("--scores", choices=list(SCORES), help="what kind of scores they are (default: found)")
    parser.add_argument(
        "--dynamic", action="append", default=[], metavar="INPUT:DIM=WORD",
        help="a dimension that varies from batch to batch, such as input_ids:1=sequence; may be repeated, the same "
        "word means the same size; INPUT: alone keeps it fixed (default: the length of token ids, if the model allows)",
    )  # fmt: skip


def _signature(args: argparse.Namespace) -> Signature:
    return Signature(parse_dynamic(args.dynamic), args.output_field, args.scores)


def _configure_candidates(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List every place in a model that was considered for an exit: kept, or refused with the reason."
    )
    parser.epilog = (
        "Shapes are needed to trace the model: from --data, from --shape, from the .pt2 itself, or else guessed from "
        "the first layer."
    )
    _add_model(parser)
    parser.add_argument("--data", metavar="D", help=_DATA_HELP)
    parser.add_argument(
        "--preprocess", metavar="STEPS", help="for a folder of images, like resize=256,crop=224,std=0.5"
    )
    parser.add_argument("--shape", metavar="C,H,W", help="shape of one row of a single float input, such as 3,224,224")
    parser.add_argument("--all", action="store_true", help="also list the refused places, one line each")


def _run_candidates(args: argparse.Namespace) -> int:
    said = _signature(args)
    model = load_model(args.model, args.weights)
    example = _example(model, args)
    backbone = capture(
        model, example, name=_title(args.model), dynamic=said.dynamic, output=said.output, scores=said.scores, say=_log
    )
    found = keep_independent(backbone, find_candidates(backbone), bind(backbone.inputs, example, backbone.name))
    _say(_candidates_table(found))
    if args.all:
        _say("\nrefused")
        width = max((len(r.name) for r in found.refused), default=0)
        for refused in found.refused:
            _say(f"  {refused.name:<{width}}  {refused.place}: {refused.reason}")
    else:
        _say(f"\n{len(found.refused)} other places refused; --all lists them with their reasons")
    return 0


def _example(model: nn.Module | ExportedProgram, args: argparse.Namespace) -> Mapping[str, torch.Tensor]:
    if args.data:
        rows = open_data(args.data, inputs=None, preprocessing=args.preprocess)
        return tensors(rows, np.arange(min(8, len(rows))))
    if args.shape:
        sizes = args.shape.split(",")
        if not all(s.isdigit() and int(s) for s in sizes):
            raise UsageError(f"--shape {args.shape!r} is not a list of sizes such as 3,224,224")
        return _random_rows(tuple(map(int, sizes)))
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        return example_inputs(model)
    guessed = guess_shape(model) if isinstance(model, nn.Module) else None
    if guessed is None:
        raise UsageError("the model's input shape is not known; give --data D, or --shape such as 3,224,224")
    _log(f"input guessed as {'x'.join(map(str, guessed))} from the first layer; --shape or --data say otherwise")
    return _random_rows(guessed)


def _random_rows(shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:
    try:
        return {"input": torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))}
    except (RuntimeError, TypeError, OverflowError) as error:  # what torch raises of sizes beyond memory or integers
        raise UsageError(
            f"rows of {'x'.join(map(str, shape))} numbers do not fit into memory; give smaller ones"
        ) from error


def _candidates_table(found: Candidates) -> str:
    lines = [("candidate", "place", "shape", "compute before", "side inputs")]
    for c in found.kept:
        total = c.flops_before + c.flops_after
        share = percent(c.flops_before / total if total else 0.0)
        shape = "x".join(map(str, c.shape[1:]))
        lines.append((c.name, c.place, shape, f"{human(c.flops_before)} ({share})", ", ".join(c.side_inputs) or "-"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _configure_compile(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compile a trained classifier to an artifact with early exits. No label is used; labels in the data only "
        "add accuracies to the report. An interrupted compile, started again, goes on where it was."
    )
    parser.epilog = (
        "example:\n  offramp compile mymodels:resnet20 --weights resnet20.safetensors --data images.npy \\\n"
        "      --tolerance 0.01 -o resnet20.offramp\n\n"
        "Then: offramp inspect resnet20.offramp, and open resnet20.offramp/report.html."
    )
    _add_model(parser)
    parser.add_argument("--data", required=True, metavar="D", help=_DATA_HELP)
    parser.add_argument(
        "--preprocess", metavar="STEPS", help="for a folder of images, like resize=256,crop=224,std=0.5"
    )
    parser.add_argument("--labels", choices=["folders"], help="for a folder of images with one sub-folder per class")
    parser.add_argument(
        "--static", metavar="MODEL",
        help="a smaller model for the same classes, trained already, that the report sets beside the artifact",
    )  # fmt: skip
    parser.add_argument("--static-weights", type=Path, metavar="FILE", help="its state dict, as for --weights")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the artifact to write")
    parser.add_argument(
        "--tolerance", type=float, default=Options.tolerance, metavar="T",
        help="share of rows whose answer may differ from the backbone's (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--policy", choices=list(ALL_POLICIES), default=Options.policy,
        help="how exits and thresholds are chosen: certified keeps the tolerance on new rows too, with probability "
        "1 - delta; joint only on the rows it chooses on; geometric is the papers', equal divides the tolerance "
        "evenly (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--risk", choices=list(RISKS), default=Options.risk, metavar="RISK",
        help="that the tolerance bounds: disagreement, or regret, the backbone's own estimate of the accuracy lost "
        "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", choices=METRICS, default=Options.metric, metavar="METRIC",
        help=f"of confidence: {', '.join(METRICS)} (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--delta", type=float, default=Options.delta, metavar="P",
        help="how often the certificate may be wrong (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--target",
        action="append",
        choices=list(ALL_TARGETS),
        help=f"form to emit; may be repeated (default: {' and '.join(TARGETS)}, the former alone with --precision)",
    )
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default=Options.precision,
        help="of the stages: fp16 halves their size, and their time on a GPU; int8 quarters their size and takes less "
        "time on a CPU. The tolerance then holds for exits and precision together (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs",
        type=positive,
        default=Training.epochs,
        metavar="N",
        help="of distillation (default %(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        default=Training.patience,
        metavar="N",
        help="epochs without a lower loss on the calibration rows after which a head stops (default: a third of all)",
    )
    parser.add_argument(
        "--augment", type=_augmentation, metavar="NAME",
        help=f"what distillation adds to the data: {', '.join(AUGMENTATIONS)}, or package.module:function that takes "
        "tensors by input name and a generator (default: flip-shift-mix for colour images, else none)",
    )  # fmt: skip
    parser.add_argument(
        "--search", choices=[NONE, *ENGINES], default=NONE, metavar="ENGINE",
        help=f"search the heads' architectures by {', '.join(ENGINES)} (default %(default)s: default heads)",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=positive, default=Search.trials, metavar="N",
        help="heads to try at every candidate, beside the default one (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--space", type=Path, metavar="FILE", help="search spaces to use, edited from what `offramp space` prints"
    )
    parser.add_argument(
        "--memory-budget", type=byte_size, metavar="SIZE",
        help="what training may take beside the model and the data, such as 2GiB (default: no bound)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=Training.device, metavar="NAME",
        help="to train heads on, such as cuda; has no bearing on what is served on (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--disk-budget", type=byte_size, metavar="SIZE", default=Training.kept_bytes,
        help="what training may keep on disk of the backbone's values (default: 2GiB)",
    )  # fmt: skip
    parser.add_argument(
        "--max-candidates", type=positive, default=Options.max_candidates, metavar="N",
        help="train heads at no more than this many places (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, metavar="DIR",
        help="keep trained heads there for the next compile, under another tolerance say (default: not kept)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="check the graph by the verifier's rules after every pass"
    )
    parser.add_argument(
        "--cost", choices=list(COSTS), default=Options.cost,
        help="what exits are chosen to save: flops, or time measured on this machine (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cost-batch", type=positive, default=Options.cost_batch, metavar="N",
        help="with --cost time: rows at a time (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="to measure with (default: all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")


def _augmentation(text: str) -> str | Augment:
    return load_reference(text) if is_reference(text) else text


def _static(args: argparse.Namespace) -> nn.Module | ExportedProgram | None:
    if args.static is None and args.static_weights is not None:
        raise UsageError("--static-weights without a model they belong to; give --static too, or leave them out")
    return None if args.static is None else load_model(args.static, args.static_weights)


def _run_compile(args: argparse.Namespace) -> int:
    if args.space and args.search == NONE:
        raise UsageError("--space without a search; give --search tpe too, or leave it out")
    model, static = load_model(args.model, args.weights), _static(args)
    rows = open_data(args.data, inputs=None, preprocessing=args.preprocess, labels=args.labels)
    options = Options(
        tolerance=args.tolerance,
        policy=args.policy,
        delta=args.delta,
        risk=args.risk,
        metric=args.metric,
        seed=args.seed,
        targets=tuple(dict.fromkeys(args.target)) if args.target else None,
        precision=args.precision,
        training=Training(
            epochs=args.epochs,
            patience=args.patience,
            augment=args.augment,
            device=args.device,
            kept_bytes=args.disk_budget,
        ),
        search=Search(
            engine=args.search,
            trials=args.trials,
            waves=min(Search.waves, args.trials),
            spaces=read_spaces(args.space) if args.space else {},
        ),
        memory_budget=args.memory_budget,
        max_candidates=args.max_candidates,
        cost=args.cost,
        cost_batch=args.cost_batch,
        threads=args.threads,
        verify=args.verify,
        signature=_signature(args),
        preprocessing=args.preprocess,
    )
    manifest = compile(
        model, rows, args.output, options=options, name=_title(args.model), static=static,
        static_name=_title(args.static) if args.static else None, work=args.work, say=_log,
    )  # fmt: skip
    _say(render(manifest))
    _say(f"\nartifact  {args.output}\nreport    {args.output / 'report.html'}")
    return 0


def _title(spec: str) -> str:
    return Path(spec).stem if spec.endswith(".pt2") else spec.partition(":")[2]


def _configure_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a small residual network on scikit-learn's handwritten digits (real scans), compile it, run it, "
        "and print what it saved."
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("demo-artifact"), metavar="OUT", help="(default %(default)s)"
    )
    parser.add_argument("--tolerance", type=float, default=0.03, metavar="T", help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")


def _check_digits(path: Path) -> None:
    """A file that no demo wrote is a person's own."""
    try:
        ours = not path.exists() or open_data(path, inputs=None).input_names == (_DIGITS,)
    except InputError:
        ours = False
    if not ours:
        raise UsageError(f"{path}: is there and no demo wrote it; choose another --output, or move it away")


def _run_demo(args: argparse.Namespace) -> int:
    options = Options(tolerance=args.tolerance, seed=args.seed)
    check_output(args.output)
    data = args.output.with_name(args.output.name + ".npz")
    _check_digits(data)
    digits = train_digits(args.seed, _log)
    manifest = compile(digits.model, digits.images, args.output, labels=digits.labels, options=options, say=_log)
    _say(render(manifest))
    write_arrays(data, {_DIGITS: digits.images, "labels": digits.labels})
    with load(args.output) as session:
        answers = session.run(digits.images[:32])
        left = ", ".join(f"{(answers.exits == e).sum()} at exit {e}" for e in range(session.exits))
        _say(f"\nthe runtime answers a batch of 32: {left}")
    _say(f"\nartifact  {args.output}\nreport    {args.output / 'report.html'}\ndata      {data}")
    _say(f"try       offramp run {args.output} --data {data} -o answers.npz")
    return 0


def _configure_space(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print what a head search may choose, as JSON in NNI's form, by head family. Edit it and give it back with "
        "`offramp compile --space FILE`."
    )
    parser.add_argument("--family", choices=list(FAMILIES), help="only this one (default: all)")


def _run_space(args: argparse.Namespace) -> int:
    names = [args.family] if args.family else list(FAMILIES)
    _say("{\n" + ",\n".join(f'  "{name}": {{\n{_entries(name)}\n  }}' for name in names) + "\n}")
    return 0


def _entries(family: str) -> str:
    """One line for every choice."""
    return ",\n".join(f'    "{key}": {json.dumps(entry)}' for key, entry in search_space(family).items())


candidates = Command(
    "list the places in a model that can carry an exit, and why others cannot",
    _configure_candidates,
    _run_candidates,
)
compile_ = Command("model + unlabelled data + tolerance -> artifact", _configure_compile, _run_compile)
demo = Command("train, compile and run a small network on real digits", _configure_demo, _run_demo)
space = Command("print the search space of exit heads, to edit and pass back", _configure_space, _run_space)
