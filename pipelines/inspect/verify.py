"""``probelog-index verify``: re-read everything in a store and name what is damaged, missing or not accounted for.

Whatever a later stage or a client would trust is checked against what was written down when it was made: parts
against their receipts (size, SHA-256, rows), JSON against its own seal, a generation's files against its list, the
list against the pointer, receipts against each other (those that a completion, a plan's sums or a catalogue names must
be there). Files are hashed in parallel, a few megabytes at a time: memory does not grow with what is in them. Threads
read as much as one machine can; where there is a cluster, its machines share a large store out.

Not checked, because nothing rests on them: temporary files and locks (``.tmp-*``); the parts of a crawl before the
last one, and generations that the pointer does not name (both are reported as unexpected, and removed by the stages
that made them); ``hold.json`` of a generation that is being built.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.runtime.ordered import in_order
from cluster.runtime.session import is_local, session
from pipelines.complete.record import DESCRIPTORS_VERSION
from pipelines.crawl.stage import CRAWL_VERSION
from pipelines.job.figures import FIGURES_VERSION
from pipelines.job.progress import Report
from pipelines.nightly.record import RECORD_VERSION
from pipelines.publish import encoder
from pipelines.publish.pieces import read_piece
from pipelines.quality.report import REPORT_VERSION, page_of
from pipelines.trees.families import FAMILIES
from pipelines.trees.record import TREES_VERSION
from probelog.errors import IndexNotFoundError, StoreError, UsageError
from probelog.index.pointer import Pointer, read_pointer
from probelog.kinds.registry import KINDS
from probelog.probes import probe_set
from probelog.publication.lifecycle import read_files
from probelog.storage import layout
from probelog.storage.bundles import Bundles
from probelog.storage.checksummed_json import unsealed_json
from probelog.storage.ledger import (
    LEDGER_VERSION,
    PROBED,
    RECEIPT_VERSION,
    Contents,
    ItemResult,
    Ledger,
    Receipt,
)
from probelog.storage.parquet_parts import Part
from probelog.storage.schemas import (
    CATALOGUE,
    DESCRIPTORS,
    EDGES,
    FAILURES,
    TREE_MODELS,
)
from probelog.storage.store import Store
from probelog.storage.versions import check_schema, check_version

_READERS = 8
_WAITING = 64
# A store of fewer bytes is read by one machine: in some minutes.
_SPREAD_BYTES = 50_000_000_000
# Checks that a worker is sent at a time.
_CHECKS_AT_ONCE = 64
_PROBLEMS = ("damaged", "missing", "unexpected")
_KNOWN_FOLDERS = (
    layout.CATALOGUES,
    layout.COMPLETIONS,
    layout.ENCODERS,
    layout.INDEX,
    layout.LEDGERS,
    layout.PIECES,
    layout.PROBE_SETS,
    layout.REPORTS,
    layout.RUNS,
    layout.SAMPLES,
    layout.TREES,
)


Check = Callable[["_Files"], object]
"""Reads one thing and notes what is wrong with it; it can be sent to a worker."""


@dataclass
class Verified:
    """What was found. Each list holds ``path`` (below the store) and ``problem``.

    Attributes:
        store: its address.
        files: how many were re-read, and how many ``bytes``.
        damaged: not what they were when they were written, or not understood.
        missing: named by a receipt, a list or the pointer, and not there.
        unexpected: there, and named by nothing. No damage: what a killed run left, or an older crawl or generation.
    """

    store: str
    files: int = 0
    bytes: int = 0
    damaged: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    unexpected: list[dict[str, str]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether everything that is trusted is what it was."""
        return not (self.damaged or self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"clean": self.clean}

    def lines(self) -> list[str]:
        """The same for a person."""
        lines = [f"store {self.store}: {self.files:,} files, {self.bytes:,} bytes re-read"]
        for kind in _PROBLEMS:
            problems = getattr(self, kind)
            lines += [f"{kind:<12} {item['path']}: {item['problem']}" for item in problems]
        if self.clean:
            lines.append("no damage found")
        else:
            lines.append(f"{len(self.damaged):,} damaged, {len(self.missing):,} missing")
        return lines


