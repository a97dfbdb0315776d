from __future__ import annotations

import gc
import json
import mmap
import multiprocessing
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.inference.execution_plan import CPU_BATCH_MOST, FIRST_BATCH, Plans, kind, lower_precision
from probelog.inference.observe import Observation, observe
from probelog.models.loading import Classifier
from probelog.models.preprocessing import Recipe, timm_recipe
from probelog.storage.encoding import parquet_bytes
from probelog.storage.observations import from_rows, to_rows
from probelog.storage.schemas import OBSERVATIONS, Head

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
    return timm_recipe({"input_size": [3, size, size], "crop_pct": 1.0, "mean": [mean] * 3}, 256)


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


def plain(indices: Sequence[int]) -> np.ndarray:
    return observe(classifier(linear()), Pictures(), indices).values


def test_values_order_and_batch_size() -> None:
    model, indices = classifier(linear()), [7, 0, 3, 10, 4]
    images = [make(i) for i in indices]
    with torch.inference_mode():
        inputs = model.recipe.normalise(torch.from_numpy(model.recipe.geometry(images)))
        expected = model.module(inputs).numpy().T
    for size in (1, 2, 64):
        found = observe(model, Pictures(), indices, plans=Plans(batch_size=size)).values
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    again = observe(model, Pictures(), indices).values
    assert (observe(model, Pictures(), indices).values == again).all()


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
    plans = Plans(batch_size=8)
    found = observe(classifier(hungry), pictures, range(COUNT), plans=plans)
    np.testing.assert_allclose(found.values, plain(range(COUNT)), rtol=1e-5, atol=1e-6)
    assert found.batch_size == 2
    assert hungry.tried[:3] == [8, 4, 2]
    assert max(hungry.tried[3:]) <= 2  # the smaller batch is kept
    assert pictures.asked == list(range(COUNT))  # nothing is preprocessed twice
    again = Hungry(3, error)
    observe(classifier(again), Pictures(), range(COUNT), plans=plans)
    assert max(again.tried) == 2  # nor is it learnt twice
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
    values = observe(classifier(module), Pictures(), range(4)).values
    assert np.ptp(values[2]) == 0
    assert np.ptp(values[1]) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the device path is NOT tested")
def test_on_a_gpu() -> None:
    model = classifier(convolutions())
    exact = observe(model, Pictures(), range(COUNT)).values
    plans = Plans(batch_size=4)
    for _ in range(2):
        found = observe(model, Pictures(), list(range(COUNT)) * 4, device="cuda", plans=plans)
        np.testing.assert_allclose(found.values[:, :COUNT], exact, rtol=1e-3, atol=1e-3)
        assert found.batch_size <= 4


# Variants


def convolutions() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8 * 4 * 4, 4))


class Sleepy(torch.nn.Module):
    """Takes longer in one layout or precision, and may give something else in another."""

    def __init__(self, slow: str, wrong: str = "") -> None:
        super().__init__()
        self.inner, self.slow, self.wrong, self.seen = convolutions(), slow, wrong, []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        now = [
            "channels_last" if batch.is_contiguous(memory_format=torch.channels_last) else "contiguous",
            "bfloat16" if torch.is_autocast_enabled("cpu") else "float32",
        ]
        self.seen.append((*now, len(batch)))
        with torch.autocast("cpu", enabled=False):
            logits = self.inner(batch)
        if self.slow in now:
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
        return logits + torch.rand_like(logits) if self.wrong in now else logits


def many(model: torch.nn.Module, plans: Plans) -> Observation:
    return observe(classifier(model), Pictures(), list(range(COUNT)) * 4, plans=plans)


def test_the_faster_layout_is_found_and_remembered() -> None:
    plans, exact = Plans(batch_size=4), many(convolutions(), Plans()).values
    for slow, best in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        plans = Plans(batch_size=4)
        first = Sleepy(slow)
        found = many(first, plans)
        assert found.layout == best
        assert {layout for layout, _, _ in first.seen} == {"contiguous", "channels_last"}
        np.testing.assert_allclose(found.values, exact, rtol=1e-4, atol=1e-5)
        second = Sleepy(slow)
        assert many(second, plans).layout == best
        assert {layout for layout, _, _ in second.seen} == {best}  # not tried again


