"""The order of work, and batches that do not move."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa

from pipelines.probe.plan import ProbingPlan, first_keys, make_plan, weight_bytes, work_order
from probelog.errors import FailureReason
from probelog.storage.ledger import item_key, key_numbers, open_failures
from probelog.storage.schemas import CATALOGUE, FAILURES, CatalogueRow, Failure, RepoFile, to_table

SHA = "a" * 40
MB = 1 << 20


def row(name: str, size: int | None, architecture: str | None = "resnet", **facts) -> CatalogueRow:
    files = [] if size is None else [RepoFile("config.json", 900), RepoFile("model.safetensors", size)]
    return CatalogueRow(f"o/{name}", SHA, "timm", architecture=architecture, files=files, **facts)


def plan(rows, sealed=(), failures=(), batch=3, retry_failed=False) -> ProbingPlan:
    table = to_table(rows, CATALOGUE)
    keys = key_numbers(sealed)
    failed = open_failures(to_table(failures, FAILURES), keys)
    return make_plan(table, first_keys(table), keys, failed, batch, retry_failed)


def names(found: ProbingPlan) -> list[str]:
    return [item.row.repo.removeprefix("o/") for item in found.items(np.arange(len(found)))]


def failure(name: str, reason: FailureReason, attempt: int = 1) -> Failure:
    return Failure.of(f"o/{name}", SHA, "probe", reason, "", attempt)


def test_large_ones_first_then_by_architecture() -> None:
    rows = [
        row("small-vit", 3 * MB, "vit"),
        row("large-vit", 1000 * MB, "vit"),
        row("large-resnet", 700 * MB),
        row("small-resnet", 2 * MB),
        row("unknown", None),
        row("large-vit-again", 1020 * MB, "vit"),
        row("parameters-only", None, parameters=200 * MB),
        row("no-architecture", 2 * MB, None),
    ]
    expected = [
        "unknown", "large-resnet", "parameters-only", "large-vit", "large-vit-again", "small-resnet", "small-vit",
        "no-architecture",
    ]  # fmt: skip
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert names(plan(rows)) == expected


def test_models_of_one_base_follow_each_other() -> None:
    rows = [
        row("small", 2 * MB),
        row("of-b", 900 * MB, base_model="b"),
        row("of-a", 3 * MB, base_model="a"),
        row("large", 500 * MB),
        row("of-b-again", 1 * MB, base_model="b"),
        row("of-a-again", 700 * MB, base_model="a"),
    ]
    expected = ["large", "small", "of-a-again", "of-a", "of-b", "of-b-again"]
    table = to_table(rows, CATALOGUE)
    order = work_order(table, weight_bytes(table), ["base_model"])
    assert [rows[i].repo.removeprefix("o/") for i in order] == expected


def test_weights_are_what_would_be_downloaded() -> None:
    def size(*files: RepoFile, **facts: int) -> float:
        table = to_table([CatalogueRow("o/m", SHA, files=list(files), **facts)], CATALOGUE)
        return float(weight_bytes(table)[0])

    safe = RepoFile("model-00001-of-00002.safetensors", 5), RepoFile("model-00002-of-00002.safetensors", 6)
    assert size(*safe, RepoFile("pytorch_model.bin", 99), RepoFile("onnx/model.safetensors", 50)) == 11
    assert size(RepoFile("pytorch_model.bin", 99), RepoFile("config.json", 1)) == 99
    assert size(RepoFile("config.json", 1)) == 0
    unet, half = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
    parts = RepoFile(unet, 7), RepoFile("text_encoder/model.safetensors", 2), RepoFile(half, 3)
    assert (
        size(*parts, RepoFile("v1-5-pruned.safetensors", 50), RepoFile("safety_checker/model.safetensors", 9))
        == 9
    )
    assert size(parts[2], RepoFile("v1-5-pruned.safetensors", 50)) == 3
    unsized = RepoFile("config.json"), RepoFile("model.safetensors")
    assert np.isnan(size(*unsized))
    assert size(*unsized, parameters=10) == 40
    assert size(*unsized, parameters=10, weight_bytes=20) == 20
    assert size(parameters=10) == 40
    assert np.isnan(size())


def test_batches_do_not_move_when_a_run_is_resumed() -> None:
    rows = [row(f"m{i:02}", (1 + i % 7) * MB) for i in range(20)]
    whole = plan(rows)
    batches = [whole.batch(number) for number in range(len(whole.starts) - 1)]
    assert [len(batch) for batch in batches] == [3] * 6 + [2]
    sealed = [key for number in (0, 3, 4) for key in batches[number]]
    rest = plan(rows, sealed=sealed)
    assert [rest.batch(number) for number in range(4)] == [batches[number] for number in (1, 2, 5, 6)]
    assert not len(plan(rows, sealed=[key for batch in batches for key in batch]))


def test_retries_come_after_and_know_what_they_replace() -> None:
    rows = [row(f"m{i}", (9 - i) * MB) for i in range(8)]
    failed = [
        failure("m1", FailureReason.TIMEOUT),
        failure("m2", FailureReason.TOO_LARGE),
        failure("m3", FailureReason.TIMEOUT),
        failure("m3", FailureReason.DOWNLOAD_FAILED, 2),
        failure("m4", FailureReason.TIMEOUT),
        failure("gone", FailureReason.TIMEOUT),
    ]
    done = [item_key(f"o/m{i}", SHA) for i in range(5)]
    done += [item_key("o/m3", SHA, 2), item_key("o/m4", SHA, 2), item_key("o/gone", SHA)]
    found = plan(rows, done, failed)
    assert names(found) == ["m5", "m6", "m7", "m1", "m3"]
    assert found.attempts.tolist() == [1, 1, 1, 2, 3]
    assert found.batch(1) == [item_key("o/m1", SHA, 2), item_key("o/m3", SHA, 3)]
    assert [found.replaced(number) for number in (0, 1)] == [{}, {"download-failed": 1, "timeout": 1}]
    assert names(plan(rows, done, failed, retry_failed=True)) == ["m5", "m6", "m7", "m1", "m2", "m3"]


def test_items_of_a_table_in_many_pieces() -> None:
    rows = [
        row(f"m{i:04}", int(size)) for i, size in enumerate(np.random.default_rng(0).integers(1, 10**9, 700))
    ]
    whole = to_table(rows, CATALOGUE)
    pieces = pa.concat_tables([whole.slice(start, 33) for start in range(0, 700, 33)])
    none = np.zeros(0, np.uint64)
    found = make_plan(pieces, first_keys(pieces), none, FAILURES.empty_table(), 32, False)
    items = list(found.items(np.arange(700)))
    assert [item.row for item in items] == [rows[i] for i in work_order(whole, weight_bytes(whole))]
    assert [item.key for item in items] == [item_key(item.row.repo, SHA) for item in items]


def test_nothing_to_do() -> None:
    assert not len(plan([]))
