"""Batch normalisations folded into convolutions: the same logits, and nothing folded that is not a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probelog.inference.folding import Folding, Pair, has_norms, pairs_seen
from probelog.inference.observe import observe
from tests.probelog.inference.test_observe import Pictures, classifier, recipe

nn = torch.nn


def settled(module: Any, seed: int = 0) -> Any:
    """In eval mode, with statistics as training leaves them."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.1, 3.0)
            if layer.weight is not None:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return module.eval()


def images(size: int = 16, count: int = 3) -> Any:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def traced(module: Any, batch: Any) -> list[Pair]:
    with torch.inference_mode():
        return pairs_seen(module, lambda: module(batch))


def run(module: Any, batch: Any) -> Any:
    with torch.inference_mode():
        found = module(batch)
        return getattr(found, "logits", found)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bias=st.booleans(),
    affine=st.booleans(),
    groups=st.sampled_from([1, 3]),
    channels=st.sampled_from([3, 6, 12]),
    eps=st.sampled_from([1e-5, 1e-3]),
)
def test_folded_layers_say_the_same(
    seed: int, bias: bool, affine: bool, groups: int, channels: int, eps: float
) -> None:
    module = settled(
        nn.Sequential(
            nn.Conv2d(3, channels, 3, bias=bias, groups=groups, stride=2),
            nn.BatchNorm2d(channels, eps=eps, affine=affine),
            nn.ReLU(),
            nn.Conv2d(channels, 4, 1, bias=bias),
            nn.BatchNorm2d(4, eps=eps, affine=affine),
        ),
        seed,
    )
    batch = images()
    plain, before = run(module, batch), {name: value.clone() for name, value in module.state_dict().items()}
    pairs = traced(module, batch)
    assert [(type(conv), type(norm)) for conv, norm in pairs] == [(nn.Conv2d, nn.BatchNorm2d)] * 2
    folding = Folding(pairs)
    torch.testing.assert_close(run(module, batch), plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(module[0].weight, before["0.weight"])
    folding.undo()
    assert torch.equal(run(module, batch), plain)
    assert {
        name: bool(torch.equal(value, before[name])) for name, value in module.state_dict().items()
    } == dict.fromkeys(before, True)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002", "densenet121"]
)
def test_timm(name: str) -> None:
    import timm

    module = settled(timm.create_model(name, num_classes=5))
    batch = images(64)
    plain, pairs = run(module, batch), traced(module, batch)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    # A densenet's first norm of each layer comes before its convolution.
    assert len(pairs) == norms if name != "densenet121" else norms // 3 < len(pairs) < norms
    Folding(pairs)
    torch.testing.assert_close(run(module, batch), plain, rtol=1e-3, atol=1e-4 * float(plain.std()))


def test_transformers() -> None:
    from transformers import RegNetConfig, RegNetForImageClassification

    module = settled(
        RegNetForImageClassification(
            RegNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], groups_width=8)
        )
    )
    batch = images(64)
    plain, pairs = run(module, batch), traced(module, batch)
    assert len(pairs) == sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())
    Folding(pairs)
    torch.testing.assert_close(run(module, batch), plain, rtol=1e-3, atol=1e-4 * float(plain.std()))


class Twice(nn.Module):
    """One of its layers runs twice."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.conv, self.norm, self.shared = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), shared

    def forward(self, x: Any) -> Any:
        x = self.norm(self.conv(x))
        return self.norm(x) if self.shared == "norm" else self.conv(x)


class Fork(nn.Module):
    """What the convolution gives goes past the norm as well."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * size * size, 4)

    def forward(self, x: Any) -> Any:
        x = self.conv(x)
        return self.head((x + self.norm(x)).flatten(1))


class Standardised(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return nn.functional.conv2d(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize(
    "module",
    [
        Twice("norm"),
        Twice("conv"),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(Standardised(3, 3, 1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
    ],
    ids=["norm twice", "convolution twice", "something between", "not plain", "no statistics", "norm first"],
)
def test_what_is_no_pair(module: Any) -> None:
    assert traced(settled(module), images()) == []


def test_hooks_are_removed() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(ZeroDivisionError):
        pairs_seen(module, lambda: print(1 / 0))
    traced(module, images())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module)
    assert has_norms(module)
    assert not has_norms(nn.Conv2d(3, 3, 1))


# In a run


class Counting(nn.Module):
    """Tells how many images it was asked for, and with how many norms at work."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Any) -> Any:
        folded = [
            layer
            for layer in self.modules()
            if isinstance(layer, nn.BatchNorm2d) and "forward" in vars(layer)
        ]
        self.seen.append((len(x), len(folded)))
        return self.inner(x)


def small() -> Any:
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)]
    return Counting(settled(nn.Sequential(*layers), 3))


def exact(model: Any, indices: list[int]) -> np.ndarray:
    pixels = recipe().geometry(Pictures()(indices))
    return run(model, recipe().normalise(torch.from_numpy(pixels))).numpy().T


def test_a_model_is_run_folded() -> None:
    model, indices = small(), [*range(11)] * 4
    wanted = exact(model, indices)
    model.seen.clear()
    found = observe(classifier(model), Pictures(), indices)
    np.testing.assert_allclose(found.values, wanted, rtol=1e-4, atol=1e-4)
    assert model.seen[:2] == [(4, 0), (4, 1)]
    assert {folded for _, folded in model.seen[2:]} == {1}


def test_few_probes_are_not_worth_it() -> None:
    model = small()
    observe(classifier(model), Pictures(), [*range(11)])
    assert {folded for _, folded in model.seen} == {0}


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_would_answer_otherwise_is_run_as_it_is(fails: bool) -> None:
    model, indices = Counting(settled(Fork())), [*range(11)] * 4
    if fails:
        norm, inner = model.inner.norm, model.inner.forward

        def forward(x: Any) -> Any:
            if "forward" in vars(norm):
                raise RuntimeError("somebody looked")
            return inner(x)

        model.inner.forward = forward
    wanted = exact(model, indices)
    model.seen.clear()
    found = observe(classifier(model), Pictures(), indices)
    np.testing.assert_allclose(found.values, wanted, rtol=1e-5, atol=1e-5)
    assert {folded for _, folded in model.seen[2:]} == {0}
