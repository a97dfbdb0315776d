"""Where probes come from: folders of images, Parquet files with images, datasets on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from probelog.encoders.decoding import looks_like_image
from probelog.errors import ProbeLogError, UsageError
from probelog.storage.schemas import clean_unicode

MAX_IMAGE_BYTES = 64 << 20
# Of one Parquet file. Encodings and compression make a table of any size from a few kilobytes, images they hardly shrink:
# what is far larger than its file is no set of images.
_FREE_ROWS, _FREE_BYTES, _MOST_GROWTH = 1_000_000, 1 << 30, 64
# Together in memory, each of any size.
_ROWS_AT_ONCE = 4
HUB = "hf://datasets/"


class LeftOut(StrEnum):
    """Why an image of the source is not a probe."""

    NOT_AN_IMAGE = "not-an-image"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too-large"
    DUPLICATE = "duplicate"
    NO_BYTES = "no-bytes"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """One image (or other file) of the source that is not a probe, and why."""

    source: str
    reason: LeftOut
    detail: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source. ``version`` changes when its content does (a date, or the Hub's blob id)."""

    name: str
    size: int
    version: str
    open: Callable[[], BinaryIO]
    must_be_parquet: bool


def source_files(source: str) -> tuple[list[SourceFile], list[ProbeReport]]:
    """The files of a source sorted by name, and what was not followed or cannot be listed."""
    if source.startswith(HUB):
        return _hub_files(source), []
    path = Path(source).expanduser()
    if source and path.is_dir():
        return _folder_files(path)
    if path.is_file():
        return [_local_file(path.name, path, True)], []
    matches = sorted(glob(str(path), recursive=True)) if has_magic(str(path)) else []
    files = [_local_file(item, Path(item), True) for item in matches if Path(item).is_file()]
    if not files:
        raise UsageError(
            f"images {source!r}: no such folder or file. Give a folder of images, a Parquet file or pattern with "
            f"images, or {HUB}OWNER/NAME/PATTERN."
        )
    return files, []


def _local_file(name: str, path: Path, must_be_parquet: bool) -> SourceFile:
    facts = path.stat()
    return SourceFile(
        clean_unicode(name), facts.st_size, str(facts.st_mtime_ns), lambda: path.open("rb"), must_be_parquet
    )


def _folder_files(root: Path) -> tuple[list[SourceFile], list[ProbeReport]]:
    files: list[SourceFile] = []
    left_out: list[ProbeReport] = []
    real = os.path.realpath(root)

    def unlisted(error: OSError) -> None:
        name = clean_unicode(os.path.relpath(error.filename, root))
        left_out.append(ProbeReport(name, LeftOut.UNREADABLE, f"folder cannot be listed ({error.strerror})"))

    for folder, folders, names in os.walk(root, onerror=unlisted):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            target = Path(os.path.realpath(path))  # unlike Path.resolve, does not raise on a loop
            if not target.is_relative_to(real):
                detail = "a link that leads outside the folder"
                left_out.append(ProbeReport(clean_unicode(relative), LeftOut.OUTSIDE, detail))
            elif target.is_file():
                files.append(_local_file(relative, path, False))
    return sorted(files, key=lambda file: file.name), left_out


def _hub_files(source: str) -> list[SourceFile]:
    from huggingface_hub import HfFileSystem, constants

    system = HfFileSystem()
    facts: dict[str, dict[str, Any]] = {}
    try:
        facts = {path: system.info(path) for path in sorted(system.glob(source))}
    except FileNotFoundError:
        pass  # the same as no match
    except Exception as error:  # reason: the HTTP library underneath has errors of its own
        raise ProbeLogError(
            f"images {source!r}: the Hub at {constants.ENDPOINT} cannot be read ({type(error).__name__}: {error}). "
            "Set HF_ENDPOINT to a Hub or mirror that this machine reaches (and HF_TOKEN for what is private), or "
            "download the files and give their folder."
        ) from error
    if not facts:
        raise UsageError(f"images {source!r}: the Hub at {constants.ENDPOINT} has no such dataset or files")
    return [
        SourceFile(
            path,
            int(about.get("size") or 0),
            str(about.get("blob_id")),
            partial(system.open, path, "rb"),
            True,
        )
        for path, about in facts.items()
    ]


