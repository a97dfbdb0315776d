"""The scheduler and the order of work at the size of a hub: what the driver costs, and how idle workers are.

    python -m tests.benchmarks.scheduler [--items 100000] [--workers 200] [--mean-seconds 0.5] [--out FILE.csv]

First part, ``driver``. Real: the scheduler, Ray's task submission and answers, an actor call per item, two items in
flight per worker. Not real: the workers. A few actor processes hold all of them; each worker is a handle on a lane
of such a process, which sleeps for drawn times one item after the other, as a prober computes: half of the mean for
every item, and a lognormal part (sigma 1), in the order of the pipeline, which is by classes of a factor two, the
largest first. Workers' idle time is measured in the processes: between a lane's first item and the moment when the
driver's items ran out. The ideal wall time is the drawn seconds over the workers; the time that the workers take to
start is in the wall time too.

Second part, ``order``, computed without Ray: the wall time of the same workers over models of skewed sizes
(lognormal, sigma 1.5, and a second), given to whoever is free, largest first (the order of ``pipelines.probe.plan``: by classes of a factor two) and in random order.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_PROCESSES = 4
_SIGMA, _SIZE_SIGMA = 1.0, 1.5


def main() -> None:
    """Measure and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--items", type=int, default=100_000)
    arguments.add_argument("--workers", type=int, default=200)
    arguments.add_argument("--mean-seconds", type=float, default=0.5)
    arguments.add_argument("--out", type=Path, help="CSV to write")
    given = arguments.parse_args()
    figures = driver(given.items, given.workers, given.mean_seconds) + order(given.items, given.workers)
    sink = given.out.open("w", newline="") if given.out else sys.stdout
    writer = csv.writer(sink)
    writer.writerow(["part", "items", "workers", "mean seconds", "figure", "value"])
    for part, name, value in figures:
        row = [part, given.items, given.workers, given.mean_seconds if part == "driver" else "", name, value]
        writer.writerow(row)
        if given.out:
            print(f"{part:<7} {name:<44} {value}")


def driver(items: int, workers: int, mean: float) -> list[tuple[str, str, str]]:
    """Run the scheduler over stub workers."""
    import ray

    from cluster.probing.scheduler import Scheduler
    from cluster.runtime.session import session

    drawn_seconds = np.random.default_rng(0).lognormal(np.log(mean / 2) - _SIGMA**2 / 2, _SIGMA, items)
    seconds = mean / 2 + drawn_seconds[np.argsort(-np.floor(np.log2(drawn_seconds)), kind="stable")]
    with session("local", cpus=_PROCESSES):
        hosts = [_host().remote() for _ in range(_PROCESSES)]
        lanes = iter(range(10**9))

        def make() -> Any:
            number = next(lanes)
            return _Lane(hosts[number % _PROCESSES], number)

        ended = [0.0]

        def drawn() -> Iterator[float]:
            yield from seconds.tolist()
            ended[0] = time.time()

        scheduler: Scheduler[float] = Scheduler(make, workers, end_worker=lambda lane: None)
        ray.get([host.ready.remote(0) for host in hosts])
        memory: dict[str, float] = {}
        marks = {items // 10: "10 %", items // 2: "50 %", items: "100 %"}
        cpu, began = time.process_time(), time.time()
        for done, _ in enumerate(scheduler.run(drawn()), 1):
            if done in marks:
                memory[marks[done]] = _resident()
        cpu, wall = time.process_time() - cpu, time.time() - began
        idle = [share for host in hosts for share in ray.get(host.idle.remote(ended[0]))]
    ideal = float(seconds.sum()) / workers
    return [
        ("driver", "CPU of the driver, ms an item", f"{1000 * cpu / items:.3f}"),
        ("driver", "CPU of the driver, share of one core", f"{cpu / wall:.3f}"),
        ("driver", "items a second", f"{items / wall:.0f}"),
        *(("driver", f"resident memory at {mark}, MB", f"{size:.0f}") for mark, size in memory.items()),
        ("driver", "workers idle while items were left, share", f"{np.mean(idle):.4f}"),
        ("driver", "wall, s", f"{wall:.1f}"),
        ("driver", "ideal wall, s", f"{ideal:.1f}"),
        ("driver", "wall over ideal", f"{wall / ideal:.4f}"),
        ("driver", f"load of the machine's {os.cpu_count()} cores", f"{os.getloadavg()[1]:.1f}"),
    ]


def order(items: int, workers: int) -> list[tuple[str, str, str]]:
    """Wall time over the ideal for skewed sizes, by the order of work."""
    rng = np.random.default_rng(1)
    cost = 1.0 + rng.lognormal(2.0, _SIZE_SIGMA, items)
    classes = np.floor(np.log2(cost))
    orders = {
        "size classes, largest first": np.argsort(-classes, kind="stable"),
        "random": np.arange(items),
        "size classes, smallest first": np.argsort(classes, kind="stable"),
    }
    ideal = max(cost.sum() / workers, cost.max())
    return [
        ("order", f"wall over ideal, {name}", f"{_makespan(cost[chosen], workers) / ideal:.4f}")
        for name, chosen in orders.items()
    ]


def _makespan(costs: np.ndarray, workers: int) -> float:
    free = [0.0] * workers
    for cost in costs.tolist():
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


class _Method:
    """What ``actor.run`` is to the scheduler: something with ``remote``."""

    def __init__(self, method: Any, lane: int) -> None:
        self._method, self._lane = method, lane

    def remote(self, *arguments: Any) -> Any:
        return self._method.remote(self._lane, *arguments)


class _Lane:
    """A handle on one worker of a shared process."""

    def __init__(self, host: Any, number: int) -> None:
        self.ready, self.run = _Method(host.ready, number), _Method(host.run, number)


def _host() -> Any:
    import asyncio
    from collections import defaultdict

    import ray

    from cluster.probing.results import ItemReport

    class Host:
        """Many workers in one process: each sleeps through its items one after the other."""

        def __init__(self) -> None:
            self._locks: dict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
            self._busy: dict[int, list[tuple[float, float]]] = defaultdict(list)

        async def ready(self, lane: int) -> None:
            pass

        async def run(self, lane: int, seconds: float) -> ItemReport:
            async with self._locks[lane]:
                begun = time.time()
                await asyncio.sleep(seconds)
                self._busy[lane].append((begun, time.time()))
            return ItemReport(seconds={"forward": seconds, "download": 0.0}, rows=1000, parameters=1)

        async def idle(self, end: float) -> list[float]:
            """Share of each worker's time without an item, from its first one to the end of the items."""
            shares = []
            for spans in self._busy.values():
                whole = end - spans[0][0]
                busy = sum(min(until, end) - since for since, until in spans if since < end)
                shares.append(1 - busy / whole)
            return shares

    return ray.remote(num_cpus=0, max_concurrency=1000)(Host)


def _resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
