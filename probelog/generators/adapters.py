"""LoRA adapters, added to the networks of their base: read as data under each of the names that they are stored by.

Hu and others, "LoRA: Low-Rank Adaptation of Large Language Models" (2022): what an adapter adds to a matrix is the product of
two thin ones, times alpha / rank. Base and adapter are sampled in turn from one set of networks: what changes is which of
two sets of weights they have.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.layout import ADAPTER_CONFIG, Layout
from probelog.generators.parts.building import TEXT_MODEL, check_elements
from probelog.generators.parts.reduced import flag, number, one_of, reduced
from probelog.generators.prompts import trigger_words
from probelog.generators.sampling import Draw, Generator
from probelog.models.memory import out_of_memory
from probelog.storage.encoding import short_key
from probelog.weights.reader import Weights
from probelog.weights.repository import member, parse_object, read_json
from probelog.weights.safetensors import read_metadata

if TYPE_CHECKING:
    import torch

    from probelog.generators.assembly import LoadOptions

MOST_RANK = 1024
_MOST_SCALE = 1e4
_FACTOR = re.compile(
    r"(?P<path>.+?)[._]lora(?:_|\.|_linear_layer\.)(?P<which>A|B|down|up)(?:\.[A-Za-z0-9_-]{1,60})?\.weight"
)
_ALPHA = re.compile(r"(?P<path>.+)\.alpha")
_CONFIG = {
    "peft_type": one_of(("LORA",)),
    "lora_alpha": number(0.0, 1e6),
    "use_rslora": flag,
}
# Kinds of LoRA that are more than a product of two matrices: what a key of the configuration may say without being one.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "alpha_pattern": ({},), "bias": ("none",), "fan_in_fan_out": (False,), "layer_replication": (), "lora_bias": (False,),
    "modules_to_save": ([],), "target_parameters": ([],), "use_dora": (False,), "use_qalora": (False,),
    "use_bdlora": (False,),
}  # fmt: skip
# Libraries' own names for the parts of attention in a text encoder, by those of adapters of 2023.
_TEXT_PARTS = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out": "out_proj",
    "to_out.0": "out_proj",
}
# Prefixes of kohya's keys, whose points are underscores.
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
# Two networks a block and, on the way up, three: input_blocks_4_1_..., middle_block_1_..., output_blocks_0_1_...
_BLOCKS = re.compile(r"(?P<side>input|middle|output)_blocks?(?:_(?P<number>\d{1,2}))?_1_(?P<rest>[a-z].*)")
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class _Product:
    """What an adapter adds to one module: names of its two matrices, and of the number that scales them."""

    down: str
    up: str
    alpha: str | None


def load_adapter(
    folder: Path,
    layout: Layout,
    options: LoadOptions,
    load_base: Callable[[LoadOptions], Generator],
) -> Generator:
    """The adapter in a folder, beside its base.

    Raises:
        ItemFailure: CONFIG_MISMATCH where a key matches nothing in the base, or the base's matrices have other shapes;
            TOO_LARGE for a rank beyond ``MOST_RANK``; UNSUPPORTED for what is more than plain LoRA; as
            `probelog.generators.loading.load_generator`.
    """
    settings = _settings(folder)
    weights = Weights(folder, name=layout.folders["adapter"])
    check_elements([weights], options.limits)
    products = _products(weights.shapes)
    path = member(folder, layout.folders["adapter"])
    metadata = {} if path is None else read_metadata(path)
    words = trigger_words(folder, metadata)
    base = load_base(replace(options, trigger_words=words))
    tensors, facts = weights.read()
    scales = _Scales(settings, metadata, tensors)
    try:
        changes = [
            _change(base, path, product, tensors, scales) for path, product in sorted(products.items())
        ]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise ItemFailure(FailureReason.OUT_OF_MEMORY, f"the adapter: {str(error)[:300]}") from error
    return replace(
        base,
        pipeline=layout.pipeline,
        draw=_with(changes, base.draw, adapted=True),
        draw_base=_with(changes, base.draw, adapted=False),
        parameters=weights.elements,
        dtype=facts.dtype,
        weight_digest=facts.digest,
        identity=short_key(facts.digest, base.identity, scales.function),
        layers=facts.layers,
        trigger_words=words,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """What counts of ``adapter_config.json``; nothing where there is none.

    Raises:
        ItemFailure: UNSUPPORTED, CORRUPT_CONFIG.
    """
    config = read_json(folder, ADAPTER_CONFIG)
    if config is None:
        return {}
    kind = config.get("peft_type")
    if kind is not None and kind != "LORA":
        raise ItemFailure(FailureReason.UNSUPPORTED, f"an adapter of the kind {str(kind)[:60]!r}")
    _check_plain(config, ADAPTER_CONFIG)
    return reduced(config, _CONFIG, "adapter")


def _check_plain(config: Mapping[str, Any], name: str) -> None:
    for key, harmless in _PLAIN.items():
        value = config.get(key)
        if value is not None and value not in harmless:
            raise ItemFailure(FailureReason.UNSUPPORTED, f"{name} says {key} = {str(value)[:60]}")


def _products(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Product]:
    """The products that the weights consist of, by the path of the module that each is added to.

    Raises:
        ItemFailure: NOT_A_GENERATOR, UNSUPPORTED, CORRUPT_WEIGHTS, TOO_LARGE.
    """
    halves: dict[str, dict[str, str]] = {}
    others = []
    for name in shapes:
        if match := _FACTOR.fullmatch(name):
            halves.setdefault(match["path"], {})["down" if match["which"] in ("A", "down") else "up"] = name
        elif match := _ALPHA.fullmatch(name):
            halves.setdefault(match["path"], {})["alpha"] = name
        else:
            others.append(name)
    if not halves:
        raise ItemFailure(FailureReason.NOT_A_GENERATOR, "the weights are no adapter's")
    if others:
        raise ItemFailure(
            FailureReason.UNSUPPORTED,
            f"{others[0][:100]!r} is not of plain LoRA ({len(others)} such tensors)",
        )
    products = {}
    for path, names in halves.items():
        if "down" not in names or "up" not in names:
            raise ItemFailure(
                FailureReason.CORRUPT_WEIGHTS, f"of {path[:100]!r} one of the two matrices is not there"
            )
        down, up = shapes[names["down"]], shapes[names["up"]]
        if len(down) not in (2, 4) or len(up) not in (2, 4) or down[0] != up[1] or not down[0]:
            raise ItemFailure(
                FailureReason.CORRUPT_WEIGHTS, f"{path[:100]!r}: {down} and {up} have no product"
            )
        if down[0] > MOST_RANK:
            raise ItemFailure(
                FailureReason.TOO_LARGE, f"an adapter of rank {down[0]}; {MOST_RANK} are accepted"
            )
        if "alpha" in names and math.prod(shapes[names["alpha"]]) != 1:
            raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{names['alpha'][:100]!r} is no number")
        products[path] = _Product(names["down"], names["up"], names.get("alpha"))
    return products


class _Scales:
    """By how much each product is multiplied."""

    def __init__(
        self, settings: Mapping[str, Any], metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self._settings, self._tensors = settings, tensors
        self._alphas: dict[str, Any] = {}
        self._used: list[float] = []
        if _METADATA in metadata:
            told = parse_object(metadata[_METADATA].encode(), _METADATA, FailureReason.CORRUPT_CONFIG)
            for role in ("unet", "text_encoder", "text_encoder_2"):
                part = {
                    key.removeprefix(f"{role}."): value
                    for key, value in told.items()
                    if key.startswith(f"{role}.")
                }
                _check_plain(part, "the adapter")
                self._alphas[role] = reduced(part, _CONFIG, "the adapter")

    def scale(self, role: str, product: _Product, rank: int) -> float:
        """Of one product.

        Raises:
            ItemFailure: CORRUPT_WEIGHTS where it is out of bounds.
        """
        settings = self._alphas.get(role, self._settings)
        alpha = float(settings.get("lora_alpha", rank))
        if product.alpha is not None:
            alpha = float(self._tensors[product.alpha].reshape(()).item())
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        if not math.isfinite(scale) or abs(scale) > _MOST_SCALE:
            raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"an adapter that is multiplied by {scale:.3g}")
        self._used.append(scale)
        return scale

    @property
    def function(self) -> str:
        """All that were used, as JSON."""
        return json.dumps(self._used)


@dataclass(frozen=True)
class _Change:
    """A module's weight, and what it is with and without the adapter."""

    parameter: torch.nn.Parameter
    base: torch.Tensor
    adapted: torch.Tensor


