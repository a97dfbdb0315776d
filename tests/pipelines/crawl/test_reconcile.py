"""An index compared with a Hub from which things were taken away."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.model import Config
from pipelines.crawl import reconcile as reconciliation
from pipelines.crawl.reconcile import Reconciliation, RemovalReason, TooManyRemovedError, reconcile
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog.hub.client import HubError, Retry
from probelog.hub.listing import iter_pages
from tests.support.hub import faults
from tests.support.hub.live_hub import LiveHub, live_hub

FAST = Retry(attempts=2, first_wait=0.01, longest_wait=0.02, read_timeout=2.0)
MODELS = 30


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LiveHub]:
    with live_hub(tmp_path / "hub", MODELS) as running:
        yield running


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of-a-test")


def compare(hub: LiveHub, tmp_path: Path, indexed: dict[str, str], **settings: Any) -> Reconciliation:
    content = {"store": str(tmp_path / "store"), "probes": "unused", **settings}
    job = Job.of(Config.model_validate(content), Report(io.StringIO()))
    return reconcile(job, hub.endpoint, indexed.items(), retry=FAST)


def reasons(result: Reconciliation) -> dict[str, RemovalReason]:
    return {repo.removeprefix("owner/"): removal.reason for repo, removal in result.removed.items()}


def test_nothing_changed(hub: LiveHub, tmp_path: Path) -> None:
    assert compare(hub, tmp_path, hub.state()) == Reconciliation()
    assert not hub.faults.asked("/api/models/")
    (page,) = hub.faults.asked("/api/models?")
    assert "expand=sha" in page.address
    assert "expand=config" not in page.address, "only what the filters look at"


def test_only_pages_with_something_new_are_read_as_a_whole(
    hub: LiveHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = hub.state()
    hub.put("owner/model-3", 100, tags=["timm", "of-3"])
    hub.put("owner/added", -1, tags=["timm", "added"])
    hub.put("owner/not-ours", 5, library="keras")
    monkeypatch.setattr(reconciliation, "iter_pages", partial(iter_pages, page_size=8))
    found = compare(hub, tmp_path, indexed)
    assert [(row.repo, row.tags[-1]) for row in found.changed] == [("owner/model-3", "of-3")]
    assert [(row.repo, row.tags[-1]) for row in found.missed] == [("owner/added", "added")]
    whole = ["expand=config" in request.address for request in hub.faults.asked("/api/models?")]
    assert whole == [False, True, False, False, False, True]


def test_every_reason_for_removal(hub: LiveHub, tmp_path: Path) -> None:
    indexed = hub.state()
    hub.remove("owner/model-0")
    hub.rename("owner/model-1", "other/renamed")
    hub.set("owner/model-2", private=True)
    hub.set("owner/model-3", gated="auto")
    hub.set("owner/model-4", disabled=True)
    hub.set("owner/model-5", pipeline_tag="text-generation")
    hub.put("owner/model-6", 100)
    hub.put("owner/added", 0)
    found = compare(hub, tmp_path, indexed)
    assert reasons(found) == {
        "model-0": RemovalReason.REMOVED,
        "model-1": RemovalReason.RENAMED,
        "model-2": RemovalReason.REMOVED,
        "model-3": RemovalReason.GATED,
        "model-4": RemovalReason.DISABLED,
        "model-5": RemovalReason.FILTERED,
    }
    assert found.renamed == {"owner/model-1": "other/renamed"}
    assert "text-generation" in found.removed["owner/model-5"].detail
    assert [(row.repo, row.sha) for row in found.changed] == [("owner/model-6", hub.state()["owner/model-6"])]
    assert sorted(row.repo for row in found.missed) == ["other/renamed", "owner/added"]
    assert found.unconfirmed == {}
    # Whoever is there and open is not asked for.
    assert len(hub.faults.asked("/api/models/owner/")) == 6
    assert not hub.faults.asked("/resolve/"), "without a token no gated one opens"


def test_known_repositories_are_not_missed_again(hub: LiveHub, tmp_path: Path) -> None:
    indexed = hub.state()
    failed = hub.put("owner/failed", 0)
    content = {"store": str(tmp_path / "store"), "probes": "unused"}
    job = Job.of(Config.model_validate(content), Report(io.StringIO()))
    known = {("owner/failed", failed)}
    assert reconcile(job, hub.endpoint, indexed.items(), known, retry=FAST) == Reconciliation()


def test_of_a_repository_that_is_listed_twice_the_first_row_counts(hub: LiveHub, tmp_path: Path) -> None:
    """It changed during the listing: the first is the newer."""
    indexed = hub.state()
    newer = {name: hub.put(name, 100) for name in ("owner/model-6", "owner/added")}

    def twice(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*rows, *({**row, "sha": "0" * 40} for row in rows if row["id"] in newer)]

    hub.faults.spoil("/api/models?", faults.rows(twice))
    found = compare(hub, tmp_path, indexed)
    assert [(row.repo, row.sha) for row in found.changed] == [("owner/model-6", newer["owner/model-6"])]
    assert [(row.repo, row.sha) for row in found.missed] == [("owner/added", newer["owner/added"])]


def test_a_renamed_repository_whose_old_name_lives_on_is_a_changed_one(hub: LiveHub, tmp_path: Path) -> None:
    indexed = hub.state()
    hub.rename("owner/model-1", "owner/moved")
    hub.put("owner/model-1", 3)
    found = compare(hub, tmp_path, indexed)
    assert found.removed == {}
    assert [row.repo for row in found.changed] == ["owner/model-1"]
    assert [row.repo for row in found.missed] == ["owner/moved"]


def test_a_gated_repository_stays_if_the_token_opens_it(hub: LiveHub, tmp_path: Path, token: None) -> None:
    indexed = hub.state()
    for number in range(4):
        hub.set(f"owner/model-{number}", gated="manual")
    hub.faults.spoil("/owner/model-0/resolve/", faults.answer(200, body=b"{}"))
    hub.faults.spoil("/owner/model-1/resolve/", faults.answer(404, {"x-error-code": "EntryNotFound"}))
    hub.faults.spoil("/owner/model-2/resolve/", faults.answer(503))
    found = compare(hub, tmp_path, indexed)
    assert reasons(found) == {"model-3": RemovalReason.GATED}
    assert [*found.unconfirmed] == ["owner/model-2"]
    assert "503" in found.unconfirmed["owner/model-2"]
    assert {request.headers["authorization"] for request in hub.faults.requests} == {"Bearer hf_of-a-test"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (faults.answer(500), "answered 500"),
        (faults.slow(30.0, 10), "did not answer in time"),
        (faults.cut(20), "broke off"),
        (faults.answer(401, {"x-error-message": "Invalid credentials in Authorization header"}), "HF_TOKEN"),
        (faults.answer(403), "403"),
        (faults.answer(307, {"location": "https://elsewhere.example/api/models/x"}), "elsewhere"),
        (faults.answer(200, body=b"[]"), "in place of a model"),
        (faults.answer(200, body=b'{"id": "../x", "sha": "1"}'), "repository's id"),
        (faults.answer(200, body=b"<html>"), "broken JSON"),
    ],
)
def test_what_cannot_be_confirmed_stays(hub: LiveHub, tmp_path: Path, fault: faults.Fault, said: str) -> None:
    indexed = hub.state()
    hub.remove("owner/model-0")
    without = faults.rows(lambda rows: [row for row in rows if row["id"] != "owner/model-1"])
    hub.faults.spoil("/api/models?", without)
    hub.faults.spoil("/api/models/owner/model-1?", fault)
    found = compare(hub, tmp_path, indexed)
    assert reasons(found) == {"model-0": RemovalReason.REMOVED}
    assert list(found.unconfirmed) == ["owner/model-1"]
    assert said in found.unconfirmed["owner/model-1"]


def test_an_incomplete_listing_removes_no_repository(hub: LiveHub, tmp_path: Path) -> None:
    """Rows that are hostile, or missing, of repositories that are there."""
    indexed = hub.state()
    hub.faults.spoil(
        "/api/models?", faults.rows(lambda rows: [None, {"id": "owner/model-0", "sha": 3}, 7, *rows[:5]])
    )
    found = compare(hub, tmp_path, indexed)
    assert found == Reconciliation()
    assert len(hub.faults.asked("/api/models/owner/")) == MODELS - 5


def test_a_listing_that_breaks_off_is_no_comparison(hub: LiveHub, tmp_path: Path) -> None:
    hub.faults.spoil("/api/models?", faults.answer(500))
    with pytest.raises(HubError):
        compare(hub, tmp_path, hub.state())


def test_too_many_removals_are_refused(hub: LiveHub, tmp_path: Path) -> None:
    indexed = hub.state()
    hub.remove(*[f"owner/model-{number}" for number in range(9)])
    assert len(compare(hub, tmp_path, indexed).removed) == 9  # fewer than ten may always go
    hub.remove("owner/model-9")
    with pytest.raises(
        TooManyRemovedError, match=r"10 of 30 .*removed 10.*nightly.max_removed_share"
    ) as caught:
        compare(hub, tmp_path, indexed)
    assert caught.value.exit_status == 1
    found = compare(hub, tmp_path, indexed, nightly={"max_removed_share": 0.4})
    assert len(found.removed) == 10


def test_a_wrong_hub_is_noticed_before_everything_was_asked_for(hub: LiveHub, tmp_path: Path) -> None:
    indexed = {f"someone/else-{number}": f"{number:040x}" for number in range(1000)}
    with pytest.raises(TooManyRemovedError, match="or more"):
        compare(hub, tmp_path, indexed)
    assert len(hub.faults.asked("/api/models/")) < 400


def test_a_hub_that_stops_answering_is_not_asked_a_thousand_times(hub: LiveHub, tmp_path: Path) -> None:
    indexed = {f"someone/else-{number}": f"{number:040x}" for number in range(1000)}
    hub.faults.spoil("/api/models/someone", faults.answer(500))
    found = compare(hub, tmp_path, indexed)
    assert found.removed == {}
    assert len(found.unconfirmed) == 1000
    assert len(hub.faults.asked("/api/models/someone")) == 64 * FAST.attempts


def test_with_a_limit_older_ones_stay(hub: LiveHub, tmp_path: Path) -> None:
    indexed = hub.state()
    hub.remove("owner/model-2")
    found = compare(hub, tmp_path, indexed, filters={"limit": 3})
    assert reasons(found) == {"model-2": RemovalReason.REMOVED}


def test_of_an_explicit_list_the_names_count(hub: LiveHub, tmp_path: Path) -> None:
    indexed = {f"owner/model-{number}": sha for number, sha in enumerate(hub.state().values()) if number < 6}
    (tmp_path / "list.txt").write_text("".join(f"owner/model-{number}\n" for number in range(1, 6)))
    hub.rename("owner/model-1", "owner/moved")
    hub.remove("owner/model-2")
    hub.faults.spoil("/api/models/owner/model-3?", faults.answer(500))
    hub.put("owner/model-4", 70)
    found = compare(hub, tmp_path, indexed, filters={"list": tmp_path / "list.txt"})
    assert reasons(found) == {"model-0": RemovalReason.FILTERED, "model-2": RemovalReason.REMOVED}
    assert found.renamed == {}
    assert list(found.unconfirmed) == ["owner/model-3"]
    assert [row.repo for row in found.changed] == ["owner/model-4"]
