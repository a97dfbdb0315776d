"""An untrusted model in a process of its own: without token, network, other people's files or endless memory.

What the model does there can only cost that process, and no other model meets it: each gets a fresh fork. Its answers are
checked fact by fact (`probelog.sandbox.answers`). Pixels are prepared by a second process, in which no model runs.
See `probelog.sandbox.fork_server.client` for how processes are made and `probelog.sandbox.server` for what runs inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import logging
import os
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import FailureReason, ItemFailure
from probelog.inference.pixel_cache import DIGEST_BYTES, locks_folder
from probelog.logs import shortened
from probelog.models.config import LoadLimits
from probelog.sandbox import answers
from probelog.sandbox.fork_server.client import (
    Child,
    ForkServer,
    Grant,
    ProcessLostError,
    Role,
    library_folders,
    packages,
)
from probelog.sandbox.fork_server.confinement import Confinement
from probelog.sandbox.fork_server.forking import DEVICE_VARIABLES
from probelog.sandbox.spec import GeneratorSpec, ProcessSpec, home_folder, pixels_folder
from probelog.weights.reader import MAX_LAYERS

_MODEL, _PIXELS = "model", "pixels"
#: What takes seconds to import and is the same for every model.
LIBRARIES = ("probelog.sandbox.fork_server.preload",)
_WARM_UP = "probelog.sandbox.fork_server.warm_up:warm_up"

# Shared libraries, and what they and the C library ask the machine about; no program, no folder of a user.
_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
    "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/dev/null", "/dev/random", "/dev/urandom", "/proc/cpuinfo",
    "/proc/meminfo", "/proc/stat", "/proc/sys/kernel/random/boot_id", "/proc/sys/vm", "/sys/devices/system",
)  # fmt: skip
_SYSTEM_OF_DEVICES = (
    "/usr/local/cuda*", "/opt/rocm*", "/sys", "/proc/driver", "/proc/modules", "/proc/devices", "/proc/filesystems",
    "/proc/sys/kernel", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/usr/share",
)  # fmt: skip
#: Not all of /dev: other programs' shared memory lies there.
DEVICE_FILES = ("/dev/nvidia*", "/dev/dri", "/dev/kfd")
_START_SECONDS = 120.0
_LARGEST_PIXELS = 1 << 40

_log = logging.getLogger(__name__)


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
    """What processes that are set up alike found out about kinds of models (`Plans.exported`), to spare each other the
    trials. It comes from processes that ran untrusted models: whoever uses it checks it, and after some uses it is found
    out anew, so that what one model pretends slows few others.
    """

    _MOST, _LONGEST, _USES = 10_000, 2_000, 50

    def __init__(self) -> None:
        self._plans: dict[str, tuple[object, int]] = {}

    def get(self, kind: str) -> object:
        """What was last said of a kind, or None."""
        plan, uses = self._plans.get(kind, (None, 0))
        if uses >= self._USES:
            self._plans.pop(kind, None)
        elif plan is not None:
            self._plans[kind] = plan, uses + 1
        return plan

    def put(self, kind: str, plan: object) -> None:
        """Remember it, unless it is too long to be true, or nothing new."""
        known = self._plans.get(kind)
        if known is not None and known[0] == plan:
            return
        if len(kind) + len(json.dumps(plan)) <= self._LONGEST and len(self._plans) < self._MOST:
            self._plans[kind] = plan, 0


class Process:
    """One process of a role, forked when it is first asked. One thread at a time asks; any may `close`."""

    def __init__(self, server: ForkServer, role: str, spec: ProcessSpec | GeneratorSpec) -> None:
        self._server, self._role, self._spec = server, role, spec
        self._child: Child | None = None
        #: What the platform took away from the last process, by guard.
        self.confined: dict[str, bool] = {}

    def start(self, readable: Sequence[str], memory_bytes: int | None) -> dict[str, Any]:
        """End the process before, if there is one; what the new one says when it is ready."""
        self.done()
        devices = {name: os.environ[name] for name in DEVICE_VARIABLES if name in os.environ}
        try:
            self._child = self._server.fork(self._role, Grant(tuple(readable), memory_bytes, devices))
        except OSError as error:
            raise ItemFailure(FailureReason.STORE_FAILED, f"no process can be started: {error}") from error
        answer, _ = self.ask(
            time.monotonic() + _START_SECONDS, command="set-up", spec=dataclasses.asdict(self._spec)
        )
        self.confined = {str(name): bool(held) for name, held in dict(answer["confined"]).items()}
        return answer

    @property
    def running(self) -> bool:
        """Whether there is a process to ask."""
        return self._child is not None

    def ask(
        self, until: float, *, most: Sequence[int] = (), model: str = "", **message: object
    ) -> tuple[dict[str, Any], list[bytearray]]:
        """An answer that is one; ``model`` is whom its internal errors are about.

        Raises:
            ItemFailure: the one that it reports; TIMEOUT; INTERNAL for an answer that is none. After any of them, as
                after ProcessLostError, there is no process any more.
        """
        child = self._child
        if child is None:
            raise ProcessLostError(-9)  # closed by another thread
        timeout = until - time.monotonic()
        try:
            answer, blobs = child.ask(timeout, most=most, **message)
            failure = answers.failure(answer)
        except TimeoutError:
            self.close()
            raise ItemFailure(
                FailureReason.TIMEOUT, f"{message['command']}: no answer within {max(timeout, 0):.0f} seconds"
            ) from None
        except ValueError as error:
            self.done()
            raise protocol_error(str(error)) from None
        except BaseException:
            self.close()
            raise
        if failure is not None:
            self.done()
            if trace := answer.get("traceback"):
                # Untrusted like the rest of the answer: bounded here, and made harmless where the log is written.
                _log.error("%s: internal error in its process\n%s", model, shortened(str(trace)))
            raise failure
        return answer, blobs

    def close(self) -> None:
        """End the process. From another thread: whoever waits for it gets ProcessLostError."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def done(self) -> None:
        """End the process, whose work is done: nobody waits for it."""
        child, self._child = self._child, None
        if child is not None:
            child.forget()


