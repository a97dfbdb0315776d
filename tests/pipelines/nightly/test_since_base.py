"""What nightly runs have added since the base: put together, compared with the base, and what is decided by that."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import probelog
from pipelines.complete.descriptors import Descriptors
from pipelines.complete.record import CompletionRecord, measure_file, write_record
from pipelines.config.model import Config
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly import decision, drift, rebuild
from pipelines.nightly.changes import HubChanges
from pipelines.nightly.decision import Decision, decide
from pipelines.nightly.drift import Drift, measure_drift
from pipelines.nightly.probing import ProbedChanges
from pipelines.nightly.record import NightlyFiles, NightlyRecord
from pipelines.nightly.start import FailedVersions, NightlyStart
from pipelines.nightly.update import ChangesSinceBase, changes_since_base, publish_update
from pipelines.probe.run import StageResult
from pipelines.publish.release import LiveIndex
from pipelines.quality.failures import FailureCounts
from pipelines.quality.report import last_report
from pipelines.quality.samples import sampled_models
from probelog.completion.descriptors import describe
from probelog.errors import ConflictError, FailureReason
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.ranking.matched_heads import HeadSpace
from probelog.storage.encoding import digest, npy
from probelog.storage.ledger import ItemResult, Ledger, Receipt, item_key, observed_models
from probelog.storage.observations import to_rows
from probelog.storage.parquet_parts import Part, part_bytes
from probelog.storage.schemas import DESCRIPTORS, FAILURES, CatalogueRow, Failure, to_table
from probelog.storage.store import Store
from tests.support.worlds import naive, tiny_encoders
from tests.support.worlds.probed_models import probed_model
from tests.support.worlds.small_index import Model, SmallIndex, build

PROBES, RANK, TOP_R = 40, 3, 10
HELD = (
    Model("owner/a", ("x", "y", "z")),
    Model("owner/b", ("x", "y"), weights="twins"),
    Model("owner/b-again", ("x", "y"), weights="twins"),
    Model("owner/c", ("x",), head="single"),
)
COLUMNS = np.random.default_rng(7).standard_normal((PROBES, RANK)).astype(np.float32)
FITTED = 0.5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return build(Store(tmp_path_factory.mktemp("base")), "base", HELD, "clip", images=False, probes=PROBES)


def observed(ledger: Ledger, repo: str, predictable: bool = True, sha: str = "1", **facts: Any) -> str:
    """A model of four logits on half of the probes, whose values the columns explain, or do not; its key."""
    random = np.random.default_rng(list(repo.encode()))
    values = random.standard_normal((4, PROBES))
    if predictable:
        values = random.standard_normal((4, RANK)) @ COLUMNS.T
        # The columns know of no mean: what is observed has none.
    probes = facts.pop("probes", np.sort(random.choice(PROBES, PROBES // 2, replace=False)).tolist())
    given = {"sha": sha, "logits": 4, "labels": [], "probes": probes, "weight_digest": f"of {repo}"}
    model = probed_model(repo, **given | facts)
    key = item_key(repo, sha)
    ledger.spool(key, ItemResult.success(model, to_rows(repo, sha, values[:, probes].astype(np.float32))))
    return key


def failed(ledger: Ledger, repo: str, reason: FailureReason) -> str:
    key = item_key(repo, "1")
    ledger.spool(key, ItemResult.failure(Failure.of(repo, "1", "probe", reason, "x")))
    return key


class Since:
    """A base, and a ledger of what came since."""

    def __init__(self, index: SmallIndex, folder: Path) -> None:
        self.index, self.base = index, Generation(index.store, index.pointer)
        self.store = Store(folder)
        self.files = NightlyFiles(self.store, "key", "base")
        self.ledger = self.files.ledger
        self.completion = CompletionRecord("base", RANK, 0.1, FITTED, FITTED, 4, 7, 0, {})
        self.store.write("completion/base/columns.npy", npy(COLUMNS))
        columns = {"columns.npy": measure_file(self.store, "completion/base/columns.npy")}
        write_record(self.store, self.completion, columns, "key")

    def described(self, receipts: Sequence[Receipt]) -> CompletionRecord:
        """Their descriptors, with the base's columns."""
        embeddings = self.index.embeddings
        parts = {}
        for receipt in receipts:
            space = HeadSpace(embeddings, embeddings[:0])
            tables = describe(observed_models(self.store, receipt), COLUMNS, space, 0.1, TOP_R)
            data = part_bytes(tables, DESCRIPTORS)
            path = f"completion/more/descriptors/{receipt.name}.parquet"
            self.store.write(path, data)
            rows = sum(table.num_rows for table in tables)
            parts[receipt.name] = Part(path, rows, len(data), digest(data))
        return replace(self.completion, key="more", parts=parts)

    def drift(self, *batches: Sequence[str]) -> Drift:
        """Of the models of some batches."""
        receipts = [self.ledger.seal(batch) for batch in batches]
        models = self.ledger.models(receipts)
        described = Descriptors(self.store, receipts, self.described(receipts).parts, models)
        return measure_drift(self.base, described, self.completion, COLUMNS, TOP_R)

    def changes(
        self,
        items: Sequence[str] = (),
        rows: Sequence[str] = (),
        removed: Sequence[str] = (),
        live: Pointer | None = None,
    ) -> ChangesSinceBase:
        """What one batch of items came to, of the repositories that the Hub lists at commit 1."""
        receipts = [self.ledger.seal(items)] if items else []
        models = self.ledger.models(receipts)
        failures = self.ledger.failures(receipts, models)
        probed = ProbedChanges(
            StageResult("key", receipts, len(models), to_table(failures, FAILURES)), FailureCounts(0)
        )
        start = NightlyStart(
            live=LiveIndex(live or self.base.pointer, self.base),
            base=self.base,
            completion=self.completion,
            probe_set=cast("Any", None),
            files=self.files,
            failed=FailedVersions(np.empty(0, np.uint64)),
            endpoint="http://127.0.0.1:1",
            at="2026-01-02T00:00:00+00:00",
        )
        facts: Mapping[str, Any] = {repo: {"reason": "removed", "detail": ""} for repo in removed}
        record = NightlyRecord("base", None, "2026-01-01T00:00:00+00:00", removed=facts)
        hub = HubChanges(record, {repo: CatalogueRow(repo, "1") for repo in rows})
        return changes_since_base(self.job(), start, hub, probed, self.described(receipts))

    def job(self, **nightly: float) -> Job:
        content = {"store": str(self.store.root), "probes": "unused", "top_r": TOP_R}
        content |= {"encoder": str(tiny_encoders.folder("clip")), "quality": {"enforce": False}}
        nothing_much = {"max_drift": 1e9, "rebuild_share": 1.0}
        config = Config.model_validate({**content, "nightly": nothing_much | nightly})
        return Job.of(config, Report(io.StringIO()))


