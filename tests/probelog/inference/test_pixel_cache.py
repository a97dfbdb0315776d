"""The node's cache of preprocessed probes: filled by whoever comes, never twice, and never wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.inference import pixel_cache
from probelog.inference.observe import observe
from probelog.inference.pixel_cache import PixelCache
from tests.probelog.inference.test_observe import COUNT, Pictures, classifier, linear, make, recipe

ALL = list(range(COUNT))
ROOM = 10**6


def cache(folder: Path, max_bytes: int = ROOM, probe_set: str = "set") -> PixelCache:
    return PixelCache(folder, max_bytes, probe_set=probe_set, count=COUNT)


def expected(indices: Sequence[int], size: int = 8) -> np.ndarray:
    return recipe(size).geometry([make(i) for i in indices])


def arrays(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pixels"))


def test_only_what_is_needed_and_missing_is_made(tmp_path: Path) -> None:
    pictures = Pictures()
    for indices, made in (([5, 2, 9], [2, 5, 9]), ([9, 3], [3]), ([2, 3, 5], []), ([0, 3, 10], [0, 10])):
        pictures.asked = []
        found = cache(tmp_path / "c").pixels(recipe(), pictures, indices)
        assert pictures.asked == made
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable
        assert found.shape == (COUNT, 3, 8, 8)
        assert (found[indices] == expected(indices)).all()
    pictures.asked = []
    cache(tmp_path / "c").pixels(recipe(mean=0.1), pictures, [0, 2])  # another arithmetic, the same geometry
    assert pictures.asked == []


def test_observing_through_a_cache_changes_nothing(tmp_path: Path) -> None:
    indices = [5, 2, 9]
    plain = observe(classifier(linear()), Pictures(), indices).values
    for _ in range(2):
        found = observe(classifier(linear()), Pictures(), indices, cache=cache(tmp_path)).values
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([6, 8]), st.lists(st.integers(0, COUNT - 1), min_size=1)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([600, 9000, ROOM]),
)
def test_it_always_equals_the_geometry(steps: list[tuple[int, list[int]]], room: int) -> None:
    with TemporaryDirectory() as folder:
        for size, indices in steps:
            found = cache(Path(folder), room).pixels(recipe(size), Pictures(), indices)
            assert (found is None) is (room == 600)
            if found is not None:
                assert (found[indices] == expected(indices, size)).all()


def test_probe_sets_do_not_mix(tmp_path: Path) -> None:
    first = cache(tmp_path).pixels(recipe(), Pictures(), ALL)
    second = cache(tmp_path, probe_set="other").pixels(recipe(), lambda i: [make(k + 50) for k in i], ALL)
    assert first is not None
    assert second is not None
    assert not (first == second).all()


def test_too_big_for_the_cache(tmp_path: Path) -> None:
    pictures = Pictures()
    observe(classifier(linear()), pictures, [4, 6], cache=cache(tmp_path, max_bytes=100))
    assert pictures.asked == [4, 6]
    assert not arrays(tmp_path)


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    room = 2 * (page + COUNT * 3 * 12 * 12)
    small = cache(tmp_path, room)
    found: dict[int, Any] = {}
    for size in (10, 11, 10, 12):  # 10 is used again before 12 needs room: 11 must go
        found[size] = small.pixels(recipe(size), Pictures(), ALL)
        time.sleep(0.02)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room
    pictures = Pictures()
    for size in (10, 12):
        small.pixels(recipe(size), pictures, ALL)
    assert pictures.asked == []
    small.pixels(recipe(11), pictures, ALL)
    assert pictures.asked == ALL
    assert (found[11] == expected(ALL, 11)).all()  # its file is gone, but it is still mapped


def test_what_fails_in_the_middle_leaves_only_what_was_done(tmp_path: Path) -> None:
    def broken(indices: Sequence[int]) -> list[Any]:
        if 7 in indices:
            raise OSError("no probe 7 today")
        return [make(i) for i in indices]

    cache(tmp_path).pixels(recipe(), broken, [1, 2])
    with pytest.raises(OSError, match="today"):
        cache(tmp_path).pixels(recipe(), broken, ALL)
    pictures = Pictures()
    found = cache(tmp_path).pixels(recipe(), pictures, ALL)
    assert found is not None
    assert (found == expected(ALL)).all()
    assert {1, 2}.isdisjoint(pictures.asked)


def test_a_full_disk_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert cache(tmp_path).pixels(recipe(), Pictures(), [3]) is None
    assert not arrays(tmp_path), "what does not fit holds no room"
    assert cache(tmp_path).pixels(recipe(), Pictures(), [3]) is not None


def test_an_array_that_the_disk_has_no_room_for_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert cache(tmp_path).pixels(recipe(), Pictures(), [3]) is None
    assert not arrays(tmp_path)


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "empty"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    cache(tmp_path).pixels(recipe(), Pictures(), ALL)
    (path,) = arrays(tmp_path)
    data = path.read_bytes()
    changed = {"shorter": data[:200], "longer": data + b"x", "header": b"x" + data[1:], "empty": b""}
    path.write_bytes(changed[damage])
    pictures = Pictures()
    found = cache(tmp_path).pixels(recipe(), pictures, ALL)
    assert pictures.asked == ALL
    assert (found == expected(ALL)).all()


def test_nothing_is_trusted_after_the_machine_went_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path).pixels(recipe(), Pictures(), ALL)
    monkeypatch.setattr(pixel_cache, "_boot_id", lambda: "the next boot")
    pictures = Pictures()
    assert cache(tmp_path).pixels(recipe(), pictures, ALL) is not None
    assert pictures.asked == ALL


def test_what_a_dead_maker_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "half.new").write_bytes(b"x" * 5000)
    assert cache(tmp_path).pixels(recipe(), Pictures(), ALL) is not None
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".pixels"]


# Several at once


def _worker(folder: Path, log: Path, indices: Sequence[int], seconds: float) -> None:
    def slowly(wanted: Sequence[int]) -> list[Any]:
        with open(log, "a") as stream:
            stream.write("".join(f"{i}\n" for i in wanted))
        time.sleep(seconds)
        return [make(i) for i in wanted]

    found = cache(folder).pixels(recipe(), slowly, indices)
    assert found is not None
    assert (found[indices] == expected(indices)).all()


def _made(log: Path) -> list[int]:
    return sorted(int(line) for line in log.read_text().split()) if log.exists() else []


def _until(happened: Any) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_share_the_work_and_survive_a_killed_one(tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    victim = context.Process(target=_worker, args=(tmp_path / "c", log, [0, 1, 2, 3], 60.0))
    victim.start()
    _until(lambda: _made(log) == [0, 1, 2, 3])
    # Who needs nothing of what the victim has claimed does not wait for it.
    other = context.Process(target=_worker, args=(tmp_path / "c", log, [5, 6], 0.0))
    other.start()
    other.join(60)
    assert other.exitcode == 0
    waiting = [
        context.Process(target=_worker, args=(tmp_path / "c", log, [*range(i, COUNT)], 0.1)) for i in range(3)
    ]
    for process in waiting:
        process.start()
    _until(lambda: set(_made(log)) == set(ALL))
    time.sleep(0.3)
    assert all(process.is_alive() for process in waiting)
    assert _made(log) == ALL  # nothing twice
    victim.kill()
    for process in [victim, *waiting]:
        process.join(60)
    assert [process.exitcode for process in waiting] == [0, 0, 0]
    assert _made(log) == sorted([*ALL, 0, 1, 2, 3])  # what the dead had claimed was made by others, once
    pictures = Pictures()
    assert (cache(tmp_path / "c").pixels(recipe(), pictures, ALL) == expected(ALL)).all()
    assert pictures.asked == []


def test_threads_share_a_cache(tmp_path: Path) -> None:
    pictures = Pictures()
    threads = [
        threading.Thread(target=cache(tmp_path).pixels, args=(recipe(), pictures, ALL)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(pictures.asked) == ALL


def test_arrays_come_and_go_under_load(tmp_path: Path) -> None:
    room = 3 * (os.sysconf("SC_PAGE_SIZE") + COUNT * 3 * 12 * 12)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            size, indices = int(rng.integers(6, 12)), rng.choice(COUNT, 5, replace=False).tolist()
            try:
                found = cache(tmp_path, room).pixels(recipe(size), Pictures(), indices)
                if found is None or not (found[indices] == expected(indices, size)).all():
                    wrong.append((size, indices))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(path.stat().st_size for path in arrays(tmp_path)) <= room
