"""The log: levels, and what it does with text that it cannot trust."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from probelog import logs
from probelog.logs import LogLevel

_OURS = logging.getLogger("probelog.some.module")
_LIBRARY = logging.getLogger("library")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, "probelog", "cluster", "pipelines")]
    levels, handlers = [one.level for one in loggers], list(logging.root.handlers)
    yield
    for one, level in zip(loggers, levels, strict=True):
        one.setLevel(level)
    logging.root.handlers[:] = handlers


@pytest.mark.parametrize(
    ("level", "ours", "library"),
    [("debug", 4, 2), ("info", 3, 2), ("warning", 2, 2), ("error", 1, 1)],
)
def test_levels(level: str, ours: int, library: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of libraries are not let in below warnings: they would drown ours."""
    logs.configure("debug")
    logs.configure(level)
    assert logs.current() == level
    for logger in (_OURS, _LIBRARY):
        for name in ("debug", "info", "warning", "error"):
            getattr(logger, name)("said")
    assert capsys.readouterr().err.count("said") == ours + library


def test_a_process_that_configures_nothing_hands_on_the_default() -> None:
    logging.getLogger("probelog").setLevel(logging.NOTSET)
    assert logs.current() is LogLevel.WARNING


def test_lines_say_their_place_where_there_are_many(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning")
    _OURS.warning("a message of %s", "today")
    logs.configure("info")
    _OURS.warning("another")
    plain, detailed = capsys.readouterr().err.splitlines()
    assert plain == "a message of today"
    assert detailed.endswith("WARNING probelog.some.module: another")


def test_untrusted_text_neither_controls_the_terminal_nor_passes_for_a_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure()
    _OURS.warning("repository %s", "a\x1b[2J\nthe store is damaged\rx")
    assert capsys.readouterr().err == "repository a\ufffd[2J\n    the store is damaged\n    x\n"


def test_long_texts_keep_their_beginning_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()

    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ValueError("y" * 10_000 + "\n" + "x" * 1_000_000 + "the end")

    try:
        deep(3)
    except ValueError:
        _OURS.exception("the beginning")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["the beginning", "    Traceback (most recent call last):"]
    assert "    [...]" in lines
    assert sum(map(len, lines)) < 17_000
    assert max(map(len, lines)) <= 504
    assert logs.shortened("abc" * 100, 100)[-75:] == ("abc" * 100)[-75:]
