"""Analyse and rewrite torch.fx graphs: a backbone in, candidates and exit programs out.

    backbone = normalise(backbone)
    candidates = find_candidates(backbone)           # every node considered, kept or refused with a reason
    program = build_program(backbone, plan, heads)   # the linear IR of every backend
    probabilities, exits = program(x)                # its eager run is the reference

Knows graphs and nothing of training or files.
"""

from .backbone import Backbone, Input, probabilities, row_shape
from .candidates import FILTERS, Candidate, Candidates, Filter, Limits, Refusal, find_candidates
from .contract import Pass, PassResult
from .cuts import Cut, ValueGraph, analyse
from .flops import module_flops, node_flops
from .normalise import NORMALISATION, RemoveAssertions, RemoveIdentities, ReshapeViews, normalise
from .plan import METRICS, ExitPlan, PlannedExit
from .program import ExitProgram, InsertExits, build_program, confidence, exit_if, gather
from .segments import Segment, split
from .verify import RULES, violations

__all__ = [
    "FILTERS",
    "METRICS",
    "NORMALISATION",
    "RULES",
    "Backbone",
    "Candidate",
    "Candidates",
    "Cut",
    "ExitPlan",
    "ExitProgram",
    "Filter",
    "Input",
    "InsertExits",
    "Limits",
    "Pass",
    "PassResult",
    "PlannedExit",
    "Refusal",
    "RemoveAssertions",
    "RemoveIdentities",
    "ReshapeViews",
    "Segment",
    "ValueGraph",
    "analyse",
    "build_program",
    "confidence",
    "exit_if",
    "find_candidates",
    "gather",
    "module_flops",
    "node_flops",
    "normalise",
    "probabilities",
    "row_shape",
    "split",
    "violations",
]
