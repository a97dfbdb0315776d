"""The probing actor: downloads a model, loads it, runs it on its probes and writes what it saw."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray

from cluster.limiter import LimitActor, SharedLimiter
from probelog.errors import FailureReason, ItemFailure, UsageError
from probelog.ledger import Ledger, Spooled
from probelog.schemas import CatalogueRow, Failure, ProbedModel
from probelog.storage import Store

if TYPE_CHECKING:
    from PIL import Image


_STAGE = "probe"


@dataclass(frozen=True)
class ProberSpec:
    """What a probing actor needs to know. Small, and free of anything that does not survive a restart."""

    store: str
    folder: str
    probe_set: str
    fraction: float
    seed: int
    endpoint: str
    batch_size: int
    max_bytes: int
    max_params: int
    allow_pickle: bool
    cache_bytes: int
    scratch: str | None
    threads: int
    on_gpu: bool


class Item(Protocol):
    """One model to probe: its key in the ledger, its catalogue row, and which attempt this is."""

    @property
    def key(self) -> str: ...
    @property
    def row(self) -> CatalogueRow: ...
    @property
    def attempt(self) -> int: ...


class Prober:
    """Probes models one after the other; the next one downloads while this one computes.

    Two calls of ``run`` may be under way at once (``max_concurrency=2``): downloads overlap, a lock keeps loading
    and computing to one at a time.
    """

    def __init__(self, spec: ProberSpec, limiter: Any) -> None:
        import torch

        from probelog.forward_plan import Plans
        from probelog.pixel_cache import PixelCache
        from probelog.probes import ProbeSet

        torch.set_num_threads(spec.threads)
        # Full float32 on GPUs too: a logit must not depend on the kind of worker that happened to run its model.
        torch.backends.cudnn.allow_tf32 = False
        self._spec = spec
        self._limiter = SharedLimiter(limiter)
        self._ledger = Ledger(Store(spec.store), spec.folder)
        self._probes = ProbeSet.open(Store(spec.store), spec.probe_set)
        self._device = "cuda" if spec.on_gpu and torch.cuda.is_available() else "cpu"
        scratch = _scratch(spec.scratch)
        self._downloads = scratch / "downloads"
        _sweep(self._downloads)
        self._own = self._downloads / str(os.getpid())
        self._own.mkdir(parents=True, exist_ok=True)
        self._cache = PixelCache(
            scratch / "pixels", spec.cache_bytes, probe_set=self._probes.hash, count=self._probes.count
        )
        self._plans = Plans(batch_size=spec.batch_size)
        self._computing = threading.Lock()
        self._metrics = _Metrics()

    def ready(self) -> None:
        """Returns when the actor can work."""

    def run(self, item: Item) -> str | None:
        """Probe one model and spool its result; returns None, or the reason why it failed."""
        row = item.row
        reason: FailureReason | None = None
        detail = ""
        started = time.monotonic()
        try:
            result = self._probe(row)
        except ItemFailure as failure:
            reason, detail = failure.reason, failure.detail
        except MemoryError as error:
            reason, detail = FailureReason.OUT_OF_MEMORY, str(error) or "out of memory"
        except (
            Exception
        ) as error:  # a stranger's model can raise anything; it must cost its own row and no more
            reason, detail = FailureReason.INTERNAL, f"{type(error).__name__}: {error}"
        if reason is not None:
            result = Spooled.failure(Failure.of(row.repo, row.sha, _STAGE, reason, detail, item.attempt))
        self._ledger.spool(item.key, result)
        self._metrics.record(reason, time.monotonic() - started)
        return None if reason is None else reason.value

    def _probe(self, row: CatalogueRow) -> Spooled:
        from probelog.download import DownloadLimits, download_model
        from probelog.models import LoadLimits, load_classifier
        from probelog.observations import to_rows
        from probelog.observe import observe
        from probelog.probes import subset

        spec = self._spec
        folder = Path(tempfile.mkdtemp(dir=self._own))
        try:
            downloaded = download_model(
                row,
                folder,
                limits=DownloadLimits(max_bytes=spec.max_bytes),
                allow_pickle=spec.allow_pickle,
                limiter=self._limiter,
                endpoint=spec.endpoint,
            )
            with self._computing:
                begun = time.monotonic()
                classifier = load_classifier(
                    folder,
                    limits=LoadLimits(max_parameters=spec.max_params),
                    device=self._device,
                    allow_pickle=spec.allow_pickle,
                )
                loaded = time.monotonic()
                chosen = subset(
                    self._probes.hash, row.repo, row.sha, spec.seed, spec.fraction, self._probes.count
                )
                seen = observe(
                    classifier,
                    self._images,
                    chosen.tolist(),
                    plans=self._plans,
                    device=self._device,
                    cache=self._cache,
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        model = ProbedModel(
            repo=row.repo,
            sha=row.sha,
            logits=classifier.logits,
            head=classifier.head.value,
            labels=classifier.labels,
            probes=chosen.tolist(),
            library=classifier.library,
            architecture=classifier.architecture,
            parameters=classifier.parameters,
            recipe=classifier.recipe.to_json(),
            dtype=classifier.dtype,
            device=self._device,
            weight_digest=classifier.weight_digest,
            weight_mean=classifier.weight_mean,
            weight_std=classifier.weight_std,
            seconds_download=downloaded.seconds,
            seconds_load=loaded - begun,
            seconds_preprocess=seen.seconds_preprocess,
            seconds_forward=seen.seconds_forward,
            precision=seen.precision,
            batch_size=seen.batch_size,
        )
        return Spooled.success(model, to_rows(row.repo, row.sha, seen.values))

    def _images(self, indices: Sequence[int]) -> list[Image.Image]:
        return list(self._probes.images(indices))


@contextmanager
def probers(spec: ProberSpec, cpus: float, gpus: float) -> Iterator[Callable[[], Any]]:
    """A factory of probing actors that share one rate limiter for the Hub."""
    limiter = LimitActor.remote(spec.endpoint, bool(os.environ.get("HF_TOKEN")))
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=2)(
        Prober
    )
    try:
        yield lambda: actor.remote(spec, limiter)
    finally:
        ray.kill(limiter)


class _Metrics:
    """Counters that Ray exports for Prometheus."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        self._models = Counter("probelog_models", "Models that are through.", tag_keys=("result",))
        self._seconds = Histogram(
            "probelog_model_seconds", "Seconds a model.", boundaries=[1, 3, 10, 30, 100, 300, 1000]
        )

    def record(self, reason: FailureReason | None, seconds: float) -> None:
        """Count one model."""
        self._models.inc(1, tags={"result": "indexed" if reason is None else reason.value})
        self._seconds.observe(seconds)


def _scratch(folder: str | None) -> Path:
    """The node-local folder for downloads and preprocessed probes: this user's alone, on shared machines too.

    Raises:
        UsageError: it belongs to somebody else.
    """
    path = Path(folder) / "probelog" if folder else Path(tempfile.gettempdir(), f"probelog-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise UsageError(f"{path} belongs to another user: set `scratch` to a folder of your own")
    return path


def _sweep(downloads: Path) -> None:
    """Remove what workers left that are no longer alive."""
    if not downloads.is_dir():
        return
    for folder in downloads.iterdir():
        if folder.name.isdigit() and not Path("/proc", folder.name).exists():
            shutil.rmtree(folder, ignore_errors=True)
