"""Probe sets: the fixed, ordered images that every model is run on, with their embeddings.

Layout below ``probes/<first 16 digits of the hash>/`` of a store: ``images-NNNNN.parquet`` (the original bytes,
in parts of about 32 MiB), ``thumbnails.parquet`` (facts and small pictures), ``embeddings-<encoder>.parquet``
with a receipt beside each, and ``manifest.json``, written last: a set without it does not exist.

Identity: a probe is the SHA-256 of its stored bytes, which no decoder's version can change; a set is the hash
over those in order, so that it depends neither on names, nor on where the images came from, nor on the encoder.
Duplicates are found by the decoded RGB pixels, so that the same picture saved twice counts once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from probelog.arrays import values_of
from probelog.encoders.decoding import UnreadableImageError, decode
from probelog.errors import StoreError, UsageError
from probelog.probes.selection import Chosen, Selection
from probelog.probes.sources import LeftOut, ProbeReport, SourceFile, candidates, source_files
from probelog.storage import layout
from probelog.storage.encoding import digest, parquet_bytes, short_key
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_schema, check_version, schema_metadata

if TYPE_CHECKING:
    from probelog.encoders.torch_encoder import Encoder

VERSION = 1
_PART_BYTES = 32 << 20
_LISTED = 1000
_PARTS_IN_MEMORY = 2

# The share of a model's probes that all models see (docs/results.md, "Probes in common").
COMMON = 0.75

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done (``images``, ``embeddings``), how many are done and, if known, of how many."""


