"""Edges of model trees: which model was made from which, how, and how sure that is; as records and as a table.

Nothing here needs the weights or what reads them: the query client reads edges that anybody may have published.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

from probelog.storage.records import shown
from probelog.storage.schemas import EDGES
from probelog.terminal import printable

_LATENT = re.compile(r"latent:[0-9a-f]{12}")
_LONGEST_NAME = 256
_HUB_NAME = re.compile(r"[A-Za-z0-9._/-]+")
_MOST_SIGNALS = 64
_SIGNAL = re.compile(r"[a-z][a-z0-9 _%-]{0,59}")
# Weights are stored as float32.
_ROUNDING = 1e-4


class Relation(StrEnum):
    """How a child came from its parent."""

    COPY = "copy"
    PERMUTED = "permuted"
    RECAST = "recast"
    QUANTISED = "quantised"
    HEAD_ONLY = "head-only"
    PRUNED = "pruned"
    LOW_RANK = "low-rank"
    MERGE = "merge"
    FINE_TUNED = "fine-tune"


_RELATIONS = frozenset(Relation)


@dataclass(frozen=True, slots=True)
class Edge:
    """A parent of a model. A merge has one edge for each parent, whose weights add up to one.

    ``declared``: whether the child names this parent; None where it names none. ``latent``: whether the parent is not
    among the models, because it was deleted or never uploaded. ``evidence`` maps signals to their values.
    """

    child: str
    parent: str
    relation: Relation
    probability: float
    weight: float = 1.0
    declared: bool | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)
    latent: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "child": self.child,
            "parent": self.parent,
            "relation": self.relation.value,
            "probability": self.probability,
            "weight": self.weight,
            "declared": self.declared,
            "latent": self.latent,
            "evidence": dict(self.evidence),
        }


def is_latent_name(name: str) -> bool:
    """Whether it names an ancestor that nobody has seen."""
    return _LATENT.fullmatch(name) is not None


def parent_rank(parent: str, weight: float, probability: float) -> tuple[bool, float, float, str]:
    """Sorts the parents of one child, the main one first.

    Known models come before latent ancestors, then the largest weight and the largest probability decide.
    """
    return is_latent_name(parent), -weight, -probability, parent


def edge_table(edges: Iterable[Edge]) -> pa.Table:
    """Edges as a table (``EDGES``), by child and parent; signals that are not finite numbers are left out."""
    rows = [
        {
            **edge.to_dict(),
            "evidence": [
                {"signal": signal, "value": float(value)}
                for signal, value in edge.evidence.items()
                if math.isfinite(value)
            ],
        }
        for edge in sorted(edges, key=lambda edge: (edge.child, edge.parent))
    ]
    return pa.Table.from_pylist(rows, EDGES)


def edges_of(table: pa.Table) -> list[Edge]:
    """The rows of a table (``EDGES``) that anybody may have written, in their order.

    Raises:
        ValueError: a row is no edge; the message says why.
    """
    return [edge_of(row) for row in table.to_pylist()]


def edge_of(row: Mapping[str, Any]) -> Edge:
    """One of these rows; raises ValueError likewise."""
    child, parent = _name(row["child"], "child"), _name(row["parent"], "parent")
    if child == parent:
        raise ValueError(f"{child} is its own parent")
    relation = row["relation"]
    if relation not in _RELATIONS:
        raise ValueError(f"a relation is {shown(relation)}")
    latent, declared = row["latent"], row["declared"]
    if type(latent) is not bool or (is_latent_name(parent) and not latent):
        raise ValueError(f"{parent} is not marked as latent")
    return Edge(
        child=child,
        parent=parent,
        relation=Relation(relation),
        probability=_share(row["probability"], "probability"),
        weight=_share(row["weight"], "weight"),
        declared=None if declared is None else bool(declared),
        evidence=_evidence(row["evidence"]),
        latent=latent,
    )


def _name(value: object, role: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"a {role} is {shown(value)}, which no model is called")
    if _HUB_NAME.fullmatch(value):  # millions of them
        return value
    if printable(value, _LONGEST_NAME) != value:
        raise ValueError(f"a {role} is {shown(value)}, which no model is called")
    if value.startswith("latent:") and not is_latent_name(value):
        raise ValueError(f"a {role} is {shown(value)}, which no latent ancestor is called")
    return value


def _share(value: object, role: str) -> float:
    if not isinstance(value, float) or not -_ROUNDING <= value <= 1 + _ROUNDING:
        raise ValueError(f"a {role} is {shown(value)} and not between 0 and 1")
    return min(max(value, 0.0), 1.0)


def _evidence(signals: object) -> dict[str, float]:
    if not isinstance(signals, list) or len(signals) > _MOST_SIGNALS:
        raise ValueError(f"evidence is {shown(signals)} and not a list of at most {_MOST_SIGNALS} signals")
    evidence: dict[str, float] = {}
    for item in signals:
        signal, value = item["signal"], item["value"]
        if not isinstance(signal, str) or not _SIGNAL.fullmatch(signal):
            raise ValueError(f"a signal is called {shown(signal)}")
        if not isinstance(value, float) or not math.isfinite(value):
            raise ValueError(f"the signal {signal} is {shown(value)}")
        evidence[signal] = value
    return evidence
