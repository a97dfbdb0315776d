"""The first thing that runs in the process that forks: importable is what it was told to import, and nothing else.

Run by path in Python's isolated mode (``-I``), so that neither the current folder nor a user's own packages nor a
variable decides what ``torch`` is. The folders of a checkout are not on its path: only the packages named are found in
them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class Packages:
    """Finds some top-level packages and modules at given places (`importlib.abc.MetaPathFinder`)."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As the import system asks for it."""
        place = self._places.get(fullname)
        if place is None:
            return None
        if not Path(place).is_dir():
            return importlib.util.spec_from_file_location(fullname, place)
        return importlib.util.spec_from_file_location(
            fullname, Path(place, "__init__.py"), submodule_search_locations=[place]
        )


def find(places: Mapping[str, str], libraries: Sequence[str]) -> None:
    """Have the packages of ``places`` found there, and others also in the folders ``libraries``, after all else."""
    sys.meta_path.insert(0, Packages(places))
    sys.path += [folder for folder in libraries if folder not in sys.path]


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    find(arguments.pop("places"), arguments.pop("libraries"))
    from probelog.sandbox.fork_server import forking

    sys.exit(forking.main(**arguments))
