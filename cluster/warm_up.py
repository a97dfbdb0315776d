"""Model libraries imported before anybody needs them: some seconds a node, while a job still lists and prepares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.scheduler import kill
from cluster.scratch import scratch_folder


class _WarmNode:
    """An actor's state: somebody who needs a node's fork server, so that it is started and does not leave."""

    def __init__(self, scratch: str | None, preload: Sequence[str]) -> None:
        from probelog.errors import ProbeLogError
        from probelog.fork_server import ForkServer
        from probelog.model_process import LIBRARIES, SERVER, home_folder

        self._server: ForkServer | None = None
        # What keeps it from starting is for the probing actors to tell.
        with contextlib.suppress(ProbeLogError, OSError):
            self._server = ForkServer(SERVER, [*LIBRARIES, *preload], home_folder(scratch_folder(scratch)))


@contextlib.contextmanager
def libraries_at_hand(scratch: Path | None, preload: Sequence[str] = ()) -> Iterator[None]:
    """Have the fork servers of all present nodes with CPUs or GPUs start now, and stay for as long as the block runs.

    Returns at once. Nodes that come later start theirs with their first worker.

    Args:
        scratch: as the probing actors are given it (`cluster.prober.ProberSpec`).
        preload: likewise.
    """
    folder = None if scratch is None else str(scratch)
    actor = ray.remote(num_cpus=0, max_restarts=0)(_WarmNode)
    started = [
        actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            folder, list(preload)
        )
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(kind, 0) > 0 for kind in ("CPU", "GPU"))
    ]
    try:
        yield
    finally:
        for one in started:
            kill(one)
