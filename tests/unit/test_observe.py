from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.models import Classifier
from probelog.observations import from_rows, to_rows
from probelog.observe import observe
from probelog.pixel_cache import PixelCache
from probelog.preprocess import Recipe, timm_recipe
from probelog.schemas import OBSERVATIONS, Head
from probelog.storage import parquet_bytes

torch = pytest.importorskip("torch")

COUNT = 11


class Pictures:
    """Probes made from their index, counting how often each was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, indices: Sequence[int]) -> list[Image.Image]:
        self.asked += indices
        return [make(i) for i in indices]


def make(index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (9 + index, 12, 3), dtype=np.uint8))


def recipe(size: int = 8, mean: float = 0.5) -> Recipe:
    return timm_recipe({"input_size": [3, size, size], "crop_pct": 1.0, "mean": [mean] * 3}, None, 64)


def classifier(module: torch.nn.Module, logits: int = 4, size: int = 8) -> Classifier:
    return Classifier(
        module=module.eval(), library="timm", architecture="toy", head=Head.SOFTMAX, labels=["x"] * logits,
        logits=logits, parameters=0, recipe=recipe(size), dtype="float32", weight_digest="", weight_mean=0, weight_std=1,
    )  # fmt: skip


def linear(logits: int = 4, size: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, logits))


class Hungry(torch.nn.Module):
    """Runs out of memory above so many images."""

    def __init__(self, most: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.most, self.error, self.tried = linear(), most, error, []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(batch))
        if len(batch) > self.most:
            raise self.error
        return self.inner(batch)


class Says(torch.nn.Module):
    """Gives a constant, whatever the image."""

    def __init__(self, value: float, logits: int = 4) -> None:
        super().__init__()
        self.value, self.logits = value, logits

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.full((len(batch), self.logits), self.value)


def test_values_order_and_batch_size() -> None:
    model, indices = classifier(linear()), [7, 0, 3, 10, 4]
    images = [make(i) for i in indices]
    with torch.inference_mode():
        inputs = model.recipe.normalise(torch.from_numpy(model.recipe.geometry(images)))
        expected = model.module(inputs).numpy().T
    for size in (1, 2, 64):
        found = observe(model, Pictures(), indices, batch_size=size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (observe(model, Pictures(), indices) == observe(model, Pictures(), indices)).all()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch(error: BaseException) -> None:
    hungry, pictures = Hungry(3, error), Pictures()
    found = observe(classifier(hungry), pictures, range(COUNT), batch_size=8)
    np.testing.assert_allclose(
        found, observe(classifier(linear()), Pictures(), range(COUNT)), rtol=1e-5, atol=1e-6
    )
    assert hungry.tried[:3] == [8, 4, 2]
    assert max(hungry.tried[3:]) <= 2  # the smaller batch is kept
    assert pictures.asked == list(range(COUNT))  # nothing is preprocessed twice
    with pytest.raises(ItemFailure) as failure:
        observe(classifier(Hungry(0, error)), Pictures(), [0, 1, 2])
    assert failure.value.reason is FailureReason.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Says(float("nan")), FailureReason.NON_FINITE),
        (Says(float("inf")), FailureReason.NON_FINITE),
        (Says(0.0), FailureReason.CONSTANT),
        (Says(5.0), FailureReason.CONSTANT),
        (Says(1.0, logits=3), FailureReason.CONFIG_MISMATCH),
        (torch.nn.Identity(), FailureReason.CONFIG_MISMATCH),
        (linear(size=9), FailureReason.CONFIG_MISMATCH),
    ],
)
def test_useless_models(module: torch.nn.Module, reason: FailureReason) -> None:
    with pytest.raises(ItemFailure) as failure:
        observe(classifier(module), Pictures(), range(3))
    assert failure.value.reason is reason


def test_some_constant_logits_are_no_failure() -> None:
    module = linear()
    with torch.no_grad():
        module[1].weight[2] = 0
    values = observe(classifier(module), Pictures(), range(4))
    assert np.ptp(values[2]) == 0
    assert np.ptp(values[1]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the device path is NOT tested")
def test_on_a_gpu() -> None:
    found = observe(classifier(linear()), Pictures(), range(COUNT), device="cuda")
    np.testing.assert_allclose(
        found, observe(classifier(linear()), Pictures(), range(COUNT)), rtol=1e-3, atol=1e-3
    )


# The cache


def cache(folder: Path, max_bytes: int = 10**6, probe_set: str = "set") -> PixelCache:
    return PixelCache(folder, max_bytes, probe_set=probe_set, count=COUNT)


def test_cache_gives_the_same_and_is_built_once(tmp_path: Path) -> None:
    pictures, indices = Pictures(), [5, 2, 9]
    plain = observe(classifier(linear()), Pictures(), indices)
    for _ in range(2):
        found = observe(classifier(linear()), pictures, indices, batch_size=2, cache=cache(tmp_path / "c"))
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    assert pictures.asked == list(range(COUNT))
    pixels = cache(tmp_path / "c").pixels(recipe(mean=0.1), pictures)  # the same geometry
    assert pictures.asked == list(range(COUNT))
    assert isinstance(pixels, np.memmap)
    assert not pixels.flags.writeable
    assert (pixels == recipe().geometry([make(i) for i in range(COUNT)])).all()


def test_probe_sets_do_not_mix(tmp_path: Path) -> None:
    first = cache(tmp_path).pixels(recipe(), Pictures())
    second = cache(tmp_path, probe_set="other").pixels(recipe(), lambda i: [make(k + 50) for k in i])
    assert first is not None
    assert second is not None
    assert not (first == second).all()


def test_too_big_for_the_cache(tmp_path: Path) -> None:
    pictures = Pictures()
    observe(classifier(linear()), pictures, [4, 6], cache=cache(tmp_path, max_bytes=100))
    assert pictures.asked == [4, 6]
    assert not list(tmp_path.glob("*.npy"))


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    room = 2 * (COUNT * 3 * 12 * 12 + 256)
    small = cache(tmp_path, room)
    arrays = {}
    for size in (10, 11, 10, 12):  # 10 is used again before 12 needs room: 11 must go
        arrays[size] = small.pixels(recipe(size), Pictures())
        time.sleep(0.02)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room
    pictures = Pictures()
    for size in (10, 12):
        small.pixels(recipe(size), pictures)
    assert pictures.asked == []
    small.pixels(recipe(11), pictures)
    assert pictures.asked == list(range(COUNT))
    assert (arrays[11] == recipe(11).geometry([make(i) for i in range(COUNT)])).all()  # evicted, still mapped


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(indices: Sequence[int]) -> list[Image.Image]:
        raise OSError("no probes today")

    with pytest.raises(OSError, match="today"):
        cache(tmp_path).pixels(recipe(), broken)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert cache(tmp_path).pixels(recipe(), Pictures()) is not None


def test_a_damaged_file_is_built_again(tmp_path: Path) -> None:
    cache(tmp_path).pixels(recipe(), Pictures())
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:200])
    pictures = Pictures()
    assert cache(tmp_path).pixels(recipe(), pictures) is not None
    assert pictures.asked == list(range(COUNT))


def _worker(folder: Path, log: Path, die: bool) -> None:
    def slowly(indices: Sequence[int]) -> list[Image.Image]:
        with open(log, "a") as stream:
            stream.write("built\n")
        time.sleep(30 if die else 0.3)
        return [make(i) for i in indices]

    found = cache(folder).pixels(recipe(), slowly)
    assert found is not None
    assert (found[3] == recipe().geometry([make(3)])[0]).all()


def test_one_process_builds_while_others_wait(tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    victim = context.Process(target=_worker, args=(tmp_path / "c", log, True))
    victim.start()
    while not log.exists():
        time.sleep(0.01)
    others = [context.Process(target=_worker, args=(tmp_path / "c", log, False)) for _ in range(3)]
    for process in others:
        process.start()
    time.sleep(0.2)
    assert log.read_text() == "built\n"  # the others wait for the first
    victim.kill()
    for process in [victim, *others]:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert log.read_text() == "built\n" * 2  # one took over from the dead, once
    assert [path.suffix for path in (tmp_path / "c").iterdir() if path.suffix != ".lock"] == [".npy"]


def test_threads_share_a_cache(tmp_path: Path) -> None:
    pictures = Pictures()
    threads = [threading.Thread(target=cache(tmp_path).pixels, args=(recipe(), pictures)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pictures.asked == list(range(COUNT))


# Rows


@settings(deadline=None)  # the machine may be busy
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=8),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@example(
    np.array([[3.0e38, -1e30, 1.0], [1e-7, 2e-7, 3e-7], [65504.0, 1.0, 0.1], [1e-45, 0.0, 0.0]], np.float32)
)
def test_rows_keep_the_values(values: np.ndarray) -> None:
    table = to_rows("owner/name", "0" * 40, values)
    assert table.schema.equals(OBSERVATIONS, check_metadata=True)
    found = from_rows(table)
    assert found.shape == (values.shape if len(values) else (0, 0))  # no rows, no length
    found = found.reshape(values.shape)
    largest = np.abs(values).max(axis=1, initial=0).astype(np.float64)
    errors = np.abs(found.astype(np.float64) - values).max(axis=1, initial=0)
    assert (errors <= largest * 2.0**-10).all()
    scale = table.column("scale").to_numpy()
    assert (np.frexp(scale)[0] == 0.5).all()  # powers of two


def test_ordinary_logits_are_stored_as_they_are() -> None:
    values = np.random.default_rng(0).normal(0, 5, (3, 200)).astype(np.float32)
    table = to_rows("a/b", "c", values)
    assert table.column("scale").to_pylist() == [1.0] * 3
    assert table.column("logit").to_pylist() == [0, 1, 2]
    np.testing.assert_array_equal(from_rows(table), values.astype(np.float16).astype(np.float32))


def test_a_small_spread_on_a_large_mean_survives() -> None:
    values = (1000 + np.random.default_rng(0).normal(0, 0.01, (2, 500))).astype(np.float32)
    found = from_rows(to_rows("a/b", "c", values))
    assert np.abs(found - values).max() < 2.0**-10 * np.ptp(values)


def test_rows_survive_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    values = np.linspace(-1e6, 1e6, 30, dtype=np.float32).reshape(3, 10)
    (tmp_path / "part").write_bytes(parquet_bytes(to_rows("a/b", "c", values)))
    np.testing.assert_allclose(from_rows(pq.read_table(tmp_path / "part")), values, atol=1e3)
    np.testing.assert_allclose(from_rows(pq.read_table(tmp_path / "part").slice(1, 1)), values[1:2], atol=1e3)


def test_bad_rows() -> None:
    for values in ([[float("nan")]], [1.0], [[float("inf")]]):
        with pytest.raises(ValueError, match="finite"):
            to_rows("a/b", "c", values)
    import pyarrow as pa

    with pytest.raises(ValueError, match="not of one model"):
        from_rows(pa.concat_tables([to_rows("a/b", "c", [[1.0]]), to_rows("a/d", "c", [[1.0, 2.0]])]))
