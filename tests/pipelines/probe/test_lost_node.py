"""A machine vanishes while its workers work: everything comes back, nobody is blamed.

In a process of its own, since a test run has one Ray only and this one loses nodes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.processes.operator_command import CHECKOUT

PROGRAM = """
import json, logging, time
import ray
from ray.cluster_utils import Cluster
from cluster.probing.scheduler import Policy, Scheduler
from cluster.runtime.session import worker_count

health = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000, "health_check_failure_threshold": 4,
}
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": health})
lost = nodes.add_node(num_cpus=2)
ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)

@ray.remote(num_cpus=1, max_concurrency=2)
class Stub:
    def ready(self):
        pass
    def run(self, item):
        time.sleep(0.5)
        return ray.get_runtime_context().get_node_id()

scheduler = Scheduler(Stub.remote, lambda: worker_count(1.0, 0.0), Policy(blames=1, start_attempts=1))
found, workers = [], []
for outcome in scheduler.run(range(40)):
    found.append([outcome.item, outcome.result, outcome.reason, outcome.attempts])
    workers.append(scheduler.workers)
    if len(found) == 6:
        nodes.remove_node(lost, allow_graceful=False)
        nodes.add_node(num_cpus=3)
print(json.dumps({"found": found, "workers": max(workers[10:])}))
"""


@pytest.mark.acceptance
@pytest.mark.timeout(240)
def test_a_lost_node_blames_no_item() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith('{"found"')))
    assert sorted(item for item, *_ in said["found"]) == list(range(40))
    assert [reason for _, _, reason, _ in said["found"]] == [None] * 40
    assert len({node for _, node, _, _ in said["found"]}) == 2
    # What one of its workers had may have gone to the other one before the loss was known.
    assert max(attempts for *_, attempts in said["found"]) in (2, 3), "what the lost node had ran again"
    assert said["workers"] == 3, "the new node's room is used"
