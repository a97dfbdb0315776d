"""An untrusted model in a process of its own: without token, network, other people's files or endless memory.

What the model does there can only cost that process. Its answers are checked for shape and read as plain values.
See `probelog.sandbox.fork_server` for how processes are made and `probelog.sandbox.server` for what runs inside.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import FailureReason, ItemFailure
from probelog.inference.pixel_cache import locks_folder
from probelog.logs import shortened
from probelog.sandbox.fork_server import Child, ForkServer, ProcessLostError, writable_home
from probelog.storage.encoding import from_npy
from probelog.storage.schemas import WEIGHTS

SERVER = "probelog.sandbox.server:serve"
#: What takes seconds to import and is the same for every model.
LIBRARIES = ("probelog.sandbox.preload",)

_SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/etc", "/sys", "/proc/self", "/proc/cpuinfo",
    "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/driver", "/proc/modules", "/proc/filesystems",
)  # fmt: skip
# Not all of /dev: other programs' shared memory lies there.
_DEVICES = (
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/nvidia*", "/dev/dri", "/dev/kfd",
)  # fmt: skip
# Which of a node's devices an actor was given; told to each process, which finds them when it first computes.
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_START_SECONDS = 120.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessSpec:
    """What a model's process is allowed and told.

    Attributes:
        probes: a local store with the probe set.
        probe_set: its hash.
        scratch: the node's folder: models are read from it, preprocessed probes kept in it.
        cache_bytes: of preprocessed probes in ``scratch``.
        batch_size: at most so many images a forward pass.
        precision: ``float32``, or ``auto`` for less where the logits stay the same.
        max_params: largest model.
        allow_pickle: whether weights may be pickled.
        device: ``cpu`` or ``cuda``.
        device_share: of the device's memory that this process may fill.
        memory_bytes: more than this beyond the libraries' own cannot be allocated; None for no limit.
        threads: for computing.
    """

    probes: str
    probe_set: str
    scratch: str
    cache_bytes: int
    batch_size: int
    precision: str
    max_params: int
    allow_pickle: bool
    device: str = "cpu"
    device_share: float = 1.0
    memory_bytes: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Loaded:
    """What a process says about the model that it has loaded; ``facts`` has the fields of a `ProbedModel`."""

    facts: dict[str, Any]
    weights: pa.Table = field(repr=False)

    @property
    def identity(self) -> str:
        """Equal for models that give the same logits."""
        return str(self.facts["identity"])


@dataclass(frozen=True)
class ForwardResult:
    """A model's logits (L, m) on its probes and how they were computed."""

    values: npt.NDArray[np.float32] = field(repr=False)
    batch_size: int
    precision: str


class PlanCache:
    """What processes that are set up alike found out about kinds of models (``forward_plan.Plans.told``), to spare each
    other the trials. It comes from processes that ran untrusted models: whoever uses it checks it.
    """

    _MOST, _LONGEST = 10_000, 2_000

    def __init__(self) -> None:
        self._plans: dict[str, object] = {}

    def get(self, kind: str) -> object:
        """What was last said of a kind, or None."""
        return self._plans.get(kind)

    def put(self, kind: str, plan: object) -> None:
        """Remember it, unless it is too long to be true."""
        if len(kind) + len(json.dumps(plan)) <= self._LONGEST and len(self._plans) < self._MOST:
            self._plans[kind] = plan


