"""Fetch what it takes to run one model: known file names only, at a pinned commit, bounded and verified.

Files are streamed by this module and not by ``hf_hub_download``. That one trusts the size it is told, restarts
its count of retries whenever a byte arrives, has no limit on what it writes, verifies no digest, and keeps
book-keeping files (with Xet also the payload) in shared folders that removing a model does not free. Here a
transfer resumes with a range request after a cut, ends at the operator's limit whatever the server claims, takes
every request from the limiter that all workers share, and leaves nothing outside the folder it was given.

A model costs one request a file and no API request when its row names its files: sizes and digests come with the
answer itself (the Hub's redirect tells both), and the limit on API requests is the tighter one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import (
    MEBIBYTE,
    SHA_PATTERN,
    BrokenAnswerError,
    HubClient,
    HubError,
    HubResponse,
    Retry,
    chunks,
)
from probelog.hub.huggingface import is_repo_id
from probelog.hub.listing import item_failure, tree
from probelog.hub.model_info import INDEX, PICKLE, SAFETENSORS, weights
from probelog.storage.schemas import CatalogueRow, RepoFile

CONFIG = "config.json"
OPTIONAL = ("preprocessor_config.json", "processor_config.json")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", re.ASCII)
_MOST_SHARDS = 1_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", re.ASCII)
_DIGEST = re.compile(r'(?:W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?')
_STRONG_ETAG = re.compile(r'(?!W/)"?[!#-~]{1,500}"?')
_WEB_PAGE = "answered with a web page in place of the file (a proxy that asks for a log-in?)"


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """In bytes: of a model with everything that is fetched for it, and of one of its JSON files."""

    max_bytes: int = 8 * 1024 * MEBIBYTE
    max_json_bytes: int = 20 * MEBIBYTE


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What was fetched: the files in the folder with their SHA-256, bytes in all, seconds it took."""

    folder: Path
    digests: dict[str, str]
    bytes: int
    seconds: float

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files, in the order of their download."""
        return tuple(self.digests)


def download_model(
    client: HubClient,
    row: CatalogueRow,
    folder: Path,
    *,
    limits: DownloadLimits = DownloadLimits(),
    allow_pickle: bool = False,
    check: Callable[[], None] | None = None,
) -> Downloaded:
    """Fetch a model's configuration and weights into a folder, which is made if need be.

    Safetensors only, in one file or in the shards that the index names; a pickle (``pytorch_model.bin``) only with
    ``allow_pickle`` and only where there is nothing else. After a failure the folder may hold parts: remove it.

    Args:
        client: of the Hub; may be shared by threads.
        row: the model; its ``files`` are asked of the Hub when the row names none.
        folder: where the files go, by their names.
        limits: what is too large.
        allow_pickle: whether weights may be a format that can run code when loaded.
        check: called with every piece that arrives, and while none does; what it raises ends the download.

    Raises:
        ItemFailure: whatever goes wrong. Reasons: malformed-row, gated, disabled, not-found, unsafe-format,
            unsafe-path, corrupt-weights (the index), too-large, wrong-digest, download-failed, store-failed (the
            local disk).
    """

    def fetch(download: Download) -> None:
        # The small files first: most models that cannot be used are known by them.
        *small, last = needed_files(download.listed, allow_pickle)
        download.check_sizes([*small, last])
        for name in small:
            download.fetch_json(name)
        download.fetch_weights(last)

    return download_files(client, row, folder, fetch, limits=limits, check=check)


def download_files(
    client: HubClient,
    row: CatalogueRow,
    folder: Path,
    fetch: Callable[[Download], None],
    *,
    limits: DownloadLimits,
    check: Callable[[], None] | None = None,
) -> Downloaded:
    """Have ``fetch`` choose files of a repository, and fetch them into a folder; otherwise as `download_model`."""
    started = time.monotonic()
    check_access(row, has_token=client.has_token)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download = Download(client, row, folder, limits, check or _carry_on)
        fetch(download)
    except HubError as error:
        raise item_failure(error) from error
    except OSError as error:
        raise ItemFailure(FailureReason.STORE_FAILED, f"cannot write to {folder}: {error}") from error
    return Downloaded(folder, download.digests, download.bytes, time.monotonic() - started)


def check_access(row: CatalogueRow, *, has_token: bool) -> None:
    """Refuse what needs no request to be refused.

    Raises:
        ItemFailure: malformed-row, disabled or gated.
    """
    if not is_repo_id(row.repo) or not SHA_PATTERN.fullmatch(row.sha):
        raise ItemFailure(
            FailureReason.MALFORMED_ROW, f"{row.repo!r} at {row.sha!r} is no repository and commit"
        )
    if row.disabled:
        raise ItemFailure(FailureReason.DISABLED, "the Hub has disabled the repository")
    if row.gated and not has_token:
        raise ItemFailure(
            FailureReason.GATED, "gated: access must be requested; set HF_TOKEN to that of a user who has it"
        )


def needed_files(names: Collection[str], allow_pickle: bool) -> list[str]:
    """Names of the files to fetch, in their order, of those that a repository holds.

    The last one holds the weights, or names the shards that do (`read_shards`).

    Raises:
        ItemFailure: unsafe-format or not-found.
    """
    weights = _weights_name(names, allow_pickle)
    if CONFIG not in names:
        raise ItemFailure(FailureReason.NOT_FOUND, f"no {CONFIG}; {_listing(names)}")
    return [CONFIG, *(name for name in OPTIONAL if name in names), weights]


def foreseen_files(names: Collection[str], allow_pickle: bool) -> list[str]:
    """Names of all files that will be fetched, as far as the names of those that a repository holds tell; raises as
    `needed_files`.
    """
    needed = needed_files(names, allow_pickle)
    shards = weights([RepoFile(name) for name in names]) if needed[-1] == INDEX else []
    return [*needed, *(shard.path for shard in shards)]


def _weights_name(names: Collection[str], allow_pickle: bool) -> str:
    for name in (SAFETENSORS, INDEX):
        if name in names:
            return name
    if allow_pickle and PICKLE in names:
        return PICKLE
    pickles = sorted(path for path in names if path.endswith(_PICKLES))
    if pickles and allow_pickle:
        raise ItemFailure(FailureReason.UNSAFE_FORMAT, f"of pickles only {PICKLE} is read; {_listing(names)}")
    if pickles:
        raise ItemFailure(
            FailureReason.UNSAFE_FORMAT,
            f"weights only as pickle ({pickles[0]}), which can run code when loaded",
        )
    raise ItemFailure(FailureReason.NOT_FOUND, f"no {SAFETENSORS} and no {INDEX}; {_listing(names)}")


def _listing(files: Collection[str]) -> str:
    names = ", ".join(sorted(files)[:8])
    return f"the repository holds {names or 'no files'}{', ...' if len(files) > 8 else ''}"


class Download:
    """The files of one model on their way.

    Attributes:
        folder: where they go.
        listed: what the repository holds, by path.
        digests: SHA-256 of what was fetched, by path.
        bytes: of all of it.
    """

    def __init__(
        self,
        client: HubClient,
        row: CatalogueRow,
        folder: Path,
        limits: DownloadLimits,
        check: Callable[[], None],
    ) -> None:
        self.client, self.row, self.folder, self.limits, self.check = client, row, folder, limits, check
        self.listed = {file.path: file for file in row.files or tree(client, row.repo, row.sha)}
        self.digests: dict[str, str] = {}
        self.bytes = 0

    def fetch_json(self, name: str) -> None:
        """One of the small files."""
        self.fetch(name, self.limits.max_json_bytes)

    def fetch_weights(self, name: str) -> None:
        """A file of weights; where it is an index, the shards beside it that it names."""
        if not name.endswith(".index.json"):
            self.fetch(name, self.limits.max_bytes)
            return
        self.fetch_json(name)
        folder = name.rpartition("/")[0]
        shards = [f"{folder}/{shard}".lstrip("/") for shard in read_shards((self.folder / name).read_bytes())]
        if missing := [shard for shard in shards if shard not in self.listed]:
            raise ItemFailure(FailureReason.NOT_FOUND, f"the index names {missing[0]}, which is not there")
        self.check_sizes(shards)
        for shard in shards:
            self.fetch(shard, self.limits.max_bytes)

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raise ItemFailure, too-large, where the sizes that are listed exceed what is left of the limit."""
        known = self.bytes + sum(self.listed[name].size or 0 for name in names if name in self.listed)
        if known > self.limits.max_bytes:
            raise _too_large(f"{known} bytes are listed", self.limits.max_bytes)

    def fetch(self, name: str, longest: int) -> None:
        """One file, whole and verified, under its name."""
        bound = min(longest, self.limits.max_bytes - self.bytes)
        url = file_url(self.client, self.row.repo, self.row.sha, name)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part(target) as stream:
            transfer = _Transfer(self.listed[name], self.row.sha, stream, bound, self.client.retry)
            self.client.call("file", url, transfer.receive, transfer.headers, self.check)
        self.digests[name] = transfer.digest.hexdigest()
        self.bytes += transfer.received


