"""Background concepts: the names that calibrate every logit."""

from __future__ import annotations

import random
from pathlib import Path

from pipelines.job.job import read_names
from probelog.errors import UsageError

IMAGENET_21K = "imagenet-21k"
# What the hub's models declare, which a full run finds out (`pipelines.publish.background`).
HUB = "hub"


def background_names(source: str, count: int, seed: int) -> list[str]:
    """At most ``count`` names, drawn with a seed.

    Args:
        source: a text file, one name a line; or ``imagenet-21k``, the class names that timm carries (version 2 of
            the paper draws its 500 there), which is also what ``hub`` adds where a hub declares little.
        count: how many; a shorter file is used whole.
        seed: of the draw.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if source in (IMAGENET_21K, HUB):
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet21k")
        described = (info.index_to_description(i, detailed=False) for i in range(info.num_classes()))
        names = list(dict.fromkeys(text.split(",")[0].strip() for text in described if text.strip()))
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UsageError(
                f"background {source!r}: there is no such file (one name a line; or write {HUB!r} or {IMAGENET_21K!r})"
            )
        names = read_names(path, "background concepts")
    if len(names) <= count:
        return names
    return sorted(random.Random(f"background {seed}").sample(names, count))  # noqa: S311 - a draw, not a secret
