"""What the gate measures, as it is judged and as it is reported."""

from __future__ import annotations

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
        examples: some of what made it worse: strangers' text among it.
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
