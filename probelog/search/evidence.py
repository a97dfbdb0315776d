"""Why a logit answers: the probes that fire it most and least, with its values on them.

A model sees a share of the probes. On the others its values are estimated (docs/method.md, completion): each shown probe
says which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from probelog.arrays import values_of
from probelog.index.tables import sql_in

if TYPE_CHECKING:
    from probelog.index.generation import Generation

# Of a picture of at most some hundred pixels.
_LARGEST_PICTURE = 1 << 20
# What the bytes of a picture begin with, and where.
_MEDIA_TYPES = (
    ("image/webp", 8, b"WEBP"),
    ("image/jpeg", 0, b"\xff\xd8\xff"),
    ("image/png", 0, b"\x89PNG\r\n\x1a\n"),
)


@dataclass(frozen=True, slots=True)
class EvidenceProbe:
    """One probe that fires a logit strongly, or least of all.

    Attributes:
        probe: its number.
        value: the logit on it, standardised over all probes (of a negated logit, its opposite); None in indexes of
            older versions.
        observed: whether the model saw it; False: completion estimated the value; None: not known, as above.
        picture: a small picture of it; None where the index has none, or none was asked for.
        media_type: of the picture.
    """

    probe: int
    value: float | None
    observed: bool | None
    picture: bytes | None = field(default=None, repr=False)
    media_type: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The probes that fire one logit most, descending, and least, ascending (none in indexes of older versions).

    Models with the same weights share it: it says what the one of them saw that was run.
    """

    repo: str
    sha: str
    logit: int
    negated: bool
    strongest: list[EvidenceProbe]
    weakest: list[EvidenceProbe]


def shown_probes(
    generation: Generation, rows: npt.NDArray[np.int64], pictures: bool
) -> list[tuple[list[EvidenceProbe], list[EvidenceProbe]]]:
    """The strongest and the weakest probes of the logits at some rows, in the order of ``rows``.

    Raises:
        StoreError: a row is missing or damaged.
    """
    strongest = generation.logits(rows).probes
    evidence = generation.evidence(rows)
    numbers = {*strongest.ravel().tolist()}
    numbers.update(*(row["weakest"][: row["count"]].tolist() for row in evidence.values))
    shown = _pictures(generation, sorted(numbers)) if pictures else {}

    def probes(
        places: npt.NDArray[np.integer], values: npt.NDArray[np.floating], bits: int, known: bool
    ) -> list[EvidenceProbe]:
        return [
            EvidenceProbe(
                probe,
                round(float(values[place]), 3) if known else None,
                bool(bits >> place & 1) if known else None,
                *shown.get(probe, (None, None)),
            )
            for place, probe in enumerate(places.tolist())
        ]

    return [
        (
            probes(strongest[place], row["values"], int(row["observed"]), bool(known)),
            probes(row["weakest"][: row["count"]], row["weakest_values"], int(row["weakest_observed"]), True),
        )
        for place, (row, known) in enumerate(zip(evidence.values, evidence.known, strict=True))
    ]


def media_type(picture: bytes) -> str | None:
    """What kind of picture some bytes are, by their beginning; None for what an index does not hold."""
    if len(picture) > _LARGEST_PICTURE:
        return None
    for name, start, mark in _MEDIA_TYPES:
        if picture.startswith(mark, start):
            return name
    return None


def _pictures(generation: Generation, probes: Sequence[int]) -> dict[int, tuple[bytes, str]]:
    """Pictures of some probes with their media types; what is no picture is left out."""
    rows = generation.probes(["thumbnail"], sql_in("id", probes))
    pictures: dict[int, tuple[bytes, str]] = {}
    for probe, picture in zip(values_of(rows["id"], int), rows["thumbnail"].to_pylist(), strict=True):
        if picture is not None and (kind := media_type(picture)) is not None:
            pictures[probe] = (picture, kind)
    return pictures
