"""The whole way from a Hub to an index, and the index against METHOD's formulas in plain NumPy."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipelines.complete.record import CompletionRecord
from pipelines.full import run_full
from pipelines.inspect.status import status
from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import HeldError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import find_index, read_pointer
from probelog.index.schema import MODEL_FACTS
from probelog.probes.probe_set import ProbeSet, subset
from probelog.publication.lifecycle import roll_back
from probelog.search.client import open_index
from probelog.storage.layout import RECEIPT
from probelog.storage.ledger import observed_models
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import DESCRIPTORS
from probelog.storage.store import Store
from tests.support.hub.faults import faulty
from tests.support.processes.operator_command import operator
from tests.support.worlds import naive
from tests.support.worlds.tiny_world import CONCEPTS, LOGITS, MODELS, PROBES, Indexed, standardised, truth

PROMPT = "a photo of a {}"
# Two names that calibrate every logit, and two that the background does not hold.
QUERIES = ["dog", "Jack-o'-Lantern", "zebra", "a very old castle"]


@pytest.fixture(autouse=True)
def _at_the_tiny_hub(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, but for the figures of the last run."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "runs"
    }


def written(folder: Path) -> dict[str, int]:
    """When every file was written, but for receipts: one is written again whenever what it lists is used."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECEIPT
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
    models = {row["repo"]: row for row in generation.models_table(MODEL_FACTS.names).to_pylist()}
    assert {repo: row["logits"] for repo, row in models.items()} == {r: n for r, (n, _) in MODELS.items()}
    heads = {repo: row["head"] for repo, row in models.items()}
    assert {heads.pop("bob/one-logit"), heads.pop("bob/many-labels")} == {"single", "sigmoid"}
    assert set(heads.values()) == {"softmax"}
    assert all(row["observed"] == PROBES for row in models.values())
    assert models["ada/resnet"]["weight_digest"] == models["ada/resnet-again"]["weight_digest"]
    copy = models["ada/resnet-again"]
    assert (copy["root"], copy["parent"], copy["depth"]) == ("ada/resnet", "ada/resnet", 1)
    assert {repo for repo, row in models.items() if row["depth"] == 0} == models.keys() - {"ada/resnet-again"}
    rows = listed(generation)
    assert len(rows) == LOGITS
    assert [(row.logit, row.negated) for row in rows if row.repo == "bob/one-logit"] == [
        (0, False),
        (0, True),
    ]
    assert sum(row.negated for row in rows) == 1
    assert [row.logit for row in rows if row.repo == "ada/convnext-shards"] == [0, 2, 3]
    same, again = ([row[1:] for row in rows if row.repo == f"ada/resnet{end}"] for end in ("", "-again"))
    assert same == again, "what copies are searched by is stored once"


class Row(NamedTuple):
    """A logit of a model, and its row in the index."""

    repo: str
    logit: int
    negated: bool
    row: int


def listed(generation: Generation) -> list[Row]:
    """The logits of all models, those of copies too."""
    logits = generation.all_logits
    return [
        Row(model["repo"], int(logits.logit[row]), bool(logits.negated[row]), row)
        for model in generation.models_table(["repo", "first_row", "rows"]).to_pylist()
        for row in range(model["first_row"], model["first_row"] + model["rows"])
    ]


def stored_directions(generation: Generation, rows: list[int], expected: np.ndarray) -> np.ndarray:
    """Directions as the index holds them: the expected ones, but for rounding."""
    directions = generation.basis.directions(generation.all_logits.coordinates[rows]).astype(np.float64)
    np.testing.assert_allclose(directions, expected, atol=2e-3)
    return directions


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
    again = run_full(indexed.job())
    assert again.published.pointer == indexed.run.published.pointer
    assert not again.published.is_new
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
    changing = ("manifest.json", "summary.json")
    kept = {name: value for name, value in before.items() if not name.endswith(changing)}
    assert kept.items() <= after.items(), "what was observed before is not touched"
    repos = set(opened(store).models_table(["repo"])["repo"].to_pylist())
    assert repos == set(MODELS) - {"cleo/timm-half"} | {"dan/newcomer"}
    assert run.published.is_new
    ledger = next(item for item in status(str(store)).ledgers if item.key == run.probed.key)
    assert (ledger.planned, ledger.left) == (len(MODELS), 0)


