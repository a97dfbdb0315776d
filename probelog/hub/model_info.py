"""The Hub's JSON about a model as a typed row. All of it is untrusted."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from probelog.errors import FailureReason, ItemFailure
from probelog.hub.client import SHA_PATTERN
from probelog.hub.huggingface import is_repo_id
from probelog.storage.schemas import RELATIONS, CatalogueRow, Parent, RepoFile, clean_unicode

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
#: Weights of a pipeline's parts; the second counts where there is none of the first. Beside them may lie averages, and single
#: files of the whole.
PART_WEIGHTS = tuple(
    rf"(unet|transformer|vae|vqvae|text_encoder(_2)?)/(diffusion_pytorch_)?model{half}(-\d{{5}}-of-\d{{5}})?\.safetensors"
    for half in ("", r"\.fp16")
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_MOST_TAGS, _LONGEST_TAG = 500, 200
_MOST_LABELS, _LONGEST_LABEL = 25_000, 500
_MOST_FILES, _LONGEST_PATH = 1_000, 500
_MOST_PARENTS = 20
_PARENT_TAG = "base_model:"
_MOST_LICENCES = 20
_LICENCE_TAG = "license:"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Bytes per element of safetensors' types; 1 for types not named here, so that estimates are rather too low.
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}


def read_row(item: object) -> CatalogueRow:
    """One row of the Hub's JSON as a typed row. Values that are missing or of the wrong type become None or empty.

    Args:
        item: a model as the Hub lists it.

    Raises:
        ItemFailure: malformed-row: the row has no valid id or commit.
    """
    listed, repo, sha = _identified(item)
    card, config = _mapping(listed.get("cardData")), _mapping(listed.get("config"))
    tags, files = _tags(listed), read_files(listed.get("siblings"))
    licences = _licences(card, tags)
    return CatalogueRow(
        repo=repo,
        sha=sha,
        library=_text(listed.get("library_name")) or _text(card.get("library_name")) or _library(tags),
        pipeline_tag=_text(listed.get("pipeline_tag")),
        parameters=_parameters(listed),
        licence=next(iter(licences), None),
        licences=licences,
        last_modified=_time(listed.get("lastModified")),
        gated=_is_gated(listed),
        disabled=_is_disabled(listed),
        weight_bytes=_weight_bytes(files, listed),
        model_type=_text(config.get("model_type")),
        architecture=_text(_first(config.get("architectures"))) or _text(config.get("architecture")),
        files=files,
        tags=tags,
        downloads=_count(listed.get("downloads")),
        likes=_count(listed.get("likes")),
        labels=_labels(config),
        created_at=_time(listed.get("createdAt")),
        parents=_parents(repo, card, config, tags),
        base_model=_text(_first(card.get("base_model"))) or _tagged(tags, "base_model:"),
    )


def read_brief_row(item: object, fields: Container[str]) -> CatalogueRow:
    """Of `read_row` what filters look at, and whether the repository is open: a third of the time.

    Args:
        item: a model as the Hub lists it.
        fields: that the Hub was asked for. Without ``cardData`` no licence is read, without ``safetensors`` no size.

    Raises:
        ItemFailure: as `read_row`.
    """
    listed, repo, sha = _identified(item)
    library = _text(listed.get("library_name"))
    licences, parameters, weight_bytes = list[str](), None, None
    if library is None or "cardData" in fields:
        card, tags = _mapping(listed.get("cardData")), _tags(listed)
        library = library or _text(card.get("library_name")) or _library(tags)
        licences = _licences(card, tags)
    if "safetensors" in fields:
        parameters, weight_bytes = _parameters(listed), _weight_bytes([], listed)
    return CatalogueRow(
        repo,
        sha,
        library,
        pipeline_tag=_text(listed.get("pipeline_tag")),
        parameters=parameters,
        licences=licences,
        last_modified=_time(listed.get("lastModified")),
        gated=_is_gated(listed),
        disabled=_is_disabled(listed),
        weight_bytes=weight_bytes,
    )


def _identified(item: object) -> tuple[dict[str, Any], str, str]:
    """A row with its repository and commit."""
    if not isinstance(item, dict):
        raise ItemFailure(FailureReason.MALFORMED_ROW, f"a {type(item).__name__} in place of a model")
    repo, sha = item.get("id"), item.get("sha")
    if not isinstance(repo, str) or not is_repo_id(repo):
        raise ItemFailure(FailureReason.MALFORMED_ROW, f"{excerpt(repo)} cannot be a repository's id")
    if not isinstance(sha, str) or not SHA_PATTERN.fullmatch(sha):
        raise ItemFailure(FailureReason.MALFORMED_ROW, f"{excerpt(sha)} cannot be a commit")
    return item, repo, sha


def _tags(listed: Mapping[str, Any]) -> list[str]:
    return [tag for value in _list(listed.get("tags"))[:_MOST_TAGS] if (tag := _text(value, _LONGEST_TAG))]


def _is_gated(listed: Mapping[str, Any]) -> bool:
    return listed.get("gated") not in (None, False)


def _is_disabled(listed: Mapping[str, Any]) -> bool:
    return listed.get("disabled") is True


def _licences(card: Mapping[str, Any], tags: list[str]) -> list[str]:
    """The licences of the model card, or else of the tags; a card names one or a list of them."""
    declared = card.get("license")
    named = [
        _text(name) for name in (declared if isinstance(declared, list) else [declared])[:_MOST_LICENCES]
    ]
    tagged = [tag.removeprefix(_LICENCE_TAG) for tag in tags if tag.startswith(_LICENCE_TAG)][:_MOST_LICENCES]
    return list(dict.fromkeys(filter(None, named))) or list(dict.fromkeys(filter(None, tagged)))


def _parents(repo: str, card: Mapping[str, Any], config: Mapping[str, Any], tags: list[str]) -> list[Parent]:
    """The declared parents of a model, each once for every place that names it (card, tag, adapter, config)."""
    declared = card.get("base_model")
    declared_relation = card.get("base_model_relation")
    relation = (
        declared_relation
        if isinstance(declared_relation, str) and declared_relation in RELATIONS
        else "unknown"
    )
    candidates: list[tuple[object, str, str]] = [
        (name, relation, "card")
        for name in (declared if isinstance(declared, list) else [declared])[:_MOST_PARENTS]
    ]
    for tag in tags:
        if tag.startswith(_PARENT_TAG):
            kind, _, name = tag.removeprefix(_PARENT_TAG).partition(":")
            if kind in RELATIONS:
                candidates.append((name, kind, "tag"))
    candidates.append((_mapping(config.get("peft")).get("base_model_name_or_path"), "adapter", "adapter"))
    candidates.append((config.get("_name_or_path"), "unknown", "config"))
    return _other_repositories(repo, candidates)


def add_configured_parent(repo: str, listed: Sequence[Parent], name_or_path: str | None) -> list[Parent]:
    """The parents that a listing declares, and the older ``_name_or_path`` of the model's own configuration.

    The Hub leaves it out of its excerpt of the configuration, so it is known only of models that were downloaded.
    """
    candidates = [(parent.repo, parent.relation, parent.source) for parent in listed]
    return _other_repositories(repo, [*candidates, (name_or_path, "unknown", "config")])


def _other_repositories(repo: str, candidates: Iterable[tuple[object, str, str]]) -> list[Parent]:
    # Other values are paths on the uploader's disk.
    parents = [
        Parent(name, kind, source)
        for name, kind, source in candidates
        if isinstance(name, str) and name != repo and len(name) <= _LONGEST_TAG and is_repo_id(name)
    ]
    return list(dict.fromkeys(parents))[:_MOST_PARENTS]


def weights(files: list[RepoFile]) -> list[RepoFile]:
    """The files with a model's weights: those of a pipeline's parts; else one safetensors file, its shards, or a pickle.

    Empty without any. The order of preference is that of transformers and timm.
    """
    for pattern in PART_WEIGHTS:
        if parts := [file for file in files if re.fullmatch(pattern, file.path, re.ASCII)]:
            return parts
    at_root = {file.path: file for file in files}
    if SAFETENSORS in at_root:
        return [at_root[SAFETENSORS]]
    if shards := [file for path, file in at_root.items() if _SHARD.fullmatch(path)]:
        return shards
    return [at_root[PICKLE]] if PICKLE in at_root else []


def _weight_bytes(files: list[RepoFile], item: Mapping[str, Any]) -> int | None:
    """Bytes of a model's weights: the sizes of its files, else an estimate from parameter counts; None: unknown."""
    sizes = [file.size for file in weights(files)] if files else []
    if sizes and (known := [size for size in sizes if size is not None]) and len(known) == len(sizes):
        return _count(sum(known))
    counts = _mapping(_mapping(item.get("safetensors")).get("parameters"))
    return _count(sum((_count(count) or 0) * _WIDTHS.get(kind, 1) for kind, count in counts.items())) or None


