"""The quality gate over real indexes: ordinary updates pass, damaging ones are refused, and the report says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.model import Quality
from pipelines.quality.failures import FailureCounts
from pipelines.quality.gate import changed_settings, run_quality_gate
from pipelines.quality.report import Verdict
from pipelines.quality.samples import added_versions, draw, rows_of, sampled_models
from probelog.errors import QualityError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import read_pointer
from probelog.storage.store import Store
from tests.benchmarks.gate import WAYS, trial
from tests.support.processes.operator_command import operator
from tests.support.worlds.named_world import NAMES, Directions, generation, recognised, some_models
from tests.support.worlds.small_index import Model
from tests.support.worlds.tiny_world import Indexed

LABELS = {"declared, first answer", "declared, first ten answers", "models named as declared"}
USUAL = FailureCounts(100, {"gated": 3, "timeout": 2})
OLD = some_models(70)
NEW = some_models(40, seed=1, owner="new")


@dataclass(frozen=True)
class GateWorld:
    """A store with a live generation, in which another one is built."""

    store: Store
    live: Generation

    def build(self, name: str, models: list[Model], **given: Any) -> Generation:
        return generation(self.store.child("index"), name, models, **given)

    def gate(self, candidate: Generation, run: FailureCounts = USUAL, **limits: Any) -> Verdict:
        return run_quality_gate(self.store, candidate, self.live, run, USUAL, Quality(**limits))

    def refused(
        self, candidate: Generation, run: FailureCounts = USUAL, **limits: Any
    ) -> tuple[set[str], str, str]:
        """Which measures failed; the error's message; the page."""
        with pytest.raises(QualityError) as error:
            self.gate(candidate, run, **limits)
        assert error.value.exit_status == 3
        name = candidate.pointer.generation
        report = self.store.read_json(f"quality/{name}.json")
        assert (report["passed"], report["refused"]) == (False, True)
        assert read_pointer(self.store.child("index"))[0].generation == self.live.pointer.generation
        page = self.store.read(f"quality/{name}.html").decode()
        assert "not published" in page
        return {item["name"] for item in report["measures"] if not item["passed"]}, str(error.value), page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> GateWorld:
    store = Store(tmp_path_factory.mktemp("night"))
    return GateWorld(store, generation(store.child("index"), "live", OLD, live=True))


def test_an_ordinary_nightly_run_passes(world: GateWorld) -> None:
    """A good half as many models again, one that left, one that changed, one copy that takes its original's place."""
    copy = Model("a/copy", OLD[5].labels, weights=OLD[5].digest)
    models = [copy, *OLD[1:], *NEW]
    candidate = world.build("honest", models, describe=like_the_original)
    verdict = world.gate(candidate)
    assert verdict.passed
    judged = {measure.name: measure for measure in verdict.measures if measure.worse is not None}
    assert {
        "lost answers",
        "declared, first answer",
        *LABELS,
        "new models named as declared",
        "models gone",
    } <= set(judged)
    assert judged["lost answers"].counted > 200
    assert judged["declared, first answer"].value == pytest.approx(1, abs=0.05)
    assert judged["new models named as declared"].value == pytest.approx(1, abs=0.05)
    assert world.store.read_json("quality/honest.json")["passed"]
    assert "good enough" in world.store.read("quality/honest.html").decode()


def like_the_original(model: Model, space: Any, encoder: Any) -> Directions:
    return recognised(OLD[5] if model.repo == "a/copy" else model, space, encoder)


def describes(others: dict[str, Model]) -> Callable[[Model, Any, Any], Directions]:
    """Logits recognise what another model, by repository, declares."""
    return lambda model, space, encoder: recognised(others[model.repo], space, encoder)


def test_rows_mixed_up_among_models(world: GateWorld) -> None:
    others = np.random.default_rng(0).permutation(len(OLD))
    mixed = {model.repo: OLD[other] for model, other in zip(OLD, others, strict=True)}
    candidate = world.build("mixed", OLD, describe=describes(mixed))
    failed, told, page = world.refused(candidate)
    assert failed == {"lost answers", *LABELS}
    assert "lost answers: 9" in told
    assert "first was old/model-" in page


def test_labels_shuffled(world: GateWorld) -> None:
    every = np.random.default_rng(0).permutation([label for model in OLD for label in model.labels])
    labels = iter(every.tolist())
    models = [replace(model, labels=tuple(next(labels) for _ in model.labels)) for model in OLD]
    candidate = world.build("labels", models, describe=describes({model.repo: model for model in OLD}))
    failed, _, _ = world.refused(candidate)
    assert failed == LABELS


