"""What uploaders wrote, in the hands of a spreadsheet."""

from __future__ import annotations

import csv

from probelog.spreadsheet import csv_lines


def test_texts_are_no_formulas() -> None:
    texts = ['=HYPERLINK("http://x")', "+1", "-1", "@x", "plain", "\x1b[2J", None]
    numbers = [-1.5, 2.0, None, 0.0, 1.0, 1.0, 1.0]
    head, *rows = csv.reader(
        csv_lines(["text", "number", "=list"], zip(texts, numbers, [["=1"]] * 7, strict=True))
    )
    assert head == ["text", "number", "'=list"]
    assert [row[0] for row in rows] == ["'" + text for text in texts[:4] if text] + ["plain", "\ufffd[2J", ""]
    assert [row[1] for row in rows[:3]] == ["-1.5", "2.0", ""]
    assert rows[0][2] == '["=1"]'
