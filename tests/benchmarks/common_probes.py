"""What probes in common cost completion: the error of entries that no model saw, against what it would have answered.

    uv run python -m tests.benchmarks.common_probes --index STORE [--index STORE-2] [--share 0.25] [--common 0.75]

The stores must hold observations of all probes. Each model keeps a share of them, drawn as the probe stage draws, with
different shares of those in common; rows are completed by ALS, rank and regularisation chosen by held-out entries, as in
the method "version 2 + ALS". Prints for each the error of what was filled in, in a row's standard deviations.
"""

from __future__ import annotations

import argparse

import numpy as np

from pipelines.benchmark.probed import ProbedHub
from probelog.evaluation.completed import complete_by_als


def main() -> None:
    """Print a line for each store, share and share in common."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", action="append", required=True)
    parser.add_argument("--share", type=float, nargs="+", default=[1 / 4, 1 / 16])
    parser.add_argument("--common", type=float, nargs="+", default=[0.0, 0.5, 0.75])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for uri in given.index:
        hub = ProbedHub.open(uri, lambda model: "copy" if model.copy_of_repo else None)
        for share in given.share:
            for common in given.common:
                error = error_of_unseen(hub, share, common, given.seed)
                print(f"{hub.name}  share {share:g}  common {common:g}  RMSE {error:.3f}", flush=True)


def error_of_unseen(hub: ProbedHub, share: float, common: float, seed: int) -> float:
    """Root mean squared error of all entries on probes that their model did not see."""
    truth = np.concatenate([model.values for model in hub.observed])
    gallery, kept = hub.gallery(share, seed, common)
    squares, entries, start = 0.0, 0, 0
    for seen, completed in zip(gallery.models, complete_by_als(gallery).models, strict=True):
        rows = truth[kept[start : start + len(seen.values)]].astype(np.float64)
        start += len(seen.values)
        mean, deviation = seen.values.mean(axis=1, keepdims=True), seen.values.std(axis=1, keepdims=True)
        errors = np.delete((rows - mean) / deviation - completed.values, seen.probes, axis=1)
        squares, entries = squares + float(np.square(errors).sum()), entries + errors.size
    return float(np.sqrt(squares / entries))


if __name__ == "__main__":
    main()
