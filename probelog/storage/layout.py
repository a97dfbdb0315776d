"""Where everything lies in a store: its paths are spelled here and nowhere else.

`docs/architecture.md` lists them with what they hold; a test holds that list against this module. Paths of generations
are below the index, which may be opened without the store around it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CATALOGUES = "catalogue"
PROBE_SETS = "probes"
LEDGERS = "observations"
SAMPLES = "samples"
COMPLETIONS = "completion"
TREES = "trees"
ENCODERS = "encoders"
INDEX = "index"
REPORTS = "quality"
PIECES = "publish"
RUNS = "runs"

RECEIPT = "receipt.json"
PROGRESS = "progress.json"
MANIFEST = "manifest.json"
NIGHTLY_RECORD = "night.json"
THUMBNAILS = "thumbnails.parquet"
COLUMNS = "columns.npy"
CHOICE = "choice.json"
TEXT_ENCODER = "text_encoder.onnx"
TOKENIZER = "tokenizer.json"
IMAGE_ENCODER = "image_encoder.onnx"

# Below the index.
POINTER = "current.json"
GENERATIONS = "generations"
FILES = "files.json"
HOLD = "hold.json"

LEASE = "nightly/lease.json"


@dataclass(frozen=True)
class _Folder:
    """A folder of a store, by its path."""

    path: str

    @property
    def key(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    def file(self, name: str) -> str:
        """The path of one of its files."""
        return f"{self.path}/{name}"


class CatalogueFolder(_Folder):
    """One crawl of the Hub with one set of filters."""

    @classmethod
    def of(cls, key: str) -> CatalogueFolder:
        """By its key."""
        return cls(f"{CATALOGUES}/{key}")

    @property
    def receipt(self) -> str:
        """What a finished crawl found: its parts."""
        return self.file(RECEIPT)

    @property
    def progress(self) -> str:
        """How far a crawl has come that is not finished."""
        return self.file(PROGRESS)

    def run(self, run: str) -> str:
        """The folder of one crawl's parts."""
        return self.file(run)

    def part(self, run: str, kind: str, number: int) -> str:
        """Some rows, or some failures, of one crawl."""
        return f"{self.run(run)}/{kind}-{number:05}.parquet"


class ProbeSetFolder(_Folder):
    """One probe set. The names of its files are relative: workers keep copies of the folder."""

    @classmethod
    def of(cls, set_hash: str) -> ProbeSetFolder:
        """By its hash, or the first 16 digits of it."""
        return cls(f"{PROBE_SETS}/{set_hash[:16]}")

    @property
    def manifest(self) -> str:
        """What the set consists of; written last."""
        return self.file(MANIFEST)

    @staticmethod
    def images(number: int) -> str:
        """Some of the images."""
        return f"images-{number:05}.parquet"

    @staticmethod
    def embeddings(encoder_digest: str, suffix: str) -> str:
        """Embeddings by one encoder (``parquet``), or their receipt (``json``)."""
        return f"embeddings-{encoder_digest[:16]}.{suffix}"


def made_probe_set(settings: str) -> str:
    """Which probe set was made with some settings (a key)."""
    return f"{PROBE_SETS}/made/{settings}.json"


class LedgerFolder(_Folder):
    """One ledger of observations; files of other ledgers have the same names."""

    @classmethod
    def of(cls, key: str) -> LedgerFolder:
        """By its key."""
        return cls(f"{LEDGERS}/{key}")

    @property
    def manifest(self) -> str:
        """What was asked for."""
        return self.file(MANIFEST)

    @property
    def summary(self) -> str:
        """The sums of its receipts."""
        return self.file("summary.json")

    @property
    def spool(self) -> str:
        """The folder of results that wait to be sealed."""
        return self.file("spool")

    def spooled(self, item: str) -> str:
        """The result of one item that waits to be sealed."""
        return f"{self.spool}/{item}.arrow"

    @property
    def receipts(self) -> str:
        """The folder of the receipts of sealed batches."""
        return self.file("receipts")

    def receipt(self, batch: str) -> str:
        """The receipt of a sealed batch."""
        return f"{self.receipts}/{batch}.json"

    @property
    def bundles(self) -> str:
        """The folder of copies of receipts, many in one object."""
        return self.file("bundles")

    def bundle(self, digest: str) -> str:
        """Copies of many receipts, by the digest of what it holds."""
        return f"{self.bundles}/{digest[:16]}.parquet"

    def part(self, kind: str, batch: str) -> str:
        """A part of a sealed batch."""
        return f"{self.path}/{kind}/{batch}.parquet"

    @property
    def runs(self) -> str:
        """The folder of the figures of runs."""
        return self.file("runs")

    def run(self, time: str) -> str:
        """Figures of the run that ended at some time."""
        return f"{self.runs}/{time}.json"

    @property
    def nightly_record(self) -> str:
        """The record of nightly runs."""
        return self.file(NIGHTLY_RECORD)

    def nightly_catalogue(self, digest: str) -> str:
        """The catalogue of what nightly runs added."""
        return self.file(f"catalogue-{digest[:16]}.parquet")


