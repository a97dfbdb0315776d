"""Which images of a source become probes: a choice that depends on nothing but their contents and a seed."""

from __future__ import annotations

import heapq
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from probelog.encoders.decoding import UnreadableImageError, decode
from probelog.probes.sources import LeftOut, ProbeReport
from probelog.storage.encoding import digest

THUMBNAIL_SIDE = 96


@dataclass(frozen=True, slots=True)
class Chosen:
    """One image that is a probe for now: its place in the order, its name, hashes and size."""

    key: int
    name: str
    sha256: str
    pixels: str
    width: int
    height: int


class Selection:
    """The ``count`` usable images with the smallest keys among those offered so far; their bytes lie in a folder.

    One pass over the source, memory for the facts only: an image whose key is over the largest chosen one can
    never come back in, so it is not even decoded.
    """

    def __init__(self, seed: int, count: int | None, spool: Path) -> None:
        self.seed = seed
        self.count = count
        self.spool = spool
        self.seen = 0
        self._chosen: dict[str, Chosen] = {}
        self._by_pixels: dict[str, str] = {}
        self._largest: list[tuple[int, str]] = []  # heap of (-key, sha256); may name images that have gone
        self._left_out: list[tuple[int | None, ProbeReport]] = []

    def leave_out(self, key: int | None, report: ProbeReport) -> None:
        """Record what is not a probe; without a key it counts whatever else is chosen."""
        self._left_out.append((key, report))

    def offer(self, name: str, data: bytes) -> None:
        """Take an image in, or leave it out."""
        self.seen += 1
        content = digest(data)
        key = int(digest(f"{self.seed}:{content}".encode()), 16)
        if key > self._limit():
            return
        if (same := self._chosen.get(content)) is not None:
            first, second = sorted([same.name, name])
            self._chosen[content] = Chosen(key, first, content, same.pixels, same.width, same.height)
            self.leave_out(key, ProbeReport(second, LeftOut.DUPLICATE, f"same file as {first}"))
            return
        try:
            image = decode(data)
        except UnreadableImageError as error:
            reason = LeftOut.TOO_LARGE if error.too_large else LeftOut.UNREADABLE
            self.leave_out(key, ProbeReport(name, reason, str(error)))
            return
        pixels = digest(f"{image.width}x{image.height} ".encode() + image.tobytes())
        new = Chosen(key, name, content, pixels, image.width, image.height)
        if (other := self._by_pixels.get(pixels)) is not None:
            kept, dropped = sorted([self._chosen[other], new], key=lambda item: item.key)
            self.leave_out(
                dropped.key, ProbeReport(dropped.name, LeftOut.DUPLICATE, f"same pixels as {kept.name}")
            )
            if kept is not new:
                return
            self._remove(other)
        self._chosen[content] = new
        self._by_pixels[pixels] = content
        heapq.heappush(self._largest, (-key, content))
        (self.spool / content).write_bytes(data)
        (self.spool / f"{content}.webp").write_bytes(thumbnail(image))
        if self.count is not None and len(self._chosen) > self.count:
            self._limit()  # brings a chosen one to the top of the heap
            self._remove(heapq.heappop(self._largest)[1])

    def result(self) -> tuple[list[Chosen], list[ProbeReport]]:
        """The chosen images in the set's order, and what was left out where it would have been chosen."""
        limit = self._limit()
        reports = [report for key, report in self._left_out if key is None or key <= limit]
        return (
            sorted(self._chosen.values(), key=lambda item: item.key),
            sorted(reports, key=lambda report: (report.source, report.reason)),
        )

    def _limit(self) -> float:
        while self._largest and self._largest[0][1] not in self._chosen:
            heapq.heappop(self._largest)
        full = self.count is not None and len(self._chosen) >= self.count
        return -self._largest[0][0] if full else float("inf")

    def _remove(self, content: str) -> None:
        removed = self._chosen.pop(content)
        del self._by_pixels[removed.pixels]
        (self.spool / content).unlink()
        (self.spool / f"{content}.webp").unlink()


def thumbnail(image: Image.Image) -> bytes:
    """A small copy as WebP."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    sink = io.BytesIO()
    small.save(sink, "WEBP", quality=80)
    return sink.getvalue()
