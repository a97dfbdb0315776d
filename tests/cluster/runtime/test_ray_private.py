"""What is used of Ray without being public."""

from __future__ import annotations

import pytest
import ray

from cluster.runtime import ray_private


def test_this_version_has_what_is_used(local_ray: None) -> None:
    """Fails where a new version moved something: mend `cluster.runtime.ray_private`, then raise its ``CHECKED``."""
    try:
        assert ray_private.draining_nodes() == {}
    except NotImplementedError as error:
        pytest.fail(f"{error}; checked with Ray {ray_private.CHECKED}")


def test_a_version_that_lacks_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ray._private.state.GlobalState.get_draining_nodes")
    with pytest.raises(NotImplementedError, match=rf"Ray {ray.__version__}: .*get_draining_nodes"):
        ray_private.draining_nodes()
