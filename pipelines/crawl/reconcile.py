"""Which indexed repositories must disappear from answers, because the Hub no longer has them as they were.

Deletions, renames and withdrawn access leave no trace in a listing sorted by time, so that from time to time the
whole listing is read and compared with the index. Nothing is believed to be gone because a listing leaves it out:
every such repository is asked for by itself, and one whose answer makes no sense stays where it is.

**What is gated** stays for as long as this run's token opens it (it was indexed by that right), and goes when the
token does not, or when there is none: then probing it would be refused too. Likewise a private one that the token
opens stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import quote

from pipelines.crawl.stage import listing_filters
from pipelines.job.job import Job
from probelog.errors import FailureReason, ItemFailure, ProbeLogError
from probelog.hub.client import (
    PATIENT,
    HubClient,
    HubError,
    HubRefusalError,
    HubResponse,
    HubUnavailableError,
    Retry,
)
from probelog.hub.download import CONFIG
from probelog.hub.listing import EXPAND, ListingFilters, item_failure, iter_pages
from probelog.hub.model_info import read_row
from probelog.hub.rate_limit import Limiter
from probelog.storage.schemas import CatalogueRow

#: Fewer than this may always disappear, whatever their share: a small index is not kept from shrinking.
FEWEST_ALARMING = 10
_REQUESTS_AT_ONCE = 8
_BATCH = 64


class GoneReason(StrEnum):
    """Why an indexed repository has to disappear."""

    REMOVED = "removed"  # or made private: the Hub does not tell which
    RENAMED = "renamed"
    GATED = "gated"
    DISABLED = "disabled"
    FILTERED = "filtered"


class TooManyGoneError(ProbeLogError):
    """More of the index would disappear than the operator allows. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Why one repository has to disappear; ``detail`` may quote the Hub."""

    reason: GoneReason
    detail: str


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The index compared with the Hub.

    Attributes:
        gone: indexed repositories that have to disappear.
        renamed: of those, the new names by the old ones. The new name is in ``missed`` where the filters accept it.
        changed: indexed repositories with another commit than the indexed one, at that commit.
        missed: repositories that the filters accept and that are neither indexed nor known. (A rename, or a
            repository made public, does not show in `pipelines.crawl.changes`: its ``lastModified`` stays.)
        unconfirmed: indexed repositories that the listing leaves out, and what the Hub said when it was asked for
            them. They stay.
    """

    gone: dict[str, Gone] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    changed: list[CatalogueRow] = field(default_factory=list)
    missed: list[CatalogueRow] = field(default_factory=list)
    unconfirmed: dict[str, str] = field(default_factory=dict)


