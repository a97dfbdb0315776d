"""Repositories in transformers' layout, of the model types that the library itself can classify images with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from probelog.errors import FailureReason, ItemFailure
from probelog.models.config import (
    COUNTER,
    LoadLimits,
    bound_numbers,
    bounded_construction,
    canonical,
    count_logits,
    head_of,
    tidy_labels,
)
from probelog.models.memory import out_of_memory
from probelog.models.preprocessing import Recipe, transformers_recipe
from probelog.storage.schemas import Head
from probelog.weights.reader import WeightFacts, Weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# Image classification in name, but the input is not a picture alone: colour clusters, a prompt, patches of
# varying number with a mask.
_OTHER_INPUT = {"imagegpt", "shieldgemma2", "siglip2"}

# Fields of every configuration that say how to run rather than what the model is, or that are set here.
_NOT_THE_MODEL = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "quantization_config", "gradient_checkpointing",
}  # fmt: skip
# Older spellings that configuration classes still translate when they are made.
_OLD_SPELLINGS = {"text_config_dict", "vision_config_dict", "segmentation_indices"}

Made = TypeVar("Made")


@dataclass(frozen=True)
class TransformersPlan:
    """A transformers model that the configuration describes, checked as far as possible without its weights."""

    library: ClassVar[str] = "transformers"

    model_class: type[PreTrainedModel]
    config: type[PreTrainedConfig] = field(repr=False)
    numbers: Mapping[str, Any] = field(repr=False)
    head: Head
    labels: list[str] = field(repr=False)
    recipe: Recipe
    limits: LoadLimits

    @property
    def architecture(self) -> str:
        """The class's name."""
        return str(self.model_class.__name__)

    @property
    def input_name(self) -> str:
        """What the class calls its pixels."""
        return str(self.model_class.main_input_name)

    @property
    def function(self) -> str:
        """What decides the logits besides weights, architecture and preprocessing, as canonical JSON."""
        return canonical(self.numbers)

    def build(self, weights: Weights) -> tuple[torch.nn.Module, WeightFacts]:
        """The model with its weights, on the CPU in float32.

        The library's own loader does the loading, because it knows the older names of every weight; it is handed
        tensors and not the folder, where it would also look for adapters, distributed checkpoints (pickles) and
        files that the configuration names.

        Raises:
            ItemFailure: CONFIG_MISMATCH where weights and configuration differ, CORRUPT_CONFIG where the library
                cannot build the model as described, NON_FINITE.
        """
        import torch
        import transformers

        bound_numbers(self.numbers, weights.shapes, weights.elements, self.limits)
        config = self._made(lambda: self.config.from_dict(dict(self.numbers), num_labels=len(self.labels)))
        with _quiet(transformers):
            with _without_memory(), bounded_construction(len(weights.shapes), weights.elements):
                sketch = self._made(lambda: self.model_class(config))
            needed = sum(parameter.numel() for parameter in sketch.parameters())
            if needed > weights.elements:
                raise ItemFailure(
                    FailureReason.CONFIG_MISMATCH,
                    f"{self.architecture} as described has {needed} parameters; the weights hold {weights.elements}",
                )
            del sketch
            tensors, facts = weights.read()
            try:
                module, report = cast(
                    "tuple[torch.nn.Module, dict[str, Any]]",
                    self.model_class.from_pretrained(
                        None,
                        config=config,
                        state_dict=tensors,
                        dtype=torch.float32,
                        trust_remote_code=False,
                        local_files_only=True,
                        use_safetensors=True,
                        output_loading_info=True,
                    ),
                )
            except Exception as error:  # the foreign loader raises many kinds when a shape does not fit
                if out_of_memory(error):
                    raise
                raise ItemFailure(
                    FailureReason.CONFIG_MISMATCH,
                    f"the weights do not fit {self.architecture} as described: {str(error)[:300]}",
                ) from error
        wrong = {
            kind: sorted(str(key) for key in report.get(kind) or () if not str(key).endswith(COUNTER))
            for kind in ("missing_keys", "mismatched_keys", "error_msgs")
        }
        wrong = {kind: keys for kind, keys in wrong.items() if keys}
        if wrong:
            # The library would fill these with random numbers and go on.
            kind, keys = next(iter(wrong.items()))
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"the weights do not fit {self.architecture}: {kind.replace('_', ' ')}: {', '.join(keys[:3])[:300]} "
                f"({len(keys)} in all)",
            )
        return module, facts

    def _made(self, make: Callable[[], Made]) -> Made:
        try:
            return make()
        except ItemFailure:
            raise
        except ImportError as error:  # a package that few architectures need
            raise ItemFailure(
                FailureReason.UNSUPPORTED,
                f"{self.architecture} needs a package that is not installed: {' '.join(str(error).split())[:300]}",
            ) from error
        except Exception as error:  # a library's constructors given untrusted values raise anything
            if out_of_memory(error):
                raise
            raise ItemFailure(
                FailureReason.CORRUPT_CONFIG,
                f"transformers cannot build {self.architecture} as described: {str(error)[:300]}",
            ) from error


