"""Which rows a listing's filters accept, whatever the server has filtered already."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.hubserver import running
from probelog.errors import UsageError
from probelog.hub.client import HubError
from probelog.hub.listing import ListingFilters, iter_pages
from probelog.storage.schemas import CatalogueRow
from tests.support.hub import faults
from tests.support.hub.live_hub import BEGINNING, live_hub
from tests.support.hub.repositories import Write

MAY = dt.datetime(2025, 5, 1, tzinfo=dt.UTC)
ROW = CatalogueRow(
    "ada/vit", "0" * 40, library="timm", pipeline_tag="image-classification", licence="mit",
    parameters=100, weight_bytes=400, last_modified=MAY,
)  # fmt: skip
TICK = dt.timedelta(microseconds=1)

CASES: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {}, True),
    ({}, {"library": "keras"}, False),
    ({}, {"library": None}, False),
    ({}, {"pipeline_tag": "text-generation"}, False),
    ({}, {"pipeline_tag": None}, False),
    ({"pipeline_tag": None}, {"pipeline_tag": "text-generation"}, True),
    ({"libraries": ()}, {"library": "keras"}, True),
    ({"libraries": ("transformers",)}, {}, False),
    ({"author": "ada"}, {}, True),
    ({"author": "ada"}, {"repo": "adam/vit"}, False),
    ({"author": "ada"}, {"repo": "ada-lovelace/vit"}, False),
    ({"author": "ada"}, {"repo": "bob/ada"}, False),
    ({"author": "ada"}, {"repo": "ada"}, False),
    ({"author": "da"}, {}, False),
    ({"author": "Ada"}, {}, False),
    ({"licences": ("mit", "bsd")}, {}, True),
    ({"licences": ("mit", "bsd")}, {"licence": "apache-2.0"}, False),
    ({"licences": ("mit", "bsd")}, {"licence": None}, False),
    ({"max_params": 100}, {}, True),
    ({"max_params": 99}, {}, False),
    ({"max_params": 1}, {"parameters": None}, True),
    ({"max_bytes": 400}, {}, True),
    ({"max_bytes": 399}, {}, False),
    ({"max_bytes": 1}, {"weight_bytes": None}, True),
    ({"since": MAY}, {}, True),
    ({"since": MAY + TICK}, {}, False),
    ({"since": MAY + TICK}, {"last_modified": None}, True),
    # Of an explicit list library, task, author and time do not count; size and licence do.
    ({"repos": ("ada/vit",)}, {"library": "keras", "pipeline_tag": None}, True),
    ({"repos": ("ada/vit",), "author": "bob", "since": MAY + TICK}, {}, True),
    ({"repos": ("ada/vit2", "bob/vit")}, {}, False),
    ({"repos": ("ada/vit",), "max_params": 99}, {}, False),
    ({"repos": ("ada/vit",), "max_bytes": 399}, {}, False),
    ({"repos": ("ada/vit",), "licences": ("bsd",)}, {}, False),
]


@pytest.mark.parametrize(("filters", "facts", "accepted"), CASES)
def test_what_a_filter_accepts(filters: dict[str, Any], facts: dict[str, Any], accepted: bool) -> None:
    assert ListingFilters(**filters).accepts(replace(ROW, **facts)) is accepted


@pytest.mark.parametrize(("name", "least"), [("max_bytes", 1), ("max_params", 1), ("limit", 0)])
def test_the_least_of_a_bound(name: str, least: int) -> None:
    assert getattr(ListingFilters(**{name: least}), name) == least
    with pytest.raises(UsageError, match=f"the filter {name} must be {least} or more, not {least - 1}"):
        ListingFilters(**{name: least - 1})


def test_none_are_wanted_and_the_hub_is_not_asked() -> None:
    assert list(iter_pages(ListingFilters(limit=0), endpoint="http://127.0.0.1:9")) == []


def test_a_list_of_just_a_page_ends_with_it(write_repository: Write, tmp_path: Path) -> None:
    for number in range(20):
        write_repository(f"ada/m{number}")
    wanted = tuple(f"ada/m{number}" for number in range(20))
    with running(tmp_path / "hub") as endpoint:
        pages = list(iter_pages(ListingFilters(repos=wanted), endpoint=endpoint))
    assert [(len(page.rows), page.next_url) for page in pages] == [(20, None)]


def test_only_a_crawl_that_goes_on_can_have_lost_its_place(tmp_path: Path) -> None:
    with live_hub(tmp_path / "hub", 2) as hub:
        hub.faults.spoil("/api/models?", faults.answer(400))
        with pytest.raises(HubError) as fresh:
            list(iter_pages(ListingFilters(), endpoint=hub.endpoint))
        assert "start from the first page" not in str(fresh.value)
        start = f"{hub.endpoint}/api/models?cursor=x"
        with pytest.raises(HubError, match="start from the first page"):
            list(iter_pages(ListingFilters(), start, endpoint=hub.endpoint))


def test_an_order_that_breaks_between_two_pages_ends_no_crawl(tmp_path: Path) -> None:
    """Each page is sorted, and yet the server ignores the order."""
    with live_hub(tmp_path / "hub", 9) as hub:
        hub.faults.spoil(
            "/api/models?",
            faults.rows(lambda rows: [{**row, "lastModified": "2025-01-01T00:30:00Z"} for row in rows]),
            times=1,
        )
        since = BEGINNING + dt.timedelta(hours=4)
        pages = list(iter_pages(ListingFilters(since=since), endpoint=hub.endpoint, page_size=3))
        assert len(pages) == 1, "all of the first page is older"
        hub.faults.spoil(
            "/api/models?",
            faults.rows(lambda rows: [{**row, "lastModified": "2025-01-01T04:00:00Z"} for row in rows]),
            times=1,
        )
        pages = list(iter_pages(ListingFilters(since=since), endpoint=hub.endpoint, page_size=3))
        assert len(pages) == 3, "the second page is newer than the first"
