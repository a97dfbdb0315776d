"""The settings of a generation: the record in its ``meta`` table that readers and nightly runs use.

An index may come from anybody: every value is untrusted and checked when the record is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from probelog.index.generators.schema import GeneratorSettings
from probelog.ranking.confidence import Confidence
from probelog.storage.layout import is_generation_name
from probelog.storage.records import Check, each, is_count, is_finite, is_number, is_text, read_record

# Texts of a query are put into each of them.
_MOST_PROMPTS = 1000


def _is_run(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"models", "failures"}:
        return False
    failures = value["failures"]
    return all(
        map(is_count, [value["models"], *(failures.values() if isinstance(failures, dict) else [None])])
    )


_SHARE: Check = ("a share above 0", lambda value: is_finite(value) and 0 < value <= 1)
_POSITIVE: Check = ("a number above 0", lambda value: is_finite(value) and value > 0)
_PROMPTS: Check = (
    "a list of prompts",
    lambda value: each(is_text)(value) and 0 < len(value) <= _MOST_PROMPTS,
)
# Of very few values none is held out: the error of none is not a number.
_ERROR: Check = (
    "an error, 0 or more",
    lambda value: is_number(value) and (value != value or 0 <= value < 1e300),
)
_RUN: Check = ("counts of models and of failures by reason", _is_run)
_GENERATION: Check = ("a generation's name", is_generation_name)
# Pages link to it, and snippets name it.
_ADDRESS = re.compile(
    r"https?://([a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?|\[[0-9a-f:.]{2,60}\])(:[0-9]{1,5})?(/[a-z0-9._~-]{1,100}){0,9}",
    re.ASCII | re.IGNORECASE,
)
_ENDPOINT: Check = (
    "a Hub's address",
    lambda value: isinstance(value, str) and _ADDRESS.fullmatch(value) is not None,
)


def recorded_endpoint(address: str) -> str | None:
    """A Hub's address as settings keep it; None for one that cannot be kept, with a query for instance."""
    return address if _ENDPOINT[1](address) else None


@dataclass(frozen=True)
class UpdateBase:
    """The whole generation that another one is an update of, and its numbers of models and of rows of logits."""

    generation: str = field(metadata={"check": _GENERATION})
    models: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a generation was made, and what it holds.

    Attributes:
        version: of the index's format (``probelog.index.schema.INDEX_VERSION``).
        made_by: the program that wrote it.
        models: how many it holds, those of its base counted.
        logits: of these models, negated ones of one-logit heads and those of copies counted.
        probe_set: hash of the probe set.
        probes: number of probes in it.
        observations: key of the ledger that the logits were observed in.
        fraction: share of the probes that a model sees.
        seed: of every random choice.
        encoder: name of the text-image encoder, and
        encoder_digest: what two indexes must share for their logits to be compared.
        prompts: sentences that names are put into, with ``{}`` for the name.
        method: how logits become directions.
        sharpness: inverse temperature of the scores (``probelog.ranking.matched_heads``).
        confidence: how scores become probabilities.
        background_concepts: number of names in the background.
        background_source: where they are from: ``hub``, ``imagenet-21k`` or ``file``; None where it was not recorded.
        watermark: the newest change on the Hub that it knows of (ISO 8601); nightly runs go on from there.
        listed: when the whole Hub was listed, or the index compared with it (UTC, ISO 8601).
        night: when the last nightly run that it holds started (UTC, ISO 8601).
        endpoint: address of the Hub that was listed; None where it was not recorded.
        text_encoder: settings of the exported encoder for texts (``probelog.encoders.text``).
        text_encoder_difference: largest difference of the exported encoder's vectors from the original's.
        image_encoder: likewise for images (``probelog.encoders.image``); None where it was not exported,
        image_encoder_difference: likewise, and
        image_encoder_missing: why it was not.
        rank: of the completion.
        regularisation: of the completion.
        held_out_rmse: error of the completion on values it did not see, and
        held_out_top_rmse: on the largest of them.
        constant_logits_dropped: logits left out because no probe moves them.
        completion: key of the completion.
        run: counts of the run that made it: ``models`` that were probed, and ``failures`` by reason.
        rows: of the ``logits`` table, those of the base counted.
        large: whether it is searched by a vector index.
        middle_offset: what offsets are measured from (``probelog.index.basis``).
        trees: key of the recovery of model trees that the edges are of; None without any, as in older indexes, and
        edges: number of rows of the ``edges`` table, which there is only then.
        generators: of the ``generators`` and ``samples`` tables, which there are only then.
        base: of updates only, as are all that follow.
        folded_in: key of the completion that the update's descriptors are of.
        added: models that the update holds.
        gone: models of the base that are no longer valid.
        drift: how far the update is from what its base was fitted on (``pipelines.nightly.drift``).
    """

    version: int
    made_by: str
    models: int
    logits: int
    probe_set: str
    probes: int
    observations: str
    fraction: float = field(metadata={"check": _SHARE})
    seed: int
    encoder: str
    encoder_digest: str
    prompts: list[str] = field(metadata={"check": _PROMPTS})
    method: str
    sharpness: float = field(metadata={"check": _POSITIVE})
    confidence: Confidence = field(metadata={"read": Confidence.from_dict})
    background_concepts: int
    watermark: str | None
    listed: str
    night: str | None
    text_encoder: dict[str, Any]
    text_encoder_difference: float
    image_encoder: dict[str, Any] | None
    image_encoder_difference: float | None
    image_encoder_missing: str | None
    rank: int
    regularisation: float
    held_out_rmse: float = field(metadata={"check": _ERROR})
    held_out_top_rmse: float = field(metadata={"check": _ERROR})
    constant_logits_dropped: int
    completion: str
    run: dict[str, Any] = field(metadata={"check": _RUN})
    rows: int
    large: bool
    middle_offset: float
    background_source: str | None = None
    endpoint: str | None = field(default=None, metadata={"check": _ENDPOINT})
    trees: str | None = None
    edges: int | None = None
    generators: GeneratorSettings | None = None
    base: UpdateBase | None = None
    folded_in: str | None = None
    added: int | None = None
    gone: int | None = None
    drift: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the entries of updates only where they are set."""
        later = [item.name for item in fields(self) if item.default is None]
        return {name: value for name, value in asdict(self).items() if value is not None or name not in later}

    def to_bytes(self) -> bytes:
        """The JSON in the ``meta`` table."""
        return json.dumps(self.to_dict()).encode()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str) -> GenerationSettings:
        """Read and check the values of ``to_dict``; unknown entries are ignored.

        Raises:
            StoreError: an entry is missing or invalid.
        """
        return read_record(cls, content, where, "settings")
