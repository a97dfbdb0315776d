"""Which machines of a cluster are used, and what each of them has to share out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

#: Names a custom resource: work goes only to nodes that offer it. For a cluster that other people's jobs use.
NODE_RESOURCE_VARIABLE = "PROBELOG_NODE_RESOURCE"
# Of that resource, what an actor or task takes: it says where, and never how many.
_TRACE = 0.0001

# Memory limits of a container, by version of the kernel's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def own_nodes() -> dict[str, Any]:
    """Options that keep an actor or task on this job's nodes: nothing, unless the environment names their resource."""
    name = os.environ.get(NODE_RESOURCE_VARIABLE)
    return {"resources": {name: _TRACE}} if name else {}


def own_resources() -> dict[str, float]:
    """The sums of what this job's nodes have at present."""
    name = os.environ.get(NODE_RESOURCE_VARIABLE)
    sums: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and (not name or name in node["Resources"]):
            for resource, amount in node["Resources"].items():
                sums[resource] = sums.get(resource, 0.0) + amount
    return sums


def memory_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def memory_share(cpus: float, gpus: float) -> float:
    """Bytes of this node's memory that belong to a worker with so many of its CPUs and GPUs. Call it in a worker."""
    here = ray.get_runtime_context().get_node_id()
    node: dict[str, Any] = next((node for node in ray.nodes() if node["NodeID"] == here), {})
    resources = node.get("Resources", {})
    shares = [
        requested / held
        for requested, held in (
            (cpus, resources.get("CPU") or os.cpu_count() or 1),
            (gpus, resources.get("GPU") or 0),
        )
        if requested > 0 and held > 0
    ]
    return memory_bytes() * min(1.0, max(shares, default=1.0))


def driver_node_affinity() -> dict[str, Any]:
    """Options for an actor that must live as long as the driver does. Call it in the driver."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