def candidates(files: Sequence[SourceFile]) -> Iterator[tuple[str, bytes | ProbeReport]]:
    """Every image of the files by name: its bytes, or why there are none."""
    for file in files:
        try:
            stream = file.open()
        except OSError as error:
            if file.must_be_parquet:
                raise UsageError(f"images {file.name}: cannot be opened ({error})") from error
            yield (
                file.name,
                ProbeReport(file.name, LeftOut.UNREADABLE, f"cannot be opened ({error.strerror})"),
            )
            continue
        with stream:
            head = stream.read(16)
            stream.seek(0)
            if file.must_be_parquet or head.startswith(b"PAR1"):
                yield from _parquet_images(file, stream)
            elif not looks_like_image(head):
                yield (
                    file.name,
                    ProbeReport(file.name, LeftOut.NOT_AN_IMAGE, "not an image by its first bytes"),
                )
            elif file.size > MAX_IMAGE_BYTES:
                yield file.name, _too_many_bytes(file.name, file.size)
            else:
                yield file.name, stream.read(MAX_IMAGE_BYTES)


def _parquet_images(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[str, bytes | ProbeReport]]:
    row = total = 0
    try:
        # A buffered stream reads a column page by page: one row group of images can be larger than the memory.
        table = pq.ParquetFile(stream, buffer_size=1 << 20)
        column = _image_column(file.name, table.schema_arrow)
        _check_growth(file, table.metadata.num_rows, _column_bytes(table.metadata, column))
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[column]):
            values = batch.column(0)
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            total += values.nbytes
            _check_growth(file, row + len(values), total)  # the footer may have said less
            for value in values:
                name = f"{file.name}#{row}"
                row += 1
                if not value.is_valid:
                    yield name, ProbeReport(name, LeftOut.NO_BYTES, "the row holds no image bytes")
                elif (size := value.as_buffer().size) > MAX_IMAGE_BYTES:
                    yield name, _too_many_bytes(name, size)
                else:
                    yield name, value.as_py()
    except ProbeLogError:
        raise
    except Exception as error:  # reason: pyarrow passes on what the stream raises
        raise UsageError(
            f"images {file.name}: cannot be read as Parquet, at row {row} ({type(error).__name__}: {error}). "
            "Check the file, or download it again."
        ) from error


def _column_bytes(metadata: pq.FileMetaData, column: str) -> int:
    """The bytes of a column, without its compression, as the footer says."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _check_growth(file: SourceFile, rows: int, size: int) -> None:
    if rows > max(_FREE_ROWS, file.size) or size > _FREE_BYTES + _MOST_GROWTH * file.size:
        raise UsageError(
            f"images {file.name}: {rows:,} rows and {size:,} bytes out of a file of {file.size:,} bytes are no images. "
            "Leave the file out, or write it again without what repeats or is empty."
        )


def _image_column(name: str, schema: pa.Schema) -> str:
    """The column with images: in the Hub's format (a struct with ``bytes``), or else plain binary."""

    def is_bytes(kind: pa.DataType) -> bool:
        return bool(
            pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
        )

    structs = [
        item.name
        for item in schema
        if pa.types.is_struct(item.type)
        and item.type.get_field_index("bytes") >= 0
        and is_bytes(item.type.field("bytes").type)
    ]
    plain = [item.name for item in schema if is_bytes(item.type)]
    for kind, suffix in ((structs, ".bytes"), (plain, "")):
        if len(kind) == 1 or "image" in kind:
            return ("image" if "image" in kind else kind[0]) + suffix
    columns = ", ".join(f"{item.name}: {item.type}" for item in schema)
    raise UsageError(
        f"images {name}: no single column of images (image: struct<bytes: binary, path: string>, or plain binary) "
        f"among {columns[:500]}. Name the wanted one `image`."
    )


def _too_many_bytes(name: str, size: int) -> ProbeReport:
    return ProbeReport(
        name, LeftOut.TOO_LARGE, f"{size} bytes, more than the {MAX_IMAGE_BYTES >> 20} MiB allowed"
    )
