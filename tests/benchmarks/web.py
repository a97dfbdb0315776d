"""A hundred visitors at once on the page of a large index, and the same beside clients that mean harm.

    uv run python -m tests.benchmarks.web --index DIR                         # an index that there is
    uv run python -m tests.benchmarks.web --store URI --scratch DIR           # makes a million logits first, and keeps them there

URI is a store that was indexed with ``fraction = 1``; ``tests/benchmarks/search.py`` says how its hub is enlarged. The
server is ``probelog web`` in a process of its own, on loopback; visitors are tasks of this process, on the same cores.

A visitor loads a page and the small pictures of its first answers that it has not seen yet, over one connection, and reads
for a while (``--think`` seconds on average, exponentially distributed) before the next: most search by name, some narrow a
search down, go on from a logit, look at a model or its tree. Milliseconds are from the request to the last byte of a
page (its pictures apart). Visitors come from an address each, hostile clients from another: connections that send a byte now and then,
and searches one after the other without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import probelog
from tests.support.paths import CHECKOUT
from tests.support.processes.processes import megabytes_of

HOSTILE_ADDRESS = "127.0.0.2"
SLOW, GREEDY = 300, 50
SHOWN_HITS = 4
MIXTURE = {"search": 60, "filtered": 12, "more like this": 12, "model": 12, "index": 4}
SEED = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, help="a published index")
    parser.add_argument("--store", help="indexed with fraction = 1, to make a large index from")
    parser.add_argument("--scratch", type=Path, help="folder for that index, which is kept there")
    parser.add_argument("--logits", type=int, default=1_000_000)
    parser.add_argument("--visitors", type=int, default=100)
    parser.add_argument(
        "--think", type=float, default=5.0, help="seconds between a visitor's pages, on average"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the two parts")
    given = parser.parse_args()
    folder = given.index or made(given)
    texts = names(folder)
    with served(folder) as (address, server):
        asyncio.run(measured(given, address, server.pid, texts))


def made(given: argparse.Namespace) -> Path:
    """A large index, made once."""
    from tests.benchmarks import search

    folder: Path = given.scratch / str(given.logits)
    if not (folder / "questions.json").exists():
        settings = argparse.Namespace(store=given.store, questions=100, pictures=None)
        for row in search.made(settings, given.logits, folder):
            print(json.dumps(row), flush=True)
    return folder / "index"


def names(folder: Path) -> list[str]:
    """Names that the index knows."""
    index = probelog.open_index(folder)
    known = {
        concept
        for row in index.models(limit=40).column("repo").to_pylist()
        for concept in _concepts(index, row)
    }
    return sorted(known)


def _concepts(index: probelog.Index, repo: str) -> list[str]:
    return [concept for item in index.show(repo, 5, limit=20).logits for concept in item.concepts]


@contextlib.contextmanager
def served(folder: Path):  # type: ignore[no-untyped-def]
    """Address of the page, and the process that serves it."""
    command = [sys.executable, "-m", "probelog", "web", "--index", str(folder), "--port", "0"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as in deploy/web/page.yaml: answers share the cores
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        yield re.findall(r"http://([\d.:]+)/", line)[0], server
    finally:
        server.terminate()
        server.wait(30)


class Connection:
    """A connection that is kept alive, with as little work as an answer can be read with."""

    def __init__(self, address: str, source: str = "127.0.0.1") -> None:
        self._host, port = address.split(":")
        self._port, self._source = int(port), source
        self._writer: asyncio.StreamWriter | None = None

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        for _ in range(2):  # an idle connection may have been ended
            try:
                return await self._get(path)
            except (ConnectionError, asyncio.IncompleteReadError):
                self.close()
        raise ConnectionError

    async def _get(self, path: str) -> tuple[int, bytes]:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                self._host, self._port, local_addr=(self._source, 0)
            )
        self._writer.write(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n".encode()
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
        body = await self._reader.readexactly(length)
        return int(head.split()[1]), gzip.decompress(
            body
        ) if b"content-encoding: gzip" in head.lower() else body

    def close(self) -> None:
        """End it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Watch:
    """Milliseconds and statuses by kind of page."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.statuses: dict[int, int] = defaultdict(int)

    async def get(self, kind: str, connection: Connection, path: str) -> str:
        began = time.perf_counter()
        status, body = await connection.get(path)
        self.times[kind].append(1000 * (time.perf_counter() - began))
        self.statuses[status] += 1
        return body.decode("utf-8", "replace")


async def visitor(
    watch: Watch, address: str, source: str, texts: list[str], think: float, rng: random.Random
) -> None:
    connection, seen = Connection(address, source), set()
    await asyncio.sleep(rng.uniform(0, think))
    page = ""
    while True:
        kind = rng.choices([*MIXTURE], [*MIXTURE.values()])[0]
        logits = re.findall(r'/use/([^"?]+)\?logit=(\d+)', page)
        if kind in ("more like this", "model") and not logits:
            kind = "search"
        path = f"/search?q={quote(rng.choice(texts))}"
        if kind == "filtered":
            path += "&downloads=100&licence=mit"
        elif kind == "more like this":
            repo, logit = rng.choice(logits)
            path = f"/search?like={repo}%23{logit}"
        elif kind == "model":
            path = f"/models/{rng.choice(logits)[0]}"
        elif kind == "index":
            path = "/index"
        page = await watch.get(kind, connection, path)
        hits = page.split('<li class="hit">')[1 : 1 + SHOWN_HITS]
        for picture in dict.fromkeys(re.findall(r'src="(/probes/[^"]+)"', "".join(hits))):
            if picture not in seen:
                seen.add(picture)
                await watch.get("picture", connection, picture)
        await asyncio.sleep(rng.expovariate(1 / think))


async def slow(address: str) -> None:
    """A request that never ends."""
    while True:
        with contextlib.suppress(OSError):
            host, port = address.split(":")
            _, writer = await asyncio.open_connection(host, int(port), local_addr=(HOSTILE_ADDRESS, 0))
            writer.write(b"GET /search HTTP/1.1\r\nX: ")
            while not writer.is_closing():
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(5)
        await asyncio.sleep(1)


async def greedy(address: str, texts: list[str], rng: random.Random, answered: dict[int, int]) -> None:
    """Searches one after the other."""
    connection = Connection(address, HOSTILE_ADDRESS)
    while True:
        status, _ = await connection.get(f"/search?q={quote(rng.choice(texts))}&k=200")
        answered[status] += 1


async def measured(given: argparse.Namespace, address: str, pid: int, texts: list[str]) -> None:
    rng = random.Random(SEED)
    print(f"{len(texts)} names; {given.visitors} visitors, {given.think:g} s between pages", flush=True)
    first = Connection(address)
    for text in texts[:20]:  # whatever is read once
        await first.get(f"/search?q={quote(text)}")
    for part in ("alone", "beside hostile clients"):
        watch, answered = Watch(), defaultdict(int)
        async with running() as start:
            for number in range(given.visitors):
                start(
                    visitor(
                        watch,
                        address,
                        f"127.0.1.{number + 1}",
                        texts,
                        given.think,
                        random.Random(rng.random()),
                    )
                )
            if part != "alone":
                for _ in range(SLOW):
                    start(slow(address))
                for _ in range(GREEDY):
                    start(greedy(address, texts, random.Random(rng.random()), answered))
            before, used = memory(pid), processor(pid)
            await asyncio.sleep(given.seconds)
            used = processor(pid) - used
        report(part, watch, given.seconds, before, memory(pid), used, answered)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator:  # type: ignore[type-arg]
    tasks = []
    yield lambda work: tasks.append(asyncio.create_task(work))
    for task in tasks:
        if task.done() and task.exception() is not None:
            print(f"a client ended: {task.exception()!r}", flush=True)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def report(
    part: str,
    watch: Watch,
    seconds: float,
    before: float,
    after: float,
    used: float,
    answered: dict[int, int],
) -> None:
    pages = [value for kind, values in watch.times.items() if kind != "picture" for value in values]
    print(f"\n{part}: {len(pages) / seconds:.1f} pages a second, statuses {dict(watch.statuses)}", flush=True)
    print(f"{'':>16} {'number':>7} {'median':>7} {'p95':>7} {'most':>7}  ms")
    for kind, values in [("every page", pages), *sorted(watch.times.items())]:
        p95 = statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]
        print(
            f"{kind:>16} {len(values):>7} {statistics.median(values):>7.0f} {p95:>7.0f} {max(values):>7.0f}"
        )
    print(
        f"the server's memory: {before:.0f} MB, then {after:.0f} MB; its processor time: {used / seconds:.2f} cores"
    )
    if answered:
        print(f"greedy clients' answers: {dict(answered)}", flush=True)


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *(int(child) for child in children.read_text().split())]


def memory(pid: int) -> float:
    """Resident megabytes of a process and those that it started."""
    return sum(megabytes_of(one, "VmRSS") for one in family(pid))


def processor(pid: int) -> float:
    """Processor seconds of a process and those that it started."""
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in family(pid)]
    return sum(int(field[11]) + int(field[12]) for field in fields) / 100


if __name__ == "__main__":
    main()
