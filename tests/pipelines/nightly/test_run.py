"""Nightly runs over a real Hub on loopback that grows, changes and shrinks, merged into an index with readers."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.crawl.stage import crawl
from pipelines.full import run_full, run_publish
from pipelines.inspect.config_check import notes
from pipelines.inspect.verify import verify
from pipelines.job.job import Job
from pipelines.job.lease import LeaseHeldError, hold_lease
from pipelines.job.progress import Report
from pipelines.nightly.run import NightlyRun, run_nightly
from probelog.errors import HeldError, QueryError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.publication.lifecycle import release, roll_back
from probelog.search.client import Index, open_index
from probelog.storage.layout import LEASE
from probelog.storage.ledger import Ledger
from probelog.storage.store import Store
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.processes.operator_command import kill_tree, operator, operator_process
from tests.support.refusals import assert_error_on_page
from tests.support.worlds.tiny_world import CONCEPTS, MODELS, Indexed, timm_model, transformers_model

_START = dt.datetime(2025, 3, 1, tzinfo=dt.UTC)


class NightlyWorld:
    """A store of its own beside a Hub of its own, on which things happen."""

    def __init__(self, indexed: Indexed, root: Path, endpoint: str, faults: FaultyHub) -> None:
        self._indexed = indexed
        self.hub = root / "hub"
        self.endpoint = endpoint
        self.faults = faults
        self.store = indexed.copy_store(root / "store")
        self._commits = 0
        self.entries: dict[str, dict[str, Any]] = {
            entry["id"]: entry for entry in json.loads((self.hub / "hub.json").read_text())
        }

    def commit(self, repo: str, **facts: Any) -> str:
        """Say that a repository's files are new; returns the commit."""
        self._commits += 1
        sha = f"{self._commits:040x}"
        time = (_START + dt.timedelta(hours=self._commits)).isoformat()
        self.entries[repo] = {"license": "mit", **self.entries.get(repo, {}), "id": repo, "sha": sha, "lastModified": time} | facts  # fmt: skip
        self.list()
        return sha

    def new(self, repo: str, seed: int, logits: int = 3) -> str:
        shutil.rmtree(self.hub / repo, ignore_errors=True)
        timm_model(self.hub / repo, "test_resnet", logits, seed)
        return self.commit(repo)

    def copy(self, repo: str, to: str) -> str:
        shutil.copytree(self.hub / repo, self.hub / to)
        return self.commit(to)

    def remove(self, *repos: str) -> None:
        for repo in repos:
            del self.entries[repo]
            shutil.rmtree(self.hub / repo)
        self.list()

    def rename(self, old: str, to: str) -> None:
        entry = self.entries.pop(old)
        (self.hub / to).parent.mkdir(exist_ok=True)
        shutil.move(self.hub / old, self.hub / to)
        self.entries[to] = {**entry, "id": to, "formerly": [old]}
        self.list()

    def list(self) -> None:
        (self.hub / ".new.json").write_text(json.dumps([*self.entries.values()]))
        os.replace(self.hub / ".new.json", self.hub / "hub.json")

    def job(self, store: Path | str | None = None, **changes: Any) -> Job:
        # The tiny index is small: a few models more are much of it.
        nightly = {"max_drift": 100.0, "rebuild_share": 1.0} | changes.pop("nightly", {})
        quality = {"enforce": False} | changes.pop("quality", {})
        # The world's scratch folder: the process that forks model processes is started once for all runs.
        settings = {"nightly": nightly, "quality": quality, "workers": 1} | changes  # two would do the same
        config = self._indexed.world.config(store or self.store, **settings)
        self.told = io.StringIO()
        return Job.of(config, Report(self.told))

    def run(self, **changes: Any) -> NightlyRun:
        return run_nightly(self.job(**changes))

    @property
    def pointer(self) -> Pointer:
        return read_pointer(Store(self.store / "index"))[0]

    @property
    def index(self) -> Index:
        return open_index(self.store)

    def observed(self) -> set[tuple[str, str]]:
        """Models of the main ledger, as the next full run finds them."""
        (main,) = [name for name in os.listdir(self.store / "observations") if "-" not in name]
        ledger = Ledger(Store(self.store), f"observations/{main}")
        return {(model.repo, model.sha) for model in ledger.models(ledger.receipts())}


@pytest.fixture
def hub_and_index(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NightlyWorld]:
    indexed.world.copy_hub(tmp_path / "hub")
    with faulty(tmp_path / "hub") as (endpoint, faults):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield NightlyWorld(indexed, tmp_path, endpoint, faults)


