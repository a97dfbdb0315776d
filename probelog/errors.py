"""The errors that ProbeLog raises, as one tree, and the closed list of reasons why a model is not indexed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from probelog.credentials import redacted


class ProbeLogError(Exception):
    """Base of every error raised on purpose; its message says what to do, and holds no credential.

    ``exit_status`` is what a command ends with: 2 for bad usage or configuration, 3 for a result that exceeds a
    configured limit, 1 for anything else.
    """

    exit_status = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(item) if isinstance(item, str) else item for item in arguments))


def suggestion(names: Sequence[str]) -> str:
    """The end of a message about a name that does not exist: others that are like it; empty where there are none."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


class UsageError(ProbeLogError):
    """The caller asked for something that cannot be done as asked."""

    exit_status = 2


class ConfigError(UsageError):
    """The configuration is wrong. Carries every problem found, not only the first."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = [redacted(problem) for problem in problems]
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class QueryError(UsageError):
    """A search that has no meaning: empty text, an unreadable image, an unknown logit, a bad filter."""


class IndexNotFoundError(UsageError):
    """There is no published index at the address given."""


class StoreError(ProbeLogError):
    """A store that fails: a disk or an object store that cannot be read or written, or content that contradicts itself.

    Where a library's error is the reason, it is the cause (``__cause__``).
    """


class SchemaVersionError(StoreError):
    """A file or an index was written by a newer ProbeLog than this one."""


class ConflictError(StoreError):
    """Somebody else changed the same object first."""


class QualityError(ProbeLogError):
    """A generation was built and is not published: it is worse than the configured limits allow."""

    exit_status = 3


class HeldError(ProbeLogError):
    """Nothing was published, because an operator holds the live generation."""

    exit_status = 3


class FailureReason(StrEnum):
    """Why a model is not indexed. A closed list: scripts and dashboards group by it."""

    MALFORMED_ROW = "malformed-row"
    GATED = "gated"
    DISABLED = "disabled"
    NOT_A_CLASSIFIER = "not-a-classifier"
    NOT_A_GENERATOR = "not-a-generator"
    MISSING_BASE = "missing-base"
    GATED_BASE = "gated-base"
    UNSUPPORTED = "unsupported"
    UNSAFE_FORMAT = "unsafe-format"
    UNSAFE_PATH = "unsafe-path"
    REMOTE_CODE = "remote-code"
    TOO_LARGE = "too-large"
    NOT_FOUND = "not-found"
    DOWNLOAD_FAILED = "download-failed"
    WRONG_DIGEST = "wrong-digest"
    CORRUPT_CONFIG = "corrupt-config"
    CORRUPT_WEIGHTS = "corrupt-weights"
    CONFIG_MISMATCH = "config-mismatch"
    NON_FINITE = "non-finite"
    CONSTANT = "constant"
    OUT_OF_MEMORY = "out-of-memory"
    TIMEOUT = "timeout"
    CRASHED_WORKER = "crashed-worker"
    STORE_FAILED = "store-failed"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether the same files may do better another time (a plain rerun tries again)."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {
        FailureReason.DOWNLOAD_FAILED,
        FailureReason.WRONG_DIGEST,
        FailureReason.OUT_OF_MEMORY,
        FailureReason.TIMEOUT,
        FailureReason.STORE_FAILED,
        FailureReason.INTERNAL,
    }
)


class ItemFailure(ProbeLogError):  # noqa: N818 - not an error of ours: a verdict on an uploaded model
    """One model cannot be indexed, for a reason from the closed list.

    Raised by the code that reads or runs a model, turned into a failure row by the stage that called it.
    """

    def __init__(self, reason: FailureReason, detail: str) -> None:
        self.reason = reason
        self.detail = redacted(detail)
        super().__init__(f"{reason.value}: {self.detail}")

    def __reduce__(self) -> tuple[type[ItemFailure], tuple[FailureReason, str]]:
        return type(self), (self.reason, self.detail)
