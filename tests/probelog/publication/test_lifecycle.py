"""Publishing, rolling back and sweeping, on local disk and on a real S3 server, with readers in between."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import probelog
from probelog.errors import ConflictError, StoreError, UsageError
from probelog.index.pointer import read_pointer
from probelog.index.schema import MODELS
from probelog.publication import lifecycle
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import GRACE, discard, go_live, roll_back, sweep
from probelog.search import client
from probelog.storage.layout import POINTER
from probelog.storage.store import Store
from tests.support.processes.s3 import s3_server
from tests.support.worlds.small_index import Model, build


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = getattr(request, "param", "local")
    if place == "local":
        return Store(tmp_path / "store" / "index")
    bucket = request.getfixturevalue("bucket" if place == "s3" else place)
    return Store(f"{bucket}/{tmp_path.name}/index")


# What stores may do differently is tested on both: swaps, listings, deletions, clocks, reads of what is gone.
on_both_stores = pytest.mark.parametrize("index", ["local", "s3"], indirect=True)
NO_GRACE = dt.timedelta(0)


def models(tag: str, count: int = 3) -> list[Model]:
    """Models that say which generation they belong to."""
    return [Model(f"{tag}/model-{i}", (f"{tag} a", f"{tag} b"), licence=tag) for i in range(count)]


def publish(index: Store, name: str, grace: dt.timedelta = NO_GRACE) -> list[str]:
    """A live generation whose every fact says its name; returns what the sweep after it deleted."""
    make(index, name)
    go_live(index, name, f"source of {name}")
    return sweep(index, grace)


def make(index: Store, name: str) -> None:
    build(index, name, models(name), kind="dual", images=False, live=False, seed=len(name))


def generations(index: Store) -> set[str]:
    """Generations of which anything is left."""
    return {name.split("/")[1] for name in index.names("generations")}


@pytest.mark.parametrize(
    "index",
    ["local", "s3", "google", pytest.param("azure", marks=pytest.mark.acceptance)],
    indirect=True,
)
def test_publish_and_roll_back(index: Store) -> None:
    for name in ("a", "b", "c"):
        publish(index, name)
    found, _ = read_pointer(index)
    assert found.generation == "c"
    assert [item["generation"] for item in found.previous] == ["b", "a"]
    assert probelog.open_index(index.uri).search("dog")[0].licence == "c"
    assert roll_back(index).generation == "b"
    assert probelog.open_index(index.uri).search("dog")[0].licence == "b"
    assert roll_back(index).generation == "a"
    with pytest.raises(UsageError, match="no earlier generation"):
        roll_back(index)
    assert read_pointer(index)[0].generation == "a"


def test_a_rollback_can_be_taken_back(index: Store) -> None:
    for name in ("a", "b", "c"):
        publish(index, name)
    roll_back(index)
    found = roll_back(index)
    assert [item["generation"] for item in found.withdrawn] == ["b", "c"]
    sweep(index, NO_GRACE)
    with pytest.raises(UsageError, match="there is no generation 'x' to roll back to; there is b and c"):
        roll_back(index, "x")
    found = roll_back(index, "c")
    assert probelog.open_index(index.uri).search("dog")[0].licence == found.generation == "c"
    assert [item["generation"] for item in found.previous] == ["b", "a"]
    assert roll_back(index, "a").choice == ["a"]
    publish(index, "d")
    assert read_pointer(index)[0].choice == ["d", "a"]
    assert generations(index) == {"a", "d"}, "withdrawn ones are kept until the next publish"


def test_a_sweep_keeps_what_the_pointer_names(index: Store) -> None:
    assert [publish(index, name) for name in "abcde"] == [[], [], [], ["a"], ["b"]]
    assert generations(index) == {"c", "d", "e"}
    assert sweep(index, NO_GRACE) == []
    roll_back(index)
    assert sweep(index, NO_GRACE) == []
    assert probelog.open_index(index.uri).generation == "d"
    assert read_pointer(index)[0].retired == {}


def test_a_retired_generation_outlives_its_readers(index: Store) -> None:
    """A script publishes three times within a minute: a reader of the oldest one has not looked yet."""
    publish(index, "a")
    reader = probelog.open_index(index.uri)
    for name in ("b", "c", "d"):
        assert publish(index, name, GRACE) == []
    assert list(read_pointer(index)[0].retired) == ["a"]
    assert reader.search("dog", where="licence IS NOT NULL")[0].licence == "a"
    assert sweep(index) == []
    assert sweep(index, NO_GRACE) == ["a"]


@on_both_stores
def test_times_are_the_stores(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is a day ahead sweeps nothing that another one still has to."""
    real = dt.datetime

    class Ahead(real):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Ahead:
            return cls.fromtimestamp(real.now(tz).timestamp() + 2 * 86400, tz)

    for name in "abcd":
        publish(index, name, GRACE)
    make(index, "being built")
    monkeypatch.setattr(dt, "datetime", Ahead)
    assert sweep(index) == []
    assert generations(index) == {*"abcd", "being built"}