class ModelProcess:
    """Load a model, prepare its probes, observe it, release it, and the next: each model in a process of its own.

    One thread at a time. Methods raise ItemFailure with the model's own reason, TIMEOUT where ``timeout`` seconds were
    not enough, and ProcessLostError where the process ended.
    """

    def __init__(self, server: ForkServer, spec: ProcessSpec, learnt: PlanCache | None = None) -> None:
        """``learnt``: shared with other processes of the same spec."""
        self._spec, self._learnt = spec, learnt or PlanCache()
        self._limits = LoadLimits(max_parameters=spec.max_params)
        self._model, self._pixels = Process(server, _MODEL, spec), Process(server, _PIXELS, spec)
        self._name = self._kind = self._recipe = ""
        self._probes = 0
        self._digests: str | None = None

    @property
    def confined(self) -> dict[str, bool]:
        """What the platform took away from the last model's process, by guard (`probelog.sandbox.fork_server.confinement`)."""
        return self._model.confined

    def load(self, folder: Path, repo: str, sha: str, timeout: float) -> Loaded:
        """Load what was downloaded."""
        until = time.monotonic() + timeout
        self._name, self._digests = f"{repo}@{sha}", None
        self._model.start([str(folder), f"{self._spec.probes}/probes"], self._spec.memory_bytes)
        answer, blobs = self._ask(
            until, most=[MAX_LAYERS * answers.SKETCH_BYTES], command="load", folder=str(folder)
        )
        with self._believed():
            facts = answers.facts(answer.get("facts"), self._limits)
            weights = answers.weights(repo, sha, answer.get("weights"), blobs[0] if blobs else b"")
        self._kind, self._recipe = str(answer.get("kind")), str(facts["recipe"])
        return Loaded(facts, weights)

    def prepare(self, indices: Sequence[int], timeout: float) -> None:
        """Have the probes preprocessed as the model needs them, where they can be kept."""
        wanted = [int(index) for index in indices]
        until = time.monotonic() + timeout
        try:
            blobs = self._prepared(wanted, until)
        except ProcessLostError:
            # Ended while it was idle, or with its server: not by this model, unless it happens again.
            blobs = self._prepared(wanted, until)
        self._digests = blobs[0].hex() if blobs else None

    def _prepared(self, wanted: Sequence[int], until: float) -> list[bytearray]:
        if not self._pixels.running:
            answer = self._pixels.start([f"{self._spec.probes}/probes"], self._spec.memory_bytes)
            self._probes = int(answer["probes"])
        _, blobs = self._pixels.ask(
            until, most=[DIGEST_BYTES * len(wanted)], model=self._name,
            command="prepare", recipe=self._recipe, indices=wanted,
        )  # fmt: skip
        return blobs

    def observe(self, indices: Sequence[int], logits: int, timeout: float) -> ForwardResult:
        """Run the model on probes."""
        known = self._learnt.get(self._kind)
        wanted = [int(index) for index in indices]
        answer, blobs = self._ask(
            time.monotonic() + timeout, most=[4 * logits * len(wanted)], command="observe", indices=wanted, plan=known,
            digests=self._digests, probes=self._probes,
        )  # fmt: skip
        with self._believed():
            values = answers.logits(blobs[0] if blobs else b"", logits, len(wanted))
            batch_size, precision = answers.run(answer, self._spec.batch_size)
        self._learnt.put(self._kind, answer.get("plan"))
        return ForwardResult(values, batch_size, precision)

    def release(self) -> None:
        """End the model's process."""
        self._model.done()

    def close(self) -> None:
        """End both processes. From another thread: whoever waits for one gets ProcessLostError."""
        self._model.close()
        self._pixels.close()

    def _ask(
        self, until: float, most: Sequence[int], **message: object
    ) -> tuple[dict[str, Any], list[bytearray]]:
        return self._model.ask(until, most=most, model=self._name, **message)

    @contextlib.contextmanager
    def _believed(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self._model.done()
            raise protocol_error(str(error)) from None


def protocol_error(what: str) -> ItemFailure:
    """What a model fails with whose process says what no process of ours could have said."""
    return ItemFailure(FailureReason.INTERNAL, f"the model's process answered with {what[:300]}")


def fork_server(scratch: Path, preload: Sequence[str], device: str = "cpu") -> ForkServer:
    """The node's server of model processes: everybody who gives the same folder, modules and kind of device gets the
    same one.
    """
    pixels = pixels_folder(scratch)
    locks = locks_folder(pixels)
    for folder in (pixels, locks):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    modules = [*LIBRARIES, *preload]
    roles = {
        _MODEL: Role("probelog.sandbox.server:serve_model", rights_of_models(scratch, modules, device)),
        _PIXELS: Role(
            "probelog.sandbox.server:serve_pixels",
            Confinement(
                (*libraries_of(modules), *system_of(device)),
                writable=(str(pixels), str(locks)),
                largest_file=_LARGEST_PIXELS,
            ),
        ),
    }
    return ForkServer(roles, modules, home_folder(scratch), warm_up=_WARM_UP)


def rights_of_models(scratch: Path, modules: Sequence[str], device: str) -> Confinement:
    """What a model's process may do, beside reading its model: whoever gives the same folder, modules and kind of
    device gets the same.
    """
    return Confinement(
        (*libraries_of(modules), *system_of(device), str(pixels_folder(scratch))),
        devices=() if device == "cpu" else tuple(matching(DEVICE_FILES)),
    )


def system_of(device: str) -> list[str]:
    """What a kind of device needs beside."""
    return [] if device == "cpu" else matching(_SYSTEM_OF_DEVICES)


def libraries_of(modules: Sequence[str]) -> list[str]:
    """What a process may read to import what it needs: the interpreter's own folders, and some packages."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [f"{sys.base_prefix}/lib", *packages(modules).values(), *library_folders()]
    places += [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if path]
    # Links in the interpreter's path (a virtual environment's) are followed before the rule applies.
    return [*_SYSTEM, *sorted({*places, *map(os.path.realpath, places)})]


def matching(patterns: Sequence[str]) -> list[str]:
    """Files that there are."""
    return sorted(name for pattern in patterns for name in glob.glob(pattern))
