"""The node's cache of preprocessed probes: filled by trusted processes, never twice, read as it was written."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.inference import pixel_cache
from probelog.inference.execution_plan import Plans
from probelog.inference.observe import observe
from probelog.inference.pixel_cache import DIGEST_BYTES, CachedPixels, PixelCache, cached_pixels
from probelog.models.preprocessing import Recipe
from tests.probelog.inference.test_observe import COUNT, Pictures, classifier, linear, make, recipe

Images = Callable[[Sequence[int]], Sequence[Image.Image]]

ALL = list(range(COUNT))
ROOM = 10**6


def cache(folder: Path, max_bytes: int = ROOM, probe_set: str = "set") -> PixelCache:
    return PixelCache(folder, max_bytes, probe_set=probe_set, count=COUNT)


def expected(indices: Sequence[int], size: int = 8) -> np.ndarray:
    return recipe(size).geometry([make(i) for i in indices])


def view(
    folder: Path, recipe: Recipe, indices: Sequence[int], digests: bytes | None, probe_set: str = "set"
) -> AbstractContextManager[CachedPixels | None]:
    return cached_pixels(folder, recipe, indices, digests, probe_set=probe_set, count=COUNT)


def pixels(
    cache: PixelCache, recipe: Recipe, images: Images, indices: Sequence[int]
) -> npt.NDArray[Any] | None:
    """What a model reads after its probes were prepared; None where it has to make them itself."""
    digests = cache.prepare(recipe, images, indices)
    with view(cache.folder, recipe, indices, digests, cache.probe_set) as seen:
        assert (seen is None) is (digests is None)
        return None if seen is None else seen.rows(indices)


def arrays(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pixels"))


def test_only_what_is_needed_and_missing_is_made(tmp_path: Path) -> None:
    pictures = Pictures()
    for indices, made in (([5, 2, 9], [2, 5, 9]), ([9, 3], [3]), ([2, 3, 5], []), ([0, 3, 10], [0, 10])):
        pictures.asked = []
        found = pixels(cache(tmp_path / "c"), recipe(), pictures, indices)
        assert pictures.asked == made
        assert (found == expected(indices)).all()
    pictures.asked = []
    cache(tmp_path / "c").prepare(recipe(mean=0.1), pictures, [0, 2])  # another arithmetic, the same geometry
    assert pictures.asked == []


def test_observing_through_a_cache_changes_nothing(tmp_path: Path) -> None:
    indices = [5, 2, 9]
    plain = observe(classifier(linear()), Pictures(), indices).values
    for _ in range(2):
        digests = cache(tmp_path).prepare(recipe(), Pictures(), indices)
        pictures = Pictures()
        with view(tmp_path, recipe(), indices, digests) as seen:
            found = observe(classifier(linear()), pictures, indices, cached=seen).values
        assert pictures.asked == []
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
            found = pixels(cache(Path(folder, "c"), room), recipe(size), Pictures(), indices)
            assert (found is None) is (room == 600)
            if found is not None:
                assert (found == expected(indices, size)).all()


def test_probe_sets_do_not_mix(tmp_path: Path) -> None:
    first = pixels(cache(tmp_path), recipe(), Pictures(), ALL)
    second = pixels(cache(tmp_path, probe_set="other"), recipe(), lambda i: [make(k + 50) for k in i], ALL)
    assert first is not None
    assert second is not None
    assert not (first == second).all()


def test_too_big_for_the_cache(tmp_path: Path) -> None:
    assert cache(tmp_path, max_bytes=100).prepare(recipe(), Pictures(), [4, 6]) is None
    assert not arrays(tmp_path)


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    room = 2 * (page + COUNT * 3 * 12 * 12)
    tmp_path = tmp_path / "c"
    small = cache(tmp_path, room)
    digests = small.prepare(recipe(11), Pictures(), ALL)
    with view(tmp_path, recipe(11), ALL, digests) as opened:
        for size in (10, 11, 10, 12):  # 10 is used again before 12 needs room: 11 must go
            small.prepare(recipe(size), Pictures(), ALL)
            time.sleep(0.02)
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room
        assert opened is not None
        assert (opened.rows(ALL) == expected(ALL, 11)).all()  # its file is gone, but it is still open
    with view(tmp_path, recipe(11), ALL, digests) as gone:
        assert gone is None
    pictures = Pictures()
    for size in (10, 12):
        small.prepare(recipe(size), pictures, ALL)
    assert pictures.asked == []
    small.prepare(recipe(11), pictures, ALL)
    assert pictures.asked == ALL


def test_what_fails_in_the_middle_leaves_only_what_was_done(tmp_path: Path) -> None:
    def broken(indices: Sequence[int]) -> list[Any]:
        if 7 in indices:
            raise OSError("no probe 7 today")
        return [make(i) for i in indices]

    cache(tmp_path).prepare(recipe(), broken, [1, 2])
    with pytest.raises(OSError, match="today"):
        cache(tmp_path).prepare(recipe(), broken, ALL)
    pictures = Pictures()
    found = pixels(cache(tmp_path), recipe(), pictures, ALL)
    assert found is not None
    assert (found == expected(ALL)).all()
    assert {1, 2}.isdisjoint(pictures.asked)


def test_a_full_disk_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert cache(tmp_path).prepare(recipe(), Pictures(), [3]) is None
    assert not arrays(tmp_path), "what does not fit holds no room"
    assert cache(tmp_path).prepare(recipe(), Pictures(), [3]) is not None


def test_an_array_that_the_disk_has_no_room_for_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert cache(tmp_path).prepare(recipe(), Pictures(), [3]) is None
    assert not arrays(tmp_path)


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "empty"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    cache(tmp_path).prepare(recipe(), Pictures(), ALL)
    (path,) = arrays(tmp_path)
    data = path.read_bytes()
    changed = {"shorter": data[:200], "longer": data + b"x", "header": b"x" + data[1:], "empty": b""}
    path.write_bytes(changed[damage])
    pictures = Pictures()
    found = pixels(cache(tmp_path), recipe(), pictures, ALL)
    assert pictures.asked == ALL
    assert (found == expected(ALL)).all()


def test_nothing_is_trusted_after_the_machine_went_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(tmp_path).prepare(recipe(), Pictures(), ALL)
    monkeypatch.setattr(pixel_cache, "_boot_id", lambda: "the next boot")
    pictures = Pictures()
    assert cache(tmp_path).prepare(recipe(), pictures, ALL) is not None
    assert pictures.asked == ALL


def test_what_a_dead_maker_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "half.new").write_bytes(b"x" * 5000)
    assert cache(tmp_path).prepare(recipe(), Pictures(), ALL) is not None
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".pixels"]


# Several at once


def _worker(folder: Path, log: Path, indices: Sequence[int], seconds: float) -> None:
    def slowly(wanted: Sequence[int]) -> list[Any]:
        with open(log, "a") as stream:
            stream.write("".join(f"{i}\n" for i in wanted))
        time.sleep(seconds)
        return [make(i) for i in wanted]

    found = pixels(cache(folder), recipe(), slowly, indices)
    assert (found == expected(indices)).all()


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
    assert (pixels(cache(tmp_path / "c"), recipe(), pictures, ALL) == expected(ALL)).all()
    assert pictures.asked == []


def test_threads_share_a_cache(tmp_path: Path) -> None:
    pictures = Pictures()
    threads = [
        threading.Thread(target=cache(tmp_path).prepare, args=(recipe(), pictures, ALL)) for _ in range(6)
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
                made = cache(tmp_path / "c", room).prepare(recipe(size), Pictures(), indices)
                with view(tmp_path / "c", recipe(size), indices, made) as seen:
                    # None where another thread removed it meanwhile.
                    found = expected(indices, size) if seen is None else seen.rows(indices)
                if made is None or not (found == expected(indices, size)).all():
                    wrong.append((size, indices))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(path.stat().st_size for path in arrays(tmp_path / "c")) <= room


# What a model's process reads


def test_digests_are_in_the_order_asked_for(tmp_path: Path) -> None:
    whole = cache(tmp_path).prepare(recipe(), Pictures(), ALL)
    some = cache(tmp_path).prepare(recipe(), Pictures(), [7, 2, 7])
    assert whole is not None
    each = [whole[at : at + DIGEST_BYTES] for at in range(0, len(whole), DIGEST_BYTES)]
    assert len(set(each)) == COUNT
    assert some == each[7] + each[2] + each[7]


@pytest.mark.parametrize("change", ["pixel", "two rows swapped", "shorter"])
def test_changed_pixels_are_an_error_and_never_another_answer(change: str, tmp_path: Path) -> None:
    digests = cache(tmp_path).prepare(recipe(), Pictures(), ALL)
    (path,) = arrays(tmp_path)
    data, each = path.read_bytes(), 3 * 8 * 8
    with view(tmp_path, recipe(), ALL, digests) as seen:
        assert seen is not None
        with open(path, "r+b") as stream:
            if change == "pixel":
                stream.seek(-1, os.SEEK_END)
                stream.write(bytes([data[-1] ^ 1]))
            elif change == "two rows swapped":
                stream.seek(-2 * each, os.SEEK_END)
                stream.write(data[-each:] + data[-2 * each : -each])
            else:
                stream.truncate(len(data) - 1)
        with pytest.raises(
            ItemFailure, match=r"probe (9|10) in .*\.pixels changed .* remove that file"
        ) as failure:
            observe(classifier(linear()), Pictures(), ALL, plans=Plans(batch_size=2), cached=seen)
        assert failure.value.reason is FailureReason.INTERNAL
        assert (seen.rows([3, 0]) == expected([3, 0])).all()


def test_reading_changes_nothing(tmp_path: Path) -> None:
    digests = cache(tmp_path / "c").prepare(recipe(), Pictures(), [1, 2])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with (
        view(tmp_path / "c", recipe(), [2, 1], digests),
        view(tmp_path / "c", recipe(9), [2, 1], digests) as no,
    ):
        assert no is None
    with view(tmp_path / "nowhere", recipe(), [2, 1], digests) as no:
        assert no is None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_array_made_anew_without_these_probes_is_not_read(tmp_path: Path) -> None:
    digests = cache(tmp_path).prepare(recipe(), Pictures(), [1, 2])
    arrays(tmp_path)[0].unlink()
    cache(tmp_path).prepare(recipe(), Pictures(), [1])
    with view(tmp_path, recipe(), [1, 2], digests) as seen:
        assert seen is None


def test_who_holds_every_claim_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "_STALLED_SECONDS", 0.2)
    some = cache(tmp_path / "c").prepare(recipe(), Pictures(), [0])
    assert some is not None
    with open(tmp_path / "c-locks" / "claims", "r+b") as claims, open(tmp_path / "c-locks" / "room") as room:
        fcntl.fcntl(claims, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, 0, 0, 0))
        fcntl.flock(room, fcntl.LOCK_EX)
        assert (pixels(cache(tmp_path / "c"), recipe(), Pictures(), ALL) == expected(ALL)).all()
        assert cache(tmp_path / "c").prepare(recipe(9), Pictures(), [0]) is None  # no new array


def test_what_may_only_be_read_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks on all that a model's process can open: the array, for reading."""
    cache(tmp_path / "c").prepare(recipe(), Pictures(), [0])
    (path,) = arrays(tmp_path / "c")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for the reader"))
    with open(path, "rb") as stream:
        fcntl.fcntl(stream, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, 0, 0, 0))
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert (pixels(cache(tmp_path / "c"), recipe(), Pictures(), ALL) == expected(ALL)).all()


def test_large_images_are_made_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "_CLAIM_BYTES", 3 * 8 * 8 * 2)
    most = 0

    def images(indices: Sequence[int]) -> list[Image.Image]:
        nonlocal most
        most = max(most, len(indices))
        return [make(i) for i in indices]

    assert (pixels(cache(tmp_path), recipe(), images, ALL) == expected(ALL)).all()
    assert most == 2