def test_labels_lost(world: GateWorld) -> None:
    nameless = [replace(model, labels=tuple(f"LABEL_{i}" for i in range(4))) for model in OLD]
    candidate = world.build("nameless", nameless, describe=describes({model.repo: model for model in OLD}))
    assert world.refused(candidate)[0] == LABELS


def test_most_models_stop_answering(world: GateWorld) -> None:
    """They are listed, but taken for copies of one of them."""
    models = [replace(model, weights="one") if i % 4 else model for i, model in enumerate(OLD)]
    failed, _, page = world.refused(world.build("folded", models))
    assert "lost answers" in failed
    assert "models gone" not in failed
    assert "lost answers" in page


def test_most_models_are_removed_at_once(world: GateWorld) -> None:
    """No answer is lost but by models that left."""
    failed, told, _ = world.refused(world.build("halved", OLD[:30]))
    assert failed == {"models gone"}
    assert "models gone: 57.1%" in told


def test_new_models_come_out_wrong(world: GateWorld) -> None:
    def wrong(model: Model, space: Any, encoder: Any) -> Directions:
        exact = recognised(model, space, encoder)
        return exact if model.repo.startswith("old") else -exact

    failed, _, page = world.refused(world.build("wrong", [*OLD, *NEW], describe=wrong))
    assert failed == {"new models named as declared"}
    assert "is named" in page


def test_failures_rise(world: GateWorld) -> None:
    candidate = world.build("failing", OLD)
    failed, told, page = world.refused(candidate, FailureCounts(100, {"timeout": 57, "gated": 3}))
    assert failed == {"failed models", "failed: timeout"}
    assert "failed: timeout: 57.0% (before: 2.0%)" in told
    assert "57 of 100 models, 2 of 100 in the last run" in page
    assert world.gate(candidate, FailureCounts(100, {"timeout": 6, "gated": 3})).passed
    let = world.gate(candidate, FailureCounts(100, {"timeout": 57}), enforce=False)
    assert not let.passed
    assert "let through" in world.store.read("quality/failing.html").decode()


def test_other_settings_change_answers_and_are_no_damage(world: GateWorld) -> None:
    """Here with another share of the probes; the declared labels still judge."""
    opposite = {model.repo: other for model, other in zip(OLD, OLD[1:] + OLD[:1], strict=True)}
    candidate = world.build("settings", OLD, describe=describes(opposite), settings={"fraction": 0.5})
    failed, _, page = world.refused(candidate)
    assert "lost answers" not in failed
    assert "declared, first answer" in failed
    assert "made with other settings (fraction)" in page


