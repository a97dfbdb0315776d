"""A generation as it is read: what is asked for comes in the order in which it was asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from probelog.errors import QueryError, StoreError
from probelog.index import basis as basis_module
from probelog.index.arrow import fixed_binary, fixed_lists, matrix_of, structured
from probelog.index.contents.logits import Logits
from probelog.index.contents.opened import Once
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.index.schema import MODEL_FACTS, probes_schema
from probelog.index.tables import Tables, first_line, is_valid_sql_text, sql_in, sql_literal
from probelog.publication import rows as rows_module
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.rows import LogitBatch, RowEncoder, write_tables
from probelog.publication.update import Changes, write_update
from probelog.ranking.confidence import ColumnStatistics, background_scores
from probelog.ranking.matched_heads import Background
from probelog.storage.encoding import npy
from probelog.storage.store import Store
from tests.support.worlds.small_index import some_settings

DIMENSION, PROBES, SHARPNESS = 6, 4, 5.0
NAMES = ["cat", "dog", "tree"]
# Repository, logits, weights.
BASE = [("ada/one", 2, "a"), ("bob/two", 1, "b"), ("ada/copy", 2, "a"), ("cy/three", 3, "c"), ("dan/four", 1, "d")]  # fmt: skip


def unit(seed: int, count: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def facts(models: Sequence[tuple[str, int, str]]) -> pa.Table:
    rows = [
        {
            "repo": repo, "sha": f"sha of {repo}", "logits": logits, "weight_digest": weights,
            "licence": "mit" if logits == 1 else "other", "downloads": logits, "labels": [repo] * logits,
            "library": "timm", "architecture": "resnet18", "head": "softmax", "observed": 4,
        }
        for repo, logits, weights in models
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, MODEL_FACTS).drop_columns(["copies"])


def batches(models: Sequence[tuple[str, int, str]]) -> list[LogitBatch]:
    return [
        LogitBatch(
            np.full(logits, number),
            np.arange(logits),
            np.zeros(logits, bool),
            unit(sum(weights.encode()), logits),
            np.argsort(np.random.default_rng(number).random((logits, PROBES)), axis=1),
        )
        for number, (_, logits, weights) in enumerate(models)
    ]


def whole(index: Store, models: Sequence[tuple[str, int, str]] = BASE, exact: int = 1000) -> Generation:
    writer = GenerationWriter(index, "base")
    background = Background(unit(1, len(NAMES)), SHARPNESS)
    written = write_tables(
        writer, batches(models), facts(models), RowEncoder.fit(unit(2, 30), background, PROBES), exact
    )
    thumbnails = pa.array([b"x"] * PROBES, pa.binary())
    # Not in the order of their numbers.
    numbers = np.array([2, 0, 3, 1], np.int32)
    probes = pa.table(
        {
            "id": numbers, "name": [f"{number}.png" for number in numbers], "sha256": ["0"] * PROBES,
            "thumbnail": thumbnails, "embedding": fixed_lists(unit(3, PROBES)[numbers], pa.float32()),
        },
        probes_schema(DIMENSION),
    )  # fmt: skip
    writer.write("probes", probes_schema(DIMENSION), [probes])
    settings = some_settings(
        models=len(models), logits=written.logits, sharpness=SHARPNESS, **written.settings
    )
    means = np.zeros(len(NAMES))
    meta = {
        "settings": settings.to_bytes(), "background": json.dumps(NAMES).encode(),
        "background_vectors.npy": npy(unit(1, len(NAMES))),
        "background_statistics.npy": npy(np.stack([means, means + 1])), **written.meta,
    }  # fmt: skip
    writer.write_meta(meta)
    writer.finish()
    return Generation(index, Pointer("base", "s", "p"))


ADDED = [("eva/five", 2, "e"), ("ada/again", 2, "a"), ("fay/six", 1, "f")]


def update(index: Store, base: Generation, gone: Sequence[int], models: Sequence[tuple[str, int, str]] = ADDED) -> Generation:  # fmt: skip
    writer = GenerationWriter(index, "update")
    changes = Changes(facts(models), [weights for _, _, weights in models], np.array(gone, np.int64))
    written = write_update(writer, base, changes, batches(models))
    settings = replace(base.settings, **written.settings, logits=written.logits)
    writer.write_meta({"settings": settings.to_bytes(), **written.meta})
    writer.finish()
    return Generation(index, Pointer("update", "s", "p", base="base"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    return whole(Store(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    """``bob/two`` is gone, and ``ada/one``, whose copies take its place."""
    index = Store(tmp_path_factory.mktemp("updated"))
    return update(index, whole(index), [0, 1])


def test_an_encoder_of_more_dimensions_than_an_index_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its least informative coordinates are left out; embeddings of probes keep all."""
    monkeypatch.setattr(basis_module, "BYTES", basis_module.PRECISE + basis_module._SCALE_BYTES + 4)
    generation = whole(Store(tmp_path))
    assert generation.basis.axes.shape == (4, DIMENSION)
    np.testing.assert_array_equal(generation.probe_embeddings, unit(3, PROBES))


