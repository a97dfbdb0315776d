"""Execution plans: batch size, memory layout and precision for the models of one architecture on one device.

They are measured on the first models of each architecture, with their own batches, and kept while the process lives;
processes with the same setup can share them (`Plans.exported`, `Plans.learn`). No plan may change a result: a layout is
kept only where it gives the same logits within rounding, and lower precision is tried only where the operator allows
it and checked on every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from probelog.models.memory import free_memory

if TYPE_CHECKING:
    from probelog.models.loading import Classifier

Precision = Literal["float32", "auto"]
Layout = Literal["contiguous", "channels_last"]

_PRECISIONS = ("float32", "bfloat16", "float16")
_INVALID = (TypeError, ValueError, KeyError, OverflowError)
_PROCESSORS = Path("/proc/cpuinfo")

#: Input values of a batch on a CPU. At 224 pixels 16 images are 0 to 12 % slower than these 32, and larger batches gain
#: nothing: their activations fill the caches, and torch's own cost is small by then.
CPU_BATCH_VALUES = 32 * 3 * 224 * 224
CPU_BATCH_LEAST = 16
#: Of small images: every model's process is a fresh one, whose memory the kernel has to clear. 256 of 64 pixels take a fifth
#: more processor time there than these 128.
CPU_BATCH_MOST = 128
#: The first batch of an unknown architecture, where memory is bounded: small, to learn from.
FIRST_BATCH = 4
#: Share of the free memory that a batch may take: measurements are not exact.
_MEMORY_SHARE = 0.8
#: A variant must be so much faster to be worth its conversions.
WORTH = 0.95


@dataclass(frozen=True)
class Variant:
    """One way to run the same model: layout of its tensors, and the type that matrices are multiplied in."""

    layout: Layout = "contiguous"
    precision: str = "float32"


@dataclass(frozen=True)
class ExecutionPlan:
    """The plan for one kind of model.

    Attributes:
        batch_size: images per batch.
        measured: whether its need of memory is known, or memory is not bounded.
        variant: the best one so far.
        untried: variants that were not tried yet.
    """

    batch_size: int
    measured: bool
    variant: Variant
    untried: tuple[Variant, ...]


class Plans:
    """Plans of all kinds of models that a process met, for one operator's bounds."""

    def __init__(
        self, *, batch_size: int = 64, memory_bytes: int | None = None, precision: Precision = "float32"
    ) -> None:
        """``batch_size`` is the largest allowed; ``memory_bytes`` this process's share of the device's memory (a GPU's
        own, or the host's), None for no bound; ``precision`` "auto" allows bfloat16 or float16 where the hardware
        has it and the logits bear it.
        """
        self.batch_size = batch_size
        self.memory_bytes = memory_bytes
        self.precision = precision
        self._known: dict[str, ExecutionPlan] = {}

    def plan(self, classifier: Classifier, device: str) -> ExecutionPlan:
        """The plan for a model's kind; for a new kind, the initial one."""
        known = self._known.get(kind(classifier, device))
        return known if known is not None else self._first(classifier, device)

    def remember(self, classifier: Classifier, device: str, plan: ExecutionPlan) -> None:
        """Keep a plan for the next model of the same kind."""
        self._known[kind(classifier, device)] = plan

    def exported(self, kind: str) -> dict[str, Any] | None:
        """The plan of a kind as plain values for another process; None without one."""
        plan = self._known.get(kind)
        return None if plan is None else asdict(plan)

    def learn(self, kind: str, facts: object) -> None:
        """Take over another process's plan (``exported``) for a kind without one. Invalid values are ignored."""
        if kind in self._known or not isinstance(facts, dict):
            return
        try:
            plan = _plan_from(facts)
        except _INVALID:
            return
        lower = any(one.precision != "float32" for one in (plan.variant, *plan.untried))
        if 1 <= plan.batch_size <= self.batch_size and (self.precision == "auto" or not lower):
            self._known[kind] = plan

    def sized(
        self, plan: ExecutionPlan, bytes_an_image: float, classifier: Classifier, device: str
    ) -> ExecutionPlan:
        """The plan with the largest batch that fits into memory at ``bytes_an_image``, rounded down to a power of two."""
        most = self._most(classifier, device)
        free = free_memory(device, self.memory_bytes)
        if free is not None and bytes_an_image > 0:
            fits = max(1, int(_MEMORY_SHARE * free / bytes_an_image))
            most = min(most, 1 << (fits.bit_length() - 1))
        return replace(plan, batch_size=most, measured=True)

    def _first(self, classifier: Classifier, device: str) -> ExecutionPlan:
        most = self._most(classifier, device)
        bounded = free_memory(device, self.memory_bytes) is not None
        return ExecutionPlan(
            batch_size=min(most, FIRST_BATCH) if bounded else most,
            measured=not bounded,
            variant=Variant(),
            untried=self._variants(classifier, device),
        )

    def _most(self, classifier: Classifier, device: str) -> int:
        if not device.startswith("cpu"):
            return self.batch_size
        channels, height, width = classifier.recipe.shape
        fits = max(CPU_BATCH_LEAST, CPU_BATCH_VALUES // (channels * height * width))
        return min(self.batch_size, fits, CPU_BATCH_MOST)

    def _variants(self, classifier: Classifier, device: str) -> tuple[Variant, ...]:
        layouts: tuple[Layout, ...] = ("channels_last",) if _is_convolutional(classifier) else ()
        lower = lower_precision(device) if self.precision == "auto" else None
        variants = [Variant(layout) for layout in layouts]
        if lower is not None:
            variants += [Variant(layout, lower) for layout in layouts or ("contiguous",)]
        return tuple(variants)


def lower_precision(device: str) -> str | None:
    """The short floating-point type that a device multiplies matrices in at speed, or None."""
    import torch

    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    try:
        flags = set(_PROCESSORS.read_text().split())
    except OSError:  # not Linux: left at float32
        return None
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else None


def _is_convolutional(classifier: Classifier) -> bool:
    """More than a patch embedding, which is one convolution that touches every pixel once."""
    import torch

    modules = classifier.module.modules()
    return sum(isinstance(module, torch.nn.Conv2d) for module in modules) > 1


def kind(classifier: Classifier, device: str) -> str:
    """Equal for models that differ in little but the size of their heads."""
    size = f"{classifier.parameters:.0e}"
    return json.dumps([classifier.library, classifier.architecture, *classifier.recipe.shape, size, device])


def _plan_from(facts: Mapping[str, Any]) -> ExecutionPlan:
    """From ``asdict``. Raises one of `_ODD` for anything else."""
    best, *untried = [_variant_from(one) for one in (facts["variant"], *facts["untried"])]
    return ExecutionPlan(int(facts["batch_size"]), facts["measured"] is True, best, tuple(untried))


def _variant_from(facts: Mapping[str, Any]) -> Variant:
    if facts["layout"] not in get_args(Layout) or facts["precision"] not in _PRECISIONS:
        raise ValueError("no variant")
    return Variant(facts["layout"], facts["precision"])
