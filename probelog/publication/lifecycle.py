"""The life of a generation: reserved, built, released by a swap of the pointer, rolled back, retired, swept.

A generation is built under a new, unique name, with a *hold* in its folder (``hold.json``). When it is built,
``files.json`` lists its files with their sizes and digests. Then the pointer is swapped to it: one atomic step.

What is deleted, and when:

1. A generation that the pointer names (live, to roll back to, withdrawn by a rollback, or the base that one of
   these is an update of) is never deleted.
2. One that leaves the pointer (three newer ones were published, or one after it was withdrawn) is *retired* in the
   same swap: the pointer lists it with the time. A reader may hold it for as long as it takes to look at the pointer
   again (30 s) and to finish its question.
3. One that the pointer never named and whose hold was not renewed for a day is *abandoned*: its publisher died. The
   next sweep retires it, by a swap of the pointer like any other.
4. A sweep deletes the generations that have been retired for ten minutes (``GRACE``), and nothing else.

An operator may *hold* the live generation (another thing than the hold of one that is built): `go_live` refuses every
other one until it is released. The hold is part of the pointer, so that no publisher can miss it.

A retired generation can never become live again: `go_live` refuses it. So no race between a sweep and a publisher,
however slow, can delete a live generation. Times are those of the store's clock: the clocks of machines may disagree.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from probelog.errors import ConflictError, HeldError, IndexNotFoundError, StoreError, UsageError
from probelog.index.pointer import Pointer, read_pointer
from probelog.storage.checksummed_json import sealed_json, unsealed_json
from probelog.storage.encoding import digest
from probelog.storage.layout import FILES, GENERATIONS, HOLD, POINTER, GenerationFolder
from probelog.storage.store import Store
from probelog.storage.versions import MADE_BY, check_version

# Of the list of a generation's files.
FILES_VERSION = 1
# The hold is renewed before every table and once a minute while one is written; indexing a table, or checking all,
# takes hours at worst.
BUILDING = dt.timedelta(hours=24)
# Twenty times what a reader takes to notice (30 s).
GRACE = dt.timedelta(minutes=10)
_READERS = 8
_ATTEMPTS = 20


# Building


def reserve(index: Store, generation: str) -> None:
    """Reserve a name for a generation that is to be built, and protect it from sweeps by a hold.

    Raises:
        StoreError: a generation of this name exists.
    """
    existing = index.names(GenerationFolder.of(generation).path)
    if existing or not index.create(GenerationFolder.of(generation).hold, _hold_content()):
        raise StoreError(f"{index.uri}: there is a generation {generation} already")


def renew(index: Store, generation: str) -> None:
    """Renew the hold of a generation that is still being built.

    Raises:
        StoreError: a sweep retired it meanwhile.
    """
    if not index.exists(GenerationFolder.of(generation).hold):
        raise _swept_error(index, generation)
    index.write(GenerationFolder.of(generation).hold, _hold_content())


def list_files(index: Store, generation: str) -> str:
    """Write the list of a finished generation's files, with sizes and SHA-256; returns the digest of that list.

    Its tables must not change afterwards.
    """
    folder = GenerationFolder.of(generation)
    names = [name.removeprefix(folder.file("")) for name in index.names(folder.path)]
    names = [name for name in names if name not in (FILES, HOLD)]
    with ThreadPoolExecutor(_READERS) as pool:
        measured = pool.map(lambda name: index.measure(folder.file(name)), names)
        files = {
            name: {"size": size, "sha256": sha256}
            for name, (size, sha256) in zip(names, measured, strict=True)
        }
    data = sealed_json(
        {"version": FILES_VERSION, "made_by": MADE_BY, "generation": generation, "files": files}
    )
    index.write(folder.files, data)
    return digest(data)


def discard(index: Store, generation: str) -> None:
    """Delete a generation that did not become live.

    Raises:
        StoreError: the pointer names it; it was not deleted.
    """
    with contextlib.suppress(IndexNotFoundError):
        if generation in read_pointer(index)[0].referenced:
            raise StoreError(f"{index.uri}: generation {generation} is in use and was not removed")
    index.delete_folder(GenerationFolder.of(generation).path)


# Choosing what is live


def go_live(
    index: Store,
    generation: str,
    source: str,
    keep: int = 3,
    expected_choice: Sequence[str] | None = None,
    base: str | None = None,
) -> Pointer:
    """Make a finished generation the live one.

    Args:
        index: holds the generation.
        generation: its name; `list_files` was called for it.
        source: key of the data that it was made from.
        keep: number of generations that the pointer names from now on, the live one included.
        expected_choice: the pointer's ``choice`` when this publisher began to build ([] where there was no pointer);
            None: whatever was published meanwhile, which may be newer than this generation's data, is superseded.
        base: the generation that it is an update of, which the pointer must name.

    Raises:
        ConflictError: somebody published or rolled back meanwhile; the pointer is unchanged.
        HeldError: an operator holds the live generation.
        StoreError: the generation is incomplete, or was swept because building it took too long.
    """
    files = _check_complete(index, generation)
    base_files = None if base is None else _check_complete(index, base)

    def next_pointer(old: Pointer | None) -> Pointer:
        refuse_held(index, old)
        if expected_choice is not None and list(expected_choice) != _choice(old):
            raise _overtaken_error(index, old)
        if base is not None and (old is None or base not in old.referenced):
            raise StoreError(f"{index.uri}: generation {base} is no longer kept: it cannot be updated")
        if old is None:
            return Pointer(generation, source, _now(), files)
        if generation in old.retired:
            raise _swept_error(index, generation)
        earlier = [old.facts, *(item for item in old.previous if item["generation"] != generation)]
        new = replace(
            old,
            generation=generation,
            source=source,
            published=_now(),
            files=files,
            base=base,
            base_files=base_files,
            previous=earlier[: keep - 1],
            withdrawn=[],
            serial=old.serial + 1,
        )
        dropped = [name for name in old.referenced if name not in new.referenced]
        return replace(new, retired=_with_retired(index, old, dropped))

    pointer = _swap_pointer(index, next_pointer, _optional_pointer(index))
    with contextlib.suppress(StoreError):  # the hold of a generation that is named means nothing
        index.delete(GenerationFolder.of(generation).hold)
    return pointer


def refuse_held(index: Store, pointer: Pointer | None) -> None:
    """Refuse to publish over a generation that is held.

    Raises:
        HeldError: it is; says since when, why, and how to release it.
    """
    if pointer is not None and pointer.held is not None:
        raise HeldError(
            f"{index.uri}: generation {pointer.generation} is held since {pointer.held['since']} "
            f"({pointer.held['reason']}): nothing is published over it until `probelog-index release`"
        )


def release(index: Store) -> Pointer:
    """Release the live generation: publishers may replace it again.

    Raises:
        UsageError: it is not held.
        ConflictError: somebody published or rolled back at the same moment.
    """

    def next_pointer(old: Pointer | None) -> Pointer:
        if old is None or old.held is None:
            raise UsageError(f"{index.uri}: the live generation is not held")
        return replace(old, held=None, serial=old.serial + 1)

    return _swap_pointer(index, next_pointer, lambda: read_pointer(index))


def roll_back(index: Store, to: str | None = None, hold: str | None = None) -> Pointer:
    """Return to an earlier generation, or to one that was withdrawn by an earlier rollback.

    The generations that were live after it are withdrawn: kept until the next publish, so that a rollback can be undone.
    A hold stays when another generation becomes live by a rollback.

    Args:
        index: the index.
        to: name of the generation; by default the one before the live one. With ``hold`` also the live one itself.
        hold: why nothing is to be published over it until `release`; None: publishers go on.

    Raises:
        UsageError: there is no earlier generation, or none of that name.
        StoreError: it is missing or incomplete.
        ConflictError: somebody published or rolled back at the same moment.
    """
    pointer, _ = read_pointer(index)
    if to is None and not pointer.previous:
        raise UsageError(f"{index.uri}: there is no earlier generation to roll back to")
    target = str(pointer.previous[0]["generation"]) if to is None else to
    # In the order in which they were published.
    timeline = [*reversed(pointer.previous), pointer.facts, *pointer.withdrawn]
    names = [str(item["generation"]) for item in timeline]
    alternatives = [name for name in names if name not in (target, pointer.generation)]
    if target not in names or (target == pointer.generation and hold is None):
        raise UsageError(
            f"{index.uri}: there is no generation {target!r} to roll back to; there "
            + (f"is {' and '.join(alternatives)}" if alternatives else "are no others")
        )
    place = names.index(target)
    try:
        _check_complete(index, target, timeline[place]["files"])
        base = timeline[place].get("base")
        if base is not None:
            _check_complete(index, base, timeline[place].get("base_files"))
    except StoreError as error:
        raise StoreError(
            f"{error}. Publish again"
            + (f", or go back to {' or '.join(alternatives)} (--to)" if alternatives else "")
        ) from error

    def next_pointer(old: Pointer | None) -> Pointer:
        if old is None or old.choice != pointer.choice:
            raise _overtaken_error(index, old)
        facts = timeline[place]
        return replace(
            old,
            generation=target,
            source=str(facts["source"]),
            published=_now(),
            files=str(facts["files"]),
            base=facts.get("base"),
            base_files=facts.get("base_files"),
            previous=timeline[:place][::-1],
            withdrawn=timeline[place + 1 :],
            serial=old.serial + 1,
            held=old.held if hold is None else {"reason": hold, "since": _now()},
        )

    return _swap_pointer(index, next_pointer, lambda: read_pointer(index))


# Sweeping


def sweep(index: Store, grace: dt.timedelta = GRACE) -> list[str]:
    """Delete the generations that are due by the rules of this module; returns their names.

    Raises:
        IndexNotFoundError: nothing was ever published.
    """
    pointer, pointer_bytes = read_pointer(index)
    # Listed after the pointer was read: what went live since then makes the swap below fail.
    existing = {name.split("/")[1] for name in index.names(GENERATIONS)}
    now = index.time()
    due = sorted(name for name, since in pointer.retired.items() if _age(now, since) >= grace)
    for name in due:
        index.delete_folder(GenerationFolder.of(name).path)
    abandoned = [
        name
        for name in sorted(existing - {*pointer.referenced, *pointer.retired})
        if _is_abandoned(index, name, now)
    ]
    if due or abandoned:
        remaining = {name: since for name, since in pointer.retired.items() if name not in due}
        new = replace(
            pointer,
            retired=remaining | dict.fromkeys(abandoned, _timestamp(now)),
            serial=pointer.serial + 1,
        )
        # If somebody else swapped meanwhile, the next sweep does it.
        with contextlib.suppress(ConflictError):
            index.swap(POINTER, new.to_bytes(), pointer_bytes)
    return [name for name in due if name in existing]


def _swap_pointer(
    index: Store,
    next_pointer: Callable[[Pointer | None], Pointer],
    read: Callable[[], tuple[Pointer | None, bytes | None]],
) -> Pointer:
    """Swap the pointer for ``next_pointer`` of the present one; retried where only a sweep was faster.

    Raises:
        ConflictError: somebody published or rolled back meanwhile, or the pointer changes all the time.
    """
    first: Pointer | None = None
    for attempt in range(_ATTEMPTS):
        old, old_bytes = read()
        if attempt == 0:
            first = old
        elif _choice(old) != _choice(first):
            raise _overtaken_error(index, old)
        new = next_pointer(old)
        try:
            index.swap(POINTER, new.to_bytes(), old_bytes)
        except ConflictError:
            continue
        return new
    raise ConflictError(f"{index.path(POINTER)} changes all the time; nothing was changed. Run again.")


def _overtaken_error(index: Store, live: Pointer | None) -> ConflictError:
    return ConflictError(
        f"{index.uri}: somebody else published or rolled back meanwhile ("
        + ("the pointer is missing" if live is None else f"{live.generation} is live")
        + "). Nothing was changed. Run again."
    )


def _optional_pointer(index: Store) -> Callable[[], tuple[Pointer | None, bytes | None]]:
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
        FileNotFoundError: it has no such list: it is not finished.
        SchemaVersionError: made by a newer ProbeLog.
        StoreError: the list is damaged, or not the expected one.
    """
    path = GenerationFolder.of(generation).files
    data = index.read(path)
    where = index.path(path)
    if expected is not None and digest(data) != expected:
        raise StoreError(f"{where} is damaged: its digest is not the one in the pointer")
    content = unsealed_json(data, where)
    check_version(content, FILES_VERSION, where, "list of files")
    try:
        files = {
            str(name): (int(item["size"]), str(item["sha256"])) for name, item in content["files"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where} is damaged ({error!r})") from error
    return files, digest(data)


def _check_complete(index: Store, generation: str, expected: str | None = None) -> str:
    """Check that all files of a generation exist in their sizes; returns the digest of the list of files.

    Raises:
        StoreError: the generation was never finished, or a file is missing or of another size.
    """
    try:
        files, list_digest = read_files(index, generation, expected)
    except FileNotFoundError:
        raise StoreError(f"{index.uri}: generation {generation} is missing, or was never finished") from None
    folder = GenerationFolder.of(generation)
    sizes = index.sizes(folder.path)
    wrong = [name for name, (size, _) in files.items() if sizes.get(folder.file(name)) != size]
    if wrong:
        raise StoreError(
            f"{index.uri}: generation {generation} is incomplete: {wrong[0]}"
            + (f" and {len(wrong) - 1} other files are" if len(wrong) > 1 else " is")
            + " missing or of another size"
        )
    return list_digest


def _hold_content() -> bytes:
    # The file's time of writing counts; its content is for people.
    return sealed_json({"building_on": platform.node(), "process": os.getpid()})


def _is_abandoned(index: Store, generation: str, now: dt.datetime) -> bool:
    renewed = index.modified(GenerationFolder.of(generation).hold)
    return renewed is None or now - renewed >= BUILDING


def _swept_error(index: Store, generation: str) -> StoreError:
    return StoreError(
        f"{index.uri}: generation {generation} was retired by a sweep, because its publisher did not renew its "
        f"hold for {BUILDING}. Run again."
    )


def _with_retired(index: Store, old: Pointer, names: Sequence[str]) -> dict[str, str]:
    return {**old.retired, **dict.fromkeys(names, _timestamp(index.time()))} if names else dict(old.retired)


def _timestamp(moment: dt.datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _age(now: dt.datetime, since: str) -> dt.timedelta:
    """Time since ``since``; zero where it cannot be parsed, so that nothing is deleted because of it."""
    try:
        return now - dt.datetime.fromisoformat(since)
    except (ValueError, TypeError):
        return dt.timedelta(0)


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
