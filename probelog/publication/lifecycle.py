"""What publishers do with generations: list their files, go live, roll back, sweep.

A generation is built under a new name that nobody else uses, with a *hold* in its folder (``hold.json``). When it is
built, ``files.json`` lists its files with their sizes and digests. Then the pointer is swapped to it: one atomic step.

What is deleted, and when:

1. A generation that the pointer names (live, to roll back to, withdrawn by a rollback, or the base that one of
   these is an update of) is never deleted.
2. One that leaves the pointer (three newer ones were published, or one after it was withdrawn) is *retired* in the
   same swap: the pointer lists it with the time. A reader may hold it for as long as it takes to look at the pointer
   again (30 s) and to finish its question.
3. One that the pointer never named and whose hold was not renewed for a day was left behind by a publisher that
   died. The next sweep retires it, by a swap of the pointer like any other.
4. A sweep deletes what has been retired for ten minutes (``GRACE``), and nothing else.

Nothing ever comes back from being retired: `go_live` refuses it, so that no race between a sweep and a publisher, and
no publisher however slow, can delete what is live. Times are those of the store's own clock: machines may disagree.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from probelog.errors import ConflictError, IndexNotFoundError, StoreError, UsageError
from probelog.index.layout import FILES, FILES_VERSION, HOLD, folder_of
from probelog.index.pointer import POINTER, Pointer, read_pointer
from probelog.storage.checksummed_json import sealed_json, unsealed_json
from probelog.storage.encoding import digest
from probelog.storage.store import Store
from probelog.storage.versions import check_version

# Renewed before every table and once a minute while one is written; indexing one, or checking all, takes hours at worst.
BUILDING = dt.timedelta(hours=24)
# Twenty times what a reader takes to notice (30 s).
GRACE = dt.timedelta(minutes=10)
_READERS = 8
_ATTEMPTS = 20


# Building


def reserve(index: Store, generation: str) -> None:
    """Take a name for a generation that is to be built, and keep sweeps away from it.

    Raises:
        StoreError: there is one of this name.
    """
    taken = index.names(folder_of(generation))
    if taken or not index.create(_hold(generation), _holding()):
        raise StoreError(f"{index.uri}: there is a generation {generation} already")


def renew(index: Store, generation: str) -> None:
    """Say that a generation is still being built.

    Raises:
        StoreError: a sweep took it meanwhile.
    """
    if not index.exists(_hold(generation)):
        raise _swept(index, generation)
    index.write(_hold(generation), _holding())


def list_files(index: Store, generation: str) -> str:
    """Write down which files a finished generation consists of; returns the digest of that list.

    Its tables must not change any more.
    """
    folder = folder_of(generation)
    names = [name.removeprefix(f"{folder}/") for name in index.names(folder)]
    names = [name for name in names if name not in (FILES, HOLD)]
    with ThreadPoolExecutor(_READERS) as pool:
        measured = pool.map(lambda name: index.measure(f"{folder}/{name}"), names)
        files = {
            name: {"size": size, "sha256": found} for name, (size, found) in zip(names, measured, strict=True)
        }
    data = sealed_json({"version": FILES_VERSION, "generation": generation, "files": files})
    index.write(f"{folder}/{FILES}", data)
    return digest(data)


def discard(index: Store, generation: str) -> None:
    """Remove a generation that did not become live. One that the pointer names, after all, stays.

    Raises:
        StoreError: it is named.
    """
    with contextlib.suppress(IndexNotFoundError):
        if generation in read_pointer(index)[0].named:
            raise StoreError(f"{index.uri}: generation {generation} is in use and was not removed")
    index.delete_folder(folder_of(generation))


# Choosing what is live


def go_live(
    index: Store,
    generation: str,
    source: str,
    keep: int = 3,
    seen: Sequence[str] | None = None,
    base: str | None = None,
) -> Pointer:
    """Make a finished generation the live one.

    Args:
        index: holds the generation.
        generation: its name; `list_files` was called for it.
        source: key of what it was made from.
        keep: how many generations the pointer names from now on, the live one included.
        seen: the pointer's ``choice`` when this publisher began to build ([] where there was no pointer), where
            that matters: what was published meanwhile may be newer than what this one was made from.
        base: the generation that it is an update of, which the pointer must name.

    Raises:
        ConflictError: somebody published or rolled back meanwhile; the pointer is left as it was.
        StoreError: the generation is not whole, or was swept because it took too long.
    """
    files = _whole(index, generation)
    base_files = None if base is None else _whole(index, base)

    def turned(old: Pointer | None) -> Pointer:
        if seen is not None and list(seen) != _choice(old):
            raise _overtaken(index, old)
        if base is not None and (old is None or base not in old.named):
            raise StoreError(f"{index.uri}: generation {base} is no longer kept: it cannot be updated")
        if old is None:
            return Pointer(generation, source, _now(), files)
        if generation in old.retired:
            raise _swept(index, generation)
        kept = [old.facts, *(item for item in old.previous if item["generation"] != generation)]
        new = replace(
            old,
            generation=generation,
            source=source,
            published=_now(),
            files=files,
            base=base,
            base_files=base_files,
            previous=kept[: keep - 1],
            withdrawn=[],
            serial=old.serial + 1,
        )
        gone = [name for name in old.named if name not in new.named]
        return replace(new, retired=_with_retired(index, old, gone))

    pointer = _swapped(index, turned, _optional(index))
    with contextlib.suppress(OSError, StoreError):  # the hold of a generation that is named means nothing
        index.delete(_hold(generation))
    return pointer


def roll_back(index: Store, to: str | None = None) -> Pointer:
    """Return to an earlier generation, or to one that was withdrawn by an earlier rollback.

    What was live after it is withdrawn: kept until the next publish, so that a rollback can be taken back.

    Args:
        index: the index.
        to: name of the generation; by default the one before the live one.

    Raises:
        UsageError: there is no earlier generation, or none of that name.
        StoreError: it is no longer there, or not whole.
        ConflictError: somebody published or rolled back at the same moment.
    """
    seen, _ = read_pointer(index)
    if to is None and not seen.previous:
        raise UsageError(f"{index.uri}: there is no earlier generation to roll back to")
    wanted = str(seen.previous[0]["generation"]) if to is None else to
    # In the order in which they were published.
    line = [*reversed(seen.previous), seen.facts, *seen.withdrawn]
    names = [str(item["generation"]) for item in line]
    others = [name for name in names if name not in (wanted, seen.generation)]
    if wanted not in names or wanted == seen.generation:
        raise UsageError(
            f"{index.uri}: there is no generation {wanted!r} to roll back to; there "
            + (f"is {' and '.join(others)}" if others else "are no others")
        )
    place = names.index(wanted)
    try:
        _check_is_present(index, wanted, line[place]["files"])
        base = line[place].get("base")
        if base is not None:
            _check_is_present(index, base, line[place].get("base_files"))
    except StoreError as error:
        raise StoreError(
            f"{error}. Publish again" + (f", or go back to {' or '.join(others)} (--to)" if others else "")
        ) from error

    def turned(old: Pointer | None) -> Pointer:
        if old is None or old.choice != seen.choice:
            raise _overtaken(index, old)
        chosen = line[place]
        return replace(
            old,
            generation=wanted,
            source=str(chosen["source"]),
            published=_now(),
            files=chosen["files"],
            base=chosen.get("base"),
            base_files=chosen.get("base_files"),
            previous=line[:place][::-1],
            withdrawn=line[place + 1 :],
            serial=old.serial + 1,
        )

    return _swapped(index, turned, lambda: read_pointer(index))


# Sweeping


def sweep(index: Store, grace: dt.timedelta = GRACE) -> list[str]:
    """Delete the generations that nobody needs any more; returns their names. The rules are in the module's text.

    Raises:
        IndexNotFoundError: nothing was ever published.
    """
    pointer, before = read_pointer(index)
    # Listed after the pointer was read: what went live since then makes the swap below fail.
    found = {name.split("/")[1] for name in index.names("generations")}
    now = index.time()
    due = sorted(name for name, since in pointer.retired.items() if _age(now, since) >= grace)
    for name in due:
        index.delete_folder(folder_of(name))
    ruins = [
        name for name in sorted(found - {*pointer.named, *pointer.retired}) if _abandoned(index, name, now)
    ]
    if due or ruins:
        left = {name: since for name, since in pointer.retired.items() if name not in due}
        after = replace(
            pointer,
            retired=left | dict.fromkeys(ruins, _stamp(now)),
            serial=pointer.serial + 1,
        )
        # Somebody else swapped meanwhile: the next sweep finds the same.
        with contextlib.suppress(ConflictError):
            index.swap(POINTER, after.to_bytes(), before)
    return [name for name in due if name in found]


def _swapped(
    index: Store,
    turned: Callable[[Pointer | None], Pointer],
    read: Callable[[], tuple[Pointer | None, bytes | None]],
) -> Pointer:
    """Swap the pointer for what becomes of it; again where only a sweep was faster."""
    first: Pointer | None = None
    for attempt in range(_ATTEMPTS):
        old, before = read()
        if attempt == 0:
            first = old
        elif _choice(old) != _choice(first):
            raise _overtaken(index, old)
        new = turned(old)
        try:
            index.swap(POINTER, new.to_bytes(), before)
        except ConflictError:
            continue
        return new
    raise ConflictError(f"{index.path(POINTER)} changes all the time; nothing was changed. Run again.")


def _overtaken(index: Store, live: Pointer | None) -> ConflictError:
    return ConflictError(
        f"{index.uri}: somebody else published or rolled back meanwhile ("
        + ("the pointer is gone" if live is None else f"{live.generation} is live")
        + "). Nothing was changed. Run again."
    )


def _optional(index: Store) -> Callable[[], tuple[Pointer | None, bytes | None]]:
    def read() -> tuple[Pointer | None, bytes | None]:
        try:
            return read_pointer(index)
        except IndexNotFoundError:
            return None, None

    return read


def _choice(pointer: Pointer | None) -> list[str]:
    return [] if pointer is None else pointer.choice


def read_files(
    index: Store, generation: str, expected: str | None = None
) -> tuple[dict[str, tuple[int, str]], str]:
    """Size and SHA-256 of every file of a generation by its path below the generation's folder; the list's digest.

    Args:
        index: the index.
        generation: its name.
        expected: digest of the list, where it is known.

    Raises:
        FileNotFoundError: it has no such list: it is not finished, or was published by an early ProbeLog.
        SchemaVersionError: made by a newer ProbeLog.
        StoreError: the list is damaged, or not the expected one.
    """
    path = f"{folder_of(generation)}/{FILES}"
    data = index.read(path)
    where = index.path(path)
    if expected is not None and digest(data) != expected:
        raise StoreError(f"{where} is damaged: its digest is not the one in the pointer")
    content, _ = unsealed_json(data, where)
    try:
        check_version(content["version"], FILES_VERSION, where, "list of files")
        files = {
            str(name): (int(item["size"]), str(item["sha256"])) for name, item in content["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where} is damaged ({error!r})") from error
    return files, digest(data)


def _whole(index: Store, generation: str, expected: str | None = None) -> str:
    """Digest of a generation's list of files, all of which are there with their sizes."""
    try:
        files, found = read_files(index, generation, expected)
    except FileNotFoundError:
        raise StoreError(f"{index.uri}: generation {generation} is gone, or was never finished") from None
    folder = folder_of(generation)
    sizes = index.sizes(folder)
    wrong = [name for name, (size, _) in files.items() if sizes.get(f"{folder}/{name}") != size]
    if wrong:
        raise StoreError(
            f"{index.uri}: generation {generation} is not whole: {wrong[0]}"
            + (f" and {len(wrong) - 1} other files are" if len(wrong) > 1 else " is")
            + " missing or of another size"
        )
    return found


