"""A tiny forest: its weights are what its truth says, and the same call goes on where it was left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.hubserver.folder import HubFolder
from pipelines.zoo import networks
from pipelines.zoo.forest import ForestRequest, build_forest
from probelog.errors import UsageError
from probelog.models.loading import load_classifier
from tests.support.processes.operator_command import operator

pytestmark = pytest.mark.acceptance  # it trains a forest


@pytest.fixture(scope="module")
def request_of_forest(tmp_path_factory: pytest.TempPathFactory) -> ForestRequest:
    request = ForestRequest(
        tmp_path_factory.mktemp("forest") / "out",
        networks=44,
        seed=4,
        architectures=("convnext",),
        effort=0.03,
    )
    build_forest(request)
    return request


def _truth(out: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, dict[str, Any]]] = json.loads((out / "truth.json").read_text())
    return {**content["withheld"], **content["models"]}


def _state(out: Path, name: str) -> dict[str, torch.Tensor]:
    state = networks.state(out / ("hub" if "/" in name else "withheld") / name)
    return {key: values for key, values in state.items() if values.is_floating_point()}


def _backbone(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [values.flatten() for name, values in sorted(state.items()) if not name.startswith("classifier")]
    )


def test_weights_are_what_the_truth_says(request_of_forest: ForestRequest) -> None:
    out = request_of_forest.out
    truth = _truth(out)
    seen = set()
    for name, facts in truth.items():
        if not facts["parents"]:
            continue
        seen.add(facts["relation"])
        state = _state(out, name)
        weights = [parent["weight"] for parent in facts["parents"]]
        states = [_state(out, parent["repo"] or parent["withheld"]) for parent in facts["parents"]]
        child, parent = _backbone(state), _backbone(states[0])
        moved = float((child - parent).norm() / parent.norm())
        match facts["relation"]:
            case "copy":
                assert all(torch.equal(state[key], states[0][key]) for key in state)
            case "head-only":
                assert moved < 1e-3
                assert state["classifier.weight"].shape[0] == len(facts["classes"])
            case "merge" if facts["detail"]["form"] == "linear":
                mean = sum(
                    (w * _backbone(s) for w, s in zip(weights, states, strict=True)), torch.zeros(len(child))
                )
                torch.testing.assert_close(child, mean, rtol=2e-3, atol=1e-4)
            case "pruned":
                tensor = "convnext.encoder.stages.3.layers.0.pwconv1.weight"
                share = float((state[tensor] == 0).float().mean())
                assert share == pytest.approx(facts["detail"]["share"], abs=0.01)
            case "recast":
                assert moved < 0.01
            case "quantised":
                assert 0 < moved < 0.02
            case "permuted":
                assert torch.allclose(child.sort().values, parent.sort().values)
            case "fine-tune" | "low-rank":
                assert 1e-4 < moved < 1
    assert seen == {
        "fine-tune", "head-only", "low-rank", "pruned", "recast", "quantised", "merge", "copy", "permuted",
    }  # fmt: skip


def test_it_is_a_hub_and_the_listings_hold_the_truths_times(request_of_forest: ForestRequest) -> None:
    out = request_of_forest.out
    uploaded = json.loads((out / "truth.json").read_text())["models"]
    for file, key in (
        ("hub/hub.json", "time"), ("hub_5pct_wrong.json", "time_5pct_wrong"), ("hub_shuffled.json", "time_shuffled"),
    ):  # fmt: skip
        times = {row["id"]: row["createdAt"] for row in json.loads((out / file).read_text())}
        assert times == {name: facts[key] for name, facts in uploaded.items()}
    hub = HubFolder(out / "hub")
    assert set(hub.repositories()) == set(uploaded)
    name, facts = next(iter(uploaded.items()))
    assert load_classifier(out / "hub" / name).logits == len(facts["classes"])


def test_parents_that_are_not_uploaded_are_named(request_of_forest: ForestRequest) -> None:
    truth = _truth(request_of_forest.out)
    orphans = {
        name: facts
        for name, facts in truth.items()
        if facts["parents"] and facts["parents"][0]["repo"] is None
    }
    assert orphans
    for facts in orphans.values():
        parent = facts["parents"][0]["withheld"]
        assert facts["withheld_ancestor"]["withheld_parent"] == parent
        nearest = facts["withheld_ancestor"]["nearest_uploaded"]
        assert nearest is None or "/" in nearest
        assert not (request_of_forest.out / "hub" / parent).exists()


def test_the_same_call_makes_what_is_missing_and_nothing_else(request_of_forest: ForestRequest) -> None:
    out = request_of_forest.out
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    facts = json.loads((out / "truth.json").read_text())["models"]
    lost = next(out / "hub" / name for name, fact in facts.items() if fact["relation"] == "fine-tune")
    before = (lost / "model.safetensors").read_bytes()
    truth = (out / "truth.json").read_bytes()
    shutil.rmtree(lost)
    build_forest(request_of_forest)
    assert (lost / "model.safetensors").read_bytes() == before
    assert (out / "truth.json").read_bytes() == truth
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert {path for path in files if files[path] != after[path]} == {lost / "model.safetensors"}


def test_what_cannot_be_made_is_refused(request_of_forest: ForestRequest, tmp_path: Path) -> None:
    other = ForestRequest(request_of_forest.out, networks=20, seed=5, architectures=("convnext",))
    with pytest.raises(UsageError, match="holds a forest of other settings"):
        build_forest(other)
    with pytest.raises(UsageError, match="needs 8 at the least"):
        build_forest(ForestRequest(tmp_path / "few", networks=7))
    with pytest.raises(UsageError, match="'vit' does not take images of 36 pixels"):
        build_forest(ForestRequest(tmp_path / "size", networks=8, size=36, architectures=("vit",)))
    ended = operator("zoo", "--out", tmp_path / "zoo")
    assert ended.status == 2
    assert "draw their own" in ended.err
