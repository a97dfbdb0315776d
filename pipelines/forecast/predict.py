"""From what is known of the models and what was measured: a forecast, with the interval that the measurements leave.

Every quantity is computed from the measurements as they are and again from each of 200 bootstrap draws of them
(models drawn with replacement, everything fitted anew), with the errors on items left out added as noise and the
share of failures drawn from its posterior (Jeffreys' prior). The interval is the middle 80 %. It covers what a sample
does not tell; not that machines, networks and neighbours are slower on another day.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.forecast.estimates import Chosen, Cost, Estimate, Left, SizeClass, Wall
from pipelines.forecast.heads import logits_by_parameters
from pipelines.forecast.known import SIZE_CLASSES, Known, size_class
from pipelines.forecast.measured import PARTS, Measured
from pipelines.forecast.regression import NEVER, Fitted, Shape, choose, resampled
from pipelines.probe.timeline import BUSY, Run
from probelog.hub.rate_limit import HUB_LIMITS, WINDOW_SECONDS

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_DRAWS = 200
_FEWEST = 3
_HOUR = 3600.0

# Features of each part of a model's time, and the candidates of `choose`, the simplest first.
_ONE, _BYTES, _PARAMETERS = 0, 1, 2
_SEEN, _WORK = 1, 2
_NEW, _ALL = 1, 2
_SHAPES: Mapping[str, Sequence[Shape]] = {
    "download": [Shape((_ONE,)), Shape((_BYTES,)), Shape((_ONE, _BYTES))],
    "load": [
        Shape(columns, shrink)
        for shrink in (NEVER, 1.0)
        for columns in ((_ONE,), (_ONE, _BYTES), (_ONE, _BYTES, _PARAMETERS))
    ],
    "preprocess": [Shape((_ALL,)), Shape((_NEW,)), Shape((_NEW, _ALL))],
    "forward": [
        Shape(columns, shrink)
        for shrink in (NEVER, 4.0, 1.0)
        for columns in ((_SEEN,), (_WORK,), (_SEEN, _WORK), (_ONE, _SEEN, _WORK))
    ],
}
FEATURES: Mapping[str, Sequence[str]] = {
    "download": ("1", "bytes"),
    "load": ("1", "bytes", "parameters"),
    "preprocess": ("1", "probes new to the node", "probes"),
    "forward": ("1", "probes", "parameters x probes"),
    "bytes beside weights": ("1", "bytes of weights"),
}


@dataclass(frozen=True)
class Settings:
    """What a prediction depends on besides the models: from the configuration and the command line.

    Attributes:
        probes: in the probe set; ``seen``: by each model.
        workers: None for as many as were measured.
        machine_workers: that this machine would hold.
        in_flight, gpus_per_worker, batch_models, cache_bytes: as configured.
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
    batch_models: int
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
        names = sorted({*measured.architectures.tolist()} - {None, ""})
        number = {name: place for place, name in enumerate(names)}
        self.count = len(names) + 1  # the last one: measured models without an architecture
        self.groups = np.array([number.get(name, len(names)) for name in measured.architectures], np.int64)
        self.wanted = np.array([number.get(name, -1) for name in self.sure.architectures], np.int64)
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
        beside = measured.bytes - self.joined.weights
        told = np.isfinite(beside)
        each[by_type] = sure.weights[by_type]
        total += np.nansum(sure.weights[by_type])
        if by_type.any() and told.any():
            features = np.stack([np.ones(int(told.sum())), self.joined.weights[told]], axis=1)
            shapes = [Shape((0,)), Shape((0, 1)), Shape((0,), 1.0)]
            fit = self._choose("bytes beside weights", features, np.maximum(beside[told], 0.0), told, shapes)
            rows = np.stack([np.ones(int(by_type.sum())), sure.weights[by_type]], axis=1)
            total += self._total(fit, rows, self.wanted[by_type])
            each[by_type] += fit.each(rows, self.wanted[by_type])
        sizes["parameters by type"] = int(by_type.sum())
        for name, rows_in, column in (
            ("number of parameters", by_number, measured.parameters),
            ("nothing", unknown, np.ones(len(measured))),
        ):
            sizes[name] = int(rows_in.sum())
            told = np.isfinite(measured.bytes) & np.isfinite(column)
            if rows_in.any() and told.any():
                feature = sure.parameters[rows_in] if name != "nothing" else np.ones(int(rows_in.sum()))
                fit = self._choose(
                    f"bytes from {name}", column[told, None], measured.bytes[told], told, [Shape((0,))]
                )
                total += self._total(fit, feature[:, None], self.wanted[rows_in])
                each[rows_in] = fit.each(feature[:, None], self.wanted[rows_in])
        return total, np.nan_to_num(each), sizes

    def _parameters(self) -> Floats:
        """Of each model; where unknown from its bytes, else the mean of the measured ones."""
        found = self.sure.parameters.copy()
        each, measured = self.sure.weights, self.measured
        told = np.isfinite(measured.bytes)
        rate = measured.parameters[told].sum() / max(measured.bytes[told].sum(), 1.0)
        found = np.where(np.isnan(found), each * rate, found)
        return np.where(np.isnan(found), measured.parameters.mean(), found)

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
        mine, theirs = np.ones(n), np.ones(m)
        seen = np.full(n, float(self.settings.seen))
        new_theirs, new_mine = self._new_probes()
        bytes_theirs = np.nan_to_num(measured.bytes)
        rows = {
            "download": ((theirs, bytes_theirs), (mine, sizes)),
            "load": ((theirs, bytes_theirs, measured.parameters), (mine, sizes, parameters)),
            "preprocess": (
                (theirs, new_theirs, measured.seen),
                (mine, np.full(n, new_mine / max(n, 1)), seen),
            ),
            "forward": (
                (theirs, measured.seen, measured.seen * measured.parameters),
                (mine, seen, seen * parameters),
            ),
        }
        seconds: dict[str, Floats] = {}
        busy = np.zeros(n)
        for part, (fitted_on, wanted) in rows.items():
            costs = measured.seconds[part]
            told = np.isfinite(costs)
            features = np.stack(fitted_on, axis=1)[told]
            fit = self._choose(part, features, costs[told], told, _SHAPES[part])
            mine_rows = np.stack(wanted, axis=1)
            seconds[part] = self._total(fit, mine_rows, self.wanted) * share
            if part in BUSY:
                busy += fit.each(mine_rows, self.wanted) * share[0]
        return seconds, busy

    def _new_probes(self) -> tuple[Floats, float]:
        """Probes that had to be prepared for each measured model, on average, and for all models that are left.

        Models that share a geometry share prepared probes. After k models that each see a share f of N probes,
        N (1 - (1 - f)^k) are prepared. The models that are left are taken to spread over geometries as the measured
        ones do, a share of them over geometries that nobody measured (Good, Biometrika 40, 1953: that of the
        measured ones which are alone with theirs); how many of these there are follows Chao (Scand. J. Stat. 11,
        1984).
        """
        measured, n = self.measured, float(len(self.sure))
        old, new = measured.fraction, self.settings.seen / self.settings.probes
        sizes = np.array([geometry.models for geometry in measured.geometries], np.float64)
        prepared = measured.probes * (1 - (1 - old) ** sizes)
        each = (prepared / np.maximum(sizes, 1))[measured.geometry]
        run = sizes.sum()
        alone, unseen = float((sizes == 1).sum()), self._unseen_geometries()
        novel = alone / run if run else 0.0
        coming = n * (1 - novel) * sizes / max(run, 1.0)
        already = 1 - (1 - new) ** sizes if measured.own else np.zeros(len(sizes))
        total = self.settings.probes * ((1 - already) * (1 - (1 - new) ** coming)).sum()
        if unseen:
            total += self.settings.probes * unseen * (1 - (1 - new) ** (n * novel / unseen))
        return np.where(measured.copies, 0.0, each), float(total)

    def _unseen_geometries(self) -> float:
        sizes = [geometry.models for geometry in self.measured.geometries]
        alone, pairs = sizes.count(1), sizes.count(2)
        return alone**2 / (2 * pairs) if pairs else alone * (alone - 1) / 2

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
        told = {name: Estimate.of(draws) for name, draws in limits.items()}
        return Wall(
            workers, **told, total=Estimate.of(total), bound=bound, start_seconds=start, overlap=overlap
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
        left = np.full(self.draws, float(len(self.known)))
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
                left,
            ),
        }
        parts = math.ceil(len(self.known) / self.settings.batch_models)
        found: dict[str, Floats] = {}
        for kind, (sizes, amount, wanted) in kinds.items():
            rest = measured.part_rests.get(kind, 0.0)
            rate = max(0.0, sum(sizes) - rest * len(sizes)) / amount if amount else 0.0
            found[kind] = np.asarray(parts * rest + rate * wanted, np.float64)
        rates = self.rates
        if rates.descriptors is not None:
            found["descriptors"] = logits * rates.descriptors
        if (
            rates.index_logits is not None
            and rates.index_models is not None
            and rates.index_fixed is not None
        ):
            found["index"] = logits * rates.index_logits + indexed * rates.index_models
        return found

    def _disk(self, sizes: Floats, workers: int) -> dict[str, float]:
        """Bytes on a node that runs all workers: the largest downloads at once, prepared probes, the probe set."""
        flying = np.sort(sizes)[::-1][: workers * self.settings.in_flight].sum()
        images = [geometry.image_bytes for geometry in self.measured.geometries]
        cached = self.settings.probes * (sum(images) + self._unseen_geometries() * float(np.mean(images)))
        return {
            "downloads under way": float(flying),
            "prepared probes": float(min(cached, self.settings.cache_bytes)),
            "probe set": float(self.settings.probe_copy_bytes),
        }

    # Behind the scenes

    def _choose(
        self, name: str, features: Floats, costs: Floats, told: npt.NDArray[np.bool_], shapes: Sequence[Shape]
    ) -> Fitted:
        fit = choose(features, costs, self.groups[told], self.count, shapes, self.weights[:, told])
        names = FEATURES.get(name, (name.removeprefix("bytes from "),))
        self.chosen[name] = Chosen(
            [names[column] for column in fit.shape.columns if column < len(names)],
            fit.shape.shrink != NEVER,
            fit.error,
        )
        return fit

    def _total(self, fit: Fitted, rows: Floats, groups: Ints) -> Floats:
        """Sum of costs by draw: fitted on each draw, with the noise of single items added."""
        present = np.unique(groups)
        sums = np.stack([rows[groups == group].sum(axis=0) for group in present]) if len(rows) else rows
        total = fit.totals(sums, present)
        spread = fit.noise * math.sqrt(float((fit.each(rows, groups) ** 2).sum()))
        total[1:] += spread * self.rng.standard_normal(self.draws - 1)
        return np.maximum(total, 0.0)


def _limited(files: float, api: int, account: str) -> float:
    """Seconds that an account's limits take at the least: the first window's requests may come at once."""
    limits = HUB_LIMITS[account]
    windows = max(files / limits["file"], api / limits["api"]) - 1.0
    return max(0.0, windows) * WINDOW_SECONDS
