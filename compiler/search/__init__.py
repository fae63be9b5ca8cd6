"""Head search: engines propose, all proposed heads of all candidates learn from one stream, the better half goes on."""

from .engine import ENGINES, Engine, Proposal, RandomEngine, check_space, make_engine

__all__ = ["ENGINES", "Engine", "Proposal", "RandomEngine", "check_space", "make_engine"]
