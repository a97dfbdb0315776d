"""What the gate measures, as it is judged and as it is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measure:
    """One measure of a candidate beside the live generation. All numbers are shares between 0 and 1.

    Attributes:
        name: what is measured.
        meaning: in a sentence.
        value: the candidate's; None where there was nothing to measure.
        before: the live generation's, or the last run's; None where there is none.
        worse: by how much it became worse at the least; None where that cannot be said.
        limit: what ``worse`` may be at the most.
        counted: how many the value is of.
        note: why it is not judged, or what was left out.
        examples: some of what made it worse: untrusted text among it.
    """

    name: str
    meaning: str
    value: float | None
    before: float | None
    worse: float | None
    limit: float
    counted: int
    note: str = ""
    examples: Sequence[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether it keeps its limit; what cannot be judged does."""
        return self.worse is None or self.worse <= self.limit

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.worse is None:
            return "not judged"
        return "passed" if self.passed else "failed"


# One-sided 99.9 %: a nightly job asks a dozen questions 365 times a year.
Z = 3.09


def wilson(hits: float, count: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson 1927, eq. of Brown, Cai and DasGupta 2001, section 3.1.1).

    Args:
        hits: how many of ``count`` have the property; sums of shares between 0 and 1 may stand for counts, whose
            variance is then overstated.
        count: of how many; with none the interval is all of 0 to 1.
        z: normal quantile.
    """
    if count <= 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Exactly so at the ends, where rounding would leave a trace.
    return (centre - half if hits > 0 else 0.0), (centre + half if hits < count else 1.0)


def least_rise(hits: float, count: float, hits_before: float, count_before: float, z: float = Z) -> float:
    """How much a share rose at the least: the lower end of the interval of the difference of two shares.

    Newcombe's hybrid score interval (R. G. Newcombe 1998, Statistics in Medicine 17:873, method 10). -1 where
    nothing was counted on either side.
    """
    if count <= 0 or count_before <= 0:
        return -1.0
    now, before = hits / count, hits_before / count_before
    low = wilson(hits, count, z)[0]
    high_before = wilson(hits_before, count_before, z)[1]
    return now - before - math.hypot(now - low, high_before - before)


def least_paired_fall(lost: float, gained: float, count: int, z: float = Z) -> float:
    """How much a share fell at the least, where the same were asked before and after.

    The adjusted Wald interval of matched pairs (A. Agresti and Y. Min 2005, Statistics in Medicine 24:729): half an
    observation is added to each of the four cells.

    Args:
        lost: had the property before and have not now; a sum of falls between 0 and 1 may stand for the count, whose
            variance is then overstated.
        gained: have it now and had not before; likewise.
        count: of how many pairs; -1 is given where there are none.
        z: normal quantile.
    """
    if count <= 0:
        return -1.0
    fell, rose, pairs = lost + 0.5, gained + 0.5, count + 2
    difference = (fell - rose) / pairs
    return difference - z * math.sqrt((fell + rose) / pairs - difference**2) / math.sqrt(pairs)
