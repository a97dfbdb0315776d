"""A Ray cluster of several nodes on this machine, in a process of its own: a test run has one Ray only.

with ray_cluster(cpus=0) as cluster:
    node = cluster.add(cpus=2)
    cluster.remove(node)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.support.processes.operator_command import CHECKOUT, kill_tree

# A node that vanished is known to be gone after two seconds.
_HEALTH = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000, "health_check_failure_threshold": 4,
}  # fmt: skip


class RayCluster:
    """The side of a test, which never connects to the cluster itself."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = str(self._answer())

    def add(self, cpus: int) -> str:
        """A further node; its number in Ray's words."""
        return str(self._ask("add", cpus))

    def remove(self, node: str) -> None:
        """The node vanishes: SIGKILL to all its processes but those of models, which nobody looks after then."""
        self._ask("remove", node)

    def drain(self, node: str, seconds: float) -> None:
        """Tell Ray that a spot machine goes away in so many seconds."""
        assert self._ask("drain", node, seconds)

    def _ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        raise AssertionError("the cluster's process has ended")


@contextlib.contextmanager
def ray_cluster(cpus: int) -> Iterator[RayCluster]:
    """A cluster whose head has so many CPUs."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(cpus)],
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield RayCluster(process)
        process.communicate(timeout=60)  # the end of its input is the end of the cluster
    finally:
        kill_tree(process)


def _main(cpus: int) -> None:
    import ray
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    def say(answer: Any) -> None:
        print(json.dumps({"answer": answer}), flush=True)

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus, "_system_config": _HEALTH, "include_dashboard": False},
    )
    nodes: dict[str, Any] = {}
    say(cluster.address)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "add":
            node = cluster.add_node(num_cpus=arguments[0])
            nodes[node.node_id] = node
            say(node.node_id)
        elif command == "remove":
            cluster.remove_node(nodes.pop(arguments[0]), allow_graceful=False)
            say(True)
        elif command == "drain":
            node, seconds = arguments
            client = ray._raylet.GcsClient(address=cluster.address)
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            say(client.drain_node(node, reason, "a test", int(1000 * (time.time() + seconds)))[0])
    cluster.shutdown()


if __name__ == "__main__":
    _main(int(sys.argv[1]))
