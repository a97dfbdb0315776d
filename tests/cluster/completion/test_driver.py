"""Sharded completion on a real Ray: the same result however the rows are spread."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.completion.describe import describe_parts, forget_described
from cluster.completion.driver import Completion, _lives
from cluster.completion.fit import Checkpoint, Fit
from cluster.completion.shard import ShardSpec, partition_by_rows
from cluster.runtime.settings import WorkerSettings
from probelog.completion.als import Block, HeldOutError, complete_rows, row_step
from probelog.completion.scoring import standardise, top_pairs
from probelog.errors import ProbeLogError, StoreError
from probelog.storage.ledger import ItemResult, Ledger, Receipt, item_key, observed_models
from probelog.storage.observations import to_rows
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import DESCRIPTORS
from probelog.storage.store import Store
from tests.probelog.storage.test_ledger import model
from tests.support.worlds.naive import model_directions

PROBES, LOGITS = 60, 4
EMBEDDINGS = np.random.default_rng(1).normal(size=(PROBES, 6)) / 3
pytestmark = pytest.mark.usefixtures("local_ray")


def ledger_of(
    folder: Path, share: float, models: int = 12, constant: Sequence[int] = ()
) -> tuple[Store, list[Receipt]]:
    """Models of low rank, four a receipt, each seen on its own probes."""
    store = Store(folder)
    ledger = Ledger(store, "observations/x")
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((PROBES, 3))
    keys = []
    for number in range(models):
        repo = f"owner/model-{number:02}"
        seen = np.sort(rng.choice(PROBES, round(share * PROBES), replace=False))
        values = (rng.standard_normal((LOGITS, 3)) @ columns.T)[:, seen] * 5 + 3
        values[[*constant]] = 7.0
        facts = model(repo, logits=LOGITS, probes=len(seen))
        facts = type(facts)(
            **{name: getattr(facts, name) for name in facts.__slots__} | {"probes": seen.tolist()}
        )
        keys.append(item_key(repo, "s" * 40))
        ledger.spool(keys[-1], ItemResult.success(facts, to_rows(repo, "s" * 40, values)))
    return store, [ledger.seal(keys[start : start + 4]) for start in range(0, models, 4)]


def fit(**changes: object) -> Fit:
    given = {"probes": PROBES, "rank": 3, "regularisation": 0.01, "seed": 0, "top_share": 0.1, "sweeps": 6}
    return Fit(**(given | changes))


def spec(store: Store, memory: int | None = None) -> ShardSpec:
    return ShardSpec(store.uri, seed=0, settings=WorkerSettings(completion_memory=memory))


def test_any_number_of_shards_gives_the_same_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5, models=20)
    found = []
    # This Ray has four CPUs. All may be shards': adding up needs none.
    for shards, memory in ((1, None), (2, 10**9), (5, 1)):
        monkeypatch.setattr("cluster.completion.driver._PLACE_SECONDS", 60.0 if shards < 4 else 2.0)
        completion = Completion(store, receipts, shards, spec(store, memory))
        placed, loaded = completion.shards, completion.loaded
        assert len(placed) == shards if shards < 4 else len(placed) <= 4
        assert (loaded.models, loaded.logits, loaded.dropped) == (20, 80, 0)
        assert (loaded.in_memory == 0, loaded.on_disk == 0) == (memory == 1, memory != 1)
        found.append(completion.fit(fit(), held_out=False).columns)
        completion.close()
        while any(_lives(shard) for shard in placed):
            time.sleep(0.01)  # a signal is under way
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    np.testing.assert_allclose(found[2], found[0], atol=1e-4)


def test_the_choice_prefers_what_predicts_and_goes_on_where_it_was(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6, models=20)
    completion = Completion(store, receipts, 2, spec(store))
    tried: dict[tuple[int, float], tuple[int, HeldOutError]] = {}
    fits: list[Fit] = []
    chosen, sweeps, error = completion.choose(
        fit(sweeps=15), (1, 3), (0.01, 1.0), tried, lambda new, _: fits.append(new)
    )
    assert (chosen.rank, chosen.regularisation) == (3, 0.01)
    assert error.rmse < 0.2
    assert 1 <= sweeps <= 15
    assert error.entries > error.top_entries > 0
    again: list[Fit] = []
    assert completion.choose(
        fit(sweeps=15), (1, 3), (0.01, 1.0), tried, lambda new, _: again.append(new)
    ) == (
        chosen,
        sweeps,
        error,
    )
    assert fits
    assert not again
    completion.close()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_descriptors_describe_the_completed_rows(tmp_path: Path, share: float) -> None:
    store, receipts = ledger_of(tmp_path, share, constant=[1])
    completion = Completion(store, receipts, 2, spec(store))
    assert completion.loaded.dropped == 12
    fitted = completion.fit(fit(), held_out=False)
    completion.close()
    described = (store, receipts, fitted.columns, EMBEDDINGS.astype(np.float32), 0.01, 10, "completion/y")
    parts = describe_parts(*described)
    assert describe_parts(*described) == parts
    for receipt in receipts:
        table = read_part(store, parts[receipt.name], DESCRIPTORS)
        start = 0
        for facts, logits, values in observed_models(store, receipt):
            rows = table.slice(start, LOGITS - 1)
            start += LOGITS - 1
            assert rows["repo"].unique().to_pylist() == [facts.repo]
            assert rows["logit"].to_pylist() == [0, 2, 3]
            mean, std, z_mean, z_std = (
                rows[name].to_numpy().astype(float)[:, None] for name in ("mean", "std", "z_mean", "z_std")
            )
            block = Block(
                np.asarray(facts.probes, np.int32), ((values[logits != 1] - mean) / std).astype(np.float32)
            )
            factors = row_step(block, fitted.columns, 0.01)
            np.testing.assert_allclose(np.stack(rows["factor"].to_numpy()), factors, rtol=1e-3, atol=1e-4)
            z = (complete_rows(block, factors, fitted.columns) - z_mean) / z_std
            assert z.shape == (LOGITS - 1, PROBES)
            np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-5)
            np.testing.assert_allclose(z.std(axis=1), 1, atol=1e-5)
            pairs = top_pairs(z, 10)
            np.testing.assert_array_equal(pairs.probes, np.stack(rows["top_probes"].to_numpy()))
            np.testing.assert_allclose(pairs.values, np.stack(rows["top_values"].to_numpy()), atol=2e-3)
            for name in ("bottom_probes", "bottom_values", "opposite_direction"):  # of one-logit heads only
                assert rows[name].null_count == LOGITS - 1
            if share == 1.0:  # nothing was missing: nothing may change
                np.testing.assert_allclose(z, standardise(values[logits != 1]), atol=1e-5)
            expected = model_directions(
                values[logits != 1].astype(float), facts.head, EMBEDDINGS, facts.probes
            )
            np.testing.assert_allclose(np.stack(rows["direction"].to_numpy()), expected, atol=5e-4)
        assert start == table.num_rows


def test_parts_that_are_described_are_not_described_again(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, 0.5)
    columns = np.random.default_rng(2).standard_normal((PROBES, 3)).astype(np.float32)
    settings = (columns, EMBEDDINGS.astype(np.float32), 0.01, 10, "completion/y")
    heard: list[int] = []
    first = describe_parts(store, receipts[1:2], *settings, progress=heard.append)
    assert list(first) == [receipts[1].name]
    (part,) = first.values()
    assert part.rows == 4 * LOGITS
    written = (tmp_path / part.path).stat().st_mtime_ns
    parts = describe_parts(store, receipts, *settings, progress=heard.append)
    assert heard == [1, 2, 3], "the part that there was is counted"
    assert parts.keys() == {receipt.name for receipt in receipts}
    assert parts[receipts[1].name] == part
    assert (tmp_path / part.path).stat().st_mtime_ns == written
    forget_described(store, "completion/y")
    assert set(store.names("completion/y")) == {part.path for part in parts.values()}


def test_nothing_to_complete_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProbeLogError, match="nothing to complete: no model was probed"):
        Completion(Store(tmp_path), [], 2, spec(Store(tmp_path)))
    store, receipts = ledger_of(tmp_path, share=0.5, models=4, constant=range(LOGITS))
    with pytest.raises(ProbeLogError, match="nothing to complete: every logit is constant") as refused:
        Completion(store, receipts, 2, spec(store))
    assert refused.traceback[-1].locals["self"].shards == [], "its workers are given back"


def test_shards_hold_about_equally_many_rows(tmp_path: Path) -> None:
    _, (receipt, *_) = ledger_of(tmp_path, share=0.5)
    sizes = [900, 10, 20, 400, 30, 500, 40, 850, 5, 300]
    receipts = [
        replace(receipt, name=f"{number:02}", rows=replace(receipt.rows, rows=rows))
        for number, rows in enumerate(sizes)
    ]
    groups = partition_by_rows(receipts, 3)
    assert groups == partition_by_rows(receipts[::-1], 3)
    assert sorted(item.name for group in groups for item in group) == [item.name for item in receipts]
    rows = [sum(item.observations.rows for item in group) for group in groups]
    assert max(rows) <= 4 / 3 * sum(rows) / 3


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("held_out", [True, pytest.param(False, marks=pytest.mark.acceptance)])
def test_a_fit_goes_on_at_the_sweep_where_it_was(tmp_path: Path, held_out: bool) -> None:
    store, receipts = ledger_of(tmp_path, share=0.6)
    checkpoint = Checkpoint(store, "completion/y/sweep.npy")
    wanted = fit(sweeps=7, regularisation=0.1, tolerance=-1.0)
    completion = Completion(store, receipts, 2, spec(store), checkpoint)
    undisturbed = completion.fit(wanted, held_out)
    checkpoint.clear()
    heard: list[int] = []

    def stop(sweep: int, _: HeldOutError | None) -> None:
        heard.append(sweep)
        if sweep == 4 and len(heard) == 4:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        completion.fit(wanted, held_out, stop)
    completion.close()
    completion = Completion(store, receipts, 2, spec(store), checkpoint)
    assert checkpoint.load(replace(wanted, rank=2), held_out) is None, (
        "another fit starts at its own beginning"
    )
    assert checkpoint.load(wanted, not held_out) is None
    resumed = completion.fit(wanted, held_out, stop)
    # A held-out error comes with the sums of the next sweep: the one that was not told is told again.
    assert heard == [1, 2, 3, 4, *([4] if held_out else []), 5, 6, 7]
    np.testing.assert_array_equal(resumed.columns, undisturbed.columns)
    assert (resumed.sweeps, resumed.error) == (undisturbed.sweeps, undisturbed.error)
    checkpoint.clear()
    assert not list((tmp_path / "completion/y").iterdir())
    completion.close()


def test_a_lost_shard_is_read_again_and_the_sweep_repeated(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    completion = Completion(store, receipts, 2, spec(store))
    undisturbed = completion.fit(fit(), held_out=False)
    heard: list[int] = []

    def kill(sweep: int, _: HeldOutError | None) -> None:
        heard.append(sweep)
        if sweep in (2, 4):
            victim = completion.shards[sweep // 4]
            os.kill(ray.get(victim.pid.remote()), signal.SIGKILL)

    found = completion.fit(fit(), held_out=False, progress=kill)
    assert len(completion.shards) == 2
    completion.close()
    assert heard == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(found.columns, undisturbed.columns)


@pytest.mark.acceptance
def test_without_a_place_for_a_lost_shard_the_others_take_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    completion = Completion(store, receipts, 3, spec(store))
    # From here on: the three shards may have to wait for CPUs that tests before this one still hold.
    monkeypatch.setattr("cluster.completion.driver._PLACE_SECONDS", 3.0)
    undisturbed = completion.fit(fit(), held_out=False)
    # Takes the one CPU that is left, so that the CPU of a shard that dies is the only one there could be.
    squatters: list[Any] = []

    def kill(sweep: int, _: HeldOutError | None) -> None:
        if sweep == 2:
            os.kill(ray.get(completion.shards[1].pid.remote()), signal.SIGKILL)
            free = int(ray.cluster_resources()["CPU"]) - 2
            squatters.extend(_Squatter.remote() for _ in range(free))
            ray.get([squatter.here.remote() for squatter in squatters])

    found = completion.fit(fit(), held_out=False, progress=kill)
    assert len(completion.shards) == 2
    held = [receipt.name for group in completion._groups for receipt in group]
    assert sorted(held) == sorted(receipt.name for receipt in receipts), "the next loss must not forget them"
    completion.close()
    for squatter in squatters:
        ray.kill(squatter)
    np.testing.assert_allclose(found.columns, undisturbed.columns, atol=1e-4)


def test_without_any_place_the_first_that_is_free_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5, models=4)
    monkeypatch.setattr("cluster.completion.driver._PLACE_SECONDS", 0.5)
    squatters = [_Squatter.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    ray.get([squatter.here.remote() for squatter in squatters])
    leaving = threading.Timer(1.0, lambda: [ray.kill(squatter) for squatter in squatters])
    leaving.start()
    completion = Completion(store, receipts, 1, spec(store))
    assert (len(completion.shards), completion.loaded.models) == (1, 4)
    completion.close()
    leaving.join()


@ray.remote(num_cpus=1)
class _Squatter:
    def here(self) -> None:
        pass


@pytest.mark.acceptance
def test_shards_that_are_lost_for_ever_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    completion = Completion(store, receipts, 2, spec(store))

    def kill() -> None:
        os.kill(ray.get(completion.shards[0].pid.remote()), signal.SIGKILL)
        ray.get(completion.shards[0].ready.remote())

    with pytest.raises(ProbeLogError, match="set a smaller `completion_memory`"):
        completion._persistently(kill)
    completion.close()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    file = tmp_path / receipts[1].observations.path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"is damaged"):
        Completion(store, receipts, 2, spec(store))