def directions(index: Index) -> dict[tuple[str, int, bool], np.ndarray]:
    """Every logit's direction, by repository and place."""
    generation = index._generation
    found = {}
    for model in generation.models_table(["repo", "first_row", "rows"]).to_pylist():
        logits = generation.logits(np.arange(model["first_row"], model["first_row"] + model["rows"]))
        for place, direction in enumerate(generation.basis.directions(logits.coordinates)):
            key = (model["repo"], int(logits.logit[place]), bool(logits.negated[place]))
            found[key] = direction
    return found


@contextlib.contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """How often this process reads each part of descriptors from a store, and opens each generation."""
    reads: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    real_read, real_open = Store.read, Generation.__init__

    def read(self: Store, name: str, most: int | None = None) -> bytes:
        if "/descriptors/" in name:
            reads[name] += 1
        return real_read(self, name, most)

    def open_generation(self: Generation, index: Store, pointer: Pointer) -> None:
        opened[pointer.generation] += 1
        real_open(self, index, pointer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "read", read)
        patch.setattr(Generation, "__init__", open_generation)
        yield reads, opened


def test_nothing_new_is_nothing_published(hub_and_index: NightlyWorld) -> None:
    before = hub_and_index.pointer
    asked = len(hub_and_index.faults.requests)
    done = hub_and_index.run()
    assert not done.published.is_new
    assert hub_and_index.pointer == before
    assert len(hub_and_index.faults.requests) - asked == 1  # a page of the listing
    assert (done.added, done.removed) == (0, 0)


def test_a_nightly_run_gives_what_a_full_run_gives(hub_and_index: NightlyWorld) -> None:
    before = hub_and_index.pointer
    crawl(hub_and_index.job(), hub_and_index.endpoint)
    hub_and_index.new("zed/new", 21)
    hub_and_index.copy("ada/resnet", "zed/copy")
    hub_and_index.new("cleo/timm-half", 22, logits=2)  # other weights, another head
    readme = hub_and_index.commit("bob/one-logit")  # the same files at another commit
    (hub_and_index.hub / "zed/broken").mkdir()
    (hub_and_index.hub / "zed/broken/config.json").write_text("{")
    hub_and_index.commit("zed/broken", library="timm", pipeline_tag="image-classification")

    done = hub_and_index.run()
    assert done.published.is_new
    assert (done.tried, done.added, done.removed) == (5, 4, 2)
    assert [failure.repo for failure in done.failures] == ["zed/broken"]
    assert done.drift is not None
    assert done.drift.models >= 2
    assert (hub_and_index.pointer.base, hub_and_index.pointer.generation) == (
        before.generation,
        done.published.pointer.generation,
    )
    index = hub_and_index.index
    assert index.models == len(MODELS) + 2
    assert index._generation.model("bob/one-logit")["sha"] == readme
    assert index.show("cleo/timm-half").logits[-1].logit == 1
    assert sorted(index.show("zed/copy").same_weights) == ["ada/resnet", "ada/resnet-again"]
    assert {edge.child for edge in index.edges("relation = 'copy'")} == {"ada/resnet-again", "zed/copy"}
    assert index.show("zed/copy").root == index.show("ada/resnet").root == "ada/resnet"
    (hit, *_) = [hit for hit in index.search("dog", k=50) if hit.repo == "ada/resnet"]
    assert hit.duplicates == 2

    # A second run adds to the first; all else stays.
    hub_and_index.new("zed/second", 23)
    live = hub_and_index.pointer.generation
    with counted() as (reads, opened):
        again = hub_and_index.run()
    assert set(reads.values()) == {1}, "for the drift and to write; the checks need no more"
    assert opened == dict.fromkeys([before.generation, live, hub_and_index.pointer.generation], 1)
    assert (again.tried, again.added) == (6, 1)
    assert hub_and_index.pointer.base == before.generation
    assert hub_and_index.index.models == len(MODELS) + 3
    assert "drift" in hub_and_index.index.settings
    assert not hub_and_index.run().published.is_new

    probed, index = hub_and_index.observed(), hub_and_index.index
    models, ours = index.models, directions(index)
    first = {concept: index.search(concept)[0] for concept in CONCEPTS}
    # A full run with the catalogue from before the nightly runs would remove what they added.
    for run in (run_full, run_publish):
        with pytest.raises(UsageError) as caught:
            run(hub_and_index.job())
    old = "a catalogue older than the nightly runs whose models are live"
    assert_error_on_page(old, caught.value, "publish full", hub_and_index.store.parent)
    assert [note.partition(":")[0] for note in notes(hub_and_index.job().config)] == ["full"]
    full = run_full(hub_and_index.job(), refresh=True)
    assert hub_and_index.observed() == probed
    assert hub_and_index.pointer.base is None
    index = hub_and_index.index
    assert index.models == full.probed.models == models
    theirs = directions(index)
    assert ours.keys() == theirs.keys()
    for key, direction in ours.items():
        assert direction @ theirs[key] > 0.999, key
    for concept, mine in first.items():
        other = index.search(concept)[0]
        assert (mine.repo, mine.logit) == (other.repo, other.logit) or abs(mine.score - other.score) < 0.2
    copies = {edge.child for edge in index.edges("relation = 'copy'")}
    assert copies == {"ada/resnet-again", "zed/copy"}
    assert verify(str(hub_and_index.store), Report(io.StringIO())).clean


