"""Imports the libraries that models need, for `probelog.fork_server` to have them in memory when it forks."""

from __future__ import annotations

import PIL.Image
import timm
import torch
import transformers
from timm.data import create_transform
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import image_processing_auto, modeling_auto

from probelog import (
    forward_plan,
    models,
    models_timm,
    models_transformers,
    observe,
    pixel_cache,
    preprocess,
    probes,
    weights,
)

__all__ = [
    "PIL",
    "BaseImageProcessor",
    "PreTrainedModel",
    "create_transform",
    "forward_plan",
    "image_processing_auto",
    "modeling_auto",
    "models",
    "models_timm",
    "models_transformers",
    "observe",
    "pixel_cache",
    "preprocess",
    "probes",
    "timm",
    "torch",
    "transformers",
    "weights",
]
