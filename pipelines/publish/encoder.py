"""The exported encoder, kept in the store: an export takes minutes, and every publish with this encoder needs the same.

Its folder's key names the encoder and what exports it (`probelog.encoders.onnx_export.export_key`), so that nothing here
is ever out of date. The receipt, written last, has the settings of both towers, sizes and digests of the files. What no
kept generation carries and no publish has used for a day is deleted (`sweep_exports`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.job.progress import Report
from probelog.encoders.onnx_export import (
    ImageEncoderFiles,
    TextEncoderFiles,
    UnsupportedExportError,
    check_image_encoder,
    check_text_encoder,
    export_image_encoder,
    export_key,
    export_text_encoder,
)
from probelog.encoders.torch_encoder import Encoder
from probelog.errors import SchemaVersionError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.publication.lifecycle import BUILDING
from probelog.storage.encoding import digest
from probelog.storage.layout import ENCODERS, IMAGE_ENCODER, INDEX, TEXT_ENCODER, TOKENIZER, EncoderFolder
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

EXPORT_RECEIPT_VERSION = 1


@dataclass(frozen=True)
class ExportedEncoder:
    """Both towers of an encoder as an index carries them.

    Attributes:
        text: the text tower and its tokenizer.
        image: the image tower; None where it cannot be exported: such an index is still searched by text.
        image_missing: the reason, where there is none.
    """

    text: TextEncoderFiles
    image: ImageEncoderFiles | None
    image_missing: str | None


def exported_encoder(
    store: Store, report: Report, encoder: Encoder, prompts: Sequence[str]
) -> tuple[ExportedEncoder, float, float | None]:
    """The encoder's towers, from the store or exported now and kept there; checked against the encoder.

    Returns:
        The towers, and the largest absolute difference from the encoder in any component of a text's and of an image's
        embedding (unit vectors); None for images without an image tower.

    Raises:
        UnsupportedExportError: the text tower cannot be exported.
        ExportMismatchError: a tower does not give what the encoder gives. Such an export is not kept.
        SchemaVersionError: kept by a newer ProbeLog.
    """
    folder = EncoderFolder.of(export_key(encoder))
    _renew(store, folder)
    stored = _read_or_none(store, report, folder, encoder.source)
    exported = stored or _export(report, encoder)
    text_difference = check_text_encoder(encoder, exported.text, prompts)
    image_difference = None
    if exported.image is not None:
        image_difference = check_image_encoder(encoder, exported.image)
    else:
        report.say(f"publish: this index will not be searchable by image: {exported.image_missing}")
    if stored is None:
        _write(store, folder, exported)
    return exported, text_difference, image_difference


def _export(report: Report, encoder: Encoder) -> ExportedEncoder:
    report.line("publish: exporting the encoder")
    text = export_text_encoder(encoder)
    try:
        return ExportedEncoder(text, export_image_encoder(encoder), None)
    except UnsupportedExportError as error:
        return ExportedEncoder(text, None, str(error))


def _write(store: Store, folder: EncoderFolder, exported: ExportedEncoder) -> None:
    files = {
        TEXT_ENCODER: exported.text.onnx,
        TOKENIZER: exported.text.tokenizer_json.encode(),
    }
    if exported.image is not None:
        files[IMAGE_ENCODER] = exported.image.onnx
    for name, data in files.items():
        store.write(folder.file(name), data)
    receipt = {
        "version": EXPORT_RECEIPT_VERSION,
        "made_by": MADE_BY,
        "text": exported.text.settings,
        "image": None if exported.image is None else exported.image.settings,
        "image_missing": exported.image_missing,
        "files": {name: {"size": len(data), "sha256": digest(data)} for name, data in files.items()},
    }
    store.write_json(folder.receipt, receipt)


def sweep_exports(store: Store, pointer: Pointer) -> list[str]:
    """Delete unused exports; returns their keys.

    An export is kept if a generation in the pointer carries it, or if it was used less than ``BUILDING`` ago (a
    generation with it may be under construction).
    """
    written = defaultdict(list)
    for name in store.names(ENCODERS):
        written[name.split("/")[1]].append(store.modified(name))
    now = store.time() if written else None
    unused = {
        key
        for key, times in written.items()
        if all(now and time and now - time >= BUILDING for time in times)
    }
    index = store.child(INDEX)
    for item in pointer.kept_facts if unused else []:
        generation = Generation(index, Pointer(str(item["generation"]), "", "", base=item.get("base")))
        unused.discard(generation.settings.text_encoder.get("made_with", {}).get("export"))
    for key in sorted(unused):
        store.delete_folder(EncoderFolder.of(key).path)
    return sorted(unused)


def _renew(store: Store, folder: EncoderFolder) -> None:
    """Mark an export as used, by writing its receipt again: recently written exports are not swept."""
    receipt = store.read_or_none(folder.receipt)
    if receipt is not None:
        store.write(folder.receipt, receipt)


def _read_or_none(store: Store, report: Report, folder: EncoderFolder, source: str) -> ExportedEncoder | None:
    """The export that an earlier publish kept; None where there is none, or where it is damaged."""
    try:
        receipt = store.read_json_or_none(folder.receipt)
        if receipt is None:
            return None
        where = store.path(folder.path)
        check_version(receipt, EXPORT_RECEIPT_VERSION, where, "exported encoder")
        files = {name: _file(store, folder.file(name), item) for name, item in receipt["files"].items()}
        tokenizer = files[TOKENIZER].decode()
        text = TextEncoderFiles(files[TEXT_ENCODER], tokenizer, _settings(receipt["text"], source))
        image = None
        if receipt["image"] is not None:
            image = ImageEncoderFiles(files[IMAGE_ENCODER], _settings(receipt["image"], source))
        return ExportedEncoder(text, image, receipt["image_missing"])
    except SchemaVersionError:
        raise
    except (StoreError, FileNotFoundError, KeyError, TypeError) as error:
        report.say(f"publish: the kept export of the encoder is damaged, it is exported again: {error}")
        return None


def _file(store: Store, path: str, item: dict[str, Any]) -> bytes:
    data = store.read(path)
    if digest(data) != item["sha256"]:
        raise StoreError(f"{store.path(path)} is damaged: its digest is not the one in its receipt")
    return data


def _settings(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings of a tower; the same encoder may lie in another folder now."""
    return settings | {"made_with": settings["made_with"] | {"encoder": source}}
