"""A downloaded repository as a classifier that runs: whatever the uploader put into the folder.

What keeps this safe, in order: only plain files inside the folder are opened; the weights are safetensors whose
headers are checked whole (pickles only where the operator asks, through torch's restricted unpickler); the
configuration is data, reduced to known keys, and can name neither code nor another repository; its sizes must be
justified by the weights before a model is built, first without memory; the libraries get a sanitised
configuration object and tensors, never the folder, so that no other file in it is ever looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.models.config import LoadLimits, read_config
from probelog.models.memory import out_of_memory
from probelog.storage.encoding import short_key
from probelog.storage.schemas import Head, clean_unicode
from probelog.weights.reader import LayerFacts, Weights

if TYPE_CHECKING:
    import torch

    from probelog.models.preprocessing import Recipe
    from probelog.models.timm import TimmPlan
    from probelog.models.transformers import TransformersPlan

# Of what a configuration calls its model: more than any repository's name has.
_LONGEST_NAME = 200

__all__ = ["Classifier", "LoadLimits", "load_classifier"]


@dataclass(frozen=True)
class Classifier:
    """A model that is ready to run, in eval mode and float32, and what is known about it.

    ``labels`` holds one declared label per logit, ``LABEL_i`` where none is declared; nothing may depend on
    them. ``parameters`` counts the model's own, ``dtype`` is how most weights are stored, ``weight_mean`` and
    ``weight_std`` are over all stored floating-point numbers, ``layers`` tells of every tensor.

    ``identity`` is a 16-digit key of all that decides the logits: weights, library, architecture, configuration
    as it is used, preprocessing, meaning of the head. Equal for repositories that differ only in labels, in the
    sharding of their weights or in what is never looked at.

    ``seconds_weights`` is what reading the weights took, with digest, statistics and sketches;
    ``seconds_sketch`` the part of it for statistics and sketches. ``name_or_path`` is the configuration's
    ``_name_or_path``, where that is a text of a name's length: untrusted, like the labels.
    """

    module: torch.nn.Module = field(repr=False)
    library: str
    architecture: str
    head: Head
    labels: list[str] = field(repr=False)
    logits: int
    parameters: int
    recipe: Recipe
    dtype: str
    weight_digest: str
    weight_mean: float
    weight_std: float
    device: str = "cpu"
    input_name: str | None = None
    identity: str = ""
    layers: list[LayerFacts] = field(default_factory=list, repr=False)
    seconds_weights: float = 0.0
    seconds_sketch: float = 0.0
    name_or_path: str | None = None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The logits, (B, L) float32 on the model's device, of a normalised batch (B, C, H, W) float32.

        Raises:
            ItemFailure: CONFIG_MISMATCH where the output is not (B, L). What the model itself raises passes.
        """
        import torch

        output: Any = (
            self.module(batch) if self.input_name is None else self.module(**{self.input_name: batch})
        )
        # PPLCNetForImageClassification returns its logits under the other name.
        logits = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        if not isinstance(logits, torch.Tensor) or logits.shape != (len(batch), self.logits):
            shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"{self.architecture} gives {shape} for {len(batch)} images; {self.logits} logits are declared",
            )
        return logits.float()


def load_classifier(
    folder: str | os.PathLike[str],
    *,
    limits: LoadLimits | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> Classifier:
    """The image classifier in a downloaded repository, of the transformers or the timm kind.

    ``allow_pickle`` accepts ``pytorch_model.bin`` where there are no safetensors; torch's restricted unpickler
    has had holes (CVE-2025-32434, CVE-2026-24747), so leave it off for untrusted files.

    Raises:
        ItemFailure: with the reason why this model is not indexed.
    """
    limits = limits or LoadLimits()
    folder = Path(folder)
    config = read_config(folder)
    timm_kind = "architecture" in config and config.get("model_type") in (None, "timm_wrapper")
    if timm_kind:
        from probelog.models import timm

        plan: TimmPlan | TransformersPlan = timm.plan(config, limits)
    else:
        from probelog.models import transformers

        plan = transformers.plan(folder, config, limits)
    weights = Weights(folder, allow_pickle=allow_pickle)
    if weights.elements > limits.max_parameters:
        raise ItemFailure(
            FailureReason.TOO_LARGE,
            f"{weights.elements} numbers in the weights; the limit is {limits.max_parameters}",
        )
    try:
        module, facts = plan.build(weights)
        module.requires_grad_(False).eval().to(device)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ItemFailure(FailureReason.OUT_OF_MEMORY, f"{plan.architecture}: {str(error)[:300]}") from error
    return Classifier(
        module=module,
        library=plan.library,
        architecture=plan.architecture,
        head=plan.head,
        labels=plan.labels,
        logits=len(plan.labels),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        recipe=plan.recipe,
        dtype=facts.dtype,
        weight_digest=facts.digest,
        weight_mean=facts.mean,
        weight_std=facts.std,
        device=device,
        input_name=plan.input_name,
        identity=short_key(
            facts.digest,
            plan.library,
            plan.architecture,
            plan.function,
            replace(plan.recipe, declared=True).key,
            plan.head.value,
        ),
        layers=facts.layers,
        seconds_weights=facts.seconds,
        seconds_sketch=facts.seconds_sketch,
        name_or_path=_name_or_path(config),
    )


def _name_or_path(config: Mapping[str, Any]) -> str | None:
    name = config.get("_name_or_path")
    return clean_unicode(name) if isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME else None
