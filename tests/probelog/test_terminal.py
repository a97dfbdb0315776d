"""Untrusted text cannot control a terminal."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from probelog.terminal import printable


@given(st.text(max_size=300))
def test_nothing_but_plain_characters_gets_through(text: str) -> None:
    shown = printable(text)
    assert len(shown) <= 200
    assert not any(unicodedata.category(char) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} for char in shown)
    assert "\n" not in shown


def test_known_attacks() -> None:
    assert "\x1b" not in printable("dog\x1b]0;owned\x07")
    assert "\x9b" not in printable("\x9b2J")
    assert printable("a\r\nb") == "a\ufffd\ufffdb"
    assert "\u202e" not in printable("gnp\u202eexe")
    assert printable("\ud800") == "\ufffd"


def test_ordinary_labels_stay_as_they_are() -> None:
    for label in ("Egyptian cat", "고양이", "naïve café", "日本語", "n02123045 tabby"):
        assert printable(label) == label


def test_long_text_is_cut() -> None:
    assert printable("x" * 1000) == "x" * 199 + "…"
