"""One model of the zoo, from capture to the answers of every backend.

    candidates   capture, candidates, row independence: what could carry an exit, and how long finding out takes
    full         then a program with three exits at spread places, every backend, and its answers against the eager
                 run's: all rows leave at the first exit, none leaves, each exit alone, mixed; batches of 0 rows and up

An `OfframpError` on the way is a refusal and its message the reason. Anything else is a failure of ours.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from offramp.compiler import capture, choose_candidates, keep_independent
from offramp.compiler.capture import bind
from offramp.compiler.emit import ALL_TARGETS, SCRIPT, TARGETS, TORCHSCRIPT
from offramp.compiler.emit.torchscript import ScriptSession
from offramp.compiler.equivalence import Answering, Expected, expect
from offramp.passes import Backbone, Candidate, Candidates, ExitProgram, find_candidates
from offramp.runtime import load
from offramp.runtime.errors import ModelError

from .program import program_with_exits, write
from .sources import Built

EXAMPLE_ROWS = 8
EXITS = 3
EXECUTORS = dict(zip(TARGETS, ("segments", "single-file"), strict=True))
# Batches compared, the most that fit `SECONDS` of the eager run; a row says which.
BATCHES = ((0, 1, 3, 32, 257), (0, 1, 3, 32), (0, 1, 3, 8), (0, 1, 3))
SECONDS = 20.0
_MOVES = 4
LARGE = 2e8  # parameters: such a model's forms are made one after the other, or memory would not do

Row = dict[str, Any]


def examine(built: Built, name: str, row: Row, work: Path | None) -> None:
    """Fill `row` with what is found out; artifacts go below `work`, None stops at the candidates.

    Raises `OfframpError` where the model is refused, `AssertionError` where a backend's answers are not the eager
    run's.
    """
    torch.manual_seed(0)
    example = built.rows(EXAMPLE_ROWS, 0)
    row["inputs"] = {key: list(value.shape[1:]) for key, value in example.items()}
    row["parameters"] = sum(p.numel() for p in built.model.parameters())
    # The processor's seconds: with one thread they are what a free core needs, whoever else computes meanwhile.
    started = time.process_time()
    backbone = capture(built.model, example, name=name)
    row["capture_s"] = time.process_time() - started
    found = find_candidates(backbone)
    row["find_s"] = time.process_time() - started - row["capture_s"]
    found = keep_independent(backbone, found, bind(backbone.inputs, example, name))
    row["seconds"] = time.process_time() - started
    row["nodes"] = len(backbone.graph.nodes)
    describe(found, row)
    choose_candidates(backbone, found, EXITS)  # refuses when there is none
    if work is None:
        return
    chosen = spread(found.kept)
    rows = bind(backbone.inputs, built.rows(32, 1), name)
    program = program_with_exits(backbone, chosen, rows)
    row["exits"] = [c.place for c in chosen]
    exercise(program, built, row, work)


def spread(kept: Sequence[Candidate]) -> list[Candidate]:
    """`EXITS` of the candidates from the first to the last, or all."""
    last = len(kept) - 1
    return [kept[i] for i in sorted({round(position * last / (EXITS - 1)) for position in range(EXITS)})]


def describe(found: Candidates, row: Row) -> None:
    """Places kept, and how often each reason refused a node."""
    row["candidates"] = len(found.kept)
    row["places"] = [f"{c.place} ({c.name})" for c in found.kept]
    row["side_inputs"] = sorted({s for c in found.kept for s in c.side_inputs})
    row["refusals"] = dict(Counter(r.rule for r in found.refused).most_common())


def exercise(program: ExitProgram, built: Built, row: Row, work: Path) -> None:
    """Every backend against the eager run; `row["backends"]` says what of each."""
    batches = row["batches"] = affordable(program, built)
    expected = _expected(program, built, batches)
    row["backends"] = {}
    large = row["parameters"] > LARGE
    for targets in ((t,) for t in ALL_TARGETS) if large else (TARGETS, (TORCHSCRIPT,)):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            artifact = Path(folder) / "artifact"
            try:
                write(program, targets, artifact)
            except ModelError as error:
                row["backends"] |= {target: {"refused": str(error)} for target in targets}
                continue
            for target in targets:
                row["backends"][target] = _compared(expected, artifact, target, program.backbone)
    differs = [t for t, o in row["backends"].items() if not o.get("holds", True)]
    if differs:
        own = row["own_rounding"] = own_rounding(program, built, max(batches))
        differs = [t for t in differs if row["backends"][t]["other_exit"] or row["backends"][t]["difference"] > 2 * own]
    assert not differs, f"{', '.join(differs)}: answers differ from the eager run's: {row['backends'][differs[0]]}"
    refused = [o["refused"] for o in row["backends"].values() if "refused" in o]
    if refused:
        raise ModelError(refused[0])


def own_rounding(program: ExitProgram, built: Built, rows: int) -> float:
    """How far the eager run's own answers `[B, K]` are off, at any exit: a bound on what rounding may explain.

    That is the change by what should not matter: float64 in the place of float32, torch's own kernels in that of
    oneDNN's, every input moved by its last bit. A random network can be so ill-conditioned that no two orders of
    summation agree to 1e-4.
    """
    inputs = bind(program.backbone.inputs, built.rows(rows, 2), program.backbone.name)
    answers = program.all_exits(*inputs)
    exact = _in_float64(program, inputs)
    others = [] if exact is None else [exact]
    with torch.backends.mkldnn.flags(enabled=False):
        others.append(program.all_exits(*inputs))
    for seed in range(_MOVES):
        generator = torch.Generator().manual_seed(seed)
        others.append(program.all_exits(*(_moved(x, generator) for x in inputs)))
    return max(float((answers - other).abs().max()) for other in others)


def _in_float64(program: ExitProgram, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The answers of all exits, computed in float64; None for a graph that insists on float32."""
    modules = [*(segment.graph_module for segment in program.segments), *program.heads]
    try:
        for module in modules:
            module.double()
        return program.all_exits(*(x.double() if x.is_floating_point() else x for x in inputs))
    except RuntimeError:
        return None
    finally:
        for module in modules:
            module.float()


