"""From what is known of the models and what was measured: a forecast, with the interval that the measurements leave.

Every quantity is computed from the measurements as they are and again from each of 200 bootstrap draws of them
(models drawn with replacement, everything fitted anew), with the errors of single models added as noise and the share
of failures drawn from its posterior (Jeffreys' prior). The interval is the middle 80 %. It covers what a sample does
not tell; not that machines, networks and neighbours are slower on another day.

What a model costs is a sum of non-negative parts (`non_negative`): a worker's busy seconds by model, probes, and
parameters times probes; a download's seconds by model and bytes. How the busy seconds divide into loading, preparing
and computing is taken as measured: finer predictions were wrong by more than half.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.forecast.estimates import Chosen, Cost, Estimate, Left, SizeClass, Wall
from pipelines.forecast.known import SIZE_CLASSES, Known, logits_by_parameters, size_class
from pipelines.forecast.measured import PARTS, Measured
from pipelines.probe.timeline import BUSY, Run
from probelog.hub.rate_limit import HUB_LIMITS, WINDOW_SECONDS

Floats = npt.NDArray[np.float64]

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
        probes: in the probe set; ``seen``: by each model.
        workers: None for as many as were measured.
        machine_workers: that this machine would hold.
        in_flight, gpus_per_worker, cache_bytes: as configured.
        probe_copy_bytes: of the probe set that each node copies; 0 where the store is on the node.
        account: of the Hub's limits that apply; None: no limit.
        price: of one worker hour, or of a GPU hour where workers have GPUs; None: not asked.
    """

    probes: int
    seen: int
    workers: int | None
    machine_workers: int
    in_flight: int
    gpus_per_worker: float
    cache_bytes: int
    probe_copy_bytes: int
    account: str | None
    price: float | None


@dataclass(frozen=True)
class StoreRates:
    """Bytes in the measured store: for each logit (descriptors; the index's logits), each model of the index, and
    what an index holds whatever its size. None where there is no completion or no index.
    """

    descriptors: float | None = None
    index_logits: float | None = None
    index_models: float | None = None
    index_fixed: float | None = None


def predict(
    known: Known,
    measured: Measured,
    failed: Mapping[str, int],
    joined: Known,
    rates: StoreRates,
    settings: Settings,
) -> Left:
    """The forecast for some models.

    Args:
        known: the models that are left.
        measured: what costs are fitted on.
        failed: how many models failed beside those measured, by reason, without those of which it was known.
        joined: what the catalogue says of the measured models, as far as it lists them.
        rates: of the store in which they were measured.
        settings: of the run.
    """
    return _Prediction(known, measured, failed, joined, rates, settings).left()


