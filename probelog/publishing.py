"""What publishers do to the pointer and to generations: go live, roll back, sweep."""

from __future__ import annotations

import datetime as dt
import json

from probelog.errors import StoreError, UsageError
from probelog.pointer import POINTER, Pointer, read_pointer
from probelog.storage import Store

_HOLD = "hold.json"
# A publisher renews its hold before every table, none of which takes this long; one that died leaves its ruins
# behind for no longer. A withdrawn generation needs to outlive the readers that look for a newer one every 30 s.
BUILDING = dt.timedelta(hours=24)
_WITHDRAWN = dt.timedelta(minutes=10)


def go_live(index: Store, generation: str, source: str, keep: int = 3) -> Pointer:
    """Make a finished generation the live one.

    Raises:
        ConflictError: another publisher was faster; the pointer is left as that one wrote it.
    """
    before = index.read_or_none(POINTER)
    previous: list[dict[str, str]] = []
    if before is not None:
        old = Pointer.from_bytes(before, index.path(POINTER))
        previous = [_past(old), *old.previous][: keep - 1]
    pointer = Pointer(generation, source, _now(), previous)
    index.swap(POINTER, pointer.to_bytes(), before)
    return pointer


def roll_back(index: Store) -> Pointer:
    """Return to the generation before the live one, and forget the live one.

    Raises:
        UsageError: there is no earlier generation.
        StoreError: the earlier generation is no longer there.
        ConflictError: somebody published meanwhile.
    """
    pointer, before = read_pointer(index)
    if not pointer.previous:
        raise UsageError(f"{index.uri}: there is no earlier generation to roll back to")
    first, *rest = pointer.previous
    back = Pointer(first["generation"], first["source"], _now(), rest)
    if not index.names(f"generations/{back.generation}/meta.lance"):
        raise StoreError(f"{index.uri}: the earlier generation {back.generation} is gone; publish again")
    hold(index, pointer.generation, _WITHDRAWN)
    index.swap(POINTER, back.to_bytes(), before)
    return back


def sweep(index: Store) -> list[str]:
    """Delete the generations that nobody needs any more; returns their names.

    Kept are those that the pointer names (the live one and those to roll back to, which readers that have not
    looked yet still answer from), and those on hold: being built by another publisher, or just withdrawn.
    """
    found = {name.split("/")[1] for name in index.names("generations")}
    held = {name for name in found if _onhold(index, name)}
    # Read last: what went live since the listing was on hold then, or is named by now.
    pointer, _ = read_pointer(index)
    named = {pointer.generation, *(item["generation"] for item in pointer.previous)}
    for name in sorted(named & held):
        index.delete(f"generations/{name}/{_HOLD}")
    gone = sorted(found - held - named)
    for name in gone:
        index.delete_folder(f"generations/{name}")
    return gone


def hold(index: Store, generation: str, duration: dt.timedelta) -> None:
    """Keep sweeps away from a generation that the pointer does not name, for so long."""
    until = dt.datetime.now(dt.UTC) + duration
    index.write_json(f"generations/{generation}/{_HOLD}", {"until": until.isoformat(timespec="seconds")})


def _onhold(index: Store, generation: str) -> bool:
    data = index.read_or_none(f"generations/{generation}/{_HOLD}")
    if data is None:
        return False
    try:
        return dt.datetime.fromisoformat(json.loads(data)["until"]) > dt.datetime.now(dt.UTC)
    except (ValueError, KeyError, TypeError):
        return False


def _past(pointer: Pointer) -> dict[str, str]:
    return {"generation": pointer.generation, "source": pointer.source, "published": pointer.published}


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
