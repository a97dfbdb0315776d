"""Code that loads an indexed model: what it says, and that nothing that an index says can become code."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest

from probelog.errors import QueryError
from probelog.search.snippet import HUB, commit_url, snippet_of

SHA = "0123456789abcdef0123456789abcdef01234567"
PROCESSOR = {
    "library": "transformers",
    "processor": "ViTImageProcessorPil",
    "settings": {"do_resize": True, "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5]},
    "declared": True,
    "input": [3, 32, 32],
    "gain": None,
    "offset": None,
    "square": False,
}
TIMM = PROCESSOR | {
    "library": "timm",
    "processor": "timm.data.create_transform",
    "settings": {
        "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
        "mean": [0.5], "std": [0.5],
    },
}  # fmt: skip
MODEL = {
    "repo": "ada/vit",
    "sha": SHA,
    "architecture": "ViTForImageClassification",
    "model_type": "vit",
    "precision": "float32",
    "recipe": json.dumps(PROCESSOR),
}


def code(label: str = "dog", negated: bool = False, image: str = "a.jpg", **changes: Any) -> str:
    recipe = json.loads(MODEL["recipe"]) | changes.pop("recipe", {})
    return snippet_of(MODEL | {"recipe": json.dumps(recipe)} | changes, None, 3, label, negated, image)


def test_of_transformers() -> None:
    tree = ast.parse(code())
    imports = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imports == {"Image", "ImageOps", "ViTForImageClassification", "ViTImageProcessorPil"}
    load = calls(tree, "from_pretrained")
    assert load == {"": ["ada/vit"], "revision": SHA, "use_safetensors": True}
    assert calls(tree, "ViTImageProcessorPil") == {"": [], **PROCESSOR["settings"]}
    assert "logits[0, 3]" in code()
    assert "autocast" not in code()


def calls(tree: ast.Module, name: str) -> dict[str, Any]:
    """Literal arguments of the one call of a function."""
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name
    )
    literal = {
        item.arg or "": item.value for item in call.keywords if not isinstance(item.value, ast.Attribute)
    }
    return {"": [ast.literal_eval(item) for item in call.args]} | {
        name: ast.literal_eval(value) for name, value in literal.items()
    }


def test_of_timm_and_of_its_wrapper() -> None:
    own = code(recipe=TIMM, architecture="resnet18", model_type=None)
    assert calls(ast.parse(own), "create_model") == {"": [f"hf-hub:ada/vit@{SHA}"], "pretrained": True}
    assert calls(ast.parse(own), "create_transform") == {"": [], **TIMM["settings"], "is_training": False}
    assert "transformers" not in own
    wrapped = code(recipe=TIMM, architecture="resnet18", model_type="timm_wrapper")
    assert "TimmWrapperForImageClassification.from_pretrained" in wrapped
    assert "create_transform" in wrapped
    assert 'convert("L")' in code(
        recipe=TIMM | {"input": [1, 32, 32]}, architecture="resnet18", model_type=None
    )


def test_what_was_probed_otherwise() -> None:
    assert "torch.autocast(device, torch.bfloat16)" in code(precision="bfloat16")
    assert "image.crop" in code(recipe={"square": True})
    assert "the repository declares none" in code(recipe={"declared": False})
    assert ".last_hidden_state[0, 3]" in code(architecture="PPLCNetForImageClassification")
    assert "its opposite" in code(negated=True)
    here = snippet_of(MODEL, "http://127.0.0.1:1234", 0, "x", False, "a.jpg")
    assert "HF_ENDPOINT=http://127.0.0.1:1234" in here
    for text in (code(precision="float16"), code(recipe={"square": True}), here):
        compile(text, "snippet", "exec")


NASTY = '\'"\\\n\r\u2028\u202e"""; import os; os.system(\'x\') #'


def test_texts_stay_texts() -> None:
    """Labels and paths are literals on one line; nothing that reorders a line is in it."""
    plain, nasty = code(label="dog"), code(label=NASTY, image=NASTY)
    assert len(nasty.splitlines()) == len(plain.splitlines())
    assert "\u202e" not in nasty
    shape = [type(node) for node in ast.walk(ast.parse(nasty))]
    assert shape == [type(node) for node in ast.walk(ast.parse(plain))]
    assert calls(ast.parse(nasty), "open") == {"": [NASTY]}


@pytest.mark.parametrize(
    "changes",
    [
        {"repo": NASTY},
        {"repo": "../../etc"},
        {"repo": "ada/vit@main"},
        {"repo": "a/b/c"},
        {"sha": "main"},
        {"sha": f"{SHA}'"},
        {"architecture": "pipeline"},
        {"architecture": "ViTForImageClassification, os"},
        {"architecture": None},
        {"precision": "float64"},
        {"precision": None},
        {"recipe": {"processor": "ViTImageProcessor(x)"}},
        {"recipe": {"processor": "AutoModel"}},
        {"recipe": {"settings": {"a=print(1), b": 1}}},
        {"recipe": {"settings": {"size": float("nan")}}},
        {"recipe": {"settings": {"size": {"height": {"deeper": 1}}}}},
        {"recipe": {"settings": {"size": {"a b": 1}}}},
        {"recipe": {"settings": [1]}},
        {"recipe": {"input": [3, "x", 32]}},
        {"recipe": {"input": None}},
        {"recipe": {"square": "yes"}},
        {"recipe": {"library": "os"}},
        {"recipe": {"library": "timm"}},
        {"recipe": TIMM | {"settings": TIMM["settings"] | {"is_training": True}}},
    ],
    ids=str,
)
def test_what_no_index_says_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(QueryError, match="there is no code"):
        code(**changes)


@pytest.mark.parametrize("recipe", ["", "[]", "{}", "null", "[" * 100_000, "{" + " " * 30_000 + "}"])
def test_recipes_that_are_none(recipe: str) -> None:
    with pytest.raises(QueryError, match="its preprocessing is none"):
        snippet_of(MODEL | {"recipe": recipe}, None, 0, "x", False, "a.jpg")


def test_an_older_index() -> None:
    with pytest.raises(QueryError, match="published by an older version"):
        snippet_of(MODEL | {"recipe": None}, None, 0, "x", False, "a.jpg")


def test_pages_of_commits() -> None:
    assert commit_url(None, "ada/vit", SHA) == f"{HUB}/ada/vit/tree/{SHA}"
    assert commit_url("http://127.0.0.1:80/hub", 'a"/<b>', "x/../y") == (
        "http://127.0.0.1:80/hub/a%22/%3Cb%3E/tree/x%2F..%2Fy"
    )
