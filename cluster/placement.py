"""Where helper actors live: on the driver's node, so that a machine that goes away takes no shared state along."""

from __future__ import annotations

from typing import Any

import ray


def driver_node_affinity() -> dict[str, Any]:
    """Options for an actor that must live as long as the driver does. Call it in the driver."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
