"""A tiny zoo of generators: the library reads it, its truth is true, and the same call goes on where it was left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.hubserver.folder import HubFolder
from pipelines.zoo.generators import text
from pipelines.zoo.generators.build import GeneratorsRequest, build_generators
from pipelines.zoo.generators.plan import plan
from pipelines.zoo.generators.styles import edges
from probelog.errors import UsageError
from probelog.generators.loading import LoadOptions, load_generator
from probelog.generators.sampling import Sampler
from tests.support.processes.operator_command import operator
from tests.support.worlds.shapes import CLASSES, write_folder


@pytest.fixture(scope="module")
def request_of_zoo(tmp_path_factory: pytest.TempPathFactory) -> GeneratorsRequest:
    folder = tmp_path_factory.mktemp("generators")
    write_folder(folder / "images", per_class=6)
    request = GeneratorsRequest(
        folder / "out", generators=9, seed=1, size=8, images=str(folder / "images"), effort=0.004
    )
    build_generators(request)
    return request


def _truth(request: GeneratorsRequest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((request.out / "truth.json").read_text())
    return content


def _weights(request: GeneratorsRequest, repo: str) -> Path:
    return next((request.out / "hub" / repo).rglob("*.safetensors"))


@pytest.mark.acceptance
def test_diffusers_reads_every_generator_and_it_makes_pictures(request_of_zoo: GeneratorsRequest) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

    seen = set()
    for facts in _truth(request_of_zoo)["generators"]:
        folder = request_of_zoo.out / "hub" / facts["repo"]
        seen.add(facts["pipeline"])
        if facts["pipeline"] in ("StableDiffusionPipeline", "lora"):
            continue
        with torch.inference_mode():
            if facts["pipeline"] == "AutoencoderKL":
                made = AutoencoderKL.from_pretrained(folder).float().decode(torch.zeros(1, 12, 1, 1)).sample
            else:
                index = json.loads((folder / "model_index.json").read_text())
                assert index["_class_name"] == facts["pipeline"]
                assert list(index.get("id2label", {}).values()) in ([], facts["concepts"])
                unet = UNet2DModel.from_pretrained(folder / "unet").float()
                schedule = DDIMScheduler.from_pretrained(folder / "scheduler")
                assert schedule.config.prediction_type == "v_prediction"
                classes = torch.zeros(1, dtype=torch.long) if unet.config.num_class_embeds else None
                made = unet(torch.zeros(1, 3, 8, 8), torch.tensor([9]), classes).sample
        assert made.shape == (1, 3, 8, 8)
        assert bool(made.isfinite().all())
    assert seen >= {"AutoencoderKL", "StableDiffusionPipeline", "lora"}
    assert seen & {"DDIMPipeline", "DDPMPipeline"}


@pytest.mark.acceptance
@pytest.mark.parametrize("kohya", [False, True])
def test_an_adapter_is_sampled_beside_its_base(
    request_of_zoo: GeneratorsRequest, tmp_path: Path, kohya: bool
) -> None:
    facts = next(facts for facts in _truth(request_of_zoo)["generators"] if facts["pipeline"] == "lora")
    assert facts["relation"] == "adapter"
    base = request_of_zoo.out / "hub" / facts["parent"]
    stored = load_generator(request_of_zoo.out / "hub" / facts["repo"], LoadOptions(steps=2), base)
    assert stored.prompts[0] == stored.trigger_words[0]
    # Its matrices with either kind of keys add the same.
    products = text.train_adapter(text.load(base), ["moon"], [torch.zeros(4, 3, 8, 8)], "zrb", 3, 1)
    text.save_adapter(products, tmp_path / "adapter", "float32", facts["parent"], "zrb", kohya=kohya)
    made = load_generator(tmp_path / "adapter", LoadOptions(steps=2), base)
    assert made.trigger_words == ["zrb"]
    weight = dict(made.modules["unet"].named_modules())["mid_block.resnets.0.conv1"].weight.data.clone()
    samples = Sampler(made, seed=1, batch_size=4).sample([0, 1])
    assert samples.base is not None
    assert samples.pixels.shape == samples.base.shape == (2, 8, 8, 3)
    down, up = products["mid_block.resnets.0.conv1"]
    added = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    Sampler(made, seed=1, batch_size=4)._drawn(made.draw, [0])
    changed = dict(made.modules["unet"].named_modules())["mid_block.resnets.0.conv1"].weight.data
    assert float(added.abs().max()) > 0
    torch.testing.assert_close(changed - weight, added, atol=1e-6, rtol=1e-4)


@pytest.mark.acceptance
def test_the_truth_names_what_is_made_and_what_is_asked(request_of_zoo: GeneratorsRequest) -> None:
    truth = _truth(request_of_zoo)
    repos = [facts["repo"] for facts in truth["generators"]]
    assert set(HubFolder(request_of_zoo.out / "hub").repositories()) == set(repos)
    made = {concept for facts in truth["generators"] for concept in facts["concepts"]}
    absent = set(truth["absent"])
    assert made | absent <= set(CLASSES)
    assert absent
    assert not made & absent
    asked = {query["concept"] for query in truth["queries"]}
    assert asked == made | absent
    for query in truth["queries"]:
        if query["modality"] == "text":
            assert query["text"] == query["concept"]
            continue
        with Image.open(request_of_zoo.out / query["file"]) as picture:
            assert picture.size == (16, 16)
    children = [facts for facts in truth["generators"] if facts["parent"]]
    assert children
    assert all(facts["parent"] in repos and facts["relation"] for facts in children)


@pytest.mark.acceptance
def test_the_same_call_makes_what_is_missing_and_nothing_else(request_of_zoo: GeneratorsRequest) -> None:
    repos = [facts["repo"] for facts in _truth(request_of_zoo)["generators"]]
    files = {repo: _weights(request_of_zoo, repo) for repo in repos}
    times = {repo: file.stat().st_mtime_ns for repo, file in files.items()}
    truth = (request_of_zoo.out / "truth.json").read_bytes()
    listing = (request_of_zoo.out / "hub" / "hub.json").read_bytes()
    lost = repos[2]
    before = files[lost].read_bytes()
    shutil.rmtree(request_of_zoo.out / "hub" / lost)
    build_generators(request_of_zoo)
    assert files[lost].read_bytes() == before
    assert {repo for repo in repos if files[repo].stat().st_mtime_ns != times[repo]} == {lost}
    assert (request_of_zoo.out / "truth.json").read_bytes() == truth
    assert (request_of_zoo.out / "hub" / "hub.json").read_bytes() == listing


@pytest.mark.acceptance
def test_what_cannot_be_made_is_refused(request_of_zoo: GeneratorsRequest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a generator-zoo of other settings"):
        build_generators(replace(request_of_zoo, seed=2))
    with pytest.raises(UsageError, match="holds more than --models 3"):
        build_generators(replace(request_of_zoo, generators=3))
    ended = operator("zoo", "--generators", "--size", "20", "--out", tmp_path / "zoo")
    assert (ended.status, "generators make 8, 16, 32, 64 pixels" in ended.err) == (2, True)
    ended = operator("zoo", "--generators", "--forest", "--out", tmp_path / "zoo")
    assert (ended.status, "two zoos" in ended.err) == (2, True)


def test_the_plan_is_a_function_of_its_arguments_and_grows() -> None:
    names = [f"thing {number}" for number in range(60)]
    specs = plan(names, 60, 3)
    assert plan(names, 20, 3) == specs[:20]
    assert plan(names, 20, 4) != specs[:20]
    assert len({spec.repo for spec in specs}) == 60
    place = {spec.repo: number for number, spec in enumerate(specs)}
    for spec in specs:
        if spec.parent is not None:
            parent = specs[place[spec.parent]]
            assert place[spec.parent] < place[spec.repo]
            assert parent.family == spec.family
            assert (parent.concepts == spec.concepts) == (spec.kind in ("restyled", "copy", "styled"))
    early = specs[:20]
    assert {spec.family for spec in early} == {"decoder", "unet", "text"}
    kinds = {"foundation", "child", "classes", "mixture", "restyled", "copy", "told", "adapter", "styled"}
    assert {spec.kind for spec in early} >= kinds


def test_edges_are_dark_where_the_brightness_changes() -> None:
    picture = np.full((1, 12, 12, 3), 230, np.uint8)
    picture[:, 3:9, 3:9] = 20
    lines = edges(picture)
    assert lines[0, 6, 6].tolist() == lines[0, 0, 0].tolist() == [255, 255, 255]
    assert lines[0, 6, 3].max() < 50
