"""Workers and drivers killed at random moments: the ledger ends as if nothing had happened.

The stub's observations follow from the item's name; plan, scheduler, ledger and Ray are real. ``PROBELOG_CHAOS_RUNS``
says how many runs there are, ``PROBELOG_CHAOS_SEED`` which seed is the first; `python -m tests.chaos` prints each.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import chaos

RUNS = int(os.environ.get("PROBELOG_CHAOS_RUNS", "100"))
FIRST = int(os.environ.get("PROBELOG_CHAOS_SEED", "0"))


@pytest.mark.acceptance
@pytest.mark.timeout(120 * RUNS + 120)
def test_kills_at_random_moments(tmp_path: Path) -> None:
    with chaos(tmp_path) as run:
        done = [run(seed) for seed in range(FIRST, FIRST + RUNS)]
    assert not [(one.seed, one.problems) for one in done if one.problems]
    kills = sum((Counter(one.kills) for one in done), Counter[str]())
    assert kills.total() >= RUNS, "hardly anything was killed"
