"""How many logits a model has, by its number of parameters.

The Hub's listing tells no labels. But classifiers of one body differ by their last layer alone, which has as many
parameters a logit as it has inputs (and one more for a bias). Two measured models of one architecture with different
numbers of logits tell that number; every other model of the same body follows, exactly:

    logits = logits_1 + (parameters - parameters_1) / d,    d = (parameters_2 - parameters_1) / (logits_2 - logits_1).

Where d or the result is no whole number, the bodies differ, and nothing is said.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_MOST_LOGITS = 25_000
# Of the measured models of an architecture so many, the nearest in parameters, are compared with each other.
_NEAREST = 12


def logits_by_parameters(
    architectures: npt.NDArray[np.object_],
    parameters: Floats,
    measured_architectures: npt.NDArray[np.object_],
    measured_parameters: Floats,
    measured_logits: Floats,
) -> Floats:
    """Logits of each model, (N,), NaN where they do not follow.

    Args:
        architectures: (N,) names, "" for an unknown one.
        parameters: (N,), NaN for an unknown number.
        measured_architectures: (n,) names of the models whose logits are known.
        measured_parameters: (n,).
        measured_logits: (n,).
    """
    of = defaultdict(set)
    for name, p, logits in zip(measured_architectures, measured_parameters, measured_logits, strict=True):
        if name and np.isfinite(p):
            of[name].add((int(p), int(logits)))
    known: dict[tuple[str, int], float] = {}
    found = np.full(len(parameters), np.nan)
    for i, (name, p) in enumerate(zip(architectures, parameters, strict=True)):
        if name in of and np.isfinite(p):
            key = (name, int(p))
            if key not in known:
                known[key] = _logits(int(p), of[name])
            found[i] = known[key]
    return found


def _logits(parameters: int, measured: set[tuple[int, int]]) -> float:
    near = sorted(measured, key=lambda one: abs(one[0] - parameters))[:_NEAREST]
    same = {logits for p, logits in near if p == parameters}
    if same:
        return float(next(iter(same))) if len(same) == 1 else float("nan")
    votes: Counter[int] = Counter()
    for i, (p1, logits1) in enumerate(near):
        for p2, logits2 in near[i + 1 :]:
            if logits1 == logits2:
                continue
            a_logit, rest = divmod(p2 - p1, logits2 - logits1)
            if rest or a_logit < 1:
                continue
            more, rest = divmod(parameters - p1, a_logit)
            logits = logits1 + more
            if not rest and 1 <= logits <= _MOST_LOGITS and logits * a_logit < parameters:
                votes[logits] += 1
    return float(votes.most_common(1)[0][0]) if votes else float("nan")
