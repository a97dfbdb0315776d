"""Bounds that the configurations of networks have in common."""

from __future__ import annotations

from probelog.generators.parts.reduced import either, number, one_of, several, whole

#: Along an edge: more than any limit lets through, so that it is the limit that is named.
PIXELS = whole(1, 1 << 20)
SIZE = either(PIXELS, several(PIXELS, 2))
CHANNELS = whole(1, 1 << 14)
WIDTHS = several(CHANNELS, 12)
LAYERS = whole(1, 16)
GROUPS = whole(1, 1 << 12)
EPSILON = number(1e-12, 1.0)
ACTIVATION = one_of(("swish", "silu", "mish", "gelu", "relu"))
CLASSES = whole(1, 100_000)
