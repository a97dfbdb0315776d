"""Repositories in timm's layout: an ``architecture`` of timm's registry, ``model_args`` and ``pretrained_cfg``."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from probelog.errors import FailureReason, ItemFailure
from probelog.models.config import (
    LoadLimits,
    bound_numbers,
    bounded_construction,
    canonical,
    count_logits,
    head_of,
    tidy_labels,
)
from probelog.models.memory import out_of_memory
from probelog.models.preprocessing import Recipe, timm_recipe
from probelog.storage.schemas import Head
from probelog.weights.reader import WeightFacts, Weights

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"[A-Za-z0-9_]+")
_WORD = re.compile(r"[A-Za-z0-9_]{0,40}")
_WRAPPER_PREFIX = "timm_model."

# What timm's own exports carry, for every architecture family. Arguments that reach elsewhere (checkpoint_path,
# pretrained, pretrained_cfg, cache_dir, features_only, ...) are not among them.
_MODEL_ARGS = frozenset({
    "num_classes", "in_chans", "global_pool", "img_size", "patch_size", "embed_dim", "embed_dims",
    "dim", "dims", "depth", "depths", "num_heads", "mlp_ratio", "mlp_ratios", "mlp_expansion",
    "window_size", "window_ratio", "expand_ratio", "qkv_bias", "qkv_fused", "qk_norm", "proj_bias",
    "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm",
    "pos_embed", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_mean_pooling",
    "use_post_norm", "use_rot_pos_emb", "ref_feat_shape", "swiglu_mlp", "scale_mlp", "dynamic_img_size",
    "dynamic_img_pad", "strict_img_size", "always_partition", "ls_init_value", "layer_scale_init_value",
    "head_init_scale", "head_hidden_size", "head_dropout", "head_bias", "use_grn", "kernel_sizes",
    "conv_mlp", "conv_bias", "patch_padding", "stem_type", "stem_width", "stem_size", "stem_chs",
    "deep_stem", "output_stride", "cardinality", "base_width", "layers", "channels", "widths",
    "growth_rate", "block_config", "num_features", "feature_size", "replace_stem_pool",
    "channel_multiplier", "round_chs_fn", "pad_type", "se_layer", "norm_layer", "act_layer", "norm_eps",
    "bn_eps", "bn_momentum", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate",
    "pos_drop_rate", "patch_drop_rate", "drop_block_rate", "drop_connect_rate", "weight_init",
    "pool_size",
})  # fmt: skip
_INPUT_KEYS = (
    "input_size",
    "fixed_input_size",
    "pool_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
)


@dataclass(frozen=True)
class TimmPlan:
    """A timm model that the configuration describes, checked as far as possible without its weights."""

    library: ClassVar[str] = "timm"
    input_name: ClassVar[None] = None

    architecture: str
    arguments: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any]
    head: Head
    labels: list[str] = field(repr=False)
    recipe: Recipe
    limits: LoadLimits

    @property
    def function(self) -> str:
        """What decides the logits besides weights, architecture and preprocessing, as canonical JSON."""
        inputs = {
            key: self.pretrained_cfg.get(key) for key in ("input_size", "fixed_input_size", "pool_size")
        }
        return canonical({**self.arguments, **{f"input {key}": value for key, value in inputs.items()}})

    def build(self, weights: Weights) -> tuple[torch.nn.Module, WeightFacts]:
        """The model with its weights, on the CPU in float32.

        Raises:
            ItemFailure: CONFIG_MISMATCH where weights and configuration differ, UNSUPPORTED where timm cannot
                build the model as described, NON_FINITE.
        """
        from probelog.models.construction import constructed, with_weights

        shapes = {name.removeprefix(_WRAPPER_PREFIX): shape for name, shape in weights.shapes.items()}
        bound_numbers(self.arguments, shapes, weights.elements, self.limits)
        with bounded_construction(len(shapes), weights.elements):
            sketch = constructed(self._create, "meta")
        expected = {name: tuple(tensor.shape) for name, tensor in sketch[0].state_dict().items()}
        renamed = shapes != expected
        if renamed:
            # Exports of older timm versions: the library's own converter renames what it knows.
            shapes = {
                name: tuple(tensor.shape)
                for name, tensor in self._convert(_sketches(shapes), sketch[0]).items()
            }
        _compare(self.architecture, expected, shapes)
        tensors, facts = weights.read()
        tensors = {name.removeprefix(_WRAPPER_PREFIX): tensor for name, tensor in tensors.items()}
        if not renamed:
            return with_weights(self._create, tensors, sketch), facts
        # The converter may ask the model for values that a sketch has not.
        tensors = self._convert(tensors, constructed(self._create, "cpu")[0])
        return with_weights(self._create, tensors, sketch), facts

    def _create(self) -> torch.nn.Module:
        import timm

        try:
            module: torch.nn.Module = timm.create_model(
                self.architecture,
                pretrained=False,
                pretrained_cfg={**self.pretrained_cfg, "architecture": self.architecture},
                **self.arguments,
            )
        except ItemFailure:
            raise
        except Exception as error:  # a library's constructor given untrusted arguments raises anything
            if out_of_memory(error):
                raise
            raise ItemFailure(
                FailureReason.UNSUPPORTED,
                f"timm cannot build {self.architecture} as described: {str(error)[:300]}",
            ) from error
        return module

    def _convert(self, tensors: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
        convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return tensors
        try:
            return dict(convert(dict(tensors), module))
        except Exception as error:  # the converter meets a state dict that is not what it expects
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"the weights are not those of {self.architecture}: {str(error)[:300]}",
            ) from error


def _sketches(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _compare(
    architecture: str, expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]
) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - actual.keys())]
    problems += [f"{name[:100]} is not part of it" for name in sorted(actual.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(actual[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & actual.keys())
        if expected[name] != actual[name]
    ]
    if problems:
        raise ItemFailure(
            FailureReason.CONFIG_MISMATCH,
            f"the weights are not those of {architecture} as described: {'; '.join(problems[:3])} "
            f"({len(problems)} differences)",
        )


def plan(config: Mapping[str, Any], limits: LoadLimits) -> TimmPlan:
    """What a timm configuration, or transformers' wrapper around one, describes.

    Raises:
        ItemFailure: UNSUPPORTED for an architecture that is not in timm's registry and for arguments that are
            not known to be harmless; NOT_A_CLASSIFIER, TOO_LARGE, CORRUPT_CONFIG, CONFIG_MISMATCH.
    """
    # Exports before 2023 are one flat object.
    pretrained_cfg = config.get("pretrained_cfg", config)
    if not isinstance(pretrained_cfg, dict):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "pretrained_cfg is not an object")
    architecture = _architecture(config["architecture"])
    arguments = _arguments(config.get("model_args"))
    logits = _logits(config, pretrained_cfg, arguments, limits)
    arguments["num_classes"] = logits
    inputs = {key: pretrained_cfg[key] for key in _INPUT_KEYS if pretrained_cfg.get(key) is not None}
    channels = arguments.get("in_chans")
    recipe = timm_recipe(inputs, None if channels is None else channels, limits.max_image_size)
    inputs["input_size"] = (recipe.channels, recipe.height, recipe.width)
    return TimmPlan(
        architecture=architecture,
        arguments=arguments,
        pretrained_cfg={**inputs, "num_classes": logits},
        head=head_of(config.get("problem_type"), logits),
        labels=tidy_labels(_labels(config, pretrained_cfg), logits),
        recipe=recipe,
        limits=limits,
    )


def _architecture(name: object) -> str:
    import timm

    if not isinstance(name, str):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "architecture is not a name")
    base = name.split(".", 1)[0]  # a pretrained tag may follow; it only chooses weights
    if not _NAME.fullmatch(base) or not timm.is_model(base):
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{name[:100]!r} is not a model of timm {timm.__version__}"
        )
    return base


def _arguments(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "model_args is not an object")
    for key, value in given.items():
        items = value if isinstance(value, list) else [value]
        harmless = all(
            isinstance(item, bool | int | float | None) or (isinstance(item, str) and _WORD.fullmatch(item))
            for item in items
        )
        if key not in _MODEL_ARGS or not harmless or len(items) > 100:
            raise ItemFailure(FailureReason.UNSUPPORTED, f"the model argument {key[:60]!r} is not accepted")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _logits(
    config: Mapping[str, Any],
    pretrained_cfg: Mapping[str, Any],
    arguments: Mapping[str, Any],
    limits: LoadLimits,
) -> int:
    declared = {
        "num_classes": config.get("num_classes"),
        # transformers' wrapper saves it under its own name too
        "num_labels": config.get("num_labels"),
        "model_args.num_classes": arguments.get("num_classes"),
    }
    numbers = {key: value for key, value in declared.items() if value is not None}
    if not numbers:
        numbers = {"pretrained_cfg.num_classes": pretrained_cfg.get("num_classes", 1000)}
    if any(type(value) is not int for value in numbers.values()):
        raise ItemFailure(
            FailureReason.CORRUPT_CONFIG, f"the number of classes is no number: {str(numbers)[:200]}"
        )
    if len(set(numbers.values())) > 1:
        raise ItemFailure(FailureReason.CONFIG_MISMATCH, f"the number of classes is given twice: {numbers}")
    return count_logits(next(iter(numbers.values())), limits)


def _labels(config: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> dict[int, object]:
    for source in (config, pretrained_cfg):
        names = source.get("label_names", source.get("labels"))
        described = source.get("label_descriptions")
        if isinstance(names, list):
            # ImageNet exports name synsets (n02110185) and describe them in words.
            words = described if isinstance(described, dict) else {}
            return {
                i: words.get(name, name) if isinstance(name, str) else name for i, name in enumerate(names)
            }
    return {}
