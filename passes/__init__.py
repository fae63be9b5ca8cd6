"""Analyse and rewrite torch.fx graphs: a backbone in, candidates and exit programs out.

    backbone = normalise(backbone)
    candidates = find_candidates(backbone)           # every node considered, kept or refused with a reason
    program = build_program(backbone, plan, heads)   # the linear IR of every backend
    probabilities, exits = program(x)                # its eager run is the reference

Knows graphs and nothing of training or files.
"""

from .attention import NumberMasks
from .backbone import Backbone, Input, probabilities, row_shape
from .candidates import FILTERS, Candidate, Candidates, Filter, Limits, Refusal, find_candidates
from .contract import Observer, Pass, PassResult, observed
from .cuts import Cut, ValueGraph, analyse
from .features import last_features
from .flops import module_flops, node_flops
from .folding import FoldWeights
from .masks import SpreadMasks
from .normalise import NORMALISATION, NameSqueezed, RemoveAssertions, RemoveIdentities, ReshapeViews, normalise
from .plan import METRICS, ExitPlan, PlannedExit
from .program import ExitProgram, InsertExits, build_program, confidence, exit_if, gather
from .segments import Segment, split
from .trace import Trace, graph_text
from .verify import RULES, verified, violations

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
    "FoldWeights",
    "Input",
    "InsertExits",
    "Limits",
    "NameSqueezed",
    "NumberMasks",
    "Observer",
    "Pass",
    "PassResult",
    "PlannedExit",
    "Refusal",
    "RemoveAssertions",
    "RemoveIdentities",
    "ReshapeViews",
    "Segment",
    "SpreadMasks",
    "Trace",
    "ValueGraph",
    "analyse",
    "build_program",
    "confidence",
    "exit_if",
    "find_candidates",
    "gather",
    "graph_text",
    "last_features",
    "module_flops",
    "node_flops",
    "normalise",
    "observed",
    "probabilities",
    "row_shape",
    "split",
    "verified",
    "violations",
]
