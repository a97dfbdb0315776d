"""The gate's mathematics: intervals, which answers count as lost, which names are asked."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.labels.labels import Lexicon
from pipelines.quality import report
from pipelines.quality.agreement import (
    NamingAgreement,
    _kept_models_measure,
    declared_names,
    label_agreement,
)
from pipelines.quality.canaries import Canary, KnownModels, background_canaries, compare, read_canaries
from pipelines.quality.failures import FailureCounts, failure_measures
from pipelines.quality.measure import Measure, least_paired_fall, least_rise, wilson
from pipelines.quality.report import Verdict, last_report, write_report
from pipelines.quality.samples import Sampled, added_versions, draw, hashed
from probelog.errors import SchemaVersionError, UsageError
from probelog.search.results import Hit
from probelog.storage.encoding import digest
from probelog.storage.store import Store
from tests.support.worlds.small_index import some_settings

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_wilson_as_published() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81 of 263, 15 of 148 and 0 of 20."""
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ):
        assert wilson(hits, count, 1.959964) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    """A limit of nothing must not be exceeded by rounding."""
    assert wilson(0, 0) == (0.0, 1.0), "nothing is known of a share of nothing"
    for count in range(1, 1000):
        assert wilson(0, count)[0] == 0
        assert wilson(count, count)[1] == 1


