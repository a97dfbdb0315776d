"""Weights that are read in parts, from a Hub on loopback: beside what whole files give, and what cannot be read."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config.model import Config
from pipelines.full import run_trees
from pipelines.inspect.verify import verify
from pipelines.job.job import Job
from pipelines.job.progress import Report
from pipelines.trees.exact import ExactLook
from pipelines.trees.remote import RemoteWeights, weights_path
from pipelines.trees.weights import read_weights, weights_key
from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import HubClient, Retry
from probelog.hub.rate_limit import Kind, SlidingWindowLimit
from probelog.storage.ledger import ItemResult
from probelog.storage.parquet_parts import read_part
from probelog.storage.schemas import EDGES, WEIGHTS, CatalogueRow, RepoFile
from probelog.trees.recovery.recover import recover
from probelog.weights.reader import Weights
from tests.support.hub import faults
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.hub.public_hub import HostedFile, HostedRepository, public_hub
from tests.support.worlds import sharded_models as models

HURRIED = Retry(attempts=2, first_wait=0.01, longest_wait=0.01, connect_timeout=2, read_timeout=2)
PARENT = models.language_model(1)
CHILD = models.child(PARENT, 2)


def listed(hub: Path, **tasks: str) -> None:
    rows = [{"id": f"ada/{name}", "pipeline_tag": task} for name, task in tasks.items()]
    (hub / "hub.json").write_text(json.dumps(rows))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, FaultyHub]]:
    root = tmp_path / "hub"
    models.write(root / "ada/base", PARENT, shards=3)
    models.write(root / "ada/child", CHILD, shards=2)
    models.write(root / "ada/stranger", models.language_model(3))
    models.write(root / "ada/drawings/unet", models.language_model(4), 2, "diffusion_pytorch_model")
    for name, file in (("llama-gguf", "llama.Q4_K_M.gguf"), ("old", "pytorch_model.bin")):
        (root / f"ada/{name}").mkdir()
        (root / f"ada/{name}" / file).write_bytes(b"x")
    names = ("base", "child", "stranger", "llama-gguf", "old")
    listed(root, **dict.fromkeys(names, "text-generation"), drawings="text-to-image")
    with faulty(root) as running:
        yield running


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def job(tmp_path: Path, out: io.StringIO) -> Job:
    content = {
        "store": str(tmp_path / "store"),
        "probes": "unused",
        "trees": {"tasks": ["text-generation", "text-to-image"]},
    }
    return Job.of(Config.model_validate(content), Report(out))


def rows(job: Job, receipts: list[Any]) -> pa.Table:
    return pa.concat_tables([read_part(job.store, receipt.weights, WEIGHTS) for receipt in receipts])


def files_asked(running: FaultyHub) -> int:
    return len([request for request in running.requests if "/resolve/" in request.address])


def test_repositories_that_are_no_classifiers_get_edges(
    hub: tuple[str, FaultyHub], job: Job, out: io.StringIO
) -> None:
    endpoint, running = hub
    done = read_weights(job, endpoint, probed=["ada/drawings"])
    assert {row.repo for row in done.rows.values()} == {
        "ada/base", "ada/child", "ada/llama-gguf", "ada/old", "ada/stranger",
    }  # fmt: skip
    assert {failure.repo: failure.reason for failure in done.failures} == {
        "ada/llama-gguf": "unsupported",
        "ada/old": "unsupported",
    }
    assert "parts of those of 3 of 5 repositories read" in out.getvalue()
    assert "2 failed (unsupported 2)" in out.getvalue()
    (edge,) = recover(rows(job, done.receipts), least_probability=0)
    assert {edge.child, edge.parent} == {"ada/base", "ada/child"}
    assert all("range" in request.headers for request in running.requests if "/resolve/" in request.address)
    # Again: nothing is asked. With one more task: only what is new.
    asked = files_asked(running)
    assert read_weights(job, endpoint, probed=["ada/drawings"]).rows == done.rows
    assert files_asked(running) == asked
    more = read_weights(job, endpoint)
    assert {row.repo for row in more.rows.values()} - {row.repo for row in done.rows.values()} == {
        "ada/drawings"
    }
    fresh = [request.address for request in running.requests if "/resolve/" in request.address][asked:]
    assert fresh
    assert all("drawings" in address for address in fresh)


class KilledError(BaseException):
    """As a signal would."""


def test_a_run_that_was_killed_goes_on_where_it_was(
    hub: tuple[str, FaultyHub], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, running = hub
    true = ItemResult.success
    count = itertools.count()

    def killed(*arguments: Any) -> ItemResult:
        if next(count) == 2:
            raise KilledError
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ItemResult, "success", staticmethod(killed))
        with pytest.raises(KilledError):
            read_weights(job, endpoint)
    asked = files_asked(running)
    done = read_weights(job, endpoint)
    assert set(rows(job, done.receipts)["repo"].to_pylist()) == {
        "ada/base", "ada/child", "ada/drawings", "ada/stranger",
    }  # fmt: skip
    fresh = {request.address for request in running.requests[-(files_asked(running) - asked) :]}
    assert len({address.split("/")[2] for address in fresh if "/resolve/" in address}) <= 3


def test_a_run_ends_though_it_waits_for_the_hubs_limit(
    hub: tuple[str, FaultyHub], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that a signal ends while every reader waits, for a window of five minutes."""
    endpoint, running = hub
    limit = SlidingWindowLimit({"file": 6})
    monkeypatch.setattr(SlidingWindowLimit, "for_endpoint", lambda *_, **__: limit)
    acquire, waiting = limit.try_acquire, threading.Event()

    def counted(kind: Kind) -> float:
        seconds = acquire(kind)
        if seconds > 0:
            waiting.set()
        return seconds

    def killed(*_: Any, **__: Any) -> Any:
        assert waiting.wait(60)
        raise KilledError

    monkeypatch.setattr(limit, "try_acquire", counted)
    monkeypatch.setattr("pipelines.trees.weights.wait", killed)
    with pytest.raises(KilledError):
        read_weights(job, endpoint)
    assert 0 < files_asked(running) <= 6  # the last one that may go out may not have gone out yet