@pytest.fixture
def since(index: SmallIndex, tmp_path: Path) -> Since:
    return Since(index, tmp_path)


# Put together


def test_a_new_commit_takes_the_old_ones_place_once_its_fate_is_known(since: Since) -> None:
    items = [
        observed(since.ledger, "owner/a"),
        failed(since.ledger, "owner/b", FailureReason.TIMEOUT),
        failed(since.ledger, "owner/c", FailureReason.UNSUPPORTED),
        observed(since.ledger, "owner/new"),
        observed(since.ledger, "owner/unlisted"),
    ]
    rows = ["owner/a", "owner/b", "owner/c", "owner/new", "owner/b-again"]
    changes = since.changes(items, rows, removed=["owner/b-again", "owner/nobody"])
    assert [model.repo for model in changes.descriptors.models] == ["owner/a", "owner/new"]
    assert changes.removed == {"owner/a": 0, "owner/b-again": 2, "owner/c": 3}
    assert set(changes.rows) == {(repo, "1") for repo in rows if repo != "owner/b-again"}
    assert changes.base is since.base
    assert not changes.empty
    streamed = [described.model.repo for described in changes.descriptors.stream()]
    assert streamed == ["owner/a", "owner/new"]
    assert changes.for_writer().removed.tolist() == [0, 2, 3]
    assert changes.for_writer().models["repo"].to_pylist() == ["owner/a", "owner/new"]
    assert changes.for_writer().identities == ["of owner/a", "of owner/new"]


