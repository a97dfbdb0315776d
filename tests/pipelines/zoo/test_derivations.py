"""What is made of a network without training does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.zoo import derivations, networks


def _network(architecture: str) -> torch.nn.Module:
    torch.manual_seed(1)
    model = networks.build(networks.ARCHITECTURES[architecture], ["a", "b", "c"])
    with torch.no_grad():
        for values in model.state_dict().values():
            if values.is_floating_point():  # statistics and scales that are all 1 would hide a wrong order
                values.add_(0.1 * torch.rand_like(values))
    return model.eval()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        return networks.logits(model, torch.randn(3, 3, 32, 32, generator=generator))


@pytest.mark.parametrize("architecture", derivations.PERMUTABLE)
def test_another_order_of_hidden_units_computes_the_same(architecture: str) -> None:
    model = _network(architecture)
    before, state = _logits(model), model.state_dict()
    reordered = derivations.permuted(state, architecture, np.random.default_rng(3))
    moved = [name for name in state if not torch.equal(state[name], reordered[name])]
    assert len(moved) >= 6
    for name in moved:
        assert torch.equal(state[name].flatten().sort().values, reordered[name].flatten().sort().values)
    model.load_state_dict(reordered)
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_row", [True, False])
def test_8_bits_leave_255_numbers(per_row: bool) -> None:
    state = {"m": torch.randn(6, 400), "v": torch.randn(400)}
    rounded = derivations.quantised(state, per_row=per_row)
    assert torch.equal(rounded["v"], state["v"])
    rows = rounded["m"] if per_row else rounded["m"].reshape(1, -1)
    assert all(len(row.unique()) <= 255 for row in rows)
    assert 0 < (rounded["m"] - state["m"]).abs().max() < state["m"].abs().max() / 250


def test_merges() -> None:
    a, b = (
        {"w": torch.randn(4, 4), "head": torch.randn(2 + i, 4), "count": torch.tensor(i)} for i in range(2)
    )
    linear = derivations.merged([a, b], [0.7, 0.3], slerp=False)
    torch.testing.assert_close(linear["w"], 0.7 * a["w"] + 0.3 * b["w"])
    assert torch.equal(linear["head"], a["head"])
    assert linear["count"] == 0
    arc = derivations.merged([{"w": torch.eye(2)[0]}, {"w": torch.eye(2)[1]}], [0.5, 0.5], slerp=True)
    torch.testing.assert_close(arc["w"], torch.full((2,), 0.5**0.5))


def test_pruning_leaves_zeros_and_the_head() -> None:
    model = _network("vit")
    before = {name: values.clone() for name, values in model.state_dict().items()}
    head = networks.head(model)
    derivations.prune(model, head, 0.6)
    derivations.unmask(model, head)
    after = model.state_dict()
    assert after.keys() == before.keys()
    zeros = {name: float((values == 0).float().mean()) for name, values in after.items()}
    assert zeros["blocks.0.mlp.fc1.weight"] == pytest.approx(0.6, abs=0.01)
    assert zeros["head.weight"] == 0
    kept = after["blocks.0.mlp.fc1.weight"] != 0
    assert torch.equal(after["blocks.0.mlp.fc1.weight"][kept], before["blocks.0.mlp.fc1.weight"][kept])


def test_adapters_add_their_rank_and_touch_nothing_else() -> None:
    model = _network("resnet")
    before = {name: values.clone() for name, values in model.state_dict().items()}
    head = networks.head(model)
    derivations.adapt(model, head, 3)
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in free:
            parameter.add_(torch.randn_like(parameter))
    derivations.merge_adapters(model, head)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, values in after.items():
        if values.dim() > 1 and not name.startswith("classifier"):
            difference = (values - before[name]).reshape(len(values), -1)
            assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 3, name
        elif not name.startswith("classifier"):
            assert torch.equal(values, before[name]), name