def plan(folder: Path, config: Mapping[str, Any], limits: LoadLimits) -> TransformersPlan:
    """What a transformers configuration describes.

    Raises:
        ItemFailure: REMOTE_CODE, NOT_A_CLASSIFIER, UNSUPPORTED (quantised, an unknown architecture, not an RGB
            image), TOO_LARGE, CORRUPT_CONFIG.
    """
    model_class = _model_class(config)
    config_class = model_class.config_class
    assert config_class is not None  # every class of the mapping has one
    if config.get("quantization_config") is not None:
        raise ItemFailure(FailureReason.UNSUPPORTED, "the weights are quantised")
    numbers = _known_keys(config, config_class)
    channels = numbers.get("num_channels", 3)
    if channels != 3:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"the model takes {str(channels)[:20]} channels, not RGB"
        )
    labels = _labels(config, limits)
    logits = count_logits(_logits(config, labels), limits)
    image_size = numbers.get("image_size")
    return TransformersPlan(
        model_class=model_class,
        config=config_class,
        numbers=numbers,
        head=head_of(config.get("problem_type"), logits),
        labels=tidy_labels(labels, logits),
        recipe=transformers_recipe(
            folder,
            str(config["model_type"]),
            image_size if type(image_size) is int else None,
            limits.max_image_size,
        ),
        limits=limits,
    )


def _model_class(config: Mapping[str, Any]) -> type[PreTrainedModel]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "model_type is not a name")
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "architectures is not a list of names")
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(model_type or "", ())
    known = (known,) if isinstance(known, str) else tuple(known)
    native = [name for name in named if name in known]
    shown = f"model type {str(model_type)[:60]!r}, architecture {(named or ['none'])[0][:60]!r}"
    if not known or (named and not native):
        if config.get("auto_map"):
            raise ItemFailure(
                FailureReason.REMOTE_CODE, f"{shown}: needs code from the repository, which is not run"
            )
        if any("ForImageClassification" in name for name in named):
            raise ItemFailure(
                FailureReason.UNSUPPORTED, f"{shown}: unknown to transformers {transformers.__version__}"
            )
        raise ItemFailure(FailureReason.NOT_A_CLASSIFIER, f"{shown}: not an image classifier")
    if model_type in _OTHER_INPUT:
        raise ItemFailure(FailureReason.UNSUPPORTED, f"{shown}: its input is not a plain image")
    model_class: type[PreTrainedModel] = getattr(transformers, (native or known)[0])
    return model_class


def _known_keys(config: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The values that describe the model: fields of the class, no others.

    The library would set any key as an attribute, and some attributes load code or files: attn_implementation
    (a kernel repository), transformers_weights, fusion_config, auto_map, per_layer_config, ...
    """
    fields = {item.name for item in dataclasses.fields(config_class)}
    known = (fields | set(config_class.attribute_map) | _OLD_SPELLINGS) - _NOT_THE_MODEL
    nested = dict(config_class.sub_configs)
    nested |= {f"{key}_dict": value for key, value in nested.items()}
    kept = {}
    for key, value in config.items():
        if key not in known or key.startswith("_") or value is None:
            continue
        if isinstance(value, dict):
            if key not in nested or not dataclasses.is_dataclass(nested[key]):
                continue
            kept[key] = _known_keys(value, nested[key])
        else:
            kept[key] = value
    return kept


def _labels(config: Mapping[str, Any], limits: LoadLimits) -> dict[int, object]:
    declared = config.get("id2label")
    if declared is None:
        return {}
    if not isinstance(declared, dict):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "id2label is not an object")
    count_logits(len(declared) or 1, limits)  # before a million keys are turned into numbers
    try:
        return {int(key): value for key, value in declared.items()}
    except ValueError:
        raise ItemFailure(
            FailureReason.CORRUPT_CONFIG, "id2label has keys that are not whole numbers"
        ) from None


def _logits(config: Mapping[str, Any], labels: Mapping[int, object]) -> int:
    # As the library does: the labels decide, then num_labels, then two. The weights have the last word.
    if labels:
        return len(labels)
    number = config.get("num_labels", 2)
    if type(number) is not int:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "num_labels is not a whole number")
    return number


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    import torch
    from transformers.initialization import meta_device_safe_creation_ops

    from probelog.models.construction import Construction

    with torch.device("meta"), meta_device_safe_creation_ops(), Construction():
        yield


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars and no load reports on the terminal of a worker; what they say is in the failure."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
