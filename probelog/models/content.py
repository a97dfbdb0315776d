"""What a worker knows by itself of a downloaded model, without believing the process that ran it.

A model's process says what the model is, and the model may have taken the process over. So that none can pass for
another, whose observations would then be copied, its word counts together with what the worker downloaded and verified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from probelog.errors import ItemFailure
from probelog.weights.repository import read_json

_CONFIG = "config.json"
#: Keys of a configuration that decide no logit, and that a re-upload has its own of: the rest is compared.
NAMES_AND_LABELS = frozenset(
    {
        "_commit_hash", "_name_or_path", "id2label", "label2id", "label_descriptions", "label_names",
        "transformers_version",
    }
)  # fmt: skip


def content_digest(folder: Path, digests: Mapping[str, str]) -> str:
    """Equal for downloads that are the same, byte for byte, but for names and labels in the configuration.

    Args:
        folder: of the download.
        digests: SHA-256 of each of its files, by name.
    """
    contents = dict(digests)
    try:
        config = read_json(folder, _CONFIG)
    except ItemFailure:  # then by its bytes; whoever runs the model tells what is wrong with it
        config = None
    if config is not None:
        kept = {key: value for key, value in config.items() if key not in NAMES_AND_LABELS}
        contents[_CONFIG] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(json.dumps(sorted(contents.items())).encode()).hexdigest()
