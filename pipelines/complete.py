"""The complete stage: fill what the models did not see, and describe every logit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.completer import Completion, Fit, Fitted
from cluster.session import worker_count
from pipelines.stages import Job
from probelog.completion import HeldOutError
from probelog.ledger import Part, Receipt
from probelog.matching import RIDGE
from probelog.probes import ProbeSet
from probelog.storage import Store, npy, short_key

DESCRIPTORS_VERSION = 2
# Smallest first: a larger rank must earn its cost by a smaller held-out error.
RANKS = (8, 16, 32, 64)
REGULARISATIONS = (0.01, 0.03, 0.1)
# Twelve fits on more logits than this would tell nothing new and cost as much as the final one twelve times.
CHOICE_LOGITS = 50_000


@dataclass(frozen=True)
class Completed:
    """The finished stage: the error that chose its columns (``columns.npy``), and a descriptor part for each receipt."""

    key: str
    rank: int
    regularisation: float
    rmse: float
    top_rmse: float
    models: int
    logits: int
    dropped: int
    parts: dict[str, Part]

    def facts(self) -> dict[str, Any]:
        """What the index says about its completion."""
        return {
            "rank": self.rank,
            "regularisation": self.regularisation,
            "held_out_rmse": self.rmse,
            "held_out_top_rmse": self.top_rmse,
            "constant_logits_dropped": self.dropped,
        }


def complete(
    job: Job, observations: str, receipts: Sequence[Receipt], probe_set: ProbeSet, encoder_digest: str
) -> Completed:
    """Complete one state of a ledger; needs a running Ray session. A no-op when that was done before."""
    probes = probe_set.count
    config = job.config
    receipts = [receipt for receipt in receipts if receipt.models.rows]
    names = sorted(receipt.name for receipt in receipts)
    wanted = (config.rank, config.regularisation, config.top_r, config.seed, encoder_digest, RIDGE)
    key = short_key("completion", DESCRIPTORS_VERSION, observations, *wanted, *names)
    folder = f"completion/{key}"
    done = job.store.read_or_none(f"{folder}/receipt.json")
    if done is not None:
        found = _read(key, json.loads(done))
        job.report.say(f"complete: {_told(found)}; nothing was left to do")
        return found
    # All shards work at once: more of them than CPUs would wait for each other for ever.
    shards = min(config.workers or len(receipts), worker_count(1.0, 0.0))
    completion = Completion(job.store, receipts, shards, config.seed)
    try:
        job.report.say(
            f"complete: {completion.logits:,} logits of {completion.models:,} models"
            + (f", {completion.dropped:,} constant ones dropped" if completion.dropped else "")
        )
        base = Fit(
            probes=probes,
            rank=RANKS[0],
            regularisation=REGULARISATIONS[0],
            seed=config.seed,
            top_share=min(1.0, config.top_r / probes),
            sample=min(1.0, CHOICE_LOGITS / completion.logits),
        )
        fit, sweeps, error = _chosen(job, completion, base, folder)
        job.report.say(
            f"complete: rank {fit.rank}, lambda {fit.regularisation:g}: held-out RMSE {error.rmse:.3f} "
            f"(top-{config.top_r} entries {error.top_rmse:.3f}; 1 is a row's standard deviation)"
        )
        final = completion.fit(
            Fit(**{**asdict(fit), "sweeps": sweeps}),
            held_out=False,
            progress=lambda sweep, _: job.report.line(f"complete: sweep {sweep} of {sweeps}"),
        )
        embeddings = probe_set.embeddings(encoder_digest)
        parts = completion.describe(final.columns, embeddings, fit.regularisation, config.top_r, folder)
        job.store.write(f"{folder}/columns.npy", npy(final.columns))
        facts = {
            "rank": fit.rank,
            "regularisation": fit.regularisation,
            "sweeps": sweeps,
            "rmse": error.rmse,
            "top_rmse": error.top_rmse,
            "models": completion.models,
            "logits": completion.logits,
            "dropped": completion.dropped,
            "parts": {name: asdict(part) for name, part in parts.items()},
            "observations": observations,
            "version": DESCRIPTORS_VERSION,
        }
        job.store.write_json(f"{folder}/receipt.json", facts)
    finally:
        completion.close()
    return _read(key, facts)


def completed(store: Store, key: str) -> Completed | None:
    """A finished completion of a store, if it is there."""
    done = store.read_or_none(f"completion/{key}/receipt.json")
    return None if done is None else _read(key, json.loads(done))


def _chosen(job: Job, completion: Completion, base: Fit, folder: str) -> tuple[Fit, int, HeldOutError]:
    """Rank and regularisation by held-out entries; what an interrupted run tried is not tried again."""
    config = job.config
    name = f"{folder}/choice.json"
    before = job.store.read_or_none(name)
    tried = {
        (int(item["rank"]), float(item["regularisation"])): (
            int(item["sweeps"]),
            HeldOutError(**item["error"]),
        )
        for item in (json.loads(before) if before is not None else [])
    }

    def progress(fit: Fit, fitted: Fitted) -> None:
        assert fitted.error is not None
        job.report.line(
            f"complete: rank {fit.rank}, lambda {fit.regularisation:g}: held-out RMSE {fitted.error.rmse:.3f} "
            f"after {fitted.sweeps} sweeps"
        )
        job.store.write_json(
            name,
            [
                {"rank": rank, "regularisation": lam, "sweeps": sweeps, "error": asdict(error)}
                for (rank, lam), (sweeps, error) in tried.items()
            ],
        )

    return completion.choose(
        base,
        RANKS if config.rank is None else (config.rank,),
        REGULARISATIONS if config.regularisation is None else (config.regularisation,),
        tried,
        progress,
    )


def _read(key: str, facts: dict[str, Any]) -> Completed:
    return Completed(
        key=key,
        rank=int(facts["rank"]),
        regularisation=float(facts["regularisation"]),
        rmse=float(facts["rmse"]),
        top_rmse=float(facts["top_rmse"]),
        models=int(facts["models"]),
        logits=int(facts["logits"]),
        dropped=int(facts["dropped"]),
        parts={name: Part(**part) for name, part in facts["parts"].items()},
    )


def _told(completed: Completed) -> str:
    return (
        f"{completed.logits:,} logits, rank {completed.rank}, lambda {completed.regularisation:g}, "
        f"held-out RMSE {completed.rmse:.3f}"
    )