def test_a_background_of_the_hubs_own_names(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    job = indexed.job(store, background="hub", background_count=30)
    done = run_full(job)
    assert done.published.is_new
    background = opened(store).background
    declared = {"dog", "cat", "owl", "boat", "tree", "bread", "clock", "bridge", "tent"}
    assert declared < {*background}
    assert len(background) == len({*background}) == 30, "ImageNet's names where the hub declares too few"
    assert background == sorted(background)
    assert open_index(store).settings["background_source"] == "hub"
    assert open_index(store).search(text="dogs", k=3)
    assert not run_full(job).published.is_new, "nothing changed"


def test_another_prompt_or_background_publishes_without_probing(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store")
    first = indexed.run.published.pointer
    observations, encoders = contents(store / "observations"), written(store / "encoders")
    asked = len(indexed.hub.requests)
    prompted = run_full(indexed.job(store, prompt="{}"))
    assert prompted.published.is_new
    assert prompted.published.pointer.generation != first.generation
    assert [item["generation"] for item in prompted.published.pointer.previous] == [first.generation]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CONCEPTS[:9]))
    other = run_full(indexed.job(store, background=str(names)))
    assert other.published.is_new
    assert opened(store).background == CONCEPTS[:9]
    assert contents(store / "observations") == observations
    assert len(encoders) == 3
    assert written(store / "encoders") == encoders, "the encoder is not exported again"
    assert indexed.hub.requests[asked:] == []
    index = open_index(store)
    assert index.settings["background_concepts"] == 9
    back = roll_back(find_index(str(store)))
    assert back.generation == prompted.published.pointer.generation
    again = open_index(store)
    assert again.settings["prompts"] == ["{}"]
    assert again.search(text="dog", k=3)
    roll_back(find_index(str(store)))
    assert open_index(store).generation == first.generation
    roll_back(find_index(str(store)), first.generation, hold="the others are worse")
    job = indexed.job(store)
    assert not run_full(job).published.is_new, "the settings of the generation that is live again"
    assert "(the others are worse)" in job.report._stream.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(HeldError, match="the others are worse"):
        run_full(indexed.job(store, prompt="{}"))
    assert (
        f"held since {read_pointer(find_index(str(store)))[0].held['since']}: the others are worse"
        in "\n".join(  # type: ignore[index]
            status(str(store)).lines()
        )
    )


def test_evaluation_of_the_index(indexed: Indexed) -> None:
    from pipelines.evaluate import evaluate

    found = evaluate(str(indexed.store), indexed.world.truth)
    copies = [repo for repo, model in truth()["models"].items() if model["kind"] == "copy"]
    assert found.models == len(MODELS) - len(copies)
    assert found.logits == LOGITS - sum(MODELS[repo][0] for repo in copies)
    assert {method.name for method in found.methods} >= {
        "this index (matched heads)",
        "version 2, from its top probes",
    }
    for method in found.methods:
        assert 0 <= method.every.top1 <= method.every.top5 <= 1
    assert "chance" in "\n".join(found.lines())
    ours, by_ids, by_words = found.model_searches
    assert {way.queries for way in found.model_searches} == {found.methods[0].every.queries}
    assert (ours.answered, ours.found) == (1, 1), "the index ranks every model"
    assert by_ids.found == 0, "no repository is called by what it recognises"
    assert 0 < by_words.answered < 1, "some models declare a label that is asked for"


