"""What runs inside a generator's process: it loads one model, an adapter with its base, and samples it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.inference.execution_plan import CPU_BATCH_VALUES, FIRST_BATCH, lower_precision
from probelog.models import memory
from probelog.models.config import LoadLimits
from probelog.sandbox import answers
from probelog.sandbox.protocol import Channel
from probelog.sandbox.server import Answer, serve, set_up_device
from probelog.sandbox.spec import GeneratorSpec

if TYPE_CHECKING:
    from probelog.generators.sampling import Sampler


def serve_generator(channel: Channel, confined: dict[str, bool]) -> None:
    """Load one generator and sample it."""
    serve(channel, _Generator(confined).commands)


class _Generator:
    def __init__(self, confined: dict[str, bool]) -> None:
        self._confined = confined
        self._sampler: Sampler | None = None
        self.commands: dict[str, Callable[..., Answer]] = {
            "set-up": self._set_up,
            "load": self._load,
            "sample": self._sample,
        }

    def _set_up(self, spec: dict[str, Any]) -> Answer:
        self._spec = made = GeneratorSpec(**{**spec, "prompts": tuple(spec["prompts"])})
        self._device, self._bytes_of_device = set_up_device(made, self._confined)
        memory.keep_freed()
        return (), {"confined": self._confined}

    def _load(self, folder: str, base: str | None, base_digest: str | None) -> Answer:
        from probelog.generators.loading import LoadOptions, load_generator
        from probelog.generators.sampling import Sampler

        started = time.perf_counter()
        options = LoadOptions(
            steps=self._spec.steps,
            prompts=self._spec.prompts,
            limits=LoadLimits(max_parameters=self._spec.max_params, max_image_size=self._spec.max_image_size),
            allow_pickle=self._spec.allow_pickle,
            device=self._device,
        )
        made = load_generator(Path(folder), options, None if base is None else Path(base), base_digest)
        self._sampler = Sampler(
            made,
            seed=self._spec.seed,
            batch_size=_largest_batch(made.size, self._device, self._spec.batch_size),
            memory_bytes=self._bytes_of_device,
            lower=lower_precision(self._device) if self._spec.precision == "auto" else None,
        )
        rows, sketches = answers.layers_to_json(made.layers)
        facts = {
            "pipeline": made.pipeline,
            "architecture": made.architecture,
            "conditioning": made.conditioning,
            "image_size": max(made.size),
            "parameters": made.parameters,
            "trigger_words": made.trigger_words,
            "prompts": made.prompts,
            "classes": made.class_names,
            "dtype": made.dtype,
            "device": made.device,
            "weight_digest": made.weight_digest,
            "identity": made.identity,
            "seconds_load": time.perf_counter() - started,
        }
        shape = {"size": list(made.size), "class_count": made.classes, "available": made.available,
                 "adapter": made.draw_base is not None}  # fmt: skip
        return (sketches,), {"facts": facts, "shape": shape, "weights": rows}

    def _sample(self, numbers: Sequence[int], base: bool) -> Answer:
        assert self._sampler is not None
        samples = self._sampler.sample(numbers, base=base)
        pictures = [samples.pixels, *([] if samples.base is None else [samples.base])]
        said = {"prompts": samples.prompts, "classes": samples.classes, "batch_size": samples.batch_size,
                "precision": samples.precision}  # fmt: skip
        return [picture.tobytes() for picture in pictures], said


def _largest_batch(size: tuple[int, int], device: str, most: int) -> int:
    """As for classifiers: what is more than a CPU's caches hold gains nothing."""
    fits = max(FIRST_BATCH, CPU_BATCH_VALUES // (3 * size[0] * size[1]))
    return most if device != "cpu" else min(most, fits)
