"""Stores on local disk and in object stores of every kind behave alike."""

from __future__ import annotations

import datetime as dt
import io
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from probelog.errors import ConflictError, StoreError, UsageError
from probelog.storage.backends.s3 import S3
from probelog.storage.encoding import digest, parquet_bytes, short_key
from probelog.storage.store import Store
from tests.support.processes.s3 import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["local", "bucket", "google", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "a store")
    return Store(f"{request.getfixturevalue(request.param)}/{tmp_path.name}")


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b/c.bin", b"one")
    store.write("a/b/c.bin", b"two")
    assert store.read("a/b/c.bin") == b"two"
    assert store.exists("a/b/c.bin")
    assert not store.exists("a/b")
    assert store.read_or_none("a/none") is None
    with pytest.raises(FileNotFoundError):
        store.read("a/none")


def test_names_are_listed_sorted_below_a_folder(store: Store) -> None:
    for name in ("x/2.json", "x/1.json", "x/deep/3.json", "x/4.txt", "xy/5.json"):
        store.write(name, b"{}")
    assert store.names("x", suffix=".json") == ["x/1.json", "x/2.json", "x/deep/3.json"]
    assert store.names("nowhere") == []
    assert store.child("x").names("deep") == ["deep/3.json"]


def test_records_are_found_without_listing_all(store: Store) -> None:
    for name in ("x/2/facts.json", "x/1/facts.json", "x/1/deep/facts.json", "x/3/other.json", "x/facts.json"):
        store.write_json(name, {"name": name})
    assert store.folders("x") == ["x/1", "x/2", "x/3"]
    assert store.folders("nowhere") == []
    assert list(store.records("x", "facts.json")) == [
        (folder, {"name": f"{folder}/facts.json"}) for folder in ("x/1", "x/2")
    ]
    assert store.child("x").folders("1") == ["1/deep"]


def test_names_are_sorted_in_whatever_order_a_disk_lists_them(tmp_path: Path) -> None:
    numbers = [f"many/{7 * number % 30:02}.json" for number in range(30)]
    for name in numbers:
        Store(tmp_path).write(name, b"{}")
    assert Store(tmp_path).names("many") == sorted(numbers)


def test_create_never_overwrites(store: Store) -> None:
    assert store.create("once", b"first")
    assert not store.create("once", b"second")
    assert store.read("once") == b"first"


def test_swap_takes_only_what_was_expected(store: Store) -> None:
    store.swap("pointer", b"1", None)
    with pytest.raises(ConflictError):
        store.swap("pointer", b"2", None)
    store.swap("pointer", b"2", b"1")
    with pytest.raises(ConflictError):
        store.swap("pointer", b"3", b"1")
    assert store.read("pointer") == b"2"
    with pytest.raises(ConflictError):
        store.swap("missing", b"1", b"0")
    store.swap("in/folders/of-its-own", b"1", None)
    assert store.read("in/folders/of-its-own") == b"1"