@pytest.mark.parametrize(("name", "value"), [("logit", -1), ("weights", -1), ("probes", PROBES)])
def test_values_that_no_logit_has_are_damage(base: Generation, name: str, value: int) -> None:
    facts = np.zeros(2, base._facts)
    assert base._logits(facts).logit.tolist() == [0, 0]
    facts[name][1] = value
    with pytest.raises(StoreError, match="a value is not one that a logit has"):
        base._logits(facts)


# In the order asked


@pytest.mark.parametrize("numbers", [[3, 0, 2], [4, 3, 2, 1, 0], [1, 1, 0, 1], [2], []])
def test_models_come_in_the_order_of_the_numbers(base: Generation, numbers: list[int]) -> None:
    found = base.take_models(numbers, ["repo", "rows"])
    assert found["id"].to_pylist() == numbers
    assert found["repo"].to_pylist() == [BASE[number][0] for number in numbers]
    assert found["rows"].to_pylist() == [BASE[number][1] for number in numbers]


def test_models_of_an_update_come_in_the_order_of_the_numbers(updated: Generation) -> None:
    found = updated.take_models([7, 3, 5, 4, 5], ["repo", "copies"])
    assert found["repo"].to_pylist() == ["fay/six", "cy/three", "eva/five", "dan/four", "eva/five"]
    assert found["copies"].to_pylist() == [1, 1, 1, 1, 1]
    with pytest.raises(StoreError, match="has gaps"):
        updated.take_models([3, 99], ["repo"])


@pytest.mark.parametrize("exact", [1000, 1])
@pytest.mark.parametrize("rows", [[5, 0, 3], [6, 5, 4, 3, 2, 1, 0], [2, 2, 1]])
def test_logits_come_in_the_order_of_the_rows(tmp_path: Path, exact: int, rows: list[int]) -> None:
    models = [*BASE, ("x/many", 300, "x")] if exact == 1 else BASE
    generation = whole(Store(tmp_path), models, exact)
    assert generation.large == (exact == 1)
    found = generation.logits(np.array(rows))
    assert found.rows.tolist() == rows
    owner = [0, 0, 1, 3, 3, 3, 4]
    assert found.weights.tolist() == [owner[row] for row in rows]
    place = [0, 1, 0, 0, 1, 2, 0]
    assert found.logit.tolist() == [place[row] for row in rows]
    expected = np.concatenate([batch.directions for batch in batches(BASE) if batch.model[0] != 2])
    np.testing.assert_allclose(generation.basis.directions(found.coordinates), expected[rows], atol=0.01)
    pieces = list(generation.at(np.array(rows)))
    assert [piece.rows.tolist() for piece in pieces] == [rows]


@pytest.mark.parametrize("numbers", [[len(BASE)], [-1], [0, 10**6]])
def test_models_that_are_not_there_are_gaps(base: Generation, numbers: list[int]) -> None:
    with pytest.raises(StoreError, match="the models table of generation base has gaps"):
        base.take_models(numbers, ["repo"])


def test_rows_that_are_not_there_are_gaps(base: Generation) -> None:
    for rows in ([7], [0, 99]):
        with pytest.raises(StoreError, match="the logits table of generation base has gaps"):
            base.logits(np.array(rows))
    assert len(base.logits(np.empty(0, np.int64))) == 0
    assert [len(piece) for piece in base.at(np.empty(0, np.int64))] == [0], "one piece at the least"


def test_probes_come_in_the_order_of_their_numbers(base: Generation) -> None:
    np.testing.assert_array_equal(base.probe_embeddings, unit(3, PROBES))
    assert base.probes(["name"], "id = 3")["name"].to_pylist() == ["3.png"]


