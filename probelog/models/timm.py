"""Repositories in timm's layout: an ``architecture`` of timm's registry, ``model_args`` and ``pretrained_cfg``."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

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
from probelog.models.preprocessing import Recipe, timm_recipe
from probelog.storage.schemas import Head
from probelog.weights.reader import WeightFacts, Weights

if TYPE_CHECKING:
    import torch
    from torch.nn.modules.module import _IncompatibleKeys

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
    "pool_size", "use_naflex",
})  # fmt: skip
_INPUT_SIZE = (3, 224, 224)
_CFG_KEYS = (
    "input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "crop_mode", "mean", "std",
    "first_conv", "classifier", "label_offset",
)  # fmt: skip
_MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,20}")
_CLASS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class TimmPlan:
    """A timm model that the configuration describes, checked as far as possible without its weights.

    ``pretrained_cfg`` is None for transformers' wrapper, which has timm's registry say what else belongs to the
    architecture and creates it as not pretrained.
    """

    library: ClassVar[str] = "timm"
    input_name: ClassVar[None] = None

    architecture: str
    arguments: Mapping[str, Any]
    pretrained_cfg: Mapping[str, Any] | None
    head: Head
    labels: list[str] = field(repr=False)
    recipe: Recipe
    limits: LoadLimits

    @property
    def function(self) -> str:
        """What decides the logits besides weights, architecture and preprocessing, as canonical JSON."""
        if self.pretrained_cfg is None:
            return canonical({**self.arguments, "created by": "transformers"})
        inputs = {key: self.pretrained_cfg.get(key) for key in ("fixed_input_size", "pool_size")}
        inputs["input_size"] = self.recipe.shape
        offset = {key: value for key, value in self.pretrained_cfg.items() if key == "label_offset" and value}
        return canonical(
            {**self.arguments, **{f"input {key}": value for key, value in inputs.items()}, **offset}
        )

    def build(self, weights: Weights) -> tuple[torch.nn.Module, WeightFacts]:
        """The model with its weights, on the CPU in float32.

        Raises:
            ItemFailure: CONFIG_MISMATCH where weights and configuration differ, UNSUPPORTED where timm cannot
                build the model as described, NON_FINITE.
        """
        from probelog.models.construction import constructed, with_weights

        shapes = {name.removeprefix(_WRAPPER_PREFIX): shape for name, shape in weights.shapes.items()}
        bound_numbers(self.arguments, shapes, weights.elements, self.limits)
        loader = _Loader(self)
        with bounded_construction(len(shapes), weights.elements):
            sketch = constructed(loader.create, "meta")
        if shapes != {name: tuple(tensor.shape) for name, tensor in sketch[0].state_dict().items()}:
            # Known before the weights are read: whether what the library makes of these names and shapes fits.
            loader.load(sketch[0], _sketches(shapes), assign=False)
        tensors, facts = weights.read()
        tensors = {name.removeprefix(_WRAPPER_PREFIX): tensor for name, tensor in tensors.items()}
        module = with_weights(
            loader.create, lambda module, assign: loader.load(module, tensors, assign=assign), sketch
        )
        return module, facts


class _Loader:
    """timm's own two steps, apart: creating a model as pretrained, and loading a state dict into it.

    Some architectures are created otherwise as pretrained than not (fbnetc_100: the epsilon of its batch norms), and
    each hands its own converter of older names to the library's loader. ``create`` notes what the loader would be
    called with; ``load`` calls it.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, plan: TimmPlan) -> None:
        self._plan = plan
        self._loading: dict[str, Any] = {}

    def create(self) -> torch.nn.Module:
        """The model without its weights. Raises ItemFailure, UNSUPPORTED, where timm cannot create it."""
        import timm

        plan, cfg = self._plan, self._plan.pretrained_cfg
        described = None if cfg is None else {**cfg, "architecture": plan.architecture}
        try:
            with self._noting():
                module: torch.nn.Module = timm.create_model(
                    plan.architecture, pretrained=cfg is not None, pretrained_cfg=described, **plan.arguments
                )
        except ItemFailure:
            raise
        except Exception as error:  # a library's constructor given untrusted arguments raises anything
            if out_of_memory(error):
                raise
            raise ItemFailure(
                FailureReason.UNSUPPORTED,
                f"timm cannot build {plan.architecture} as described: {str(error)[:300]}",
            ) from error
        return module

    def load(self, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, assign: bool) -> None:
        """Load tensors into a model of `create`, as timm or transformers' wrapper would.

        Raises:
            ItemFailure: CONFIG_MISMATCH where they are not this model's.
        """
        from timm.models import load_pretrained

        def load_state_dict(state: dict[str, torch.Tensor], strict: bool = True) -> _IncompatibleKeys:
            return _fill(self._plan.architecture, module, state, strict=strict, assign=assign)

        if not self._loading:
            # The wrapper, where transformers leaves out what the model has not; or an architecture of another's making.
            load_state_dict(dict(tensors), strict=self._plan.pretrained_cfg is not None)
            return
        convert = self._loading.get("filter_fn")
        state = self._converted(convert, tensors, module) if convert else dict(tensors)
        # The library's loader asks the model to load; this is how the model does it here.
        module.load_state_dict = load_state_dict  # type: ignore[assignment, method-assign]
        try:
            load_pretrained(
                module,
                **{
                    **self._loading,
                    "filter_fn": None,
                    "pretrained_cfg": {**self._loading["pretrained_cfg"], "state_dict": state},
                },
            )
        except ItemFailure:
            raise
        except Exception as error:  # the loader meets a state dict that is not what it expects
            self._refuse(error)
        finally:
            del module.load_state_dict

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """While a model is created in this process, timm's loader only notes what it is called with."""
        from timm.models import _builder

        def note(_module: torch.nn.Module, **arguments: object) -> None:
            self._loading = arguments

        with self._lock:
            loader = _builder.load_pretrained
            _builder.load_pretrained = note  # type: ignore[assignment]  # it takes what the library passes
            try:
                yield
            finally:
                _builder.load_pretrained = loader

    def _converted(
        self,
        convert: Callable[..., Mapping[str, torch.Tensor]],
        tensors: Mapping[str, torch.Tensor],
        module: torch.nn.Module,
    ) -> dict[str, torch.Tensor]:
        """What the architecture's own converter makes of a state dict: the names of today."""
        from probelog.models.construction import constructed

        sketched = any(tensor.is_meta for tensor in tensors.values())
        try:
            state = _call_converter(convert, tensors, module)
            if sketched or not any(tensor.is_meta for tensor in state.values()):
                return state
        except Exception as error:  # the converter meets a state dict that is not what it expects
            if sketched:
                self._refuse(error)
        # The converter asks the model for values that a sketch has not.
        try:
            return _call_converter(convert, tensors, constructed(self.create, "cpu")[0])
        except Exception as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        """Say that the weights are another model's, unless only the memory is short."""
        if out_of_memory(error):
            raise error
        raise ItemFailure(
            FailureReason.CONFIG_MISMATCH,
            f"the weights are not those of {self._plan.architecture}: {str(error)[:300]}",
        ) from error


