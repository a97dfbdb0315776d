"""What can be known to be wrong with a job before it runs: its file, and what the file points at."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipelines.config.model import Config, load_config
from pipelines.job.background import background_names
from pipelines.job.job import read_repos
from pipelines.quality.canaries import read_canaries
from probelog.errors import ConfigError, ProbeLogError
from probelog.probes.sources import HUB, source_files
from probelog.storage.layout import INDEX, POINTER
from probelog.storage.store import Store


def check_config(file: Path, overrides: Sequence[str] = (), store: str | None = None) -> Config:
    """Read a configuration file and look at everything it names that can be seen from here.

    Nothing is downloaded, written or started. What lies on the Hub is not asked for.

    Raises:
        ConfigError: with every problem found.
        UsageError: the file is missing.
    """
    config = load_config(file, overrides, store)
    problems = [problem for check in _CHECKS for problem in check(config)]
    if problems:
        raise ConfigError(str(file), problems)
    return config


def _store(config: Config) -> Iterator[str]:
    """The store can be listed; a folder that is not there yet can be made."""
    try:
        store = Store(config.store)
        if store.is_local:
            nearest = next(
                folder for folder in [Path(store.root), *Path(store.root).parents] if folder.exists()
            )
            if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
                yield f"store: {nearest} is not a folder that can be written"
        else:
            store.child(INDEX).exists(POINTER)
    except (ProbeLogError, OSError) as error:  # OSError: a folder above it may not be looked into
        yield f"store: {error}"


def _probes(config: Config) -> Iterator[str]:
    if config.probes.startswith(HUB):
        return
    try:
        files, _ = source_files(config.probes)
        if not files:
            yield f"probes: {config.probes} holds no image and no Parquet file"
    except (ProbeLogError, OSError) as error:
        yield f"probes: {error}"


def _encoder(config: Config) -> Iterator[str]:
    folder = Path(config.encoder).expanduser()
    looks_local = (
        folder.is_absolute() or config.encoder.startswith((".", "~")) or config.encoder.count("/") > 1
    )
    if looks_local and not (folder / "config.json").is_file():
        yield f"encoder: {config.encoder} is no folder with a config.json, and no Hub id (OWNER/NAME)"


def _background(config: Config) -> Iterator[str]:
    try:
        background_names(config.background, config.background_count, config.seed)
    except ProbeLogError as error:
        yield str(error) if str(error).startswith("background") else f"background: {error}"


def _repositories(config: Config) -> Iterator[str]:
    for table, file in (("filters", config.filters.repos), ("trees", config.trees.repos)):
        try:
            read_repos(file)
        except ProbeLogError as error:
            yield f"{table}.list: {error}"


def _canaries(config: Config) -> Iterator[str]:
    try:
        read_canaries(config.quality.canaries)
    except ProbeLogError as error:
        yield str(error) if str(error).startswith("quality") else f"quality.canaries: {error}"


def _scratch(config: Config) -> Iterator[str]:
    if config.scratch is None:
        return
    folder = next(
        folder for folder in [config.scratch, *config.scratch.absolute().parents] if folder.exists()
    )
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield f"scratch: {folder} is not a folder that can be written"
        return
    free = shutil.disk_usage(folder).free
    if free < config.cache_bytes:
        yield (
            f"cache_bytes: {config.cache_bytes:,} bytes of preprocessed probes are allowed, "
            f"{folder} has {free:,} free"
        )


def _modules(config: Config) -> Iterator[str]:
    for name in config.preload:
        try:
            exists = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            exists = False
        if not exists:
            yield f"preload: there is no Python module {name!r} here"


_CHECKS: list[Callable[[Config], Iterator[str]]] = [
    _store,
    _probes,
    _encoder,
    _background,
    _repositories,
    _canaries,
    _scratch,
    _modules,
]
