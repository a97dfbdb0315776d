"""A zoo of five models, trained on a real Ray, killed on the way, finished, spoiled and grown."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipelines.evaluate import Truth
from pipelines.hubserver.folder import HubFolder
from probelog.models.loading import load_classifier
from tests.support.processes.operator_command import Ended, kill_tree, operator, operator_process, wait_until
from tests.support.worlds.shapes import CLASSES, write_folder

pytestmark = pytest.mark.acceptance  # it trains a zoo

OPTIONS = (
    "--size",
    "32",
    "--epochs",
    "20",
    "--workers",
    "2",
    "--architectures",
    "test_resnet,test_efficientnet",
)


@dataclass(frozen=True)
class Zoo:
    images: Path
    out: Path

    def run(self, *more: object, models: int = 5) -> Ended:
        return operator("zoo", self.images, "--out", self.out, "--models", models, *OPTIONS, *more)

    def entries(self) -> dict[str, int]:
        """When each entry was written."""
        return {path.name: path.stat().st_mtime_ns for path in (self.out / "entries").glob("*.json")}

    def weights(self) -> dict[str, bytes]:
        hub = self.out / "hub"
        return {
            path.parent.relative_to(hub).as_posix(): path.read_bytes() for path in hub.rglob("*.safetensors")
        }


@pytest.fixture(scope="module")
def zoo(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Killed with SIGKILL after its first model, then finished by the same command."""
    root = tmp_path_factory.mktemp("zoo")
    made = Zoo(write_folder(root / "images", 24), root / "out")
    (made.images / "red_disc" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    address = str(ray.get_runtime_context().gcs_address)
    arguments = ("zoo", made.images, "--out", made.out, "--models", 5, *OPTIONS)
    with operator_process(*arguments, environment={"RAY_ADDRESS": address}) as process:
        wait_until(process, lambda: len(made.entries()) > 0)
        kill_tree(process)
    before = made.entries()
    assert 1 <= len(before) < 5
    assert not (made.out / "truth.json").exists()
    ended = made.run()
    assert ended.status == 0, ended.err
    assert "left out (unreadable 1)" in ended.err
    after = made.entries()
    assert len(after) == 5
    assert before.items() <= after.items(), "finished models are not trained again"
    return made


def test_every_repository_loads_and_does_what_the_truth_says(zoo: Zoo) -> None:
    content = json.loads((zoo.out / "truth.json").read_text())
    truth = Truth.read(zoo.out / "truth.json")
    assert set(truth.concepts) == {*CLASSES, "disc", "box"}
    assert set(truth.kinds.values()) == {"foundation", "inet", "wild", "child", "copy"}
    queries = pq.read_table(zoo.out / "queries.parquet")
    pictures = [Image.open(io.BytesIO(row["bytes"])) for row in queries["image"].to_pylist()]
    numbers = np.array(queries["class"].to_pylist())
    for repo, model in content["models"].items():
        classifier = load_classifier(zoo.out / "hub" / repo)
        assert classifier.logits == len(model["logits"])
        assert model["accuracy"] > 0.6
        with torch.inference_mode():
            pixels = torch.from_numpy(classifier.recipe.geometry(pictures))
            guess = classifier.forward(classifier.recipe.normalise(pixels)).argmax(1).numpy()
        taught = {number for members in model["logits"] for number in members}
        known = [(g, n) for g, n in zip(guess, numbers, strict=True) if n in taught]
        right = np.mean([n in model["logits"][g] for g, n in known])
        assert right > 0.6, f"{repo}: {right:.0%} of the queries, {model['accuracy']:.0%} when validated"


def test_the_folder_is_a_hub(zoo: Zoo) -> None:
    repositories = HubFolder(zoo.out / "hub").repositories()
    truth = json.loads((zoo.out / "truth.json").read_text())["models"]
    assert set(repositories) == set(truth)
    assert len({repository.listed["sha"] for repository in repositories.values()}) == 5
    copy = next(repo for repo, model in truth.items() if model["kind"] == "copy")
    weights = zoo.weights()
    assert weights[copy] == weights[truth[copy]["parent"]]
    assert len(set(weights.values())) == 4


def test_queries_and_probes_were_seen_by_no_model(zoo: Zoo) -> None:
    queries, probes = (pq.read_table(zoo.out / f"{name}.parquet") for name in ("queries", "probes"))
    seen = [row["bytes"] for table in (queries, probes) for row in table["image"].to_pylist()]
    files = {path.read_bytes() for path in zoo.images.rglob("*.png")}
    assert len(set(seen)) == len(seen)
    assert set(seen) < files
    assert sorted(set(queries["class"].to_pylist())) == list(range(6))
    assert set(probes["shows"].to_pylist()) == set(CLASSES)
    assert set(CLASSES) <= set((zoo.out / "concepts.txt").read_text().splitlines())


def test_a_missing_entry_alone_is_trained_again_and_comes_out_the_same(zoo: Zoo) -> None:
    before, weights = zoo.entries(), zoo.weights()
    truth = (zoo.out / "truth.json").read_bytes()
    child = next(
        file for file in (zoo.out / "entries").iterdir() if json.loads(file.read_text())["kind"] == "child"
    )
    child.unlink()
    ended = zoo.run()
    assert ended.status == 0, ended.err
    after = zoo.entries()
    assert {name for name in after if after[name] != before[name]} == {child.name}
    assert zoo.weights() == weights
    assert (zoo.out / "truth.json").read_bytes() == truth


def test_other_settings_are_refused_and_more_models_are_added(zoo: Zoo) -> None:
    for more, message in ((("--seed", 1), "other settings"), (("--epochs", 3), "other settings (epochs)")):
        ended = zoo.run(*more)
        assert ended.status == 2
        assert message in ended.err
    before = zoo.entries()
    ended = zoo.run("--gpus-per-model", 0.5, models=6)
    if not ray.cluster_resources().get("GPU"):
        assert ended.status == 2
        assert "no GPU in this Ray" in ended.err
    ended = zoo.run(models=6)
    assert ended.status == 0, ended.err
    after = zoo.entries()
    assert len(after) == 6
    assert before.items() <= after.items()
    assert len(Truth.read(zoo.out / "truth.json").logits) == 6
    ended = zoo.run(models=5)
    assert ended.status == 2
    assert "holds 1 models more than --models 5" in ended.err
