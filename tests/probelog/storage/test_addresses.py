"""Addresses of stores, and the waits between tries: what needs no server."""

from __future__ import annotations

import datetime as dt
import io
import random
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from probelog.errors import SchemaVersionError, StoreError, UsageError
from probelog.storage.encoding import from_npy, npy, parquet_bytes
from probelog.storage.store import Store, lance_options, retry_with_backoff


def test_addresses_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for address, root in (
        (tmp_path / "a", tmp_path / "a"),
        (f"file://{tmp_path}/a", tmp_path / "a"),
        ("a/b", tmp_path / "a/b"),
        ("~/a", tmp_path / "home/a"),
    ):
        store = Store(address)
        assert (store.is_local, store.uri, store.root) == (True, str(root), str(root))
    assert store.path("") == store.uri
    assert store.path("x/y") == f"{store.uri}/x/y"
    assert store.child("x").uri == f"{store.uri}/x"
    assert repr(store) == f"Store({store.uri!r})"


def test_addresses_of_buckets() -> None:
    store = Store("s3://bucket/some/prefix/")
    assert (store.is_local, store.uri) == (False, "s3://bucket/some/prefix")
    assert store.path("x") == "s3://bucket/some/prefix/x"
    assert Store("s3://bucket").child("x").uri == "s3://bucket/x"
    assert Store("gs://bucket/a/").path("x") == "gs://bucket/a/x"
    assert Store("az://container").path("x/y") == "az://container/x/y"


@pytest.mark.parametrize("name", ["../x", "a/../x", "/x"])
def test_a_path_outside_the_store_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="is not a path inside the store"):
        Store(tmp_path).path(name)


def test_options_of_lance_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert lance_options("s3://bucket/x") == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://general")
    assert lance_options("s3://bucket/x") == {"aws_endpoint": "https://general", "allow_http": "false"}
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special")
    assert lance_options("s3://bucket/x") == {"aws_endpoint": "http://special", "allow_http": "true"}
    assert lance_options("/folder") == {}
    for scheme, variable in (("gs", "GOOGLE_BASE_URL"), ("az", "AZURE_STORAGE_ENDPOINT")):
        monkeypatch.delenv(variable, raising=False)
        assert lance_options(f"{scheme}://bucket/x") == {}
        monkeypatch.setenv(variable, "https://other")
        key = variable.lower()
        assert lance_options(f"{scheme}://bucket/x") == {key: "https://other", "allow_http": "false"}
        monkeypatch.setenv(variable, "http://other")
        assert lance_options(f"{scheme}://bucket/x") == {key: "http://other", "allow_http": "true"}


def test_ranges_sizes_and_columns(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("a/1", b"0123456789")
    store.write("a/b/2", b"")
    with store.open("a/1") as file:
        file.seek(3)
        assert file.read(4) == b"3456"
    assert store.sizes("a") == {"a/1": 10, "a/b/2": 0}
    assert store.sizes("none") == {}
    table = pa.table({"x": [1, 2], "y": ["a", "b"]})
    store.write("t", parquet_bytes(table))
    assert store.read_table("t") == table
    assert store.read_table("t", ["y"]) == table.select(["y"])


def test_the_clock_of_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    now = dt.datetime.now(dt.UTC)
    assert abs(store.time() - now) < dt.timedelta(seconds=5)
    assert list((tmp_path / "new").iterdir()) == []
    store.write("x", b"")
    assert store.modified("") is None, "a folder is no object"


def test_arrays_never_hold_objects() -> None:
    array = from_npy(npy(pa.array([1, 2]).to_numpy()))
    assert array.tolist() == [1, 2]
    with pytest.raises(ValueError, match="pickle"):
        npy(pa.array(["x"]).to_numpy(zero_copy_only=False))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        from_npy(pickled.getvalue())


def test_the_region_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert Store("s3://bucket")._backend.filesystem.region == "eu-west-3"
    monkeypatch.setenv("AWS_REGION", "ap-south-1")
    assert Store("s3://bucket")._backend.filesystem.region == "ap-south-1"


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_waits_double_up_to_half_a_minute_and_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), []

    def call() -> None:
        calls.append(clock.now)
        raise StoreError(f"refusal {len(calls)}")

    with pytest.raises(StoreError) as caught:
        retry_with_backoff(call, 200.0)
    assert str(caught.value) == f"refusal {len(calls)}", "the last error"
    assert (calls[0], calls[-1]) == (100.0, 300.0), "tried at once, and once more when the time is over"
    ceilings = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, *[30.0] * 20]
    for wait, ceiling in zip(clock.slept[:-1], ceilings, strict=False):
        assert ceiling / 2 <= wait <= ceiling
    assert len(set(clock.slept[7:-1])) > 1, "not all workers at the same moment"


def test_the_last_wait_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)

    def call() -> None:
        raise StoreError("no")

    with pytest.raises(StoreError, match="no"):
        retry_with_backoff(call, 0.6)
    assert clock.slept == pytest.approx([0.25, 0.35])


def test_a_newer_format_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def call() -> None:
        raise SchemaVersionError("newer")

    with pytest.raises(SchemaVersionError):
        retry_with_backoff(call, 60.0)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("az://KEY@account/x", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("az://container/x?sv=2021&sig=geheim12", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("gs://user:geheim12@bucket", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://bucket/x?X-Amz-Signature=geheim12", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_keys_belong_in_the_environment(address: str, place: str) -> None:
    with pytest.raises(UsageError, match=place) as refused:
        Store(address)
    assert "geheim12" not in str(refused.value)


def test_a_store_at_google_or_azure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    for address in ("gs://bucket/x", "az://container/x"):
        for use in (Store(address).read, Store(address).names, Store(address).exists):
            with pytest.raises(UsageError, match=r"need obstore: install probelog\[cloud\]"):
                use("a")


@pytest.mark.parametrize("address", ["s3://", "s3:///prefix", "s3://?x"])
def test_an_address_without_a_bucket(address: str) -> None:
    with pytest.raises(UsageError, match="names no bucket: write s3://bucket/prefix"):
        Store(address)
