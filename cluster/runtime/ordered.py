"""Tasks on Ray whose results are wanted in order, a bounded number at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from probelog import logs
from probelog.errors import ProbeLogError

if TYPE_CHECKING:
    import ray

Item = TypeVar("Item")
Result = TypeVar("Result")

# For each CPU one task is under way while another one waits to be started, or to be taken.
_TASKS_AHEAD = 2


def in_order(
    work: Callable[..., Result], items: Iterable[Item], shared: Sequence[object] = ()
) -> Iterator[Result]:
    """``work(item, *shared)`` for every item, each in a task of its own; results come in the order of the items.

    No more tasks are ahead of the result that is taken than the cluster's CPUs can work on, so that neither they nor
    their results pile up. A worker that dies is replaced, and its item is worked on again.

    Args:
        work: an importable function that may be called more than once for an item.
        items: taken as tasks are started.
        shared: sent to every machine once.

    Raises:
        ProbeLogError: what ``work`` raised.
    """
    import ray  # not where nothing is spread
    from ray.exceptions import RayError

    from cluster.runtime.node import own_nodes, own_resources

    task = ray.remote(num_cpus=1, max_retries=-1, **own_nodes())(_logged)
    references = [ray.put(value) for value in shared]
    ahead: deque[Any] = deque()
    try:
        for item in items:
            # Machines come and go.
            while len(ahead) >= max(1, int(_TASKS_AHEAD * own_resources().get("CPU", 1))):
                yield _result(ahead.popleft())
            ahead.append(task.remote(work, logs.current(), item, *references))
        while ahead:
            yield _result(ahead.popleft())
    finally:
        for reference in ahead:
            with contextlib.suppress(RayError):
                ray.cancel(reference)


def _logged(work: Callable[..., Result], log_level: str, item: object, *shared: object) -> Result:
    logs.configure(log_level)
    return work(item, *shared)


def _result(reference: ray.ObjectRef[Result]) -> Result:
    import ray
    from ray.exceptions import RayTaskError

    try:
        result: Result = ray.get(reference)
        return result
    except RayTaskError as error:
        if isinstance(error.cause, ProbeLogError):
            raise error.cause from error
        raise
