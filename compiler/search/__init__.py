"""Head search: engines propose, all proposed heads of all candidates learn from one stream, the better half goes on."""

from .engine import ENGINES, Engine, Proposal, RandomEngine, check_space, make_engine, read_spaces
from .objective import saved_at, shortlist, worth
from .waves import NONE, Found, Search, search_heads, shortlist_over

__all__ = [
    "ENGINES",
    "NONE",
    "Engine",
    "Found",
    "Proposal",
    "RandomEngine",
    "Search",
    "check_space",
    "make_engine",
    "read_spaces",
    "saved_at",
    "search_heads",
    "shortlist",
    "shortlist_over",
    "worth",
]
