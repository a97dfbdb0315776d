"""What is wrong with a generation keeps it from going live, on local disk and on a real S3 server."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.publish import release
from pipelines.publish import stage as publish_module
from pipelines.publish.release import PublishResult
from pipelines.publish.stage import ListingSnapshot, publish
from pipelines.quality.failures import FailureCounts
from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import StoreError
from probelog.index.pointer import read_pointer
from probelog.probes.probe_set import ProbeSet
from probelog.publication.lifecycle import go_live
from probelog.publication.rows import LogitBatch
from probelog.search.client import Index, open_index
from probelog.storage.store import Store
from tests.support.processes.operator_command import operator
from tests.support.processes.s3 import s3_server
from tests.support.worlds.tiny_world import LOGITS, Indexed


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def store(indexed: Indexed, tmp_path: Path) -> Store:
    return Store(indexed.copy_store(tmp_path / "store"))


@pytest.fixture
def remote(indexed: Indexed, bucket: str, tmp_path: Path) -> Store:
    store = Store(f"{bucket}/{tmp_path.name}")
    local = Store(indexed.store)
    for name in local.names(""):
        store.write(name, local.read(name))
    return store


def published(indexed: Indexed, store: Store, **changes: Any) -> PublishResult:
    """Publish once more, with another prompt so that there is something to do."""
    given = indexed.job(Path(store.root), **({"prompt": "{}"} | changes))
    job = Job(given.config, store, given.report)
    run = indexed.run
    return publish(
        job,
        ListingSnapshot.of(run.catalogue),
        ProbeSet.open(store, indexed.probe_set),
        load_encoder(job.config.encoder),
        run.probed.key,
        run.probed.receipts,
        run.completed,
        FailureCounts(run.probed.tried, run.probed.reasons),
    )


def generations(store: Store) -> set[str]:
    return {name.split("/")[2] for name in store.names("index/generations")}


def test_a_sound_generation_goes_live(indexed: Indexed, remote: Store) -> None:
    done = published(indexed, remote)
    assert done.fresh
    assert done.logits == LOGITS
    index = open_index(remote.uri)
    assert index.generation == done.pointer.generation
    assert index.search("dog")
    assert done.pointer.choice[1:] == [indexed.run.published.pointer.generation]


@pytest.mark.parametrize("sampled", [1, 20_000])
def test_a_part_of_descriptors_is_read_at_most_twice(
    indexed: Indexed,
    remote: Store,
    sampled: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once to write and once to check, whether it is among those that the basis is learnt from or not."""
    monkeypatch.setattr(publish_module, "_SAMPLE_LOGITS", sampled)
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        assert published(indexed, remote).fresh
    reads = Counter(re.findall(r"GET /\S*/completion/\w+/descriptors/(\S+)\.parquet", caplog.text))
    assert set(reads) == set(indexed.run.completed.parts)
    assert len(reads) > 2
    assert set(reads.values()) == {2}


def first_is(value: float) -> Callable[[LogitBatch], LogitBatch]:
    def change(batch: LogitBatch) -> LogitBatch:
        directions = batch.directions.copy()
        directions[0, 0] = value
        return batch._replace(directions=directions)

    return change


def without_the_first(batch: LogitBatch) -> LogitBatch:
    return LogitBatch(*(column[1:] for column in batch))


def other_way(batch: LogitBatch) -> LogitBatch:
    return batch._replace(directions=-batch.directions)


def next_ones(batch: LogitBatch) -> LogitBatch:
    return batch._replace(directions=np.roll(batch.directions, 1, axis=0))


FAULTS = {
    "NaN": (first_is(np.nan), "values of offset of its logits are not finite"),
    "infinity": (first_is(np.inf), "values of direction of its logits are not finite"),
    "a logit is missing": (without_the_first, "models have other logits than their descriptors"),
    "directions turned round": (other_way, "a wrong score"),
    "directions of other logits": (next_ones, "a wrong score"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_generation_that_is_wrong_does_not_go_live(
    indexed: Indexed, store: Store, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, told = FAULTS[fault]
    real = publish_module._logit_batches
    monkeypatch.setattr(publish_module, "_logit_batches", lambda *given: map(change, real(*given)))
    before = generations(store)
    with pytest.raises(StoreError, match="was not published: ") as error:
        published(indexed, store)
    assert told in str(error.value)
    assert read_pointer(store.child("index"))[0] == indexed.run.published.pointer
    assert generations(store) == before, "what was built is removed"


def test_a_wrong_generation_on_s3(indexed: Indexed, remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    change, told = FAULTS["NaN"]
    real = publish_module._logit_batches
    monkeypatch.setattr(publish_module, "_logit_batches", lambda *given: map(change, real(*given)))
    before = generations(remote)
    with pytest.raises(StoreError, match=told):
        published(indexed, remote)
    assert generations(remote) == before


def test_descriptors_that_lack_logits(
    indexed: Indexed, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipts counted one more than was dropped for being constant."""
    from dataclasses import replace

    wrong = replace(indexed.run.completed, dropped=indexed.run.completed.dropped + 1)
    run = replace(indexed.run, completed=wrong)
    with pytest.raises(
        StoreError, match="its descriptors lack 1 logits of the receipts' models, but 2 were dropped"
    ):
        published(replace(indexed, run=run), store)


def test_answers_that_lose_recall(indexed: Indexed, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives every second of the right answers."""
    real = Index.search

    def search(self: Any, *given: Any, **named: Any) -> Any:
        return list(real(self, *given, **named))[::2]

    monkeypatch.setattr(Index, "search", search)
    with pytest.raises(StoreError, match="its answers hold 50% of the exact first 10, less than 95%"):
        published(indexed, store)


def test_a_logit_that_is_not_found(indexed: Indexed, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Index.search

    def search(self: Any, *given: Any, **named: Any) -> Any:
        return [hit for hit in real(self, *given, **named) if hit.distance > 1e-3]

    monkeypatch.setattr(Index, "search", search)
    with pytest.raises(StoreError, match=r"asked for the direction of .* it does not find that logit"):
        published(indexed, store)


def test_somebody_publishes_while_one_builds(
    indexed: Indexed, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command says so, ends with status 1, and removes what it built."""
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    file = indexed.world.config_file(tmp_path / "job.toml", store.uri, prompt="a {}")
    real = Report.line
    other: list[str] = []

    def line(self: Report, text: str) -> None:
        if text == "publish: checking" and not other:
            other.append("")
            other[0] = published(indexed, store).pointer.generation
        real(self, text)

    monkeypatch.setattr(Report, "line", line)
    ended = operator("publish", "--config", file)
    assert ended.status == 1
    assert f"somebody else published or rolled back meanwhile ({other[0]} is live)" in ended.err
    assert read_pointer(store.child("index"))[0].generation == other[0]
    assert generations(store) == {other[0], indexed.run.published.pointer.generation}


def test_an_interrupted_publisher_cleans_up(
    indexed: Indexed, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = generations(store)
    with monkeypatch.context() as patch:
        patch.setattr(publish_module, "check_generation", interrupted)
        with pytest.raises(KeyboardInterrupt):
            published(indexed, store)
    assert generations(store) == before
    # The swap went through, but the answer was lost: what is live stays.
    with monkeypatch.context() as patch:

        def late(*given: Any, **named: Any) -> None:
            go_live(*given, **named)
            raise KeyboardInterrupt

        patch.setattr(release, "go_live", late)
        with pytest.raises(KeyboardInterrupt):
            published(indexed, store)
    assert open_index(store.uri).generation == read_pointer(store.child("index"))[0].generation
    assert len(generations(store)) == len(before) + 1
