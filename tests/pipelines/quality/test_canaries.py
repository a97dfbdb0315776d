"""The gate's measures over two small generations, of which one was mixed up: what is counted, and by what names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.model import Quality
from pipelines.labels.labels import imagenet_lexicon
from pipelines.quality import agreement
from pipelines.quality.agreement import Meanings, declared_measures, named_measures, naming_agreement
from pipelines.quality.canaries import (
    Canary,
    background_canaries,
    first,
    known_answers,
    lost_answers,
    removed_measure,
)
from pipelines.quality.failures import FailureCounts
from pipelines.quality.gate import changed_settings, measure, run_quality_gate
from pipelines.quality.measure import Measure, least_paired_fall, least_rise, wilson
from pipelines.quality.report import last_report
from pipelines.quality.samples import Version, added_versions, draw, rows_of, sampled_models
from probelog.errors import QualityError, StoreError
from probelog.index.generation import Generation
from probelog.search.results import Hit
from probelog.storage.store import Store
from tests.support.worlds.named_world import NAMES, generation, recognised, some_models
from tests.support.worlds.small_index import build

MODELS = some_models(30)
NEW = some_models(6, seed=1, owner="new")


@dataclass(frozen=True)
class Pair:
    live: Generation
    same: Generation
    mixed: Generation
    """The second half of the models recognise what others declare, the first five are missing, some are new."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    index = Store(tmp_path_factory.mktemp("pair") / "index")
    others = {model.repo: MODELS[29 - i] if i >= 15 else model for i, model in enumerate([*MODELS])}

    def mixed(model, space, encoder):  # type: ignore[no-untyped-def]
        return recognised(others.get(model.repo, model), space, encoder)

    return Pair(
        generation(index, "live", MODELS, live=True),
        generation(index, "same", MODELS),
        generation(index, "mixed", [*MODELS[5:], *NEW], describe=mixed),
    )


def test_samples_are_drawn_by_hash(pair: Pair) -> None:
    repos = [model.repo for model in MODELS]
    assert [row.repo for row in sampled_models(pair.live, 1000)] == sorted(repos)
    for count in (3, 7, 14, 15, 29):
        assert [row.repo for row in sampled_models(pair.live, count)] == sorted(draw(repos, count))
    (row,) = rows_of(pair.live, ["old/it's", "old/\x00", "nobody/there", repos[4]])
    model = MODELS[4]
    assert (row.version, row.labels, row.rows) == ((model.repo, model.sha), list(model.labels), 4)
    assert (row.weight_digest, row.weights, row.first_row) == (model.digest, 4, 16)
    removed = {(model.repo, model.sha) for model in MODELS[:5]}
    assert added_versions(pair.live, pair.mixed) == sorted(removed)
    assert added_versions(pair.mixed, pair.live) == sorted((model.repo, model.sha) for model in NEW)


# Lost answers


def lost_between(live: Generation, candidate: Generation, *names: str, unlike: str = "") -> Measure:
    return lost_answers(candidate, live, [Canary(name) for name in names], 0.1, unlike)


def kept_by_hand(pair: Pair, name: str) -> tuple[int, int]:
    """Of the live first ten those that count, and those that are lost, where nothing is a copy of anything."""
    old = {model.repo for model in MODELS[5:]}
    before = [(hit.repo, hit.logit) for hit in first(pair.live, name, 10)]
    after = [(hit.repo, hit.logit) for hit in first(pair.mixed, name, 60) if hit.repo in old][:10]
    counted = [key for key in before if key[0] in old]
    return len(counted), len([key for key in counted if key not in after])


def test_lost_answers_are_those_that_others_of_old_took_the_place_of(pair: Pair) -> None:
    for name in ("owl", "anchor", "camel"):
        counted, lost = kept_by_hand(pair, name)
        result = lost_between(pair.live, pair.mixed, name)
        assert (result.counted, result.value) == (counted, lost / counted)
    names = NAMES[:12]
    by_hand = [kept_by_hand(pair, name) for name in names]
    result = lost_between(pair.live, pair.mixed, *names, names[0])
    counted, lost = (sum(column) for column in zip(*by_hand, strict=True))
    assert (result.counted, result.value) == (counted, lost / counted), (
        "a name that is given twice counts once"
    )
    assert result.worse == result.value
    assert result.counted >= 50
    worst = sorted(zip(names, by_hand, strict=True), key=lambda item: (-item[1][1], item[0]))[:8]
    shown = [example.split(":")[0] for example in result.examples]
    assert shown == [name for name, (_, lost) in worst if lost]
    assert f"lost {worst[0][1][1]} of {worst[0][1][0]}: " in result.examples[0]


