"""What the Hub added and removed since the base: what earlier runs recorded, the listing and the whole Hub put together."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly.changes import HubChanges, list_changes, reconcile_changes, save_changes
from pipelines.nightly.record import NightlyFiles, NightlyRecord
from pipelines.nightly.start import FailedVersions, NightlyStart
from pipelines.publish.release import LiveIndex
from probelog.index.generation import Generation
from probelog.storage.ledger import item_key, key_numbers
from probelog.storage.schemas import CatalogueRow
from probelog.storage.store import Store
from tests.support.hub.live_hub import BEGINNING, LiveHub, live_hub
from tests.support.worlds.small_index import Model, SmallIndex, build

HELD = (Model("owner/a", ("x", "y")), Model("owner/b", ("x", "y")), Model("owner/c", ("x",), head="single"))
LISTED = BEGINNING + dt.timedelta(days=10)


def at(hours: float) -> str:
    return (BEGINNING + dt.timedelta(hours=hours)).isoformat()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    settings = {"watermark": at(3), "listed": LISTED.isoformat()}
    return build(
        Store(tmp_path_factory.mktemp("changes")), "base", HELD, "clip", images=False, settings=settings
    )


class Run:
    """A nightly run's start over an index of three models, whose Hub has them at their commits an hour apart."""

    def __init__(self, index: SmallIndex, hub: LiveHub, folder: Path) -> None:
        self.hub = hub
        base = Generation(index.store, index.pointer)
        for number, model in enumerate(HELD):
            hub.put(model.repo, number, sha=model.sha)
        self.files = NightlyFiles(Store(folder), "key", "base")
        self.start = NightlyStart(
            live=LiveIndex(index.pointer, base),
            base=base,
            completion=cast("Any", None),
            probe_set=cast("Any", None),
            files=self.files,
            failed=FailedVersions(np.empty(0, np.uint64)),
            endpoint=hub.endpoint,
            at=LISTED.isoformat(),
        )
        nightly = {"overlap_hours": 0.0, "reconcile_days": 7.0}
        content = {"store": str(folder), "probes": "unused", "nightly": nightly}
        self.output = io.StringIO()
        self.job = Job.of(Config.model_validate(content), Report(self.output))

    def reconciled(self, changes: HubChanges, days: float) -> HubChanges:
        """As a run so many days after the listing of the base."""
        later = replace(self.start, at=(LISTED + dt.timedelta(days=days)).isoformat())
        return reconcile_changes(self.job, later, changes)


@pytest.fixture
def run(index: SmallIndex, tmp_path: Path) -> Iterator[Run]:
    with live_hub(tmp_path / "hub", 1) as hub:
        made = Run(index, hub, tmp_path / "store")
        hub.remove("owner/model-0")
        yield made


def test_the_first_run_looks_from_where_the_base_ended(run: Run) -> None:
    assert list_changes(run.job, run.start) == HubChanges(
        NightlyRecord("base", at(3), LISTED.isoformat()), {}
    )
    run.hub.put("owner/early", 2.5)
    run.hub.put("owner/late", 4)
    sha = run.hub.put("owner/b", 5)
    result = list_changes(run.job, run.start)
    assert result.record == NightlyRecord("base", at(5), LISTED.isoformat())
    assert {repo: row.sha for repo, row in result.rows.items()} == {
        "owner/b": sha,
        "owner/late": run.hub.state()["owner/late"],
    }
    assert {row.repo for row in result.to_index} == set(result.rows)


def test_what_the_last_full_run_could_not_index_is_not_tried_again(run: Run) -> None:
    sha = run.hub.put("owner/broken", 4)
    failed = FailedVersions(key_numbers([item_key("owner/broken", sha)]))
    assert list_changes(run.job, replace(run.start, failed=failed)).rows == {}
    run.hub.put("owner/broken", 5)
    assert [*list_changes(run.job, replace(run.start, failed=failed)).rows] == ["owner/broken"]


