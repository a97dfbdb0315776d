"""What a model's process can do to the pixels that others are shown: through their files, and through its recipe.

The files are attacked by another process without any confinement, as on a platform that has no means for it: pixels may
then be lost or refused, they are never other ones. That a model's process cannot even open them for writing is shown
where processes are confined.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from probelog.errors import FailureReason, ItemFailure
from probelog.inference import pixel_cache
from probelog.inference.observe import observe
from probelog.inference.pixel_cache import PixelCache, cached_pixels, locks_folder
from probelog.models.preprocessing import Recipe, timm_recipe
from tests.probelog.inference.test_observe import COUNT, Pictures, classifier, linear, plain, recipe
from tests.probelog.models.test_preprocessing import refused

ALL = list(range(COUNT))
EACH = 3 * 8 * 8
VIT = (
    '{"declared": true, "gain": [0.1, 0.2, 0.3], "input": [3, 32, 32], "library": "transformers", '
    '"offset": [-1.0, 0.0, 1.0], "processor": "ViTImageProcessorPil", "settings": {"do_resize": true, '
    '"image_mean": [0.5, 0.5, 0.5], "resample": 2, "size": {"height": 32, "width": 32}}, "square": false}'
)


def one_pixel(array: Path) -> None:
    with open(array, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 0x80]))


def rows_of_another_probe(array: Path) -> None:
    data = array.read_bytes()
    with open(array, "r+b") as stream:
        stream.seek(-2 * EACH, os.SEEK_END)
        stream.write(data[-EACH:])


def black_and_marked_as_there(array: Path) -> None:
    size = array.stat().st_size
    with open(array, "r+b") as stream:
        stream.seek(512)
        stream.write(b"\1" * COUNT)
        stream.seek(size - COUNT * EACH)
        stream.write(bytes(COUNT * EACH))


def another_file_in_its_place(array: Path) -> None:
    data = bytearray(array.read_bytes())
    data[-COUNT * EACH :] = bytes(COUNT * EACH)
    array.with_suffix(".mine").write_bytes(data)
    os.replace(array.with_suffix(".mine"), array)


def shorter(array: Path) -> None:
    os.truncate(array, array.stat().st_size - 1)


def another_header(array: Path) -> None:
    with open(array, "r+b") as stream:
        stream.write(b"{")


def removed(array: Path) -> None:
    array.unlink()


@pytest.mark.parametrize(
    "attack",
    [
        one_pixel,
        rows_of_another_probe,
        black_and_marked_as_there,
        another_file_in_its_place,
        shorter,
        another_header,
        removed,
    ],
)
@pytest.mark.parametrize("opened", [False, True], ids=["before-it-is-opened", "while-it-is-read"])
def test_who_writes_the_arrays_never_gives_a_sound_model_other_logits(
    attack: Callable[[Path], None], opened: bool, tmp_path: Path
) -> None:
    """The logits are right, or the model fails for a reason that a rerun cures."""
    cache = PixelCache(tmp_path / "c", 10**6, probe_set="set", count=COUNT)
    digests = cache.prepare(recipe(), Pictures(), ALL)
    (array,) = (tmp_path / "c").glob("*.pixels")
    attacker = multiprocessing.get_context("fork").Process(target=attack, args=(array,))
    if not opened:
        attacker.start()
        attacker.join(30)
    with cached_pixels(tmp_path / "c", recipe(), ALL, digests, probe_set="set", count=COUNT) as seen:
        if opened:
            attacker.start()
            attacker.join(30)
        assert attacker.exitcode == 0
        try:
            values = observe(classifier(linear()), Pictures(), ALL, cached=seen).values
        except ItemFailure as failure:
            reason = failure.reason
        else:
            reason = None
            np.testing.assert_array_equal(values, plain(ALL))
    assert reason in (None, FailureReason.INTERNAL)


def read_locks(folder: Path) -> list[int]:
    """On all that can be opened for reading in the folder that models may read."""
    held = [os.open(path, os.O_RDONLY) for path in folder.iterdir()]
    for descriptor in held:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, 0, 0, 0))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return held


def claims(folder: Path) -> list[int]:
    """On every probe of every array, where nothing keeps models from the locks."""
    held = [os.open(path, os.O_RDWR) for path in locks_folder(folder).iterdir()]
    for descriptor in held:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_WRLCK, 0, 0, 0, 0))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return held


@pytest.mark.parametrize("attack", [read_locks, claims])
def test_who_holds_locks_is_not_waited_for_for_ever(
    attack: Callable[[Path], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_cache, "_STALLED_SECONDS", 0.1)
    cache = PixelCache(tmp_path / "c", 10**6, probe_set="set", count=COUNT)
    cache.prepare(recipe(), Pictures(), [0])
    held = attack(tmp_path / "c")
    assert held
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=cache.prepare, args=(recipe(), Pictures(), ALL))
    worker.start()
    worker.join(30)
    code = worker.exitcode
    worker.kill()
    for descriptor in held:
        os.close(descriptor)
    assert code == 0
    pictures = Pictures()
    cache.prepare(recipe(), pictures, ALL)
    assert pictures.asked == []


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(VIT.replace('"ViTImageProcessorPil"', '"a.b.C"'), id="class-by-path"),
        pytest.param(VIT.replace("32, 32]", "2048, 100000]"), id="input-of-100000-pixels"),
        pytest.param(VIT.replace('"height": 32', '"height": 100000'), id="resize-to-100000-pixels"),
        pytest.param(VIT.replace('"height": 32', '"height": {"width": 3}'), id="object-for-a-size"),
        pytest.param(VIT.replace("0.1", "NaN"), id="nan"),
        pytest.param(VIT.replace("0.1", "1e400"), id="infinity"),
        pytest.param(VIT.replace("0.5", "9" * 400), id="number-of-400-digits"),
        pytest.param(VIT.replace("0.5", "9" * 10_000), id="number-of-10000-digits"),
        pytest.param(VIT.replace('"square"', '"_run": "x", "square"'), id="field-of-the-object"),
        pytest.param(VIT.replace('"resample"', '"path_to_x": 1, "resample"'), id="setting-that-is-not-read"),
        pytest.param(VIT.replace('"square"', '"square": true, "square"'), id="key-twice"),
        pytest.param(VIT.replace("false}", "false}" + " " * 10**7), id="ten-megabytes"),
        pytest.param("[" * 10_000, id="nested-10000-deep"),
        pytest.param(VIT.replace("ViT", "\\u001b]0;x\\u0007"), id="terminal-escape"),
        pytest.param(VIT.replace("transformers", "\\ud800"), id="lone-surrogate"),
    ],
)
def test_a_recipe_from_a_models_process_is_one_that_a_sound_process_writes(text: str) -> None:
    refused(text)


def test_another_class_of_the_library_is_never_made() -> None:
    """A recipe names a class; the library would make any of its own under that name."""
    forged = Recipe.from_json(VIT.replace("ViTImageProcessorPil", "TrainingArguments"))
    with pytest.raises(ItemFailure, match="no image processor"):
        forged.geometry(Pictures()([0]))


@pytest.mark.parametrize("processor", ["ViTImageProcessorPil", "DeepseekVLImageProcessorPil"])
def test_a_forged_recipe_fills_the_array_that_it_shares_with_the_same_pixels(
    processor: str, tmp_path: Path
) -> None:
    """The second of them pads with what counts as arithmetic for others."""
    sound = VIT.replace("ViTImageProcessorPil", processor)
    forged = sound.replace("[0.5, 0.5, 0.5]", "[0.0, 0.9, 0.1]").replace("0.1, 0.2, 0.3", "9.0, 9.0, 9.0")
    PixelCache(tmp_path / "c", 10**6, probe_set="set", count=COUNT).prepare(
        Recipe.from_json(forged), Pictures(), ALL
    )
    pictures = Pictures()
    cache = PixelCache(tmp_path / "c", 10**6, probe_set="set", count=COUNT)
    digests = cache.prepare(Recipe.from_json(sound), pictures, ALL)
    assert pictures.asked == []
    with cached_pixels(
        tmp_path / "c", Recipe.from_json(sound), ALL, digests, probe_set="set", count=COUNT
    ) as seen:
        assert seen is not None
        assert (seen.rows(ALL) == Recipe.from_json(sound).geometry(Pictures()(ALL))).all()


def test_the_key_of_an_array_cannot_be_searched_for() -> None:
    """64 bits of a hash can be met by trying; a recipe has free bits enough to try with."""
    key = timm_recipe({"input_size": [3, 32, 32]}, 64).geometry_key
    assert len(bytes.fromhex(key)) == 32
