"""The bases that adapters are run with: each is downloaded, checked and sampled once for the adapters that follow each
other.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.layout import ADAPTER_CONFIG
from probelog.hub.download import Downloaded
from probelog.hub.huggingface import is_repo_id
from probelog.ranking.samples.description import Float32s
from probelog.storage.encoding import short_key
from probelog.storage.schemas import CatalogueRow
from probelog.weights.repository import read_json

#: What it means for an adapter that its base cannot be had.
_REASONS = {
    FailureReason.GATED: FailureReason.GATED_BASE,
    FailureReason.NOT_FOUND: FailureReason.MISSING_BASE,
    FailureReason.DISABLED: FailureReason.MISSING_BASE,
}


class BaseSamples:
    """What a base made by itself, in a process without any adapter: the same for all adapters that ask it for the same."""

    def __init__(self) -> None:
        self._extending = threading.Lock()
        self._features: list[Float32s] = []
        #: Of its weights, once they were read and found sound.
        self.digest: str | None = None

    def first(self, count: int, make: Callable[[range], tuple[Float32s, str]]) -> Float32s:
        """Features (count, d) of the first samples.

        Args:
            count: how many.
            make: samples the base: features of the samples of some numbers, and the digest of its weights. Asked for those
                that no adapter before needed, by one thread at a time.
        """
        with self._extending:
            missing = range(sum(map(len, self._features)), count)
            if missing:
                features, self.digest = make(missing)
                self._features.append(features)
            return np.concatenate(self._features)[:count]


@dataclass(frozen=True)
class Base:
    """A base on this node's disk, at the commit that the Hub named when it was first asked for, and what it made."""

    repo: str
    sha: str
    downloaded: Downloaded
    samples: BaseSamples = field(default_factory=BaseSamples, compare=False)


@dataclass
class _Entry:
    fetching: threading.Lock = field(default_factory=threading.Lock)
    base: Base | None = None
    users: int = 0


def base_of(folder: Path, row: CatalogueRow) -> str:
    """The repository of the base of an adapter, as its configuration says, or else its card.

    Args:
        folder: what was downloaded of it.
        row: of the catalogue.

    Raises:
        ItemFailure: missing-base, where neither names a repository.
    """
    named = [(read_json(folder, ADAPTER_CONFIG) or {}).get("base_model_name_or_path")]
    named += [parent.repo for parent in row.parents if parent.relation == "adapter"]
    for repo in (*named, row.base_model):
        if isinstance(repo, str) and is_repo_id(repo):
            return repo
    raise ItemFailure(FailureReason.MISSING_BASE, "the adapter does not say which model it is for")


class Bases:
    """Bases that are in use, and the one that was used last."""

    def __init__(
        self,
        folder: Path,
        look_up: Callable[[str], CatalogueRow],
        download: Callable[[CatalogueRow, Path], Downloaded],
    ) -> None:
        """``look_up``: the row of a repository at its newest commit; ``download``: fetches it into a folder."""
        self._folder, self._look_up, self._download = folder, look_up, download
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._last = ""

    @contextmanager
    def held(self, repo: str) -> Iterator[Base]:
        """A base, for as long as the block runs.

        Raises:
            ItemFailure: it cannot be had; the reason is the adapter's.
        """
        with self._lock:
            entry = self._entries.setdefault(repo, _Entry())
            entry.users += 1
        try:
            with entry.fetching:
                if entry.base is None:
                    entry.base = self._fetched(repo)
            yield entry.base
        finally:
            with self._lock:
                entry.users -= 1
                if entry.base is not None:
                    self._last = repo
                for name in [name for name, one in self._entries.items() if not one.users]:
                    if name != self._last or self._entries[name].base is None:
                        shutil.rmtree(self._place(name), ignore_errors=True)
                        del self._entries[name]

    def _place(self, repo: str) -> Path:
        return self._folder / f"base-{short_key(repo)}"

    def _fetched(self, repo: str) -> Base:
        try:
            row = self._look_up(repo)
            return Base(row.repo, row.sha, self._download(row, self._place(repo)))
        except ItemFailure as failure:
            reason = _REASONS.get(failure.reason, failure.reason)
            raise ItemFailure(reason, f"base {repo}: {failure.detail}") from failure
