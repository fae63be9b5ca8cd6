"""Model + unlabelled data -> artifact. The flow, each arrow a public function usable alone:

    backbone     = capture(model, example)                              # nn.Module / .pt2 -> torch.fx graph
    candidates   = find_candidates(backbone)                            # offramp.passes; refusals have reasons
    splits       = split_rows(len(data), seed)                          # distil / calibrate / select / certify / test
    heads        = distil(backbone, candidates.kept, configs, data, ...)  # KL to the backbone, no labels
    temperatures = calibrate(record(backbone, heads, data, splits.calibrate, "calibrate"))
    chosen       = certified(records(record(...), temperatures), certify_records, costs(backbone, heads), tolerance)
    program      = build_program(backbone, exit_plan(chosen.selection, ...), modules)   # offramp.passes; the IR
    stages, files = emit(program)                                       # ONNX segments, one ONNX file
    manifest, files = pack(program, job)                                # emitted, checked, measured, reported

`compile` is these calls in a row and nothing else.
"""

from offramp.runtime.selection import (
    POLICIES,
    Certified,
    Costs,
    Records,
    Selection,
    certified,
    equal,
    geometric,
    joint,
    rows_needed,
    select,
)

from .augment import AUGMENTATIONS, Augment
from .capture import capture
from .choose import exit_plan, records
from .compile import as_rows, choose_candidates, compile, finish, prepare, train
from .costs import COSTS, costs
from .distill import Head, default_heads, distil
from .emit import ALL_TARGETS, TARGETS, emit
from .equivalence import Equivalence, compare
from .evaluate import Outcome, evaluate, run_program
from .heads import FAMILIES, Family, HeadConfig, build_head, default_head, register_family, search_space
from .independence import keep_independent
from .loading import load_model, load_weights
from .package import ALL_POLICIES, Job, Options, Ready, input_specs, pack
from .precision import PRECISIONS
from .record import Recording, calibrate, record
from .search import ENGINES, Found, Search, search_heads
from .signature import Signature
from .splits import RowSplits, check_splits, split_rows
from .training import Training

__all__ = [
    "ALL_POLICIES",
    "ALL_TARGETS",
    "AUGMENTATIONS",
    "COSTS",
    "ENGINES",
    "FAMILIES",
    "POLICIES",
    "PRECISIONS",
    "TARGETS",
    "Augment",
    "Certified",
    "Costs",
    "Equivalence",
    "Family",
    "Found",
    "Head",
    "HeadConfig",
    "Job",
    "Options",
    "Outcome",
    "Ready",
    "Recording",
    "Records",
    "RowSplits",
    "Search",
    "Selection",
    "Signature",
    "Training",
    "as_rows",
    "build_head",
    "calibrate",
    "capture",
    "certified",
    "check_splits",
    "choose_candidates",
    "compare",
    "compile",
    "costs",
    "default_head",
    "default_heads",
    "distil",
    "emit",
    "equal",
    "evaluate",
    "exit_plan",
    "finish",
    "geometric",
    "input_specs",
    "joint",
    "keep_independent",
    "load_model",
    "load_weights",
    "pack",
    "prepare",
    "record",
    "records",
    "register_family",
    "rows_needed",
    "run_program",
    "search_heads",
    "search_space",
    "select",
    "split_rows",
    "train",
]
