"""Query images with known classes: pictures that stand for a concept, and what retrieved logits are tested on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmark.cells import Asked
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.questions import Questions
from probelog.errors import UsageError
from probelog.probes.sources import ProbeReport, candidates, source_files
from probelog.storage.encoding import digest

# How many images stand for a concept, as in the paper's second version.
COUNTS = (1, 5, 10)
_CLASS_COLUMNS = ("class", "label")


def asked_with(count: int) -> str:
    """What a cell's ``asked`` says of queries by so many images."""
    return f"{count} image{'s' if count > 1 else ''}"


@dataclass(frozen=True)
class QueryImages:
    """M images (``data``: encoded files) with their class numbers ``classes`` (M,).

    ``file`` is where they came from, ``left_out`` counts rows without usable bytes.
    """

    file: Path
    data: list[bytes]
    classes: npt.NDArray[np.int64]
    left_out: int
    _embeddings: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, file: Path) -> QueryImages:
        """Read a Parquet file with images (as probes have them) and a column ``class`` or ``label`` of integers.

        Raises:
            UsageError: the file cannot be read or has other columns.
        """
        if file.suffix != ".parquet" or not file.is_file():
            raise UsageError(f"{file}: the query images must be a Parquet file (columns image and class)")
        try:
            schema = pq.read_schema(file)
            column = next((name for name in _CLASS_COLUMNS if name in schema.names), None)
            if column is None or not pa.types.is_integer(schema.field(column).type):
                raise UsageError(f"{file}: there is no integer column `class` or `label`: {schema.names}")
            numbers = pq.read_table(file, columns=[column])[column].to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{file}: the query images cannot be read ({error})") from None
        files, _ = source_files(str(file))
        data, classes, left_out = [], [], 0
        for number, (_, content) in zip(numbers, candidates(files), strict=True):
            if isinstance(content, ProbeReport) or number is None:
                left_out += 1
            else:
                data.append(content)
                classes.append(number)
        if not data:
            raise UsageError(f"{file}: there is no image with a class")
        return cls(file, data, np.array(classes, np.int64), left_out)

    @property
    def key(self) -> str:
        """Identity of the images and their classes."""
        return digest("".join(self.contents).encode() + self.classes.tobytes())

    @cached_property
    def contents(self) -> list[str]:
        """The SHA-256 of every image's file."""
        return [digest(item) for item in self.data]

    def embeddings(self, hub: ProbedHub) -> npt.NDArray[np.float32]:
        """(M, d) unit vectors by the index's own image encoder; kept for indexes with the same one.

        Raises:
            QueryError: the index has no image encoder, or an image cannot be decoded.
        """
        encoder = str(hub.generation.settings["encoder_digest"])
        if encoder not in self._embeddings:
            self._embeddings[encoder] = hub.generation.image_encoder.embed(self.data, mirror=True)
        return self._embeddings[encoder]

    def drawn(self, questions: Questions, seed: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Every single class's number among the questions, and its images in the seed's order."""
        for number, wanted in enumerate(questions.classes):
            if wanted is not None:
                own = np.flatnonzero(self.classes == wanted)
                yield number, np.random.default_rng([seed, number]).permutation(own)

    def queries(self, hub: ProbedHub, questions: Questions, count: int, seed: int) -> Asked:
        """Every single class that has so many images, asked with the mean of ``count`` of them (unit length).

        Fewer images of the same seed are among the more.
        """
        embeddings = self.embeddings(hub)
        numbers, vectors, shown = [], [], []
        for number, own in self.drawn(questions, seed):
            if len(own) >= count:
                chosen = own[:count]
                mean = embeddings[chosen].mean(axis=0)
                numbers.append(number)
                shown.append(embeddings[chosen])
                vectors.append(mean / np.linalg.norm(mean))
        dimension = embeddings.shape[1]
        return Asked(np.array(numbers, np.int64), np.array(vectors, np.float32).reshape(-1, dimension), shown)


def counts_at_hand(images: QueryImages, questions: Questions) -> list[int]:
    """Which of ``COUNTS`` images a concept there are enough of, for at least one concept with an answer."""
    sizes = [
        int((images.classes == questions.classes[number]).sum())
        for number in questions.answerable
        if questions.classes[number] is not None
    ]
    return [count for count in COUNTS if any(size >= count for size in sizes)]
