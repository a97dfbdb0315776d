"""A forest of models that nobody trained: random weights, moved the way training, merging and rounding move them.

Known parents in every detail, seconds to make. What it does not have is real training: steps are random directions
with a little in common among siblings, sizes and weight decay of many kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from probelog.arrays import Floats
from probelog.weights.reader import LayerFacts, layer_table
from probelog.weights.sketch import Summary

Tensors = dict[str, Floats]

RELATIONS = (
    *["fine-tune"] * 10,
    "snake",
    "snake",
    "low-rank",
    "head-only",
    "pruned",
    "recast",
    "quantised",
    "merge",
    "merge",
    "copy",
    "permuted",
)


@dataclass
class Node:
    """One model: its parents with their weights, and all its tensors."""

    repo: str
    tensors: Tensors = field(repr=False)
    parents: dict[str, float] = field(default_factory=dict)
    relation: str = "root"
    time: float = 0.0
    tree: str = ""
    drift: Tensors = field(default_factory=dict, repr=False)
    dtype: str = "float16"


@dataclass(frozen=True)
class World:
    """The nodes of a forest by repository; ``withheld`` ones are not uploaded."""

    nodes: dict[str, Node]
    withheld: set[str]

    @property
    def uploaded(self) -> list[Node]:
        return [node for repo, node in sorted(self.nodes.items()) if repo not in self.withheld]

    def ancestors(self, repo: str) -> set[str]:
        parents = set(self.nodes[repo].parents)
        return parents.union(*(self.ancestors(parent) for parent in parents)) if parents else parents


class Forest:
    """Grows trees of one architecture after the other; the seed decides everything."""

    def __init__(self, seed: int, *, trees: int = 4, models: int = 14, missing: float = 0.2) -> None:
        self._random = np.random.default_rng(seed)
        self.nodes: dict[str, Node] = {}
        self._clock = 0.0
        for architecture in range(2):
            self._width, self._depth = int(self._random.integers(24, 48)), int(self._random.integers(5, 13))
            for tree in range(trees):
                self._tree(f"a{architecture}t{tree}", models)
        inner = sorted({parent for node in self.nodes.values() for parent in node.parents})
        self._withheld = {repo for repo in inner if self._random.random() < missing}

    @property
    def world(self) -> World:
        return World(self.nodes, self._withheld)

    def _tree(self, tree: str, models: int) -> None:
        self._common = {name: self._normal(x.shape) for name, x in self._initial(100).items()}
        self._decay = float(self._random.choice([0.0, 0.05, 0.1, 0.2]))
        root = self._initial(100)
        root = self._trained(root, 0.3, new_head=None)[0]
        nodes = [self._add(tree, "root", {}, root)]
        fan = self._random.random()
        for _ in range(models - 1):
            # Copies, rounded and pruned models are leaves (Atlas, arXiv 2503.10633).
            bases = [
                node
                for node in nodes
                if node.relation in ("root", "fine-tune", "low-rank", "head-only", "merge")
            ]
            base = nodes[0] if self._random.random() < fan else bases[int(self._random.integers(len(bases)))]
            nodes.append(self._child(tree, base, nodes))

    def _child(self, tree: str, base: Node, nodes: list[Node]) -> Node:
        relation = str(self._random.choice(RELATIONS))
        tensors, drift, parents = dict(base.tensors), {}, {base.repo: 1.0}
        if relation in ("fine-tune", "snake"):
            size = float(10 ** self._random.uniform(-2.0, -0.6))
            new_head = None if relation == "snake" else int(self._random.integers(5, 40))
            tensors, drift = self._trained(
                base.tensors, size, new_head, base.drift if relation == "snake" else {}
            )
            relation = "fine-tune"
        elif relation == "low-rank":
            rank, size = int(self._random.choice([2, 4, 8])), float(self._random.uniform(0.03, 0.3))
            for name, x in tensors.items():
                if x.ndim > 1 and not name.startswith("head"):
                    delta = self._normal((x.shape[0], rank)) @ self._normal((rank, x.shape[1]))
                    tensors[name] = x + delta * (size * np.linalg.norm(x) / np.linalg.norm(delta))
            self._new_head(tensors, int(self._random.integers(5, 40)))
        elif relation == "head-only":
            self._new_head(tensors, int(self._random.integers(5, 40)))
        elif relation == "pruned":
            share = float(self._random.uniform(0.3, 0.7))
            for name, x in tensors.items():
                if x.ndim > 1 and not name.startswith("head"):
                    tensors[name] = np.where(np.abs(x) < np.quantile(np.abs(x), share), 0, x)
        elif relation == "recast":
            tensors = {name: torch.from_numpy(x).bfloat16().float().numpy() for name, x in tensors.items()}
        elif relation == "quantised":
            for name, x in tensors.items():
                if x.ndim > 1:
                    step = np.abs(x).max(axis=1, keepdims=True) / 127
                    tensors[name] = np.round(x / step) * step
        elif relation == "permuted":
            order = self._random.permutation(self._width)
            for name, x in tensors.items():
                if not name.startswith("head"):
                    tensors[name] = x[order][:, order] if x.ndim > 1 else x[order]
        elif relation == "merge":
            same = [
                node for node in nodes if node.repo != base.repo and node.relation in ("fine-tune", "root")
            ]
            if base.relation not in ("fine-tune", "root") or not same:
                return self._child(tree, base, nodes)
            other = same[int(self._random.integers(len(same)))]
            weight = float(self._random.choice([0.3, 0.4, 0.5, 0.6]))
            parents = {base.repo: 1 - weight, other.repo: weight}
            tensors = {
                name: (1 - weight) * x + weight * other.tensors[name]
                if other.tensors[name].shape == x.shape
                else x
                for name, x in base.tensors.items()
            }
        dtype = base.dtype if relation not in ("recast",) else "bfloat16"
        return self._add(tree, relation, parents, tensors, drift, dtype)

    def _add(
        self,
        tree: str,
        relation: str,
        parents: dict[str, float],
        tensors: Tensors,
        drift: Tensors | None = None,
        dtype: str = "float16",
    ) -> Node:
        self._clock += float(self._random.uniform(0.5, 1.5))
        repo = f"owner{int(self._random.integers(10**6)):06d}/model{len(self.nodes)}"
        stored = {name: x.astype(np.float16).astype(np.float32) for name, x in tensors.items()}
        node = Node(repo, stored, parents, relation, self._clock, tree, drift or {}, dtype)
        self.nodes[repo] = node
        return node

    def _initial(self, classes: int) -> Tensors:
        width = self._width
        tensors: Tensors = {}
        for layer in range(self._depth):
            tensors[f"blocks.{layer}.mlp.weight"] = self._normal((width, width)) / np.sqrt(width)
            tensors[f"blocks.{layer}.mlp.bias"] = np.zeros(width)
            tensors[f"blocks.{layer}.norm.weight"] = np.ones(width)
            tensors[f"blocks.{layer}.norm.bias"] = np.zeros(width)
        self._new_head(tensors, classes)
        return tensors

    def _new_head(self, tensors: Tensors, classes: int) -> None:
        tensors["head.weight"] = self._normal((classes, self._width)) * 0.1
        tensors["head.bias"] = self._normal((classes,)) * 0.01

    def _trained(
        self, start: Tensors, size: float, new_head: int | None, previous: Tensors | None = None
    ) -> tuple[Tensors, Tensors]:
        """Moved by ``size`` of each matrix's norm, partly the way that siblings and ``previous`` went."""
        result, drift = dict(start), {}
        for name, x in start.items():
            step = self._normal(x.shape)
            if name in self._common and self._common[name].shape == x.shape:
                step = step + 0.2 * self._common[name]
            if previous and name in previous and previous[name].shape == x.shape:
                step = step + 0.5 * previous[name]
            scale = float(np.linalg.norm(x)) if x.ndim > 1 else 0.3 * np.sqrt(x.size)
            layer = float(np.exp(0.4 * self._random.standard_normal()))
            shrunk = 1 - self._decay * size if x.ndim > 1 else 1.0
            result[name] = shrunk * x + step * (layer * size * scale / np.linalg.norm(step))
            drift[name] = step
        if new_head is not None:
            self._new_head(result, new_head)
        return result, drift

    def _normal(self, shape: tuple[int, ...]) -> Floats:
        return self._random.standard_normal(shape)


def weights_table(nodes: list[Node]) -> pa.Table:
    """The ``weights`` rows of the nodes, as the probing pass would write them."""
    return pa.concat_tables(layer_table(node.repo, "0" * 40, list(_facts(node))) for node in nodes)


def _facts(node: Node) -> Iterator[LayerFacts]:
    summary = Summary()
    for name, x in sorted(node.tensors.items()):
        summary.begin(sketched=x.ndim > 1)
        summary.add(torch.from_numpy(np.ascontiguousarray(x, np.float32)).reshape(-1))
        moments, sketch = summary.finish()
        yield LayerFacts(name, node.dtype, x.shape, moments.mean, moments.std, moments.kurtosis, sketch)
