"""S3 by pyarrow and boto3 (as a store reaches it) and by obstore (as `gs://` and `az://` are reached): requests and seconds.

    uv run python -m tests.benchmarks.stores [--wait 0 0.02] [--objects 200] [--listed 5000] [--rounds 3] [--only WORD]

The server is moto's, in a process of its own on this machine, which answers in milliseconds; ``--wait`` makes every answer
come so many seconds later, as a bucket's do. Requests are counted at the server. Of several rounds, each with the kinds in
turn, the least seconds are told. Credentials are keys in the environment: the only ones that both find by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from probelog.storage.backends.cloud import Cloud
from probelog.storage.backends.s3 import S3
from probelog.storage.store import Store
from tests.support.processes.s3 import at

_BUCKET = "benchmark"
_SMALL = 2_000
_THREADS = 16
_COUNTS = "/__counts__"


class S3ByObstore(Cloud):
    """What `s3://` would be, were it reached as the other clouds are."""

    advice = S3.advice
    keys = S3.keys
    endpoints = ("AWS_ENDPOINT_URL",)
    mark = "e_tag"

    def _open_store(self, client: Any) -> Any:
        from obstore.store import S3Store

        return S3Store(self.bucket, client_options=client)


def serve() -> None:
    """Runs moto with a count of what it is asked; prints its port."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    asked, guard, wait = Counter[str](), threading.Lock(), [0.0]
    moto = DomainDispatcherApplication(create_backend_app)

    def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _COUNTS:
            body = json.dumps(asked).encode()
            with guard:
                asked.clear()
                wait[0] = float(environ["QUERY_STRING"] or 0)
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]
        with guard:
            asked[environ["REQUEST_METHOD"]] += 1
        time.sleep(wait[0])
        return moto(environ, start_response)

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Quiet)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def server() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.stores", "--serve"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        with at(keys | {"AWS_ENDPOINT_URL": endpoint}):
            yield endpoint
    finally:
        process.kill()
        process.wait()


def counts(endpoint: str, wait: float = 0.0) -> Counter[str]:
    """What the server was asked since the last call; from now on it waits so many seconds before each answer."""
    with urllib.request.urlopen(f"{endpoint}{_COUNTS}?{wait}", timeout=60) as answer:
        return Counter(json.load(answer))


def operations(objects: int) -> dict[str, Callable[[Store, str], object]]:
    """What is measured, by its name in the table; each is given a store and a word that it was not given before."""
    names = [f"small/{number:05}" for number in range(objects)]
    data = os.urandom(_SMALL)

    def together(call: Callable[[str], object]) -> list[object]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(call, names))

    def columns(store: Store, _: str) -> pa.Table:
        with store.open("table.parquet") as stream:
            return pq.ParquetFile(stream).read(["c1", "c7"])

    def row_group(store: Store, _: str) -> pa.Table:
        with store.open("table.parquet") as stream:
            return pq.ParquetFile(stream).read_row_group(9, ["c1", "c7"])

    def swaps(store: Store, word: str) -> None:
        previous = None
        for number in range(objects // 4):
            content = f"{word} {number}".encode()
            store.swap(f"pointers/{word}", content, previous)
            previous = content

    return {
        f"read {objects} objects of 2 kB, one after the other": lambda store, _: [
            store.read(name) for name in names
        ],
        f"the same by {_THREADS} threads": lambda store, _: together(store.read),
        f"write {objects} objects of 2 kB": lambda store, _: [store.write(name, data) for name in names],
        f"the same by {_THREADS} threads ": lambda store, _: together(lambda name: store.write(name, data)),
        "list all": lambda store, _: store.sizes("listed"),
        f"create {objects // 4} objects, if they are not there": lambda store, word: [
            store.create(f"created/{word}-{number}", data) for number in range(objects // 4)
        ],
        f"swap a pointer {objects // 4} times": swaps,
        "digest of 32 MB": lambda store, _: store.measure("large"),
        "columns: 2 of 10 of a Parquet file, all 20 row groups": columns,
        "columns: 2 of one row group": row_group,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wait", type=float, nargs="+", default=[0.0, 0.02])
    parser.add_argument("--objects", type=int, default=200)
    parser.add_argument("--listed", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="What has this word in its name.")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    plan = parser.parse_args()
    if plan.serve:
        return serve()
    with server() as endpoint:
        import boto3

        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=_BUCKET)
        today, other = Store(f"s3://{_BUCKET}/store"), Store(f"s3://{_BUCKET}/store")
        other._backend = S3ByObstore(other.root)
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda number: other.write(f"listed/{number:06}.json", b"{}"), range(plan.listed)))
        rng = np.random.default_rng(0)
        table = pa.table({f"c{number}": rng.standard_normal(200_000) for number in range(10)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=10_000)
        today.write("table.parquet", sink.getvalue().to_pybytes())
        today.write("large", os.urandom(32 << 20))
        for number in range(plan.objects):
            other.write(f"small/{number:05}", os.urandom(_SMALL))

        waits = "".join(f" s, +{1000 * wait:.0f} ms: today | obstore |" for wait in plan.wait)
        print(f"| | requests today | obstore |{waits}")
        print("|---|" + "---|" * (2 + 2 * len(plan.wait)))
        number = 0
        for name, operation in operations(plan.objects).items():
            if plan.only not in name:
                continue
            asked, seconds = list[str](), list[str]()
            for wait in plan.wait:
                least = [float("inf"), float("inf")]
                asked = []
                for _ in range(plan.rounds):
                    asked = []
                    for kind, store in enumerate((today, other)):
                        number += 1
                        counts(endpoint, wait)
                        begin = time.perf_counter()
                        operation(store, f"w{number}")
                        least[kind] = min(least[kind], time.perf_counter() - begin)
                        asked.append(_told(counts(endpoint)))
                seconds += [f"{value:.2f}" for value in least]
            print(f"| {' | '.join([name.strip(), *asked, *seconds])} |", flush=True)
    return None


def _told(asked: Counter[str]) -> str:
    return ", ".join(f"{count} {method}" for method, count in sorted(asked.items()))


if __name__ == "__main__":
    main()
