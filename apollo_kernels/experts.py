"""Which parameters of three dimensions [E, m, n] are E matrices, as the experts of a mixture are.

Others are filters of a convolution, or tokens and positions [1, n, d], or one matrix whose side was
cut in two ([d, heads, size] in XLNet).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

_NO_WEIGHT = ("bias", "embed", "token")  # within a parameter's own name


def count_matrices(shape: Sequence[int], name: str = "") -> bool:
    """Whether the first of three dimensions may count matrices: it is not the longest of them,
    unless ``name``, of the parameter and what it belongs to, speaks of experts."""
    return len(shape) == 3 and (shape[0] <= max(shape[1:]) or "expert" in name.lower())


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) or "conv" in type(module).__name__.lower()


def are_weights(shape: Sequence[int], name: str) -> bool:
    """Whether what counts matrices holds weights of linear maps, and no tokens or biases.

    Two matrices at least, of two rows and columns at least, and a ``name``, that of the parameter
    and then what it belongs to, that says nothing else.
    """
    own = name.split()[0].rsplit(".", 1)[-1].lower()
    several = shape[0] > 1 or "expert" in name.lower()
    return several and min(shape[1:]) > 1 and not any(word in own for word in _NO_WEIGHT)


def look_like(shape: Sequence[int], name: str) -> bool:
    """Whether a parameter of ``shape``, called ``name``, is several matrices by all of that."""
    return count_matrices(shape, name) and are_weights(shape, name)
