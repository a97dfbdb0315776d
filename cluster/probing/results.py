"""What an actor that runs models answers to the driver: small records; rows and pixels never travel this way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from probelog.hub.usage import HubUsage


@dataclass(frozen=True)
class ItemReport:
    """One item that is through; its result lies in the spool.

    Attributes:
        reason: why it failed, from the closed list; None where it is indexed.
        detail: more about a failure.
        seconds: time spent, by part (`probelog.storage.ledger.Contents.phases`, ``write``, ``wait``).
        bytes: downloaded.
        rows: of its result, a logit's or a sample's each; 0 for a failure.
        parameters: of the model; 0 for a failure.
        identity: what its logits follow from (`probelog.storage.schemas.ProbedModel`); None for a failure.
        copy_of: the repository whose observations it shares, where it is a copy.
        copies_checked: whether the coordinator could say if another repository has the same weights.
        worker: host name and process number.
        hub: what the worker asked of the Hub since its last report.
        spooled: whether the item's result lies in the spool; if not, the store refused it for longer than the worker
            was patient, and ``reason`` says so.
    """

    reason: str | None = None
    detail: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    rows: int = 0
    parameters: int = 0
    identity: str | None = None
    copy_of: str | None = None
    copies_checked: bool = True
    worker: str = ""
    hub: HubUsage = field(default_factory=HubUsage)
    spooled: bool = True


@dataclass(frozen=True)
class Requeued:
    """The worker's machine is going away and the item was not begun or not finished: somebody else is to do it.

    Costs the item neither an attempt nor a blame.
    """