@pytest.mark.acceptance
def test_repositories_removed_from_the_hub_are_removed_from_answers(hub_and_index: NightlyWorld) -> None:
    hub_and_index.new("zed/new", 21)
    hub_and_index.run()
    hub_and_index.remove("cleo/timm-bfloat", "zed/new")
    hub_and_index.rename("ada/resnet", "ada/renamed")
    hub_and_index.entries["timm-without-owner"]["gated"] = "auto"
    hub_and_index.list()
    assert not hub_and_index.run().published.is_new  # the listing's newest page does not tell
    done = hub_and_index.run(nightly={"reconcile_days": 0})
    assert done.published.is_new
    index = hub_and_index.index
    for repo in ("cleo/timm-bfloat", "zed/new", "ada/resnet", "timm-without-owner"):
        with pytest.raises(QueryError, match="does not hold"):
            index.show(repo)
        assert all(hit.repo != repo for hit in index.search("dog", k=100))
    assert index.show("ada/renamed").same_weights == ["ada/resnet-again"]
    (edge,) = [edge for edge in index.edges() if edge.child == "ada/resnet-again"]
    assert (edge.parent, edge.relation, edge.latent) == ("ada/resnet", "copy", True)
    assert index.show("ada/resnet-again").parent == "ada/resnet"
    assert index.models == len(MODELS) - 2
    hub_and_index.new("cleo/timm-bfloat", 30)  # it comes back
    hub_and_index.run(nightly={"overlap_hours": 1e6})  # the gated one is listed still
    assert hub_and_index.index.show("cleo/timm-bfloat").logits
    assert hub_and_index.index.models == len(MODELS) - 1


@pytest.mark.acceptance
def test_after_many_additions_the_index_is_rebuilt(hub_and_index: NightlyWorld) -> None:
    base = hub_and_index.pointer.generation
    hub_and_index.new("zed/new", 21)
    hub_and_index.remove("cleo/timm-bfloat")
    with counted() as (reads, _):
        done = hub_and_index.run(nightly={"rebuild_share": 0.01, "reconcile_days": 0})
    assert done.published.is_new
    assert set(reads.values()) == {2}, "for the drift and to write, and to check"
    assert hub_and_index.pointer.base is None
    assert hub_and_index.pointer.choice == [done.published.pointer.generation, base]
    index = hub_and_index.index
    assert index.models == len(MODELS)
    assert index.show("zed/new").logits
    assert (
        index._generation.model("bob/one-logit")["licence"]
        == hub_and_index.entries["bob/one-logit"]["license"]
    )
    assert not hub_and_index.run().published.is_new  # the new base knows all of it
    hub_and_index.new("zed/second", 23)
    hub_and_index.run()
    assert hub_and_index.pointer.base == done.published.pointer.generation
    assert hub_and_index.index.models == len(MODELS) + 1
    with pytest.raises(UsageError, match="fraction"):
        hub_and_index.run(fraction=0.5)
    report = verify(str(hub_and_index.store), Report(io.StringIO()))
    assert report.clean, report.lines()