def test_a_sweep_leaves_a_generation_that_is_being_built(index: Store) -> None:
    publish(index, "a")
    writer = GenerationWriter(index, "b")
    writer.write("models", MODELS, [])
    assert publish(index, "c") == []
    writer.write_meta({"settings": b"{}"})
    assert publish(index, "d") == []
    assert generations(index) == {"a", "b", "c", "d"}
    writer.finish()
    go_live(index, "b", "s")
    assert sweep(index, NO_GRACE) == ["a"]
    assert read_pointer(index)[0].generation == "b"


@on_both_stores
def test_a_sweep_deletes_the_generation_of_a_dead_publisher(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a")
    GenerationWriter(index, "dead").write("models", MODELS, [])
    index.write("generations/no-hold/meta.lance/data/x", b"{")
    assert sweep(index) == []
    assert list(read_pointer(index)[0].retired) == ["no-hold"]
    monkeypatch.setattr(lifecycle, "BUILDING", NO_GRACE)
    assert sweep(index) == []
    assert sorted(read_pointer(index)[0].retired) == ["dead", "no-hold"]
    assert sweep(index, NO_GRACE) == ["dead", "no-hold"]
    assert generations(index) == {"a"}
    assert read_pointer(index)[0].retired == {}


def test_a_publisher_whose_hold_expired_does_not_go_live(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a")
    writers = [GenerationWriter(index, name) for name in ("b", "c")]
    writers[1].write_meta({"settings": b"{}"})
    writers[1].finish()
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "BUILDING", NO_GRACE)
        sweep(index)
    with pytest.raises(StoreError, match="was retired by a sweep"):
        go_live(index, "c", "s")
    sweep(index, NO_GRACE)
    with pytest.raises(StoreError, match="was retired by a sweep"):
        writers[0].write_meta({"settings": b"{}"})
    with pytest.raises(StoreError, match="is missing, or was never finished"):
        go_live(index, "c", "s")
    assert read_pointer(index)[0].generation == "a"


@on_both_stores
def test_an_incomplete_generation_does_not_go_live(index: Store) -> None:
    publish(index, "a")
    make(index, "b")
    file = next(name for name in index.names("generations/b") if "models.lance/data" in name)
    index.write(file, index.read(file)[:-1])
    with pytest.raises(StoreError, match=r"generation b is incomplete: models.lance/data"):
        go_live(index, "b", "s")
    assert read_pointer(index)[0].generation == "a"


def test_a_withdrawn_generation_outlives_its_readers(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, "a")
    publish(index, "b")
    reader = probelog.open_index(index.uri)
    roll_back(index)
    publish(index, "c", GRACE)
    assert list(read_pointer(index)[0].retired) == ["b"]
    assert reader.search("dog", where="licence IS NOT NULL")[0].licence == "b", "it has not looked yet"
    monkeypatch.setattr(client, "POLL_SECONDS", -1.0)
    assert reader.search("dog")[0].licence == "c"


def test_a_late_sweep_keeps_generations_published_meanwhile(index: Store) -> None:
    """Of two publishers the first goes live, then the second does and sweeps; only then the first one sweeps."""
    make(index, "a")
    go_live(index, "a", "s")
    publish(index, "b")
    assert sweep(index, NO_GRACE) == []
    assert probelog.open_index(index.uri).search("dog")[0].licence == "b"
    assert generations(index) == {"a", "b"}


@on_both_stores
def test_of_two_publishers_one_wins(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        make(index, name)
    go_live(index, "a", "s")
    both_have_read = threading.Barrier(2)
    real = Store.read_or_none

    def read(self: Store, name: str, *most: int) -> bytes | None:
        data = real(self, name, *most)
        if name == POINTER and threading.current_thread().name.startswith("publisher"):
            both_have_read.wait(10)
            threading.current_thread().name = "done"
        return data

    monkeypatch.setattr(Store, "read_or_none", read)

    def attempt(name: str) -> str | ConflictError:
        try:
            return go_live(index, name, "s").generation
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(2, thread_name_prefix="publisher") as pool:
        outcomes = list(pool.map(attempt, ["b", "c"]))
    won = [outcome for outcome in outcomes if isinstance(outcome, str)]
    lost = [outcome for outcome in outcomes if isinstance(outcome, ConflictError)]
    assert len(won) == len(lost) == 1
    assert f"{won[0]} is live" in str(lost[0])
    found, _ = read_pointer(index)
    assert found.generation == won[0]
    assert [item["generation"] for item in found.previous] == ["a"]


@pytest.mark.parametrize("first", [True, False])
def test_a_publisher_that_was_overtaken_while_building_gets_a_conflict(index: Store, first: bool) -> None:
    """Its inputs may be older than those of what is live now."""
    if not first:
        publish(index, "a")
    seen = [] if first else ["a"]
    make(index, "b")
    make(index, "c")
    go_live(index, "c", "s", expected_choice=seen)
    with pytest.raises(ConflictError, match=r"published or rolled back meanwhile \(c is live\)"):
        go_live(index, "b", "s", expected_choice=seen)
    discard(index, "b")
    with pytest.raises(StoreError, match="generation c is in use"):
        discard(index, "c")
    assert generations(index) == {"c", *seen}


def test_a_sweep_does_not_overtake_a_publisher(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        publish(index, name)
    make(index, "d")
    index.write("generations/ruin/x", b"1")
    real = Store.swap

    def swap(self: Store, name: str, data: bytes, expected: bytes | None) -> None:
        monkeypatch.setattr(Store, "swap", real)
        sweep(index)
        real(self, name, data, expected)

    monkeypatch.setattr(Store, "swap", swap)
    go_live(index, "d", "s", expected_choice=["c", "b", "a"])
    found = read_pointer(index)[0]
    assert (found.choice, sorted(found.retired)) == (["d", "c", "b"], ["a", "ruin"])


def test_rolling_back_to_a_missing_generation(index: Store) -> None:
    for name in "abc":
        publish(index, name)
    index.delete_folder("generations/b")
    with pytest.raises(StoreError, match=r"generation b is missing.*or go back to a"):
        roll_back(index)
    assert read_pointer(index)[0].generation == "c"
    assert roll_back(index, "a").generation == "a"
    with pytest.raises(StoreError, match="generation b is missing"):
        roll_back(index, "b")
    assert roll_back(index, "c").generation == "c"


def test_a_reader_follows_the_pointer(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, "a")
    reader = probelog.open_index(index.uri)
    publish(index, "b")
    assert reader.search("dog")[0].licence == "a", "a reader looks every 30 seconds only"
    monkeypatch.setattr(client, "POLL_SECONDS", -1.0)
    assert reader.search("dog")[0].licence == "b"
    assert reader.generation == "b"


@pytest.mark.parametrize(
    ("index", "warm"), [("local", True), ("local", False), ("s3", False)], indirect=["index"]
)
def test_a_reader_of_a_swept_generation_asks_the_next_one(index: Store, warm: bool) -> None:
    publish(index, "a")
    reader = probelog.open_index(index.uri)
    if warm:
        assert reader.search("dog")[0].licence == "a"
    assert [publish(index, name) for name in ("b", "c", "d")] == [[], [], ["a"]]
    # What the reader holds in memory it may still answer from; what it must read is of the live generation.
    for ask in (
        lambda: reader.search("dog", where="licence IS NOT NULL")[0].licence,
        lambda: reader.search("dog")[0].licence,
        lambda: reader.show("d/model-1").licence,
        lambda: reader.search(like="d/model-1#0")[0].licence,
    ):
        assert ask() == "d"
    assert reader.thumbnail(0) == b"picture 0"


@on_both_stores
def test_a_reader_without_a_pointer_keeps_answering(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, "a")
    reader = probelog.open_index(index.uri)
    want = [hit.repo for hit in reader.search("dog")]
    monkeypatch.setattr(client, "POLL_SECONDS", -1.0)
    for content in (b"{", json.dumps({"version": 99}).encode(), None):
        if content is None:
            index.delete(POINTER)
        else:
            index.write(POINTER, content)
        assert [hit.repo for hit in reader.search("dog")] == want


def test_a_reader_that_opens_between_pointer_and_sweep(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, "a")
    stale, _ = read_pointer(index)
    for name in ("b", "c", "d"):
        publish(index, name)
    answers = iter([(stale, b"")])
    real = client.read_pointer
    monkeypatch.setattr(client, "read_pointer", lambda store: next(answers, None) or real(store))
    assert probelog.open_index(index.uri).search("dog")[0].licence == "d"


@pytest.mark.parametrize("how", ["keys", "no region"])
def test_a_reader_on_s3_needs_no_boto3(bucket: str, tmp_path: Path, how: str) -> None:
    index = Store(f"{bucket}/{tmp_path.name}/index")
    publish(index, "a")
    environment = dict(os.environ)
    if how == "no region":
        environment = {k: v for k, v in environment.items() if k not in ("AWS_REGION", "AWS_DEFAULT_REGION")}
    code = (
        "import sys\n"
        "sys.modules['boto3'] = sys.modules['botocore'] = None\n"
        "import probelog\n"
        f"index = probelog.open_index({index.uri.removesuffix('/index')!r})\n"
        "print(index.search('dog', where='downloads > 1')[0].licence, len(index.show('a/model-0').logits))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.stdout == "a 2\n", done.stderr


def test_a_public_bucket(bucket: str, tmp_path: Path) -> None:
    import boto3

    index = Store(f"{bucket}/{tmp_path.name}/index")
    publish(index, "a")
    s3 = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name in index.names(""):
        s3.put_object_acl(
            Bucket=bucket.removeprefix("s3://"), Key=f"{tmp_path.name}/index/{name}", ACL="public-read"
        )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {
        "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(tmp_path),
    }
    code = f"from probelog.cli import main; import sys; sys.argv[1:] = ['info', '--index', {index.uri!r}]; main()"
    for more, status, said in (
        ({}, 1, "set AWS_SKIP_SIGNATURE=true"),
        ({"AWS_SKIP_SIGNATURE": "true"}, 0, "generation             a"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment | more,
            timeout=120,
            check=False,
        )
        assert done.returncode == status
        assert said in done.stdout + done.stderr


def test_an_s3_address_without_an_index(bucket: str, tmp_path: Path) -> None:
    for uri in (f"{bucket}/none", bucket, "s3://no-such-bucket/x"):
        with pytest.raises(UsageError, match="no published index"):
            probelog.open_index(uri)


def test_an_s3_server_that_cannot_be_reached(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="cannot be read"):
        probelog.open_index(f"{bucket}/none")
