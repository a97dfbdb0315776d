"""The rules of generations, on folders that hold a file or two: what is kept, retired, deleted, and refused."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from probelog.errors import ConflictError, HeldError, IndexNotFoundError, StoreError, UsageError
from probelog.index.pointer import Pointer, find_index, read_pointer
from probelog.publication.lifecycle import (
    BUILDING,
    GRACE,
    discard,
    go_live,
    list_files,
    read_files,
    release,
    renew,
    reserve,
    roll_back,
    sweep,
)
from probelog.storage.encoding import digest
from probelog.storage.layout import FILES, HOLD, POINTER
from probelog.storage.store import Store

NO_GRACE = dt.timedelta(0)
SECOND = dt.timedelta(seconds=1)


@pytest.fixture
def index(tmp_path: Path) -> Store:
    return Store(tmp_path / "index")


def make(index: Store, name: str) -> str:
    """A generation that is built and listed; returns the digest of its list of files."""
    reserve(index, name)
    index.write(f"generations/{name}/meta.lance/data", name.encode())
    index.write(f"generations/{name}/logits.lance/data", b"logits of " + name.encode())
    return list_files(index, name)


def publish(index: Store, *names: str, base: str | None = None) -> Pointer:
    for name in names:
        make(index, name)
        pointer = go_live(index, name, f"source of {name}", base=base)
    return pointer


def generations(index: Store) -> set[str]:
    return {name.split("/")[1] for name in index.names("generations")}


def live(index: Store) -> Pointer:
    return read_pointer(index)[0]


# Updates and their bases


def test_the_base_of_an_update_is_kept_for_as_long_as_the_update(index: Store) -> None:
    publish(index, "base")
    for name in ("u1", "u2", "u3", "u4"):
        publish(index, name, base="base")
        sweep(index, NO_GRACE)
        sweep(index, NO_GRACE)
    assert live(index).referenced == ["u4", "u3", "u2", "base"]
    assert generations(index) == {"u4", "u3", "u2", "base"}
    publish(index, "w1", "w2")
    sweep(index, NO_GRACE)
    assert generations(index) == {"w2", "w1", "u4", "base"}, "the last update can still be rolled back to"
    publish(index, "w3")
    assert sorted(live(index).retired) == ["base", "u4"]
    assert sweep(index, NO_GRACE) == ["base", "u4"]
    assert generations(index) == {"w3", "w2", "w1"}


def test_the_base_of_a_withdrawn_update_is_kept(index: Store) -> None:
    publish(index, "base")
    publish(index, "u1", base="base")
    publish(index, "w1")
    make(index, "u2")
    go_live(index, "u2", "s", base="w1", keep=2)
    roll_back(index, "w1")
    assert live(index).referenced == ["w1", "u2"]
    other = Pointer("whole", "s", "p", withdrawn=[{"generation": "u", "base": "base"}])
    assert other.referenced == ["whole", "u", "base"]
    sweep(index, NO_GRACE)
    assert roll_back(index, "u2").base == "w1"


def test_the_pointer_says_what_an_update_rests_on(index: Store) -> None:
    base_files = make(index, "base")
    go_live(index, "base", "s")
    own_files = make(index, "update")
    pointer = go_live(index, "update", "source", base="base")
    assert (pointer.base, pointer.base_files, pointer.files) == ("base", base_files, own_files)
    back = roll_back(index)
    assert (back.generation, back.base, back.base_files, back.files) == ("base", None, None, base_files)
    again = roll_back(index, "update")
    assert (again.base, again.base_files, again.files) == ("base", base_files, own_files)
    assert publish(index, "whole").base is None
    assert live(index) == Pointer.from_bytes(index.read(POINTER), "here")


def test_an_update_of_what_is_no_longer_kept_does_not_go_live(index: Store) -> None:
    make(index, "base")
    make(index, "update")
    with pytest.raises(StoreError, match="generation base is no longer kept"):
        go_live(index, "update", "s", base="base")
    assert index.read_or_none(POINTER) is None
    publish(index, "a")
    with pytest.raises(StoreError, match="generation base is no longer kept"):
        go_live(index, "update", "s", base="base")
    assert live(index).generation == "a"


def test_an_update_of_an_incomplete_base_does_not_go_live(index: Store) -> None:
    publish(index, "base")
    make(index, "update")
    index.delete("generations/base/logits.lance/data")
    with pytest.raises(StoreError, match=r"generation base is incomplete: logits.lance/data is missing"):
        go_live(index, "update", "s", base="base")
    assert live(index).generation == "base"


def _remove(index: Store) -> None:
    index.delete_folder("generations/base")


def _shorten(index: Store) -> None:
    index.write("generations/base/logits.lance/data", b"")


def _relist(index: Store) -> None:
    index.write("generations/base/logits.lance/data", b"something else")
    list_files(index, "base")


@pytest.mark.parametrize("damage", [_remove, _shorten, _relist])
def test_no_rollback_to_an_update_of_a_missing_base(index: Store, damage: Callable[[Store], None]) -> None:
    publish(index, "base")
    publish(index, "update", base="base")
    publish(index, "w1")
    before = index.read(POINTER)
    damage(index)
    with pytest.raises(StoreError, match=r"base.* Publish again, or go back to base \(--to\)"):
        roll_back(index)
    assert index.read(POINTER) == before


def test_no_rollback_to_a_generation_that_has_changed(index: Store) -> None:
    publish(index, "a", "b")
    index.write("generations/a/meta.lance/data", b"longer")
    with pytest.raises(StoreError, match=r"generation a is incomplete.*Publish again$"):
        roll_back(index)
    list_files(index, "a")
    with pytest.raises(StoreError, match="its digest is not the one in the pointer"):
        roll_back(index)
    assert live(index).generation == "b"


# Going live


def test_the_pointer_after_a_publish(index: Store) -> None:
    files = make(index, "a")
    assert index.exists(f"generations/a/{HOLD}")
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    first = go_live(index, "a", "source of a")
    assert before <= dt.datetime.fromisoformat(first.published) <= dt.datetime.now(dt.UTC)
    assert first == Pointer("a", "source of a", first.published, files) == live(index)
    assert not index.exists(f"generations/a/{HOLD}")
    second = publish(index, "b")
    assert second.serial == first.serial + 1
    assert second.previous == [first.facts]
    assert second.choice == ["b", "a"]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_keep_is_the_number_of_generations(index: Store, keep: int) -> None:
    for name in "abcde":
        make(index, name)
        pointer = go_live(index, name, "s", keep=keep)
    assert pointer.referenced == list("edcba")[:keep]
    assert sorted(pointer.retired) == sorted("abcde"[:-keep])


def test_three_are_kept_by_default(index: Store) -> None:
    assert publish(index, *"abcd").referenced == ["d", "c", "b"]


def test_a_generation_that_is_published_again_is_listed_once(index: Store) -> None:
    publish(index, "a", "b")
    assert go_live(index, "a", "s").choice == ["a", "b"]


def test_what_was_withdrawn_is_retired_by_the_next_publish(index: Store) -> None:
    publish(index, "a", "b", "c")
    assert [item["generation"] for item in roll_back(index, "a").withdrawn] == ["b", "c"]
    pointer = publish(index, "d")
    assert (pointer.referenced, sorted(pointer.retired), pointer.withdrawn) == (["d", "a"], ["b", "c"], [])
    make(index, "e")
    with pytest.raises(UsageError, match=r"there is no generation 'b' to roll back to; there is a$"):
        roll_back(index, "b")


def test_a_retired_generation_cannot_go_live(index: Store) -> None:
    publish(index, "a", "b", "c", "d")
    before = index.read(POINTER)
    with pytest.raises(StoreError, match="generation a was retired by a sweep"):
        go_live(index, "a", "s")
    assert index.read(POINTER) == before


def test_a_publisher_with_an_expected_choice_gets_a_conflict(index: Store) -> None:
    publish(index, "a", "b")
    make(index, "c")
    for seen in (["a"], ["b"], [], ["a", "b"]):
        with pytest.raises(ConflictError, match=r"meanwhile \(b is live\)"):
            go_live(index, "c", "s", expected_choice=seen)
    assert go_live(index, "c", "s", expected_choice=("b", "a")).generation == "c"
    index.delete(POINTER)
    make(index, "d")
    with pytest.raises(ConflictError, match=r"the pointer is missing"):
        go_live(index, "d", "s", expected_choice=["c"])


def test_an_unfinished_generation_does_not_go_live(index: Store) -> None:
    reserve(index, "a")
    with pytest.raises(StoreError, match="generation a is missing, or was never finished"):
        go_live(index, "a", "s")
    make(index, "b")
    for name in ("meta", "logits"):
        index.delete(f"generations/b/{name}.lance/data")
    with pytest.raises(StoreError, match=r"b is incomplete: .*lance/data and 1 other files are missing"):
        go_live(index, "b", "s")
    assert index.read_or_none(POINTER) is None


def test_a_hold_is_there_until_the_swap_has_happened(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, "a")
    make(index, "b")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _no_power)
        with pytest.raises(StoreError, match="no power"):
            go_live(index, "b", "s")
    assert index.exists(f"generations/b/{HOLD}")
    assert live(index).generation == "a"


def _no_power(*_: object) -> None:
    raise OSError("no power")


def test_a_pointer_that_changes_all_the_time_is_left_alone(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a")
    make(index, "b")
    tries, real = [], Store.swap

    def swap(self: Store, name: str, data: bytes, expected: bytes | None) -> None:
        tries.append(expected)
        raise ConflictError("somebody else")

    monkeypatch.setattr(Store, "swap", swap)
    with pytest.raises(ConflictError, match="changes all the time"):
        go_live(index, "b", "s")
    assert len(tries) == 20
    monkeypatch.setattr(Store, "swap", real)
    assert live(index).generation == "a"


def test_a_concurrent_sweep_is_no_conflict_and_a_publisher_is(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a")
    for name in "bcd":
        make(index, name)
    real = Store.swap

    def after(change: Callable[[], object]) -> Callable[..., None]:
        def swap(self: Store, *given: object) -> None:
            monkeypatch.setattr(Store, "swap", real)
            change()
            real(self, *given)

        return swap

    def swept() -> None:
        pointer, before = read_pointer(index)
        index.swap(
            POINTER, replace(pointer, serial=pointer.serial + 1, retired={"x": "now"}).to_bytes(), before
        )

    monkeypatch.setattr(Store, "swap", after(swept))
    pointer = go_live(index, "b", "s")
    assert (pointer.choice, pointer.retired, pointer.serial) == (["b", "a"], {"x": "now"}, 3)
    monkeypatch.setattr(Store, "swap", after(lambda: go_live(index, "c", "s")))
    with pytest.raises(ConflictError, match=r"meanwhile \(c is live\)"):
        go_live(index, "d", "s")
    monkeypatch.setattr(Store, "swap", after(lambda: go_live(index, "d", "s")))
    with pytest.raises(ConflictError, match=r"meanwhile \(d is live\)"):
        roll_back(index)


# Rolling back


def test_a_rollback_moves_the_line_and_keeps_its_order(index: Store) -> None:
    first = publish(index, "a", "b", "c")
    past = {str(item["generation"]): item for item in first.kept_facts}
    back = roll_back(index, "a")
    assert (back.generation, back.previous, back.withdrawn) == ("a", [], [past["b"], past["c"]])
    assert (back.source, back.serial) == ("source of a", first.serial + 1)
    middle = roll_back(index, "b")
    assert [item["generation"] for item in middle.previous] == ["a"]
    assert [item["generation"] for item in middle.withdrawn] == ["c"]
    again = roll_back(index, "c")
    assert [item["generation"] for item in again.previous] == ["b", "a"]
    assert again.withdrawn == []
    assert again.retired == {}


@pytest.mark.parametrize("to", ["c", "x"])
def test_no_rollback_to_what_is_live_or_unknown(index: Store, to: str) -> None:
    publish(index, "a", "b", "c")
    with pytest.raises(UsageError, match=rf"no generation '{to}' to roll back to; there is a and b$"):
        roll_back(index, to)


def test_nothing_is_published_over_what_is_held(index: Store) -> None:
    publish(index, "a", "b")
    back = roll_back(index, hold="b answers nonsense")
    assert (back.generation, back.held) == ("a", {"reason": "b answers nonsense", "since": back.published})
    make(index, "c")
    for _ in range(2):
        with pytest.raises(
            HeldError, match=r"a is held since .* \(b answers nonsense\): .*`probelog-index release`"
        ):
            go_live(index, "c", "source of c")
    assert live(index) == back
    assert roll_back(index, "b").held == back.held, (
        "it stays when another generation becomes live by a rollback"
    )
    roll_back(index, "a")
    freed = release(index)
    assert (freed.generation, freed.held, freed.withdrawn) == ("a", None, back.withdrawn)
    with pytest.raises(UsageError, match="is not held"):
        release(index)
    assert go_live(index, "c", "source of c").held is None


def test_a_hold_without_a_rollback_and_one_at_the_last_moment(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a", "b")
    held = roll_back(index, "b", hold="it is Friday")
    assert (held.choice, held.withdrawn) == (["b", "a"], [])
    release(index)
    make(index, "c")
    swap, calls = Store.swap, []

    def late(store: Store, *arguments: object) -> None:
        monkeypatch.setattr(Store, "swap", swap)
        calls.append(roll_back(index, "b", hold="just now"))
        store.swap(*arguments)

    monkeypatch.setattr(Store, "swap", late)
    with pytest.raises(HeldError, match="just now"):
        go_live(index, "c", "s", expected_choice=["b", "a"])
    assert live(index) == calls[0]


def test_no_rollback_where_there_is_nothing_else(index: Store) -> None:
    publish(index, "a")
    with pytest.raises(UsageError, match="there is no earlier generation"):
        roll_back(index)
    with pytest.raises(UsageError, match="there are no others"):
        roll_back(index, "a")


def test_no_rollback_over_what_was_published_while_it_was_checked(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a", "b")
    make(index, "c")
    real = Store.sizes

    def sizes(self: Store, folder: str) -> dict[str, int]:
        monkeypatch.setattr(Store, "sizes", real)
        go_live(index, "c", "s")
        return real(self, folder)

    monkeypatch.setattr(Store, "sizes", sizes)
    with pytest.raises(ConflictError, match=r"meanwhile \(c is live\)"):
        roll_back(index)
    assert live(index).choice == ["c", "b", "a"]


# Sweeping


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[dt.datetime]:
    """The store's clock, which stands still until it is set."""
    now = [dt.datetime(2031, 1, 1, tzinfo=dt.UTC)]
    monkeypatch.setattr(Store, "time", lambda _: now[0])
    return now


