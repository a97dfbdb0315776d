"""A publisher of small generations as a process of its own: ``python -m tests.support.processes.publisher URI ENCODER FIRST COUNT``.

ENCODER is a folder that ``save_encoder`` wrote: a process without torch starts in a second. Every fact of a generation says its number: names, labels, licences. With ``--ask`` it says "built" before each swap
and waits for a line.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace

from probelog.errors import IndexNotFoundError, ProbeLogError
from probelog.index.pointer import Pointer, read_pointer
from probelog.publication.lifecycle import discard, go_live, sweep
from probelog.storage.store import Store
from tests.support.worlds.small_index import Model, TextFiles, build

MODELS = 3
LOGITS = 2


def models(tag: str) -> list[Model]:
    """Models that say which generation they belong to."""
    labels = tuple(f"{tag} {i}" for i in range(LOGITS))
    return [Model(f"{tag}/model-{i}", labels, licence=tag) for i in range(MODELS)]


def save_encoder(folder: Path) -> Path:
    """Write a tiny text encoder for publishers to use."""
    from tests.support.worlds import tiny_encoders

    files = tiny_encoders.text_files("dual")
    folder.mkdir(parents=True)
    (folder / "encoder.onnx").write_bytes(files.onnx)
    (folder / "tokenizer.json").write_text(files.tokenizer_json)
    (folder / "settings.json").write_text(json.dumps(files.settings))
    return folder


def load_encoder(folder: Path) -> TextFiles:
    """Read it."""
    return SimpleNamespace(
        onnx=(folder / "encoder.onnx").read_bytes(),
        tokenizer_json=(folder / "tokenizer.json").read_text(),
        settings=json.loads((folder / "settings.json").read_text()),
    )


def publish(index: Store, encoder: TextFiles, tag: str, ask: bool = False) -> Pointer:
    """Build, go live, sweep: what a publisher does, in its order."""
    try:
        seen = read_pointer(index)[0].choice
    except IndexNotFoundError:
        seen = []
    name = f"{tag}-{secrets.token_hex(4)}"
    build(index, name, models(tag), "dual", images=False, live=False, seed=int(tag[1:]), files=encoder)
    if ask:
        print("built", flush=True)
        sys.stdin.readline()
    try:
        pointer = go_live(index, name, f"source of {tag}", expected_choice=seen)
    except ProbeLogError:
        discard(index, name)
        raise
    sweep(index)
    return pointer


def main(uri: str, encoder: str, first: int, count: int, ask: bool) -> None:
    """Publish so many, one after the other."""
    index, files = Store(uri), load_encoder(Path(encoder))
    for number in range(first, first + count):
        try:
            print(publish(index, files, f"g{number}", ask).generation, flush=True)
        except ProbeLogError as error:
            sys.exit(f"{error}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), "--ask" in sys.argv)
