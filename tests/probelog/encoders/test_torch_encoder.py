import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probelog.encoders.onnx_export import (
    ExportMismatchError,
    ImageEncoderFiles,
    TextEncoderFiles,
    UnsupportedExportError,
    check_image_encoder,
    check_text_encoder,
    export_image_encoder,
    export_text_encoder,
)
from probelog.encoders.torch_encoder import deferred_encoder, load_encoder
from probelog.errors import UsageError
from tests.support.hub.tiny_hub import environment_for, serving
from tests.support.paths import BENCH as SHARED_BENCH
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_encoders import CONCEPTS, KINDS, photo

BENCH = SHARED_BENCH / "encoder"
kinds = pytest.mark.parametrize("kind", KINDS)
TEXTS = ["a photo of a dog", "husky", "", "a " * 100, "猫"]


def copied(kind: str, to: Path) -> Path:
    return Path(shutil.copytree(tiny_encoders.folder(kind), to / kind))


def change_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = {name: values.copy() for name, values in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@kinds
def test_embeddings_are_unit_rows_that_do_not_depend_on_their_batch(kind):
    encoder = tiny_encoders.encoder(kind)
    texts = encoder.embed_texts(TEXTS)
    images = [photo(40, 30), photo(7, 90), photo(33, 33)]
    pictures = encoder.embed_images(iter(images))
    assert texts.shape == (len(TEXTS), encoder.dimension)
    assert pictures.shape == (3, encoder.dimension)
    assert texts.dtype == pictures.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, pictures]), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.embed_texts(TEXTS, batch_size=1), texts, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_images(images, batch_size=1), pictures, atol=1e-5)
    np.testing.assert_array_equal(encoder.embed_texts(TEXTS), texts)


@kinds
def test_nothing_to_embed_gives_no_rows(kind):
    encoder = tiny_encoders.encoder(kind)
    assert encoder.embed_texts([]).shape == encoder.embed_images([]).shape == (0, encoder.dimension)


def test_embeddings_are_those_of_the_model_itself():
    import torch

    encoder = tiny_encoders.encoder("clip")
    tokens = encoder.tokenizer(["a dog"], return_tensors="pt")
    pixels = encoder.image_processor(images=photo(50, 40), return_tensors="pt")
    with torch.inference_mode():
        text = encoder.model.get_text_features(**tokens).pooler_output.numpy()
        image = encoder.model.get_image_features(**pixels).pooler_output.numpy()
    np.testing.assert_allclose(encoder.embed_texts(["a dog"]), text / np.linalg.norm(text), atol=1e-6)
    np.testing.assert_allclose(
        encoder.embed_images([photo(50, 40)]), image / np.linalg.norm(image), atol=1e-6
    )


def test_siglip_texts_are_padded_to_full_length_without_a_mask():
    encoder = tiny_encoders.encoder("siglip")
    assert encoder.fixed_length
    assert encoder.text_inputs == ("input_ids",)
    assert encoder.tokens(["dog"])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("kind", ["clip", "dual"])
def test_texts_are_padded_to_the_longest_where_padding_changes_nothing(kind):
    encoder = tiny_encoders.encoder(kind)
    assert not encoder.fixed_length
    alone, together = encoder.embed_texts(["a dog"]), encoder.embed_texts(["a dog", "a photo of a dog " * 9])
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)


def test_long_texts_are_cut_but_keep_their_end_token():
    encoder = tiny_encoders.encoder("clip")
    ids = encoder.tokens(["dog " * 50])["input_ids"]
    assert ids.shape == (1, encoder.max_length)
    assert ids[0, -1] == encoder.tokenizer.eos_token_id


def test_positions_of_roberta_begin_after_the_padding_index(tmp_path):
    from transformers import (
        BertTokenizer,
        RobertaConfig,
        VisionTextDualEncoderConfig,
        ViTConfig,
        ViTImageProcessorPil,
    )
    from transformers import VisionTextDualEncoderModel as Dual

    words = ["<s>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    text = RobertaConfig(**tiny_encoders.TOWER, vocab_size=7, max_position_embeddings=22, pad_token_id=1)
    vision = ViTConfig(**tiny_encoders.VISION)
    Dual(
        VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), "cpu")
    assert encoder.max_length == 20
    assert np.isfinite(encoder.embed_texts(["a " * 100])).all()


