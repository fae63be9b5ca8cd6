"""Exit heads: small classifiers over a cut's value.

    conv    [B, C, H, W]  convolutions with batch norm; mean and maximum of every map, dense
    tokens  [B, T, D]     first token and mean over tokens, layer norm, dense, dense
    dense   [B, D]        layer norm, dense, dense

The default of each family spends no more than 3.5 percent of the backbone's compute; `search_space` says what else
a search may choose.
"""

from .conv import CONV, ConvHead
from .dense import DENSE, TOKENS, DenseHead, TokensHead
from .family import (
    BUDGET,
    COST,
    FAMILIES,
    LEARNING_RATE,
    Family,
    HeadConfig,
    Settings,
    Shape,
    Space,
    build_head,
    configure,
    default_head,
    families_for,
    find_family,
    head_flops,
    register_family,
    search_space,
)

for _name, _family in (("conv", CONV), ("tokens", TOKENS), ("dense", DENSE)):
    register_family(_name, _family)

__all__ = [
    "BUDGET",
    "COST",
    "FAMILIES",
    "LEARNING_RATE",
    "ConvHead",
    "DenseHead",
    "Family",
    "HeadConfig",
    "Settings",
    "Shape",
    "Space",
    "TokensHead",
    "build_head",
    "configure",
    "default_head",
    "families_for",
    "find_family",
    "head_flops",
    "register_family",
    "search_space",
]
