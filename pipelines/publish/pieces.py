"""The rows of a large generation, made by tasks on Ray: a piece of them for some neighbouring batches of the ledger.

Rows depend on nothing but their logits' descriptors, the basis and the background. What depends on all rows before them
(their numbers, and which model's logits stand for its copies') the publisher adds when it appends the pieces in order,
so that the table is the one that it would have written alone. Pieces lie in the store until the generation is
published: a publisher that was killed goes on with those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.runtime.ordered import in_order
from pipelines.complete.descriptors import Descriptors, Eligible, ModelDescriptors, same_logits
from probelog.errors import StoreError
from probelog.index.arrow import fixed_lists, matrix_of
from probelog.index.schema import EVIDENCE, INDEX_VERSION
from probelog.publication.rows import EncodedRows, RowEncoder
from probelog.storage.encoding import digest, npy, sealed_tables, short_key, unsealed_tables
from probelog.storage.layout import PIECES, PiecesFolder
from probelog.storage.ledger import Ledger, Receipt
from probelog.storage.parquet_parts import Part
from probelog.storage.schemas import ProbedModel
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY

# Rows of a piece, some 5 MB, unless one batch has more: half a second of work, many times what a task costs.
PIECE_ROWS = 8_192

_OWNER_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("repo", pa.string()),
    ("sha", pa.string()),
    ("logits", pa.int32()),
]
_OWNERS = pa.schema(_OWNER_COLUMNS)

Note = Callable[[ProbedModel, int, int, ModelDescriptors | None], None]
"""Hears of every model: its facts, number and number of logits, and its descriptors where they are `Eligible`."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring batches of the ledger.

    Attributes:
        receipts: of them.
        parts: their descriptors, by the names of the receipts.
    """

    receipts: Sequence[Receipt]
    parts: Mapping[str, Part]

    @property
    def name(self) -> str:
        """Names it among the pieces of one generation."""
        return short_key(*(receipt.name for receipt in self.receipts))

    def descriptors(self, store: Store, unlisted: frozenset[tuple[str, str]]) -> Descriptors:
        """Those of its models that are not ``unlisted``."""
        models = Ledger(store, "").models(self.receipts, probes=False)
        listed = [model for model in models if (model.repo, model.sha) not in unlisted]
        return Descriptors(store, self.receipts, self.parts, listed)


@dataclass(frozen=True)
class Making:
    """What all pieces of a generation are made with.

    Attributes:
        store: its address.
        completion: key of the completion that the descriptors are of.
        encoder: makes the rows.
        unlisted: repository and commit of the models that were probed and are not published.
        share: of the models that samples of all models draw.
    """

    store: str
    completion: str
    encoder: RowEncoder
    unlisted: frozenset[tuple[str, str]]
    share: float

    @property
    def folder(self) -> PiecesFolder:
        """Where the pieces are, by all that they depend on."""
        basis, background = self.encoder.basis, self.encoder.background
        key = short_key(
            "pieces",
            MADE_BY,
            INDEX_VERSION,
            self.completion,
            *(digest(npy(array)) for array in (basis.array(), background.directions)),
            *(basis.middle, background.sharpness, self.encoder.probes, self.share),
            *sorted(self.unlisted),
        )
        return PiecesFolder.of(key)


def pieces_of(receipts: Sequence[Receipt], parts: Mapping[str, Part]) -> list[Piece]:
    """Receipts in their order, as pieces of about ``PIECE_ROWS`` rows."""
    pieces: list[Piece] = []
    gathered: list[Receipt] = []
    for number, receipt in enumerate(receipts, 1):
        gathered.append(receipt)
        own = {one.name: parts[one.name] for one in gathered}
        if number == len(receipts) or sum(part.rows for part in own.values()) >= PIECE_ROWS:
            pieces.append(Piece(gathered, own))
            gathered = []
    return pieces


class Pieces:
    """A generation's pieces.

    Args:
        store: where they are kept.
        making: what they are made with.
        pieces: in the order of the rows.
        models: of the generation, by number.

    Attributes:
        originals: of every piece that was read, which of its models are not copies of an earlier one.
    """

    def __init__(
        self, store: Store, making: Making, pieces: Sequence[Piece], models: Sequence[ProbedModel]
    ) -> None:
        self.making, self.pieces = making, pieces
        self.originals: list[npt.NDArray[np.bool_]] = []
        self._store, self._models = store, models

    def with_originals(self) -> Iterator[tuple[Piece, npt.NDArray[np.bool_]]]:
        """Every piece, and which of its models are no copies."""
        return zip(self.pieces, self.originals, strict=True)

    def rows(self, note: Note, progress: Callable[[int], None]) -> Iterator[EncodedRows]:
        """The rows of all pieces in their order, those of copies, too.

        Args:
            note: hears of every model in the order of the rows.
            progress: hears how many pieces are read.
        """
        numbers = {(model.repo, model.sha): number for number, model in enumerate(self._models)}
        folder = self.making.folder
        there = set(self._store.names(folder.path))
        missing = (piece for piece in self.pieces if folder.piece(piece.name) not in there)
        made = in_order(make_piece, missing, [self.making])
        seen: set[str] = set()
        self.originals = []
        for piece in self.pieces:
            path = folder.piece(piece.name)
            if path not in there:
                next(made)
            rows, owners, noted = _read(self._store, path)
            own = np.array([numbers[row["repo"], row["sha"]] for row in owners], np.int64)
            self.originals.append(np.zeros(len(own), bool))
            for place, (number, row) in enumerate(zip(own.tolist(), owners, strict=True)):
                model = self._models[number]
                note(model, number, row["logits"], _described(model, number, noted.get(place)))
                if (key := same_logits(model)) not in seen:
                    seen.add(key)
                    self.originals[-1][place] = True
            if rows.num_rows:
                yield self.making.encoder.rows_of(rows, own[rows["place"].to_numpy()])
            progress(len(self.originals))


def make_piece(piece: Piece, making: Making) -> None:
    """Write a piece: its rows, its models in their order, and the logits of those that samples may hold."""
    store, encoder = Store(making.store), making.encoder
    eligible, seen = Eligible(making.share), set()
    owners: list[dict[str, object]] = []
    rows = [_with_place(encoder.schema.empty_table(), 0)]
    kind = _noted_schema(encoder.basis.axes.shape[1])
    noted = [_with_place(kind.empty_table(), 0)]
    for place, described in enumerate(piece.descriptors(store, making.unlisted).stream()):
        model = described.model
        owners.append({"repo": model.repo, "sha": model.sha, "logits": len(described.logits)})
        if eligible(described):
            directions = fixed_lists(described.directions, pa.float32())
            logits = described.logits.astype(np.int32)
            columns: dict[str, Any] = {"logit": logits, "negated": described.negated, "direction": directions}
            noted.append(_with_place(pa.table(columns, kind), place))
        if (key := same_logits(model)) not in seen:
            seen.add(key)
            rows.append(_with_place(encoder.table(encoder.encode(described.batch())), place))
    tables = [pa.concat_tables(rows), pa.Table.from_pylist(owners, _OWNERS), pa.concat_tables(noted)]
    path = making.folder.piece(piece.name)
    store.write(path, sealed_tables(table.combine_chunks() for table in tables))


def read_piece(data: bytes, where: str = "a piece of an index") -> list[pa.Table]:
    """The three tables of a piece.

    Raises:
        StoreError: these are not the bytes that were written.
    """
    return unsealed_tables(data, 3, where)


def sweep_pieces(store: Store) -> None:
    """Remove all pieces: what is live now supersedes whatever they were made for."""
    store.delete_folder(PIECES)


def _noted_schema(dimension: int) -> pa.Schema:
    """Of logits that samples may hold."""
    columns: list[tuple[str, pa.DataType]] = [
        ("logit", pa.int32()),
        ("negated", pa.bool_()),
        ("direction", pa.list_(pa.float32(), dimension)),
    ]
    return pa.schema(columns)


def _with_place(table: pa.Table, place: int) -> pa.Table:
    """One model's rows with its place among the piece's models."""
    return table.append_column("place", pa.array(np.full(table.num_rows, place, np.int32)))


def _read(store: Store, path: str) -> tuple[pa.Table, list[dict[str, Any]], dict[int, pa.Table]]:
    """The rows of a piece, its models, and those of its logits that samples may hold, by the model's place."""
    try:
        data = store.read(path)
    except FileNotFoundError:
        raise StoreError(
            f"{store.path(path)} is gone: somebody else published meanwhile. Run again."
        ) from None
    rows, owners, noted = read_piece(data, store.path(path))
    places, starts = np.unique(noted["place"].to_numpy(), return_index=True)
    ends = [*starts[1:].tolist(), noted.num_rows]
    by_place = {
        place: noted.slice(start, end - start)
        for place, start, end in zip(places.tolist(), starts.tolist(), ends, strict=True)
    }
    return rows, owners.to_pylist(), by_place


def _described(model: ProbedModel, number: int, logits: pa.Table | None) -> ModelDescriptors | None:
    """A model as samples need it, which is without probes."""
    if logits is None:
        return None
    count = logits.num_rows
    return ModelDescriptors(
        model,
        number,
        logits["logit"].to_numpy(),
        logits["negated"].to_numpy(),
        # A copy, because samples keep it: the table's own would keep the whole piece in memory.
        np.array(matrix_of(logits["direction"]), np.float32),
        np.empty((count, 0), np.int64),
        np.zeros(count, EVIDENCE),
    )