def test_progress_counts_images():
    told: list[int] = []
    tiny_encoders.encoder("clip").embed_images([photo(9, 9)] * 5, batch_size=2, progress=told.append)
    assert told == [2, 4, 5]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_any_mode_are_embedded(mode):
    encoder = tiny_encoders.encoder("dual")  # its processor does not convert to RGB by itself
    image = (
        photo(20, 20).convert("L").convert("I").convert(mode)
        if mode == "I;16"
        else photo(20, 20).convert(mode)
    )
    assert encoder.embed_images([image]).shape == (1, encoder.dimension)


# The digest


def test_digest_follows_every_file_that_matters_and_no_other(tmp_path):
    folder = copied("clip", tmp_path)
    digest = load_encoder(str(folder), "cpu").digest
    assert digest == tiny_encoders.encoder("clip").digest
    (folder / "README.md").write_text("other words")
    assert load_encoder(str(folder), "cpu").digest == digest
    seen = {digest}
    for name in ("preprocessor_config.json", "tokenizer_config.json", "config.json"):
        path = folder / name
        path.write_text(path.read_text() + "\n")
        seen.add(load_encoder(str(folder), "cpu").digest)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    seen.add(load_encoder(str(folder), "cpu").digest)
    assert len(seen) == 5


# What cannot be loaded


@pytest.mark.parametrize("source", ["no such folder", "./nowhere/clip", "/nowhere", "a/b/c", ""])
def test_missing_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"config\.json"):
        load_encoder(source)


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    folder = copied("clip", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="other formats are not loaded"):
        load_encoder(str(folder))


def test_a_classifier_is_not_an_encoder(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    folder = copied("dual", tmp_path)
    ViTForImageClassification(ViTConfig(**tiny_encoders.VISION)).save_pretrained(folder)
    with pytest.raises(UsageError, match="not an image-text encoder"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "never-heard-of"}'),
        ("tokenizer.json", "[]"),
        ("preprocessor_config.json", "{}"),
        ("model.safetensors", "short"),
    ],
)
def test_damaged_files(tmp_path, name, content):
    folder = copied("clip", tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match=r"cannot be loaded|does not run"):
        load_encoder(str(folder))


def test_weights_that_miss_a_layer_are_refused_rather_than_made_up(tmp_path):
    folder = copied("clip", tmp_path)
    change_weights(folder, lambda weights: weights.pop("text_projection.weight"))
    with pytest.raises(UsageError, match=r"text_projection\.weight"):
        load_encoder(str(folder))


def align(folder: Path, dimension: int) -> Path:
    """An ALIGN over the dual encoder's tokenizer; its image tower gives 64 dimensions."""
    from transformers import AlignConfig, AlignModel, EfficientNetImageProcessorPil

    text = {**tiny_encoders.TOWER, "vocab_size": 12, "max_position_embeddings": 24}
    vision = {"hidden_dim": 64, "width_coefficient": 0.2, "depth_coefficient": 0.2, "image_size": 64}
    config = AlignConfig(text_config=text, vision_config=vision, projection_dim=dimension)
    AlignModel(config).save_pretrained(folder)
    EfficientNetImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_towers_of_different_dimensions_are_refused(tmp_path):
    with pytest.raises(UsageError, match="64 dimensions, its texts 32"):
        load_encoder(str(align(copied("dual", tmp_path), 32)), "cpu")


# The Hub, over a real socket

_LOAD = """
import sys
from probelog.encoders.torch_encoder import deferred_encoder, load_encoder
from probelog.errors import ProbeLogError
try:
    print(load_encoder(sys.argv[1], "cpu").digest)
except ProbeLogError as error:
    print(type(error).__name__, error)
"""


