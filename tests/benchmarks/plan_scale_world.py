"""A store on S3 and a Hub as large as the public one, in the memory of one process, for `plan_scale`.

    python -m tests.benchmarks.plan_scale_world --models N --receipts N [--bare]

Of N models seven of ten are indexed, and three failed for good. They lie in the given number of receipts, with parts of
all four kinds (observations and weights are empty objects: nobody reads them), in a finished completion, and in a live
generation of the index, one logit each, most of them copies. Prints where everything is as one line of JSON, then serves
until its input ends.

moto looks at every key of a bucket for every page of a listing: at half a million that takes seconds, as on no real
store. Its listing is therefore replaced by one that searches sorted names.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import gc
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import numpy as np
import pyarrow as pa

BUCKET = "scale"
PER_PAGE = 200
NEWEST = "2026-01-01T00:00:00.000Z"
PROBE_SET = "a" * 64
_DISTINCT = 50_000


def repo(number: int) -> str:
    """The repository of a model."""
    return f"owner-{number % 977}/model-{number}"


def sha(number: int) -> str:
    """Its commit."""
    return f"{number * 2654435761 % 2**40:040x}"


def failed(number: int) -> bool:
    """Whether it could not be indexed."""
    return number % 10 >= 7


def moment(number: int) -> str:
    """When it was changed: half a minute before the one before it."""
    return str(np.datetime64(NEWEST[:-1]) - np.timedelta64(30 * number, "s")) + "Z"


def main() -> None:
    """Make it, say where it is, serve it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--receipts", type=int, required=True)
    parser.add_argument("--bare", action="store_true", help="Without sums of receipts, and without bundles.")
    given = parser.parse_args()
    requests: Counter[str] = Counter()
    endpoint = serve_s3(requests)
    hub = serve_hub(given.models, requests)
    with tempfile.TemporaryDirectory() as folder:
        config = fill(Path(folder), given, hub)
        requests.clear()
        # Millions of objects that stay: looking through them again and again takes seconds.
        gc.freeze()
        gc.disable()
        print(json.dumps({"s3": endpoint, "hub": hub, "config": config}), flush=True)
        sys.stdin.read()
    os._exit(0)


def serve_s3(requests: Counter[str]) -> str:
    """Moto's server with a bucket; sets this process's environment to it."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    from tests.support.processes import s3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    s3.boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
    S3Response.list_objects_v2 = listing
    answer = S3Response._bucket_response, S3Response._key_response

    def counted(number: int, name: str) -> Any:
        def respond(self: Any, request: Any, full_url: str, *others: Any) -> Any:
            requests[f"s3 {'LIST' if name == 'bucket' and request.method == 'GET' else request.method}"] += 1
            return answer[number](self, request, full_url, *others)

        return respond

    S3Response._bucket_response = counted(0, "bucket")
    S3Response._key_response = counted(1, "key")
    return endpoint


def backend() -> Any:
    """Moto's objects."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


_names: list[str] = []
_lock = threading.Lock()


def listing(self: Any) -> tuple[int, dict[str, str], str]:
    """One page of a bucket's keys and common prefixes; the token is the last name of the page before."""
    asked = {
        name: self.querystring.get(name, [""])[0] for name in ("prefix", "delimiter", "continuation-token")
    }
    prefix, delimiter = asked["prefix"], asked["delimiter"]
    most = int(self.querystring.get("max-keys", ["1000"])[0])
    keys = self.backend.get_bucket(self.bucket_name).keys
    with _lock:
        if len(_names) != len(keys):
            _names[:] = sorted(keys)
    token = asked["continuation-token"]
    place = max(bisect.bisect_left(_names, prefix), bisect.bisect_right(_names, token) if token else 0)
    found: list[str] = []
    while place < len(_names) and _names[place].startswith(prefix) and len(found) < most:
        name = _names[place]
        folder, inside, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if inside:
            found.append(f"<CommonPrefixes><Prefix>{prefix}{folder}/</Prefix></CommonPrefixes>")
            place = bisect.bisect_left(_names, f"{prefix}{folder}0")  # "0" is the character after "/"
        else:
            found.append(
                f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<Size>{keys[name].size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
            place += 1
    following = (
        f"<NextContinuationToken>{_names[place - 1]}</NextContinuationToken>"
        if place < len(_names) and _names[place].startswith(prefix)
        else ""
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{self.bucket_name}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(found)}</KeyCount>"
        f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(bool(following)).lower()}</IsTruncated>{following}"
        f"{''.join(found)}</ListBucketResult>"
    )
    return 200, {"Content-Type": "application/xml"}, xml