def test_a_new_commit_is_read_anew(hub: tuple[str, FaultyHub], job: Job, tmp_path: Path) -> None:
    endpoint, _ = hub
    first = read_weights(job, endpoint)
    models.write(tmp_path / "hub/ada/stranger", models.language_model(9))
    second = read_weights(job, endpoint, refresh=True)
    changed = set(second.rows) - set(first.rows)
    assert {repo for repo, _ in changed} == {"ada/stranger"}
    assert len(second.receipts) == len(first.receipts) + 1


def test_failures_of_the_way_are_tried_again(hub: tuple[str, FaultyHub], job: Job) -> None:
    endpoint, running = hub
    running.spoil("ada/stranger/resolve", faults.answer(404, {"x-error-code": "EntryNotFound"}), times=1)
    running.spoil("ada/base/resolve", faults.answer(200, {"x-repo-commit": "1" * 40}, b"x"), times=1)
    done = read_weights(job, endpoint)
    reasons = {failure.repo: failure.reason for failure in done.failures}
    assert (reasons["ada/stranger"], reasons["ada/base"]) == ("not-found", "wrong-digest")
    reasons = {failure.repo: failure.reason for failure in read_weights(job, endpoint).failures}
    assert "ada/base" not in reasons
    assert "ada/stranger" in reasons
    last = read_weights(job, endpoint, retry_failed=True)
    assert {failure.reason for failure in last.failures} == {"unsupported"}
    counts = sum((receipt.counts for receipt in last.receipts[1:]), last.receipts[0].counts)
    assert counts.failures == {"unsupported": 2}


# One repository


@pytest.fixture
def remote(hub: tuple[str, FaultyHub]) -> Iterator[Callable[..., RemoteWeights]]:
    endpoint, _ = hub
    with HubClient(endpoint, retry=HURRIED) as client:

        def opened(repo: str, most_bytes: int = 10**6, **facts: Any) -> RemoteWeights:
            sha = client.json(f"/api/models/{repo}").value["sha"]
            paths = [item["rfilename"] for item in client.json(f"/api/models/{repo}").value["siblings"]]
            files = [RepoFile(path) for path in paths]
            return RemoteWeights(client, CatalogueRow(repo=repo, sha=sha, files=files, **facts), most_bytes)

        yield opened


def test_shards_and_one_file_give_the_same_facts(
    remote: Callable[..., RemoteWeights], tmp_path: Path
) -> None:
    sharded = remote("ada/base").sample()
    shutil.rmtree(tmp_path / "hub/ada/base")
    models.write(tmp_path / "hub/ada/base", PARENT)
    whole = remote("ada/base").sample()
    assert sharded.digest == whole.digest
    assert [(one, one.sketch.tobytes()) for one in sharded.layers if one.sketch is not None] == [
        (two, two.sketch.tobytes()) for two in whole.layers if two.sketch is not None
    ]
    assert sharded.elements == sum(values.size for values in PARENT.values())
    assert whole.requests < sharded.requests