def test_of_many_swaps_one_wins(store: Store) -> None:
    store.write("pointer", b"start")
    won: list[int] = []
    barrier = threading.Barrier(6)

    def publisher(number: int) -> None:
        barrier.wait()
        try:
            store.swap("pointer", f"by {number}".encode(), b"start")
            won.append(number)
        except ConflictError:
            pass

    threads = [threading.Thread(target=publisher, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("pointer") == f"by {won[0]}".encode()


@pytest.mark.parametrize("expected", [None, b"1"])
def test_a_swap_whose_answer_was_lost_counts(
    bucket: str, tmp_path: Path, expected: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put arrived; the library sent it again, and that was refused because the object had changed."""
    store = Store(f"{bucket}/{tmp_path.name}")
    if expected is not None:
        store.write("pointer", expected)
    real = S3.put_if

    def twice(self: S3, name: str, data: bytes, tag: str | None) -> bool:
        assert real(self, name, data, tag)
        return real(self, name, data, tag)

    monkeypatch.setattr(S3, "put_if", twice)
    store.swap("pointer", b"2", expected)
    assert store.read("pointer") == b"2"
    with pytest.raises(ConflictError):
        store.swap("pointer", b"3", expected)


def test_a_swap_is_tried_again_while_somebody_else_is_writing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may answer 409 to a conditional put while another one is under way, which may then fail."""
    store = Store(f"{bucket}/{tmp_path.name}")
    refusals = iter([True, True])
    real = S3.put_if

    def refused(self: S3, name: str, data: bytes, tag: str | None) -> bool:
        return False if next(refusals, False) else real(self, name, data, tag)

    monkeypatch.setattr(S3, "put_if", refused)
    store.swap("pointer", b"1", None)
    assert store.read("pointer") == b"1"


def test_a_put_that_another_one_is_in_the_way_of_is_sent_again(bucket: str, tmp_path: Path) -> None:
    """The same with the answer of a store that says so: 409 ConditionalRequestConflict."""
    from botocore.awsrequest import AWSResponse

    store, sent = Store(f"{bucket}/{tmp_path.name}"), list[str]()

    class Body(io.BytesIO):
        def stream(self, **_: object) -> Iterator[bytes]:
            yield self.read()

    def refuse_the_first(request: Any, **_: object) -> AWSResponse | None:
        sent.append(request.url)
        xml = b"<Error><Code>ConditionalRequestConflict</Code></Error>"
        return AWSResponse(request.url, 409, {}, Body(xml)) if len(sent) == 1 else None

    store._backend.client.meta.events.register("before-send.s3.PutObject", refuse_the_first)
    store.swap("pointer", b"1", None)
    assert len(sent) == 2
    assert store.read("pointer") == b"1"


def test_the_time_is_asked_for_below_the_stores_own_prefix(bucket: str, tmp_path: Path) -> None:
    """Credentials may be good for nothing else."""
    store, asked = Store(f"{bucket}/{tmp_path.name}/deep"), list[Any]()
    store._backend.client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: asked.append(params)
    )
    store.time()
    assert [params["Prefix"] for params in asked] == [f"{tmp_path.name}/deep"]


def test_times_and_digests(store: Store) -> None:
    before = store.time()
    store.write("a", bytes(9_000_000))
    assert store.measure("a") == (9_000_000, digest(bytes(9_000_000)))
    with pytest.raises(FileNotFoundError):
        store.measure("b")
    written = store.modified("a")
    assert written is not None
    # An object store's clock ticks in seconds.
    assert before - dt.timedelta(seconds=1) <= written <= store.time() + dt.timedelta(seconds=1)
    assert store.modified("b") is None
    assert store.names("") == ["a"]


def test_json_is_sealed(store: Store) -> None:
    store.write_json("a.json", {"b": [1, 2.5], "a": "é"})
    assert store.read_json("a.json") == store.read_json_or_none("a.json") == {"b": [1, 2.5], "a": "é"}
    assert store.read_json_or_none("b.json") is None
    store.write("a.json", store.read("a.json").replace(b"2.5", b"2.6"))
    with pytest.raises(StoreError, match="is damaged"):
        store.read_json("a.json")
    store.write("a.json", b'{"b": 1}')
    with pytest.raises(StoreError, match="not what it was sealed with"):
        store.read_json("a.json")


def test_delete(store: Store) -> None:
    store.write("a/1", b"")
    store.write("a/2", b"")
    store.delete("a/1")
    store.delete("a/1")
    assert store.names("a") == ["a/2"]
    store.delete_folder("a")
    store.delete_folder("a")
    assert store.names("a") == []
    with pytest.raises(StoreError):
        store.delete_folder("")


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/passwd"])
def test_names_cannot_climb_out(store: Store, name: str) -> None:
    with pytest.raises(StoreError):
        store.read(name)
    with pytest.raises(StoreError):
        store.write(name, b"")


def test_stores_travel(store: Store) -> None:
    store.write("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_tables_and_json(store: Store) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    store.write("t.parquet", parquet_bytes(table))
    assert store.read_table("t.parquet", ["b"]).to_pydict() == {"b": ["x", "y"]}
    store.write_json("j.json", {"a": 1})
    assert store.read_json("j.json") == {"a": 1}
    store.write("broken.json", b"{")
    with pytest.raises(StoreError, match="damaged"):
        store.read_json("broken.json")


def test_interrupted_writes_leave_nothing_that_is_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a/1", b"")
    (tmp_path / "a" / ".tmp-1-99-aaaa").write_bytes(b"half")
    assert store.names("a") == ["a/1"]


@pytest.mark.parametrize("address", ["", "  ", "abfs://bucket/x", "http://host/x"])
def test_unusable_addresses_are_refused(address: str) -> None:
    with pytest.raises(UsageError):
        Store(address)


def test_keys_do_not_run_together() -> None:
    assert short_key("a", "bc") != short_key("ab", "c")
    assert short_key("a", 1) == short_key("a", 1)
    assert len(short_key()) == 16