@dataclass
class _Prediction:
    known: Known
    measured: Measured
    failed: Mapping[str, int]
    joined: Known
    rates: StoreRates
    settings: Settings
    chosen: dict[str, Chosen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        measured = self.measured
        self.rng = np.random.default_rng(0)
        self.weights = resampled(self.rng, len(measured), _DRAWS if len(measured) >= _FEWEST else 0)
        self.sure = self.known.chosen(~self.known.doomed)
        self.draws = len(self.weights)

    def left(self) -> Left:
        indexed, failures = self._successes()
        share = indexed / max(1, len(self.sure))
        data, each, sizes = self._bytes()
        parameters = self._parameters()
        seconds, busy_each = self._seconds(each, parameters, share)
        busy = sum((seconds[part] for part in BUSY), np.zeros(self.draws))
        runs = self._runs()
        overlap = (
            sum(run.busy_seconds for run in runs) / sum(run.workers * run.wall_seconds for run in runs)
            if runs
            else None
        )
        start = float(np.mean([run.start_seconds for run in runs])) if runs else 0.0
        paid_seconds = busy / (overlap or 1.0)
        requests, api = self._requests()
        workers = self.settings.workers or (runs[-1].workers if runs else self.settings.machine_workers)
        wall, wall_draws = self._wall(
            workers, start, overlap, paid_seconds, requests, api, seconds["download"]
        )
        logits = self._logits(share)
        unit = "GPU" if self.settings.gpus_per_worker > 0 else "worker"
        hours = wall_draws * workers * (self.settings.gpus_per_worker or 1.0) / _HOUR
        price = self.settings.price
        return Left(
            models=len(self.known),
            indexed=Estimate.of(indexed),
            failures=failures,
            foretold=len(self.known) - len(self.sure),
            bytes=Estimate.of(data),
            sizes=sizes,
            file_requests=Estimate.of(requests),
            api_requests=api,
            limit_hours={
                account: _limited(float(requests[0]), api, account) / _HOUR for account in HUB_LIMITS
            },
            seconds={part: Estimate.of(seconds[part]) for part in PARTS},
            busy_hours=Estimate.of(busy / _HOUR),
            worker_hours=Estimate.of(paid_seconds / _HOUR),
            classes=self._classes(
                parameters, each, busy_each * (paid_seconds[0] / max(busy_each.sum(), 1e-12))
            ),
            logits=Estimate.of(logits),
            store_bytes={
                kind: Estimate.of(draws) for kind, draws in self._store(indexed, logits, failures).items()
            },
            disk_bytes=self._disk(each, workers),
            wall=wall,
            cost=Cost(unit, Estimate.of(hours), price, None if price is None else Estimate.of(hours * price)),
            chosen=self.chosen,
        )

    # How many

    def _successes(self) -> tuple[Floats, dict[str, float]]:
        """Models indexed, by draw, and failures by reason."""
        found = self.failed
        failed, good = sum(found.values()), self.measured.counts.indexed
        share = np.append(failed / (failed + good), self.rng.beta(failed + 0.5, good + 0.5, self.draws - 1))
        n = len(self.sure)
        wrong = np.append(n * share[:1], self.rng.binomial(n, share[1:]))
        expected = {reason: n * count / (failed + good) for reason, count in found.items()}
        for reason, count in self.known.failures().items():
            expected[reason] = expected.get(reason, 0.0) + count
        return n - wrong, dict(sorted(expected.items(), key=lambda item: -item[1]))

    # Bytes and requests

    def _bytes(self) -> tuple[Floats, Floats, dict[str, int]]:
        """Bytes of all downloads by draw, of each model, and how many models' were told by what."""
        sure, measured = self.sure, self.measured
        each = sure.listed.copy()
        total = np.full(self.draws, np.nansum(each))
        by_type = np.isnan(each) & ~np.isnan(sure.weights)
        by_number = np.isnan(each) & ~by_type & ~np.isnan(sure.parameters)
        unknown = np.isnan(each) & ~by_type & ~by_number
        sizes = {"file sizes": int(np.isfinite(each).sum())}
        sizes["parameters by type"] = int(by_type.sum())
        sizes["number of parameters"], sizes["nothing"] = int(by_number.sum()), int(unknown.sum())
        guesses = (  # what is known of it, and what measured models cost over one feature
            (
                by_type,
                sure.weights,
                np.ones(len(sure)),
                measured.bytes - self.joined.weights,
                np.ones(len(measured)),
            ),
            (by_number, np.zeros(len(sure)), sure.parameters, measured.bytes, measured.parameters),
            (unknown, np.zeros(len(sure)), np.ones(len(sure)), measured.bytes, np.ones(len(measured))),
        )
        for rows, exact, feature, costs, measured_feature in guesses:
            usable = np.isfinite(costs) & np.isfinite(measured_feature)
            each[rows] = exact[rows]
            total += exact[rows].sum()
            if rows.any() and usable.any():
                fit, guessed = self._predicted(
                    measured_feature[usable, None],
                    np.maximum(costs[usable], 0.0),
                    usable,
                    feature[rows, None],
                )
                total += fit
                each[rows] += guessed
        return total, np.nan_to_num(each), sizes

    def _parameters(self) -> Floats:
        """Of each model; where unknown from its bytes, else the mean of the measured ones."""
        parameters = self.sure.parameters.copy()
        each, measured = self.sure.weights, self.measured
        usable = np.isfinite(measured.bytes)
        rate = measured.parameters[usable].sum() / max(measured.bytes[usable].sum(), 1.0)
        parameters = np.where(np.isnan(parameters), each * rate, parameters)
        return np.where(np.isnan(parameters), measured.parameters.mean(), parameters)

    def _requests(self) -> tuple[Floats, int]:
        """Requests of files by draw, and of the API."""
        files, api = self.sure.files.astype(np.float64), self.sure.api
        unlisted = int(api.sum())
        listed = files[api == 0]
        # Where nothing is listed: as many files as the others have; of a model alone, its configuration and weights.
        typical = float(listed.mean()) if len(listed) else 2.0
        return np.full(self.draws, listed.sum() + unlisted * typical), unlisted

    # Time

    def _seconds(self, sizes: Floats, parameters: Floats, share: Floats) -> tuple[dict[str, Floats], Floats]:
        """Seconds by part and draw, and the busy seconds of each model."""
        measured, n, m = self.measured, len(self.sure), len(self.measured)
        seen = np.full(n, float(self.settings.seen))
        busy = np.sum([measured.seconds[part] for part in BUSY], axis=0)
        usable = np.isfinite(busy)
        total, each = self._predicted(
            np.stack([np.ones(m), measured.seen, measured.seen * measured.parameters], axis=1)[usable],
            busy[usable],
            usable,
            np.stack([np.ones(n), seen, seen * parameters], axis=1),
            "busy seconds",
            ("1", "probes", "parameters x probes"),
        )
        whole = max(float(busy[usable].sum()), _TINY)
        seconds = {
            part: total * share * (float(measured.seconds[part][usable].sum()) / whole) for part in BUSY
        }
        download = measured.seconds["download"]
        usable = np.isfinite(download) & np.isfinite(measured.bytes)
        downloads, _ = self._predicted(
            np.stack([np.ones(m), measured.bytes], axis=1)[usable],
            download[usable],
            usable,
            np.stack([np.ones(n), sizes], axis=1),
            "download",
            ("1", "bytes"),
        )
        return {"download": downloads * share, **seconds}, each * share[0]

    def _runs(self) -> Sequence[Run]:
        """Runs with the wanted number of workers; all where there is none."""
        runs = self.measured.runs
        return [run for run in runs if run.workers == self.settings.workers] or runs

    def _wall(
        self,
        workers: int,
        start: float,
        overlap: float | None,
        paid_seconds: Floats,
        requests: Floats,
        api: int,
        download: Floats,
    ) -> tuple[Wall, Floats]:
        account = self.settings.account
        limits = {
            "compute": start + paid_seconds / workers,
            "requests": np.array([0.0 if account is None else _limited(r, api, account) for r in requests]),
            "download": start + download / (workers * self.settings.in_flight),
        }
        total = np.max(list(limits.values()), axis=0)
        bound = max(limits, key=lambda name: float(limits[name][0]))
        estimates = {name: Estimate.of(draws) for name, draws in limits.items()}
        return Wall(
            workers, **estimates, total=Estimate.of(total), bound=bound, start_seconds=start, overlap=overlap
        ), total

    def _classes(self, parameters: Floats, sizes: Floats, paid_seconds: Floats) -> list[SizeClass]:
        number, known = size_class(parameters), np.isfinite(self.sure.parameters)
        return [
            SizeClass(
                name,
                int((number == i).sum()),
                int(((number == i) & ~known).sum()),
                float(sizes[number == i].sum()),
                float(paid_seconds[number == i].sum() / _HOUR),
            )
            for i, name in enumerate(SIZE_CLASSES)
        ]

    # What is kept

    def _logits(self, share: Floats) -> Floats:
        """By draw: what is declared, or follows from the number of parameters; else the mean of measured models (of
        those for which neither tells, if there are such).
        """
        measured, joined = self.measured, self.joined
        count = self.sure.labels
        heads = (measured.architectures, joined.parameters, measured.logits)
        followed = logits_by_parameters(self.sure.architectures, self.sure.parameters, *heads)
        count = np.where(np.isnan(count), followed, count)
        bodies = Counter(measured.architectures.tolist())
        lonely = np.array([bodies[name] == 1 for name in measured.architectures], bool)
        like = np.isnan(joined.labels) & lonely
        like = like if like.any() else np.ones(len(measured), bool)
        weights = self.weights[:, like]
        mean = (weights @ measured.logits[like]) / np.maximum(weights.sum(axis=1), 1e-12)
        mean = np.where(weights.sum(axis=1) > 0, mean, measured.logits[like].mean())
        untold_left = int(np.isnan(count).sum())
        total: Floats = np.nansum(count) + untold_left * mean
        spread = float(measured.logits[like].std()) * math.sqrt(untold_left)
        total[1:] += spread * self.rng.standard_normal(self.draws - 1)
        return np.maximum(total, 0.0) * share

    def _store(self, indexed: Floats, logits: Floats, failures: Mapping[str, float]) -> dict[str, Floats]:
        """Bytes by kind and draw."""
        measured = self.measured
        receipts = [receipt for receipt in measured.receipts if receipt.counts is not None]
        counts = [receipt.counts for receipt in receipts if receipt.counts is not None]
        models = sum(count.indexed for count in counts)
        failed = sum(sum(count.failed.values()) for count in counts)
        values = sum(count.logits for count in counts) * max(1, round(measured.fraction * measured.probes))
        remaining = np.full(self.draws, float(len(self.known)))
        kinds = {
            "observations": ([r.observations.size for r in receipts], values, logits * self.settings.seen),
            "models": ([r.models.size for r in receipts], models, indexed),
            "weights": ([0 if r.weights is None else r.weights.size for r in receipts], models, indexed),
            "failures": (
                [r.failures.size for r in receipts],
                failed,
                np.full(self.draws, sum(failures.values())),
            ),
            "receipts": (
                [measured.receipt_bytes[r.name] for r in receipts],
                sum(len(r.items) for r in receipts),
                remaining,
            ),
        }
        sizes_by_kind: dict[str, Floats] = {}
        for kind, (sizes, amount, requested) in kinds.items():
            sizes_by_kind[kind] = np.asarray(
                sum(sizes) / amount * requested if amount else 0.0 * requested, np.float64
            )
        rates = self.rates
        if rates.descriptors is not None:
            sizes_by_kind["descriptors"] = logits * rates.descriptors
        if (
            rates.index_logits is not None
            and rates.index_models is not None
            and rates.index_fixed is not None
        ):
            sizes_by_kind["index"] = logits * rates.index_logits + indexed * rates.index_models
        return sizes_by_kind

    def _disk(self, sizes: Floats, workers: int) -> dict[str, float]:
        """Bytes on a node that runs all workers: the largest downloads at once, prepared probes, the probe set."""
        flying = np.sort(sizes)[::-1][: workers * self.settings.in_flight].sum()
        cached = self.settings.probes * sum(self.measured.image_bytes)
        return {
            "downloads under way": float(flying),
            "prepared probes": float(min(cached, self.settings.cache_bytes)),
            "probe set": float(self.settings.probe_copy_bytes),
        }

    # Behind the scenes

    def _predicted(
        self,
        features: Floats,
        costs: Floats,
        told: npt.NDArray[np.bool_],
        rows: Floats,
        name: str | None = None,
        names: Sequence[str] = (),
    ) -> tuple[Floats, Floats]:
        """The sum of the costs of models, by draw, and each one's; their features are ``rows``, (N, J).

        Fitted on the ``features`` and ``costs`` of those measured models that are ``told``, on each draw of them. The
        noise of single models is added.
        """
        beta = non_negative(features, costs, self.weights[:, told])
        each: Floats = rows @ beta[0]
        fitted = features @ beta[0]
        noise = (
            math.sqrt(((costs - fitted) ** 2).sum() / max((fitted**2).sum(), _TINY)) if len(costs) else 0.0
        )
        total = (rows.sum(axis=0) * beta).sum(axis=1)
        spread = noise * math.sqrt(float((each**2).sum()))
        total[1:] += spread * self.rng.standard_normal(self.draws - 1)
        if name is not None:
            self.chosen[name] = Chosen(list(names), False, self._left_out_error(features, costs))
        return np.maximum(total, 0.0), each

    def _left_out_error(self, features: Floats, costs: Floats) -> float | None:
        """Sum of absolute errors over sum of costs, each model predicted from the others: one fold in forty."""
        if len(costs) < _FEWEST or not costs.sum() > 0:
            return None
        folds = np.arange(len(costs)) % _MOST_FOLDS
        others = (folds[None, :] != np.arange(folds.max() + 1)[:, None]).astype(np.float64)
        predicted = (features * non_negative(features, costs, others)[folds]).sum(axis=1)
        return float(np.abs(costs - predicted).sum() / costs.sum())


def resampled(rng: np.random.Generator, n: int, draws: int) -> Floats:
    """Weightings for the bootstrap, (1 + draws, n): the items as they are, then drawn with replacement."""
    if not n:
        return np.ones((1 + draws, 0))
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    return np.concatenate([np.ones((1, n)), drawn])


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
    scale = features.mean(axis=0) if len(features) else np.zeros(features.shape[1])
    used = scale > 0
    result = np.zeros((len(weights), features.shape[1]))
    if not used.any():
        return result
    x = features[:, used] / scale[used]
    exposure = np.maximum(weights @ x, _TINY)
    # The means match from the first step on; only the shares of the columns move.
    share = np.maximum((weights @ costs) / exposure.sum(axis=1), _TINY)
    beta = np.repeat(share[:, None], x.shape[1], axis=1)
    for _ in range(_STEPS if x.shape[1] > 1 else 1):
        beta = beta * ((weights * costs / np.maximum(beta @ x.T, _TINY)) @ x) / exposure
    result[:, used] = beta / scale[used]
    return result


def _limited(files: float, api: int, account: str) -> float:
    """Seconds that an account's limits take at the least: the first window's requests may come at once."""
    limits = HUB_LIMITS[account]
    windows = max(files / limits["file"], api / limits["api"]) - 1.0
    return max(0.0, windows) * WINDOW_SECONDS
