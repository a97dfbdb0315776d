"""What a zoo's models learn from and are judged by: the split of the images, and one model's training."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.zoo import networks
from pipelines.zoo.networks import ARCHITECTURES, NORMALISATIONS, Architecture
from pipelines.zoo.plan import Spec
from probelog.errors import UsageError

if TYPE_CHECKING:
    import torch

FEWEST_IMAGES = 5
"""Of a class: two to learn from, and one each to validate, to ask with, and to probe with."""

_TIMM_RATE = 2e-3
_BATCH = 64
# Without --epochs, each model sees this many batches: enough to be right far above chance, in seconds to a minute.
_STEPS = {"foundation": 900, "scratch": 450}
_FEWEST_STEPS = 300


@dataclass(frozen=True)
class Split:
    """Indices of images by use; no image is in two of them. ``probes`` may be of classes that no model knows."""

    lessons: NDArray[np.int64]
    validation: NDArray[np.int64]
    queries: NDArray[np.int64]
    probes: NDArray[np.int64]


def split(labels: NDArray[np.int64], probe_classes: Sequence[int], probes: int, seed: int) -> Split:
    """Deal every class's images out: 20 % to validate with, 10 % to ask with, the rest to learn from.

    Args:
        labels: class number of each image.
        probe_classes: classes that no model learns: their images are the probes. Without any, 15 % of each class.
        probes: how many probes at the most, chosen at random.
        seed: another seed, another split.
    """
    rng = np.random.default_rng((seed, 13))
    apart = set(probe_classes)
    parts: dict[str, list[NDArray[np.int64]]] = {"lessons": [], "validation": [], "queries": [], "probes": []}
    for number in range(int(labels.max()) + 1):
        shuffled = rng.permutation(np.flatnonzero(labels == number))
        if number in apart:
            parts["probes"].append(shuffled)
            continue
        sizes = {"validation": 0.2, "queries": 0.1, "probes": 0.0 if apart else 0.15}
        begin = 0
        for part, share in sizes.items():
            count = max(1, round(share * len(shuffled))) if share else 0
            parts[part].append(shuffled[begin : begin + count])
            begin += count
        parts["lessons"].append(shuffled[begin:])
    whole = {part: np.concatenate(pieces) for part, pieces in parts.items() if pieces}
    dealt = rng.permutation(whole["probes"])
    return Split(whole["lessons"], whole["validation"], whole["queries"], np.sort(dealt[:probes]))


@dataclass(frozen=True)
class Material:
    """The images that models are made of: pixels (n, size, size, 3) uint8, class numbers, and the two parts used."""

    pixels: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    lessons: NDArray[np.int64] = field(repr=False)
    validation: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True)
class Trained:
    """A finished model: its repository's files, its accuracy on validation images, its number of parameters."""

    files: dict[str, bytes] = field(repr=False)
    accuracy: float
    parameters: int


def architecture(name: str) -> Architecture:
    """A network by its name here, or by its name in timm."""
    return ARCHITECTURES.get(name) or Architecture("timm", name, _TIMM_RATE)


