"""Whole publishes: what is sound goes live, what is not is removed, on local disk and on a real S3 server."""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.complete import descriptors as descriptors_module
from pipelines.complete.descriptors import Descriptors
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
from probelog.search.client import open_index
from probelog.storage.ledger import Ledger
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


def test_a_correct_generation_goes_live(indexed: Indexed, remote: Store) -> None:
    done = published(indexed, remote)
    assert done.is_new
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
        assert published(indexed, remote).is_new
    reads = Counter(re.findall(r"GET /\S*/completion/\w+/descriptors/(\S+)\.parquet", caplog.text))
    assert set(reads) == set(indexed.run.completed.parts)
    assert len(reads) > 2
    assert set(reads.values()) == {2}


@pytest.mark.parametrize(("room", "times"), [(1 << 30, 1), (0, 2)], ids=["kept", "too large to keep"])
def test_what_was_kept_is_not_read_again(
    indexed: Indexed,
    remote: Store,
    room: int,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A nightly run measures the drift of what it then writes."""
    monkeypatch.setattr(descriptors_module, "_KEPT_BYTES", room)
    run = indexed.run
    models = Ledger(remote, "").models(run.probed.receipts)
    given = (remote, run.probed.receipts, run.completed.parts, models)
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        first = Descriptors(*given)
        kept = [described.logits.tolist() for described in first.stream(keep=True)]
        again = [described.logits.tolist() for described in Descriptors(*given, read=first).stream()]
    assert again == kept
    reads = Counter(re.findall(r"GET /\S*/completion/\w+/descriptors/(\S+)\.parquet", caplog.text))
    assert set(reads) == set(run.completed.parts)
    assert set(reads.values()) == {times}


def with_a_nan(batch: LogitBatch) -> LogitBatch:
    directions = batch.directions.copy()
    directions[0, 0] = np.nan
    return batch._replace(directions=directions)


def test_a_wrong_generation_does_not_go_live(
    indexed: Indexed, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publish_module._logit_batches
    monkeypatch.setattr(publish_module, "_logit_batches", lambda *given: map(with_a_nan, real(*given)))
    before = generations(remote)
    with pytest.raises(
        StoreError, match=r"was not published: .*values of offset of its logits are not finite"
    ):
        published(indexed, remote)
    assert read_pointer(remote.child("index"))[0] == indexed.run.published.pointer
    assert generations(remote) == before, "what was built is removed"


def test_somebody_publishes_while_one_builds(
    indexed: Indexed, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The command says so, ends with status 1, and removes what it built."""
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    file = indexed.world.config_file(tmp_path / "job.toml", store.uri, prompt="a {}")
    real = Report.line
    live = indexed.run.published.pointer.generation
    folder = Path(store.root) / "index/generations"

    def line(self: Report, text: str) -> None:
        if text == "publish: checking":
            shutil.copytree(folder / live, folder / "another")
            go_live(store.child("index"), "another", "another source")
        real(self, text)

    monkeypatch.setattr(Report, "line", line)
    ended = operator("publish", "--config", file)
    assert ended.status == 1
    assert "somebody else published or rolled back meanwhile (another is live)" in ended.err
    assert read_pointer(store.child("index"))[0].generation == "another"
    assert generations(store) == {"another", live}


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
