"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# A local Ray would otherwise write a token file into the home directory.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

BENCH = Path(__file__).parents[1].parent / "shared" / "bench"


@pytest.fixture(scope="session")
def bench() -> Path:
    """The bench hub beside the checkout; tests that need it are skipped, loudly, where it is missing."""
    if not (BENCH / "truth.json").exists():
        pytest.skip(f"the bench hub is not at {BENCH}: this test did not run")
    return BENCH


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One real Ray for the whole run."""
    import ray

    from cluster.session import session

    with session("local", cpus=4):
        yield
    assert not ray.is_initialized()
