"""A worker's folder on its node: downloads in flight, preprocessed probes, and a copy of the probe set."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from probelog.errors import UsageError
from probelog.sandbox.spec import downloads_folder
from probelog.storage.layout import ProbeSetFolder
from probelog.storage.store import Store


def scratch_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The node-local folder: this user's alone, on shared machines too.

    Raises:
        UsageError: it belongs to somebody else.
    """
    path = Path(folder) / "probelog" if folder else Path(tempfile.gettempdir(), f"probelog-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise UsageError(f"{path} belongs to another user: set `scratch` to a folder of your own")
    return path.resolve()


def own_downloads(scratch: Path) -> Path:
    """A folder for the downloads of this process; what workers that are no longer alive left is removed."""
    downloads = downloads_folder(scratch)
    if downloads.is_dir():
        for folder in downloads.iterdir():
            if folder.name.isdigit() and not _is_running(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
    folder_of_process = downloads / str(os.getpid())
    folder_of_process.mkdir(parents=True, exist_ok=True)
    return folder_of_process


def _is_running(process: str) -> bool:
    """Whether a process has not ended. One that nobody has waited for yet (a zombie) has."""
    try:
        status = Path("/proc", process, "stat").read_text(errors="replace")
    except OSError:
        return False
    # Its name, in brackets, may hold anything; the state follows it (proc(5)).
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def local_probes(store: Store, probe_set: str, scratch: Path) -> Store:
    """A store on this node that holds the probe set: the job's own where that is a directory, else a copy.

    The first worker of a node copies while the others wait. Model processes have neither network nor credentials.
    """
    if store.is_local:
        return store
    folder = ProbeSetFolder.of(probe_set)
    local = Store(scratch / "probe-sets")
    (scratch / "probe-sets").mkdir(exist_ok=True)
    with open(scratch / "probe-sets" / f"{folder.key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = folder.manifest
        if not local.exists(manifest):
            names = [name for name in store.names(folder.path) if name != manifest]
            for name in [*names, manifest]:  # last: a set without it does not exist
                if not local.exists(name):
                    local.write(name, store.read(name))
    return local