def _moved(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every value up or down by its last bit; whole numbers stay."""
    if not x.is_floating_point():
        return x
    up = torch.rand(x.shape, generator=generator) < 0.5
    return torch.nextafter(x, torch.where(up, torch.inf, -torch.inf))


def affordable(program: ExitProgram, built: Built) -> tuple[int, ...]:
    """The batches of the longest list that all cases together have time for."""
    inputs = bind(program.backbone.inputs, built.rows(8, 3), program.backbone.name)
    started = time.process_time()
    program.all_exits(*inputs)
    per_row = (time.process_time() - started) / 8
    runs = len(list(plans(program))) * (2 + len(ALL_TARGETS))  # per case two eager ones and the backends'
    return next((b for b in BATCHES if per_row * sum(b) * runs < SECONDS), BATCHES[-1])


def plans(program: ExitProgram) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The cases of DESIGN.md as thresholds."""
    exits = len(program.plan.exits)
    yield "all at once", (-math.inf,) * exits
    yield "none", (math.inf,) * exits
    for alone in range(exits):
        yield f"exit {alone} alone", tuple(-math.inf if e == alone else math.inf for e in range(exits))
    yield "mixed", program.plan.thresholds


def _session(artifact: Path, target: str, backbone: Backbone) -> Answering:
    if target in EXECUTORS:
        return load(artifact, providers=["CPUExecutionProvider"], threads=1, executor=EXECUTORS[target])  # type: ignore[arg-type]
    return ScriptSession(artifact / SCRIPT, [i.name for i in backbone.inputs])


def _expected(program: ExitProgram, built: Built, batches: tuple[int, ...]) -> list[Expected]:
    """The eager run's answers in all cases at all batches."""
    backbone = program.backbone
    arguments = bind(backbone.inputs, built.rows(max(batches), 2), backbone.name)
    rows = {i.name: value.numpy() for i, value in zip(backbone.inputs, arguments, strict=True)}
    programs = [program.with_thresholds(thresholds) for _, thresholds in plans(program)]
    return [expect(p, {name: value[:batch] for name, value in rows.items()}) for p in programs for batch in batches]


def _compared(expected: Sequence[Expected], artifact: Path, target: str, backbone: Backbone) -> Mapping[str, Any]:
    """All cases at all batches, added up; the session's memory is free again afterwards."""
    session = _session(artifact, target, backbone)
    found = [e.against(session) for e in expected]
    del session
    gc.collect()
    return {
        "holds": all(f.holds for f in found),
        "rows": sum(f.rows for f in found),
        "near": sum(f.near for f in found),
        "other_exit": sum(f.other_exit for f in found),
        "difference": max(f.difference for f in found),
    }
