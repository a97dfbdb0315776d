"""What the first model of a process waits for, done once for all: every process is fresh, and would do it again.

Classes of models are imported, and a small model of each library, made here, is loaded and run.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from probelog.errors import ItemFailure
from probelog.inference.observe import observe
from probelog.models.loading import load_classifier

_SIDE, _IMAGES = 32, 5


def warm_up() -> None:
    """Import the classes, and have both libraries build, load and run a network.

    With one thread: a pool of threads would not survive a fork.
    """
    torch.set_num_threads(1)
    for kind, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items():
        processors = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {})
        for name in (*([classes] if isinstance(classes, str) else classes), *processors.values()):
            with contextlib.suppress(Exception):  # reason: some need packages that are not installed
                getattr(transformers, name)
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng():
        for number, write in enumerate((_timm_model, _transformers_model)):
            folder = Path(name, str(number))
            folder.mkdir()
            write(folder)
            with contextlib.suppress(ItemFailure):
                observe(load_classifier(folder), _images, range(_IMAGES))


def _timm_model(folder: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    save_file(model.state_dict(), folder / "model.safetensors")
    declared = {"input_size": [3, _SIDE, _SIDE], "num_classes": 2}
    config = {"architecture": "test_resnet", "num_classes": 2, "pretrained_cfg": declared}
    (folder / "config.json").write_text(json.dumps(config))


def _transformers_model(folder: Path) -> None:
    config = transformers.ViTConfig(
        image_size=_SIDE,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    # Not by the library's own method, which starts a thread that draws a progress bar.
    model = transformers.ViTForImageClassification(config)
    save_file(model.state_dict(), folder / "model.safetensors")
    config.architectures = [type(model).__name__]
    config.to_json_file(folder / "config.json")
    size = {"height": _SIDE, "width": _SIDE}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _images(indices: Sequence[int]) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (len(indices), _SIDE, _SIDE, 3), np.uint8)
    return [Image.fromarray(one) for one in noise]
