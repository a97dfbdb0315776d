"""A disk or an object store that fails, whatever is asked of it: one error that names the object and what to check."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from probelog.errors import StoreError
from probelog.storage.backends import cloud
from probelog.storage.store import Store
from tests.support.processes.google import google_server
from tests.support.processes.s3 import s3_server

OPERATIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("a/b"),
    "read_or_none": lambda store: store.read_or_none("a/b"),
    "read_json": lambda store: store.read_json("a/b"),
    "read_table": lambda store: store.read_table("a/b"),
    "exists": lambda store: store.exists("a/b"),
    "modified": lambda store: store.modified("a/b"),
    "names": lambda store: store.names("a"),
    "measure": lambda store: store.measure("a/b"),
    "open": lambda store: store.open("a/b").__enter__(),
    "time": lambda store: store.time(),
    "write": lambda store: store.write("a/b", b"1"),
    "create": lambda store: store.create("a/b", b"1"),
    "swap": lambda store: store.swap("a/b", b"1", None),
    "delete": lambda store: store.delete("a/b"),
    "delete_folder": lambda store: store.delete_folder("a"),
}


# The others go the same ways, and pyarrow tries each for a second or two.
@pytest.mark.parametrize(
    "name", ["read", "exists", "names", "time", "write", "create", "swap", "delete", "delete_folder"]
)
def test_an_object_store_out_of_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StoreError, match=r"^s3://bucket/x.* cannot be .* AWS_ENDPOINT_URL") as error:
            OPERATIONS[name](Store("s3://bucket/x"))
    assert error.value.__cause__ is not None


# What is asked of single objects does not look at the folder above them.
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"exists", "modified"}))
def test_a_file_in_the_way_of_a_folder(name: str, tmp_path: Path) -> None:
    """Not a missing object: nothing can be read or written there before somebody looks at it."""
    blocked = tmp_path / "store"
    blocked.mkdir()
    (blocked / "a").write_text("in the way")
    store = Store(blocked if name != "time" else blocked / "a")
    with pytest.raises(StoreError, match=rf"^{blocked}/a.* cannot be ") as error:
        OPERATIONS[name](store)
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("scheme", "variable"), [("gs", "GOOGLE_BASE_URL"), ("az", "AZURE_STORAGE_ENDPOINT")]
)
@pytest.mark.parametrize("name", ["read", "names", "time", "swap", "delete_folder"])
def test_another_cloud_out_of_reach(
    name: str, scheme: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cloud._RETRY, "max_retries", 0)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"geheim12" * 4).decode())
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "geheim12geheim12")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv(variable, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StoreError, match=rf"^{scheme}://bucket/x.* cannot be .*Check the") as error:
            OPERATIONS[name](Store(f"{scheme}://bucket/x"))
    assert error.value.__cause__ is not None
    assert "\n" not in str(error.value)
    assert "geheim12" not in str(error.value)


def test_a_container_that_is_not_there(google: str) -> None:
    """To a reader it holds nothing; a writer is told."""
    store = Store("gs://no-such-bucket/x")
    assert store.read_or_none("a") is None
    with pytest.raises(
        StoreError, match=r"^gs://no-such-bucket/x/a cannot be written: .*404.* Check the bucket"
    ):
        store.write("a", b"1")


def test_a_put_that_google_refuses_for_now_is_sent_again() -> None:
    with google_server() as (address, server):
        store = Store(f"{address}/x")
        server.refusals += [503, 429]
        store.swap("pointer", b"1", None)
        assert store.read("pointer") == b"1"
        assert not server.refusals


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_missing_object_is_no_failure(place: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        store = Store(tmp_path if place == "local" else f"{stack.enter_context(s3_server())}/x")
        for name in ("read", "read_json", "read_table", "measure", "open"):
            with pytest.raises(FileNotFoundError):
                OPERATIONS[name](store)


def test_a_file_that_fails_while_it_is_read(tmp_path: Path) -> None:
    """What a library reads from an opened object, in the midst of its own work."""
    store = Store(tmp_path)
    store.write("part", b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(StoreError, match=r"part cannot be read"), store.open("part") as stream:
        pq.ParquetFile(stream)


@pytest.fixture
def cut_short() -> Iterator[str]:
    """An object store that promises an object of a megabyte and hangs up after its beginning."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    with client, client.makefile("rb") as lines:
                        request = lines.readline()
                        while lines.readline().strip():
                            pass
                        head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\n"
                        client.sendall(head if request.startswith(b"HEAD") else head + b"1234")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("name", ["measure", "swap"])
def test_an_object_store_that_hangs_up(name: str, cut_short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", cut_short)
    with pytest.raises(StoreError, match=r"^s3://bucket/x/a/b cannot be (read|written)"):
        OPERATIONS[name](Store("s3://bucket/x"))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Make room there."),
        (errno.EDQUOT, "Make room there."),
        (errno.EACCES, "Check who may read and write there."),
        (errno.EPERM, "Check who may read and write there."),
        (errno.EROFS, "Check who may read and write there."),
        (errno.EIO, "Check that folder and the disk that it lies on."),
        # The folder was removed meanwhile: to a writer this is no missing object.
        (errno.ENOENT, "Check that folder and the disk that it lies on."),
    ],
)
def test_what_to_check(number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError) as error:
        Store(tmp_path).write("a", b"1")
    cause = OSError(number, os.strerror(number))
    assert str(error.value) == f"{tmp_path}/a cannot be written: {cause}. {advice}"
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == number
    assert not list(tmp_path.iterdir())
