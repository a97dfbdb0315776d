"""Finds the indexed repositories that must be removed from the index, because the Hub no longer has them as indexed.

Deletions, renames and withdrawn access leave no trace in a listing sorted by time, so that from time to time the
whole listing is read and compared with the index. A repository is not removed because a listing leaves it out: each
one is requested by itself, and stays in the index if the answer is unclear.

**A gated repository** stays as long as this run's token opens it, and is removed when the token does not, or without a
token: probing it would be refused too. A private repository that the token opens stays as well.
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

# Fewer removals than this are always allowed, whatever their share: a small index may shrink.
FEWEST_ALARMING = 10
_REQUESTS_AT_ONCE = 8
_BATCH = 64


class RemovalReason(StrEnum):
    """Why an indexed repository must be removed."""

    REMOVED = "removed"  # or made private: the Hub does not tell which
    RENAMED = "renamed"
    GATED = "gated"
    DISABLED = "disabled"
    FILTERED = "filtered"


class TooManyRemovedError(ProbeLogError):
    """More of the index would be removed than ``nightly.max_removed_share`` allows. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Removal:
    """Why one repository must be removed; ``detail`` may quote the Hub: untrusted text."""

    reason: RemovalReason
    detail: str


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The index compared with the Hub.

    Attributes:
        removed: indexed repositories that must be removed.
        renamed: of those, the new names by the old ones. The new name is in ``missed`` where the filters accept it.
        changed: indexed repositories with another commit than the indexed one, at that commit.
        missed: repositories that the filters accept and that are neither indexed nor known. (A rename, or a
            repository made public, does not show in `pipelines.crawl.changes`: its ``lastModified`` is unchanged.)
        unconfirmed: indexed repositories that the listing leaves out without a clear answer of the Hub, and its
            answer. They stay in the index.
    """

    removed: dict[str, Removal] = field(default_factory=dict)
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

    One full listing (all names are kept in memory, rows only of changed repositories), then one or two requests for
    every indexed repository that it leaves out, or lists as gated or disabled; with an explicit list, for every indexed
    one. With ``filters.limit`` only the newest are listed, and the older ones are requested one by one.

    Args:
        job: whose filters and ``nightly.max_removed_share``; progress goes to its report.
        endpoint: the Hub's address.
        indexed: repositories and their commits, as the index holds them.
        known: further pairs that need no work: those that cannot be indexed.
        limiter: shared with other users of the same Hub in this process.
        retry: number of attempts and waits between them.

    Raises:
        TooManyRemovedError: more would be removed than ``nightly.max_removed_share`` allows.
        HubError: the listing was interrupted.
    """
    filters = listing_filters(job.config.filters)
    indexed_shas = dict(indexed)
    with HubClient(endpoint, limiter=limiter, retry=retry) as client:
        work = _Comparison(job, client, filters, indexed_shas, known)
        doubtful = set(indexed_shas) if filters.repos else work.read_listing()
        work.confirm(sorted(doubtful))
    result = work.result
    counts = Counter(removal.reason.value for removal in result.removed.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    job.report.say(
        f"reconcile: {len(result.removed):,} of {len(indexed_shas):,} indexed repositories were removed"
        + (f" ({reasons})" if reasons else "")
        + f", {len(result.changed):,} changed, {len(result.missed):,} were missed"
        + (
            f", {len(result.unconfirmed):,} could not be confirmed and stay in the index"
            if result.unconfirmed
            else ""
        )
    )
    return result


class _Comparison:
    def __init__(
        self,
        job: Job,
        client: HubClient,
        filters: ListingFilters,
        indexed_shas: dict[str, str],
        known: Container[tuple[str, str]],
    ) -> None:
        self.job, self.client, self.filters = job, client, filters
        self.indexed_shas, self.known = indexed_shas, known
        self.result = Reconciliation()

    def read_listing(self) -> set[str]:
        """Read the listing; returns the indexed repositories that must be requested one by one."""
        unconfirmed, listed = set(self.indexed_shas), set[str]()
        counter = self.job.report.counter("reconcile: listing", None, "repositories")
        for page in iter_pages(
            self.filters,
            endpoint=self.client.endpoint,
            limiter=self.client.limiter,
            retry=self.client.retry,
            known=lambda repo, sha: (
                self.indexed_shas[repo] == sha if repo in self.indexed_shas else (repo, sha) in self.known
            ),
        ):
            counter.add(len(page.rows))
            for row in page.rows:
                if row.repo in listed:  # it changed during the listing; the first row is the newer
                    continue
                listed.add(row.repo)
                if row.repo not in self.indexed_shas:
                    if not page.known and (row.repo, row.sha) not in self.known:
                        self.result.missed.append(row)
                elif not row.gated and not row.disabled:
                    unconfirmed.discard(row.repo)
                    self._record_present(row)
        return unconfirmed

    def confirm(self, repos: Sequence[str]) -> None:
        """Request each repository's own page, several at the same time.

        Raises:
            TooManyRemovedError: more would be removed than ``nightly.max_removed_share`` allows.
        """
        share = self.job.config.nightly.max_removed_share
        allowed = max(FEWEST_ALARMING - 1, int(share * len(self.indexed_shas)))
        counter = self.job.report.counter("reconcile: asking for", len(repos), "repositories")
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE, "reconcile") as pool:
            for begin, batch in _batches(repos):
                unanswered = 0
                for repo, answer in zip(batch, pool.map(self._ask, batch), strict=True):
                    counter.add()
                    unanswered += isinstance(answer, HubUnavailableError)
                    self._record_answer(repo, answer)
                if len(self.result.removed) > allowed:
                    raise self._too_many_removed(share, len(repos) - begin - len(batch))
                if unanswered == len(batch):
                    # Each of them has cost all retries: the Hub is down.
                    for repo in repos[begin + len(batch) :]:
                        self.result.unconfirmed[repo] = "not requested: the Hub had stopped answering"
                    return

    def _record_answer(
        self, repo: str, answer: CatalogueRow | Removal | HubError | ItemFailure | _Renamed
    ) -> None:
        match answer:
            case CatalogueRow():
                self._record_present(answer)
            case Removal():
                self.result.removed[repo] = answer
            case _Renamed(new):
                self.result.removed[repo] = Removal(RemovalReason.RENAMED, f"is now {new}")
                self.result.renamed[repo] = new
            case _:
                self.result.unconfirmed[repo] = str(answer)

    def _record_present(self, row: CatalogueRow) -> None:
        if row.sha != self.indexed_shas[row.repo]:
            self.result.changed.append(row)

    def _ask(self, repo: str) -> CatalogueRow | Removal | HubError | ItemFailure | _Renamed:
        """One repository's own page: its row if it stays, why it must be removed, or the error if that is unclear."""
        if self.filters.repos and repo not in self.filters.repos:
            return Removal(RemovalReason.FILTERED, "it is no longer in the list of repositories")
        try:
            page = self.client.json(f"/api/models/{quote(repo)}", {"expand": list(EXPAND)}).value
            name = page.get("id") if isinstance(page, dict) else None
            # With an explicit list the name in the list counts, whatever the Hub calls the repository now.
            row = read_row({**page, "id": repo} if self.filters.repos and name else page)
            if row.repo != repo:
                return _Renamed(row.repo)
            if row.disabled:
                return Removal(RemovalReason.DISABLED, "the Hub has disabled the repository")
            if not self.filters.accepts(row):
                return Removal(RemovalReason.FILTERED, _facts(row))
            if row.gated and not self.client.has_token:
                return Removal(
                    RemovalReason.GATED,
                    "gated: access must be requested; set HF_TOKEN to that of a user who has it",
                )
            if row.gated:
                self._check_access(row)
            return row
        except HubRefusalError as error:
            return _outcome_of_refusal(error)
        except (HubError, ItemFailure) as error:
            return error

    def _check_access(self, row: CatalogueRow) -> None:
        """Request a file that every model has, to see whether the token opens the repository.

        Raises:
            HubRefusalError: it does not.
        """
        url = f"{self.client.endpoint}/{quote(row.repo)}/resolve/{row.sha}/{CONFIG}"

        def read(answer: HubResponse) -> None:
            # The Hub says that a file is missing only to those who have access.
            if answer.response.status_code != 200 and answer.headers.get("x-error-code") != "EntryNotFound":
                raise answer.refusal()

        self.client.call("file", url, read)

    def _too_many_removed(self, share: float, unasked: int) -> TooManyRemovedError:
        removed = self.result.removed
        counts = Counter(item.reason.value for item in removed.values()).most_common()
        return TooManyRemovedError(
            f"{len(removed):,}{' or more' if unasked else ''} of {len(self.indexed_shas):,} indexed repositories would disappear "
            f"({', '.join(f'{reason} {count}' for reason, count in counts)}; for example "
            f"{', '.join(list(removed)[:3])}): more than nightly.max_removed_share = {share:g} allows. Nothing was "
            f"changed. Check that {self.client.endpoint} is your Hub, that HF_TOKEN is the one the index was made "
            "with, and the filters. If they were really removed, allow it for one nightly run: "
            "--set nightly.max_removed_share=1"
        )


@dataclass(frozen=True, slots=True)
class _Renamed:
    new: str


def _outcome_of_refusal(error: HubRefusalError) -> Removal | HubError:
    failure = item_failure(error)
    match failure.reason:
        case FailureReason.NOT_FOUND:
            return Removal(RemovalReason.REMOVED, f"removed or made private: {failure.detail}")
        case FailureReason.GATED:
            return Removal(RemovalReason.GATED, failure.detail)
        case FailureReason.DISABLED:
            return Removal(RemovalReason.DISABLED, failure.detail)
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
