"""A generation's settings are read from indexes that anybody may have published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

import probelog
from probelog.errors import StoreError
from probelog.index.settings import GenerationSettings, UpdateBase
from probelog.storage.store import Store
from tests.support.worlds import small_index

SETTINGS = small_index.some_settings(
    models=3, logits=7, sharpness=10.0, rows=6, large=False, middle_offset=0.5, probes=9
)
UPDATE = small_index.some_settings(
    models=3,
    logits=7,
    sharpness=10.0,
    rows=6,
    large=False,
    middle_offset=0.5,
    probes=9,
    base=UpdateBase("first", 2, 5),
    folded_in="d" * 16,
    added=1,
    gone=0,
    drift={"share": 0.5},
)


@pytest.mark.parametrize("settings", [SETTINGS, UPDATE], ids=["whole", "update"])
def test_what_was_written_is_read(settings: GenerationSettings) -> None:
    content = json.loads(settings.to_bytes())
    assert GenerationSettings.from_dict(content | {"of a later version": 1}, "here") == settings
    assert content == settings.to_dict()
    assert ("base" in content) == (settings is UPDATE)
    assert content["night"] is None


def test_errors_of_nothing_held_out() -> None:
    content = json.loads(small_index.some_settings(**_numbers(), held_out_rmse=float("nan")).to_bytes())
    read = GenerationSettings.from_dict(content, "here")
    assert read.held_out_rmse != read.held_out_rmse
    content["held_out_rmse"] = 0
    assert GenerationSettings.from_dict(content, "here").held_out_rmse == 0.0


ODD: list[tuple[str, Any, str]] = [
    ("models", -1, "a count"),
    ("models", True, "a count"),
    ("models", "3", "a count"),
    ("models", 2**60, "a count"),
    ("logits", 1.5, "a count"),
    ("fraction", 0, "a share above 0"),
    ("fraction", 1.1, "a share above 0"),
    ("sharpness", float("nan"), "a number above 0"),
    ("sharpness", 10**400, "a number above 0"),
    ("middle_offset", float("inf"), "a finite number"),
    ("middle_offset", float("-inf"), "a finite number"),
    ("middle_offset", -(10**400), "a finite number"),
    ("middle_offset", -1e300, "a finite number"),
    ("middle_offset", None, "a finite number"),
    ("held_out_rmse", 10**400, "an error"),
    ("held_out_rmse", -1.0, "an error"),
    ("large", 1, "true or false"),
    ("prompts", [], "a list of prompts"),
    ("prompts", "{}", "a list of prompts"),
    ("prompts", [1], "a list of prompts"),
    ("encoder", None, "a text"),
    ("watermark", 3, "a text"),
    ("text_encoder", None, "an object"),
    ("image_encoder", [], "an object"),
    ("run", {"models": 1}, "counts of models and of failures"),
    ("run", {"models": 1, "failures": {"timeout": -1}}, "counts of models and of failures"),
    ("run", {"models": 1, "failures": []}, "counts of models and of failures"),
    ("base", {"generation": "x", "models": 1}, "rows in its settings' base is missing"),
    ("base", "first", "its settings' base is no object"),
    ("confidence", {}, "confidence is incomplete"),
]


@pytest.mark.parametrize(("name", "value", "message"), ODD)
def test_values_that_make_no_sense(name: str, value: object, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        GenerationSettings.from_dict(SETTINGS.to_dict() | {name: value}, "here")


def test_a_missing_entry() -> None:
    content = SETTINGS.to_dict()
    del content["encoder_digest"]
    with pytest.raises(StoreError, match=r"^here is damaged: encoder_digest in its settings is missing"):
        GenerationSettings.from_dict(content, "here")
    with pytest.raises(StoreError, match="its settings is no object"):
        GenerationSettings.from_dict(cast("Any", []), "here")


def test_an_index_with_such_settings_is_not_opened(tmp_path: Path) -> None:
    built = small_index.build(Store(tmp_path), settings={"sharpness": float("inf")})
    with pytest.raises(StoreError, match="generation first is damaged: sharpness in its settings is inf"):
        probelog.open_index(built.store.uri)


def _numbers() -> dict[str, Any]:
    return {
        name: getattr(SETTINGS, name)
        for name in ("models", "logits", "sharpness", "rows", "large", "middle_offset", "probes")
    }