def read_files(entries: object) -> list[RepoFile]:
    """Files of a listing (``rfilename``) or of a tree (``path``), at most 1,000, those at the root first."""
    files = []
    for entry in _list(entries):
        if not isinstance(entry, dict) or entry.get("type", "file") != "file":
            continue
        path = entry.get("rfilename", entry.get("path"))
        if isinstance(path, str) and 0 < len(path) <= _LONGEST_PATH:
            files.append(RepoFile(clean_unicode(path), _count(entry.get("size")), _sha256(entry.get("lfs"))))
    files.sort(key=lambda file: file.path.count("/"))
    return files[:_MOST_FILES]


def _sha256(lfs: object) -> str | None:
    if not isinstance(lfs, dict):
        return None
    digest = lfs.get("sha256", lfs.get("oid"))
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def _labels(config: Mapping[str, Any]) -> list[str]:
    """Declared labels in the order of their logits; empty unless there is one for each of 0, 1, ..."""
    names: list[Any] = _list(config.get("label_names"))
    if id2label := _mapping(config.get("id2label")):
        names = [id2label.get(str(logit)) for logit in range(min(len(id2label), _MOST_LABELS))]
    labels = [clean_unicode(name[:_LONGEST_LABEL]) for name in names[:_MOST_LABELS] if isinstance(name, str)]
    return labels if len(labels) == len(names) else []