class _Transfer:
    """One file's bytes over as many answers as it takes."""

    def __init__(
        self,
        file: RepoFile,
        sha: str,
        stream: BinaryIO,
        bound: int,
        retry: Retry,
    ) -> None:
        self.file, self.sha, self.stream, self.bound, self.retry = file, sha, stream, bound, retry
        self.etag = ""
        self.received = 0
        self.digest = hashlib.sha256()
        self.mismatched = False

    def headers(self) -> dict[str, str]:
        """Of the next request: the whole file, or the rest of it."""
        if not self.received:
            return {}
        sent = {"range": f"bytes={self.received}-"}
        if _STRONG_ETAG.fullmatch(self.etag):
            sent["if-range"] = self.etag
        return sent

    def receive(self, answer: HubResponse) -> None:
        """Take what an answer brings; returns when the file is whole and what it should be."""
        response = answer.response
        if response.status_code == 416 or (response.status_code == 206 and not self._continues(answer)):
            self._restart()
            raise BrokenAnswerError("cannot go on where it broke off")
        if response.status_code not in (200, 206):
            raise answer.refusal()
        if response.status_code == 200:
            self._restart()
        check_origin(answer, self.file.path, self.sha)
        size = self._size(answer)
        self.etag = response.headers.get("etag", "")
        for chunk in chunks(answer, self.retry):
            if self.received == 0 and chunk[:100].lstrip().lower().startswith((b"<!doctype", b"<html")):
                raise BrokenAnswerError(_WEB_PAGE)
            self.received += len(chunk)
            if self.received > self.bound:
                raise _too_large(
                    f"{self.file.path} goes on after {self.received - len(chunk)} bytes", self.bound
                )
            self.stream.write(chunk)
            self.digest.update(chunk)
        if size is not None and self.received != size:
            got = self.received
            if got > size:
                self._restart()
            raise BrokenAnswerError(f"brought {got} bytes of {size}")
        self._verify(answer)

    def _continues(self, answer: HubResponse) -> bool:
        """Whether a partial answer begins where the last one ended."""
        content_range = _CONTENT_RANGE.fullmatch(answer.response.headers.get("content-range", ""))
        return content_range is not None and int(content_range[1]) == self.received

    def _restart(self) -> None:
        self.stream.seek(0)
        self.stream.truncate()
        self.received = 0
        self.digest = hashlib.sha256()

    def _size(self, answer: HubResponse) -> int | None:
        """Bytes of the whole file, from the listing or else as announced; refused here if they are too many."""
        announced = announced_size(answer)
        if self.file.size is not None and announced not in (None, self.file.size):
            raise BrokenAnswerError(f"announces {announced} bytes; {self.file.size} are listed")
        size = announced if self.file.size is None else self.file.size
        if size is not None and size > self.bound:
            raise _too_large(f"{self.file.path} has {size} bytes", self.bound)
        return size

    def _verify(self, answer: HubResponse) -> None:
        """Compare with the digest in the listing, else with the Hub's own name for the file.

        That is the SHA-256 of a file in LFS, and of others git's: the SHA-1 of their size and content.
        """
        announced = _announced_digest(answer)
        expected = self.file.sha256 or announced
        if expected is None:
            return
        actual = self.digest.hexdigest() if len(expected) == 64 else self._blob_digest()
        if expected == actual:
            return
        # Once more from the beginning: it may have been the way here and not the file.
        if self.mismatched:
            kind = "SHA-256" if len(expected) == 64 else "git digest"
            raise ItemFailure(
                FailureReason.WRONG_DIGEST, f"{self.file.path} has the {kind} {actual}, not {expected}"
            )
        self.mismatched = True
        self._restart()
        raise BrokenAnswerError(f"brought {self.file.path} with a wrong digest")

    def _blob_digest(self) -> str:
        digest = hashlib.sha1(b"blob %d\0" % self.received, usedforsecurity=False)
        self.stream.seek(0)
        while piece := self.stream.read(MEBIBYTE):
            digest.update(piece)
        return digest.hexdigest()


