"""Which models to measure first: some of every class of size, always the same ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.forecast.known import SIZE_CLASSES, Known, size_class
from probelog.storage.encoding import short_key
from probelog.storage.ledger import key_numbers

UNKNOWN = -1


def stratified(known: Known, names: list[str], count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Marks ``count`` models of those that may be indexed, (N,): all, where there are fewer.

    Every class of size that has models gets one, whatever ``count``, the others go where models and bytes are: half by the
    number of models of a class, half by their bytes. Within a class they lie at equal distances in the order of
    size (systematic sampling), so that large and small ones are seen.

    Args:
        known: the catalogue's models.
        names: (N,) of them, which decide the order among equals.
        count: how many.
        seed: another one draws others.
    """
    classes = size_class(known.parameters)
    able = ~known.doomed
    sizes = np.nan_to_num(known.weights, nan=0.0)
    tie = key_numbers(short_key(seed, name) for name in names)
    numbers = [UNKNOWN, *range(len(SIZE_CLASSES))]
    members = {
        number: rows[np.lexsort((tie[rows], sizes[rows]))]
        for number in numbers
        if len(rows := np.flatnonzero(able & (classes == number)))
    }
    marked = np.zeros(len(known), bool)
    if not members:
        return marked
    rng = np.random.default_rng(seed)
    for rows, share in zip(members.values(), _shares(members, sizes, count), strict=True):
        places = (np.arange(share) + rng.random()) * len(rows) / share if share else np.zeros(0)
        marked[rows[places.astype(np.int64)]] = True
    return marked


def _shares(
    members: dict[int, npt.NDArray[np.int64]], sizes: npt.NDArray[np.float64], count: int
) -> list[int]:
    """How many of each class."""
    held = np.array([len(rows) for rows in members.values()])
    size = np.array([sizes[rows].sum() for rows in members.values()])
    wanted = held / held.sum() + (size / size.sum() if size.sum() > 0 else held / held.sum())
    shares = np.minimum(held, 1)
    for _ in range(max(0, min(count, int(held.sum())) - len(held))):
        # The class that is furthest behind its share and has models left.
        behind = np.where(shares < held, wanted / (shares + 1), -1.0)
        shares[int(behind.argmax())] += 1
    return [int(share) for share in shares]
