"""The query side: what an analyst's machine runs, without torch."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from probelog.encoders.image import ImageEncoder, ImageSettings, pixels
from probelog.encoders.text import TextEncoder, unit_rows
from probelog.errors import QueryError, SchemaVersionError, StoreError
from tests.probelog.encoders.test_decoding import bomb, encoded
from tests.support.paths import CHECKOUT
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_encoders import CONCEPTS, KINDS, photo


def text_encoder(kind: str) -> TextEncoder:
    files = tiny_encoders.text_files(kind)
    return TextEncoder(files.onnx, files.tokenizer_json, files.settings)


def image_encoder(kind: str = "clip") -> ImageEncoder:
    files = tiny_encoders.image_files(kind)
    return ImageEncoder(files.onnx, files.settings)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_embedded_as_the_encoder_does(kind):
    found = text_encoder(kind).embed(CONCEPTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tiny_encoders.encoder(kind).embed_texts(CONCEPTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_says_nothing_of_the_machine_that_made_it(kind):
    for files in (tiny_encoders.text_files(kind), tiny_encoders.image_files(kind)):
        for place in (str(CHECKOUT), sys.prefix, ".py"):
            assert place.encode() not in files.onnx


def test_no_text_gives_no_rows():
    assert text_encoder("dual").embed([]).shape == (0, 16)


def test_text_that_is_not_unicode_is_embedded():
    assert np.isfinite(text_encoder("dual").embed(["dog \udcff"])).all()


def test_threads_share_one_encoder():
    encoder = text_encoder("clip")
    want = encoder.embed(CONCEPTS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: encoder.embed(CONCEPTS), range(40)):
            np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "text", "unknown"),
    [
        ("dual", "a photo of a dog", []),
        ("dual", "A photo of a DOG, huskys!", []),
        ("dual", "zebra dog zebra, okapi", ["zebra", "okapi"]),
        ("dual", "猫 dog", ["猫"]),
        ("siglip", "any latin word", []),
        ("siglip", "собака dog!", ["собака"]),
        ("clip", "zebra 猫 🐕", []),
        ("clip", "", []),
    ],
)
def test_unknown_words(kind, text, unknown):
    assert text_encoder(kind).unknown_words([text, "", text]) == [unknown, [], unknown]


def test_files_may_lie_on_disk(tmp_path):
    files = tiny_encoders.text_files("dual")
    (tmp_path / "text.onnx").write_bytes(files.onnx)
    found = TextEncoder(tmp_path / "text.onnx", files.tokenizer_json, files.settings).embed(["dog"])
    np.testing.assert_array_equal(found, text_encoder("dual").embed(["dog"]))


def test_damaged_files_say_so_when_used():
    files = tiny_encoders.text_files("dual")
    with pytest.raises(StoreError, match="text encoder is damaged"):
        TextEncoder(b"nonsense", files.tokenizer_json, files.settings).embed(["dog"])
    with pytest.raises(StoreError, match="tokenizer is damaged"):
        TextEncoder(files.onnx, "{}", files.settings).embed(["dog"])
    with pytest.raises(StoreError, match="image encoder is damaged"):
        ImageEncoder(b"nonsense", tiny_encoders.image_files("clip").settings).embed([photo(9, 9)])


@pytest.mark.parametrize(
    ("change", "error"),
    [({"version": 2}, SchemaVersionError), ({"version": None}, StoreError), ({"surplus": 1}, StoreError)],
)
def test_settings_of_another_make_are_refused(change, error):
    text, image = tiny_encoders.text_files("dual"), tiny_encoders.image_files("clip")
    with pytest.raises(error):
        TextEncoder(text.onnx, text.tokenizer_json, text.settings | change)
    with pytest.raises(error):
        ImageEncoder(image.onnx, image.settings | change)


@pytest.mark.parametrize("size", [(32, 32), (31, 97), (333, 64), (5, 7), (640, 481), (1, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_equal_to_those_of_the_processor(kind, size):
    image = photo(*size)
    want = tiny_encoders.encoder(kind).image_processor(images=image, return_tensors="np")["pixel_values"][0]
    settings = ImageSettings.from_dict(tiny_encoders.image_files(kind).settings)
    np.testing.assert_array_equal(pixels(image, settings), want)


def test_crop_larger_than_the_image_is_padded_as_the_processor_does():
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 33, "width": 46})
    settings = ImageSettings.from_dict(
        tiny_encoders.image_files("clip").settings | {"shortest_edge": 20, "crop": [33, 46]}
    )
    for size in ((50, 41), (41, 50), (20, 20)):
        want = processor(images=photo(*size), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(pixels(photo(*size), settings), want)


def test_images_come_as_objects_files_and_bytes(tmp_path):
    image = photo(50, 40)
    (tmp_path / "bild ä.png").write_bytes(encoded(image))
    found = image_encoder().embed(
        [image, tmp_path / "bild ä.png", str(tmp_path / "bild ä.png"), encoded(image)]
    )
    assert found.shape == (4, 16)
    np.testing.assert_allclose(found, np.repeat(found[:1], 4, axis=0), atol=1e-6)
    np.testing.assert_allclose(found[:1], tiny_encoders.encoder("clip").embed_images([image]), atol=1e-5)


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(bomb())
    encoder = image_encoder()
    for name in ("text.png", "bomb.png", "missing.png"):
        with pytest.raises(QueryError, match=name):
            encoder.embed([photo(9, 9), tmp_path / name])
    with pytest.raises(QueryError, match="it is a folder"):
        encoder.embed([tmp_path])
    with pytest.raises(QueryError, match="image number 2"):
        encoder.embed([photo(9, 9), b"no image"])


def test_unit_rows_leave_zero_alone():
    np.testing.assert_array_equal(
        unit_rows(np.array([[0.0, 0.0], [3.0, 4.0]])), np.float32([[0, 0], [0.6, 0.8]])
    )


_CLIENT = """
import json, sys
from pathlib import Path
from PIL import Image
from probelog.encoders.image import ImageEncoder
from probelog.encoders.text import TextEncoder
folder = Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())
text = TextEncoder(folder / "text.onnx", (folder / "tokenizer.json").read_text(), settings["text"])
assert text.embed(["dog"]).shape == (1, text.dimension)
assert text.unknown_words(["dog zebra"]) == [[]]
image = ImageEncoder(folder / "image.onnx", settings["image"])
assert image.embed([Image.new("RGB", (9, 9))]).shape == (1, image.dimension)
heavy = {"torch", "transformers", "huggingface_hub", "timm", "ray", "onnx", "boto3"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_queries_need_neither_torch_nor_transformers(tmp_path):
    text, image = tiny_encoders.text_files("clip"), tiny_encoders.image_files("clip")
    (tmp_path / "text.onnx").write_bytes(text.onnx)
    (tmp_path / "image.onnx").write_bytes(image.onnx)
    (tmp_path / "tokenizer.json").write_text(text.tokenizer_json)
    (tmp_path / "settings.json").write_text(json.dumps({"text": text.settings, "image": image.settings}))
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