def test_all_models_by_number(base: Generation, updated: Generation) -> None:
    assert base.models_table(["repo"])["repo"].to_pylist() == [repo for repo, _, _ in BASE]
    assert base.models_table(["repo"], "licence = 'mit'")["repo"].to_pylist() == ["bob/two", "dan/four"]
    assert base.models_table(["repo"], limit=2).num_rows == 2
    found = updated.models_table(["repo", "copies", "first_row", "rows", "weights"]).to_pylist()
    by_repo = {row["repo"]: (row["id"], row["weights"], row["first_row"], row["rows"], row["copies"]) for row in found}  # fmt: skip
    assert by_repo == {
        "ada/copy": (0, 0, 0, 2, 2),
        "ada/again": (6, 0, 0, 2, 2),
        "cy/three": (3, 3, 3, 3, 1),
        "dan/four": (4, 4, 6, 1, 1),
        "eva/five": (5, 5, 7, 2, 1),
        "fay/six": (7, 7, 9, 1, 1),
    }
    assert [row["id"] for row in found] == sorted(row["id"] for row in found)
    assert updated.models_table(["repo"], limit=3)["id"].to_pylist() == [0, 3, 4]


def test_models_by_name(base: Generation, updated: Generation) -> None:
    found = base.models_named("repo", ["dan/four", "ada/one", "none", "ada/one"], ["repo"])
    assert [row["repo"] for row in found] == ["ada/one", "dan/four"]
    assert base.models_named("repo", [], ["repo"]) == []
    many = base.models_named("repo", [*(f"no/{n}" for n in range(600)), "bob/two"], ["repo"])
    assert [row["repo"] for row in many] == ["bob/two"]
    assert updated.models_named("identity", ["a", "f", "b"], ["repo"]) == [
        {"id": 0, "repo": "ada/copy"}, {"id": 6, "repo": "ada/again"}, {"id": 7, "repo": "fay/six"},
    ]  # fmt: skip


def test_counts_of_models(base: Generation, updated: Generation) -> None:
    assert (base.count_models("true"), base.count_models("licence = 'mit'")) == (5, 2)
    assert (updated.count_models("true"), updated.count_models("licence = 'mit'")) == (6, 2)
    assert updated.count_models("repo = 'bob/two' OR repo = 'ada/one'") == 0
    found = updated.models("downloads >= 2", ["downloads"], among=[0, 7])
    assert (found["id"].tolist(), found["downloads"].tolist()) == ([0, 6], [2, 2])
    assert updated.models("true", ["rows"], limit=2)["id"].tolist() == [0, 3]
    for wrong in ("lice = 'mit'", "true true", "'"):
        with pytest.raises(QueryError, match="is not understood"):
            updated.count_models(wrong)
        with pytest.raises(QueryError, match="is not understood"):
            base.models(wrong, ["rows"])


def test_the_logits_of_an_update(updated: Generation) -> None:
    assert updated.is_update
    assert updated.size == 10
    (block,) = updated.blocks()
    assert block.rows.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9], "those of bob/two belong to nobody"
    assert updated.recent.rows.tolist() == [7, 8, 9]
    assert updated.recent.weights.tolist() == [5, 5, 7]
    assert updated.logits(np.array([8, 1, 6])).rows.tolist() == [8, 1, 6]
    with pytest.raises(StoreError, match="has gaps"):
        updated.logits(np.array([2]))
    assert updated.meta("background") == json.dumps(NAMES).encode(), "of its base"
    with pytest.raises(StoreError, match="generation update has no 'unheard-of'"):
        updated.meta("unheard-of")


def test_every_group_of_copies_has_an_heir(tmp_path: Path) -> None:
    index = Store(tmp_path)
    models = [(f"{owner}/{weights}", 2, weights) for owner in ("one", "two", "three") for weights in "abc"]
    left = update(index, whole(index, models), [0, 1, 2, 4], ADDED[:1])
    found = left.models_table(["repo", "weights", "copies", "first_row"]).to_pylist()
    assert [(row["id"], row["repo"], row["weights"], row["copies"], row["first_row"]) for row in found] == [
        (0, "two/a", 0, 2, 0),
        (1, "three/b", 1, 1, 2),
        (2, "two/c", 2, 2, 4),
        (6, "three/a", 0, 2, 0),
        (8, "three/c", 2, 2, 4),
        (9, "eva/five", 9, 1, 6),
    ]
    assert left.take_models([8, 9, 1, 6], ["copies"])["copies"].to_pylist() == [2, 1, 1, 2]


