"""A whole publish without a Hub and without Ray: what is written of what was probed and described."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.complete.record import CompletionRecord
from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.publish import stage
from pipelines.publish.encoder import ExportedEncoder
from pipelines.publish.release import PublishResult
from pipelines.publish.stage import ListingSnapshot, check_shown_probes, publish
from pipelines.quality.failures import FailureCounts
from probelog.completion.descriptors import describe
from probelog.errors import FailureReason, StoreError, UsageError
from probelog.index.arrow import matrix_of
from probelog.index.generation import Generation
from probelog.probes.probe_set import ProbeSet, make_probe_set
from probelog.ranking import matched_heads
from probelog.ranking.confidence import ColumnStatistics
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.names import name_vectors
from probelog.search.client import open_index
from probelog.storage.encoding import digest, from_npy
from probelog.storage.ledger import ItemResult, Ledger, Receipt, item_key, key_numbers, observed_models
from probelog.storage.observations import to_rows
from probelog.storage.parquet_parts import Part, part_bytes
from probelog.storage.schemas import DESCRIPTORS, CatalogueRow, Failure
from probelog.storage.store import Store
from tests.support.worlds import tiny_encoders
from tests.support.worlds.probed_models import probed_model
from tests.support.worlds.tiny_world import write_probes

PROBES, TOP_R = 40, 10
COLUMNS = np.random.default_rng(7).standard_normal((PROBES, 3)).astype(np.float32)
NAMES = ["cat", "dog", "tree", "violin", "chair"]
AT, FINISHED = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


class World:
    """A store with a probe set, a ledger and its descriptors."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        self.encoder = tiny_encoders.encoder("clip")
        write_probes(folder / "probes.parquet", PROBES)
        (folder / "names.txt").write_text("\n".join(NAMES))
        source = str(folder / "probes.parquet")
        self.probe_set: ProbeSet = make_probe_set(source, None, 0, self.store, self.encoder)
        self.ledger = Ledger(self.store, "observations/key")
        first = [
            self.probed("b/two", 3, labels=["cat", "dog", "owl"]),
            self.probed("a/one", 4, constant=1),
            self.failed("a/never"),
            self.failed("a/later"),
        ]
        second = [
            self.probed("c/copy", 3, weight_digest="of b/two"),
            self.probed("d/unlisted", 2),
            self.probed("a/later", 2, attempt=2),
            self.probed("e/binary", 1, head="single"),
        ]
        self.receipts = [self.ledger.seal(first), self.ledger.seal(second)]
        self.parts = {receipt.name: self.described(receipt) for receipt in self.receipts}
        self.completion = CompletionRecord("completion", 3, 0.1, 0.5, 0.75, 6, 14, 1, self.parts)
        self.listed = [CatalogueRow(f"{name}", "1", downloads=7) for name in ("e/binary", "a/one", "b/two")]
        self.listed += [CatalogueRow("a/later", "1"), CatalogueRow("c/copy", "1", licence="mit")]
        self.listed += [CatalogueRow("a/never", "1"), CatalogueRow("x/not-probed", "1")]

    def probed(
        self, repo: str, logits: int, attempt: int = 1, constant: int | None = None, **facts: Any
    ) -> str:
        random = np.random.default_rng([*str(facts.get("weight_digest", f"of {repo}")).encode()])
        values = (random.standard_normal((logits, 3)) @ COLUMNS.T).astype(np.float32)
        if constant is not None:
            values[constant] = 5.0
        given = {"sha": "1", "logits": logits, "labels": [], "probes": list(range(PROBES))}
        model = probed_model(repo, **{**given, "weight_digest": f"of {repo}", **facts})
        key = item_key(repo, "1", attempt)
        self.ledger.spool(key, ItemResult.success(model, to_rows(repo, "1", values)))
        return key

    def failed(self, repo: str) -> str:
        failure = Failure.of(repo, "1", "probe", FailureReason.TIMEOUT, "x")
        self.ledger.spool(item_key(repo, "1"), ItemResult.failure(failure))
        return item_key(repo, "1")

    def described(self, receipt: Receipt) -> Part:
        embeddings = self.probe_set.embeddings(self.encoder.digest)
        space = HeadSpace(embeddings, embeddings[:0])
        tables = describe(observed_models(self.store, receipt), COLUMNS, space, 0.1, TOP_R)
        data = part_bytes(tables, DESCRIPTORS)
        path = f"completion/completion/descriptors/{receipt.name}.parquet"
        self.store.write(path, data)
        return Part(path, sum(table.num_rows for table in tables), len(data), digest(data))

    def job(self, **changes: Any) -> Job:
        self.output = io.StringIO()
        content = {
            "store": str(self.store.root),
            "probes": "unused",
            "top_r": TOP_R,
            "seed": 5,
            "fraction": 0.5,
            "encoder": str(tiny_encoders.folder("clip")),
            "prompt": ["{}", "a {}"],
            "background": str(self.folder / "names.txt"),
        }
        return Job.of(Config.model_validate(content | changes), Report(self.output))

    def publish(
        self,
        completion: CompletionRecord | None = None,
        rows: Sequence[CatalogueRow] | None = None,
        **more: Any,
    ) -> PublishResult:
        return publish(
            self.job(**more.pop("config", {})),
            ListingSnapshot(self.listed if rows is None else rows, "the watermark", AT, FINISHED),
            self.probe_set,
            self.encoder,
            "key",
            more.pop("receipts", self.receipts[::-1]),
            completion or self.completion,
            FailureCounts(7, {"timeout": 1}),
            **more,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Its encoder was exported for other tests already."""
    exported = ExportedEncoder(tiny_encoders.text_files("clip"), tiny_encoders.image_files("clip"), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "exported_encoder", lambda *_: (exported, 1e-5, 2e-5))
        yield World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world: World) -> tuple[Generation, str]:
    """The first publish, and what it said."""
    done = world.publish()
    assert done.is_new
    return Generation(world.store.child("index"), done.pointer), world.output.getvalue()


def test_the_models_that_are_listed_and_probed(world: World, first: tuple[Generation, str]) -> None:
    generation, said = first
    rows = generation.models_table(["repo", "downloads", "licence", "rows", "copies", "identity"]).to_pylist()
    found = [(row["repo"], row["rows"], row["copies"], row["downloads"], row["licence"]) for row in rows]
    assert found == [
        ("a/later", 2, 1, None, None),
        ("a/one", 3, 1, 7, None),  # without its constant logit
        ("b/two", 3, 2, 7, None),
        ("c/copy", 3, 2, None, "mit"),
        ("e/binary", 2, 1, 7, None),  # and its opposite
    ]
    assert (generation.settings.models, generation.settings.logits, generation.size) == (5, 13, 10)
    index = open_index(world.store.uri)
    assert [logit.label for logit in index.show("b/two").logits] == ["cat", "dog", "owl"]
    assert [logit.logit for logit in index.show("a/one").logits] == [0, 2, 3]
    assert [logit.negated for logit in index.show("e/binary").logits] == [False, True]
    assert "the background holds only 5 names, which makes answers worse" in said
    assert "is live: 5 models, 13 logits" in said


def test_the_settings_say_what_it_was_made_from(world: World, first: tuple[Generation, str]) -> None:
    settings = first[0].settings
    assert (settings.probe_set, settings.probes, settings.observations) == (
        world.probe_set.hash,
        PROBES,
        "key",
    )
    assert (settings.fraction, settings.seed, settings.prompts) == (0.5, 5, ["{}", "a {}"])
    assert (settings.encoder, settings.encoder_digest) == (
        str(tiny_encoders.folder("clip")),
        world.encoder.digest,
    )
    assert (settings.background_concepts, settings.background_source) == (5, "file")
    assert (settings.watermark, settings.listed, settings.night) == ("the watermark", AT, None)
    assert (settings.rank, settings.regularisation, settings.completion) == (3, 0.1, "completion")
    assert (settings.held_out_rmse, settings.held_out_top_rmse, settings.constant_logits_dropped) == (
        0.5,
        0.75,
        1,
    )
    assert settings.run == {"models": 7, "failures": {"timeout": 1}}
    assert (settings.text_encoder_difference, settings.image_encoder_difference) == (1e-5, 2e-5)
    assert settings.image_encoder == tiny_encoders.image_files("clip").settings
    assert settings.image_encoder_missing is None
    assert (settings.base, settings.large, settings.method) == (None, False, "matched heads")


def test_probes_background_and_failed_models(world: World, first: tuple[Generation, str]) -> None:
    generation = first[0]
    embeddings = world.probe_set.embeddings(world.encoder.digest)
    probes = generation.probes(["name", "sha256", "thumbnail", "embedding"]).sort_by("id")
    facts = world.probe_set.facts()
    assert (
        probes.select(["id", "name", "sha256"]).to_pydict()
        == facts.select(["id", "name", "sha256"]).to_pydict()
    )
    assert probes["thumbnail"].to_pylist() == world.probe_set.thumbnails()
    np.testing.assert_array_equal(matrix_of(probes["embedding"]), embeddings)
    assert generation.background == NAMES
    vectors = name_vectors(world.encoder.embed_texts, ["{}", "a {}"], NAMES)
    np.testing.assert_allclose(from_npy(generation.meta("background_vectors.npy")), vectors, atol=1e-6)
    assert (
        from_npy(generation.meta("failed.npy")).tolist() == key_numbers([item_key("a/never", "1")]).tolist()
    )
    # Temperature and statistics are those of the stored logits, but for their rounding.
    logits = generation.all_logits
    directions, b = generation.basis.directions(logits.coordinates), generation.sharpness
    background = HeadSpace(embeddings, vectors).background
    assert b == pytest.approx(matched_heads.sharpness(directions, background), rel=0.05)
    twice = np.concatenate(
        [directions, directions[np.isin(logits.weights, generation.model("b/two")["weights"])]]
    )
    expected = ColumnStatistics.of(twice, background, matched_heads.offsets(twice, background, b), b)
    np.testing.assert_allclose(generation.statistics.means, expected.means, atol=0.05)
    np.testing.assert_allclose(generation.statistics.stds, expected.stds, rtol=0.05)


def test_the_same_once_more_is_nothing_new(world: World, first: tuple[Generation, str]) -> None:
    again = world.publish()
    assert (again.is_new, again.pointer) == (False, first[0].pointer)
    assert (again.models, again.logits) == (5, 13)


def test_without_models_there_is_nothing_to_publish(world: World) -> None:
    with pytest.raises(UsageError, match="there is nothing to publish: no model of the catalogue was probed"):
        world.publish(rows=[CatalogueRow("x/not-probed", "1"), CatalogueRow("a/one", "another commit")])


def test_logits_that_nobody_dropped_are_missed(world: World, first: tuple[Generation, str]) -> None:
    wrong = replace(world.completion, key="other", dropped=0)
    with pytest.raises(StoreError, match=r"lack 1 logits of the receipts' models, but 0 were dropped"):
        world.publish(wrong)
    assert open_index(world.store.uri).generation == first[0].pointer.generation


def test_a_receipt_that_was_not_completed_yet_is_left_out(
    world: World, first: tuple[Generation, str]
) -> None:
    """And a nightly run keeps the background, and says when it ran."""
    (old,) = [receipt for receipt in world.receipts if receipt.failures.rows]
    completion = replace(world.completion, key="first half", parts={old.name: world.parts[old.name]})
    (world.folder / "other.txt").write_text("owl\nboat")
    changes = {"background": str(world.folder / "other.txt"), "quality": {"enforce": False}}
    done = world.publish(completion, config=changes, background_of=first[0], last_nightly_run=FINISHED)
    generation = Generation(world.store.child("index"), done.pointer)
    assert generation.models_table(["repo"])["repo"].to_pylist() == ["a/one", "b/two"]
    assert (generation.background, generation.settings.background_source) == (NAMES, "file")
    assert generation.settings.night == FINISHED
    # What was never completed is tried again by nobody until then: its failures are known all the same.
    assert (
        from_npy(generation.meta("failed.npy")).tolist() == key_numbers([item_key("a/never", "1")]).tolist()
    )


@pytest.mark.parametrize(
    ("top_r", "probes", "enough"), [(8, 100, True), (7, 100, False), (5, 5, True), (4, 5, False)]
)
def test_descriptors_must_fill_what_an_index_shows(
    world: World, top_r: int, probes: int, enough: bool
) -> None:
    config = world.job(top_r=top_r).config
    if enough:
        check_shown_probes(config, probes)
        return
    with pytest.raises(UsageError, match=f"top_r = {top_r}; an index shows {top_r + 1} probes of a logit"):
        check_shown_probes(config, probes)
