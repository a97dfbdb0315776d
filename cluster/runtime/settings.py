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

    workers: Positive | None = Field(
        None, description="Number of probing actors; none: as many as the cluster has room for."
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each actor reserves.")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs, whole or a fraction, that each actor reserves."
    )
    in_flight: Positive = Field(
        3, description="Models in flight per actor: one computes, one loads, the others download."
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
        description="With auto a model computes in 16 bits if its logits stay the same within the stated tolerance.",
    )
    drain_seconds: float = Field(
        25.0,
        gt=0,
        description="Seconds for which an actor finishes its work after notice that its machine goes away (Ray allows 30).",
    )
    preload: list[str] = Field(
        [],
        description="Python modules to import before models are loaded (for your own timm architectures).",
    )
    batch_size: Positive = Field(
        256,
        description="Largest number of images per forward pass; memory may lower it, and on CPUs the cache.",
    )
    batch_models: Positive = Field(32, description="Number of models whose observations share one part.")
    item_seconds: float = Field(
        1800.0, gt=0, description="Seconds without an answer after which a model fails with `timeout`."
    )
    cache_bytes: int = Field(
        8_000_000_000, ge=0, description="Disk a node may use for preprocessed probes, in bytes."
    )
    scratch: Path | None = Field(
        None,
        description="Node-local folder for downloads, and for rows that exceed completion_memory; none: the system's.",
    )
    item_log: Path | None = Field(
        None, description="File of JSON lines, one per probed model; none: a file in the scratch folder."
    )
    store_retry_seconds: float = Field(
        600.0, ge=0, description="Seconds for which refused writes to the store are retried."
    )
    disk_retry_seconds: float = Field(
        60.0, ge=0, description="Seconds for which a download waits for space on a full disk."
    )
    allow_pickle: bool = Field(
        False, description="Also read pytorch_model.bin, with weights_only, which has had security holes."
    )

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What models compute on."""
        return "cuda" if self.gpus_per_worker > 0 else "cpu"
