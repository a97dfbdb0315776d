"""From what is known of the models and what was measured: a forecast, with the interval that the measurements leave.

Every quantity is computed from the measurements as they are and again from each of 200 bootstrap draws of them
(models drawn with replacement, everything fitted again); the share of failures is drawn from its posterior (Jeffreys'
prior). The interval is the middle 80 %. It covers what a sample does not tell; not that machines, networks and neighbours
are slower on another day, nor the luck of single models where few are left.

What a model costs is a sum of two non-negative parts (`non_negative`): a worker's busy seconds by passes and by
parameters times passes (on probes, or in the steps of its samples); a download's seconds by model and by bytes. How the busy seconds divide into loading, preparing
and computing is taken as measured. Everything else is in proportion to something that is known of the models.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.config.model import Config
from pipelines.forecast.estimates import Chosen, Cost, Estimate, Left, SizeClass, Wall
from pipelines.forecast.known import SIZE_CLASSES, Known, logits_by_parameters, size_class
from pipelines.forecast.measured import Measured
from probelog.arrays import Floats, Ints
from probelog.hub.rate_limit import HUB_LIMITS, WINDOW_SECONDS

_DRAWS = 200
_FEWEST = 3
_HOUR = 3600.0

_STEPS = 1000
_MOST_FOLDS = 40
_TINY = 1e-300


@dataclass(frozen=True)
class Settings:
    """What a prediction depends on besides the models: from the configuration and the command line.

    Attributes:
        config: of the job.
        passes: of each model, forward.
        values: in a row of its results.
        probes: that a node prepares; 0 where models are run on none.
        workers: None for as many as were measured.
        probe_copy_bytes: of the probe set that each node copies; 0 where the store is on the node.
        account: of the Hub's limits that apply; None: no limit.
        price: of one worker hour, or of a GPU hour where workers have GPUs; None: not asked.
    """

    config: Config
    passes: int
    values: int
    probes: int
    workers: int | None
    probe_copy_bytes: int
    account: str | None
    price: float | None


def predict(
    catalogue: Known,
    remaining: npt.NDArray[np.bool_],
    measured: Measured,
    places: Ints,
    failed: Mapping[str, int],
    store_rates: Mapping[str, float],
    settings: Settings,
) -> Left:
    """The forecast for some models.

    Args:
        catalogue: all N models that are listed.
        remaining: (N,) those that are left.
        measured: what costs are fitted on.
        places: (n,) of the measured models in the catalogue; -1 where it does not list one.
        failed: how many models failed beside those measured, by reason, without those of which it was known.
        store_rates: bytes a logit that a completion and an index take, where they were measured.
        settings: of the run.
    """
    left = catalogue.chosen(remaining)
    sure = left.chosen(~left.doomed)
    rng = np.random.default_rng(0)
    draws = resampled(rng, len(measured), _DRAWS if len(measured) >= _FEWEST else 0)

    good, bad = measured.counts.indexed, sum(failed.values())
    share = 1 - np.append(bad / (bad + good), rng.beta(bad + 0.5, good + 0.5, len(draws) - 1))
    indexed = share * len(sure)
    expected = Counter({reason: len(sure) * count / (bad + good) for reason, count in failed.items()})
    expected.update(left.failures())

    each, size, sources = _bytes(sure, measured, _listed(catalogue.weights, places), draws)
    measured_bytes, measured_parameters = measured.numbers("bytes"), measured.numbers("parameters")
    per_byte = ratio(draws[:1], measured_parameters, measured_bytes)[0]
    parameters = np.where(np.isnan(sure.parameters), each * per_byte, sure.parameters)
    # Where no file is listed: as many as the others have; of a model alone, its configuration and weights.
    listed = sure.files[sure.files > 0]
    unlisted = len(sure) - len(listed)
    requests = float(listed.sum() + unlisted * (listed.mean() if len(listed) else 2.0))

    passes, busy_seconds = measured.passes, measured.busy_seconds
    busy, busy_error = fitted(draws, np.stack([passes, passes * measured_parameters], axis=1), busy_seconds)
    downloading, download_error = fitted(
        draws,
        np.stack([np.ones(len(measured)), measured_bytes], axis=1),
        measured.numbers("seconds_download"),
    )
    work = settings.passes * parameters
    busy_each = settings.passes * busy[0, 0] + work * busy[0, 1]
    busy_total = share * (settings.passes * len(sure) * busy[:, 0] + work.sum() * busy[:, 1])
    seconds = {"download": share * (len(sure) * downloading[:, 0] + size * downloading[:, 1])}
    for part in measured.busy:
        seconds[part] = busy_total * ratio(draws[:1], measured.numbers(f"seconds_{part}"), busy_seconds)[0]

    wall, paid, wall_seconds = _wall(measured, settings, busy_total, seconds["download"], requests, unlisted)
    unit = "GPU" if settings.config.gpus_per_worker > 0 else "worker"
    hours = wall_seconds * wall.workers * (settings.config.gpus_per_worker or 1.0) / _HOUR
    inputs = measured.ledger.contents.inputs
    logits = share * _logits(sure, measured, _listed(catalogue.parameters, places), draws)
    return Left(
        models=len(left),
        indexed=Estimate.of(indexed),
        failures=dict(expected.most_common()),
        foretold=len(left) - len(sure),
        bytes=Estimate.of(size),
        sizes=sources,
        file_requests=Estimate.of(np.full(len(draws), requests)),
        api_requests=unlisted,
        limit_hours={account: _limited(requests, unlisted, account) / _HOUR for account in HUB_LIMITS},
        seconds={part: Estimate.of(draws) for part, draws in seconds.items()},
        busy_hours=Estimate.of(busy_total / _HOUR),
        worker_hours=Estimate.of(paid / _HOUR),
        classes=_classes(sure, parameters, each, busy_each * (paid[0] / max(busy_each.sum(), _TINY))),
        logits=Estimate.of(logits),
        store_bytes=_store(measured, settings, len(left), indexed, logits, store_rates),
        disk_bytes=_disk(measured, settings, each, wall.workers),
        wall=wall,
        cost=Cost(
            unit,
            Estimate.of(hours),
            settings.price,
            None if settings.price is None else Estimate.of(hours * settings.price),
        ),
        chosen={
            "busy seconds": Chosen([inputs, f"parameters x {inputs}"], busy_error),
            "download": Chosen(["1", "bytes"], download_error),
        },
    )


def _listed(values: Floats, places: Ints) -> Floats:
    """What the catalogue says of the measured models, (n,)."""
    return np.where(places < 0, np.nan, values[places])


def _bytes(
    sure: Known, measured: Measured, listed_weights: Floats, draws: Floats
) -> tuple[Floats, Floats, dict[str, int]]:
    """Bytes of each download, and of all by draw; how many models' bytes follow from what.

    By the first of these that the catalogue tells; where it is not the bytes themselves, as many for each of it as the
    measured models had.
    """
    sources = {
        "file sizes": (sure.listed, None),
        "parameters by type": (sure.weights, listed_weights),
        "number of parameters": (sure.parameters, measured.numbers("parameters")),
        "nothing": (np.ones(len(sure)), np.ones(len(measured))),
    }
    each, total, counts = np.full(len(sure), np.nan), np.zeros(len(draws)), {}
    for source, (amounts, measured_amounts) in sources.items():
        rows = np.isnan(each) & np.isfinite(amounts)
        rate = (
            np.ones(len(draws))
            if measured_amounts is None
            else ratio(draws, measured.numbers("bytes"), measured_amounts)
        )
        each[rows] = amounts[rows] * rate[0]
        total += amounts[rows].sum() * rate
        counts[source] = int(rows.sum())
    return each, total, counts


def _wall(
    measured: Measured, settings: Settings, busy: Floats, download: Floats, requests: float, api: int
) -> tuple[Wall, Floats, Floats]:
    """How long the run takes; by draw the workers' seconds, and those of the run."""
    config, account = settings.config, settings.account
    # Runs with the requested number of workers; all where there is none.
    runs = [run for run in measured.runs if run.workers == settings.workers] or measured.runs
    machine_workers = max(1, int((os.cpu_count() or 1) / config.cpus_per_worker))
    workers = settings.workers or (runs[-1].workers if runs else machine_workers)
    overlap, start = None, 0.0
    if runs:
        overlap = sum(run.busy_seconds for run in runs) / sum(run.workers * run.wall_seconds for run in runs)
        start = float(np.mean([run.start_seconds for run in runs]))
    paid = busy / (overlap or 1.0)
    limited = 0.0 if account is None else _limited(requests, api, account)
    limits = {
        "compute": start + paid / workers,
        "requests": np.full(len(busy), limited),
        "download": start + download / (workers * config.in_flight),
    }
    total = np.max(list(limits.values()), axis=0)
    bound = max(limits, key=lambda name: float(limits[name][0]))
    estimates = {name: Estimate.of(draws) for name, draws in limits.items()}
    wall = Wall(
        workers, **estimates, total=Estimate.of(total), bound=bound, start_seconds=start, overlap=overlap
    )
    return wall, paid, total


