"""From an answer to the model: the Hub's page of just this commit, and code that computes this logit as it was probed.

What an index says is untrusted: names and settings enter the code as Python literals alone, and what is no name of a
repository, commit or class is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from probelog.errors import QueryError

# The public Hub, for indexes that do not say which one was listed.
HUB = "https://huggingface.co"

_REPO = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_MODEL_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{0,60}ForImageClassification[A-Za-z0-9]{0,40}")
_PROCESSOR_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{0,60}ImageProcessor(Pil)?")
_SETTING = re.compile(r"[a-z][a-z_]{0,40}")
_PRECISIONS = ("float32", "bfloat16", "float16")
_LONGEST_RECIPE = 20_000
_LONGEST_LABEL = 100
# Settings of timm's transform (`probelog.models.preprocessing`).
_TIMM_SETTINGS = {"input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"}
_SINGLE_VALUES = (str, int, float, bool, type(None))


def commit_url(endpoint: str | None, repo: str, sha: str) -> str:
    """The Hub's page of one commit of a repository."""
    return f"{endpoint or HUB}/{quote(repo, safe='/')}/tree/{quote(sha, safe='')}"


def snippet_of(
    model: Mapping[str, Any], endpoint: str | None, logit: int, label: str, negated: bool, image: str
) -> str:
    """Python code that loads one model and prints one of its logits of an image.

    Args:
        model: its row of the index.
        endpoint: of the Hub that was listed; None: not known.
        logit: number of the logit.
        label: as it is declared.
        negated: whether the answer was the opposite of the logit's concept.
        image: path of the image.

    Raises:
        QueryError: the index does not say how the model was run, or says what no index does.
    """
    repo, sha = model["repo"], model["sha"]
    if not isinstance(sha, str) or not _REPO.fullmatch(repo) or not _COMMIT.fullmatch(sha):
        raise QueryError(
            f"{repo!r:.120} at {sha!r:.80} is no commit that a Hub has: there is no code to load it"
        )
    recipe, precision = _recipe(model), model["precision"]
    if precision not in _PRECISIONS:
        raise _unknown(repo, f"it was run in {precision!r:.40}")
    wrapped = recipe["library"] == "timm" and model["model_type"] == "timm_wrapper"
    by_timm = recipe["library"] == "timm" and not wrapped
    imports = ["import torch", "from PIL import Image, ImageOps"]
    classes = []
    if by_timm:
        imports.insert(0, "import timm")
        load = [f"model = timm.create_model({f'hf-hub:{repo}@{sha}'!r}, pretrained=True).eval()"]
    else:
        name = "TimmWrapperForImageClassification" if wrapped else model["architecture"]
        if not _MODEL_CLASS.fullmatch(name or ""):
            raise _unknown(repo, f"its class is {name!r:.80}")
        classes.append(name)
        load = [
            f"model = {name}.from_pretrained(",
            f"    {repo!r}, revision={sha!r}, dtype=torch.float32, use_safetensors=True",
            ").eval()",
        ]
    if recipe["library"] == "timm":
        imports.append("from timm.data import create_transform")
        prepare = _call("transform = create_transform", {**recipe["settings"], "is_training": False})
        mode = "L" if recipe["input"][0] == 1 else "RGB"
        pixels = "transform(image).unsqueeze(0)"
    else:
        classes.append(recipe["processor"])
        prepare = _call(f"processor = {recipe['processor']}", recipe["settings"])
        mode = "RGB"
        pixels = 'processor(images=image, return_tensors="pt")["pixel_values"]'
    if classes:
        imports.append(f"from transformers import {', '.join(sorted(classes))}")
    declared = "" if recipe["declared"] else ", the default of its kind: the repository declares none"
    square = [
        "edge = min(image.size)  # every picture must come out at one size",
        "left, top = (image.width - edge) // 2, (image.height - edge) // 2",
        "image = image.crop((left, top, left + edge, top + edge))",
    ]
    context = "torch.inference_mode()"
    to = move = ""
    if precision != "float32":
        load.append('device = "cuda" if torch.cuda.is_available() else "cpu"')
        context += f", torch.autocast(device, torch.{precision})"
        to, move = ".to(device)", ".to(device)"
    output = "" if by_timm else ".logits"
    if model["architecture"] == "PPLCNetForImageClassification":
        output = ".last_hidden_state"  # where this class returns its logits
    lines = [
        f"# Logit {logit} of {repo}, declared as {label[:_LONGEST_LABEL]!r}.",
        *(["# The answer was its opposite: the lower this logit, the more."] if negated else []),
        *([f"# The Hub that was listed: HF_ENDPOINT={endpoint}"] if endpoint not in (None, HUB) else []),
        *imports,
        "",
        *load,
        f"# The preprocessing that was probed{declared}.",
        *prepare,
        f'image = ImageOps.exif_transpose(Image.open({image!r})).convert("{mode}")',
        *(square if recipe["square"] else []),
        f"pixels = {pixels}{move}",
        f"with {context}:",
        f"    logit = model{to}(pixels){output}[0, {logit}].item()",
        "print(logit)",
    ]
    return "\n".join(lines) + "\n"


def _call(function: str, arguments: Mapping[str, Any]) -> list[str]:
    """A call with keyword arguments, which are plain values."""
    return [f"{function}(", *(f"    {name}={value!r}," for name, value in arguments.items()), ")"]


def _recipe(model: Mapping[str, Any]) -> dict[str, Any]:
    """How the model's images were made, checked: settings of plain values."""
    repo, text = model["repo"], model["recipe"]
    if text is None:
        raise QueryError(
            f"this index does not say how {repo} was run: it was published by an older version. Publish it again, or see "
            "the repository's own page"
        )
    try:
        recipe = json.loads(text[: _LONGEST_RECIPE + 1])
        settings, shape = recipe["settings"], recipe["input"]
        sound = (
            all(_SETTING.fullmatch(name) and _is_plain(value) for name, value in settings.items())
            and all(type(edge) is int for edge in shape)
            and len(shape) == 3
            and type(recipe["declared"]) is type(recipe["square"]) is bool
            and (
                settings.keys() == _TIMM_SETTINGS
                if recipe["library"] == "timm"
                else _PROCESSOR_CLASS.fullmatch(recipe["processor"]) and recipe["library"] == "transformers"
            )
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise _unknown(repo, "its preprocessing is none that ProbeLog knows")
    return dict(recipe)


def _is_plain(value: object, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < 1 and all(
            isinstance(name, str) and _SETTING.fullmatch(name) and _is_plain(item, 1)
            for name, item in value.items()
        )
    if isinstance(value, list):
        return depth < 1 and all(_is_plain(item, 1) for item in value)
    return isinstance(value, _SINGLE_VALUES) and not (isinstance(value, float) and not math.isfinite(value))


def _unknown(repo: str, reason: str) -> QueryError:
    return QueryError(f"there is no code that runs {repo} as it was probed: {reason}")
