"""Forecasts: the regression, what the catalogue foretells, heads by parameters, which models are measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.probing.results import ItemReport
from pipelines.config.model import Config
from pipelines.forecast.estimates import Estimate
from pipelines.forecast.known import Known, logits_by_parameters, size_class, stratified
from pipelines.forecast.measured import Measured
from pipelines.forecast.predict import _limited, fitted, non_negative, ratio, resampled
from pipelines.probe.timeline import Timeline
from probelog.hub.rate_limit import HUB_LIMITS, SlidingWindowLimit, hub_account
from probelog.kinds.registry import CLASSIFIER
from probelog.models.preprocessing import timm_recipe
from probelog.storage.schemas import CATALOGUE, CatalogueRow, RepoFile, to_table

SHA = "a" * 40
NONE = np.zeros(0)


def features(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.stack([np.ones(n), rng.lognormal(15, 2, n), rng.lognormal(3, 1, n)], axis=1)


# Regression


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), coefficients=st.tuples(*[st.floats(0.05, 20)] * 3))
def test_known_coefficients_are_recovered(seed: int, coefficients: tuple[float, ...]) -> None:
    x = features(np.random.default_rng(seed), 80)
    truth = np.array(coefficients) / x.mean(axis=0)
    beta = non_negative(x, x @ truth, np.ones((1, 80)))[0]
    assert np.allclose(x @ beta, x @ truth, rtol=0.05)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), draws=st.integers(0, 5))
def test_never_negative_and_the_measured_total_is_met(seed: int, n: int, draws: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = features(rng, n), rng.lognormal(0, 3, n) * (rng.random(n) < 0.8)
    weights = resampled(rng, n, draws)
    for columns in ([0], [0, 1], [0, 1, 2]):
        beta = non_negative(x[:, columns], y, weights)
        assert beta.shape == (1 + draws, len(columns))
        assert (beta >= 0).all()
        assert np.isfinite(beta).all()
        assert (x[:, columns] @ beta[0]).sum() == pytest.approx(y.sum(), rel=1e-6, abs=1e-12)


def test_a_ratio_is_of_what_is_known() -> None:
    costs, amounts = np.array([1.0, 2.0, np.nan, 9.0]), np.array([1.0, 3.0, 5.0, np.nan])
    draws = np.array([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    assert ratio(draws, costs, amounts).tolist() == [0.75, 0.8, 0.75], "a draw of none is as all"
    assert ratio(draws, costs, np.full(4, np.nan)).tolist() == [1, 1, 1]


def test_the_error_on_what_is_left_out() -> None:
    x = np.stack([np.ones(5), np.array([1.0, 2, 3, 5, 8])], axis=1)
    (coefficients, *_), error = fitted(np.ones((1, 5)), x, x @ [2.0, 3.0])
    assert coefficients == pytest.approx([2, 3], rel=0.05)
    assert error == pytest.approx(0, abs=0.05)
    assert fitted(np.ones((1, 5)), x, np.array([1.0, 100, 1, 100, 1]))[1] == pytest.approx(2, abs=0.2)
    assert fitted(np.ones((1, 2)), x[:2], np.ones(2))[1] is None, "too few"


def test_estimates() -> None:
    told = Estimate.of(np.array([5.0, *np.arange(11.0)]))
    assert (told.value, told.low, told.high) == (5, 1, 9)
    assert told.times(2) + 1 == Estimate(11, 3, 19)
    assert Estimate.of(np.array([5.0])) == Estimate(5.0)


# The catalogue


def row(name: str, *files: str, size: int | None = None, **facts: object) -> CatalogueRow:
    return CatalogueRow(f"o/{name}", SHA, files=[RepoFile(file, size) for file in files], **facts)


def known(
    *rows: CatalogueRow, has_token: bool = False, allow_pickle: bool = False, max_bytes: int = 10**6
) -> Known:
    table = to_table(rows, CATALOGUE)
    return Known.of(table, CLASSIFIER, has_token=has_token, allow_pickle=allow_pickle, max_bytes=max_bytes)


SAFE = ("config.json", "model.safetensors")
SHARDS = (
    "config.json", "preprocessor_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "pytorch_model.bin", "README.md",
)  # fmt: skip


def test_what_the_download_will_do_is_foretold() -> None:
    found = known(
        row("plain", *SAFE, size=40),
        row("listed", *SAFE, parameters=7, weight_bytes=28, labels=["a", "b"], architecture="x"),
        row("shards", *SHARDS, size=9),
        row("gated", *SAFE, gated=True),
        row("disabled", *SAFE, disabled=True),
        row("pickle", "config.json", "pytorch_model.bin"),
        row("bare", "model.safetensors"),
        row("large", *SAFE, size=10**6),
        row("unlisted", parameters=10),
    )
    reasons = [None, None, None, "gated", "disabled", "unsafe-format", "not-found", "too-large", None]
    assert found.reasons.tolist() == reasons
    assert found.files.tolist() == [2, 2, 5, 0, 0, 0, 0, 0, 0]
    assert np.array_equal(found.listed[[0, 1, 2]], [80, np.nan, 45], equal_nan=True)
    assert np.array_equal(found.weights[[0, 1, 2, 8]], [40, 28, 18, np.nan], equal_nan=True)
    assert np.array_equal(found.labels[[0, 1]], [np.nan, 2], equal_nan=True)
    assert found.failures() == {reason: 1 for reason in reasons if reason}
    assert found.architectures.tolist()[1] == "x"
    assert known(row("gated", *SAFE, gated=True), has_token=True).files.tolist() == [2]
    assert known(row("p", "config.json", "pytorch_model.bin"), allow_pickle=True).files.tolist() == [2]
    assert len(known()) == 0


def test_limits_of_the_hub() -> None:
    assert hub_account("http://127.0.0.1:8000", with_token=True) is None
    assert hub_account("https://huggingface.co", with_token=False) == "anonymous"
    for account, limits in HUB_LIMITS.items():
        assert _limited(limits["file"], limits["api"], account) == 0, "one window's requests may come at once"
        assert _limited(13 * limits["file"], 0, account) == pytest.approx(3600)
        assert _limited(0, 13 * limits["api"], account) == pytest.approx(3600)
    bucket = SlidingWindowLimit.for_endpoint("https://huggingface.co", with_token=True)
    assert sum(bucket.try_acquire("api") == 0 for _ in range(2000)) == HUB_LIMITS["free account"]["api"]


# Heads


@settings(max_examples=50)
@given(
    bodies=st.lists(st.tuples(st.integers(10**4, 10**8), st.integers(33, 2049)), min_size=1, max_size=4),
    logits=st.lists(st.integers(1, 200), min_size=2, max_size=8, unique=True),
)
def test_logits_follow_from_parameters(bodies: list[tuple[int, int]], logits: list[int]) -> None:
    for number, (body, width) in enumerate(bodies):
        body = max(body, 300 * width)
        counts = np.array([body + width * count for count in logits], float)
        names = np.array([f"a{number}"] * len(logits), object)
        given_ = (names[:2], counts[:2], np.array(logits[:2], float))
        assert logits_by_parameters(names, counts, *given_).tolist() == logits


def test_logits_that_do_not_follow() -> None:
    one = np.array(["a"], object), np.array([1000.0]), np.array([3.0])
    names = np.array(["a", "a", "b", "", "a"], object)
    found = logits_by_parameters(names, np.array([1000, 1100, 1000, 1000, np.nan]), *one)
    assert np.array_equal(found, [3, np.nan, np.nan, np.nan, np.nan], equal_nan=True)
    two = np.array(["a", "a"], object), np.array([1000.0, 1000.0]), np.array([3.0, 4.0])
    assert np.isnan(logits_by_parameters(names[:1], np.array([1000.0]), *two)).all()


# Which are measured


def test_every_class_of_size_is_measured() -> None:
    sizes = [1e5] * 50 + [2e7] * 20 + [1e8] * 5 + [3e8] * 2 + [4e9]
    rows = [row(f"m{i}", *SAFE, parameters=int(p), weight_bytes=int(4 * p)) for i, p in enumerate(sizes)]
    rows += [row("unknown", *SAFE), row("gated", *SAFE, gated=True, parameters=10)]
    found, names = known(*rows, max_bytes=10**11), [r.repo for r in rows]
    chosen = stratified(found, names, 20, 0)
    assert chosen.sum() == 20
    assert set(size_class(found.parameters)[chosen]) == {-1, 0, 1, 2, 3, 4}
    taken = [int(chosen[size_class(found.parameters) == number].sum()) for number in range(-1, 5)]
    assert taken == [1, 6, 5, 5, 2, 1], "the classes take turns until they are empty"
    assert not chosen[-1], "it is known to fail"
    assert (stratified(found, names, 20, 0) == chosen).all()
    assert (stratified(found, names, 20, 1) != chosen).any()
    assert stratified(found, names, 1000, 0).sum() == len(rows) - 1
    assert not stratified(known(rows[-1]), names[-1:], 3, 0).any()


# Prepared probes


def test_a_way_that_one_model_needs_stands_for_one_not_seen() -> None:
    def recipe(size: int, mean: float) -> str:
        return timm_recipe({"input_size": [3, size, size], "mean": [mean] * 3}, 99).to_json()

    recipes = [recipe(8, 0.1), recipe(8, 0.2), recipe(10, 0.1)]
    nothing: list[Any] = [None] * 11
    measured = Measured(*nothing, models=pa.table({"recipe": recipes}))
    assert measured.prepared_bytes == 3 * 8 * 8 + 2 * 3 * 10 * 10


# A run's wall time


def test_a_timeline() -> None:
    now = [0.0]
    line = Timeline(Config(store="s", probes="p"), clock=lambda: now[0])
    assert line.run() is None
    parts = {"download": 1.0, "load": 2.0, "wait": 1.0, "preprocess": 0.5, "forward": 1.5}
    for at, worker in ((16.0, "a"), (18.0, "b"), (20.0, "a")):
        now[0] = at
        line.add(ItemReport(seconds=parts, bytes=10, worker=worker))
    line.add(ItemReport(reason="timeout", seconds={"load": 9.0}, worker="a"))
    run = line.run()
    assert run is not None
    assert (run.models, run.failed, run.workers, run.bytes) == (3, 1, 2, 30)
    assert (run.start_seconds, run.wall_seconds, run.busy_seconds) == (10.0, 10.0, 12.0)
    assert run.overlap == pytest.approx(0.6)