class ModelProcess:
    """One process: load a model, prepare its probes, observe it, release it, and the next. One thread at a time.

    A process that was lost, timed out or ran out of memory is replaced by the next `load`. Methods raise
    ItemFailure with the model's own reason, TIMEOUT where ``timeout`` seconds were not enough, and
    ProcessLostError where the process ended.
    """

    def __init__(
        self, server: ForkServer, spec: ProcessSpec, recycle_after: int = 200, learnt: PlanCache | None = None
    ) -> None:
        """``learnt``: shared with other processes of the same spec."""
        self._server, self._spec, self._recycle_after = server, spec, recycle_after
        self._learnt, self._kind, self._model = learnt or PlanCache(), "", ""
        for folder in (pixels := pixels_folder(Path(spec.scratch)), locks_folder(pixels)):
            folder.mkdir(parents=True, exist_ok=True)
        self._child: Child | None = None
        self._served = 0
        #: What the platform took away from the last process: ``network``, ``files``, ``memory``.
        self.confined: dict[str, bool] = {}

    def load(self, folder: Path, repo: str, sha: str, timeout: float) -> Loaded:
        """Load what was downloaded."""
        until = time.monotonic() + timeout
        if self._child is None or self._served >= self._recycle_after:
            self.close()
            self._start()
        self._served += 1
        self._model = f"{repo}@{sha}"
        answer, blobs = self._ask(until, command="load", folder=str(folder), repo=repo, sha=sha)
        table = pa.ipc.open_stream(blobs[0]).read_all()
        if table.schema != WEIGHTS:
            raise _protocol_error("another table than that of the weights")
        self._kind = str(answer.get("kind"))
        return Loaded(dict(answer["facts"]), table)

    def prepare(self, indices: Sequence[int], timeout: float) -> None:
        """Have the probes preprocessed as the model needs them, where they can be kept."""
        self._ask(time.monotonic() + timeout, command="prepare", indices=[int(i) for i in indices])

    def observe(self, indices: Sequence[int], logits: int, timeout: float) -> ForwardResult:
        """Run the model on probes."""
        until, known = time.monotonic() + timeout, self._learnt.get(self._kind)
        answer, blobs = self._ask(until, command="observe", indices=[int(i) for i in indices], plan=known)
        self._learnt.put(self._kind, answer.get("plan"))
        values = from_npy(blobs[0])
        if values.dtype != np.float32 or values.shape != (logits, len(indices)):
            raise _protocol_error(f"{values.dtype} of shape {values.shape}")
        return ForwardResult(values, int(answer["batch_size"]), str(answer["precision"]))

    def release(self) -> None:
        """Forget the model and free what it held."""
        if self._child is not None:
            try:
                self._ask(time.monotonic() + _START_SECONDS, command="release")
            except (ItemFailure, ProcessLostError):
                self.close()

    def close(self) -> None:
        """End the process. From another thread: whoever waits for it gets ProcessLostError."""
        child, self._child = self._child, None
        self._served = 0
        if child is not None:
            child.kill()

    def _start(self) -> None:
        self._child = self._server.fork()
        spec = dataclasses.asdict(self._spec)
        readable, writable = _paths(self._spec)
        answer, _ = self._ask(
            time.monotonic() + _START_SECONDS,
            command="set-up",
            spec=spec,
            readable=readable,
            writable=writable,
            devices={name: os.environ[name] for name in _DEVICE_VARIABLES if name in os.environ},
        )
        self.confined = {str(name): bool(held) for name, held in dict(answer["confined"]).items()}

    def _ask(self, until: float, **message: object) -> tuple[dict[str, Any], list[bytes]]:
        child = self._child
        if child is None:
            raise ProcessLostError(-9)  # closed by another thread
        timeout = until - time.monotonic()
        try:
            answer, blobs = child.ask(timeout, **message)
            failure = answer.get("failure")
            reason = None if failure is None else FailureReason(failure)
        except TimeoutError:
            self.close()
            raise ItemFailure(
                FailureReason.TIMEOUT, f"{message['command']}: no answer within {max(timeout, 0):.0f} seconds"
            ) from None
        except ProcessLostError:
            self.close()
            raise
        except (ValueError, RecursionError) as error:
            self.close()
            raise _protocol_error(str(error)) from None
        if reason is not None:
            if answer.get("worn"):
                self.close()
            if trace := answer.get("traceback"):
                # Untrusted like the rest of the answer: bounded here, and made harmless where the log is written.
                _log.error("%s: internal error in its process\n%s", self._model, shortened(str(trace)))
            raise ItemFailure(reason, str(answer.get("detail", "")))
        return answer, blobs


def _protocol_error(what: str) -> ItemFailure:
    return ItemFailure(FailureReason.INTERNAL, f"the model's process answered with {what[:300]}")


def _paths(spec: ProcessSpec) -> tuple[list[str], list[str]]:
    """What a model's process may read and write below."""
    interpreter = [sys.prefix, sys.base_prefix, *(path for path in sys.path if path)]
    # Links in the interpreter's path (a virtual environment's) are followed before the rule applies.
    real = [os.path.realpath(path) for path in interpreter]
    scratch = Path(spec.scratch)
    readable = [*_SYSTEM, *interpreter, *real, f"{spec.probes}/probes", str(downloads_folder(scratch))]
    devices = [name for pattern in _DEVICES for name in glob.glob(pattern)]
    # Its own high-water mark of memory, which is reset to measure what a batch takes.
    return readable, [
        "/proc/self/clear_refs",
        *devices,
        str(pixels_folder(scratch)),
        str(locks_folder(pixels_folder(scratch))),
        str(writable_home(home_folder(scratch))),
    ]


def fork_server(scratch: Path, preload: Sequence[str]) -> ForkServer:
    """The node's server of model processes: everybody who gives the same folder and modules gets the same one."""
    return ForkServer(SERVER, [*LIBRARIES, *preload], home_folder(scratch))


def downloads_folder(scratch: Path) -> Path:
    """Models on their way, below the node's scratch folder."""
    return scratch / "downloads"


def pixels_folder(scratch: Path) -> Path:
    """Preprocessed probes."""
    return scratch / "pixels"


def home_folder(scratch: Path) -> Path:
    """The fork server's."""
    return scratch / "home"
