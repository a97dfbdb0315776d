"""An index of generators alone: from a hub without classifiers to answers, nightly runs, and the first classifier."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.forecast.run import run_plan
from pipelines.full import FullRun, run_full, run_publish
from pipelines.inspect.dry_run import full_lines, nightly_lines
from pipelines.inspect.verify import verify
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly.run import run_nightly
from probelog.publication.lifecycle import roll_back
from probelog.search.client import open_index
from probelog.storage.layout import INDEX
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.worlds import tiny_generators
from tests.support.worlds.tiny_world import TinyWorld

pytestmark = pytest.mark.acceptance  # it takes seconds to import the libraries


@dataclass(frozen=True)
class World:
    """A hub of two generators and an adapter of one, without classifiers, and where a store is made of it."""

    root: Path
    tiny: TinyWorld
    hub: FaultyHub

    @property
    def store(self) -> Path:
        return self.root / "store"

    def job(self, **changes: Any) -> Job:
        settings = {
            "workers": 1,
            "scratch": str(self.root / "scratch"),
            "background": "hub",
            "nightly": {"reconcile_days": 0},
            **changes,
            "generators": {"enabled": True, "samples": 5, "max_samples": 5, "steps": 2},
        }
        return Job.of(self.tiny.config(self.store, **settings), Report(io.StringIO()))

    def add(self, repo: str, **facts: Any) -> None:
        file = self.root / "hub/hub.json"
        task = "unconditional-image-generation"
        entry = {"id": repo, "library": "diffusers", "pipeline_tag": task, **facts}
        file.write_text(json.dumps([*json.loads(file.read_text()), entry]))


@pytest.fixture(scope="module")
def world(
    tiny_world: TinyWorld, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("alone")
    hub = root / "hub"
    tiny_generators.decoder(hub / "bob/decoder")
    tiny_generators.text_to_image(hub / "ada/text")
    tiny_generators.adapter(hub / "ada/adapter", hub / "ada/text", "diffusers")
    (hub / "hub.json").write_text("[]")
    with faulty(hub) as (endpoint, server), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", endpoint)
        made = World(root, tiny_world, server)
        made.add("bob/decoder")
        made.add("ada/text", pipeline_tag="text-to-image")
        yield made


@pytest.fixture(scope="module")
def full(world: World) -> FullRun:
    return run_full(world.job())


def test_it_is_published_and_answers(world: World, full: FullRun) -> None:
    assert (full.published.is_new, full.published.models, full.published.logits) == (True, 0, 0)
    index = open_index(world.store)
    assert (len(index), index.logits, int(index.generators)) == (0, 0, 2)
    assert len(index.search("dog", kind="generator")) == 2
    assert len(index.search(like="bob/decoder", kind="generator")) == 1
    assert len(index.search("dog")) == 0
    assert verify(str(world.store), world.job().report).clean


def test_done_again_it_changes_nothing(world: World, full: FullRun) -> None:
    assert run_full(world.job()).published.pointer == full.published.pointer
    assert run_publish(world.job()).pointer == full.published.pointer
    assert any("probe" in line for line in full_lines(world.job()))
    plan = run_plan(world.job())
    assert (plan.catalogue, plan.done.models, plan.generators) == (2, 2, None)
    assert run_nightly(world.job()).published.pointer == full.published.pointer


def test_nightly_runs_add_generators_and_the_first_classifier(world: World, full: FullRun) -> None:
    world.add("ada/adapter", pipeline_tag="text-to-image", base_model="ada/text", tags=["lora"])
    added = run_nightly(world.job())
    index = open_index(world.store)
    assert (added.drift is not None, int(index.generators), len(index)) == (True, 3, 0)
    assert index.show_generator("ada/adapter").parent == "ada/text"
    assert any("sample" in line for line in nightly_lines(world.job()))
    roll_back(world.job().store.child(INDEX))
    index = open_index(world.store)
    assert (index.generation, int(index.generators)) == (full.published.pointer.generation, 2)
    # None is wanted: what the Hub has of them is not looked at.
    shutil.copytree(world.tiny.hub / "ada/resnet", world.root / "hub/ada/resnet")
    world.add("ada/resnet", library="transformers", pipeline_tag="image-classification")
    unwanted = run_full(world.job(filters={"limit": 0}))
    assert (unwanted.published.models, unwanted.probed.tried) == (0, 0)
    first = run_nightly(world.job())
    assert (first.added, first.published.models) == (1, 1)
    assert first.refit_due is not None
    assert "no classifier" in first.refit_due
    index = open_index(world.store)
    assert {hit.repo for hit in index.search("dog")} == {"ada/resnet"}
    assert int(index.generators) == 3
    assert index.show_generator("ada/adapter").parent == "ada/text"
    whole = run_full(world.job(), refresh=True)
    assert (whole.published.models, whole.completed.models) == (1, 1)
    # What was probed once stays in the ledger, and out of the index.
    assert run_full(world.job(filters={"limit": 0}), refresh=True).published.models == 0
    assert int(open_index(world.store).generators) == 3
    assert verify(str(world.store), world.job().report).clean
