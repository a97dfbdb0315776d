"""Sharded completion: the rows of a shard never leave it, only sums over probes travel.

Each shard holds the standardised observations of some models. In a sweep it runs its row step, adds up
``U^T U`` and ``U^T x`` for the probes that its models saw, and hands those sums to a tree of additions; the driver
solves the column step and sends the new columns out again (masked ALS, see ``probelog.completion.als``).

A shard can be lost with its machine: its parts are read again by another worker, and the sweep is repeated. A driver
can be lost: the columns are kept in the store after every sweep, and the next one goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.completion.fit import Checkpoint, Fit, Fitted, State
from cluster.completion.shard import Loaded, Shard, ShardSpec, partition_by_rows
from cluster.runtime.node import own_nodes
from probelog.completion.als import Float32, HeldOutError, SweepSums, column_step, initial_columns
from probelog.errors import ProbeLogError
from probelog.storage.ledger import Receipt
from probelog.storage.store import Store

# Two sums at a time keep the driver and any one node at two matrices of (n, k, k).
_FAN_IN = 2
# A sweep that loses workers so often one after the other has another reason than bad luck.
_LOSSES = 5
# After so many seconds without a place for a lost shard, the others take its parts.
_PLACE_SECONDS = 60.0
_LOST = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)

Result = TypeVar("Result")
_log = logging.getLogger(__name__)

ShardActor = ray.remote(num_cpus=1, max_restarts=0)(Shard)


@ray.remote(num_cpus=0)
def _add(*sums: SweepSums) -> SweepSums:
    first, *rest = sums
    for other in rest:
        first = first + other
    return first


class Completion:
    """The driver's side: shards on Ray, fits over them.

    Args:
        store: holds the parts.
        receipts: of the parts.
        shards: at most so many; all work at once, so that each needs a CPU.
        spec: of the shards.
        checkpoint: where fits are kept after every sweep; None for nowhere.
    """

    def __init__(
        self,
        store: Store,
        receipts: Sequence[Receipt],
        shards: int,
        spec: ShardSpec,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        if not receipts:
            raise ProbeLogError("there is nothing to complete: no model was probed with success")
        self._spec, self._checkpoint = spec, checkpoint
        self.shards = _placed(spec, min(shards, len(receipts)))
        self._groups = partition_by_rows(receipts, len(self.shards))
        self._loads: list[list[ray.ObjectRef[Loaded]]] = [
            [shard.load.remote(group)] for shard, group in zip(self.shards, self._groups, strict=True)
        ]
        self.loaded = sum(self._persistently(self._answers_to_loading), Loaded())
        if not self.loaded.logits:
            self.close()
            raise ProbeLogError("there is nothing to complete: every logit is constant on its probes")

    def close(self) -> None:
        """Give the shards' memory and CPUs back."""
        for shard in self.shards:
            _end(shard)
        self.shards = []

    def fit(
        self,
        fit: Fit,
        held_out: bool = True,
        progress: Callable[[int, HeldOutError | None], None] | None = None,
    ) -> Fitted:
        """Alternate row and column steps until the held-out error stops falling, or for ``fit.sweeps`` sweeps.

        The columns returned are those of the sweep with the smallest held-out error. A fit that the checkpoint knows
        goes on where it was; the caller clears the checkpoint when it has made the result durable.
        """
        state = self._checkpoint.load(fit, held_out) if self._checkpoint is not None else None
        if state is None:
            state = State(fit, held_out, 0, initial_columns(fit.probes, fit.rank, fit.seed))
        while held_out or state.sweep < fit.sweeps:
            sums = self._sums(state.columns, fit, held_out)
            best = state.best
            if held_out and state.sweep:
                # The error of the columns that the last sweep made comes with the sums of this one, for nothing.
                if progress is not None:
                    progress(state.sweep, sums.error)
                last = best.error.rmse if best is not None and best.error is not None else float("inf")
                if best is None or sums.error.rmse < last:
                    best = Fitted(state.columns, state.sweep, sums.error)
                if not sums.error.rmse < last * (1 - fit.tolerance) or state.sweep == fit.sweeps:
                    return best
            columns = column_step(sums.columns, fit.regularisation)
            state = State(fit, held_out, state.sweep + 1, columns, best)
            if self._checkpoint is not None:
                self._checkpoint.save(state)
            if not held_out and progress is not None:
                progress(state.sweep, None)
        return Fitted(state.columns, state.sweep, None)

    def choose(
        self,
        base: Fit,
        ranks: Sequence[int],
        regularisations: Sequence[float],
        tried: dict[tuple[int, float], tuple[int, HeldOutError]],
        progress: Callable[[Fit, Fitted], None],
    ) -> tuple[Fit, int, HeldOutError]:
        """Rank and regularisation with the smallest held-out error, and after how many sweeps.

        The first rank is tried with every regularisation, larger ranks with the best one so far and the next
        smaller one, until a rank gains less than one per cent.

        Args:
            base: everything else about the fits.
            ranks: what to choose from, ascending.
            regularisations: likewise.
            tried: what an earlier, interrupted run found already; every new fit is added.
            progress: hears of every new fit.
        """
        best: tuple[float, int, float] | None = None
        for rank in ranks:
            previous = best
            near = len(regularisations) if best is None else regularisations.index(best[2]) + 1
            for regularisation in regularisations[0 if best is None else max(0, near - 2) : near]:
                if (rank, regularisation) not in tried:
                    fit = replace(base, rank=rank, regularisation=regularisation)
                    fitted = self.fit(fit)
                    assert fitted.error is not None
                    tried[rank, regularisation] = (fitted.sweeps, fitted.error)
                    progress(fit, fitted)
                candidate = (tried[rank, regularisation][1].rmse, rank, regularisation)
                best = candidate if best is None else min(best, candidate)
            if previous is not None and best is not None and best[0] > 0.99 * previous[0]:
                break
        assert best is not None
        _, rank, regularisation = best
        return replace(base, rank=rank, regularisation=regularisation), *tried[rank, regularisation]

    def _sums(self, columns: Float32, fit: Fit, held_out: bool) -> SweepSums:
        """One sweep's sums over all shards, by a tree of additions in the shards' order."""

        def sweep() -> SweepSums:
            shared, add = ray.put(columns), _add.options(**own_nodes())
            level = [shard.sums.remote(shared, fit, held_out) for shard in self.shards]
            while len(level) > 1:
                level = [add.remote(*level[i : i + _FAN_IN]) for i in range(0, len(level), _FAN_IN)]
            total: SweepSums = ray.get(level[0])
            return total

        return self._persistently(sweep)

    def _persistently(self, call: Callable[[], Result]) -> Result:
        """The result of something that every shard takes part in; it is repeated when some were lost meanwhile.

        Raises:
            ProbeLogError: shards are lost again and again.
        """
        for loss in range(_LOSSES):
            try:
                if loss:
                    self._replace_lost()
                return call()
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                if not isinstance(cause, _LOST):
                    raise
                _log.warning("a worker of the completion was lost (%s); its parts are read again", cause)
        raise ProbeLogError(
            f"{_LOSSES} times one after the other a worker of the completion was lost. Where memory ran out, "
            "set a smaller `completion_memory`, or fewer `workers`"
        )

    def _answers_to_loading(self) -> list[Loaded]:
        answers: list[Loaded] = ray.get([ref for refs in self._loads for ref in refs])
        return answers

    def _replace_lost(self) -> None:
        """New shards for those that do not live; where the cluster has no place for one, the others take its parts."""
        orphans: list[Receipt] = []
        for number in reversed(range(len(self.shards))):
            if _lives(self.shards[number]):
                continue
            fresh = ShardActor.options(**own_nodes()).remote(self._spec)
            alone = len(self.shards) == 1
            if alone or ray.wait([fresh.ready.remote()], timeout=_PLACE_SECONDS)[0]:
                self.shards[number] = fresh
                self._loads[number] = [fresh.load.remote(self._groups[number])]
                continue
            _end(fresh)
            orphans += self._groups[number]
            del self.shards[number], self._loads[number], self._groups[number]
        for number, group in enumerate(partition_by_rows(orphans, len(self.shards))):
            if group:
                self._groups[number] += group
                self._loads[number].append(self.shards[number].load.remote(group))
        self._answers_to_loading()


def _placed(spec: ShardSpec, count: int) -> list[ActorProxy[Shard]]:
    """At most so many shards, those that the cluster has a place for, one at the least.

    A machine that was lost a moment ago is still counted among the cluster's: a shard for it would be waited for for ever.
    """
    shard = ShardActor.options(**own_nodes())
    fresh = {(actor := shard.remote(spec)).ready.remote(): actor for _ in range(count)}
    placed, missing = ray.wait([*fresh], num_returns=count, timeout=_PLACE_SECONDS)
    if not placed:
        _log.warning("no worker of the completion has a place yet: each needs a CPU of the cluster")
        placed, missing = ray.wait(missing, num_returns=1)
    for ref in missing:
        _end(fresh[ref])
    return [fresh[ref] for ref in placed]


def _end(shard: ActorProxy[Shard]) -> None:
    ray.kill(cast("ActorHandle[Shard]", shard))


def _lives(shard: ActorProxy[Shard]) -> bool:
    """Whether an actor answers, as soon as it is done with what it was asked before."""
    try:
        ray.get(shard.ready.remote())
    except RayActorError:
        return False
    return True
