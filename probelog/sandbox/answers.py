"""What a model's process says, before anybody believes it: types, ranges and lengths of every fact.

The model may have taken its process over. It then can say what it likes about itself, within what any model could be;
it cannot speak of another repository, nor fill a log or a table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probelog.errors import FailureReason, ItemFailure
from probelog.models.config import LoadLimits
from probelog.models.preprocessing import Recipe
from probelog.sandbox import checks
from probelog.sandbox.checks import AnswerError
from probelog.storage.schemas import Head
from probelog.weights.reader import MAX_LAYERS, WHOLE_NUMBERS, LayerFacts, layer_table
from probelog.weights.sketch import WIDTH

#: Reasons that a model's process may give; the others are about what it has no part in.
REASONS = frozenset(
    {
        FailureReason.NOT_A_CLASSIFIER, FailureReason.NOT_A_GENERATOR, FailureReason.MISSING_BASE,
        FailureReason.UNSUPPORTED, FailureReason.UNSAFE_FORMAT,
        FailureReason.UNSAFE_PATH, FailureReason.REMOTE_CODE, FailureReason.TOO_LARGE,
        FailureReason.CORRUPT_CONFIG, FailureReason.CORRUPT_WEIGHTS, FailureReason.CONFIG_MISMATCH,
        FailureReason.NON_FINITE, FailureReason.CONSTANT, FailureReason.OUT_OF_MEMORY, FailureReason.INTERNAL,
    }
)  # fmt: skip
LONGEST_DETAIL = 2_000
_LONGEST_RECIPE = 1 << 16
_LONGEST_LABEL = LONGEST_NAME = 300
KEY, DIGEST = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{16,128}")
MOST_SECONDS = 1e7
SKETCH_BYTES = 4 * WIDTH


def failure(answer: Mapping[str, Any]) -> ItemFailure | None:
    """The failure that an answer reports."""
    if "failure" not in answer:
        return None
    try:
        reason = FailureReason(checks.text(answer, "failure", 100))
    except ValueError:
        raise AnswerError("a reason that does not exist") from None
    if reason not in REASONS:
        raise AnswerError(f"the reason {reason}, which is not a model's to give")
    detail = answer.get("detail")
    return ItemFailure(reason, detail[:LONGEST_DETAIL] if isinstance(detail, str) else "")


def facts(said: object, limits: LoadLimits) -> dict[str, Any]:
    """The facts of a `ProbedModel` that a process tells of the model that it has loaded.

    Raises:
        AnswerError: one is missing, of another type or out of range.
    """
    if not isinstance(said, dict):
        raise AnswerError("no facts")
    logits = checks.whole(said, "logits", 1, limits.max_logits)
    labels = said.get("labels")
    if not isinstance(labels, list) or len(labels) != logits:
        raise AnswerError(f"labels that are not {logits}")
    for label in labels:
        checks.check_text(label, "a label", _LONGEST_LABEL)
    name = said.get("name_or_path")
    if name is not None:
        checks.check_text(name, "name_or_path", LONGEST_NAME)
    if said.get("head") not in [head.value for head in Head]:
        raise AnswerError("a head that does not exist")
    return {
        "logits": logits,
        "head": said["head"],
        "labels": labels,
        "library": checks.one_of(said, "library", ("timm", "transformers")),
        "architecture": checks.text(said, "architecture", LONGEST_NAME),
        "parameters": checks.whole(said, "parameters", 0, limits.max_parameters),
        "recipe": _recipe(said),
        "dtype": checks.text(said, "dtype", 30),
        "device": checks.one_of(said, "device", ("cpu", "cuda")),
        "weight_digest": checks.matching(said, "weight_digest", DIGEST),
        "weight_mean": checks.number(said, "weight_mean", -math.inf, math.inf),
        "weight_std": checks.number(said, "weight_std", 0.0, math.inf),
        "identity": checks.matching(said, "identity", KEY),
        "name_or_path": name,
        **{
            name: checks.number(said, name, 0.0, MOST_SECONDS)
            for name in ("seconds_load", "seconds_weights", "seconds_sketch")
        },
    }


def layers_to_json(layers: Sequence[LayerFacts]) -> tuple[list[list[Any]], bytes]:
    """Facts of tensors as plain values, and the sketches of those that have one, one after the other."""
    rows = [
        [layer.tensor, layer.dtype, list(layer.shape), *map(_finite, (layer.mean, layer.std, layer.kurtosis)),
         layer.sketch is not None]
        for layer in layers
    ]  # fmt: skip
    sketches = [layer.sketch for layer in layers if layer.sketch is not None]
    return rows, np.ascontiguousarray(np.stack(sketches), np.float32).tobytes() if sketches else b""


def weights(repo: str, sha: str, said: object, sketches: bytes | bytearray) -> pa.Table:
    """What ``layers_to_json`` made, as rows of the ``WEIGHTS`` schema of one repository, whatever the process says.

    Raises:
        AnswerError: no process of ours could have said this.
    """
    if not isinstance(said, list) or len(said) > MAX_LAYERS or len(sketches) % SKETCH_BYTES:
        raise AnswerError("weights that are none")
    matrix = np.frombuffer(sketches, np.float32).reshape(-1, WIDTH)
    remaining = iter(matrix)
    layers = [_layer(row, remaining) for row in said]
    if next(remaining, None) is not None:
        raise AnswerError("more sketches than tensors")
    return layer_table(repo, sha, layers)


def logits(data: bytes | bytearray, count: int, probes: int) -> npt.NDArray[np.float32]:
    """The matrix (L, m) of a process's answer.

    Raises:
        AnswerError: another size, or a number that is not finite.
    """
    if len(data) != 4 * count * probes:
        raise AnswerError(f"{len(data)} bytes for {count} logits on {probes} probes")
    values = np.frombuffer(data, np.float32).reshape(count, probes)
    if not np.isfinite(values).all():
        raise AnswerError("logits that are not finite")
    return values


def run(said: Mapping[str, Any], most: int) -> tuple[int, str]:
    """Batch size and precision of a forward pass.

    Raises:
        AnswerError: no process of ours could have said this.
    """
    return checks.whole(said, "batch_size", 1, most), checks.one_of(
        said, "precision", ("float32", "bfloat16", "float16")
    )


def _layer(row: object, sketches: Iterator[npt.NDArray[np.float32]]) -> LayerFacts:
    if not isinstance(row, list) or len(row) != 7:
        raise AnswerError("a tensor that is none")
    tensor, dtype, shape, mean, std, kurtosis, sketched = row
    checks.check_text(tensor, "a tensor's name", 1 << 16)
    checks.check_text(dtype, "a type", 30)
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_size, shape)):
        raise AnswerError("a tensor's shape")
    for value in (mean, std, kurtosis):
        if value is not None and not checks.is_number(value):
            raise AnswerError("a tensor's statistics")
    is_value = mean is None or (math.prod(shape) == 1 and abs(mean) <= 1 << 64 and mean == int(mean))
    if dtype.startswith(WHOLE_NUMBERS) and not is_value:
        raise AnswerError("a mean of whole numbers")
    sketch = next(sketches, None) if sketched is True else None
    if sketched is not (sketch is not None):
        raise AnswerError("other sketches than tensors")
    return LayerFacts(tensor, dtype, tuple(shape), mean, std, kurtosis, sketch)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _recipe(said: Mapping[str, Any]) -> str:
    text = checks.text(said, "recipe", _LONGEST_RECIPE)
    try:
        return Recipe.from_json(text).to_json()
    except ValueError as error:
        raise AnswerError(f"a recipe that is none: {error}") from None
