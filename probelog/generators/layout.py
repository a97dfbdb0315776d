"""What a repository of a generator consists of: read as data, held against a closed list of classes.

Nothing here imports a library of models. ``model_index.json`` names a class for each part of a pipeline; a name that is
not on the list ends the matter, whether it is a class of the repository's own, of another package or one that nobody knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.parts.decoders import DECODERS
from probelog.weights.repository import member, read_json

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
ADAPTER_CONFIG = "adapter_config.json"

#: Weights of a part of diffusers, and of transformers: without their last letters, which say how they are stored.
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS = "model"

#: Schedulers that are no more than betas and what the network predicts: for all of them our own sampler does.
SCHEDULERS = frozenset(
    {
        "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler",
    }
)  # fmt: skip

_UNCONDITIONAL: Mapping[str, Collection[str]] = {"unet": ("UNet2DModel",), "scheduler": SCHEDULERS}
_LATENT: Mapping[str, Collection[str]] = {"vqvae": ("VQModel",), **_UNCONDITIONAL}
_TRANSFORMER: Mapping[str, Collection[str]] = {
    # The first is what the second was called when these pipelines were uploaded.
    "transformer": ("Transformer2DModel", "DiTTransformer2DModel"),
    "vae": ("AutoencoderKL",),
    "scheduler": SCHEDULERS,
}
_TEXT: Mapping[str, Collection[str]] = {
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "scheduler": SCHEDULERS,
}
_LARGE_TEXT: Mapping[str, Collection[str]] = {
    **_TEXT,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": _TEXT["tokenizer"],
}
#: The parts of each pipeline, and the classes that each may have.
PIPELINES: Mapping[str, Mapping[str, Collection[str]]] = {
    "DDPMPipeline": _UNCONDITIONAL,
    "DDIMPipeline": _UNCONDITIONAL,
    "PNDMPipeline": _UNCONDITIONAL,
    "LDMPipeline": _LATENT,
    "DiTPipeline": _TRANSFORMER,
    "StableDiffusionPipeline": _TEXT,
    "StableDiffusionXLPipeline": _LARGE_TEXT,
}
#: All parts that a pipeline may have.
ROLES = tuple(dict.fromkeys(role for parts in PIPELINES.values() for role in parts))
#: Classes that are a model by themselves, as they lie in repositories without folders.
FLAT = ("UNet2DModel", *DECODERS)
#: What `Layout.pipeline` may be.
KINDS = (*PIPELINES, *FLAT, "lora", "gallery")
#: Weights of adapters as diffusers and peft call them; others have one file of any name.
ADAPTER_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_ADAPTER_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+() -]{0,150}\.safetensors", re.ASCII)
_PICTURE = re.compile(
    r"((gallery|images|samples)/)?[A-Za-z0-9][A-Za-z0-9._ -]{0,150}\.(png|jpe?g|webp)",
    re.ASCII | re.IGNORECASE,
)
#: So many pictures are a gallery; more than the most are not looked at.
LEAST_PICTURES, MOST_PICTURES = 8, 1024
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}", re.ASCII)
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Layout:
    """The parts of a generator that are run.

    Attributes:
        pipeline: one of ``KINDS``.
        folders: where each part lies, by its role (``unet``, ``vae``, ...); "" is the repository itself. Of adapters and
            galleries: files.
        settings: what else counts of ``model_index.json``, unchecked.
    """

    pipeline: str
    folders: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def read_layout(folder: Path) -> Layout:
    """The parts of the generator in a folder: a pipeline, one network, an adapter or a gallery.

    Raises:
        ItemFailure: NOT_A_GENERATOR, UNSUPPORTED (a pipeline, a part or a scheduler that is not on the list),
            REMOTE_CODE, UNSAFE_FORMAT (adapters as pickles), CORRUPT_CONFIG.
    """
    names = [path.name for path in folder.iterdir()]
    for place in ("gallery", "images", "samples"):
        if place in names and not (folder / place).is_symlink() and (folder / place).is_dir():
            names += [f"{place}/{path.name}" for path in (folder / place).iterdir()]
    return layout_of(names, lambda name: read_json(folder, name) or {})


def layout_of(names: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> Layout:
    """The parts of the generator in a repository with these files; ``read`` gets one that is JSON; raises as `read_layout`."""
    if MODEL_INDEX in names:
        return pipeline_layout(read(MODEL_INDEX))
    weights = sorted(
        (name for name in names if _ADAPTER_FILE.fullmatch(name)), key=lambda name: (len(name), name)
    )
    named = next((name for name in ADAPTER_WEIGHTS if name in names), None)
    if named is None and (ADAPTER_CONFIG in names or CONFIG not in names) and weights:
        named = weights[0]  # of several the one that no count of steps was added to
    if named is not None:
        return Layout("lora", {"adapter": named})
    if CONFIG in names:
        return flat_layout(read(CONFIG))
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise ItemFailure(
            FailureReason.UNSAFE_FORMAT,
            f"weights only as pickle ({pickles[0][:100]}), which can run code when loaded",
        )
    pictures = sorted(name for name in names if _PICTURE.fullmatch(name))
    if len(pictures) < LEAST_PICTURES:
        raise ItemFailure(
            FailureReason.NOT_A_GENERATOR,
            f"neither {MODEL_INDEX} nor {CONFIG}, no adapter, and {len(pictures)} pictures; {LEAST_PICTURES} are a gallery",
        )
    return Layout("gallery", {str(number): name for number, name in enumerate(pictures[:MOST_PICTURES])})


def pipeline_layout(index: Mapping[str, Any]) -> Layout:
    """What ``model_index.json`` describes; raises as `read_layout`.

    A pipeline of another name whose parts are a plain network and a schedule of noise is sampled like one: its own
    code would do no more.
    """
    name = index.get("_class_name")
    if isinstance(name, list):
        raise ItemFailure(
            FailureReason.REMOTE_CODE,
            f"{MODEL_INDEX} names a pipeline of the repository's own, which is not run",
        )
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"{MODEL_INDEX} names no pipeline")
    declared = {key for key, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    parts = PIPELINES.get(name)
    if parts is None and declared == set(_UNCONDITIONAL):
        name, parts = "UNet2DModel", _UNCONDITIONAL
    if parts is None:
        raise ItemFailure(FailureReason.UNSUPPORTED, f"pipeline {name}: not one of {', '.join(PIPELINES)}")
    for role, classes in parts.items():
        _check_part(role, index.get(role), classes)
    settings = {key: index[key] for key in ("force_zeros_for_empty_prompt", "id2label") if key in index}
    return Layout(name, {role: role for role in parts}, settings)


def _check_part(role: str, declared: object, classes: Collection[str]) -> None:
    if declared is None or declared == [None, None]:
        raise ItemFailure(FailureReason.UNSUPPORTED, f"the pipeline has no {role}")
    if (
        not isinstance(declared, list)
        or len(declared) != 2
        or not all(isinstance(item, str) for item in declared)
    ):
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"{MODEL_INDEX} does not say what its {role} is")
    library, name = declared
    if library not in _LIBRARIES:
        raise ItemFailure(
            FailureReason.REMOTE_CODE,
            f"{role} is {name[:60]!r} of {library[:60]!r}: code from the repository is not run",
        )
    if name not in classes:
        raise ItemFailure(FailureReason.UNSUPPORTED, f"{role} is {name[:60]!r}, which is not run")


def flat_layout(config: Mapping[str, Any]) -> Layout:
    """What the ``config.json`` of a repository without folders describes; raises as `read_layout`."""
    name = config.get("_class_name")
    if config.get("auto_map") is not None:
        raise ItemFailure(
            FailureReason.REMOTE_CODE, f"{CONFIG} names code of the repository, which is not run"
        )
    if name is None:
        raise ItemFailure(FailureReason.NOT_A_GENERATOR, f"{CONFIG} is not that of a diffusers model")
    if not isinstance(name, str) or name not in FLAT:
        raise ItemFailure(
            FailureReason.UNSUPPORTED, f"{str(name)[:60]!r} alone: not one of {', '.join(FLAT)}"
        )
    if name == "UNet2DModel":
        return Layout(name, {"unet": "", "scheduler": ""})
    return Layout(name, {"vae": ""})


def part_folder(folder: Path, layout: Layout, role: str) -> Path:
    """The folder of a part.

    Raises:
        ItemFailure: UNSAFE_PATH where it is a link, NOT_FOUND.
    """
    place = folder / layout.folders[role]
    if place.is_symlink():
        raise ItemFailure(FailureReason.UNSAFE_PATH, f"{role} is a link")
    if not place.is_dir():
        raise ItemFailure(FailureReason.NOT_FOUND, f"the repository has no folder {role}")
    return place


def read_part(folder: Path, layout: Layout, role: str, name: str = CONFIG) -> dict[str, Any]:
    """The configuration of a part.

    Raises:
        ItemFailure: NOT_FOUND, CORRUPT_CONFIG, UNSAFE_PATH.
    """
    config = read_json(part_folder(folder, layout, role), name)
    if config is None:
        raise ItemFailure(FailureReason.NOT_FOUND, f"{role} has no {name}")
    return config


def weights_stem(role: str) -> str:
    """What the weights of a part are called, without their last letters."""
    return TRANSFORMERS_WEIGHTS if role.startswith("text_encoder") else DIFFUSERS_WEIGHTS


def pickle_name(stem: str) -> str:
    """What they are called as a pickle."""
    return "pytorch_model.bin" if stem == TRANSFORMERS_WEIGHTS else f"{stem}.bin"


def weights_name(folder: Path, stem: str) -> str:
    """The name of a part's safetensors: in full precision, or in half where there is nothing else."""
    half = f"{stem}.fp16.safetensors"
    full = f"{stem}.safetensors"
    if member(folder, full) is None and member(folder, f"{full}.index.json") is None and member(folder, half):
        return half
    return full