def test_variants_are_tried_with_small_batches() -> None:
    plans, model = Plans(batch_size=256), Sleepy("contiguous")
    observe(classifier(model), Pictures(), list(range(COUNT)) * (800 // COUNT), plans=plans)
    sizes = [
        [size for layout, _, size in model.seen if layout == one] for one in ("contiguous", "channels_last")
    ]
    assert max(sizes[0]) == 64
    assert sum(sizes[0]) <= 3 * 64
    assert max(sizes[1]) == CPU_BATCH_MOST


def test_processes_tell_each_other_what_they_learnt() -> None:
    plans = Plans(batch_size=4)
    many(Sleepy("contiguous"), plans)
    name = kind(classifier(Sleepy("")), "cpu")
    told = json.loads(json.dumps(plans.exported(name)))
    other, second = Plans(batch_size=4), Sleepy("contiguous")
    other.learn(name, told)
    assert many(second, other).layout == "channels_last"
    assert {layout for layout, _, _ in second.seen} == {"channels_last"}
    other.learn(name, {**told, "batch_size": 1})  # it knows better by now
    assert other.exported(name) == plans.exported(name)
    assert Plans().exported(name) is None


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0}, {"batch_size": 5}, {"batch_size": "many"}, {"batch_size": None}, {"batch_size": 1e400},
        {"variant": {}}, {"variant": None}, {"variant": {"layout": "odd", "precision": "float32"}}, {"untried": 3},
        {"variant": {"layout": "contiguous", "precision": "bfloat16"}},
        {"untried": [{"layout": ["contiguous"], "precision": "float32"}]},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_not_learnt(change: dict[str, object]) -> None:
    right = {
        "batch_size": 4,
        "measured": True,
        "variant": {"layout": "contiguous", "precision": "float32"},
        "untried": [],
    }
    plans = Plans(batch_size=4)
    for facts in ({**right, **change}, None, [], "plan", {}):
        plans.learn("kind", facts)
        assert plans.exported("kind") is None
    plans.learn("kind", right)
    assert plans.exported("kind") == {**right, "untried": ()}


def test_a_layout_that_changes_answers_is_not_used() -> None:
    plans, model = Plans(batch_size=4), Sleepy("contiguous", wrong="channels_last")
    found = many(model, plans)
    assert found.layout == "contiguous"
    np.testing.assert_allclose(found.values, many(convolutions(), Plans()).values, rtol=1e-4, atol=1e-5)


def test_few_probes_leave_no_time_for_trials() -> None:
    model = Sleepy("contiguous")
    observe(classifier(model), Pictures(), range(4), plans=Plans(batch_size=4))
    assert len(model.seen) == 1


def test_models_without_convolutions_stay_as_they_are() -> None:
    assert Plans().plan(classifier(linear()), "cpu").untried == ()


@pytest.mark.skipif(
    lower_precision("cpu") is None, reason="no short floats here: lower precision is NOT tested"
)
def test_lower_precision_only_where_it_is_allowed_and_right() -> None:
    assert many(Sleepy("float32"), Plans(batch_size=4)).precision == "float32"
    plans = Plans(batch_size=4, precision="auto")
    assert many(Sleepy("float32"), plans).precision == "bfloat16"
    honest = many(Sleepy("float32", wrong="bfloat16"), plans)  # checked again on every model
    assert honest.precision == "float32"
    np.testing.assert_allclose(honest.values, many(convolutions(), Plans()).values, rtol=1e-4, atol=1e-5)
    assert many(Sleepy("float32"), plans).precision == "bfloat16"


# Memory


class Greedy(torch.nn.Module):
    """Takes so many bytes an image while it runs."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.inner, self.each, self.tried = linear(), each, []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.tried.append(len(batch))
        # Not from an allocator, which may have kept what earlier tests gave back.
        with mmap.mmap(-1, len(batch) * self.each) as fresh:
            fresh[::4096] = bytes(len(fresh) // 4096)
        return self.inner(batch)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is NOT measured here")
def test_the_batch_follows_from_the_memory_an_image_takes() -> None:
    each = 16 << 20
    gc.collect()
    plain(range(COUNT))  # libraries take memory when first used
    plans = Plans(batch_size=64, memory_bytes=resident() + 25 * each)
    model = Greedy(each)
    found = observe(classifier(model), Pictures(), list(range(COUNT)) * 6, plans=plans)
    assert model.tried[0] == FIRST_BATCH
    assert max(model.tried) == found.batch_size == 16  # the largest power of two within four fifths of 25
    again = Greedy(each)
    observe(classifier(again), Pictures(), list(range(COUNT)) * 6, plans=plans)
    assert again.tried[0] == 16
    ample = Greedy(each)
    observe(classifier(ample), Pictures(), list(range(COUNT)) * 6, plans=Plans(batch_size=64))
    assert ample.tried[0] == 64  # nothing bounds it


def resident(name: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _within_a_limit(answer: Any) -> None:
    torch.set_num_threads(1)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 128, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                 torch.nn.Flatten(), torch.nn.Linear(128, 4))  # fmt: skip
    model = classifier(module, size=64)
    exact = observe(model, Pictures(), range(COUNT), plans=Plans(batch_size=1)).values
    most = resident("VmData") + (64 << 20)  # a batch of 64 needs 120 MiB for the first layer alone
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    found = observe(model, Pictures(), list(range(COUNT)) * 6)
    answer.send((found.batch_size, float(np.abs(found.values[:, :COUNT] - exact).max())))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is NOT limited here")
def test_a_process_of_limited_memory_takes_smaller_batches() -> None:
    context = multiprocessing.get_context("spawn")
    answer, theirs = context.Pipe()  # a queue would need a thread, and that memory
    process = context.Process(target=_within_a_limit, args=(theirs,))
    process.start()
    theirs.close()
    batch, error = answer.recv()  # ends where the process does
    process.join()
    assert 1 < batch < 64
    assert error < 1e-5


def test_large_inputs_take_small_batches_on_a_cpu() -> None:
    assert Plans().plan(classifier(linear()), "cpu").batch_size == 64
    assert Plans().plan(classifier(linear(), size=224), "cpu").batch_size == 32
    assert Plans().plan(classifier(linear(), size=256), "cpu").batch_size == 24
    assert Plans(batch_size=2).plan(classifier(linear(), size=224), "cpu").batch_size == 2


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
