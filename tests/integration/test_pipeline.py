"""The whole way from a Hub to an index, and the index against METHOD's formulas in plain NumPy."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipelines.complete import Completed
from pipelines.full import run_full
from pipelines.status import status
from probelog.client import open_index
from probelog.encoders import load_encoder
from probelog.generation import Generation
from probelog.index import find_index, read_pointer, roll_back
from probelog.ledger import observed_models, read_part
from probelog.probes import ProbeSet, subset
from probelog.schemas import DESCRIPTORS
from probelog.storage import Store
from tests.faults import faulty
from tests.operator_command import operator
from tests.tiny_world import CONCEPTS, LOGITS, MODELS, PROBES, Indexed, standardised, truth

PROMPT = "a photo of a {}"
# Two names that calibrate every logit, and two that the background does not hold.
QUERIES = ["dog", "Jack-o'-Lantern", "zebra", "a very old castle"]


@pytest.fixture(autouse=True)
def _at_the_tiny_hub(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def opened(store: Path) -> Generation:
    index = find_index(str(store))
    return Generation(index, read_pointer(index)[0])


# A full run


def test_everything_is_indexed(indexed: Indexed) -> None:
    run = indexed.run
    assert (run.probed.models, run.probed.failures) == (len(MODELS), [])
    assert run.completed.dropped == sum(dead for _, dead in MODELS.values())
    assert (run.published.models, run.published.logits) == (len(MODELS), LOGITS)
    generation = opened(indexed.store)
    models = {row["repo"]: row for row in generation.models.to_pylist()}
    assert {repo: row["logits"] for repo, row in models.items()} == {r: n for r, (n, _) in MODELS.items()}
    heads = {repo: row["head"] for repo, row in models.items()}
    assert {heads.pop("bob/one-logit"), heads.pop("bob/many-labels")} == {"single", "sigmoid"}
    assert set(heads.values()) == {"softmax"}
    assert all(row["observed"] == PROBES for row in models.values())
    assert models["ada/resnet"]["weight_digest"] == models["ada/resnet-again"]["weight_digest"]
    negated = generation.logits.filter(generation.logits["negated"])
    assert [models_at(generation, row) for row in range(LOGITS)].count("bob/one-logit") == 2
    assert negated.num_rows == 1
    dead = [n for n, repo in zip(generation.logits["logit"].to_pylist(), owners(generation), strict=True) if repo == "ada/convnext-shards"]  # fmt: skip
    assert dead == [0, 2, 3]


def owners(generation: Generation) -> list[str]:
    repos = generation.models["repo"].to_pylist()
    return [repos[model] for model in generation.model_of]


def models_at(generation: Generation, row: int) -> str:
    return owners(generation)[row]


def test_stored_types_are_remembered(indexed: Indexed) -> None:
    store = Store(indexed.store)
    dtypes = {
        model.repo: model.dtype
        for receipt in indexed.run.probed.receipts
        for model, _, _ in observed_models(store, receipt)
    }
    assert dtypes["cleo/timm-half"] == "float16"
    assert dtypes["cleo/timm-bfloat"] == "bfloat16"
    assert dtypes["ada/resnet"] == "float32"


def test_status_adds_up(indexed: Indexed) -> None:
    found = status(str(indexed.store))
    ledger = next(item for item in found.ledgers if item.key == indexed.run.probed.key)
    assert ledger.planned == ledger.indexed + sum(ledger.failed.values()) + ledger.left + ledger.unsealed
    assert (ledger.planned, ledger.indexed, ledger.left, ledger.unsealed) == (len(MODELS), len(MODELS), 0, 0)
    assert [item["rows"] for item in found.catalogues] == [len(MODELS)]
    assert [item["count"] for item in found.probe_sets] == [PROBES]
    assert found.index is not None
    assert found.index["generation"] == indexed.run.published.pointer.generation
    assert f"{len(MODELS)} of {len(MODELS)} models indexed" in "\n".join(found.lines())


def test_a_rerun_is_a_no_op(indexed: Indexed) -> None:
    before, asked = contents(indexed.store), len(indexed.hub.requests)
    started = time.monotonic()
    again = run_full(indexed.job())
    assert time.monotonic() - started < 5
    assert again.published.pointer == indexed.run.published.pointer
    assert not again.published.fresh
    assert (again.published.models, again.published.logits) == (len(MODELS), LOGITS)
    assert indexed.hub.requests[asked:] == []
    assert contents(indexed.store) == before


def test_a_refresh_lists_again_and_downloads_nothing(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    asked = len(indexed.hub.requests)
    again = run_full(indexed.job(store), refresh=True)
    addresses = [request.address for request in indexed.hub.requests[asked:]]
    assert addresses
    assert all(address.startswith("/api/models?") for address in addresses)
    assert again.catalogue.receipt["run"] != indexed.run.catalogue.receipt["run"]
    assert again.catalogue.rows() == indexed.run.catalogue.rows()
    assert again.published.pointer == indexed.run.published.pointer


def test_only_new_models_are_probed(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = indexed.copy_store(tmp_path / "store")
    root = indexed.world.copy_hub(tmp_path / "hub")
    shutil.rmtree(root / "cleo/timm-half")
    shutil.copytree(root / "bob/many-labels", root / "dan/newcomer")
    before = contents(store / "observations")
    with faulty(root) as (endpoint, hub):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        run = run_full(indexed.job(store, workers=1))
        fetched = {request.address for request in hub.requests if "/resolve/" in request.address}
    assert fetched
    assert all("dan/newcomer" in address for address in fetched)
    after = contents(store / "observations")
    kept = {name: value for name, value in before.items() if not name.endswith("manifest.json")}
    assert kept.items() <= after.items(), "what was observed before is not touched"
    repos = set(opened(store).models["repo"].to_pylist())
    assert repos == set(MODELS) - {"cleo/timm-half"} | {"dan/newcomer"}
    assert run.published.fresh
    ledger = next(item for item in status(str(store)).ledgers if item.key == run.probed.key)
    assert (ledger.planned, ledger.left) == (len(MODELS), 0)


def test_another_prompt_or_background_publishes_without_probing(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    first = indexed.run.published.pointer
    observations = contents(store / "observations")
    asked = len(indexed.hub.requests)
    prompted = run_full(indexed.job(store, prompt="{}"))
    assert prompted.published.fresh
    assert prompted.published.pointer.generation != first.generation
    assert [item["generation"] for item in prompted.published.pointer.previous] == [first.generation]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CONCEPTS[:9]))
    other = run_full(indexed.job(store, background=str(names)))
    assert other.published.fresh
    assert opened(store).background == CONCEPTS[:9]
    assert contents(store / "observations") == observations
    assert indexed.hub.requests[asked:] == []
    index = open_index(store)
    assert index.settings["background_concepts"] == 9
    back = roll_back(find_index(str(store)))
    assert back.generation == prompted.published.pointer.generation
    again = open_index(store)
    assert again.settings["prompt"] == "{}"
    assert again.search(text="dog", k=3)
    roll_back(find_index(str(store)))
    assert open_index(store).generation == first.generation
    assert not run_full(indexed.job(store)).published.fresh, (
        "the settings of the generation that is live again"
    )


def test_evaluation_of_the_index(indexed: Indexed) -> None:
    from pipelines.evaluate import evaluate

    found = evaluate(str(indexed.store), indexed.world.truth)
    copies = [repo for repo, model in truth()["models"].items() if model["kind"] == "copy"]
    assert found.models == len(MODELS) - len(copies)
    assert found.logits == LOGITS - sum(MODELS[repo][0] for repo in copies)
    assert {method.name for method in found.methods} >= {"this index (version 2)", "without calibration"}
    for method in found.methods:
        assert 0 <= method.every.top1 <= method.every.top5 <= 1
    assert "chance" in "\n".join(found.lines())


@pytest.fixture(scope="module")
def half(indexed: Indexed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store indexed with half of the probes, by the operator's stages one after the other."""
    store = tmp_path_factory.mktemp("half") / "store"
    file = indexed.world.config_file(store.parent / "half.toml", store, fraction=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", indexed.endpoint)
        for stage in ("crawl", "probe", "complete", "publish"):
            assert operator(stage, "--config", file).status == 0
    return store


def test_the_stages_one_by_one_are_a_full_run(indexed: Indexed, half: Path) -> None:
    before = contents(half)
    asked = len(indexed.hub.requests)
    run = run_full(indexed.job(half, fraction=0.5))
    assert not run.published.fresh
    assert (run.published.models, run.published.logits) == (len(MODELS), LOGITS)
    assert indexed.hub.requests[asked:] == []
    assert contents(half) == before


def test_half_of_the_probes_are_kept_as_they_were_observed(indexed: Indexed, half: Path) -> None:
    run = run_full(indexed.job(half, fraction=0.5))
    generation = opened(half)
    columns = generation.columns_at(range(PROBES)).T.astype(np.float64)
    assert columns.shape == (LOGITS, PROBES)
    np.testing.assert_allclose(columns.mean(axis=1), 0, atol=2e-3)
    np.testing.assert_allclose(columns.std(axis=1), 1, atol=2e-3)
    rows = {
        (repo, logit): row
        for row, (repo, logit, negated) in enumerate(
            zip(owners(generation), generation.logits["logit"].to_pylist(), generation.logits["negated"].to_pylist(), strict=True)
        )
        if not negated
    }  # fmt: skip
    store, seen, subsets = Store(half), 0, set()
    for receipt in run.probed.receipts:
        for model, logits, values in observed_models(store, receipt):
            assert len(model.probes) == PROBES // 2
            assert model.probes == subset(indexed.probe_set, model.repo, model.sha, 0, 0.5, PROBES).tolist()
            subsets.add(tuple(model.probes))
            for logit, observed in zip(logits.tolist(), standardised(values.astype(np.float64)), strict=True):
                if (model.repo, logit) not in rows:
                    assert (model.repo, logit) == ("ada/convnext-shards", 1)
                    continue
                row = columns[rows[model.repo, logit]]
                slope, shift = np.polyfit(observed, row[model.probes], 1)
                assert slope > 0
                np.testing.assert_allclose(row[model.probes], slope * observed + shift, atol=4e-3)  # float16
                seen += 1
    assert seen == len(rows)
    assert len(subsets) == len(MODELS), "every model sees a subset of its own"


# Against the formulas


class Naive(NamedTuple):
    """Standardised logits (N, n) in the index's order, from nothing but the ledger, and whose they are."""

    z: np.ndarray
    rows: list[tuple[str, int, bool]]


def naive(indexed: Indexed) -> Naive:
    store = Store(indexed.store)
    values: dict[str, np.ndarray] = {}
    for receipt in indexed.run.probed.receipts:
        for model, logits, observed in observed_models(store, receipt):
            assert model.probes == list(range(PROBES))
            assert logits.tolist() == list(range(model.logits))
            values[model.repo] = observed.astype(np.float64)
    generation = opened(indexed.store)
    rows = list(
        zip(owners(generation), generation.logits["logit"].to_pylist(), generation.logits["negated"].to_pylist(), strict=True)
    )  # fmt: skip
    z = [
        standardised(values[repo][logit : logit + 1])[0] * (-1 if negated else 1)
        for repo, logit, negated in rows
    ]
    return Naive(np.stack(z), rows)


def text_rows(indexed: Indexed, names: list[str]) -> np.ndarray:
    """Standardised similarity (C, n) of every name to every probe, by the torch encoder itself."""
    encoder = load_encoder(str(indexed.world.encoder), "cpu")
    images = ProbeSet.open(Store(indexed.store), indexed.probe_set).embeddings(encoder.digest)
    texts = encoder.embed_texts([PROMPT.replace("{}", name) for name in names])
    return standardised(texts.astype(np.float64) @ images.astype(np.float64).T)


def naive_scores(indexed: Indexed, z: np.ndarray, queries: list[str], r: int, k: int) -> np.ndarray:
    """METHOD section 3, loop by loop: (C, N), higher is better."""
    z_queries, z_background = text_rows(indexed, queries), text_rows(indexed, CONCEPTS)
    scores = np.empty((len(queries), len(z)))
    for j, row in enumerate(z):
        top = np.argsort(-row, kind="stable")[:r]
        for i, query in enumerate(queries):
            distance = np.sqrt(((row[top] - z_queries[i, top]) ** 2).sum())
            others = [
                np.sqrt(((row[top] - z_background[b, top]) ** 2).sum())
                for b, name in enumerate(CONCEPTS)
                if name.lower() != query.lower()
            ]
            scores[i, j] = np.mean(sorted(others)[:k]) - distance
    return scores


def test_scores_are_version_2s(indexed: Indexed) -> None:
    known = naive(indexed)
    config = indexed.job().config
    expected = naive_scores(indexed, known.z, QUERIES, config.top_r, config.calibration_k)
    index = open_index(indexed.store)
    found = index.scores(QUERIES)
    assert np.ptp(expected) > 0.5, "a comparison of equal numbers would prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for query, scores in zip(QUERIES, expected, strict=True):
        # Answers of equal weights are folded into one, the first of the index.
        ranked: list[tuple[str, int, bool]] = []
        for row in np.argsort(-np.round(scores, 5), kind="stable"):
            repo, logit, negated = known.rows[row]
            if (repo.removesuffix("-again"), logit, negated) not in ranked:
                ranked.append((repo.removesuffix("-again"), logit, negated))
        hits = index.search(text=query, k=LOGITS)
        assert [(hit.repo.removesuffix("-again"), hit.logit, hit.negated) for hit in hits] == ranked
        assert [hit.rank for hit in hits] == list(range(1, len(ranked) + 1))
        assert {hit.duplicates for hit in hits if hit.repo.startswith("ada/resnet")} == {1}


def test_a_query_is_left_out_of_its_own_background(indexed: Indexed) -> None:
    known = naive(indexed)
    config = indexed.job().config
    generation = opened(indexed.store)
    name = generation.background[generation.nearest.names[0][0]]  # it calibrates a logit, so that it matters
    # With a blank behind it, it is no name of the background, but the same words to the encoder.
    with_itself = naive_scores(indexed, known.z, [name + " "], config.top_r, config.calibration_k)
    without = naive_scores(indexed, known.z, [name], config.top_r, config.calibration_k)
    assert np.abs(without - with_itself).max() > 1e-2
    index = open_index(indexed.store)
    for spelling in (name, name.upper(), f" {name} "):
        np.testing.assert_allclose(index.scores([spelling]), without, atol=1e-4)


def test_completion_changes_nothing_where_everything_was_observed(indexed: Indexed) -> None:
    store, r = Store(indexed.store), indexed.job().config.top_r
    known = naive(indexed)
    place = {row: i for i, row in enumerate(known.rows)}
    completed: Completed = indexed.run.completed
    seen = 0
    for part in completed.parts.values():
        for row in read_part(store, part, DESCRIPTORS).to_pylist():
            z = known.z[place[row["repo"], row["logit"], False]]
            order = np.argsort(-z, kind="stable")[:r]
            assert row["top_probes"] == order.tolist()
            np.testing.assert_allclose(row["top_values"], z[order], atol=1e-5)
            np.testing.assert_allclose(row["bottom_values"], np.sort(z)[:r], atol=1e-5)
            assert row["observed"] == PROBES
            seen += 1
    assert seen == completed.logits == LOGITS - 1
    columns = opened(indexed.store).columns_at(range(PROBES))
    np.testing.assert_allclose(columns.T, known.z, atol=4e-3)  # float16


def test_logit_queries_are_version_1s(indexed: Indexed) -> None:
    known = naive(indexed)
    r = indexed.job().config.top_r
    index = open_index(indexed.store)
    place = {row: i for i, row in enumerate(known.rows)}
    for repo, logit in [("bob/many-labels", 3), ("cleo/timm-half", 0), ("bob/one-logit", 0)]:
        query = known.z[place[repo, logit, False]]
        top = np.argsort(-query, kind="stable")[:r]
        expected = np.sqrt(((known.z[:, top] - query[top]) ** 2).sum(axis=1))
        hits = index.search(like=f"{repo}#{logit}", k=LOGITS)
        assert len(hits) > 10
        assert (repo, logit, False) not in {(hit.repo, hit.logit, hit.negated) for hit in hits}
        for hit in hits:
            assert hit.distance == pytest.approx(expected[place[hit.repo, hit.logit, hit.negated]], abs=0.02)
        assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)


def test_the_opposite_of_one_logit(indexed: Indexed) -> None:
    known = naive(indexed)
    place = {row: i for i, row in enumerate(known.rows)}
    generation = opened(indexed.store)
    plain, opposite = (place["bob/one-logit", 0, negated] for negated in (False, True))
    np.testing.assert_array_equal(known.z[plain], -known.z[opposite])
    assert not set(generation.pairs.probes[plain]) & set(generation.pairs.probes[opposite])
    assert (generation.pairs.values[opposite] > 0).any()
