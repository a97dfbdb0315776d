"""``probelog-index verify``: every damaged byte of a store is found, and named."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.inspect import verify as verify_module
from pipelines.inspect.verify import Verified, verify
from pipelines.job.progress import Report
from probelog.errors import StoreError, UsageError
from probelog.publication.lifecycle import roll_back
from probelog.storage.checksummed_json import sealed_json
from probelog.storage.encoding import sealed_tables
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.store import Store
from tests.pipelines.test_resume import gcs_address
from tests.support.processes.operator_command import operator
from tests.support.processes.s3 import s3_server
from tests.support.worlds.tiny_world import Indexed


def checked(store: Path | str) -> Verified:
    return verify(str(store), Report(io.StringIO()))


def named(found: list[dict[str, str]]) -> set[str]:
    return {item["path"] for item in found}


def files(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())


@pytest.fixture
def store(indexed: Indexed, tmp_path: Path) -> Path:
    return indexed.copy_store(tmp_path / "store")


def test_a_sound_store(store: Path) -> None:
    found = checked(store)
    assert found.clean
    assert found.unexpected == []
    there = [name for name in files(store) if "/.tmp-" not in name]
    assert found.files == len(there)
    assert found.bytes == sum((store / name).stat().st_size for name in there)
    ended = operator("verify", "--store", store)
    assert ended.status == 0
    assert ended.out.endswith("no damage found\n")


def test_any_byte(store: Path) -> None:
    """One byte of each file, at a place that a seed chooses, and the first and the last one."""
    generator = random.Random(5)
    missed = []
    for name in files(store):
        if "/.tmp-" in name:
            continue
        file = store / name
        data = file.read_bytes()
        for place in {0, generator.randrange(len(data)), len(data) - 1}:
            broken = bytearray(data)
            broken[place] ^= 1 << generator.randrange(8)
            file.write_bytes(broken)
            found = checked(store)
            if found.clean or name not in named(found.damaged):
                missed.append((name, place, found.damaged, found.missing))
        file.write_bytes(data)
    assert not missed
    assert checked(store).clean


def test_every_byte_of_what_names_others(store: Path) -> None:
    """In JSON some bytes are blanks, and some are a seal's."""
    only = store / "only"
    pointer = only / "index/current.json"
    pointer.parent.mkdir(parents=True)
    data = (store / "index/current.json").read_bytes()
    for place in range(len(data)):
        for bit in (1, 4, 32):
            broken = bytearray(data)
            broken[place] ^= bit
            pointer.write_bytes(broken)
            found = checked(only)
            assert named(found.damaged) == {"index/current.json"}, (place, bit)


def test_any_missing_file(store: Path, tmp_path: Path) -> None:
    """It is missing where something names it; what it named itself is no longer accounted for."""
    for name in files(store):
        # Nothing names these: without one there is no such run, crawl, probe set, ledger, completion, index or verdict.
        roots = ("runs/", "/made/", "manifest.json", "summary.json", "receipt.json", "current.json", ".tmp-")
        verdict = name.startswith("quality/") and name.endswith(".json")
        if any(part in name for part in roots) or "/embeddings-" in name or verdict:
            continue
        (store / name).rename(tmp_path / "away")
        found = checked(store)
        assert named(found.missing) == {name}, name
        assert not found.damaged
        (tmp_path / "away").rename(store / name)


def test_what_nothing_names(store: Path) -> None:
    strays = {
        "observations/0123456789abcdef/observations/x.parquet",
        "index/generations/dead/models.lance/data/x",
        "catalogue/0123456789abcdef/first/rows-00000.parquet",
        "completion/0123456789abcdef/descriptors/x.parquet",
    }
    for name in strays:
        (store / name).parent.mkdir(parents=True)
        (store / name).write_bytes(b"x")
    found = checked(store)
    assert found.clean
    assert named(found.unexpected) == strays
    assert operator("verify", "--store", store).status == 0