def _fields(name: str, fields: list[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema(fields, metadata=schema_metadata(name, VERSION))


_FACTS: list[tuple[str, pa.DataType]] = [
    ("id", pa.int32()),
    ("name", pa.string()),
    ("sha256", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
]
IMAGES = _fields("probe-images", [*_FACTS, ("bytes", pa.binary())])
THUMBNAILS = _fields("probe-thumbnails", [*_FACTS, ("thumbnail", pa.binary())])


def embeddings_schema(dimension: int) -> pa.Schema:
    """Rows of ``embeddings-<encoder>.parquet``: one unit vector a probe, in the set's order."""
    return _fields("probe-embeddings", [("id", pa.int32()), ("embedding", pa.list_(pa.float32(), dimension))])


class ImageEmbedder(Protocol):
    """What embeds a set's probes: an encoder, or what prepares pictures for one."""

    @property
    def digest(self) -> str:
        """Equal for what embeds alike."""

    def embed_images(
        self, images: Iterable[Image.Image], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Embeddings (n, d) of unit length."""


class ProbeSet:
    """A finished probe set in a store. Opened with `ProbeSet.open`, made with `make_probe_set`.

    Files are read when first needed, and their digests checked whenever they are read. Thread-safe.
    """

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self._root = store
        self._store = store.child(layout.ProbeSetFolder.of(manifest["hash"]).path)
        self._manifest = manifest
        self._files = {item["name"]: item for item in manifest["files"]}
        self._parts = [item for item in manifest["files"] if "first" in item]
        self._first = np.array([item["first"] for item in self._parts])
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ProbeSet({self.hash[:16]!r}, count={self.count})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ProbeSet, (self._root, self._manifest)

    @classmethod
    def open(cls, store: Store, key: str) -> ProbeSet:
        """Open a set by its hash, or by the first 16 digits of it.

        Raises:
            UsageError: the store has no such set, or its making was interrupted.
            SchemaVersionError: made by a newer ProbeLog.
            StoreError: its manifest is damaged.
        """
        manifest = _manifest_or_none(store, key[:16])
        if manifest is None or not manifest["hash"].startswith(key):
            raise UsageError(
                f"{store.uri} has no probe set {key!r}. Make one with `probelog-index probes SOURCE --store "
                f"{store.uri}`; one whose making was interrupted is finished by the same command."
            )
        return cls(store, manifest)

    @property
    def hash(self) -> str:
        """The set's identity, 64 hexadecimal digits: part of every key downstream."""
        return str(self._manifest["hash"])

    @property
    def count(self) -> int:
        """Number of probes, n."""
        return int(self._manifest["count"])

    def __len__(self) -> int:
        return self.count

    @property
    def left_out_counts(self) -> dict[LeftOut, int]:
        """How many images of the source were left out, by reason."""
        return {LeftOut(reason): int(count) for reason, count in self._manifest["left_out"].items()}

    @property
    def left_out(self) -> list[ProbeReport]:
        """The images that were left out (the first thousand)."""
        return [
            ProbeReport(row["source"], LeftOut(row["reason"]), row["detail"])
            for row in self._manifest["left_out_listed"]
        ]

    def facts(self) -> pa.Table:
        """Columns id, name, sha256, width, height (of the original), in the set's order.

        Raises:
            StoreError: the file is damaged, or is not this set's.
        """
        return self._thumbnail_table().drop_columns(["thumbnail"])

    def thumbnails(self) -> list[bytes]:
        """Every probe as a small WebP file (at most `THUMBNAIL_SIDE` pixels a side), in the set's order."""
        return values_of(self._thumbnail_table()["thumbnail"], bytes)

    def image_bytes(self, index: int) -> bytes:
        """The original file of one probe. Raises IndexError where there is none of this number."""
        if not 0 <= index < self.count:
            raise IndexError(f"the set has probes 0 to {self.count - 1}, not {index}")
        part = self._parts[int(np.searchsorted(self._first, index, side="right")) - 1]
        table = self._table(part["name"])
        data: bytes = table["bytes"][index - part["first"]].as_py()
        return data

    def image(self, index: int) -> Image.Image:
        """One probe as an RGB image of its original size. Raises IndexError, and StoreError where damaged."""
        try:
            return decode(self.image_bytes(index))
        except UnreadableImageError as error:
            raise StoreError(
                f"probe {index} of set {self.hash[:16]} cannot be decoded here ({error}), but could be where the "
                "set was made: compare the versions of Pillow"
            ) from error

    def images(self, indices: Iterable[int] | None = None) -> Iterator[Image.Image]:
        """Probes as RGB images, decoded one at a time; all of them in order by default."""
        return (self.image(int(index)) for index in (range(self.count) if indices is None else indices))

    def has_embeddings(self, encoder_digest: str) -> bool:
        """Whether the set carries the embeddings of this encoder."""
        return self._store.exists(layout.ProbeSetFolder.embeddings(encoder_digest, "json"))

    def embeddings(self, encoder_digest: str) -> NDArray[np.float32]:
        """The probes' embeddings (n, d) by one encoder, of unit length.

        Raises:
            UsageError: this encoder has not embedded the set.
            StoreError: the file is damaged.
        """
        try:
            receipt = self._store.read_json(layout.ProbeSetFolder.embeddings(encoder_digest, "json"))
        except FileNotFoundError:
            raise UsageError(
                f"probe set {self.hash[:16]} has no embeddings by encoder {encoder_digest[:16]}. "
                "Run `probelog-index probes` with that encoder to add them."
            ) from None
        name = layout.ProbeSetFolder.embeddings(encoder_digest, "parquet")
        if receipt.get("encoder") != encoder_digest or receipt.get("hash") != self.hash:
            raise StoreError(f"{self._store.path(name)}: its receipt is for another encoder or probe set")
        table = self._read(name, receipt, embeddings_schema(int(receipt["dimension"])))
        flat = pc.list_flatten(table["embedding"].combine_chunks()).to_numpy()
        return np.asarray(flat, np.float32).reshape(len(table), int(receipt["dimension"]))

    def add_embeddings(self, encoder: ImageEmbedder, progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed every probe with an encoder and keep the result; embeddings that are there are only read."""
        if self.has_embeddings(encoder.digest):
            return self.embeddings(encoder.digest)
        tell = _silent if progress is None else progress
        rows = encoder.embed_images(self.images(), progress=lambda done: tell("embeddings", done, self.count))
        schema = embeddings_schema(rows.shape[1])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        table = pa.table([pa.array(range(self.count), pa.int32()), vectors], schema=schema)
        written = _write(self._store, layout.ProbeSetFolder.embeddings(encoder.digest, "parquet"), table)
        self._store.write_json(
            layout.ProbeSetFolder.embeddings(encoder.digest, "json"),
            written | {"encoder": encoder.digest, "dimension": rows.shape[1], "hash": self.hash},
        )
        return rows

    def _thumbnail_table(self) -> pa.Table:
        table = self._table(layout.THUMBNAILS)
        if _set_hash(values_of(table["sha256"], str)) != self.hash:
            raise StoreError(
                f"{self._store.path(layout.THUMBNAILS)} belongs to another probe set than its manifest"
            )
        return table

    def _table(self, name: str) -> pa.Table:
        with self._lock:
            if name in self._tables:
                self._tables.move_to_end(name)
                return self._tables[name]
        table = self._read(name, self._files[name], THUMBNAILS if name == layout.THUMBNAILS else IMAGES)
        with self._lock:
            self._tables[name] = table
            while len(self._tables) > _PARTS_IN_MEMORY:
                self._tables.popitem(last=False)
        return table

    def _read(self, name: str, receipt: dict[str, Any], schema: pa.Schema) -> pa.Table:
        where = self._store.path(name)
        try:
            data = self._store.read(name)
        except FileNotFoundError as error:
            raise StoreError(
                f"{where} is missing although the set is complete. Make the set again."
            ) from error
        if digest(data) != receipt["sha256"]:
            raise StoreError(
                f"{where} is not what was written (wrong SHA-256). Delete the folder and make it again."
            )
        table = pq.read_table(pa.BufferReader(data))
        check_schema(table.schema, schema, where)
        return table


def make_probe_set(
    source: str,
    count: int | None,
    seed: int,
    store: Store,
    encoder: Encoder,
    progress: Progress | None = None,
) -> ProbeSet:
    """Choose ``count`` images (all of them if None) from a source and keep them as a probe set with embeddings.

    The choice takes the images with the smallest SHA-256 of (seed, content): it depends on nothing but the
    contents, and a larger count with the same seed extends a smaller one. A run that finds its work done (the
    source's files unchanged in name, size and date) does nothing; a killed one starts again.

    Args:
        source: a folder of images (searched recursively; names that begin with a dot and links that lead
            outside are left alone) which may hold Parquet files too; a Parquet file, or a pattern like
            ``data/*.parquet``, with a column in the Hub's image format; or ``hf://datasets/OWNER/NAME/PATTERN``.
        count: how many probes.
        seed: which ones, and in which order.
        store: where the set is kept, below ``probes/``.
        encoder: embeds the set; more encoders can be added later.
        progress: see `Progress`.

    Raises:
        UsageError: no such source, or fewer usable images than asked for, with counts.
        ProbeLogError: the Hub cannot be reached.
    """
    if count is not None and count < 1:
        raise UsageError(f"a probe set needs at least one image, not {count}")
    tell = _silent if progress is None else progress
    files, skipped = source_files(source)
    made = _made_name(source, count, seed, files)
    if (existing := _made_before(store, made)) is not None:
        existing.add_embeddings(encoder, progress)
        return existing
    encoder.digest  # noqa: B018 - an encoder that is not there is refused before the images are read
    with tempfile.TemporaryDirectory(prefix="probelog-") as spool:
        selection = Selection(seed, count, Path(spool))
        for report in skipped:
            selection.leave_out(None, report)
        for number, (name, content) in enumerate(candidates(files), start=1):
            if isinstance(content, ProbeReport):
                selection.leave_out(None, content)
            else:
                selection.offer(name, content)
            tell("images", number, None)
        chosen, reports = selection.result()
        _check_enough(source, count, len(chosen), selection.seen, reports)
        probe_set = _written(store, source, seed, encoder, chosen, reports, selection, progress)
    store.write_json(made, {"hash": probe_set.hash})
    return probe_set


def find_probe_set(source: str, count: int | None, seed: int, store: Store) -> ProbeSet | None:
    """What `make_probe_set` made of these arguments before; None where it has yet to.

    Raises:
        UsageError: no such source.
    """
    return _made_before(store, _made_name(source, count, seed, source_files(source)[0]))


def _made_name(source: str, count: int | None, seed: int, files: Sequence[SourceFile]) -> str:
    listing = [[file.name, file.size, file.version] for file in files]
    return layout.made_probe_set(short_key(VERSION, source, count, seed, json.dumps(listing)))


def _made_before(store: Store, made: str) -> ProbeSet | None:
    record = store.read_json_or_none(made)
    key = None if record is None else str(record["hash"])
    if key is None or _manifest_or_none(store, key[:16]) is None:
        return None
    return ProbeSet.open(store, key)


def subset(
    probe_set_hash: str, repo: str, sha: str, seed: int, fraction: float, n: int, common: float = COMMON
) -> NDArray[np.int32]:
    """Which probes one model sees: ``max(1, round(fraction * n))`` indices out of ``0..n-1``, ascending.

    The share ``common`` of them is drawn for all models alike, the rest for this one. What chance makes of common ones it
    makes for every model, so that it hardly counts where models are compared; with their own ones all models together
    see all probes, which completion needs.

    A pure function, so that no worker has to be told: the probes are ranked by the raw stream of a Philox
    generator (raw streams are fixed across numpy versions; distributions are not), keyed by the SHA-256 of set and seed,
    and ranked again with the model in the key. The first of the common ranking are taken, then the first of the model's
    own that are left. Neither ranking depends on the fraction, so a smaller fraction's subset lies within a larger one's.

    Raises:
        UsageError: fraction outside (0, 1], or n below 1.
    """
    shared = common_probes(probe_set_hash, seed, fraction, n, common)
    own = _ranking(n, probe_set_hash, repo, sha, seed)
    rest = own[~np.isin(own, shared)][: _size(fraction, n) - len(shared)]
    return np.sort(np.concatenate([shared, rest])).astype(np.int32)


def common_probes(
    probe_set_hash: str, seed: int, fraction: float, n: int, common: float = COMMON
) -> NDArray[np.int32]:
    """Those probes of ``subset`` that all models see, ascending."""
    return np.sort(_ranking(n, probe_set_hash, seed)[: int(common * _size(fraction, n))]).astype(np.int32)


def _size(fraction: float, n: int) -> int:
    if not 0 < fraction <= 1:
        raise UsageError(f"the fraction of probes must be over 0 and at most 1, not {fraction}")
    if n < 1:
        raise UsageError(f"a subset of {n} probes has no meaning")
    return max(1, round(fraction * n))


def _ranking(n: int, *key: str | int) -> NDArray[np.int64]:
    """The numbers 0..n-1 in an order that the key alone decides: (n,)."""
    digits = hashlib.sha256(json.dumps(key).encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digits[:16], "big")).random_raw(n)
    return np.argsort(draws, kind="stable")


def _check_enough(
    source: str, count: int | None, usable: int, seen: int, reports: Sequence[ProbeReport]
) -> None:
    if usable >= (count or 1):
        return
    why = ", ".join(f"{number} {reason}" for reason, number in _counts(reports).items())
    raise UsageError(
        f"{source}: {usable} usable images of {seen} found, {count or 1} needed"
        + (f" (left out: {why})" if why else "")
        + ". Ask for fewer with -n, or add images."
    )


def _counts(reports: Sequence[ProbeReport]) -> dict[str, int]:
    return dict(sorted(Counter(report.reason.value for report in reports).items()))


def _written(
    store: Store,
    source: str,
    seed: int,
    encoder: Encoder,
    chosen: Sequence[Chosen],
    reports: Sequence[ProbeReport],
    selection: Selection,
    progress: Progress | None,
) -> ProbeSet:
    set_hash = _set_hash([item.sha256 for item in chosen])
    if (manifest := _manifest_or_none(store, set_hash[:16])) is not None:
        probe_set = ProbeSet(store, manifest)
        probe_set.add_embeddings(encoder, progress)
        return probe_set
    folder = store.child(layout.ProbeSetFolder.of(set_hash).path)
    files = [
        _write(folder, layout.ProbeSetFolder.images(number), table) | {"first": table["id"][0].as_py()}
        for number, table in enumerate(_image_parts(chosen, selection.spool))
    ]
    thumbnails = [(selection.spool / f"{item.sha256}.webp").read_bytes() for item in chosen]
    files.append(_write(folder, layout.THUMBNAILS, _fact_table(chosen, 0, thumbnails, THUMBNAILS)))
    manifest = {
        "kind": "probe-set",
        "version": VERSION,
        "made_by": MADE_BY,
        "hash": set_hash,
        "count": len(chosen),
        "seed": seed,
        "source": source,
        "seen": selection.seen,
        "files": files,
        "encoder": {"source": encoder.source, "digest": encoder.digest, "dimension": encoder.dimension},
        "left_out": _counts(reports),
        "left_out_listed": [asdict(report) for report in reports[:_LISTED]],
    }
    probe_set = ProbeSet(store, manifest)
    probe_set.add_embeddings(encoder, progress)
    folder.write_json(layout.MANIFEST, manifest)
    return probe_set


def _image_parts(chosen: Sequence[Chosen], spool: Path) -> Iterator[pa.Table]:
    first, data, size = 0, [], 0
    for index, item in enumerate(chosen):
        data.append((spool / item.sha256).read_bytes())
        size += len(data[-1])
        if size >= _PART_BYTES or index == len(chosen) - 1:
            yield _fact_table(chosen[first : index + 1], first, data, IMAGES)
            first, data, size = index + 1, [], 0


def _fact_table(chosen: Sequence[Chosen], first: int, data: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    columns = [
        range(first, first + len(chosen)),
        [item.name for item in chosen],
        [item.sha256 for item in chosen],
        [item.width for item in chosen],
        [item.height for item in chosen],
        data,
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _write(folder: Store, name: str, table: pa.Table) -> dict[str, Any]:
    data = parquet_bytes(table, use_dictionary=False)
    folder.write(name, data)
    return {"name": name, "rows": len(table), "size": len(data), "sha256": digest(data)}


def _manifest_or_none(store: Store, key: str) -> dict[str, Any] | None:
    name = layout.ProbeSetFolder.of(key).manifest
    try:
        manifest = store.read_json(name)
    except FileNotFoundError:
        return None
    if manifest.get("kind") != "probe-set":
        raise StoreError(f"{store.path(name)} is not the manifest of a probe set")
    check_version(manifest, VERSION, store.path(name), "probe set")
    return manifest


def _set_hash(contents: Sequence[str]) -> str:
    return digest("\n".join([f"probe-set {VERSION}", *contents]).encode())


def _silent(what: str, done: int, total: int | None) -> None:
    """The progress of a caller that does not ask for it."""
