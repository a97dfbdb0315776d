"""A network with its weights: sizes are compared before memory is taken, and every tensor has its place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.layout import pickle_name, weights_name
from probelog.generators.parts.networks import Network
from probelog.models.config import LoadLimits, bound_numbers, bounded_construction
from probelog.models.construction import constructed, fill, with_weights
from probelog.models.memory import out_of_memory
from probelog.weights.reader import WeightFacts, Weights

if TYPE_CHECKING:
    import torch

#: Attention as diffusers called its parts until 2023; most networks of its first year are stored so.
_OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
#: Counts up to the length of a text, in weights from before 2023; made by the class itself since.
_POSITIONS = re.compile(r"(.*\.)?position_ids")

TEXT_MODEL = "text_model."


def open_weights(folder: Path, stem: str, allow_pickle: bool) -> Weights:
    """The weights of a part of a pipeline, not yet read.

    Raises:
        ItemFailure: as `Weights`.
    """
    return Weights(
        folder, allow_pickle=allow_pickle, name=weights_name(folder, stem), pickled=pickle_name(stem)
    )


def check_elements(weights: Iterable[Weights], limits: LoadLimits) -> None:
    """Raise ItemFailure, TOO_LARGE, where all parts of a pipeline together exceed the limit."""
    elements = sum(one.elements for one in weights)
    if elements > limits.max_parameters:
        raise ItemFailure(
            FailureReason.TOO_LARGE,
            f"{elements} numbers in the weights; the limit is {limits.max_parameters}",
        )


def build(
    network: Network, weights: Weights, limits: LoadLimits, device: str, *, again: bool = False
) -> tuple[torch.nn.Module, WeightFacts | None]:
    """The network with its weights, ready to run in float32.

    ``again``: of weights that were read and found sound before; nothing is learnt of them.

    Raises:
        ItemFailure: CONFIG_MISMATCH where weights and configuration differ, CORRUPT_CONFIG where the library cannot build
            what is described, TOO_LARGE, NON_FINITE, OUT_OF_MEMORY.
    """
    bound_numbers(network.settings, weights.shapes, weights.elements, limits)
    try:
        with bounded_construction(len(weights.shapes), weights.elements):
            sketch = constructed(network.create, "meta")
        built = {name: tuple(tensor.shape) for name, tensor in sketch[0].state_dict().items()}
        names = {name: _current(name, built) for name in weights.shapes if not _POSITIONS.fullmatch(name)}
        _compare(
            network.name,
            built,
            {current: _squeezed(weights.shapes[name], name) for name, current in names.items()},
        )
        facts = None
        if again:
            stored = weights.read_again()
        else:
            stored, facts = weights.read()
        tensors = {
            current: stored[name].reshape(_squeezed(tuple(stored[name].shape), name))
            for name, current in names.items()
        }
        del stored
        module = with_weights(network.create, lambda made, assign: fill(made, tensors, assign=assign), sketch)
        return module.requires_grad_(False).eval().to(device), facts
    except ItemFailure:
        raise
    except Exception as error:  # a library's constructors given untrusted values raise anything
        reason = FailureReason.OUT_OF_MEMORY if out_of_memory(error) else FailureReason.CORRUPT_CONFIG
        raise ItemFailure(
            reason, f"{network.name} cannot be built as described: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _current(name: str, built: Collection[str]) -> str:
    """What a tensor of the weights is called in a network of this version of the libraries."""
    if match := _OLD_ATTENTION.fullmatch(name):
        return f"{match[1]}.{_NEW_NAMES[match[2]]}.{match[3]}"
    # transformers 5 has one module less around a text encoder.
    short = name.removeprefix(TEXT_MODEL)
    return short if short in built else name


def _squeezed(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Attention's matrices were stored as convolutions of one pixel by the oldest."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) and _OLD_ATTENTION.fullmatch(name) else shape


def _compare(
    network: str, built: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ItemFailure, CONFIG_MISMATCH, unless both name the same tensors with the same shapes."""
    missing, odd = sorted(built.keys() - stored.keys()), sorted(stored.keys() - built.keys())
    other = sorted(name for name in built.keys() & stored.keys() if built[name] != stored[name])
    for kind, names in (("lack", missing), ("have besides", odd), ("have in another shape", other)):
        if names:
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"the weights do not fit {network} as described: they {kind} {', '.join(names[:3])[:300]} "
                f"({len(names)} in all)",
            )