def test_what_is_the_same_has_the_same_source(since: Since) -> None:
    nothing = since.changes()
    assert nothing.empty
    assert (nothing.descriptors.models, nothing.removed) == ([], {})
    removed = since.changes(removed=["owner/a", "owner/c"])
    assert removed.removed == {"owner/a": 0, "owner/c": 3}
    assert not removed.empty
    items = [observed(since.ledger, f"owner/{name}") for name in ("m", "n")]
    rows = ["owner/m", "owner/n"]
    added = since.changes(items, rows)
    assert not added.empty
    fewer = replace(added, removed={"owner/a": 0})
    every = [nothing, removed, added, fewer, since.changes(removed=["owner/a"])]
    assert len({changes.source for changes in every}) == len(every)
    other_order = replace(removed, removed=dict(reversed(removed.removed.items())))
    assert other_order.source == removed.source


def test_what_a_generation_lacks_of_the_added(since: Since) -> None:
    items = [observed(since.ledger, "owner/new"), observed(since.ledger, "owner/a")]
    items.append(observed(since.ledger, "owner/c", sha=HELD[3].sha))
    receipt = since.ledger.seal(items)
    changes = replace(since.changes(), descriptors=Descriptors(since.store, [receipt], {}, since.ledger.models([receipt])))  # fmt: skip
    assert changes.missing_in(since.base) == [("owner/a", "1"), ("owner/new", "1")]


def test_rows_of_the_base_that_are_shared(since: Since) -> None:
    items = [
        observed(since.ledger, "new/one", weight_digest="twins"),
        observed(since.ledger, "new/two", weight_digest=str(HELD[0].digest)),
        observed(since.ledger, "new/three"),
    ]
    changes = since.changes(items, ["new/one", "new/two", "new/three"])
    assert changes.known == {"twins": 2, HELD[0].digest: 3}


# Drift


def test_without_changes_nothing_has_drifted(since: Since) -> None:
    assert since.drift() == Drift(0, None, FITTED, 0.0, 0.0, 0.0, 0, 0.0)


def test_models_that_the_columns_explain_are_predicted_and_others_are_not(since: Since) -> None:
    good = since.drift([observed(since.ledger, f"good/{i}") for i in range(4)])
    bad = since.drift([observed(since.ledger, f"bad/{i}", predictable=False) for i in range(4)])
    assert (good.models, bad.models) == (4, 4)
    assert good.held_out_rmse is not None
    assert bad.held_out_rmse is not None
    assert good.held_out_rmse < 0.5 < 0.9 < bad.held_out_rmse
    for measured in (good, bad):
        assert measured.fitted_rmse == FITTED
        assert measured.held_out == pytest.approx(cast("float", measured.held_out_rmse) / FITTED - 1)
    # A tenth of each model's entries, of two batches as of one.
    both = since.drift(
        [observed(since.ledger, f"good/{i}") for i in range(2)],
        [observed(since.ledger, f"good/{i}") for i in range(2, 4)],
    )
    assert both.held_out_rmse == pytest.approx(good.held_out_rmse)
    since.completion = replace(since.completion, rmse=0.0)
    assert since.drift([observed(since.ledger, "good/9")]).held_out == 0.0, "nothing to compare with"


