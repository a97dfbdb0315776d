"""Sharded completion on a real Ray: the same result however the rows are spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.completer import Completion, Fit, ShardSpec, describe_parts
from probelog.completion import Block, HeldOutError, complete_rows, row_step
from probelog.errors import ProbeLogError
from probelog.ledger import Ledger, Receipt, Spooled, item_key, observed_models, read_part
from probelog.observations import to_rows
from probelog.schemas import DESCRIPTORS
from probelog.scoring import standardise, top_pairs
from probelog.storage import Store
from tests.naive import model_directions
from tests.unit.test_ledger import model

PROBES, LOGITS = 60, 4
EMBEDDINGS = np.random.default_rng(1).normal(size=(PROBES, 6)) / 3
pytestmark = pytest.mark.usefixtures("local_ray")


def ledger_of(
    folder: Path, share: float, models: int = 12, constant: bool = False
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
        if constant:
            values[1] = 7.0
        facts = model(repo, logits=LOGITS, probes=len(seen))
        facts = type(facts)(
            **{name: getattr(facts, name) for name in facts.__slots__} | {"probes": seen.tolist()}
        )
        keys.append(item_key(repo, "s" * 40))
        ledger.spool(keys[-1], Spooled.success(facts, to_rows(repo, "s" * 40, values)))
    return store, [ledger.seal(keys[start : start + 4]) for start in range(0, models, 4)]


def fit(**changes: object) -> Fit:
    given = {"probes": PROBES, "rank": 3, "regularisation": 0.01, "seed": 0, "top_share": 0.1, "sweeps": 6}
    return Fit(**(given | changes))  # type: ignore[arg-type]


def spec(store: Store, **changes: object) -> ShardSpec:
    return ShardSpec(**({"store": store.uri, "seed": 0} | changes))  # type: ignore[arg-type]


def test_any_number_of_shards_gives_the_same_columns(tmp_path: Path) -> None:
    store, receipts = ledger_of(tmp_path, share=0.5)
    found = []
    for shards, memory in ((1, None), (2, 10**9), (3, 0)):
        completion = Completion(store, receipts, shards, spec(store, memory=memory))
        loaded = completion.loaded
        assert (loaded.models, loaded.logits, loaded.dropped) == (12, 48, 0)
        assert (loaded.in_memory == 0, loaded.on_disk == 0) == (memory == 0, memory != 0)
        found.append(completion.fit(fit(), held_out=False).columns)
        completion.close()
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
    store, receipts = ledger_of(tmp_path, share, constant=True)
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


def test_nothing_to_complete_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProbeLogError, match="nothing to complete"):
        Completion(Store(tmp_path), [], 2, spec(Store(tmp_path)))