def serve_hub(models: int, requests: Counter[str]) -> str:
    """The Hub's listing, newest first."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests["hub GET"] += 1
            split = urlsplit(self.path)
            if split.path == "/requests":
                return self._answer(json.dumps({**requests, "seconds": time.process_time()}).encode(), {})
            if split.path != "/api/models":
                self.send_error(404)
                return None
            query = parse_qs(split.query)
            begin = int(query.pop("cursor", ["0"])[0])
            end = min(begin + PER_PAGE, models)
            row = row_template(tuple(query.get("expand", ())))
            body = b"[" + b",".join(row_json(number, row) for number in range(begin, end)) + b"]"
            following = f'<http://{self.headers["Host"]}/api/models?{urlencode({**query, "cursor": end}, True)}>; rel="next"'
            return self._answer(body, {"Link": following} if end < models else {})

        def _answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


_ROW = {
    "_id": "%(number)024x",
    "id": "%(repo)s",
    "sha": "%(sha)s",
    "lastModified": "%(at)s",
    "createdAt": "%(at)s",
    "gated": False,
    "disabled": False,
    "downloads": "%(downloads)d",
    "likes": "%(likes)d",
    "library_name": "timm",
    "pipeline_tag": "image-classification",
    "tags": ["timm", "safetensors", "image-classification", "license:apache-2.0", "region:us"],
    "cardData": {"license": "apache-2.0", "tags": ["image-classification"], "library_name": "timm"},
    "config": {"architecture": "resnet%(depth)s"},
    "safetensors": {"parameters": {"F32": "%(size)d"}, "total": "%(size)d"},
    "siblings": [
        {"rfilename": ".gitattributes"},
        {"rfilename": "README.md"},
        {"rfilename": "config.json"},
        {"rfilename": "model.safetensors"},
        {"rfilename": "preprocessor_config.json"},
    ],
}


@functools.cache
def row_template(expand: tuple[str, ...] = ()) -> str:
    """A row with the fields that a listing is asked for.

    Filled in, not encoded a million times: whoever reads the listing would wait for that.
    """
    asked = {name: value for name, value in _ROW.items() if not expand or name in {"_id", "id", *expand}}
    return re.sub(r'"(%\(\w+\)d)"', r"\1", json.dumps(asked))


def row_json(number: int, row: str) -> bytes:
    """A model as the Hub lists it."""
    return (
        row
        % {
            "number": number,
            "repo": repo(number),
            "sha": sha(number),
            "at": moment(number),
            "downloads": number % 1000,
            "likes": number % 7,
            "depth": number % 50,
            "size": 10**6 + number % 10**7,
        }
    ).encode()


def fill(folder: Path, given: argparse.Namespace, hub: str) -> dict[str, Any]:
    """Write everything; returns the configuration that it is for."""
    models = given.models
    from pipelines.config.model import Config
    from pipelines.job.job import Job
    from probelog.probes import probe_set
    from probelog.probes.sources import source_files
    from probelog.storage import layout

    images = folder / "probes"
    images.mkdir()
    (images / "1.png").write_bytes(b"a picture")
    names = folder / "names.txt"
    names.write_text("cat\ndog\nowl\ntree\n")
    config = {
        "store": f"s3://{BUCKET}/store",
        "probes": str(images),
        "encoder": "an encoder",
        "background": str(names),
        "fraction": 0.25,
    }
    job = Job.of(Config.model_validate(config))
    manifest = {"kind": "probe-set", "version": probe_set.VERSION, "hash": PROBE_SET, "count": 4000, "files": []}  # fmt: skip
    job.store.write_json(layout.ProbeSetFolder.of(PROBE_SET).manifest, manifest)
    made = probe_set._made_name(str(images), job.config.probe_count, 0, source_files(str(images))[0])
    job.store.write_json(made, {"hash": PROBE_SET})
    catalogue(job, models, hub)
    parts = ledger(job, models, given.receipts, given.bare)
    completion(job, parts)
    index(job, folder, models)
    # A reader's configuration is a file: everything in it is kept until the process ends.
    return config


def put(job: Any, name: str, data: bytes) -> None:
    """Write one object without HTTP."""
    backend().put_object(BUCKET, f"store/{name}", data)


def catalogue(job: Any, models: int, hub: str) -> None:
    """What a finished crawl leaves."""
    from pipelines.crawl.stage import CRAWL_VERSION
    from probelog.hub.model_info import read_row
    from probelog.storage.encoding import digest, parquet_bytes
    from probelog.storage.layout import CatalogueFolder
    from probelog.storage.parquet_parts import Part
    from probelog.storage.schemas import CATALOGUE, to_table

    key = CatalogueFolder.of(job.catalogue_key(hub))
    rows = to_table(
        [read_row(json.loads(row_json(i, row_template()))) for i in range(min(5000, models))], CATALOGUE
    )
    parts = []
    for number, start in enumerate(range(0, models, 5000)):
        numbers = range(start, min(start + 5000, models))
        part = rows.slice(0, len(numbers))
        for name, values in (("repo", map(repo, numbers)), ("sha", map(sha, numbers))):
            place = CATALOGUE.get_field_index(name)
            part = part.set_column(place, CATALOGUE.field(name), pa.array(values, pa.string()))
        data = parquet_bytes(part)
        path = key.part("first", "rows", number)
        put(job, path, data)
        parts.append(asdict(Part(path, len(numbers), len(data), digest(data))))
    job.store.write_json(
        key.receipt,
        {
            "run": "first",
            "rows": parts,
            "failures": [],
            "endpoint": hub,
            "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T05:00:00+00:00",
            "version": CRAWL_VERSION,
        },
    )


def ledger(job: Any, models: int, receipts: int, bare: bool) -> dict[str, Any]:
    """Receipts of all models and their parts; returns a part of descriptors for each."""
    from pipelines.probe.summary import Summary
    from probelog.errors import FailureReason
    from probelog.models.preprocessing import timm_recipe
    from probelog.storage.bundles import BUNDLED, Bundles
    from probelog.storage.checksummed_json import sealed_json
    from probelog.storage.encoding import digest, short_key
    from probelog.storage.layout import LedgerFolder
    from probelog.storage.ledger import LEDGER_VERSION, TIMED_PHASES, Counts, Ledger, Receipt, item_key
    from probelog.storage.parquet_parts import Part, part_bytes
    from probelog.storage.schemas import FAILURES, PROBED_MODELS, Failure, to_table
    from tests.support.worlds.probed_models import probed_model

    folder = LedgerFolder.of(job.observations_key(PROBE_SET))
    size = -(-models // receipts)
    manifest = {"probe_set": PROBE_SET, "probes": 4000, "fraction": 0.25, "seed": 0, "planned": models}
    job.store.write_json(folder.manifest, manifest | {"version": LEDGER_VERSION})
    recipe = timm_recipe({}, 1024).to_json()
    sidecar: bytes | None = None
    parts = {}
    bundles, waiting = Bundles(job.store, folder), list[tuple[str, bytes, pa.Table]]()
    summary = Summary()
    for start in range(0, models, size):
        numbers = range(start, min(start + size, models))
        indexed = [i for i in numbers if not failed(i)]
        if sidecar is None:
            rows = [
                probed_model(
                    repo(i), sha=sha(i), logits=10, labels=None, probes=list(range(1000)), recipe=recipe
                )
                for i in indexed
            ]
            sidecar = part_bytes([to_table(rows, PROBED_MODELS)], PROBED_MODELS)
        failures = [
            Failure.of(
                repo(i), sha(i), "probe", FailureReason.UNSAFE_FORMAT, "pytorch_model.bin is a pickle", 1
            )
            for i in numbers
            if failed(i)
        ]
        keys = sorted(item_key(repo(i), sha(i)) for i in numbers)
        name = short_key(*keys)

        def part(kind: str, rows: int, data: bytes, name: str = name) -> Part:
            put(job, folder.part(kind, name), data)
            return Part(folder.part(kind, name), rows, len(data) or 100_000, digest(data))

        receipt = Receipt(
            name=name,
            items=keys,
            rows=part("observations", 10 * len(indexed), b""),
            models=part("models", len(indexed), sidecar),
            failures=part("failures", len(failures), part_bytes([to_table(failures, FAILURES)], FAILURES)),
            weights=part("weights", 60 * len(indexed), b""),
            counts=Counts(
                indexed=len(indexed),
                logits=10 * len(indexed),
                bytes=10**8 * len(indexed),
                failed={"unsafe-format": len(failures)},
                seconds=dict.fromkeys(TIMED_PHASES, 1.5 * len(indexed)),
            ),
            originals={digest(repo(i).encode()): [repo(i), sha(i)] for i in indexed},
            at=moment(models - start)[:19] + "+00:00",
        )
        data = sealed_json(receipt.to_json())
        put(job, folder.receipt(name), data)
        summary.add([receipt])
        waiting.append((name, data, to_table(failures, FAILURES)))
        if len(waiting) == BUNDLED and not bare:
            bundles.write(*zip(*waiting, strict=True))
            waiting.clear()
        parts[name] = Part(f"completion/finished/descriptors/{name}.parquet", 70, 70_000, "d" * 64)
        put(job, parts[name].path, b"")
    if not bare:
        summary.write(Ledger(job.store, folder.path), now=True)
    return parts


def completion(job: Any, parts: dict[str, Any]) -> None:
    """A finished one of all of it."""
    from pipelines.complete.record import CompletionRecord, write_record

    record = CompletionRecord("finished", 3, 0.1, 0.5, 0.6, 7 * len(parts), 70 * len(parts), 0, parts)
    write_record(job.store, record, {}, job.observations_key(PROBE_SET))


def index(job: Any, folder: Path, models: int) -> None:
    """A live generation of all indexed models, one logit each, most of them copies."""
    from probelog.index.generation import Generation
    from probelog.publication.generation_writer import GenerationWriter
    from probelog.publication.lifecycle import go_live
    from probelog.publication.rows import RowEncoder, write_tables
    from probelog.ranking import matched_heads
    from probelog.storage.encoding import npy
    from probelog.storage.ledger import item_key, key_numbers
    from probelog.storage.store import Store
    from tests.benchmarks.search import write_rest
    from tests.support.worlds.small_index import build

    keys = np.sort(key_numbers(item_key(repo(i), sha(i)) for i in range(models) if failed(i)))
    settings = {
        "probe_set": PROBE_SET,
        "observations": job.observations_key(PROBE_SET),
        "encoder": "an encoder",
        "prompts": job.config.prompts,
        "fraction": 0.25,
        "completion": "finished",
        "watermark": NEWEST.replace("Z", "+00:00"),
        "listed": "2026-01-01T00:00:00+00:00",
    }
    names = ["cat", "dog", "owl", "tree"]
    local = Store(folder / "index")
    small = build(local, names=names, images=False, settings=settings, further={"failed.npy": npy(keys)})
    real = Generation(local, small.pointer)
    writer = GenerationWriter(local, "large")
    facts = model_table([i for i in range(models) if not failed(i)])
    distinct = min(_DISTINCT, facts.num_rows)
    random = np.random.default_rng(0)
    dimension = small.gallery.shape[1]
    directions = random.normal(size=(distinct, dimension)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    background = matched_heads.Background(
        small.background_vectors, matched_heads.sharpness(directions[:4096], small.background_vectors)
    )
    encoder = RowEncoder.fit(directions[:20_000], background, 40)
    written = write_tables(writer, batches(directions), facts, encoder)
    write_rest(writer, real, written, background.sharpness)
    writer.finish()
    go_live(local, "large", "source of large")
    for path in sorted(p for p in (folder / "index").rglob("*") if p.is_file()):
        put(job, f"index/{path.relative_to(folder / 'index').as_posix()}", path.read_bytes())


def batches(directions: Any) -> Iterator[Any]:
    """One logit a model, for as many models as there are directions."""
    from probelog.publication.rows import LogitBatch

    for start in range(0, len(directions), 10_000):
        some = directions[start : start + 10_000]
        numbers = np.arange(start, start + len(some))
        probes = np.tile(np.arange(8), (len(some), 1))
        yield LogitBatch(numbers, np.zeros(len(some), np.int64), np.zeros(len(some), bool), some, probes)


def model_table(numbers: list[int]) -> pa.Table:
    """Facts of the indexed models."""
    from probelog.index.schema import MODEL_FACTS

    fields = [item for item in MODEL_FACTS if item.name != "copies"]
    count = len(numbers)
    distinct = min(_DISTINCT, count)
    known: dict[str, Any] = {
        "repo": [repo(i) for i in numbers],
        "sha": [sha(i) for i in numbers],
        "library": ["timm"] * count,
        "pipeline_tag": ["image-classification"] * count,
        "architecture": ["resnet18"] * count,
        "head": ["softmax"] * count,
        "logits": [1] * count,
        "licence": ["mit"] * count,
        "weight_digest": [f"{place % distinct:064x}" for place in range(count)],
        "observed": [1000] * count,
    }
    columns = [
        pa.array(known[item.name], item.type) if item.name in known else pa.nulls(count, item.type)
        for item in fields
    ]
    return pa.table(columns, schema=pa.schema(fields))


if __name__ == "__main__":
    main()
