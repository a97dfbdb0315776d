"""Whether a generator was sampled often enough, by its own samples and names of the background alone.

What a model is found for is what its samples show. Its samples are parted into the earlier and the later half, and each half
names what it shows: a name's share is the mean over samples of ``softmax over names of a n.h``, the encoder's zero-shot reading
(Radford et al. 2021). Where the best name of one half is not among the best ``AMONG`` of the other, another set of seeds could
have ranked the model elsewhere, and it is worth sampling again. Near synonyms and a few concepts that take turns are no doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from probelog.arrays import Floats
from probelog.ranking.matched_heads import SHARPNESS

#: How well the best name of one half must do in the other. 64 samples of 48 galleries: the halves of 88 % have the same best
#: name, of 96 % one among the other's best three, of 98 % among its best five.
AMONG = 5


def is_unsure(features: Floats, names: Floats) -> bool:
    """Whether the halves of a model's samples disagree about what it makes.

    Args:
        features: (m, d) of its samples, in the order of their numbers, of length 1.
        names: (B, d) embeddings of the background's names, of length 1.
    """
    rows, texts = np.asarray(features, np.float32), np.asarray(names, np.float32)
    if len(rows) < 2 or len(texts) <= AMONG:
        return False
    similarities = rows @ texts.T
    spread = max(float(similarities.std(axis=1).mean()), 1e-6)
    # In units of the spread, as every temperature of the ranking: encoders differ in it by a factor of ten.
    terms = np.exp((2 * SHARPNESS / spread) * (similarities - similarities.max(axis=1, keepdims=True)))
    shares = terms / terms.sum(axis=1, keepdims=True)
    half = len(rows) // 2
    one, other = shares[:half].mean(axis=0), shares[half:].mean(axis=0)
    return not (_among(one, other) and _among(other, one))


def _among(best: Floats, shares: Floats) -> bool:
    """Whether the best name of one half is among the best of the other's shares (B,)."""
    return int((shares > shares[int(np.argmax(best))]).sum()) < AMONG


def batches(first: int, most: int, unsure: Callable[[], bool]) -> Iterator[range]:
    """Numbers of the samples to make next: the first ones, then as many as there are for as long as the model is unsure.

    Args:
        first: how many every model makes.
        most: how many it may make in all.
        unsure: of what was made so far; asked after each batch that another may follow.
    """
    made = 0
    while made < most and (not made or unsure()):
        count = min(most, 2 * made or first)
        yield range(made, count)
        made = count