@pytest.fixture(scope="module")
def half(indexed: Indexed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store indexed with half of the probes, by the operator's stages one after the other."""
    store = tmp_path_factory.mktemp("half") / "store"
    file = indexed.world.config_file(store.parent / "half.toml", store, fraction=0.5, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", indexed.endpoint)
        for stage in ("crawl", "probe", "complete", "publish"):
            assert operator(stage, "--config", file).status == 0
    return store


@pytest.mark.acceptance
def test_the_stages_one_by_one_are_a_full_run(indexed: Indexed, half: Path) -> None:
    before = contents(half)
    asked = len(indexed.hub.requests)
    run = run_full(indexed.job(half, fraction=0.5))
    assert not run.published.is_new
    assert (run.published.models, run.published.logits) == (len(MODELS), LOGITS)
    assert indexed.hub.requests[asked:] == []
    assert contents(half) == before


@pytest.mark.acceptance
def test_half_of_the_probes_are_kept_as_they_were_observed(indexed: Indexed, half: Path) -> None:
    run = run_full(indexed.job(half, fraction=0.5))
    generation = opened(half)
    embeddings = generation.probe_embeddings.astype(np.float64)
    rows = {(row.repo, row.logit): row.row for row in listed(generation) if not row.negated}
    store, seen, subsets = Store(half), 0, set()
    for receipt in run.probed.receipts:
        for model, logits, values in observed_models(store, receipt):
            assert len(model.probes) == PROBES // 2
            # A copy was not run: it has what its original saw.
            own = (model.copy_of_repo or model.repo, model.copy_of_sha or model.sha)
            assert model.probes == subset(indexed.probe_set, *own, 0, 0.5, PROBES).tolist()
            subsets.add(tuple(model.probes))
            usable = values[[(model.repo, logit) in rows for logit in logits.tolist()]].astype(np.float64)
            directions = naive.model_directions(usable, model.head, embeddings, model.probes)
            place = [rows[model.repo, logit] for logit in logits.tolist() if (model.repo, logit) in rows]
            assert len(place) == len(logits) - (model.repo == "ada/convnext-shards")
            stored_directions(generation, place, directions)
            seen += len(place)
    assert seen == len(rows)
    assert len(subsets) == len(MODELS) - 1, "every model but the copy sees a subset of its own"


# Against the formulas


class Known(NamedTuple):
    """From nothing but the ledger: standardised logits (N, n) and directions (N, d), rounded, and whose they are."""

    z: np.ndarray
    directions: np.ndarray
    rows: list[tuple[str, int, bool]]
    places: list[int]  # rows of the index
    fitted: np.ndarray  # the directions before they were rounded


def known_logits(indexed: Indexed) -> Known:
    store, embeddings = Store(indexed.store), probe_embeddings(indexed)
    z: dict[tuple[str, int, bool], np.ndarray] = {}
    directions: dict[tuple[str, int, bool], np.ndarray] = {}
    for receipt in indexed.run.probed.receipts:
        for model, logits, observed in observed_models(store, receipt):
            assert model.probes == list(range(PROBES))
            assert logits.tolist() == list(range(model.logits))
            varied = [i for i, row in enumerate(observed) if np.ptp(row) > 0]
            for sign in (1, -1):
                values = sign * observed[varied].astype(np.float64)
                for i, row, w in zip(
                    varied, values, naive.model_directions(values, model.head, embeddings), strict=True
                ):
                    z[model.repo, i, sign < 0] = standardised(row[None])[0]
                    directions[model.repo, i, sign < 0] = w
    generation = opened(indexed.store)
    every = listed(generation)
    rows = [(row.repo, row.logit, row.negated) for row in every]
    places = [row.row for row in every]
    fitted = np.stack([directions[row] for row in rows])
    rounded = stored_directions(generation, places, fitted)
    return Known(np.stack([z[row] for row in rows]), rounded, rows, places, fitted)


def probe_embeddings(indexed: Indexed) -> np.ndarray:
    encoder = load_encoder(str(indexed.world.encoder), "cpu")
    return (
        ProbeSet.open(Store(indexed.store), indexed.probe_set).embeddings(encoder.digest).astype(np.float64)
    )


def text_vectors(indexed: Indexed, names: list[str]) -> np.ndarray:
    """By the torch encoder itself."""
    encoder = load_encoder(str(indexed.world.encoder), "cpu")
    return encoder.embed_texts([PROMPT.replace("{}", name) for name in names]).astype(np.float64)


def naive_scores(indexed: Indexed, known: Known, queries: list[str]) -> np.ndarray:
    """Matched heads, loop by loop: (C, N), higher is better."""
    embeddings, background = probe_embeddings(indexed), text_vectors(indexed, CONCEPTS)
    named = naive.background_directions(embeddings, background)
    b = naive.sharpness(known.fitted, named)
    distinct = np.unique(known.places, return_index=True)[1]  # copies share a row
    repos = [repo for repo, _, _ in known.rows]
    owners = [repos.index(repos[row]) for row in distinct]
    scores = np.empty((len(queries), len(known.z)))
    for i, (query, vector) in enumerate(zip(queries, text_vectors(indexed, queries), strict=True)):
        own = [j for j, name in enumerate(CONCEPTS) if name.lower() == query.lower()]
        name = naive.text_direction(vector, embeddings, background, own)
        direction = naive.with_feedback(name, known.directions[distinct], owners, named, b, own)
        scores[i] = [naive.score(w, direction, named, b, own) for w in known.directions]
    return scores


def test_scores_are_the_formulas(indexed: Indexed) -> None:
    known = known_logits(indexed)
    expected = naive_scores(indexed, known, QUERIES)
    index = open_index(indexed.store)
    found = index.scores(QUERIES)[:, known.places]
    assert np.ptp(expected) > 0.5, "a comparison of equal numbers would prove nothing"
    np.testing.assert_allclose(found, expected, atol=2e-3)
    for query in QUERIES:
        # Answers of equal weights are folded into one, the first of the index.
        ranked: list[tuple[str, int, bool]] = []
        for row in np.argsort(-np.round(found[QUERIES.index(query)], 9), kind="stable"):
            repo, logit, negated = known.rows[row]
            if (repo.removesuffix("-again"), logit, negated) not in ranked:
                ranked.append((repo.removesuffix("-again"), logit, negated))
        hits = index.search(text=query, k=LOGITS)
        assert [(hit.repo.removesuffix("-again"), hit.logit, hit.negated) for hit in hits] == ranked
        assert [hit.rank for hit in hits] == list(range(1, len(ranked) + 1))
        assert {hit.duplicates for hit in hits if hit.repo.startswith("ada/resnet")} == {1}


def test_a_query_is_left_out_of_its_own_background(indexed: Indexed) -> None:
    known = known_logits(indexed)
    name = opened(indexed.store).background[0]
    # With a blank behind it, it is no name of the background, but the same words to the encoder.
    with_itself, without = (naive_scores(indexed, known, [query]) for query in (name + " ", name))
    assert np.abs(without - with_itself).max() > 1e-2
    index = open_index(indexed.store)
    for spelling in (name, name.upper(), f" {name} "):
        np.testing.assert_allclose(index.scores([spelling])[:, known.places], without, atol=2e-3)


def test_completion_changes_nothing_where_everything_was_observed(indexed: Indexed) -> None:
    store, r = Store(indexed.store), indexed.job().config.top_r
    known = known_logits(indexed)
    place = {row: i for i, row in enumerate(known.rows)}
    completed: CompletionRecord = indexed.run.completed
    seen = 0
    for part in completed.parts.values():
        for row in read_part(store, part, DESCRIPTORS).to_pylist():
            z = known.z[place[row["repo"], row["logit"], False]]
            order = np.argsort(-z, kind="stable")[:r]
            assert row["top_probes"] == order.tolist()
            np.testing.assert_allclose(row["top_values"], z[order], rtol=1e-3)
            if row["repo"] == "bob/one-logit":
                np.testing.assert_allclose(row["bottom_values"], np.sort(z)[:r], rtol=1e-3)
            else:
                assert row["bottom_values"] is None
            assert row["observed"] == PROBES
            seen += 1
    assert seen == completed.logits == LOGITS - 1


def test_logit_queries_are_asked_with_directions(indexed: Indexed) -> None:
    known = known_logits(indexed)
    named = naive.background_directions(probe_embeddings(indexed), text_vectors(indexed, CONCEPTS))
    b = naive.sharpness(known.fitted, named)
    index = open_index(indexed.store)
    place = {row: i for i, row in enumerate(known.rows)}
    for repo, logit in [("bob/many-labels", 3), ("cleo/timm-half", 0), ("bob/one-logit", 0)]:
        query = known.directions[place[repo, logit, False]]
        hits = index.search(like=f"{repo}#{logit}", k=LOGITS)
        assert len(hits) > 10
        assert (repo, logit, False) not in {(hit.repo, hit.logit, hit.negated) for hit in hits}
        for hit in hits:
            w = known.directions[place[hit.repo, hit.logit, hit.negated]]
            assert hit.score == pytest.approx(naive.score(w, query, named, b), abs=2e-3)
            assert hit.distance == pytest.approx(1 - w @ query, abs=1e-3)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_the_opposite_of_one_logit(indexed: Indexed) -> None:
    known = known_logits(indexed)
    place = {row: i for i, row in enumerate(known.rows)}
    generation = opened(indexed.store)
    plain, opposite = (place["bob/one-logit", 0, negated] for negated in (False, True))
    np.testing.assert_array_equal(known.z[plain], -known.z[opposite])
    fires = generation.all_logits.probes.tolist()
    shown = [fires[known.places[row]] for row in (plain, opposite)]
    assert shown[0] == np.argsort(-known.z[plain], kind="stable")[:8].tolist()
    assert not set(shown[0]) & set(shown[1])


def test_fewer_entries_than_an_index_shows_are_refused_before_anything_is_probed(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    requests = len(indexed.hub.requests)
    with pytest.raises(UsageError, match="top_r = 7; an index shows 8 probes"):
        run_full(indexed.job(tmp_path / "store", top_r=7))
    assert len(indexed.hub.requests) == requests + 1, "one page, to see whether the Hub answers"
