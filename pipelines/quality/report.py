"""Reports of the quality gate in the store: ``quality/GENERATION.json``, with a checksum, and a HTML page beside it.

The JSON has the page's size and digest, so that ``verify`` finds every changed byte of either.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.job.templates import rendered
from pipelines.quality.measure import Measure
from probelog import __version__
from probelog.storage import layout
from probelog.storage.encoding import digest
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version
from probelog.terminal import printable

REPORT_VERSION = 1
KEPT = 30


@dataclass(frozen=True)
class Verdict:
    """Result of the quality gate.

    Attributes:
        generation: name of the candidate.
        live: name of the generation that it was compared with; None without one.
        enforced: whether a failed measure prevents publishing.
        measures: in the order of the report.
        at: when (UTC, ISO 8601).
        seconds: that the measures took.
        note: about the whole.
    """

    generation: str
    live: str | None
    enforced: bool
    measures: Sequence[Measure]
    at: str
    seconds: float
    note: str = ""

    @property
    def failed(self) -> list[Measure]:
        """The measures that exceed their limits."""
        return [measure for measure in self.measures if not measure.passed]

    @property
    def passed(self) -> bool:
        """Whether all measures keep their limits."""
        return not self.failed

    @property
    def refused(self) -> bool:
        """Whether the candidate must not be published."""
        return self.enforced and not self.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": REPORT_VERSION,
            "made_by": MADE_BY,
            **{name: getattr(self, name) for name in ("generation", "live", "at", "seconds", "note")},
            **{name: getattr(self, name) for name in ("passed", "enforced", "refused")},
            "measures": [
                asdict(measure) | {"passed": measure.passed, "verdict": measure.verdict}
                for measure in self.measures
            ],
        }


def write_report(store: Store, verdict: Verdict) -> str:
    """Write a verdict's JSON and page, and remove all but the newest reports; returns the page's name in the store."""
    page = _page(verdict)
    page_name, name = (layout.report(verdict.generation, suffix) for suffix in ("html", "json"))
    # The page is written before the JSON and deleted after it, so that the page of every JSON exists.
    store.write(page_name, page)
    described = {"size": len(page), "sha256": digest(page)}
    store.write_json(name, verdict.to_dict() | {"page": described})
    for old in _newest_first(store)[KEPT:]:
        store.delete(old)
        store.delete(page_of(old))
    return page_name


def last_report(store: Store) -> dict[str, Any] | None:
    """The newest report's JSON; None where there is none.

    Raises:
        StoreError: it is damaged, or written by a newer ProbeLog.
    """
    names = _newest_first(store)
    content = store.read_json_or_none(names[0]) if names else None
    if content is not None:
        check_version(content, REPORT_VERSION, store.path(names[0]), "quality report")
    return content


def page_of(report: str) -> str:
    """Name of the page beside a report's JSON."""
    return report.removesuffix(".json") + ".html"


def _newest_first(store: Store) -> list[str]:
    long_ago = dt.datetime.min.replace(tzinfo=dt.UTC)
    names = store.names(layout.REPORTS, suffix=".json")
    return sorted(names, key=lambda name: (store.modified(name) or long_ago, name), reverse=True)


def _page(verdict: Verdict) -> bytes:
    filters = {"percent": _percent, "plain": lambda text: printable(text, 300)}
    return rendered(Path(__file__).parent / "report.html.j2", filters, verdict=verdict, version=__version__)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
