"""Every architecture of timm, whatever its size: created from a repository's configuration by timm and by ProbeLog.

No weights are drawn, stored or run: models lie on torch's meta device, and every module's class, settings and tensors'
shapes are compared, and the pixels. Logits are those of the same modules with the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import transformers
from timm.models._hub import save_config_for_hf

from probelog.encoders.decoding import decode
from probelog.errors import ItemFailure
from probelog.models.config import LoadLimits, read_config
from probelog.models.construction import constructed
from probelog.models.timm import _Loader, plan
from tests.conformance.compare import FILES, MOST_PIXELS, Outcome, pictures
from tests.conformance.timm_models import Change, as_of_2022, as_wrapper

LAYOUTS: dict[str, Change] = {
    "as saved": lambda config: None,
    "wrapper": as_wrapper,
    "of 2022": as_of_2022,
}
# What torch itself keeps in a module, what only training uses, and what timm notes about where the model came from.
_PASSED = (
    "_",
    "training",
    "grad_checkpointing",
    "pretrained_cfg",
    "pretrained_model_args",
    "default_cfg",
    "call_super_init",
    "dump_patches",
)


def settings(value: object) -> object:
    """Plain values as they are, tensors by shape and type, functions and classes by name, the rest by its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return ["tensor", list(value.shape), str(value.dtype)]
    if isinstance(value, list | tuple | set | frozenset | torch.Size):
        return [settings(item) for item in value]
    if isinstance(value, dict):
        return {str(key): settings(item) for key, item in value.items()}
    if isinstance(value, partial):
        return ["partial", settings(value.func), settings(value.args), settings(value.keywords)]
    return getattr(value, "__qualname__", type(value).__qualname__)


def description(model: torch.nn.Module) -> dict[str, object]:
    """Each module by its name: class, settings, shapes of its own tensors."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        plain = {
            key: settings(value)
            for key, value in vars(module).items()
            if not key.startswith(_PASSED) and not isinstance(value, torch.nn.Module)
        }
        tensors = {**module._parameters, **module._buffers}
        found[name] = [type(module).__qualname__, module.extra_repr(), plain, settings(tensors)]
    return found


def by_library(folder: Path, layout: str) -> torch.nn.Module:
    """The model as timm, or transformers' wrapper, creates it before weights are loaded."""
    with torch.device("meta"), mock.patch("timm.models._builder.load_pretrained"):
        if layout == "wrapper":
            config = transformers.AutoConfig.from_pretrained(folder)
            wrapper: Any = transformers.AutoModelForImageClassification.from_config(config)
            created: torch.nn.Module = wrapper.timm_model
        else:
            created = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return created


@cache
def _pixels_apart(transform: str, recipe: Any) -> float:
    """How far pixels differ, in grey levels; ``transform`` is the library's data configuration as JSON, of which there are few."""
    theirs = timm.data.create_transform(**json.loads(transform), is_training=False)
    own = recipe.normalise(torch.from_numpy(recipe.geometry([decode(data) for data in FILES.values()])))
    apart = max(float((a - theirs(b)).abs().max()) for a, b in zip(own, pictures(), strict=True))
    return apart / max(map(abs, recipe.gain))


def outcomes(name: str, folder: Path) -> Iterator[Outcome]:
    """One architecture in every layout."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=5)
    save_config_for_hf(model, folder / "config.json")
    saved = (folder / "config.json").read_text()
    for layout, change in LAYOUTS.items():
        config = json.loads(saved)
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        named = ("timm", name, layout)
        try:
            planned = plan(read_config(folder), LoadLimits())
            own = constructed(_Loader(planned).create, "meta")[0]
        except ItemFailure as failure:
            yield Outcome(*named, f"refused: {failure.reason.value}")
            continue
        theirs: Any = by_library(folder, layout)
        data = timm.data.resolve_data_config(pretrained_cfg=theirs.pretrained_cfg, model=theirs)
        pixels = _pixels_apart(json.dumps(data), planned.recipe)
        same = description(own) == description(theirs) and pixels <= MOST_PIXELS
        yield Outcome(*named, "equal" if same else "different", round(pixels, 4))