def _call_converter(
    convert: Callable[..., Mapping[str, torch.Tensor]],
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
) -> dict[str, torch.Tensor]:
    try:
        return dict(convert(dict(tensors), module))
    except TypeError:  # as the library: older converters take the state dict alone
        return dict(convert(dict(tensors)))


def _sketches(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _fill(
    architecture: str,
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    strict: bool,
    assign: bool,
) -> _IncompatibleKeys:
    """Load a state dict in which nothing is missing: the libraries would leave random numbers there and go on.

    Counters of batches are set to zero, as torch does.
    """
    import torch

    from probelog.models.construction import fill

    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [
        f"{name} is missing" for name in sorted(expected.keys() - state.keys()) if not name.endswith(COUNTER)
    ]
    extra = sorted(state.keys() - expected.keys())
    problems += [f"{name[:100]} is not part of it" for name in extra if strict]
    problems += [
        f"{name} has shape {list(state[name].shape)}, not {list(expected[name])}"
        for name in sorted(expected.keys() & state.keys())
        if expected[name] != tuple(state[name].shape)
    ]
    if problems:
        raise ItemFailure(
            FailureReason.CONFIG_MISMATCH,
            f"the weights are not those of {architecture} as described: {'; '.join(problems[:3])} "
            f"({len(problems)} differences)",
        )
    loaded = {name: state[name] for name in state if name in expected}
    sketched = any(tensor.is_meta for tensor in loaded.values())
    for name in expected.keys() - loaded.keys():
        loaded[name] = torch.zeros(expected[name], dtype=torch.int64, device="meta" if sketched else "cpu")
    return fill(module, loaded, assign=assign)


def plan(config: Mapping[str, Any], limits: LoadLimits) -> TimmPlan:
    """What a timm configuration, or transformers' wrapper around one, describes.

    Raises:
        ItemFailure: UNSUPPORTED for an architecture that is not in timm's registry and for arguments that are
            not known to be harmless; NOT_A_CLASSIFIER, TOO_LARGE, CORRUPT_CONFIG, CONFIG_MISMATCH.
    """
    # Exports before 2023 are one flat object.
    declared = config.get("pretrained_cfg", config)
    if not isinstance(declared, dict):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "pretrained_cfg is not an object")
    architecture = _architecture(config["architecture"])
    arguments = _arguments(config.get("model_args"))
    logits = _logits(config, declared, arguments, limits)
    arguments["num_classes"] = logits
    wrapped = config.get("model_type") == "timm_wrapper"
    pretrained_cfg = _pretrained_cfg(declared)
    if not wrapped:
        pretrained_cfg = _as_loaded(pretrained_cfg, arguments)
    return TimmPlan(
        architecture=architecture,
        arguments=arguments,
        pretrained_cfg=None if wrapped else {**pretrained_cfg, "num_classes": logits},
        head=head_of(config.get("problem_type"), logits),
        labels=tidy_labels(_labels(config, declared), logits),
        recipe=timm_recipe(pretrained_cfg, limits.max_image_size),
        limits=limits,
    )


