"""What runs inside the processes that are forked: one loads and runs one model, the other prepares pixels.

Both answer commands over a channel, and end when its other side is closed (`probelog.sandbox.process`).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probelog import logs
from probelog.errors import FailureReason, ItemFailure
from probelog.inference import execution_plan
from probelog.models import memory
from probelog.models.config import LoadLimits
from probelog.models.memory import out_of_memory
from probelog.sandbox import answers
from probelog.sandbox.protocol import Channel
from probelog.sandbox.spec import GeneratorSpec, ProcessSpec, pixels_folder
from probelog.storage.store import Store

if TYPE_CHECKING:
    from PIL import Image

    from probelog.models.loading import Classifier
    from probelog.probes.probe_set import ProbeSet

Answer = tuple[Sequence[bytes | memoryview], dict[str, Any]]


def serve_model(channel: Channel, confined: dict[str, bool]) -> None:
    """Load one model and run it."""
    serve(channel, _Model(confined).commands)


def serve_pixels(channel: Channel, confined: dict[str, bool]) -> None:
    """Prepare the probes of many models. None of them runs here."""
    serve(channel, _Pixels(confined).commands)


def serve(channel: Channel, commands: dict[str, Callable[..., Answer]]) -> None:
    """Answer commands until nobody asks any more; what goes wrong is an answer too."""
    while True:
        message, _ = channel.receive()
        command, number = message.pop("command"), message.pop("number")
        blobs: Sequence[bytes | memoryview] = ()
        try:
            blobs, facts = commands[command](**message)
        except ItemFailure as failure:
            facts = {"failure": failure.reason.value, "detail": failure.detail}
        except Exception as error:  # whatever goes wrong must cost its own row and no more
            reason = FailureReason.OUT_OF_MEMORY if out_of_memory(error) else FailureReason.INTERNAL
            # Nobody reads what this process writes to its standard error.
            lines = traceback.format_exception(error) if reason is FailureReason.INTERNAL else []
            detail = f"{type(error).__name__}: {str(error)[:500]}"
            facts = {"failure": reason.value, "detail": detail, "traceback": logs.shortened("".join(lines))}
        channel.send({**facts, "number": number}, blobs)


def _probes(spec: ProcessSpec) -> ProbeSet:
    from probelog.probes.probe_set import ProbeSet

    return ProbeSet.open(Store(spec.probes), spec.probe_set)


def set_up_device(spec: ProcessSpec | GeneratorSpec, confined: Mapping[str, bool]) -> tuple[str, int | None]:
    """The device that there is, ready to be used, and how much of its memory is this process's share."""
    import torch

    from probelog.sandbox.guards import seccomp

    torch.set_num_threads(spec.threads)
    # Full float32 on GPUs too: a result must not depend on the kind of worker that happened to run its model.
    torch.backends.cudnn.allow_tf32 = False
    if spec.device != "cuda" or not torch.cuda.is_available():
        return "cpu", spec.memory_bytes
    torch.zeros(1, device="cuda")
    if confined.get("calls") and not seccomp.without_connections():
        raise RuntimeError("the sockets that set up the device cannot be given up")
    return "cuda", int(torch.cuda.get_device_properties(0).total_memory * spec.device_share)


class _Pixels:
    def __init__(self, confined: dict[str, bool]) -> None:
        self._confined = confined
        self.commands: dict[str, Callable[..., Answer]] = {"set-up": self._set_up, "prepare": self._prepare}

    def _set_up(self, spec: dict[str, Any]) -> Answer:
        from probelog.inference.pixel_cache import PixelCache

        made = ProcessSpec(**spec)
        self._probes = _probes(made)
        self._cache = PixelCache(
            pixels_folder(Path(made.scratch)),
            made.cache_bytes,
            probe_set=self._probes.hash,
            count=self._probes.count,
        )
        return (), {"confined": self._confined, "probes": self._probes.count}

    def _prepare(self, recipe: str, indices: Sequence[int]) -> Answer:
        from probelog.models.preprocessing import Recipe

        try:
            checked = Recipe.from_json(recipe)
        except ValueError as error:
            # It comes from the model's process, which makes no such recipe by itself.
            raise ItemFailure(FailureReason.INTERNAL, f"the model's process answered with {error}") from None
        digests = self._cache.prepare(checked, lambda some: list(self._probes.images(some)), indices)
        return (() if digests is None else (digests,)), {}


class _Model:
    def __init__(self, confined: dict[str, bool]) -> None:
        self._confined = confined
        self._classifier: Classifier | None = None
        self._probes: ProbeSet | None = None
        self.commands: dict[str, Callable[..., Answer]] = {
            "set-up": self._set_up,
            "load": self._load,
            "observe": self._observe,
        }

    def _set_up(self, spec: dict[str, Any]) -> Answer:
        """Get ready to work, devices included, before anything of the model is looked at."""
        from probelog.inference.execution_plan import Plans, Precision

        self._spec = made = ProcessSpec(**spec)
        self._device, bytes_of_device = set_up_device(made, self._confined)
        precision: Precision = "auto" if made.precision == "auto" else "float32"
        self._plans = Plans(batch_size=made.batch_size, memory_bytes=bytes_of_device, precision=precision)
        memory.keep_freed()
        return (), {"confined": self._confined}

    def _load(self, folder: str) -> Answer:
        from probelog.models.loading import load_classifier

        started = time.perf_counter()
        self._classifier = made = load_classifier(
            folder,
            limits=LoadLimits(max_parameters=self._spec.max_params),
            device=self._device,
            allow_pickle=self._spec.allow_pickle,
        )
        rows, sketches = answers.layers_to_json(made.layers)
        facts = {
            "logits": made.logits,
            "head": made.head.value,
            "labels": made.labels,
            "library": made.library,
            "architecture": made.architecture,
            "parameters": made.parameters,
            "recipe": made.recipe.to_json(),
            "dtype": made.dtype,
            "device": self._device,
            "weight_digest": made.weight_digest,
            "weight_mean": made.weight_mean,
            "weight_std": made.weight_std,
            "identity": made.identity,
            "seconds_weights": made.seconds_weights,
            "seconds_sketch": made.seconds_sketch,
            "name_or_path": made.name_or_path,
            "seconds_load": time.perf_counter() - started,
        }
        return (sketches,), {"facts": facts, "weights": rows, "kind": execution_plan.kind(made, self._device)}

    def _observe(self, indices: Sequence[int], plan: object, digests: str | None, probes: int) -> Answer:
        from probelog.inference.observe import observe
        from probelog.inference.pixel_cache import cached_pixels

        assert self._classifier is not None
        kind = execution_plan.kind(self._classifier, self._device)
        self._plans.learn(kind, plan)
        with cached_pixels(
            pixels_folder(Path(self._spec.scratch)),
            self._classifier.recipe,
            indices,
            None if digests is None else bytes.fromhex(digests),
            probe_set=self._spec.probe_set,
            count=probes,
        ) as cached:
            observation = observe(
                self._classifier,
                self._images,
                indices,
                plans=self._plans,
                device=self._device,
                cached=cached,
            )
        facts = {
            "batch_size": observation.batch_size,
            "precision": observation.precision,
            "plan": self._plans.exported(kind),
        }
        return (np.ascontiguousarray(observation.values, np.float32).tobytes(),), facts

    def _images(self, indices: Sequence[int]) -> list[Image.Image]:
        """Probes that were not prepared."""
        if self._probes is None:
            self._probes = _probes(self._spec)
        return list(self._probes.images(indices))
