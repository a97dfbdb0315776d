"""The families of a small ``weights`` table, in memory; `probelog.trees.families.partition` makes those of a large one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from probelog.trees.families.family import Family, ModelFacts
from probelog.trees.families.partition import partition

__all__ = ["Family", "ModelFacts", "families"]


def families(weights: pa.Table) -> list[Family]:
    """The models of a ``weights`` table by architecture, in order of the tensors' names and shapes.

    Models without a single usable sketch (of integers, NaN, or overflown) are in no family.
    """
    with TemporaryDirectory() as folder:
        parts = partition(lambda columns: [weights.select(columns)], Path(folder))
        every = (parts.family(key) for key in parts.keys)
        usable = [family.take(np.flatnonzero(family.usable)) for family in every if family.usable.any()]
    return sorted(usable, key=lambda family: (family.tensors, family.shapes))
