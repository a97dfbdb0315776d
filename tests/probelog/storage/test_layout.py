"""The list of a store's paths in the documentation, the module that spells them, and what a store really holds agree."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from probelog.storage import layout
from tests.compatibility.make import KEPT
from tests.support.paths import CHECKOUT

_FOLDERS = [kind for _, kind in inspect.getmembers(layout, inspect.isclass) if hasattr(kind, "of")]


@pytest.fixture(scope="module")
def documented() -> list[str]:
    page = (CHECKOUT / "docs/architecture.md").read_text()
    block = page.split("## The store")[1].split("```text\n")[1].split("```")[0]
    return [line.split()[0] for line in block.splitlines()]


def filled(function: object) -> str:
    """The path that a function gives for arguments that are their own names."""
    assert callable(function)
    names = [name.upper() for name in inspect.signature(function).parameters]
    assert names, "what takes no argument is a property"
    return str(
        function(*({"SET_HASH": "HASH", "ENCODER_DIGEST": "ENCODER"}.get(name, name) for name in names))
    )


def spelled() -> Iterator[str]:
    """All paths of files that the module gives."""
    for kind in _FOLDERS:
        folder = kind.of(
            "HASH"
            if kind is layout.ProbeSetFolder
            else "GENERATION"
            if kind is layout.GenerationFolder
            else "KEY"
        )
        for name, member in inspect.getmembers(kind):
            if name.startswith("_") or name in ("of", "file", "key", "path"):
                continue
            path = getattr(folder, name) if isinstance(member, property) else filled(getattr(folder, name))
            if kind is layout.ProbeSetFolder and not path.startswith(folder.path):
                path = folder.file(path)
            if re.search(r"\.\w+$", path):  # not a folder
                yield f"{layout.INDEX}/{path}" if kind is layout.GenerationFolder else path
    yield filled(layout.made_probe_set)
    yield filled(layout.report)
    yield filled(layout.run_figures)
    yield filled(layout.tree_weights)
    yield filled(layout.sample_ledger)
    yield layout.ProbeSetFolder.of("HASH").file(layout.THUMBNAILS)
    yield from map(
        layout.EncoderFolder.of("KEY").file, (layout.TEXT_ENCODER, layout.TOKENIZER, layout.IMAGE_ENCODER)
    )
    yield f"{layout.INDEX}/{layout.POINTER}"
    yield layout.LEASE


def test_the_documentation_lists_what_the_module_spells(documented: list[str]) -> None:
    assert sorted(documented) == sorted(spelled())


@pytest.mark.parametrize("kept", sorted(KEPT.iterdir()), ids=lambda kept: kept.name)
def test_a_store_holds_nothing_else(documented: list[str], kept: Path) -> None:
    patterns = [re.compile(re.sub("[A-Z]+", "[^/]+", re.escape(path)) + "(/.*)?") for path in documented]
    for file in (kept / "store").rglob("*"):
        if file.is_file():
            name = file.relative_to(kept / "store").as_posix()
            assert any(pattern.fullmatch(name) for pattern in patterns), name


def test_a_folder_by_its_key_and_by_its_path() -> None:
    assert layout.LedgerFolder.of("a") == layout.LedgerFolder("observations/a")
    assert [layout.LedgerFolder(path).key for path in ("observations/a", "x/y/z", "l")] == ["a", "z", "l"]
    assert layout.ProbeSetFolder.of("0123456789abcdef" * 4).key == "0123456789abcdef"
    assert layout.CatalogueFolder.of("k").part("run", "rows", 7) == "catalogue/k/run/rows-00007.parquet"


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("20260101T000000-0a1b2c3d", True), ("first", True), ("x" * 100, True), ("x" * 101, False), ("", False),
        ("../other", False), (".hidden", False), ("a/b", False), ("a\n", False), (7, False), (None, False),
    ],
)  # fmt: skip
def test_names_of_generations(name: object, valid: bool) -> None:
    assert layout.is_generation_name(name) == valid
