"""The Hub's listing of models as typed rows, page by page, so that a crawl can be interrupted and resumed.

Filters are sent to the server as `huggingface_hub.HfApi.list_models` sends them (version 2.4), and checked again
here: mirrors and older servers ignore some. A malformed row becomes a failure and the crawl continues.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import quote

from probelog.errors import FailureReason, ItemFailure, UsageError
from probelog.hub.client import (
    PATIENT,
    SHA_PATTERN,
    HubClient,
    HubError,
    HubRefusalError,
    HubUnavailableError,
    Retry,
)
from probelog.hub.huggingface import is_repo_id
from probelog.hub.model_info import excerpt, read_brief_row, read_files, read_row
from probelog.hub.rate_limit import Limiter
from probelog.storage.encoding import digest
from probelog.storage.schemas import CatalogueRow, Failure, RepoFile

log = logging.getLogger(__name__)

STAGE = "crawl"
# The Hub gives these names of a listing's rows; sizes and digests of files it gives for one model at a time only.
EXPAND = (
    "cardData", "config", "createdAt", "disabled", "downloads", "gated", "lastModified", "library_name", "likes", "pipeline_tag", "safetensors", "sha", "siblings", "tags",
)  # fmt: skip
_LISTED_PER_PAGE = 20
_NO_HUB = "{} does not answer as a Hub does. Set HF_ENDPOINT to a Hub's address."
_MOST_TREE_PAGES = 20
# A million models are 5,000 pages; a server that sends a tenth of what is asked for still gets through.
_MOST_PAGES = 100_000
_MOST_PER_PAGE = 100_000
# Pages in a row without a repository that the last ones did not have. A server that filters its pages may send many.
_MOST_IDLE_PAGES = 200
_REMEMBERED = 20_000
_LONGEST_ID = 200
# Entries of an explicit list in a row without any proper answer, after which the Hub counts as unavailable.
_SILENT = 3


@dataclass(frozen=True, slots=True)
class ListingFilters:
    """Which models to list. A fact that the Hub does not give about a model (such as its size) does not exclude it.

    Args:
        libraries: library names, any of which matches; empty: all.
        pipeline_tag: the task; None: all.
        author: user or organisation.
        licences: licence names as the Hub writes them, any of which will do; empty: all. A model that names none is
            excluded.
        since: only models modified then or later (with a time zone); the listing is newest first and stops there.
        max_bytes: bytes of weights, where the listing gives them or they can be estimated from it.
        max_params: parameters in safetensors files.
        repos: exactly these repositories. Library, task, author and since then do not apply.
        limit: this many rows at most; 0: the Hub is not asked.

    Raises:
        UsageError: a limit below 0, a time without zone, or an id that no repository can have.
    """

    libraries: tuple[str, ...] = ("transformers", "timm")
    pipeline_tag: str | None = "image-classification"
    author: str | None = None
    licences: tuple[str, ...] = ()
    since: dt.datetime | None = None
    max_bytes: int | None = None
    max_params: int | None = None
    repos: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_bytes", self.max_bytes, 1),
            ("max_params", self.max_params, 1),
            ("limit", self.limit, 0),
        ):
            if value is not None and value < least:
                raise UsageError(
                    f"the filter {name} must be {least} or more, not {value}; leave it out for no limit"
                )
        if self.since is not None and self.since.tzinfo is None:
            raise UsageError(f"the filter since must have a time zone, as in {self.since.isoformat()}Z")
        if wrong := [repo for repo in self.repos if not is_repo_id(repo)]:
            raise UsageError(f"not repository ids (owner/name): {', '.join(map(repr, wrong[:10]))}")

    def accepts(self, row: CatalogueRow) -> bool:
        """Whether a row passes the filters."""
        if self.licences and not {row.licence, *row.licences}.intersection(self.licences):
            return False
        if self.max_params is not None and row.parameters is not None and row.parameters > self.max_params:
            return False
        if self.max_bytes is not None and row.weight_bytes is not None and row.weight_bytes > self.max_bytes:
            return False
        if self.repos:
            return row.repo in self.repos
        return (
            (not self.libraries or row.library in self.libraries)
            and self.pipeline_tag in (None, row.pipeline_tag)
            and (self.author is None or row.repo.startswith(f"{self.author}/"))
            and (self.since is None or row.last_modified is None or row.last_modified >= self.since)
        )


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing.

    Attributes:
        rows: that passed the filters.
        failures: malformed rows.
        next_url: address of the next page; None on the last one.
        date: when the page was sent, by the Hub's clock; None where the Hub does not say, and for explicit lists.
        known: whether every row is known (`iter_pages`), and brief.
    """

    rows: list[CatalogueRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    next_url: str | None = None
    date: dt.datetime | None = None
    known: bool = False


def iter_pages(
    filters: ListingFilters,
    start_url: str | None = None,
    *,
    already: int = 0,
    endpoint: str | None = None,
    limiter: Limiter | None = None,
    retry: Retry = PATIENT,
    page_size: int = 200,
    known: Callable[[str, str], bool] | None = None,
) -> Iterator[Page]:
    """Crawl the catalogue, newest models first.

    Save each page before requesting the next; after an interruption, ``start_url`` = the last saved ``next_url``
    resumes the crawl (the Hub's cursor is the last row's sort key and id, so rows that changed meanwhile have moved to
    the front, where the next crawl finds them). The same (repo, sha) may be listed twice.

    Args:
        filters: which models.
        start_url: a ``next_url`` of an earlier run with the same filters; None: from the beginning.
        already: number of rows that the earlier run has, counted against ``filters.limit``.
        endpoint: the Hub's address, as for `probelog.hub.client.HubClient`.
        limiter: shared with other users of the same Hub in this process.
        retry: number of attempts and waits between them.
        page_size: models per page. Smaller than the Hub allows: long pages deep in a listing time out.
        known: whether a repository is known at a commit. Then the Hub is asked only for what the filters look at, and
            rows are brief (`read_brief_row`): a third of the bytes. A page with a row that they accept and that is not known is
            asked for once more, with everything.

    Raises:
        HubError: the Hub refuses (a wrong token), does not answer after all retries, is no Hub, or its pages form a
            circle or have no end. Pages already yielded stay valid.
    """
    if filters.limit == 0:
        return
    with HubClient(endpoint, limiter=limiter, retry=retry) as client:
        pages = (
            _listed_pages(client, filters, start_url)
            if filters.repos
            else _pages(client, filters, start_url, page_size, known)
        )
        count = already
        for page in pages:
            if filters.limit is not None and count + len(page.rows) >= filters.limit:
                rows = page.rows[: max(0, filters.limit - count)]
                yield Page(rows, page.failures, None, page.date, page.known)
                return
            count += len(page.rows)
            yield page


def fetch_files(
    repo: str,
    sha: str,
    *,
    endpoint: str | None = None,
    limiter: Limiter | None = None,
    retry: Retry = PATIENT,
) -> list[RepoFile]:
    """The files at the root of a repository with size and, where the Hub knows it, SHA-256. One API request.

    Raises:
        ItemFailure: the commit does not exist or is not public, or the Hub does not answer.
    """
    with HubClient(endpoint, limiter=limiter, retry=retry) as client:
        return tree(client, repo, sha)


def tree(client: HubClient, repo: str, sha: str) -> list[RepoFile]:
    """`fetch_files` with an open client."""
    if not is_repo_id(repo) or not SHA_PATTERN.fullmatch(sha):
        raise ItemFailure(FailureReason.MALFORMED_ROW, f"{repo!r} at {sha!r} is no repository and commit")
    files: list[RepoFile] = []
    url: str | None = f"/api/models/{quote(repo)}/tree/{sha}?recursive=false&expand=false"
    for _ in range(_MOST_TREE_PAGES):
        if url is None:
            break
        try:
            answer = client.json(url)
        except HubError as error:
            raise item_failure(error) from error
        files += read_files(answer.value)
        url = answer.next_url
    return files


def look_up(client: HubClient, repo: str) -> CatalogueRow:
    """The row of one repository at its newest commit. One API request.

    Raises:
        ItemFailure: it does not exist or is not public, its name or page is none, or the Hub does not answer.
    """
    if not is_repo_id(repo):
        raise ItemFailure(FailureReason.MALFORMED_ROW, f"{repo!r:.200} cannot be a repository's id")
    try:
        return read_row(_info(client, repo))
    except HubError as error:
        raise item_failure(error) from error


def item_failure(error: HubError) -> ItemFailure:
    """The failure of a model for which the Hub refused a request or did not answer."""
    if not isinstance(error, HubRefusalError):
        return ItemFailure(FailureReason.DOWNLOAD_FAILED, str(error))
    if error.code == "GatedRepo":
        reason = FailureReason.GATED
    elif error.message == "Access to this resource is disabled." or error.status == 451:
        reason = FailureReason.DISABLED
    elif error.status in (401, 404, 410) and not error.bad_token:
        # The Hub answers 401 for private and for missing repositories alike, so as not to reveal which.
        reason = FailureReason.NOT_FOUND
    else:
        # Also a wrong token: as a permanent failure, one run with it would exclude the whole catalogue for good.
        reason = FailureReason.DOWNLOAD_FAILED
    return ItemFailure(reason, str(error))


def _pages(
    client: HubClient,
    filters: ListingFilters,
    start_url: str | None,
    page_size: int,
    known: Callable[[str, str], bool] | None,
) -> Iterator[Page]:
    fields = EXPAND if known is None else looked_at(filters)
    read = read_row if known is None else partial(read_brief_row, fields=fields)
    query = _query(filters, page_size, fields)
    url = client.reroot(start_url) if start_url else client.url("/api/models", query)
    visited = {digest(url.encode())}
    endless = _Endless(client.endpoint)
    newest_first = True
    last: list[dt.datetime] = []
    while True:
        try:
            answer = client.json(url)
        except HubRefusalError as error:
            if error.status == 400 and start_url:
                raise HubError(
                    f"{error} The Hub no longer knows the page where the crawl stopped: start from the first page."
                ) from error
            if error.status == 404:
                raise HubError(_NO_HUB.format(client.endpoint)) from error
            raise
        items = _items(client, answer.value)
        endless.add(items)
        page, modified = _read_page(client, items, filters, read)
        all_known = known is not None and all(known(row.repo, row.sha) for row in page.rows)
        if known is not None and not all_known:
            whole = client.json(client.url(url, {"expand": list(EXPAND)}))
            page, _ = _read_page(client, _items(client, whole.value), filters)
        # If the server ignored the order on any page so far, the times do not decide when to stop.
        newest_first &= all(before >= after for before, after in pairwise([*last, *modified]))
        last = modified[-1:] or last
        below_since = (
            filters.since is not None and newest_first and bool(modified) and modified[-1] < filters.since
        )
        following = None if below_since else answer.next_url
        key = digest((following or "").encode())
        if key in visited:
            raise HubError(f"{client.endpoint} lists in a circle: page {following} was listed before")
        yield Page(page.rows, page.failures, following, answer.date, all_known)
        if following is None:
            return
        url = following
        visited.add(key)


def _items(client: HubClient, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise HubError(_NO_HUB.format(client.endpoint))
    return value


class _Endless:
    """Notices a listing that does not come to an end: new addresses of pages for ever, with nothing new on them."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.pages = self.idle = 0
        # Of a dict the first entry takes the longer to find, the more were deleted before it.
        self.recent: OrderedDict[str, None] = OrderedDict()

    def add(self, items: list[Any]) -> None:
        """One more page.

        Raises:
            HubError: one too many.
        """
        if len(items) > _MOST_PER_PAGE:
            raise HubError(
                f"{self.endpoint} lists {len(items)} models on a page; {_MOST_PER_PAGE} are accepted"
            )
        names = [item.get("id") for item in items if isinstance(item, dict)]
        # Looked up one by one: a difference of sets would go through all that are remembered.
        fresh = {
            name
            for name in names
            if isinstance(name, str) and len(name) <= _LONGEST_ID and name not in self.recent
        }
        self.recent.update(dict.fromkeys(fresh))
        while len(self.recent) > _REMEMBERED:
            self.recent.popitem(last=False)
        self.pages += 1
        self.idle = 0 if fresh else self.idle + 1
        if self.idle > _MOST_IDLE_PAGES or self.pages > _MOST_PAGES:
            raise HubError(
                f"{self.endpoint} lists without end: {self.pages} pages, the last {self.idle} without a new model. "
                "Check that HF_ENDPOINT is your Hub, or set filters.limit."
            )


def _read_page(
    client: HubClient,
    items: list[Any],
    filters: ListingFilters,
    read: Callable[[object], CatalogueRow] = read_row,
) -> tuple[Page, list[dt.datetime]]:
    page, modified = Page(), []
    for item in items:
        try:
            row = read(_with_commit(client, item))
        except ItemFailure as failure:
            page.failures.append(Failure.of(_shown_id(item), "", STAGE, failure.reason, failure.detail))
            continue
        if row.last_modified is not None:
            modified.append(row.last_modified)
        if filters.accepts(row):
            page.rows.append(row)
    return page, modified


def _with_commit(client: HubClient, item: object) -> object:
    """A row of a listing, completed from the model's own page where the server leaves out the commit."""
    if not isinstance(item, dict) or item.get("sha") is not None:
        return item
    repo = item.get("id")
    return {**item, **_info(client, repo)} if isinstance(repo, str) and is_repo_id(repo) else item


def _listed_pages(client: HubClient, filters: ListingFilters, start_url: str | None) -> Iterator[Page]:
    """Pages of an explicit list: portions of it, with the position in ``next_url``."""
    start = (start_url or "").rpartition("#")[2]
    first = int(start) if start.isascii() and start.isdigit() and len(start) < 9 else 0
    for begin in range(first, len(filters.repos), _LISTED_PER_PAGE):
        end = begin + _LISTED_PER_PAGE
        items: list[Any] = []
        failures = []
        silent = 0
        for repo in filters.repos[begin:end]:
            try:
                items.append(_info(client, repo))
                silent = 0
            except ItemFailure as failure:
                failures.append(Failure.of(repo, "", STAGE, failure.reason, failure.detail))
                silent = 0
            except HubUnavailableError as error:
                # One entry that the Hub cannot answer fails alone; a Hub that answers nothing ends the crawl.
                silent += 1
                if silent == min(_SILENT, end - begin):
                    raise
                reason = FailureReason.DOWNLOAD_FAILED
                failures.append(Failure.of(repo, "", STAGE, reason, str(error)))
        page, _ = _read_page(client, items, filters)
        following = f"{client.endpoint}/api/models#{end}" if end < len(filters.repos) else None
        yield Page(page.rows, failures + page.failures, following)


def _info(client: HubClient, repo: str) -> dict[str, Any]:
    """One model's own page, with sizes and digests of its files.

    Raises:
        ItemFailure: the model does not exist or is not public, or its page leads elsewhere (a renamed model behind a
            mirror that redirects to another host).
        HubRefusalError: a wrong token.
        HubUnavailableError: no proper answer, several times in a row.
    """
    try:
        page = client.json(f"/api/models/{quote(repo)}", {"blobs": "true"}).value
    except HubUnavailableError:
        raise
    except HubError as error:
        if isinstance(error, HubRefusalError) and error.bad_token:
            raise
        raise item_failure(error) from error
    if not isinstance(page, dict):
        raise ItemFailure(FailureReason.MALFORMED_ROW, "the model's page is no object")
    # A renamed model answers under its new name; the row belongs to the name that was asked for. An empty commit
    # is a malformed one: it is not looked up a second time.
    return {**page, "id": repo, "sha": page.get("sha") or ""}


def looked_at(filters: ListingFilters) -> tuple[str, ...]:
    """What the Hub must tell of a model for `ListingFilters.accepts`, and to know whether it is open.

    The library that a model card names is also among the Hub's own tags, and names of files have no sizes in a listing.
    """
    licences = ("cardData",) if filters.licences else ()
    sizes = ("safetensors",) if (filters.max_bytes or filters.max_params) is not None else ()
    return (
        "disabled",
        "gated",
        "lastModified",
        "library_name",
        "pipeline_tag",
        "sha",
        "tags",
        *licences,
        *sizes,
    )


def _query(filters: ListingFilters, page_size: int, fields: Sequence[str]) -> dict[str, Any]:
    query: dict[str, Any] = {"sort": "lastModified", "limit": page_size, "expand": list(fields)}
    if filters.pipeline_tag is not None:
        query["pipeline_tag"] = filters.pipeline_tag
    if filters.author is not None:
        query["author"] = filters.author
    if len(filters.libraries) == 1:
        # Several would mean models that carry all of these tags.
        query["filter"] = filters.libraries[0]
    return query


def _shown_id(item: object) -> str:
    """Name of a malformed row in failures: its id where it has one, else an excerpt of the value in its place."""
    repo = item.get("id") if isinstance(item, dict) else item
    return repo[:200] if isinstance(repo, str) and repo else f"({excerpt(repo)})"
