"""Every way to search by concept, one interface: a gallery and concepts in, scores (C, N) out, higher is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from probelog.arrays import Floats
from probelog.evaluation import completed, dissect, ridge, truncated
from probelog.evaluation.gallery import Concepts, Gallery

Method = Callable[[Gallery, Concepts], Floats]

METHODS: Mapping[str, Method] = {
    "matched heads": ridge.rank_by_matched_heads,
    "version 1": truncated.first_version,
    "version 2": truncated.second_version,
    "version 2, uncalibrated": truncated.second_version_uncalibrated,
    "all probes": truncated.all_probes,
    "all probes, calibrated": truncated.all_probes_calibrated,
    "WPMI": dissect.wpmi,
    "SoftWPMI": dissect.soft_wpmi,
    "ridge": ridge.ridge,
    "ridge, square-root probability": ridge.ridge_probability,
    "version 2 + ALS": completed.second_version_als,
    "version 2 + ALS, text rows": completed.second_version_als_text_rows,
    "version 2 + ridge": completed.second_version_ridge,
    "version 2 + ridge + ALS": completed.second_version_ridge_als,
    "version 2, centred": completed.second_version_centred,
}
