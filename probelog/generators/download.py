"""Which files of a generator's repository are fetched: those that its parts are read from, and no others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators.layout import (
    ADAPTER_CONFIG,
    CONFIG,
    MODEL_INDEX,
    PIPELINES,
    ROLES,
    SCHEDULER_CONFIG,
    Layout,
    layout_of,
    pickle_name,
    weights_stem,
)
from probelog.generators.parts.tokenizer import FILES as TOKENIZER_FILES
from probelog.generators.prompts import CARD
from probelog.hub.client import HubClient
from probelog.hub.download import Download, Downloaded, DownloadLimits, download_files
from probelog.storage.schemas import CatalogueRow
from probelog.weights.repository import read_json


def download_generator(
    client: HubClient,
    row: CatalogueRow,
    folder: Path,
    *,
    limits: DownloadLimits,
    allow_pickle: bool = False,
    check: Callable[[], None] | None = None,
) -> Downloaded:
    """Fetch a generator; as `probelog.hub.download.download_model`, with these reasons besides: not-a-generator,
    unsupported, remote-code, corrupt-config.
    """

    def fetch(download: Download) -> None:
        layout = _layout(download)
        small, weights = needed_files(layout, download.listed, allow_pickle)
        download.check_sizes([*small, *weights])
        for name in small:
            download.fetch_json(name)
        for name in weights:
            download.fetch_weights(name)

    return download_files(client, row, folder, fetch, limits=limits, check=check)


def _layout(download: Download) -> Layout:
    def read(name: str) -> Mapping[str, Any]:
        download.fetch_json(name)
        config = read_json(download.folder, name)
        assert config is not None  # just fetched
        return config

    return layout_of(download.listed, read)


def needed_files(layout: Layout, names: Collection[str], allow_pickle: bool) -> tuple[list[str], list[str]]:
    """The small files to fetch of those that a repository holds, and the weights, each a file or an index of shards.

    Raises:
        ItemFailure: unsafe-format or not-found.
    """
    if layout.pipeline == "lora":
        return [name for name in (ADAPTER_CONFIG, CARD) if name in names], [layout.folders["adapter"]]
    if layout.pipeline == "gallery":
        return [], list(layout.folders.values())
    small: list[str] = []
    weights: list[str] = []
    for role, folder in layout.folders.items():
        for name in _SMALL.get(role, (CONFIG,)):
            path = _path(folder, name)
            if path in names and (folder or name != CONFIG):
                small.append(path)
        if role not in _WITHOUT_WEIGHTS:
            weights.append(_weights(folder, role, names, allow_pickle))
    return small, weights


def foreseen_files(names: Collection[str], allow_pickle: bool) -> list[str]:
    """Names of all files that will be fetched, as far as the names of those that a repository holds tell: folders say which
    parts a pipeline has, and a network alone is taken for a decoder.

    Raises:
        ItemFailure: not-a-generator, unsupported, unsafe-format or not-found.
    """
    if MODEL_INDEX in names:
        held = {name.partition("/")[0] for name in names if "/" in name}.intersection(ROLES)
        if not any(held == set(parts) for parts in PIPELINES.values()):
            raise ItemFailure(
                FailureReason.UNSUPPORTED,
                f"no pipeline that is run has these parts: {', '.join(sorted(held))}",
            )
        layout, first = Layout("", {role: role for role in ROLES if role in held}), [MODEL_INDEX]
    else:
        layout = layout_of(names, lambda _: {"_class_name": "AutoencoderKL"})
        first = [CONFIG] if layout.pipeline == "AutoencoderKL" else []
    small, weights = needed_files(layout, names, allow_pickle)
    indexed = [
        f"{name.removesuffix('.safetensors.index.json')}-" for name in weights if name.endswith(".json")
    ]
    shards = [name for name in names if name.startswith(tuple(indexed)) and name.endswith(".safetensors")]
    return [*first, *small, *weights, *shards]


_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2")
_SMALL = {"scheduler": (SCHEDULER_CONFIG,), **dict.fromkeys(("tokenizer", "tokenizer_2"), TOKENIZER_FILES)}


def _path(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _weights(folder: str, role: str, names: Collection[str], allow_pickle: bool) -> str:
    stem = weights_stem(role)
    choices = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors"]
    if allow_pickle:
        choices.append(pickle_name(stem))
    for choice in choices:
        if _path(folder, choice) in names:
            return _path(folder, choice)
    pickles = sorted(_pickles(folder, names))
    if pickles:
        raise ItemFailure(
            FailureReason.UNSAFE_FORMAT,
            f"weights of {role} only as pickle ({pickles[0][:100]}), which can run code when loaded",
        )
    raise ItemFailure(FailureReason.NOT_FOUND, f"{role} has no {choices[0]}")


def _pickles(folder: str, names: Collection[str]) -> Iterable[str]:
    for name in names:
        if name.rpartition("/")[0] == folder and name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            yield name
