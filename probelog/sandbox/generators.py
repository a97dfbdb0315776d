"""An untrusted generator in a process of its own, confined like a classifier's (`probelog.sandbox.process`).

The server that forks such processes is not the one of classifiers: it has other libraries in memory, and only a node that
runs generators has it. Who samples a model gets its pixels; they are described elsewhere, never in the model's process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.generators.layout import KINDS
from probelog.sandbox import answers, checks
from probelog.sandbox.checks import AnswerError
from probelog.sandbox.fork_server.client import ForkServer, Role
from probelog.sandbox.fork_server.confinement import Confinement
from probelog.sandbox.process import (
    DEVICE_FILES,
    Process,
    libraries_of,
    matching,
    protocol_error,
    system_of,
)
from probelog.sandbox.spec import GeneratorSpec, home_folder
from probelog.weights.reader import MAX_LAYERS

_GENERATOR = "generator"
_PRELOAD = "probelog.sandbox.fork_server.preload_generators"
_MOST_PROMPTS, _LONGEST_PROMPT = 64, 1_000
_MOST_WORDS, _LONGEST_WORD = 16, 200
_MOST_CLASSES = 100_000
_LONGEST_CLASS = 300


@dataclass(frozen=True)
class LoadedGenerator:
    """What a process says about the generator that it has loaded.

    Attributes:
        facts: fields of a `SampledModel`.
        weights: rows of the ``WEIGHTS`` schema; of an adapter its own.
        size: of a sample, height and width.
        available: how many samples there are (a gallery); None for a model that can make any number.
        adapter: whether a sample may come with its base's.
    """

    facts: dict[str, Any]
    weights: pa.Table = field(repr=False)
    size: tuple[int, int] = (0, 0)
    class_count: int = 0
    available: int | None = None
    adapter: bool = False

    @property
    def identity(self) -> str:
        """Equal for models that make the same samples."""
        return str(self.facts["identity"])


@dataclass(frozen=True)
class SampledImages:
    """Pictures (m, H, W, 3) that a generator made, and how.

    Attributes:
        pixels: of the model.
        base: of an adapter's base, from the same noise and prompts.
        prompts: for each sample the index of its prompt, of models that take text.
        classes: for each sample its class, of models that take one.
        batch_size: how many were made at once.
        precision: of the forward passes.
    """

    pixels: npt.NDArray[np.uint8] = field(repr=False)
    base: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    prompts: npt.NDArray[np.int32] | None = None
    classes: npt.NDArray[np.int32] | None = None
    batch_size: int = 1
    precision: str = "float32"


class GeneratorProcess:
    """Load a generator, sample it, release it, and the next: each in a process of its own.

    One thread at a time. Methods raise ItemFailure with the model's own reason, TIMEOUT where ``timeout`` seconds were
    not enough, and ProcessLostError where the process ended.
    """

    def __init__(self, server: ForkServer, spec: GeneratorSpec) -> None:
        """``server``: of `generator_server`."""
        self._spec, self._process = spec, Process(server, _GENERATOR, spec)
        self._name = ""
        self._loaded: LoadedGenerator | None = None

    @property
    def confined(self) -> dict[str, bool]:
        """What the platform took away from the last model's process, by guard."""
        return self._process.confined

    def load(
        self,
        folder: Path,
        repo: str,
        sha: str,
        timeout: float,
        base: Path | None = None,
        base_digest: str | None = None,
    ) -> LoadedGenerator:
        """Load what was downloaded.

        Args:
            folder: of the download.
            repo: repository.
            sha: commit.
            timeout: seconds.
            base: the folder of an adapter's base.
            base_digest: what loading that base alone gave, which is then not checked again.
        """
        until = time.monotonic() + timeout
        self._name, self._loaded = f"{repo}@{sha}", None
        readable = [str(folder), *([] if base is None else [str(base)])]
        self._process.start(readable, self._spec.memory_bytes)
        answer, blobs = self._process.ask(
            until, most=[MAX_LAYERS * answers.SKETCH_BYTES], model=self._name,
            command="load", folder=str(folder), base=None if base is None else str(base), base_digest=base_digest,
        )  # fmt: skip
        with self._believed():
            weights = answers.weights(repo, sha, answer.get("weights"), blobs[0] if blobs else b"")
            self._loaded = loaded(answer, weights, self._spec)
        return self._loaded

    def sample(self, numbers: Sequence[int], timeout: float, *, base: bool = True) -> SampledImages:
        """The samples of these numbers; each is the same whatever others are asked for with it.

        ``base``: of an adapter, its base's as well.
        """
        assert self._loaded is not None
        base = base and self._loaded.adapter
        asked = [int(number) for number in numbers]
        height, width = self._loaded.size
        size = 3 * height * width * len(asked)
        answer, blobs = self._process.ask(
            time.monotonic() + timeout, most=[size] * (2 if base else 1), model=self._name,
            command="sample", numbers=asked, base=base,
        )  # fmt: skip
        with self._believed():
            return sampled(answer, blobs, len(asked), self._loaded, self._spec, base=base)

    def release(self) -> None:
        """End the model's process."""
        self._process.done()

    def close(self) -> None:
        """End the process. From another thread: whoever waits for it gets ProcessLostError."""
        self._process.close()

    @contextlib.contextmanager
    def _believed(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self._process.done()
            raise protocol_error(str(error)) from None


def generator_server(scratch: Path, preload: Sequence[str] = (), device: str = "cpu") -> ForkServer:
    """The node's server of generators' processes: everybody who gives the same folder, modules and kind of device gets the
    same one.
    """
    modules = [_PRELOAD, *preload]
    rights = Confinement(
        (*libraries_of(modules), *system_of(device)),
        devices=() if device == "cpu" else tuple(matching(DEVICE_FILES)),
    )
    role = Role("probelog.sandbox.generator_server:serve_generator", rights)
    return ForkServer({_GENERATOR: role}, modules, home_folder(scratch))


def loaded(said: dict[str, Any], weights: pa.Table, spec: GeneratorSpec) -> LoadedGenerator:
    """What a process tells of the generator that it has loaded.

    Raises:
        AnswerError: a fact is missing, of another type or out of range.
    """
    facts, shape = said.get("facts"), said.get("shape")
    if not isinstance(facts, dict) or not isinstance(shape, dict):
        raise AnswerError("no facts")
    size = checks.indices(shape, "size", 2, spec.max_image_size + 1)
    if size is None or min(size) < 1 or max(size) != facts.get("image_size"):
        raise AnswerError("a size that is none")
    if type(shape.get("adapter")) is not bool:
        raise AnswerError("adapter that is neither true nor false")
    conditioning = checks.one_of(facts, "conditioning", ("none", "class", "text"))
    prompts = checks.texts(facts, "prompts", _LONGEST_PROMPT, _MOST_PROMPTS)
    class_count = checks.whole(shape, "class_count", 0, _MOST_CLASSES)
    if bool(prompts) is not (conditioning == "text") or bool(class_count) is not (conditioning == "class"):
        raise AnswerError("other conditions than its own")
    believed = {
        "pipeline": checks.one_of(facts, "pipeline", KINDS),
        "architecture": checks.text(facts, "architecture", answers.LONGEST_NAME),
        "conditioning": conditioning,
        "image_size": max(size),
        "parameters": checks.whole(facts, "parameters", 0, 2 * spec.max_params),
        "trigger_words": checks.texts(facts, "trigger_words", _LONGEST_WORD, _MOST_WORDS),
        "prompts": prompts,
        "classes": checks.texts(facts, "classes", _LONGEST_CLASS, _MOST_CLASSES),
        "dtype": checks.text(facts, "dtype", 30),
        "device": checks.one_of(facts, "device", ("cpu", "cuda")),
        "weight_digest": checks.matching(facts, "weight_digest", answers.DIGEST),
        "identity": checks.matching(facts, "identity", answers.KEY),
        "seconds_load": checks.number(facts, "seconds_load", 0.0, answers.MOST_SECONDS),
    }
    available = shape.get("available")
    if available is not None:
        available = checks.whole(shape, "available", 1, 1 << 20)
    return LoadedGenerator(believed, weights, (size[0], size[1]), class_count, available, shape["adapter"])


def sampled(
    said: dict[str, Any],
    blobs: Sequence[bytes | bytearray],
    count: int,
    model: LoadedGenerator,
    spec: GeneratorSpec,
    *,
    base: bool,
) -> SampledImages:
    """The pictures of a process's answer, with a ``base``'s or without.

    Raises:
        AnswerError: another number or size, or conditions that the model has not.
    """
    height, width = model.size
    if len(blobs) != (2 if base else 1) or any(len(blob) != 3 * height * width * count for blob in blobs):
        raise AnswerError(f"other than {count} pictures of {height} x {width} pixels")
    pictures = [np.frombuffer(blob, np.uint8).reshape(count, height, width, 3) for blob in blobs]
    prompts = checks.indices(said, "prompts", count, len(model.facts["prompts"]))
    classes = checks.indices(said, "classes", count, model.class_count)
    if (prompts is None) is bool(model.facts["prompts"]) or (classes is None) is bool(model.class_count):
        raise AnswerError("other conditions than its own")
    batch_size, precision = answers.run(said, spec.batch_size)
    return SampledImages(
        pictures[0],
        pictures[1] if base else None,
        None if prompts is None else np.array(prompts, np.int32),
        None if classes is None else np.array(classes, np.int32),
        batch_size,
        precision,
    )