def verify(uri: str, report: Report, ray_address: str | None = None) -> Verified:
    """Re-read a store.

    Args:
        uri: its address.
        report: hears of the progress.
        ray_address: a cluster that helps where the store is large; by default that of ``RAY_ADDRESS``.

    Raises:
        UsageError: there is no ProbeLog store at this address.
    """
    store = Store(uri)
    listed: dict[str, int] = {}
    for folder in _KNOWN_FOLDERS:
        listed |= store.sizes(folder)
    if not listed:
        raise UsageError(f"{store.uri} is not a ProbeLog store: check the address")
    verifier = _Verifier(store, listed, report)
    if sum(listed.values()) < _SPREAD_BYTES or is_local(ray_address):
        return verifier.run()
    with session(ray_address):
        return verifier.run(spread=True)


class _Files:
    """Reads files, and notes what is wrong with them.

    Attributes:
        store: that they are in.
        problems: each with ``path`` and ``problem``, by their kinds.
        claimed: what something names.
        read: the files that were read, with their bytes.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.problems: dict[str, list[dict[str, str]]] = {kind: [] for kind in _PROBLEMS}
        self.claimed: set[str] = set()
        self.read: dict[str, int] = {}
        self._checked: set[Part] = set()
        self._lock = threading.Lock()

    def run(self, checks: Iterable[Check], progress: Callable[[], None] = lambda: None) -> None:
        """Several checks at a time."""
        with ThreadPoolExecutor(_READERS) as pool:
            pending: set[Future[object]] = set()
            for check in checks:
                pending.add(pool.submit(check, self))
                if len(pending) >= _WAITING:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    progress()
            for future in pending:
                future.result()

    def add(self, other: _Found) -> None:
        """What was found elsewhere; what two receipts name may have been read twice."""
        for kind, problems in other.problems.items():
            self.problems[kind] += [item for item in problems if item["path"] not in self.claimed]
        self.claimed |= other.claimed
        self.read |= other.read

    def receipt(self, folder: str, contents: Contents, name: str) -> None:
        """One receipt of a ledger with its parts, and what it counts against what they hold."""
        if self.json(name, RECEIPT_VERSION, "receipt") is None:
            return
        try:
            receipt = Ledger(self.store, folder, contents).receipt(
                name.rsplit("/", 1)[1].removesuffix(".json")
            )
        except (StoreError, FileNotFoundError) as error:
            self.note("damaged", name, str(error))
            return
        for part, schema in _ledger_parts(receipt, contents):
            self.part(name, part, schema)
        counts = receipt.counts
        if (
            counts.indexed != receipt.models.rows
            or counts.logits != receipt.rows.rows
            or sum(counts.failed.values()) != receipt.failures.rows
        ):
            self.note("damaged", name, "it counts other rows than its parts have")

    def bundle(self, folder: str, name: str, size: int) -> None:
        """Copies of receipts of a ledger."""
        with self._lock:
            self.claimed.add(name)
        self.count(name, size)
        try:
            Bundles(self.store, layout.LedgerFolder(folder)).read(name)
        except (StoreError, FileNotFoundError) as error:
            self.note("damaged", name, str(error))

    def passing(self, name: str, read: Callable[[bytes], object]) -> None:
        """What waits to be sealed, or published; what was since the listing is no longer there."""
        with self._lock:
            self.claimed.add(name)
        data = self.store.read_or_none(name)
        if data is None:
            return
        self.count(name, len(data))
        try:
            read(data)
        except StoreError as error:
            self.note("damaged", name, str(error))

    def json(self, name: str, known: int | None = None, what: str = "") -> dict[str, Any] | None:
        """A JSON object without its seal; None where it is damaged, which is then noted."""
        self.claimed.add(name)
        try:
            data = self.store.read(name)
            content = unsealed_json(data, name)
            if known is not None:
                check_version(content, known, name, what)
        except FileNotFoundError:
            self.note("missing", name, "it was removed while the store was read")
            return None
        except StoreError as error:
            self.note("damaged", name, str(error))
            return None
        self.count(name, len(data))
        return content

    def part(self, by: str, part: Part, schema: pa.Schema) -> None:
        """One Parquet file: its bytes, and that it is readable as what it should be."""
        with self._lock:
            # Parts of nightly runs are named by two receipts: theirs, and its copy in the main ledger.
            if part in self._checked:
                return
            self._checked.add(part)
        if not self.file(by, part.path, part.size, part.sha256):
            return
        try:
            with self.store.open(part.path) as source:
                metadata = pq.ParquetFile(source)
                check_schema(metadata.schema_arrow, schema, part.path)
                rows = metadata.metadata.num_rows
        except StoreError as error:
            self.note("damaged", part.path, str(error))
            return
        if rows != part.rows:
            self.note("damaged", part.path, f"it has {rows} rows, {by} says {part.rows}")

    def file(self, by: str, path: str, size: int, sha256: str) -> bool:
        """One file, of any kind; whether it is what it should be."""
        with self._lock:
            self.claimed.add(path)
        try:
            measured = self.store.measure(path)
        except FileNotFoundError:
            self.note("missing", path, f"{by} names it")
            return False
        except StoreError as error:
            self.note("damaged", path, str(error))
            return False
        self.count(path, measured[0])
        if measured == (size, sha256):
            return True
        what = "size" if measured[0] != size else "digest"
        self.note("damaged", path, f"its {what} is not the one in {by}")
        return False

    def count(self, path: str, size: int) -> None:
        """One file was read."""
        with self._lock:
            self.read[path] = size

    def note(self, kind: str, path: str, problem: str) -> None:
        """A problem of a kind (``_PROBLEMS``)."""
        with self._lock:
            self.problems[kind].append({"path": path, "problem": problem})


class _Found(NamedTuple):
    """What a worker found: the attributes of its `_Files`."""

    problems: dict[str, list[dict[str, str]]]
    claimed: set[str]
    read: dict[str, int]


def _run(checks: Sequence[Check], store: str) -> _Found:
    files = _Files(Store(store))
    files.run(checks)
    return _Found(files.problems, files.claimed, files.read)


class _Verifier:
    """One run over a store. What is claimed by a receipt is checked once; what nobody claims is unexpected."""

    def __init__(self, store: Store, listed: Mapping[str, int], report: Report) -> None:
        self._store, self._listed = store, listed
        self._reader = _Files(store)
        self._counter = report.counter("verify", len(listed), "files")

    def run(self, spread: bool = False) -> Verified:
        """Everything, by threads, or by workers on Ray."""
        if spread:
            for found in in_order(_run, _batches(self._checks()), [self._store.uri]):
                self._reader.add(found)
                self._count()
        else:
            self._reader.run(self._checks(), self._count)
        for name in sorted(self._listed.keys() - self._reader.claimed):
            self._reader.note("unexpected", name, _why_unexpected(name))
        problems = self._reader.problems
        for kind in ("damaged", "missing"):
            problems[kind].sort(key=lambda item: item["path"])
        self._count()
        self._counter.show(final=True)
        read = self._reader.read
        return Verified(self._store.uri, len(read), sum(read.values()), **problems)

    def _count(self) -> None:
        self._counter.add(len(self._reader.read) - self._counter.good)

    def _checks(self) -> Iterator[Check]:
        """What is to be read, found through what names it."""
        yield from self._catalogues()
        yield from self._probe_sets()
        yield from self._ledgers()
        yield from self._nightly_records()
        yield from self._completions()
        yield from self._trees()
        yield from self._encoders()
        yield from self._index()
        for name in self._below(f"{layout.PIECES}/"):
            yield methodcaller("passing", name, read_piece)
        yield from self._reports()
        for name in self._below(f"{layout.RUNS}/"):
            self._reader.json(name, FIGURES_VERSION, "figures of a run")

    # The stages

    def _catalogues(self) -> Iterator[Check]:
        for name in self._names(layout.CATALOGUES, layout.RECEIPT, layout.PROGRESS):
            content = self._reader.json(name, CRAWL_VERSION, "crawl")
            if content is not None:
                for kind, schema in (("rows", CATALOGUE), ("failures", FAILURES)):
                    yield from self._parts(name, content.get(kind, []), schema)

    def _probe_sets(self) -> Iterator[Check]:
        for name in self._below(layout.made_probe_set("").removesuffix(".json")):
            self._reader.json(name)
        for name in self._names(layout.PROBE_SETS, layout.MANIFEST):
            content = self._reader.json(name, probe_set.VERSION, "probe set")
            folder = name.rsplit("/", 1)[0]
            if content is None:
                self._reader.claimed.update(self._below(f"{folder}/"))
                continue
            items = [
                item | {"path": f"{folder}/{item['name']}"} for item in _objects(content.get("files", []))
            ]
            for item in items:
                schema = probe_set.THUMBNAILS if "thumbnail" in item["path"] else probe_set.IMAGES
                yield from self._parts(name, [item], schema)
            for receipt in self._below(f"{folder}/embeddings-"):
                if receipt.endswith(".json") and (facts := self._reader.json(receipt)) is not None:
                    part = facts | {"path": receipt.removesuffix(".json") + ".parquet"}
                    schema = probe_set.embeddings_schema(int(facts.get("dimension", 0)))
                    yield from self._parts(receipt, [part], schema)

    def _ledgers(self) -> Iterator[Check]:
        manifests = {
            name: kind.contents for kind in KINDS for name in self._names(kind.ledgers, layout.MANIFEST)
        }
        weights = [name for name in self._below(layout.tree_weights("")) if name.count("/") == 3]
        manifests |= {name: PROBED for name in weights if name.endswith(f"/{layout.MANIFEST}")}
        for manifest, contents in manifests.items():
            self._reader.json(manifest, LEDGER_VERSION, "ledger")
            ledger = Ledger(self._store, manifest.rsplit("/", 1)[0], contents)
            paths = ledger.paths
            for name in self._below(f"{paths.receipts}/"):
                yield methodcaller("receipt", ledger.folder, contents, name)
            for name in self._below(f"{paths.bundles}/"):
                yield methodcaller("bundle", ledger.folder, name, self._listed[name])
            for name in self._below(f"{paths.runs}/"):
                self._reader.json(name)
            summary = self._reader.json(paths.summary) if paths.summary in self._listed else None
            for receipt in (summary or {}).get("sealed", {}):
                self._expect(paths.receipt(receipt), paths.summary)
            for name in self._below(f"{paths.spool}/"):
                yield methodcaller("passing", name, partial(ItemResult.from_bytes, contents=contents))

    def _nightly_records(self) -> Iterator[Check]:
        for name in self._names(layout.LEDGERS, layout.NIGHTLY_RECORD):
            content = self._reader.json(name, RECORD_VERSION, "record of nightly runs")
            if content is not None and content.get("rows") is not None:
                yield from self._parts(name, [content["rows"]], CATALOGUE)

    def _completions(self) -> Iterator[Check]:
        for name in self._names(layout.COMPLETIONS, layout.RECEIPT):
            content = self._reader.json(name, DESCRIPTORS_VERSION, "completion")
            if content is None:
                continue
            parts = content.get("parts", {})
            ledger = layout.LedgerFolder.of(str(content.get("observations")))
            for receipt in parts:
                self._expect(ledger.receipt(receipt), name)
            yield from self._parts(name, parts.values(), DESCRIPTORS)
            yield from self._files(name, content)

    def _trees(self) -> Iterator[Check]:
        for name in self._below(f"{layout.TREES}/"):
            folder = layout.TreesFolder.of(name.split("/")[1])
            if name != folder.receipt and not name.startswith(f"{folder.batches}/"):
                continue
            content = self._reader.json(name, TREES_VERSION, "recovery of model trees")
            if content is None:
                continue
            batches = list(_objects(content.get("batches", [])))
            for batch in batches:
                yield from self._parts(name, batch.get("families", []), FAMILIES)
                yield from self._parts(name, [batch.get("models")], TREE_MODELS)
                yield from self._parts(name, [batch.get("edges")], EDGES)
            if name == folder.receipt:
                yield from self._parts(name, [content.get("models")], TREE_MODELS)
                yield from self._parts(name, [content.get("edges")], EDGES)

    def _encoders(self) -> Iterator[Check]:
        for name in self._names(layout.ENCODERS, layout.RECEIPT):
            content = self._reader.json(name, encoder.EXPORT_RECEIPT_VERSION, "exported encoder")
            if content is not None:
                yield from self._files(name, content)

    def _index(self) -> Iterator[Check]:
        index = self._store.child(layout.INDEX)
        name = f"{layout.INDEX}/{layout.POINTER}"
        self._reader.claimed.add(name)
        try:
            pointer, data = read_pointer(index)
        except IndexNotFoundError:
            return
        except StoreError as error:
            self._reader.claimed.update(self._below(f"{layout.INDEX}/"))
            self._reader.note("damaged", name, str(error))
            return
        self._reader.count(name, len(data))
        for name, files in _generations(pointer).items():
            yield from self._generation(index, name, files)

    def _reports(self) -> Iterator[Check]:
        """The quality gate's: each JSON object describes its page."""
        for name in [path for path in self._below(f"{layout.REPORTS}/") if path.endswith(".json")]:
            content = self._reader.json(name, REPORT_VERSION, "quality report")
            if content is not None:
                page = content["page"]
                yield methodcaller("file", name, page_of(name), int(page["size"]), str(page["sha256"]))

    def _generation(self, index: Store, name: str, expected: str) -> Iterator[Check]:
        folder = layout.GenerationFolder(f"{layout.INDEX}/{layout.GenerationFolder.of(name).path}")
        self._reader.claimed |= {folder.files, folder.hold}
        try:
            files, _ = read_files(index, name, expected)
        except FileNotFoundError:
            self._reader.note("missing", folder.files, "the pointer names it")
            return
        except StoreError as error:
            self._reader.claimed.update(self._below(folder.file("")))
            self._reader.note("damaged", folder.files, str(error))
            return
        self._reader.count(folder.files, self._listed.get(folder.files, 0))
        for path, (size, sha256) in files.items():
            yield methodcaller("file", folder.files, folder.file(path), size, sha256)

    # Files

    def _names(self, folder: str, *last: str) -> list[str]:
        return [path for path in self._below(f"{folder}/") if path.count("/") == 2 and path.endswith(last)]

    def _below(self, start: str) -> list[str]:
        return [path for path in self._listed if path.startswith(start)]

    def _expect(self, name: str, by: str) -> None:
        if name not in self._listed and not self._store.exists(name):
            self._reader.note("missing", name, f"{by} names it")

    def _parts(self, by: str, parts: Iterable[Any], schema: pa.Schema) -> Iterator[Check]:
        for item in _objects(parts):
            try:
                part = Part(str(item["path"]), int(item["rows"]), int(item["size"]), str(item["sha256"]))
            except (KeyError, TypeError, ValueError) as error:
                self._reader.note("damaged", by, f"a part is described without {error}")
                continue
            yield methodcaller("part", by, part, schema)

    def _files(self, receipt: str, content: Mapping[str, Any]) -> Iterator[Check]:
        """What is no Parquet, beside the receipt that lists it."""
        folder = receipt.rsplit("/", 1)[0]
        for path, item in content.get("files", {}).items():
            yield methodcaller("file", receipt, f"{folder}/{path}", int(item["size"]), str(item["sha256"]))


