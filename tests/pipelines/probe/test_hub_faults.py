"""A Hub that is ill: what passes is waited out within a run, what stays is a row that a rerun cures."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from pipelines.full import run_crawl, run_probe
from pipelines.job.job import Job
from pipelines.job.progress import Report
from tests.support.hub import faults
from tests.support.hub.faults import Fault, faulty
from tests.support.hub.hostile import write_json
from tests.support.hub.rogue_models import write_rogue
from tests.support.worlds.tiny_world import TinyWorld

FOR_EVER = 10**9
# Of a model: six tries with waits that double take more than half a minute.
SECONDS = 50.0
# The fault, where, how often; then the reason of the row and words of its detail, where there is one.
FAULTS: dict[str, tuple[Fault, str, int, str | None, str]] = {
    "throttled": (faults.answer(429, {"ratelimit": '"resolvers";r=0;t=1'}), "", 3, None, ""),
    "answers-500": (faults.answer(500), "", 2, None, ""),
    "answers-503": (faults.answer(503, {"retry-after": "1"}), "", 2, None, ""),
    "breaks-off": (faults.cut(50), "model.safetensors", 1, None, ""),
    "wrong-once": (faults.flipped, "model.safetensors", 1, None, ""),
    "fine": (faults.answer(500), "", 0, None, ""),
    "always-500": (faults.answer(500), "", FOR_EVER, "download-failed", "answered 500"),
    "always-breaks-off": (
        faults.cut(50), "model.safetensors", FOR_EVER, "download-failed", "broke off",
    ),
    "always-wrong": (faults.flipped, "model.safetensors", FOR_EVER, "wrong-digest", "has the SHA-256"),
    "always-slow": (
        faults.slow(0.5, 16), "model.safetensors", FOR_EVER, "download-failed", "download timed out after 50 s",
    ),
}  # fmt: skip


@pytest.mark.acceptance
def test_faults_that_pass_and_faults_that_stay(
    tiny_world: TinyWorld, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    for seed, name in enumerate(FAULTS):
        write_rogue(root / "ill" / name, "sleep", seed=seed)
    write_json(root, "hub.json", [{"id": f"ill/{name}", "library": "timm"} for name in FAULTS])
    settings = {
        "preload": ["tests.support.hub.rogue_models"], "probe_count": 20, "scratch": str(tmp_path / "scratch"),
        "in_flight": len(FAULTS) // 2, "item_seconds": SECONDS,
    }  # fmt: skip
    staying = {name: reason for name, (_, _, _, reason, _) in FAULTS.items() if reason is not None}
    with faulty(root) as (endpoint, hub):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        job = Job.of(tiny_world.config(tmp_path / "store", **settings), Report(io.StringIO()))
        shas = {row.repo.split("/")[1]: row.sha for row in run_crawl(job).rows()}
        for name, (fault, file, times, _, _) in FAULTS.items():
            hub.spoil(f"/ill/{name}/resolve/{shas[name]}/{file}", fault, times)
        first = run_probe(job)
        hub.rules.clear()
        asked = len(hub.requests)
        second = run_probe(job)
        fetched = {request.address.split("/")[2] for request in hub.requests[asked:]}
    rows = {failure.repo.split("/")[1]: failure for failure in first.failures}
    assert {name: row.reason for name, row in rows.items()} == staying
    for name, row in rows.items():
        assert FAULTS[name][4] in row.detail
        assert row.retryable
        assert row.attempts == 1
    assert first.models == len(FAULTS) - len(staying)
    assert fetched == set(staying), "what is indexed is left alone"
    assert (second.models, second.failures) == (len(FAULTS), [])
    assert not [path for path in tmp_path.glob("scratch/**/downloads/**/*") if path.is_file()]
