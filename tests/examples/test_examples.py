"""The scripts of examples/ do what they say."""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import probelog
from tests.compatibility.make import KEPT
from tests.support.paths import CHECKOUT

if TYPE_CHECKING:
    from tests.support.worlds.tiny_world import Indexed


def main_of(name: str) -> Callable[..., None]:
    main: Callable[..., None] = runpy.run_path(str(CHECKOUT / "examples" / name))["main"]
    return main


def test_ask_an_index(indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("ask_an_index.py")(str(indexed.store), "dog")
    told = capsys.readouterr().out
    best = probelog.open_index(indexed.store).search("dog", k=1)[0]
    assert f"1. {best.repo}#{best.logit}" in told
    assert f"{best.repo} ({best.library} {best.architecture}):" in told


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell, in their order, as a notebook runs them; upon the kept index, which is there at once."""
    monkeypatch.setenv("PROBELOG_INDEX", str(KEPT / probelog.__version__ / "store"))
    notebook = json.loads((CHECKOUT / "examples" / "notebook.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "the notebook is kept without outputs"
            exec("".join(cell["source"]), names)
    told = capsys.readouterr().out
    assert "4 models" in told
    assert "\nowl -> " in told
    assert asyncio.run(names["ask"]([])) == []
    assert [len(answer) for answer in names["answers"]] == [3, 3, 3, 3]
    with pytest.raises(probelog.ProbeLogError, match="is closed"):
        names["index"].search("dog")


@pytest.mark.acceptance
def test_index_a_folder(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, store = tmp_path / "hub", tmp_path / "store"
    for repo in ("ada/resnet", "cleo/timm-half"):
        shutil.copytree(indexed.world.hub / repo, folder / repo)
    config = indexed.world.config_file(tmp_path / "job.toml", store)
    monkeypatch.setenv("HF_ENDPOINT", "")  # the script sets it; undone after the test
    main_of("index_a_folder.py")(str(folder), str(config))
    assert str(store) in capsys.readouterr().out
    assert probelog.open_index(store).models == 2


def test_evaluate(indexed: Indexed, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("evaluate.py")(str(indexed.store), str(indexed.world.truth))
    assert "highest mean average precision" in capsys.readouterr().out
