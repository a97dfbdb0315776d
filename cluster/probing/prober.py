"""The probing actor: downloads a classifier, has it run on its probes in a confined process, writes what was seen.

download --> load --> prepare probes --> forward --> write
(this process)  (a model process: no token, no network)  (this process)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.probing.coordinator import CoordinatorHandle
from cluster.probing.results import ItemReport
from cluster.probing.worker import (
    NODE_SHARE,
    PROCESS_SHARE,
    PROCESSES,
    Clock,
    Item,
    ItemWorker,
    Outcome,
    Workers,
    WorkerSpec,
    workers,
)
from cluster.runtime.scratch import local_probes
from probelog.hub.download import Downloaded
from probelog.kinds.registry import CLASSIFIER
from probelog.models.content import content_digest
from probelog.sandbox.fork_server.client import ForkServer
from probelog.sandbox.process import ModelProcess, PlanCache, fork_server
from probelog.sandbox.spec import ProcessSpec
from probelog.storage.encoding import short_key
from probelog.storage.ledger import ItemResult
from probelog.storage.schemas import ProbedModel
from probelog.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class ProberSpec(WorkerSpec):
    """What a probing actor needs to know.

    Attributes:
        probe_set: its hash.
        probes: how many it holds.
        fraction: of them that each model sees.
        seed: of each model's own ones.
    """

    probe_set: str
    probes: int
    fraction: float
    seed: int


class Prober(ItemWorker[ProberSpec, ModelProcess]):
    """Probes classifiers."""

    kind = CLASSIFIER

    def _processes(
        self, store: Store, scratch: Path, memory: int
    ) -> tuple[ForkServer, Sequence[ModelProcess]]:
        spec, settings = self._spec, self._settings
        server = fork_server(scratch, settings.preload, settings.device)
        process = ProcessSpec(
            probes=local_probes(store, spec.probe_set, scratch).uri,
            probe_set=spec.probe_set,
            scratch=str(scratch),
            cache_bytes=settings.cache_bytes,
            device=settings.device,
            device_share=min(1.0, settings.gpus_per_worker) * NODE_SHARE * PROCESS_SHARE,
            memory_bytes=memory,
            threads=max(1, int(settings.cpus_per_worker)),
            batch_size=settings.batch_size,
            precision=settings.precision,
            max_params=spec.max_params,
            allow_pickle=settings.allow_pickle,
        )
        learnt = PlanCache()
        return server, [ModelProcess(server, process, learnt=learnt) for _ in range(PROCESSES)]

    def _use(self, item: Item, downloaded: Downloaded, clock: Clock) -> Outcome:
        return self._in_process(lambda process: self._observe(process, item, downloaded, clock), clock)

    def _observe(self, process: ModelProcess, item: Item, downloaded: Downloaded, clock: Clock) -> Outcome:
        from probelog.probes.probe_set import subset
        from probelog.storage.observations import to_rows

        row, spec = item.row, self._spec
        with clock.part("load", counts=True):
            loaded = process.load(downloaded.folder, row.repo, row.sha, clock.remaining)
            # Its process may be the model's, and say that it is another one.
            identity = short_key(loaded.identity, content_digest(downloaded.folder, downloaded.digests))
        # As the worker sees it, like the other parts: with the start of the model's process.
        facts = loaded.facts | {"seconds_load": clock.seconds["load"], "identity": identity}
        size = downloaded.bytes
        with self._claimed(identity, item, clock) as claim:
            original = claim.original
            if original is not None and (copied := self._copy(original, row, facts, size)) is not None:
                process.release()
                return copied, self._report(facts, size, original.repo)
            chosen = subset(spec.probe_set, row.repo, row.sha, spec.seed, spec.fraction, spec.probes)
            with clock.part("preprocess", counts=True):
                process.prepare(chosen.tolist(), clock.remaining)
            with self._computes(process, clock), clock.part("forward", counts=True):
                seen = process.observe(chosen.tolist(), int(facts["logits"]), clock.remaining)
            process.release()
            model = ProbedModel(
                **facts,
                repo=row.repo,
                sha=row.sha,
                probes=chosen.tolist(),
                precision=seen.precision,
                batch_size=seen.batch_size,
                bytes=size,
                seconds_download=clock.seconds["download"],
                seconds_preprocess=clock.seconds["preprocess"],
                seconds_forward=clock.seconds["forward"],
            )
            rows = to_rows(row.repo, row.sha, seen.values)
        report = replace(self._report(facts, size, None), copies_checked=claim.answered)
        return ItemResult.success(model, rows, loaded.weights), report

    def _report(self, facts: dict[str, Any], size: int, copy_of: str | None) -> ItemReport:
        return ItemReport(
            bytes=size,
            parameters=int(facts["parameters"]),
            identity=str(facts["identity"]),
            copy_of=copy_of,
            worker=self._name,
        )


def probers(spec: ProberSpec, coordinator: CoordinatorHandle) -> Workers:
    """Probing actors that share a coordinator."""
    return workers(Prober, spec, coordinator)
