"""What the stages share: one job, and the keys by which it finds its own work in the store.

A key is a hash of everything that the output depends on, so that outputs of different settings never mix and a
finished stage finds its own work. Where the output of each stage lies: `probelog.storage.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.config.model import Config
from pipelines.job.figures import Figures
from pipelines.job.progress import Report
from probelog.errors import UsageError
from probelog.storage.encoding import short_key
from probelog.storage.store import Store


@dataclass(frozen=True)
class Job:
    """One run of the pipeline: what was asked for, where it is kept, who is told, and what it takes."""

    config: Config
    store: Store
    report: Report
    figures: Figures = field(default_factory=Figures, compare=False)

    @classmethod
    def of(cls, config: Config, report: Report | None = None) -> Job:
        """A job over the store that its configuration names."""
        return cls(config, Store(config.store), report or Report())

    def catalogue_key(self, endpoint: str) -> str:
        """Key of the crawl: the Hub's address and the filters, the listed repositories included."""
        filters = self.config.filters
        return short_key(
            "catalogue", 1, endpoint.rstrip("/"), filters.model_dump_json(), *read_repos(filters.repos)
        )

    def observations_key(self, probe_set: str) -> str:
        """Key of the ledger of observations: what decides which probes a model sees."""
        return short_key("observations", 1, probe_set, self.config.fraction, self.config.seed)

    def samples_key(self, encoder_digest: str) -> str:
        """Key of the ledger of samples: what decides which pictures a generator makes, and who embeds them."""
        generators = self.config.generators
        counts = (generators.samples, max(generators.samples, generators.max_samples))
        settings = (*counts, generators.steps, self.config.seed, *generators.prompts)
        return short_key("samples", 2, encoder_digest, *settings)


def read_repos(file: Path | None) -> list[str]:
    """The repositories named in a text file, one a line; blank lines and ``#`` comments are left out.

    Raises:
        UsageError: the file cannot be read or names nothing.
    """
    if file is None:
        return []
    return read_names(file, "repositories")


def read_names(file: Path, what: str) -> list[str]:
    """The lines of a text file that are neither blank nor comments, each once.

    Raises:
        UsageError: the file cannot be read or holds no line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: the list of {what} cannot be read ({error})") from None
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise UsageError(f"{file}: the list of {what} is empty")
    return list(dict.fromkeys(names))
