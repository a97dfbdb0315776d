"""A background that fits a hub: the names that its uploaders declare, and a general vocabulary where these are few.

A score is the log-odds of a query against an average background concept (`probelog.ranking.matched_heads`): it says most
where the background holds what the hub's logits could be instead. Names that no logit stands for dilute it (on the bench
hub 500 of ImageNet's beside the hub's own cost 6 points of top-1), so that they are only taken where the hub declares
too few, and then those that stand out for its logits.

Labels are a vocabulary here: which logit declares a name plays no part.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from pipelines.labels.labels import names_in
from probelog.arrays import Floats
from probelog.ranking.matched_heads import HeadSpace
from probelog.ranking.names import canonical_name

# With fewer names answers become worse (docs/results.md): 100 instead of 245 lost 6 points of top-1 on the bench hub.
FEWEST = 200
# Of a million models a thousand labels each would be read; a larger vocabulary is a flood.
_LABELS_OF_MODEL = 2000
# No uploader fills more than this share of the background, where there are others.
_SHARE_OF_OWNER = 1 / 20
# So many times the names that are taken are considered.
_CONSIDERED = 4


def declared_names(models: Iterable[tuple[str, Sequence[str]]], count: int, seed: int) -> list[str]:
    """Names that models declare, those of most uploaders first: at most ``_CONSIDERED * count``.

    Every name counts for one of the uploaders that declare it, the one that it counts least for; an uploader whose share
    is full gives no more.

    Args:
        models: repository and labels of every model.
        count: how many names a background has at most.
        seed: of the order of names that equally many uploaders declare.
    """
    owners: dict[str, set[str]] = {}
    known: dict[str, list[str]] = {}
    for repo, labels in models:
        owner = repo.partition("/")[0]
        for label in labels[:_LABELS_OF_MODEL]:
            if label not in known:
                known[label] = names_in(label)
            for name in known[label]:
                owners.setdefault(name, set()).add(owner)
    uploaders = len(set[str]().union(*owners.values()))
    share = max(_SHARE_OF_OWNER, 1 / max(uploaders, 1))
    limit, considered = max(1, round(count * share)), _CONSIDERED * count
    given = Counter[str]()
    chosen: list[str] = []
    for name in sorted(owners, key=lambda name: (-len(owners[name]), _hash(seed, name))):
        owner = min(owners[name], key=lambda owner: (given[owner], owner))
        if given[owner] < limit and len(chosen) < considered:
            given[owner] += 1
            chosen.append(name)
    return chosen


def hub_background(
    declared: Sequence[str],
    general: Sequence[str],
    count: int,
    embed: Callable[[Sequence[str]], Floats],
    embeddings: Floats,
    directions: Callable[[], Floats],
) -> list[str]:
    """The background of a hub: at most ``count`` names, in alphabetical order.

    Args:
        declared: what its models declare (``declared_names``).
        general: a vocabulary of everything.
        count: how many names.
        embed: unit vectors (C, d) of names.
        embeddings: (n, d) unit vectors of the probes.
        directions: (S, d) of a sample of the hub's logits; only read where declared names are few.
    """
    if len(declared) > count:
        return sorted(declared[number] for number in spread(embed(declared), count, first=(count + 1) // 2))
    missing = min(FEWEST, count) - len(declared)
    if missing <= 0:
        return sorted(declared)
    others = [name for name in general if canonical_name(name) not in {*declared}]
    return sorted([*declared, *fitting(others, missing, embed(others), embeddings, directions())])


def spread(vectors: Floats, count: int, first: int) -> list[int]:
    """Numbers of ``count`` of the unit vectors (C, d): the ``first`` ones, then those that are farthest from all before.

    The farthest-point traversal of Gonzalez (1985) reaches what few name; alone it would leave out what most name.
    """
    vectors = np.asarray(vectors, np.float32)
    chosen = [*range(min(first, count, len(vectors)))]
    nearest = (vectors @ vectors[chosen].T).max(axis=1)
    nearest[chosen] = np.inf
    while len(chosen) < min(count, len(vectors)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
        nearest[chosen[-1]] = np.inf
    return chosen


def fitting(
    names: Sequence[str], count: int, vectors: Floats, embeddings: Floats, directions: Floats
) -> list[str]:
    """The ``count`` names that stand out for most of the logits; names of no logit only where there are no others.

    For each logit the name with the highest standardised cosine (over logits): plain cosines would take the few names
    that are near to everything.

    Args:
        names: V names.
        count: how many.
        vectors: (V, d) of the names.
        embeddings: (n, d) of the probes.
        directions: (S, d) of the logits.
    """
    cosines = np.asarray(directions, np.float64) @ HeadSpace(embeddings, vectors).background.T
    spreads = cosines.std(axis=0)
    standardised = (cosines - cosines.mean(axis=0)) / np.where(spreads > 0, spreads, 1.0)
    votes = np.bincount(standardised.argmax(axis=1), minlength=len(names))
    return [names[number] for number in np.argsort(-votes, kind="stable")[:count]]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"background {seed} {name}".encode()).digest()
