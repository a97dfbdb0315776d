"""Which nodes of a cluster are a job's own."""

from __future__ import annotations

import pytest
import ray

from cluster.runtime.node import NODE_RESOURCE_VARIABLE, own_nodes, own_resources
from cluster.runtime.session import worker_count


def test_all_nodes_are_used_unless_a_resource_is_named(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NODE_RESOURCE_VARIABLE, raising=False)
    everything = ray.cluster_resources()
    assert own_nodes() == {}
    assert own_resources()["CPU"] == everything["CPU"]
    assert worker_count(1.0, 0.0) == everything["CPU"]
    node = next(name for name in everything if name.startswith("node:") and "internal" not in name)
    monkeypatch.setenv(NODE_RESOURCE_VARIABLE, node)
    assert own_resources()["CPU"] == everything["CPU"]
    monkeypatch.setenv(NODE_RESOURCE_VARIABLE, "of-nobody")
    assert own_resources() == {}
    assert worker_count(1.0, 0.0) == 1
    assert list(own_nodes()["resources"]) == ["of-nobody"]
