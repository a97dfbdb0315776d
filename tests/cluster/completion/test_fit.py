"""The loop of a fit and the choice of its settings, without Ray: sums in this process, or errors as the test plans them;
and what is repeated when a worker was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from cluster.completion.driver import Completion
from cluster.completion.fit import Checkpoint, Fit, Fitted, State
from cluster.completion.shard import Loaded
from probelog.completion.als import (
    ColumnSums,
    Float32,
    HeldOutError,
    SweepSums,
    column_step,
    initial_columns,
)
from probelog.errors import ProbeLogError, StoreError
from probelog.storage.store import Store

FIT = Fit(probes=7, rank=2, regularisation=0.1, seed=5, top_share=0.1, sweeps=20)


def error(rmse: float) -> HeldOutError:
    return HeldOutError(100 * rmse**2, 100, 1.0, 1)


def columns_sums(number: int) -> ColumnSums:
    """Those of some sweep: every one has columns of its own."""
    rng = np.random.default_rng(number)
    return ColumnSums(np.ones((7, 3)) * [1, 0, 1], rng.standard_normal((7, 2)), np.ones(7))


def columns(sweep: int, fit: Fit = FIT) -> Float32:
    """After so many sweeps."""
    if sweep == 0:
        return initial_columns(fit.probes, fit.rank, fit.seed)
    return column_step(columns_sums(sweep), fit.regularisation)


class Planned(Completion):
    """The held-out errors of the columns after sweep 0, 1, 2, ... are given."""

    def __init__(self, errors: Sequence[float], checkpoint: Checkpoint | None = None) -> None:
        self._errors, self._checkpoint = errors, checkpoint
        self.asked: list[int] = []

    def _sums(self, columns_: Float32, fit: Fit, held_out: bool) -> SweepSums:
        (sweep,) = [
            number for number in range(len(self._errors)) if np.array_equal(columns(number), columns_)
        ]
        self.asked.append(sweep)
        return SweepSums(columns_sums(sweep + 1), error(self._errors[sweep]))


@pytest.mark.parametrize(
    ("errors", "best", "asked"),
    [
        ([1.0, 0.9, 0.5, 0.7], 2, 3),  # rises again: the one before was the best
        ([1.0, 0.9, 0.5, 0.4999], 3, 3),  # falls by less than a thousandth: taken, but the last
        ([1.0, 0.9, 0.5, 0.5], 2, 3),  # equal ones: the earlier
        ([0.1, 0.9, 0.8, 0.9], 2, 3),  # the start's own error is not looked at
        ([1.0, 0.9, 0.95], 1, 2),
    ],
)
def test_the_columns_of_the_sweep_with_the_smallest_error_are_the_result(
    errors: list[float], best: int, asked: int
) -> None:
    heard: list[tuple[int, HeldOutError | None]] = []
    completion = Planned(errors)
    found = completion.fit(FIT, progress=lambda sweep, error: heard.append((sweep, error)))
    assert found.sweeps == best
    np.testing.assert_array_equal(found.columns, columns(best))
    assert found.error == error(errors[best])
    assert completion.asked == [*range(asked + 1)]
    assert heard == [(number, error(errors[number])) for number in range(1, asked + 1)]


def test_a_fit_ends_after_its_sweeps_though_the_error_still_falls() -> None:
    completion = Planned([1.0, 0.9, 0.8, 0.7, 0.6])
    found = completion.fit(replace(FIT, sweeps=3))
    assert (found.sweeps, completion.asked) == (3, [0, 1, 2, 3])
    np.testing.assert_array_equal(found.columns, columns(3))
    assert found.error == error(0.7)


def test_the_tolerance_is_a_share_of_the_error() -> None:
    found = Planned([1.0, 0.9, 0.8, 0.7, 0.6]).fit(replace(FIT, tolerance=0.2))
    assert found.sweeps == 2
    assert Planned([1.0, 0.9, 0.71, 0.6, 0.59]).fit(replace(FIT, tolerance=0.2)).sweeps == 3


def test_without_held_out_entries_all_sweeps_are_made_and_no_error_is_known() -> None:
    heard: list[tuple[int, HeldOutError | None]] = []
    completion = Planned([1.0] * 5)
    found = completion.fit(
        replace(FIT, sweeps=4), held_out=False, progress=lambda sweep, error: heard.append((sweep, error))
    )
    assert (found.sweeps, found.error, completion.asked) == (4, None, [0, 1, 2, 3])
    np.testing.assert_array_equal(found.columns, columns(4))
    assert heard == [(1, None), (2, None), (3, None), (4, None)]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_an_interrupted_fit_resumes(tmp_path: Path, interrupted: int, held_out: bool) -> None:
    checkpoint = Checkpoint(Store(tmp_path), "fit")
    errors, fit = [1.0, 0.9, 0.5, 0.7, 0.6], replace(FIT, sweeps=4)
    with pytest.raises(ValueError, match="unpack"):  # the plan ends, and with it the driver
        Planned(errors[:interrupted], checkpoint).fit(fit, held_out)
    kept = checkpoint.load(fit, held_out)
    assert kept is not None
    assert kept.sweep == interrupted
    again = Planned(errors, checkpoint)
    found = again.fit(fit, held_out)
    assert again.asked[0] == interrupted
    whole = Planned(errors).fit(fit, held_out)
    np.testing.assert_array_equal(found.columns, whole.columns)
    assert (found.sweeps, found.error) == (whole.sweeps, whole.error)


def test_a_checkpoint_keeps_the_state_of_one_fit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Store(tmp_path), "fit")
    assert checkpoint.load(FIT, True) is None
    best = Fitted(columns(1), 1, HeldOutError(1.5, 2, 0.5, 1))
    checkpoint.save(State(FIT, True, 3, columns(3), best))
    found = checkpoint.load(FIT, True)
    assert found is not None
    assert found.best is not None
    assert (found.fit, found.held_out, found.sweep) == (FIT, True, 3)
    assert (found.best.sweeps, found.best.error) == (1, best.error)
    np.testing.assert_array_equal(found.columns, columns(3))
    np.testing.assert_array_equal(found.best.columns, columns(1))
    assert checkpoint.load(FIT, False) is None
    assert checkpoint.load(replace(FIT, seed=6), True) is None
    checkpoint.save(State(FIT, True, 0, columns(0)))
    first = checkpoint.load(FIT, True)
    assert first is not None
    assert first.best is None
    checkpoint.clear()
    assert checkpoint.load(FIT, True) is None


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\n", b'{"best": null}\nno array'])
def test_a_checkpoint_of_another_kind_is_none(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.write("fit", content)
    assert Checkpoint(store, "fit").load(FIT, True) is None


class Choosing(Completion):
    """Errors by rank and regularisation."""

    def __init__(self, errors: dict[tuple[int, float], float]) -> None:
        self._planned = errors
        self.asked: list[tuple[int, float]] = []

    def fit(self, fit: Fit, held_out: bool = True, progress: object = None) -> Fitted:
        key = (fit.rank, fit.regularisation)
        self.asked.append(key)
        return Fitted(columns(0), 10 + fit.rank, error(self._planned[key]))


def choice(
    errors: dict[tuple[int, float], float], ranks: Sequence[int], regularisations: Sequence[float]
) -> tuple[tuple[int, float], int, list[tuple[int, float]]]:
    completion = Choosing(errors)
    heard: list[tuple[int, float]] = []
    chosen, sweeps, found = completion.choose(
        FIT, ranks, regularisations, {}, lambda fit, _: heard.append((fit.rank, fit.regularisation))
    )
    key = (chosen.rank, chosen.regularisation)
    assert replace(chosen, rank=FIT.rank, regularisation=FIT.regularisation) == FIT
    assert found == error(errors[key])
    assert heard == completion.asked
    return key, sweeps, completion.asked


def test_larger_ranks_are_tried_with_the_best_regularisation_and_the_next_smaller_one() -> None:
    errors = {(1, 0.1): 0.9, (1, 1.0): 0.8, (1, 10.0): 0.95}
    errors |= {(2, 0.1): 0.6, (2, 1.0): 0.7}
    errors |= {(4, 0.1): 0.5}
    assert choice(errors, (1, 2, 4), (0.1, 1.0, 10.0)) == ((4, 0.1), 14, [*errors])


def test_a_rank_that_gains_less_than_a_hundredth_is_the_last() -> None:
    errors = {(1, 0.1): 0.8, (2, 0.1): 0.7925, (4, 0.1): 0.1}
    assert choice(errors, (1, 2, 4), (0.1,)) == ((2, 0.1), 12, [(1, 0.1), (2, 0.1)])
    errors[2, 0.1] = 0.7915
    assert choice(errors, (1, 2, 4), (0.1,)) == ((4, 0.1), 14, [*errors])
    errors[2, 0.1] = 0.9
    assert choice(errors, (1, 2, 4), (0.1,)) == ((1, 0.1), 11, [(1, 0.1), (2, 0.1)])


def test_what_was_tried_is_not_tried_again_and_what_is_new_is_added() -> None:
    completion = Choosing({(1, 0.1): 0.8, (2, 0.1): 0.5})
    tried = {(1, 0.1): (3, error(0.8))}
    heard: list[int] = []
    chosen, sweeps, _ = completion.choose(FIT, (1, 2), (0.1,), tried, lambda fit, _: heard.append(fit.rank))
    assert (chosen.rank, sweeps, heard, completion.asked) == (2, 12, [2], [(2, 0.1)])
    assert tried == {(1, 0.1): (3, error(0.8)), (2, 0.1): (12, error(0.5))}


def test_what_shards_hold_adds_up() -> None:
    assert Loaded(1, 2, 3, 4, 5) + Loaded(10, 20, 30, 40, 50) == Loaded(11, 22, 33, 44, 55)


def test_how_a_fit_is_made_by_default() -> None:
    assert (FIT.held_share, FIT.sample, FIT.tolerance) == (0.1, 1.0, 1e-3)
    assert Fit(7, 2, 0.1, 5, 0.1).sweeps == 20


class Losing(Completion):
    """Its calls lose workers one after the other, as planned."""

    def __init__(self, *losses: Exception) -> None:
        self._planned, self.replaced = [*losses], 0

    def _replace_lost(self) -> None:
        self.replaced += 1

    def call(self) -> str:
        if self._planned:
            raise self._planned.pop(0)
        return "the result"


LOST = [
    RayActorError(),
    ObjectLostError("reference", None, "call site"),
    OutOfMemoryError("memory"),
    WorkerCrashedError(),
    RayTaskError("_add", "traceback", RayActorError()),
]


@pytest.mark.parametrize("loss", LOST, ids=lambda loss: type(loss).__name__)
def test_what_a_lost_worker_took_part_in_is_repeated_with_another(loss: RayError) -> None:
    completion = Losing(loss)
    assert completion._persistently(completion.call) == "the result"
    assert completion.replaced == 1


def test_nothing_is_replaced_where_nothing_was_lost() -> None:
    completion = Losing()
    assert completion._persistently(completion.call) == "the result"
    assert completion.replaced == 0


@pytest.mark.parametrize(
    "other",
    [RuntimeEnvSetupError("x"), RayTaskError("load", "traceback", StoreError("damaged")), ValueError("x")],
    ids=lambda other: type(other).__name__,
)
def test_other_errors_are_not_repeated(other: Exception) -> None:
    completion = Losing(other)
    with pytest.raises(type(other)):
        completion._persistently(completion.call)
    assert completion.replaced == 0


def test_workers_that_are_lost_again_and_again_are_given_up() -> None:
    four = Losing(*[WorkerCrashedError()] * 4)
    assert four._persistently(four.call) == "the result"
    five = Losing(*[WorkerCrashedError()] * 5, ValueError("a sixth try"))
    with pytest.raises(ProbeLogError, match=r"5 times one after the other .* set a smaller"):
        five._persistently(five.call)
    assert (four.replaced, five.replaced) == (4, 4)
