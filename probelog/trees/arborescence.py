"""The cheapest arborescence with roots that cost something, after Chu and Liu (1965) and Edmonds (1967).

Every node takes one parent or becomes a root, so that no cycle remains and the sum of the costs is smallest. A root
is a node whose parent is the artificial node 0.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The cost of each edge by its parent and child.
Costs = Mapping[tuple[int, int], float]

_ROOT = -1


def arborescence(nodes: int, edges: Costs, roots: Mapping[int, float]) -> dict[int, int | None]:
    """The parent of each of the nodes 0 to ``nodes`` - 1, None for a root, at the lowest cost in all.

    ``edges`` maps (parent, child) to a cost, ``roots`` every node to what it costs as a root. Ties are decided by
    the smaller parent.
    """
    costs = {(parent, child): cost for (parent, child), cost in edges.items() if parent != child}
    costs.update({(_ROOT, node): roots[node] for node in range(nodes)})
    parents = _cheapest(set(range(nodes)), costs, nodes)
    return {node: None if parents[node] == _ROOT else parents[node] for node in range(nodes)}


def _cheapest(nodes: set[int], costs: dict[tuple[int, int], float], free: int) -> dict[int, int]:
    """Parents of ``nodes``; ``free`` is a number that no node has. One level contracts all cycles of the level."""
    best: dict[int, int] = {}
    for (parent, child), cost in sorted(costs.items()):
        if child not in best or cost < costs[best[child], child]:
            best[child] = parent
    cycles = _cycles(best)
    if not cycles:
        return best
    # Each cycle becomes a node of its own. An edge into it costs what it adds to the cycle, of which it breaks one.
    contracted = {node: free + number for number, cycle in enumerate(cycles) for node in cycle}
    costs_of_contracted: dict[tuple[int, int], float] = {}
    origin: dict[tuple[int, int], tuple[int, int]] = {}
    for (parent, child), cost in sorted(costs.items()):
        edge = contracted.get(parent, parent), contracted.get(child, child)
        if edge[0] == edge[1]:
            continue
        added = cost - costs[best[child], child] if child in contracted else cost
        if edge not in origin or added < costs_of_contracted[edge]:
            costs_of_contracted[edge], origin[edge] = added, (parent, child)
    remaining = {contracted.get(node, node) for node in nodes}
    chosen = _cheapest(remaining, costs_of_contracted, free + len(cycles))
    result = {node: best[node] for node in contracted}
    for child, parent in chosen.items():
        outer, inner = origin[parent, child]
        result[inner] = outer
    return result


def _cycles(parents: Mapping[int, int]) -> list[list[int]]:
    state: dict[int, int] = {}
    cycles = []
    for start in sorted(parents):
        path, node = [], start
        while node in parents and node not in state:
            state[node] = start
            path.append(node)
            node = parents[node]
        if state.get(node) == start and node in path:
            cycles.append(path[path.index(node) :])
    return cycles