def reconcile(
    job: Job,
    endpoint: str,
    indexed: Iterable[tuple[str, str]],
    known: Container[tuple[str, str]] = frozenset(),
    *,
    limiter: Limiter | None = None,
    retry: Retry = PATIENT,
) -> Reconciliation:
    """Compare an index with what the Hub lists under the job's filters.

    One full listing (names are kept, rows only of what changed), then one request or two for every indexed
    repository that it leaves out, or lists as gated or disabled; of an explicit list, for every indexed one. With
    ``filters.limit`` only the newest are listed, and the older ones are asked for one by one.

    Args:
        job: whose filters and ``nightly.max_removed_share``; progress goes to its report.
        endpoint: the Hub's address.
        indexed: repositories and their commits, as the index holds them.
        known: further pairs that need no work: what cannot be indexed.
        limiter: shared with whoever else asks the same Hub.
        retry: how patient to be.

    Raises:
        TooManyGoneError: more would disappear than ``nightly.max_removed_share`` allows.
        HubError: the listing broke off.
    """
    filters = listing_filters(job.config.filters)
    held = dict(indexed)
    with HubClient(endpoint, limiter=limiter, retry=retry) as client:
        work = _Comparison(job, client, filters, held, known)
        doubtful = set(held) if filters.repos else work.read_listing()
        work.confirm(sorted(doubtful))
    found = work.found
    counts = Counter(gone.reason.value for gone in found.gone.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    job.report.say(
        f"reconcile: {len(found.gone):,} of {len(held):,} indexed repositories are gone"
        + (f" ({reasons})" if reasons else "")
        + f", {len(found.changed):,} changed, {len(found.missed):,} were missed"
        + (f", {len(found.unconfirmed):,} could not be confirmed and stay" if found.unconfirmed else "")
    )
    return found


class _Comparison:
    def __init__(
        self,
        job: Job,
        client: HubClient,
        filters: ListingFilters,
        held: dict[str, str],
        known: Container[tuple[str, str]],
    ) -> None:
        self.job, self.client, self.filters = job, client, filters
        self.held, self.known = held, known
        self.found = Reconciliation()

    def read_listing(self) -> set[str]:
        """Go through the listing; gives the indexed repositories that must be asked for by themselves."""
        doubtful, seen = set(self.held), set[str]()
        counter = self.job.report.counter("reconcile: listing", None, "repositories")
        for page in iter_pages(
            self.filters,
            endpoint=self.client.endpoint,
            limiter=self.client.limiter,
            retry=self.client.retry,
        ):
            counter.add(len(page.rows))
            for row in page.rows:
                if row.repo in seen:  # it changed meanwhile; the first is the newer
                    continue
                seen.add(row.repo)
                if row.repo not in self.held:
                    if (row.repo, row.sha) not in self.known:
                        self.found.missed.append(row)
                elif not row.gated and not row.disabled:
                    doubtful.discard(row.repo)
                    self._is_present(row)
        return doubtful

    def confirm(self, repos: Sequence[str]) -> None:
        """Ask for repositories one by one, some at a time."""
        share = self.job.config.nightly.max_removed_share
        allowed = max(FEWEST_ALARMING - 1, int(share * len(self.held)))
        counter = self.job.report.counter("reconcile: asking for", len(repos), "repositories")
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE, "reconcile") as pool:
            for begin, batch in _batches(repos):
                silent = 0
                for repo, answer in zip(batch, pool.map(self._ask, batch), strict=True):
                    counter.add()
                    silent += isinstance(answer, HubUnavailableError)
                    self._take(repo, answer)
                if len(self.found.gone) > allowed:
                    raise self._too_many(share, len(repos) - begin - len(batch))
                if silent == len(batch):
                    # Each of them has cost all retries: the Hub is down.
                    for repo in repos[begin + len(batch) :]:
                        self.found.unconfirmed[repo] = "not asked for: the Hub had stopped answering"
                    return

    def _take(self, repo: str, answer: CatalogueRow | Gone | HubError | ItemFailure | _Renamed) -> None:
        match answer:
            case CatalogueRow():
                self._is_present(answer)
            case Gone():
                self.found.gone[repo] = answer
            case _Renamed(new):
                self.found.gone[repo] = Gone(GoneReason.RENAMED, f"is now {new}")
                self.found.renamed[repo] = new
            case _:
                self.found.unconfirmed[repo] = str(answer)

    def _is_present(self, row: CatalogueRow) -> None:
        if row.sha != self.held[row.repo]:
            self.found.changed.append(row)

    def _ask(self, repo: str) -> CatalogueRow | Gone | HubError | ItemFailure | _Renamed:
        """One repository's own page: its row if it stays, else why it goes, or why nobody knows."""
        if self.filters.repos and repo not in self.filters.repos:
            return Gone(GoneReason.FILTERED, "it is no longer in the list of repositories")
        try:
            page = self.client.json(f"/api/models/{quote(repo)}", {"expand": list(EXPAND)}).value
            name = page.get("id") if isinstance(page, dict) else None
            # Of an explicit list the name that the operator wrote counts, whatever the Hub calls it now.
            row = read_row({**page, "id": repo} if self.filters.repos and name else page)
            if row.repo != repo:
                return _Renamed(row.repo)
            if row.disabled:
                return Gone(GoneReason.DISABLED, "the Hub has disabled the repository")
            if not self.filters.accepts(row):
                return Gone(GoneReason.FILTERED, _facts(row))
            if row.gated and not self.client.has_token:
                return Gone(
                    GoneReason.GATED,
                    "gated: access must be requested; set HF_TOKEN to that of a user who has it",
                )
            if row.gated:
                self._open(row)
            return row
        except HubRefusalError as error:
            return _verdict(error)
        except (HubError, ItemFailure) as error:
            return error

    def _open(self, row: CatalogueRow) -> None:
        """Ask for a file that every model has, to see whether the token opens the repository."""
        url = f"{self.client.endpoint}/{quote(row.repo)}/resolve/{row.sha}/{CONFIG}"

        def read(answer: HubResponse) -> None:
            # One that lacks the file says so only to those who are let in.
            if answer.response.status_code != 200 and answer.headers.get("x-error-code") != "EntryNotFound":
                raise answer.refusal()

        self.client.call("file", url, read)

    def _too_many(self, share: float, unasked: int) -> TooManyGoneError:
        gone = self.found.gone
        counts = Counter(item.reason.value for item in gone.values()).most_common()
        return TooManyGoneError(
            f"{len(gone):,}{' or more' if unasked else ''} of {len(self.held):,} indexed repositories would disappear "
            f"({', '.join(f'{reason} {count}' for reason, count in counts)}; for example "
            f"{', '.join(list(gone)[:3])}): more than nightly.max_removed_share = {share:g} allows. Nothing was "
            f"changed. Check that {self.client.endpoint} is your Hub, that HF_TOKEN is the one the index was made "
            "with, and the filters. If they are truly gone, allow it for one night: "
            "--set nightly.max_removed_share=1"
        )


@dataclass(frozen=True, slots=True)
class _Renamed:
    new: str


def _verdict(error: HubRefusalError) -> Gone | HubError:
    failure = item_failure(error)
    match failure.reason:
        case FailureReason.NOT_FOUND:
            return Gone(GoneReason.REMOVED, f"removed or made private: {failure.detail}")
        case FailureReason.GATED:
            return Gone(GoneReason.GATED, failure.detail)
        case FailureReason.DISABLED:
            return Gone(GoneReason.DISABLED, failure.detail)
        case _:
            return error


def _facts(row: CatalogueRow) -> str:
    size = f"{row.parameters:,} parameters" if row.parameters is not None else "no known size"
    return (
        f"the filters no longer accept it: library {row.library or 'none'}, task {row.pipeline_tag or 'none'}, "
        f"licence {row.licence or 'none'}, {size}"
    )


def _batches(repos: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    for begin in range(0, len(repos), _BATCH):
        yield begin, repos[begin : begin + _BATCH]