@pytest.mark.acceptance
def test_a_hubs_background_stays_over_nightly_runs(hub_and_index: NightlyWorld) -> None:
    run_full(hub_and_index.job(background="hub"))
    before = hub_and_index.index._generation
    assert before.settings.background_source == "hub"
    labels = ["quokka", "numbat", "bilby"]
    transformers_model(
        hub_and_index.hub / "zed/new", "ResNetForImageClassification", 3, 31, labels,
        embedding_size=8, layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
    )  # fmt: skip
    hub_and_index.commit("zed/new")
    # Rebuilt as a whole: an update has none of its own.
    assert hub_and_index.run(background="hub", nightly={"rebuild_share": 0.01}).published.is_new
    generation = hub_and_index.index._generation
    assert generation.background == before.background
    assert generation.settings.background_source == "hub"
    assert hub_and_index.pointer.base is None
    with pytest.raises(UsageError, match="background imagenet-21k is not the index's"):
        hub_and_index.run(background="imagenet-21k")
    run_full(hub_and_index.job(background="hub"), refresh=True)
    assert {*labels} <= {*hub_and_index.index._generation.background}


@pytest.mark.acceptance
def test_a_copy_that_saw_other_probes(hub_and_index: NightlyWorld) -> None:
    """Its own directions are others than those that the base holds of the same weights; the base's are kept."""
    store = hub_and_index.store.parent / "half"
    run_full(hub_and_index.job(store, fraction=0.5))
    hub_and_index.copy("ada/resnet", "zed/copy")
    hub_and_index.copy("cleo/timm-half", "zed/another")
    done = run_nightly(hub_and_index.job(store, fraction=0.5))
    assert done.published.is_new
    index = open_index(store)
    assert sorted(index.show("zed/copy").same_weights) == ["ada/resnet", "ada/resnet-again"]
    assert len(index._generation.recent) == 0


@pytest.mark.acceptance
def test_a_rollback_is_undone_by_the_next_nightly_run_unless_it_is_held(hub_and_index: NightlyWorld) -> None:
    hub_and_index.new("zed/new", 21)
    hub_and_index.run()
    index = Store(hub_and_index.store / "index")
    roll_back(index, hold="wrong labels")
    assert hub_and_index.index.models == len(MODELS)
    generations = index.names("generations")
    with pytest.raises(HeldError) as caught:
        hub_and_index.run()
    held = "the live generation is held (after probing, of which all is kept)"
    assert_error_on_page(held, caught.value, "publish nightly full", hub_and_index.store.parent)
    assert index.names("generations") == generations, "nothing was built"
    release(index)
    probed = len(hub_and_index.faults.asked("zed/new"))
    done = hub_and_index.run(nightly={"max_drift": 0.0})
    assert done.published.is_new
    assert done.drift is not None
    assert done.refit_due is not None
    assert done.drift.largest()[0] in done.refit_due
    assert "a full run is due" in hub_and_index.told.getvalue()
    assert hub_and_index.index.settings["drift"]["share"] == done.drift.share > 0
    assert hub_and_index.index.models == len(MODELS) + 1
    assert len(hub_and_index.faults.asked("zed/new")) == probed  # nothing was probed again


def test_one_nightly_run_at_a_time(hub_and_index: NightlyWorld, tmp_path: Path) -> None:
    with (
        hold_lease(Store(hub_and_index.store), LEASE, seconds=60),
        pytest.raises(LeaseHeldError) as caught,
    ):
        hub_and_index.run()
    assert_error_on_page("another nightly run is at work", caught.value, "nightly", tmp_path)
    assert not hub_and_index.run().published.is_new


def test_settings_of_another_index(hub_and_index: NightlyWorld) -> None:
    with pytest.raises(UsageError) as caught:
        hub_and_index.run(fraction=0.5, prompt="{}")
    assert_error_on_page("settings of another index", caught.value, "nightly", hub_and_index.store.parent)
    with pytest.raises(UsageError, match="run `probelog-index full` first"):
        run_nightly(hub_and_index.job(hub_and_index.store.parent / "empty"))


def test_the_command_says_what_is_wrong(hub_and_index: NightlyWorld, tmp_path: Path) -> None:
    file = hub_and_index._indexed.world.config_file(tmp_path / "job.toml", tmp_path / "none")
    ended = operator("nightly", "--config", file)
    assert ended.status == 2
    assert "run `probelog-index full` first" in ended.err