def read_shards(index: bytes) -> list[str]:
    """The shards that a safetensors index names, sorted.

    Raises:
        ItemFailure: corrupt-weights, where it is no index; unsafe-path, where a name is not that of a plain file.
    """
    try:
        shards = sorted(set(json.loads(index.decode("utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{INDEX} is no index: {error!r}") from error
    for name in shards:
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ItemFailure(FailureReason.UNSAFE_PATH, f"{INDEX} names the shard {name!r:.200}")
    if not 1 <= len(shards) <= _MOST_SHARDS:
        raise ItemFailure(FailureReason.CORRUPT_WEIGHTS, f"{INDEX} names {len(shards)} shards")
    return shards


def _carry_on() -> None:
    """Nothing to check."""


@contextlib.contextmanager
def _part(target: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when it is whole, and is gone when it is not."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "x+b") as stream:
            yield stream
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def file_url(client: HubClient, repo: str, sha: str, path: str) -> str:
    """The address of a file at a commit."""
    return f"{client.endpoint}/{quote(repo)}/resolve/{sha}/{quote(path)}"


def check_origin(answer: HubResponse, path: str, sha: str) -> None:
    """Refuse an answer that is not the file at that commit.

    Raises:
        ItemFailure: wrong-digest: it comes from another commit.
        BrokenAnswerError: it is a web page.
    """
    commit = answer.headers.get("x-repo-commit", sha)
    if commit != sha:
        raise ItemFailure(FailureReason.WRONG_DIGEST, f"{path} came from commit {commit[:40]!r}")
    if answer.response.headers.get("content-type", "").lower().startswith("text/html"):
        raise BrokenAnswerError(_WEB_PAGE)


def announced_size(answer: HubResponse) -> int | None:
    """Bytes of the whole file by the headers, where they say."""
    headers = answer.response.headers
    if content_range := _CONTENT_RANGE.fullmatch(headers.get("content-range", "")):
        return int(content_range[2])
    linked = answer.headers.get("x-linked-size", "")
    said = linked or headers.get("content-length", "")
    return int(said) if re.fullmatch(r"\d{1,18}", said, re.ASCII) else None


def _announced_digest(answer: HubResponse) -> str | None:
    """SHA-256 or git's SHA-1 by the Hub's headers: a linked ETag, or the ETag of an answer that the Hub gave itself.

    A CDN's own ETag means something else.
    """
    headers = answer.response.headers
    etag = answer.headers.get("x-linked-etag") or (
        headers.get("etag", "") if "x-repo-commit" in headers else ""
    )
    match = _DIGEST.fullmatch(etag)
    return match[1] if match else None


def _too_large(what: str, limit: int) -> ItemFailure:
    return ItemFailure(FailureReason.TOO_LARGE, f"{what}; the limit leaves room for {limit}")