def test_copies_and_models_of_one_probe_are_not_predicted(
    since: Since, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [
        observed(since.ledger, "new/a"),
        observed(since.ledger, "new/copy", weight_digest="of new/a", copy_of_repo="new/a", copy_of_sha="1"),
        observed(since.ledger, "new/single", probes=[3]),
        observed(since.ledger, "new/two", probes=[3, 9]),
        observed(since.ledger, "new/b"),
    ]
    measured = since.drift(items)
    assert measured.models == 3
    # The logits of a copy count once; those with one probe are constant.
    assert measured.logits == 12
    assert measured.share == pytest.approx(12 / (12 + since.base.size))
    monkeypatch.setattr(drift, "_MODELS", 2)
    assert since.drift([*items]).models == 2


def test_temperature_and_background_are_compared_with_the_bases(since: Since) -> None:
    receipt = since.ledger.seal([observed(since.ledger, f"new/{i}", predictable=False) for i in range(5)])
    models = since.ledger.models([receipt])
    described = Descriptors(since.store, [receipt], since.described([receipt]).parts, models)
    measured = measure_drift(since.base, described, since.completion, COLUMNS, TOP_R)
    base, basis = since.base, since.base.basis
    added = np.concatenate([basis.coordinates(item.directions) for item in described.stream()]).astype(float)
    before = base.all_logits.coordinates.astype(float)
    after = np.concatenate([before, added])
    named = base.background_coordinates.astype(float)
    rise = naive.sharpness(after, named) / naive.sharpness(before, named) - 1
    assert measured.temperature == pytest.approx(rise, rel=1e-3)
    assert abs(rise) > 1e-3

    def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # No concept is its own rival.
        scores = np.array(
            [
                [naive.score(row, name, named, base.sharpness, [i]) for i, name in enumerate(named)]
                for row in rows
            ]
        )
        return scores.mean(axis=0), scores.std(axis=0)

    (old, spread), (new, _) = moments(before), moments(after)
    shift = np.sqrt(np.mean(((new - old) / spread) ** 2))
    assert measured.background == pytest.approx(shift, rel=1e-3)
    assert (measured.logits, measured.share) == (20, pytest.approx(20 / (20 + base.size)))


# What is decided


def test_nothing_is_published_where_nothing_is_new(since: Since) -> None:
    nothing = since.changes()
    assert decide(since.job(), nothing) is None
    removed = since.changes(removed=["owner/a"])
    assert decide(since.job(), removed) == Decision(False, since.drift(), None)
    published = Pointer("update", removed.source, "", base="base")
    assert decide(since.job(), since.changes(removed=["owner/a"], live=published)) is None
    taken_back = since.changes(live=published)
    assert decide(since.job(), taken_back) is not None, "an update is live, and nothing of it holds any more"


def test_much_is_rebuilt_and_drift_is_told(since: Since, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = since.changes([observed(since.ledger, "owner/new", predictable=False)], ["owner/new"])
    decided = decide(since.job(max_drift=0.01), changes)
    assert decided is not None
    assert decided.refit_due is not None
    assert not decided.rebuild
    share = decided.drift.share
    assert (decided.drift.models, decided.drift.logits) == (1, 4)
    at_the_bound, below_it = (
        decide(since.job(rebuild_share=bound), changes) for bound in (share, share * 0.999)
    )
    assert at_the_bound is not None
    assert below_it is not None
    assert (at_the_bound.rebuild, below_it.rebuild, at_the_bound.refit_due) == (False, True, None)
    for most, expected in ((4, False), (3, True)):
        monkeypatch.setattr(decision, "EXACT_LOGITS", most)
        again = decide(since.job(), changes)
        assert again is not None
        assert again.rebuild == expected


# What is published


@pytest.fixture
def published(tmp_path: Path) -> Since:
    """The base lies in the job's own store."""
    index = build(Store(tmp_path).child("index"), "base", HELD, "clip", images=False, probes=PROBES)
    return Since(index, tmp_path)


def test_an_update_holds_what_was_added_and_not_what_was_removed(published: Since) -> None:
    since = published
    items = [
        observed(since.ledger, "owner/new"),
        observed(since.ledger, "owner/new-copy", weight_digest="of owner/new"),
        observed(since.ledger, "owner/a"),
        failed(since.ledger, "owner/b", FailureReason.UNSUPPORTED),
    ]
    rows = ["owner/new", "owner/new-copy", "owner/a", "owner/b"]
    changes = since.changes(items, rows, removed=["owner/c"])
    changes = replace(
        changes, hub=replace(changes.hub, record=replace(changes.hub.record, watermark="2026-01-01T05:00:00"))
    )
    job, run, steps = since.job(), FailureCounts(4, {"unsupported": 1}), []
    decided = decide(job, changes)
    assert decided is not None
    added = changes.missing_in(since.base)
    done = publish_update(job, changes, run, decided.drift, added, lambda: steps.append("allowed"))
    assert steps == ["allowed"]
    assert done.is_new
    pointer = read_pointer(job.store.child("index"))[0]
    assert (pointer, pointer.base, pointer.source) == (done.pointer, "base", changes.source)
    update = Generation(job.store.child("index"), pointer)
    settings = update.settings
    assert (settings.folded_in, settings.watermark, settings.night) == (
        "more",
        "2026-01-01T05:00:00",
        changes.start.at,
    )
    assert (settings.run, settings.drift) == (run.to_dict(), decided.drift.facts())
    assert (settings.added, settings.gone) == (3, 3)
    models = {(row["repo"], row["sha"]) for row in update.models_table(["repo", "sha"]).to_pylist()}
    assert models == {
        ("owner/new", "1"),
        ("owner/new-copy", "1"),
        ("owner/a", "1"),
        (HELD[2].repo, HELD[2].sha),
    }
    assert (settings.models, done.models) == (4, 4)
    assert settings.logits == done.logits == 4 + 4 + 4 + 2
    assert len(update.recent) == 8, "copies share their logits"
    index = probelog.Index(job.store.child("index"), pinned=update)
    assert index.show("owner/new").same_weights == ["owner/new-copy"]
    report = last_report(job.store)
    assert report is not None
    assert (report["generation"], report["live"]) == (pointer.generation, "base")
    again = since.changes(items, rows, removed=["owner/c"], live=pointer)
    assert decide(job, again) is None, "it is live already"


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Degrees of freedom:RuntimeWarning")
def test_an_update_that_removes_all(published: Since) -> None:
    changes = published.changes(removed=[model.repo for model in HELD])
    job = published.job()
    decided = decide(job, changes)
    assert decided is not None
    done = publish_update(job, changes, FailureCounts(0), decided.drift, [], lambda: None)
    assert (done.is_new, done.models, done.logits) == (True, 0, 0)
    assert sampled_models(Generation(job.store.child("index"), done.pointer), 5) == []


def test_an_update_is_not_published_once_another_run_is_at_work(published: Since) -> None:
    since = published
    changes = since.changes([observed(since.ledger, "owner/new")], ["owner/new"])
    decided = decide(since.job(), changes)
    assert decided is not None

    def lost() -> None:
        raise ConflictError("taken")

    job = since.job()
    with pytest.raises(ConflictError, match="taken"):
        publish_update(job, changes, FailureCounts(1), decided.drift, [("owner/new", "1")], lost)
    index = job.store.child("index")
    assert read_pointer(index)[0].generation == "base"
    assert {name.split("/")[1] for name in index.names("generations")} == {"base"}


def test_a_rebuilt_index_is_made_of_the_base_and_all_changes(
    since: Since, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    further: dict[str, Any] = {}
    live = LiveIndex(since.base.pointer, since.base)
    result = live.unchanged()

    def publish(*values: Any, **named: Any) -> Any:
        given.extend(values)
        further.update(named)
        return result

    monkeypatch.setattr(rebuild, "publish", publish)
    main = Ledger(since.store, f"observations/{since.base.settings.observations}")
    old = main.seal([observed(main, "owner/old")])
    since.completion = replace(since.completion, parts=since.described([old]).parts)
    write_record(
        since.store,
        since.completion,
        {"columns.npy": measure_file(since.store, "completion/base/columns.npy")},
        "key",
    )
    items = [observed(since.ledger, "owner/a"), observed(since.ledger, "owner/new")]
    changes = since.changes(items, ["owner/a", "owner/new"], removed=["owner/c"])
    record = replace(changes.hub.record, watermark="2026-01-01T05:00:00")
    changes = replace(changes, hub=replace(changes.hub, record=record))
    run = FailureCounts(2)
    said = io.StringIO()
    job = Job.of(since.job().config, Report(said))
    assert rebuild.publish_rebuilt(job, changes, run, lambda: None) is result
    assert "nightly.rebuild_share: it is rebuilt as a whole" in said.getvalue()
    _, listed, probe_set, encoder, key, receipts, completion, counts, allowed = given
    assert {(row.repo, row.sha) for row in listed.rows} == {
        *((model.repo, model.sha) for model in HELD[1:3]),
        ("owner/a", "1"),
        ("owner/new", "1"),
    }
    (kept,) = [row for row in listed.rows if row.repo == "owner/b"]
    assert (kept.licence, kept.downloads) == (HELD[1].licence, HELD[1].downloads), "facts are kept"
    assert (listed.watermark, listed.at, listed.finished) == (
        "2026-01-01T05:00:00",
        record.reconciled,
        changes.start.at,
    )
    assert (probe_set, encoder.digest) == (changes.start.probe_set, tiny_encoders.encoder("clip").digest)
    assert (key, receipts, counts) == (since.base.settings.observations, [old], run)
    assert completion.parts == {**since.completion.parts, **changes.described.parts}
    assert allowed() is None
    trees = further.pop("trees")
    assert (trees.models.rows, trees.edges.rows) == (0, 0), "no weights are known"
    assert further == {
        "last_nightly_run": changes.start.at,
        "background_of": since.base,
        "live": changes.start.live,
        "read": changes.descriptors,
        "sampled": None,
    }
