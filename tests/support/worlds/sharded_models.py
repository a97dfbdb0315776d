"""Repositories that are no classifiers: language and diffusion models in several files, untrained and small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Tensors = dict[str, npt.NDArray[Any]]


def language_model(seed: int, layers: int = 2, width: int = 96, vocabulary: int = 500) -> Tensors:
    """The tensors of a decoder."""
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> npt.NDArray[np.float32]:
        return (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors: Tensors = {"model.embed_tokens.weight": matrix(vocabulary, width)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part in "qkvo":
            tensors[f"{name}.self_attn.{part}_proj.weight"] = matrix(width, width)
        tensors[f"{name}.mlp.up_proj.weight"] = matrix(4 * width, width)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(width, 4 * width)
        tensors[f"{name}.input_layernorm.weight"] = 1 + 0.1 * matrix(width)
    tensors["model.norm.weight"] = 1 + 0.1 * matrix(width)
    tensors["lm_head.weight"] = matrix(vocabulary, width)
    return tensors


def child(parent: Mapping[str, npt.NDArray[Any]], seed: int, step: float = 0.05) -> Tensors:
    """All weights moved by a share of their size."""
    random = np.random.default_rng(seed)
    return {
        name: (values + step * np.std(values) * random.normal(size=values.shape)).astype(values.dtype)
        for name, values in parent.items()
    }


def write(
    folder: Path, tensors: Mapping[str, npt.NDArray[Any]], shards: int = 1, stem: str = "model"
) -> None:
    """Weights in one file, or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors")
        return
    where = {}
    names = list(tensors)
    for number in range(shards):
        shard = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, folder / shard)
        where.update(dict.fromkeys(mine, shard))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
