"""An encoder is exported once: what is kept of it is used again, and only while it is whole."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.inspect.verify import Verified, verify
from pipelines.job.progress import Report
from pipelines.publish.encoder import ExportedEncoder, exported_encoder, sweep_exports
from probelog.encoders import onnx_export
from probelog.encoders.torch_encoder import Encoder, load_encoder
from probelog.errors import SchemaVersionError
from probelog.index.pointer import Pointer
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import BUILDING, go_live
from probelog.storage.checksummed_json import sealed_json
from probelog.storage.store import Store
from tests.support.worlds import tiny_encoders
from tests.support.worlds.small_index import some_settings

PROMPTS = ["a photo of a dog", "a photo of a chair"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the export of the tiny CLIP; not to be changed."""
    root = tmp_path_factory.mktemp("exported")
    exported_encoder(Store(root), Report(io.StringIO()), tiny_encoders.encoder("clip"), PROMPTS)
    return root


class Kept:
    """A copy of that store, to be changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (self.folder,) = (root / "encoders").iterdir()
        self.receipt = self.folder / "receipt.json"
        self.said = io.StringIO()

    def publish(self, encoder: Encoder | None = None) -> ExportedEncoder:
        """What a publish does with the encoder."""
        encoder = encoder or tiny_encoders.encoder("clip")
        exported, text, image = exported_encoder(Store(self.root), Report(self.said), encoder, PROMPTS)
        assert text < 1e-4
        assert (image is None) == (exported.image is None)
        return exported

    def written(self) -> dict[str, int]:
        """When each file was written: an export writes all of them. The receipt is, whenever it is used."""
        times = {path.name: path.stat().st_mtime_ns for path in self.folder.iterdir()}
        return times | ({"receipt.json": 0} if "receipt.json" in times else {})

    def change_receipt(self, **facts: Any) -> None:
        content = json.loads(self.receipt.read_text())
        del content["seal"]
        self.receipt.write_bytes(sealed_json(content | facts))

    def verify(self) -> Verified:
        return verify(str(self.root), Report(io.StringIO()))


@pytest.fixture
def kept(exported: Path, tmp_path: Path) -> Kept:
    return Kept(shutil.copytree(exported, tmp_path / "store"))


def test_the_same_encoder_is_not_exported_again(kept: Kept, tmp_path: Path) -> None:
    written = kept.written()
    assert set(written) == {"text_encoder.onnx", "tokenizer.json", "image_encoder.onnx", "receipt.json"}
    first = kept.publish()
    # The same files in another folder are the same encoder: only its name in the settings is another.
    moved = shutil.copytree(tiny_encoders.folder("clip"), tmp_path / "moved")
    again = kept.publish(load_encoder(str(moved), "cpu"))
    assert kept.written() == written
    assert (again.text.onnx, again.text.tokenizer_json) == (first.text.onnx, first.text.tokenizer_json)
    assert again.text.settings["made_with"].pop("encoder") == str(moved)
    assert first.text.settings["made_with"].pop("encoder") == str(tiny_encoders.folder("clip"))
    assert again.text.settings == first.text.settings
    assert not kept.said.getvalue()


def test_the_key_follows_the_encoder_and_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {onnx_export.export_key(tiny_encoders.encoder(kind)) for kind in ("clip", "dual")}
    monkeypatch.setattr(onnx_export, "EXPORT_VERSION", onnx_export.EXPORT_VERSION + 1)
    keys.add(onnx_export.export_key(tiny_encoders.encoder("clip")))
    monkeypatch.setattr(onnx_export, "version", lambda library: f"another {library}")
    keys.add(onnx_export.export_key(tiny_encoders.encoder("clip")))
    assert len(keys) == 4


def test_a_killed_export_is_not_used(kept: Kept) -> None:
    """The receipt is written last: without it the files count for nothing."""
    kept.receipt.unlink()
    (kept.folder / "image_encoder.onnx").write_bytes(b"half")
    assert {item["path"].rsplit("/", 1)[1] for item in kept.verify().unexpected} == set(kept.written())
    exported = kept.publish()
    assert exported.image is not None
    assert (kept.folder / "image_encoder.onnx").read_bytes() == exported.image.onnx
    assert kept.verify().clean
    assert not kept.verify().unexpected


def test_what_nobody_needs_is_swept(kept: Kept) -> None:
    """An export stays while a kept generation carries it, and for a day after it was used for the last time."""
    store = Store(kept.root)
    index, mine = store.child("index"), kept.folder.name
    for key in ("before", "unused", "used"):
        shutil.copytree(kept.folder, kept.folder.parent / key)
    store.write("encoders/half/tokenizer.json", b"written by a publish that was killed")
    at = time.time() - BUILDING.total_seconds() - 60

    def age(*folders: str) -> None:
        for folder in folders:
            for file in (kept.folder.parent / folder).iterdir():
                os.utime(file, (at, at))

    def live(name: str, export: str, keep: int = 3) -> Pointer:
        writer = GenerationWriter(index, name)
        settings = some_settings(
            text_encoder={"made_with": {"export": export}}, models=0, logits=0, probes=1, sharpness=1.0, rows=0,
            large=False, middle_offset=0.0,
        )  # fmt: skip
        writer.write_meta({"settings": settings.to_bytes()})
        writer.finish()
        return go_live(index, name, name, keep)

    age(mine, "before", "unused", "half")
    live("a", "before")
    pointer = live("b", mine)
    assert sweep_exports(store, pointer) == ["half", "unused"]
    assert {path.name for path in kept.folder.parent.iterdir()} == {mine, "before", "used"}
    made_with = kept.publish().text.settings["made_with"]
    assert made_with["export"] == mine, "it says which one a generation carries"

    pointer = live("c", "another", keep=1)
    assert sweep_exports(store, pointer) == ["before"]
    age(mine)
    assert sweep_exports(store, pointer) == [mine]
    assert sweep_exports(store, pointer) == []


def test_a_damaged_export_is_found_and_replaced(kept: Kept) -> None:
    for name in kept.written():
        file = kept.folder / name
        data = file.read_bytes()
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        assert [item["path"] for item in kept.verify().damaged] == [f"encoders/{kept.folder.name}/{name}"]
        file.write_bytes(data)
    (kept.folder / "text_encoder.onnx").write_bytes(b"half")
    (kept.folder / "image_encoder.onnx").unlink()
    missing = [item["path"] for item in kept.verify().missing]
    assert missing == [f"encoders/{kept.folder.name}/image_encoder.onnx"]
    kept.publish()
    assert "is damaged, it is exported again" in kept.said.getvalue()
    assert kept.verify().clean


def test_that_there_is_no_image_tower_is_kept_too(kept: Kept) -> None:
    files = json.loads(kept.receipt.read_text())["files"]
    del files["image_encoder.onnx"]
    kept.change_receipt(image=None, image_missing="it pads images", files=files)
    written = kept.written()
    assert kept.publish().image_missing == "it pads images"
    assert kept.written() == written
    assert "will not be searchable by image: it pads images" in kept.said.getvalue()


def test_what_a_newer_version_kept_stays(kept: Kept) -> None:
    kept.change_receipt(version=99)
    written = kept.written()
    with pytest.raises(SchemaVersionError, match="Upgrade ProbeLog"):
        kept.publish()
    assert kept.written() == written


def test_an_export_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the encoder before it is kept."""
    real = Encoder.embed_images
    monkeypatch.setattr(Encoder, "embed_images", lambda self, images: -real(self, images))
    with pytest.raises(onnx_export.ExportMismatchError, match="image tower is off"):
        exported_encoder(Store(tmp_path), Report(io.StringIO()), tiny_encoders.encoder("clip"), PROMPTS)
    assert not (tmp_path / "encoders").exists()
