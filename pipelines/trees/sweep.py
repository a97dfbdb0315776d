"""Deletes recoveries of model trees that no kept generation was made from."""

from __future__ import annotations

from collections import defaultdict

from probelog.index.generation import Generation
from probelog.index.pointer import Pointer
from probelog.publication.lifecycle import BUILDING
from probelog.storage.layout import INDEX, TREES, TreesFolder, tree_weights
from probelog.storage.store import Store


def sweep_trees(store: Store, pointer: Pointer) -> list[str]:
    """Delete recoveries that are not used any more; returns their keys.

    One is kept if a generation in the pointer was made from it, with what nightly runs have attached to it since, or if
    it was written to less than ``BUILDING`` ago (it may be under way).
    """
    names = defaultdict(list)
    for name in store.names(TREES):
        if not name.startswith(tree_weights("")):
            names[name.split("/")[1]].append(name)
    now = store.time() if names else None
    unused = set()
    for key, files in names.items():
        receipt = TreesFolder.of(key).receipt
        times = map(store.modified, [receipt] if receipt in files else files)
        if all(now and time and now - time >= BUILDING for time in times):
            unused.add(key)
    for item in pointer.kept_facts if unused else []:
        base = item.get("base")
        generation = Generation(store.child(INDEX), Pointer(str(item["generation"]), "", "", base=base))
        key = str(generation.settings.trees)
        unused -= {key, f"{key}-{base or item['generation']}"}
    for key in sorted(unused):
        store.delete_folder(TreesFolder.of(key).path)
    return sorted(unused)
