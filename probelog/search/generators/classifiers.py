"""Logits and whole classifiers as parts of a query for generators: those that make what they recognise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats, evenly_spread
from probelog.errors import QueryError
from probelog.index.generation import Generation
from probelog.ranking.samples.description import unit
from probelog.search.models import check_comparable, label_of, logit_rows

# Of more logits, so many are asked, evenly spread over the head: neighbours of large heads are alike.
ASKED = 256
# How much surer the names of a logit are than its scores for them say. With 25 classifiers of the demo and 48 galleries, mAP of a
# whole classifier (of one logit): 41.7 (74.9) by directions alone; with 1, 2 and 3: 52.6 (78.3), 56.9 (82.5), 57.3 (81.7). Where
# the background lacks all of their names: 38.4 (70.9), 40.0 (70.6), 38.9 (69.8).
_SURER = 2.0


@dataclass(frozen=True, eq=False)
class Classifier:
    """The logits of a classifier that are asked.

    Attributes:
        repo: its name.
        count: of all rows that its logits have in the index.
        logits: (q,) their numbers.
        labels: (q,) as declared: untrusted text.
        directions: (q, d) of length 1, of what they recognise.
    """

    repo: str
    count: int
    logits: npt.NDArray[np.integer]
    labels: Sequence[str]
    directions: Floats

    @classmethod
    def named(cls, generation: Generation, repo: str, other: Generation | None = None) -> Classifier:
        """The classifier of this name, in this index or in another one.

        Raises:
            QueryError: there is none, none of its logits is indexed, or the other index has another encoder.
        """
        holder = generation if other is None else other
        check_comparable(generation, holder)
        model = holder.model(repo)
        rows = logit_rows(model)
        places = evenly_spread(len(rows), ASKED)
        logits = holder.logits(rows[places])
        # The opposite of a one-logit head's concept is all else.
        logits = logits[~logits.negated]
        if not len(logits):
            raise QueryError(f"none of the logits of {repo!r} is indexed: nothing says what it recognises")
        labels = [label_of(model["labels"], number) for number in logits.logit.tolist()]
        directions = meant(generation, holder.basis.directions(logits.coordinates))
        return cls(repo, len(rows), logits.logit, labels, directions)

    @property
    def note(self) -> str | None:
        """What is to be said of logits that are not asked."""
        if self.count <= ASKED:
            return None
        return f"{len(self.logits)} of the {self.count:,} logits of {self.repo} are asked, evenly spread over its head"


def meant(generation: Generation, directions: Floats) -> Floats:
    """Directions (q, d) of what logits of directions (q, d) recognise, to compare samples with.

    A logit's own direction is noisy: the probes say little of it. Like pictures (``HeadSpace.of_images``) it stands for the
    background names that it is recognised by, each with its posterior, and for itself beside them, for what the names do not say.
    """
    background = generation.space.background
    if len(background) < 2:
        return directions
    odds = _SURER * generation.sharpness * (directions @ background.T)
    weights = np.exp(odds - odds.max(axis=1, keepdims=True))
    return unit(unit(weights @ background) + directions)
