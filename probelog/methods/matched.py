"""Our own method as one of the methods: matched heads (``probelog.matching``)."""

from __future__ import annotations

import numpy as np

from probelog import matching
from probelog.arrays import Floats
from probelog.gallery import Concepts, Gallery


def rank_by_matched_heads(
    gallery: Gallery,
    concepts: Concepts,
    ridge: float = matching.RIDGE,
    text_units: float = matching.SHARPNESS,
    score_units: float = matching.SHARPNESS,
    image_share: float = matching.IMAGE_SHARE,
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
    space = matching.HeadSpace(gallery.embeddings, concepts.background, ridge, text_units, image_share)
    directions = np.concatenate([space.of_model(model) for model in gallery.models])
    if concepts.images is None:
        wanted = space.of_texts(concepts.queries, concepts.excluded)
    else:
        wanted = np.concatenate([space.of_images(images) for images in concepts.images])
    similarities = directions @ wanted.T
    b = matching.sharpness(directions, space.background, score_units)
    offset = matching.offsets(directions, space.background, b)
    return np.stack(
        [
            matching.scores(column, directions, offset, space.background, b, excluded)
            for column, excluded in zip(similarities.T, concepts.excluded, strict=True)
        ]
    )
