"""Every hostile repository is refused for its reason, quickly and without memory; what loads has done no harm."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.inference.observe import observe
from probelog.models.loading import LoadLimits, load_classifier
from tests.support.hub import hostile
from tests.support.paths import CHECKOUT


def noise(indices: Sequence[int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in indices]


def load_and_run(folder: Path, name: str) -> None:
    classifier = load_classifier(folder)
    assert name in hostile.FOUND_BY_RUNNING
    observe(classifier, noise, range(4))


def test_every_hostile_repository_is_in_the_table() -> None:
    """docs/threat-model.md names each with the reason it gets."""
    text = (CHECKOUT / "docs" / "threat-model.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    listed = {row[0]: row[2] for row in rows if row[0] in hostile.REPOSITORIES}
    assert listed == {
        name: "loads" if reason is None else reason.value
        for name, (_, reason) in hostile.REPOSITORIES.items()
    }


@pytest.mark.parametrize("name", hostile.REPOSITORIES)
def test_hostile_repository(name: str, tmp_path: Path) -> None:
    build, reason = hostile.REPOSITORIES[name]
    folder = tmp_path / "repository"
    build(folder)
    start = time.monotonic()
    if reason is None:
        classifier = load_classifier(folder)
        assert classifier.logits == len(classifier.labels) == 3
        assert classifier.forward(torch.zeros(2, *classifier.recipe.shape)).shape == (2, 3)
    else:
        with pytest.raises(ItemFailure) as failure:
            load_and_run(folder, name)
        assert failure.value.reason is reason, failure.value.detail
        assert len(failure.value.detail) < 1000
    assert time.monotonic() - start < 120  # some seconds; what is caught here would take hours
    assert not hostile.trap(folder).exists()


def test_labels_are_fit_to_print(tmp_path: Path) -> None:
    hostile.REPOSITORIES["label-escapes"][0](tmp_path / "a")
    hostile.REPOSITORIES["label-holes"][0](tmp_path / "b")
    assert load_classifier(tmp_path / "a").labels == ["[31mcat?", "a" * 300, "LABEL_2"]
    assert load_classifier(tmp_path / "b").labels == ["cat", "LABEL_1", "LABEL_2"]


BOMBS = ("billion-units", "many-units", "billion-layers", "header-2-to-60", "million-labels", "huge-shape")


def test_bombs_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    """In a process of its own, so that the peaks are the refusals' and not another test's."""
    program = """
import json, resource, sys, time
from probelog.errors import ItemFailure
from probelog.models.loading import load_classifier
load_classifier(sys.argv[1])
for folder in sys.argv[2:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try: load_classifier(folder)
    except ItemFailure as failure: reason = failure.reason
    seconds = time.process_time() - start
    print(json.dumps([reason, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
    hostile.vit(tmp_path / "warm-up")
    for name in BOMBS:
        hostile.REPOSITORIES[name][0](tmp_path / name)
    output = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "warm-up", *(tmp_path / name for name in BOMBS)],
        capture_output=True, text=True, check=True, cwd=CHECKOUT,
    )  # fmt: skip
    results = dict(zip(BOMBS, map(json.loads, output.stdout.splitlines()), strict=True))
    for name, (reason, seconds, kilobytes) in results.items():
        assert reason == hostile.REPOSITORIES[name][1]
        assert seconds < 2, results
        assert kilobytes < 200_000, results


def test_hostile_pickle_is_not_run_even_when_pickles_are_allowed(tmp_path: Path) -> None:
    hostile.pickled(tmp_path / "r")
    with pytest.raises(ItemFailure) as failure:
        load_classifier(tmp_path / "r", allow_pickle=True)
    assert failure.value.reason is FailureReason.UNSAFE_FORMAT
    assert not hostile.trap(tmp_path / "r").exists()
    # The trap works: an ordinary unpickler falls into it.
    torch.load(tmp_path / "r" / "pytorch_model.bin", weights_only=False)
    assert hostile.trap(tmp_path / "r").exists()


def test_operator_limits(tmp_path: Path) -> None:
    hostile.vit(tmp_path / "r")
    for limits in (LoadLimits(max_parameters=100), LoadLimits(max_logits=2), LoadLimits(max_image_size=15)):
        with pytest.raises(ItemFailure) as failure:
            load_classifier(tmp_path / "r", limits=limits)
        assert failure.value.reason is FailureReason.TOO_LARGE
