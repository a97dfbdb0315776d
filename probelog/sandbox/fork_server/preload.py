"""Imports what models need, for `probelog.sandbox.fork_server.client` to have it in memory when it forks."""

from __future__ import annotations

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
