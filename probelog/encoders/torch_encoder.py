"""Encoders that embed images and texts into one space: CLIP and its relatives, as transformers loads them."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from probelog.encoders.decoding import to_rgb
from probelog.encoders.text import unit_rows
from probelog.errors import ProbeLogError, UsageError
from probelog.storage.schemas import clean_unicode

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.modeling_outputs import BaseModelOutputWithPooling

_RECIPE = "1"
"""Part of the digest: raise it when this module feeds the same files differently."""

_NEEDED = (
    "config.json, model.safetensors, the tokenizer's files (tokenizer.json, tokenizer_config.json) and "
    "preprocessor_config.json or processor_config.json"
)
_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNUSED_WEIGHTS = frozenset({"logit_scale", "logit_bias"})
_LONGEST_TEXT = 512

# SigLIP pools the last position, padding or not, and was trained without a mask (big_vision); not every
# tokenizer file of the family says so.
_UNMASKED = frozenset({"siglip", "siglip2"})


class ImageTextModel(Protocol):
    """What the encoder needs of a model: both towers, and what every module of torch has."""

    device: torch.device
    config: PreTrainedConfig

    def get_text_features(self, **inputs: torch.Tensor) -> torch.Tensor | BaseModelOutputWithPooling: ...
    def get_image_features(self, **inputs: torch.Tensor) -> torch.Tensor | BaseModelOutputWithPooling: ...
    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]: ...
    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def eval(self) -> ImageTextModel: ...
    def to(self, device: str | torch.device) -> ImageTextModel: ...


class Encoder:
    """An image-text encoder in float32, in evaluation mode. Made by `load_encoder`.

    ``digest`` names everything that an embedding depends on (weights, configuration, tokenizer, image
    processor) and is part of the keys of whatever is derived from embeddings. ``dimension`` is d.
    """

    def __init__(
        self,
        source: str,
        digest: str,
        model: ImageTextModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,  # noqa: ANN401 - transformers has one class per family and no common one
    ) -> None:
        self.source = source
        self.digest = digest
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_length = _max_length(model, tokenizer)
        self.text_inputs = _text_inputs(model, tokenizer)
        self._image_inputs = frozenset(inspect.signature(model.get_image_features).parameters)
        self.fixed_length = _is_unmasked(model) or self._depends_on_padding()
        self.dimension = self._embed_text_batch(["a photo"]).shape[1]

    def __repr__(self) -> str:
        return f"Encoder({self.source!r}, dimension={self.dimension}, digest={self.digest[:16]!r})"

    def tokens(self, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The text tower's inputs, each (texts, tokens), truncated and padded as in training."""
        return self._tokens(texts, self.fixed_length)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Embeddings (n, d) of unit length. Texts beyond the encoder's length are cut."""
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        parts += [
            self._embed_text_batch(texts[start : start + batch_size])
            for start in range(0, len(texts), batch_size)
        ]
        return self._unit(np.concatenate(parts))

    def embed_images(
        self,
        images: Iterable[Image.Image],
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings (n, d) of unit length. ``progress`` is told how many images are done, after each batch.

        Images are consumed a batch at a time, so an iterator that decodes as it goes stays small.
        """
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        done = 0
        stream = iter(images)
        while batch := list(itertools.islice(stream, batch_size)):
            parts.append(self._embed_image_batch(batch))
            done += len(batch)
            if progress is not None:
                progress(done)
        return self._unit(np.concatenate(parts))

    def _tokens(self, texts: Sequence[str], full: bool) -> dict[str, NDArray[np.int64]]:
        encoded = self.tokenizer(
            [clean_unicode(text) for text in texts],
            padding="max_length" if full else "longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="np",
        )
        return {name: np.asarray(encoded[name], dtype=np.int64) for name in self.text_inputs}

    def _embed_text_batch(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._features(self.model.get_text_features, self.tokens(texts))

    def _embed_image_batch(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        inputs = self.image_processor(images=[to_rgb(image) for image in images], return_tensors="pt")
        accepted = {name: value for name, value in inputs.items() if name in self._image_inputs}
        return self._features(self.model.get_image_features, accepted)

    def _features(
        self, tower: Callable[..., torch.Tensor | BaseModelOutputWithPooling], inputs: dict[str, Any]
    ) -> NDArray[np.float32]:
        import torch

        on_device = {name: torch.as_tensor(value).to(self.model.device) for name, value in inputs.items()}
        with torch.inference_mode(), _full_precision():
            features: NDArray[np.float32] = pooled(tower(**on_device)).float().cpu().numpy()
        return features

    def _depends_on_padding(self) -> bool:
        """Whether padding changes an embedding; if so, every text is padded to the full length, as in training.

        Otherwise padding to the longest of a batch is the same, and several times faster.
        """
        text = ["a photo"]
        short, full = (
            unit_rows(self._features(self.model.get_text_features, self._tokens(text, full)))
            for full in (False, True)
        )
        return bool(np.abs(short - full).max() > 1e-3)

    def _unit(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(rows).all():
            raise ProbeLogError(
                f"{self.source}: the encoder gives embeddings that are not finite; use another encoder"
            )
        return unit_rows(rows)


class _DeferredEncoder(Encoder):
    """Has its source; finds its files when the digest is asked for, and loads when anything else is."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the encoder has
        if name.startswith("__"):
            raise AttributeError(name)
        found = found_encoder(self.source) if name == "digest" else load_encoder(self.source)
        self.__dict__.update(vars(found))
        return self.__dict__[name]


def deferred_encoder(source: str) -> Encoder:
    """The encoder that `load_encoder` gives, found when its digest is first asked for, and loaded when it is first used.

    Torch and transformers take seconds to import: a job that finds its work done needs the digest alone. Both raise
    what `load_encoder` raises.
    """
    return _DeferredEncoder(source)


def found_encoder(source: str) -> Encoder:
    """`deferred_encoder` whose files are found now: downloaded, or refused, before a job does anything else."""
    encoder = deferred_encoder(source)
    encoder.digest = _files_digest(_local_folder(source))
    return encoder


def digest_here(source: str) -> str | None:
    """The digest of an encoder whose files are on this machine; None where they would have to be downloaded.

    Raises:
        UsageError: no such folder and no Hub id, or files are missing.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _files_digest(_local_folder(source, _downloaded_before))
    except LocalEntryNotFoundError:
        return None


def load_encoder(source: str, device: str | torch.device | None = None) -> Encoder:
    """Load any transformers model that has ``get_text_features`` and ``get_image_features``.

    Args:
        source: a local folder, or a Hub id ``OWNER/NAME``, optionally ``OWNER/NAME@REVISION``. From the Hub
            only safetensors weights are taken, and code from the repository is never run.
        device: where it runs; by default CUDA if there is any, otherwise the CPU.

    Raises:
        UsageError: no such folder or repository, or not an encoder; says what is needed.
        ProbeLogError: the Hub cannot be reached.
    """
    folder = _local_folder(source)
    digest = _files_digest(folder)
    import torch  # after the checks: a mistyped name is answered at once

    with _quiet_loading():
        model, tokenizer, image_processor = _load(source, folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        encoder = Encoder(source, digest, model.eval().to(device), tokenizer, image_processor)
        blank = encoder._embed_image_batch([_blank()])
    except ProbeLogError:
        raise
    except Exception as error:  # reason: the library's errors about files that do not fit each other vary
        raise UsageError(
            f"{source}: the encoder loads but does not run ({type(error).__name__}: {error}). "
            "Are its tokenizer and image processor those it was trained with?"
        ) from error
    if blank.shape[1] != encoder.dimension:
        raise UsageError(
            f"{source}: not an encoder: its images have {blank.shape[1]} dimensions, its texts {encoder.dimension}"
        )
    return encoder


def pooled(output: torch.Tensor | BaseModelOutputWithPooling) -> torch.Tensor:
    """The embedding (n, d) in what ``get_*_features`` returns: ``pooler_output`` since transformers 5."""
    import torch

    vectors = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(vectors, torch.Tensor)
    return vectors


def _local_folder(source: str, fetch: Callable[[str, str, str | None], Path] | None = None) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        name, _, revision = source.partition("@")
        if not _HUB_ID.fullmatch(name):
            raise UsageError(
                f"encoder {source!r}: no such folder, and not a Hub id either. Give a folder with {_NEEDED}, "
                "or a Hub id like openai/clip-vit-base-patch32."
            )
        folder = (fetch or _download)(source, name, revision or None)
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors (weights in other formats are not loaded)")
    if missing:
        raise UsageError(f"encoder {source}: {' and '.join(missing)} missing. It needs {_NEEDED}.")
    return folder


def _downloaded_before(_source: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = list(_PATTERNS)
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))


def _download(source: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except GatedRepoError as error:
        raise UsageError(
            f"encoder {source} is gated: accept its terms on {constants.ENDPOINT} and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(
            f"encoder {source!r}: no such folder here, and no such repository or revision on "
            f"{constants.ENDPOINT} (HF_ENDPOINT). Private repositories need HF_TOKEN."
        ) from error
    except Exception as error:  # reason: the HTTP library underneath has errors of its own
        raise ProbeLogError(
            f"encoder {source!r}: no such folder here, and the Hub at {constants.ENDPOINT} cannot be reached "
            f"({type(error).__name__}: {error}). Set HF_ENDPOINT to a Hub or mirror that this machine reaches, "
            "or give a folder that holds the encoder."
        ) from error


def _files_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of every file that an embedding may depend on.

    Files rather than loaded objects: configurations gain defaults with every release of the library, and a
    digest that follows them would throw away every index.
    """
    whole = hashlib.sha256(f"encoder {_RECIPE}\n".encode())
    files = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as stream:
            whole.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _load(source: str, folder: Path) -> tuple[ImageTextModel, PreTrainedTokenizerBase, Any]:
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, loaded = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            # Given, so that the configuration cannot name code of its own; the one that every architecture has.
            attn_implementation="eager",
            output_loading_info=True,
            **local,
        )
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise UsageError(
                f"encoder {source}: {type(model).__name__} is not an image-text encoder. Give a model with both "
                "towers, such as CLIP, SigLIP, ALIGN, Chinese-CLIP or a vision-text dual encoder."
            )
        missing = sorted({*loaded["missing_keys"]} - _UNUSED_WEIGHTS)
        if missing or loaded["mismatched_keys"]:
            named = ", ".join([*missing, *(str(key) for key in loaded["mismatched_keys"])][:5])
            raise UsageError(f"encoder {source}: its weights do not fit its configuration ({named}, ...)")
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
    except UsageError:
        raise
    except Exception as error:  # reason: untrusted files, read by a library that raises many types
        raise UsageError(
            f"encoder {source} cannot be loaded ({type(error).__name__}: {error}). It needs {_NEEDED}."
        ) from error
    if tokenizer.pad_token is None:
        raise UsageError(
            f"encoder {source}: its tokenizer has no padding token; name one in tokenizer_config.json"
        )
    return model, tokenizer, image_processor


def _max_length(model: ImageTextModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest text in tokens, from the tokenizer and the size of the position table."""
    lengths = [_LONGEST_TEXT, int(tokenizer.model_max_length)]
    tower = getattr(model, "text_model", model)
    for name, module in tower.named_modules():
        if name.endswith(("position_embedding", "position_embeddings")) and hasattr(module, "num_embeddings"):
            # RoBERTa and its relatives count positions from padding_idx + 1.
            padding = getattr(module, "padding_idx", None)
            lengths.append(getattr(module, "num_embeddings") - (0 if padding is None else padding + 1))  # noqa: B009 - a tensor to the type checker
    return min(lengths)


def _text_inputs(model: ImageTextModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    accepted = inspect.signature(model.get_text_features).parameters
    known = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(
        name
        for name in known
        if name in accepted
        and name in tokenizer.model_input_names
        and not (name == "attention_mask" and _is_unmasked(model))
    )


def _is_unmasked(model: ImageTextModel) -> bool:
    return model.config.model_type in _UNMASKED


def _blank() -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (64, 48), (127, 127, 127))


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Convolutions in true float32 and by fixed algorithms: cuDNN's default (TF32) is off by a thousandth."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Loading without the library's progress bar and advice; what matters is checked and raised."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
