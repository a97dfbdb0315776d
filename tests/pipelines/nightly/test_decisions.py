"""What a nightly run decides by: drift, bounds, and which models failed before."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.config.model import Nightly
from pipelines.nightly.decision import _refit_due
from pipelines.nightly.drift import Drift
from pipelines.nightly.start import FailedVersions
from probelog.storage.ledger import item_key, key_numbers


def drift(held_out: float = 0.0, temperature: float = 0.0, background: float = 0.0) -> Drift:
    return Drift(3, 0.5, 0.4, held_out, temperature, background, logits=10, share=0.1)


def test_the_largest_drift_is_named() -> None:
    assert drift(0.3, 0.2, 0.1).largest() == ("held-out error", 0.3)
    assert drift(0.1, -0.2, 0.15).largest() == ("temperature", 0.2)
    assert drift(-0.9, 0.1, 0.2).largest() == ("background", 0.2), "predicted better is no harm"
    assert drift(0.3).facts()["held_out"] == 0.3


def test_a_full_run_is_due_above_the_bound_and_not_at_it() -> None:
    settings = Nightly(max_drift=0.2)
    assert _refit_due(drift(0.2), settings) is None
    due = _refit_due(drift(temperature=-0.21), settings)
    assert due is not None
    assert "the temperature has moved by 21.0%" in due
    assert "more than nightly.max_drift (20.0%)" in due


def test_failed_models_are_known_by_repository_and_commit() -> None:
    tried = [(f"a/{number}", "1") for number in range(50)]
    failed = FailedVersions(np.sort(key_numbers(item_key(*version) for version in tried)))
    assert all(version in failed for version in tried)
    assert not any((f"a/{number}", "2") in failed or (f"b/{number}", "1") in failed for number in range(50))
    assert ("a/1", "1") not in FailedVersions(np.empty(0, np.uint64))


@pytest.mark.parametrize("largest", [True, False])
def test_the_ends_of_the_list_of_failures(largest: bool) -> None:
    keys = sorted(int(item_key(f"a/{number}", "1"), 16) for number in range(9))
    only = np.array([max(keys) if largest else min(keys)], np.uint64)
    hits = [(f"a/{number}", "1") in FailedVersions(only) for number in range(9)]
    assert sum(hits) == 1