def test_weights_that_come_back_with_two_models_are_numbered_once(tmp_path: Path) -> None:
    """The first takes the number that was left vacant, the second gets one of its own."""
    index = Store(tmp_path)
    back = update(index, whole(index), [1], [("new/x", 1, "b"), ("new/y", 1, "b")])
    found = back.models_named("repo", ["new/x", "new/y"], ["repo", "weights", "first_row", "copies"])
    assert [(row["repo"], row["weights"], row["first_row"], row["copies"]) for row in found] == [
        ("new/x", 1, 2, 2),
        ("new/y", 1, 2, 2),
    ]
    assert [row["id"] for row in found] == [1, 5]
    assert back.size == back.settings.logits - 2 - 1 == 7, "shared rows are written once"


def test_an_update_of_a_large_generation(tmp_path: Path) -> None:
    index = Store(tmp_path)
    models = [*BASE, ("x/many", 300, "x")]
    generation = update(index, whole(index, models, exact=1), [1, 3])
    assert generation.large
    rows = [row for block in generation.blocks() for row in block.rows.tolist()]
    assert rows == [0, 1, *range(6, 310)]
    asked = np.array([309, 0, 308, 306, 1, 307])
    assert generation.logits(asked).rows.tolist() == asked.tolist()
    assert generation.logits(np.array([309, 307])).rows.tolist() == [309, 307], "of the update alone"
    assert len(generation.logits(np.empty(0, np.int64))) == 0
    listed = generation.shortlisted(generation.basis.coordinates(unit(4, 1))[0], 400)
    near = [row for piece in listed for row in piece.rows.tolist()]
    assert near == sorted(near)
    assert set(near) <= {0, 1, *range(6, 307)}
    sample = generation.sample
    assert not set(sample.weights.tolist()) & {1, 3}
    assert len(sample) == 303 + 3, "all of a base that is smaller than a sample, and of the update"


def test_of_an_update_the_same_share_is_sampled_as_of_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_GALLERY_SAMPLE", 60)
    index = Store(tmp_path)
    base = whole(index, [*BASE, ("x/many", 300, "x")], exact=1)
    assert len(base.sample) == 60
    updated = update(index, base, [], [("y/many", 400, "y")])
    added = int((updated.sample.rows >= base.size).sum())
    assert len(updated.sample) - added == 60
    assert 50 < added < 110, "a fifth of them, about"


def test_an_update_of_an_update_is_refused(tmp_path: Path) -> None:
    index = Store(tmp_path)
    changed = update(index, whole(index), [], ADDED[:1])
    with pytest.raises(ValueError, match="is an update itself"):
        write_update(GenerationWriter(index, "x"), changed, Changes(facts([]), [], np.array([], int)), [])


def test_the_row_of_a_repository_or_similar_names(base: Generation, updated: Generation) -> None:
    row = base.model("cy/three")
    assert (row["id"], row["logits"], row["sha"]) == (3, 3, "sha of cy/three")
    with pytest.raises(QueryError, match=r"does not hold 'cy/thre'; did you mean cy/three\?"):
        base.model("cy/thre")
    with pytest.raises(QueryError, match=r"did you mean cy/three\?"):
        base.model("THREE")
    with pytest.raises(QueryError, match=r"does not hold 'zzzzzzzz'$"):
        base.model("zzzzzzzz")
    for odd in ("x'y", "\x00", "\ud800"):
        with pytest.raises(QueryError, match="does not hold"):
            base.model(odd)
    with pytest.raises(QueryError, match="does not hold 'bob/two'"):
        updated.model("bob/two")


def test_names_of_logits_best_first(base: Generation) -> None:
    logits = base.all_logits
    names, scores = base.names(logits, 2)
    background = base.background_coordinates
    every = background_scores(logits.coordinates, background, logits.offsets, SHARPNESS)
    for place, row in enumerate(every):
        best = np.argsort(-row)[:2]
        assert names[place] == [NAMES[number] for number in best]
        np.testing.assert_allclose(scores[place], row[best], atol=1e-5)
    assert base.names(logits[:0], 2) == ([], [])


def test_names_are_ordered_by_how_unusual_their_scores_are(base: Generation) -> None:
    """A name that scores high for every logit says little."""
    generation = Generation(base.index, base.pointer)
    logits, background = generation.all_logits, generation.background_coordinates
    every = background_scores(logits.coordinates, background, logits.offsets, SHARPNESS)
    statistics = ColumnStatistics(every.mean(axis=0) + np.array([3.0, 0.0, -3.0]), np.array([1.0, 2.0, 0.5]))
    vars(generation)["statistics"] = statistics
    names, scores = generation.names(logits, 3)
    for place, row in enumerate(every):
        order = np.argsort(-(row - statistics.means) / statistics.stds)
        assert names[place] == [NAMES[number] for number in order]
        np.testing.assert_allclose(scores[place], row[order], atol=1e-5)


