"""What the checks notice in a generation: small indexes written right, and written wrong in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.complete.descriptors import Descriptors, DescriptorSummary, ModelDescriptors
from pipelines.publish.answers import ASKED_LOGITS
from pipelines.publish.checks import check_generation, check_update
from pipelines.publish.expected import Expected, ExpectedTrees, ExpectedUpdate
from probelog.errors import StoreError
from probelog.index.arrow import fixed_lists
from probelog.index.generation import Generation
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch
from probelog.ranking.confidence import ColumnStatistics
from probelog.ranking.names import name_vectors
from probelog.search.client import Index
from probelog.storage.schemas import TREE_FACTS, ProbedModel, TreeFacts
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.probelog.publication.test_update import written_update
from tests.support.worlds.small_index import PROMPT, Model, SmallIndex, build


def written(folder: Path, tamper: Callable[[LogitBatch], LogitBatch] = lambda batch: batch) -> SmallIndex:
    return build(Store(folder), kind="clip", images=False, live=False, tamper=tamper)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return written(tmp_path_factory.mktemp("sound"))


def opened(index: SmallIndex) -> Generation:
    return Generation(index.store, index.pointer)


def expected(index: SmallIndex) -> Expected:
    """What a small index was made of."""

    def embed(names: Any) -> Any:
        return name_vectors(index.encoder.embed, [PROMPT], names)

    descriptors = SmallDescriptors(index)
    written = DescriptorSummary(len(descriptors.models), ASKED_LOGITS)
    for _ in written.of(descriptors.stream()):
        pass
    return Expected(
        descriptors,
        written,
        0,
        0,
        index.embeddings,
        index.background,
        index.background_vectors,
        embed,
        [PROMPT],
    )


class SmallDescriptors(Descriptors):
    """Those of a small index, which has no ledger."""

    def __init__(self, index: SmallIndex) -> None:
        self.models = [probed(model) for model in index.models]
        self._batch = index.batch

    def stream(self) -> Iterator[ModelDescriptors]:
        for number, model in enumerate(self.models):
            own = self._batch.at(self._batch.model == number)
            if len(own.model):
                yield ModelDescriptors(model, number, *own[1:])


def probed(model: Model) -> ProbedModel:
    return ProbedModel(
        model.repo, model.sha, model.logits, model.head, list(model.labels), [], "timm", "resnet18", 1, "{}",
        "float32", "cpu", str(model.digest), 0.0, 1.0,
    )  # fmt: skip


def test_a_correct_generation_passes(sound: SmallIndex) -> None:
    check_generation(opened(sound), expected(sound))


def test_a_generation_with_few_names_passes(tmp_path: Path) -> None:
    """Fewer than are asked for."""
    index = build(Store(tmp_path), kind="clip", images=False, live=False, names=["cat", "chair"])
    check_generation(opened(index), expected(index))


def first_is(value: float) -> Callable[[LogitBatch], LogitBatch]:
    def change(batch: LogitBatch) -> LogitBatch:
        directions = batch.directions.copy()
        directions[0, 0] = value
        return batch._replace(directions=directions)

    return change


def without_the_first(batch: LogitBatch) -> LogitBatch:
    return batch.at(np.arange(1, len(batch.model)))


def opposite(batch: LogitBatch) -> LogitBatch:
    return batch._replace(directions=-batch.directions)


def shifted(batch: LogitBatch) -> LogitBatch:
    return batch._replace(directions=np.roll(batch.directions, 1, axis=0))


def evidence_is(value: float) -> Callable[[LogitBatch], LogitBatch]:
    def change(batch: LogitBatch) -> LogitBatch:
        assert batch.evidence is not None
        evidence = batch.evidence.copy()
        evidence["weakest_values"][0, 0] = value
        return batch._replace(evidence=evidence)

    return change


def without_evidence(batch: LogitBatch) -> LogitBatch:
    return batch._replace(evidence=None)


FAULTS = {
    "NaN": (first_is(np.nan), "values of offset of its logits are not finite"),
    "infinity": (first_is(np.inf), "values of direction of its logits are not finite"),
    "a logit is missing": (without_the_first, "models have other logits than their descriptors"),
    "opposite directions": (opposite, "a wrong score"),
    "directions of other logits": (shifted, "a wrong score"),
    "evidence that is none": (evidence_is(np.nan), "its evidence is none"),
    "no evidence": (without_evidence, "whether the shown probes were seen by the models"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_generation_that_is_wrong_is_refused(fault: str, tmp_path: Path) -> None:
    tamper, message = FAULTS[fault]
    index = written(tmp_path, tamper)
    with pytest.raises(StoreError, match="generation first was not published: ") as error:
        check_generation(opened(index), expected(index))
    assert message in str(error.value)


def test_a_model_of_constant_logits_alone_is_held_without_logits(tmp_path: Path) -> None:
    def without_one(batch: LogitBatch) -> LogitBatch:
        return batch.at(batch.model != 4)

    index = written(tmp_path, without_one)
    made_of = expected(replace(index, batch=without_one(index.batch)))
    check_generation(opened(index), replace(made_of, missing=9, dropped=9))


def test_descriptors_that_lack_logits(sound: SmallIndex) -> None:
    """The receipts counted one more than was dropped for being constant."""
    with pytest.raises(
        StoreError, match="its descriptors lack 2 logits of the receipts' models, but 1 were dropped"
    ):
        check_generation(opened(sound), replace(expected(sound), missing=2, dropped=1))


def test_models_of_another_catalogue(sound: SmallIndex) -> None:
    made_of = expected(sound)
    fewer = SmallDescriptors(sound)
    fewer.models = fewer.models[:-1]
    with pytest.raises(StoreError, match="its 8 models are not the 7 of the receipts and the catalogue"):
        check_generation(opened(sound), replace(made_of, descriptors=fewer))


def test_another_encoder(sound: SmallIndex) -> None:
    """The original one gives other vectors than the one that travels with the index."""
    made_of = expected(sound)

    def embed(names: Any) -> Any:
        return np.roll(made_of.embed(names), 1, axis=1)

    with pytest.raises(StoreError, match=r"its encoder answers .* differently from the one it was made with"):
        check_generation(opened(sound), replace(made_of, embed=embed))


def test_answers_that_lose_recall(sound: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives every second of the right answers."""
    real = Index.search

    def search(self: Any, *given: Any, **named: Any) -> Any:
        return list(real(self, *given, **named))[::2]

    monkeypatch.setattr(Index, "search", search)
    with pytest.raises(StoreError, match="its answers hold 50% of the exact first 10, less than 95%"):
        check_generation(opened(sound), expected(sound))


