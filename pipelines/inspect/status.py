"""What a store holds and what is left to do, read from receipts and their sums: safe beside a running job."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.inspect.failures import examples
from pipelines.job.eta import duration
from pipelines.probe.summary import Summary
from pipelines.quality.report import last_report
from pipelines.trees.record import read_trees
from probelog.errors import UsageError
from probelog.index.pointer import Pointer
from probelog.storage import layout
from probelog.storage.ledger import LEDGER_VERSION, SAMPLED, Counts, Ledger
from probelog.storage.parquet_parts import count_rows
from probelog.storage.store import Store
from probelog.storage.versions import check_version
from probelog.terminal import printable

_EXAMPLES = 3
_EXAMPLE_TEXT = 100
# A driver writes every ten seconds; one that has been silent for so long is gone, and its estimate with it.
_STALE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """One ledger, of whatever kind of model.

    ``left`` counts planned models without a sealed or spooled result. ``eta_seconds`` is the running driver's
    estimate; without one, what is left at the rate of the last hour of work. ``seconds_a_model`` is by part:
    ``weights`` is included in ``load`` and ``sketch`` in ``weights``. ``copies`` are models that share another
    one's results. ``examples`` are models that failed for the most frequent reasons: ``repo``, ``sha`` and
    ``detail`` by reason.
    """

    key: str
    seed: int
    planned: int
    indexed: int
    failed: dict[str, int]
    unsealed: int
    left: int
    models_an_hour: float | None
    seconds_a_model: dict[str, float]
    copies: int
    bytes: int
    eta_seconds: float | None
    running: bool
    examples: dict[str, dict[str, str]]

    def lines(self, stage: str, rows: str, settings: str, store: str) -> Iterator[str]:
        """The same for a person."""
        yield (
            f"{stage:11}{self.key}  {self.indexed:,} of {self.planned:,} models indexed, "
            f"{sum(self.failed.values()):,} failed, {self.left:,} left"
            + (f", {self.unsealed:,} not yet sealed" if self.unsealed else "")
            + (f", {self.models_an_hour:,.0f} models an hour" if self.models_an_hour else "")
            + (f", {duration(self.eta_seconds)} to go" if self.eta_seconds else "")
            + f"  ({settings}, seed {self.seed})"
        )
        if self.indexed:
            yield f"             {self.copies:,} of them copies, {rows}, {self.bytes / 1e9:,.1f} GB downloaded"
        for reason, count in self.failed.items():
            yield f"             {count:6,}  {reason}{_example_line(self.examples.get(reason))}"
        if self.failed:
            yield f"             all, and what to do: probelog-index failures --store {shlex.quote(store)}"
        if self.seconds_a_model:
            parts = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds_a_model.items())
            yield f"             seconds a model: {parts}"


@dataclass(frozen=True, kw_only=True)
class LedgerStatus(_Progress):
    """One ledger of observations."""

    probe_set: str
    fraction: float
    logits: int


@dataclass(frozen=True, kw_only=True)
class SamplesStatus(_Progress):
    """One ledger of what generators made.

    ``encoder`` is the digest of the one that embedded it, ``samples`` the number of all samples.
    """

    encoder: str
    steps: int
    samples: int


@dataclass(frozen=True)
class Status:
    """Everything that a store holds."""

    store: str
    catalogues: list[dict[str, Any]]
    probe_sets: list[dict[str, Any]]
    ledgers: list[LedgerStatus]
    completions: list[dict[str, Any]]
    trees: list[dict[str, Any]]
    index: dict[str, Any] | None
    quality: dict[str, Any] | None
    samplings: list[SamplesStatus]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The same for a person."""
        lines = [f"store {self.store}"]
        for item in self.catalogues:
            state = f"finished {item['finished']}" if item.get("finished") else "unfinished"
            lines.append(
                f"crawl      {item['key']}  {item['rows']:,} models{' of ' + item['of'] if item['of'] else ''}, "
                f"{item['failures']:,} unreadable rows, {state}"
            )
        lines += [f"probes     {item['hash'][:16]}  {item['count']:,} images" for item in self.probe_sets]
        for ledger in self.ledgers:
            settings = f"probe set {ledger.probe_set[:16]}, fraction {ledger.fraction:g}"
            lines += ledger.lines("probe", f"{ledger.logits:,} logits", settings, self.store)
        for samples in self.samplings:
            settings = f"encoder {samples.encoder[:16]}, {samples.steps} steps"
            lines += samples.lines("sample", f"{samples.samples:,} samples", settings, self.store)
        lines += [
            f"complete   {item['key']}  {item['logits']:,} logits, rank {item['rank']}, "
            f"held-out RMSE {item['rmse']:.3f}"
            for item in self.completions
        ]
        lines += [f"trees      {item['key']}  {_trees_line(item)}" for item in self.trees]
        if self.index is None:
            lines.append("index      none published yet")
        else:
            lines.append(
                f"index      generation {self.index['generation']}, published {self.index['published']}, "
                + (f"an update of {self.index['base']}, " if self.index["base"] else "")
                + f"{len(self.index['previous'])} earlier ones kept"
            )
            if held := self.index["held"]:
                lines.append(
                    f"             held since {held['since']}: {held['reason']}; publishing goes on after: "
                    f"probelog-index release --store {shlex.quote(self.store)}"
                )
        if self.quality is not None:
            lines.append(
                f"quality    generation {self.quality['generation']} "
                + (
                    "was refused"
                    if self.quality["refused"]
                    else "passed"
                    if self.quality["passed"]
                    else "was let through"
                )
                + (f" ({', '.join(self.quality['failed'])})" if self.quality["failed"] else "")
                + f", {self.quality['at']}, report {self.quality['page']}"
            )
        return lines