def _parameters(item: Mapping[str, Any]) -> int | None:
    safetensors = _mapping(item.get("safetensors"))
    total = _count(safetensors.get("total"))
    if total is None:
        counts = [_count(count) for count in _mapping(safetensors.get("parameters")).values()]
        total = _count(sum(count for count in counts if count is not None)) or None
    return total


def _library(tags: list[str]) -> str | None:
    return next((name for name in ("timm", "transformers", "diffusers", "peft") if name in tags), None)


def _tagged(tags: list[str], prefix: str) -> str | None:
    values = (tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix))
    return next((value for value in values if value and ":" not in value), None)


def _time(value: object) -> dt.datetime | None:
    try:
        time = dt.datetime.fromisoformat(value) if isinstance(value, str) and len(value) < 50 else None
        return time.replace(tzinfo=time.tzinfo or dt.UTC).astimezone(dt.UTC) if time else None
    except (ValueError, OverflowError):
        return None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _text(value: object, longest: int = 200) -> str | None:
    return clean_unicode(value[:longest]) if isinstance(value, str) and value else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _first(value: object) -> object:
    return next(iter(value), None) if isinstance(value, list) else value


def excerpt(value: object) -> str:
    """Any value as a short printable text for a message."""
    if isinstance(value, str):
        return ascii(value[:100])
    return "nothing" if value is None else f"a {type(value).__name__}"
