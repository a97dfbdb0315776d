"""What a kind of model declares. Everything else on the way (scheduler, ledger, retries, receipts) knows no kind."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from probelog.hub.client import HubClient
from probelog.hub.download import Downloaded, DownloadLimits
from probelog.storage.ledger import Contents
from probelog.storage.schemas import CatalogueRow


class Download(Protocol):
    """Fetches what it takes to run one model, and nothing else (`probelog.hub.download.download_model`)."""

    def __call__(
        self,
        client: HubClient,
        row: CatalogueRow,
        folder: Path,
        *,
        limits: DownloadLimits,
        allow_pickle: bool,
        check: Callable[[], None] | None,
    ) -> Downloaded: ...


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: what queries call it.
        stage: the name of the stage that runs its models, of its command and in failures.
        libraries: of its models, as the Hub lists them, and
        tasks: their tasks there.
        download: what of a repository is fetched, and
        foreseen: the names of these files, as far as the names of those in the repository (and whether pickles are read)
            tell; raises ItemFailure where they tell that it will fail.
        ledgers: the folder of a store with the ledgers of the stage.
        contents: what these hold.
        tables: of a generation of the index, in which only models of this kind are.
        together: columns of the catalogue; models that agree in them are run one after the other.
    """

    name: str
    stage: str
    libraries: tuple[str, ...]
    tasks: tuple[str, ...]
    download: Download
    foreseen: Callable[[Collection[str], bool], list[str]]
    ledgers: str
    contents: Contents
    tables: tuple[str, ...]
    together: tuple[str, ...] = ()