def test_difference_as_published() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:873), table II, method 10: 56/70 - 48/80 and 10/10 - 0/10."""
    assert least_rise(56, 70, 48, 80, 1.959964) == pytest.approx(0.0524, abs=5e-5)
    assert least_rise(10, 10, 0, 10, 1.959964) == pytest.approx(0.6075, abs=5e-5)


def test_a_paired_fall_by_hand() -> None:
    """Half an observation more in each of the four cells: 40.5 fell and 0.5 rose of 102, (41/102 - .392^2) / 102."""
    assert least_paired_fall(40, 0, 100, 1.959964) == pytest.approx(0.392157 - 1.959964 * 0.049327, abs=1e-5)


@given(COUNTS)
def test_wilson_holds_the_share(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    assert 0 <= low <= counts[0] / counts[1] + 1e-12
    assert counts[0] / counts[1] - 1e-12 <= high <= 1


@given(COUNTS, COUNTS)
def test_a_rise_is_never_more_than_what_was_seen(now: tuple[int, int], before: tuple[int, int]) -> None:
    seen = now[0] / now[1] - before[0] / before[1]
    assert -1 - 1e-9 <= least_rise(*now, *before) <= seen + 1e-12
    assert least_rise(now[0] * 100, now[1] * 100, before[0] * 100, before[1] * 100) >= (
        least_rise(*now, *before) - 1e-12
    ), "more of the same is surer"


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_a_paired_fall(lost: int, gained: int, kept: int) -> None:
    count = lost + gained + kept
    fall = least_paired_fall(lost, gained, count)
    assert fall <= max(0.0, (lost - gained) / count) + 1e-12
    if lost >= gained:
        assert least_paired_fall(100 * lost, 100 * gained, 100 * count) >= fall, "more of the same is surer"


def test_few_never_refuse() -> None:
    """Three of three are chance as often as not."""
    assert least_paired_fall(3, 0, 3) < 0
    assert least_rise(2, 2, 30, 100) < 0.1
    assert least_rise(0, 0, 1, 10) == least_rise(1, 10, 0, 0) == least_paired_fall(0, 0, 0) == -1


def test_many_do() -> None:
    assert least_rise(60, 100, 5, 100) > 0.3
    assert least_paired_fall(40, 0, 100) > 0.2


@given(
    st.sets(st.text(min_size=1), max_size=30), st.sets(st.text(min_size=1), max_size=5), st.integers(1, 10)
)
def test_a_draw_stays_the_same(names: set[str], more: set[str], count: int) -> None:
    """What was drawn and is drawn no more gave way to something new."""
    before, after = draw(names, count), draw(names | more, count)
    assert len(before) == min(count, len(names))
    assert set(before) - set(after) == set() or len(after) == count
    assert set(after) <= set(before) | more
    assert before == sorted(before, key=hashed)


class Listed:
    """Of a generation only its models matter here."""

    def __init__(self, *versions: tuple[str, str]) -> None:
        self._versions = versions

    def models_table(self, columns: list[str]) -> pa.Table:
        assert columns == ["repo", "sha"]
        return pa.table(dict(zip(columns, zip(*self._versions, strict=True), strict=True)))


def test_another_commit_of_a_repository_is_another_model() -> None:
    live = Listed(("a/same", "1"), ("a/changed", "1"), ("a/gone", "1"))
    candidate = Listed(("b/new", "1"), ("a/changed", "2"), ("a/same", "1"))
    assert added_versions(cast("Any", candidate), cast("Any", live)) == [("a/changed", "2"), ("b/new", "1")]


# Canaries


def hit(repo: str, logit: int = 0, label: str = "", sha: str = "1", negated: bool = False) -> Hit:
    return Hit(
        rank=1, repo=repo, sha=sha, url=f"https://hub/{repo}", logit=logit, label=label, score=0.0, confidence=0.5, distance=0.5,
        negated=negated, duplicates=0, head="softmax", library="timm", architecture="x", probes=[],
    )  # fmt: skip


def known(*repos: str, sha: str = "1", digests: dict[str, str] | None = None) -> KnownModels:
    versions = {(repo, sha): (digests or {}).get(repo) for repo in repos}
    return KnownModels(versions)


OLD = [f"old/{i}" for i in range(12)]
NEW = [f"new/{i}" for i in range(80)]


def lost(
    before: list[Hit], after: list[Hit], held: KnownModels, holds: KnownModels, asked: int = 60
) -> tuple[int, list[str]]:
    counted, gone = compare(before, after, asked, held, holds)
    return counted, [item.repo for item in gone]


def test_nothing_changed() -> None:
    answers = [hit(repo) for repo in OLD[:10]]
    assert lost(answers, answers, known(*OLD), known(*OLD), 10) == (10, [])


def test_an_answer_displaced_by_models_of_the_live_generation_is_lost() -> None:
    before, after = [hit(repo) for repo in OLD[:10]], [hit(repo) for repo in OLD[1:11]]
    assert lost(before, after, known(*OLD), known(*OLD), 10) == (10, ["old/0"])


def test_newer_models_push_down_without_loss() -> None:
    before = [hit(repo) for repo in OLD[:10]]
    after = [hit(repo) for repo in [*NEW[:30], *OLD]]
    assert lost(before, after, known(*OLD), known(*OLD, *NEW)) == (10, [])


def test_where_newer_models_leave_no_room_nothing_is_lost() -> None:
    before = [hit(repo) for repo in OLD[:10]]
    after = [hit(repo) for repo in [*NEW[:55], *OLD[:5]]]
    assert lost(before, after, known(*OLD), known(*OLD, *NEW)) == (5, [])


def test_removed_and_changed_models_do_not_count() -> None:
    before = [hit(repo) for repo in OLD[:10]]
    after = [hit(repo) for repo in OLD[2:12]]
    assert lost(before, after, known(*OLD), known(*OLD[2:]), 10) == (8, [])
    changed = [hit("old/0", sha="2"), *after[:9]]
    holds = KnownModels({**known(*OLD[1:]).versions, ("old/0", "2"): None})
    assert lost(before, changed, known(*OLD), holds) == (9, ["old/1"])


def test_a_copy_stands_for_its_original() -> None:
    """The original left, or is shown under another name."""
    digests = {"old/0": "same", "copy/0": "same"}
    before, after = [hit(repo) for repo in OLD[:10]], [hit(repo) for repo in ["copy/0", *OLD[1:10]]]
    held = known(*OLD, digests=digests)
    assert lost(before, after, held, known("copy/0", *OLD, digests=digests), 10) == (10, [])
    assert lost(before, after, held, known("copy/0", *OLD[1:], digests=digests), 10) == (10, [])


def test_other_logits_and_opposites_are_other_answers() -> None:
    before = [hit("old/0", 1), hit("old/1")]
    after = [hit("old/0", 2), hit("old/1", negated=True)]
    assert lost(before, after, known(*OLD), known(*OLD), 10) == (2, ["old/0", "old/1"])


def test_canaries_are_read(tmp_path: Path) -> None:
    file = tmp_path / "canaries.txt"
    file.write_text("# names\ndog\nhot dog\tanna/pets#3\n\ncat\tanna/pets#tom cat\n")
    expected = [Canary("dog"), Canary("hot dog", "anna/pets#3"), Canary("cat", "anna/pets#tom cat")]
    assert read_canaries(file) == expected
    assert read_canaries(["dog", "hot dog\tanna/pets#3", "cat\tanna/pets#tom cat"]) == expected
    assert read_canaries(["dog\tanna/draws"]) == [Canary("dog", "anna/draws")], "a generator"
    assert read_canaries(None) == []
    for line in ("dog\t#3", "dog\tanna/pets#", " \tanna/pets#3"):
        with pytest.raises(UsageError, match="write a name"):
            read_canaries([line])
    with pytest.raises(UsageError, match="cannot be read"):
        read_canaries(tmp_path / "none.txt")


def test_background_canaries() -> None:
    names = [f"name {i}" for i in range(1000)]
    chosen = background_canaries(names, 50)
    assert len(set(chosen)) == 50
    assert background_canaries(names[::-1], 50) == chosen
    assert len(background_canaries(names[:7], 50)) == 7


# Declared labels


def sampled(repo: str, *labels: str, weights: int = 0) -> Sampled:
    return Sampled(repo, "1", weights, None, "softmax", labels, 0, len(labels))


def test_names_are_those_that_two_logits_declare() -> None:
    models = [
        sampled("a", "dog", "cat", "LABEL_2", weights=0),
        sampled("b", "Dogs", "owl", "LABEL_2", weights=1),
        sampled("copy of a", "dog", "cat", "LABEL_2", weights=0),
        sampled("c", "fish", "Fish", weights=2),
    ]
    assert set(declared_names(models)) == {"dog", "fish"}
    assert len(declared_names(models, 1)) == 1


def test_agreement_looks_at_labels_that_name_something() -> None:
    lexicon = Lexicon()
    hits = [
        hit("a", label="LABEL_0"),
        hit("b", label="3"),
        hit("c", label="cat"),
        hit("d", label="Egyptian cat"),
    ]
    assert label_agreement("cat", hits, lexicon).top
    assert label_agreement("egyptian cat", hits, lexicon).top
    assert (label_agreement("dog", hits, lexicon).top, label_agreement("dog", hits, lexicon).ten) == (
        False,
        False,
    )
    eleventh = [*(hit(f"m{i}", label="owl") for i in range(10)), hit("c", label="cat")]
    assert not label_agreement("cat", eleventh, lexicon).ten
    assert label_agreement("cat", eleventh[1:], lexicon).ten
    assert not label_agreement("cat", [hit("a", label="cat", negated=True)], lexicon).ten
    assert label_agreement("cat", [], lexicon).shown == "nothing with a label"


def test_examples_are_the_models_that_fell_the_most() -> None:
    def naming(repo: str, right: int) -> NamingAgreement:
        return NamingAgreement(sampled(repo, "dog"), 4, right, f"{repo} is named otherwise")

    before = [naming("a", 2), naming("b", 4), naming("c", 1), naming("d", 3)]
    after = [naming("a", 2), naming("b", 3), naming("c", 2), naming("d", 0)]
    measured = _kept_models_measure(after, before, 0.1, "")
    assert measured.examples == ["d is named otherwise", "b is named otherwise"]
    assert (measured.value, measured.before) == (7 / 16, 10 / 16)
    assert measured.worse == least_paired_fall(1.0, 0.25, 4)


# Failures


def test_what_was_tried_was_indexed_or_failed() -> None:
    assert FailureCounts.of(3, {"gated": 2, "timeout": 1}) == FailureCounts(6, {"gated": 2, "timeout": 1})


def verdicts(run: FailureCounts, last: FailureCounts | None) -> dict[str, str]:
    return {measure.name: measure.verdict for measure in failure_measures(run, last, 0.1)}


def test_failures_that_rise() -> None:
    assert verdicts(
        FailureCounts(200, {"timeout": 110, "gated": 10}), FailureCounts(1000, {"gated": 50})
    ) == {
        "failed models": "failed",
        "failed: timeout": "failed",
        "failed: gated": "passed",
    }


def test_failures_are_measured_together_and_by_reason_the_most_frequent_first() -> None:
    run = FailureCounts(200, {"b": 3, "a": 3, "timeout": 50})
    measures = failure_measures(run, FailureCounts(100, {"gated": 5, "a": 1}), 0.1)
    assert [item.name for item in measures] == [
        "failed models", "failed: timeout", "failed: a", "failed: b", "failed: gated",
    ]  # fmt: skip
    assert [item.value for item in measures] == [56 / 200, 50 / 200, 3 / 200, 3 / 200, 0.0]
    assert [item.before for item in measures] == [0.06, 0.0, 0.01, 0.0, 0.05]
    assert measures[0].meaning.startswith("Share of the models tried that failed, and by how much")
    assert "that failed with timeout, and" in measures[1].meaning
    assert list(measures[1].examples) == ["50 of 200 models, 0 of 100 in the last run"]
    assert measures[1].worse == least_rise(50, 200, 0, 100)
    for item in failure_measures(run, None, 0.1) + failure_measures(run, FailureCounts(0), 0.1):
        assert (item.worse, item.note, item.examples) == (None, "no run to compare with", [])
    assert failure_measures(FailureCounts(0), None, 0.1)[0].value is None


def test_failures_of_few_models_or_of_a_first_run() -> None:
    last = FailureCounts(1000, {"gated": 50})
    assert set(verdicts(FailureCounts(19, {"timeout": 19}), last).values()) == {"not judged"}
    assert set(verdicts(FailureCounts(20, {"timeout": 4, "gated": 2}), last).values()) == {"passed"}
    assert set(verdicts(FailureCounts(100, {"timeout": 60}), None).values()) == {"not judged"}
    assert set(verdicts(FailureCounts(0), last).values()) == {"not judged"}
    settings = some_settings(
        models=1,
        logits=1,
        sharpness=1.0,
        rows=1,
        large=False,
        middle_offset=0.0,
        probes=1,
        run=last.to_dict(),
    )
    assert FailureCounts.of_settings(settings) == last


# Reports


def verdict(name: str, *measures: Measure) -> Verdict:
    return Verdict(name, "before", True, measures, "2026-01-01T00:00:00+00:00", 1.5)


GOOD = Measure("good", "meaning", 0.5, 0.1, 0.2, 0.2, 7)
BAD = Measure("m", "meaning", 0.5, 0.1, 0.3, 0.2, 7, "note", ["<script>alert(1)</script>\x1b[31m"])


def test_a_page_escapes_untrusted_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    page = store.read(write_report(store, verdict("<b>first</b>".replace("/", ""), BAD))).decode()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "\x1b" not in page
    assert "<b>" not in page
    assert "not published" in page


def test_the_newest_reports_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert last_report(store) is None
    for number in range(33):
        write_report(store, verdict(f"{number:03}", BAD))
    names = set(store.names("quality"))
    assert names == {f"quality/{number:03}.{kind}" for number in range(3, 33) for kind in ("json", "html")}
    newest = last_report(store)
    assert newest is not None
    assert (newest["generation"], newest["passed"], newest["refused"]) == ("032", False, True)
    assert (newest["version"], newest["enforced"], newest["seconds"], newest["note"]) == (1, True, 1.5, "")
    (measure,) = newest["measures"]
    assert (measure["name"], measure["worse"], measure["passed"], measure["verdict"]) == (
        "m",
        0.3,
        False,
        "failed",
    )


def test_the_newest_report_is_the_last_one_written_whatever_its_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, name in enumerate(("b", "c", "a")):
        write_report(store, verdict(name, BAD))
        for file in (tmp_path / "quality").glob(f"{name}.*"):
            os.utime(file, (number + 1, number + 1))
    newest = last_report(store)
    assert newest is not None
    assert newest["generation"] == "a"
    store.write_json("quality/a.json", {**newest, "version": 2})
    with pytest.raises(SchemaVersionError, match="quality report version 2 is newer"):
        last_report(store)


def test_every_report_has_its_page_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a publish is killed: `verify` looks for the page of every report."""
    monkeypatch.setattr(report, "KEPT", 2)
    steps: list[str] = []

    def watched(name: str) -> None:
        real = getattr(Store, name)

        def step(self: Store, *given: Any) -> Any:
            done = real(self, *given)
            names = set(self.names("quality"))
            assert {report.page_of(item) for item in names if item.endswith(".json")} <= names
            steps.append(name)
            return done

        monkeypatch.setattr(Store, name, step)

    for name in ("write", "delete"):
        watched(name)
    for number in range(4):
        write_report(Store(tmp_path), verdict(f"{number}", BAD))
    assert (steps.count("write"), steps.count("delete")) == (8, 4)


def test_a_report_names_its_page_by_size_and_digest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = write_report(store, verdict("x", BAD))
    page = store.read(name)
    assert store.read_json("quality/x.json")["page"] == {"size": len(page), "sha256": digest(page)}
    assert "50.0" in page.decode()
    assert "10.0" in page.decode()


@pytest.mark.parametrize(("worse", "enforced", "refused"), [(0.2, True, False), (0.3, True, True), (0.3, False, False), (None, True, False)])  # fmt: skip
def test_a_verdict_refuses_what_exceeds_a_limit_that_is_enforced(
    worse: float | None, enforced: bool, refused: bool
) -> None:
    one = Verdict("x", None, enforced, [GOOD, replace(BAD, worse=worse)], "2026-01-01T00:00:00+00:00", 0.0)
    assert one.refused == refused
    assert one.passed == (worse != 0.3)
    assert one.to_dict()["refused"] == refused
