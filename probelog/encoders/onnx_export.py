"""Exporting an encoder's towers to ONNX, so that an index answers queries without torch and without the Hub."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from probelog.encoders.image import ImageEncoder, ImageSettings
from probelog.encoders.text import TextEncoder, TextSettings
from probelog.encoders.torch_encoder import Encoder, pooled
from probelog.encoders.towers import TextTower
from probelog.errors import ProbeLogError
from probelog.storage.encoding import short_key

if TYPE_CHECKING:
    import tokenizers
    import torch

EXPORT_VERSION = 1
"""Part of an export's key: raise it when this module exports the same encoder differently."""

# What makes an export; torch and onnxscript choose its opset.
_EXPORTERS = ("onnx", "onnxscript", "tokenizers", "torch", "transformers")
_OUTPUT = "features"
_MAX_BYTES = (1 << 31) - (1 << 20)  # protobuf's limit of 2 GiB, less the graph around the weights
_ODD_SIZES = ((64, 48), (31, 97), (333, 64), (5, 7), (640, 481))


class UnsupportedExportError(ProbeLogError):
    """An encoder's tower cannot be carried by an index; queries of that kind are then not available."""


class ExportMismatchError(ProbeLogError):
    """The exported tower does not give what the encoder gives."""


@dataclass(frozen=True, slots=True)
class TextEncoderFiles:
    """What `probelog.encoders.text.TextEncoder` is made of."""

    onnx: bytes
    tokenizer_json: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImageEncoderFiles:
    """What `probelog.encoders.image.ImageEncoder` is made of."""

    onnx: bytes
    settings: dict[str, Any]


def export_key(encoder: Encoder) -> str:
    """Names all that an export depends on: the encoder, this module, and the libraries that it uses."""
    return short_key("encoder export", EXPORT_VERSION, encoder.digest, *map(version, _EXPORTERS))


def export_text_encoder(encoder: Encoder) -> TextEncoderFiles:
    """The text tower as one ONNX file (float32, any number of texts) and its tokenizer as one JSON file.

    Raises:
        UnsupportedExportError: over 2 GiB, an operation that ONNX lacks, or a tokenizer that the ``tokenizers``
            library cannot express.
    """
    tokenizer = _tokenizer(encoder)
    example = encoder.tokens(["a photo of a dog", "a tree"])
    onnx, opset = _export(
        encoder,
        "get_text_features",
        example,
        {name: {0: "texts"} | ({} if encoder.fixed_length else {1: "tokens"}) for name in example},
    )
    settings = TextSettings(
        inputs=list(encoder.text_inputs),
        output=_OUTPUT,
        dimension=encoder.dimension,
        max_length=encoder.max_length,
        fixed_length=encoder.fixed_length,
        pad_id=int(encoder.tokenizer.pad_token_id),
        made_with=_provenance(encoder, opset),
    )
    return TextEncoderFiles(onnx, tokenizer.to_str(), settings.to_dict())


def export_image_encoder(encoder: Encoder) -> ImageEncoderFiles:
    """The image tower as one ONNX file (float32, any number of images) and its preprocessing.

    Raises:
        UnsupportedExportError: preprocessing that is not plain resize, crop, rescale, normalise to one size;
            over 2 GiB; or an operation that ONNX lacks.
    """
    settings = _preprocessing(encoder)
    example = _processed(encoder, [_random_image(*size, seed=0) for size in _ODD_SIZES[:2]])
    onnx, opset = _export(
        encoder, "get_image_features", {settings.input: example}, {settings.input: {0: "images"}}
    )
    settings.made_with.update(_provenance(encoder, opset))
    return ImageEncoderFiles(onnx, settings.to_dict())


