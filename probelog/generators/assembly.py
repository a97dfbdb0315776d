"""The networks of a pipeline, put together as a generator."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.layout import Layout, part_folder, weights_stem
from probelog.generators.parts.building import build, check_elements, open_weights
from probelog.generators.parts.networks import Network
from probelog.generators.sampling import Draw, Generator
from probelog.models.config import LoadLimits, canonical, tidy_labels
from probelog.storage.encoding import short_key
from probelog.weights.reader import WeightFacts, largest_layers

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"[0-9]{1,6}", re.ASCII)

LIMITS = LoadLimits(max_image_size=1024)


@dataclass(frozen=True)
class LoadOptions:
    """What the operator chose.

    Attributes:
        steps: of the sampler.
        prompts: for models that take text; none for our own.
        trigger_words: of the adapter that is to be added.
        known_digest: of weights that were read and found sound before (an adapter's base): nothing else is learnt of them.
        limits: what is too large; ``max_image_size`` is that of a sample.
        allow_pickle: whether weights may be pickled.
        device: ``cpu`` or ``cuda``.
    """

    steps: int = 25
    prompts: Sequence[str] = ()
    trigger_words: Sequence[str] = ()
    known_digest: str | None = None
    limits: LoadLimits = LIMITS
    allow_pickle: bool = False
    device: str = "cpu"


class Parts:
    """The networks of a pipeline, built one after the other when all are known to be within the limits."""

    def __init__(
        self, folder: Path, layout: Layout, options: LoadOptions, parts: Mapping[str, Network]
    ) -> None:
        self._layout, self._networks, self._options = layout, parts, options
        opened = {
            role: open_weights(part_folder(folder, layout, role), weights_stem(role), options.allow_pickle)
            for role in parts
        }
        check_elements(opened.values(), options.limits)
        self.modules: dict[str, torch.nn.Module] = {}
        self.facts: dict[str, WeightFacts] = {}
        for role, network in parts.items():
            again = options.known_digest is not None
            self.modules[role], facts = build(
                network, opened.pop(role), options.limits, options.device, again=again
            )
            if facts is not None:
                self.facts[role] = facts

    def generator(
        self,
        role: str,
        draw: Draw,
        *,
        shape: tuple[int, ...],
        size: tuple[int, int],
        classes: int = 0,
        prompts: Sequence[str] = (),
        function: Sequence[object] = (),
    ) -> Generator:
        """The pipeline as a generator, told one of so many ``classes``, one of the ``prompts`` or nothing; ``role`` is the
        network that makes the picture, ``function`` what decides the samples besides networks and weights.
        """
        several = len(self.facts) > 1
        layers = [
            replace(layer, tensor=f"{name}.{layer.tensor}") if several else layer
            for name, facts in self.facts.items()
            for layer in facts.layers
        ]
        digest = self._options.known_digest
        if digest is None:
            digests = [facts.digest for facts in self.facts.values()]
            digest = hashlib.sha256(json.dumps(digests).encode()).hexdigest() if several else digests[0]
        settings = [canonical(network.settings) for network in self._networks.values()]
        return Generator(
            pipeline=self._layout.pipeline,
            architecture=self._networks[role].name,
            draw=draw,
            parameters=sum(
                parameter.numel() for module in self.modules.values() for parameter in module.parameters()
            ),
            dtype=self.facts[role].dtype if role in self.facts else "none",
            weight_digest=digest,
            identity=short_key(digest, json.dumps([settings, *function])),
            layers=largest_layers(layers),
            device=self._options.device,
            conditioning="class" if classes else "text" if prompts else "none",
            shape=shape,
            size=size,
            class_names=_class_names(self._layout.settings.get("id2label"), classes),
            classes=classes,
            prompts=list(prompts),
            modules=self.modules,
        )


def check_size(height: int, width: int, limits: LoadLimits) -> None:
    """Raise ItemFailure, TOO_LARGE, for pictures beyond the limit."""
    if max(height, width) > limits.max_image_size:
        raise ItemFailure(
            FailureReason.TOO_LARGE,
            f"pictures of {height} x {width} pixels; the limit is {limits.max_image_size}",
        )


def _class_names(declared: object, classes: int) -> list[str]:
    """Names that a pipeline declares for all of its classes, fit to print; none where it declares none."""
    if not isinstance(declared, dict) or not declared or len(declared) > classes:
        return []
    return tidy_labels(
        {int(key): value for key, value in declared.items() if _NUMBER.fullmatch(key)}, classes
    )
