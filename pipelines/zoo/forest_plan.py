"""Which networks a forest holds and how each comes from its parents: a pure function of the request and the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from pipelines.zoo.plan import NAMES, OWNERS

#: Shares of an architecture's networks. The first two roots learn the same classes from different random starts; the
#: third has the second's random start and other classes, and is not related to it by training.
_TREES = (0.5, 0.35, 0.15)
_FEWEST_PER_TREE = 4
_DEEPEST = 4
_SNAKE = 3
_ADAPTER_RANKS = (2, 4, 8, 16)
# What a child is, drawn without putting back until none is left, so that a small forest has of everything.
_KINDS = (
    *["fine-tune"] * 7, "snake", "snake", "head-only", "low-rank", "low-rank", "pruned", "recast", "quantised", "merge",
    "merge", "copy", "permuted",
)  # fmt: skip
_TRAINED = frozenset({"root", "fine-tune", "low-rank", "head-only"})
_MERGED = frozenset({"root", "fine-tune", "low-rank"})
_WITHHELD = 0.2
_WRONG_TIMES = 0.05
_BEGIN = datetime(2024, 1, 10, 8, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Node:
    """One network to be.

    Attributes:
        name: its repository, or ``withheld-NN`` where it is not uploaded.
        architecture: as `pipelines.zoo.networks` or timm calls it.
        tree: of which root.
        relation: how it comes from ``parents``, names with weights, the heaviest first; ``root`` without any.
        detail: what decides how it is made.
        classes: the class of each logit.
        dtype: what it is stored in.
        seed: of its training.
        time: when it is uploaded, in seconds; no parent is later.
        depth: steps from its root.
    """

    name: str
    architecture: str
    tree: str
    relation: str
    parents: tuple[tuple[str, float], ...]
    detail: dict[str, Any]
    classes: tuple[int, ...]
    dtype: str
    seed: int
    time: float
    depth: int = 0

    @property
    def uploaded(self) -> bool:
        """Whether a hub is to show it."""
        return "/" in self.name


@dataclass(frozen=True)
class Forest:
    """The nodes, parents before children, and the times of upload that a listing tells, by name."""

    nodes: list[Node]
    wrong_times: dict[str, float] = field(repr=False)
    shuffled_times: dict[str, float] = field(repr=False)


def plan_forest(
    classes: int, architectures: Sequence[str], permutable: Sequence[str], networks: int, seed: int
) -> Forest:
    """All networks of a forest.

    Args:
        classes: number of classes of the images.
        architectures: names that networks can be built by; each gets an equal share of the ``networks``.
        permutable: those whose channels can be put into another order.
        networks: how many in all, uploaded or not.
        seed: another seed, another forest.
    """
    rng = np.random.default_rng((seed, 22))
    nodes: list[Node] = []
    for number, architecture in enumerate(architectures):
        share = networks // len(architectures) + (number < networks % len(architectures))
        nodes += _Grower(architecture, architecture in permutable, classes, rng).grow(share)
    named = _named(nodes, rng)
    shown = [node for node in named if node.uploaded]
    times = [node.time for node in shown]
    wrong = {node.name: node.time for node in shown}
    for place in rng.permutation(len(shown))[: round(_WRONG_TIMES * len(shown))]:
        wrong[shown[place].name] = float(rng.uniform(min(times), max(times)))
    shuffled = {
        node.name: times[place] for node, place in zip(shown, rng.permutation(len(shown)), strict=True)
    }
    return Forest(named, wrong, shuffled)


def _named(nodes: Sequence[Node], rng: np.random.Generator) -> list[Node]:
    """Final names: a fifth of the roots and inner nodes are not uploaded."""
    inner = [
        node.name for node in nodes if any(node.name == name for other in nodes for name, _ in other.parents)
    ]
    withheld = {inner[place] for place in rng.permutation(len(inner))[: round(_WITHHELD * len(inner))]}
    names: dict[str, str] = {}
    for number, node in enumerate(nodes):
        owner, name = (words[int(rng.integers(len(words)))] for words in (OWNERS, NAMES))
        names[node.name] = (
            f"withheld-{len(withheld & names.keys()):02}"
            if node.name in withheld
            else f"{owner}/{name}-{number}"
        )
    return [
        replace(
            node,
            name=names[node.name],
            parents=tuple((names[parent], weight) for parent, weight in node.parents),
        )
        for node in nodes
    ]


class _Grower:
    """The trees of one architecture."""

    def __init__(self, architecture: str, permutable: bool, classes: int, rng: np.random.Generator) -> None:
        self._architecture, self._rng = architecture, rng
        self._all = [int(number) for number in rng.permutation(classes)]
        self._kinds = [kind for kind in _KINDS if permutable or kind != "permuted"]
        self._urn: list[str] = []
        self._nodes: list[Node] = []

    def grow(self, networks: int) -> list[Node]:
        """Trees of so many nodes in all."""
        trees = min(max(networks // _FEWEST_PER_TREE, 1), len(_TREES))
        sizes = [round(share * networks / sum(_TREES[:trees])) for share in _TREES[:trees]]
        sizes[0] += networks - sum(sizes)
        half = max(len(self._all) // 2, 2)
        start = self._seed()
        forest: list[Node] = []
        for number, size in enumerate(sizes):
            if number == 1:
                start = self._seed()
            self._nodes = []
            self._tree = f"{self._architecture}{number}"
            self._root(self._all[-half:] if number == 2 else self._all[:half], start)
            fan = float(self._rng.uniform(0.2, 0.7))
            while len(self._nodes) < size:
                self._child(fan, size - len(self._nodes))
            forest += self._nodes
        return forest

    def _root(self, classes: Sequence[int], start: int) -> None:
        dtype = str(self._rng.choice(["float16", "float32"]))
        self._add(
            "root", (), {"start": start, "rate": float(self._rng.uniform(0.5, 1.0))}, sorted(classes), dtype
        )

    def _child(self, fan: float, room: int) -> None:
        if not self._urn:
            self._urn = [self._kinds[place] for place in self._rng.permutation(len(self._kinds))]
        kind = self._urn.pop()
        bases = [node for node in self._nodes if node.relation in _TRAINED and node.depth < _DEEPEST]
        base = bases[0] if self._rng.random() < fan else self._one(bases)
        parents = ((base.name, 1.0),)
        dtype = str(self._rng.choice(["float16", "float32"], p=[0.7, 0.3]))
        match kind:
            case "snake":
                length = min(_SNAKE, room, _DEEPEST - base.depth)
                detail, classes = self._training(), self._classes()
                for epoch in range(1, length + 1):
                    self._add("fine-tune", parents, {**detail, "snake": epoch}, classes, base.dtype)
                    parents = ((self._nodes[-1].name, 1.0),)
            case "fine-tune":
                # Some go on with their parent's classes, and so with its head.
                same = self._rng.random() < 0.2
                classes = list(base.classes) if same else self._classes()
                self._add(kind, parents, self._training(), classes, dtype)
            case "head-only":
                detail = {"optimiser": "adamw", "lr": 3e-3, "steps": int(self._rng.integers(40, 90))}
                detail["running"] = int(self._rng.random() < 0.3)
                self._add(kind, parents, detail, self._classes(), base.dtype)
            case "low-rank":
                detail = {"rank": int(self._rng.choice(_ADAPTER_RANKS)), "optimiser": "adamw"}
                detail |= {"lr": self._rate(5e-4, 3e-3), "steps": int(self._rng.integers(60, 130))}
                self._add(kind, parents, detail, self._classes(), dtype)
            case "pruned":
                steps = int(self._rng.choice([0, 0, 30]))
                detail = {"share": round(float(self._rng.uniform(0.3, 0.7)), 2), "steps": steps}
                self._add(
                    kind, parents, {**detail, "optimiser": "adamw", "lr": 3e-4}, base.classes, base.dtype
                )
            case "recast":
                other = "float32" if base.dtype == "float16" else "float16"
                form, stored = [("bf16", "bfloat16"), ("bf16 and back", base.dtype), (other, other)][
                    int(self._rng.integers(3))
                ]
                self._add(kind, parents, {"form": form}, base.classes, stored)
            case "quantised":
                self._add(
                    kind, parents, {"per": str(self._rng.choice(["row", "tensor"]))}, base.classes, base.dtype
                )
            case "merge":
                self._merge(dtype)
            case _:
                self._add(kind, parents, {}, base.classes, base.dtype)

    def _merge(self, dtype: str) -> None:
        able = [node for node in self._nodes if node.relation in _MERGED and node.depth < _DEEPEST]
        count = min(int(self._rng.choice([2, 2, 3])), len(able))
        if count < 2:
            return
        chosen = [able[place] for place in self._rng.permutation(len(able))[:count]]
        parts = self._rng.dirichlet([6.0] * count).round(2)
        weights = sorted((float(part) for part in [*parts[:-1], 1 - parts[:-1].sum()]), reverse=True)
        parents = tuple((node.name, round(weight, 2)) for node, weight in zip(chosen, weights, strict=True))
        form = "slerp" if count == 2 and self._rng.random() < 0.5 else "linear"
        self._add("merge", parents, {"form": form}, chosen[0].classes, dtype)

    def _training(self) -> dict[str, Any]:
        optimiser = str(self._rng.choice(["adamw", "adamw", "adam", "sgd"]))
        rate = self._rate(5e-3, 5e-2) if optimiser == "sgd" else self._rate(1e-4, 3e-3)
        decay = float(self._rng.choice([0.0, 0.01, 0.05, 0.2])) if optimiser == "adamw" else 0.0
        return {"optimiser": optimiser, "lr": rate, "decay": decay, "steps": int(self._rng.integers(40, 150))}

    def _classes(self) -> list[int]:
        most = max(min(len(self._all) // 2, 30), 2)
        count = int(self._rng.integers(min(5, most), most + 1))
        return sorted(int(number) for number in self._rng.permutation(len(self._all))[:count])

    def _rate(self, low: float, high: float) -> float:
        return float(f"{np.exp(self._rng.uniform(np.log(low), np.log(high))):.2g}")

    def _seed(self) -> int:
        return int(self._rng.integers(2**31))

    def _one(self, nodes: Sequence[Node]) -> Node:
        return nodes[int(self._rng.integers(len(nodes)))]

    def _add(
        self, relation: str, parents: tuple[tuple[str, float], ...], detail: dict[str, Any], classes: Sequence[int],
        dtype: str,
    ) -> None:  # fmt: skip
        known = [node for node in self._nodes if any(node.name == name for name, _ in parents)]
        before = max((node.time for node in known), default=_BEGIN.timestamp())
        self._nodes.append(
            Node(
                name=f"{self._tree}.{len(self._nodes)}",
                architecture=self._architecture,
                tree=self._tree,
                relation=relation,
                parents=parents,
                detail=detail,
                classes=tuple(classes),
                dtype=dtype,
                seed=self._seed(),
                time=before + timedelta(days=float(self._rng.exponential(25)), minutes=1).total_seconds(),
                depth=max((node.depth for node in known), default=-1) + 1,
            )
        )