def check_text_encoder(
    encoder: Encoder, files: TextEncoderFiles, texts: Sequence[str] = (), tolerance: float = 1e-4
) -> float:
    """Compare the exported text tower with the encoder; the largest difference found in any component.

    Every text is embedded one by one and in batches. A varied set of its own (empty, long, not ASCII) is always
    part of the comparison; ``texts`` come on top, for instance concept names.

    Raises:
        ExportMismatchError: tokens differ, or an embedding by more than ``tolerance``.
    """
    texts = [*_HARD_TEXTS, *texts]
    exported = TextEncoder(files.onnx, files.tokenizer_json, files.settings)
    names = ("inputs", "output", "dimension")
    tower = TextTower(files.onnx, files.tokenizer_json, **{name: files.settings[name] for name in names})
    for text in texts:
        want, got = encoder.tokens([text]), tower.tokens([text])
        if any(not np.array_equal(want[name], got[name]) for name in want):
            raise ExportMismatchError(
                f"{encoder.source}: the exported tokenizer cuts {text[:80]!r} differently from the encoder's own"
            )
    want_rows = encoder.embed_texts(texts)
    alone = np.concatenate([exported.embed([text]) for text in texts])
    return max(
        _compared(encoder, "text", want_rows, alone, tolerance),
        _compared(encoder, "text", want_rows, exported.embed(texts, batch_size=7), tolerance),
    )


def check_image_encoder(
    encoder: Encoder,
    files: ImageEncoderFiles,
    images: Sequence[Image.Image] = (),
    tolerance: float = 1e-3,
    seed: int = 0,
) -> float:
    """Compare the exported image tower with the encoder; the largest difference found in any component.

    Random images of odd sizes are always part of the comparison; ``images`` come on top.

    Raises:
        ExportMismatchError: an embedding differs by more than ``tolerance``.
    """
    images = [*(_random_image(*size, seed=seed) for size in _ODD_SIZES), *images]
    exported = ImageEncoder(files.onnx, files.settings)
    want = encoder.embed_images(images)
    alone = np.concatenate([exported.embed([image]) for image in images])
    return max(
        _compared(encoder, "image", want, alone, tolerance),
        _compared(encoder, "image", want, exported.embed(images), tolerance),
    )


_HARD_TEXTS = (
    "",
    " ",
    "a",
    "dog",
    "A Photo of a HUSKY.",
    "an ice-cream, isn't it?",
    "tab\tand\nnew line",
    "naïve café, Übergröße",
    "猫の写真",
    "собака",
    "🐕 emoji",
    "[MASK] </s> <|endoftext|> <pad>",
    "0123456789 3.14",
    "supercalifragilisticexpialidocious" * 3,
    "a very long description of a small brown dog " * 40,
)


def _compared(
    encoder: Encoder, what: str, want: NDArray[np.float32], got: NDArray[np.float32], tolerance: float
) -> float:
    worst = float(np.abs(want - got).max())
    if not worst <= tolerance:
        raise ExportMismatchError(
            f"{encoder.source}: the exported {what} tower is off by {worst:.2g} (allowed: {tolerance:.2g}); "
            "its answers would not be the encoder's"
        )
    return worst


def _tokenizer(encoder: Encoder) -> tokenizers.Tokenizer:
    """The encoder's tokenizer with truncation and padding set, as a copy."""
    from tokenizers import Tokenizer

    source = encoder.tokenizer
    backend = getattr(source, "backend_tokenizer", None)
    if backend is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        try:
            backend = convert_slow_tokenizer(source)
        except Exception as error:  # reason: converters need optional libraries and raise whatever they meet
            raise UnsupportedExportError(
                f"{encoder.source}: {type(source).__name__} cannot be written as tokenizer.json ({error}). "
                "Put a tokenizer.json beside its files."
            ) from error
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.enable_truncation(encoder.max_length, direction=source.truncation_side)
    tokenizer.enable_padding(
        direction=source.padding_side,
        pad_id=source.pad_token_id,
        pad_type_id=source.pad_token_type_id,
        pad_token=source.pad_token,
        length=encoder.max_length if encoder.fixed_length else None,
    )
    return tokenizer


