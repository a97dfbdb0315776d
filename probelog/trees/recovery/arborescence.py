"""The cheapest arborescence with roots that cost something, after Chu and Liu (1965) and Edmonds (1967).

Every node takes one parent or becomes a root, so that no cycle remains and the sum of the costs is smallest. Grown as
by Tarjan (1977), in O(E log V): a path follows cheapest parents; where it meets itself the cycle is contracted, and
the edges into it cost what they add to the cycle. Every node's edges are sorted once; a contracted cycle has a heap
of its nodes' lists, so that edges which nothing asks for are not touched.
"""

from __future__ import annotations

from array import array

import numpy as np

from probelog.arrays import Floats, Ints


def arborescence(nodes: int, parents: Ints, children: Ints, costs: Floats, roots: Floats) -> Ints:
    """(nodes,) parent of each node, -1 for a root, at the lowest cost in all.

    The edges lead from ``parents`` (m,) to ``children`` (m,) at ``costs`` (m,); to be a root costs a node ``roots``
    (nodes,). Ties are decided by the smaller parent.
    """
    inner = parents != children
    every = np.arange(nodes)
    tails = np.concatenate([parents[inner], np.full(nodes, -1)])
    heads = np.concatenate([children[inner], every])
    prices = np.concatenate([costs[inner], roots]).astype(np.float64)
    order = np.lexsort((tails, prices, heads))
    return _Growth(
        nodes, tails[order], prices[order], np.searchsorted(heads[order], np.arange(nodes + 1))
    ).grown()


class _Growth:
    """Paths that grow backwards, contracted where they meet themselves, and unfolded at the end."""

    def __init__(self, nodes: int, tails: Ints, costs: Floats, starts: Ints) -> None:
        self._nodes = nodes
        # Arrays of the standard library: as fast as lists to index, and a quarter of their size.
        self._tails = array("q", np.where(tails >= 0, tails, nodes).astype(np.int64).tobytes())
        self._costs = array("d", costs.tobytes())
        self._starts: list[int] = starts.tolist()
        self._sets = _Sets(nodes + 1)
        self._lists = _Lists(self._costs, self._starts)
        self._child = array("q", np.repeat(np.arange(nodes), np.diff(starts)).tobytes())

    def grown(self) -> Ints:
        unseen, root = -1, self._nodes
        seen = [unseen] * self._nodes + [root]
        heap = list(range(self._nodes))  # of each set, by its representative
        entering = [-1] * (self._nodes + 1)
        contracted: list[tuple[int, int, list[int]]] = []
        for start in range(self._nodes):
            node, path, edges = self._sets.find(start), [], []
            while seen[node] == unseen:
                edge, heap[node] = self._cheapest(node, heap[node])
                edges.append(edge)
                path.append(node)
                seen[node] = start
                node = self._sets.find(self._tails[edge])
                if seen[node] == start:
                    # The path from here on is a cycle.
                    whole, merged, cycle = self._sets.moment(), heap[node], []
                    while (inner := path.pop()) != node:
                        cycle.append(inner)
                        merged = self._lists.merged(merged, heap[inner])
                    around = edges[len(path) :]
                    del edges[len(path) :]
                    for inner in cycle:
                        self._sets.join(node, inner)
                    node = self._sets.find(node)
                    heap[node], seen[node] = merged, unseen
                    contracted.append((node, whole, around))
            for edge in edges:
                entering[self._sets.find(self._child[edge])] = edge
        for node, whole, around in reversed(contracted):
            self._sets.back_to(whole)
            outer = entering[node]
            for edge in around:
                entering[self._sets.find(self._child[edge])] = edge
            entering[self._sets.find(self._child[outer])] = outer
        chosen = np.array([self._tails[edge] for edge in entering[: self._nodes]], np.int64)
        chosen[chosen == self._nodes] = -1
        return chosen

    def _cheapest(self, node: int, heap: int) -> tuple[int, int]:
        """The cheapest edge into a set from outside, and the heap without it, cheaper by that edge's cost."""
        find, tails = self._sets.find, self._tails
        while True:
            edge, cost = self._lists.first(heap)
            outside = find(tails[edge]) != node
            after = edge + 1
            while after < self._starts[self._child[edge] + 1] and find(tails[after]) == node:
                after += 1
            heap = self._lists.advanced(heap, after)
            if outside:
                self._lists.cheapen(heap, cost)
                return edge, heap


class _Lists:
    """Leftist heaps of sorted lists of edges, by the first edge that is left; what is subtracted goes down lazily.

    A list is named by its node; -1 is the empty heap.
    """

    def __init__(self, costs: array[float], starts: list[int]) -> None:
        nodes = len(starts) - 1
        self._costs = costs
        self._place = starts[:-1]
        self._end = starts[1:]
        self._left, self._right = [-1] * nodes, [-1] * nodes
        self._rank = [1] * nodes
        self._key = [costs[place] for place in self._place]
        self._change = [0.0] * nodes  # of the whole list
        self._lazy = [0.0] * nodes  # of the heaps below

    def first(self, heap: int) -> tuple[int, float]:
        """The cheapest edge and its cost now."""
        return self._place[heap], self._key[heap]

    def advanced(self, heap: int, place: int) -> int:
        """The heap after its first list has gone on to ``place``."""
        self._down(heap)
        left, right = self._left[heap], self._right[heap]
        if place < self._end[heap]:
            self._place[heap] = place
            key = self._key[heap] = self._costs[place] + self._change[heap]
            if (left < 0 or key <= self._key[left]) and (right < 0 or key <= self._key[right]):
                return heap
        self._left[heap] = self._right[heap] = -1
        self._rank[heap] = 1
        rest = self.merged(left, right)
        return self.merged(rest, heap) if place < self._end[heap] else rest

    def cheapen(self, heap: int, cost: float) -> None:
        if heap >= 0:
            self._key[heap] -= cost
            self._change[heap] -= cost
            self._lazy[heap] -= cost

    def merged(self, a: int, b: int) -> int:
        if a < 0 or b < 0:
            return max(a, b)
        if (self._key[b], b) < (self._key[a], a):
            a, b = b, a
        self._down(a)
        left, right = self._left[a], self.merged(self._right[a], b)
        if left < 0 or self._rank[left] < self._rank[right]:
            left, right = right, left
        self._left[a], self._right[a] = left, right
        self._rank[a] = 1 + (self._rank[right] if right >= 0 else 0)
        return a

    def _down(self, heap: int) -> None:
        change = self._lazy[heap]
        if change:
            self._lazy[heap] = 0.0
            self.cheapen(self._left[heap], -change)
            self.cheapen(self._right[heap], -change)


class _Sets:
    """Disjoint sets that can be taken apart again: joined by size, without compression."""

    def __init__(self, count: int) -> None:
        self._above = [-1] * count
        self._size = [1] * count
        self._joined: list[tuple[int, int]] = []

    def find(self, item: int) -> int:
        while self._above[item] >= 0:
            item = self._above[item]
        return item

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if self._size[a] < self._size[b]:
            a, b = b, a
        self._above[b] = a
        self._size[a] += self._size[b]
        self._joined.append((a, b))

    def moment(self) -> int:
        return len(self._joined)

    def back_to(self, moment: int) -> None:
        while len(self._joined) > moment:
            a, b = self._joined.pop()
            self._above[b] = -1
            self._size[a] -= self._size[b]
