"""Tasks on Ray of which some need another's result: a child starts when its parent is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.runtime.node import own_nodes
from probelog import logs

Result = TypeVar("Result")


@dataclass(frozen=True)
class Finished:
    """A task that is through: its result, or the error that ended it or its parent."""

    name: str
    result: Any = None
    error: str | None = None


def run_families(
    work: Callable[..., Any],
    arguments: Mapping[str, Sequence[Any]],
    parents: Mapping[str, str],
    *,
    at_once: int,
    cpus: float,
    gpus: float,
    tick: Callable[[], None] | None = None,
) -> Iterator[Finished]:
    """Call ``work(*arguments[name], parent's result or None)`` for every name, each in a Ray task of its own.

    Args:
        work: an importable function; a worker that dies under it is replaced and it is called again, twice at most.
        arguments: by name; object references among them are resolved.
        parents: child -> parent, of those whose parent is among the names too.
        at_once: how many tasks at the same time, at the most.
        cpus: what one task takes of its machine.
        gpus: the same, a share of one or several whole ones.
        tick: called about once a second.

    Raises:
        ValueError: a parent is not among the names, or its own descendant.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2, **own_nodes())(_logged)
    level = logs.current()
    waiting = list(arguments)
    awaited = set(parents.values())
    results: dict[str, Any] = {}
    failed: set[str] = set()
    running: dict[Any, str] = {}
    while waiting or running:
        for name in list(waiting):
            parent = parents.get(name)
            if parent in failed:
                waiting.remove(name)
                failed.add(name)
                yield Finished(name, error=f"its parent {parent} failed")
            elif len(running) < at_once and (parent is None or parent in results):
                waiting.remove(name)
                result = results.get(parent) if parent else None
                running[task.remote(work, level, *arguments[name], result)] = name
        if waiting and not running and not any(parents.get(name) in failed for name in waiting):
            raise ValueError(f"these wait for a parent that is not among the tasks: {waiting}")
        done, _ = ray.wait(list(running), num_returns=1, timeout=1.0) if running else ([], [])
        for reference in done:
            name = running.pop(reference)
            try:
                result = ray.get(reference)
            except RayError as error:
                failed.add(name)
                yield Finished(name, error=_cause(error))
                continue
            if name in awaited:
                results[name] = reference  # children get it from the object store
            yield Finished(name, result)
        if tick is not None:
            tick()


def _logged(work: Callable[..., Result], log_level: str, *arguments: object) -> Result:
    logs.configure(log_level)
    return work(*arguments)


def _cause(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__
