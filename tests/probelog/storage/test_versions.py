"""What a newer ProbeLog wrote is refused by name, and what has no version, wherever it is read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.complete.record import read_record
from pipelines.config.model import Config
from pipelines.crawl.stage import Catalogue
from pipelines.inspect.status import status
from pipelines.job.job import Job
from pipelines.job.progress import Report
from probelog import __version__
from probelog.errors import SchemaVersionError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.probes.probe_set import IMAGES, THUMBNAILS, ProbeSet, embeddings_schema
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live, read_files
from probelog.storage import schemas
from probelog.storage.encoding import digest
from probelog.storage.ledger import Ledger
from probelog.storage.parquet_parts import Part, part_bytes, read_part
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY_KEY, NAME_KEY, VERSION_KEY, check_schema, check_version

NEWER = r"version 99 is newer than this ProbeLog knows .*Upgrade ProbeLog .* to 9\.1 or newer"
NEWER_RECORD: dict[str, object] = {"version": 99, "made_by": "probelog 9.1"}
SCHEMAS = [
    schemas.CATALOGUE,
    schemas.FAILURES,
    schemas.OBSERVATIONS,
    schemas.PROBED_MODELS,
    schemas.GENERATORS,
    schemas.SAMPLES,
    schemas.WEIGHTS,
    schemas.DESCRIPTORS,
    IMAGES,
    THUMBNAILS,
    embeddings_schema(3),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.metadata[NAME_KEY].decode())
def test_every_schema(schema: pa.Schema, tmp_path: Path) -> None:
    newer = schema.with_metadata({**schema.metadata, VERSION_KEY: b"99", MADE_BY_KEY: b"probelog 9.1"})
    data = part_bytes([newer.empty_table()], newer)
    store = Store(tmp_path)
    store.write("part", data)
    with pytest.raises(SchemaVersionError, match=NEWER):
        read_part(store, Part("part", 0, len(data), digest(data)), schema)
    for version in ({}, {VERSION_KEY: b"0"}, {VERSION_KEY: b"one"}):
        without = schema.with_metadata({NAME_KEY: schema.metadata[NAME_KEY], **version})
        with pytest.raises(StoreError, match="here is damaged, or was made before ProbeLog was released"):
            check_schema(without, schema, "here")


def test_another_kind_of_rows() -> None:
    for other, name in (
        (schemas.FAILURES, "failures"),
        (pa.schema([("repo", pa.string())]), "something else"),
    ):
        with pytest.raises(StoreError, match=f"here: expected catalogue rows, found {name}"):
            check_schema(other, schemas.CATALOGUE, "here")


@pytest.mark.parametrize("version", [None, "1", 1.0, True, [], 0, -1])
def test_what_is_no_version(version: object) -> None:
    for content in ({"version": version}, {}):
        with pytest.raises(
            StoreError, match=r"here is damaged, or was made before .* is not the version of a thing"
        ):
            check_version(content, 1, "here", "thing")


@pytest.mark.parametrize(
    ("made_by", "advice"),
    [
        ("probelog 0.9.1", "Upgrade ProbeLog 0.1.0 to 0.9.1 or newer."),
        ("probelog 1.0.0rc1+local", "Upgrade ProbeLog 0.1.0 to 1.0.0rc1+local or newer."),
        (None, "Upgrade ProbeLog 0.1.0."),
        ("probelog 9\x1b[2J", "Upgrade ProbeLog 0.1.0."),
        ("a virus", "Upgrade ProbeLog 0.1.0."),
        ("probelog " + "9" * 99, "Upgrade ProbeLog 0.1.0."),
    ],
)
def test_the_message_names_the_version_to_get(made_by: object, advice: str) -> None:
    with pytest.raises(SchemaVersionError) as caught:
        check_version({"version": 3, "made_by": made_by}, 2, "here", "thing")
    assert str(
        caught.value
    ) == f"here: thing version 3 is newer than this ProbeLog knows (2). {advice}".replace(
        "0.1.0", __version__
    )
    assert check_version({"version": 2, "made_by": made_by}, 2, "here", "thing") == 2
    assert check_version({"version": 1}, 2, "here", "thing") == 1


def job(store: Store) -> Job:
    return Job(Config.model_construct(), store, Report(io.StringIO()))


def receipt(store: Store) -> None:
    store.write_json("observations/k/receipts/r.json", NEWER_RECORD | {"parts": "of another kind"})
    Ledger(store, "observations/k").receipts()


def sealed_again(store: Store) -> None:
    store.write_json("observations/k/receipts/r.json", NEWER_RECORD)
    Ledger(store, "observations/k").sealed_result("r", "a/b", "1")


def pointer(store: Store) -> None:
    store.write_json("current.json", NEWER_RECORD)
    read_pointer(store)


def files(store: Store) -> None:
    store.write_json("generations/g/files.json", NEWER_RECORD)
    read_files(store, "g")


def rollback_target(store: Store) -> None:
    store.write_json("generations/g/files.json", NEWER_RECORD)
    go_live(store, "g", "source")


def generation(store: Store) -> None:
    GenerationWriter(store, "g").write_meta({"settings": json.dumps(NEWER_RECORD).encode()})
    Generation(store, Pointer("g", "s", "p"))


def catalogue(store: Store) -> None:
    class Everywhere(Job):
        def catalogue_key(self, endpoint: str) -> str:
            return "k"

    store.write_json("catalogue/k/receipt.json", NEWER_RECORD)
    given = job(store)
    Catalogue.open(Everywhere(given.config, given.store, given.report), "http://hub")


def completion(store: Store) -> None:
    read_record(store, "k", NEWER_RECORD)


def ledger(store: Store) -> None:
    store.write_json("observations/k/manifest.json", NEWER_RECORD)
    status(store.uri)


def probe_set(store: Store) -> None:
    store.write_json("probes/0123456789abcdef/manifest.json", NEWER_RECORD | {"kind": "probe-set"})
    ProbeSet.open(store, "0123456789abcdef")


READERS = [
    receipt, sealed_again, pointer, files, rollback_target, generation, catalogue, completion, ledger, probe_set,
]  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_reader(read: Callable[[Store], None], tmp_path: Path) -> None:
    with pytest.raises(SchemaVersionError, match=NEWER):
        read(Store(tmp_path))


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_reader_refuses_what_has_no_version(
    read: Callable[[Store], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NEWER_RECORD, "version", None)
    with pytest.raises(StoreError, match="is damaged"):
        read(Store(tmp_path))


def test_a_table_of_another_kind_is_named() -> None:
    fields = [pa.field("a", pa.int32())]

    def schema(name: bytes | None, version: bytes | None) -> pa.Schema:
        metadata = {NAME_KEY: name, VERSION_KEY: version}
        return pa.schema(
            fields, metadata={key: value for key, value in metadata.items() if value is not None}
        )

    wanted = schema(b"apples", b"2")
    for known in (b"1", b"2"):
        check_schema(schema(b"apples", known), wanted, "here")
    with pytest.raises(StoreError, match="None is not the version of a apples"):
        check_schema(schema(b"apples", None), wanted, "here")
    with pytest.raises(SchemaVersionError, match="here: apples version 3 is newer"):
        check_schema(schema(b"apples", b"3"), wanted, "here")
    with pytest.raises(StoreError, match="here: expected apples rows, found pears"):
        check_schema(schema(b"pears", b"2"), wanted, "here")
    for nameless in (schema(None, b"2"), pa.schema(fields)):
        with pytest.raises(StoreError, match="here: expected apples rows, found something else"):
            check_schema(nameless, wanted, "here")
