"""The complete stage: fill what the models did not see, and describe every logit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from cluster.completion.describe import describe_parts, forget_described
from cluster.completion.driver import Completion
from cluster.completion.fit import Checkpoint, Fit, Fitted
from cluster.completion.shard import ShardSpec
from cluster.runtime.session import session, worker_count
from pipelines.complete.record import (
    DESCRIPTORS_VERSION,
    CompletionRecord,
    completed,
    measure_file,
    of_nothing,
    read_columns,
    write_record,
)
from pipelines.job.job import Job
from probelog import logs
from probelog.completion.als import HeldOutError, working_bytes
from probelog.errors import UsageError
from probelog.probes.probe_set import ProbeSet, common_probes
from probelog.ranking.matched_heads import NOISE, PLAIN, RIDGE
from probelog.storage.encoding import npy, short_key
from probelog.storage.layout import CHOICE, COLUMNS, CompletionFolder
from probelog.storage.ledger import Receipt

# Smallest first: a larger rank must earn its cost by a smaller held-out error.
RANKS = (8, 16, 32, 64)
REGULARISATIONS = (0.01, 0.03, 0.1)
# Twelve fits on more logits than this would tell nothing new and cost as much as the final one twelve times.
CHOICE_LOGITS = 50_000


def complete(
    job: Job, observations: str, receipts: Sequence[Receipt], probe_set: ProbeSet, encoder_digest: str
) -> CompletionRecord:
    """Complete one state of a ledger, on Ray. A no-op when that was done before."""
    config = job.config
    receipts = [receipt for receipt in receipts if receipt.models.rows]
    names = sorted(receipt.name for receipt in receipts)
    constants = (RIDGE, NOISE, PLAIN)
    parameters = (config.rank, config.regularisation, config.top_r, config.seed, encoder_digest, *constants)
    key = short_key("completion", DESCRIPTORS_VERSION, observations, *parameters, *names)
    folder = CompletionFolder.of(key)
    checkpoint = Checkpoint(job.store, folder.sweep)
    done = completed(job.store, key)
    if done is not None:
        _tidy(checkpoint, job, folder)
        job.report.say(f"complete: {_format(done)}; already complete")
        return done
    if not receipts:
        regularisation = config.regularisation or REGULARISATIONS[-1]
        return of_nothing(job.store, key, probe_set.count, regularisation, observations)
    with session(config.ray_address):
        return _completed_anew(job, key, observations, receipts, probe_set, encoder_digest)


def _completed_anew(
    job: Job,
    key: str,
    observations: str,
    receipts: Sequence[Receipt],
    probe_set: ProbeSet,
    encoder_digest: str,
) -> CompletionRecord:
    config, probes = job.config, probe_set.count
    folder = CompletionFolder.of(key)
    checkpoint = Checkpoint(job.store, folder.sweep)
    # All shards work at once: more of them than CPUs would wait for each other for ever.
    shards = min(config.workers or len(receipts), worker_count(1.0, 0.0))
    completion = Completion(job.store, receipts, shards, _shard_spec(job, probe_set), checkpoint)
    loaded = completion.loaded
    try:
        job.report.say(
            f"complete: {loaded.logits:,} logits of {loaded.models:,} models"
            + (f", {loaded.dropped:,} constant ones dropped" if loaded.dropped else "")
            + (f", {loaded.on_disk / 1e9:.1f} GB of their rows on scratch disks" if loaded.on_disk else "")
        )
        base = Fit(
            probes=probes,
            rank=RANKS[0],
            regularisation=REGULARISATIONS[0],
            seed=config.seed,
            top_share=min(1.0, config.top_r / probes),
            sample=min(1.0, CHOICE_LOGITS / loaded.logits),
        )
        fit, sweeps, error = _chosen(job, completion, base, folder)
        job.report.say(
            f"complete: rank {fit.rank}, lambda {fit.regularisation:g}: held-out RMSE {error.rmse:.3f} "
            f"(top-{config.top_r} entries {error.top_rmse:.3f}; 1 is a row's standard deviation)"
        )
        final = completion.fit(
            replace(fit, sweeps=sweeps),
            held_out=False,
            progress=lambda sweep, _: job.report.line(f"complete: sweep {sweep} of {sweeps}"),
        )
    finally:
        completion.close()
    parts = describe_parts(
        job.store,
        receipts,
        final.columns,
        probe_set.embeddings(encoder_digest),
        fit.regularisation,
        config.top_r,
        folder.path,
        progress=lambda done: job.report.line(f"complete: {done:,} of {len(receipts):,} parts described"),
    )
    job.store.write(folder.columns, npy(final.columns))
    done = CompletionRecord(
        key=key,
        rank=fit.rank,
        regularisation=fit.regularisation,
        rmse=error.rmse,
        top_rmse=error.top_rmse,
        models=loaded.models,
        logits=loaded.logits,
        dropped=loaded.dropped,
        parts=parts,
    )
    files = {name: measure_file(job.store, folder.file(name)) for name in (CHOICE, COLUMNS)}
    write_record(job.store, done, files, observations, sweeps=sweeps)
    _tidy(checkpoint, job, folder)
    return done


def fold_in(
    job: Job,
    base: CompletionRecord,
    key: str,
    observations: str,
    receipts: Sequence[Receipt],
    embeddings: npt.NDArray[np.float32],
) -> CompletionRecord:
    """Describe models that came after a completion, with its columns as they are.

    Only what is new is described: ``completion/KEY`` grows with every call.

    Args:
        job: where all is kept.
        base: the completion.
        key: of what this makes.
        observations: key of the ledger that the receipts are of.
        receipts: all of that ledger.
        embeddings: (n, d) of the probes.

    Raises:
        StoreError: the columns are not those that the completion wrote.
    """
    store, folder = job.store, CompletionFolder.of(key)
    existing = completed(store, key)
    parts = {} if existing is None else dict(existing.parts)
    remaining = [receipt for receipt in receipts if receipt.models.rows and receipt.name not in parts]
    if existing is not None and not remaining:
        return existing
    if remaining:
        columns = read_columns(store, base)
        with session(job.config.ray_address):
            parts |= describe_parts(
                store, remaining, columns, embeddings, base.regularisation, job.config.top_r, folder.path
            )
    indexed = [receipt for receipt in receipts if receipt.name in parts]
    logits = sum(part.rows for part in parts.values())
    done = replace(
        base,
        key=key,
        models=sum(receipt.models.rows for receipt in indexed),
        logits=logits,
        dropped=sum(receipt.observations.rows for receipt in indexed) - logits,
        parts=parts,
    )
    write_record(store, done, {}, observations)
    forget_described(store, folder.path)
    return done


def _tidy(checkpoint: Checkpoint, job: Job, folder: CompletionFolder) -> None:
    """Remove what an interrupted run would go on from; with a receipt it is needed no more."""
    checkpoint.clear()
    forget_described(job.store, folder.path)


def _shard_spec(job: Job, probe_set: ProbeSet) -> ShardSpec:
    """What shards need to know.

    Raises:
        UsageError: the memory that they may use does not hold the sums of one sweep.
    """
    config, probes = job.config, probe_set.count
    working = working_bytes(probes, config.rank or RANKS[-1])
    if config.completion_memory is not None and config.completion_memory < working:
        raise UsageError(
            f"completion_memory is {config.completion_memory:,} bytes, but the sums over {probes:,} probes at rank "
            f"{config.rank or RANKS[-1]} take {working:,}: allow more, or set a smaller `rank`"
        )
    common = common_probes(probe_set.hash, config.seed, config.fraction, probes)
    return ShardSpec(job.store.uri, config.seed, config, working, logs.current(), tuple(common.tolist()))


def _chosen(
    job: Job, completion: Completion, base: Fit, folder: CompletionFolder
) -> tuple[Fit, int, HeldOutError]:
    """Rank and regularisation by held-out entries; what an interrupted run tried is not tried again."""
    config = job.config
    name = folder.choice
    stored = job.store.read_json_or_none(name)
    tried = {
        (int(item["rank"]), float(item["regularisation"])): (
            int(item["sweeps"]),
            HeldOutError(**item["error"]),
        )
        for item in (stored["tried"] if stored is not None else [])
    }

    def progress(fit: Fit, fitted: Fitted) -> None:
        assert fitted.error is not None
        job.report.line(
            f"complete: rank {fit.rank}, lambda {fit.regularisation:g}: held-out RMSE {fitted.error.rmse:.3f} "
            f"after {fitted.sweeps} sweeps"
        )
        job.store.write_json(
            name,
            {
                "tried": [
                    {"rank": rank, "regularisation": lam, "sweeps": sweeps, "error": asdict(error)}
                    for (rank, lam), (sweeps, error) in tried.items()
                ]
            },
        )

    return completion.choose(
        base,
        RANKS if config.rank is None else (config.rank,),
        REGULARISATIONS if config.regularisation is None else (config.regularisation,),
        tried,
        progress,
    )


def _format(completed: CompletionRecord) -> str:
    return (
        f"{completed.logits:,} logits, rank {completed.rank}, lambda {completed.regularisation:g}, "
        f"held-out RMSE {completed.rmse:.3f}"
    )