def test_what_is_retired_is_deleted_after_the_grace(index: Store, clock: list[dt.datetime]) -> None:
    publish(index, "a", "b", "c", "d")
    assert live(index).retired == {"a": "2031-01-01T00:00:00+00:00"}
    clock[0] += GRACE - SECOND
    before = index.read(POINTER)
    assert sweep(index) == []
    assert index.read(POINTER) == before, "nothing to do, nothing written"
    clock[0] += SECOND
    serial = live(index).serial
    assert sweep(index) == ["a"]
    assert (live(index).retired, live(index).serial) == ({}, serial + 1)
    assert generations(index) == {"b", "c", "d"}
    assert dt.timedelta(minutes=10) == GRACE


def test_each_is_deleted_in_its_own_time(index: Store, clock: list[dt.datetime]) -> None:
    publish(index, "a", "b", "c", "d")
    clock[0] += GRACE / 2
    publish(index, "e")
    clock[0] += GRACE / 2
    assert sweep(index) == ["a"]
    assert list(live(index).retired) == ["b"]


def test_the_generation_of_a_dead_publisher_is_retired_after_a_day(
    index: Store, tmp_path: Path, clock: list[dt.datetime]
) -> None:
    publish(index, "a")
    make(index, "left")
    os.utime(tmp_path / f"index/generations/left/{HOLD}", (clock[0].timestamp(),) * 2)
    clock[0] += BUILDING - SECOND
    sweep(index)
    assert live(index).retired == {}
    clock[0] += SECOND
    assert sweep(index) == [], "retired first: its readers, if any, have time to leave"
    assert live(index).retired == {"left": clock[0].isoformat()}
    assert sweep(index) == []
    clock[0] += GRACE
    assert sweep(index) == ["left"]
    assert generations(index) == {"a"}
    assert dt.timedelta(days=1) == BUILDING


