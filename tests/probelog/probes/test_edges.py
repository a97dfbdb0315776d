"""Edge maps: dark where brightness changes, white elsewhere."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from probelog.probes.edges import edge_map


def test_lines_are_where_the_brightness_changes() -> None:
    picture = Image.new("RGB", (64, 48), (200, 220, 240))
    ImageDraw.Draw(picture).rectangle((16, 12, 47, 35), fill=(20, 30, 10))
    lines = np.asarray(edge_map(picture))
    assert lines.shape == (48, 64, 3)
    assert (lines[..., 0] == lines[..., 1]).all()
    assert lines[24, 16].max() < 60
    assert lines[2, 2].min() == 255
    assert lines[24, 32].min() == 255


def test_any_picture_has_an_edge_map() -> None:
    for picture in (Image.new("RGB", (1, 1)), Image.new("RGBA", (900, 300)), Image.new("L", (3, 1))):
        lines = np.asarray(edge_map(picture))
        assert lines.min() == 255
        assert max(lines.shape) <= 256