def _change(
    base: Generator,
    path: str,
    product: _Product,
    tensors: Mapping[str, torch.Tensor],
    scales: _Scales,
) -> _Change:
    role, module = _module(base.modules, path)
    weight: Any = module.weight
    down, up = tensors[product.down].float(), tensors[product.up].float()
    same = (
        up.shape[0] == weight.shape[0]
        and up.numel() == up.shape[0] * up.shape[1]
        and math.prod(down.shape[1:]) == math.prod(weight.shape[1:])
        and down.shape[1] == weight.shape[1]
    )
    if not same:
        raise ItemFailure(
            FailureReason.CONFIG_MISMATCH,
            f"the adapter is for another base: {path[:100]!r} has {list(up.shape)} and {list(down.shape)} for a weight "
            f"of {list(weight.shape)}",
        )
    rank = down.shape[0]
    added = (up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(weight.shape)
    added = added.mul_(scales.scale(role, product, rank)).to(weight.device)
    original = weight.data
    return _Change(weight, original, original + added)


def _module(networks: Mapping[str, torch.nn.Module], path: str) -> tuple[str, torch.nn.Module]:
    """The module that an adapter's key means, and the role of its network.

    Raises:
        ItemFailure: CONFIG_MISMATCH where there is none.
    """
    for role, candidate in _candidates(path):
        network = networks.get(role)
        if network is None:
            continue
        known = _layers(network)
        flat = candidate.startswith("_")
        name = {key.replace(".", "_"): key for key in known}.get(candidate[1:]) if flat else candidate
        if name in known:
            return role, known[name]
    raise ItemFailure(
        FailureReason.CONFIG_MISMATCH, f"the adapter's {path[:100]!r} matches nothing in its base"
    )


def _layers(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    import torch

    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def _candidates(path: str) -> list[tuple[str, str]]:
    """Roles and names that a key may mean, the likeliest first; names with underscores for points begin with one."""
    for prefix, role in _KOHYA.items():
        if path.startswith(prefix):
            flat = path.removeprefix(prefix)
            return [(role, f"_{name}") for name in (flat, flat.removeprefix("text_model_"), _of_blocks(flat))]
    bare = path.removeprefix("base_model.model.").replace(".processor.", ".")
    for role in ("unet", "text_encoder", "text_encoder_2"):
        if bare.startswith(f"{role}."):
            return [(role, name) for name in _spellings(role, bare.removeprefix(f"{role}."))]
    return [(role, name) for role in ("unet", "text_encoder") for name in _spellings(role, bare)]


def _of_blocks(flat: str) -> str:
    """Attention of Stable Diffusion XL by its own names, which count blocks through, as diffusers names it."""
    match = _BLOCKS.fullmatch(flat)
    if match is None:
        return flat
    number, rest = int(match["number"] or 0), match["rest"]
    if match["side"] == "middle":
        return f"mid_block_attentions_0_{rest}"
    if match["side"] == "input":
        return f"down_blocks_{(number - 1) // 3}_attentions_{(number - 1) % 3}_{rest}"
    return f"up_blocks_{number // 3}_attentions_{number % 3}_{rest}"


def _spellings(role: str, name: str) -> list[str]:
    names = [name, f"{name}.0"]
    if role != "unet":
        short = name.removeprefix(TEXT_MODEL)
        parent, _, last = short.rpartition(".")
        names += [short, f"{TEXT_MODEL}{short}", f"{parent}.{_TEXT_PARTS.get(last, last)}"]
    return names


def _with(changes: Sequence[_Change], draw: Draw, *, adapted: bool) -> Draw:
    def drawn(noise: torch.Tensor, conditions: Sequence[int]) -> torch.Tensor:
        for change in changes:
            change.parameter.data = change.adapted if adapted else change.base
        return draw(noise, conditions)

    return drawn
