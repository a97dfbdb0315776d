"""The demo's world: rendering, sampling and a toy build, all from the real fonts."""

from __future__ import annotations

import io
import json
import pickletools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.demo.builder import build, classifiers, generators, hostile, icons, render, vocabulary
from pipelines.demo.builder.__main__ import main
from pipelines.zoo import networks
from probelog.errors import UsageError


@pytest.fixture(scope="module")
def found() -> build.Things:
    return build.things()


def test_concepts_are_many_distinct_and_drawn_by_several_designers(found):
    names = [drawn.name for drawn in found.concepts]
    assert len(names) == len(set(names)) > 250
    assert sum(len(drawn.drawings) >= 3 for drawn in found.concepts) > 150
    assert {"dog", "cat", "umbrella", "guitar", "airplane"} <= set(names)
    assert not set(names) & {drawn.name for drawn in found.others}
    assert all(
        icons.mask(glyph) is not None
        for drawn in found.concepts
        for glyph in sum(drawn.drawings.values(), ())
    )


def test_no_drawing_stands_for_two_concepts(found):
    owners: dict[tuple[str, int], str] = {}
    for drawn in (*found.concepts, *found.others):
        for glyphs in drawn.drawings.values():
            for glyph in glyphs:
                assert owners.setdefault((glyph.font.name, glyph.code), drawn.name) == drawn.name, glyph


@pytest.mark.parametrize(
    ("glyph_name", "base"),
    [
        ("car-2-fill", "car"),
        ("cat", "cat"),
        ("bell-thin", "bell"),
        ("horse-variant", "horse"),
        ("line", "line"),
    ],
)
def test_base_names(glyph_name, base):
    assert icons.base_name(glyph_name) == base


def test_every_table_row_is_well_formed():
    rows = [*vocabulary.concepts(), *vocabulary.others()]
    assert all(row.name and row.glyphs and "|" not in row.name for row in rows)
    fonts = {designer for row in rows for designer, _ in row.glyphs}
    assert fonts <= {"", *icons.DESIGNERS}


def test_rendering_is_a_pure_function_of_seed_and_index(found):
    drawing = icons.mask(found.concepts[0].drawings["mdi"][0])
    assert drawing is not None
    first = render.render(drawing, 7, 3)
    assert first.shape == (render.SIZE, render.SIZE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, render.render(drawing, 7, 3))
    assert not np.array_equal(first, render.render(drawing, 7, 4))
    assert not np.array_equal(first, render.render(drawing, 8, 3))


def test_drawings_stand_out_from_the_ground(found):
    glyphs = [drawn.drawings["mdi"][0] for drawn in found.concepts[:60] if "mdi" in drawn.drawings]
    pictures = render.render_many(glyphs, 0)
    assert (pictures.reshape(len(pictures), -1).std(axis=1) > 8).all()


def test_probes_mix_what_is_taught_with_what_is_not(found):
    chosen = build.probe_glyphs(found, 500, 0)
    assert chosen == build.probe_glyphs(found, 500, 0)
    assert chosen != build.probe_glyphs(found, 500, 1)
    taught = {found.concepts[i].name for i in classifiers.known_concepts(found.concepts)}
    share = np.mean([name in taught for name, _ in chosen])
    assert 0.3 < share < 0.5


def test_plan_covers_every_taught_concept_with_every_kind_of_model(found):
    specs = classifiers.plan(found.concepts, 0)
    assert [spec.repo for spec in specs] == [spec.repo for spec in classifiers.plan(found.concepts, 0)]
    assert len({spec.repo for spec in specs}) == len(specs) >= 24
    assert {spec.kind for spec in specs} == {"icons", "wild", "multilabel", "binary", "child", "copy"}
    assert {spec.dtype for spec in specs} == {"float16", "bfloat16", "float32"}
    assert {networks.ARCHITECTURES[spec.architecture].library for spec in specs} == {
        "timm",
        "transformers",
    }
    assert any(spec.sharded for spec in specs)
    assert any(spec.labels[0] == "LABEL_0" for spec in specs)
    taught = {number for spec in specs for members in spec.classes for number in members}
    assert set(classifiers.known_concepts(found.concepts)) <= taught
    repos = {spec.repo for spec in specs}
    assert all(spec.parent in repos for spec in specs if spec.kind in ("child", "copy"))


def test_pickle_would_open_a_file_and_is_never_loaded_here():
    operations = [(code.name, argument) for code, argument, _ in pickletools.genops(hostile.evil_pickle())]
    assert ("GLOBAL", "io open") in operations
    assert ("BINUNICODE", hostile.PICKLE_VICTIM) in operations
    assert not Path(hostile.PICKLE_VICTIM).exists()


