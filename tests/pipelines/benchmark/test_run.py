"""``evaluate --out``: the full benchmark over a published index and its observations."""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.benchmark import confidence_evaluation, tables
from pipelines.benchmark.cells import Cell, run_cells
from pipelines.benchmark.page import write_page
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.protocols import AS_PUBLISHED, PROTOCOLS, WITHHELD
from pipelines.benchmark.questions import Truth, from_labels, from_truth
from pipelines.benchmark.run import BenchmarkPlan, run_benchmark
from pipelines.job.progress import Report
from pipelines.labels.labels import Lexicon
from probelog.errors import UsageError
from probelog.evaluation import METHODS
from probelog.evaluation.accuracy import per_query
from probelog.evaluation.truncated import second_version
from probelog.probes.probe_set import subset
from probelog.storage.schemas import ProbedModel
from probelog.storage.store import Store
from tests.support.processes.operator_command import operator
from tests.support.worlds.tiny_world import LOGITS, MODELS, PROBES, Indexed, write_probes

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture(autouse=True)
def _at_the_tiny_hub(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)


def take_all(_: ProbedModel) -> str | None:
    return None


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of nothing again, with classes: ten of each of four."""
    file = tmp_path_factory.mktemp("queries") / "queries.parquet"
    write_probes(file, 120)
    table = pq.read_table(file).slice(80, 40)
    pq.write_table(table.append_column("class", pa.array([i % 4 for i in range(40)], pa.int32())), file)
    return file


@pytest.fixture(scope="module")
def done(
    indexed: Indexed, queries: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BenchmarkPlan]:
    """A finished benchmark by the operator's command."""
    folder = tmp_path_factory.mktemp("benchmark")
    store = indexed.copy_store(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", indexed.endpoint)
        ended = operator(
            "evaluate", "--index", store, "--truth", indexed.world.truth, "--out", folder / "out",
            "--budget", 1, "--budget", 0.5, "--seeds", 2, "--queries", queries, "--method", "version 2",
        )  # fmt: skip
        assert ended.status == 0, ended.err
        assert "version 2" in ended.out
        yield BenchmarkPlan(
            [str(store)], folder / "out", indexed.world.truth, None, queries, (1.0, 0.5), 2, ["version 2"]
        )


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def test_every_table_and_plot_is_there(done: BenchmarkPlan) -> None:
    names = {path.name for path in done.out.iterdir()}
    tables_written = {"results", "differences", "hubness", "reverse", "sweeps", "prauc", "by_rank", "labels"}
    plots = {"accuracy-by-probes", "accuracy-by-r", "accuracy-by-background", "hub-curve"}
    assert names == (
        {f"{name}.csv" for name in tables_written}
        | {f"{name}.png" for name in plots}
        | {"results.parquet", "per_query.parquet", "index.html", "cells"}
    )
    assert all((done.out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in plots)
    page = (done.out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(plots)
    assert "version 2" in page


def test_results_hold_what_was_asked_for(done: BenchmarkPlan) -> None:
    rows = pq.read_table(done.out / "results.parquet").to_pylist()
    assert len(rows) == len(rows_of(done.out / "results.csv"))
    texts = [row for row in rows if row["asked"] == "text" and row["half"] == "both" and row["part"] == "all"]
    assert {(row["budget"], row["seed"], row["protocol"]) for row in texts} == {
        (budget, seed, protocol)
        for budget, seed in ((1.0, None), (1.0, 0), (0.5, None), (0.5, 0), (0.5, 1))
        for protocol in PROTOCOLS
    }
    assert {(row["asked"], row["protocol"]) for row in rows} == {
        (asked, protocol) for asked in ("text", "1 image", "5 images", "10 images") for protocol in PROTOCOLS
    }
    for row in rows:
        for name in ("top1", "top5", "map"):
            assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
            assert 0 < row[f"chance_{name}"] <= 1
        assert row["top1"] <= row["top5"]
        assert 0 < row["oracle"] <= 1
        assert row["seconds"] > 0
    rows = [row for row in rows if row["protocol"] == WITHHELD]
    texts = [row for row in texts if row["protocol"] == WITHHELD]
    mean = next(row for row in texts if row["budget"] == 0.5 and row["seed"] is None)
    single = [row["map"] for row in texts if row["budget"] == 0.5 and row["seed"] is not None]
    assert mean["map"] == pytest.approx(np.mean(single))
    halves = [row for row in rows if row["asked"] == "text" and row["seed"] is None and row["budget"] == 1]
    count = {(row["part"], row["half"]): row["queries"] for row in halves}
    assert count["all", "both"] == count["all", "development"] + count["all", "test"]
    assert count["all", "both"] == count["single", "both"] + count["super", "both"]


def test_ranks_are_the_methods(done: BenchmarkPlan, indexed: Indexed) -> None:
    """The whole way once more by hand: observations, subset, method, ranks."""
    truth = Truth.read(indexed.world.truth)
    hub = ProbedHub.open(done.indexes[0], lambda m: None if truth.kinds[m.repo] != "copy" else "copy")
    questions = from_truth(truth, hub.logits)
    written = pq.read_table(done.out / "per_query.parquet").to_pylist()
    for share, seed in ((1.0, 0), (0.5, 1)):
        gallery, kept = hub.gallery(share, seed)
        assert kept.tolist() == list(range(len(hub.logits)))
        scores = second_version(gallery, hub.concepts(hub.embed(questions.names), questions.synonyms))
        expected = per_query(scores[questions.answerable], questions.relevant[questions.answerable])
        own = [
            row
            for row in written
            if (row["asked"], row["budget"], row["seed"], row["protocol"], row["r"], row["background"])
            == ("text", share, seed, AS_PUBLISHED, None, None)
        ]
        assert [row["rank"] for row in own] == expected.rank.tolist()
        assert [row["concept"] for row in own] == [questions.names[i] for i in questions.answerable]


def test_a_gallery_sees_what_the_probe_stage_would_show(indexed: Indexed) -> None:
    hub = ProbedHub.open(str(indexed.store), take_all)
    assert len(hub.logits) == LOGITS
    gallery, kept = hub.gallery(0.3, seed=5)
    assert len(gallery) == len(kept) == LOGITS
    digest = hub.generation.settings.probe_set
    for model, seen, full in zip(hub.models, gallery.models, hub.observed, strict=True):
        assert seen.probes.tolist() == subset(digest, model.repo, model.sha, 5, 0.3, PROBES).tolist()
        np.testing.assert_array_equal(seen.values, full.values[:, seen.probes])
    (single,) = [
        rows for model, rows in zip(hub.models, hub.observed, strict=True) if model.repo == "bob/one-logit"
    ]
    np.testing.assert_array_equal(single.values[0], -single.values[1])
    assert [item.negated for item in hub.logits if item.repo == "bob/one-logit"] == [False, True]


def test_a_share_of_a_share_is_refused(indexed: Indexed) -> None:
    hub = ProbedHub.open(str(indexed.store), take_all)
    hub.generation.settings = replace(hub.generation.settings, fraction=0.5)
    assert len(hub.gallery(0.5, seed=0)[0]) == LOGITS
    with pytest.raises(UsageError, match="fraction = 1"):
        hub.gallery(0.25, seed=0)


def test_an_index_without_its_observations_is_refused(indexed: Indexed, tmp_path: Path) -> None:
    store = indexed.copy_store(tmp_path / "store", "observations")
    with pytest.raises(UsageError, match="observations"):
        ProbedHub.open(str(store), take_all)


def test_finished_cells_are_not_run_again(done: BenchmarkPlan) -> None:
    cells = sorted((done.out / "cells").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in cells}
    table = (done.out / "results.csv").read_bytes()
    damaged, gone = cells[0], cells[1]
    damaged.write_bytes(b"PK nonsense")
    gone.unlink()
    run_benchmark(done, Report(io.StringIO()))
    after = {path.name: path.stat().st_mtime_ns for path in (done.out / "cells").iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == {damaged.name, gone.name}
    without_times = [
        [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(io.StringIO(text))
        ]
        for text in (table.decode(), (done.out / "results.csv").read_text())
    ]
    assert without_times[0] == without_times[1]


def test_areas_by_hand(done: BenchmarkPlan) -> None:
    rows = rows_of(done.out / "prauc.csv")
    assert {(row["budget"], row["half"]) for row in rows} >= {("1", "both"), ("0.5", "both")}
    for row in rows:
        for name in ("first_correct", "hub_mean", "encoder"):
            assert 0 < float(row[name]) <= 1
        assert float(row["first_minus_hub"]) == pytest.approx(
            float(row["first_correct"]) - float(row["hub_mean"])
        )
    for protocol in PROTOCOLS:
        ranks = [
            row
            for row in rows_of(done.out / "by_rank.csv")
            if (row["budget"], row["protocol"]) == ("1", protocol)
        ]
        assert [int(row["rank"]) for row in ranks] == list(range(1, 11))


def test_confidence_is_judged_by_the_truth(indexed: Indexed, tmp_path: Path) -> None:
    store, out = indexed.copy_store(tmp_path / "$tiny$"), tmp_path / "out"
    ended = operator(
        "evaluate", "--index", store, "--truth", indexed.world.truth, "--out", out, "--seeds", 1,
        "--budget", 1, "--budget", 0.125, "--budget", 0.5, "--method", "matched heads", "--baseline", "matched heads",
    )  # fmt: skip
    assert ended.status == 0, ended.err

    bins = rows_of(out / "reliability.csv")
    places = itertools.product(("1", "0.125"), PROTOCOLS, ("single", "super", "all"))
    by_place = {
        place: [row for row in bins if (row["budget"], row["protocol"], row["part"]) == place]
        for place in places
    }
    assert sum(map(len, by_place.values())) == len(bins)
    for own in by_place.values():
        hits = sum(int(row["hits"]) for row in own)
        assert hits == 10 * int(own[0]["concepts"])
        gaps = [int(row["hits"]) * abs(float(row["confidence"]) - float(row["right"])) for row in own]
        assert float(own[0]["calibration_error"]) == pytest.approx(sum(gaps) / hits)
        for row in own:
            assert float(row["low"]) <= float(row["confidence"]) <= float(row["high"])
    # Whatever the background, the same concepts are asked.
    assert len({own[0]["concepts"] for (_, _, part), own in by_place.items() if part == "all"}) == 1
    # The tiny hub declares too few names to learn from.
    assert {row["source"] for row in bins} == {"posterior"}

    for budget, protocol in itertools.product(("1", "0.125"), PROTOCOLS):
        own = [
            row
            for row in rows_of(out / "absent.csv")
            if (row["budget"], row["protocol"]) == (budget, protocol)
        ]
        draws, mean = [row for row in own if row["draw"]], own[-1]
        # One half of the tiny hub has too few single classes to hold some out.
        assert [int(row["draw"]) for row in draws] == list(range(10))
        assert mean["draw"] == ""
        assert {row["absent"] for row in own} == {"1" if protocol == WITHHELD else "2"}
        assert float(mean["auc"]) == pytest.approx(np.mean([float(row["auc"]) for row in draws]))
        assert 0 <= float(mean["auc_low"]) <= float(mean["auc"]) <= float(mean["auc_high"]) <= 1

    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "index.html").read_text()
    assert "Nothing here recognises this" in page
    assert "fitted on" in page


def test_held_out_logits_are_nowhere(indexed: Indexed) -> None:
    """What is asked after a class is held out is what a hub without it would answer."""
    truth = Truth.read(indexed.world.truth)
    hub = ProbedHub.open(str(indexed.store), take_all)
    questions = from_truth(truth, hub.logits)
    whole = confidence_evaluation.ProbedConfidence.of(hub, questions, 1.0)
    concept = int(questions.answerable[0])
    left = np.flatnonzero(~questions.relevant[concept])
    small = replace(
        whole,
        directions=whole.directions[left],
        owners=whole.owners[left],
        labels=[whole.labels[number] for number in left],
        relevant=whole.relevant[:, left],
    )
    concepts = np.arange(len(questions.names))
    one, other = (
        confidence_evaluation.answers(whole, left, concepts),
        confidence_evaluation.answers(small, np.arange(len(left)), concepts),
    )
    np.testing.assert_array_equal(one.confidences, other.confidences)
    np.testing.assert_array_equal(one.right, other.right)
    assert not one.right[concept].any()


def test_declared_labels_stand_in_for_a_truth(indexed: Indexed, tmp_path: Path) -> None:
    hierarchy = tmp_path / "hierarchy.tsv"
    hierarchy.write_text("dog\tanimal\ncat\tanimal\n")
    ended = operator(
        "evaluate", "--index", indexed.store, "--out", tmp_path / "out", "--seeds", 1, "--budget", 1,
        "--hierarchy", hierarchy, "--json",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "1 with the weights of another" in ended.err
    answer = json.loads(ended.out)
    assert list(answer["protocols"]) == list(PROTOCOLS)
    assert answer["protocols"][AS_PUBLISHED] == answer["results"]
    assert {row["method"] for row in answer["protocols"][WITHHELD]} == set(METHODS)
    found = answer["results"]
    own = next(row for row in found if (row["part"], row["half"]) == ("all", "both"))
    concepts = {row["concept"] for row in pq.read_table(tmp_path / "out/per_query.parquet").to_pylist()}
    assert concepts == {"dog", "cat", "owl", "boat", "tree", "bread", "clock", "bridge", "tent"}
    assert own["queries"] == len(concepts)
    assert {row["method"] for row in found} == set(METHODS)
    # Confidence is fitted on the labels: they cannot judge it.
    assert not (tmp_path / "out/reliability.csv").exists()


def test_hostile_labels_are_escaped(indexed: Indexed, tmp_path: Path) -> None:
    hub = ProbedHub.open(str(indexed.store), take_all)
    labels = [f"{HOSTILE}{i}\x1b]0;x\x07" if i % 2 else f"dog</td>{i}" for i in range(len(hub.logits))]
    named = [item._replace(label=label) for item, label in zip(hub.logits, labels, strict=True)]
    hub = replace(hub, name="<b>$x^", logits=named)
    questions = from_labels(hub.logits, Lexicon())
    questions = replace(questions, names=[f"{HOSTILE}{name}" for name in questions.names])
    out = Store(tmp_path)
    cells = [Cell(hub.name, "version 2", share, 0) for share in (1.0, 0.5)]
    outcomes = dict(
        run_cells(cells, {hub.name: hub}, {hub.name: questions}, None, "", out, Report(io.StringIO()))
    )
    done = tables.Finished({hub.name: hub}, {hub.name: questions}, outcomes)
    written = {
        "results": tables.results(done),
        "differences": tables.differences(done, "version 2"),
        "hubness": tables.hubs(done),
        "reverse": tables.reverse(done),
        "sweeps": tables.sweeps(done),
    }
    write_page(out, done, written, "version 2")
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert "dog</td>" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    assert html.escape(HOSTILE)[:12] in page


# What the operator is told


def test_what_makes_no_sense_is_refused(indexed: Indexed, queries: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        ended = operator("evaluate", "--index", indexed.store, *arguments)
        assert ended.status == 2, ended.err
        assert "Traceback" not in ended.err
        return " ".join(ended.err.split())

    out = ["--out", tmp_path / "out"]
    truth = ["--truth", indexed.world.truth]
    assert "there is no method 'magic'; there are: " in refused(*out, *truth, "--method", "magic")
    assert "no method 'magic'" in refused(*out, *truth, "--baseline", "magic")
    for budget in ("0", "-1", "1.5", "nan"):
        assert "over 0 and at most 1" in refused(*out, *truth, "--budget", budget)
    assert "seeds must be at least 1" in refused(*out, *truth, "--seeds", 0)
    assert "--out" in refused(*truth, "--budget", 0.5)
    assert "--out" in refused()
    assert "given twice" in refused(*out, *truth, "--index", indexed.store)
    assert "truth file" in refused(*out, "--queries", queries)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused("--out", tmp_path / "file", *truth)

    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"classes": [], "concepts": {}, "models": {}}))
    assert "is not a truth file" in refused(*out, "--truth", empty)
    empty.write_text(json.dumps({"classes": [["dog"]], "concepts": {"dog": [0]}, "models": {}}))
    assert f"{len(MODELS)} not in the truth file" in refused(*out, "--truth", empty)
    empty.write_text(json.dumps({
        "classes": [["dog"]], "concepts": {"dog": [0]},
        "models": {repo: {"logits": [[]] * 9} for repo in MODELS},
    }))  # fmt: skip
    assert "no concept that a model of the index recognises" in refused(*out, "--truth", empty)

    assert "must be a Parquet file" in refused(*out, *truth, "--queries", tmp_path / "no.parquet")
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 not at all")
    assert "cannot be read" in refused(*out, *truth, "--queries", bad)
    pq.write_table(pa.table({"image": [b"x"], "class": ["dog"]}), bad)
    assert "no integer column" in refused(*out, *truth, "--queries", bad)
    pq.write_table(pa.table({"class": [1]}), bad)
    assert "no single column of images" in refused(*out, *truth, "--queries", bad)
    pq.write_table(pa.table({"image": [b"not an image"], "class": [0]}), bad)
    assert "image number 1" in refused(*out, *truth, "--queries", bad)
