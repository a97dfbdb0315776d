"""Three ways to choose the background of an evaluation, from what users get to the hardest and to the kindest.

- *as published*: the index's own background. What users get.
- *withheld*: the concepts are split in halves by a hash of their names; each half is asked with the names of the other
  half as background. No queried concept has a neighbour there by design: the hardest.
- *closed*: the names of all concepts that are asked. It flatters methods that compare a logit with the background.

A query's own names never count as its background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.benchmark.questions import Questions
from probelog.arrays import Ints
from probelog.errors import UsageError
from probelog.evaluation.accuracy import DEVELOPMENT, TEST
from probelog.ranking.names import normal_name

AS_PUBLISHED = "as-published"
WITHHELD = "withheld"
CLOSED = "closed"
PROTOCOLS = (AS_PUBLISHED, WITHHELD, CLOSED)


class Round(NamedTuple):
    """Concepts that are asked with the same background: their ``numbers`` (C',), and the ``background``'s names."""

    numbers: Ints
    background: list[str]


def check_protocols(names: Sequence[str]) -> None:
    """Refuse names that are none of ``PROTOCOLS``.

    Raises:
        UsageError: says which there are.
    """
    for name in names:
        if name not in PROTOCOLS:
            raise UsageError(f"there is no protocol {name!r}; there are: {', '.join(PROTOCOLS)}")


def rounds(protocol: str, questions: Questions, published: Sequence[str]) -> list[Round]:
    """What is asked with which background; together the rounds ask every concept once.

    Args:
        protocol: one of ``PROTOCOLS``.
        questions: the concepts.
        published: names of the index's background.
    """
    everything = np.arange(len(questions.names))
    if protocol == AS_PUBLISHED:
        return [Round(everything, list(published))]
    if protocol == CLOSED:
        return [Round(everything, list(questions.names))]
    halves = []
    for half in (DEVELOPMENT, TEST):
        asked = np.flatnonzero(questions.halves == half)
        own = {normal_name(name) for number in asked.tolist() for name in questions.synonyms[number]}
        others = [questions.names[number] for number in np.flatnonzero(questions.halves != half).tolist()]
        if len(asked):
            halves.append(Round(asked, [name for name in others if normal_name(name) not in own]))
    return halves
