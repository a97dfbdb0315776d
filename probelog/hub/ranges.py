"""Parts of a file of the Hub: byte ranges at a pinned commit, each checked against what was asked for.

Of a file that is read in part no digest can be verified. What is checked: the commit, that an answer is the very range,
and that all answers agree with the listing on the file's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import BrokenAnswerError, HubClient, HubError, HubResponse, Route, chunks
from probelog.hub.download import announced_size, check_origin, file_url
from probelog.hub.listing import item_failure

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_NOTHING = re.compile(r"(bytes )?\*/0")
# Asked for even where less is left, so that it is the budget that ends and not the file.
_LEAST = 64


class ByteBudget:
    """Bytes that may still be asked for; ``asked`` and ``requests`` count what was."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked = 0
        self.requests = 0

    @property
    def left(self) -> int:
        """How many remain."""
        return self.most - self.asked

    def take(self, count: int, what: str) -> None:
        """Take some before they are asked for.

        Raises:
            ItemFailure: too-large: so many are not left.
        """
        if count > self.left:
            raise ItemFailure(
                FailureReason.TOO_LARGE, f"{what} takes {count} bytes, of {self.most} are {self.left} left"
            )
        self.asked += count
        self.requests += 1


class RemoteFile:
    """One file of a repository. For one thread.

    Args:
        client: of the Hub; may be shared by threads.
        repo, sha, path: which file.
        budget: what every read is taken from.
        size: bytes of the file, where the listing says.
        check: called with every piece that arrives, and while none does; what it raises ends the read.
    """

    def __init__(
        self,
        client: HubClient,
        repo: str,
        sha: str,
        path: str,
        budget: ByteBudget,
        size: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.size = path, size
        self._client, self._sha, self._budget, self._check = client, sha, budget, check
        self._url = file_url(client, repo, sha, path)
        self._route = Route()

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from ``begin`` to before ``end``, fewer where the file ends earlier.

        Where its size is not known yet, fewer too where the budget ends.

        Raises:
            ItemFailure: whatever goes wrong. Reasons: too-large (the budget), gated, disabled, not-found, wrong-digest
                (another commit), download-failed.
        """
        end = min(end, begin + max(self._budget.left, _LEAST) if self.size is None else self.size)
        if begin >= end:
            return b""
        self._budget.take(end - begin, self.path)
        asked = {"range": f"bytes={begin}-{end - 1}"}
        try:
            data = self._client.call(
                "file",
                self._url,
                lambda answer: self._receive(answer, begin, end),
                lambda: asked,
                self._check,
                self._route,
            )
        except HubError as error:
            raise item_failure(error) from error
        self._budget.asked -= end - begin - len(data)
        return data

    def _receive(self, answer: HubResponse, begin: int, end: int) -> bytes:
        status = answer.response.status_code
        if (
            status == 416
            and begin == 0
            and _NOTHING.fullmatch(answer.response.headers.get("content-range", ""))
        ):
            self.size = 0
            return b""
        if status == 416:
            raise BrokenAnswerError(f"has no bytes from {begin} on")
        if status not in (200, 206):
            raise answer.refusal()
        check_origin(answer, self.path, self._sha)
        size = self._checked_size(answer)
        expected = self._answered_range(answer, size, begin, end)
        data = bytearray()
        for chunk in chunks(answer, self._client.retry):
            data += chunk
            if len(data) > expected:
                break
        if len(data) != expected:
            raise BrokenAnswerError(
                f"brought {'more than ' if len(data) > expected else ''}{min(len(data), expected)} bytes of {expected}"
            )
        self.size = size
        return bytes(data)

    def _checked_size(self, answer: HubResponse) -> int:
        size = announced_size(answer)
        linked = answer.headers.get("x-linked-size", "")
        if size is None:
            raise BrokenAnswerError("does not say how large the file is")
        if linked.isascii() and linked.isdigit() and linked != str(size):
            raise BrokenAnswerError(f"announces {size} bytes; the Hub's redirect {linked[:20]}")
        if self.size not in (None, size):
            raise BrokenAnswerError(f"announces {size} bytes; {self.size} are known")
        return size

    def _answered_range(self, answer: HubResponse, size: int, begin: int, end: int) -> int:
        """How many bytes come."""
        if answer.response.status_code == 200:
            # Right by the protocol; of use only where the whole file was asked for.
            if begin == 0 and size <= end:
                return size
            raise BrokenAnswerError("answered with the whole file in place of a range")
        content_range = answer.response.headers.get("content-range", "")
        match = _RANGE.fullmatch(content_range)
        last = min(end, size) - 1
        if match is None or (int(match[1]), int(match[2])) != (begin, last):
            raise BrokenAnswerError(f"answered with {content_range[:60]!r} in place of bytes {begin}-{last}")
        return last - begin + 1
