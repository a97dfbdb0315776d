"""What can be known to be wrong with a job before it runs: its file, what that points at, and what lies outside."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from pipelines.config.model import Config, Filters, load_config
from pipelines.config.spelling import did_you_mean
from pipelines.inspect import reach
from pipelines.job.background import HUB as HUB_NAMES
from pipelines.job.background import IMAGENET_21K, background_names
from pipelines.job.job import read_repos
from pipelines.quality.canaries import read_canaries
from pipelines.sample.library import missing_library
from probelog.errors import ConfigError, ProbeLogError, UsageError
from probelog.hub.vocabulary import LICENCES, TASKS
from probelog.probes.sources import HUB
from probelog.sandbox.spec import pixels_folder


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the sentence, which begins with a key, and the error."""

    text: str
    error: ProbeLogError


def check_config(file: Path, overrides: Sequence[str] = (), store: str | None = None) -> Config:
    """Read a configuration file and try everything that it needs, in seconds.

    Nothing is started and nothing downloaded but some pages of the Hub; in a store that is there one small object is written
    and deleted.

    Raises:
        ConfigError: with every problem found.
        UsageError: the file is missing.
    """
    config = load_config(file, overrides, store)
    problems = [problem.text for problem in find_problems(config)]
    if problems:
        raise ConfigError(str(file), problems)
    return config


def refuse_early(config: Config, command: str = "full", *, ask_hub: bool) -> None:
    """What `check_config` finds of what a command needs, before it spends hours.

    Args:
        config: of the job.
        command: the stage, or ``full`` or ``nightly``.
        ask_hub: whether the command is to list the Hub; one that finds its work done needs none.

    Raises:
        ProbeLogError: the only problem as it is, of several a ConfigError with all.
    """
    problems = list(find_problems(config, command, ask_hub=ask_hub))
    if len(problems) == 1:
        raise problems[0].error
    if problems:
        raise ConfigError("the configuration", [problem.text for problem in problems])


def find_problems(config: Config, command: str = "full", *, ask_hub: bool = True) -> Iterator[Problem]:
    """Everything that can be seen from here to be wrong for a command."""
    needs = _NEEDS.get(command, _ALL)
    if command == "nightly" and not config.generators.enabled:
        needs = needs - {
            "encoder"
        }  # what it adds is compared as the index compares; a whole build alone needs it
    from_hub = _reached("hub", reach.hub_lists, config) if ask_hub else None
    if from_hub is not None:
        yield from_hub
    # One message is enough where the Hub does not answer.
    asked = ask_hub and from_hub is None
    if not asked:
        at_the_hub = {
            "words": True,
            "encoder": not reach.is_folder(config.encoder),
            "probes": config.probes.startswith(HUB),
        }
        needs = needs - {name for name, is_there in at_the_hub.items() if is_there}
    for name, check in _CHECKS.items():
        if name in needs:
            yield from (Problem(text, UsageError(text)) for text in check(config))
    for name, attempt in _TRIES.items():
        if name in needs:
            yield from filter(None, [_reached(name, attempt, config)])


def notes(config: Config) -> Iterator[str]:
    """What is right with the file and would still stop a command."""
    problem = _reached("full", reach.catalogue_is_new_enough, config)
    if problem is not None:
        yield problem.text


def _reached(key: str, attempt: reach.Try, config: Config) -> Problem | None:
    try:
        attempt(config)
    except (ProbeLogError, OSError) as error:  # OSError: a folder above may not be looked into
        text = str(error)
        named = text if text.startswith(f"{key}") or key == "workers" else f"{key}: {text}"
        return Problem(named, error if isinstance(error, ProbeLogError) else ProbeLogError(named))
    return None


