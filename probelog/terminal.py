"""Text of strangers on a terminal: labels, repository names and messages that must not control it."""

from __future__ import annotations

import unicodedata

# Control and format characters (escapes, carriage returns, bidirectional overrides, zero-width joiners), private
# use and surrogates: none of them belongs in a label, each can disguise or hijack a terminal line.
_UNSAFE = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})


def printable(text: object, limit: int = 200) -> str:
    """One harmless line: control and format characters become U+FFFD, long text ends in an ellipsis.

    >>> printable("dog" + chr(27) + "[2J")
    'dog\ufffd[2J'
    """
    raw = str(text)
    clean = "".join("\ufffd" if unicodedata.category(char) in _UNSAFE else char for char in raw[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
