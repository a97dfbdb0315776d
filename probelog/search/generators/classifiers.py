"""A whole classifier as a part of a query for generators: those that make any of what its logits recognise, and much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probelog.arrays import Floats
from probelog.errors import QueryError
from probelog.index.generation import Generation
from probelog.search.models import check_comparable, label_of, logit_rows

# Of more logits, so many are asked, evenly spread over the head: neighbours of large heads are alike.
ASKED = 256


@dataclass(frozen=True, eq=False)
class Classifier:
    """The logits of a classifier that are asked.

    Attributes:
        repo: its name.
        count: of all rows that its logits have in the index.
        logits: (q,) their numbers.
        labels: (q,) as declared: untrusted text.
        directions: (q, d) of length 1.
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
        places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ASKED)).astype(np.int64))
        logits = holder.logits(rows[places])
        # The opposite of a one-logit head's concept is all else.
        logits = logits[~logits.negated]
        if not len(logits):
            raise QueryError(f"none of the logits of {repo!r} is indexed: nothing says what it recognises")
        labels = [label_of(model["labels"], number) for number in logits.logit.tolist()]
        return cls(repo, len(rows), logits.logit, labels, holder.basis.directions(logits.coordinates))

    @property
    def note(self) -> str | None:
        """What is to be said of logits that are not asked."""
        if self.count <= ASKED:
            return None
        return f"{len(self.logits)} of the {self.count:,} logits of {self.repo} are asked, evenly spread over its head"