def test_facts_of_bfloat16_are_those_of_its_numbers(
    remote: Callable[..., RemoteWeights], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    exact = {name: torch.from_numpy(values).bfloat16() for name, values in PARENT.items()}
    save_file(exact, tmp_path / "hub/ada/stranger/model.safetensors")
    models.write(tmp_path / "hub/ada/child", {name: t.float().numpy() for name, t in exact.items()}, 2)
    half, full = remote("ada/stranger").sample(), remote("ada/child").sample()
    assert half.asked < full.asked
    for one, two in zip(half.layers, full.layers, strict=True):
        assert (one.dtype, two.dtype) == ("bfloat16", "float32")
        assert (one.mean, one.sketch is None) == (two.mean, two.sketch is None)
        if one.sketch is not None and two.sketch is not None:
            np.testing.assert_array_equal(one.sketch, two.sketch)


@pytest.mark.parametrize("repo", ["ada/base", "ada/stranger"])
def test_weights_that_are_read_whole_give_what_the_probing_pass_stores(
    repo: str, remote: Callable[..., RemoteWeights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ends of tensors and of what is asked for at once."""
    monkeypatch.setattr("pipelines.trees.remote._AHEAD", 50_000)
    read = remote(repo, 10**7).read_whole()
    _, facts = Weights(tmp_path / "hub" / repo).read()
    assert read.layers == facts.layers
    for one, two in zip(read.layers, facts.layers, strict=True):
        assert (one.sketch is None) == (two.sketch is None)
        np.testing.assert_array_equal(one.sketch, two.sketch)
    assert (read.mean, read.std) == pytest.approx((facts.mean, facts.std), rel=1e-9)
    assert read.asked == pytest.approx(read.size, rel=0.1)
    with pytest.raises(
        ItemFailure, match=r"too-large: .* bytes of weights; trees.bytes_per_model leaves room"
    ):
        remote(repo, 10**6).read_whole()


def test_whole_weights_lie_apart_from_parts(hub: tuple[str, FaultyHub], job: Job, out: io.StringIO) -> None:
    endpoint, _ = hub
    trees = job.config.trees.model_copy(update={"whole": True, "tasks": ["text-to-image"]})
    whole = replace(job, config=job.config.model_copy(update={"trees": trees}))
    done = read_weights(whole, endpoint)
    assert weights_key(whole.config) != weights_key(job.config)
    assert [receipt.counts.indexed for receipt in done.receipts] == [1]
    assert "all of those of 1 of 1 repositories read" in out.getvalue()


def test_tensors_are_read_exactly(remote: Callable[..., RemoteWeights]) -> None:
    weights = remote("ada/base", 200_000)
    names = [
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ]
    assert weights.read_tensors(names) == {name: PARENT[name].tobytes() for name in names}
    with pytest.raises(ItemFailure, match=r"too-large: .* left"):
        weights.read_tensors(["model.embed_tokens.weight"])
    with pytest.raises(ItemFailure, match="not-found: there is no tensor 'x'"):
        weights.read_tensors(["x"])


def test_a_small_budget_reads_fewer_tensors(remote: Callable[..., RemoteWeights]) -> None:
    some = remote("ada/base", 250_000).sample()
    assert some.asked <= 250_000
    sketched = {layer.tensor for layer in some.layers if layer.sketch is not None}
    assert 0 < len(sketched) < 20
    same = {
        layer.tensor for layer in remote("ada/child", 250_000).sample().layers if layer.sketch is not None
    }
    assert same == sketched
    assert len(some.layers) == len(PARENT)
    with pytest.raises(ItemFailure, match=r"too-large: .* are 0 left"):
        remote("ada/base", 20_000)
    with pytest.raises(ItemFailure, match=r"unsupported: .*bytes_per_model is too small"):
        remote("ada/stranger", 40_000).sample()


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def lie(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another header before the same bytes."""
    path = shard(folder)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def grow(header: dict[str, Any]) -> None:
    entry = next(value for value in header.values() if "shape" in value and len(value["shape"]) == 2)
    entry["shape"][0] *= 1000
    entry["data_offsets"][1] += 999 * (entry["data_offsets"][1] - entry["data_offsets"][0])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing-shard": (lambda folder: shard(folder).unlink(), "corrupt-weights: shard .* is missing"),
    "cut-off": (lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-9]), "accounts for"),
    "empty": (lambda folder: shard(folder).write_bytes(b""), "corrupt-weights: .*cut off: 0 bytes"),
    "only-a-length": (lambda folder: shard(folder).write_bytes(b"\xff" * 8), "cut off: 8 bytes cannot hold"),
    "header-of-3-MB": (
        lambda folder: shard(folder).write_bytes((3_000_000).to_bytes(8, "little") + b" " * 3_000_000),
        "a header of 3000000 bytes; 2000000 are accepted",
    ),
    "shapes-grow": (lambda folder: lie(folder, grow), "overlaps another or leaves a gap"),
    "renamed": (
        lambda folder: lie(folder, lambda header: header.update({"x": header.pop(sorted(header)[-1])})),
        "lacks the tensor",
    ),
    "both-have-it": (
        lambda folder: lie(
            folder,
            lambda header: header.update(
                {"lm_head.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
            ),
        ),
        "overlaps another|is in .* too",
    ),
    "index-is-a-list": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "corrupt-weights: .* is no object|corrupt-weights",
    ),
    "index-climbs": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../x/model.safetensors"}}'
        ),
        "unsafe-path",
    ),
    "index-without-end": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(" " * 2_000_001),
        "too-large: .* has 2000001 bytes; 2000000 are read",
    ),
    "index-of-thousands": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(1001)}})
        ),
        "too-large: .* names 1001 shards",
    ),
    "not-finite": (
        lambda folder: models.write(
            folder, PARENT | {"lm_head.weight": PARENT["lm_head.weight"] * np.nan}, 3
        ),
        "non-finite: tensor 'lm_head.weight'",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_what_uploaders_may_have_made(
    attack: str, remote: Callable[..., RemoteWeights], tmp_path: Path
) -> None:
    spoil, message = HOSTILE[attack]
    spoil(tmp_path / "hub/ada/base")
    with pytest.raises(ItemFailure, match=message):
        remote("ada/base", 10**7).sample()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faults.cut(100), "broke off"),
        (faults.answer(200, {}, b"<!doctype html>" * 9000), "announces 135000 bytes; .* are known"),
        (faults.header("content-range", lambda _: "bytes 0-9/10"), "are known|in place of bytes"),
        (faults.header("content-type", lambda _: "text/html"), "web page"),
        (faults.answer(416), "no bytes from"),
        (faults.answer(500), "answered 500"),
    ],
)
def test_what_may_happen_on_the_way(
    fault: faults.Fault, message: str, hub: tuple[str, FaultyHub], remote: Callable[..., RemoteWeights]
) -> None:
    _, running = hub
    running.spoil("-of-00003.safetensors", fault, skip=4)
    with pytest.raises(ItemFailure, match=rf"download-failed: .*({message})"):
        remote("ada/base").sample()


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["unet/diffusion_pytorch_model.safetensors", "sd-v1.safetensors"], "unet/diffusion_pytorch_model.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "vae/x.safetensors"], "unet/diffusion_pytorch_model.fp16.safetensors"),
        (["adapter_model.safetensors", "x.safetensors"], "adapter_model.safetensors"),
        (["anything.safetensors", "x.gguf"], "anything.safetensors"),
        (["a.safetensors", "b.safetensors"], FailureReason.UNSUPPORTED),
        (["model-00001-of-00002.safetensors"], FailureReason.UNSUPPORTED),
        (["llama.gguf", "README.md"], FailureReason.UNSUPPORTED),
        (["README.md"], FailureReason.UNSUPPORTED),
        ([], FailureReason.NOT_FOUND),
    ],
)  # fmt: skip
def test_which_weights_of_a_repository(paths: list[str], expected: str) -> None:
    if isinstance(expected, FailureReason):
        with pytest.raises(ItemFailure, match=expected.value):
            weights_path(paths)
    else:
        assert weights_path(paths) == expected