def test_a_logit_that_is_not_found(sound: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Index.search

    def search(self: Any, *given: Any, **named: Any) -> Any:
        return [hit for hit in real(self, *given, **named) if hit.distance > 1e-3]

    monkeypatch.setattr(Index, "search", search)
    with pytest.raises(StoreError, match=r"asked for the direction of .* it does not find that logit"):
        check_generation(opened(sound), expected(sound))


def test_statistics_that_are_not_finite(sound: SmallIndex, tmp_path: Path) -> None:
    means, stds = sound.statistics.means.copy(), sound.statistics.stds
    means[3] = np.nan
    like = replace(sound, statistics=ColumnStatistics(means, stds))
    index = build(Store(tmp_path), kind="clip", images=False, live=False, like=like)
    with pytest.raises(
        StoreError, match=r"its background_statistics.npy holds values that are not finite"
    ) as error:
        check_generation(opened(index), expected(index))
    assert "background_vectors" not in str(error.value)


def test_probes_whose_embeddings_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GenerationWriter.write

    def write(self: GenerationWriter, table: str, schema: pa.Schema, batches: Any) -> int:
        if table == "probes":
            (rows,) = batches
            values = np.stack(rows["embedding"].to_numpy())
            values[0, 1] = values[3, 0] = np.inf  # LanceDB itself refuses NaN
            values[2, 2] = -np.inf
            place = rows.column_names.index("embedding")
            batches = [rows.set_column(place, "embedding", fixed_lists(values, pa.float32()))]
        return real(self, table, schema, batches)

    monkeypatch.setattr(GenerationWriter, "write", write)
    index = written(tmp_path)
    with pytest.raises(StoreError, match="column embedding of its probes holds 3 values that are not finite"):
        check_generation(opened(index), expected(index))


@pytest.mark.parametrize("column", ["rows", "first_row"])
def test_models_that_name_other_rows_of_logits(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GenerationWriter.write

    def write(self: GenerationWriter, table: str, schema: pa.Schema, batches: Any) -> int:
        if table == "models":
            (rows,) = batches
            place = rows.column_names.index(column)
            values = [value + (number == 4) for number, value in enumerate(rows[column].to_pylist())]
            batches = [rows.set_column(place, column, pa.array(values, rows[column].type))]
        return real(self, table, schema, batches)

    monkeypatch.setattr(GenerationWriter, "write", write)
    index = written(tmp_path)
    repo = index.models[4].repo
    with pytest.raises(StoreError, match=f"1 models have other logits than their descriptors, {repo}"):
        check_generation(opened(index), expected(index))


def test_a_table_that_cannot_be_read_is_one_of_the_problems(tmp_path: Path) -> None:
    index = written(tmp_path)
    index.store.delete_folder("generations/first/logits.lance")
    with pytest.raises(StoreError, match=r"generation first was not published: .*cannot be read"):
        check_generation(opened(index), expected(index))


# Trees

LATENT = "latent:0123456789ab"
EDGES_OF_ALL_SORTS = (
    Edge("bert/pets-copy", "anna/pets", Relation.COPY, 0.9),
    Edge("carl/pets-copy", "anna/pets", Relation.COPY, 0.8),
    Edge("emil/things", LATENT, Relation.FINE_TUNED, 0.7, latent=True),
)


def with_edges(folder: Path, edges: Sequence[Edge]) -> tuple[Generation, Expected]:
    table = edge_table(edges)
    index = build(Store(folder), kind="clip", images=False, live=False, edges=table)
    rows = opened(index).models_table(["repo", *TREE_FACTS]).drop_columns(["id"]).to_pylist()
    places = {row.pop("repo"): TreeFacts(**row) for row in rows}
    return opened(index), replace(expected(index), trees=ExpectedTrees(len(edges), places))


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[Generation, Expected]:
    return with_edges(tmp_path_factory.mktemp("trees"), EDGES_OF_ALL_SORTS)


def test_sound_trees_pass(trees: tuple[Generation, Expected]) -> None:
    check_generation(*trees)


def test_trees_that_are_not_what_was_recovered(trees: tuple[Generation, Expected]) -> None:
    generation, sound = trees
    assert sound.trees is not None
    places = dict(sound.trees.places)

    def told(changed: ExpectedTrees | None) -> str:
        with pytest.raises(StoreError) as error:
            check_generation(generation, replace(sound, trees=changed))
        return str(error.value)

    assert "it has edges, but no trees were recovered" in told(None)
    assert "it holds 3 edges instead of 4" in told(ExpectedTrees(4, places))
    moved = places | {"dora/hot-dog": TreeFacts(root="anna/pets", parent="anna/pets", depth=1)}
    assert "1 models have another place in their trees than was found, dora/hot-dog for one" in told(
        ExpectedTrees(3, moved)
    )
    del places["bert/pets-copy"]
    told_of = told(ExpectedTrees(3, places))
    assert "edges of 1 models whose weights were not compared, bert/pets-copy for one" in told_of


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (
            [
                Edge("bert/pets-copy", "anna/pets", Relation.COPY, 0.9),
                Edge("anna/pets", "bert/pets-copy", Relation.COPY, 0.5),
            ],
            "is its own ancestor",
        ),
        ([Edge("bert/pets-copy", "anna/pets", Relation.COPY, 0.9, latent=True)], "whether 1 parents are there"),
        ([Edge("bert/pets-copy", "nobody/there", Relation.COPY, 0.9)], "whether 1 parents are there, nobody/there"),
        ([Edge("bert/pets-copy", "anna/pets", Relation.COPY, 7.0)], "its edges cannot be read: a probability"),
    ],
)  # fmt: skip
def test_trees_that_are_none(edges: list[Edge], message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=message):
        check_generation(*with_edges(tmp_path, edges))


