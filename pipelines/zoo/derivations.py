"""What is made of a network with little or no training: pruned, rounded, merged, reordered and adapted copies of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]

# Units that lie between two layers and nowhere else, by architecture: what their order is called, and along which axis
# of which tensors it goes. Any order of them computes the same.
_HIDDEN = {
    "vit": ((r"(blocks\.\d+\.mlp)\.fc1\..*", 0), (r"(blocks\.\d+\.mlp)\.fc2\.weight", 1)),
    "convnext": ((r"(.*layers\.\d+)\.pwconv1\..*", 0), (r"(.*layers\.\d+)\.pwconv2\.weight", 1)),
    "resnet": (
        (r"(.*layers\.\d+)\.layer\.0\.(?:convolution|normalization)\..*", 0),
        (r"(.*layers\.\d+)\.layer\.1\.convolution\.weight", 1),
    ),
}  # fmt: skip
_MOBILENET = re.compile(r"mobilenet_v1\.layer\.(\d+)\.(convolution|normalization)\..*")
_LAST_MOBILENET_LAYER = 25

#: Architectures whose channels can be put into another order.
PERMUTABLE = (*_HIDDEN, "mobilenet")


def permuted(state: Mapping[str, torch.Tensor], architecture: str, rng: np.random.Generator) -> State:
    """The same function with its hidden units in another order."""
    import torch

    orders: dict[str, torch.Tensor] = {}
    result = dict(state)
    for name in sorted(state):
        for unit, axis in _hidden_units(architecture, name):
            if result[name].dim() > axis:
                size = result[name].shape[axis]
                order = orders.setdefault(unit, torch.from_numpy(rng.permutation(size)))
                result[name] = result[name].index_select(axis, order)
    return result


def _hidden_units(architecture: str, tensor: str) -> list[tuple[str, int]]:
    if architecture != "mobilenet":
        matches = [(re.fullmatch(pattern, tensor), axis) for pattern, axis in _HIDDEN[architecture]]
        return [(match.group(1), axis) for match, axis in matches if match]
    found = _MOBILENET.fullmatch(tensor)
    if not found:
        return []
    # Depthwise (even) and pointwise (odd) layers take turns; a depthwise one keeps the order of the layer before.
    layer = int(found.group(1))
    units = [(str(layer - 1 + layer % 2), 0)]
    if layer % 2 and found.group(2) == "convolution":
        units.append((str(layer - 2), 1))
    return [(unit, axis) for unit, axis in units if 0 < int(unit) < _LAST_MOBILENET_LAYER]


def quantised(state: Mapping[str, torch.Tensor], *, per_row: bool) -> State:
    """Matrices rounded to 8 bits of their largest number, by row or as a whole, and back."""
    result = dict(state)
    for name, values in state.items():
        if values.dim() > 1:
            rows = values.reshape(len(values), -1) if per_row else values.reshape(1, -1)
            step = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            result[name] = ((rows / step).round() * step).reshape(values.shape)
    return result


def merged(states: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], *, slerp: bool) -> State:
    """A weighted mean of networks, or of two the point on the arc between them; what differs in shape is the first's.

    Counters are the first's too.
    """
    first = states[0]
    result = dict(first)
    for name, values in first.items():
        same = all(state[name].shape == values.shape for state in states)
        if same and values.is_floating_point():
            parts = _arc(values, states[1][name], weights) if slerp else weights
            result[name] = sum(
                (part * state[name] for part, state in zip(parts, states, strict=True)), 0 * values
            )
    return result


def _arc(a: torch.Tensor, b: torch.Tensor, weights: Sequence[float]) -> list[float]:
    lengths = float(a.norm()) * float(b.norm())
    angle = float(np.arccos(np.clip(float((a * b).sum()) / lengths, -1, 1))) if lengths else 0.0
    if angle < 1e-3:
        return list(weights)
    return [float(np.sin(weight * angle) / np.sin(angle)) for weight in weights]


def prune(model: torch.nn.Module, keep: torch.nn.Module, share: float) -> None:
    """Mask that share of every matrix's smallest numbers; not of the layer ``keep``, the head."""
    from torch.nn.utils import prune as pruning

    for module in _matrices(model, keep):
        pruning.l1_unstructured(module, "weight", amount=share)  # type: ignore[no-untyped-call]


def unmask(model: torch.nn.Module, keep: torch.nn.Module) -> None:
    """Make the zeros of `prune` zeros like any others."""
    from torch.nn.utils import prune as pruning

    for module in _matrices(model, keep):
        pruning.remove(module, "weight")  # type: ignore[no-untyped-call]


def adapt(model: torch.nn.Module, keep: torch.nn.Module, rank: int) -> None:
    """Freeze everything but the head ``keep``, and add a trainable product of this rank to every matrix."""
    from torch.nn.utils import parametrize

    model.requires_grad_(False)
    for module in _matrices(model, keep):
        parametrize.register_parametrization(module, "weight", _adapter(module.get_parameter("weight"), rank))
    keep.requires_grad_(True)


def merge_adapters(model: torch.nn.Module, keep: torch.nn.Module) -> None:
    """Put the products of `adapt` into the matrices."""
    from torch.nn.utils import parametrize

    for module in _matrices(model, keep):
        parametrize.remove_parametrizations(module, "weight")


def _adapter(weight: torch.Tensor, rank: int) -> torch.nn.Module:
    import torch

    class Adapter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows, columns = len(weight), weight[0].numel()
            self.down = torch.nn.Parameter(torch.randn(rank, columns) / columns**0.5)
            self.up = torch.nn.Parameter(torch.zeros(rows, rank))

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values + (self.up @ self.down).reshape(values.shape)

    return Adapter()


def _matrices(model: torch.nn.Module, keep: torch.nn.Module) -> list[torch.nn.Module]:
    """Linear layers and convolutions across channels, without the head."""
    import torch

    heads = set(keep.modules())
    return [
        module
        for module in model.modules()
        if module not in heads
        and (
            isinstance(module, torch.nn.Linear)
            or (isinstance(module, torch.nn.Conv2d) and module.groups == 1)
        )
    ]
