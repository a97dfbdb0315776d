"""What each failure reason means and what to do about it: said here, shown by commands and on a page.

The table of `docs/operators/troubleshooting.md` is `table`; a test holds the page against it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from probelog.errors import FailureReason


@dataclass(frozen=True)
class Remedy:
    """One reason, in Markdown; addresses of links are relative to the page.

    Attributes:
        means: what is the matter.
        to_do: what an operator can do.
    """

    means: str
    to_do: str

    @property
    def plain(self) -> str:
        """What to do, for a terminal: without links and marks."""
        return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", self.to_do).replace("`", "")


REMEDIES: dict[FailureReason, Remedy] = {
    FailureReason.MALFORMED_ROW: Remedy(
        "the Hub's listing has a row without a usable repository id or commit",
        "nothing; the Hub's side. Many at once: a mirror that answers wrongly",
    ),
    FailureReason.GATED: Remedy(
        "access must be requested from the owner",
        "request it, set `HF_TOKEN`, then `--retry-failed`",
    ),
    FailureReason.DISABLED: Remedy(
        "the Hub has disabled the repository",
        "nothing",
    ),
    FailureReason.NOT_A_CLASSIFIER: Remedy(
        "no classification head: a backbone, a feature extractor, a language model",
        "nothing, or narrow `filters.pipeline_tag`",
    ),
    FailureReason.NOT_A_GENERATOR: Remedy(
        "nothing that makes pictures: no pipeline, no network of diffusers, no adapter, no gallery",
        "nothing, or narrow the filters",
    ),
    FailureReason.MISSING_BASE: Remedy(
        "an adapter names no base model, or one that is not there",
        "nothing; when it is back: `--retry-failed`",
    ),
    FailureReason.GATED_BASE: Remedy(
        "access to an adapter's base model must be requested from its owner",
        "request it, set `HF_TOKEN`, then `--retry-failed`",
    ),
    FailureReason.UNSUPPORTED: Remedy(
        "a model type, architecture, processor, pipeline, scheduler, kind of adapter, data type or number of channels that this version does not handle",
        "update transformers or timm; see [how to add an architecture](../development.md#an-architecture) and `preload`. Of repositories that [get trees alone](trees.md#trees-of-repositories-that-are-not-probed): no safetensors, or nothing in them to compare",
    ),
    FailureReason.UNSAFE_FORMAT: Remedy(
        "weights only as pickle, which can run code when loaded",
        "for your own repositories: convert to safetensors; or `allow_pickle`, whose risk the [threat model](../threat-model.md) states",
    ),
    FailureReason.UNSAFE_PATH: Remedy(
        "a file name, link or shard that leaves the repository, or a file that is not plain",
        "nothing: treat the repository as hostile",
    ),
    FailureReason.REMOTE_CODE: Remedy(
        "needs Python code from the repository, which is never run",
        "nothing",
    ),
    FailureReason.TOO_LARGE: Remedy(
        "above `filters.max_bytes`, `filters.max_params` (of generators those of `generators.filters`, and `generators.max_image_size`) or a built-in limit (logits, tensors, image size, rank of an adapter); of repositories that get trees alone: headers that exceed `trees.bytes_per_model`",
        "raise the filter where the detail names one",
    ),
    FailureReason.NOT_FOUND: Remedy(
        "the repository, its configuration or its weights are not there",
        "nothing; when it is back: `--retry-failed`",
    ),
    FailureReason.DOWNLOAD_FAILED: Remedy(
        "the Hub's errors or a slow connection outlasted six attempts, the download timed out, or the answer was [none that is followed](../threat-model.md#the-hub-and-what-stands-between) (the detail says what)",
        "rerun; many at once: the Hub's status, the network policy, `item_seconds`, what stands between you and the Hub",
    ),
    FailureReason.WRONG_DIGEST: Remedy(
        "bytes that are not those that the Hub declares",
        "rerun; again: a broken proxy or mirror",
    ),
    FailureReason.CORRUPT_CONFIG: Remedy(
        "`config.json` or the processor's configuration is not valid, or has impossible values",
        "nothing; the repository's owner",
    ),
    FailureReason.CORRUPT_WEIGHTS: Remedy(
        "a weight file that contradicts its own header or index",
        "nothing; the repository's owner",
    ),
    FailureReason.CONFIG_MISMATCH: Remedy(
        "the configuration does not fit the weights: missing head, other sizes, a model that refuses its declared input, an adapter for another base",
        "nothing; the repository's owner",
    ),
    FailureReason.NON_FINITE: Remedy(
        "NaN or infinite weights, logits or samples",
        "nothing; the repository's owner",
    ),
    FailureReason.CONSTANT: Remedy(
        "every logit is the same on all probes, or every sample of one colour",
        "nothing; the model is dead. Many at once: look at the probes",
    ),
    FailureReason.OUT_OF_MEMORY: Remedy(
        "the model did not fit the memory of its process",
        "rerun with fewer actors a machine or GPU, or a larger `memory_per_worker`",
    ),
    FailureReason.TIMEOUT: Remedy(
        "no answer within `item_seconds`",
        "rerun with a larger `item_seconds`, or leave it",
    ),
    FailureReason.CRASHED_WORKER: Remedy(
        "the model took its process down, twice while alone",
        "nothing for one; many: the driver, CUDA and library versions, then `--retry-failed`",
    ),
    FailureReason.STORE_FAILED: Remedy(
        "the store refused to be read, or the result or the download could not be written for longer than `store_retry_seconds` or `disk_retry_seconds`",
        "credentials, quota, free disk; rerun",
    ),
    FailureReason.INTERNAL: Remedy(
        "an error of ProbeLog itself",
        "the traceback is in the log of the worker that the item log names ([where](full-crawl.md#commands)): report it; rerun after an update",
    ),
}


def remedy(reason: str) -> str:
    """What to do about a reason; one of a newer ProbeLog is not known."""
    try:
        return REMEDIES[FailureReason(reason)].plain
    except ValueError:
        return "update ProbeLog: this version does not know the reason"


def table() -> str:
    """The page's table."""
    rows = [
        f"| `{reason.value}` | {'yes' if reason.retryable else 'no'} | {item.means} | {item.to_do} |"
        for reason, item in REMEDIES.items()
    ]
    return "\n".join(["| reason | retryable | what it means | what to do |", "|---|---|---|---|", *rows, ""])