def load_elsewhere(source: str, endpoint: str, home: Path) -> str:
    """Load in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = environment_for(endpoint, home)
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, source], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hub():
    with serving(tiny_encoders.folder("clip"), "models") as endpoint:
        yield endpoint


def test_an_encoder_from_the_hub_is_the_one_in_the_folder(hub, tmp_path):
    assert load_elsewhere("owner/name", hub, tmp_path) == tiny_encoders.encoder("clip").digest


def test_an_unknown_repository(hub, tmp_path):
    answer = load_elsewhere("owner/other", hub, tmp_path)
    assert answer.startswith("UsageError")
    assert hub in answer


def test_a_hub_that_cannot_be_reached(tmp_path):
    answer = load_elsewhere("owner/name", "http://127.0.0.1:9", tmp_path)
    assert answer.startswith("ProbeLogError")
    assert "Set HF_ENDPOINT" in answer


# Export


@kinds
def test_exported_towers_agree_with_the_encoder(kind):
    encoder = tiny_encoders.encoder(kind)
    assert check_text_encoder(encoder, tiny_encoders.text_files(kind), CONCEPTS) < 1e-5
    assert (
        check_image_encoder(encoder, tiny_encoders.image_files(kind), [photo(100, 333), photo(1, 1)]) < 1e-5
    )


def test_settings_are_plain_json():
    for files in (tiny_encoders.text_files("clip"), tiny_encoders.image_files("clip")):
        assert json.loads(json.dumps(files.settings)) == files.settings


def test_exporter_is_quiet(tmp_path, capfd):
    folder = copied("siglip", tmp_path)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    encoder = load_encoder(str(folder), "cpu")  # one that was not exported before
    capfd.readouterr()
    export_text_encoder(encoder)
    assert capfd.readouterr() == ("", "")


def test_an_export_that_differs_is_refused(tmp_path):
    clip, dual = (tiny_encoders.text_files(kind) for kind in ("clip", "dual"))
    with pytest.raises(ExportMismatchError, match="tokenizer"):
        check_text_encoder(
            tiny_encoders.encoder("dual"), TextEncoderFiles(dual.onnx, clip.tokenizer_json, dual.settings)
        )
    folder = copied("clip", tmp_path)
    change_weights(folder, lambda weights: weights["text_projection.weight"].__imul__(-1))
    other = load_encoder(str(folder), "cpu")
    with pytest.raises(ExportMismatchError, match="off by"):
        check_text_encoder(other, clip)
    image = tiny_encoders.image_files("clip")
    wrong = ImageEncoderFiles(image.onnx, image.settings | {"resample": int(Image.Resampling.NEAREST)})
    with pytest.raises(ExportMismatchError, match="image tower"):
        check_image_encoder(tiny_encoders.encoder("clip"), wrong)


def test_preprocessing_of_its_own_kind_is_not_exported(tmp_path):
    encoder = load_encoder(str(align(copied("dual", tmp_path), 64)), "cpu")
    assert encoder.embed_images([photo(30, 30)]).shape == (1, 64)
    assert check_text_encoder(encoder, export_text_encoder(encoder)) < 1e-5
    with pytest.raises(UnsupportedExportError, match="EfficientNet"):
        export_image_encoder(encoder)


def test_preprocessing_without_one_size_is_not_exported(tmp_path):
    folder = copied("clip", tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_center_crop": False}))
    with pytest.raises((UnsupportedExportError, UsageError), match=r"different sizes|does not run"):
        export_image_encoder(load_encoder(str(folder), "cpu"))


@pytest.mark.acceptance
def test_bench_encoder_exports():
    if not BENCH.is_dir():
        pytest.skip(f"bench data missing: {BENCH}")
    encoder = load_encoder(str(BENCH), "cpu")
    names = (BENCH.parent / "concepts.txt").read_text().split("\n")[:50]
    assert check_text_encoder(encoder, export_text_encoder(encoder), names) < 1e-5
    assert check_image_encoder(encoder, export_image_encoder(encoder), [photo(300, 200)]) < 1e-4


def test_a_deferred_encoder_loads_when_it_is_used(tmp_path):
    folder = tiny_encoders.folder("clip")
    encoder, loaded = deferred_encoder(str(folder)), load_encoder(str(folder))
    assert (encoder.source, encoder.digest) == (loaded.source, loaded.digest)
    assert "model" not in vars(encoder)
    np.testing.assert_array_equal(encoder.embed_texts(CONCEPTS), loaded.embed_texts(CONCEPTS))
    assert encoder.dimension == loaded.dimension
    missing = deferred_encoder(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no such folder"):
        missing.digest  # noqa: B018 - looked for when it is asked for