def test_toy_world_is_complete_and_loads(tmp_path):
    out = tmp_path / "world"
    assert main(["--out", str(out), "--quick", "--workers", "1"]) == 0
    rows = json.loads((out / "hub" / "hub.json").read_text())
    assert all((out / "hub" / row["id"]).is_dir() and len(row["sha"]) == 40 for row in rows)
    assert {row["id"] for row in rows} >= set(hostile.REPOSITORIES)
    assert next(row for row in rows if row["id"] == "closed/gated-classifier")["gated"] == "manual"
    truth = json.loads((out / "truth.json").read_text())
    numbers = {number for model in truth["models"].values() for logit in model["logits"] for number in logit}
    assert max(numbers) < len(truth["classes"])
    assert set(truth["concepts"]) <= set((out / "concepts.txt").read_text().splitlines())
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert not suffixes & {".ttf", ".otf"}

    probes = pq.read_table(out / "probes.parquet")
    picture = Image.open(io.BytesIO(probes["image"][0].as_py()["bytes"]))
    assert picture.size == (64, 64)
    _check_models_load(out, truth)
    _check_encoder_loads(out, picture)


def _check_models_load(out: Path, truth: dict) -> None:
    import timm
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    libraries = set()
    for repo, model in truth["models"].items():
        folder = out / "hub" / repo
        config = json.loads((folder / "config.json").read_text())
        pixels = torch.zeros(1, 3, 64, 64)
        if "architecture" in config:
            network = timm.create_model(config["architecture"], num_classes=config["num_classes"])
            network.load_state_dict(networks.state(folder))
            logits = network.eval()(pixels)
            assert config["label_names"]
            assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
            libraries.add("timm")
        else:
            network, info = AutoModelForImageClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            assert AutoImageProcessor.from_pretrained(folder, local_files_only=True) is not None
            logits = network(pixels).logits
            libraries.add("transformers")
        assert logits.shape == (1, len(model["logits"]))
    assert libraries == {"timm", "transformers"}


def _check_encoder_loads(out: Path, picture: Image.Image) -> None:
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    model = AutoModel.from_pretrained(out / "encoder", local_files_only=True)
    processor = AutoProcessor.from_pretrained(out / "encoder", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "encoder", local_files_only=True)
    words = tokenizer(["a photo of a dog", "Xylophone"], padding=True, return_tensors="pt")
    assert (words["input_ids"] != tokenizer.unk_token_id).all()
    texts = model.get_text_features(**words).pooler_output
    pixels = processor.image_processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    images = model.get_image_features(pixel_values=pixels).pooler_output
    assert texts.shape == (2, 128)
    assert images.shape == (1, 128)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match="not empty"):
        build.build(tmp_path, quick=True)


def test_training_is_the_same_every_time(found):
    concepts = found.concepts[:8]
    spec = classifiers.plan(concepts, 0, quick=True)[0]
    first, second = (
        classifiers.train(spec, concepts, classifiers.QUICK, "cpu").state_dict() for _ in range(2)
    )
    assert all((first[key] == second[key]).all() for key in first)


SHIPPED = Path(build.__file__).parents[1] / "world"
shipped = pytest.mark.skipif(
    not (SHIPPED / "truth.json").is_file(),
    reason=f"{SHIPPED} is missing: python -m pipelines.demo.builder --out {SHIPPED}",
)


@shipped
def test_shipped_world_is_small_and_holds_nothing_unexpected():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    suffixes = {path.suffix for path in files if path.parent.name not in ("pickle-only", "remote-code")}
    assert suffixes == {".safetensors", ".json", ".parquet", ".txt", ".md"}
    assert (SHIPPED / "hub/unsafe/pickle-only/pytorch_model.bin").read_bytes() == hostile.evil_pickle()


@shipped
def test_shipped_world_agrees_with_the_plan(found):
    truth = json.loads((SHIPPED / "truth.json").read_text())
    specs = {spec.repo: spec for spec in classifiers.plan(found.concepts, 0)}
    assert set(truth["models"]) == set(specs)
    for repo, model in truth["models"].items():
        assert [tuple(members) for members in model["logits"]] == list(specs[repo].classes)
        assert model["accuracy"] >= 0.85, repo
    listed = {row["id"] for row in json.loads((SHIPPED / "hub" / "hub.json").read_text())}
    made = json.loads((SHIPPED / "generators.json").read_text())["generators"]
    assert len(made) == generators.COUNT
    assert listed == set(specs) | set(hostile.REPOSITORIES) | {facts["repo"] for facts in made}
    copies = [spec for spec in specs.values() if spec.kind == "copy"]
    for spec in copies:
        weights = [
            (SHIPPED / "hub" / repo / "model.safetensors").read_bytes() for repo in (spec.repo, spec.parent)
        ]
        assert weights[0] == weights[1]


@shipped
def test_shipped_probes_are_those_of_the_seed(found):
    made = build.probe_glyphs(found, build.PROBES, 0)
    table = pq.read_table(SHIPPED / "probes.parquet")
    assert table["shows"].to_pylist() == [name for name, _ in made]
    picture = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])).convert("RGB")
    exact = render.render_many([made[0][1]], 0, first=1_000_000, noise=False)[0]
    assert np.abs(np.asarray(picture).astype(int) - exact).mean() < 12
