"""Every way to search by concept, one interface: a gallery and concepts in, scores (C, N) out, higher is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from probelog.gallery import Concepts, Floats, Gallery
from probelog.methods.matched import matched_heads
from probelog.methods.truncated import second_version

Method = Callable[[Gallery, Concepts], Floats]

METHODS: Mapping[str, Method] = {
    "version 2": second_version,
    "matched heads": matched_heads,
}
