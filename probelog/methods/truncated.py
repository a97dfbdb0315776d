"""Distances between standardised logits and concepts (arXiv 2502.09619 and its second version)."""

from __future__ import annotations

import numpy as np

from probelog import scoring
from probelog.gallery import Concepts, Floats, Gallery


def second_version(gallery: Gallery, concepts: Concepts, r: int = 50, k: int = 20) -> Floats:
    """Version 2 on what was observed: gallery-side truncation and calibration; (C, N) scores ``h_l - d(l, c)``."""
    z_queries = scoring.text_descriptors(gallery.embeddings, concepts.queries)
    z_background = scoring.text_descriptors(gallery.embeddings, concepts.background)
    scores = []
    spare = max((len(numbers) for numbers in concepts.excluded), default=0)
    for model in gallery.models:
        observed = scoring.top_pairs(scoring.standardise(model.values), r)
        pairs = scoring.TopPairs(model.probes[observed.probes].astype(np.int32), observed.values)
        distances = scoring.truncated_distances(pairs, z_queries)
        nearest = scoring.nearest_background(scoring.truncated_distances(pairs, z_background), k + spare)
        offsets = [scoring.calibration_offsets(nearest, k, numbers) for numbers in concepts.excluded]
        scores.append(np.stack(offsets) - distances.T)
    return np.concatenate(scores, axis=1)