def _words(config: Config) -> Iterator[str]:
    """Tasks and licences that the Hub does not know. Of one that is not in our list the Hub is asked for a model."""
    words = [("trees.tasks", word, "task", TASKS, "pipeline_tag") for word in config.trees.tasks]
    for table, filters in _filters(config):
        if (tag := filters.pipeline_tag) is not None:
            words.append((f"{table}.pipeline_tag", tag, "task", TASKS, "pipeline_tag"))
        words += [(f"{table}.licence", word, "licence", LICENCES, "license") for word in filters.licence]
    for key, word, kind, known, tag_kind in words:
        if word not in known and not reach.hub_has_model(tag_kind, word):
            yield f"{key}: the Hub has no {kind} {word!r}{did_you_mean(word, known)}"


def _filters(config: Config) -> list[tuple[str, Filters]]:
    """Of each kind that the job wants, with the name of its table."""
    generators = config.generators
    wanted = [("generators.filters", generators.filters)] if generators.enabled else []
    return [("filters", config.filters), *wanted]


def _background(config: Config) -> Iterator[str]:
    if config.background in (HUB_NAMES, IMAGENET_21K):  # timm has these; it takes seconds to import
        return
    try:
        background_names(config.background, config.background_count, config.seed)
    except ProbeLogError as error:
        yield str(error) if str(error).startswith("background") else f"background: {error}"


def _lists(config: Config) -> Iterator[str]:
    files = [(f"{table}.list", filters.repos) for table, filters in _filters(config)]
    files.append(("trees.list", config.trees.repos))
    if config.generators.enabled:
        files.append(("generators.galleries", config.generators.galleries))
    for key, file in files:
        try:
            read_repos(file)
        except ProbeLogError as error:
            yield f"{key}: {error}"


def _canaries(config: Config) -> Iterator[str]:
    try:
        read_canaries(config.quality.canaries)
    except ProbeLogError as error:
        yield str(error) if str(error).startswith("quality") else f"quality.canaries: {error}"


def _scratch(config: Config) -> Iterator[str]:
    if config.scratch is None:
        return
    folder = reach.nearest(config.scratch)
    if not reach.is_writable(folder):
        yield f"scratch: {folder} is not a folder that can be written"


def _room(config: Config) -> Iterator[str]:
    """Less than preprocessed probes may take, those of earlier runs included. A run of little room does without them."""
    if config.scratch is None or not reach.is_writable(folder := reach.nearest(config.scratch)):
        return
    free = shutil.disk_usage(folder).free
    pixels = pixels_folder(config.scratch / "probelog").glob("*")
    held = sum(file.stat().st_size for file in pixels if file.is_file())
    if free + held < config.cache_bytes:
        yield (
            f"cache_bytes: {config.cache_bytes:,} bytes of preprocessed probes are allowed, "
            f"{folder} has {free:,} free"
        )


def _libraries(config: Config) -> Iterator[str]:
    if config.generators.enabled and (missing := missing_library()) is not None:
        yield missing


def _modules(config: Config) -> Iterator[str]:
    for name in config.preload:
        try:
            exists = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            exists = False
        if not exists:
            yield f"preload: there is no Python module {name!r} here"


_CHECKS: Mapping[str, Callable[[Config], Iterator[str]]] = {
    "background": _background,
    "lists": _lists,
    "canaries": _canaries,
    "scratch": _scratch,
    "room": _room,
    "libraries": _libraries,
    "modules": _modules,
    "words": _words,
}
_TRIES: Mapping[str, reach.Try] = {
    "store": reach.store_keeps,
    "workers": reach.workers_fit,
    "encoder": reach.encoder_is_there,
    "probes": reach.probes_are_there,
}
_ALL = frozenset({*_CHECKS, *_TRIES})
#: What commands need that do not need all of it. A nightly run writes its lease before all else, and has probes.
_NEEDS: Mapping[str, Set[str]] = {
    "crawl": {"lists", "words", "store"},
    "probe": {"scratch", "modules", "store", "workers", "encoder", "probes"},
    "sample": _ALL - {"canaries", "probes", "room"},
    "complete": {"store", "encoder", "probes"},
    "trees": {"lists", "scratch", "words", "store"},
    "publish": {"background", "lists", "canaries", "store", "encoder", "probes"},
    "nightly": _ALL - {"store", "probes", "room"},
}
