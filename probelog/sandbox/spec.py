"""What a process is told about its work, and the folders of a node that it works in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessSpec:
    """What a model's process is allowed and told.

    Attributes:
        probes: a local store with the probe set.
        probe_set: its hash.
        scratch: the node's folder: models are read from it, preprocessed probes kept in it.
        cache_bytes: of preprocessed probes in ``scratch``.
        batch_size: at most so many images a forward pass.
        precision: ``float32``, or ``auto`` for less where the logits stay the same.
        max_params: largest model.
        allow_pickle: whether weights may be pickled.
        device: ``cpu`` or ``cuda``.
        device_share: of the device's memory that this process may fill.
        memory_bytes: more than this beyond the libraries' own cannot be allocated; None for no limit.
        threads: for computing.
    """

    probes: str
    probe_set: str
    scratch: str
    cache_bytes: int
    batch_size: int
    precision: str
    max_params: int
    allow_pickle: bool
    device: str = "cpu"
    device_share: float = 1.0
    memory_bytes: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class GeneratorSpec:
    """What a generator's process is allowed and told.

    Attributes:
        steps: of the sampler.
        seed: of the set: with the architecture and a sample's number it decides the noise.
        prompts: for models that take text; none for our own.
        batch_size: at most so many samples at once.
        precision: ``float32``, or ``auto`` for less where the samples stay nearly the same and are made faster.
        max_params: largest model, of all parts of a pipeline together.
        max_image_size: largest edge of a sample, in pixels.
        allow_pickle: whether weights may be pickled.
        device: ``cpu`` or ``cuda``.
        device_share: of the device's memory that this process may fill.
        memory_bytes: more than this beyond the libraries' own cannot be allocated; None for no limit.
        threads: for computing.
    """

    steps: int = 25
    seed: int = 0
    prompts: tuple[str, ...] = ()
    batch_size: int = 64
    precision: str = "float32"
    max_params: int = 4_000_000_000
    max_image_size: int = 1024
    allow_pickle: bool = False
    device: str = "cpu"
    device_share: float = 1.0
    memory_bytes: int | None = None
    threads: int = 1


def downloads_folder(scratch: Path) -> Path:
    """Models on their way, below the node's scratch folder."""
    return scratch / "downloads"


def pixels_folder(scratch: Path) -> Path:
    """Preprocessed probes."""
    return scratch / "pixels"


def home_folder(scratch: Path) -> Path:
    """The fork server's."""
    return scratch / "home"
