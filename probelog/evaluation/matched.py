"""Our own method as one of the methods: matched heads (``probelog.ranking.matched_heads``)."""

from __future__ import annotations

import numpy as np

from probelog.arrays import Floats
from probelog.evaluation.gallery import Concepts, Gallery
from probelog.ranking import matched_heads


def rank_by_matched_heads(
    gallery: Gallery,
    concepts: Concepts,
    ridge: float = matched_heads.RIDGE,
    text_units: float = matched_heads.SHARPNESS,
    score_units: float = matched_heads.SHARPNESS,
    image_share: float = matched_heads.IMAGE_SHARE,
) -> Floats:
    """Log-odds of every concept for every logit: (C, N).

    Args:
        gallery: N logits.
        concepts: C queries.
        ridge: rho, see ``matching.HeadSpace``.
        text_units: the zero-shot temperature, see there.
        score_units: the score's temperature, see ``matching.sharpness``.
        image_share: how much of an image query is its own embedding.
    """
    space = matched_heads.HeadSpace(gallery.embeddings, concepts.background, ridge, text_units, image_share)
    directions = np.concatenate([space.of_model(model) for model in gallery.models])
    if concepts.images is None:
        wanted = space.of_texts(concepts.queries, concepts.excluded)
    else:
        wanted = np.concatenate([space.of_images(images) for images in concepts.images])
    similarities = directions @ wanted.T
    b = matched_heads.sharpness(directions, space.background, score_units)
    offset = matched_heads.offsets(directions, space.background, b)
    return np.stack(
        [
            matched_heads.scores(column, directions, offset, space.background, b, excluded)
            for column, excluded in zip(similarities.T, concepts.excluded, strict=True)
        ]
    )
