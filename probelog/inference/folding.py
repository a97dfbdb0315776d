"""Batch normalisations folded into the convolutions before them, which spares convolutional networks a pass over memory.

In eval mode a batch normalisation is a scale and a shift of each channel, so that ``norm(conv(x))`` is a convolution
with other weights: ``w' = w g / sqrt(v + e)``, ``b' = (b - m) g / sqrt(v + e) + h`` with the norm's running mean m and
variance v, its weight g and bias h (Jacob et al. 2018, "Quantization and training of neural networks", section 3.2;
``torch.nn.utils.fusion`` does the same for pairs that somebody names). Which norm follows which convolution is seen
while the model runs, so that no architecture needs to be known. What cannot be seen (a convolution whose output goes
elsewhere too, weights that are read from outside) shows in the logits: the caller compares them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.nn.Conv2d", "torch.nn.BatchNorm2d"]


def pairs_seen(module: torch.nn.Module, run: Callable[[], None]) -> list[Pair]:
    """Each batch normalisation whose input is the output of a convolution, with that convolution.

    Args:
        module: the model, in eval mode.
        run: runs it once.

    Only plain layers, which do nothing else, and each only where it ran exactly once.
    """
    import torch

    made: dict[int, tuple[weakref.ref[torch.Tensor], torch.nn.Conv2d]] = {}
    times: Counter[torch.nn.Module] = Counter()
    pairs: list[Pair] = []

    def ran(layer: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        times[layer] += 1
        assert isinstance(layer, torch.nn.Conv2d)
        made[id(output)] = (weakref.ref(output), layer)

    def runs(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        times[layer] += 1
        known, conv = made.get(id(given[0]), (None, None)) if given else (None, None)
        if known is not None and known() is given[0] and conv is not None:
            assert isinstance(layer, torch.nn.BatchNorm2d)
            pairs.append((conv, layer))

    with ExitStack() as hooks:
        for layer in module.modules():
            if _is_plain_convolution(layer):
                hooks.callback(layer.register_forward_hook(ran).remove)
            elif _is_plain_norm(layer):
                hooks.callback(layer.register_forward_pre_hook(runs).remove)
        run()
    taken = Counter(conv for conv, _ in pairs)
    return [(conv, norm) for conv, norm in pairs if times[conv] == times[norm] == taken[conv] == 1]


def has_norms(module: torch.nn.Module) -> bool:
    """Whether there may be anything to fold."""
    return any(_is_plain_norm(layer) for layer in module.modules())


@dataclass(frozen=True)
class _Before:
    conv: torch.nn.Conv2d
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm: torch.nn.BatchNorm2d


class Folding:
    """Pairs that are folded, until ``undo``."""

    def __init__(self, pairs: list[Pair]) -> None:
        self._before = [_Before(conv, conv.weight, conv.bias, norm) for conv, norm in pairs]
        for conv, norm in pairs:
            _fold(conv, norm)

    def undo(self) -> None:
        """Give every layer back what it had, bit for bit."""
        for one in self._before:
            one.conv.weight, one.conv.bias = one.weight, one.bias
            del one.norm.forward


def _fold(conv: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d) -> None:
    import torch

    assert norm.running_mean is not None
    assert norm.running_var is not None
    # In double precision: the product of two roundings would be a third one.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype)
    conv.weight = torch.nn.Parameter(weight, requires_grad=False)
    conv.bias = torch.nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    # timm's norms are followed by an activation of their own. An attribute of the instance hides the class's method.
    setattr(norm, "forward", _what_follows(norm))  # noqa: B010 - to the type checker a method


def _what_follows(norm: torch.nn.BatchNorm2d) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    if type(norm) is torch.nn.BatchNorm2d:
        return lambda x: x
    drop: Any = norm.drop
    act: Any = norm.act

    def follow(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = act(drop(x))
        return result

    return follow


def _is_plain_convolution(layer: torch.nn.Module) -> bool:
    import torch
    from timm.layers import Conv2dSame

    # Others may look at their weights again when they run (weight standardisation).
    return type(layer) in (torch.nn.Conv2d, Conv2dSame) and layer.weight.dtype == torch.float32


def _is_plain_norm(layer: torch.nn.Module) -> bool:
    import torch
    from timm.layers import BatchNormAct2d

    return (
        isinstance(layer, torch.nn.BatchNorm2d)
        and type(layer) in (torch.nn.BatchNorm2d, BatchNormAct2d)
        and not layer.training
        and layer.running_mean is not None
        and layer.running_var is not None
    )
