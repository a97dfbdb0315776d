"""Labelled images: from a folder with a sub-folder per class, or from Parquet files in the Hub's image format."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.job.progress import Report
from pipelines.zoo.networks import IMAGENET
from probelog.encoders.decoding import UnreadableImageError, decode
from probelog.errors import UsageError
from probelog.models.preprocessing import timm_recipe
from probelog.probes.sources import HUB, LeftOut, ProbeReport, SourceFile, candidates, source_files
from probelog.storage.schemas import clean_unicode

LABEL_COLUMNS = ("label", "class", "class_name")
MAX_SIZE = 512

# A class's number in the source (0 where it has only a name) and its name; classes are sorted by this.
Key = tuple[int, str]


@dataclass(frozen=True)
class LabelledImages:
    """Every usable image of a source: ``pixels`` (n, size, size, 3) uint8, ``labels`` (n) class numbers.

    ``names[c]`` are the names of class c, the first one its own and the rest synonyms: a name such as
    ``tench, Tinca tinca`` (as ImageNet's are) is taken apart at its commas. ``order[i]`` is image i's place in the
    source. ``left_out`` counts what is not used by reason, ``examples`` tells of the first few. ``given`` are the class names that came from beside the source.
    """

    source: str
    names: list[list[str]]
    pixels: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    order: NDArray[np.int64] = field(repr=False)
    left_out: Counter[str]
    examples: list[str]
    given: list[str] | None = None

    def digest(self) -> str:
        """SHA-256 of names, labels and pixels: other images, another digest."""
        hasher = hashlib.sha256(json.dumps(self.names).encode())
        hasher.update(self.labels.tobytes())
        hasher.update(np.ascontiguousarray(self.pixels).data)
        return hasher.hexdigest()

    def encoded(self, chosen: Sequence[int]) -> list[bytes]:
        """The files of some images, as they are in the source (read a second time)."""
        places = {int(self.order[i]): at for at, i in enumerate(chosen)}
        images: dict[int, bytes] = {}
        if places:
            last = max(places)
            for place, (_, _, data) in enumerate(_entries(self.source, self.given)):
                if place in places and isinstance(data, bytes):
                    images[places[place]] = data
                if place == last:
                    break
        if len(images) < len(places):
            raise UsageError(f"{self.source} changed while it was read: start again")
        return [images[at] for at in range(len(chosen))]


def read_images(
    source: str, size: int, names_file: Path | None = None, report: Report | None = None
) -> LabelledImages:
    """Read and shrink every image of a source.

    The pixels are exactly those that timm's evaluation transform makes for a model of this input size: the short
    side scaled to ``size``, bicubic, the centre cut out.

    Args:
        source: folder with a sub-folder per class (its name, underscores as blanks), or a Parquet file or pattern
            with an image column and ``label``, ``class`` or ``class_name``: names, or numbers that the Hub's
            ``ClassLabel`` in the file's metadata or ``names_file`` has names for.
        size: pixels, height and width.
        names_file: text file, one class name a line, for numbers 0, 1, ...
        report: who is told how far it is.

    Raises:
        UsageError: no such source, no label column, a number without a name, or a name for no number.
    """
    given = None if names_file is None else _read_names(names_file)
    recipe = timm_recipe(
        {"input_size": (3, size, size), "interpolation": "bicubic", "crop_pct": 1.0, "mean": IMAGENET[0],
         "std": IMAGENET[1]}, MAX_SIZE,
    )  # fmt: skip
    pixels: list[NDArray[np.uint8]] = []
    keys: list[Key] = []
    order: list[int] = []
    left_out: Counter[str] = Counter()
    examples: list[str] = []
    seen: set[bytes] = set()
    counted = None if report is None else report.counter("zoo: reading", None, "images")
    for place, (name, key, data) in enumerate(_entries(source, given)):
        unusable: ProbeReport | None = None
        if counted is not None:
            counted.add()
        if isinstance(data, ProbeReport):
            unusable = data
        elif key is None:
            left_out["no-label"] += 1
            continue
        elif (content := hashlib.sha256(data).digest()) in seen:
            # The same image among the lessons and among the queries would make the answers too good.
            unusable = ProbeReport(name, LeftOut.DUPLICATE, "the same bytes as an image before it")
        else:
            seen.add(content)
            try:
                shrunk = recipe.geometry([decode(data)])[0]
                pixels.append(np.ascontiguousarray(shrunk.transpose(1, 2, 0)))
                keys.append(key)
                order.append(place)
            except UnreadableImageError as error:
                reason = LeftOut.TOO_LARGE if error.too_large else LeftOut.UNREADABLE
                unusable = ProbeReport(name, reason, str(error))
        if unusable is not None:
            left_out[unusable.reason.value] += 1
            if len(examples) < 10:
                examples.append(f"{unusable.source}: {unusable.reason.value} ({unusable.detail})")
    if not pixels:
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common())
        raise UsageError(
            f"{source}: no usable image with a label" + (f" (left out: {reasons})" if reasons else "")
        )
    classes = {key: number for number, key in enumerate(sorted(set(keys)))}
    return LabelledImages(
        source=source,
        names=[split_names(name) for _, name in classes],
        pixels=np.stack(pixels),
        labels=np.array([classes[key] for key in keys], np.int64),
        order=np.array(order, np.int64),
        left_out=left_out,
        examples=examples,
        given=given,
    )


def split_names(name: str) -> list[str]:
    """A class name and its synonyms: ``tabby, tabby cat`` -> ``["tabby", "tabby cat"]``."""
    parts = [" ".join(part.split()) for part in name.split(",")]
    return list(dict.fromkeys(part for part in parts if part)) or [name]


def _read_names(file: Path) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: the class names cannot be read ({error})") from None
    if not all(names) or not names:
        raise UsageError(f"{file} must hold a class name in every line: line n + 1 names class n")
    return names


def _entries(
    source: str, given: Sequence[str] | None = None
) -> Iterator[tuple[str, Key | None, bytes | ProbeReport]]:
    """Every image of a source in a fixed order: its name, its class (None: unlabelled), its bytes."""
    if source.startswith(HUB) or not source:
        raise UsageError(
            f"{source!r}: give a folder on this machine with a sub-folder per class, or Parquet files"
        )
    folder = Path(source).expanduser().is_dir()
    files, skipped = source_files(source)
    for report in skipped:
        yield report.source, None, report
    if not folder or (files and all(file.name.endswith(".parquet") for file in files)):
        for file in files:
            labels = _parquet_labels(file, given)
            for (name, data), key in zip(candidates([file]), labels, strict=True):
                yield name, key, data
        return
    if given is not None:
        raise UsageError(f"{source} names its classes by its sub-folders: leave --names out")
    if not any("/" in file.name for file in files):
        raise UsageError(
            f"{source} has no sub-folders with images: it needs one per class, named as the class"
        )
    for file in files:
        first, _, rest = file.name.partition("/")
        label = (0, " ".join(first.replace("_", " ").split())) if rest else None
        for name, data in candidates([file]):
            yield name, label, data


def _parquet_labels(file: SourceFile, given: Sequence[str] | None) -> list[Key | None]:
    with file.open() as stream:
        table, column = _label_column(file.name, stream)
    values = table.column(0).to_pylist()
    kind = table.schema.field(0).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if given is not None:
            raise UsageError(f"{file.name}: the column {column!r} holds names already: leave --names out")
        return [(0, clean_unicode(value).strip()) if value and value.strip() else None for value in values]
    names = given if given is not None else _declared_names(table.schema.metadata, column)
    keys: list[Key | None] = []
    for row, value in enumerate(values):
        if value is None or value < 0:  # the Hub's datasets write -1 for an unlabelled image
            keys.append(None)
        elif names is None:
            keys.append((value, f"class {value}"))
        elif value < len(names):
            keys.append((value, names[value]))
        else:
            where = "--names" if given is not None else "the file's ClassLabel"
            raise UsageError(
                f"{file.name}, row {row}: class {value}, but {where} has only {len(names)} names"
            )
    return keys


def _label_column(name: str, stream: BinaryIO) -> tuple[pa.Table, str]:
    try:
        table = pq.ParquetFile(stream)
        schema = table.schema_arrow
        for column in LABEL_COLUMNS:
            at = schema.get_field_index(column)
            if at >= 0 and (
                pa.types.is_integer(schema.field(at).type)
                or pa.types.is_string(schema.field(at).type)
                or pa.types.is_large_string(schema.field(at).type)
            ):
                return table.read(columns=[column]).replace_schema_metadata(schema.metadata), column
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{name} cannot be read as Parquet ({error})") from None
    columns = ", ".join(f"{item.name}: {item.type}" for item in schema)
    raise UsageError(
        f"{name}: no column of labels (label, class or class_name; whole numbers or names) among {columns[:500]}"
    )


def _declared_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The names of a ``ClassLabel`` in the JSON that the datasets library writes into a Parquet schema."""
    try:
        features: Any = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        return None
    return [clean_unicode(name) for name in names]
