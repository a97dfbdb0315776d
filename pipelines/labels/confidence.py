"""Fits the confidence of hits on what uploaders declare: no truth is needed, and labels that lie only blunt it.

Declared labels that name something are asked as concepts, as a user would ask them; their best-scored logits are
right or wrong by the label rule of ``pipelines.labels.labels``. Labels say too little rather than too much ("puppy" on a
logit that is asked for "dog"), so that the confidence errs towards caution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.labels.labels import Meaning, imagenet_lexicon, names_in
from probelog.arrays import Floats, Ints
from probelog.ranking import confidence, matched_heads
from probelog.ranking.confidence import ColumnStatistics, Confidence
from probelog.ranking.matched_heads import Float64, HeadSpace

# The cost of the fit stays the same however large the hub is: so many concepts are asked of so many logits.
MAX_CONCEPTS = 300
MAX_LOGITS = 50_000
# Learned from are so many of the best-scored labelled logits of every concept: as many as a person looks at.
BEST = 10

Embed = Callable[[Sequence[str]], Floats]


def fit_confidence(
    directions: Floats,
    owners: Ints,
    offsets: Floats,
    labels: Sequence[str],
    space: HeadSpace,
    b: float,
    embed: Embed,
    background_names: Sequence[str],
    statistics: ColumnStatistics,
    seed: int,
) -> Confidence:
    """The confidence of a gallery's hits.

    Args:
        directions: (N, d) of the gallery's logits.
        owners: (N,) whose the logits are, a number for each model.
        offsets: (N,) of the logits, over the whole background.
        labels: (N,) each logit's declared label; empty where unknown, and for the negative of a one-logit head.
        space: holds the background's directions.
        b: the score's temperature.
        embed: unit vectors (C, d) of concepts' names in the index's prompt.
        background_names: (B,) names of the background concepts.
        statistics: of the background over this gallery.
        seed: of the choice of logits and of concepts, where there are more than ``MAX_LOGITS`` and
            ``MAX_CONCEPTS``.
    """
    chosen = np.arange(len(labels))
    if len(chosen) > MAX_LOGITS:
        chosen = np.sort(np.random.default_rng([seed, len(chosen)]).permutation(len(chosen))[:MAX_LOGITS])
    some = [labels[number] for number in chosen.tolist()]
    asked = LabelledConcepts.of(some, space, embed, background_names, seed)
    return asked.fit(
        directions[chosen], owners[chosen], offsets[chosen], some, space.background, b, statistics
    )


@dataclass(frozen=True)
class LabelledConcepts:
    """Declared names as concepts that can be asked.

    Attributes:
        names: each concept's normalised synonyms, the asked one first.
        directions: (C, d).
        excluded: for each concept the numbers of the background concepts of the same name.
    """

    names: list[list[str]]
    directions: Float64
    excluded: Sequence[Ints]

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        space: HeadSpace,
        embed: Embed,
        background_names: Sequence[str],
        seed: int,
    ) -> LabelledConcepts:
        """At most ``MAX_CONCEPTS`` of the names among labels, those with the smallest hashes."""
        concepts: dict[str, list[str]] = {}
        for label in dict.fromkeys(labels):
            if label_names := names_in(label):
                known = concepts.setdefault(label_names[0], [])
                known += [name for name in label_names if name not in known]
        chosen = sorted(concepts, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
        names = [concepts[name] for name in sorted(chosen[:MAX_CONCEPTS])]
        rivals = [set(names_in(name)) for name in background_names]
        excluded = [
            np.array([i for i, rival in enumerate(rivals) if not rival.isdisjoint(label_names)], np.int64)
            for label_names in names
        ]
        if not names:
            return cls([], np.empty((0, len(space.centre))), [])
        return cls(
            names, space.of_texts(embed([label_names[0] for label_names in names]), excluded), excluded
        )

    def fit(
        self,
        directions: Floats,
        owners: Ints,
        offsets: Floats,
        labels: Sequence[str],
        background: Floats,
        b: float,
        statistics: ColumnStatistics,
    ) -> Confidence:
        """Fit on the concepts that some of these logits' labels (N,) name; the others are as if nobody knew them."""
        declared = {label: names for label in set(labels) if (names := names_in(label))}
        asked = {names[0] for names in declared.values()}
        candidates = np.flatnonzero(np.array([label in declared for label in labels], bool))
        lexicon = imagenet_lexicon()
        meanings: dict[str, Meaning] = {}
        directions = np.asarray(directions, np.float64)
        scores, margins = [np.empty(0)], [np.empty(0)]
        relevant: list[bool] = []
        for number, names in enumerate(self.names):
            if names[0] not in asked:
                continue
            column = matched_heads.scores_of_concept(
                self.directions[number], directions, owners, offsets, background, b, self.excluded[number]
            )
            best = candidates[np.argsort(-column[candidates], kind="stable")[:BEST]]
            scores.append(column[best])
            margins.append(
                confidence.hit_margins(
                    directions, offsets, column, best, background, b, statistics, self.excluded[number]
                )
            )
            meaning_of_names = lexicon.meaning(names)
            for label in (labels[hit] for hit in best.tolist()):
                if label not in meanings:
                    meanings[label] = lexicon.meaning(declared[label])
                relevant.append(meaning_of_names.matches(meanings[label]))
        return confidence.fit(np.concatenate(scores), np.concatenate(margins), relevant, len(background))
