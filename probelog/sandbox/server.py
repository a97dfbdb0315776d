"""What runs inside a model's process: commands over a pipe, one model at a time (`probelog.sandbox.process`)."""

from __future__ import annotations

import gc
import io
import json
import os
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from probelog import logs
from probelog.errors import FailureReason, ItemFailure
from probelog.inference import execution_plan
from probelog.models import memory
from probelog.models.memory import out_of_memory
from probelog.sandbox import confinement
from probelog.sandbox.fork_server import answer
from probelog.sandbox.process import ProcessSpec, pixels_folder
from probelog.storage.encoding import npy
from probelog.storage.store import Store

if TYPE_CHECKING:
    from PIL import Image

    from probelog.models.loading import Classifier


def serve(connection: Connection) -> None:
    """Answer commands until the other side closes the pipe."""
    server: _Server | None = None
    while True:
        message = json.loads(connection.recv_bytes())
        command = message.pop("command")
        try:
            if command == "set-up":
                os.environ.update(message["devices"])
                server = _Server(ProcessSpec(**message["spec"]))
                answer(connection, confined=server.confine(message["readable"], message["writable"]))
                continue
            assert server is not None
            blobs, facts = server.commands[command](**message)
            answer(connection, blobs, **facts)
        except ItemFailure as failure:
            answer(
                connection, failure=failure.reason.value, detail=failure.detail, worn=_worn(failure.reason)
            )
        except Exception as error:  # whatever goes wrong must cost its own row and no more
            reason = FailureReason.OUT_OF_MEMORY if out_of_memory(error) else FailureReason.INTERNAL
            detail = f"{type(error).__name__}: {str(error)[:500]}"
            # Nobody reads what this process writes to its standard error.
            lines = traceback.format_exception(error) if reason is FailureReason.INTERNAL else []
            trace = logs.shortened("".join(lines))
            answer(connection, failure=reason.value, detail=detail, worn=True, traceback=trace)


def _worn(reason: FailureReason) -> bool:
    """Whether a process should not go on after such a failure: its memory is in pieces."""
    return reason in (FailureReason.OUT_OF_MEMORY, FailureReason.INTERNAL)


class _Server:
    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec
        self._classifier: Classifier | None = None
        self._prepared: tuple[Sequence[int], bytes | None] = [], None
        self.commands: dict[str, Any] = {
            "load": self._load,
            "prepare": self._prepare,
            "observe": self._observe,
            "release": self._release,
        }

    def confine(self, readable: list[str], writable: list[str]) -> dict[str, bool]:
        """Give up rights, then get ready to work; returns what the platform allowed."""
        import torch

        from probelog.inference.execution_plan import Plans, Precision
        from probelog.inference.pixel_cache import PixelCache
        from probelog.probes.probe_set import ProbeSet

        spec = self._spec
        confined = {
            "network": confinement.without_network(),
            "files": confinement.only_files(readable, writable),
            "memory": spec.memory_bytes is not None and confinement.limit_memory(spec.memory_bytes),
        }
        torch.set_num_threads(spec.threads)
        # Full float32 on GPUs too: a logit must not depend on the kind of worker that happened to run its model.
        torch.backends.cudnn.allow_tf32 = False
        self._device = "cuda" if spec.device == "cuda" and torch.cuda.is_available() else "cpu"
        memory = spec.memory_bytes
        if self._device == "cuda":
            memory = int(torch.cuda.get_device_properties(0).total_memory * spec.device_share)
        precision: Precision = "auto" if spec.precision == "auto" else "float32"
        self._plans = Plans(batch_size=spec.batch_size, memory_bytes=memory, precision=precision)
        self._probes = ProbeSet.open(Store(spec.probes), spec.probe_set)
        self._cache = PixelCache(
            pixels_folder(Path(spec.scratch)),
            spec.cache_bytes,
            probe_set=self._probes.hash,
            count=self._probes.count,
        )
        return confined

    def _load(self, folder: str, repo: str, sha: str) -> tuple[list[bytes], dict[str, Any]]:
        from probelog.models.loading import LoadLimits, load_classifier
        from probelog.weights.reader import layer_table

        self._release()
        memory.keep_freed()  # the one before may have run out of memory
        started = time.perf_counter()
        made = load_classifier(
            folder,
            limits=LoadLimits(max_parameters=self._spec.max_params),
            device=self._device,
            allow_pickle=self._spec.allow_pickle,
        )
        self._classifier = made
        facts = {
            "logits": made.logits,
            "head": made.head.value,
            "labels": made.labels,
            "library": made.library,
            "architecture": made.architecture,
            "parameters": made.parameters,
            "recipe": made.recipe.to_json(),
            "dtype": made.dtype,
            "device": self._device,
            "weight_digest": made.weight_digest,
            "weight_mean": made.weight_mean,
            "weight_std": made.weight_std,
            "identity": made.identity,
            "seconds_weights": made.seconds_weights,
            "seconds_sketch": made.seconds_sketch,
            "name_or_path": made.name_or_path,
            "seconds_load": time.perf_counter() - started,
        }
        kind = execution_plan.kind(made, self._device)
        return [_stream(layer_table(repo, sha, made.layers))], {"facts": facts, "kind": kind}

    def _prepare(self, indices: Sequence[int]) -> tuple[list[bytes], dict[str, Any]]:
        assert self._classifier is not None
        self._prepared = indices, self._cache.prepare(self._classifier.recipe, self._images, indices)
        return [], {}

    def _observe(self, indices: Sequence[int], plan: object) -> tuple[list[bytes], dict[str, Any]]:
        from probelog.inference.observe import observe
        from probelog.inference.pixel_cache import cached_pixels

        assert self._classifier is not None
        kind = execution_plan.kind(self._classifier, self._device)
        self._plans.learn(kind, plan)
        prepared, digests = self._prepared
        with cached_pixels(
            self._cache.folder,
            self._classifier.recipe,
            indices,
            digests if prepared == indices else None,
            probe_set=self._probes.hash,
            count=self._probes.count,
        ) as cached:
            observation = observe(
                self._classifier,
                self._images,
                indices,
                plans=self._plans,
                device=self._device,
                cached=cached,
            )
        facts = {
            "batch_size": observation.batch_size,
            "precision": observation.precision,
            "plan": self._plans.exported(kind),
        }
        return [npy(np.ascontiguousarray(observation.values, np.float32))], facts

    def _release(self) -> tuple[list[bytes], dict[str, Any]]:
        if self._classifier is not None:
            large = 4 * self._classifier.parameters > memory.KEPT
            self._classifier, self._prepared = None, ([], None)
            gc.collect()  # modules refer to each other in circles
            if large:  # what a small one frees, the next one uses
                memory.give_back()
        return [], {}

    def _images(self, indices: Sequence[int]) -> list[Image.Image]:
        return list(self._probes.images(indices))


def _stream(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
