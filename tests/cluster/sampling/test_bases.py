"""Bases of adapters: found, fetched once for those that follow each other, and gone with the last."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.sampling.bases import Bases, BaseSamples, base_of
from probelog.errors import FailureReason, ItemFailure
from probelog.hub.download import Downloaded
from probelog.storage.schemas import CatalogueRow, Parent

SHA = "5" * 40


class Hub:
    """Bases of one file each; some cannot be had."""

    def __init__(self, folder: Path, **refused: FailureReason) -> None:
        self.refused, self.fetched, self.waits = refused, list[str](), threading.Event()
        self.waits.set()
        self.bases = Bases(folder, self.look_up, self.download)

    def look_up(self, repo: str) -> CatalogueRow:
        if repo.partition("/")[2] in self.refused:
            raise ItemFailure(self.refused[repo.partition("/")[2]], "no such luck")
        return CatalogueRow(repo, SHA)

    def download(self, row: CatalogueRow, folder: Path) -> Downloaded:
        assert self.waits.wait(30)
        self.fetched.append(row.repo)
        folder.mkdir()
        (folder / "weights").write_text(row.repo)
        return Downloaded(folder, {"weights": "0"}, 1, 0.0)


def test_a_base_is_fetched_once_for_adapters_that_follow_each_other(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    for repo in ("a/one", "a/one", "a/two", "a/two", "a/one"):
        with hub.bases.held(repo) as base:
            assert (base.repo, base.sha) == (repo, SHA)
            assert (base.downloaded.folder / "weights").read_text() == repo
    assert hub.fetched == ["a/one", "a/two", "a/one"]
    assert len(list(tmp_path.iterdir())) == 1, "the last one is kept"


def test_a_base_stays_for_as_long_as_somebody_uses_it(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    with hub.bases.held("a/one") as one:
        with hub.bases.held("a/two"), hub.bases.held("a/three"):
            pass
        assert (one.downloaded.folder / "weights").read_text() == "a/one"
    assert hub.fetched == ["a/one", "a/two", "a/three"]


def test_adapters_at_the_same_time_share_a_download(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.waits.clear()

    def use(_: int) -> str:
        with hub.bases.held("a/one") as base:
            return (base.downloaded.folder / "weights").read_text()

    with ThreadPoolExecutor(3) as pool:
        used = pool.map(use, range(3))
        hub.waits.set()
        assert list(used) == ["a/one"] * 3
    assert hub.fetched == ["a/one"]


@pytest.mark.parametrize(
    ("reason", "of_the_adapter"),
    [
        ("gated", "gated-base"),
        ("not-found", "missing-base"),
        ("disabled", "missing-base"),
        ("too-large", "too-large"),
        ("download-failed", "download-failed"),
    ],
)
def test_why_a_base_cannot_be_had(tmp_path: Path, reason: str, of_the_adapter: str) -> None:
    hub = Hub(tmp_path, gone=FailureReason(reason))
    for _ in range(2):
        with (
            pytest.raises(ItemFailure, match="base a/gone: no such luck") as failed,
            hub.bases.held("a/gone"),
        ):
            raise AssertionError
        assert failed.value.reason.value == of_the_adapter
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "facts", "expected"),
    [
        ({"base_model_name_or_path": "a/config"}, {"base_model": "a/card"}, "a/config"),
        ({"base_model_name_or_path": "../weights"}, {"base_model": "a/card"}, "a/card"),
        ({"base_model_name_or_path": 7}, {"parents": [Parent("a/tag", "adapter", "tag")]}, "a/tag"),
        (None, {"base_model": "a/card"}, "a/card"),
        (None, {"parents": [Parent("a/other", "finetune", "tag")]}, None),
        (None, {"base_model": "no repository"}, None),
    ],
)
def test_which_base_an_adapter_is_for(
    tmp_path: Path, config: object, facts: dict[str, object], expected: str | None
) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    row = CatalogueRow(repo="b/adapter", sha=SHA, **facts)  # type: ignore[arg-type]
    if expected is not None:
        assert base_of(tmp_path, row) == expected
        return
    with pytest.raises(ItemFailure) as failed:
        base_of(tmp_path, row)
    assert failed.value.reason is FailureReason.MISSING_BASE


def test_a_base_is_sampled_once_for_all_its_adapters() -> None:
    """Also for those that come at the same time; one that needs more has the rest made, and a failure leaves what there is."""
    made = list[range]()

    def make(numbers: range) -> tuple[np.ndarray[Any, Any], str]:
        made.append(numbers)
        return np.array([[number] for number in numbers], np.float32), "digest"

    def fails(numbers: range) -> tuple[np.ndarray[Any, Any], str]:
        raise ItemFailure(FailureReason.TIMEOUT, "too slow")

    samples = BaseSamples()
    with pytest.raises(ItemFailure):
        samples.first(4, fails)
    assert samples.digest is None
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: samples.first(4, make).ravel().tolist(), range(8)))
    assert results == [[0, 1, 2, 3]] * 8
    assert samples.first(2, fails).ravel().tolist() == [0, 1]
    with pytest.raises(ItemFailure):
        samples.first(7, fails)
    assert samples.first(6, make).ravel().tolist() == [*range(6)]
    assert made == [range(4), range(4, 6)]
    assert samples.digest == "digest"
