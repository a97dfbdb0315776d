"""What is on disk when a write returns, and what a crash in the middle of one leaves behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from probelog.errors import ConflictError, StoreError
from probelog.storage.store import Store


class Disk:
    """The calls that change the disk, in their order; one of them may fail as if the machine did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.fails = ""
        for name in ("fsync", "replace", "link"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*given: int | str | Path) -> None:
            first = Path(os.readlink(f"/proc/self/fd/{given[0]}") if name == "fsync" else str(given[0]))
            what = "folder" if first.is_dir() else "temporary" if first.name.startswith(".tmp-") else "target"
            size = f" of {first.stat().st_size}" if what != "folder" else ""
            self.events.append(f"{name} {what}{size}")
            if self.events[-1] == self.fails:
                raise OSError("the power failed")
            real(*given)

        return call


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


WRITES: dict[str, Callable[[Store], object]] = {
    "write": lambda store: store.write("folder/name", b"content"),
    "create": lambda store: store.create("folder/name", b"content"),
    "swap": lambda store: store.swap("folder/name", b"content", None),
}


@pytest.mark.parametrize("how", WRITES)
def test_content_is_on_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, disk: Disk, how: str
) -> None:
    WRITES[how](Store(tmp_path))
    named = "link temporary of 7" if how == "create" else "replace temporary of 7"
    assert disk.events == ["fsync temporary of 7", named, "fsync folder"]
    assert (tmp_path / "folder/name").read_bytes() == b"content"
    left = {path.name for path in (tmp_path / "folder").iterdir()} - {".tmp-name.lock"}
    assert left == {"name"}


@pytest.mark.parametrize("fails", ["fsync temporary of 7", "replace temporary of 7"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, disk: Disk, fails: str) -> None:
    store = Store(tmp_path)
    store.write("folder/name", b"old")
    disk.fails = fails
    with pytest.raises(StoreError, match="power"):
        store.write("folder/name", b"content")
    assert store.read("folder/name") == b"old"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["name"]


def test_a_folder_that_cannot_be_synced_is_no_success(tmp_path: Path, disk: Disk) -> None:
    disk.fails = "fsync folder"
    with pytest.raises(StoreError, match="power"):
        Store(tmp_path).write("folder/name", b"content")


def test_two_writes_of_one_name_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = Store(tmp_path), os.replace

    def another_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        store.write("name", b"second")
        real(source, target)

    monkeypatch.setattr(os, "replace", another_first)
    store.write("name", b"first")
    assert store.read("name") == b"first"


def test_a_swap_waits_for_one_that_has_already_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = Store(tmp_path), os.replace
    store.write("name", b"old")
    refused: list[ConflictError] = []

    def late() -> None:
        try:
            store.swap("name", b"late", b"old")
        except ConflictError as error:
            refused.append(error)

    other = threading.Thread(target=late)

    def while_replacing(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it must wait for the lock"
        real(source, target)

    monkeypatch.setattr(os, "replace", while_replacing)
    store.swap("name", b"first", b"old")
    other.join()
    assert store.read("name") == b"first"
    assert len(refused) == 1


def test_the_lock_of_a_swap_is_not_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.swap("folder/name", b"1", None)
    assert store.sizes("") == {"folder/name": 1}