def _batches(checks: Iterable[Check]) -> Iterator[list[Check]]:
    while batch := list(itertools.islice(checks, _CHECKS_AT_ONCE)):
        yield batch


def _objects(items: Iterable[Any]) -> Iterator[dict[str, Any]]:
    return (item for item in items if isinstance(item, dict))


def _ledger_parts(receipt: Receipt, contents: Contents) -> Iterator[tuple[Part, pa.Schema]]:
    parts = (receipt.rows, receipt.models, receipt.failures, receipt.weights)
    return zip(parts, contents.schemas.values(), strict=True)


def _generations(pointer: Pointer) -> dict[str, str]:
    """The generations that the pointer names, and the digests of their lists of files."""
    generations: dict[str, str] = {}
    for item in pointer.kept_facts:
        generations[str(item["generation"])] = str(item["files"])
        if item.get("base") is not None:
            generations.setdefault(str(item["base"]), str(item["base_files"]))
    return generations


def _why_unexpected(name: str) -> str:
    kind, *rest = name.split("/")
    if kind == layout.CATALOGUES:
        return "of an earlier crawl, or of one that was killed"
    if kind == layout.INDEX and rest[:1] == [layout.GENERATIONS]:
        return "of a generation that the pointer does not name (any more, or not yet)"
    return "nothing names it: left by a run that was killed"
