"""A worker's folder on its node: downloads in flight, preprocessed probes, and a copy of the probe set."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from probelog.errors import UsageError
from probelog.sandbox.spec import downloads_folder
from probelog.storage.layout import ProbeSetFolder
from probelog.storage.store import Store

# As the kernel follows at most.
_MOST_LINKS = 40


def scratch_folder(folder: str | os.PathLike[str] | None) -> Path:
    """The node-local folder: this user's alone (0700), on shared machines too.

    What models are read from and what is deleted lies below it, so nobody else may be able to put anything there, or
    another folder in its place.

    Raises:
        UsageError: it belongs to somebody else, holds what somebody else made, or others could replace it; says what to do.
    """
    path = Path(folder) / "probelog" if folder else Path(tempfile.gettempdir(), f"probelog-{os.getuid()}")
    path = _made(path.absolute())
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(opened)
        if status.st_uid != os.getuid():
            raise _refusal(path, "belongs to another user")
        os.fchmod(opened, 0o700)
        try:
            _check_entries(path, deep=bool(status.st_mode & 0o022))
        except UsageError:
            os.fchmod(opened, stat.S_IMODE(status.st_mode))  # so that it is looked at again
            raise
    finally:
        os.close(opened)
    return path


def _made(path: Path) -> Path:
    """A folder, made where it is missing, by its path without links.

    Every step is one that nobody else could have put there or can replace: the kernel's rule for links in /tmp, here for
    folders as well. Links of the user's own may lead there; the folder itself is none.

    Raises:
        UsageError: somebody else could have.
    """
    reached, parts, links = Path(path.anchor), [*reversed(path.parts[1:])], 0
    while parts:
        step, parent = reached / parts.pop(), reached.stat()
        if step.name == "..":
            reached = reached.parent
            continue
        if not os.path.lexists(step):
            with contextlib.suppress(FileExistsError):
                step.mkdir(mode=0o777 if parts else 0o700)
        entry = step.lstat()
        # Group members were let in by whoever owns the folder; the root of a mount is a container's volume, mostly.
        if parent.st_mode & stat.S_IWOTH:
            if not parent.st_mode & stat.S_ISVTX and not os.path.ismount(reached):
                raise _refusal(reached, "can be changed by every user", f"`chmod +t {reached}`, or ")
            if entry.st_uid not in (os.getuid(), 0, parent.st_uid):
                raise _refusal(step, "belongs to another user")
        if stat.S_ISDIR(entry.st_mode):
            reached = step
        elif stat.S_ISLNK(entry.st_mode) and not parts:
            raise UsageError(
                f"{step} is a link, and ProbeLog did not make it: remove it, or set `scratch` to where it leads"
            )
        elif stat.S_ISLNK(entry.st_mode) and links < _MOST_LINKS:
            links += 1
            target = Path(os.readlink(step))
            if target.is_absolute():
                reached = Path(target.anchor)
            parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            raise _refusal(step, "is no folder")
    return reached


def _check_entries(folder: Path, deep: bool) -> None:
    """Refuse what ProbeLog did not make. ``deep``: at any depth, because others could have made it.

    Raises:
        UsageError: a link, or a file of somebody else.
    """
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another worker's download, done
            status = entry.stat(follow_symlinks=False)
            if entry.is_symlink() or status.st_uid != os.getuid():
                what = "is a link" if entry.is_symlink() else "belongs to another user"
                raise UsageError(
                    f"{entry.path} {what}, and ProbeLog did not make it: remove it, or set `scratch` to a folder of your own"
                )
            if deep and entry.is_dir(follow_symlinks=False):
                _check_entries(Path(entry.path), deep)


def _refusal(path: Path, why: str, remedy: str = "") -> UsageError:
    return UsageError(f"{path} {why}: {remedy}set `scratch` to a folder of your own")


def own_downloads(scratch: Path) -> Path:
    """A folder for the downloads of this process; what workers that are no longer alive left is removed."""
    return process_folder(downloads_folder(scratch))


def process_folder(parent: Path) -> Path:
    """A folder of this process below ``parent``; those of processes that are no longer alive are removed."""
    if parent.is_dir():
        for folder in parent.iterdir():
            if folder.name.isdigit() and not _is_running(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
    folder_of_process = parent / str(os.getpid())
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
