"""Our own method as one of the methods: matched heads (``probelog.matching``)."""

from __future__ import annotations

import numpy as np

from probelog import matching
from probelog.gallery import Concepts, Floats, Gallery


def matched_heads(gallery: Gallery, concepts: Concepts) -> Floats:
    """Log-odds of every concept for every logit: (C, N)."""
    space = matching.HeadSpace(gallery.embeddings, concepts.background)
    directions = np.concatenate([space.of_model(model) for model in gallery.models])
    if concepts.images is None:
        wanted = space.of_texts(concepts.queries, concepts.excluded)
    else:
        wanted = np.concatenate([space.of_images(images) for images in concepts.images])
    similarities = directions @ wanted.T
    b = matching.sharpness(directions, space.background)
    offset = matching.offsets(directions, space.background, b)
    to_background = directions @ space.background.T
    scores = np.empty((len(concepts.queries), len(directions)))
    for query, excluded in enumerate(concepts.excluded):
        own = matching.without(
            offset, to_background[:, np.asarray(excluded, np.int64)], b, len(space.background)
        )
        scores[query] = b * similarities[:, query] - own
    return scores
