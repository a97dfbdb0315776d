"""What a run over models exports for Prometheus, through Ray (which puts ``ray_`` before every name).

One place, the driver: it hears of every item, those included that were given up with their worker. Counts are
gathered and handed to Ray once a second, so that an item costs next to nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from cluster.probing.results import ItemReport
from pipelines.probe.item_log import result_of

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "probelog_items_total": ("Models that are through, by result.", ("result",)),
    "probelog_logits_total": ("Logits of indexed classifiers.", ()),
    "probelog_samples_total": ("Samples of indexed generators.", ()),
    "probelog_copies_unchecked_total": ("Models run with no coordinator to tell copies.", ()),
    "probelog_download_bytes_total": ("Bytes downloaded.", ()),
    "probelog_hub_requests_total": ("Requests that workers sent to the Hub, by kind.", ("kind",)),
    "probelog_hub_throttled_total": ('Answers "too many requests" of the Hub.', ()),
    "probelog_hub_wait_seconds_total": ("Seconds that downloads waited for the Hub, over all threads.", ()),
    "probelog_seconds_total": ("Seconds that workers spent, by part of the work.", ("part",)),
}
GAUGES = {
    "probelog_items_left": "Models not through yet.",
    "probelog_workers": "Workers that can work.",
    "probelog_in_flight": "Models that workers have been given.",
    "probelog_models_per_hour": "Models an hour over the last ten minutes.",
    "probelog_eta_seconds": "Seconds until all models are through, by what they are expected to cost.",
}
HISTOGRAMS = {"probelog_item_seconds": ("Seconds a model.", [0.3, 1, 3, 10, 30, 100, 300, 1000, 3000])}


class Metrics:
    """The metrics of one run over models of one kind, whose results have rows of ``counted``."""

    def __init__(self, counted: str) -> None:
        from ray.util import metrics

        self._rows = f"probelog_{counted}_total"

        self._counters = {
            name: metrics.Counter(name, about, tag_keys=tags) for name, (about, tags) in COUNTERS.items()
        }
        self._gauges = {name: metrics.Gauge(name, about) for name, about in GAUGES.items()}
        self._histograms = {
            name: metrics.Histogram(name, about, boundaries=bounds)
            for name, (about, bounds) in HISTOGRAMS.items()
        }
        self._gathered: Counter[tuple[str, str]] = Counter()

    def add(self, report: ItemReport, seconds: float) -> None:
        """Count one model, on which a worker spent so many seconds."""
        gathered: Any = self._gathered
        gathered["probelog_items_total", result_of(report)] += 1
        gathered[self._rows, ""] += report.rows
        gathered["probelog_copies_unchecked_total", ""] += not report.copies_checked
        gathered["probelog_download_bytes_total", ""] += report.bytes
        gathered["probelog_hub_requests_total", "api"] += report.hub.api
        gathered["probelog_hub_requests_total", "file"] += report.hub.file
        gathered["probelog_hub_throttled_total", ""] += report.hub.throttled
        gathered["probelog_hub_wait_seconds_total", ""] += report.hub.wait_seconds
        for part, spent in report.seconds.items():
            gathered["probelog_seconds_total", part] += spent
        self._histograms["probelog_item_seconds"].observe(seconds)

    def publish(
        self,
        remaining: int,
        workers: int,
        in_flight: int,
        models_an_hour: float | None,
        eta_seconds: float | None,
    ) -> None:
        """Hand over what was gathered, and the state of the run. What is not known yet is left as it was."""
        for (name, tag), value in self._gathered.items():
            if value > 0:
                tags = dict(zip(COUNTERS[name][1], [tag], strict=False))
                self._counters[name].inc(value, tags=tags)
        self._gathered.clear()
        values: dict[str, float | None] = {
            "probelog_items_left": remaining,
            "probelog_workers": workers,
            "probelog_in_flight": in_flight,
            "probelog_models_per_hour": models_an_hour,
            "probelog_eta_seconds": eta_seconds,
        }
        for name, known in values.items():
            if known is not None:
                self._gauges[name].set(known)
