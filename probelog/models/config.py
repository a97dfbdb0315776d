"""What an untrusted ``config.json`` may say: bounds on its numbers, its labels and the meaning of its head."""

from __future__ import annotations

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probelog.errors import FailureReason, ItemFailure
from probelog.storage.schemas import Head, clean_unicode
from probelog.weights.repository import read_json, walk

if TYPE_CHECKING:
    import torch

MAX_LABEL_CHARACTERS = 300

#: How the name of a batch norm's counter of batches ends. It does nothing in inference, so it may be missing.
COUNTER = ".num_batches_tracked"

#: Sizes up to this are accepted however small the weights are: image sizes, buckets, kernel sizes.
_ORDINARY_SIZE = 1 << 16
_ORDINARY_DEPTH = 256

# Numbers under these keys drive loops and lists in model constructors, where a size would only fill a shape.
_DEPTH_KEY = re.compile(r"(depth|layers$|blocks|stages|repeats?|num_layers)")
_TRAINING_KEY = re.compile(
    r"dropout|drop_rate|drop_path|drop_block|drop_connect|initializer_range|weight_init"
)
_IMAGE_KEY = re.compile(r"(image|img|train|input)_size$")
_LABEL_KEYS = ("id2label", "label2id", "label_names", "labels", "label_descriptions")
#: Control characters (terminal escapes among them) and the marks that reorder the text after them.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """What the operator is ready to run; anything larger is refused as TOO_LARGE.

    ``max_parameters`` bounds the numbers in the weight files, ``max_image_size`` the pixels along an edge of
    the model's input, ``max_logits`` the outputs of its head.
    """

    max_parameters: int = 2_000_000_000
    max_image_size: int = 2048
    max_logits: int = 50_000


def read_config(folder: Path) -> dict[str, Any]:
    """The repository's ``config.json``.

    Raises:
        ItemFailure: NOT_FOUND where there is none, CORRUPT_CONFIG where it is not a sound JSON object.
    """
    config = read_json(folder, "config.json")
    if config is None:
        raise ItemFailure(FailureReason.NOT_FOUND, "the repository has no config.json")
    return config


def bound_numbers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], elements: int, limits: LoadLimits
) -> None:
    """Refuse sizes that the weight files cannot justify, before any library sees them.

    No dimension of a model exceeds the numbers in its weights, and no layer comes without a tensor. Labels are
    left out (see `count_logits`).

    Raises:
        ItemFailure: CONFIG_MISMATCH, TOO_LARGE for an image size above the limit, CORRUPT_CONFIG for a negative
            number of layers and for numbers that are not finite.
    """
    sizes = {key: value for key, value in config.items() if key not in _LABEL_KEYS}
    largest, deepest = max(elements, _ORDINARY_SIZE), max(len(shapes), _ORDINARY_DEPTH)
    loops: dict[str, int] = {}
    for count, (key, value) in enumerate(walk(sizes)):
        if count > 100_000:
            raise ItemFailure(FailureReason.CORRUPT_CONFIG, "config.json holds more than 100,000 values")
        if isinstance(value, float) and not math.isfinite(value) and not _TRAINING_KEY.search(key):
            raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"config.json says {key[:60]} = {value}")
        if type(value) is not int:
            continue
        if abs(value) > largest:
            raise ItemFailure(
                FailureReason.CONFIG_MISMATCH,
                f"config.json says {key[:60]} = {value}; the weights hold {elements} numbers in all",
            )
        if _IMAGE_KEY.search(key) and value > limits.max_image_size:
            raise ItemFailure(
                FailureReason.TOO_LARGE, f"{key[:60]} = {value} pixels; the limit is {limits.max_image_size}"
            )
        if _DEPTH_KEY.search(key):
            if value < 0:
                raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"config.json says {key[:60]} = {value}")
            loops[key] = loops.get(key, 0) + value
            if loops[key] > deepest:
                raise ItemFailure(
                    FailureReason.CONFIG_MISMATCH,
                    f"config.json says {key[:60]} = {value}; the weights hold {len(shapes)} tensors",
                )


@contextlib.contextmanager
def bounded_construction(tensors: int, elements: int) -> Iterator[None]:
    """While a model is built in this thread, refuse one that outgrows its weight files by far.

    `bound_numbers` cannot know every key that every architecture loops over; this counts what is really made,
    through torch's global registration hooks. The exact comparison comes afterwards.

    Raises:
        ItemFailure: CONFIG_MISMATCH, from inside the constructor.
    """
    from torch.nn.modules import module as registry

    thread = threading.get_ident()
    made = {"parameters": 0, "numbers": 0, "modules": 0}
    allowed = {
        "parameters": 4 * tensors + 4096,
        "numbers": 4 * elements + (1 << 24),
        "modules": 64 * tensors + 65536,
    }

    def count(**more: int) -> None:
        if threading.get_ident() != thread:  # another thread's model; the hooks are global
            return
        for kind, number in more.items():
            made[kind] += number
            if made[kind] > allowed[kind]:
                raise ItemFailure(
                    FailureReason.CONFIG_MISMATCH,
                    f"config.json describes a model of more than {allowed[kind]} {kind}; "
                    f"the weights hold {elements} numbers in {tensors} tensors",
                )

    def parameter_made(_module: object, _name: str, parameter: torch.Tensor | None) -> None:
        count(parameters=1, numbers=0 if parameter is None else parameter.numel())

    def buffer_made(_module: object, _name: str, buffer: torch.Tensor | None) -> None:
        count(numbers=0 if buffer is None else buffer.numel())

    def module_made(_module: object, _name: str, _child: object) -> None:
        count(modules=1)

    handles = [
        registry.register_module_parameter_registration_hook(parameter_made),
        registry.register_module_buffer_registration_hook(buffer_made),
        registry.register_module_module_registration_hook(module_made),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def canonical(settings: Mapping[str, Any]) -> str:
    """Settings of a model as one JSON text, equal for models that compute the same with the same weights.

    Leaves out what has a meaning for training alone.
    """
    return json.dumps(
        {key: value for key, value in settings.items() if not _TRAINING_KEY.search(key)}, sort_keys=True
    )


def count_logits(number: int, limits: LoadLimits) -> int:
    """A number of outputs within the limits.

    Raises:
        ItemFailure: NOT_A_CLASSIFIER for none, CORRUPT_CONFIG below none, TOO_LARGE above the limit.
    """
    if number < 0:
        raise ItemFailure(FailureReason.CORRUPT_CONFIG, f"{number} outputs")
    if number == 0:
        raise ItemFailure(FailureReason.NOT_A_CLASSIFIER, "the model has no outputs (a feature extractor)")
    if number > limits.max_logits:
        raise ItemFailure(FailureReason.TOO_LARGE, f"{number} outputs; the limit is {limits.max_logits}")
    return number


def tidy_label(value: object, index: int) -> str:
    """One declared label as text for a terminal and for Arrow; ``LABEL_i`` where nothing readable is declared."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return f"LABEL_{index}"
    text = UNPRINTABLE.sub(" ", clean_unicode(str(value)[: 4 * MAX_LABEL_CHARACTERS])).strip()
    return text[:MAX_LABEL_CHARACTERS] or f"LABEL_{index}"


def tidy_labels(declared: Mapping[int, object], logits: int) -> list[str]:
    """Exactly ``logits`` labels; holes are filled with ``LABEL_i``, what lies outside is dropped."""
    return [tidy_label(declared.get(index), index) for index in range(logits)]


def head_of(problem_type: object, logits: int) -> Head:
    """What the head means: transformers' ``problem_type`` where there is one, softmax otherwise."""
    if problem_type == "regression":
        return Head.REGRESSION
    if logits == 1:
        return Head.SINGLE
    return Head.SIGMOID if problem_type == "multi_label_classification" else Head.SOFTMAX