def _limited(files: float, api: int, account: str) -> float:
    """Seconds that an account's limits take at the least: the first window's requests may come at once."""
    limits = HUB_LIMITS[account]
    windows = max(files / limits["file"], api / limits["api"]) - 1.0
    return max(0.0, windows) * WINDOW_SECONDS


def _classes(sure: Known, parameters: Floats, sizes: Floats, paid_seconds: Floats) -> list[SizeClass]:
    number, guessed = size_class(parameters), np.isnan(sure.parameters)
    return [
        SizeClass(
            name,
            int((number == i).sum()),
            int(((number == i) & guessed).sum()),
            float(sizes[number == i].sum()),
            float(paid_seconds[number == i].sum() / _HOUR),
        )
        for i, name in enumerate(SIZE_CLASSES)
    ]


def _logits(sure: Known, measured: Measured, listed_parameters: Floats, draws: Floats) -> Floats:
    """By draw: what is declared, or follows from the number of parameters; else the mean of measured models."""
    measured_logits = measured.numbers(measured.ledger.contents.counted)
    heads = (np.array(measured.texts("architecture"), object), listed_parameters, measured_logits)
    followed = logits_by_parameters(sure.architectures, sure.parameters, *heads)
    count = np.where(np.isnan(sure.labels), followed, sure.labels)
    mean = ratio(draws, measured_logits, np.ones(len(measured)))
    total: Floats = np.nansum(count) + np.isnan(count).sum() * mean
    return total