def test_logits_joined_and_taken(base: Generation) -> None:
    logits = base.all_logits
    joined = Logits.joined([logits[3:], logits[:3]])
    assert joined.rows.tolist() == [3, 4, 5, 6, 0, 1, 2]
    assert len(joined) == 7
    assert Logits.joined([logits]) is logits


def test_a_generation_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be read \(settings\): there is no such folder"):
        Generation(Store(tmp_path), Pointer("none", "s", "p"))
    assert list(tmp_path.iterdir()) == []


def test_only_of_buckets_it_is_said_how_they_are_read_without_credentials(tmp_path: Path) -> None:
    (tmp_path / "generations" / "base").mkdir(parents=True)
    with (
        pytest.raises(StoreError, match=r"generation base cannot be read \(models\): no credentials$"),
        Tables(Store(tmp_path), "base").reading("models"),
    ):
        raise OSError("no credentials")


def test_an_index_without_an_image_encoder_says_why(base: Generation) -> None:
    for missing, said in ((None, "its image encoder was not published"), ("too odd", "too odd")):
        generation = Generation(base.index, base.pointer)
        generation.settings = replace(generation.settings, image_encoder=None, image_encoder_missing=missing)
        with pytest.raises(QueryError, match=f"^this index cannot be searched by image: {said}$"):
            _ = generation.image_encoder


def test_models_whose_logits_the_index_does_not_have(base: Generation) -> None:
    """The last one's are the last row: of an index of one row fewer they end behind it."""
    generation = Generation(base.index, base.pointer)
    names = ["first_row", "rows"]
    assert generation.models_table(names).num_rows == 5
    generation.settings = replace(generation.settings, rows=generation.size - 1)
    with pytest.raises(StoreError, match="a model has logits that the index does not have"):
        generation.models_table(names)


def test_made_once_and_kept(base: Generation) -> None:
    assert base.all_logits is base.all_logits
    assert base.background is base.background == NAMES
    assert base.confidence is base.settings.confidence


def test_made_once_though_two_threads_ask_at_the_same_time() -> None:
    made: list[int] = []

    class Asked:
        _lock = threading.RLock()

        @Once
        def value(self) -> int:
            made.append(len(made))
            if second.ident is None:
                second.start()
                second.join(0.2)
            return made[-1]

    asked: Any = Asked()
    second = threading.Thread(target=lambda: asked.value)
    assert asked.value == 0
    second.join()
    assert made == [0]


# SQL and columns


def test_sql_literals() -> None:
    assert sql_literal("it's") == "'it''s'"
    assert sql_in("id", [3, 1]) == "id IN (3, 1)"
    assert sql_in("repo", ["a", "b'c"]) == "repo IN ('a', 'b''c')"
    assert sql_in("id", []) == "false"
    assert [is_valid_sql_text(text) for text in ("a/b", "é", "\x00", "\ud800")] == [True, True, False, False]


def test_messages_of_lance_without_their_noise() -> None:
    noise = "lance error: Invalid input, no field x, /root/.cargo/src/lance/a.rs:12:3\nand more"
    assert first_line(ValueError(noise)) == "no field x"
    assert first_line(ValueError("")) == "ValueError('')"
    assert len(first_line(ValueError("y" * 999))) == 300


def test_structured_values_travel_in_columns() -> None:
    kind: Any = np.dtype([("a", "<i4"), ("b", "<f4")])
    values = np.array([(1, 0.5), (2, 1.5), (3, 2.5)], kind)
    column = pa.chunked_array([fixed_binary(values), fixed_binary(values)[:0], fixed_binary(values)[1:]])
    assert structured(column, kind).tolist() == [*values.tolist(), *values[1:].tolist()]
    assert structured(column.slice(2, 1), kind).tolist() == values[2:].tolist()
    assert len(structured(column.slice(0, 0), kind)) == 0
    with pytest.raises(ValueError, match="instead of 4 bytes"):
        structured(column, np.dtype([("a", "<i4")]))
    column = pa.chunked_array([fixed_lists(np.eye(2), pa.float16())])
    assert matrix_of(column).dtype == np.float16