def test_a_hubs_background_may_change_a_little(world: GateWorld) -> None:
    """A full run makes it anew: a few other names leave the answers to be judged, many others do not."""
    names, hub = NAMES[::2], {"background_source": "hub"}
    assert len(names) > 20
    live = world.build("hub-live", OLD, settings=hub, names=names)
    for number, (left_out, source, changed) in enumerate(
        [(1, "hub", []), (len(names) // 2, "hub", ["background"]), (1, "file", ["background"])]
    ):
        candidate = world.build(
            f"hub-{number}", OLD, settings={"background_source": source}, names=names[left_out:]
        )
        assert changed_settings(candidate, live) == changed


def test_an_operators_canaries(world: GateWorld, tmp_path: Path) -> None:
    candidate = world.build("canaries", OLD)
    holder = next(model for model in OLD if "owl" in model.labels)
    number = holder.labels.index("owl")
    other = next(model for model in OLD if "owl" not in model.labels)
    right = [f"owl\t{holder.repo}#{number}", f"owl\t{holder.repo}#Owl", "owl\tnobody/there#0", "fox"]
    verdict = world.gate(candidate, canaries=right)
    known = next(measure for measure in verdict.measures if measure.name == "known answers missed")
    assert (known.value, known.counted) == (0, 2)
    assert "nobody/there#0" in known.note
    file = tmp_path / "canaries.txt"
    file.write_text("\n".join([*right, f"owl\t{other.repo}#0"]))
    failed, told, _ = world.refused(candidate, canaries=file)
    assert failed == {"known answers missed"}
    assert f"owl: {other.repo}#0" in told
    assert world.gate(candidate, canaries=file, max_known_missed=0.5).passed


def test_the_first_generation_is_compared_with_nothing(world: GateWorld) -> None:
    verdict = run_quality_gate(world.store, world.live, None, USUAL, None, Quality())
    assert verdict.passed
    assert {measure.verdict for measure in verdict.measures} == {"not judged"}
    declared = next(item for item in verdict.measures if item.name == "declared, first answer")
    assert declared.value == pytest.approx(1, abs=0.05)


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    """Every label is markup too."""
    store = Store(tmp_path)
    hostile = "<img src=x onerror=alert(1)>\x1b[2J"
    names = {f"<b>/model-{i}": model for i, model in enumerate(OLD)}
    models = [
        replace(m, repo=repo, labels=tuple(f"{label}, {hostile}" for label in m.labels))
        for repo, m in names.items()
    ]
    mixed = dict(zip(names, OLD[1:] + OLD[:1], strict=True))
    index = store.child("index")
    live = generation(index, "live", models, live=True, describe=describes(names))
    world = GateWorld(store, live)
    _, told, page = world.refused(world.build("mixed", models, describe=describes(mixed)))
    assert hostile[:10] in told, "the command line makes it printable (probelog.terminal)"
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert not any(text in page for text in ("<img", "<b>", "\x1b"))


def test_a_live_generation_that_is_damaged(world: GateWorld, tmp_path: Path) -> None:
    store = Store(shutil.copytree(world.store.root, tmp_path / "store"))
    index = store.child("index")
    for file in Path(index.path("generations/live/logits.lance/data")).iterdir():
        file.write_bytes(b"x")
    damaged = GateWorld(store, Generation(index, world.live.pointer))
    candidate = damaged.build("after", OLD)
    with pytest.raises(StoreError, match="cannot be read"):
        damaged.gate(candidate)
    verdict = damaged.gate(candidate, enforce=False)
    assert verdict.live is None
    assert "could not be compared with" in verdict.note


def test_samples_are_drawn_by_hash(world: GateWorld) -> None:
    repos = [model.repo for model in OLD]
    assert {row.repo for row in sampled_models(world.live, 1000)} == set(repos)
    assert [row.repo for row in sampled_models(world.live, 5)] == sorted(draw(repos, 5))
    assert rows_of(world.live, ["old/it's", "old/\x00", "nobody/there"]) == []
    assert added_versions(world.live, world.live) == []
    assert set(world.live.background) <= set(NAMES)


@pytest.mark.parametrize(("way", "share"), [(WAYS[0], 0.0), *((way, 0.8) for way in WAYS)])
def test_the_benchmark(world: GateWorld, way: str, share: float) -> None:
    """Nothing is spoilt in three ways alike."""
    assert (trial(world.live, way, share, 0)["refused by"] != "") == (share > 0)


# The operator's command


def test_the_command_refuses_with_status_3(indexed: Indexed, tmp_path: Path) -> None:
    """A known answer that is not found: nothing goes live, and everything is there to be looked at."""
    store = Store(indexed.copy_store(tmp_path / "store"))
    # Of names that random weights do not recognise, a logit that is declared a boat is not among ten for all.
    wrong = [f"{name}\tbob/many-labels#{logit}" for name in ("dog", "chair", "violin") for logit in range(5)]
    file = indexed.world.config_file(
        tmp_path / "job.toml", store.root, background_count=23, quality={"canaries": wrong}
    )
    before = read_pointer(store.child("index"))[0]
    built = set(store.names("index/generations"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", indexed.endpoint)
        ended = operator("publish", "--config", file)
        assert ended.status == 3
        assert "was not published" in ended.err
        assert "known answers missed" in ended.err
        assert "--set quality.enforce=false" in ended.err
        assert read_pointer(store.child("index"))[0] == before
        assert set(store.names("index/generations")) == built, "what was built is removed"
        status = json.loads(operator("status", "--store", store.root, "--json").out)["quality"]
        assert (status["passed"], status["refused"], status["failed"]) == (
            False,
            True,
            ["known answers missed"],
        )
        assert store.exists(status["page"])
        assert "was refused (known answers missed)" in operator("status", "--store", store.root).out
        assert operator("verify", "--store", store.root).status == 0

        assert operator("publish", "--config", file, "--set", "quality.enforce=false").status == 0
    after = read_pointer(store.child("index"))[0]
    assert after.generation != before.generation
    assert "was let through" in operator("status", "--store", store.root).out
    settings = Generation(store.child("index"), after).settings
    assert FailureCounts.of_settings(settings) == FailureCounts(len(indexed.run.catalogue.rows()))
