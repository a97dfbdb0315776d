"""Imports what models need, for `probelog.sandbox.fork_server` to have it in memory when it forks."""

from __future__ import annotations

import contextlib
from importlib import import_module

# The submodules are those that transformers would otherwise import for the first model.
for _name in (
    "PIL.Image",
    "timm",
    "timm.data",
    "torch",
    "transformers",
    "transformers.image_processing_utils",
    "transformers.modeling_utils",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.auto.modeling_auto",
    "probelog.inference.execution_plan",
    "probelog.models.loading",
    "probelog.models.timm",
    "probelog.models.transformers",
    "probelog.inference.observe",
    "probelog.inference.pixel_cache",
    "probelog.models.preprocessing",
    "probelog.probes.probe_set",
    "probelog.weights.reader",
):
    import_module(_name)

# Every process is fresh: what it would import for its model alone, it would import for every model.
import transformers  # noqa: E402 - after the submodules that it is made of
from transformers.models.auto import image_processing_auto, modeling_auto  # noqa: E402

for _type, _classes in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
    _processors = image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(_type, {})
    for _name in (*([_classes] if isinstance(_classes, str) else _classes), *_processors.values()):
        # Some need packages that are not installed.
        with contextlib.suppress(Exception):
            getattr(transformers, _name)

from probelog.sandbox.warm_up import warm_up  # noqa: E402

warm_up()