def test_few_answers_and_other_settings_are_not_judged(pair: Pair) -> None:
    assert lost_between(pair.live, pair.same, *NAMES[:5]).worse == 0.0
    few = lost_between(pair.live, pair.same, *NAMES[:4])
    assert (few.worse, few.value, few.note) == (
        None,
        0.0,
        "not judged: 40 answers can be compared, 50 are needed",
    )
    other = lost_between(pair.live, pair.mixed, *NAMES[:9], unlike="fraction")
    assert other.worse is None
    assert other.value is not None
    assert other.note == "not judged: made with other settings (fraction)"
    none = lost_answers(pair.same, None, [Canary("owl")], 0.1, "")
    assert (none.value, none.counted, none.note) == (None, 0, "there is no live generation to compare with")
    assert lost_between(pair.live, pair.same).value is None


# Known answers


def test_known_answers_are_looked_for_in_both_generations(pair: Pair) -> None:
    moved, stayed, missing = MODELS[20], MODELS[8], MODELS[0]
    hits = [(hit.repo, hit.logit) for hit in first(pair.mixed, moved.labels[0], 10)]
    assert (moved.repo, 0) not in hits
    canaries = [
        Canary(moved.labels[0], f"{moved.repo}#0"),
        Canary(stayed.labels[1], f"{stayed.repo}#{stayed.labels[1].upper()}"),
        Canary(missing.labels[0], f"{missing.repo}#0"),
        Canary("owl"),
    ]
    result = known_answers(pair.mixed, pair.live, canaries, 0.2)
    assert (result.value, result.before, result.counted, result.worse) == (0.5, 0.0, 2, 0.5)
    assert list(result.examples) == [f"{moved.labels[0]}: {moved.repo}#0"]
    assert result.note == f"not in the index, so not queried: {missing.repo}#0"
    assert not result.passed
    assert known_answers(pair.live, None, canaries, 0.2).before is None
    wrong = [Canary(stayed.labels[1], f"{stayed.repo}#{place}") for place in ("0", "9", "no such label")]
    assert known_answers(pair.mixed, pair.live, wrong, 0.2).value == 1.0
    nothing = known_answers(pair.mixed, pair.live, [Canary("owl")], 0.2)
    assert (nothing.value, nothing.worse, nothing.counted) == (None, None, 0)
    assert nothing.note == "no canary with a known answer"


# Gone


def test_models_that_are_gone_are_counted(pair: Pair) -> None:
    result = removed_measure(pair.mixed, pair.live, 0.1)
    assert (result.value, result.counted) == (5 / 30, 30)
    assert result.worse == wilson(5, 30)[0]
    assert set(result.examples) == {model.repo for model in MODELS[:5]}
    assert removed_measure(pair.same, pair.live, 0.1).value == 0
    assert removed_measure(pair.same, None, 0.1).note == "there is no live generation to compare with"


# Declared labels


