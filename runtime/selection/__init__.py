"""Selection: recorded answers -> exits, thresholds and certificates. Numpy alone, so that a deployment can do it again.

records    what candidates said of some rows, what compute costs, what a plan makes of both
policies   geometric, equal, joint: records -> the exits and thresholds within a tolerance
bounds     risks, their tests and bounds
certify    the plan whose risk on new rows keeps to the tolerance, and the evidence
dial       plans for the tolerances a deployment may turn to
"""

from .bounds import DISAGREEMENT, REGRET, RISKS, rows_needed, upper_bound
from .certify import Certified, certified, check_rows, plan_path, walk
from .dial import CERTIFIED, PREDICTED, TOLERANCES, dial, evidence, plan_without_exits, plans_over
from .joint import column
from .policies import POLICIES, equal, equation_3_threshold, equation_4_score, geometric, joint, select
from .records import (
    Costs,
    Records,
    Selection,
    disagreement,
    exits_taken,
    expected_cost,
    oracle_cost,
    realised_risk,
)

__all__ = [
    "CERTIFIED",
    "DISAGREEMENT",
    "POLICIES",
    "PREDICTED",
    "REGRET",
    "RISKS",
    "TOLERANCES",
    "Certified",
    "Costs",
    "Records",
    "Selection",
    "certified",
    "check_rows",
    "column",
    "dial",
    "disagreement",
    "equal",
    "equation_3_threshold",
    "equation_4_score",
    "evidence",
    "exits_taken",
    "expected_cost",
    "geometric",
    "joint",
    "oracle_cost",
    "plan_path",
    "plan_without_exits",
    "plans_over",
    "realised_risk",
    "rows_needed",
    "select",
    "upper_bound",
    "walk",
]