def test_a_later_run_adds_to_what_was_recorded(run: Run) -> None:
    removed = {
        f"owner/{name}": {"reason": "removed", "detail": ""}
        for name in ("again", "gated", "disabled", "never")
    }
    earlier = [CatalogueRow("owner/kept", "1"), CatalogueRow("owner/changed", "1"), CatalogueRow("owner/never", "1")]  # fmt: skip
    run.files.write(NightlyRecord("base", at(6), at(1), removed=removed), earlier)
    run.hub.put("owner/before", 5)  # below the record's watermark, not the base's
    changed = run.hub.put("owner/changed", 7)
    run.hub.put("owner/again", 8)
    run.hub.put("owner/gated", 9, gated="auto")
    run.hub.put("owner/disabled", 10, disabled=True)
    result = list_changes(run.job, run.start)
    assert (result.record.watermark, result.record.reconciled) == (at(10), at(1))
    assert {
        repo: row.sha for repo, row in result.rows.items() if repo in ("owner/kept", "owner/changed")
    } == {
        "owner/kept": "1",
        "owner/changed": changed,
    }
    assert set(result.rows) == {f"owner/{name}" for name in ("kept", "changed", "never", "again", "gated", "disabled")}  # fmt: skip
    assert set(result.record.removed) == {"owner/gated", "owner/disabled", "owner/never"}
    assert {row.repo for row in result.to_index} == {"owner/kept", "owner/changed", "owner/again"}


def test_the_whole_hub_is_read_when_that_is_due(run: Run) -> None:
    changes = list_changes(run.job, run.start)
    requests = len(run.hub.faults.requests)
    assert run.reconciled(changes, 6.99) is changes
    assert len(run.hub.faults.requests) == requests
    due = run.reconciled(changes, 7)
    assert len(run.hub.faults.requests) > requests
    when = (LISTED + dt.timedelta(days=7)).isoformat()
    assert due == HubChanges(replace(changes.record, reconciled=when), {})


def test_what_the_whole_hub_tells_replaces_what_was_recorded(run: Run) -> None:
    listed = run.hub.put("owner/new", 4)
    changes = list_changes(run.job, run.start)
    assert [*changes.rows] == ["owner/new"]
    stale = replace(changes.record, removed={"owner/x": {"reason": "removed", "detail": ""}})
    run.hub.remove("owner/a")
    moved = run.hub.put("owner/b", 1)  # a commit with an old time: the listing by time does not tell
    missed = run.hub.put("owner/public-now", 0)
    result = run.reconciled(replace(changes, record=stale), 8)
    assert {repo: row.sha for repo, row in result.rows.items()} == {
        "owner/new": listed,
        "owner/b": moved,
        "owner/public-now": missed,
    }
    assert {repo: facts["reason"] for repo, facts in result.record.removed.items()} == {"owner/a": "removed"}
    assert "removed or made private" in result.record.removed["owner/a"]["detail"]


def test_a_row_that_was_recorded_and_left_is_removed_too(run: Run) -> None:
    run.hub.put("owner/new", 4)
    sha = run.hub.put("owner/c", 5)
    changes = list_changes(run.job, run.start)
    run.hub.remove("owner/new")
    result = run.reconciled(changes, 8)
    assert set(result.record.removed) == {"owner/new"}
    assert {repo: row.sha for repo, row in result.rows.items()}["owner/c"] == sha
    assert [row.repo for row in result.to_index] == ["owner/c"]


def test_what_the_base_holds_at_the_same_commit_is_not_recorded(run: Run) -> None:
    indexed = {model.repo: model.sha for model in HELD}
    rows = [
        CatalogueRow("owner/a", indexed["owner/a"]),
        CatalogueRow("owner/b", "other"),
        CatalogueRow("owner/new", indexed["owner/a"]),
    ]
    record = NightlyRecord("base", at(6), at(1))
    saved = save_changes(run.job, run.start, HubChanges(record, {row.repo: row for row in rows}))
    assert set(saved.rows) == {"owner/b", "owner/new"}
    assert saved.record == run.files.read()
    assert run.files.rows(saved.record) == rows[1:]
    assert "2 commits that the index of 2025-01-11 does not hold\n" in run.output.getvalue()
    removed = {"owner/c": {"reason": "removed", "detail": ""}}
    save_changes(run.job, run.start, HubChanges(replace(saved.record, removed=removed), saved.rows))
    assert "1 repositories to remove from it" in run.output.getvalue()