def _store(
    measured: Measured,
    settings: Settings,
    models: int,
    indexed: Floats,
    logits: Floats,
    rates: Mapping[str, float],
) -> dict[str, Estimate]:
    """Bytes by kind."""
    counts, receipts = measured.counts, measured.receipts
    values = counts.logits * measured.values
    items = sum(len(receipt.items) for receipt in receipts)
    # A receipt takes so much for each of its models, and the rest whatever it holds, as does its part of failures.
    batches = -(-models // settings.config.batch_models)
    fixed = (measured.receipt_bytes - measured.listed_bytes) / len(receipts)
    sizes = {
        measured.ledger.contents.rows: measured.part_bytes("rows") / values * logits * settings.values,
        "models": measured.part_bytes("models") / counts.indexed * indexed,
        "weights": measured.part_bytes("weights") / counts.indexed * indexed,
        "failures": np.full(len(logits), measured.part_bytes("failures") / len(receipts) * batches),
        "receipts": np.full(len(logits), measured.listed_bytes / items * models + fixed * batches),
    } | {kind: logits * rate for kind, rate in rates.items()}
    return {kind: Estimate.of(draws) for kind, draws in sizes.items()}


def _disk(measured: Measured, settings: Settings, sizes: Floats, workers: int) -> dict[str, float]:
    """Bytes on a node that runs all workers: the largest downloads at once, prepared probes, the probe set."""
    config = settings.config
    flying = np.sort(sizes)[::-1][: workers * config.in_flight].sum()
    return {
        "downloads under way": float(flying),
        "prepared probes": float(min(settings.probes * measured.prepared_bytes, config.cache_bytes)),
        "probe set": float(settings.probe_copy_bytes),
    }


def resampled(rng: np.random.Generator, n: int, draws: int) -> Floats:
    """Weightings for the bootstrap, (1 + draws, n): the items as they are, then drawn with replacement."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    return np.concatenate([np.ones((1, n)), drawn])


def ratio(draws: Floats, costs: Floats, amounts: Floats) -> Floats:
    """Cost over amount of those n models of which both are known, by draw; 1 where none is."""
    known = np.isfinite(costs) & np.isfinite(amounts)
    if not amounts[known].sum() > 0:
        return np.ones(len(draws))
    weights = draws[:, known]
    whole = costs[known].sum() / amounts[known].sum()
    total = weights @ amounts[known]
    return np.where(total > 0, weights @ costs[known] / np.maximum(total, _TINY), whole)


def fitted(draws: Floats, features: Floats, costs: Floats) -> tuple[Floats, float | None]:
    """Coefficients by draw (B, J), and the error on models left out, where there are enough.

    The error is the sum of absolute errors over the sum of costs, each model predicted from the others: one fold in
    forty.
    """
    known = np.isfinite(costs) & np.isfinite(features).all(axis=1)
    features, costs = features[known], costs[known]
    coefficients = non_negative(features, costs, draws[:, known])
    if len(costs) < _FEWEST or not costs.sum() > 0:
        return coefficients, None
    folds = np.arange(len(costs)) % _MOST_FOLDS
    others = (folds[None, :] != np.arange(folds.max() + 1)[:, None]).astype(np.float64)
    predicted = (features * non_negative(features, costs, others)[folds]).sum(axis=1)
    return coefficients, float(np.abs(costs - predicted).sum() / costs.sum())


def non_negative(features: Floats, costs: Floats, weights: Floats) -> Floats:
    """Coefficients (B, J) >= 0 of the Poisson regression with the identity link, for each of B weightings.

    The variance grows with the mean, so that large models do not drown small ones as in least squares, and the fitted
    costs add up to the measured ones. The multiplicative updates of expectation-maximisation (Richardson, J. Opt.
    Soc. Am. 62, 1972) never leave the non-negative numbers.

    Args:
        features: (n, J), none negative.
        costs: (n,), none negative.
        weights: (B, n), none negative.
    """
    scale = np.maximum(features.sum(axis=0), _TINY)
    x = features / scale
    exposure = np.maximum(weights @ x, _TINY)
    # The totals match from the first step on; only the shares of the columns move.
    share = np.maximum((weights @ costs) / exposure.sum(axis=1), _TINY)
    beta = np.repeat(share[:, None], x.shape[1], axis=1)
    for _ in range(_STEPS):
        beta = beta * ((weights * costs / np.maximum(beta @ x.T, _TINY)) @ x) / exposure
    coefficients: Floats = beta / scale
    return coefficients
