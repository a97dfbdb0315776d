"""Models made without random numbers give exactly the logits of those that the library makes and fills."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch

from probelog.models.construction import constructed, fill, with_weights

TINY_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64, "patch_size": 16}
# One small model of each family that keeps tensors outside of its state dict, and of some that only look odd.
ODD: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": TINY_VIT,
    "beitv2_base_patch16_224": TINY_VIT,
    "cait_xxs24_224": {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64},
    "coatnet_0_rw_224": {"img_size": 64},
    "convit_tiny": {"depth": 2, "embed_dim": 24, "num_heads": 2, "local_up_to_layer": 1},
    "csatv2": {},
    "deit3_small_patch16_224": TINY_VIT,
    "densenetblur121d": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
    "efficientformer_l1": {},
    "efficientformerv2_s0": {},
    "efficientvit_m0": {},
    "eva02_tiny_patch14_224": TINY_VIT | {"patch_size": 16},
    "gcvit_xxtiny": {"img_size": 64, "window_size": (2, 2, 4, 2)},
    "levit_128s": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": 128},
    "maxvit_tiny_tf_224": {"img_size": 64},
    "mobilevit_xxs": {},
    "resnetblur18": {},
    "rexnet_100": {},
    "sequencer2d_s": {"embed_dims": (8, 8, 8, 8), "hidden_sizes": (4, 4, 4, 4), "layers": (1, 1, 1, 1)},
    "skresnet18": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "img_size": 56},
    "swinv2_tiny_window8_256": {
        "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "img_size": 64, "window_size": 4,
    },
    "swinv2_cr_tiny_224": {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "img_size": 64},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "tresnet_m": {"layers": (1, 1, 1, 1)},
    "vit_base_patch16_rope_224": TINY_VIT,
    "vit_relpos_small_patch16_224": TINY_VIT,
    "xcit_nano_12_p16_224": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}  # fmt: skip
# Those whose tensors are all in the state dict must not be made twice.
ONCE = ["resnet18", "vit_small_patch16_224", "mobilenetv3_small_050", "convnext_atto", "test_resnet"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Maker:
    """Makes one model as often as it is asked, and counts."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name, self.arguments, self.made = name, arguments, 0

    def __call__(self) -> Any:
        self.made += 1
        return timm.create_model(self.name, num_classes=5, **self.arguments)


def stirred(model: Any) -> Any:
    """Fresh models often end in zeros; a comparison of zeros proves nothing."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def filled(tensors: dict[str, Any]) -> Any:
    """How these tensors are put into a model."""
    return lambda module, assign: fill(module, tensors, assign=assign)


def check(name: str, arguments: dict[str, Any]) -> int:
    """Compares logits, bit for bit; returns how often the model was made."""
    torch.manual_seed(0)
    plain = stirred(timm.create_model(name, num_classes=5, **arguments))
    tensors = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    make = Maker(name, arguments)
    made = with_weights(make, filled(tensors), constructed(make, "meta")).eval()
    size = arguments.get("img_size") or plain.default_cfg["input_size"][-1]
    batch = torch.randn(2, 3, size, size)
    expected = plain(batch)
    assert expected.std() > 0
    assert torch.equal(made(batch), expected)
    assert not any(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])
    kinds = {key: tensor.dtype for key, tensor in plain.state_dict().items()}
    assert {key: tensor.dtype for key, tensor in made.state_dict().items()} == kinds
    return make.made


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_every_small_architecture_of_timm(name: str) -> None:
    check(name, {})


@pytest.mark.parametrize("name", ODD)
def test_tensors_outside_of_the_state_dict(name: str) -> None:
    assert check(name, ODD[name]) <= 2


@pytest.mark.parametrize("name", ONCE)
def test_most_models_are_made_once(name: str) -> None:
    assert check(name, {}) == 1


class Holder(torch.nn.Module):
    """Keeps tensors where nobody looks: in a closure, in a list, as a view and as a second name of its weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(3, 3))
        torch.nn.init.normal_(self.weight)
        scale = torch.arange(3.0)
        self.extra: Any = {
            "closure": lambda x: x * scale,
            "nested": {"a": [(scale,)]},
            "alias": [self.weight],
            "view": (self.weight.view(9),),
            "none": None,
        }[kind]

    def forward(self, x: Any) -> Any:
        """Uses both."""
        extra = self.extra
        if callable(extra):
            x = extra(x)
        elif isinstance(extra, dict):
            x = x * extra["a"][0][0]
        elif extra is not None:
            x = x * extra[0].reshape(-1)[:3]
        return x @ self.weight


@pytest.mark.parametrize(
    ("kind", "times"), [("none", 1), ("closure", 2), ("nested", 2), ("alias", 3), ("view", 3)]
)
def test_tensors_in_unexpected_places(kind: str, times: int) -> None:
    plain = Holder(kind)
    calls = []

    def make() -> Holder:
        calls.append(1)
        return Holder(kind)

    tensors = {"weight": plain.weight.detach().clone()}
    made = with_weights(make, filled(tensors), constructed(make, "meta"))
    x = torch.randn(2, 3)
    assert torch.equal(made(x), plain(x))
    assert len(calls) == times
    assert (made.weight.data_ptr() == tensors["weight"].data_ptr()) == (times < 3)


def test_types_become_the_models_own() -> None:
    def make() -> Any:
        return torch.nn.BatchNorm1d(4)

    stored = {
        "weight": torch.ones(4, dtype=torch.float16), "bias": torch.ones(4, dtype=torch.float64),
        "running_mean": torch.ones(4, dtype=torch.bfloat16), "running_var": torch.ones(4, dtype=torch.float8_e5m2),
        "num_batches_tracked": torch.tensor(7.0),
    }  # fmt: skip
    found = with_weights(make, filled(stored), constructed(make, "meta")).state_dict()
    assert found.pop("num_batches_tracked").dtype is torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_nothing_is_drawn_and_nothing_is_kept_alive() -> None:
    before = torch.get_rng_state()
    module, construction = constructed(lambda: timm.create_model("test_vit"), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    del module
    assert construction.alive() == []