def status(uri: str) -> Status:
    """Read a store's state.

    Raises:
        UsageError: there is no ProbeLog store at this address.
    """
    store = Store(uri)
    result = Status(
        store=store.uri,
        catalogues=_catalogues(store),
        probe_sets=[
            {"hash": content["hash"], "count": content["count"]}
            for _, content in store.records(layout.PROBE_SETS, layout.MANIFEST)
        ],
        ledgers=[
            _ledger(Ledger(store, folder), content)
            for folder, content in store.records(layout.LEDGERS, layout.MANIFEST)
        ],
        completions=[
            {"key": layout.CompletionFolder(folder).key}
            | {
                key: content[key]
                for key in ("logits", "models", "rank", "regularisation", "rmse", "top_rmse")
            }
            for folder, content in store.records(layout.COMPLETIONS, layout.RECEIPT)
        ],
        trees=_trees(store),
        index=_index(store),
        quality=_quality(store),
        samplings=[
            _samples(Ledger(store, folder, SAMPLED), content)
            for folder, content in store.records(layout.SAMPLES, layout.MANIFEST)
        ],
    )
    held = (result.catalogues, result.probe_sets, result.ledgers, result.samplings, result.trees)
    if not (any(held) or result.index):
        raise UsageError(f"{store.uri} is not a ProbeLog store: check the address")
    return result


def _catalogues(store: Store) -> list[dict[str, Any]]:
    catalogues: dict[str, dict[str, Any]] = {}
    for last in (layout.PROGRESS, layout.RECEIPT):
        for folder, content in store.records(layout.CATALOGUES, last):
            finished = content["finished"] if last == layout.RECEIPT else None
            key = layout.CatalogueFolder(folder).key
            catalogues[key] = {
                "key": key,
                "rows": count_rows(content["rows"]),
                "failures": count_rows(content["failures"]),
                "finished": finished,
                "of": content.get("of"),
            }
    return list(catalogues.values())


