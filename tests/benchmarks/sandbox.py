"""What a fresh, confined process for every model costs, beside one process that goes on with the next model.

    uv run python -m tests.benchmarks.sandbox [--models 30] [--probes 100] [--hub FOLDER] [--json]

Both ways run in turn, model by model, on the same node's fork server: loading (with the start of a process, where there
is one), and the forward passes. Times are processor seconds of the server and all that it forked, so that other programs
on the machine disturb them little, and wall milliseconds of the start alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from probelog.encoders.torch_encoder import load_encoder
from probelog.probes.probe_set import make_probe_set
from probelog.sandbox.fork_server.client import ForkServer, Grant, Role
from probelog.sandbox.fork_server.confinement import Confinement
from probelog.sandbox.process import ModelProcess, PlanCache, fork_server
from probelog.sandbox.spec import ProcessSpec, downloads_folder
from probelog.storage.store import Store
from tests.benchmarks import probing_world
from tests.benchmarks.probing import ProcessorTime
from tests.conftest import BENCH


class Reused(ModelProcess):
    """As it was before: a process goes on with the next model."""

    def load(self, folder: Path, repo: str, sha: str, timeout: float) -> int:  # type: ignore[override]
        """Load into the process that is there."""
        if not self._model.running:
            self._model.start([str(folder.parent), f"{self._spec.probes}/probes"], self._spec.memory_bytes)
        answer, _ = self._ask(time.monotonic() + timeout, most=[1 << 24], command="load", folder=str(folder))
        self._kind, self._recipe = str(answer["kind"]), str(answer["facts"]["recipe"])
        self._digests = None
        return int(answer["facts"]["logits"])

    def release(self) -> None:
        """Keep it."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--probes", type=int, default=100, help="that each model sees")
    parser.add_argument("--hub", type=Path, default=BENCH / "hub", help="folder of models")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    models = [path.parent for path in sorted(given.hub.glob("*/*/config.json"))]
    models = models[:: max(1, len(models) // given.models)][: given.models]
    if not models:
        print(f"NOTHING was measured: there is no model in {given.hub}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="probelog-bench-") as name:
        root = Path(name)
        bench = BENCH / "probes" / "other-classes.parquet"
        if bench.exists():
            world = probing_world.tiny(root / "world", given.hub, bench, given.probes)
        else:
            world = probing_world.realistic(root / "world", None, 0, given.probes)
        store = Store(root / "store")
        probe_set = make_probe_set(
            str(world.parquet), given.probes, 0, store, load_encoder(str(world.encoder))
        )
        scratch = root / "scratch"
        server = fork_server(scratch, ())
        spec = ProcessSpec(
            probes=store.uri, probe_set=probe_set.hash, scratch=str(scratch), cache_bytes=10**9, batch_size=64,
            precision="float32", max_params=10**9, allow_pickle=False, memory_bytes=4 * 10**9,
        )  # fmt: skip
        kinds = {
            "fresh": ModelProcess(server, spec, PlanCache()),
            "reused": Reused(server, spec, PlanCache()),
        }
        folder = downloads_folder(scratch) / "model"
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for round_, model in enumerate([models[0], *models]):  # the first of all prepares the pixels
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(model, folder)
            for kind, process in kinds.items():
                with ProcessorTime(os.getpid(), without=None, folder=root) as used:
                    loaded = process.load(folder, model.name, "0" * 40, 300)
                    logits = loaded if isinstance(loaded, int) else int(loaded.facts["logits"])
                    process.prepare(range(given.probes), 300)
                    process.observe(range(given.probes), logits, 300)
                    process.release()
                    time.sleep(0.05)  # its end is part of the price
                if round_:
                    seconds[kind].append(used.seconds)
        starts = _starts(root / "starts")
        for process in kinds.values():
            process.close()
        server.close()
    found = {
        "models": len(models),
        "probes": given.probes,
        **{f"{kind}_seconds": round(sum(values), 2) for kind, values in seconds.items()},
        "price_ms_a_model": round(
            1000 * statistics.mean(a - b for a, b in zip(seconds["fresh"], seconds["reused"], strict=True)), 1
        ),
        **starts,
    }
    if given.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:24} {value}")
    return 0


def _starts(home: Path, rounds: int = 50) -> dict[str, float]:
    """Median wall milliseconds until a confined process has answered, with the libraries in memory."""
    from probelog.sandbox.process import _WARM_UP, LIBRARIES

    entry = "tests.support.hub.rogue:serve"
    roles = {"confined": Role(entry, Confinement(("/usr/lib", "/lib")))}
    server = ForkServer(roles, LIBRARIES, home, warm_up=_WARM_UP)
    times = []
    for round_ in range(rounds + 20):
        begun = time.perf_counter()
        child = server.fork("confined", Grant(memory_bytes=1 << 30))
        child.ask(60, most=[10], command="echo")
        if round_ >= 20:  # the server has warmed up
            times.append(time.perf_counter() - begun)
        child.forget()
    server.close()
    return {"start_ms": round(1000 * statistics.median(times), 1)}


if __name__ == "__main__":
    sys.exit(main())
