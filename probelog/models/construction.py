"""Making a model whose weights are about to be replaced: nothing is drawn at random, little is copied."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.nn.modules.module import _IncompatibleKeys
from torch.overrides import TorchFunctionMode

_INIT = torch.nn.init
_RANDOM_FILLS = {
    torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.log_normal_, torch.Tensor.bernoulli_,
    torch.Tensor.exponential_, torch.Tensor.random_, torch.Tensor.erfinv_,
    _INIT.uniform_, _INIT.normal_, _INIT.trunc_normal_, _INIT.xavier_uniform_, _INIT.xavier_normal_,
    _INIT.kaiming_uniform_, _INIT.kaiming_normal_, _INIT.orthogonal_,
}  # fmt: skip
# How random numbers are brought into shape after they were drawn.
_TOUCHES = {torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.clamp_}


class Construction(TorchFunctionMode):
    """While a model is constructed: parameters are not filled with random numbers, and tensors are watched.

    The numbers of a parameter are whatever its memory held before; a state dict must replace them all. Buffers and
    other tensors get their values as always.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Called for every operation on tensors."""
        if func in _RANDOM_FILLS or func in _TOUCHES:
            target = args[0] if args else (kwargs or {})["tensor"]  # torch.nn.init names its arguments
            if isinstance(target, torch.nn.Parameter) or (
                isinstance(target, torch.Tensor) and target.is_meta
            ):
                return target
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, list | tuple) else (result,):
            if isinstance(item, torch.Tensor):
                self._made.append(weakref.ref(item))
        return result

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Parameters are made past this mode: watch these too."""
        self._made += map(weakref.ref, tensors)

    def alive(self) -> list[torch.Tensor]:
        """What was made, seen or unseen by the model's state dict, and is still held by something."""
        return [tensor for made in self._made if (tensor := made()) is not None]


def constructed(create: Callable[[], torch.nn.Module], device: str) -> tuple[torch.nn.Module, Construction]:
    """A model as ``create`` makes it on the device, without random numbers in its parameters."""
    construction = Construction()
    with torch.device(device), construction:
        module = create()
    construction.watch(module.state_dict(keep_vars=True).values())
    return module, construction


def with_weights(
    create: Callable[[], torch.nn.Module],
    load: Callable[[torch.nn.Module, bool], object],
    sketch: tuple[torch.nn.Module, Construction] | None = None,
) -> torch.nn.Module:
    """The model on the CPU, in float32, with its weights: in their own memory where the type fits.

    ``load`` puts the weights into a model that ``create`` made, its second argument says whether in place of the
    model's tensors or into their memory. ``sketch`` is the model on the meta device, if there is one already. It
    becomes the model, unless it holds more tensors than its state dict names: these have values only if it is made
    on the CPU. There, tensors that share memory with a parameter (a list of weights, a view) must go on sharing it,
    so that weights are copied.
    """
    if sketch is not None:
        module, construction = sketch
        load(module, True)
        if not any(tensor.is_meta for tensor in construction.alive()):
            return module.float()
    del sketch
    module, construction = constructed(create, "cpu")
    replaced = {_memory(tensor) for tensor in module.state_dict(keep_vars=True).values() if tensor.numel()}
    load(module, True)
    if not any(_memory(tensor) in replaced for tensor in construction.alive()):
        return module.float()
    module, _ = constructed(create, "cpu")
    load(module, False)
    return module.float()


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, assign: bool) -> _IncompatibleKeys:
    """``load_state_dict`` with floating-point weights as float32, the rest in the type that the model has."""
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    state = {
        name: tensor.to(torch.float32 if dtypes[name].is_floating_point else dtypes[name])
        for name, tensor in tensors.items()
    }
    loaded: _IncompatibleKeys = type(module).load_state_dict(module, state, strict=True, assign=assign)
    return loaded


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