class CompletionFolder(_Folder):
    """One completion of one state of a ledger."""

    @classmethod
    def of(cls, key: str) -> CompletionFolder:
        """By its key."""
        return cls(f"{COMPLETIONS}/{key}")

    @property
    def receipt(self) -> str:
        """What a finished completion consists of; written last."""
        return self.file(RECEIPT)

    @property
    def columns(self) -> str:
        """A value a probe and rank: what rows are completed with."""
        return self.file(COLUMNS)

    @property
    def choice(self) -> str:
        """The ranks and regularisations that were tried."""
        return self.file(CHOICE)

    @property
    def sweep(self) -> str:
        """The sweep that a completion has come to."""
        return self.file("sweep.npy")

    def descriptors(self, batch: str) -> str:
        """The descriptors of a sealed batch."""
        return f"{self.path}/descriptors/{batch}.parquet"

    @property
    def described_folder(self) -> str:
        """The folder of what says, until the receipt does, that batches are described."""
        return self.file("described")

    def described(self, batch: str) -> str:
        """What says that one batch is described."""
        return f"{self.described_folder}/{batch}.json"


class TreesFolder(_Folder):
    """The trees of all models of one state of the ledgers."""

    @classmethod
    def of(cls, key: str) -> TreesFolder:
        """By its key."""
        return cls(f"{TREES}/{key}")

    @property
    def receipt(self) -> str:
        """Which edges were found, in which families, and which failed; written last."""
        return self.file(RECEIPT)

    @property
    def edges(self) -> str:
        """All edges, by child and parent."""
        return self.file("edges.parquet")

    @property
    def models(self) -> str:
        """The family and the place in its tree of every model, by repository."""
        return self.file("models.parquet")

    def families(self, part: str) -> str:
        """Models of some families, as later models are compared with them."""
        return f"{self.path}/families/{part}.parquet"

    def family_models(self, batch: str) -> str:
        """Which models are of some families."""
        return f"{self.path}/family-models/{batch}.parquet"

    def family_edges(self, batch: str) -> str:
        """The edges of some families."""
        return f"{self.path}/family-edges/{batch}.parquet"

    @property
    def batches(self) -> str:
        """The folder of what says, until the receipt does, that batches of families are done."""
        return self.file("batches")

    def batch(self, batch: str) -> str:
        """What says that one batch of families is done."""
        return f"{self.batches}/{batch}.json"


def tree_weights(key: str) -> str:
    """The ledger of weights that were read without probing; its files are those of every ledger (`LedgerFolder`)."""
    return f"{TREES}/weights/{key}"


def sample_ledger(key: str) -> str:
    """The ledger of what generators made; its files are those of every ledger (`LedgerFolder`)."""
    return f"{SAMPLES}/{key}"


class EncoderFolder(_Folder):
    """An exported encoder, which every publish with it puts into its generation."""

    @classmethod
    def of(cls, key: str) -> EncoderFolder:
        """By its key."""
        return cls(f"{ENCODERS}/{key}")

    @property
    def receipt(self) -> str:
        """The settings of both towers, sizes and digests of the files; written last."""
        return self.file(RECEIPT)


_GENERATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_generation_name(value: object) -> bool:
    """Whether it can name a generation: an untrusted index must not name another folder by it, nor fill a terminal."""
    return isinstance(value, str) and _GENERATION_NAME.fullmatch(value) is not None


class GenerationFolder(_Folder):
    """One generation, below the index."""

    @classmethod
    def of(cls, generation: str) -> GenerationFolder:
        """By its name."""
        return cls(f"{GENERATIONS}/{generation}")

    def table(self, table: str) -> str:
        """One of its LanceDB tables."""
        return self.file(f"{table}.lance")

    @property
    def files(self) -> str:
        """The list of its files."""
        return self.file(FILES)

    @property
    def hold(self) -> str:
        """What keeps sweeps away while it is built."""
        return self.file(HOLD)


class PiecesFolder(_Folder):
    """Rows that workers have made for a large generation, until it is published."""

    @classmethod
    def of(cls, key: str) -> PiecesFolder:
        """By a key of what they are made of."""
        return cls(f"{PIECES}/{key}")

    def piece(self, piece: str) -> str:
        """The rows of some batches."""
        return self.file(f"{piece}.arrow")


def run_figures(command: str) -> str:
    """The figures of the last run of a command."""
    return f"{RUNS}/{command}.json"


def report(generation: str, suffix: str) -> str:
    """The quality gate's report on a generation, as a page (``html``) or as ``json``."""
    return f"{REPORTS}/{generation}.{suffix}"