def test_the_public_hub_is_asked_once_for_each_file(tmp_path: Path) -> None:
    """Its storage is asked for the ranges, without the Hub's token; where an address expired, the Hub signs another."""
    models.write(tmp_path, PARENT, shards=2)
    content = {path.name: HostedFile(path.read_bytes(), "xet") for path in tmp_path.glob("*.safetensors")}
    content["model.safetensors.index.json"] = HostedFile(
        (tmp_path / "model.safetensors.index.json").read_bytes()
    )
    with public_hub() as public:
        hosted = HostedRepository("lab/decoder", content)
        public.repositories.append(hosted)
        public.storage.spoil(
            "", faults.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>"), times=1, skip=5
        )
        row = CatalogueRow(repo="lab/decoder", sha=hosted.sha, files=[RepoFile(path) for path in content])
        with HubClient(public.endpoint, retry=HURRIED) as client:
            sampled = RemoteWeights(client, row, 10**6).sample()
        assert len(public.hub.asked("/lab/decoder/resolve/")) == 4, (
            "the index, two shards, and one of them again"
        )
        assert len(public.storage.requests) == sampled.requests
        assert not any("authorization" in request.headers for request in public.storage.requests)


# The command, and an exact look


def test_the_trees_command_takes_repositories_that_were_never_probed(
    hub: tuple[str, FaultyHub], job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: io.StringIO
) -> None:
    """A second child, halfway to the first, is looked at: which of the two is nearer, sketches leave open."""
    endpoint, running = hub
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    half = {name: (values + CHILD[name]) / 2 for name, values in PARENT.items()}
    models.write(tmp_path / "hub/ada/half", half)
    listed(tmp_path / "hub", **dict.fromkeys(("base", "child", "stranger", "half", "old"), "text-generation"))
    trees = job.config.trees.model_copy(update={"least_probability": 0.0, "exact_bytes": 10**7})
    looking = replace(job, config=job.config.model_copy(update={"trees": trees}))
    record = run_trees(looking)
    edges = read_part(job.store, record.edges, EDGES)
    related = {"ada/base", "ada/child", "ada/half"}
    known = [edge for edge in edges.to_pylist() if not edge["latent"]]
    assert known
    assert {edge[name] for edge in known for name in ("child", "parent")} <= related
    opened = [
        request.address.split("/")[2]
        for request in running.requests
        if request.headers.get("range") == "bytes=0-32767"
    ]
    assert (opened.count("half"), opened.count("stranger")) == (2, 1)
    assert "weights: parts of those of 4 of 5 repositories read" in out.getvalue()
    before = len(running.requests)
    assert run_trees(looking).edges == record.edges
    assert len(running.requests) == before
    assert verify(str(tmp_path / "store"), Report(io.StringIO())).clean