# Updates

ADDED = (
    Model("new/one", ("a", "b", "c")),
    Model("new/copy", ("a", "b", "c"), weights="digest of new/one"),
    Model("new/known", ("cat", "dog", "Golden_Retriever", "3"), weights="digest of anna/pets"),
)
REMOVED = ["dora/hot-dog", "emil/things"]


@dataclass(frozen=True)
class Update:
    """An update of the sound index, and what it was made of."""

    generation: Generation
    expected: ExpectedUpdate


@pytest.fixture(scope="module")
def update(tmp_path_factory: pytest.TempPathFactory) -> Update:
    base = build(Store(tmp_path_factory.mktemp("updated")), kind="clip", images=False, live=False)
    return an_update(base)


def an_update(base: SmallIndex, tamper: Callable[[LogitBatch], LogitBatch] = lambda batch: batch) -> Update:
    generation = written_update(base, "update", REMOVED, ADDED, "clip", tamper)
    source = build(base.store, "described", ADDED, kind="clip", images=False, live=False, like=base)
    descriptors = SmallDescriptors(source)
    known = {"digest of anna/pets": 4}
    noted = DescriptorSummary(len(ADDED), ASKED_LOGITS, passed_over=known)
    for _ in noted.of(descriptors.stream()):
        pass
    whole = Generation(base.store, base.pointer)
    return Update(generation, ExpectedUpdate(whole, descriptors.models, noted, known, set(REMOVED)))


