"""``probelog-index verify``: re-read everything in a store and name what is damaged, missing or not accounted for.

Whatever a later stage or a client would trust is checked against what was written down when it was made: parts
against their receipts (size, SHA-256, rows), JSON against its own seal, a generation's files against its list, the
list against the pointer, receipts against each other (those that a completion, a plan's sums or a catalogue names must
be there). Files are hashed in parallel, a few megabytes at a time: memory does not grow with the store.

Not checked, because nothing rests on them: temporary files and locks (``.tmp-*``); the parts of a crawl before the
last one, and generations that the pointer does not name (both are reported as unexpected, and removed by the stages
that made them); ``hold.json`` of a generation that is being built.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


Check = Callable[[], object]
"""Reads one thing and notes what is wrong with it."""


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
        for kind in ("damaged", "missing", "unexpected"):
            problems = getattr(self, kind)
            lines += [f"{kind:<12} {item['path']}: {item['problem']}" for item in problems]
        if self.clean:
            lines.append("no damage found")
        else:
            lines.append(f"{len(self.damaged):,} damaged, {len(self.missing):,} missing")
        return lines


def verify(uri: str, report: Report) -> Verified:
    """Re-read a store.

    Raises:
        UsageError: there is no ProbeLog store at this address.
    """
    store = Store(uri)
    listed: dict[str, int] = {}
    for folder in _KNOWN_FOLDERS:
        listed |= store.sizes(folder)
    if not listed:
        raise UsageError(f"{store.uri} is not a ProbeLog store: check the address")
    return _Verifier(store, listed, report).run()


class _Verifier:
    """One run over a store. What is claimed by a receipt is checked once; what nobody claims is unexpected."""

    def __init__(self, store: Store, listed: Mapping[str, int], report: Report) -> None:
        self._store, self._listed = store, listed
        self._found = Verified(store.uri)
        self._claimed: set[str] = set()
        self._checked: set[Part] = set()
        self._lock = threading.Lock()
        self._counter = report.counter("verify", len(listed), "files")

    def run(self) -> Verified:
        """Everything, in parallel."""
        with ThreadPoolExecutor(_READERS) as pool:
            pending: set[Future[object]] = set()
            for check in self._checks():
                pending.add(pool.submit(check))
                if len(pending) >= _WAITING:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in pending:
                future.result()
        for name in sorted(self._listed.keys() - self._claimed):
            self._note("unexpected", name, _why_unexpected(name))
        for problems in (self._found.damaged, self._found.missing):
            problems.sort(key=lambda item: item["path"])
        self._counter.show(final=True)
        return self._found

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
            yield partial(self._passing, name, read_piece)
        yield from self._reports()
        for name in self._below(f"{layout.RUNS}/"):
            self._json(name, FIGURES_VERSION, "figures of a run")

    # The stages

    def _catalogues(self) -> Iterator[Check]:
        for name in self._names(layout.CATALOGUES, layout.RECEIPT, layout.PROGRESS):
            content = self._json(name, CRAWL_VERSION, "crawl")
            if content is not None:
                for kind, schema in (("rows", CATALOGUE), ("failures", FAILURES)):
                    yield from self._parts(name, content.get(kind, []), schema)

    def _probe_sets(self) -> Iterator[Check]:
        for name in self._below(layout.made_probe_set("").removesuffix(".json")):
            self._json(name)
        for name in self._names(layout.PROBE_SETS, layout.MANIFEST):
            content = self._json(name, probe_set.VERSION, "probe set")
            folder = name.rsplit("/", 1)[0]
            if content is None:
                self._claimed.update(self._below(f"{folder}/"))
                continue
            items = [
                item | {"path": f"{folder}/{item['name']}"} for item in _objects(content.get("files", []))
            ]
            for item in items:
                schema = probe_set.THUMBNAILS if "thumbnail" in item["path"] else probe_set.IMAGES
                yield from self._parts(name, [item], schema)
            for receipt in self._below(f"{folder}/embeddings-"):
                if receipt.endswith(".json") and (facts := self._json(receipt)) is not None:
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
            self._json(manifest, LEDGER_VERSION, "ledger")
            ledger = Ledger(self._store, manifest.rsplit("/", 1)[0], contents)
            paths = ledger.paths
            for name in self._below(f"{paths.receipts}/"):
                yield partial(self._receipt, ledger, name)
            for name in self._below(f"{paths.bundles}/"):
                yield partial(self._bundle, ledger, name)
            for name in self._below(f"{paths.runs}/"):
                self._json(name)
            summary = self._json(paths.summary) if paths.summary in self._listed else None
            for receipt in (summary or {}).get("sealed", {}):
                self._expect(paths.receipt(receipt), paths.summary)
            for name in self._below(f"{paths.spool}/"):
                yield partial(self._passing, name, partial(ItemResult.from_bytes, contents=contents))

    def _nightly_records(self) -> Iterator[Check]:
        for name in self._names(layout.LEDGERS, layout.NIGHTLY_RECORD):
            content = self._json(name, RECORD_VERSION, "record of nightly runs")
            if content is not None and content.get("rows") is not None:
                yield from self._parts(name, [content["rows"]], CATALOGUE)

    def _receipt(self, ledger: Ledger, name: str) -> None:
        """One receipt with its parts, and what it counts against what they hold."""
        if self._json(name, RECEIPT_VERSION, "receipt") is None:
            return
        try:
            receipt = ledger.receipt(name.rsplit("/", 1)[1].removesuffix(".json"))
        except (StoreError, FileNotFoundError) as error:
            self._note("damaged", name, str(error))
            return
        for part, schema in _ledger_parts(receipt, ledger.contents):
            self._part(name, part, schema)
        counts = receipt.counts
        if (
            counts.indexed != receipt.models.rows
            or counts.logits != receipt.rows.rows
            or sum(counts.failed.values()) != receipt.failures.rows
        ):
            self._note("damaged", name, "it counts other rows than its parts have")

    def _bundle(self, ledger: Ledger, name: str) -> None:
        with self._lock:
            self._claimed.add(name)
        self._count(self._listed[name])
        try:
            Bundles(ledger.store, ledger.paths).read(name)
        except (StoreError, FileNotFoundError) as error:
            self._note("damaged", name, str(error))

    def _passing(self, name: str, read: Callable[[bytes], object]) -> None:
        """What waits to be sealed, or published; what was since the listing is no longer there."""
        with self._lock:
            self._claimed.add(name)
        data = self._store.read_or_none(name)
        if data is None:
            return
        self._count(len(data))
        try:
            read(data)
        except StoreError as error:
            self._note("damaged", name, str(error))

    def _completions(self) -> Iterator[Check]:
        for name in self._names(layout.COMPLETIONS, layout.RECEIPT):
            content = self._json(name, DESCRIPTORS_VERSION, "completion")
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
            content = self._json(name, TREES_VERSION, "recovery of model trees")
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
            content = self._json(name, encoder.EXPORT_RECEIPT_VERSION, "exported encoder")
            if content is not None:
                yield from self._files(name, content)

    def _index(self) -> Iterator[Check]:
        index = self._store.child(layout.INDEX)
        name = f"{layout.INDEX}/{layout.POINTER}"
        self._claimed.add(name)
        try:
            pointer, data = read_pointer(index)
        except IndexNotFoundError:
            return
        except StoreError as error:
            self._claimed.update(self._below(f"{layout.INDEX}/"))
            self._note("damaged", name, str(error))
            return
        self._count(len(data))
        for name, files in _generations(pointer).items():
            yield from self._generation(index, name, files)

    def _reports(self) -> Iterator[Check]:
        """The quality gate's: each JSON object describes its page."""
        for name in [path for path in self._below(f"{layout.REPORTS}/") if path.endswith(".json")]:
            content = self._json(name, REPORT_VERSION, "quality report")
            if content is not None:
                page = content["page"]
                yield partial(self._bytes, name, page_of(name), int(page["size"]), str(page["sha256"]))

    def _generation(self, index: Store, name: str, expected: str) -> Iterator[Check]:
        folder = layout.GenerationFolder(f"{layout.INDEX}/{layout.GenerationFolder.of(name).path}")
        self._claimed |= {folder.files, folder.hold}
        try:
            files, _ = read_files(index, name, expected)
        except FileNotFoundError:
            self._note("missing", folder.files, "the pointer names it")
            return
        except StoreError as error:
            self._claimed.update(self._below(folder.file("")))
            self._note("damaged", folder.files, str(error))
            return
        self._count(self._listed.get(folder.files, 0))
        for path, (size, sha256) in files.items():
            yield partial(self._bytes, folder.files, folder.file(path), size, sha256)

    # Files

    def _names(self, folder: str, *last: str) -> list[str]:
        return [path for path in self._below(f"{folder}/") if path.count("/") == 2 and path.endswith(last)]

    def _below(self, start: str) -> list[str]:
        return [path for path in self._listed if path.startswith(start)]

    def _json(self, name: str, known: int | None = None, what: str = "") -> dict[str, Any] | None:
        """A JSON object without its seal; None where it is damaged, which is then noted."""
        self._claimed.add(name)
        try:
            data = self._store.read(name)
            content = unsealed_json(data, name)
            if known is not None:
                check_version(content, known, name, what)
        except FileNotFoundError:
            self._note("missing", name, "it was removed while the store was read")
            return None
        except StoreError as error:
            self._note("damaged", name, str(error))
            return None
        self._count(len(data))
        return content

    def _expect(self, name: str, by: str) -> None:
        if name not in self._listed and not self._store.exists(name):
            self._note("missing", name, f"{by} names it")

    def _parts(self, by: str, parts: Iterable[Any], schema: pa.Schema) -> Iterator[Check]:
        for item in _objects(parts):
            try:
                part = Part(str(item["path"]), int(item["rows"]), int(item["size"]), str(item["sha256"]))
            except (KeyError, TypeError, ValueError) as error:
                self._note("damaged", by, f"a part is described without {error}")
                continue
            yield partial(self._part, by, part, schema)

    def _files(self, receipt: str, content: Mapping[str, Any]) -> Iterator[Check]:
        """What is no Parquet, beside the receipt that lists it."""
        folder = receipt.rsplit("/", 1)[0]
        for path, item in content.get("files", {}).items():
            yield partial(self._bytes, receipt, f"{folder}/{path}", int(item["size"]), str(item["sha256"]))

    def _part(self, by: str, part: Part, schema: pa.Schema) -> None:
        """One Parquet file: its bytes, and that it is readable as what it should be."""
        with self._lock:
            # Parts of nightly runs are named by two receipts: theirs, and its copy in the main ledger.
            if part in self._checked:
                return
            self._checked.add(part)
        if not self._bytes(by, part.path, part.size, part.sha256):
            return
        try:
            with self._store.open(part.path) as source:
                metadata = pq.ParquetFile(source)
                check_schema(metadata.schema_arrow, schema, part.path)
                rows = metadata.metadata.num_rows
        except StoreError as error:
            self._note("damaged", part.path, str(error))
            return
        if rows != part.rows:
            self._note("damaged", part.path, f"it has {rows} rows, {by} says {part.rows}")

    def _bytes(self, by: str, path: str, size: int, sha256: str) -> bool:
        with self._lock:
            self._claimed.add(path)
        try:
            measured = self._store.measure(path)
        except FileNotFoundError:
            self._note("missing", path, f"{by} names it")
            return False
        except StoreError as error:
            self._note("damaged", path, str(error))
            return False
        self._count(measured[0])
        if measured == (size, sha256):
            return True
        what = "size" if measured[0] != size else "digest"
        self._note("damaged", path, f"its {what} is not the one in {by}")
        return False

    def _count(self, size: int) -> None:
        with self._lock:
            self._found.files += 1
            self._found.bytes += size
            self._counter.add()

    def _note(self, kind: str, path: str, problem: str) -> None:
        with self._lock:
            getattr(self._found, kind).append({"path": path, "problem": problem})


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