def test_a_time_that_cannot_be_read_deletes_nothing(index: Store) -> None:
    pointer = publish(index, "a", "b")
    make(index, "old")
    index.write(POINTER, replace(pointer, retired={"old": "yesterday"}).to_bytes())
    assert sweep(index, SECOND) == []
    index.write(POINTER, replace(pointer, retired={"old": "2020-01-01T00:00:00"}).to_bytes())
    assert sweep(index, SECOND) == [], "without a time zone"
    assert generations(index) == {"a", "b", "old"}


def test_a_sweep_returns_only_deleted_generations(index: Store) -> None:
    pointer = publish(index, "a")
    index.write(POINTER, replace(pointer, retired={"none": "2020-01-01T00:00:00+00:00"}).to_bytes())
    assert sweep(index) == []
    assert live(index).retired == {}
    index.delete(POINTER)
    with pytest.raises(IndexNotFoundError):
        sweep(index)


def test_an_overtaken_sweep_leaves_the_pointer_unchanged(
    index: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(index, "a")
    index.write("generations/ruin/x", b"1")
    make(index, "b")
    real = Store.swap

    def swap(self: Store, *given: object) -> None:
        monkeypatch.setattr(Store, "swap", real)
        go_live(index, "b", "s")
        real(self, *given)

    monkeypatch.setattr(Store, "swap", swap)
    assert sweep(index, NO_GRACE) == []
    assert (live(index).generation, live(index).retired) == ("b", {})
    sweep(index, NO_GRACE)
    assert list(live(index).retired) == ["ruin"]


# Building


def test_a_name_is_taken_once(index: Store) -> None:
    reserve(index, "a")
    with pytest.raises(StoreError, match="there is a generation a already"):
        reserve(index, "a")
    index.write("generations/b/x", b"")
    with pytest.raises(StoreError, match="there is a generation b already"):
        reserve(index, "b")
    assert not index.exists(f"generations/b/{HOLD}")


def test_a_name_that_is_taken_at_the_same_moment(index: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.names

    def names(self: Store, folder: str, suffix: str = "") -> list[str]:
        found = real(self, folder, suffix)
        monkeypatch.setattr(Store, "names", real)
        reserve(index, "a")
        return found

    monkeypatch.setattr(Store, "names", names)
    with pytest.raises(StoreError, match="there is a generation a already"):
        reserve(index, "a")


def test_a_hold_is_renewed_while_it_is_there(index: Store, tmp_path: Path) -> None:
    reserve(index, "a")
    hold = tmp_path / f"index/generations/a/{HOLD}"
    os.utime(hold, (0, 0))
    renew(index, "a")
    assert hold.stat().st_mtime > 0
    hold.unlink()
    with pytest.raises(StoreError, match="generation a was retired by a sweep"):
        renew(index, "a")
    assert not hold.exists()


def test_a_list_of_files(index: Store) -> None:
    found = make(index, "a")
    files, again = read_files(index, "a")
    assert found == again == digest(index.read(f"generations/a/{FILES}"))
    assert files == {
        "meta.lance/data": (1, digest(b"a")),
        "logits.lance/data": (11, digest(b"logits of a")),
    }
    assert list_files(index, "a") == found, "neither the list nor the hold are on the list"
    assert read_files(index, "a", found)[0] == files
    with pytest.raises(StoreError, match="its digest is not the one in the pointer"):
        read_files(index, "a", "0" * 64)
    with pytest.raises(FileNotFoundError):
        read_files(index, "none")
    for content in (
        {"version": 1},
        {"version": 1, "files": {"x": {"size": "much", "sha256": "0"}}},
        {"version": 1, "files": []},
    ):
        index.write_json(f"generations/a/{FILES}", content)
        with pytest.raises(StoreError, match="is damaged"):
            read_files(index, "a")


def test_only_unused_generations_are_discarded(index: Store) -> None:
    make(index, "first")
    discard(index, "first")
    assert generations(index) == set(), "there is no pointer yet"
    publish(index, "base")
    publish(index, "update", base="base")
    publish(index, "whole", "w2")
    make(index, "other")
    for name in ("w2", "update", "base"):
        with pytest.raises(StoreError, match=f"generation {name} is in use"):
            discard(index, name)
    discard(index, "other")
    assert generations(index) == {"base", "update", "whole", "w2"}


# The pointer


def test_an_index_is_found_by_its_own_address_and_by_its_stores(index: Store, tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match=r"no published index at .*looked for current.json"):
        find_index(str(tmp_path))
    publish(index, "a")
    assert find_index(str(tmp_path)).uri == find_index(index.uri).uri == index.uri
    Store(tmp_path).write(POINTER, b"{}")
    assert find_index(str(tmp_path)).uri == str(tmp_path), "its own first"


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / POINTER).mkdir()
    with pytest.raises(StoreError, match="cannot be read"):
        read_pointer(Store(tmp_path))
    with pytest.raises(StoreError, match="cannot be read"):
        find_index(f"{tmp_path}/{'x' * 300}")


@pytest.mark.parametrize(
    "change",
    [
        {"generation": ""}, {"generation": 3}, {"source": None}, {"published": None}, {"files": 3}, {"files": ""},
        {"files": None},
        {"base": "a", "base_files": None}, {"base": 3, "base_files": "x"}, {"previous": [{"generation": "x"}]},
        {"withdrawn": [{}]}, {"retired": {"x": None}}, {"retired": []}, {"serial": "many"}, {"version": None},
    ],
)  # fmt: skip
def test_a_pointer_of_which_anything_makes_no_sense_is_damaged(
    index: Store, change: dict[str, object]
) -> None:
    content = asdict(Pointer("g", "s", "p", "f"))
    index.write_json(POINTER, content)
    assert live(index) == Pointer("g", "s", "p", "f")
    index.write_json(POINTER, content | change)
    with pytest.raises(StoreError, match=r"is damaged.*Delete it and publish again"):
        read_pointer(index)