def test_a_sound_update_passes(update: Update) -> None:
    assert [logit.name for logit in update.expected.written.samples] == ["new/one#1"]
    check_update(update.generation, update.expected)


def refused(generation: Generation, expected: ExpectedUpdate) -> str:
    with pytest.raises(StoreError) as error:
        check_update(generation, expected)
    return str(error.value)


def test_an_update_that_lacks_models_or_logits(update: Update) -> None:
    made_of = update.expected
    written = DescriptorSummary(0, 0)
    written.logits = {0: 2, 1: 3}
    assert "new/one has 3 rows of logits instead of 2" in refused(update.generation, replace(made_of, written=written))  # fmt: skip
    told = refused(update.generation, replace(made_of, known={"digest of anna/pets": 5}))
    assert "new/known has 4 rows of logits instead of 5" in told
    more = [*made_of.models, probed(Model("new/missing", ("a",)))]
    told = refused(update.generation, replace(made_of, models=more))
    assert "new/missing has None rows of logits instead of 0" in told
    assert "it holds 3 of the repositories that were added, instead of 4" in told
    assert "it holds 9 models instead of 10" in told
    written.logits = {0: 3}
    fewer = replace(made_of, models=made_of.models[:2], written=written)
    assert refused(update.generation, fewer).endswith("not published: it holds 9 models instead of 8")


def test_an_update_that_holds_what_was_removed(update: Update) -> None:
    made_of = update.expected
    told = refused(update.generation, replace(made_of, removed={*REMOVED, "anna/pets"}))
    assert "it still holds models that were removed" in told
    assert "it holds 9 models instead of 8" in told
    # One that was removed and added again is held.
    again = replace(made_of, removed={*REMOVED, "new/one"})
    assert "still holds" not in refused(update.generation, again)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (opposite, "asked for the direction of new/one#1 it gives it the score"),
        (first_is(np.inf), "values of direction of its logits are not finite"),
        (evidence_is(-np.inf), "its evidence is none"),
        (without_evidence, "it does not say of 3 logits whether the shown probes were seen"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_update_that_is_wrong_is_refused(
    tamper: Callable[[LogitBatch], LogitBatch], message: str, tmp_path: Path
) -> None:
    base = build(Store(tmp_path), kind="clip", images=False, live=False)
    wrong = an_update(base, tamper)
    assert message in refused(wrong.generation, wrong.expected)


def test_a_logit_of_an_update_that_is_not_found(update: Update, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Index.search

    def search(self: Any, *given: Any, **named: Any) -> Any:
        return [hit for hit in real(self, *given, **named) if hit.distance > 1e-3]

    monkeypatch.setattr(Index, "search", search)
    assert "asked for the direction of new/one#1 it does not find that logit" in refused(
        update.generation, update.expected
    )
