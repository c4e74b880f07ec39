"""The random search: what its cases are drawn from, and how many there are.

In the suite the cases are the same every time. RLCORE_SEARCH=20 draws twenty times as many, others
at each run:

    RLCORE_SEARCH=20 python -m pytest tests/test_search_*.py
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

FACTOR = float(os.environ.get("RLCORE_SEARCH", "0"))
LARGEST = 1e4  # of every argument's magnitude
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def search(examples: int) -> settings:
    """A decorator for a test with `given`: so many cases in the suite, more by RLCORE_SEARCH."""
    return settings(
        max_examples=max(round(examples * FACTOR), 1) if FACTOR else examples,
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        # cases are small as they are drawn: shrinking one takes minutes
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


# where exp of float32 overflows and underflows, ties, and what an ordinary model gives
CORNERS = (0.0, 1.0, -1.0, 1e-8, -1e-8, 88.0, -88.0, 89.5, -104.0, LARGEST, -LARGEST)


def numbers(least: float = -LARGEST, most: float = LARGEST) -> st.SearchStrategy[float]:
    """A float32 number between the two: a corner, an ordinary one, or any."""
    reaches = [(max(least, -reach), min(most, reach)) for reach in (5.0, 200.0, LARGEST)]
    drawn = [st.floats(low, high) for low, high in reaches if low < high]
    corners = [x for x in CORNERS if least <= x <= most]
    drawn += [st.sampled_from(corners)] if corners else []
    return st.one_of(*drawn).map(lambda x: torch.tensor(x, dtype=torch.float32).item())


def tensors(
    *shape: int, dtype: torch.dtype = torch.float32, elements: st.SearchStrategy | None = None
) -> st.SearchStrategy[Tensor]:
    """A tensor of a shape, of `numbers()` or other elements."""
    count = torch.Size(shape).numel()
    lists = st.lists(numbers() if elements is None else elements, min_size=count, max_size=count)
    return lists.map(lambda values: torch.tensor(values, dtype=dtype).view(shape))


def masks(*shape: int) -> st.SearchStrategy[Tensor]:
    """A bool tensor, now and then without a true entry."""
    return tensors(*shape, dtype=torch.bool, elements=st.booleans())
