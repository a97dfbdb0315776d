"""The sample stage over a hub of tiny generators: listed, sampled, embedded, and never twice."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from pipelines.crawl.stage import hub_endpoint
from pipelines.forecast.run import run_plan
from pipelines.forecast.table import lines
from pipelines.full import FullRun, run_full, run_sample
from pipelines.inspect import reach
from pipelines.inspect.dry_run import full_lines, nightly_lines
from pipelines.inspect.explain import explain
from pipelines.inspect.failures import list_failures
from pipelines.inspect.status import status
from pipelines.inspect.verify import verify
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.nightly.run import run_nightly
from pipelines.probe.run import StageResult
from pipelines.sample.stage import samples_of
from probelog.encoders.decoding import decode
from probelog.encoders.torch_encoder import deferred_encoder
from probelog.errors import FailureReason
from probelog.generators.gallery import EDGE
from probelog.hub.client import HubClient
from probelog.hub.listing import look_up
from probelog.search.client import open_index
from probelog.storage.ledger import SAMPLED as SAMPLED_MODELS
from probelog.storage.ledger import ItemResult, Ledger, item_key
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import SAMPLES, Failure
from tests.support.hub import faults
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.processes.operator_command import kill_tree, operator_process, told_to_end, wait_until
from tests.support.worlds import tiny_generators
from tests.support.worlds.tiny_world import Indexed

pytestmark = pytest.mark.acceptance  # it takes seconds to import the libraries

SAMPLED, STEPS = 5, 2
# Of those that the hub lists: two fail.
INDEXED, LISTED = 9, 11


@dataclass(frozen=True)
class World:
    """A hub of classifiers and generators, and a store that was made of it."""

    root: Path
    indexed: Indexed
    hub: FaultyHub

    def job(self, store: str = "store", **changes: Any) -> Job:
        return self.indexed.job(self.root / store, **self.settings(**changes))

    def settings(self, **changes: Any) -> dict[str, Any]:
        generators = {
            "enabled": True,
            "samples": SAMPLED,
            "max_samples": SAMPLED,
            "steps": STEPS,
            "galleries": str(self.root / "galleries.txt"),
            **changes.pop("generators", {}),
        }
        # One batch: a copy finds its original in the spool.
        settings = {"workers": 1, "batch_models": 16, "scratch": str(self.root / "scratch"), **changes}
        return settings | {"generators": generators}

    def ledger(self, job: Job) -> Ledger:
        return samples_of(job, deferred_encoder(job.config.encoder).digest)

    def add(self, repo: str, **facts: Any) -> None:
        """List a repository."""
        file = self.root / "hub/hub.json"
        entry = {
            "id": repo,
            "library": "diffusers",
            "pipeline_tag": "unconditional-image-generation",
            **facts,
        }
        file.write_text(json.dumps([*json.loads(file.read_text()), entry]))


def gallery_picture(number: int) -> Image.Image:
    picture = Image.new("RGB", (40, 30), (250, 20 * number, 0))
    picture.paste((0, 0, 250), (0, 0, 20, 4 + 3 * number))
    return picture


@pytest.fixture(scope="module")
def world(indexed: Indexed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("generators")
    hub = indexed.world.copy_hub(root / "hub")
    tiny_generators.unconditional(hub / "ada/blobs")
    shutil.copytree(hub / "ada/blobs", hub / "bob/blobs-again")
    tiny_generators.unconditional(hub / "ada/classes", num_class_embeds=3)
    tiny_generators.decoder(hub / "bob/decoder")
    tiny_generators.decoder(hub / "bob/codes", "VQModel")
    tiny_generators.latent(hub / "cleo/latent")
    tiny_generators.class_to_image(hub / "cleo/transformer", classes=4)
    tiny_generators.unconditional(hub / "cleo/pickled")
    weights = hub / "cleo/pickled/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    tiny_generators.text_to_image(hub / "base/text")
    tiny_generators.adapter(hub / "dora/adapter", hub / "base/text", "diffusers")
    shutil.copytree(hub / "dora/adapter", hub / "dora/lost")
    # What nobody but its provider can run: named in a file, since nothing says that it makes pictures.
    (hub / "fay/gallery/images").mkdir(parents=True)
    for number in range(9):
        gallery_picture(number).save(hub / f"fay/gallery/images/{number}.png")
    (root / "galleries.txt").write_text("# of closed models\nfay/gallery\n")
    indexed.copy_store(root / "store", "index", "completion")
    with faulty(hub) as (endpoint, server), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", endpoint)
        made = World(root, indexed, server)
        for repo in (
            "ada/blobs", "bob/blobs-again", "ada/classes", "bob/decoder", "bob/codes", "cleo/latent", "cleo/transformer",
            "cleo/pickled",
        ):  # fmt: skip
            made.add(repo)
        # The base is not among the generators: it is found where it lies.
        made.add("base/text", pipeline_tag="text-to-video")
        made.add("dora/adapter", pipeline_tag="text-to-image", base_model="base/text", tags=["lora"])
        made.add("dora/lost", pipeline_tag="text-to-image", base_model="base/deleted", tags=["lora"])
        yield made


@pytest.fixture(scope="module")
def full(world: World) -> FullRun:
    return run_full(world.job())


@pytest.fixture(scope="module")
def sampled(full: FullRun) -> StageResult:
    assert full.sampled is not None
    return full.sampled


def test_what_generators_make_is_kept(world: World, sampled: StageResult) -> None:
    assert (sampled.models, sampled.reasons) == (INDEXED, {"unsafe-format": 1, "missing-base": 1})
    ledger = world.ledger(world.job())
    assert ledger.paths.key == sampled.key
    models = {model.repo: model for model in ledger.models(sampled.receipts)}
    assert {repo: model.pipeline for repo, model in models.items()} == {
        "ada/blobs": "DDPMPipeline",
        "ada/classes": "DDIMPipeline",
        "bob/blobs-again": "DDPMPipeline",
        "bob/codes": "VQModel",
        "bob/decoder": "AutoencoderKL",
        "cleo/latent": "LDMPipeline",
        "cleo/transformer": "DiTPipeline",
        "dora/adapter": "lora",
        "fay/gallery": "gallery",
    }
    (receipt,) = sampled.receipts
    copies = [model for model in models.values() if model.copy_of_repo]
    assert [{model.repo, model.copy_of_repo} for model in copies] == [{"ada/blobs", "bob/blobs-again"}]
    encoder = deferred_encoder(world.job().config.encoder)
    rows = {}
    for repo, model in models.items():
        _, rows[repo] = ledger.sealed_result(receipt.name, repo, model.sha) or (None, None)
        size = EDGE if repo == "fay/gallery" else tiny_generators.SIDE
        assert (model.samples, model.image_size) == (SAMPLED, size)
        assert model.steps == (0 if repo in ("bob/codes", "bob/decoder", "fay/gallery") else STEPS)
        assert rows[repo]["number"].to_pylist() == [*range(SAMPLED)]
        features = np.array(rows[repo]["feature"].to_pylist(), np.float32)
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)
        assert len({row.tobytes() for row in features}) == SAMPLED, "each from noise of its own"
        assert len(model.thumbnails) == SAMPLED
        # Lossy pictures of what was embedded: nearly the same embeddings.
        again = encoder.embed_images(map(decode, model.thumbnails))
        assert (again * features).sum(axis=1).min() > 0.9
        assert rows[repo]["base_feature"].null_count == (0 if repo == "dora/adapter" else SAMPLED)
    assert sorted(set(rows["ada/classes"]["class"].to_pylist())) == [0, 1, 2]
    assert sorted(set(rows["cleo/transformer"]["class"].to_pylist())) == [0, 1, 2, 3]
    assert models["cleo/transformer"].classes[:1] == ["tench, Tinca tinca"]
    assert rows["ada/blobs"]["class"].null_count == rows["ada/blobs"]["prompt"].null_count == SAMPLED


def test_an_adapter_is_run_beside_its_base(world: World, sampled: StageResult) -> None:
    ledger = world.ledger(world.job())
    (adapter,) = [model for model in ledger.models(sampled.receipts) if model.pipeline == "lora"]
    with HubClient(hub_endpoint()) as client:
        assert (adapter.base_repo, adapter.base_sha) == ("base/text", look_up(client, "base/text").sha)
    table = read_part(ledger.store, sampled.receipts[0].rows, SAMPLES).filter(
        pc.field("repo") == adapter.repo
    )
    assert {adapter.prompts[number] for number in table["prompt"].to_pylist()} <= set(adapter.prompts)
    own, base = (np.array(table[name].to_pylist(), np.float32) for name in ("feature", "base_feature"))
    assert np.abs(own - base).max() > 1e-3, "the adapter changes what the base makes"
    (failure,) = [failure for failure in sampled.failures if failure.repo == "dora/lost"]
    assert failure.detail.startswith("base base/deleted: ")
    left = [path.name for path in (world.root / "scratch/probelog").glob("downloads/*/*")]
    assert len(left) <= 1, "the last base at most, until the next worker starts"


def test_generators_are_published_and_nightly_runs_add_new_ones(world: World, full: FullRun) -> None:
    hub, nights = world.root / "hub", world.root / "store-of-nights"
    shutil.copytree(world.root / "store", nights)
    index = open_index(str(nights))
    assert int(index.generators) == INDEXED
    assert index.search("dog", kind="generator", k=3)
    (hit,) = index.search(kind="generator", images=gallery_picture(2), k=1)
    assert (hit.repo, index.show_generator("fay/gallery").pipeline) == ("fay/gallery", "gallery")
    unchanged = run_nightly(world.job(nights.name))
    assert unchanged.published.pointer == full.published.pointer
    receipts = sorted(nights.glob("catalogue/*/receipt.json"))
    listings = [json.loads(path.read_text()) for path in receipts]
    listed = (hub / "hub.json").read_text()
    try:
        tiny_generators.decoder(hub / "eve/new", seed=3)
        world.add("eve/new")
        run_nightly(world.job(nights.name))
    finally:
        (hub / "hub.json").write_text(listed)
        shutil.rmtree(hub / "eve")
    index = open_index(str(nights))
    assert int(index.generators) == INDEXED + 1
    assert index.show_generator("eve/new").samples == SAMPLED
    added = [
        part["rows"]
        for path, before in zip(receipts, listings, strict=True)
        for part in json.loads(path.read_text())["rows"]
        if part not in before["rows"]
    ]
    assert added == [1], "what was listed before is not listed again"
    assert any("would list what has changed" in line for line in nightly_lines(world.job(nights.name)))
    # What is gone shows when all is listed again.
    run_nightly(world.job(nights.name, nightly={"reconcile_days": 0}))
    assert int(open_index(str(nights)).generators) == INDEXED


def test_a_second_run_asks_for_nothing(world: World, sampled: StageResult) -> None:
    asked = len(world.hub.requests)
    again = run_sample(world.job())
    assert (again.key, again.models, again.receipts) == (sampled.key, sampled.models, sampled.receipts)
    assert len(world.hub.requests) == asked


def test_other_settings_are_another_ledger(world: World, sampled: StageResult) -> None:
    keys = {
        world.ledger(world.job(**changes)).paths.key
        for changes in ({"seed": 1}, {"generators": {"steps": 3}}, {"generators": {"prompts": ["a"]}}, {})
    }
    assert len(keys) == 4
    assert sampled.key in keys


def test_a_run_goes_on_where_it_was_killed_and_retries(world: World, sampled: StageResult) -> None:
    """Two results are in the spool, one generator failed in an earlier run, and the rest was never run."""
    ledger, job = world.ledger(world.job()), world.job("store-of-a-killed-run")
    killed = world.ledger(job)
    shas = {model.repo: model.sha for model in ledger.models(sampled.receipts)}
    (receipt,) = sampled.receipts
    before = {repo: ledger.sealed_result(receipt.name, repo, sha) for repo, sha in shas.items()}
    failed = Failure.of(
        "bob/decoder", shas["bob/decoder"], "sample", FailureReason.DOWNLOAD_FAILED, "a cut cable"
    )
    lost = item_key(failed.repo, failed.sha)
    killed.spool(lost, ItemResult.failure(failed, SAMPLED_MODELS))
    killed.seal([lost])
    for repo in ("ada/blobs", "bob/blobs-again", "dora/adapter"):
        killed.spool(item_key(repo, shas[repo]), ItemResult.success(*(before[repo] or ())))
    asked = len(world.hub.requests)
    again = run_sample(job)
    files = {
        "/".join(request.address.split("/")[1:3])
        for request in world.hub.requests[asked:]
        if "/resolve/" in request.address
    }
    assert files == {
        "ada/classes", "bob/codes", "bob/decoder", "cleo/latent", "cleo/pickled", "cleo/transformer", "dora/lost",
        "fay/gallery",
    }  # fmt: skip
    assert (again.models, again.reasons) == (sampled.models, sampled.reasons)
    for repo, sha in shas.items():
        found = [killed.sealed_result(one.name, repo, sha) for one in again.receipts]
        (result,) = filter(None, found)
        assert result[1].equals((before[repo] or result)[1]), "from the same noise the same samples"


def test_the_operators_commands_know_generators(world: World, sampled: StageResult) -> None:
    store = str(world.root / "store")
    found = status(store)
    (ledger,) = found.samplings
    assert (ledger.key, ledger.indexed, ledger.failed, ledger.left) == (
        sampled.key,
        INDEXED,
        {"missing-base": 1, "unsafe-format": 1},
        0,
    )
    assert ledger.samples == INDEXED * SAMPLED
    assert any(line.startswith("sample ") and f"{INDEXED} of {LISTED}" in line for line in found.lines())
    of = [item["of"] for item in found.catalogues if item["of"] != "image-classification"]
    assert sorted(of) == ["galleries.txt", "text-to-image", "unconditional-image-generation"]
    failures = {item["repo"]: item["reason"] for item in list_failures(store, stage="sample").records()}
    assert failures == {"cleo/pickled": "unsafe-format", "dora/lost": "missing-base"}
    story = list(explain(store, "ada/classes").lines())
    assert any(line.startswith("sampled    ") for line in story)
    assert any(
        f"{SAMPLED} samples of {tiny_generators.SIDE} pixels in {STEPS} steps" in line for line in story
    )
    assert any(line.startswith("index      generation ") and ", live, " in line for line in story)
    report = Report(io.StringIO())
    assert verify(store, report).clean
    part = next((world.root / "store/samples").glob("*/samples/*.parquet"))
    whole = part.read_bytes()
    try:
        part.write_bytes(whole[:-1])
        assert [item["path"] for item in verify(store, report).damaged] == [
            part.relative_to(store).as_posix()
        ]
    finally:
        part.write_bytes(whole)


def test_a_plan_foretells_generators(world: World, sampled: StageResult) -> None:
    """With the ledger that is there nothing is left; with another seed, what was done is to be done again."""
    finished = run_plan(world.job())
    assert not any(line.startswith("wall time") for line in lines(finished))
    done = finished.generators
    assert done is not None
    assert (done.catalogue, done.done.models, done.left.models) == (LISTED, INDEXED, 0)
    plan = run_plan(world.job(seed=1))
    assert plan.generators is not None
    left = plan.generators.left
    assert plan.generators.basis.source == "another ledger of this store"
    assert (left.models, left.foretold, left.failures["unsafe-format"]) == (LISTED, 1, 1)
    assert left.failures["missing-base"] == pytest.approx(1)
    assert left.indexed.value == pytest.approx(INDEXED)
    assert left.logits.value == pytest.approx(INDEXED * SAMPLED)
    # Those whose sizes are listed: what they took, or what the names say.
    assert left.bytes.value == pytest.approx(done.done.bytes, rel=0.4)
    busy = done.done.busy_hours
    assert busy / 20 < left.busy_hours.value < busy * 20
    assert {"samples", "index"} <= {*left.store_bytes}
    shown = [*lines(plan)]
    assert any(line.startswith("both ") for line in shown)
    assert sum("samples" in line for line in shown if line.startswith("the whole")) == 1


def test_a_dry_run_says_what_would_be_sampled(world: World, sampled: StageResult) -> None:
    asked = len(world.hub.requests)
    said = [line for line in full_lines(world.job()) if line.startswith("sample: ")]
    assert said == [
        f"sample: would run 0 models (0.0 GB of weights); {INDEXED} are indexed, 2 failed and are not tried again"
    ]
    assert any(
        line.startswith(f"sample: would run {LISTED} models") for line in full_lines(world.job(seed=1))
    )
    listed = {"filters": {"limit": 3}}
    assert "sample: would list generators, and sample those that are not done yet" in [
        *full_lines(world.job(generators=listed))
    ]
    assert len(world.hub.requests) == asked
    assert "pictures came out of a confined process" in reach.generators_are_sampled(world.job().config)


@pytest.mark.parametrize(("stage", "number"), [("sample", signal.SIGTERM), ("full", signal.SIGINT)])
def test_stopped_and_killed_while_sampling(
    world: World, sampled: StageResult, stage: str, number: signal.Signals
) -> None:
    """The last adapter's download stalls while the others are sampled; then a signal comes, and later another."""
    import ray

    store = f"store-of-signals-{stage}"
    world.indexed.copy_store(world.root / store, "index", "completion")
    address = str(ray.get_runtime_context().gcs_address)
    file = world.indexed.world.config_file(
        world.root / f"signals-{stage}.toml", world.root / store, ray_address=address, **world.settings()
    )
    job = world.job(store)
    ledger, stalls = world.ledger(job), "/dora/adapter/resolve"
    asked = len(world.hub.asked(stalls))
    world.hub.spoil(stalls, faults.slow(2, 8))  # for half an hour
    try:
        with operator_process(stage, "--config", file) as process:
            wait_until(process, lambda: len(world.hub.asked(stalls)) > asked and len(ledger.spooled()) > 1)
            seconds = told_to_end(process, number, stage, "--config", file)
        print(f"| `{stage}`, sampling | {number.name} | {process.returncode} | {seconds:.1f} |")
        stopped, asked = ledger.spooled(), len(world.hub.asked(stalls))
        with operator_process("sample", "--config", file) as process:
            wait_until(process, lambda: len(world.hub.asked(stalls)) > asked)
            kill_tree(process)
        assert stopped <= ledger.spooled(), "what was done is kept"
    finally:
        world.hub.rules.clear()
    again = run_sample(job)
    assert (again.models, again.reasons) == (sampled.models, sampled.reasons)
    before = world.ledger(world.job())
    for model in before.models(sampled.receipts):
        whole, resumed = (
            next(
                filter(None, (one.sealed_result(receipt.name, model.repo, model.sha) for receipt in receipts))
            )
            for one, receipts in ((before, sampled.receipts), (ledger, again.receipts))
        )
        assert resumed[1].equals(whole[1]), model.repo
