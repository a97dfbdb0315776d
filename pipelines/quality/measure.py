"""Measures of the quality gate and the statistics that judge them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measure:
    """One measure of a candidate, compared with the live generation. All numbers are shares between 0 and 1.

    Attributes:
        name: of the measure.
        meaning: a sentence that defines it.
        value: of the candidate; None where there was nothing to measure.
        before: of the live generation or the last run; None without one.
        worse: lower bound of how much worse the value became; None where it is not judged.
        limit: upper limit of ``worse``.
        counted: number of items that the value is the share of.
        note: why it is not judged, or what was left out.
        examples: items that made it worse; contains untrusted text.
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
        """Whether it keeps its limit; a measure that is not judged passes."""
        return self.worse is None or self.worse <= self.limit

    @property
    def verdict(self) -> str:
        """``passed``, ``failed`` or ``not judged``."""
        if self.worse is None:
            return "not judged"
        return "passed" if self.passed else "failed"


# How many a report names.
EXAMPLES = 8
# One-sided 99.9 %: a nightly job evaluates a dozen measures 365 times a year.
Z = 3.09


def wilson(hits: float, count: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson 1927, eq. of Brown, Cai and DasGupta 2001, section 3.1.1).

    Args:
        hits: number of ``count`` items with the property; sums of shares between 0 and 1 are accepted as counts, whose
            variance is then overstated.
        count: number of items; with 0 the interval is 0 to 1.
        z: normal quantile.

    Returns:
        Lower and upper end.
    """
    if count <= 0:
        return 0.0, 1.0
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Exactly so at the ends, where rounding would leave a trace.
    return (centre - half if hits > 0 else 0.0), (centre + half if hits < count else 1.0)


def least_rise(hits: float, count: float, hits_before: float, count_before: float, z: float = Z) -> float:
    """Lower bound of the rise of a share: the lower end of the interval of the difference of two shares.

    Newcombe's hybrid score interval (R. G. Newcombe 1998, Statistics in Medicine 17:873, method 10). -1 where
    either count is 0.
    """
    if count <= 0 or count_before <= 0:
        return -1.0
    share_now, share_before = hits / count, hits_before / count_before
    low = wilson(hits, count, z)[0]
    high_before = wilson(hits_before, count_before, z)[1]
    return share_now - share_before - math.hypot(share_now - low, high_before - share_before)


def least_paired_fall(lost: float, gained: float, count: int, z: float = Z) -> float:
    """Lower bound of the fall of a share over the same items before and after.

    The adjusted Wald interval of matched pairs (A. Agresti and Y. Min 2005, Statistics in Medicine 24:729): half an
    observation is added to each of the four cells.

    Args:
        lost: number of items that lost the property; a sum of falls between 0 and 1 is accepted, whose variance is then
            overstated.
        gained: number of items that gained it; a sum of rises is accepted as well.
        count: number of pairs; with 0 the result is -1.
        z: normal quantile.
    """
    if count <= 0:
        return -1.0
    fell, rose, pairs = lost + 0.5, gained + 0.5, count + 2
    difference = (fell - rose) / pairs
    return difference - z * math.sqrt((fell + rose) / pairs - difference**2) / math.sqrt(pairs)


def gone(
    name: str, things: str, repos: Sequence[str], held: Collection[str], limit: float, note: str = ""
) -> Measure:
    """Share of some repositories of the live generation that the candidate does not hold."""
    removed = [repo for repo in repos if repo not in held]
    return Measure(
        name=f"{name} gone",
        meaning=f"Share of the live generation's {things} that the candidate lacks; and the least that it can be, "
        "seen from a sample.",
        value=len(removed) / len(repos) if repos else None,
        before=None,
        worse=wilson(len(removed), len(repos))[0] if repos else None,
        limit=limit,
        counted=len(repos),
        note=note,
        examples=removed[:EXAMPLES],
    )
