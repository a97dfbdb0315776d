"""Small indexes in which logits recognise what they declare, and the ways in which a night can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from probelog.encoders.text import TextEncoder
from probelog.index.generation import Generation
from probelog.ranking import matched_heads
from probelog.ranking.names import name_vectors
from probelog.storage.store import Store
from tests.support.worlds.small_index import PROMPT, Model, build

NAMES = [
    "airplane", "anchor", "apple", "banana", "bear", "bee", "bell", "boat", "book", "bottle", "bread", "bridge",
    "broom", "bucket", "camel", "candle", "castle", "cherry", "clock", "cloud", "comet", "crab", "crown", "dragon",
    "drum", "eagle", "fence", "flute", "fork", "fox", "garden", "ghost", "guitar", "hammer", "harp", "helmet",
    "horse", "island", "jacket", "kettle", "ladder", "lemon", "lizard", "magnet", "mirror", "monkey", "needle",
    "orange", "otter", "owl", "paddle", "parrot", "pencil", "piano", "pumpkin", "rabbit", "ribbon", "robot",
    "rocket", "saddle",
]  # fmt: skip
# Those of a logit beside its name's direction, of which the length is one.
NOISE = 0.5
LOGITS = 4

Directions = npt.NDArray[np.float64]


def some_models(count: int, seed: int = 0, owner: str = "old") -> list[Model]:
    """Models of four names each."""
    random = np.random.default_rng([seed, 1])
    return [
        Model(f"{owner}/model-{number:03}", tuple(random.choice(NAMES, LOGITS, replace=False).tolist()))
        for number in range(count)
    ]


def recognised(model: Model, space: matched_heads.HeadSpace, encoder: TextEncoder) -> Directions:
    """Directions (L, d) of logits that recognise what they declare, each with an error of its own."""
    exact = space.of_texts(name_vectors(encoder.embed, [PROMPT], model.labels))
    random = np.random.default_rng(list(model.repo.encode()))
    error = random.normal(size=exact.shape) * NOISE / np.sqrt(exact.shape[1])
    moved: Directions = exact + error
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def generation(
    index: Store,
    name: str,
    models: Sequence[Model],
    live: bool = False,
    describe: Callable[[Model, matched_heads.HeadSpace, TextEncoder], Directions] = recognised,
    settings: dict[str, Any] | None = None,
    names: Sequence[str] = NAMES[::2],
) -> Generation:
    """Write a generation of some models and open it."""
    built = build(
        index,
        name,
        models,
        "siglip",
        images=False,
        live=live,
        settings=settings,
        names=names,
        describe=describe,
    )
    return Generation(index, built.pointer)
