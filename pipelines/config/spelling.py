"""The nearest right spelling of a word that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from probelog.errors import suggestion


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that does not exist; empty where no known word is like it.

    >>> did_you_mean("MIT", ["apache-2.0", "mit"])
    '; did you mean mit?'
    """
    folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=1, cutoff=0.6)
    return suggestion([folded[name] for name in close])