def _check_is_present(index: Store, generation: str, files: str | None) -> None:
    """Raises StoreError where a generation that was published is not whole; early ones have no list to tell by."""
    if files is not None:
        _whole(index, generation, files)
    elif not index.names(f"{folder_of(generation)}/meta.lance"):
        raise StoreError(f"{index.uri}: generation {generation} is gone")


def _hold(generation: str) -> str:
    return f"{folder_of(generation)}/{HOLD}"


def _holding() -> bytes:
    # What counts is when the file was written; its content is for people.
    return sealed_json({"building_on": platform.node(), "process": os.getpid()})


def _abandoned(index: Store, generation: str, now: dt.datetime) -> bool:
    renewed = index.modified(_hold(generation))
    return renewed is None or now - renewed >= BUILDING


def _swept(index: Store, generation: str) -> StoreError:
    return StoreError(
        f"{index.uri}: generation {generation} was given up by a sweep, because its publisher was silent for "
        f"{BUILDING}. Run again."
    )


def _with_retired(index: Store, old: Pointer, names: Sequence[str]) -> dict[str, str]:
    return {**old.retired, **dict.fromkeys(names, _stamp(index.time()))} if names else dict(old.retired)


def _stamp(moment: dt.datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _age(now: dt.datetime, since: str) -> dt.timedelta:
    """How long ago; nothing where the time cannot be read, so that nothing is deleted for it."""
    try:
        return now - dt.datetime.fromisoformat(since)
    except (ValueError, TypeError):
        return dt.timedelta(0)


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