def _ledger(ledger: Ledger, content: dict[str, Any]) -> LedgerStatus:
    progress, counts = _progress(ledger, content)
    return LedgerStatus(
        **progress, probe_set=content["probe_set"], fraction=content["fraction"], logits=counts.logits
    )


def _samples(ledger: Ledger, content: dict[str, Any]) -> SamplesStatus:
    progress, counts = _progress(ledger, content)
    return SamplesStatus(
        **progress, encoder=content["encoder"], steps=content["steps"], samples=counts.logits
    )


def _progress(ledger: Ledger, content: dict[str, Any]) -> tuple[dict[str, Any], Counts]:
    """What ledgers of every kind have, and the sums of this one."""
    check_version(content, LEDGER_VERSION, ledger.store.path(ledger.paths.manifest), "ledger")
    summary, fresh = Summary.read(ledger)
    counts, running = summary.counts, summary.running
    failed = counts.failures
    unsealed = len(ledger.spooled() - {item for receipt in fresh for item in receipt.items})
    remaining = max(0, content["planned"] - counts.indexed - sum(failed.values()) - unsealed)
    if running is not None and time.time() - running.at > _STALE_SECONDS:
        running = None
    rate, eta = summary.models_an_hour, None
    if running is not None:
        rate, eta = running.models_an_hour or rate, running.eta_seconds
    if eta is None and remaining and rate:
        eta = remaining / rate * 3600
    progress = {
        "key": ledger.paths.key,
        "seed": content["seed"],
        "planned": content["planned"],
        "indexed": counts.indexed,
        "failed": failed,
        "unsealed": unsealed,
        "left": remaining,
        "models_an_hour": rate,
        "seconds_a_model": {
            part: counts.seconds.get(part, 0.0) / counts.indexed for part in ledger.contents.phases
        }
        if counts.indexed
        else {},
        "copies": counts.copies,
        "bytes": counts.bytes,
        "eta_seconds": eta,
        "running": running is not None,
        "examples": {
            reason: {"repo": item.repo, "sha": item.sha, "detail": item.detail}
            for reason, item in examples(ledger, summary, list(failed)[:_EXAMPLES]).items()
        },
    }
    return progress, counts


def _example_line(item: dict[str, str] | None) -> str:
    return "" if item is None else f", for example {item['repo']}: {printable(item['detail'], _EXAMPLE_TEXT)}"


def _trees(store: Store) -> list[dict[str, Any]]:
    """Finished and unfinished recoveries of model trees."""
    found: list[dict[str, Any]] = []
    for path in store.folders(layout.TREES):
        folder = layout.TreesFolder(path)
        done = read_trees(store, folder.key)
        if done is not None:
            found.append(
                {
                    "key": folder.key,
                    "models": done.models.rows,
                    "families": done.families,
                    "edges": done.edges.rows,
                    "failed": done.failed,
                    "finished": True,
                }
            )
        elif batches := len(store.names(folder.batches, suffix=".json")):
            found.append({"key": folder.key, "batches": batches, "finished": False})
    return found


def _trees_line(item: dict[str, Any]) -> str:
    if not item["finished"]:
        return f"unfinished, {item['batches']:,} batches of families done"
    failed = sum(item["failed"].values())
    return f"{item['edges']:,} edges between {item['models']:,} models of {item['families']:,} families" + (
        f", {failed:,} families failed" if failed else ""
    )


def _index(store: Store) -> dict[str, Any] | None:
    index = store.child(layout.INDEX)
    data = index.read_or_none(layout.POINTER)
    return None if data is None else asdict(Pointer.from_bytes(data, index.path(layout.POINTER)))


def _quality(store: Store) -> dict[str, Any] | None:
    """The quality gate's last verdict."""
    content = last_report(store)
    if content is None:
        return None
    return {name: content[name] for name in ("generation", "live", "at", "passed", "enforced", "refused")} | {
        "failed": [measure["name"] for measure in content["measures"] if not measure["passed"]],
        "page": layout.report(content["generation"], "html"),
    }