def test_the_first_answers_to_declared_names(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    top, ten = declared_measures(pair.mixed, pair.live, 0.1)
    assert (top.name, ten.name) == ("declared, first answer", "declared, first ten answers")
    # Names that only models that left declare are not asked.
    shared = [label for model in MODELS[5:] for label in model.labels]
    names = sorted({label for label in shared if shared.count(label) > 1})
    before, after = (
        [means(name, first(which, name, 10)[:1]) for name in names] for which in (pair.live, pair.mixed)
    )
    assert (top.counted, top.before, top.value) == (len(names), np.mean(before), np.mean(after))
    assert top.value < 0.9 < top.before
    assert (ten.before, ten.value) == (
        1.0,
        np.mean([means(name, first(pair.mixed, name, 10)) for name in names]),
    )
    lost = sum(was and not is_ for was, is_ in zip(before, after, strict=True))
    assert top.worse == least_paired_fall(lost, lost - sum(before) + sum(after), len(names))
    assert len(top.examples) == min(lost, 8)
    assert " first was " in top.examples[0]
    alone = declared_measures(pair.live, None, 0.1)[0]
    assert (alone.before, alone.worse) == (None, None)
    assert alone.value is not None
    assert alone.value > 0.9
    monkeypatch.setattr(agreement, "names_in", lambda _: [])
    none = declared_measures(pair.mixed, pair.live, 0.1)[0]
    assert (none.value, none.before, none.counted) == (None, None, 0)
    assert none.note == "no name is declared by two logits of the models sampled"


def same(one: str, other: str) -> bool:
    lexicon = imagenet_lexicon()
    return lexicon.meaning([one]).matches(lexicon.meaning([other]))


def means(name: str, hits: list[Hit]) -> bool:
    """Whether one of some answers is declared as what was asked for."""
    return any(same(name, hit.label) for hit in hits)


def by_hand(which: Generation, repo: str) -> tuple[int, int]:
    """How many of a model's logits can be judged, and how many are named as they are declared."""
    row = which.model(repo)
    logits = which.logits(np.arange(row["first_row"], row["first_row"] + row["rows"]))
    named, _ = which.names(logits, 10)
    labels = row["labels"]
    judged = [
        place for place, label in enumerate(labels) if any(same(label, name) for name in which.background)
    ]
    return len(judged), sum(any(same(labels[place], name) for name in named[place]) for place in judged)


def test_a_models_logits_are_named_from_the_background(pair: Pair) -> None:
    known = Meanings(pair.mixed.background, imagenet_lexicon())
    seen = 0
    for model in sampled_models(pair.mixed, 100):
        judged, right = by_hand(pair.mixed, model.repo)
        result = naming_agreement(pair.mixed, model, known)
        if not judged:
            assert result is None
            continue
        assert result is not None
        assert (result.judged, result.right) == (judged, right)
        assert bool(result.example) == (right < judged)
        seen += right < judged
    assert seen > 3
    unlabelled = replace(sampled_models(pair.mixed, 100)[0], labels=[])
    assert naming_agreement(pair.mixed, unlabelled, known) is None


def test_models_of_both_generations_and_new_ones_count_as_one_each(pair: Pair) -> None:
    added: list[Version] = [(model.repo, model.sha) for model in NEW]
    kept, new = named_measures(pair.mixed, pair.live, added, 0.1, 0.2)

    def share(which: Generation, repo: str) -> float | None:
        judged, right = by_hand(which, repo)
        return right / judged if judged else None

    pairs = [(share(pair.live, model.repo), share(pair.mixed, model.repo)) for model in MODELS[5:]]
    judged = [(before, after) for before, after in pairs if before is not None and after is not None]
    assert kept.counted == len(judged)
    assert kept.before == pytest.approx(np.mean([before for before, _ in judged]))
    assert kept.value == pytest.approx(np.mean([after for _, after in judged]))
    lost = sum(max(0.0, before - after) for before, after in judged)
    gained = sum(max(0.0, after - before) for before, after in judged)
    assert kept.worse == pytest.approx(least_paired_fall(lost, gained, len(judged)))
    assert len(kept.examples) == min(8, len([1 for before, after in judged if before > after]))
    assert (kept.limit, new.limit) == (0.1, 0.2)
    shares = [value for model in NEW if (value := share(pair.mixed, model.repo)) is not None]
    assert (new.counted, new.value) == (len(shares), pytest.approx(np.mean(shares)))
    assert new.before == kept.value
    some = named_measures(pair.mixed, pair.live, added[:2], 0.1, 0.2)[1]
    assert some.counted == len([1 for model in NEW[:2] if share(pair.mixed, model.repo) is not None])
    alone, nothing = named_measures(pair.live, None, [], 0.1, 0.2)
    assert (alone.before, alone.worse, nothing.counted, nothing.worse) == (None, None, 0, None)
    assert alone.value is not None
    assert alone.note == "there is no live generation to compare with"
    assert nothing.note == "there is no live generation: all models are new"


def test_labels_that_are_lost_count_as_named_otherwise(pair: Pair, tmp_path: Path) -> None:
    nameless = {model.repo: replace(model, labels=("LABEL_0",) * 4) for model in MODELS[:8]}

    def as_before(model, space, encoder):  # type: ignore[no-untyped-def]
        (declared,) = [other for other in MODELS if other.repo == model.repo]
        return recognised(declared, space, encoder)

    models = [nameless.get(model.repo, model) for model in MODELS]
    candidate = generation(Store(tmp_path), "nameless", models, describe=as_before)
    kept, _ = named_measures(candidate, pair.live, [], 0.1, 0.2)
    lost = [model.repo for model in MODELS[:8] if by_hand(pair.live, model.repo)[0]]
    assert kept.counted == named_measures(pair.same, pair.live, [], 0.1, 0.2)[0].counted
    assert kept.before is not None
    assert kept.value == pytest.approx(kept.before * (1 - len(lost) / kept.counted), abs=0.05)
    assert set(kept.examples) == {f"{repo} declares nothing any more" for repo in lost}


def test_so_many_models_and_each_weights_once_are_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_NAMED_MODELS", 3)
    kept, _ = named_measures(pair.same, pair.live, [], 0.1, 0.2)
    assert kept.counted == 3


# The gate


USUAL = FailureCounts(100, {"gated": 3})
BAD = FailureCounts(100, {"timeout": 60, "gated": 3})
LIMITS: dict[str, Any] = {
    "max_lost": 0.11,
    "max_known_missed": 0.12,
    "max_agreement_fall": 0.13,
    "max_new_agreement_fall": 0.14,
    "max_gone": 0.15,
    "max_failure_rise": 0.16,
}


def test_every_measure_has_its_own_limit(pair: Pair) -> None:
    canaries = [f"{MODELS[8].labels[0]}\t{MODELS[8].repo}#0", "camel"]
    quality = Quality(**LIMITS, canaries=canaries, background_canaries=7)
    measures = measure(pair.mixed, pair.live, BAD, USUAL, quality)
    assert [(item.name, item.limit) for item in measures] == [
        ("lost answers", 0.11),
        ("known answers missed", 0.12),
        ("declared, first answer", 0.13),
        ("declared, first ten answers", 0.13),
        ("models named as declared", 0.13),
        ("new models named as declared", 0.14),
        ("models gone", 0.15),
        ("failed models", 0.16),
        ("failed: timeout", 0.16),
        ("failed: gated", 0.16),
    ]
    asked_names = [canary.name for canary in background_canaries(pair.mixed.background, 7)]
    names = {MODELS[8].labels[0], "camel", *asked_names}
    assert measures[0].counted == sum(kept_by_hand(pair, name)[0] for name in names)
    assert measures[5].counted > 0, "what is new is result by comparing"
    assert measure(pair.mixed, pair.live, BAD, USUAL, quality, [])[5].counted == 0
    assert measure(pair.mixed, None, BAD, None, quality)[5].counted == 0


def test_other_settings_are_named(pair: Pair, tmp_path: Path) -> None:
    assert changed_settings(pair.same, pair.live) == []
    other = generation(
        Store(tmp_path),
        "other",
        MODELS[:2],
        settings={"fraction": 0.5, "seed": 9, "rank": 7, "listed": "2027"},
    )
    assert changed_settings(other, pair.live) == ["fraction", "seed"]
    names = build(Store(tmp_path), "names", MODELS[:2], images=False, live=False, names=NAMES[1::2])
    assert changed_settings(Generation(names.store, names.pointer), pair.live) == ["background"]


def test_the_gate_refuses_what_is_worse_and_says_how_much(pair: Pair, tmp_path: Path) -> None:
    store = Store(tmp_path)
    strict, lenient = Quality(**LIMITS), Quality(**LIMITS, enforce=False)
    with pytest.raises(QualityError) as refused:
        run_quality_gate(store, pair.mixed, pair.live, BAD, USUAL, strict)
    lines = str(refused.value).splitlines()
    assert lines[0] == "generation mixed was not published: it exceeds the limits of the quality gate"
    assert lines[-2] == f"The report is {store.path('quality/mixed.html')}"
    worse = least_rise(60, 100, 0, 100)
    assert f"  - failed: timeout: 60.0% (before: 0.0%), worse by at least {worse:.1%}, limit 16.0%" in lines
    report = last_report(store)
    assert report is not None
    failed = {item["name"] for item in report["measures"] if not item["passed"]}
    assert {"lost answers", "failed models", "failed: timeout"} <= failed
    assert len([line for line in lines if line.startswith("  - ")]) == len(failed)
    assert (report["generation"], report["live"], report["refused"], report["note"]) == (
        "mixed",
        "live",
        True,
        "",
    )
    verdict = run_quality_gate(store, pair.mixed, pair.live, BAD, USUAL, lenient)
    assert (verdict.passed, verdict.refused, {item.name for item in verdict.failed}) == (False, False, failed)
    sound = run_quality_gate(store, pair.same, pair.live, USUAL, USUAL, strict)
    assert (sound.passed, sound.generation, sound.live, sound.enforced) == (True, "same", "live", True)
    assert 0 <= sound.seconds < 600


def test_a_live_generation_that_cannot_be_asked(pair: Pair, tmp_path: Path) -> None:
    store = Store(tmp_path)
    index = store.child("index")
    live = generation(index, "live", MODELS[:4], live=True)
    candidate = generation(index, "candidate", MODELS[:4])
    index.delete_folder("generations/live/logits.lance")
    with pytest.raises(StoreError, match="cannot be read"):
        run_quality_gate(store, candidate, live, USUAL, USUAL, Quality())
    verdict = run_quality_gate(store, candidate, live, USUAL, BAD, Quality(enforce=False))
    assert verdict.live is None
    assert verdict.note.startswith("The live generation live could not be compared with: ")
    assert next(item for item in verdict.measures if item.name == "failed models").before == 0.63
    index.delete_folder("generations/candidate/logits.lance")
    broken = Generation(index, candidate.pointer)
    for enforce in (True, False):
        with pytest.raises(StoreError, match="cannot be read"):
            run_quality_gate(store, broken, None, USUAL, None, Quality(enforce=enforce))
