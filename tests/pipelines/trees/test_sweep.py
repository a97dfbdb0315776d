"""What is deleted of earlier recoveries."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipelines.trees.sweep import sweep_trees
from probelog.index.pointer import read_pointer
from probelog.storage.store import Store
from tests.support.worlds import small_index
from tests.support.worlds.small_index import Model


def test_what_no_kept_generation_was_made_from(tmp_path: Path) -> None:
    store, index = Store(tmp_path), Store(tmp_path / "index")
    for name in ("before", "live"):
        settings = {"trees": f"of-{name}"}
        small_index.build(index, name, [Model("a/b", ("x", "y"))], settings=settings, images=False)
    keys = ["of-before", "of-live", "of-live-live", "of-live-gone", "unused", "under-way", "weights"]
    for key in keys:
        store.write(f"trees/{key}/receipt.json", b"{}")
        store.write(f"trees/{key}/families/00000-000.parquet", b"")
    long_ago = time.time() - 25 * 3600
    for file in tmp_path.glob("trees/*/**/*"):
        if "under-way" not in file.parts:
            os.utime(file, (long_ago, long_ago))
    pointer = read_pointer(index)[0]
    assert sweep_trees(store, pointer) == ["of-live-gone", "unused"]
    assert sorted(path.name for path in (tmp_path / "trees").iterdir()) == sorted(
        {*keys} - {"of-live-gone", "unused"}
    )
    assert sweep_trees(store, pointer) == []