def _pretrained_cfg(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say how pictures are prepared and weights are loaded; none that says where from."""
    kept = {key: declared[key] for key in _CFG_KEYS if declared.get(key) is not None}
    for key in ("first_conv", "classifier"):
        names = kept.get(key, [])
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) and _MODULE_NAME.fullmatch(name) for name in names):
            raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"{key} names no module")
    for key in ("pool_size", "label_offset"):
        value = kept.get(key, 0)
        if not all(
            type(item) is int and 0 <= item <= 1 << 16
            for item in (value if isinstance(value, list) else [value])
        ):
            raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"{key} = {str(value)[:40]}")
    if type(kept.get("fixed_input_size", False)) is not bool:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, "fixed_input_size is neither true nor false")
    return kept


def _as_loaded(pretrained_cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as timm corrects it when it loads a repository (``timm.models._hub._parse_model_cfg``).

    The model's own arguments describe the stored weights; the rest may still describe those that they were made from.
    """
    cfg = dict(pretrained_cfg)
    size = cfg.get("input_size", _INPUT_SIZE)
    if not isinstance(size, list | tuple) or len(size) != 3:
        return cfg  # refused by the recipe
    if (
        arguments.get("dynamic_img_size")
        or arguments.get("strict_img_size") is False
        or arguments.get("use_naflex")
    ):
        cfg["fixed_input_size"] = False
    if arguments.get("in_chans") is not None:
        size = (arguments["in_chans"], *size[1:])
    if arguments.get("img_size") is not None and cfg.get("fixed_input_size"):
        edges = arguments["img_size"]
        size = (size[0], *(edges if isinstance(edges, tuple) else (edges, edges)))
    return cfg | {"input_size": tuple(size)}


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
            isinstance(item, bool | int | None)
            or (isinstance(item, float) and math.isfinite(item))
            or (isinstance(item, str) and _WORD.fullmatch(item))
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
        if isinstance(names, list):
            named: dict[int, object] = dict(enumerate(names))
        elif isinstance(names, dict):  # where some classes have no name
            named = {int(key): name for key, name in names.items() if _CLASS.fullmatch(key)}
        else:
            continue
        # ImageNet exports name synsets (n02110185) and describe them in words.
        described = source.get("label_descriptions")
        words = described if isinstance(described, dict) else {}
        return {
            index: words.get(name, name) if isinstance(name, str) else name for index, name in named.items()
        }
    return {}
