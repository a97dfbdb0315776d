"""Entry point of ``probelog-index``, the operator's command.

The command itself lives in ``pipelines``, which is too generic a name to install into other people's
environments: it is present in a checkout and in the image, not in the wheel. This module only hands over.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec


def main() -> None:
    """Run ``pipelines.cli``, or say where to get it."""
    if find_spec("pipelines") is None or find_spec("cluster") is None:
        sys.stderr.write(
            "probelog-index builds an index and lives in the ProbeLog checkout (or its image), not in the wheel.\n"
            "Clone the repository and run `uv run probelog-index --help` there.\n"
            "To query an index that already exists, use `probelog`.\n"
        )
        raise SystemExit(2)
    import_module("pipelines.cli").main()
