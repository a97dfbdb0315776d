"""The log of items: one line each, whatever uploaders write into their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.probing.results import ItemReport
from pipelines.probe.item_log import ItemLog
from pipelines.probe.plan import Item
from probelog.errors import UsageError
from probelog.storage.schemas import CatalogueRow


def test_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "below/items.jsonl"
    hostile = 'a/b\n{"repo": "forged"}\x1b[2J\u2028\ud800'
    for _ in range(2):
        with ItemLog(file) as log:
            log.write(
                Item("k", CatalogueRow(hostile, "s"), 2, 0, 1.0),
                ItemReport(reason="internal", detail="line\nline\r", worker="host:1"),
            )
            report = ItemReport(seconds={"load": 1.23456}, bytes=5, rows=3, parameters=9, copy_of="c/d")
            log.write(Item("k", CatalogueRow("e/f", "s"), 1, 1, 1.0), report)
    data = file.read_bytes()
    assert data.count(b"\n") == 4
    assert b"\x1b" not in data
    first, second, *_ = map(json.loads, data.decode("ascii").splitlines())
    assert (first["repo"], first["result"], first["detail"]) == (hostile, "internal", "line\nline\r")
    assert (first["attempt"], first["worker"]) == (2, "host:1")
    assert (second["result"], second["seconds"], second["bytes"]) == ("copy", {"load": 1.2346}, 5)
    assert second["logits"] == 3


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        ItemLog(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_lines_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    with ItemLog(Path("/dev/full")) as log:
        for _ in range(2):
            log.write(Item("k", CatalogueRow("e/f", "s"), 1, 1, 1.0), ItemReport())
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full: lines of the log are lost (No space left on device)"
    ]
