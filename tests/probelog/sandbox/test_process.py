"""Processes of models on real models: what they tell each other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import ItemFailure
from probelog.probes.probe_set import make_probe_set
from probelog.sandbox.process import ModelProcess, PlanCache, fork_server
from probelog.sandbox.spec import ProcessSpec, downloads_folder
from probelog.storage.store import Store
from tests.support.worlds.tiny_world import TinyWorld

pytestmark = pytest.mark.xdist_group("processes")  # they share a server


@pytest.fixture(scope="module")
def spec(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> ProcessSpec:
    """Of one folder for all tests, which then share its server of processes: that takes seconds to import libraries."""
    folder = tmp_path_factory.mktemp("processes")
    store = Store(folder / "store")
    probes = make_probe_set(str(tiny_world.probes), None, 0, store, load_encoder(str(tiny_world.encoder)))
    return ProcessSpec(
        probes=store.uri, probe_set=probes.hash, scratch=str(folder / "scratch"), cache_bytes=10**8,
        batch_size=64, precision="float32", max_params=10**9, allow_pickle=False, memory_bytes=2 * 10**9,
    )  # fmt: skip


@pytest.fixture
def model(tiny_world: TinyWorld, spec: ProcessSpec) -> Iterator[Path]:
    """The downloaded folder of a model."""
    folder = downloads_folder(Path(spec.scratch)) / "model"
    shutil.copytree(tiny_world.hub / "ada" / "resnet", folder)
    yield folder
    shutil.rmtree(folder)


def test_what_one_process_learnt_the_other_knows(spec: ProcessSpec, model: Path) -> None:
    server, learnt, indices = fork_server(Path(spec.scratch), ()), PlanCache(), range(12)

    def run(process: ModelProcess) -> tuple[np.ndarray, int]:
        loaded = process.load(model, "ada/resnet", "0" * 40, 60)
        seen = process.observe(indices, int(loaded.facts["logits"]), 60)
        process.release()
        return seen.values, seen.batch_size

    first, second = (ModelProcess(server, spec, learnt=learnt) for _ in range(2))
    try:
        values, batch = run(first)
        assert batch > 4, "after four images the need of memory is known"
        (kind,) = learnt._plans
        plan = learnt.get(kind)
        assert plan["measured"]
        learnt.put(kind, {**plan, "batch_size": 3})
        again, batch = run(second)
        assert batch == 3, "it was told"
        assert run(first)[1] == 3, "so was every later process"
        np.testing.assert_allclose(again, values, rtol=1e-4, atol=1e-4)
    finally:
        first.close()
        second.close()


@pytest.fixture
def process(spec: ProcessSpec) -> Iterator[ModelProcess]:
    made = ModelProcess(fork_server(Path(spec.scratch), ()), spec)
    yield made
    made.close()


def test_an_internal_error_leaves_its_traceback_in_the_log(
    process: ModelProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and the failure keeps its short reason."""
    process._model.start([], None)
    process._name = f"ada/resnet@{'0' * 40}"
    with pytest.raises(ItemFailure, match=r"^internal: AssertionError: $"):
        process.observe([0], 1, 60)  # no model is loaded
    (record,) = caplog.records
    first, *trace = record.getMessage().splitlines()
    assert first == f"ada/resnet@{'0' * 40}: internal error in its process"
    assert trace[0] == "Traceback (most recent call last):"
    assert "in _observe" in record.getMessage()
    assert trace[-1] == "AssertionError"


def test_a_failure_of_the_model_leaves_none(
    process: ModelProcess, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ItemFailure, match=r"^corrupt-weights: "):
        process.load(model, "ada/resnet", "0" * 40, 60)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["kind", "k" * 3000])
def test_no_end_of_learning(kind: str) -> None:
    learnt = PlanCache()
    learnt.put(kind, {"plan": "p" * 3000})
    assert learnt.get(kind) is None


def test_what_was_learnt_is_found_out_again() -> None:
    """One model that pretends that another batch is better slows a bounded number of others."""
    learnt = PlanCache()
    learnt.put("kind", {"batch_size": 1})
    given = [learnt.get("kind") for _ in range(2 * PlanCache._USES)]
    assert 0 < sum(plan is not None for plan in given) <= PlanCache._USES + 1
    learnt.put("kind", {"batch_size": 8})
    assert learnt.get("kind") == {"batch_size": 8}


def test_pixels_are_prepared_by_another_process_where_the_first_has_ended(
    process: ModelProcess, model: Path
) -> None:
    """With its server, say: no model is blamed for it."""
    for _ in range(2):
        process.load(model, "ada/resnet", "0" * 40, 60)
        process.prepare(range(4), 60)
        assert process._digests is not None
        child = process._pixels._child
        assert child is not None
        child.kill()
    process.release()