def test_damage_is_reported_to_people_and_programs(store: Path) -> None:
    part = next(store.glob("observations/*/observations/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    name = part.relative_to(store).as_posix()
    gone = next(store.glob("observations/*/weights/*.parquet"))
    gone.unlink()
    ended = operator("verify", "--store", store)
    assert ended.status == 1
    assert f"damaged      {name}: its size is not the one in observations/" in ended.out
    assert "1 damaged, 1 missing" in ended.out
    ended = operator("verify", "--store", store, "--json")
    assert ended.status == 1
    found = json.loads(ended.out)
    assert [item["path"] for item in found["damaged"]] == [name]
    assert [item["path"] for item in found["missing"]] == [gone.relative_to(store).as_posix()]
    assert not found["clean"]


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a ProbeLog store"):
        checked(tmp_path)
    assert operator("verify", "--store", tmp_path / "none").status == 2


def test_a_newer_store(store: Path) -> None:
    for name in (
        next(store.glob("observations/*/receipts/*.json")),
        next(store.glob("completion/*/receipt.json")),
        next(store.glob("catalogue/*/receipt.json")),
        next(store.glob("probes/*/manifest.json")),
        next(store.glob("observations/*/manifest.json")),
        next(store.glob("index/generations/*/files.json")),
        store / "index/current.json",
    ):
        data = name.read_bytes()
        content = json.loads(data)
        del content["seal"]
        name.write_bytes(sealed_json(content | {"version": 99}))
        found = checked(store)
        problems = {item["path"]: item["problem"] for item in found.damaged}
        path = name.relative_to(store).as_posix()
        if name.name == "files.json":  # the pointer knows another digest
            assert path in problems
        else:
            assert "version 99 is newer than this ProbeLog knows" in problems[path]
        name.write_bytes(data)


def test_json_without_its_seal_is_damaged(store: Path) -> None:
    for name in ("observations/*/receipts/*.json", "quality/*.json", "index/current.json"):
        file = next(store.glob(name))
        data = file.read_bytes()
        content = json.loads(data)
        del content["seal"]
        file.write_text(json.dumps(content))
        assert file.relative_to(store).as_posix() in named(checked(store).damaged)
        file.write_bytes(data)


def test_workers_find_what_one_process_finds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cluster helps: nothing in a sound store, and the same files and problems in a damaged one."""
    monkeypatch.setattr(verify_module, "_SPREAD_BYTES", 1)
    monkeypatch.setattr(verify_module, "_CHECKS_AT_ONCE", 20)

    def by_workers() -> Verified:
        return verify(str(store), Report(io.StringIO()), gcs_address())

    sound = by_workers()
    assert sound == checked(store)
    assert sound.clean
    part = next(store.glob("observations/*/observations/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    receipt, *_ = store.glob("observations/*/receipts/*.json")
    receipt.write_bytes(receipt.read_bytes()[1:])
    next(store.glob("index/generations/*/logits.lance/data/*")).unlink()
    (store / "runs/unknown").write_text("x")
    found = by_workers()
    assert found == checked(store)
    assert all(getattr(found, kind) for kind in ("damaged", "missing", "unexpected"))


def test_a_piece_of_an_index_waits(store: Path) -> None:
    file = store / "publish/key/piece.arrow"
    file.parent.mkdir(parents=True)
    file.write_bytes(sealed_tables([pa.table({"a": [1]})] * 3))
    assert checked(store).clean
    file.write_bytes(file.read_bytes()[:-1])
    assert named(checked(store).damaged) == {"publish/key/piece.arrow"}


def test_a_spooled_result_waits(store: Path) -> None:
    from probelog.errors import FailureReason
    from probelog.storage.schemas import Failure

    folder = next(store.glob("observations/*")).relative_to(store).as_posix()
    failure = Failure.of("a/b", "1", "probe", FailureReason.TIMEOUT, "")
    Ledger(Store(store), folder).spool("0123456789abcdef", ItemResult.failure(failure))
    found = checked(store)
    assert found.clean
    assert not found.unexpected
    file = store / folder / "spool/0123456789abcdef.arrow"
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 8
        with pytest.raises(StoreError, match="a spooled result is damaged"):
            ItemResult.from_bytes(bytes(broken))
    file.write_bytes(broken)
    assert named(checked(store).damaged) == {file.relative_to(store).as_posix()}


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


def test_a_store_on_s3(store: Path, bucket: str) -> None:
    remote = Store(f"{bucket}/store")
    names = [name for name in files(store) if "/.tmp-" not in name]
    for name in names:
        remote.write(name, (store / name).read_bytes())
    found = checked(remote.uri)
    assert found.clean
    assert found.files == len(names)
    broken = next(name for name in names if name.endswith(".lance"))
    remote.write(broken, remote.read(broken)[:-1] + b"?")
    gone = next(name for name in names if "/failures/" in name)
    remote.delete(gone)
    found = checked(remote.uri)
    assert (named(found.damaged), named(found.missing)) == ({broken}, {gone})


def test_generations_that_are_kept_are_checked_too(
    indexed: Indexed, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.full import run_full

    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    run_full(indexed.job(store, prompt="{}"))
    assert checked(store).clean
    first = indexed.run.published.pointer.generation
    file = next(store.glob(f"index/generations/{first}/meta.lance/data/*"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert named(checked(store).damaged) == {file.relative_to(store).as_posix()}
    roll_back(Store(store).child("index"))
    assert named(checked(store).damaged) == {file.relative_to(store).as_posix()}


def test_the_benchmark_of_storage_accounts_for_every_byte(store: Path) -> None:
    from tests.benchmarks.storage import measured

    found = {held.stage: held for held in measured(Store(store))}
    for stage, folder in (
        ("observations", "observations"),
        ("descriptors", "completion"),
        ("index", "index/generations"),
    ):
        assert sum(found[stage].sizes.values()) == sum(
            file.stat().st_size for file in (store / folder).rglob("*") if file.is_file()
        )
    ledger = found["observations"]
    assert ledger.values == ledger.logits * 90
    assert list(ledger.lines())[-1].ratio > 1
