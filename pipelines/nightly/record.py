"""The state that nightly runs keep in the store: one *record* for each whole generation that they update.

    observations/KEY-GENERATION/                 a separate ledger of the models that nightly runs have probed since
    observations/KEY-GENERATION/night.json       the record: how far the Hub's listing was read, and what was removed
    observations/KEY-GENERATION/catalogue-*      rows of the catalogue of all models that were added since
    completion/COMPLETION-GENERATION/            their descriptors, by the columns of that completion

A run reads these, and looks up the rest of the store by name: its cost does not grow with the index. Its receipts are
copied to the main ledger too (they name parts by their full paths), so that the next full run does not probe again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from probelog.errors import StoreError
from probelog.storage.encoding import digest, parquet_bytes
from probelog.storage.layout import LedgerFolder
from probelog.storage.ledger import Ledger
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import CATALOGUE, CatalogueRow, from_table, to_table
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

RECORD_VERSION = 1


@dataclass(frozen=True)
class NightlyRecord:
    """Progress of the nightly runs since one whole generation.

    Attributes:
        base: name of that generation.
        watermark: time of the newest change on the Hub that was read (ISO 8601); older ones need not be read again.
        reconciled: when the index was last compared with the whole Hub (UTC, ISO 8601).
        rows: catalogue of the models that were added since; None without any.
        removed: repositories to remove from answers: ``reason`` and ``detail`` by name.
    """

    base: str
    watermark: str | None
    reconciled: str
    rows: Part | None = None
    removed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    version: int = RECORD_VERSION
    made_by: str = MADE_BY


class NightlyFiles:
    """The record and the catalogue of the nightly runs since one whole generation.

    Args:
        store: of the job.
        key: of the main ledger.
        base: the generation.
    """

    def __init__(self, store: Store, key: str, base: str) -> None:
        self.store = store
        self.base = base
        self.key = f"{key}-{base}"
        self.ledger = Ledger(store, LedgerFolder.of(self.key).path)
        self._main = Ledger(store, LedgerFolder.of(key).path)
        self._name = self.ledger.paths.nightly_record

    def read(self) -> NightlyRecord | None:
        """The record; None before the first nightly run.

        Raises:
            SchemaVersionError, StoreError: written by a newer ProbeLog, or damaged.
        """
        content = self.store.read_json_or_none(self._name)
        if content is None:
            return None
        where = self.store.path(self._name)
        check_version(content, RECORD_VERSION, where, "record of nightly runs")
        try:
            rows = content["rows"]
            return NightlyRecord(**{**content, "rows": None if rows is None else Part(**rows)})
        except (KeyError, TypeError) as error:
            raise StoreError(f"{where} is damaged ({error!r})") from error

    def rows(self, record: NightlyRecord) -> list[CatalogueRow]:
        """The models that were added since the base, each repository once, at its newest commit."""
        if record.rows is None:
            return []
        return from_table(read_part(self.store, record.rows, CATALOGUE), CatalogueRow)

    def write(self, record: NightlyRecord, rows: Sequence[CatalogueRow]) -> NightlyRecord:
        """Replace record and catalogue; ``rows`` are those of all models that were added since the base."""
        part = None
        if rows:
            data = parquet_bytes(to_table(sorted(rows, key=lambda row: row.repo), CATALOGUE))
            path = self.ledger.paths.nightly_catalogue(digest(data))
            part = Part(path, len(rows), len(data), digest(data))
            if record.rows != part:
                self.store.write(path, data)
        new = replace(record, rows=part)
        self.store.write_json(self._name, asdict(new))
        if record.rows is not None and record.rows != part:
            self.store.delete(record.rows.path)
        return new

    def enter_in_main(self, names: Iterable[str]) -> None:
        """Copy receipts to the main ledger."""
        for name in names:
            path = self._main.paths.receipt(name)
            if not self.store.exists(path):
                self.store.write(path, self.store.read(self.ledger.paths.receipt(name)))
