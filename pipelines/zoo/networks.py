"""Small image classifiers as people put them on the Hub: built, trained for a while, stored, read back.

What the demo's world and the zoo share. Nothing here knows where the images come from.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NORMALISATIONS = {"imagenet": IMAGENET, "inception": INCEPTION}
"""Mean and standard deviation per channel, of values in 0..1."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one kind of network is built: a timm name with its arguments, or a transformers class with its configuration.

    ``rate`` is the highest learning rate when it starts from nothing.
    """

    library: str
    name: str
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    processor: str = ""


ARCHITECTURES = {
    "test_efficientnet": Architecture("timm", "test_efficientnet", 4e-3),
    "test_resnet": Architecture("timm", "test_resnet", 2e-3),
    "resnet": Architecture(
        "transformers", "ResNet", 3e-3,
        {"embedding_size": 16, "hidden_sizes": [16, 24, 48, 80], "depths": [1, 1, 1, 1], "layer_type": "basic"},
        "ConvNextImageProcessor",
    ),
    "resnet_deep": Architecture(
        "transformers", "ResNet", 3e-3,
        {"embedding_size": 24, "hidden_sizes": [24, 32, 48, 64], "depths": [1, 1, 2, 1], "layer_type": "basic"},
        "ConvNextImageProcessor",
    ),
    "test_efficientnet_gn": Architecture("timm", "test_efficientnet_gn", 3e-3),
    "convnext": Architecture(
        "transformers", "ConvNext", 3e-3,
        {"patch_size": 4, "hidden_sizes": [16, 24, 32, 64], "depths": [1, 1, 2, 1]},
        "ConvNextImageProcessor",
    ),
    "mobilenet": Architecture(
        "transformers", "MobileNetV1", 3e-3, {"depth_multiplier": 0.25, "tf_padding": False}, "ViTImageProcessor"
    ),
    "vit": Architecture(
        "timm", "test_vit", 2e-3,
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3},
    ),
}  # fmt: skip
"""Networks of 0.1 to 0.4 million parameters that learn small images on a CPU; ``vit`` takes multiples of 8 pixels."""


def declared_label(name: str, index: int, style: str) -> str:
    """A class name as an uploader writes it: ``LABEL`` (no name at all), ``upper``, ``underscore``, or as it is."""
    if style == "LABEL":
        return f"LABEL_{index}"
    if style == "upper":
        return name.upper()
    return name.replace(" ", "_") if style == "underscore" else name


def build(
    architecture: Architecture, labels: Sequence[str], problem: str = "single_label_classification"
) -> torch.nn.Module:
    """A network with one logit per label, freshly initialised."""
    if architecture.library == "timm":
        import timm

        model: torch.nn.Module = timm.create_model(
            architecture.name, num_classes=len(labels), **architecture.options
        )
        return model
    import transformers

    config = getattr(transformers, f"{architecture.name}Config")(
        **architecture.options,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem,
    )
    made: torch.nn.Module = getattr(transformers, f"{architecture.name}ForImageClassification")(config)
    return made


def head(model: torch.nn.Module) -> torch.nn.Module:
    """The layer that makes the logits."""
    found: Any = model
    module: torch.nn.Module = found.get_classifier() if hasattr(found, "get_classifier") else found.classifier
    return module


def begin_from(model: torch.nn.Module, start: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights that fit from a state dict, in place: all but a head of another size."""
    state = model.state_dict()
    fitting = {key: value for key, value in start.items() if state[key].shape == value.shape}
    model.load_state_dict({**state, **fitting})


def logits(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """A model's logits, n x classes, whichever library it comes from."""
    output = model(pixels)
    result: torch.Tensor = output if hasattr(output, "shape") else output.logits
    return result.float()


def to_input(pixels: NDArray[np.uint8], device: str, normalisation: Normalisation = IMAGENET) -> torch.Tensor:
    """Images (n x height x width x 3) as a model takes them: n x 3 x h x w, scaled to 0..1, then normalised."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in normalisation)
    batch = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    return ((batch.float() / 255 - mean) / std).to(memory_format=torch.channels_last)


Batch = Callable[[int], tuple["torch.Tensor", "torch.Tensor"]]


def fit(
    model: torch.nn.Module, batch: Batch, loss: Callable[..., torch.Tensor], rate: float, steps: int,
    optimiser: torch.optim.Optimizer | None = None, *, constant: bool = False,
    longest_gradient: float | None = None,
) -> None:  # fmt: skip
    """Train in place, with AdamW by default, at a constant rate or under a one-cycle schedule.

    ``batch(step)`` gives inputs and targets; longer gradients are cut to ``longest_gradient``.
    """
    import torch

    optimiser = optimiser or torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = (
        torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)
        if constant
        else torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    )
    for step in range(steps):
        inputs, target = batch(step)
        error = loss(logits(model, inputs), target)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(error)
        if longest_gradient is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), longest_gradient)
        optimiser.step()
        schedule.step()


def save(
    model: torch.nn.Module, architecture: Architecture, labels: Sequence[str], folder: Path, *, size: int, dtype: str,
    normalisation: Normalisation, sharded: bool = False,
) -> None:  # fmt: skip
    """Write a repository: timm's layout for timm models, transformers' for the rest. Changes the model's dtype."""
    import torch

    mean, std = normalisation
    folder.mkdir(parents=True, exist_ok=True)
    stored = model.to(getattr(torch, dtype)).to(memory_format=torch.contiguous_format)
    if architecture.library == "timm":
        from timm.models import save_for_hf

        save_for_hf(
            stored,
            str(folder),
            model_config={"label_names": list(labels)},
            model_args=dict(architecture.options) or None,
            safe_serialization=True,
            data_config={"input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0, "mean": mean,
                         "std": std},
        )  # fmt: skip
        return
    import transformers

    convnext = architecture.processor.startswith("ConvNext")
    image_size = {"shortest_edge": size} if convnext else {"height": size, "width": size}
    limits: dict[str, Any] = {"max_shard_size": "100KB"} if sharded else {}
    cast("transformers.PreTrainedModel", stored).save_pretrained(folder, **limits)
    processor = getattr(transformers, architecture.processor)
    extra = {"crop_pct": 1.0} if convnext else {}
    processor(size=image_size, image_mean=list(mean), image_std=list(std), **extra).save_pretrained(folder)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a repository in float32."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(part)
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def listing_row(repo: str, folder: Path, library: str, rng: np.random.Generator) -> dict[str, Any]:
    """A row of ``hub.json``: what a hub's listing says about a repository, popularity and dates by chance."""
    day = dt.datetime(2025, 1, 1, 8, tzinfo=dt.UTC) + dt.timedelta(days=int(rng.integers(0, 600)))
    return {
        "id": repo,
        "sha": commit(folder, repo),
        "library": library,
        "pipeline_tag": "image-classification",
        "lastModified": day.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "downloads": int(rng.pareto(1.0) * 20),
        "likes": int(rng.pareto(1.5) * 2),
        "license": ("apache-2.0", "mit", "cc-by-4.0", None)[int(rng.integers(4))],
    }


def commit(folder: Path, repo: str) -> str:
    """Forty hexadecimal digits that change with a repository's name and files."""
    digest = hashlib.sha1(repo.encode(), usedforsecurity=False)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
