"""What a job's configuration says to its workers: each key once, with its meaning, its bounds and its default.

The configuration file's model (`pipelines.config.model.Config`) inherits these keys, and with them the file, its
checks and its page have them; actors are handed the record as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class WorkerSettings(BaseModel):
    """How work is spread over workers, and what each of them may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: Positive | None = Field(None, description="Probing actors; none: as many as the cluster holds.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each actor reserves.")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs, whole or a fraction, that each actor reserves."
    )
    in_flight: Positive = Field(
        3, description="Models under way per actor: one computes, one loads, the others download."
    )
    memory_per_worker: Positive | None = Field(
        None, description="Bytes that the models of one actor may use; none: its share of the node's memory."
    )
    completion_memory: Positive | None = Field(
        None,
        description="Bytes that each worker of the completion may use for rows and sums; rows that exceed them go to "
        "the scratch folder. None: half of its share of the node's memory.",
    )
    precision: Literal["float32", "auto"] = Field(
        "float32",
        description="auto computes in 16 bits where a model's logits stay the same within the stated tolerance.",
    )
    drain_seconds: float = Field(
        25.0,
        gt=0,
        description="How long an actor goes on after it was told that its machine goes away (Ray allows 30).",
    )
    preload: list[str] = Field(
        [],
        description="Python modules to import before models are loaded (architectures of your own, for timm).",
    )
    batch_size: Positive = Field(
        256, description="Images a forward pass at most; memory decides, and on CPUs the cache."
    )
    batch_models: Positive = Field(32, description="Models whose observations share one part.")
    item_seconds: float = Field(
        1800.0, gt=0, description="After so long without an answer a model is given up."
    )
    cache_bytes: int = Field(
        8_000_000_000, ge=0, description="Disk a node may use for preprocessed probes, in bytes."
    )
    scratch: Path | None = Field(
        None,
        description="Node-local folder for downloads, and for rows that exceed completion_memory; none: the system's.",
    )
    item_log: Path | None = Field(
        None, description="JSON lines, one for every model probed; none: a file in the scratch folder."
    )
    store_retry_seconds: float = Field(
        600.0, ge=0, description="Seconds for which refused writes to the store are tried again."
    )
    disk_retry_seconds: float = Field(
        60.0, ge=0, description="Seconds for which a download waits for room on a full disk."
    )
    allow_pickle: bool = Field(
        False, description="Also read pytorch_model.bin, with weights_only. It has had holes."
    )