def test_an_exact_look_gives_the_distances_of_whole_layers(
    hub: tuple[str, FaultyHub], remote: Callable[..., RemoteWeights]
) -> None:
    """Of what can be read; each model is read once."""
    endpoint, running = hub
    rows = {f"ada/{name}": remote(f"ada/{name}").row for name in ("base", "child", "stranger")}
    rows["ada/old"] = replace(rows["ada/base"], repo="ada/old", files=[RepoFile("pytorch_model.bin")])
    before = len(running.requests)
    with HubClient(endpoint, retry=HURRIED) as client:
        look = ExactLook(client, rows, 10**7)
        pairs = [
            ("ada/base", "ada/child"),
            ("ada/base", "ada/stranger"),
            ("ada/base", "ada/old"),
            ("ada/child", "ada/gone"),
        ]
        found = look(pairs)
        asked = len(running.requests)
        assert look(pairs) == found
    assert len(running.requests) == asked > before
    matrices = [name for name, values in PARENT.items() if values.ndim > 1]
    ratios = [
        ((PARENT[name] - CHILD[name]) ** 2).sum() / ((PARENT[name] ** 2).sum() + (CHILD[name] ** 2).sum())
        for name in matrices
    ]
    assert found == {
        pairs[0]: pytest.approx(np.mean(ratios), rel=1e-4),
        pairs[1]: pytest.approx(1, abs=0.05),
    }


def test_an_exact_look_keeps_to_its_bytes(
    hub: tuple[str, FaultyHub], remote: Callable[..., RemoteWeights]
) -> None:
    endpoint, _ = hub
    rows = {f"ada/{name}": remote(f"ada/{name}").row for name in ("base", "child")}
    with HubClient(endpoint, retry=HURRIED) as client:
        found = ExactLook(client, rows, 400_000)([("ada/base", "ada/child")])
        assert found[("ada/base", "ada/child")] == pytest.approx(0.0025 / 2.0025, rel=0.05)
        assert ExactLook(client, rows, 1000)([("ada/base", "ada/child")]) == {}