def test_verify_finds_what_is_damaged(hub_and_index: NightlyWorld) -> None:
    hub_and_index.new("zed/new", 21)
    hub_and_index.run()
    report = verify(str(hub_and_index.store), Report(io.StringIO()))
    assert report.clean, report.lines()
    assert not report.unexpected
    (folder,) = [path for path in (hub_and_index.store / "observations").iterdir() if "-" in path.name]
    files = [folder / "night.json", *folder.glob("catalogue-*.parquet")]
    base = hub_and_index.store / "index/generations" / str(hub_and_index.pointer.base)
    files.append(next(base.glob("logits.lance/data/*")))
    own = hub_and_index.store / "index/generations" / hub_and_index.pointer.generation
    files.append(next(own.glob("logits.lance/data/*")))
    assert len(files) == 4
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        found = verify(str(hub_and_index.store), Report(io.StringIO()))
        assert [item["path"] for item in found.damaged] == [str(file.relative_to(hub_and_index.store))]
        file.write_bytes(data)


def test_a_damaging_nightly_run_is_refused(hub_and_index: NightlyWorld, tmp_path: Path) -> None:
    before = hub_and_index.pointer
    hub_and_index.new("zed/new", 21)
    for number in range(60):
        (hub_and_index.hub / f"zed/broken-{number}").mkdir()
        (hub_and_index.hub / f"zed/broken-{number}/config.json").write_text("{")
        hub_and_index.commit(f"zed/broken-{number}", library="timm", pipeline_tag="image-classification")
    settings: dict[str, Any] = {"quality": {"max_failure_rise": 0.05}, "nightly": {"rebuild_share": 1.0}}
    file = hub_and_index._indexed.world.config_file(tmp_path / "job.toml", hub_and_index.store, **settings)
    ended = operator("nightly", "--config", file)
    assert ended.status == 3, ended.err
    assert "was not published" in ended.err
    assert hub_and_index.pointer == before
    told = json.loads(max((hub_and_index.store / "quality").glob("*.json")).read_text())
    assert told["live"] == before.generation
    refused = [item["name"] for item in told["measures"] if not item["passed"]]
    assert "failed models" in refused
    # What was probed is kept: published all the same, it is not probed again.
    asked = len(hub_and_index.faults.asked("zed/new"))
    ended = operator(
        "nightly", "--config", file, "--set", "quality.enforce=false", "--set", "max_failed_share=1"
    )
    assert ended.status == 0, ended.err
    assert hub_and_index.index.models == len(MODELS) + 1
    assert len(hub_and_index.faults.asked("zed/new")) == asked


@pytest.mark.acceptance
def test_a_nightly_run_on_s3(hub_and_index: NightlyWorld, bucket_of_ray: str, tmp_path: Path) -> None:
    remote = Store(f"{bucket_of_ray}/{tmp_path.name}")
    local = Store(hub_and_index.store)
    for name in local.names(""):
        remote.write(name, local.read(name))
    hub_and_index.new("zed/new", 21)
    settings = {"nightly": {"rebuild_share": 1.0}, "quality": {"enforce": False}, "workers": 1}
    file = hub_and_index._indexed.world.config_file(tmp_path / "job.toml", remote.uri, **settings)
    for told in ("is live", "nothing new"):
        ended = operator("nightly", "--config", file)
        assert ended.status == 0, ended.err
        assert told in ended.err
    assert read_pointer(remote.child("index"))[0].base == hub_and_index.pointer.generation
    index = open_index(remote.uri)
    assert index.models == len(MODELS) + 1
    assert index.show("zed/new").logits
    assert verify(remote.uri, Report(io.StringIO())).clean


@pytest.mark.acceptance
def test_killed_at_any_moment(hub_and_index: NightlyWorld, tmp_path: Path) -> None:
    """SIGKILL for the whole process tree, at random moments; the next run does what is left."""
    for number in range(6):
        hub_and_index.new(f"zed/new-{number}", 30 + number)
    settings = {
        "nightly": {"lease_seconds": 2.0, "lease_wait": 30.0, "rebuild_share": 1.0, "max_drift": 100.0}
    }
    settings |= {"quality": {"enforce": False}, "scratch": str(tmp_path / "scratch")}
    file = hub_and_index._indexed.world.config_file(tmp_path / "job.toml", hub_and_index.store, **settings)
    moments = np.random.default_rng(0).uniform(3.0, 30.0, size=3)
    for moment in moments.tolist():
        with operator_process("nightly", "--config", file) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            kill_tree(process)
        assert hub_and_index.index.search("dog")  # readers never notice
    done = operator("nightly", "--config", file)
    assert done.status == 0, done.err
    index = hub_and_index.index
    assert index.models == len(MODELS) + 6
    for number in range(6):
        assert index.show(f"zed/new-{number}").logits
    assert len([version for version in hub_and_index.observed() if version[0].startswith("zed/")]) == 6
    assert verify(str(hub_and_index.store), Report(io.StringIO())).clean