def check_architectures(names: Sequence[str], size: int) -> None:
    """Build each and run it once.

    Raises:
        UsageError: a name that timm does not know, or a network that does not take images of this size.
    """
    import timm
    import torch

    for name in names:
        if name not in ARCHITECTURES and not timm.is_model(name):
            raise UsageError(
                f"--architectures {name!r}: not a model of timm {timm.__version__}, nor one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        try:
            model = networks.build(architecture(name), ["a", "b"]).eval()
            with torch.inference_mode():
                networks.logits(model, torch.zeros(1, 3, size, size))
        except Exception as error:  # reason: any of timm's thousand constructors and what they check
            raise UsageError(
                f"--architectures {name!r} does not take images of {size} pixels ({str(error)[:200]}): choose "
                "another architecture or --size"
            ) from error


def targets(spec: Spec, labels: NDArray[np.int64], part: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Those images of a part that a model is shown, and the logit that each belongs to."""
    logit_of = np.full(int(labels.max()) + 1, -1)
    for logit, members in enumerate(spec.classes):
        logit_of[list(members)] = logit
    logits = logit_of[labels[part]]
    return part[logits >= 0], logits[logits >= 0]


def train(
    spec: Spec, material: Material, parent: Mapping[str, bytes] | None, epochs: int | None, device: str
) -> Trained:
    """Train, store, read back and judge one model; its accuracy is that of the stored weights.

    Args:
        spec: not a copy: those are made without training.
        material: the images.
        parent: the files of the repository whose weights it begins from.
        epochs: passes over its images; None trains for a fixed number of batches.
        device: ``cpu`` or ``cuda``.
    """
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    torch.manual_seed(spec.seed)
    rng = np.random.default_rng((spec.seed, 14))
    kind = architecture(spec.architecture)
    normalisation = NORMALISATIONS[spec.normalisation]
    size = material.pixels.shape[1]
    shown, labels_of_lessons = targets(spec, material.labels, material.lessons)
    chances = 1 / np.bincount(labels_of_lessons, minlength=len(spec.classes))[labels_of_lessons]
    chances /= chances.sum()

    model = networks.build(kind, spec.labels)
    with tempfile.TemporaryDirectory() as scratch:
        if parent is not None:
            networks.begin_from(model, networks.state(_unpack(parent, Path(scratch, "parent"))))
        model = model.to(device).to(memory_format=torch.channels_last).train()

        def batch(_: int) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = rng.choice(len(shown), _BATCH, p=chances)
            pixels = vary(material.pixels[shown[chosen]], rng)
            target = torch.from_numpy(labels_of_lessons[chosen]).to(device)
            return networks.to_input(pixels, device, normalisation), target

        def loss(guess: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(guess, target, label_smoothing=0.05)

        steps = _STEPS.get(spec.kind, _FEWEST_STEPS)
        if epochs is not None:
            steps = max(2, epochs * -(-len(shown) // _BATCH))
        rate = kind.rate * (1.0 if parent is None else 0.5)
        networks.fit(model, batch, loss, rate, steps)

        folder = Path(scratch, "model")
        networks.save(
            model.to("cpu").eval(), kind, spec.labels, folder, size=size, dtype=spec.dtype,
            normalisation=normalisation,
        )  # fmt: skip
        model = model.float()
        model.load_state_dict(networks.state(folder))
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise ValueError("the training diverged: its weights are not finite")
    return Trained(
        files=files,
        accuracy=_accuracy(model, spec, material),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _accuracy(model: torch.nn.Module, spec: Spec, material: Material) -> float:
    """Share of validation images whose best logit is right, every logit weighing the same."""
    import torch

    shown, target = targets(spec, material.labels, material.validation)
    right = np.empty(len(shown), bool)
    with torch.inference_mode():
        for begin in range(0, len(shown), 256):
            pixels = material.pixels[shown[begin : begin + 256]]
            guess = networks.logits(
                model, networks.to_input(pixels, "cpu", NORMALISATIONS[spec.normalisation])
            )
            right[begin : begin + 256] = guess.argmax(1).numpy() == target[begin : begin + 256]
    return float(np.mean([right[target == logit].mean() for logit in range(len(spec.classes))]))


def vary(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A batch mirrored at random and shifted by up to an eighth, the edges reflected."""
    size = pixels.shape[1]
    reach = max(1, size // 8)
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    moved = np.empty_like(pixels)
    for i, (top, left) in enumerate(rng.integers(0, 2 * reach + 1, size=(len(pixels), 2))):
        moved[i] = padded[i, top : top + size, left : left + size]
    mirrored = rng.random(len(pixels)) < 0.5
    return np.where(mirrored[:, None, None, None], moved[:, :, ::-1], moved)


def _unpack(files: Mapping[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
