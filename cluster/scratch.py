"""The node-local folder for what need not survive: downloads, preprocessed probes, logs of items."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from probelog.errors import UsageError


def scratch_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The folder, of this user alone on shared machines too; made if need be.

    Args:
        folder: the configured one; none: below the system's folder for temporary files.

    Raises:
        UsageError: it belongs to somebody else.
    """
    path = Path(folder) / "probelog" if folder else Path(tempfile.gettempdir(), f"probelog-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise UsageError(f"{path} belongs to another user: set `scratch` to a folder of your own")
    return path