def _export(
    encoder: Encoder, tower: str, example: dict[str, Any], axes: dict[str, dict[int, str]]
) -> tuple[bytes, int]:
    """One tower as ONNX bytes, and the opset used."""
    import torch

    weights = sum(p.numel() * p.element_size() for p in encoder.model.parameters())
    names = list(example)
    module = _tower(cast("torch.nn.Module", encoder.model), tower, names)
    inputs = tuple(torch.as_tensor(example[name]).to(encoder.model.device) for name in names)
    dynamic = {name: dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in names}
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                module,
                inputs,
                input_names=names,
                output_names=[_OUTPUT],
                dynamic_shapes=(tuple(dynamic.values()),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # reason: the exporter raises whatever the traced code and its passes raise
        first = str(error).strip().splitlines()[:1]
        raise UnsupportedExportError(
            f"{encoder.source}: {tower} cannot be exported to ONNX ({type(error).__name__}: {' '.join(first)})"
        ) from error
    assert program is not None
    proto = program.model_proto
    if proto.ByteSize() > _MAX_BYTES:
        raise UnsupportedExportError(
            f"{encoder.source}: {tower} takes over 2 GiB as ONNX (the whole encoder: {weights >> 20} MiB). "
            "Use a smaller encoder."
        )
    # The exporter notes which lines of which files each node comes from: paths of this machine, in a published index.
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
    opset = next(item.version for item in proto.opset_import if item.domain == "")
    return proto.SerializeToString(), opset


def _tower(model: torch.nn.Module, method: str, names: Sequence[str]) -> torch.nn.Module:
    import torch

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return pooled(getattr(self.model, method)(**dict(zip(names, inputs, strict=True))))

    return Tower().eval()


class _Steps(Protocol):
    """What a processor that is built on Pillow sets on itself: which steps it takes, and with which values."""

    do_resize: bool
    size: Mapping[str, int | None]
    do_center_crop: bool
    crop_size: Mapping[str, int | None]
    resample: int | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]


def _preprocessing(encoder: Encoder) -> ImageSettings:
    """The image processor's steps as settings, if they are the standard ones and nothing else."""
    from transformers.image_processing_backends import PilBackend

    processor = encoder.image_processor
    name = type(processor).__name__

    def refuse(why: str) -> UnsupportedExportError:
        return UnsupportedExportError(f"{encoder.source}: {name} {why}, which the query side cannot repeat")

    if not isinstance(processor, PilBackend):
        raise refuse("is not built on Pillow")
    for step in ("_preprocess", "preprocess", "resize", "center_crop", "rescale", "normalize"):
        if getattr(type(processor), step) is not getattr(PilBackend, step):
            raise refuse(f"has a {step} step of its own")
    if getattr(processor, "do_pad", None):
        raise refuse("pads images")
    steps = cast(_Steps, processor)
    size = _sides(steps.size) if steps.do_resize else {}
    if size and set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise refuse(f"resizes by {', '.join(sorted(size))}")
    crop = _sides(steps.crop_size) if steps.do_center_crop else {}
    settings = ImageSettings(
        input="pixel_values",
        output=_OUTPUT,
        dimension=encoder.dimension,
        shortest_edge=size.get("shortest_edge"),
        exact=[size["height"], size["width"]] if "height" in size else None,
        resample=int(steps.resample if steps.resample is not None else Image.Resampling.BILINEAR),
        crop=[crop["height"], crop["width"]] if crop else None,
        rescale=float(steps.rescale_factor) if steps.do_rescale else None,
        mean=_channels(steps.image_mean) if steps.do_normalize else None,
        std=_channels(steps.image_std) if steps.do_normalize else None,
    )
    try:
        _processed(encoder, [_random_image(*size, seed=0) for size in _ODD_SIZES])
    except ValueError as error:
        raise refuse("gives images of different sizes") from error
    return settings


def _sides(size: Mapping[str, int | None]) -> dict[str, int]:
    return {name: int(value) for name, value in dict(size).items() if value is not None}


def _channels(value: float | Sequence[float]) -> list[float]:
    return [float(item) for item in value] if isinstance(value, Sequence) else [float(value)] * 3


def _processed(encoder: Encoder, images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """The processor's pixels (n, 3, height, width). Raises ValueError where their sizes differ."""
    return np.stack(
        [encoder.image_processor(images=image, return_tensors="np")["pixel_values"][0] for image in images]
    )


def _random_image(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _provenance(encoder: Encoder, opset: int) -> dict[str, str]:
    import onnx
    import tokenizers
    import torch
    import transformers

    return {
        "encoder": encoder.source,
        "encoder_digest": encoder.digest,
        "export": export_key(encoder),
        "opset": str(opset),
        "onnx": onnx.__version__,
        "tokenizers": tokenizers.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter without its progress lines and warnings; its result is checked against the encoder instead."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
