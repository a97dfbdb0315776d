"""What a newer ProbeLog wrote is refused by name, wherever it is read."""

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
from probelog.errors import SchemaVersionError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.index.schema import INDEX_VERSION
from probelog.probes.probe_set import IMAGES, THUMBNAILS, ProbeSet, embeddings_schema
from probelog.publication.generation_writer import GenerationWriter
from probelog.publication.lifecycle import go_live, read_files
from probelog.storage import schemas
from probelog.storage.encoding import digest
from probelog.storage.ledger import Ledger
from probelog.storage.parquet_parts import Part, part_bytes, read_part
from probelog.storage.store import Store
from probelog.storage.versions import NAME_KEY, VERSION_KEY, check_schema, check_version

NEWER = "version 99 is newer than this ProbeLog knows .*Upgrade ProbeLog"
SCHEMAS = [
    schemas.CATALOGUE,
    schemas.FAILURES,
    schemas.OBSERVATIONS,
    schemas.PROBED_MODELS,
    schemas.WEIGHTS,
    schemas.DESCRIPTORS,
    IMAGES,
    THUMBNAILS,
    embeddings_schema(3),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.metadata[NAME_KEY].decode())
def test_every_schema(schema: pa.Schema, tmp_path: Path) -> None:
    newer = schema.with_metadata({**schema.metadata, VERSION_KEY: b"99"})
    data = part_bytes([newer.empty_table()], newer)
    store = Store(tmp_path)
    store.write("part", data)
    with pytest.raises(SchemaVersionError, match=NEWER):
        read_part(store, Part("part", 0, len(data), digest(data)), schema)
    check_schema(schema.with_metadata({NAME_KEY: schema.metadata[NAME_KEY]}), schema, "here")


@pytest.mark.parametrize("found", [None, "1", 1.0, True, []])
def test_what_is_no_version(found: object) -> None:
    with pytest.raises(StoreError, match="here is damaged"):
        check_version(found, 1, "here", "thing")


def job(store: Store) -> Job:
    return Job(Config.model_construct(), store, Report(io.StringIO()))


def receipt(store: Store) -> None:
    store.write_json("observations/k/receipts/r.json", {"version": 99, "parts": "of another kind"})
    Ledger(store, "observations/k").receipts()


def sealed_again(store: Store) -> None:
    store.write_json("observations/k/receipts/r.json", {"version": 99})
    Ledger(store, "observations/k").sealed_result("r", "a/b", "1")


def pointer(store: Store) -> None:
    store.write_json("current.json", {"version": 99})
    read_pointer(store)


def files(store: Store) -> None:
    store.write_json("generations/g/files.json", {"version": 99})
    read_files(store, "g")


def rollback_target(store: Store) -> None:
    store.write_json("generations/g/files.json", {"version": 99})
    go_live(store, "g", "source")


def generation(store: Store) -> None:
    GenerationWriter(store, "g").write_meta({"settings": json.dumps({"version": 99}).encode()})
    Generation(store, Pointer("g", "s", "p"))


def catalogue(store: Store) -> None:
    class Everywhere(Job):
        def catalogue_key(self, endpoint: str) -> str:
            return "k"

    store.write_json("catalogue/k/receipt.json", {"version": 99})
    given = job(store)
    Catalogue.open(Everywhere(given.config, given.store, given.report), "http://hub")


def completion(store: Store) -> None:
    read_record(store, "k", {"version": 99})


def ledger(store: Store) -> None:
    store.write_json("observations/k/manifest.json", {"version": 99})
    status(store.uri)


def probe_set(store: Store) -> None:
    store.write_json("probes/0123456789abcdef/manifest.json", {"kind": "probe-set", "version": 99})
    ProbeSet.open(store, "0123456789abcdef")


READERS = [
    receipt, sealed_again, pointer, files, rollback_target, generation, catalogue, completion, ledger, probe_set,
]  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_reader(read: Callable[[Store], None], tmp_path: Path) -> None:
    with pytest.raises(SchemaVersionError, match=NEWER):
        read(Store(tmp_path))


def test_an_index_that_is_too_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = {"version": INDEX_VERSION - 1}
    GenerationWriter(store, "g").write_meta({"settings": json.dumps(old).encode()})
    with pytest.raises(SchemaVersionError, match=r"is older than this ProbeLog reads .*Publish it again"):
        Generation(store, Pointer("g", "s", "p"))
