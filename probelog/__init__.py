"""ProbeLog: search for image classifiers by what they recognise, from their weights alone.

>>> import probelog
>>> index = probelog.open_index("store/index")          # doctest: +SKIP
>>> index.search(text="dog", k=3)                       # doctest: +SKIP

The query client lives here and needs neither torch nor Ray; names are imported when first used, so that
``import probelog`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from probelog.errors import ProbeLogError
    from probelog.search.client import Index, open_index
    from probelog.search.results import Hit, Results

_WHERE = {
    "Hit": "probelog.search.results",
    "Index": "probelog.search.client",
    "ProbeLogError": "probelog.errors",
    "Results": "probelog.search.results",
    "open_index": "probelog.search.client",
}

__all__ = ["Hit", "Index", "ProbeLogError", "Results", "__version__", "open_index"]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'probelog' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
