"""What a nightly run starts from, and the settings with which it refuses to add to an index."""

from __future__ import annotations

import datetime as dt
import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.complete.record import CompletionRecord, write_record
from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly.start import open_start
from probelog.errors import StoreError, UsageError
from probelog.probes.probe_set import VERSION
from probelog.publication.lifecycle import go_live
from probelog.storage.encoding import npy
from probelog.storage.ledger import item_key, key_numbers
from tests.support.worlds import tiny_encoders
from tests.support.worlds.small_index import MODELS_OF_ALL_SORTS, build

NAMES = ["cat", "dog", "owl", "tree"]
PROBE_SET = "a" * 64


def job(folder: Path, **changes: Any) -> Job:
    (folder / "names.txt").write_text("\n".join(NAMES))
    (folder / "other.txt").write_text("\n".join(reversed(NAMES)))
    keys = {
        "store": str(folder / "store"),
        "probes": "unused",
        "encoder": "an encoder",
        "background": str(folder / "names.txt"),
        "background_count": 10,
        "prompt": ["a {}", "the {}"],
        "fraction": 0.25,
        "seed": 3,
    }
    return Job.of(Config.model_validate(keys | changes), Report(io.StringIO()))


def published(folder: Path, **settings: Any) -> Job:
    """A job whose store has an index that was made with its settings, but for some."""
    made = job(folder)
    given = {
        "probe_set": PROBE_SET,
        "observations": made.observations_key(PROBE_SET),
        "encoder": "an encoder",
        "prompts": ["a {}", "the {}"],
        "fraction": 0.25,
        "seed": 3,
        "completion": "finished",
    }
    failed = npy(key_numbers([item_key("a/failed", "1")]))
    index = made.store.child("index")
    build(index, names=NAMES, images=False, settings=given | settings, further={"failed.npy": failed})
    return made


def test_without_an_index_there_is_nothing_to_add_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no published index yet .*run `probelog-index full` first"):
        open_start(job(tmp_path))


def test_an_index_made_alike_needs_its_probe_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no probe set"):
        open_start(published(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.5}, "fraction and seed are 0.5 and 3, the index's are 0.25 and 3"),
        ({"seed": 4}, "fraction and seed are 0.25 and 4, the index's are 0.25 and 3"),
        (
            {"prompt": ["the {}", "a {}"]},
            r"prompt is \['the \{\}', 'a \{\}'\], the index's is \['a \{\}', 'the \{\}'\]",
        ),
        ({"background": "other.txt"}, r"background .*other.txt is not the index's"),
        ({"background_count": 3}, r"background .*names.txt is not the index's"),
    ],
)
def test_every_setting_that_differs_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    published(tmp_path)
    if "background" in changes:
        changes = {"background": str(tmp_path / changes["background"])}
    with pytest.raises(UsageError, match=rf"was made with other settings: {message}\. Use its settings"):
        open_start(job(tmp_path, **changes))


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    published(tmp_path)
    message = r"fraction and seed are .*; prompt is .*; background .* is not the index's\. Use"
    with pytest.raises(UsageError, match=message):
        open_start(job(tmp_path, fraction=0.5, prompt="{}", background_count=2))


def test_the_same_encoder_may_lie_in_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(tiny_encoders.folder("clip"), folder)
    same = {
        "encoder": str(tiny_encoders.folder("clip")),
        "encoder_digest": tiny_encoders.encoder("clip").digest,
    }
    published(tmp_path, **same)
    with pytest.raises(UsageError, match="has no probe set"):
        open_start(job(tmp_path, encoder=str(folder)))
    (tmp_path / "other").mkdir()
    published(tmp_path / "other", encoder_digest="another")
    with pytest.raises(UsageError, match=r"encoder is .*moved, the index's is an encoder"):
        open_start(job(tmp_path / "other", encoder=str(folder)))


class Ready:
    """A store with all that a nightly run starts from."""

    def __init__(self, folder: Path) -> None:
        self.job = published(folder)
        manifest = {"kind": "probe-set", "version": VERSION, "hash": PROBE_SET, "count": 0, "files": []}
        self.job.store.write_json(f"probes/{PROBE_SET[:16]}/manifest.json", manifest)
        self.completion = CompletionRecord("finished", 3, 0.1, 0.5, 0.6, 8, 30, 0, {})
        write_record(self.job.store, self.completion, {}, "key")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ready:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    return Ready(tmp_path)


def test_what_a_run_starts_from(ready: Ready) -> None:
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    start = open_start(ready.job)
    assert start.live.generation is start.base
    assert start.base.pointer.generation == "first"
    assert start.completion == ready.completion
    assert start.probe_set.hash == PROBE_SET
    assert (start.files.base, start.files.key) == ("first", f"{ready.job.observations_key(PROBE_SET)}-first")
    assert start.endpoint == "http://127.0.0.1:9"
    assert ("a/failed", "1") in start.failed
    assert ("a/failed", "2") not in start.failed
    assert before <= dt.datetime.fromisoformat(start.at) <= dt.datetime.now(dt.UTC)
    first, second, *_ = MODELS_OF_ALL_SORTS
    rows = start.rows_in_base([second.repo, "nobody/there", first.repo])
    assert {repo: (row["id"], row["sha"]) for repo, row in rows.items()} == {
        first.repo: (0, first.sha),
        second.repo: (1, second.sha),
    }


def test_an_update_is_not_added_to_but_its_base(ready: Ready) -> None:
    index = ready.job.store.child("index")
    build(index, "update", MODELS_OF_ALL_SORTS[:2], images=False, live=False)
    pointer = go_live(index, "update", "source of update", base="first")
    start = open_start(ready.job)
    assert (start.live.pointer, start.live.pointer.base) == (pointer, "first")
    assert start.live.generation.pointer.generation == "update"
    assert (start.base.pointer.generation, start.files.base) == ("first", "first")


def test_a_completion_that_is_gone_is_named(ready: Ready) -> None:
    ready.job.store.delete_folder("completion/finished")
    with pytest.raises(
        StoreError, match=r"completion/finished, which the live index was made from, is missing"
    ):
        open_start(ready.job)
